"""Draw a run's memory over time against its plan, its cap and a plain forward pass.

    edgezo finetune --model smollm2-135m-instruct --task example --max-mem 900MB --steps 20 --profile --out runs/mine
    python docs/figures/memory_of_a_run.py runs/mine docs/figures/memory-of-a-run.svg

Reads the run's profile.json, plan.json and summary.json. Needs matplotlib (`pip install 'edgezo[bench]'`). Text stays
text, and the colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

# Placeholder that matplotlib writes -> (CSS variable, colour in light, colour in dark).
COLOURS = {
    "#010101": ("ink", "#24292f", "#e6e6e6"),
    "#020202": ("soft", "#6b7280", "#9aa3b2"),
    "#030303": ("paper", "#ffffff", "#1b1f27"),
    "#040404": ("file", "#a9c8ec", "#3b5b80"),
    "#050505": ("anon", "#4a86c8", "#5b9bdd"),
    "#060606": ("cap", "#b3261e", "#ff8a80"),
    "#070707": ("plan", "#a15c00", "#ffb74d"),
    "#080808": ("plain", "#1b6e3c", "#7ddb9c"),
    "#090909": ("band", "#f1f3f6", "#262b35"),
}
NAMED = {name: placeholder for placeholder, (name, _, _) in COLOURS.items()}
MB = 1e6


def stages(samples: dict[str, Any], steps: int) -> list[tuple[float, float, str]]:
    """(start, end, label) of the parts of a run, from the phases of the samples; seconds."""
    times, phases = samples["t_s"], samples["phase"]
    spans = [
        (name, [time for _, time in group])
        for name, group in groupby(zip(phases, times, strict=True), key=lambda sample: sample[0])
    ]
    starts = {name: [span[0] for at, span in spans if at == name] for name in phases}
    ends = {name: [span[-1] for at, span in spans if at == name] for name in phases}
    # A short phase can fall between two samples; then its stage belongs to the one before it.
    begins = [(0.0, "import")]
    begins += [
        (starts[name][0], label)
        for name, label in (("load", "load"), ("forward", "check,\nevaluate"))
        if name in starts
    ]
    if "fit" in starts and "eval" in starts:
        begins.append((ends["eval"][0], "linear\nprobe"))
        begins.append((ends["fit"][-1], f"{steps} steps"))
        begins.append((starts["eval"][-1], "evaluate"))
    until = [start for start, _ in begins[1:]] + [times[-1]]
    return [(start, end, label) for (start, label), end in zip(begins, until, strict=True)]


def thinned(samples: dict[str, list[Any]], apart_s: float = 0.04) -> dict[str, list[Any]]:
    """The samples that begin a phase, and others at least ``apart_s`` apart: what a figure can show."""
    kept = [0]
    for i, (time, phase) in enumerate(zip(samples["t_s"], samples["phase"], strict=True)):
        if phase != samples["phase"][i - 1] or time - samples["t_s"][kept[-1]] >= apart_s:
            kept.append(i)
    kept.append(len(samples["t_s"]) - 1)
    return {name: [values[i] for i in kept] for name, values in samples.items()}


def draw(run: Path) -> str:
    """The figure of a finished run as SVG text."""
    profile, plan, summary = (
        json.loads((run / name).read_text(encoding="utf-8"))
        for name in ("profile.json", "plan.json", "summary.json")
    )
    samples = thinned(profile["samples"])
    figure, axes = begun(4.1)
    end, cap = samples["t_s"][-1], summary["max_mem_bytes"] / MB
    _areas(axes, samples, summary["steps"], cap)
    _levels(axes, plan, summary, end, cap)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.22 * cap)
    axes.set_yticks([share * cap / 9 for share in range(10)])
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("seconds since the start of the process", color=NAMED["ink"])
    axes.set_ylabel("resident memory, MB", color=NAMED["ink"])
    return finished(figure, axes)


def begun(height: float) -> tuple[Any, Any]:
    """(figure, axes) of a figure of the docs, ``height`` inches high, in placeholders for colours."""
    plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})
    plt.rcParams["svg.hashsalt"] = "edgezo"  # the same file from the same figures
    figure, axes = plt.subplots(figsize=(8.2, height))
    figure.patch.set_facecolor(NAMED["paper"])
    axes.set_facecolor(NAMED["paper"])
    return figure, axes


def finished(figure: Any, axes: Any) -> str:
    """A figure as SVG text, in the reader's colours."""
    axes.tick_params(colors=NAMED["ink"])
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(NAMED["soft"])
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return themed(text.getvalue())


def _areas(axes: Any, samples: dict[str, list[Any]], steps: int, cap: float) -> None:
    """Resident memory, anonymous and of files, over the stages of the run; ``cap`` in MB."""
    times, end = samples["t_s"], samples["t_s"][-1]
    anonymous = [value / MB for value in samples["anon_bytes"]]
    resident = [value / MB for value in samples["rss_bytes"]]
    for number, (start, stop, label) in enumerate(stages(samples, steps)):
        if number % 2:
            axes.axvspan(start, stop, color=NAMED["band"], lw=0, zorder=0)
        turned = {"rotation": 90} if stop - start < 0.06 * end else {"linespacing": 1.1}
        place = ((start + stop) / 2, 1.205 * cap)
        axes.text(*place, label, ha="center", va="top", fontsize=9, color=NAMED["soft"], **turned)
    axes.fill_between(times, anonymous, color=NAMED["anon"], lw=0, zorder=2)
    axes.fill_between(times, anonymous, resident, color=NAMED["file"], lw=0, zorder=2)
    middle, above = {"ha": "center", "zorder": 3}, 0.74 * end
    axes.text(
        above, 0.31 * cap, "anonymous: weights, activations, heap", color=NAMED["paper"], **middle
    )
    axes.text(above, 0.72 * cap, "files: libraries", color=NAMED["ink"], **middle)


def _levels(
    axes: Any, plan: dict[str, Any], summary: dict[str, Any], end: float, cap: float
) -> None:
    """What the measured peak is to be compared with."""
    for level_bytes, name, label, lift in (
        (summary["max_mem_bytes"], "cap", "cap (--max-mem)", 0.009),
        (plan["planned_peak_bytes"], "plan", "planned peak", 0.009),
        (summary["inference_peak_rss_bytes"], "plain", "plain forward", -0.051),
    ):
        level = level_bytes / MB
        axes.axhline(level, color=NAMED[name], lw=1.5, ls=(0, (5, 3)), zorder=4)
        place = (0.01 * end, level + lift * cap)
        axes.text(*place, f"{label} {level:.0f} MB", color=NAMED[name], zorder=5)
    peak = summary["peak_rss_bytes"] / MB
    axes.annotate(
        f"measured peak {peak:.0f} MB",
        (0.965 * end, peak),
        (0.80 * end, 0.905 * cap),
        ha="center",
        color=NAMED["ink"],
        zorder=5,
        arrowprops={"arrowstyle": "->", "color": NAMED["ink"], "shrinkB": 1},
    )


def themed(svg: str) -> str:
    """Placeholders become CSS variables with a light and a dark value; the fonts become the reader's."""
    for placeholder, (name, light, _) in COLOURS.items():
        svg = svg.replace(placeholder, f"var(--{name}, {light})")
    light, dark = (
        "".join(f"--{name}:{colours[which]};" for name, *colours in COLOURS.values())
        for which in (0, 1)
    )
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    svg = re.sub(r"(<svg [^>]*>)", lambda match: f"{match[1]}\n {style}", svg, count=1)
    svg = re.sub(r" *<metadata>.*?</metadata>\n?", "", svg, flags=re.S)
    return re.sub(r'(?<= d=")[^"]*', lambda path: _rounded(path[0]), svg)


def _rounded(path: str) -> str:
    """An SVG path with coordinates to a tenth of a point."""
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run that was made with --profile")
    parser.add_argument("out", type=Path, help="the SVG file to write")
    args = parser.parse_args()
    args.out.write_text(draw(args.run), encoding="utf-8")


if __name__ == "__main__":
    main()
