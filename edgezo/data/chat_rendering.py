"""Conversations rendered by a chat template: a process of its own, started by chat.py.

A template is a program of a model's authors, which may loop for ever or write without end. Here it may: the kernel
bounds the memory and the processor time of this process, whatever the template does in Python or in C, and the caller
only loses this process. A line of JSON with the template comes first; then each line is a conversation, answered by a
line with its text and where the assistant's turns are in it.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from edgezo.machine.children import address_space_bytes, limit_memory
from edgezo.machine.foreign import clip

Messages = list[dict[str, Any]]
Render = Callable[..., str]  # (messages, add_generation_prompt=False) -> text

# What a conversation may take: memory beside the libraries, and processor time (a usual one takes a millisecond); and
# for each of its characters, so that a long one has as much more as an honest template needs.
ROOM_BYTES, ROOM_TIMES = 256_000_000, 16
MOST_CPU_S, CHARS_A_S = 1.0, 10_000_000
MEAN_CPU_S = 0.05  # of all conversations so far
# Characters that a template may write for each character of a conversation, and for none: a system prompt, and marks
# around each turn.
MOST_TIMES, MOST_MORE = 16, 1_000_000


def main() -> None:
    """Answer the conversations on standard input until it ends."""
    settings = json.loads(sys.stdin.readline())
    render = _template(settings["template"], settings["special_tokens"])
    size_bytes, begun_s, allowed_s = address_space_bytes(), time.process_time(), MOST_CPU_S
    _answer({})
    for line in sys.stdin:
        room_bytes = ROOM_BYTES + ROOM_TIMES * len(line)
        limit_memory(size_bytes + room_bytes)
        _count_cpu(most_cpu_s(len(line)))
        try:
            messages = json.loads(line)
            allowed_s += mean_cpu_s(len(line), len(messages))
            answer = _rendered(messages, len(line), render)
        except MemoryError:
            answer = _over(f"it takes more than {room_bytes // 1_000_000}MB for one row")
        except Exception as error:  # a template is a program, which can fail in any way
            answer = {"error": clip(str(error) or type(error).__name__, 300)}
        if time.process_time() - begun_s > allowed_s:
            answer = _over(f"it takes more than {MEAN_CPU_S:g} s of processor time a row")
        _answer(answer)
        _count_cpu(0)


def _over(why: str) -> dict[str, Any]:
    """The answer that ends the rendering: the template goes beyond a bound."""
    return {"error": why, "over": True}


def most_cpu_s(size: int) -> float:
    """Processor time that a conversation of ``size`` characters may take, in seconds."""
    return MOST_CPU_S + size / CHARS_A_S


def mean_cpu_s(size: int, turns: int) -> float:
    """Processor time that conversations may take in the mean: each turn is found by rendering all turns before it."""
    return min(most_cpu_s(size), MEAN_CPU_S + size * turns / CHARS_A_S)


def _template(template: Any, special_tokens: dict[str, str]) -> Render:
    """What renders with this template: ``apply_chat_template`` of transformers, without the rest of a tokenizer."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    parts = {
        "chat_template": template,
        "special_tokens_map": special_tokens,
        "__init__": lambda self: None,
    }
    tokenizer = type("Templates", (PreTrainedTokenizerBase,), parts)()

    def render(messages: Messages, **options: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    return render


def _rendered(messages: Messages, size: int, render: Render) -> dict[str, Any]:
    """The answer to a conversation that took ``size`` characters."""
    text = render(messages)
    if len(text) > MOST_TIMES * size + MOST_MORE:
        raise ValueError(f"it writes {len(text):,} characters for a row of {size:,}")
    return {"text": text, "spans": spans(messages, text, render)}


def spans(messages: Messages, text: str, render: Render) -> list[tuple[int, int]]:
    """Where in ``text``, the rendered messages, the assistant's turns are: (start, stop) of each.

    A turn's text is what the template adds when the turn is appended. Some templates write earlier turns in another way
    once more turns follow; then only the last turn and those that stay as they were are there.
    """
    places = []
    for index in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
        before = render(messages[:index], add_generation_prompt=True)
        after = render(messages[: index + 1]).rstrip()
        if text.startswith(after) and after.startswith(before):
            places.append((len(before), len(after)))
        elif index == len(messages) - 1:  # the last turn begins where the two renderings part
            before = render(messages[:index])
            start = next(
                (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
                min(len(before), len(after)),
            )
            places.append((start, len(after)))
    return [place for place in places if place[0] < place[1]]


def _count_cpu(seconds: float) -> None:
    """Let the kernel end this process after so much processor time from now on; 0: not at all."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
