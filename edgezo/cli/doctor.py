"""``edgezo doctor``: what this machine and its packages are good for, and what to mend. Works without torch, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from edgezo import __version__
from edgezo.cli.options import emit, json_option
from edgezo.machine.hardware import BF16_FLAGS, Machine, cpu_flags, format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from edgezo.machine.checkup import Finding

SLOW = 0.5  # bf16 products at less than this share of fp32's rate are slow


@click.command(short_help="Check this machine and what is installed.")
@click.option(
    "--calibrate",
    is_flag=True,
    help="Measure the GPU for plans: driver's context, workspace, rates. Takes a minute; kept in the cache.",
)
@json_option
def doctor(calibrate: bool, as_json: bool) -> int:
    """Check this machine and what is installed: versions, speed, memory, disks. Exits with 1 if there is a problem."""
    if calibrate:
        return _calibrate(as_json)
    findings = list(_findings())
    problems = sum(finding.level == "problem" for finding in findings)
    payload = {"problems": problems, "findings": [finding.to_dict() for finding in findings]}
    emit(as_json, payload, _table(findings, problems))
    return int(problems > 0)


def _calibrate(as_json: bool) -> int:
    """Measure the GPU and keep its figures. Raises EdgezoError where there is none that PyTorch can use."""
    from edgezo.errors import EdgezoError
    from edgezo.machine.gpu_figures import keep
    from edgezo.machine.hardware import machine

    here = machine()
    if here.gpu is None:
        about = next(note for note in here.notes if note.startswith("GPU: "))[5:]
        raise EdgezoError(
            f"there is no GPU to measure: {about}.\n"
            "--calibrate is for machines with an NVIDIA GPU and a PyTorch that is built for CUDA; without one plans "
            "count with this machine's memory, which needs no calibration."
        )
    from edgezo.machine.gpu_calibration import calibrated

    figures = calibrated(here.gpu)
    file = keep(figures)
    text = (
        f"{figures.card}: context {format_bytes(figures.context_bytes)}, workspace "
        f"{format_bytes(figures.workspace_bytes)}, {figures.flops_s / 1e12:.3g} TFLOP/s in bf16, "
        f"{format_bytes(round(figures.copy_bytes_s))} a second from the RAM. Kept in {file}"
    )
    emit(as_json, {"figures": asdict(figures), "file": str(file)}, text)
    return 0


def _findings() -> Iterator[Finding]:
    """Every finding. A check that fails is a finding, too."""
    from edgezo.machine import checkup
    from edgezo.machine.hardware import machine

    here = machine()
    checks: dict[str, Callable[[], Finding | Iterator[Finding]]] = {
        "versions": lambda: checkup.versions(__version__),
        "torch build": checkup.torch_build,
        "processor": lambda: checkup.processor(here),
        "sensors": checkup.sensors,
        "threads": lambda: checkup.threads(here.cores),
        "other programs": checkup.neighbours,
        "torch": lambda: _of_torch(here),
        "memory": lambda: checkup.memory(here),
        "out of memory": checkup.out_of_memory,
        "swap": checkup.swap,
        "allocator": checkup.allocator,
        "disks": checkup.disks,
        "GPU": lambda: checkup.gpu(here),
    }
    for about, check in checks.items():
        try:
            result = check()
            yield from [result] if isinstance(result, checkup.Finding) else result
        except Exception as failure:
            text = f"this could not be looked at: {type(failure).__name__}: {failure}"
            yield checkup.Finding(about, "note", text)


def _of_torch(here: Machine) -> Iterator[Finding]:
    """What only PyTorch can tell; C kernels alone where it cannot be imported."""
    from edgezo.machine import checkup
    from edgezo.machine.checkup import Finding

    kernels_there = checkup.c_kernels()
    try:
        import torch
    except (ImportError, OSError) as failure:
        yield kernels_there
        text = f"PyTorch cannot be imported, so speed and quantisation were not tried: {failure}"
        yield Finding("torch", "problem", text, checkup.CPU_BUILD)
        return
    from edgezo.machine import kernels, rates
    from edgezo.machine.process_memory import rss_bytes

    if kernels_there.level == "ok" and not kernels.loaded():
        text = "compiled of another version of kernels.c, or not loadable: they are not used"
        kernels_there = Finding("C kernels", "problem", text, checkup.compile_command())
    yield kernels_there
    held = rss_bytes()
    text = f"{torch.get_num_threads()} threads; PyTorch alone takes {format_bytes(held)} in this process"
    yield Finding(
        "torch", "ok", text, figures={"threads": torch.get_num_threads(), "rss_bytes": held}
    )
    if here.gpu is not None and not torch.cuda.is_available():
        text = f"PyTorch cannot use the {here.gpu.name}: its driver is older than torch {torch.__version__} needs"
        yield Finding(
            "GPU",
            "problem",
            text,
            "nvidia-smi shows the driver; install a newer one, or give --device cpu",
        )
    yield _products(rates.products_flops_s())
    speed = rates.memory_bytes_s()
    text = f"one thread copies {format_bytes(round(speed))} a second, reading and writing counted"
    yield Finding("memory speed", "ok", text, figures={"bytes_s": round(speed)})
    yield _quantisation()


def _products(flops_s: dict[str, float]) -> Finding:
    """Rates of products, and what edgezo does about slow ones (plan/footprint_stored.py, ``compute_dtype``)."""
    from edgezo.machine.checkup import Finding

    shown = ", ".join(f"{name} {rate / 1e9:.3g}" for name, rate in flops_s.items())
    figures = {f"{name}_flops_s": round(rate) for name, rate in flops_s.items()}
    fast = not BF16_FLAGS.isdisjoint(cpu_flags())
    slow = flops_s.get("bf16", 0.0) < SLOW * flops_s["fp32"]
    text = f"{shown} GFLOP/s"
    if not slow:
        return Finding("products", "ok", text, figures=figures)
    times = flops_s["fp32"] / max(flops_s.get("bf16", 0.0), 1.0)
    if fast:
        text += (
            f". bf16 is {times:.0f} x slower than fp32, though this processor has instructions for it, and edgezo "
            "computes in bf16 here"
        )
        return Finding(
            "products", "note", text, "give --precision fp32, or install a newer torch", figures
        )
    text += (
        f". This processor has no instructions for bf16, and PyTorch's bf16 products are {times:.0f} x slower than "
        "fp32 ones. edgezo makes none of them here: it keeps weights in bf16, int8 or int4, expands them by tiles, and "
        "multiplies in fp32. Other programs that compute in bf16 are slow here"
    )
    return Finding("products", "note", text, figures=figures)


def _quantisation() -> Finding:
    """Whether codes and scales of optimum-quanto are those that edgezo stores."""
    from edgezo.machine.checkup import Finding, quanto_reinstall
    from edgezo.weights.quantisation_check import disagreement

    wrong = disagreement()
    if wrong:
        return Finding("quantisation", "problem", wrong, quanto_reinstall())
    return Finding(
        "quantisation", "ok", "int8 and int4 of a matrix of 64 x 128 are optimum-quanto's"
    )


def _table(findings: list[Finding], problems: int) -> RenderableType:
    """The findings as a table, each fix below its finding, and the verdict."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("what", no_wrap=True)
    table.add_column("finding")
    styles = {"ok": "green", "note": "yellow", "problem": "red"}
    for finding in findings:
        text = Text(finding.text)
        if finding.fix:
            text.append(f"\n-> {finding.fix}", style="bold")
        table.add_row(Text(finding.level, style=styles[finding.level]), finding.about, text)
    verdict = "no problem" if not problems else f"{problems} problem{'s' * (problems > 1)}"
    return Group(table, Text(), Text(verdict))
