"""Files of pickled networks: read to the bit, and whatever else one may hold is refused without being run."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import cases
from torch import nn

from edgezo.errors import EdgezoError
from edgezo.run.pickled import read_networks


def network(hidden: int = 6, features: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def published(path: Path, **networks: Any) -> Path:
    """A file as finetuners are published: ``torch.save`` of a dictionary of modules."""
    torch.save({name.replace("__", "."): module for name, module in networks.items()}, path)
    return path


def with_pickle(path: Path, program: bytes, template: Path) -> Path:
    """``template`` with another pickle in it."""
    with zipfile.ZipFile(template) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            own = item.filename.endswith("/data.pkl")
            new.writestr(item.filename, program if own else old.read(item.filename))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_published_networks_are_read_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    wanted = {"model__embed": network().to(dtype), "model__norm": network(9).to(dtype)}
    found = read_networks(published(tmp_path / "f.pth", **wanted))
    assert list(found) == ["model.embed", "model.norm"]
    for module, layers in zip(wanted.values(), found.values(), strict=True):
        assert [sorted(layer) for layer in layers] == [["bias", "weight"], [], ["bias", "weight"]]
        for name, values in module.state_dict().items():
            at, kind = name.split(".")
            np.testing.assert_array_equal(layers[int(at)][kind], values.float().numpy())


class Runs:
    """Unpickled, it would make a file."""

    def __init__(self, canary: Path, call: Callable[..., Any] = os.system):
        self.canary, self.call = canary, call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, (f"touch {self.canary}",)


class Evaluates(Runs):
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.canary)!r}, 'w')",)


class Sets(Runs):
    """The payload in a state, for objects that the reader knows."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), {"x": Evaluates(self.canary)}


def crafted(kind: str, canary: Path) -> Any:
    one = network()
    if kind == "hidden":
        one.extra = Evaluates(canary)  # type: ignore[assignment]
        return {"a": one}
    if kind == "another module":
        return {"a": nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1))}
    return {
        "system": Runs(canary),
        "eval": {"a": Evaluates(canary)},
        "state": {"a": Sets(canary)},
        "key": {Evaluates(canary).canary: one},
        "list": [one],
        "tensor": {"a": torch.zeros(3)},
        "not in sequence": {"a": nn.Linear(5, 1)},
        "no bias": {"a": nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 1))},
        "bfloat16": {"a": network().bfloat16()},
        "transposed": {"a": transposed(one)},
    }[kind]


def transposed(module: nn.Sequential) -> nn.Sequential:
    module[0].weight = nn.Parameter(torch.zeros(5, 6).T)
    return module


@pytest.mark.parametrize(
    "kind",
    [
        *"system eval state key list tensor hidden bfloat16 transposed".split(),
        *("another module", "not in sequence", "no bias"),
    ],
)
def test_what_holds_anything_else_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "f.pth"
    torch.save(crafted(kind, canary), path)
    with pytest.raises(EdgezoError, match="Nothing of it was run"):
        read_networks(path)
    assert not canary.exists()


def programs(canary: Path) -> dict[str, bytes]:
    """Pickles by hand: names that the reader knows, put to another use, and opcodes that it does not."""
    touch = f"touch {canary}".encode()
    return {
        "protocol 0": b"cos\nsystem\n(S'" + touch + b"'\ntR.",
        "inst": b"(S'" + touch + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + touch + b"'\no.",
        "stack global": pickle.dumps(Runs(canary), 4),
        "submodule": b"\x80\x02ctorch.nn.modules.linear\nLinear.__init__.__globals__\n.",
        "extension": b"\x80\x02\x82\x01.",
        "calls a layer": b"\x80\x02ctorch.nn.modules.linear\nLinear\n)R.",
        "state of a name": b"\x80\x02ctorch.nn.modules.linear\nLinear\n}b.",
        "new of a dictionary": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        "filled from a call": b"\x80\x02ccollections\nOrderedDict\n]]a\x85R.",
        "persistent name": b"\x80\x02}X\x01\x00\x00\x00aX\x01\x00\x00\x00bQs.",
        "stack underflow": b"\x80\x02}s.",
        "no memo": b"\x80\x02h\x05.",
        "no end": b"\x80\x02}",
        "no mark": b"\x80\x02u.",
        "two results": b"\x80\x02}}.",
        "empty": b"",
        "none": b"\x80\x02N.",
        "nested": b"\x80\x02)" + b"\x85" * 50_000 + b".",
        "key of nests": b"\x80\x02})" + b"\x85" * 50_000 + b"Ns.",
    }


@pytest.mark.parametrize("name", programs(Path("canary")))
def test_a_crafted_program_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
    canary, whole = tmp_path / "canary", published(tmp_path / "whole.pth", a=network())
    path = with_pickle(tmp_path / "f.pth", programs(canary)[name], whole)
    with pytest.raises(EdgezoError, match="Nothing of it was run"):
        read_networks(path)
    assert not canary.exists()


# What follows a storage of 6 x 5 values: offset 0, shape (6, 5).
OFFSET_AND_SHAPE = b"QK\x00K\x06K\x05\x86"


@pytest.mark.parametrize(
    "other",
    [
        b"QK\x01K\x06K\x05\x86",
        b"QJ\xff\xff\xff\xffK\x06K\x05\x86",
        b"QK\x00K\x07K\x05\x86",
        b"QK\x00NK\x05\x86",
        b"QK\x00J\xfa\xff\xff\xffJ\xfb\xff\xff\xff\x86",
    ],
    ids=["beyond its storage", "before it", "larger than it", "no number", "negative"],
)
def test_a_tensor_that_is_not_all_there_is_refused(other: bytes, tmp_path: Path) -> None:
    whole = published(tmp_path / "whole.pth", a=network())
    with zipfile.ZipFile(whole) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        program = archive.read(name)
    assert program.count(OFFSET_AND_SHAPE) == 1
    changed = program.replace(OFFSET_AND_SHAPE, other)
    with pytest.raises(EdgezoError, match="Nothing of it was run"):
        read_networks(with_pickle(tmp_path / "f.pth", changed, whole))


def test_damage_anywhere_is_an_error_and_nothing_worse(tmp_path: Path) -> None:
    whole, rng = published(tmp_path / "whole.pth", a=network()), random.Random(0)
    with zipfile.ZipFile(whole) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        program = archive.read(name)
    path, refused = tmp_path / "f.pth", 0
    for _ in range(300):
        damaged = bytearray(program)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            read_networks(with_pickle(path, bytes(damaged), whole))
        except EdgezoError:
            refused += 1
    assert refused > 100


def test_files_that_are_no_archive_of_torch_are_refused(tmp_path: Path) -> None:
    whole = published(tmp_path / "whole.pth", a=network())
    data = whole.read_bytes()
    packed = io.BytesIO()
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item.filename))
    short = io.BytesIO()
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(short, "w") as new:
        for item in old.infolist():
            values = old.read(item.filename)
            new.writestr(item.filename, values[:-4] if "/data/" in item.filename else values)
    big = data.replace(b"little", b"bigbig")
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    for content in (b"", data[: len(data) // 2], packed.getvalue(), short.getvalue(), big):
        (tmp_path / "f.pth").write_bytes(content)
        with pytest.raises(EdgezoError):
            read_networks(tmp_path / "f.pth")
    (tmp_path / "f.pth").write_bytes(empty.getvalue())
    with pytest.raises(EdgezoError, match="0 pickles"):
        read_networks(tmp_path / "f.pth")
    with open(tmp_path / "huge.pth", "wb") as file:
        file.truncate(65_000_000)
    with pytest.raises(EdgezoError, match="65,000,000 bytes"):
        read_networks(tmp_path / "huge.pth")
    with pytest.raises(EdgezoError, match="No such file"):
        read_networks(tmp_path / "none.pth")


def test_programs_and_archives_that_multiply_are_refused_before_they_do(tmp_path: Path) -> None:
    sound = cases.sound_pickled()
    name = next(name for name in sound if name.endswith("data.pkl"))
    shape, tuples = b"QK\x00K\x06K\x05\x86", b"q\x00h\x00\x86" * 5000
    long = b"\x8a\xff" + b"\x7f" * 255
    programs = {
        "a key of tuples that share their parts": b"\x80\x02})" + tuples + b"Ns.",
        "a value of tuples that share their parts": b"\x80\x02)" + tuples + b".",
        "axes of hundreds of digits": sound[name].replace(shape, b"QK\x00(" + long * 1000 + b"t"),
        "many axes": sound[name].replace(shape, b"QK\x00(" + b"K\x01" * 3000 + b"t"),
        "more opcodes than networks have": b"\x80\x02" + b"N" * 300_000 + b".",
        "a long program": b"\x80\x02" + b"N" * 5_000_000 + b".",
    }
    rng, archives = random.Random(0), {}
    for what, program in programs.items():
        archives[what] = cases.zipped(rng, list((sound | {name: program}).items()))
    storage = next(item for item in sound.items() if "/data/" in item[0])
    parts = [*sound.items(), *[(f"{storage[0]}{i}", storage[1]) for i in range(400)]]
    archives["parts that overlap"] = cases.zipped(rng, parts, overlap=True)
    archives["two parts of one name"] = cases.zipped(rng, [*sound.items(), storage])
    archives["many parts"] = cases.zipped(rng, [(f"a/{i}", b"") for i in range(20_000)])
    for what, archive in archives.items():
        (tmp_path / "f.pth").write_bytes(archive)
        with pytest.raises(EdgezoError, match="Nothing of it was run") as caught:
            read_networks(tmp_path / "f.pth")
        assert len(str(caught.value)) < 1000, what
    (tmp_path / "f.pth").write_bytes(cases.zipped(rng, list(sound.items())))
    assert len(read_networks(tmp_path / "f.pth")) == 2


def test_a_storage_that_tensors_share_is_read_once_and_values_are_bounded_by_the_file(
    tmp_path: Path,
) -> None:
    shared = nn.Parameter(torch.ones(100, 100))
    networks = {}
    for i in range(400):
        one = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 1))
        one[0].weight = shared
        networks[f"n{i}"] = one
    with pytest.raises(EdgezoError, match="more values than the file has bytes"):
        read_networks(published(tmp_path / "f.pth", **networks))


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    one = network().double()
    with torch.no_grad():
        one[0].weight[0, 0] = 1e300  # finite, but not in fp32
    with pytest.raises(EdgezoError, match="not finite in fp32"):
        read_networks(published(tmp_path / "f.pth", a=one))
