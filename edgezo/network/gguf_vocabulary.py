"""A tokenizer as the metadata of a GGUF file: the inverse of gguf_tokenizer.py.

llama.cpp knows two makes: byte-level BPE (``gpt2``), with the name of the rule by which text is split, and
sentencepiece (``llama``), which merges by scores. The rule is named by trying: the first of the known rules that gives
texts with digits, capitals, scripts and white space the tokens that the tokenizer gives them. So a tokenizer of another
make, or of a rule without a name, is refused, and none is written that would split otherwise.
"""

from __future__ import annotations

import copy
import json
from typing import Any

from gguf.constants import GGUFValueType, TokenType

from edgezo.errors import UsageError
from edgezo.network.gguf_tokenizer import SPLITTINGS, split_by
from edgezo.network.tokenizer_check import SAMPLE
from edgezo.weights.gguf_write import Entry, number, numbers, text, texts

# Texts that rules of splitting differ in.
SAMPLES = (
    SAMPLE,
    "I'm SURE they'll've 3 or 33, 333, 3333 and 1234567890 of 3.14's; don't you?",
    "camelCase HTTPServer x12y  two  spaces\n\n\n\tTabs and\r\nlines   \n end ",
    "Größe naïve Ελληνικά кириллица 你好世界 日本語の文 한국어 हिन्दी ไทย",
    "(f(x)==y[0])&&!z; //http://a.b/c?d=e&f=g#h %20 @user #tag $9.99 \u00a0\u2003 \U0001f600\U0001f1e9\U0001f1ea",
    " leading",
    "trailing ",
    "''''''````\"\"\"\"......!!!!!!",
    "été\u0301 e\u0301",
    "____init____ a_b_c",
)
# The rules in the order in which they are tried, each by the name that is written.
_ORDER = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o")
_BYTE = "<0x"


def tokenizer_entries(tokenizer: Any, vocab: int, prefix: tuple[int, ...]) -> dict[str, Entry]:
    """The metadata of a fast tokenizer for a model with ``vocab`` rows in its embedding.

    ``prefix`` are the tokens that it puts before a text. Raises UsageError for one that llama.cpp cannot have.
    """
    made = json.loads(tokenizer.backend_tokenizer.to_str())
    model = made["model"]
    if model.get("type") != "BPE":
        raise _refusal(f"a tokenizer of the make {model.get('type')}")
    pieces = bool(model.get("byte_fallback"))
    entries = _vocabulary(tokenizer, made, vocab, pieces)
    entries |= _pieces_entries(made) if pieces else _bytes_entries(tokenizer, made)
    known = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    known |= {"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    for role, token in known.items():
        if token is not None and token < vocab:
            entries[f"tokenizer.ggml.{role}_token_id"] = number(int(token))
    if prefix and prefix != (tokenizer.bos_token_id,):
        raise _refusal("more than one token before a text, or another than the start token")
    entries["tokenizer.ggml.add_bos_token"] = number(bool(prefix))
    if isinstance(tokenizer.chat_template, str):
        entries["tokenizer.chat_template"] = text(tokenizer.chat_template)
    return entries


def _refusal(what: str) -> UsageError:
    return UsageError(
        f"a GGUF file has no place for {what}.\nUse --format hf, which writes the model for transformers."
    )


def _vocabulary(tokenizer: Any, made: dict[str, Any], vocab: int, pieces: bool) -> dict[str, Entry]:
    """Texts and types of all tokens, by their numbers; rows of the embedding without a token are unused."""
    added = {token["id"]: token for token in made["added_tokens"]}
    names = [f"[PAD{number}]" for number in range(vocab)]
    types = [TokenType.UNUSED] * vocab
    for name, place in {
        **made["model"]["vocab"],
        **{t["content"]: i for i, t in added.items()},
    }.items():
        if place >= vocab:
            raise _refusal(f"the token {name!r}, which has no row in the model's embedding")
        names[place], types[place] = name, TokenType.NORMAL
        if place in added:
            special = added[place]["special"]
            types[place] = TokenType.CONTROL if special else TokenType.USER_DEFINED
        elif pieces and name.startswith(_BYTE) and len(name) == 6 and name.endswith(">"):
            types[place] = TokenType.BYTE
    if pieces and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return {
        "tokenizer.ggml.tokens": texts(names),
        "tokenizer.ggml.token_type": numbers([int(t) for t in types], GGUFValueType.INT32),
    }


def _merges(made: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges, in their order; older files have each as one text."""
    pairs = (p.split(" ", 1) if isinstance(p, str) else p for p in made["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _bytes_entries(tokenizer: Any, made: dict[str, Any]) -> dict[str, Entry]:
    """Merges, and the name of the rule by which text is split."""
    return {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(_rule_name(tokenizer)),
        "tokenizer.ggml.merges": texts([" ".join(pair) for pair in _merges(made)]),
    }


def _rule_name(tokenizer: Any) -> str:
    wanted = [tokenizer(sample, add_special_tokens=False)["input_ids"] for sample in SAMPLES]
    tried = copy.deepcopy(tokenizer)
    for name in dict.fromkeys((*_ORDER, *SPLITTINGS)):
        split_by(tried, SPLITTINGS[name])
        if all(
            tried(sample, add_special_tokens=False)["input_ids"] == ids
            for sample, ids in zip(SAMPLES, wanted, strict=True)
        ):
            return name
    raise _refusal("this tokenizer: llama.cpp has no name for the rule by which it splits text")


def _pieces_entries(made: dict[str, Any]) -> dict[str, Entry]:
    """Scores by which sentencepiece merges in the order of the merges, and whether a text begins with a space."""
    first: dict[str, int] = {}
    merges = _merges(made)
    for place, pair in enumerate(merges):
        first.setdefault("".join(pair), place)
    order = sorted(made["model"]["vocab"].items(), key=lambda item: int(item[1]))
    size = 1 + max([i for _, i in order] + [t["id"] for t in made["added_tokens"]])
    scores = [0.0] * size
    for name, place in order:
        scores[place] = -float(first.get(name, len(merges)))
    return {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        "tokenizer.ggml.scores": numbers(scores, GGUFValueType.FLOAT32),
        "tokenizer.ggml.add_space_prefix": number(_prepends(made)),
    }


def _prepends(made: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    steps = [made.get("normalizer") or {}, made.get("pre_tokenizer") or {}]
    for step in list(steps):
        steps += [*step.get("normalizers", ()), *step.get("pretokenizers", ())]
    return any(
        step.get("type") == "Prepend" or step.get("prepend_scheme") in ("first", "always")
        for step in steps
    )
