"""The tokenizer of a model directory or GGUF file, of which only settings in a list are used.

transformers reads the files of a tokenizer out of the model's directory, and takes from their settings names of
classes, of code to import and of other files. So it is not shown that directory, but a temporary one, with links to the
files of a fast tokenizer and with settings that hold what is in the lists below.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerFast as FastTokenizer

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import MOST_INDEX_BYTES, read_json, reading
from edgezo.network.foreign_config import read_config
from edgezo.weights.gguf_header import read_header

# Vocabularies whose merges were learned with every digit alone (llama.cpp: LLAMA_VOCAB_PRE_TYPE_*).
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")

# Files that are shown to transformers as they are: vocabularies and templates, which are data.
_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
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
_AS_IT_STANDS = "PreTrainedTokenizerFast"

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
_SIDES = ("padding_side", "truncation_side")
_PARTS_OF_TOKEN = ("content", "lstrip", "rstrip", "normalized", "single_word", "special")


def load_tokenizer(path: Path) -> Any:
    """The fast tokenizer of a model directory or GGUF file, chat template included.

    Its pad token is the end token where the model names none. Raises EdgezoError if there is no fast tokenizer.
    """
    path = Path(path)
    with reading(f"The tokenizer of {path}", "Fetch the model again.", any_kind=True):
        if path.is_file():
            tokenizer = _gguf_tokenizer(path)
        else:
            config = read_config(path / "config.json")
            with _shown(path) as folder:
                tokenizer = AutoTokenizer.from_pretrained(
                    str(folder), config=config, trust_remote_code=False
                )
        _check_template(tokenizer, path)
        if not tokenizer.is_fast:
            raise EdgezoError(
                f"{path} has no fast tokenizer: a tokenizer.json beside the weights is needed."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _gguf_tokenizer(path: Path) -> Any:
    # Not through AutoTokenizer, which parses the metadata twice more with gguf's reader: 10 s and 170 MB for 49,152
    # tokens, where this takes 0.7 s and 50 MB.
    header = read_header(path)
    with tempfile.TemporaryDirectory(prefix="edgezo-tokenizer-") as folder:
        _link(path, Path(folder) / "model.gguf")  # alone: files beside it are another model's
        tokenizer = FastTokenizer.from_pretrained(folder, gguf_file="model.gguf")
    if header.metadata.get("tokenizer.ggml.pre") in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return tokenizer


def _check_template(tokenizer: Any, path: Path) -> None:
    """EdgezoError for a chat template that is neither a text nor several texts by name."""
    template = getattr(tokenizer, "chat_template", None)
    several = template.values() if isinstance(template, dict) else [template]
    if template is not None and not all(isinstance(text, str) for text in several):
        raise EdgezoError(f"The chat template of {path} is no text. Fetch the model again.")


# ----------------------------------------------------------------------------- what transformers is shown


@contextmanager
def _shown(directory: Path) -> Iterator[Path]:
    """A temporary directory with a tokenizer's files, as far as they are used, and with settings from the lists."""
    with tempfile.TemporaryDirectory(prefix="edgezo-tokenizer-") as temporary:
        folder = Path(temporary)
        for name in _FILES:
            if (directory / name).is_file():
                _link(directory / name, folder / name)
        templates = directory / _TEMPLATES
        if templates.is_dir():
            (folder / _TEMPLATES).mkdir()
            for file in sorted(templates.glob("*.jinja"))[:_MOST_TEMPLATES]:
                if file.is_file():
                    _link(file, folder / _TEMPLATES / file.name)
        for name, choose in ((_SETTINGS, _settings), (_SPECIAL, _special_tokens), (_ADDED, _added)):
            if (directory / name).is_file():
                values = read_json(directory / name, MOST_INDEX_BYTES)
                if not isinstance(values, dict):
                    raise EdgezoError(f"{directory / name} holds no table. Fetch the model again.")
                (folder / name).write_text(json.dumps(choose(values)), encoding="utf-8")
        yield folder


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
        chosen["tokenizer_class"] = name if name.removesuffix("Fast") in CLASSES else _AS_IT_STANDS
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
    for name in ("additional_special_tokens", "extra_special_tokens"):
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
