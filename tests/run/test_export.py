"""Exports: what transformers and peft read back has the losses that the run ended with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LABELLED, Bench, make_model
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from test_runs import run_of
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from edgezo.bench.alignment import example_loss
from edgezo.errors import EdgezoError
from edgezo.plan.request import make_config
from edgezo.run.evaluate import replay
from edgezo.run.export import export
from edgezo.run.session import open_request

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # Merging would change the embedding too; nothing here merges.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

FAMILIES = ("llama", "gpt2", "gemma2", "roberta")
LARGE = {"step": 0.5, "sigma": 0.05}  # so that a few steps move losses by more than rounding


@pytest.fixture(scope="module")
def families(own_cache: Path, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("families")
    made: dict[tuple[str, bool], Bench] = {}

    def of(family: str, tied: bool = True) -> Bench:
        if (family, tied) not in made:
            path = folder / f"{family}-{tied}"
            # Its start token has the number that transformers takes for padding.
            roberta = {"pad_token_id": 299, "max_position_embeddings": 430}
            padding = roberta if family == "roberta" else {}
            make_model(path, family, tie_word_embeddings=tied, **padding)
            made[family, tied] = replace(bench, model=path)
        return made[family, tied]

    return of


def loss_of(module: Any, bench: Bench, kind: str, dtype: torch.dtype = torch.float32) -> float:
    """Mean loss of the validation rows by transformers alone."""
    data = open_request(make_config(bench.settings(kind))).dataset
    with torch.no_grad():
        each = [example_loss(module.to(dtype).eval(), e, data) for e in data.validation]
    return float(torch.stack(each).mean())


def auto(path: Path, **more: Any) -> Any:
    masked = json.loads((path / "config.json").read_text())["model_type"] == "roberta"
    kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    return kind.from_pretrained(path, **more)


def ended(summary: dict[str, Any]) -> float:
    before, after = summary["eval_before"]["loss"], summary["eval_after"]["loss"]
    assert abs(after - before) > 1e-3, "the run changes what the rows cost"
    return float(after)


KINDS = [(f, kind) for f in FAMILIES for kind in ("label", "completion")]
KINDS.remove(("roberta", "completion"))  # a masked model answers with its mask


@pytest.mark.parametrize(("family", "kind"), KINDS)
@pytest.mark.parametrize("train", ["lowrank+head", "lowrank+norms+scales", "full+head", "full"])
def test_an_exported_model_has_the_losses_of_the_run(
    families: Any, family: str, train: str, kind: str, tmp_path: Path
) -> None:
    bench = families(family)
    summary = run_of(bench, tmp_path / "run", kind=kind, train=train, **LARGE)
    made = export(tmp_path / "run", "hf", tmp_path / "hf")
    assert made["steps"] == 3 and made["dtype"] == "float32"
    module = auto(tmp_path / "hf")
    assert loss_of(module, bench, kind) == pytest.approx(ended(summary), rel=1e-5, abs=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(bench.model))


HEADS = [(f, tied) for f in FAMILIES for tied in (True, False)]
HEADS.remove(("roberta", False))  # refused


@pytest.mark.parametrize(("family", "tied"), HEADS)
@pytest.mark.parametrize(
    "asked",
    [
        {"train": "lowrank", **LARGE},
        {"train": "lowrank+head", **LARGE},
        {"train": "head", "head_lr": 5.0},
        {"estimator": "lora", "rank": 4, "step": 0.05},
    ],
    ids=lambda asked: str(next(iter(asked.values()))),
)
def test_an_exported_adapter_has_the_losses_of_the_run(
    families: Any, family: str, tied: bool, asked: dict[str, Any], tmp_path: Path
) -> None:
    bench = families(family, tied)
    summary = run_of(bench, tmp_path / "run", **asked)
    export(tmp_path / "run", "peft", tmp_path / "adapter")
    base = auto(bench.model)
    module = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert loss_of(module, bench, "label") == pytest.approx(ended(summary), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("precision", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("train", ["lowrank", "norms+scales"])
def test_codes_are_exported_as_the_run_multiplied_them(
    bench: Bench,
    train: str,
    precision: str,
    edgezo_json: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On every machine, so that nothing but the weights can differ.
    monkeypatch.setattr(
        "edgezo.plan.footprint_stored.compute_dtype", lambda *_: ("fp32", "of this test")
    )
    request = {"train": train, "precision": precision, "kind": "completion", **LARGE}
    summary = run_of(bench, tmp_path / "run", **request)
    code, made = edgezo_json("export", tmp_path / "run", "--out", tmp_path / "hf")
    assert code == 0 and made["dtype"] == "float32"
    found = loss_of(auto(tmp_path / "hf"), bench, "completion")
    assert found == pytest.approx(ended(summary), rel=1e-5)


def test_weights_are_in_the_dtype_that_is_asked_for(bench: Bench, edgezo_json: Any, tmp_path: Path):
    run_of(bench, tmp_path / "run", train="full", precision="bf16")
    for asked, wanted in (((), "bfloat16"), (("--dtype", "fp16"), "float16")):
        out = tmp_path / wanted
        code, made = edgezo_json("export", tmp_path / "run", *asked, "--out", out)
        assert code == 0 and made["dtype"] == wanted
        assert all(str(p.dtype).endswith(wanted) for p in auto(out, dtype="auto").parameters())


@pytest.mark.parametrize("train", ["full", "lowrank"])
def test_weights_on_disk_are_exported_and_so_is_what_replay_made(
    bench: Bench, train: str, tmp_path: Path
) -> None:
    request = {"train": train, "residency": "disk", **LARGE}
    summary = run_of(bench, tmp_path / "run", **request)
    export(tmp_path / "run", "hf", tmp_path / "hf")
    assert loss_of(auto(tmp_path / "hf"), bench, "label") == pytest.approx(ended(summary), rel=1e-5)
    replay(tmp_path / "run", tmp_path / "copy")
    export(tmp_path / "copy", "hf", tmp_path / "again")
    files = [tmp_path / name / "model.safetensors" for name in ("hf", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_replay_made_of_a_run_that_no_seed_gives_again_is_exported(
    bench: Bench, tmp_path: Path
) -> None:
    run_of(bench, tmp_path / "run", train="lowrank", directions="activation", **LARGE)
    replay(tmp_path / "run", tmp_path / "copy")
    for name in ("run", "copy"):
        export(tmp_path / name, "hf", tmp_path / f"{name}-hf")
    files = [tmp_path / f"{name}-hf" / "model.safetensors" for name in ("run", "copy")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_export_can_be_evaluated(bench: Bench, edgezo_json: Any, tmp_path: Path) -> None:
    summary = run_of(bench, tmp_path / "run", train="lowrank", **LARGE)
    export(tmp_path / "run", "hf", tmp_path / "hf")
    code, found = evaluated(edgezo_json, bench, "label", tmp_path / "hf")
    assert code == 0
    assert found["loss"] == pytest.approx(ended(summary), rel=1e-5)


@pytest.mark.parametrize("train", ["lowrank+probe", "lowrank+norms+probe"])
def test_a_linear_probe_is_copied_beside_and_said(
    bench: Bench, train: str, edgezo: Any, tmp_path: Path
) -> None:
    run_of(bench, tmp_path / "run", train=train)
    used = "True" in str(safe_open(tmp_path / "run/probe.safetensors", "pt").metadata()["used"])
    assert used, "the probe is what the run predicts by"
    for form in ("hf", "peft") if train == "lowrank+probe" else ("hf",):
        out = tmp_path / form
        code, told, _ = edgezo("export", tmp_path / "run", "--format", form, "--out", out)
        assert code == 0 and "note: the run predicts by its linear probe" in told
        assert json.loads((out / "edgezo.json").read_text())["predicts_as_run"] is False
        assert (out / "probe.safetensors").read_bytes() == (
            tmp_path / "run/probe.safetensors"
        ).read_bytes()
    assert auto(tmp_path / "hf") is not None


@pytest.fixture
def exported_probe(bench: Bench, tmp_path: Path) -> tuple[Path, Any]:
    summary = run_of(bench, tmp_path / "run", train="lowrank+probe", **LARGE)
    export(tmp_path / "run", "hf", tmp_path / "hf")
    return tmp_path / "hf", summary


def evaluated(edgezo_json: Any, bench: Bench, kind: str, model: Path) -> Any:
    request = bench.arguments(kind, model=str(model), steps=None, batch_size=None)
    dropped = {"--precision", "--micro-batch"}
    pairs = list(zip(request[::2], request[1::2], strict=True))
    kept = [part for pair in pairs if pair[0] not in dropped for part in pair]
    return edgezo_json("eval", *kept, "--precision", "fp32", "--held-out", 0.1)


def test_an_exported_probe_classifies_where_the_data_is_its_own(
    exported_probe: tuple[Path, Any], bench: Bench, edgezo_json: Any
) -> None:
    folder, summary = exported_probe
    code, found = evaluated(edgezo_json, bench, "label", folder)
    assert code == 0
    assert found["loss"] == pytest.approx(summary["eval_after"]["loss"], rel=1e-4)
    assert found["value"] == summary["eval_after"]["value"]
    other = evaluated(edgezo_json, bench, "completion", folder)[1]
    (folder / "probe.safetensors").unlink()
    assert evaluated(edgezo_json, bench, "completion", folder)[1]["loss"] == other["loss"]
    assert evaluated(edgezo_json, bench, "label", folder)[1]["loss"] != found["loss"]


def test_a_probe_of_nobody_knows_what_is_refused(
    exported_probe: tuple[Path, Any], bench: Bench, edgezo_json: Any
) -> None:
    folder, _ = exported_probe
    about = folder / "edgezo.json"
    for content in (None, b"\xff", b"[" * 100_000, b"3", b'{"dataset": []}', b"{}" * (1 << 22)):
        about.unlink(missing_ok=True) if content is None else about.write_bytes(content)
        code, told = evaluated(edgezo_json, bench, "label", folder)
        assert code == 1 and "has a linear probe, but what it is for" in told["error"]


def test_the_lines_of_the_docs_classify_by_an_exported_probe(
    exported_probe: tuple[Path, Any], bench: Bench
) -> None:
    folder, summary = exported_probe
    page = (Path(__file__).parents[2] / "docs/export.md").read_text(encoding="utf-8")
    fences = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    names: dict[str, Any] = {}
    exec(next(lines for lines in fences if "probe.safetensors" in lines), names)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = open_request(make_config(bench.settings("label"))).dataset
    losses = [
        -names["classify"](str(folder), tokenizer.decode(e.rows[0].ids)).log_softmax(-1)[e.label]
        for e in data.validation
    ]
    assert float(torch.stack(losses).mean()) == pytest.approx(
        summary["eval_after"]["loss"], rel=1e-4
    )


def test_an_adapter_says_where_its_base_is_and_what_merging_would_do(
    families: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = families("llama")
    monkeypatch.chdir(bench.model.parent)
    relative = replace(bench, model=Path(bench.model.name))
    run_of(relative, tmp_path / "run", train="lowrank+head", precision="int8")
    made = export(tmp_path / "run", "peft", tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(bench.model)
    assert made["precision"] == "int8"
    assert [("int8 codes" in n, "merging" in n) for n in made["notes"]] == [
        (True, False),
        (False, True),
    ]


def test_what_no_adapter_can_hold_is_refused_and_nothing_is_left(
    bench: Bench, edgezo: Any, tmp_path: Path
) -> None:
    run_of(bench, tmp_path / "run", train="full")
    out = tmp_path / "adapter"
    code, _, error = edgezo("export", tmp_path / "run", "--format", "peft", "--out", out)
    assert code == 2 and "--format hf" in error and not out.exists()
    out.mkdir()
    (out / "mine").write_text("precious")
    code, _, error = edgezo("export", tmp_path / "run", "--out", out)
    assert code == 2 and "there already" in error
    assert [p.name for p in out.iterdir()] == ["mine"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "problem",
    [OSError(28, "No space left on device"), SafetensorError("No space left (os error 28)")],
)
def test_an_export_that_fails_leaves_nothing(
    bench: Bench, problem: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(bench, tmp_path / "run", train="lowrank")

    def full(*args: Any) -> None:
        raise problem

    monkeypatch.setattr("edgezo.run.export_files.write_saved", full)
    with pytest.raises(EdgezoError, match="bytes are free"):
        export(tmp_path / "run", "hf", tmp_path / "hf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_the_current_directory_will_do_where_it_is_empty(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(bench, tmp_path / "run", train="lowrank")
    (tmp_path / "here").mkdir()
    left = tmp_path / ".here.00000000.edgezo-tmp"  # of a process that was killed
    left.mkdir()
    left.with_name(f"{left.name}.lock").touch()
    monkeypatch.chdir(tmp_path / "here")
    export(tmp_path / "run", "hf", Path("."))
    assert (tmp_path / "here/model.safetensors").is_file() and not left.exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_large_matrix_is_written_tile_by_tile(
    families: Any, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pieces of a file are those of one whole product."""
    bench = families(family)
    run_of(bench, tmp_path / "run", train="lowrank", **LARGE)
    monkeypatch.setattr("edgezo.machine.limits.TILE_BYTES", 4000)
    export(tmp_path / "run", "hf", tmp_path / "hf")
    export(tmp_path / "run", "peft", tmp_path / "peft")
    base = dict(auto(bench.model, dtype=torch.float32).named_parameters())
    whole = load_file(tmp_path / "hf/model.safetensors")
    pairs = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert set(whole) == set(base)
    for name, weight in base.items():
        own = f"base_model.model.{name.removesuffix('.weight')}"
        wanted = weight.detach()
        if f"{own}.lora_A.weight" in pairs:
            up, down = pairs[f"{own}.lora_B.weight"], pairs[f"{own}.lora_A.weight"]
            assert up.any()
            wanted = wanted + ((up @ down).T if family == "gpt2" else up @ down)
        torch.testing.assert_close(whole[name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_model_is_evaluated_like_the_run(
    families: Any, family: str, edgezo_json: Any, tmp_path: Path
) -> None:
    bench = families(family)
    summary = run_of(bench, tmp_path / "run", train="lowrank+head", **LARGE)
    export(tmp_path / "run", "hf", tmp_path / "hf")
    asked = ("--data", bench.data / "label.jsonl", "--precision", "fp32", "--held-out", 0.1)
    said = [part for name, value in LABELLED.items() for part in (f"--{name}", value)]
    code, found = edgezo_json("eval", "--model", tmp_path / "hf", *asked, *said)
    assert code == 0 and found["loss"] == pytest.approx(ended(summary), rel=1e-4)
