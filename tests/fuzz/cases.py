"""Foreign weights and finetuners, (name, bytes) from a random generator, and odd values for every other form.

Fields contradict each other or the file's size; there are overlaps, numbers of thousands of digits, counts without end
and flipped bytes. What reads them stands in readers.py.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import zipfile
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


def gguf_case(rng: random.Random) -> Case:
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


def safetensors_case(rng: random.Random) -> Case:
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


def index_case(rng: random.Random) -> Case:
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


def shards_case(rng: random.Random) -> Case:
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


def pickled_case(rng: random.Random) -> Case:
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
