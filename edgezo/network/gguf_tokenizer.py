"""The tokenizer that the metadata of a GGUF file describes.

transformers builds it from vocabulary, merges and types. It is shown a file of the metadata of the tokenizer alone, in
which faults that llama.cpp repairs too are mended: marks such as ``<|im_end|>`` that are typed as words, and ids of
special tokens that are no tokens. Then the rule by which text is split before merging is set, since a file only names
it: transformers takes GPT-2's rule for every name that it does not know.
"""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast as FastTokenizer

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import clip
from edgezo.weights.gguf_config import END_MARKS, token_id
from edgezo.weights.gguf_header import GgufHeader, read_header

# ----------------------------------------------------------------------------- rules of splitting


class Splitting(NamedTuple):
    """How text falls into words before merging: patterns in turn, each within the pieces of those before it."""

    patterns: tuple[str, ...]
    gpt2: bool = False  # at the end GPT-2's own pattern
    whole_words: bool = False  # a word that is a token is not merged (ignore_merges)
    begins: bool = False  # the start token comes first, where the file does not say so


_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACES}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (  # words by their capitals, what may follow a word, digits
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    rf"|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"
)
_ASCII_MARKS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK_V3 = (
    rf"{_ASCII_MARKS}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{_SPACES}"
)
_QWEN35 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACES}"
_SEED_CODER = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_SPACES}"
)
_HAN, _KANA = "\u4e00-\u9fa5", "\u3040-\u309f\u30a0-\u30ff"
_FINNISH = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_ONE_DIGIT, _THREE_DIGITS = r"\p{N}", "[0-9][0-9][0-9]"

_LLAMA3 = Splitting((_WORDS % r"\p{N}{1,3}",), whole_words=True, begins=True)
_QWEN2 = Splitting((_WORDS % _ONE_DIGIT,))
_TEKKEN = Splitting((_CASED % ("", "", _ONE_DIGIT),), whole_words=True, begins=True)
_GPT4O = Splitting((_CASED % (f"{_ENDINGS}?", f"{_ENDINGS}?", r"\p{N}{1,3}"),))
_DEEPSEEK_CODER = (
    *(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+"),
    *(f"[{_HAN}\u0800-\u4e00\uac00-\ud7ff]+", _ONE_DIGIT),
)
# The rules by the names that llama.cpp gives them.
_NAMED: tuple[tuple[Splitting, str], ...] = (
    (_LLAMA3, "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    (Splitting(_LLAMA3.patterns), "dbrx smaug-bpe glm4 chatglm-bpe"),
    (_QWEN2, "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    (Splitting((_QWEN35,)), "qwen35"),
    (Splitting((_SEED_CODER,)), "seed-coder"),
    (_TEKKEN, "tekken"),
    (_GPT4O, "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (
        Splitting((), gpt2=True),
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en "
        "jina-v2-code roberta-bpe exaone4 mpt olmo jais trillion granite-docling",
    ),
    (
        Splitting((_ONE_DIGIT,), gpt2=True),
        "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
    ),
    (
        Splitting((r"\p{N}{1,3}", f"[{_HAN}{_KANA}]+", _DEEPSEEK_V3)),
        "deepseek-v3 hunyuan-dense joyai-llm",
    ),
    (Splitting(_DEEPSEEK_CODER), "deepseek-coder"),
    (Splitting((_FINNISH,)), "poro-chat bloom gpt3-finnish"),
    (Splitting((_FINNISH, _ONE_DIGIT)), "viking"),
    (Splitting((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS)), "falcon"),
    (Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE_DIGITS)), "default"),
)
SPLITTINGS: dict[str, Splitting] = {name: rule for rule, names in _NAMED for name in names.split()}
# The rule of files that name none, written before there were names: an architecture with one vocabulary.
_UNNAMED = {"gpt2": "gpt-2", "qwen2": "qwen2", "qwen3": "qwen2"}

# ----------------------------------------------------------------------------- building

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # types of tokens
_WORDS_BY_TYPE = (0, _NORMAL, 5)  # undefined, normal, unused
_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_PRE, _BEGINS = "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token"
_ROLE_KEYS = ("bos", "eos", "unknown", "padding", "seperator", "mask", "cls")
# What turns of a chat begin and end with, beside END_MARKS.
_BEGIN_MARKS = frozenset({"<start_of_turn>", "<|im_start|>", "<|start_header_id|>"})
_LOOKS_LIKE_A_MARK = re.compile(r"<\|[^\s|<>]+\|>")


def gguf_tokenizer(path: Path) -> tuple[Any, list[str]]:
    """The fast tokenizer of a GGUF file, and what was mended in it.

    Raises EdgezoError where the file names a rule of splitting that is not in the table.
    """
    header = read_header(path)
    notes: list[str] = []
    rule = _rule_of(header)
    tokens = header.texts(_TOKENS)
    if not tokens:
        raise EdgezoError(
            f"{path} has no tokenizer ({_TOKENS}). Use the model's safetensors directory."
        )
    types = header.numbers(_TYPES) or [_NORMAL] * len(tokens)
    mistyped = _mistyped_marks(header, tokens, types)
    for number in mistyped:
        types[number] = _CONTROL
    if mistyped:
        listed = ", ".join(clip(tokens[n], 30) for n in mistyped[:4])
        more = ", ..." if len(mistyped) > 4 else ""
        notes.append(
            f"{path.name} types {len(mistyped)} marks as words ({listed}{more}): they are taken whole, as marks"
        )
    with tempfile.TemporaryDirectory(prefix="edgezo-tokenizer-") as folder:
        file = Path(folder) / "model.gguf"
        file.write_bytes(_metadata_alone(header, types, len(tokens), rule))
        tokenizer = FastTokenizer.from_pretrained(folder, gguf_file=file.name)
    if rule is not None:
        split_by(tokenizer, rule)
        _spell_marks(tokenizer, tokens, types)
    return tokenizer, notes


def _rule_of(header: GgufHeader) -> Splitting | None:
    """The rule by which text is split; None for a sentencepiece vocabulary, which needs none."""
    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return None
    name = header.metadata.get(_PRE) or _UNNAMED.get(header.architecture)
    if name in SPLITTINGS:
        return SPLITTINGS[name]
    stated = f"{_PRE} is {clip(repr(name), 60)}" if name else f"it has no {_PRE}"
    raise EdgezoError(
        f"{header.path} does not say how its tokenizer splits text: {stated}, for which edgezo has no rule. "
        "With another rule, tokens would not be the model's.\n"
        "Use the model's safetensors directory, whose tokenizer.json has the rule in it"
        + ("." if name else ", or a newer GGUF file of this model.")
    )


def _mistyped_marks(header: GgufHeader, tokens: list[str], types: list[int]) -> list[int]:
    """The ids of tokens that are marks of a chat by their texts, and words by their types.

    A token that merges can make is a word: of the marks, no merge leads to one.
    """
    marks = END_MARKS | _BEGIN_MARKS
    special = {
        token_id(header, f"tokenizer.ggml.{role}_token_id", len(tokens)) for role in _ROLE_KEYS
    }
    looking = [
        number
        for number, (text, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in _WORDS_BY_TYPE
        and (text in marks or number in special or _LOOKS_LIKE_A_MARK.fullmatch(text))
    ]
    if not looking:
        return []
    merged = {"".join(merge.split(" ")) for merge in header.texts("tokenizer.ggml.merges")}
    return [number for number in looking if tokens[number] not in merged]


def _metadata_alone(
    header: GgufHeader, types: list[int], count: int, rule: Splitting | None
) -> bytes:
    """A GGUF file without tensors: the tokenizer's metadata, mended."""
    entries = {
        key: header.entry(key)
        for key in header.metadata
        if key.startswith("tokenizer.") or key in ("general.architecture", "general.name")
    }
    for role in _ROLE_KEYS:
        key = f"tokenizer.ggml.{role}_token_id"
        if key in entries and token_id(header, key, count) is None:
            del entries[key]  # "none", written as -1 or as a number beyond the vocabulary
    array = struct.pack("<IIQ", 9, 5, len(types)) + struct.pack(f"<{len(types)}i", *types)
    entries[_TYPES] = _key(_TYPES) + array
    if rule is not None and rule.begins and _BEGINS not in entries:
        entries[_BEGINS] = _key(_BEGINS) + struct.pack("<I?", 7, True)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries.values())


def _key(key: str) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode()


def split_by(tokenizer: Any, rule: Splitting) -> None:
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in rule.patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.gpt2))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.backend_tokenizer.model.ignore_merges = rule.whole_words


def _spell_marks(tokenizer: Any, tokens: list[str], types: list[int]) -> None:
    """Give marks their own ids that transformers takes for misspelled words, since letters in them are no byte's."""
    backend = tokenizer.backend_tokenizer
    wrong = {
        tokens[number]: number
        for number, kind in enumerate(types[: len(tokens)])
        if kind in (_CONTROL, _USER_DEFINED)
        and tokens[number]
        and backend.token_to_id(tokens[number]) != number
    }
    if not wrong:
        return
    whole = json.loads(backend.to_str())
    replaced = set(wrong.values())
    vocabulary = whole["model"]["vocab"].items()
    kept = {text: number for text, number in vocabulary if number not in replaced}
    whole["model"]["vocab"] = kept | wrong
    # transformers' class adds an <|endoftext|> of its own after the last token.
    known = [token for token in whole["added_tokens"] if token["id"] < len(tokens)]
    whole["added_tokens"] = _with_marks(known, wrong, types)
    whole["post_processor"] = None  # it has ids in it
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.update_post_processor()


def _with_marks(
    added: Iterable[Mapping[str, Any]], marks: Mapping[str, int], types: list[int]
) -> list[Mapping[str, Any]]:
    """The added tokens with ``marks`` among them, in the order of their ids."""
    numbers = set(marks.values())
    rest = [t for t in added if t["content"] not in marks and t["id"] not in numbers]
    switches = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    new = [
        {"id": number, "content": text, **switches, "special": types[number] == _CONTROL}
        for text, number in marks.items()
    ]
    return sorted([*rest, *new], key=lambda token: int(token["id"]))
