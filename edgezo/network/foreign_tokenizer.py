"""The tokenizer of a model directory or GGUF file, of which only settings in a list are used.

transformers reads the files of a tokenizer out of the model's directory, and takes from their settings names of
classes, of code to import and of other files. So it is not shown that directory, but a temporary one, with links to the
files of a fast tokenizer and with settings that hold what is in the lists below.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerFast as FastTokenizer

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import MOST_INDEX_BYTES, clip, read_json, reading, refuse_stand_in
from edgezo.network.foreign_config import read_config
from edgezo.network.gguf_tokenizer import gguf_tokenizer
from edgezo.network.tokenizer_check import checked

# Files that are shown to transformers as they are: vocabularies and templates, which are data.
TOKENIZER_FILE = "tokenizer.json"
_FILES = (TOKENIZER_FILE, "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
_TEMPLATES = "additional_chat_templates"
_MOST_TEMPLATES = 100
_SETTINGS, _SPECIAL, _ADDED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

# Classes of transformers that may be named: fast tokenizers of byte pairs, without a library or code of their own. For
# any other name the file tokenizer.json is taken as it stands, which is a whole tokenizer.
CLASSES = frozenset(
    f"{name}Tokenizer" for name in "CodeGen Cohere Gemma GPT2 GPTNeoX Llama Qwen2 Roberta".split()
) | {"PreTrainedTokenizer", "TokenizersBackend"}
AS_IT_STANDS = "PreTrainedTokenizerFast"

_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_SWITCHES = (
    *("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"),
    *("legacy", "spaces_between_special_tokens", "split_special_tokens", "trim_offsets"),
    *("use_default_system_prompt", "do_lower_case", "from_slow"),
)
_LISTED = ("additional_special_tokens", "extra_special_tokens")
# Texts of special tokens that a class has by itself, and the class of families whose files name none.
_GPT2_TOKENS = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
_LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_USUAL_TOKENS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("GPT2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer"), _GPT2_TOKENS),
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
    "LlamaTokenizer": _LLAMA_TOKENS,
    "GemmaTokenizer": {
        **{f"{role}_token": f"<{role}>" for role in ("unk", "bos", "eos", "pad", "mask")},
    },
    "RobertaTokenizer": {
        **_LLAMA_TOKENS,
        **{"sep_token": "</s>", "cls_token": "<s>", "pad_token": "<pad>", "mask_token": "<mask>"},
    },
    "CohereTokenizer": {
        **{"unk_token": "<UNK>", "bos_token": "<BOS_TOKEN>", "pad_token": "<PAD>"},
        "eos_token": "<|END_OF_TURN_TOKEN|>",
    },
}
_USUAL_CLASSES = {
    **dict.fromkeys(("llama", "mistral", "phi3"), "LlamaTokenizer"),
    **dict.fromkeys(("gpt2", "opt"), "GPT2Tokenizer"),
    **dict.fromkeys(("qwen2", "qwen3"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma2", "gemma3_text"), "GemmaTokenizer"),
    "roberta": "RobertaTokenizer",
}
_SIDES = ("padding_side", "truncation_side")
_PARTS_OF_TOKEN = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a model directory or GGUF file, chat template included.

    Its pad token is the end token where the model names none. ``edgezo_notes`` of it says what a user should know.
    Raises EdgezoError if there is no fast tokenizer, or if its files contradict each other.
    """
    path = Path(path)
    with reading(f"The tokenizer of {path}", "Fetch the model again.", any_kind=True):
        tokenizer, notes = gguf_tokenizer(path) if path.is_file() else _of_directory(path)
        _check_template(tokenizer, path)
        if not tokenizer.is_fast:
            raise EdgezoError(
                f"{path} has no fast tokenizer: a tokenizer.json beside the weights is needed."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.edgezo_notes = (*notes, *checked(tokenizer, path))
    return tokenizer


def _of_directory(path: Path) -> tuple[Any, list[str]]:
    """The tokenizer of a directory: tokenizer.json as it stands, or what its class makes of older files."""
    config = read_config(path / "config.json")
    in_file = added_tokens(path / TOKENIZER_FILE)
    with _shown(path, config.model_type, in_file) as folder:
        if in_file is not None:
            return FastTokenizer.from_pretrained(str(folder)), _contradictions(path, in_file)
        if (folder / "tokenizer.model").is_file() and find_spec("sentencepiece") is None:
            raise EdgezoError(
                f"{path} has its tokenizer as tokenizer.model only, which the sentencepiece library reads.\n"
                "Install it (pip install sentencepiece protobuf), or put the model's tokenizer.json beside it."
            )
        if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.model")):
            raise EdgezoError(
                f"{path} has no tokenizer: no tokenizer.json, no vocab.json with merges.txt, no tokenizer.model. "
                "Fetch the tokenizer files of this model into it."
            )
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), config=config, trust_remote_code=False
        )
        return tokenizer, []


def _contradictions(path: Path, in_file: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A note where tokenizer_config.json numbers tokens otherwise than tokenizer.json, which is used."""
    file = path / _SETTINGS
    values = read_json(file, MOST_INDEX_BYTES) if file.is_file() else {}
    listed = values.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return []
    wrong = [
        f"{clip(token['content'], 30)} is {in_file[token['content']]['id']}, not {number}"
        for number, written in listed.items()
        if isinstance(token := _token(written), dict)
        and token["content"] in in_file
        and str(in_file[token["content"]].get("id")) != number
    ]
    if not wrong:
        return []
    return [
        f"tokenizer_config.json of {path} numbers {len(wrong)} tokens otherwise than tokenizer.json, which is used: "
        f"{'; '.join(wrong[:3])}"
    ]


def _check_template(tokenizer: Any, path: Path) -> None:
    """EdgezoError for a chat template that is neither a text nor several texts by name."""
    template = getattr(tokenizer, "chat_template", None)
    several = template.values() if isinstance(template, dict) else [template]
    if template is not None and not all(isinstance(text, str) for text in several):
        raise EdgezoError(f"The chat template of {path} is no text. Fetch the model again.")


# ----------------------------------------------------------------------------- what transformers is shown


@contextmanager
def _shown(
    directory: Path, family: str, in_file: Mapping[str, Mapping[str, Any]] | None
) -> Iterator[Path]:
    """A temporary directory with a tokenizer's files, as far as they are used, and with settings from the lists.

    ``in_file``: the added tokens of tokenizer.json, where there is one.
    """
    with tempfile.TemporaryDirectory(prefix="edgezo-tokenizer-") as temporary:
        folder = Path(temporary)
        for name in _FILES:
            if (directory / name).is_file():
                refuse_stand_in(directory / name)
                _link(directory / name, folder / name)
        templates = directory / _TEMPLATES
        if templates.is_dir():
            (folder / _TEMPLATES).mkdir()
            for file in sorted(templates.glob("*.jinja"))[:_MOST_TEMPLATES]:
                if file.is_file():
                    _link(file, folder / _TEMPLATES / file.name)
        settings = {
            name: choose(_table(directory / name))
            for name, choose in (
                (_SETTINGS, _settings),
                (_SPECIAL, _special_tokens),
                (_ADDED, _added),
            )
            if (directory / name).is_file()
        }
        if in_file is not None:
            settings = _as_in_file(settings, in_file, family)
        for name, values in settings.items():
            (folder / name).write_text(json.dumps(values), encoding="utf-8")
        yield folder


def _table(file: Path) -> dict[str, Any]:
    values = read_json(file, MOST_INDEX_BYTES)
    if not isinstance(values, dict):
        raise EdgezoError(f"{file} holds no table. Fetch the model again.")
    return values


def added_tokens(file: Path) -> dict[str, dict[str, Any]] | None:
    """The added tokens of a tokenizer.json by their texts, of which the rest is not parsed here; None without one."""
    if not file.is_file():
        return None
    refuse_stand_in(file)
    text = file.read_text(encoding="utf-8")
    start = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    listed = json.JSONDecoder().raw_decode(text, start.end())[0] if start else []
    return {
        token["content"]: token
        for token in listed
        if isinstance(token, dict) and isinstance(token.get("content"), str)
    }


def _as_in_file(
    settings: dict[str, dict[str, Any]], in_file: Mapping[str, Mapping[str, Any]], family: str
) -> dict[str, dict[str, Any]]:
    """Settings that leave tokenizer.json as it stands: tokens are as it has them, and no class is named.

    A special token that no file names has the text that its class has for it, if the file has such a token.
    """
    chosen = settings.setdefault(_SETTINGS, {})
    name = chosen.pop("tokenizer_class", "").removesuffix("Fast")
    usual = _USUAL_TOKENS.get(name) or _USUAL_TOKENS.get(_USUAL_CLASSES.get(family, ""), {})
    named = {role for values in settings.values() for role in values}
    for role, text in usual.items():
        if role not in named and text in in_file:
            chosen[role] = text
    settings.pop(_ADDED, None)  # of a slow tokenizer, the file has them
    decoder = chosen.get("added_tokens_decoder", {})
    chosen["added_tokens_decoder"] = {
        number: token for number, token in decoder.items() if token["content"] not in in_file
    }
    for values in settings.values():
        for role in values.keys() & set(_ROLES):
            values[role] = _as_there(values[role], in_file)
        for listed in values.keys() & set(_LISTED):
            values[listed] = [_as_there(token, in_file) for token in values[listed]]
    chosen["tokenizer_class"] = AS_IT_STANDS
    return settings


def _as_there(token: Any, in_file: Mapping[str, Mapping[str, Any]]) -> Any:
    """A token with the switches that the file gives it."""
    content = token if isinstance(token, str) else token["content"]
    there = in_file.get(content)
    if there is None:
        return token
    switches = {k: v for k, v in there.items() if k in _PARTS_OF_TOKEN}
    return {"__type": "AddedToken", **switches}


def _link(file: Path, place: Path) -> None:
    try:
        os.symlink(file.resolve(), place)
    except OSError:  # Windows, for users without that right
        shutil.copyfile(file, place)


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of tokenizer_config.json that are used."""
    chosen = {
        **_special_tokens(values),
        **{name: values[name] for name in _SWITCHES if type(values.get(name)) is bool},
        **{name: values[name] for name in _SIDES if values.get(name) in ("left", "right")},
    }
    if type(values.get("model_max_length")) in (int, float):
        chosen["model_max_length"] = values["model_max_length"]
    if (template := _template(values.get("chat_template"))) is not None:
        chosen["chat_template"] = template
    name = values.get("tokenizer_class")
    if isinstance(name, str):
        chosen["tokenizer_class"] = name if name.removesuffix("Fast") in CLASSES else AS_IT_STANDS
    decoder = values.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        chosen["added_tokens_decoder"] = {
            number: token
            for number, written in decoder.items()
            if number.isdecimal() and isinstance(token := _token(written), dict)
        }
    return chosen


def _special_tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens by role, from the settings or from special_tokens_map.json."""
    chosen = {name: token for name in _ROLES if (token := _token(values.get(name))) is not None}
    for name in _LISTED:
        listed = values.get(name)
        if isinstance(listed, list):
            chosen[name] = [token for item in listed if (token := _token(item)) is not None]
    return chosen


def _added(values: Mapping[str, Any]) -> dict[str, int]:
    """The tokens of added_tokens.json by their texts."""
    return {text: number for text, number in values.items() if type(number) is int and number >= 0}


def _token(written: Any) -> Any:
    """A token as a text, or as a table of its text and switches; None where it is neither."""
    if isinstance(written, str):
        return written
    if not isinstance(written, dict) or not isinstance(written.get("content"), str):
        return None
    switches = {k: v for k, v in written.items() if k in _PARTS_OF_TOKEN and type(v) is bool}
    kind = {"__type": "AddedToken"} if written.get("__type") == "AddedToken" else {}
    return {**kind, "content": written["content"], **switches}


def _template(written: Any) -> Any:
    """A chat template, or a list of named ones; None where there is none that can be used."""
    if isinstance(written, str):
        return written
    if not isinstance(written, list):
        return None
    named = [item for item in written[:_MOST_TEMPLATES] if isinstance(item, dict)]
    return [
        {"name": item["name"], "template": item["template"]}
        for item in named
        if isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
    ]
