"""A small model with its tokenizer, small data of every kind, and commands run in this process."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

# The fast lane (scripts/test -m smoke): files that touch every room, without their slow tests.
SMOKE = {
    *("test_house", "test_cli", "test_option_pages", "test_request", "test_planner"),
    "test_planner_choices",
    *(
        "test_dataset",
        "test_row_faults",
        "test_metrics",
        "test_preferences",
        "test_noise",
        "test_credit",
    ),
    *(
        "test_layouts",
        "test_loader",
        "test_loader_refusals",
        "test_exact_head",
        "test_readout",
        "test_journal",
    ),
    *("test_old_runs", "test_auto_step", "test_speed", "test_hardware", "test_process_memory"),
    *("test_files", "test_ownership"),
}

os.environ.pop(
    "COLUMNS", None
)  # which the processes of pytest-xdist are given: output is as wide as in a pipe

# Where there is no GPU Triton runs its kernels in Python (test_gpu_kernels.py). It reads this when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The long runs of the fuzz lane (tests/fuzz/lane.py) and of kills and full disks (test_every_write.py)."""
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-cases", type=int, help="cases of all kinds together, with a clock")
    group.addoption("--fuzz-kinds", help="of these kinds only, separated by commas")
    group.addoption("--fuzz-seed", type=int, default=0, help="of the first case of each kind")
    parser.addoption(
        "--every-point", action="store_true", help="strike at every write of a command"
    )


def pytest_collection_finish() -> None:
    """Collections of garbage do not look at what the imports have made: a run asks for some, and each took 0.3 s."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the fast lane."""
    for item in items:
        slow = item.get_closest_marker("slow") or item.get_closest_marker("mem")
        if item.path.stem in SMOKE and not slow:
            item.add_marker(pytest.mark.smoke)


GOOD, BAD = "lovely warm bright funny".split(), "dull cold grim tired".split()
LABELLED = {"template": "{text} It was", "labels": "0=bad,1=good"}
# Label words that begin with the same token cannot be told apart by one: each becomes an option.
OPTIONS = {"template": "{text} It was", "labels": "0=no good,1=no bad"}


@dataclass(frozen=True)
class Bench:
    """A tiny model, data beside it, and requests over them that leave the planner no choice."""

    model: Path
    data: Path

    def settings(self, kind: str = "label", **changes: Any) -> dict[str, Any]:
        """A request by field name; ``kind`` names the data. Three steps unless said otherwise."""
        rows = {"label": LABELLED, "choice": OPTIONS}.get(kind, {})
        file = self.data / f"{'label' if kind == 'choice' else kind}.jsonl"
        fixed = {"precision": "fp32", "batch_size": 4, "micro_batch": 3, "max_mem_bytes": 8 * 10**9}
        found = {
            "model": str(self.model),
            "data": str(file),
            "steps": 3,
            **rows,
            **fixed,
            **changes,
        }
        return {name: value for name, value in found.items() if value is not None}

    def arguments(self, kind: str = "label", **changes: Any) -> list[str]:
        """The same request as options of the command line."""
        from edgezo.plan.fields import flag

        pairs = self.settings(kind, **changes).items()
        return [part for name, value in pairs for part in (flag(name), str(value))]


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tree(root: Path, files: dict[str, str]) -> Path:
    """Small files under ``root``: a /proc and /sys for readers that take the root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _rows(kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(40):
        words = GOOD if i % 3 else BAD
        film = f"film {i} is {words[i % 4]}" + " and long" * (i % 5)
        kinds = {
            "label": {"text": film, "label": int(i % 3 > 0)},
            "completion": {"prompt": f"{film}. Verdict:", "completion": f" {words[i % 3]}"},
            "text": {"text": film},
            "messages": {
                "messages": [
                    {"role": "user", "content": film},
                    {"role": "assistant", "content": words[i % 2]},
                ]
            },
        }
        rows.append(kinds[kind])
    return rows


@pytest.fixture(autouse=True)
def threads_of_children() -> Iterator[None]:
    """--threads of a command in this process sets what later children would take: other threads give other bits."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices as small as a test's only wait for a second thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """edgezo's cache, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("EDGEZO_CACHE", str(folder))
        yield folder


def make_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A random model of one block with a trained tokenizer beside it."""
    import tiny_models
    import tokenizers_fixture

    masked = family == "roberta"
    tokenizer = (
        tokenizers_fixture.masked_tokenizer() if masked else tokenizers_fixture.byte_tokenizer()
    )
    changes = {"num_hidden_layers": 1, **changes}
    tiny_models.make(family, folder, vocab_size=len(tokenizer), **changes)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bench(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    for kind in ("label", "completion", "text", "messages"):
        write_rows(folder / f"{kind}.jsonl", _rows(kind))
    return Bench(make_model(folder / "model"), folder)


@pytest.fixture(scope="session")
def deep_bench(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The same rows with a model of four blocks."""
    model = make_model(tmp_path_factory.mktemp("deep") / "model", num_hidden_layers=4)
    return replace(bench, model=model)


@dataclass
class Families:
    """``families("llama", **changes)``: the rows of a bench with a model of that family, made once for each request."""

    bench: Bench
    folder: Path
    layers: int
    made: dict[tuple[Any, ...], Bench] = field(default_factory=dict)

    def __call__(self, family: str, **changes: Any) -> Bench:
        key = (family, *sorted(changes.items()))
        if key not in self.made:
            changes = {"num_hidden_layers": self.layers, **changes}
            path = make_model(self.folder / str(len(self.made)), family, **changes)
            self.made[key] = replace(self.bench, model=path)
        return self.made[key]


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def edgezo(own_cache: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """``edgezo("eval", "--model", run) -> (exit code, standard output, standard error)``."""
    from edgezo.cli import main as cli

    def command(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run([str(arg) for arg in args])
        return code, *capsys.readouterr()

    before = signal.getsignal(signal.SIGTERM)
    yield command
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def edgezo_json(edgezo: Command) -> Callable[..., tuple[int, dict[str, Any]]]:
    """The same with ``--json``: standard output is one object and nothing else."""

    def command(*args: object) -> tuple[int, dict[str, Any]]:
        code, out, _ = edgezo(*args, "--json")
        found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert isinstance(found, dict) and out.count("\n") == 1
        return code, found

    return command


@pytest.fixture(scope="module")
def workshop(own_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models of every family, what is trained, directions and store, as a law asks for them."""
    from workshop import Workshop

    return Workshop(tmp_path_factory.mktemp("models"))


@pytest.fixture
def tried(request: pytest.FixtureRequest, workshop: Any) -> Iterator[Any]:
    """A case of ``workshop.cases``, as it was before the test when the test is over."""
    made = workshop.tried(request.param)
    yield made
    made.restore()


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Trials of presets (preset_trials.py)."""
    import torch
    from preset_trials import Maker

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Maker(tmp_path_factory.mktemp("model"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model as a directory of safetensors, and as a GGUF file."""
    import tiny_models

    root = tmp_path_factory.mktemp("intact")
    model = tiny_models.random_model("llama", mlp_bias=False)
    tiny_models.make_gguf(model, root / "m.gguf", tokenizer=True)
    return {"safetensors": tiny_models.make("llama", root / "hf"), "gguf": root / "m.gguf"}
