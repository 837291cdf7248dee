"""Conversations as people write them become conversations as chat templates take them.

messages: [{"role", "content"}]          OpenAI's form, which chat templates are written for
prompt, completion: each of turns        TRL's form, of which only the completion is learned
conversations: [{"from", "value"}]       ShareGPT's form
instruction, input, output               and other rows that foreign_turns.py reads
content: [{"type": "text", "text"}]      parts, of which only text is read
tools, functions; tool_calls, function_call    also as texts of JSON
weight, train, training, loss            whether a turn is learned: 1 or 0
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from edgezo.data.foreign_turns import (
    ALPACA,
    EXPORTED,
    MORE_OF_ALPACA,
    foreign_turns,
    is_alpaca,
    is_exported,
)
from edgezo.machine.foreign import clip, parse_json

TURN_FIELDS = ("messages", "conversations")  # a row's turns are in the first of these that it has,
ASKED, ANSWERED = "prompt", "completion"  # or in these, of which only the second is learned
TOOLS = ("tools", "functions")
VARIABLES = "chat_template_kwargs"  # of the template, by name
OF_TEMPLATE = (*TOOLS, VARIABLES)
USED = (*TURN_FIELDS, ASKED, ANSWERED, *OF_TEMPLATE, *ALPACA, *MORE_OF_ALPACA, *EXPORTED)
WEIGHTS = ("weight", "train", "training", "loss")
# What other formats call the roles.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLS = ("function_call", "tool_call")  # roles whose content is a call
_NO_CALL = 'a tool call is not {"type": "function", "function": {"name": ..., "arguments": ...}}'
READ_PARTS = (None, "text", "input_text", "output_text")


class Conversation(NamedTuple):
    """A row's turns up to the last one that is learned."""

    messages: list[dict[str, Any]]  # a content of parts is a list of texts
    learned: list[int]  # the turns of the assistant that are learned
    variables: dict[str, Any]  # of the template: tools, for example
    remarks: tuple[str, ...]  # what the user should know of it


class NothingToLearn(ValueError):
    """A row is in order, but all of the assistant's turns are left out of the loss."""


def conversation(fields: Mapping[str, Any]) -> Conversation:
    """The turns of a row.

    Raises ValueError with what is wrong with them, and NothingToLearn where their weights leave none to learn.
    """
    turns = _turns(fields)
    if turns == [] and is_exported(fields):
        raise NothingToLearn("a conversation has no answer")
    if not isinstance(turns, list) or not turns:
        raise ValueError("not a list of turns")
    remarks, learned = list[str](), list[int]()
    messages = [_message(turn) for turn in turns]
    for index, (turn, message) in enumerate(zip(turns, messages, strict=True)):
        wanted = _wanted(turn)
        if message["role"] != "assistant":
            if wanted:
                remarks.append(
                    "turns of another role than assistant have a weight: they are not learned"
                )
        elif not _says_something(message):
            if wanted is not False:
                remarks.append("turns of the assistant without text are not learned")
        elif wanted is not False:
            learned.append(index)
    if not learned and is_exported(fields):
        raise NothingToLearn("a conversation has no answer")
    _check_learned(messages, learned)
    last = learned[-1]
    return Conversation(messages[: last + 1], learned, _variables(fields), tuple(remarks))


def has_turns(fields: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation."""
    return any(name in fields for name in TURN_FIELDS) or (
        (isinstance(fields.get(ASKED), list) and isinstance(fields.get(ANSWERED), list))
        or is_alpaca(fields)
        or is_exported(fields)
    )


def _turns(fields: Mapping[str, Any]) -> Any:
    """The turns of a row as they are written; those of a prompt are not learned."""
    if any(name in fields for name in TURN_FIELDS):
        return _read(_first(fields, TURN_FIELDS))
    asked, answered = fields.get(ASKED), fields.get(ANSWERED)
    if not isinstance(asked, list) or not isinstance(answered, list):
        return foreign_turns(fields)
    context = [{**turn, WEIGHTS[0]: 0} if isinstance(turn, dict) else turn for turn in asked]
    return [*context, *answered]


def _check_learned(messages: list[dict[str, Any]], learned: list[int]) -> None:
    if learned:
        return
    roles = ", ".join(dict.fromkeys(clip(message["role"], 40) for message in messages))
    if not any(m["role"] == "assistant" and _says_something(m) for m in messages):
        raise ValueError(
            f"no assistant turn with text, so there is nothing to learn (its roles: {roles})"
        )
    raise NothingToLearn("every turn of the assistant has the weight 0")


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """The first of the fields that a row has; None if it has none."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _read(value: Any) -> Any:
    """A value, or what it spells where it is a text of JSON."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError:
        return value


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content", "")
    texts = content if isinstance(content, list) else [content]
    return bool(message.get("tool_calls")) or any(text.strip() for text in texts)


# -- one turn ---------------------------------------------------------------------------------------------


def _message(turn: Any) -> dict[str, Any]:
    """A turn as chat templates take it. Raises ValueError."""
    if not isinstance(turn, dict):
        raise ValueError('a turn is not {"role": ..., "content": ...}')
    if "role" not in turn and isinstance(turn.get("from"), str):
        turn = {"role": turn["from"], "content": turn.get("value")} | {
            k: v for k, v in turn.items() if k not in ("from", "value")
        }
    role = turn.get("role")
    if not isinstance(role, str):
        raise ValueError('a turn is not {"role": ..., "content": ...}')
    made_here = {"role", "content", "tool_calls", "function_call", *WEIGHTS}
    # Keys without a value are left out, as transformers does: files of one schema write every key in every turn.
    message = {k: v for k, v in turn.items() if v is not None and k not in made_here}
    calls = _calls(turn, role)
    content = None if role in CALLS else _content(turn.get("content"), role)
    if role in CALLS and not calls:
        raise ValueError(_NO_CALL)
    if content is None and not calls:
        raise ValueError(f"the content of a turn of {clip(role, 40)!r} is not a text")
    message = {"role": ROLES.get(role, role)} | message
    if content is not None:
        message["content"] = content
    return message | ({"tool_calls": calls} if calls else {})


def _content(value: Any, role: str) -> str | list[str] | None:
    """The text of a turn, or the texts of its parts; None where it has none."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    texts = []
    for part in value:
        if isinstance(part, dict) and part.get("type") not in READ_PARTS:
            raise ValueError(
                f"a turn of {clip(role, 40)!r} has a part of the type {clip(str(part['type']), 40)!r}, and only text "
                "is read"
            )
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise ValueError(f"a part of a turn of {clip(role, 40)!r} is not a text")
        texts.append(text)
    return texts[0] if len(texts) == 1 else texts


def _calls(turn: Mapping[str, Any], role: str) -> list[dict[str, Any]]:
    """The tool calls of a turn, each as {"type", "function": {"name", "arguments"}}; [] if it has none."""
    if role in CALLS:
        calls = _read(turn.get("content"))
    else:
        calls = _read(turn.get("tool_calls")) or _read(turn.get("function_call"))
    if not calls:
        return []
    every = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    if not every or None in every:
        raise ValueError(_NO_CALL)
    return [call for call in every if call is not None]


def _call(value: Any) -> dict[str, Any] | None:
    """A call with its arguments as an object wherever they are one; None where it is no call."""
    call = _read(value)
    if not isinstance(call, dict):
        return None
    outer, function = ({}, call) if "function" not in call else (call, _read(call["function"]))
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments", function.get("parameters"))
    read = {} if arguments is None else _read(arguments)
    function = {
        "name": function["name"],
        "arguments": read if isinstance(read, dict) else arguments,
    }
    kept = {k: v for k, v in outer.items() if v is not None}
    return {"type": "function"} | kept | {"function": function}


def _wanted(turn: Mapping[str, Any]) -> bool | None:
    """Whether a turn asks to be learned; None if it says nothing. Raises ValueError for another value than 1 and 0."""
    asked = None
    for name in WEIGHTS:
        value = turn.get(name)
        if value is None:
            continue
        text = str(value).strip().lower()
        number = {"true": 1.0, "false": 0.0}.get(text)
        if number is None:
            try:
                number = float(text)
            except ValueError:
                number = math.nan
        if number not in (0, 1):
            raise ValueError(
                f"the field {name!r} of a turn is {clip(json.dumps(value), 40)}: a turn is learned (1, true) or not "
                "(0, false), and nothing in between"
            )
        asked = bool(number) and asked is not False
    return asked


# -- the variables of a template --------------------------------------------------------------------------


def _variables(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The variables that a row gives to the template. Raises ValueError."""
    given = _read(_first(fields, (VARIABLES,)))
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"{VARIABLES!r} is not an object of variables")
    variables = {str(name): value for name, value in (given or {}).items()}
    if tools := _read(_first(fields, TOOLS)):
        every = [_tool(tool) for tool in (tools if isinstance(tools, list) else [tools])]
        if None in every:
            raise ValueError('a tool is not {"type": "function", "function": {"name": ...}}')
        variables["tools"] = every
    return variables


def _tool(value: Any) -> dict[str, Any] | None:
    """A tool as templates take it; None where it is none."""
    tool = _read(value)
    if not isinstance(tool, dict):
        return None
    if isinstance(tool.get("name"), str) and "function" not in tool:
        return {"type": "function", "function": tool}
    function = tool.get("function")
    return tool if isinstance(function, dict) and isinstance(function.get("name"), str) else None
