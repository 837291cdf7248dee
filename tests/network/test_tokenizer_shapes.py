"""Thirty makes of tokenizers x ways to ask: tokens are those of tokenizer.json, whatever lies beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from edgezo.data.dataset import DataRequest, load_dataset
from edgezo.errors import EdgezoError
from edgezo.network.loader import load_tokenizer

CORPUS = [
    *("it was good", "the weather is bad, isn't it?", "1234 + 56 = 1290", "f(x) = {y: 'z'}"),
    *("Naïve café über", "two\nlines\n\n  and spaces", "yes no yes no", "a b c d e f g h i"),
]
TEXTS = [
    *CORPUS,
    "It  was 2024: (good)\t!",
    " leading",
    "trailing ",
    "</s> <s> in a text",
    "\u00e9",
]
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")
LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def begin(ids: dict[str, int], end: bool = False) -> Any:
    single = "<s> $A </s>" if end else "<s> $A"
    named = [(text, ids[text]) for text in ("<s>", "</s>")]
    return processors.TemplateProcessing(single=single, special_tokens=named)


def trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if parts.get(name) is not None:
            setattr(tokenizer, name, parts[name])
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    after = parts.get("after")
    if after is not None:
        tokenizer.post_processor = after(tokenizer.get_vocab()) if callable(after) else after
    return tokenizer


def bpe(**parts: Any) -> Tokenizer:
    alphabet = pre.ByteLevel.alphabet() if parts.pop("bytes", False) else []
    fallback = parts.pop("fallback", False)
    marks = [*SPECIAL, *([f"<0x{i:02X}>" for i in range(256)] if fallback else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    model = models.BPE(unk_token="<unk>" if not alphabet else None, byte_fallback=fallback)
    return trained(model, trainer, **parts)


def byte_level(*before: Any, prefix: bool = False, regex: bool = True, **parts: Any) -> Tokenizer:
    last = pre.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    parts |= {"pre_tokenizer": pre.Sequence([*before, last]) if before else last}
    return bpe(bytes=True, decoder=decoders.ByteLevel(), **parts)


def metaspace(scheme: str = "first", **parts: Any) -> Tokenizer:
    part = pre.Metaspace(prepend_scheme=scheme)
    return bpe(pre_tokenizer=part, decoder=decoders.Metaspace(prepend_scheme=scheme), **parts)


def llama2(*, prepend: bool = True) -> Tokenizer:
    steps = [normalizers.Prepend("▁")] if prepend else []
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return bpe(
        fallback=True,
        normalizer=normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence([*decoder, *([decoders.Strip(" ", 1, 0)] if prepend else [])]),
        after=begin,
    )


def unigram(**parts: Any) -> Tokenizer:
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=[*SPECIAL], unk_token="<unk>", show_progress=False
    )
    parts = {"pre_tokenizer": pre.Metaspace(), "decoder": decoders.Metaspace()} | parts
    return trained(models.Unigram(), trainer, **parts)


def pieces(**parts: Any) -> Tokenizer:
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=[*SPECIAL], show_progress=False
    )
    parts = {"pre_tokenizer": pre.BertPreTokenizer(), "decoder": decoders.WordPiece()} | parts
    return trained(models.WordPiece(unk_token="<unk>"), trainer, **parts)


def words(**parts: Any) -> Tokenizer:
    trainer = trainers.WordLevelTrainer(
        vocab_size=200, special_tokens=[*SPECIAL], show_progress=False
    )
    parts = {"pre_tokenizer": pre.Whitespace()} | parts
    return trained(models.WordLevel(unk_token="<unk>"), trainer, **parts)


def with_added(tokenizer: Tokenizer, **switches: bool) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<|think|>", **switches), AddedToken("good", **switches)])
    return tokenizer


def roberta(ids: dict[str, int]) -> Any:
    return processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))


MAKES: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": byte_level,
    "gpt2 with a space first": lambda: byte_level(prefix=True),
    "gpt2 that begins": lambda: byte_level(after=begin),
    "gpt2 that begins and ends": lambda: byte_level(after=lambda ids: begin(ids, end=True)),
    "roberta": lambda: byte_level(after=roberta),
    "roberta with a space first": lambda: byte_level(prefix=True, after=roberta),
    "llama3": lambda: byte_level(pre.Split(Regex(LLAMA3), "isolated"), regex=False, after=begin),
    "qwen": lambda: byte_level(
        pre.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"),
        regex=False,
        normalizer=normalizers.NFC(),
    ),
    "smollm": lambda: byte_level(pre.Digits(individual_digits=True)),
    "deepseek": lambda: byte_level(pre.Split("\n", "isolated"), pre.Digits(True), regex=False),
    "starcoder with added words": lambda: with_added(byte_level(), normalized=False),
    "gpt2 with words that strip": lambda: with_added(byte_level(), lstrip=True, rstrip=True),
    "whole words only": lambda: with_added(byte_level(), single_word=True),
    "llama2": llama2,
    "llama2 without a space first": lambda: llama2(prepend=False),
    "mistral": lambda: metaspace(fallback=True, after=begin),
    "always a space first": lambda: metaspace("always"),
    "never a space first": lambda: metaspace("never"),
    "gemma": lambda: bpe(
        fallback=True,
        normalizer=normalizers.Replace(" ", "▁"),
        pre_tokenizer=pre.Split(" ", "merged_with_previous"),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()]),
        after=begin,
    ),
    "metaspace with added words": lambda: with_added(metaspace(fallback=True), normalized=True),
    "unigram": unigram,
    "unigram that ends": lambda: unigram(after=lambda ids: begin(ids, end=True)),
    "unigram of nfkc": lambda: unigram(normalizer=normalizers.NFKC()),
    "unigram in lower case": lambda: unigram(normalizer=normalizers.Lowercase()),
    "bert": lambda: pieces(normalizer=normalizers.BertNormalizer(lowercase=True)),
    "bert with case": lambda: pieces(normalizer=normalizers.BertNormalizer(lowercase=False)),
    "bert that begins and ends": lambda: pieces(after=lambda ids: begin(ids, end=True)),
    "words": words,
    "words and digits": lambda: words(pre_tokenizer=pre.Sequence([pre.Whitespace(), pre.Digits()])),
    "letters": lambda: bpe(pre_tokenizer=pre.Split("", "isolated")),
}
# Settings beside a tokenizer.json that name a class with a splitting of its own, by family of the model.
BESIDE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    ("llama", {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": True}),
    ("llama", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}),
    ("qwen2", {"tokenizer_class": "Qwen2TokenizerFast"}),
    ("qwen3", {"tokenizer_class": "GPT2Tokenizer"}),
    ("gemma2", {"tokenizer_class": "GemmaTokenizer"}),
    ("qwen2", {}),
)
ROLES = {f"{role}_token": f"<{role}>" for role in ("unk", "pad", "mask")}
ROLES |= {"bos_token": "<s>", "eos_token": "</s>"}
ROWS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "text": ({}, [{"text": text} for text in CORPUS]),
    "completion": ({}, [{"prompt": text, "completion": " it was"} for text in CORPUS]),
    "label": (
        {"template": "{text} it was", "labels": "0=bad,1=good"},
        [{"text": text, "label": at % 2} for at, text in enumerate(CORPUS)],
    ),
}


@cache
def made(make: str) -> str:
    return str(MAKES[make]().to_str())


def directory(folder: Path, make: str, family: str, settings: dict[str, Any]) -> Path:
    config = {"model_type": family, "vocab_size": 1000, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(made(make), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(ROLES | settings))
    return folder


def theirs(folder: Path) -> Any:
    """The file alone, by transformers' class for it."""
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **ROLES)


@pytest.mark.parametrize("beside", range(len(BESIDE)))
@pytest.mark.parametrize("make", MAKES)
def test_tokens_are_those_of_the_file(make: str, beside: int, tmp_path: Path) -> None:
    folder = directory(tmp_path, make, *BESIDE[beside])
    ours, expected = load_tokenizer(folder), theirs(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        asked = ours(text, return_offsets_mapping=True)
        alone = backend.encode(text)
        assert asked["input_ids"] == expected(text)["input_ids"] == alone.ids
        assert [tuple(pair) for pair in asked["offset_mapping"]] == alone.offsets
        assert ours.decode(alone.ids) == expected.decode(alone.ids)
    assert {role: ours.special_tokens_map[role] for role in ROLES} == ROLES


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("make", MAKES)
def test_rows_become_the_tokens_of_their_texts(make: str, kind: str, tmp_path: Path) -> None:
    folder = directory(tmp_path, make, *BESIDE[2])
    settings, rows = ROWS[kind]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        data = load_dataset(DataRequest(data=str(file), **settings), load_tokenizer(folder))
    except EdgezoError as problem:  # a word that the vocabulary lacks
        assert kind == "label" and "token" in str(problem)
        return
    expected = theirs(folder)
    wanted = set()
    for row in rows:
        whole = row.get("prompt", row["text"] if "text" in row else "") + row.get("completion", "")
        if kind == "label":
            whole = row["text"] + " it was"
        wanted.add(tuple(expected(whole, add_special_tokens=False)["input_ids"]))
    marks = {expected.bos_token_id, expected.eos_token_id}
    for example in (*data.train, *data.validation):
        row = example.rows[0]
        tokens = [*row.ids, *row.score_ids[-1:]] if kind != "label" else [*row.ids]
        assert tuple(t for t in tokens if t not in marks) in {
            tuple(t for t in ids if t not in marks) for ids in wanted
        }


# ----------------------------------------------------------------------------- special tokens by other ways


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    (
        ("gpt2", {"model_max_length": 1024}, {"eos_token": "<|endoftext|>"}),
        ("qwen2", {}, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
        ("llama", {"tokenizer_class": "LlamaTokenizer"}, {"bos_token": "<s>", "eos_token": "</s>"}),
        ("roberta", {}, {"mask_token": "<mask>", "cls_token": "<s>"}),
        ("llama", {"eos_token": None}, {"eos_token": "</s>"}),
    ),
    ids=str,
)
def test_tokens_that_no_file_names_are_those_of_the_class(
    family: str, settings: dict[str, Any], expected: dict[str, str], tmp_path: Path
) -> None:
    folder = directory(tmp_path, "gpt2", family, {})
    whole = Tokenizer.from_str(made("gpt2"))
    whole.add_special_tokens(["<|endoftext|>"])
    whole.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_tokens_map.items() >= expected.items()
    assert len(tokenizer) == whole.get_vocab_size()


def test_a_mask_strips_the_space_before_it_as_the_file_says(tmp_path: Path) -> None:
    folder = directory(tmp_path, "roberta", "roberta", {})
    whole = json.loads(made("roberta"))
    for token in whole["added_tokens"]:
        token["lstrip"] = token["content"] == "<mask>"
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for mask in ("<mask>", {"content": "<mask>", "lstrip": False, "__type": "AddedToken"}):
        (folder / "tokenizer_config.json").write_text(json.dumps(ROLES | {"mask_token": mask}))
        assert (
            load_tokenizer(folder)("it was <mask>")["input_ids"]
            == backend.encode("it was <mask>").ids
        )


def test_numbers_that_two_files_give_a_token_are_in_a_note(tmp_path: Path) -> None:
    numbered = {"added_tokens_decoder": {"2": {"content": "<s>", "special": True}}}
    folder = directory(tmp_path, "gpt2", "llama", numbered)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.bos_token_id == 1
    assert [note for note in tokenizer.edgezo_notes if "<s> is 1, not 2" in note]


def test_a_special_token_that_falls_into_pieces_is_refused(tmp_path: Path) -> None:
    folder = directory(tmp_path, "gpt2", "llama", {"split_special_tokens": True})
    with pytest.raises(EdgezoError, match=r"takes its .*_token .* apart"):
        load_tokenizer(folder)


def test_text_that_does_not_come_back_is_in_a_note(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(directory(tmp_path, "words", "llama", {}))
    assert [note for note in tokenizer.edgezo_notes if "does not give back every text" in note]


@pytest.mark.parametrize("family", ("llama", "qwen2", "gemma2"))
def test_a_class_does_not_replace_the_splitting_of_the_file(family: str, tmp_path: Path) -> None:
    path = tiny_models.make(family, tmp_path / "model", tokenizer=True)
    whole = json.loads((path / "tokenizer.json").read_text())
    whole["model"]["merges"].append(["1", "2"])
    whole["model"]["vocab"]["12"] = whole["model"]["vocab"].pop("<unused0>")
    (path / "tokenizer.json").write_text(json.dumps(whole))
    assert load_tokenizer(path).tokenize("no 12")[-2:] == ["Ġ", "12"]
