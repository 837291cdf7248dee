"""A chat template is rendered as transformers renders it."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, TemplateError
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from edgezo.data.chat_template import JinjaTemplate

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "roles": CHATML,
    "blocks": "  {%- if tools %}\n{{ tools | tojson(indent=2) }}\n  {%- endif %}\n" + CHATML,
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}{% endfor %}",
    "namespace": (
        "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}{{ ns.n }}{{ dict(a='<é>') | tojson }}"
    ),
    "reasoning": "{% for m in messages %}[{{ m.reasoning_content }}|{{ m.thinking }}]{{ m.content }}{% endfor %}",
    "missing": "{% for m in messages %}{{ 'content' in m }}{{ m.name }}{% endfor %}{{ documents }}{{ style }}",
}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": " is it warm? "},
    {"role": "assistant", "content": None, "reasoning": "it is May"},
    {"role": "assistant", "content": "it is <warm>"},
]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "é & <b>"}}]
TOKENS = {"eos_token": "<|im_end|>", "bos_token": "<s>"}


def of_transformers(template: Any) -> Any:
    parts = {
        "chat_template": template,
        "special_tokens_map": TOKENS,
        "__init__": lambda self: None,
    }
    tokenizer = type("Templates", (PreTrainedTokenizerBase,), parts)()
    return lambda turns, **options: tokenizer.apply_chat_template(turns, tokenize=False, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": True}, {"tools": TOOLS, "style": "short"}]
)
def test_texts_are_those_of_transformers(name: str, options: dict[str, Any]) -> None:
    turns = TURNS if name not in ("roles", "blocks") else [TURNS[0], TURNS[2]]
    expected = of_transformers(TEMPLATES[name])(turns, **options)
    assert JinjaTemplate(TEMPLATES[name], TOKENS).render(turns, **options) == expected


def test_of_several_templates_that_for_tools_is_taken() -> None:
    several = {"default": "plain", "tool_use": "tools"}
    for tools in (None, TOOLS):
        expected = of_transformers(several)(TURNS, tools=tools)
        assert JinjaTemplate(several, TOKENS).render(TURNS, tools=tools) == expected
    with pytest.raises(ValueError, match="no chat template"):
        JinjaTemplate({"other": ""}, TOKENS).render(TURNS)


def test_the_time_is_that_of_the_run() -> None:
    template = JinjaTemplate("{{ strftime_now('%d %b %Y') }}", TOKENS)
    template.now = datetime.datetime(2024, 7, 26)
    assert not template.dated
    assert template.render(TURNS) == "26 Jul 2024" and template.dated


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{{ ns.__init__.__globals__ }}",
        "{{ namespace(**{'__class__': 1}) }}",
        "{{ dict.__call__.__globals__ }}",
    ],
)
def test_a_template_does_not_leave_its_sandbox(template: str) -> None:
    with pytest.raises((SecurityError, TemplateError)):
        JinjaTemplate(template, TOKENS).render(TURNS)
    with pytest.raises((SecurityError, TemplateError)):
        of_transformers(template)(TURNS)
