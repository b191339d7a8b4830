# Copyright 2026 The miras-hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The bridge's table and plot, of the trainings that a folder holds."""

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bridge_points import PATH, RUNGS, Point
from bridge_training import Size
from study import markdown, plain, read_results, write_report_files


def at_the_rungs_point(result: dict[str, Any]) -> bool:
    """Whether a training is of the point that its rung names today; settings that there were not yet had their
    defaults."""
    rung = RUNGS.get(result["job"]["rung"])
    return rung is not None and plain(rung.point.as_dict()) == plain(Point().as_dict()) | result["point"]


Losses = dict[float, dict[int, float | None]]
"""Validation losses of a rung by learning rate and seed; `None` where a training diverged."""


def summarise(
    results: Iterable[dict[str, Any]], rungs: Mapping[str, Any] = RUNGS, path: Collection[str] = PATH
) -> list[dict[str, Any]]:
    """One entry a rung, in the rungs' order.

    Args:
        results: as JSON files hold them.
        rungs (`Mapping`): what names stand for, with `says` and `parent`.
        path: names of those that stand out.

    `by_rate` has the mean over seeds of the validation loss at each learning rate, `None` where a training diverged.
    `best` is the lowest of them, `spread` the largest less the smallest loss over seeds there. `cost` is the lowest less
    the parent's, both of the learning rates and seeds that both were tried with, so that more of them alone change nothing.
    `at_edge` says that the best rate is an end of what was tried, so that a better one may lie outside.
    """
    losses: dict[str, Losses] = {}
    norms: dict[str, float] = {}
    for result in results:
        job = result["job"]
        losses.setdefault(job["rung"], {}).setdefault(job["learning_rate"], {})[job["seed"]] = result["validation"]
        norm = result["gradient_norm_max"]
        norms[job["rung"]] = max(norms.get(job["rung"], 0.0), math.inf if norm is None else norm)

    entries: dict[str, dict[str, Any]] = {}
    for name, rung in rungs.items():
        if name not in losses:
            continue
        by_rate = {
            rate: None if None in of_seeds.values() else statistics.fmean(of_seeds.values())
            for rate, of_seeds in sorted(losses[name].items())
        }
        finite = {rate: loss for rate, loss in by_rate.items() if loss is not None}
        rate = min(finite, key=finite.get) if finite else None
        of_seeds = [] if rate is None else list(losses[name][rate].values())
        entries[name] = {
            "rung": name,
            "says": rung.says,
            "parent": rung.parent,
            "on_path": name in path,
            "by_rate": by_rate,
            "best": finite.get(rate),
            "best_rate": rate,
            "at_edge": rate is not None and rate in (min(by_rate), max(by_rate)),
            "seeds": len(of_seeds),
            "spread": max(of_seeds) - min(of_seeds) if of_seeds else None,
            "gradient_norm_max": norms[name] if math.isfinite(norms[name]) else None,
        }
    for entry in entries.values():
        parent = entry["parent"]
        entry["cost"] = _cost(losses[entry["rung"]], losses[parent]) if parent in entries else None
    return list(entries.values())


def _cost(own: Losses, of_parent: Losses) -> float | None:
    """The difference of the best means over seeds, see `summarise`."""
    best = []
    for losses, others in ((own, of_parent), (of_parent, own)):
        shared = [
            [loss for seed, loss in of_seeds.items() if seed in others.get(rate, {})]
            for rate, of_seeds in losses.items()
        ]
        best.append(min((statistics.fmean(found) for found in shared if found and None not in found), default=None))
    return None if None in best else best[0] - best[1]


def table(entries: list[dict[str, Any]]) -> Iterator[str]:
    """The entries as lines of markdown; rungs of the path in bold."""
    rates = sorted({rate for entry in entries for rate in entry["by_rate"]})
    titles = ["rung", "change", "against", *(f"{rate:g}" for rate in rates), "best", "cost", "seeds", "gradient norm"]
    rows = []
    for entry in entries:
        name = f"**{entry['rung']}**" if entry["on_path"] else entry["rung"]
        by_rate = ["" if rate not in entry["by_rate"] else _loss(entry["by_rate"][rate], "diverged") for rate in rates]
        seeds = "" if entry["spread"] is None else str(entry["seeds"])
        if entry["seeds"] > 1:
            seeds += f" (spread {entry['spread']:.3f})"
        best = _loss(entry["best"], "") + (" (edge)" if entry["at_edge"] and len(entry["by_rate"]) > 1 else "")
        cost = "" if entry["cost"] is None else f"{entry['cost']:+.3f}"
        norm = "not a number" if entry["gradient_norm_max"] is None else f"{entry['gradient_norm_max']:.3g}"
        rows.append([name, entry["says"], entry["parent"] or "", *by_rate, best, cost, seeds, norm])
    yield from markdown(titles, rows)


def _loss(value: float | None, missing: str) -> str:
    return missing if value is None else f"{value:.3f}"


def plot(entries: list[dict[str, Any]]):
    """Best losses rung by rung, every learning rate as a dot; returns the figure."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(8, 1.2 + 0.24 * sum(entry["best"] is not None for entry in entries)), layout="constrained"
    )
    plot_losses(figure.subplots(), entries, "the path", connected=True)
    return figure


def plot_losses(ax: Any, entries: list[dict[str, Any]], thick: str, connected: bool = False) -> None:
    """The picture of `plot` on axes.

    Args:
        thick (`str`): what rungs with thick bars are called.
        connected (`bool`): whether a line leads from one of them to the next.
    """
    shown = [entry for entry in entries if entry["best"] is not None]
    rates = sorted({rate for entry in shown for rate in entry["by_rate"]})
    for i, rate in enumerate(rates):
        points = [(e["by_rate"][rate], y) for y, e in enumerate(shown) if e["by_rate"].get(rate) is not None]
        ax.plot(*zip(*points, strict=True), "o", markersize=3.5, color=f"C{i}", label=f"learning rate {rate:g}")
    for y, entry in enumerate(shown):
        half = (entry["spread"] or 0.0) / 2
        width = 2.4 if entry["on_path"] else 0.8
        ax.plot([entry["best"] - half, entry["best"] + half], [y, y], color="0.3", linewidth=width)
        ax.plot([entry["best"]] * 2, [y - 0.35, y + 0.35], color="0.1", linewidth=width)
    path = [(entry["best"], y) for y, entry in enumerate(shown) if entry["on_path"]]
    if path and connected:
        ax.plot(*zip(*path, strict=True), color="0.6", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(shown)), [entry["rung"] for entry in shown], fontsize=7)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.set_xlabel(f"validation loss (nats per token); bars are the best learning rate, thick ones {thick}")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)


def write_report(folder: Path, size: Size) -> list[str]:
    """Writes `report.md`, `report.json` and `report.png` into the folder; returns the lines of `report.md`."""
    results = read_results(folder, size.name, at_the_rungs_point, "at another point than the rung's")
    entries = summarise(results)
    lines = [
        f"{protocol(results, size)} The cost of a rung is its best loss less that of the rung it stands against, at the "
        f"learning rates and seeds that both were tried with. {LEGEND}",
        "",
        *table(entries),
    ]
    content = {"size": results[0]["size"], "trainings": len(results), "rungs": entries}
    write_report_files(folder, lines, content, plot(entries))
    return lines


LEGEND = (
    "Numbers above the losses are learning rates; (edge) marks a best one at the end of those tried. The gradient norm "
    "is the largest before clipping, of all learning rates and seeds."
)


def protocol(results: list[dict[str, Any]], size: Size) -> str:
    """What was trained, in a sentence."""
    shape, parameters = size.shape, [result["parameters"] for result in results]
    return (
        f"Validation loss in nats per token after {size.tokens:,} tokens of the {results[0]['data']}: {size.steps} steps "
        f"of {size.rows} x {size.context} tokens, {shape.layers} layers of width {shape.width}, {shape.heads} heads, "
        f"{min(parameters):,} to {max(parameters):,} parameters, {'bfloat16' if size.bf16 else 'float32'}."
    )


__all__ = [
    "LEGEND",
    "at_the_rungs_point",
    "plot",
    "plot_losses",
    "protocol",
    "summarise",
    "table",
    "write_report",
]
