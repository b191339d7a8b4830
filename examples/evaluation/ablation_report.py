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
"""Tables and plot of the ablations, of the trainings that a folder holds."""

import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ablation_models import point_of
from ablation_points import ABLATIONS, MODELS
from bridge_report import LEGEND, plot_losses, protocol, summarise, table
from bridge_training import Size
from stored_config import means_the_same
from study import markdown, plain, read_results, write_report_files


def is_todays(result: dict[str, Any], size: Size) -> bool:
    """Whether a training is of what its name means today, the library's defaults included."""
    now, then = plain(point_of(result["job"]["rung"], size.shape)), result["point"]
    if now is None or then is None:
        return False
    # before there were others, every model had equal parameters
    return now == {"refitted": True, **then, "config": now["config"]} and means_the_same(then["config"], now["config"])


def with_measures(entries: list[dict[str, Any]], results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of `bridge_report.summarise`, with what was measured of the trainings at the best learning rate, means
    over seeds: `served`, the loss by chunk size, and `corrupted`, by name the loss at the tokens that were left alone less
    that of the same tokens in the text as it is; `None` for what some training has not."""
    results = list(results)
    for entry in entries:
        of_entry = [
            result
            for result in results
            if (result["job"]["rung"], result["job"]["learning_rate"]) == (entry["rung"], entry["best_rate"])
        ]
        entry["served"] = _mean_of([result.get("served") for result in of_entry])
        entry["corrupted"] = _mean_of(
            [
                result.get("corrupted")
                and {name: at["corrupted"] - at["clean"] for name, at in result["corrupted"].items()}
                for result in of_entry
            ]
        )
    return entries


def _mean_of(found: list[dict[str, float] | None]) -> dict[str, float] | None:
    if not found or not all(found):
        return None
    return {name: statistics.fmean(of_seed[name] for of_seed in found) for name in found[0]}


def table_of(entries: list[dict[str, Any]], measure: str, form: str) -> Iterator[str]:
    """A table of a measure of `with_measures`, of those entries that have it; nothing if none has."""
    rows = [entry for entry in entries if entry[measure] is not None]
    if rows:
        columns = list(rows[0][measure])
        cells = ([entry["rung"], *(_cell(entry[measure][name], form) for name in columns)] for entry in rows)
        yield from markdown(["", *columns], cells)


def _cell(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "not a number"


def plot(entries: list[dict[str, Any]]):
    """Three pictures: losses, losses by the chunk size served at, and what corruption costs; returns the figure."""
    from matplotlib.figure import Figure

    height = max(5.0, 1.5 + 0.24 * sum(entry["best"] is not None for entry in entries))
    figure = Figure(figsize=(14, height), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.3, 1))
    plot_losses(left.subplots(), entries, "the models themselves")
    served, corrupted = right.subplots(2, 1)
    for entry in entries:
        if entry["served"] is not None:
            points = [(int(chunk), loss) for chunk, loss in entry["served"].items()]
            served.plot(*zip(*points, strict=True), "o-", markersize=3, label=entry["rung"])
    served.set(xscale="log", xlabel="chunk size served at", ylabel="validation loss")
    tried = [entry for entry in entries if entry["corrupted"] is not None]
    for i, entry in enumerate(tried):
        names = list(entry["corrupted"])
        places = [x + 0.8 * (i - (len(tried) - 1) / 2) / len(tried) for x in range(len(names))]
        corrupted.bar(places, list(entry["corrupted"].values()), width=0.8 / len(tried), label=entry["rung"])
        corrupted.set_xticks(range(len(names)), names, fontsize=6, rotation=15)
    corrupted.set_ylabel("added loss")
    for ax in (served, corrupted):
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=6)
    return figure


def write_report(folder: Path, size: Size) -> list[str]:
    """Writes `report.md`, `report.json` and `report.png` into the folder; returns the lines of `report.md`."""
    results = read_results(folder, size.name, lambda result: is_todays(result, size), "as its name no longer says")
    entries = with_measures(summarise(results, ABLATIONS, MODELS), results)
    lines = [
        f"{protocol(results, size)} The cost is a model's best loss less that of the one it stands against, at the learning "
        f"rates and seeds that both were tried with; below zero, what was taken away did harm. {LEGEND}",
        "",
        *table(entries),
    ]
    measures = (
        (
            "served",
            ".3f",
            "## Served with other chunks",
            "Validation loss of the trained models when their memories take gradients at the starts of chunks of so many "
            "tokens.",
        ),
        (
            "corrupted",
            "+.3f",
            "## On corrupted text",
            "Validation loss at the tokens that were left alone, less that of the same tokens where nothing is replaced.",
        ),
    )
    for measure, form, title, says in measures:
        of_measure = list(table_of(entries, measure, form))
        if of_measure:
            lines += ["", title, "", says, "", *of_measure]
    content = {"size": results[0]["size"], "trainings": len(results), "ablations": entries}
    write_report_files(folder, lines, content, plot(entries))
    return lines


__all__ = ["is_todays", "plot", "table_of", "with_measures", "write_report"]
