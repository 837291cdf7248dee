"""Make the run directories of this folder anew: ``python tests/old_runs/make.py OUT``.

OUT is a new directory. The base model, its rows and its finetuner are copied from this folder, so that no bit depends
on the random numbers of an installed torch; where they are not here they are made. Everything else is made by the
command line of the edgezo that Python finds, one process a command, with OUT as the current directory: so every path
in the files is relative to OUT. To make them with another version of the code, put its checkout on PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
WORDS = (("dull", "cold", "grim", "tired"), ("lovely", "warm", "bright", "funny"))
ROWS = 12
LABEL = ("--data", "rows/label.jsonl", "--template", "{text} It was", "--labels", "0=bad,1=good")
COMPLETION = ("--data", "rows/completion.jsonl")
# As much as this whatever the machine has, so that the plan has nothing to choose.
FIXED = (
    *("--model", "base", "--device", "cpu", "--max-mem", "8GB", "--snapshot-every", "2"),
    *("--batch-size", "4", "--micro-batch", "3", "--held-out", "0.25"),
)


class Kind(NamedTuple):
    """One kind of run, and how it is stopped for the unfinished one."""

    options: str
    data: tuple[str, ...] = LABEL
    steps: int = 8
    at: int = 5  # records in the journal when it is stopped, or a few more
    torn: bool = False  # half of the next record follows, as a kill inside the write leaves it
    number: int = signal.SIGKILL


KINDS = {
    "default": Kind("--precision fp32", torn=True),
    "completion": Kind("--precision fp32 --train lowrank+head --rank 2", COMPLETION),
    "full-disk": Kind("--precision bf16 --train full --residency disk", COMPLETION, torn=True),
    "full-int8": Kind(
        "--precision int8 --train full --rounding anchored", COMPLETION, steps=20, at=17
    ),
    "mezo": Kind("--precision fp32 --estimator mezo --train norms+scales --weight-decay 0.01"),
    "mezo-adam": Kind("--precision fp32 --estimator mezo-adam --train lowrank"),
    "mezo-svrg": Kind("--precision fp32 --estimator mezo-svrg --refresh 3"),
    "lo-grzo": Kind("--precision fp32 --estimator lo-grzo --refresh 3 --rank 2", COMPLETION),
    "ag-grzo": Kind("--precision fp32 --estimator ag-grzo", number=signal.SIGTERM),
    "zo-finetuner": Kind(
        "--precision fp32 --estimator zo-finetuner-grzo --finetuner finetuner.safetensors"
    ),
    "lora": Kind("--precision fp32 --estimator lora --rank 2", COMPLETION, torn=True),
    "addax": Kind(
        "--precision fp32 --estimator addax --train lowrank+head --short-tokens 30 --rank 2",
        number=signal.SIGTERM,
    ),
    "step-auto": Kind("--precision fp32 --train lowrank+head --step auto", steps=30, at=27),
    "int4": Kind("--precision int4 --train lowrank+head+norms --rank 2", COMPLETION),
}


def edgezo(*args: str) -> list[str]:
    return [sys.executable, "-m", "edgezo", *args]


def finish(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def request(kind: Kind, out: str) -> list[str]:
    steps = ("--steps", str(kind.steps))
    return edgezo("finetune", *FIXED, *kind.data, *steps, *kind.options.split(), "--out", out)


# ----------------------------------------------------------------------------- base and rows


def make_base(out: Path) -> None:
    """A random model of two blocks, its tokenizer and rows of two kinds."""
    import tiny_models

    tiny_models.make("llama", out / "base", tokenizer=True, **SHAPE)
    (out / "rows").mkdir()
    for name in ("label", "completion"):
        rows = [row_of(name, number) for number in range(ROWS)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (out / "rows" / f"{name}.jsonl").write_text(text, encoding="utf-8")


def row_of(name: str, number: int) -> dict[str, object]:
    label = int(number % 3 > 0)
    film = f"film {number} is {WORDS[label][number % 4]}" + " and long" * (number % 5)
    if name == "label":
        return {"text": film, "label": label}
    return {"prompt": f"{film}. Verdict:", "completion": f" {WORDS[label][number % 3]}"}


def make_finetuner() -> None:
    options = "--batch-size 4 --steps 4 --restart 2 --sharing layer --train full"
    out = ("--out", "finetuner.safetensors")
    finish(edgezo("meta-train", "--model", "base", *LABEL, *options.split(), *out))


def write_roots(file: Path) -> None:
    """Square roots as torch takes them on this machine: a rule that divides by one has its bits from there."""
    import torch
    from safetensors.torch import save_file

    save_file({"roots": (torch.arange(1024) / 7).sqrt()}, file)


# ----------------------------------------------------------------------------- runs


def finished(name: str) -> None:
    run = f"finished/{name}"
    finish(request(KINDS[name], run))
    shutil.rmtree(f"{run}/overlay", ignore_errors=True)  # base and journal have what it has


def unfinished(name: str) -> None:
    """A run like the finished one, stopped on its way: tried again where it was too fast, or left nothing to do."""
    kind, whole = KINDS[name], Path("finished", name, "journal.bin")
    ends, run = record_ends(whole), Path("unfinished", name)
    for _ in range(40):
        shutil.rmtree(run, ignore_errors=True)
        stop(request(kind, str(run)), run / "journal.bin", ends[kind.at], kind.number)
        held = (run / "journal.bin").read_bytes()
        steps = len(record_ends(run / "journal.bin")) - 1
        # Snapshots are made after an even number of steps, so that a resume computes some again.
        odd = steps % 2 and kind.at <= steps < kind.steps
        if odd and len(held) == ends[steps] and all(map(holds_updates, run.glob("overlay/block*"))):
            break
    else:
        raise SystemExit(f"{name} was never stopped at the right moment")
    everything = whole.read_bytes()
    if not everything.startswith(held):
        raise SystemExit(f"{name}: two runs of one request differ")
    if kind.torn:
        half = (ends[steps] + ends[steps + 1]) // 2
        (run / "journal.bin").write_bytes(everything[:half])


def stop(command: list[str], journal: Path, size_bytes: int, number: int) -> None:
    """Run ``command`` and send it the signal ``number`` when its journal has that size."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None:
        if journal.exists() and journal.stat().st_size >= size_bytes:
            running.send_signal(number)
            break
    running.wait()


def holds_updates(block: Path) -> bool:
    """Whether a block on disk is whole and has taken updates, by its first page."""
    whole, applied = struct.unpack_from("<II", block.read_bytes(), 12)
    return bool(whole and applied)


def record_ends(journal: Path) -> list[int]:
    """Where the journal's header and each of its whole records end, by the lengths that they hold."""
    data = journal.read_bytes()
    ends = [20 + struct.unpack_from("<I", data, 16)[0] + 4]
    while ends[-1] + 8 <= len(data):
        end = ends[-1] + struct.unpack_from("<I", data, ends[-1] + 4)[0]
        if end > len(data):
            break
        ends.append(end)
    return ends


def main(out: Path) -> None:
    out.mkdir(parents=True)
    out = out.resolve()
    for name in ("base", "rows"):
        if (HERE / name).exists():
            shutil.copytree(HERE / name, out / name)
    if not (out / "base").exists():
        make_base(out)
    os.chdir(out)
    os.environ["OMP_NUM_THREADS"] = "1"  # matrices as small as these only wait for a second one
    write_roots(Path("roots.safetensors"))
    if (HERE / "finetuner.safetensors").exists():
        shutil.copy(HERE / "finetuner.safetensors", out)
    else:
        make_finetuner()
    for name in KINDS:
        finished(name)
        unfinished(name)
        print(name, flush=True)
    for file in [path for path in out.rglob("*") if path.is_file()]:
        if any(str(path).encode() in file.read_bytes() for path in (out, HERE)):
            raise SystemExit(f"{file} holds a path of this machine")
        file.chmod(0o644)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
