"""Tokens without a row in the model: found when the data is opened, wherever a forward or a loss would use them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from conftest import Bench, make_model, write_rows

from edgezo.errors import EdgezoError, UsageError
from edgezo.plan.request import make_config
from edgezo.run.session import Opened, open_request

OUTSIDE = "<|outside|>"


@pytest.fixture
def outside(bench: Bench, tmp_path: Path) -> Callable[..., Bench]:
    """The bench with a token that the model has no row for; ``roles`` name it."""

    def make(family: str = "llama", tied: bool = True, **roles: Any) -> Bench:
        path = make_model(tmp_path / "model", family, tie_word_embeddings=tied)
        tokens = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        used = {t["id"] for t in tokens["added_tokens"]} | set(tokens["model"]["vocab"].values())
        number = max(used) + 1
        assert number == json.loads((path / "config.json").read_text())["vocab_size"]
        switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokens["added_tokens"].append(
            {"id": number, "content": OUTSIDE, **switches, "special": True}
        )
        (path / "tokenizer.json").write_text(json.dumps(tokens), encoding="utf-8")
        settings = json.loads((path / "tokenizer_config.json").read_text()) | roles
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        return replace(bench, model=path)

    return make


def opened(bench: Bench, kind: str, **changes: Any) -> Opened:
    return open_request(make_config(bench.settings(kind, **changes)))


def rows_of(folder: Path, kind: str) -> dict[str, Any]:
    """Rows of a kind with the token in a text, a target or an option."""
    rows: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "text": ([{"text": f"it is {OUTSIDE} now"}] * 4, {}),
        "prompt": ([{"prompt": f"it {OUTSIDE}", "completion": " is"}] * 4, {}),
        "target": ([{"prompt": "it", "completion": f" is {OUTSIDE}"}] * 4, {}),
        "option": (
            [{"text": "it", "label": at % 2} for at in range(4)],
            {"template": "{text} is", "labels": f"0=no good,1=no {OUTSIDE}"},
        ),
        "turn": (
            [
                {
                    "messages": [
                        {"role": "user", "content": "it"},
                        {"role": "assistant", "content": f"is {OUTSIDE}"},
                    ]
                }
            ]
            * 4,
            {},
        ),
    }
    records, settings = rows[kind]
    return {"data": str(write_rows(folder / f"{kind}.jsonl", records)), **settings}


@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("kind", ("text", "prompt", "target", "option", "turn"))
def test_a_token_without_a_row_is_refused_with_its_text(
    kind: str, tied: bool, outside: Any, tmp_path: Path
) -> None:
    given = rows_of(tmp_path, kind)
    bench = outside(tied=tied)
    settings = {"template": None, "labels": None, **given}
    with pytest.raises(EdgezoError, match=r"<\|outside\|>.* rows for \d+ tokens only"):
        opened(bench, "label", **settings)


@pytest.mark.parametrize("kind", ("completion", "text"))
def test_an_end_token_without_a_row_says_to_name_another(kind: str, outside: Any) -> None:
    bench = outside(eos_token=OUTSIDE)
    try:
        data = opened(bench, kind).dataset
    except EdgezoError as problem:
        assert OUTSIDE in str(problem) and "Name one of the model's tokens as eos_token" in str(
            problem
        )
        return
    vocab = json.loads((bench.model / "config.json").read_text())["vocab_size"]
    rows = [row for e in (*data.train, *data.validation) for row in e.rows]
    assert kind == "text" and max(max(*row.ids, *row.score_ids) for row in rows) < vocab


def test_a_mask_without_a_row_is_refused(outside: Any) -> None:
    bench = outside("roberta", mask_token=OUTSIDE)
    with pytest.raises(EdgezoError, match=r"<\|outside\|>"):
        opened(bench, "label")


def test_a_token_that_no_row_uses_does_no_harm(outside: Any) -> None:
    opened(outside(pad_token=OUTSIDE), "completion")


def test_more_names_of_tokens_than_rows_are_found_by_use(bench: Bench, tmp_path: Path) -> None:
    tokens = [*tiny_models.byte_vocabulary(), "<|more|>", "<|most|>"]
    types = [3] * 4 + [1] * (len(tokens) - 6) + [3, 3]
    model = tiny_models.random_model("qwen2")
    named = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    tiny_models.make_gguf(model, tmp_path / "m.gguf", tokenizer=True, metadata=named)
    in_gguf = replace(bench, model=tmp_path / "m.gguf")
    opened(in_gguf, "completion")
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "it <|most|> is"}] * 4)
    with pytest.raises(EdgezoError, match=r"gives the token 301 \('<\|most\|>'"):
        opened(in_gguf, "text", data=str(data))


def test_a_text_without_an_end_says_so_before_it_is_written(bench: Bench, tmp_path: Path) -> None:
    named = {"tokenizer.ggml.eos_token_id": 4294967295}
    tokens = [f"<x{i}>" if t == "</s>" else t for i, t in enumerate(tiny_models.byte_vocabulary())]
    model = tiny_models.random_model("qwen2")
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.chat_template": None, **named}
    tiny_models.make_gguf(model, tmp_path / "m.gguf", tokenizer=True, metadata=metadata)
    asked = {"objective": "exact-match", "max_new_tokens": 5, "max_mem_bytes": None}
    made = opened(replace(bench, model=tmp_path / "m.gguf"), "completion", **asked)
    assert [note for note in made.dataset.notes if "no token that ends a text" in note]


def test_an_answer_does_not_go_from_short_to_long_factors(bench: Bench, tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 60,
        **{name: [1.0] * 4 for name in ("short_factor", "long_factor")},
    }
    path = make_model(tmp_path / "model", rope_parameters=rope)
    asked = {"objective": "exact-match", "max_new_tokens": 60}
    with pytest.raises(UsageError, match=r"beyond 60 tokens .* --max-new-tokens"):
        opened(replace(bench, model=path), "completion", **asked)
    opened(replace(bench, model=path), "completion")
