"""What a file or folder that was given as a model is, by its first bytes and by the files in it. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from edgezo.errors import EdgezoError
from edgezo.machine.foreign import clip, parse_json, read_small, reading

GGUF_MAGIC = b"GGUF"
PART_NAME = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL
)
_HEAD_BYTES = 64
_MOST_CONFIG_BYTES = 1 << 20
_GIVE_WHOLE = "give the safetensors checkpoint that it was made from"
_CONVERT = (
    "make safetensors of it first, in the folder with its config.json: "
    'python -c "from transformers import AutoModelForCausalLM as A; '
    "A.from_pretrained('.').save_pretrained('converted')\""
)
# First bytes of a file -> what it is, and the way out.
_BY_BYTES: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "weights pickled by PyTorch, or another zip archive", _CONVERT),
    (b"\x80\x02", "weights pickled by PyTorch", _CONVERT),
    (b"lmgg", "weights of GGML, which came before GGUF", "give the model as GGUF"),
    (b"tjgg", "weights of GGML, which came before GGUF", "give the model as GGUF"),
    (b"\x93NUMPY", "an array of NumPy", _GIVE_WHOLE),
)
# Ends of names -> what a file is, where its first bytes do not tell.
_BY_SUFFIX: dict[str, tuple[str, str]] = {
    ".safetensors": ("weights without their config", "give the model's directory"),
    ".onnx": ("a model of ONNX, which is for inference", _GIVE_WHOLE),
    ".tflite": ("a model of TensorFlow Lite, which is for inference", _GIVE_WHOLE),
    ".npz": ("arrays of NumPy (MLX stores weights so)", _GIVE_WHOLE),
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), ("weights pickled by PyTorch", _CONVERT)),
    ".json": ("a file of JSON", "give the model's directory"),
}


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does, whatever its name: Ollama calls them ``sha256-...``."""
    return _head(path).startswith(GGUF_MAGIC)


def first_parts(files: Iterable[Path]) -> list[Path]:
    """GGUF files without the later parts of models in several parts, sorted."""
    kept = []
    for file in sorted(files):
        name = PART_NAME.fullmatch(file.name)
        first = None if name is None else f"{name['stem']}-{1:05}-of-{name['count']}.gguf"
        if first is None or first == file.name or not file.with_name(first).is_file():
            kept.append(file)
    return kept


def file_advice(path: Path) -> str:
    """What a file is that is no GGUF file, and what to give instead: the end of a sentence."""
    head = _head(path)
    for start, what, way_out in _BY_BYTES:
        if head.startswith(start):
            return f"it holds {what}; {way_out}."
    if path.suffix.lower() in _BY_SUFFIX:
        what, way_out = _BY_SUFFIX[path.suffix.lower()]
        return f"it holds {what}; {way_out}."
    if not head:
        return "it is empty; fetch it again."
    return f"it begins with {head[:4]!r}; give the model's directory, or a GGUF file."


def folder_advice(directory: Path) -> str:
    """What a folder without a model that edgezo reads is, and the next command; "" for any other."""
    if (directory / "journal.bin").exists():
        return (
            f"\nIt is a run: edgezo export {directory} --format hf --out DIR makes a model from it."
        )
    if (directory / "adapter_config.json").exists():
        return _adapter_advice(directory)
    names = [path.name for path in sorted(directory.iterdir())]
    for name in names:
        suffix = Path(name).suffix.lower()
        if suffix in (".onnx", ".npz", ".bin", ".pt", ".pth", ".ckpt"):
            return f"\n{name}: it holds {_BY_SUFFIX[suffix][0]}; {_BY_SUFFIX[suffix][1]}."
    inner = [name for name in names if (directory / name / "config.json").is_file()]
    if inner:
        return f"\nIt has a model in it: give {directory / inner[0]}."
    blobs = [name for name in names if name.startswith("sha256-")]
    large = max(blobs, key=lambda name: (directory / name).stat().st_size, default=None)
    if large is not None:
        return f"\nIt holds files of Ollama: give the one with the weights, {directory / large}."
    if any(name.endswith(".safetensors") for name in names):
        return "\nIt has safetensors without a config.json: fetch that of this model too."
    return ""


def _adapter_advice(directory: Path) -> str:
    """How an adapter and its base become a model."""
    with reading(directory / "adapter_config.json", "Give the base model instead."):
        raw = read_small(directory / "adapter_config.json", _MOST_CONFIG_BYTES)
        values = parse_json(raw.decode("utf-8-sig"))
        base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    of = f" for {clip(base, 100)}" if isinstance(base, str) and base else ""
    if (directory / "edgezo.json").exists():
        return (
            f"\nIt is only an adapter{of}, which a run was exported to: "
            "edgezo export RUN --format hf --out DIR writes a whole model."
        )
    return (
        f"\nIt is only an adapter{of}. Merge it into its base first, and give the merged model: "
        'python -c "from peft import AutoPeftModelForCausalLM as A; '
        f"A.from_pretrained('{directory}').merge_and_unload().save_pretrained('merged')\"; "
        "then copy the base's tokenizer files into merged."
    )


def _head(path: Path) -> bytes:
    with reading(path), open(path, "rb") as stream:
        return stream.read(_HEAD_BYTES)


def refuse_foreign_codes(names: Iterable[str], where: Path) -> None:
    """EdgezoError for tensors by whose names a library of quantisation is known."""
    for name in names:
        for end, library in _CODES.items():
            if name.endswith(end):
                raise EdgezoError(
                    f"{where}: tensor {clip(name, 80)!r} belongs to codes of {library}, which only that library "
                    "reads. Give the full-precision checkpoint, which --precision quantises while it loads, or a "
                    "GGUF file."
                )


_CODES = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight.absmax": "bitsandbytes",
    ".weight_format": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8",
    ".W_q": "HQQ",
}
