"""Tokenizers of GGUF files: the rule of splitting that a file names, and marks that are one token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from tokenizers import Regex, pre_tokenizers

from edgezo.errors import EdgezoError
from edgezo.network.gguf_tokenizer import SPLITTINGS
from edgezo.network.loader import load_tokenizer, open_model

_PRE, _TYPES, _TOKENS = (f"tokenizer.ggml.{key}" for key in ("pre", "token_type", "tokens"))
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def file_of(folder: Path, arch: str = "qwen2", **metadata: Any) -> Path:
    named = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    model = tiny_models.random_model(arch, **({"mlp_bias": False} if arch == "llama" else {}))
    tiny_models.make_gguf(model, folder / "m.gguf", tokenizer=True, metadata=named)
    return folder / "m.gguf"


def with_tokens(*texts: str, kind: int = NORMAL) -> dict[str, list[Any]]:
    """The vocabulary with ``texts`` in the place of its last tokens, typed ``kind``."""
    tokens = tiny_models.byte_vocabulary()
    types = [CONTROL] * 4 + [NORMAL] * (len(tokens) - 4)
    for place, text in enumerate(texts, len(tokens) - len(texts)):
        tokens[place], types[place] = text, kind
    return {"tokens": tokens, "token_type": types}


# ----------------------------------------------------------------------------- splitting

TEXT = "I'll see NaïveUsers 12345\n\n  f(x)=#end\tжил 世界 "
PIECES = {
    "gpt-2": "I|'ll| see| NaïveUsers| 12345|\n\n | f|(|x|)=#|end|\t|жил| 世界| ",
    "smollm": "I|'ll| see| NaïveUsers| |1|2|3|4|5|\n\n | f|(|x|)=#|end|\t|жил| 世界| ",
    "llama-bpe": "I|'ll| see| NaïveUsers| |123|45|\n\n| | f|(x|)=#|end|\tжил| 世界| ",
    "qwen2": "I|'ll| see| NaïveUsers| |1|2|3|4|5|\n\n| | f|(x|)=#|end|\tжил| 世界| ",
    "seed-coder": "I|'ll| see| NaïveUsers| |1|2|3|4|5|\n\n| | f|(x|)=#|end|\tжил| 世界| ",
    "tekken": "I|'ll| see| Naïve|Users| |1|2|3|4|5|\n\n| | f|(x|)=#|end|\tжил| 世界| ",
    "gpt-4o": "I'll| see| Naïve|Users| |123|45|\n\n| | f|(x|)=#|end|\tжил| 世界| ",
    "deepseek-v3": "I|'ll| see| NaïveUsers| |123|45|\n\n| | f|(x|)=#|end|\tжил| |世界| ",
    "viking": "I'll| see| NaïveUsers| |1|2|3|4|5|\n\n | f|(|x|)|=#end|\t|жил| 世界| ",
}


@pytest.mark.parametrize("name", PIECES)
def test_text_is_split_by_the_rule_that_the_file_names(name: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(file_of(tmp_path, pre=name))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert "|".join(TEXT[start:end] for _, (start, end) in split) == PIECES[name]


def test_rules_that_transformers_knows_are_the_same_there() -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    for name, pattern in mapping.GGUF_PRE_TOKENIZER_SPLITS.items():
        ours = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(p), "isolated") for p in SPLITTINGS[name].patterns]
        )
        theirs = pre_tokenizers.Split(Regex(pattern), "isolated")
        assert ours.pre_tokenize_str(TEXT) == theirs.pre_tokenize_str(TEXT), name


@pytest.mark.parametrize("name", ("no-such-rule", "deepseek-llm", "kimi-k2", "afmoe"))
def test_a_rule_that_nobody_knows_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(EdgezoError, match=rf"tokenizer\.ggml\.pre is '{name}'.*") as caught:
        load_tokenizer(file_of(tmp_path, pre=name))
    assert "safetensors directory" in str(caught.value)


def test_a_file_without_a_rule_is_taken_by_its_architecture_or_refused(tmp_path: Path) -> None:
    (tmp_path / "qwen2").mkdir()
    pieces = load_tokenizer(file_of(tmp_path / "qwen2", pre=None)).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in pieces.pre_tokenize_str("12")] == ["1", "2"]
    with pytest.raises(EdgezoError, match=r"it has no tokenizer\.ggml\.pre"):
        load_tokenizer(file_of(tmp_path, "llama", pre=None))


@pytest.mark.parametrize(("name", "first"), (("llama-bpe", 1), ("tekken", 1), ("qwen2", None)))
def test_texts_begin_as_llama_cpp_begins_them_where_the_file_does_not_say(
    name: str, first: int | None, tmp_path: Path
) -> None:
    ids = load_tokenizer(file_of(tmp_path, pre=name))("a tin")["input_ids"]
    assert (ids[0] == 1) is (first == 1)
    (tmp_path / "said").mkdir()
    said = file_of(tmp_path / "said", pre=name, add_bos_token=False)
    assert load_tokenizer(said)("a tin")["input_ids"][0] != 1


def test_a_whole_word_is_its_token_where_the_model_learned_it_so(tmp_path: Path) -> None:
    words = with_tokens("Ġ" + "zq", kind=NORMAL)  # no merge leads to it
    for name, whole in (("llama-bpe", True), ("gpt-2", False)):
        (tmp_path / name).mkdir()
        tokenizer = load_tokenizer(file_of(tmp_path / name, pre=name, **words))
        assert (tokenizer.tokenize("a zq")[-1] == "Ġzq") is whole


# ----------------------------------------------------------------------------- marks

MARKS = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|assistant|>")


@pytest.mark.parametrize("kind", (NORMAL, 5, CONTROL, USER_DEFINED))
@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_is_one_token_however_it_is_typed(mark: str, kind: int, tmp_path: Path) -> None:
    file = file_of(tmp_path, **with_tokens(mark, kind=kind))
    tokenizer = load_tokenizer(file)
    last = tiny_models.VOCAB - 1
    assert tokenizer(f"tin{mark}\n", add_special_tokens=False)["input_ids"].count(last) == 1
    noted = [note for note in tokenizer.edgezo_notes if mark in note]
    assert bool(noted) is (kind in (NORMAL, 5))


def test_types_may_be_missing_altogether(tmp_path: Path) -> None:
    made = with_tokens("<|im_end|>") | {"token_type": None}
    tokenizer = load_tokenizer(file_of(tmp_path, **made))
    assert tokenizer.encode("<|im_end|></s>", add_special_tokens=False) == [299, 2]


def test_a_word_that_merges_make_is_no_mark(tmp_path: Path) -> None:
    merges = [" ".join(pair) for pair in tiny_models._merges()]
    steps = ["< |", "<| a", "<|a |", "<|a| >"]
    made = with_tokens("<|", "<|a", "<|a|", "<|a|>")
    tokenizer = load_tokenizer(file_of(tmp_path, merges=[*merges, *steps], **made))
    assert not [note for note in tokenizer.edgezo_notes if "<|a|>" in note]


DEEPSEEK = ("<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "  ", "жил")


@pytest.mark.parametrize("kind", (CONTROL, USER_DEFINED))
def test_marks_with_letters_of_other_scripts_keep_their_ids(kind: int, tmp_path: Path) -> None:
    made = with_tokens(*DEEPSEEK, kind=kind)
    file = file_of(tmp_path, eos_token_id=297, pre="deepseek-r1-qwen", **made)
    tokenizer = load_tokenizer(file)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in DEEPSEEK]
    assert ids == [[296], [297], [298], [299]]
    assert tokenizer.eos_token == DEEPSEEK[1] and tokenizer.eos_token_id == 297
    assert len(tokenizer) == tiny_models.VOCAB
    assert tokenizer.decode(tokenizer.encode("a жил tin")).endswith("a жил tin")


# ----------------------------------------------------------------------------- ends


@pytest.mark.parametrize(
    ("metadata", "ends"),
    (
        ({}, [2]),
        ({"eot_token_id": 7}, [2, 7]),
        ({"eot_token_id": 7, "eom_token_id": 9}, [2, 7, 9]),
        ({"eot_token_id": 4294967295, "eos_token_id": 9999}, [2]),  # </s> by its text
        (with_tokens("<|im_end|>"), [2, 299]),
        (with_tokens("<|eot_id|>", "<|eom_id|>"), [2, 298, 299]),
        (with_tokens("<end_of_turn>", kind=USER_DEFINED), [2, 299]),
    ),
    ids=str,
)
def test_every_token_that_ends_a_turn_ends_a_text(
    metadata: dict[str, Any], ends: list[int], tmp_path: Path
) -> None:
    assert open_model(file_of(tmp_path, **metadata)).end_ids == ends


def test_an_id_that_is_no_token_is_no_special_token(tmp_path: Path) -> None:
    file = file_of(tmp_path, bos_token_id=4294967295, padding_token_id=100000)
    tokenizer = load_tokenizer(file)
    assert tokenizer.bos_token_id is None and tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert open_model(file).config.bos_token_id is None
