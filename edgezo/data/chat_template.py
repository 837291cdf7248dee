"""A chat template is rendered by jinja2's sandbox, as transformers' ``apply_chat_template`` renders it.

So no engine needs transformers for conversations. tests/data/test_chat_template.py compares the two.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Variables that ``apply_chat_template`` takes for itself: a template gets none of them from a row.
RESERVED = {
    *("conversation", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length"),
    *(
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "kwargs",
    ),
}
# Names that the reasoning of a turn is passed under. The first is the one that templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class JinjaTemplate:
    """A template, or several by their names, with the tokenizer's special tokens as variables."""

    def __init__(self, template: str | Mapping[str, str] | None, special_tokens: Mapping[str, Any]):
        self._given, self._special_tokens = template, dict(special_tokens)
        self.now: datetime.datetime | None = None  # the time that templates find; None: the clock's
        self.dated = False  # a template has asked for the time
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of messages. Raises what the template raises, which is a program, and ValueError without one."""
        if not messages:
            raise ValueError("a conversation without a message")
        for tool in tools or ():
            if not isinstance(tool, dict):
                raise ValueError("tools are JSON schemas, one object each")
        for document in documents or ():
            if not isinstance(document, dict):
                raise TypeError("documents are objects with 'title' and 'text'")
        turns = [
            _with_reasoning({k: v for k, v in message.items() if v is not None})
            for message in messages
        ]
        return self._template(self._text(tools)).render(
            messages=turns,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **{**self._special_tokens, **variables},
        )

    def _text(self, tools: Sequence[Any] | None) -> str:
        """The template for a conversation with these tools."""
        given = self._given
        if isinstance(given, str):
            return given
        names = ("tool_use", "default") if tools is not None else ("default",)
        if given is None or not any(name in given for name in names):
            raise ValueError("there is no chat template, or none of several that is the default")
        return next(given[name] for name in names if name in given)

    def _template(self, text: str) -> jinja2.Template:
        if text not in self._compiled:
            self._compiled[text] = self._environment.from_string(text)
        return self._compiled[text]

    @cached_property
    def _environment(self) -> ImmutableSandboxedEnvironment:
        made = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        made.filters["tojson"] = _to_json
        made.globals["raise_exception"] = _raise
        made.globals["strftime_now"] = self._strftime_now
        made.globals["dict"] = _Dict()
        made.globals["namespace"] = _Namespace
        return made

    def _strftime_now(self, form: str) -> str:
        self.dated = True
        return (self.now or datetime.datetime.now()).strftime(form)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A turn with its reasoning under the names that templates read."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generation(Extension):
    """``{% generation %}``: what the assistant writes; here it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """``dict`` without the attributes of Python's."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace``, which takes no name that begins with an underscore: such a one could lead out of the sandbox."""

    def __init__(*args: Any, **values: Any) -> None:
        this, *given = args  # so that a template may have a variable "self"
        made = dict(*given, **values)
        for name in made:
            _check_name(name)
        Namespace.__init__(this, made)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no place for {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that jinja2's own filter writes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise TemplateError(message)
