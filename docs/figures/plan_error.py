"""Draw how far plans are above measured peaks: a histogram of the errors of random requests.

    python benchmarks/plan_error.py --out DIR --data-root DIR --json benchmarks/plan-error.json
    python docs/figures/plan_error.py benchmarks/plan-error.json docs/figures/plan-error.svg

Needs matplotlib (`pip install 'edgezo[bench]'`). Text and colours are as in memory_of_a_run.py.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from memory_of_a_run import NAMED, begun, finished

KINDS = {"resident": ("anon", "all weights in memory"), "disk": ("file", "blocks on disk")}


def errors_of(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """(planned - measured) / measured in percent, of finished runs, by residency."""
    errors: dict[str, list[float]] = {name: [] for name in KINDS}
    for line in lines:
        if not line["exit"]:
            error = 100 * (line["planned_bytes"] / line["measured_bytes"] - 1)
            errors[line["request"]["residency"]].append(error)
    return errors


def draw(lines: list[dict[str, Any]]) -> str:
    """The figure as SVG text."""
    errors = errors_of(lines)
    every = sorted(value for values in errors.values() for value in values)
    figure, axes = begun(3.4)
    first, last = min(0, math.floor(every[0])), math.ceil(every[-1])
    edges = [first + half / 2 for half in range(2 * (last - first) + 1)]
    axes.hist(
        list(errors.values()),
        bins=edges,
        stacked=True,
        color=[NAMED[colour] for colour, _ in KINDS.values()],
        label=[f"{text}: {len(errors[name])} runs" for name, (_, text) in KINDS.items()],
        edgecolor=NAMED["paper"],
        zorder=2,
    )
    _levels(axes, every)
    axes.set_xlabel("(planned peak - measured peak) / measured peak, %", color=NAMED["ink"])
    axes.set_ylabel("runs", color=NAMED["ink"])
    axes.legend(frameon=False, loc="center right", labelcolor=NAMED["ink"])
    return finished(figure, axes)


def _levels(axes: Any, every: list[float]) -> None:
    """Where a plan equals the peak, the median and the 95th percentile of the sorted errors."""
    middle, high = statistics.median(every), every[int(0.95 * len(every))]
    top = 1.16 * axes.get_ylim()[1]
    axes.set_ylim(0, top)
    for at, name, label in (
        (0.0, "cap", "plan = peak"),
        (middle, "plan", f"median {middle:.1f} %"),
        (high, "plain", f"95 %: {high:.1f} %"),
    ):
        axes.axvline(at, color=NAMED[name], lw=1.5, ls=(0, (5, 3)), zorder=3)
        axes.text(at, 0.97 * top, f" {label}", color=NAMED[name], va="top", zorder=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what benchmarks/plan_error.py has written")
    parser.add_argument("out", type=Path, help="the SVG file to write")
    args = parser.parse_args()
    lines = json.loads(args.json.read_text(encoding="utf-8"))
    args.out.write_text(draw(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
