"""What transformers, peft and llama.cpp's server make of an export: the tokens and the labels of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Bench, Families
from peft import PeftModel
from test_runs import run_of
from transformers import AutoModelForCausalLM

import edgezo as package
from edgezo.run.export import export

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

LARGE = {"step": 2.0, "sigma": 0.05}  # so that a few steps change tokens
FAMILIES = ("llama", "qwen2", "gemma3_text", "gpt2", "opt")
PROMPTS = ("a warm film", "film 3 is cold. Verdict:", "The year 2024", "  two spaces")
MOST = 8  # tokens that are written after each prompt


@pytest.fixture(scope="module")
def families(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(bench, tmp_path_factory.mktemp("families"), layers=3)


def written_by_run(target: Path) -> list[list[int]]:
    """The tokens of each prompt, and those that the run writes after it."""
    with package.load(target, max_new_tokens=MOST, precision="fp32") as used:
        return [
            [*(ids := list(used.prompt_ids(prompt))), *used.model.tokens_after(ids, MOST, None)]
            for prompt in PROMPTS
        ]


def check_written(module: Any, wanted: list[list[int]]) -> None:
    """transformers' generate writes these tokens, with its cache of keys and values."""
    ends = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    for ids in wanted:
        prompt = torch.tensor([ids[:-MOST]])
        made = module.generate(prompt, max_new_tokens=MOST, **ends)
        assert made[0].tolist() == ids


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_and_peft_write_the_tokens_of_the_run(
    families: Any, family: str, tmp_path: Path
) -> None:
    bench = families(family)
    run_of(bench, tmp_path / "run", kind="completion", train="lowrank", **LARGE)
    wanted = written_by_run(tmp_path / "run")
    for form in ("hf", "peft"):
        export(tmp_path / "run", form, tmp_path / form)
    check_written(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), wanted)
    base = AutoModelForCausalLM.from_pretrained(bench.model)
    check_written(PeftModel.from_pretrained(base, tmp_path / "peft"), wanted)
    assert written_by_run(bench.model) != wanted, "training has changed what is written"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_that_carries_a_probe_has_the_labels_of_the_run(
    families: Any, family: str, edgezo_json: Any, tmp_path: Path
) -> None:
    bench = families(family)
    run_of(bench, tmp_path / "run", train="lowrank+probe", **LARGE)
    rows = [
        f"film {i} is {'warm' if i % 2 else 'cold'}" + " and long" * (i % 7) for i in range(200)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))

    def labels(target: Path) -> list[str]:
        code, made = edgezo_json("predict", target, "--data", data, "--precision", "fp32")
        assert code == 0, made
        return [prediction["label"] for prediction in made["predictions"]]

    wanted = labels(tmp_path / "run")
    assert len(set(wanted)) == 2
    forms = {"hf": "hf"}
    if family != "opt":  # llama.cpp has no such architecture
        forms["gguf"] = "gguf/model.gguf"
    if family == "llama":
        forms["journal"] = "applied"
    for form, place in forms.items():
        dtype = "fp32" if form == "gguf" else None
        export(tmp_path / "run", form, tmp_path / form, dtype=dtype)
        if form == "journal":
            applied = ("--base", bench.model, "--out", tmp_path / place)
            assert edgezo_json("apply", tmp_path / form, *applied)[0] == 0
        assert labels(tmp_path / place) == wanted, form


def test_llama_cpps_server_answers_as_the_run(bench: Bench, tmp_path: Path) -> None:
    app = pytest.importorskip(
        "llama_cpp.server.app", reason="pip install 'llama-cpp-python[server]'"
    )
    settings = pytest.importorskip("llama_cpp.server.settings")
    client = pytest.importorskip("starlette.testclient")
    run_of(bench, tmp_path / "run", kind="messages", train="lowrank", **LARGE)
    export(tmp_path / "run", "gguf", tmp_path / "out", dtype="fp32")
    model = settings.ModelSettings(
        model=str(tmp_path / "out/model.gguf"), model_alias="mine", n_ctx=128, verbose=False
    )
    made = app.create_app(server_settings=settings.ServerSettings(), model_settings=[model])
    turns = [{"role": "user", "content": "a warm film"}]
    with client.TestClient(made) as asked, package.load(tmp_path / "run", max_new_tokens=6) as used:
        answer = asked.post(
            "/v1/chat/completions",
            json={"model": "mine", "messages": turns, "max_tokens": 6, "temperature": 0},
        ).json()
        # It leaves out bytes that are no character, which random tokens are made of.
        wanted = used.generate(turns).replace("\N{REPLACEMENT CHARACTER}", "")
        assert answer["choices"][0]["message"]["content"].strip() == wanted
