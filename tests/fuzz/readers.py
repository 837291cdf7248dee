"""Foreign files of every form that edgezo reads: cases from a seed, and what a reader may make of each.

    gguf, safetensors, index, pickled     weights and finetuners: fields that contradict each other or the file's size,
                                          overlaps, numbers of thousands of digits, counts without end, bytes flipped
    configs, tokenizers, toml             settings of models, of tokenizers and of edgezo: kinds of values, names of
                                          code, depth, keys twice
    rows                                  JSONL, JSON and CSV: the suffix of a case's name says which
    templates                             chat templates: programs that write, count and call without end

``READERS`` has for each form what makes a case, (name, bytes), from a random generator, and what reads one: it returns
whether the case was accepted, and raises nothing but EdgezoError.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

Case = tuple[str, bytes]

INTEGERS = (
    *(0, 1, 2, 3, 4, 7, 8, 31, 32, 63, 64, 255, 256, 4095, 4096, 65535, 65536, 10**6),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "0", "wide", "\ud800", "a\0b", "x" * 300, "../../etc/passwd", "owner/kernel"),
    *([], [[]], {}, {"a": {"a": {}}}, [1] * 50, ["full_attention"] * 3, 10**40, -(10**40)),
    10**4200,
)
TEXTS = (
    *(
        "",
        "a",
        "text",
        "\u2603 snow",
        "\U0001f600",
        "a\r\nb",
        "\ufeff",
        "\u202e",
        '"',
        "\\",
        "{",
        "}",
    ),
    *("<s>", "</s>", "<mask>", "{text}", "{{", "\x00", "\x1b[2J", "x" * 500, " " * 200, "\n" * 50),
)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """``data`` with a few flipped, lost, repeated or foreign bytes."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(6):
            case 0 if content:
                content[at % len(content)] ^= 1 << rng.randrange(8)
            case 1:
                del content[at : at + rng.choice((1, 2, 8, 64, 1 << 20))]
            case 2:
                content[at:at] = content[at : at + rng.choice((1, 8, 64))]
            case 3:
                content[at:at] = rng.randbytes(rng.choice((1, 4, 8, 32)))
            case 4:
                content[at : at + 8] = struct.pack("<Q", rng.choice(INTEGERS))
            case 5:
                content[at : at + 4] = struct.pack("<I", rng.choice(INTEGERS) % 2**32)
    return bytes(content)


def rarely(rng: random.Random, large: int, *usual: int) -> int:
    """One of the usual numbers, and in one of 50 cases the large one, which takes long."""
    return large if rng.random() < 0.02 else rng.choice(usual)


def odd(rng: random.Random, depth: int = 0) -> Any:
    """A value of JSON that nobody expects."""
    if depth < 3 and rng.random() < 0.15:
        return [odd(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 3 and rng.random() < 0.15:
        return {rng.choice(TEXTS): odd(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice((rng.choice(ODD_VALUES), rng.choice(INTEGERS), rng.choice(TEXTS)))


def written(rng: random.Random, value: Any) -> bytes:
    """``value`` as JSON, at times with a key twice, nested without end, or damaged."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    match rng.randrange(24):
        case 0:
            at = text.find(", ")
            text = text[: at + 2] + text[1 : at + 2] + text[at + 2 :] if at > 0 else text
        case 1:
            n = rarely(rng, 100_000, 10, 70, 1000)
            text = '{"a":' * n + text + "}" * n
        case 2:
            n = rarely(rng, 100_000, 10, 70, 1000)
            text = text.replace("1", "[" * n + "]" * n, 1)
        case 3:
            text = text.replace("1", "9" * rarely(rng, 100_000, 20, 4000, 5000), 1)
        case 4:
            return damaged(rng, text.encode("utf-8", "surrogatepass"))
        case 5:
            return text.encode(rng.choice(("utf-16", "utf-8-sig", "latin-1")), "replace")
        case 6:
            text = text.replace(": ", ": " + " " * rarely(rng, 100_000, 1000), 1)
    return text.encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------
# GGUF


class GgufFields(NamedTuple):
    """A GGUF file in fields that may contradict each other."""

    values: list[tuple[bytes, int, bytes]]  # key, type, value
    tensors: list[tuple[bytes, tuple[int, ...], int, int]]  # name, axes, type, offset
    data: bytes
    value_count: int | None = None
    tensor_count: int | None = None
    version: int = 3

    def encode(self) -> bytes:
        def text(value: bytes) -> bytes:
            return struct.pack("<Q", len(value)) + value

        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.values) if self.value_count is None else self.value_count,
        )
        head = b"GGUF" + struct.pack("<IQQ", self.version, *counts)
        for key, kind, value in self.values:
            head += text(key) + struct.pack("<I", kind) + value
        for name, axes, kind, offset in self.tensors:
            head += text(name) + struct.pack("<I", len(axes))
            head += b"".join(struct.pack("<Q", n % 2**64) for n in axes)
            head += struct.pack("<IQ", kind % 2**32, offset % 2**64)
        return head + b"\0" * (-len(head) % 32) + self.data


# Types of a GGUF file's matrices, with the size of the model that has them: blocks of 32 or 256 numbers.
GGUF_TYPES: dict[str, dict[str, int]] = {
    **{name: {} for name in ("F32", "F16")},
    **{name: {"hidden_size": 96, "intermediate_size": 96} for name in ("Q8_0", "Q4_0")},
    **{name: {"hidden_size": 768, "intermediate_size": 256} for name in ("Q4_K", "Q6_K")},
}


@cache
def sound_gguf(matrix_type: str = "F32") -> GgufFields:
    """A model of one block, read back from what llama.cpp's converter would write."""
    import tempfile

    import gguf
    import tiny_models

    model = tiny_models.random_model(
        "llama",
        **{"num_hidden_layers": 1, "attention_bias": False, "mlp_bias": False},
        **GGUF_TYPES[matrix_type],
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "m.gguf"
        tiny_models.make_gguf(model, file, matrix_type=matrix_type, tokenizer=True)
        reader = gguf.GGUFReader(file)
        values = []
        for key, field in reader.fields.items():
            if key.startswith("GGUF."):
                continue
            kinds = [int(kind) for kind in field.types]
            raw = b"".join(bytes(part.tobytes()) for part in field.parts[3:])
            values.append((key.encode(), kinds[0], raw))
        tensors, data = [], b""
        for tensor in reader.tensors:
            axes = tuple(int(n) for n in tensor.shape)
            tensors.append((tensor.name.encode(), axes, int(tensor.tensor_type), len(data)))
            data += tensor.data.tobytes()
            data += b"\0" * (-len(data) % 32)
    return GgufFields(values, tensors, data)


def _gguf(rng: random.Random) -> Case:
    sound = sound_gguf(rng.choice(("F32", *GGUF_TYPES)))
    values, tensors = list(sound.values), list(sound.tensors)
    changes: dict[str, Any] = {"data": sound.data}
    name = rng.choice(
        "flip value type array key tensor axes offset counts many texts version".split()
    )
    at, place = rng.randrange(len(values)), rng.randrange(len(tensors))
    key, kind, value = values[at]
    tensor, axes, stored, offset = tensors[place]
    match name:
        case "flip":
            return name, damaged(rng, sound.encode())
        case "value":
            values[at] = (key, kind, rng.randbytes(len(value)) if len(value) < 9 else value[::-1])
        case "type":
            values[at] = (key, rng.choice((*range(14), 2**31)), value)
        case "array":
            element, count = rng.choice((*range(13), 9, 77)), rng.choice(INTEGERS)
            values[at] = (key, 9, struct.pack("<IQ", element, count) + rng.randbytes(40))
        case "key":
            values[at] = (rng.choice((values[0][0], b"", b"\xff", b"k" * 9999)), kind, value)
        case "tensor":
            twin = tensors[rng.randrange(len(tensors))][0]
            odd_name = rng.choice((twin, b"", b"\xff", b"blk.99999.attn_q.weight", b"x.weight"))
            tensors[place] = (odd_name, axes, stored, offset)
        case "axes":
            many = tuple(rng.choice((*INTEGERS, *axes)) for _ in range(rng.randrange(7)))
            tensors[place] = (tensor, many, stored, offset)
        case "offset":
            tensors[place] = (tensor, axes, rng.choice((stored, *range(40))), rng.choice(INTEGERS))
        case "counts":
            changes |= {rng.choice(("value_count", "tensor_count")): rng.choice(INTEGERS)}
        case "many":
            n = rarely(rng, 10_000, 100)
            values += [(b"k%d" % i, 0, b"\0") for i in range(n)]
        case "texts":
            n = rarely(rng, 100_000, 100, 1000)
            values[at] = (
                key,
                9,
                struct.pack("<IQ", 8, n) + b"\0" * (8 * rng.choice((n, n - 1, 3))),
            )
        case "version":
            changes |= {"version": rng.choice(INTEGERS) % 2**32}
    return name, GgufFields(values, tensors, **changes).encode()


# ---------------------------------------------------------------------------------------------
# safetensors


@cache
def sound_model() -> Path:
    """A model directory of one block with a tokenizer, which stays until the process ends."""
    import atexit
    import tempfile

    from conftest import make_model

    folder = Path(tempfile.mkdtemp(prefix="edgezo-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_model(folder / "model")


@cache
def sound_safetensors() -> tuple[dict[str, Any], bytes]:
    """The header of the model's weights, and the bytes after it."""
    raw = (sound_model() / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def _safetensors(rng: random.Random) -> Case:
    sound, data = sound_safetensors()
    header = json.loads(json.dumps(sound))
    tensor = header[rng.choice([name for name in header if name != "__metadata__"])]
    name = rng.choice("flip shape dtype offsets field names length zero many deep swap".split())
    match name:
        case "flip":
            raw = json.dumps(sound).encode()
            return name, damaged(rng, struct.pack("<Q", len(raw)) + raw + data)
        case "shape":
            axes = rarely(rng, 3000, 0, 1, 2, 8, 9, 30)
            tensor["shape"] = [rng.choice((*INTEGERS, 10**40, 10**4000, -1)) for _ in range(axes)]
        case "dtype":
            tensor["dtype"] = rng.choice(("F8", "F64", "I64", "BOOL", "C64", "U16", odd(rng)))
        case "offsets":
            tensor["data_offsets"] = [rng.choice((*INTEGERS, 10**400, -4)) for _ in range(2)]
        case "field":
            tensor[rng.choice(list(tensor))] = odd(rng)
        case "names":
            header[rng.choice(TEXTS) * rng.choice((1, 1, 1000))] = tensor
        case "length":
            raw = json.dumps(header).encode()
            return name, struct.pack("<Q", rng.choice(INTEGERS)) + raw + data
        case "zero":
            header["empty"] = {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}
        case "many":
            n = rarely(rng, 10_000, 10)
            header |= {
                f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(n)
            }
        case "deep":
            raw = written(rng, header)
            return name, struct.pack("<Q", len(raw)) + raw + data
        case "swap":
            other = header[rng.choice([name for name in header if name != "__metadata__"])]
            tensor["data_offsets"], other["data_offsets"] = (
                other["data_offsets"],
                tensor["data_offsets"],
            )
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    return name, struct.pack("<Q", len(raw)) + raw + data


def _index(rng: random.Random) -> Case:
    sound, _ = sound_safetensors()
    names = [name for name in sound if name != "__metadata__"]
    weights: dict[str, Any] = dict.fromkeys(names, "model-1.safetensors")
    index: Any = {"metadata": {"total_size": 1}, "weight_map": weights}
    name = rng.choice("shard missing odd written many".split())
    match name:
        case "shard":
            places = ("../x", "/etc/passwd", "a\0b", "x" * 5000, "", ".", "..", "a\\b", "\ud800")
            weights[rng.choice(names)] = rng.choice(places)
        case "missing":
            weights["absent"] = rng.choice(("model-1.safetensors", "model-2.safetensors"))
        case "odd":
            index[rng.choice(("metadata", "weight_map"))] = odd(rng)
        case "written":
            return name, written(rng, index)
        case "many":
            weights |= {f"t{i}": f"s{i}" for i in range(rarely(rng, 20_000, 100))}
    return name, json.dumps(index).encode("utf-8", "surrogatepass")


def _shards(rng: random.Random) -> Case:
    """Weights in two files, as JSON: the index, and the bytes of each. Its names may be in both, or in none."""
    sound, data = sound_safetensors()
    names = [name for name in sound if name != "__metadata__"]
    shards: list[dict[str, Any]] = [{}, {}]
    weights = {}
    for name in names:
        which = rng.randrange(2)
        weights[name] = f"model-{which + 1}.safetensors"
        shards[which][name] = dict(sound[name])
    bodies = []
    for shard in shards:
        body = b""
        for place in shard.values():
            first, last = place["data_offsets"]
            place["data_offsets"] = [len(body), len(body) + last - first]
            body += data[first:last]
        bodies.append(body)
    name = rng.choice("sound moved twice swapped header flip".split())
    chosen = rng.choice(names)
    if name == "moved":
        weights[chosen] = rng.choice(
            ("model-1.safetensors", "model-2.safetensors", "model-3.safetensors")
        )
    elif name == "twice":
        place = next(shard[chosen] for shard in shards if chosen in shard)
        for shard in shards:
            shard.setdefault(chosen, place)
    elif name == "swapped":
        bodies.reverse()
    elif name == "header" and shards[0]:
        shards[0][rng.choice(sorted(shards[0]))][rng.choice(("dtype", "shape"))] = odd(rng)
    files = []
    for shard, body in zip(shards, bodies, strict=True):
        raw = json.dumps(shard).encode("utf-8", "surrogatepass")
        whole = struct.pack("<Q", len(raw)) + raw + body
        files.append(damaged(rng, whole) if name == "flip" and rng.random() < 0.5 else whole)
    return name, json.dumps([weights, *(file.hex() for file in files)]).encode()


# ---------------------------------------------------------------------------------------------
# Pickled finetuners


@cache
def sound_pickled() -> dict[str, bytes]:
    """The parts of a published finetuner's file."""
    import io

    import torch
    from torch import nn

    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
    file = io.BytesIO()
    torch.save({"model.embed": network, "model.norm": network}, file)
    with zipfile.ZipFile(file) as archive:
        return {item.filename: archive.read(item.filename) for item in archive.infolist()}


def zipped(rng: random.Random, parts: list[tuple[str, bytes]], overlap: bool = False) -> bytes:
    """A zip by hand, whose table of contents may contradict its parts."""
    body, table, first = b"", b"", 0
    for name, data in parts:
        raw, at = name.encode("utf-8", "replace"), len(body)
        head = struct.pack(
            "<HHHHHIIIHH", 20, 0, 0, 0, 33, zipfile.crc32(data), *[len(data)] * 2, len(raw), 0
        )
        body += b"PK\3\4" + head + raw + data
        place = first if overlap else at
        table += b"PK\1\2" + struct.pack("<H", 20) + head
        table += struct.pack("<HHHII", 0, 0, 0, 0, place) + raw
    size = rng.choice(INTEGERS) % 2**16 if rng.random() < 0.05 else len(parts)
    end = struct.pack("<HHHHIIH", 0, 0, size % 2**16, size % 2**16, len(table), len(body), 0)
    return body + table + b"PK\5\6" + end


def _pickled(rng: random.Random) -> Case:
    sound = sound_pickled()
    program_name = next(name for name in sound if name.endswith("data.pkl"))
    program, parts = sound[program_name], dict(sound)
    name = rng.choice("flip opcodes shared shape storages overlap zip objects texts marks".split())
    match name:
        case "flip":
            parts[program_name] = damaged(rng, program)
        case "opcodes":
            at = rng.randrange(2, len(program))
            codes = (
                b"}]()N\x88\x89\x85\x86\x87tsubRQ\x81h\0q\0K\1J\xff\xff\xff\xff\x8a\x08"
                + b"\xff" * 8
            )
            more = bytes(rng.choice(codes) for _ in range(rng.choice((1, 3, 30, 3000))))
            parts[program_name] = program[:at] + more + program[at:]
        case "shared":
            n = rarely(rng, 30_000, 5, 30, 300)
            nested = b"\x80\x02)" + b"q\0h\0\x86" * n
            parts[program_name] = rng.choice((nested + b".", b"\x80\x02}" + nested[2:] + b"Ns."))
        case "shape":
            long = b"\x8a\xff" + b"\x7f" * 255
            number = rng.choice((b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", long, b"K\0", b"N"))
            axes = b"(" + number * rng.choice((1, 2, 3, 1000)) + b"t"
            parts[program_name] = program.replace(b"QK\0K\6K\5\x86", b"QK\0" + axes)
        case "storages":
            twice = program.count(b"X\1\0\0\0") and program.replace(
                b"X\1\0\0\0001", b"X\1\0\0\0000"
            )
            parts[program_name] = twice or program
        case "overlap" | "zip":
            listed = [*parts.items(), *([next(iter(parts.items()))] * rng.choice((0, 1, 40)))]
            data = zipped(rng, listed, overlap=name == "overlap")
            return name, damaged(rng, data) if rng.random() < 0.5 else data
        case "objects":
            parts[program_name] = (
                b"\x80\x02"
                + rng.choice((b"}", b"]", b")", b"N")) * rarely(rng, 900_000, 3, 3000)
                + b"."
            )
        case "texts":
            size = rng.choice(INTEGERS) % 2**32
            parts[program_name] = b"\x80\x02X" + struct.pack("<I", size) + b"a" * 100 + b"."
        case "marks":
            parts[program_name] = (
                b"\x80\x02" + b"(" * rarely(rng, 100_000, 10, 1000) + b"t" * 50 + b"."
            )
    return name, zipped(rng, list(parts.items()))


# ---------------------------------------------------------------------------------------------
# Settings

# Fields that choose code, files or machines where they are believed.
HOSTILE_FIELDS: dict[str, Any] = {
    "attn_implementation": "owner/kernel",
    "_attn_implementation": "owner/kernel",
    "_attn_implementation_internal": "owner/kernel",
    "experts_implementation": "owner/kernel",
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "trust_remote_code": True,
    "torch_dtype": "hub",
    "dtype": "_dynamo",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "kernel_config": {"RMSNorm": "owner/kernel:layer"},
    "use_kernels": True,
    "_name_or_path": "owner/model",
    "name_or_path": "/etc",
    "configuration_files": ["config.5.0.0.json"],
    "transformers_weights": "../evil.bin",
    "per_layer_config": {"0": {"hidden_size": 10**6}},
    "num_labels": 10**9,
    "id2label": {"0": "a"},
    "architectures": ["EvilModel"],
    "output_attentions": True,
    "is_decoder": True,
    "hidden_act": "xielu",
    "rope_scaling": {"rope_type": "owner/rope", "factor": 2.0},
    "text_config": {"attn_implementation": "owner/kernel"},
    "model_type": "mamba",
    "tokenizer_class": "evil.Tokenizer",
    "pruned_heads": {"0": [0]},
    "chunk_size_feed_forward": 1,
    "layer_types": ["owner/attention"],
}


def _configs(rng: random.Random) -> Case:
    values = json.loads((sound_model() / "config.json").read_text(encoding="utf-8"))
    name = rng.choice("hostile odd sizes written rope missing family".split())
    numbers = [key for key, value in values.items() if type(value) in (int, float)]
    match name:
        case "hostile":
            for key in rng.sample(sorted(HOSTILE_FIELDS), rng.choice((1, 1, 2, 6))):
                values[key] = HOSTILE_FIELDS[key]
        case "odd":
            values[rng.choice(sorted(values))] = odd(rng)
        case "sizes":
            for key in rng.sample(numbers, rng.choice((1, 2))):
                values[key] = rng.choice((*INTEGERS, -1, 10**30))
        case "written":
            return name, written(rng, values)
        case "rope":
            key = rng.choice(("rope_scaling", "rope_parameters"))
            kinds = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "su", "evil")
            table = {"rope_type": rng.choice(kinds), rng.choice(("factor", "rope_theta")): odd(rng)}
            values[key] = rng.choice((table, {"full_attention": table}, odd(rng)))
            values["partial_rotary_factor"] = rng.choice((None, 0.5, 1e9, -1, 0))
        case "missing":
            del values[rng.choice(sorted(values))]
        case "family":
            import tiny_models

            values["model_type"] = rng.choice((*tiny_models.FAMILIES, "gemma3", "bert", 3, None))
            values["text_config"] = rng.choice((None, {}, dict(values), odd(rng)))
    return name, json.dumps(values).encode("utf-8", "surrogatepass")


def _tokenizers(rng: random.Random) -> Case:
    values = json.loads((sound_model() / "tokenizer_config.json").read_text(encoding="utf-8"))
    hostile: dict[str, Any] = {
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
        "tokenizer_class": rng.choice(("evil.T", "BertJapaneseTokenizer", "MistralCommonBackend")),
        "fast_tokenizer_files": ["tokenizer.1.0.json", "../tokenizer.json"],
        "tokenizer_file": "/etc/passwd",
        "vocab_file": "/etc/passwd",
        "init_inputs": ["/etc/passwd"],
        "tokenizer_object": "evil",
        "sp_model_kwargs": {"x": 1},
        "chat_template": rng.choice(("{{ 1", "{% for %}", [{"name": 1}], 3, "\ud800")),
        "added_tokens_decoder": {"x": {}, "0": {"content": 3}, "99999999": {"content": "<x>"}},
        "model_max_length": 10**30,
        "extra_special_tokens": {"a": {"b": "c"}},
        "fix_mistral_regex": True,
    }
    name = rng.choice("hostile odd written".split())
    if name == "hostile":
        values |= {key: hostile[key] for key in rng.sample(sorted(hostile), rng.choice((1, 2, 5)))}
    elif name == "odd":
        values[rng.choice(sorted({*values, "bos_token", "padding_side"}))] = odd(rng)
    else:
        return name, written(rng, values)
    return name, json.dumps(values).encode("utf-8", "surrogatepass")


@cache
def _sound_vocabulary() -> Any:
    return json.loads((sound_model() / "tokenizer.json").read_text(encoding="utf-8"))


def _vocabularies(rng: random.Random) -> Case:
    """tokenizer.json: what the library in Rust parses."""
    values = json.loads(json.dumps(_sound_vocabulary()))
    name = rng.choice("part model merges vocabulary added written type".split())
    model = values["model"]
    match name:
        case "part":
            values[rng.choice(sorted(values))] = odd(rng)
        case "model":
            model[rng.choice(sorted(model))] = odd(rng)
        case "merges":
            merges = model["merges"]
            wrong = (
                ["a"],
                "a",
                ["a", "b", "c"],
                ["absent", "x"],
                [],
                "",
                ["\ud800", "a"],
                merges[:1],
            )
            merges[rng.randrange(len(merges))] = rng.choice(wrong)
        case "vocabulary":
            token = rng.choice(sorted(model["vocab"]))
            model["vocab"][token] = rng.choice((*INTEGERS, -1, 3.5, "1", None))
        case "added":
            token = rng.choice(values["added_tokens"] or [{}])
            token[rng.choice(("id", "content", "special", "x"))] = odd(rng)
        case "written":
            return name, written(rng, values)
        case "type":
            place = values[rng.choice(("pre_tokenizer", "decoder", "post_processor", "model"))]
            pattern = {"Regex": rng.choice(("(a+)+$", "(?:a|a)*b", "[", "(" * 500, "\\p{L}+"))}
            more = {
                "type": rng.choice(("Split", "Sequence", "Unigram", "Evil")),
                "pattern": pattern,
            }
            if isinstance(place, dict):
                place |= more | {"behavior": "Isolated", "invert": False}
    return name, json.dumps(values).encode("utf-8", "surrogatepass")


def _toml(rng: random.Random) -> Case:
    lines = ['model = "smollm2-135m"', "steps = 3", 'task = "example"', "batch_size = 4"]
    name = rng.choice("flip depth keys dotted odd".split())
    match name:
        case "flip":
            return name, damaged(rng, "\n".join(lines).encode())
        case "depth":
            n = rarely(rng, 100_000, 10, 100, 2000)
            lines.append(rng.choice(("x = " + "[" * n, "x = " + "{a=" * n, "[" * n + "a")))
        case "keys":
            lines.append(rng.choice(lines))
        case "dotted":
            lines.append(".".join("a" * rarely(rng, 100_000, 3, 100, 2000)) + " = 1")
        case "odd":
            lines.append(f"steps2 = {json.dumps(odd(rng))}")
    return name, "\n".join(lines).encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------
# Rows and templates


def _row(rng: random.Random) -> dict[str, Any]:
    """A row of one of the kinds, at times with a field that is another thing."""
    text = rng.choice(TEXTS) + rng.choice(("a film", "", "b")) * rng.choice((1, 3, 40))
    turns = [{"role": r, "content": text} for r in ("user", "assistant") * rng.choice((1, 1, 20))]
    row = rng.choice(
        (
            {"text": text},
            {"text": text, "label": rng.choice((0, 1, "good", 1.0, True, None))},
            {"prompt": text, "completion": rng.choice(TEXTS) or "x"},
            {"prompt": text, "chosen": "a", "rejected": rng.choice(("b", "a", ""))},
            {"prompt": text, "completion": "x", "label": rng.choice((True, False, "up", 1))},
            {"messages": turns},
        )
    )
    row = dict(row)
    if rng.random() < 0.15:
        row[rng.choice(sorted(row))] = odd(rng)
    if rng.random() < 0.1:
        row[rng.choice(TEXTS)] = odd(rng)
    return row


def _rows(rng: random.Random) -> Case:
    kind = _row(rng)
    rows = [kind if rng.random() < 0.8 else _row(rng) for _ in range(rng.choice((1, 2, 5, 30)))]
    name = rng.choice("lines lines array csv damaged long many".split())
    match name:
        case "lines" | "damaged":
            data = b"\n".join(written(rng, row) for row in rows)
            return f"{name}.jsonl", damaged(rng, data) if name == "damaged" else data
        case "array":
            return f"{name}.json", written(rng, rows)
        case "csv":
            names = rng.choice(
                (("text", "label"), ("text", "text"), ("prompt", "completion"), ("",))
            )
            cells = [[rng.choice(TEXTS) for _ in names] for _ in rows]
            lines = [names, *cells]
            quoted = rng.choice((lambda c: c, lambda c: '"' + c.replace('"', '""') + '"'))
            text = rng.choice(("\n", "\r\n", "\r")).join(",".join(map(quoted, r)) for r in lines)
            data = text.encode()
            return f"{name}.csv", damaged(rng, data) if rng.random() < 0.3 else data
        case "long":
            size = rarely(rng, 300_000, 1000, 10_000)
            text = rng.choice(("a", "word ", "\U0001f600", "\n", "\u3042", "[]")) * size
            row = json.dumps({"text": text[:size]}) if rng.random() < 0.7 else "[" * size
            return f"{name}.jsonl", "\n".join([row] * 2).encode()
        case "many":
            row = rng.choice(("{}", '{"":0}', "x", "[]", '{"text":"a b"}', ""))
            return f"{name}.jsonl", f"{row}\n".encode() * rarely(rng, 20_000, 100)
    raise AssertionError(name)


def _templates(rng: random.Random) -> Case:
    n = rarely(rng, rng.choice((99_999, 10**9, 3 * 10**9)), 3, 12, 60)
    writers = (
        f"{{{{ 'x' * {n} }}}}",
        f"{{{{ [0] * {n} }}}}",
        f"{{{{ 'x'|center({n}) }}}}",
        f"{{{{ 'x'.ljust({n}) }}}}",
        f"{{{{ '%{n}d' % 1 }}}}",
        f"{{{{ '{{:{n}}}'.format(1) }}}}",
        f"{{{{ 10 ** {n} }}}}",
        f"{{{{ [1]|tojson(indent={n}) }}}}",
        f"{{{{ 'a\nb'|indent({n}) }}}}",
        f"{{% for i in range({n}) %}}{{% for j in range({n}) %}}{{% endfor %}}{{% endfor %}}",
        f"{{{{ range({n})|join('x' * {n}) }}}}",
        f"{{{{ ('x' * {min(n, 10**5)})|replace('x', 'y' * {min(n, 10**5)}) }}}}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
        f"{{{{ m({min(n, 9 if n < 2000 else 40)}) }}}}",
        f"{{% set ns = namespace(t='x') %}}{{% for i in range({60 if n > 60 else 12}) %}}"
        "{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception('no') }}",
        "{% import 'os' as os %}",
        "{% include '/etc/passwd' %}",
        f"{{{{ lipsum({n}) }}}}",
        "{% if true %}" * min(n, 3000) + "{% endif %}" * min(n, 3000),
    )
    sound = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    name = rng.choice("writer writer flip joined".split())
    if name == "flip":
        return name, damaged(rng, sound.encode())
    if name == "joined":
        return name, (sound + rng.choice(writers) + rng.choice(writers)).encode()
    return name, rng.choice(writers).encode()


# ---------------------------------------------------------------------------------------------
# Readers


class FuzzReader(NamedTuple):
    """Cases of one form, and what reads one of them in a folder: whether it was accepted."""

    make: Callable[[random.Random], Case]
    read: Callable[[str, bytes, Path], bool]
    share: int  # of the cases of a long run, beside those of the other kinds


def _model_with(folder: Path, **files: bytes) -> Path:
    """The sound model's directory in ``folder``, with other files in place of some: config__json and so on."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    given = {name.replace("__", "."): data for name, data in files.items()}
    for file in sound_model().iterdir():
        place = model / file.name
        place.unlink(missing_ok=True)
        if file.name not in given:
            place.symlink_to(file)
    for name, data in given.items():
        (model / name).write_bytes(data)
    return model


def _load(path: Path) -> bool:
    """Open a model, build its module and read every tensor. Raises EdgezoError."""
    from edgezo.network import loader

    files = loader.open_model(path)
    names = loader.source_names(files, loader.build_meta(files))
    for stored in names.values():
        files.source.read(stored)
    return True


def read_gguf(name: str, data: bytes, folder: Path) -> bool:
    file = folder / "model.gguf"
    file.write_bytes(data)
    _load(file)
    if zlib.crc32(data) % 20 == 0:  # a twentieth of a second each
        from edgezo.network.loader import load_tokenizer

        load_tokenizer(file)
    return True


def read_safetensors(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.weights.safetensors_file import SafetensorsSource

    (folder / "model.safetensors").write_bytes(data)
    source = SafetensorsSource(folder)
    for stored in source.names:
        source.read(stored)
        if source.shape(stored):
            source.read(stored, rows=slice(0, min(1, source.shape(stored)[0])))
    return True


def read_index(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.weights.safetensors_file import SafetensorsSource

    (folder / "model.safetensors.index.json").write_bytes(data)
    shard = folder / "model-1.safetensors"
    if not shard.exists():
        shutil.copyfile(sound_model() / "model.safetensors", shard)
    SafetensorsSource(folder)
    return True


def read_shards(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.weights.safetensors_file import SafetensorsSource

    weights, *files = json.loads(data)
    index = json.dumps({"metadata": {}, "weight_map": weights})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    for number, file in enumerate(files, 1):
        (folder / f"model-{number}.safetensors").write_bytes(bytes.fromhex(file))
    source = SafetensorsSource(folder)
    for stored in source.names:
        source.read(stored)
    return True


def read_pickled(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.run.pickled import read_networks

    (folder / "f.pth").write_bytes(data)
    return bool(read_networks(folder / "f.pth"))


def read_configs(name: str, data: bytes, folder: Path) -> bool:
    return _load(_model_with(folder, config__json=data))


def read_tokenizers(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.network.loader import load_tokenizer

    which = "special_tokens_map__json" if name.endswith("odd") else "tokenizer_config__json"
    tokenizer = load_tokenizer(_model_with(folder, **{which: data}))
    return len(tokenizer("a film")["input_ids"]) >= 0


def read_vocabularies(name: str, data: bytes, folder: Path) -> bool:
    """Load it, and tokenise as rows are."""
    from edgezo.data.dataset import DataRequest, load_dataset
    from edgezo.network.loader import load_tokenizer

    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps({"text": "aaaa " * n}) + "\n" for n in (2, 30, 300)))
    tokenizer = load_tokenizer(_model_with(folder, tokenizer__json=data))
    load_dataset(DataRequest(data=str(rows)), tokenizer)
    return True


def read_toml(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.plan.request import make_config, read_settings

    (folder / "c.toml").write_bytes(data)
    make_config({}, read_settings(folder / "c.toml"))
    return True


@cache
def byte_tokenizer() -> Any:
    """A tokenizer without a chat template: templates have cases of their own."""
    import tokenizers_fixture

    tokenizer = tokenizers_fixture.byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def read_rows(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.data.dataset import DataRequest, load_dataset
    from edgezo.machine.process_memory import ReadingGuard, rss_bytes

    file = folder / f"rows.{name.rpartition('.')[2]}"
    file.write_bytes(data)
    guard = ReadingGuard(rss_bytes() + 250_000_000)
    load_dataset(DataRequest(data=str(file)), byte_tokenizer(), guard=guard)
    return True


def read_templates(name: str, data: bytes, folder: Path) -> bool:
    """As ChatTemplates has it, but in a fork."""
    from fuzz.forked import run_forked

    from edgezo.errors import EdgezoError

    questions = [
        {
            "template": data.decode("utf-8", "replace"),
            "special_tokens": {"eos_token": "</s>"},
            "tokens": ["</s>"],
            "now": "2026-01-02T03:04:05",
        },
        {
            "messages": [
                {"role": "user", "content": "a film", "mood": "dark"},
                {"role": "assistant", "content": "good"},
            ],
            "variables": {"tools": []},
            "learned": [1],
        },
    ]
    (folder / "in").write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    run_forked("templates", folder, [])
    answers = (folder / "out").read_text(encoding="utf-8").splitlines()
    if len(answers) < 2 or "error" in json.loads(answers[1]):
        raise EdgezoError("the template fails")
    return True


READERS: dict[str, FuzzReader] = {
    "gguf": FuzzReader(_gguf, read_gguf, 20),
    "safetensors": FuzzReader(_safetensors, read_safetensors, 20),
    "index": FuzzReader(_index, read_index, 20),
    "shards": FuzzReader(_shards, read_shards, 20),
    "vocabularies": FuzzReader(_vocabularies, read_vocabularies, 20),
    "pickled": FuzzReader(_pickled, read_pickled, 20),
    "configs": FuzzReader(_configs, read_configs, 20),
    "tokenizers": FuzzReader(_tokenizers, read_tokenizers, 20),
    "toml": FuzzReader(_toml, read_toml, 20),
    "rows": FuzzReader(_rows, read_rows, 20),
    "templates": FuzzReader(_templates, read_templates, 20),
}
