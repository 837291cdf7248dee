"""Do exports write the tokens of their run, and give its labels, in the programs that read them?

    python benchmarks/round_trips.py --out DIR [--model smollm2-135m-instruct] [--steps 20] [--prompts 20] [--rows 200]

Trains, on the bundled example, one run that writes the intent of a request and three that tell intents apart: by the
default's linear probe, by one of one block, and by label words. Exports them, and lets transformers, peft, llama.cpp
(where its Python binding is installed) and onnxruntime read every prompt with what the run wrote after it, 32 tokens. A
program whose likeliest token is the run's at each of these places writes the same greedy text. Beside it stands the
share of all places, prompts included, with the same likeliest token as in transformers, which reads weights of the
same precision there: a directory of that type, or the GGUF file by a reader of its own. Labels are those of ``--rows``
rows. Writes DIR/round-trips.json. Everything is computed in fp32, whatever weights are stored in, but for llama.cpp,
which rounds inputs to the type of the matrix, those of q8_0 to 8 bits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, pipeline

import edgezo
from edgezo.data.row_files import Problems, Record
from edgezo.data.tasks import EXAMPLE_FOLDER
from edgezo.network.cards import resolve
from edgezo.run.export import export
from edgezo.run.shipped import apply

try:
    import llama_cpp
except ImportError:
    llama_cpp = None

WRITTEN = 32  # tokens after each prompt
CAP = "14GB"
Logits = Callable[[list[int]], np.ndarray]  # of tokens (n,): (n, vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    figures = {"tokens": list(shown(tokens(args))), "labels": list(shown(labels(args)))}
    (args.out / "round-trips.json").write_text(json.dumps(figures, indent=1) + "\n")


def shown(lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each line, printed as it comes."""
    for figures in lines:
        print(json.dumps(figures), flush=True)
        yield figures


def requests(count: int) -> list[dict[str, Any]]:
    """Rows of the example, of both its files."""
    lines = [line for name in ("train", "validation") for line in _file(name)]
    return [json.loads(line) for line in lines[:: max(1, len(lines) // count)][:count]]


def _file(name: str) -> list[str]:
    return (EXAMPLE_FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()


def trained(args: argparse.Namespace, name: str, **settings: Any) -> Path:
    """A run of these settings, which is there already where the script goes on."""
    run = args.out / name
    if not (run / "summary.json").exists():
        shared = {"model": args.model, "steps": args.steps, "max_mem_bytes": CAP, "out": str(run)}
        edgezo.finetune(edgezo.make_config({**shared, "precision": "bf16", **settings}))
    return run


# ---------------------------------------------------------------------------------------------
# Tokens


def tokens(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each program and form that writes."""
    rows = args.out / "rows.jsonl"
    pairs = [
        {"prompt": f"{r['text']} Intent:", "completion": f" {r['intent']}"} for r in requests(400)
    ]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    # A step that is large enough for the tokens to change: what is compared is the export, not the training.
    # In fp32, as all runs here: so the run, its fp32 exports and what reads them have the same weights.
    run = trained(args, "writer", data=str(rows), precision="fp32", train=("lowrank",), step=0.3)
    prompts = [pair["prompt"] for pair in pairs[:: max(1, len(pairs) // args.prompts)]][
        : args.prompts
    ]
    wanted = written(run, prompts, args.out / "wanted.json")
    for form, dtypes in (
        ("hf", ("fp32", "bf16", "fp16")),
        ("peft", (None,)),
        ("onnx", ("fp32", "fp16")),
    ):
        for dtype in dtypes:
            made(run, form, dtype, args.out)
    for dtype in ("fp32", "bf16", "fp16", "q8_0"):
        made(run, "gguf", dtype, args.out)
    path = resolve(args.model)
    base = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    yield compared("base model", "transformers", wanted, of_transformers(folder, **base), None)
    reference = {
        d: places(of_transformers(args.out / f"hf-{d}"), wanted) for d in ("fp32", "bf16", "fp16")
    }
    for dtype, read in reference.items():
        yield line("hf", dtype, "transformers", wanted, read, reference["fp32"])
    adapter = of_peft(args.out / "peft-None", folder, **base)
    yield compared("peft", "peft", wanted, adapter, reference["fp32"])
    for dtype in ("fp32", "fp16"):
        read = places(of_onnx(args.out / f"onnx-{dtype}"), wanted)
        yield line("onnx", dtype, "onnxruntime", wanted, read, reference[dtype])
    for dtype in ("fp32", "bf16", "fp16", "q8_0"):
        folder = args.out / f"gguf-{dtype}"
        theirs = places(of_transformers(folder, gguf_file="model.gguf"), wanted)
        yield line("gguf", dtype, "transformers", wanted, theirs, reference.get(dtype))
        if llama_cpp is not None:
            read = places(of_llama(folder / "model.gguf"), wanted)
            yield line("gguf", dtype, "llama.cpp", wanted, read, theirs)


def written(run: Path, prompts: list[str], kept: Path) -> list[list[int]]:
    """The tokens of each prompt, and those that the run writes after it; kept for a script that goes on."""
    if kept.exists():
        return json.loads(kept.read_text())
    with edgezo.load(run, max_new_tokens=WRITTEN, precision="fp32", max_mem_bytes=CAP) as used:
        every = []
        for prompt in prompts:
            ids = list(used.prompt_ids(prompt))
            every.append([*ids, *used.model.tokens_after(ids, WRITTEN, None)])
    kept.write_text(json.dumps(every))
    return every


def made(run: Path, form: str, dtype: str | None, out: Path) -> None:
    folder = out / f"{form}-{dtype}"
    if not folder.exists():
        export(run, form, folder, dtype=dtype)


def places(logits: Logits, wanted: list[list[int]]) -> list[np.ndarray]:
    """The likeliest token after each token of each sequence."""
    return [logits(ids).argmax(-1) for ids in wanted]


def compared(
    form: str, program: str, wanted: Any, logits: Logits, reference: Any
) -> dict[str, Any]:
    return line(form, "fp32", program, wanted, places(logits, wanted), reference)


def line(
    form: str, dtype: str, program: str, wanted: list[list[int]], read: Any, reference: Any
) -> dict[str, Any]:
    """How many texts are the run's, and the share of places with the reference's token."""
    same = sum(
        r[-WRITTEN - 1 : -1].tolist() == ids[-WRITTEN:] for r, ids in zip(read, wanted, strict=True)
    )
    about = {
        "form": form,
        "dtype": dtype,
        "program": program,
        "same_texts": same,
        "texts": len(wanted),
    }
    if reference is None:
        return about
    alike = [r == other for r, other in zip(read, reference, strict=True)]
    return {
        **about,
        "places": sum(map(len, alike)),
        "same_share": float(np.concatenate(alike).mean()),
    }


def of_transformers(folder: Path | str, **more: Any) -> Logits:
    return _of_module(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more))


def of_peft(adapter: Path, base: Path, **more: Any) -> Logits:
    module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **more)
    return _of_module(PeftModel.from_pretrained(module, adapter))


def _of_module(module: Any) -> Logits:
    module.eval()

    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return module(torch.tensor([ids])).logits[0].float().numpy()

    return logits


def of_onnx(folder: Path) -> Logits:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    inputs = session.get_inputs()

    def logits(ids: list[int]) -> np.ndarray:
        fed: dict[str, Any] = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
        }
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        for i in inputs:
            if i.name.startswith("past"):
                fed[i.name] = np.zeros((1, i.shape[1], 0, i.shape[3]), kinds[i.type])
        return session.run(["logits"], fed)[0][0]

    return logits


def of_llama(file: Path) -> Logits:
    f32 = llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(file), n_ctx=512, n_batch=512, logits_all=True, type_k=f32, type_v=f32, verbose=False
    )

    def logits(ids: list[int]) -> np.ndarray:
        model.reset()
        model.eval(ids)
        return np.array(model.scores[: len(ids)])

    return logits


# ---------------------------------------------------------------------------------------------
# Labels


def labels(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each run that tells labels apart, form and program."""
    rows = requests(args.rows)
    texts = [row["text"] for row in rows]
    asked = {
        "probe": {"train": ("lowrank", "probe")},
        "one": {"train": ("lowrank", "probe"), "probe_reads": "one"},
        "words": {"train": ("lowrank", "head")},
    }
    forms = {
        "probe": ("hf", "gguf", "onnx", "journal"),
        "one": ("hf-classifier", "hf", "gguf", "onnx"),
    }
    forms["words"] = ("hf-classifier", "gguf", "onnx")
    for name, settings in asked.items():
        run = trained(args, name, task="example", precision="fp32", **settings)
        with edgezo.load(run, precision="fp32", max_mem_bytes=CAP) as used:
            predicted = used.predict(texts)
            wanted = [p["label"] for p in predicted]
            values = [p.get("value", p["label"]) for p in predicted]
            records = [Record("", {"text": text}) for text in texts]
            prompts = [list(a.example.rows[0].ids) for a in used.asker.ask(records, Problems())]
            decode = used.asker.how.tokenizer.decode
        right = sum(v == row["intent"] for v, row in zip(values, rows, strict=True))
        yield {"run": name, "form": "run", "rows": len(rows), "right": right}
        for form in forms[name]:
            place = args.out / f"{name}-{form}"
            if not place.exists():
                export(run, form, place, dtype="fp32" if form == "gguf" else None)
            read = READERS.get(form, of_edgezo)(place, args, texts, prompts, decode)
            same = sum(a == b for a, b in zip(read, wanted, strict=True))
            yield {"run": name, "form": form, "rows": len(rows), "same_labels": same}


def of_edgezo(place: Path, args: Any, texts: list[str], prompts: Any, decode: Any) -> list[str]:
    if place.is_file():  # of the form journal
        made_of_it = place.with_name(f"{place.name}-applied")
        if not made_of_it.exists():
            apply(place, args.model, made_of_it)
        place = made_of_it
    target = place / "model.gguf" if (place / "model.gguf").exists() else place
    with edgezo.load(target, precision="fp32", max_mem_bytes=CAP) as used:
        return [prediction["label"] for prediction in used.predict(texts)]


def of_pipeline(place: Path, args: Any, texts: Any, prompts: Any, decode: Any) -> list[str]:
    classify = pipeline("text-classification", str(place), dtype=torch.float32)
    return [answer["label"] for answer in classify([decode(ids) for ids in prompts])]


def of_graph(place: Path, args: Any, texts: Any, prompts: Any, decode: Any) -> list[str]:
    session = onnxruntime.InferenceSession(str(place / "model.onnx"))
    names = json.loads((place / "edgezo.json").read_text())["dataset"]["label_names"]
    answers = []
    for row in prompts:
        ids = np.array([row])
        fed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        answers.append(names[int(session.run(None, fed)[0][0].argmax())])
    return answers


READERS = {"hf-classifier": of_pipeline, "onnx": of_graph}

if __name__ == "__main__":
    main()
