"""Chat templates in the shapes of published ones, each with a rendering by hand that says what is predicted.

A rendering is a list of (text, predicted): predicted is what the assistant writes behind its header, and its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
Pieces = list[tuple[str, bool]]

# Texts that the tokenizer of the tests has as one token each.
TOKENS = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>"),
    *("<|endoftext|>", "<|user|>", "<|assistant|>", "<|start_of_role|>", "<|end_of_role|>"),
    *("<|end_of_text|>", "<|User|>", "<|Assistant|>", "<|end_of_sentence|>", "[INST]", "[/INST]"),
    *("<|END_OF_TURN_TOKEN|>", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</think>"),
)
BOS, EOS = "<s>", "</s>"


def in_turns(
    header: Callable[[Message], str],
    end: str,
    gap: str = "",
    start: str = "",
    stop: str = "",
    user_end: str | None = None,
) -> Callable[[list[Message]], Pieces]:
    """A rendering of turns that do not depend on each other: header, content, end, and a gap that nobody predicts."""

    def rendered(messages: list[Message]) -> Pieces:
        pieces = [(start, False)]
        for message in messages:
            spoken = message["role"] == "assistant"
            end_here = end if spoken or user_end is None else user_end
            pieces += [
                (header(message), False),
                (message["content"] + end_here, spoken),
                (gap, False),
            ]
        return [*pieces, (stop, False)]

    return rendered


def mistral(messages: list[Message]) -> Pieces:
    pieces = [(BOS, False)]
    for message in messages:
        if message["role"] == "user":
            pieces += [(f"[INST] {message['content']} [/INST]", False)]
        else:
            pieces += [(f" {message['content']}{EOS}", True)]
    return pieces


def qwen3(messages: list[Message]) -> Pieces:
    """Only behind the last question an answer has its thoughts, empty ones too; others are another text there."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    pieces: Pieces = []
    for index, message in enumerate(messages):
        pieces += [(f"<|im_start|>{message['role']}\n", False)]
        if message["role"] != "assistant":
            pieces += [(f"{message['content']}<|im_end|>\n", False)]
            continue
        thoughts = message.get("reasoning_content", "")
        shown = f"<think>\n{thoughts}\n</think>\n\n" if index > last else ""
        pieces += [(f"{shown}{message['content']}<|im_end|>", index > last), ("\n", False)]
    return pieces


def deepseek(messages: list[Message]) -> Pieces:
    """The prompt for an answer ends with <think>, which no answer has."""
    pieces = [(BOS, False)]
    for message in messages:
        if message["role"] == "user":
            pieces += [(f"<|User|>{message['content']}", False)]
        elif message["role"] == "assistant":
            pieces += [("<|Assistant|>", False), (f"{message['content']}<|end_of_sentence|>", True)]
    return pieces


def last_thinks(messages: list[Message]) -> Pieces:
    pieces: Pieces = []
    for index, message in enumerate(messages):
        spoken = message["role"] == "assistant"
        last = spoken and index == len(messages) - 1
        content = ("<think></think>" if last else "") + message["content"] + EOS
        pieces += [(f"<s>{message['role']} ", False), (content, last)]
    return pieces


def im_header(message: Message) -> str:
    return f"<|im_start|>{message['role']}\n"


# name -> (template, rendering, whether two turns of a role, or an answer that comes first, are allowed)
SHAPES: dict[str, tuple[str, Callable[[list[Message]], Pieces], bool]] = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        in_turns(im_header, "<|im_end|>", "\n"),
        True,
    ),
    "chatml without a prompt": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}",
        in_turns(im_header, "<|im_end|>", "\n"),
        True,
    ),
    "smollm3": (  # its generation blocks have the headers in them
        "{{ '<|im_start|>system\n## Metadata\n' + 'Today: ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        in_turns(
            im_header,
            "<|im_end|>",
            "\n",
            start="<|im_start|>system\n## Metadata\nToday: 29 February 2024<|im_end|>\n",
        ),
        True,
    ),
    "llama3": (
        "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] "
        "| trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = '<|begin_of_text|>' + c %}{% endif %}{{ c }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        in_turns(
            lambda m: f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n",
            "<|eot_id|>",
            start="<|begin_of_text|>",
        ),
        True,
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        in_turns(
            lambda m: f"<start_of_turn>{'model' if m['role'] == 'assistant' else m['role']}\n",
            "<end_of_turn>",
            "\n",
            start=BOS,
        ),
        False,
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}",
        mistral,
        False,
    ),
    "phi3": (  # a text ends with another token than a turn
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        in_turns(lambda m: f"<|{m['role']}|>\n", "<|end|>", "\n", stop="<|endoftext|>"),
        True,
    ),
    "zephyr": (
        "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        in_turns(lambda m: f"<|{m['role']}|>\n", EOS, "\n"),
        True,
    ),
    "tulu": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token }}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        in_turns(lambda m: f"<|{m['role']}|>\n", EOS, "\n", user_end=""),
        True,
    ),
    "granite": (
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n' }}"
        "{% endif %}{% for m in messages %}"
        "{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
        "{% endfor %}",
        in_turns(
            lambda m: f"<|start_of_role|>{m['role']}<|end_of_role|>",
            "<|end_of_text|>",
            "\n",
            start="<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n",
        ),
        True,
    ),
    "vicuna": (
        "{{ 'A chat. ' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        in_turns(
            lambda m: "USER: " if m["role"] == "user" else "ASSISTANT: ",
            EOS,
            start="A chat. ",
            user_end=" ",
        ),
        True,
    ),
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
        "{% else %}{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + '<|end_of_sentence|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        deepseek,
        True,
    ),
    "qwen3": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}"
        "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        qwen3,
        True,
    ),
    "the last turn thinks": (
        "{% for m in messages %}<s>{{ m['role'] }} {% if loop.last and m['role'] == 'assistant' %}<think></think>"
        "{% endif %}{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}",
        last_thinks,
        True,
    ),
}

# Mistral v3 and Qwen2.5, in short: where tools stand, and how calls and their results are written.
WITH_TOOLS = {
    "mistral v3": (
        "{{ bos_token }}{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% if tools and loop.index0 == ns.last %}{{ '[AVAILABLE_TOOLS]' + tools | tojson }}{% endif %}"
        "{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.tool_calls is defined %}"
        "{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ ']' + eos_token }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
    ),
    "qwen2.5": (
        "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% endif %}{% for m in messages %}{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) }}"
        "{% if m.content %}{{ '\n' + m.content }}{% endif %}{% for c in m.tool_calls or [] %}"
        "{{ '\n<tool_call>\n' + c.function | tojson + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "deepseek v3": (  # arguments as text, and a call only in a turn without a content
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'tool' %}"
        "{{ '[TOOL_RESULTS]' + m.content }}{% elif m.content is not defined %}{{ '<|Assistant|>' }}"
        "{% for c in m.tool_calls %}{{ '[TOOL_CALLS]' + c.function.name + '\n' + c.function.arguments }}{% endfor %}"
        "{{ '<|end_of_sentence|>' }}{% else %}{{ '<|Assistant|>' + m.content + '<|end_of_sentence|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
    ),
}
