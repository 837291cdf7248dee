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
    first = {name: times[phases.index(name)] for name in ("load", "forward", "eval", "fit")}
    runs = [
        (name, [t for _, t in group])
        for name, group in groupby(zip(phases, times, strict=True), key=lambda s: s[0])
    ]
    evaluated = next(span[-1] for name, span in runs if name == "eval")
    fitted = max(span[-1] for name, span in runs if name == "fit")
    last = max(span[0] for name, span in runs if name == "eval")
    return [
        (0.0, first["load"], "import"),
        (first["load"], first["forward"], "load"),
        (first["forward"], evaluated, "check,\nevaluate"),
        (evaluated, fitted, "linear\nprobe"),
        (fitted, last, f"{steps} steps"),
        (last, times[-1], "evaluate"),
    ]


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
    times = samples["t_s"]
    anonymous = [value / MB for value in samples["anon_bytes"]]
    resident = [value / MB for value in samples["rss_bytes"]]
    plt.rcParams.update({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10})
    figure, axes = plt.subplots(figsize=(8.2, 4.1))
    figure.patch.set_facecolor(NAMED["paper"])
    axes.set_facecolor(NAMED["paper"])

    end = times[-1]
    for number, (start, stop, label) in enumerate(stages(samples, summary["steps"])):
        if number % 2:
            axes.axvspan(start, stop, color=NAMED["band"], lw=0, zorder=0)
        narrow = stop - start < 0.06 * end
        axes.text((start + stop) / 2, 1085, label, ha="center", va="top", fontsize=9, linespacing=1.1,
                  color=NAMED["soft"], rotation=90 if narrow else 0)  # fmt: skip
    axes.fill_between(times, anonymous, color=NAMED["anon"], lw=0, zorder=2)
    axes.fill_between(times, anonymous, resident, color=NAMED["file"], lw=0, zorder=2)
    axes.text(12.6 / 17 * end, 280, "anonymous: weights, activations, heap", ha="center",
              color=NAMED["paper"], zorder=3)  # fmt: skip
    axes.text(12.6 / 17 * end, 650, "files: libraries", ha="center", color=NAMED["ink"], zorder=3)

    for bytes_, name, label, lift in (
        (summary["max_mem_bytes"], "cap", "cap (--max-mem)", 8),
        (plan["planned_peak_bytes"], "plan", "planned peak", 8),
        (summary["inference_peak_rss_bytes"], "plain", "plain forward, same rows", -46),
    ):  # fmt: skip
        axes.axhline(bytes_ / MB, color=NAMED[name], lw=1.5, ls=(0, (5, 3)), zorder=4)
        axes.text(
            0.01 * end,
            bytes_ / MB + lift,
            f"{label} {bytes_ / MB:.0f} MB",
            color=NAMED[name],
            zorder=5,
        )
    peak = summary["peak_rss_bytes"] / MB
    axes.annotate(f"measured peak {peak:.0f} MB", (0.965 * end, peak), (0.80 * end, 815), ha="center",
                  color=NAMED["ink"], zorder=5,
                  arrowprops={"arrowstyle": "->", "color": NAMED["ink"], "shrinkB": 1})  # fmt: skip

    axes.set_xlim(0, end)
    axes.set_ylim(0, 1100)
    axes.set_yticks(range(0, 901, 100))
    axes.set_xlabel("seconds since the start of the process", color=NAMED["ink"])
    axes.set_ylabel("resident memory, MB", color=NAMED["ink"])
    axes.tick_params(colors=NAMED["ink"])
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(NAMED["soft"])
    figure.tight_layout()
    text = io.StringIO()
    plt.rcParams["svg.hashsalt"] = "edgezo"  # the same file from the same run
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return themed(text.getvalue())


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
