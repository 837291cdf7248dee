"""Files beside exported weights, in the spelling that transformers 4 and 5 both read.

transformers 5 has one table ``rope_parameters`` and ``dtype``. 4 has ``rope_theta``, ``rope_scaling``,
``partial_rotary_factor``, ``rope_local_base_freq`` and ``torch_dtype``; for a base that it does not see it takes 10000
without a word, and so do programs that read its spelling. Both spellings are written: each version passes over the
other's. A tokenizer is named by a class that both have.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from edgezo.machine.downloads import BESIDE_WEIGHTS
from edgezo.machine.files import to_json
from edgezo.machine.foreign import MOST_INDEX_BYTES, read_json, reading
from edgezo.network.foreign_tokenizer import AS_IT_STANDS, CLASSES, TOKENIZER_FILE
from edgezo.network.loader import ModelFiles, load_tokenizer
from edgezo.network.rotary import rope_tables
from edgezo.network.tokenizer_check import SAMPLE
from edgezo.weights.saved import Saved, write_saved

_TOKENIZER_SETTINGS, _GENERATION = "tokenizer_config.json", "generation_config.json"
_FOLDERS_BESIDE = ("additional_chat_templates",)
# What a config object has beside the architecture.
_NOT_OF_THE_MODEL = frozenset(
    "_name_or_path id2label label2id problem_type output_hidden_states output_attentions return_dict "
    "chunk_size_feed_forward is_encoder_decoder".split()
)
_BASE_KEYS = frozenset({"rope_theta", "partial_rotary_factor"})  # of a table, that 4 has beside it
_MORE = (
    "no x12 and 1234567",
    " a space",
    "don't",
    "\n\n\tx=1",
)  # what rules of splitting differ in
# All that transformers 4 allows in Phi-3's table.
_PHI3_TABLE = ("short_factor", "long_factor")


def write_config(config: Any, folder: Path, **more: Any) -> None:
    """config.json of a config object, with ``more`` in it."""
    values = {k: v for k, v in config.to_dict().items() if k not in _NOT_OF_THE_MODEL} | more
    values["torch_dtype"] = values["dtype"]
    values |= _rope_of_4(config)
    (folder / "config.json").write_text(to_json(dict(sorted(values.items()))) + "\n")


def write_weights(folder: Path, tensors: Sequence[Saved]) -> dict[str, Any]:
    """model.safetensors of tensors of one type; what a result says of it."""
    write_saved(folder / "model.safetensors", tensors, {"format": "pt"})
    dtype = tensors[0].dtype
    size = sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
    return {"tensors": len(tensors), "weight_bytes": size, "dtype": str(dtype).split(".")[1]}


def _rope_of_4(config: Any) -> dict[str, Any]:
    """The fields by which transformers 4 knows rotary positions."""
    tables = rope_tables(config)
    if not tables:
        return {}
    whole = tables.get("", tables.get("full_attention"))
    if whole is None:
        return {}
    scaling = {k: v for k, v in whole.items() if k not in _BASE_KEYS and v is not None}
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind or "default")
    fields: dict[str, Any] = {"rope_theta": whole["rope_theta"], "rope_scaling": scaling}
    if scaling["rope_type"] == "default":
        fields["rope_scaling"] = None
    elif config.model_type == "phi3":
        fields["rope_scaling"] = _phi3_scaling(config, scaling)
    if whole.get("partial_rotary_factor") is not None:
        fields["partial_rotary_factor"] = whole["partial_rotary_factor"]
    local = tables.get("sliding_attention")
    if local is not None and "" not in tables:
        fields["rope_local_base_freq"] = local["rope_theta"]
    return fields


def _phi3_scaling(config: Any, scaling: Mapping[str, Any]) -> dict[str, Any]:
    """The table of three fields that transformers 4 asks for; it refuses a fourth, which would change the factors."""
    implied = {
        "rope_type": scaling["rope_type"],
        "original_max_position_embeddings": config.original_max_position_embeddings,
        "factor": config.max_position_embeddings / config.original_max_position_embeddings,
    }
    more = {k: v for k, v in scaling.items() if k not in _PHI3_TABLE and v != implied.get(k)}
    return {"type": "longrope", **{k: scaling[k] for k in _PHI3_TABLE}, **more}


def beside_weights(files: ModelFiles, folder: Path) -> list[str]:
    """Tokenizer, generation settings and licences: a directory's own files, or made of what a GGUF file says.

    Returns notes on what other programs read in another way.
    """
    base = files.path
    if base.is_file():
        load_tokenizer(base).save_pretrained(folder)
        ends = files.end_ids
        if ends:
            settings = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
            roles = {f"{role}_token_id" for role in ("bos", "pad")}
            settings |= {r: v for r in roles if (v := getattr(files.config, r)) is not None}
            (folder / _GENERATION).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    else:
        for file in sorted(base.iterdir()):
            if file.is_file() and any(fnmatch(file.name, wanted) for wanted in BESIDE_WEIGHTS):
                shutil.copyfile(file, folder / file.name)
        for name in _FOLDERS_BESIDE:
            for file in sorted((base / name).glob("*.jinja")):
                (folder / name).mkdir(exist_ok=True)
                shutil.copyfile(file, folder / name / file.name)
    _name_class(folder / _TOKENIZER_SETTINGS)
    return _keep_tokens(base, folder)


def _name_class(file: Path) -> None:
    """Let tokenizer_config.json be one that both versions read: a class, and lists, that 4 has too."""
    if not file.is_file():
        return
    values = read_json(file, MOST_INDEX_BYTES)
    changed = dict(values)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = AS_IT_STANDS
    if isinstance(changed.get("extra_special_tokens"), list):  # a table in 4, which has this list
        listed = changed.pop("extra_special_tokens")
        changed.setdefault("additional_special_tokens", listed)
    if changed != values:
        file.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _keep_tokens(base: Path, folder: Path) -> list[str]:
    """Let transformers 5 take tokenizer.json as it stands where a class that it finds by name splits otherwise.

    Returns a note where no name does that: for some families it takes its own class, whatever is named.
    """
    file = folder / _TOKENIZER_SETTINGS
    values = read_json(file, MOST_INDEX_BYTES) if file.is_file() else {}
    name = values.get("tokenizer_class")
    known = name is None or (
        isinstance(name, str) and (name.removesuffix("Fast") in CLASSES or name == AS_IT_STANDS)
    )
    if not (folder / TOKENIZER_FILE).is_file() or not known or "auto_map" in values:
        return []
    if not (folder / "config.json").is_file() and name is None:
        return []  # an adapter, whose base says which class it is
    tokenizer = load_tokenizer(base)
    if _reads_the_same(folder, tokenizer):
        return []
    values["tokenizer_class"] = AS_IT_STANDS
    for role, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            values.setdefault(role, token)
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if _reads_the_same(folder, tokenizer):
        return []
    return [
        "AutoTokenizer of transformers 5 splits text by a rule of its own for this family, not as tokenizer.json has "
        "it and as the run did: load the tokenizer by PreTrainedTokenizerFast.from_pretrained(DIR)"
    ]


def _reads_the_same(folder: Path, tokenizer: Any) -> bool:
    """Whether AutoTokenizer gives sample texts the tokens that the run had."""
    with reading(f"The tokenizer in {folder}", "Fetch the base model again.", any_kind=True):
        theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    return all(theirs(t)["input_ids"] == tokenizer(t)["input_ids"] for t in (SAMPLE, *_MORE))
