"""What of a conversation is predicted: exactly what the assistant writes behind its header, and its end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from chat_shapes import BOS, EOS, SHAPES, TOKENS, WITH_TOOLS
from tokenizers_fixture import byte_tokenizer

from edgezo.data.chat import ChatTemplates, ChatText
from edgezo.data.dataset import DataRequest, Dataset, load_dataset
from edgezo.data.turns import conversation
from edgezo.errors import UsageError

LEAP_DAY = "2024-02-29T12:00:00"


def tokenizer_of(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"bos_token": BOS, "eos_token": EOS, "additional_special_tokens": list(TOKENS)}
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module", params=[*SHAPES])
def shape(request: pytest.FixtureRequest) -> Iterator[tuple[str, ChatTemplates]]:
    with closing(ChatTemplates(tokenizer_of(SHAPES[request.param][0]), LEAP_DAY)) as templates:
        yield request.param, templates


def turns(text: str) -> list[dict[str, str]]:
    """Turns by their first letters: "u: a question / a: an answer"."""
    roles = {"u": "user", "a": "assistant"}
    pairs = (turn.split(": ", 1) for turn in text.split(" / "))
    return [{"role": roles[letter], "content": content} for letter, content in pairs]


ALTERNATING = (
    "u: q / a: one",
    "u: q / a: one / u: r / a: two / u: s / a: three",
    "u: q / a: a / u: q / a: a",  # the content is a letter of the header, and twice the same
    "u: assistant / a: </s> or <|im_start|>assistant / u: ASSISTANT: / a: ASSISTANT: model",
)
IN_ANY_ORDER = (
    "u: q / a: one / a: two",
    "a: welcome / u: q / a: one",
    "u: q / u: r / a: one / a: one / a: two / u: s / a: three",
)


@pytest.mark.parametrize("text", [*ALTERNATING, *IN_ANY_ORDER])
def test_exactly_the_answers_and_their_ends_are_predicted(
    shape: tuple[str, ChatTemplates], text: str
) -> None:
    name, templates = shape
    _, rendered, any_order = SHAPES[name]
    if text in IN_ANY_ORDER and not any_order:
        pytest.skip("the template refuses such a conversation")
    messages = turns(text)
    chat = templates.render(conversation({"messages": messages}))
    pieces = rendered(messages)
    assert chat.text.rstrip() == "".join(piece for piece, _ in pieces).rstrip()
    assert marked(chat) == [text.strip() for text, predicted in pieces if predicted]
    spoken = sum(message["role"] == "assistant" for message in messages)
    assert chat.rewritten == spoken - sum(predicted for _, predicted in pieces)


def marked(chat: ChatText) -> list[str]:
    return [chat.text[start:stop].strip() for start, stop in chat.spans]


# ---------------------------------------------------------------------------------------------
# Tools

CALL = {"name": "sky", "arguments": {"place": "Bern", "days": 2}}
TOOL = {"name": "sky", "description": "the weather", "parameters": {"type": "object"}}
AS_OPENAI = {
    "id": "call_1",
    "type": "function",
    "function": {**CALL, "arguments": json.dumps(CALL["arguments"])},
}


def with_call(turn: dict[str, Any], answer: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", **turn},
        answer or {"role": "tool", "content": "wet", "tool_call_id": "call_1"},
        {"role": "assistant", "content": "yes"},
    ]


# Spellings of one call, and of one tool.
CALLS = {
    "content null": with_call({"content": None, "tool_calls": [AS_OPENAI]}),
    "content empty": with_call({"content": "", "tool_calls": [AS_OPENAI]}),
    "no content": with_call({"tool_calls": [{"type": "function", "function": CALL}]}),
    "flat": with_call({"content": None, "tool_calls": [CALL]}),
    "a text of JSON": with_call({"content": None, "tool_calls": json.dumps([CALL])}),
    "function_call": with_call(
        {"content": None, "function_call": AS_OPENAI["function"]},
        {"role": "function", "name": "sky", "content": "wet"},
    ),
    "ShareGPT": [
        {"from": "human", "value": "rain?"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "wet"},
        {"from": "gpt", "value": "yes"},
    ],
}
TOOLS = {
    "tools": [{"type": "function", "function": TOOL}],
    "tools as text": json.dumps([{"type": "function", "function": TOOL}]),
    "tools each as text": [json.dumps(TOOL)],
    "functions": [TOOL],
}


@pytest.fixture(scope="module", params=[*WITH_TOOLS])
def tooled(request: pytest.FixtureRequest) -> Iterator[tuple[str, ChatTemplates]]:
    with closing(ChatTemplates(tokenizer_of(WITH_TOOLS[request.param]))) as templates:
        yield request.param, templates


@pytest.mark.parametrize("spelling", CALLS)
def test_a_tool_call_is_predicted_however_it_is_spelled(
    tooled: tuple[str, ChatTemplates], spelling: str
) -> None:
    name, templates = tooled
    field = "conversations" if spelling == "ShareGPT" else "messages"
    chat = templates.render(conversation({field: CALLS[spelling]}))
    called = json.dumps(CALL)
    expected = {
        "mistral v3": [f"[TOOL_CALLS] [{called}]</s>", "yes</s>"],
        "qwen2.5": [f"<tool_call>\n{called}\n</tool_call><|im_end|>", "yes<|im_end|>"],
        "deepseek v3": [
            f"[TOOL_CALLS]sky\n{json.dumps(CALL['arguments'])}<|end_of_sentence|>",
            "yes<|end_of_sentence|>",
        ],
    }
    assert marked(chat) == expected[name]
    assert (chat.unwritten, chat.rewritten) == (0, 0)


@pytest.mark.parametrize("spelling", TOOLS)
def test_tools_go_to_the_template_however_they_are_spelled(
    tooled: tuple[str, ChatTemplates], spelling: str
) -> None:
    name, templates = tooled
    field = "functions" if spelling == "functions" else "tools"
    chat = templates.render(
        conversation({"messages": CALLS["content null"], field: TOOLS[spelling]})
    )
    written = json.dumps({"type": "function", "function": TOOL}) in chat.text
    assert written == ("tools" not in chat.unused) == (name != "deepseek v3")
    assert len(chat.spans) == 2


def test_turns_whose_calls_the_template_leaves_out_are_not_learned(tmp_path: Path) -> None:
    rows = [{"messages": CALLS[s]} for s in ("content null", "content empty", "flat")]
    rows += [{"messages": with_call({"content": "let me look", "tool_calls": [CALL]})}]
    data = load(rows, tmp_path, SHAPES["chatml"][0].replace("m['content']", "(m.content or '')"))
    assert set(predicted(data)) == {"yes<|im_end|>"}
    assert said(data, "does not write their tool calls: 4, the first in rows.jsonl:1")


# ---------------------------------------------------------------------------------------------
# Rows, from file to tokens


def load(rows: list[dict[str, Any]], folder: Path, template: str = SHAPES["chatml"][0]) -> Dataset:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(DataRequest(data=str(file)), tokenizer_of(template))


def predicted(data: Dataset) -> list[str]:
    """What is predicted in each row."""
    tokenizer = tokenizer_of("")
    return [
        str(tokenizer.decode(list(example.rows[0].score_ids)))
        for example in (*data.train, *data.validation)
    ]


def said(data: Dataset, what: str) -> bool:
    return any(what in note for note in data.notes)


def test_a_turn_without_weight_is_context(tmp_path: Path) -> None:
    rows = []
    for key, value in product(
        ("weight", "train", "training", "loss"), (0, 0.0, False, "0", "false")
    ):
        question, bad, again, good = turns("u: q / a: BAD / u: again / a: good")
        rows.append({"messages": [question, {**bad, key: value}, again, {**good, key: True}]})
    assert predicted(load(rows, tmp_path)) == ["good<|im_end|>"] * len(rows)


def test_rows_without_a_turn_to_learn_are_left_out_and_others_are_refused(tmp_path: Path) -> None:
    silent = turns("u: q / a: BAD")
    silent[1]["weight"] = 0
    good = {"messages": turns("u: q / a: good")}
    data = load([{"messages": silent}, good, good], tmp_path)
    assert predicted(data) == ["good<|im_end|>"] * 2
    assert said(data, "has the weight 0: 1, the first in rows.jsonl:1")
    asked = turns("u: q / a: good")
    asked[0]["train"] = True
    assert said(load([{"messages": asked}] * 2, tmp_path), "another role than assistant")
    for weight in (0.5, 2, "half", "NaN"):
        half = turns("u: q / a: half")
        half[1]["weight"] = weight
        with pytest.raises(UsageError, match=r"(?s)'weight' of a turn is .*rows\.jsonl:2"):
            load([good, {"messages": half}, good], tmp_path)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"messages": turns("u: q")}, "its roles: user"),
        ({"messages": [{"role": "system", "content": "be kind"}]}, "its roles: system"),
        ({"messages": [{"role": "user", "content": None}]}, "content of a turn of 'user'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of a turn of 'user'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]},
            "part of the type 'image'",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "is not a text"),
        ({"messages": with_call({"content": None, "tool_calls": ["sky"]})}, "a tool call is not"),
        ({"messages": turns("u: q / a: b"), "tools": ["sky"]}, "a tool is not"),
        ({"messages": turns("u: q / a: b"), "tools": "{not JSON"}, "a tool is not"),
        *(
            ({"conversations": [{"from": "human", "value": "q"}, call]}, "a tool call is not")
            for value in ("{}", "[]", "", "sky()")
            for call in [{"from": "function_call", "value": value}]
        ),
        ({"conversations": [{"from": "human", "value": "q"}]}, "its roles: user"),
    ],
)
def test_turns_that_cannot_be_used_are_refused_by_row(
    row: dict[str, Any], what: str, tmp_path: Path
) -> None:
    good = {next(iter(row)): turns("u: q / a: b")}
    with pytest.raises(UsageError) as caught:
        load([good, row, good], tmp_path)
    assert what in str(caught.value) and "rows.jsonl:2" in str(caught.value)


def test_parts_are_joined_as_the_template_joins_them(tmp_path: Path) -> None:
    of_parts = SHAPES["chatml"][0].replace(
        "m['content']",
        "(m['content'] if m['content'] is string else m['content'] | map(attribute='text') | join(' + '))",
    )
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer = {"role": "assistant", "content": parts}
    row = {"messages": [{"role": "user", "content": ["one part"]}, answer]}
    assert predicted(load([row] * 2, tmp_path, of_parts)) == ["one + two<|im_end|>"] * 2
    assert predicted(load([row] * 2, tmp_path)) == ["one\ntwo<|im_end|>"] * 2


def test_sharegpt_and_openai_rows_are_the_same_rows(tmp_path: Path) -> None:
    messages = turns("u: q / a: one / u: r / a: two")
    names = {"user": "human", "assistant": "gpt"}
    shared = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    data = [
        load([{field: value}] * 2, tmp_path)
        for field, value in (
            ("messages", messages),
            ("conversations", shared),
            ("messages", json.dumps(messages)),  # as a CSV cell has them
            (
                "messages",
                [{**m, "name": None, "tool_calls": None, "weight": None} for m in messages],
            ),
        )
    ]
    assert all(other == data[0] for other in data)
    assert predicted(data[0]) == ["one<|im_end|>two<|im_end|>"] * 2


def test_of_a_prompt_of_turns_nothing_is_learned(tmp_path: Path) -> None:
    asked, answered = turns("u: q / a: one / u: r"), turns("a: two")
    rows = [{"prompt": asked, "completion": answered, "tools": [TOOL]}] * 2
    data = load(rows, tmp_path)
    assert predicted(data) == ["two<|im_end|>"] * 2 and said(data, "'tools' the model's")
    with pytest.raises(UsageError, match="not a list of turns"):
        load([*rows, {"prompt": asked, "completion": "two"}], tmp_path)


def test_what_a_template_does_not_use_of_a_row_is_counted(tmp_path: Path) -> None:
    messages = turns("u: q / a: one")
    messages[1]["reasoning_content"] = "hm"
    row = {"messages": messages, "tools": [TOOL], "source": "web", "id": 7}
    data = load([row, row, {"messages": messages}], tmp_path)
    assert said(data, "'reasoning_content' the model's chat template does not use: 3")
    assert said(data, "'tools' the model's chat template does not use: 2")
    assert said(data, "fields that nothing uses, and their rows: 'source' (2), 'id' (2)")
    used = load([row] * 2, tmp_path, SHAPES["qwen3"][0])
    assert predicted(used) == ["<think>\nhm\n</think>\n\none<|im_end|>"] * 2
    assert not said(used, "reasoning_content")
    thinking = turns("u: q / a: <think>hm</think>one")
    dropped = load([{"messages": thinking}] * 2, tmp_path, SHAPES["deepseek"][0])
    assert predicted(dropped) == ["one<|end_of_sentence|>"] * 2
    assert said(dropped, "leaves out a part: 2")


def test_variables_of_a_row_reach_the_template(tmp_path: Path) -> None:
    template = SHAPES["chatml"][0] + "{% if quiet %}{{ raise_exception('hush') }}{% endif %}"
    row = {"messages": turns("u: q / a: one")}
    assert predicted(load([row] * 2, tmp_path, template)) == ["one<|im_end|>"] * 2
    with pytest.raises(UsageError, match="hush"):
        load([row | {"chat_template_kwargs": {"quiet": True}}] * 2, tmp_path, template)
    # None of them takes the place of what edgezo gives.
    taken = row | {"chat_template_kwargs": {"tokenize": True, "conversation": [], "padding": 1}}
    data = load([taken] * 2, tmp_path)
    assert predicted(data) == ["one<|im_end|>"] * 2 and said(data, "'tokenize'")


def test_turns_that_are_written_in_another_way_later_are_counted(tmp_path: Path) -> None:
    rows = [{"messages": turns("u: q / a: one / u: r / a: two")}] * 3
    data = load(rows, tmp_path, SHAPES["the last turn thinks"][0])
    assert predicted(data) == ["<think></think>two</s>"] * 3
    assert said(data, "once more turns follow: 3, the first in rows.jsonl:")


def test_a_template_is_given_one_time_for_all_rows(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + SHAPES["chatml"][0]
    file = tmp_path / "rows.jsonl"
    file.write_text(2 * (json.dumps({"messages": turns("u: q / a: one")}) + "\n"))
    asked = DataRequest(data=str(file), written_at=LEAP_DAY)
    data = load_dataset(asked, tokenizer_of(template))
    text = tokenizer_of("").decode(list(data.train[0].rows[0].ids))
    assert text.startswith("29 Feb 2024 12:00:00<|im_start|>") and data.written_at == LEAP_DAY
    plain = load_dataset(asked, tokenizer_of(SHAPES["chatml"][0]))
    assert plain.written_at is None
