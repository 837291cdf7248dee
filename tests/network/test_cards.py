"""Cards and their sources: the cache first, then each source in order; only verified bytes are used."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tiny_models
from huggingface_hub.errors import LocalEntryNotFoundError

from edgezo.errors import EdgezoError
from edgezo.network import cards
from edgezo.network.cards import Card, HubSource, WheelSource, find_card, resolve
from edgezo.network.loader import FAMILIES

WEIGHTS = bytes(range(256)) * 500
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()

# As the models' pages give them, or as transformers counts them.
PARAMETERS = {
    "smollm2-135m-instruct": 134_515_008,
    "smollm2-360m-instruct": 361_821_120,
    "smollm2-1.7b-instruct": 1_711_376_384,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,
    "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "phi-3-mini": 3_821_079_552,
    "roberta-large": 355_412_057,
}


def write_wheel(directory: Path, version: str = "1.0", member: bytes = WEIGHTS) -> Path:
    """A wheel of the distribution tinyweights with one data file."""
    directory.mkdir(parents=True, exist_ok=True)
    info = f"tinyweights-{version}.dist-info"
    files = {
        "tinyweights/model.gguf": member,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tinyweights\nVersion: %s\n"
        % version.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    path = directory / f"tinyweights-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


BASE = cards.cards()["smollm2-135m-instruct"]


def card(*sources: cards.Source) -> Card:
    return Card(**(vars(BASE) | {"name": "tiny", "aliases": ("tiny-alias",), "sources": sources}))


def last_bit_flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, which is all that pip looks into, an empty cache, and no hub."""
    monkeypatch.setenv("EDGEZO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shop"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "shop").mkdir()
    return tmp_path / "shop"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *sources: monkeypatch.setattr(cards, "cards", lambda: {"tiny": card(*sources)})


WHEEL = WheelSource("tinyweights==1.0", "tinyweights/model.gguf", SHA256)
HUB = HubSource("nobody/tiny-model-that-is-not-there")


def leftovers(cache: Path) -> list[str]:
    files = sorted(p.name for p in cache.rglob("*") if p.is_file())
    return [name for name in files if name != "model.gguf" and len(name) != 37]


# ----------------------------------------------------------------------------- the cards


def test_every_card_counts_the_parameters_that_its_model_has() -> None:
    assert {name: card.parameters for name, card in cards.cards().items()} == PARAMETERS


def test_every_card_is_of_a_family_that_loads_and_has_a_source() -> None:
    for each in cards.cards().values():
        assert FAMILIES[each.family].kind == each.kind and each.sources, each.name
        assert find_card(each.name) is each


@pytest.mark.parametrize(
    "name", ("smollm2-135m", "SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")
)
def test_a_card_is_found_by_alias_case_and_hub_id(name: str) -> None:
    card = find_card(name)
    assert card is not None and card.name == "smollm2-135m-instruct"
    assert [type(source) for source in card.sources] == [HubSource, WheelSource]


def test_a_malformed_card_names_its_file_and_fault(tmp_path: Path) -> None:
    models = Path(__file__).parents[2] / "models"
    sound = (models / "gemma-3-1b.toml").read_text(encoding="utf-8")
    for text, fault in (
        ("name = ", "odd.toml"),
        ('name = "a"\n[shape]\nlayrs = 2', "layrs"),
        ('name = "a"\n[shape]\nlayers = 2', "missing"),
        (sound.replace('name = "', 'name = 3 # "'), "name is no str: 3"),
        (re.sub("hidden = .*", 'hidden = "x"', sound), "hidden is no int: 'x'"),
        (re.sub("hidden = .*", "hidden = -1", sound), "hidden is -1"),
        (re.sub("hidden = .*", "hidden = true", sound), "hidden is no int: True"),
        (sound.replace('"rms+1"', '"rsm"'), "norm is 'rsm'"),
        (sound.replace("hub = ", "hub = 3 # "), "repo is no str: 3"),
        ("aliases = [3]\n" + re.sub("aliases = .*", "", sound), "an alias"),
    ):
        (tmp_path / "odd.toml").write_text(text)
        with pytest.raises(EdgezoError, match=fault):
            cards.read_card(tmp_path / "odd.toml")


# ----------------------------------------------------------------------------- local paths


def test_local_paths_resolve_to_themselves(tmp_path: Path) -> None:
    directory = tiny_models.make("llama", tmp_path / "hf")
    assert resolve(str(directory)) == directory
    (tmp_path / "one").mkdir()
    file = tmp_path / "one" / "a.gguf"
    file.write_bytes(b"GGUF")
    assert resolve(str(file)) == resolve(str(file.parent)) == file


def test_a_path_that_is_no_model_says_why(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("no model")
    with pytest.raises(EdgezoError, match="no GGUF file"):
        resolve(str(tmp_path / "text.txt"))
    with pytest.raises(EdgezoError, match=r"no config\.json"):
        resolve(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(EdgezoError, match="2 GGUF files"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("model", ("smollm-135m", "./nothing/here", "nothing.gguf", "x y"))
def test_an_unknown_model_gets_close_names_and_the_accepted_forms(model: str) -> None:
    with pytest.raises(EdgezoError, match="hub id") as caught:
        resolve(model)
    assert ("Did you mean smollm2-135m" in str(caught.value)) is (model == "smollm-135m")


# ----------------------------------------------------------------------------- wheel


def test_a_failing_source_falls_through_to_the_next_and_is_fetched_once(
    shop: Path, use: Any
) -> None:
    write_wheel(shop)
    use(HUB, WHEEL)
    messages: list[str] = []
    path = resolve("tiny-alias", progress=messages.append)
    assert path.read_bytes() == WEIGHTS and path.name == "model.gguf"
    assert any("HF_HUB_OFFLINE" in line for line in messages)
    assert leftovers(shop.parent / "cache") == []
    next(shop.iterdir()).unlink()
    assert resolve("tiny") == path


def test_a_damaged_cache_entry_is_fetched_again(shop: Path, use: Any) -> None:
    write_wheel(shop)
    use(WHEEL)
    path = resolve("tiny")
    data = bytearray(WEIGHTS)
    data[1000] ^= 1
    path.write_bytes(data)
    assert resolve("tiny").read_bytes() == WEIGHTS


def test_bytes_with_another_hash_never_reach_the_cache(shop: Path, use: Any) -> None:
    write_wheel(shop, member=WEIGHTS[:-1])
    use(WHEEL)
    with pytest.raises(EdgezoError, match="SHA-256"):
        resolve("tiny")
    assert not list((shop.parent / "cache").rglob("*.gguf"))
    assert leftovers(shop.parent / "cache") == []


def test_every_source_and_its_reason_are_in_the_last_error(shop: Path, use: Any) -> None:
    write_wheel(shop, version="2.0")
    torn = WheelSource("tinyweights==2.0", "tinyweights/other.gguf", SHA256)
    use(HUB, WHEEL, torn)
    with pytest.raises(EdgezoError) as caught:
        resolve("tiny")
    lines = str(caught.value).splitlines()
    assert "HF_HUB_OFFLINE" in lines[1] and HUB.repo in lines[1]
    assert "tinyweights==1.0" in lines[2]
    assert "other.gguf" in lines[3]
    assert len(lines) < 8


def test_a_source_distribution_is_not_built(shop: Path, use: Any) -> None:
    import tarfile

    (shop / "setup.py").write_text("raise SystemExit('code of a package was run')")
    with tarfile.open(shop / "tinyweights-1.0.tar.gz", "w:gz") as archive:
        archive.add(shop / "setup.py", "tinyweights-1.0/setup.py")
    use(WHEEL)
    with pytest.raises(EdgezoError) as caught:
        resolve("tiny")
    assert "was run" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_one_clear_error(
    shop: Path, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shop.parent / "file").write_text("in the way")
    monkeypatch.setenv("EDGEZO_CACHE", str(shop.parent / "file"))
    use(WHEEL)
    with pytest.raises(EdgezoError, match="EDGEZO_CACHE"):
        resolve("tiny")


# ----------------------------------------------------------------------------- hub


REFUSED = ("pytorch_model.bin", "tokenizer.pkl", "tokenizer.py", "vocab.pt", "chat_template.py")


class FakeHub:
    """Stands for the two calls of huggingface_hub that are used, over a folder laid out like its cache."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.published = tiny_models.make("llama", root / "published")
        self.snapshot = root / "hub" / "snapshot"
        self.blobs = root / "hub" / "blobs"
        self.names = ["config.json", "model.safetensors", *REFUSED]
        self.downloads = 0
        self.damage = False
        self.error: Exception | None = None
        api = SimpleNamespace(repo_info=self.repo_info)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def repo_info(self, repo: str, *, revision: str | None, repo_type: str, timeout: float) -> Any:
        assert timeout <= 10 and repo_type == "model"
        if self.error:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=n) for n in self.names])

    def snapshot_download(self, repo: str, *, local_files_only: bool, **options: Any) -> str:
        assert not set(REFUSED) & set(options["allow_patterns"])
        assert options["revision"] is None  # another one would not be found in the cache again
        if local_files_only:
            if not self.snapshot.is_dir():
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.snapshot)
        self.downloads += 1
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.snapshot.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors"):
            data = (self.published / name).read_bytes()
            blob = self.blobs / hashlib.sha256(data).hexdigest()
            if not blob.exists():
                blob.write_bytes(last_bit_flipped(data) if self.damage else data)
            link = self.snapshot / name
            if not link.exists():
                link.symlink_to(blob)
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shop: Path) -> FakeHub:
    return FakeHub(tmp_path, monkeypatch)


def test_a_hub_id_is_fetched_once_and_served_from_the_hub_cache(hub: FakeHub) -> None:
    first, second = resolve("somebody/model"), resolve("somebody/model")
    assert first == second == hub.snapshot and hub.downloads == 1


def test_a_damaged_hub_cache_is_fetched_again(hub: FakeHub) -> None:
    path = resolve("somebody/model") / "model.safetensors"
    good = path.read_bytes()
    path.resolve().write_bytes(last_bit_flipped(good))
    assert (resolve("somebody/model") / "model.safetensors").read_bytes() == good
    assert hub.downloads == 2


def test_a_damaged_download_is_refused(hub: FakeHub) -> None:
    hub.damage = True
    with pytest.raises(EdgezoError, match="hash"):
        resolve("somebody/model")


def test_a_repository_with_pickled_weights_only_is_refused(hub: FakeHub) -> None:
    hub.names.remove("model.safetensors")
    with pytest.raises(EdgezoError, match="pickled"):
        resolve("somebody/model")
    assert hub.downloads == 0


def test_a_hub_that_cannot_be_reached_falls_through(hub: FakeHub, shop: Path, use: Any) -> None:
    write_wheel(shop)
    hub.error = ConnectionRefusedError("nobody listens")
    use(HUB, WHEEL)
    assert resolve("tiny").read_bytes() == WEIGHTS
    hub.error = RuntimeError("404: no such repository\nlong advice")
    with pytest.raises(EdgezoError, match="no such repository") as caught:
        resolve("somebody/model")
    assert "long advice" not in str(caught.value)


# ----------------------------------------------------------------------------- cache


def test_a_hash_is_remembered_until_the_file_changes(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shop / "weights"
    file.write_bytes(WEIGHTS)
    later = time.time_ns() + 3_600_000_000_000
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert cards.file_sha256(file) == SHA256
    read: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda f, a: read.append(f.name) or real(f, a))
    assert cards.file_sha256(file) == SHA256 and read == []
    file.write_bytes(WEIGHTS + b"x")
    assert cards.file_sha256(file) != SHA256 and len(read) == 1


def test_a_read_only_cache_only_costs_the_hash_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(WEIGHTS)
    monkeypatch.setenv("EDGEZO_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(time, "time_ns", lambda: sys.maxsize)
    assert cards.file_sha256(tmp_path / "file") == SHA256


def test_the_cache_is_the_platform_s_own_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEZO_CACHE", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join(os.sep, "elsewhere"))
    assert cards.cache_dir() == Path(os.sep, "elsewhere", "edgezo")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cards.cache_dir() == Path.home() / "Library" / "Caches" / "edgezo"
