"""Chat templates write what transformers writes, and one without end is ended."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Bench
from tokenizers_fixture import byte_tokenizer

from edgezo.data.chat import ChatTemplates, TemplateFails
from edgezo.data.chat_spans import spans
from edgezo.data.turns import Conversation

# ---------------------------------------------------------------------------------------------
# Chat templates

# Real ones, in their shapes: ChatML, with a default system prompt, Llama 2, Llama 3, Gemma, Zephyr, and one that writes
# earlier turns in another way.
TEMPLATES = {
    "chatml": """
{%- for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "smollm2": """
{%- for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "llama2": """
{%- if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{%- set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}
{%- set system_message = false %}{% endif %}{% for message in loop_messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if loop.index0 == 0 and system_message != false %}
{%- set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}
{%- set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{- ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "llama3": """
{%- set loop_messages = messages %}{% for message in loop_messages %}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>

'+ message['content'] | trim + '<|eot_id|>' %}
{%- if loop.index0 == 0 %}{% set content = (bos_token or '') + content %}{% endif %}{{ content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}""",
    "gemma": """
{%- for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}
{%- set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}""",
    "zephyr": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "thinking": """
{%- set ns = namespace(last=-1) %}{% for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>

</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}{{ {'a': [1, 'ü']} | tojson if false }}""",
}
CONVERSATIONS = [
    [{"role": r, "content": c} for r, c in turns]
    for turns in (
        [("user", "a film"), ("assistant", "good")],
        [("system", "be short"), ("user", "naïve ☃ \U0001f600 <|im_end|>"), ("assistant", " x\n")],
        [("user", "1"), ("assistant", "2"), ("user", ' "3" '), ("assistant", "4"), ("user", "5")],
        [("user", "{{ messages }}"), ("assistant", "{% raw %}"), ("user", ""), ("assistant", "6")],
        [("assistant", "first")],
    )
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_writes_what_transformers_writes(name: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    tokenizer.bos_token = "<|endoftext|>"

    def render(messages: list[dict[str, Any]], **options: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    with closing(ChatTemplates(tokenizer)) as templates:
        for messages in CONVERSATIONS:
            try:
                text = render(messages)
                expected = spans(messages, text, render, ["<|endoftext|>", "<|im_end|>"])
            except Exception as error:
                with pytest.raises(TemplateFails) as caught:
                    templates.render(asked(messages))
                assert str(error) in str(caught.value) and not caught.value.over
            else:
                chat = templates.render(asked(messages))
                assert (chat.text, chat.spans) == (text, expected.places)
                assert chat.rewritten == expected.rewritten


def asked(messages: list[dict[str, Any]]) -> Conversation:
    """The messages as they are, each turn of the assistant to be learned."""
    learned = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return Conversation(messages, learned, {}, ())


ENDLESS = {
    "a long string": "{{ 'x' * 3000000000 }}",
    "doubled": "{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "joined": "{{ range(99999)|join('x' * 100000) }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "more text than the row": "{{ 'x' * 2000000 }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_ended(name: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ENDLESS[name]
    with closing(ChatTemplates(tokenizer)) as templates, pytest.raises(TemplateFails) as caught:
        templates.render(asked(CONVERSATIONS[0]))
    assert any(s in str(caught.value) for s in ("for one row", "characters for a row"))


def test_a_row_that_ends_its_template_is_named_and_no_other_is_tried(
    bench: Bench, edgezo: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in bench.model.iterdir():
        (model / file.name).symlink_to(file)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "chat_template.jinja").write_text("{{ 'x' * 3000000000 }}")
    changes = {"model": model, "out": tmp_path / "run", "max_mem_bytes": 10**9}
    code, out, err = edgezo("finetune", *bench.arguments("messages", **changes))
    assert (code, out) == (2, "") and "messages.jsonl:1: it takes more than 256MB" in err
    assert "in all" not in err and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------
