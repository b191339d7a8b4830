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
"""The recall study's tables and plot, of the trainings that a folder holds."""

import functools
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recall_models import ABLATION, MODELS, NEIGHBOURS
from recall_published import PUBLISHED, WITHOUT
from recall_tasks import TASKS
from recall_training import Job, Size, mean_accuracy, model_today
from stored_config import means_the_same
from study import markdown, plain, read_results, write_report_files


PUBLISHED_SIZE = "full"
LEARNED = 0.9
"""Accuracy on a task's easiest test from which a neighbour is said to have learned it."""


def is_todays(result: dict[str, Any], size: Size) -> bool:
    """Whether a training is by its task's protocol, and of what its model's name means today, the library's defaults
    included."""
    task = TASKS.get(result["job"]["task"])
    # those of before a protocol had chunks of its own had the size's
    if task is None or {"chunk": None, **result["protocol"]} != plain(asdict(task.protocols[size.name])):
        return False
    # before there were others, every model had equal parameters
    now, then = plain(model_today(Job(**result["job"]), size)), {"refitted": True, **result["model"]}
    if now["config"] is None or then["config"] is None:
        return now == then
    return now == {**then, "config": now["config"]} and means_the_same(then["config"], now["config"])


def summarise(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a task, model and width, in the tasks' and models' order.

    Of the grid of learning rates and weight decays the point is taken whose mean validation accuracy over seeds is
    highest, one where a seed diverged being the lowest of all; what is said of it is measured on the tests. `spread`
    is the largest less the smallest mean accuracy over its seeds. `scaled` puts a guess at 0. `at_edge` says that the
    best learning rate is an end of those tried, so that a better one may lie outside.
    """
    groups: dict[tuple, dict[tuple[float, float], list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        job = result["job"]
        point = job["learning_rate"], job["weight_decay"]
        groups[job["task"], job["model"], job["width"]][point].append(result)
    models = list(MODELS)

    def order(key: tuple) -> tuple:
        task, model, width = key
        known = models.index(model) if model in models else len(models)
        return list(TASKS).index(task), known, model, width

    entries = []
    for key in sorted(groups, key=order):
        points = groups[key]
        best = max(points, key=lambda point: _mean(mean_accuracy(r, "validation") for r in points[point]))
        of_seeds, rates = points[best], sorted({rate for rate, _ in points})
        tests = {
            part: {
                "accuracy": _mean_or_none(result["tests"][part]["accuracy"] for result in of_seeds),
                "state": of_seeds[0]["tests"][part]["state"],
            }
            for part in of_seeds[0]["tests"]
        }
        means = [mean_accuracy(result) for result in of_seeds]
        mean, chance = _mean_or_none(means), of_seeds[0]["chance"]
        entries.append(
            {
                **dict(zip(("task", "model", "width"), key, strict=True)),
                "parameters": of_seeds[0]["parameters"],
                "tests": tests,
                "mean": mean,
                "scaled": None if mean is None else scaled(mean, chance),
                "chance": chance,
                "learning_rate": best[0],
                "weight_decay": best[1],
                "at_edge": len(rates) > 1 and best[0] in (rates[0], rates[-1]),
                "seeds": len(of_seeds),
                "spread": None if mean is None else max(means) - min(means),
                "points": len(points),
            }
        )
    return entries


def scaled(accuracy: float, chance: float) -> float:
    """0 for a guess, 1 for all right."""
    return (accuracy - chance) / (1.0 - chance)


def _mean(values: Iterable[float | None]) -> float:
    values = list(values)
    return -1.0 if None in values else statistics.fmean(values)


def _mean_or_none(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return None if None in values else statistics.fmean(values)


def table(entries: list[dict[str, Any]]) -> Iterator[str]:
    """A task's entries as lines of markdown."""
    parts = list(entries[0]["tests"])
    titles = ["model", "width", "parameters", "memory", "carried", *parts, "mean", "scaled", "rate", "decay", "seeds"]
    rows = []
    for entry in entries:
        states = [test["state"] for test in entry["tests"].values()]
        accuracies = [_number(test["accuracy"]) for test in entry["tests"].values()]
        rate = f"{entry['learning_rate']:.3g}" + (" (edge)" if entry["at_edge"] else "")
        seeds = str(entry["seeds"])
        if entry["seeds"] > 1 and entry["spread"] is not None:
            seeds += f" (spread {entry['spread']:.3f})"
        rows.append(
            [
                MODELS.get(entry["model"], entry["model"]),
                str(entry["width"]),
                f"{entry['parameters']:,}",
                _range(states, "memory"),
                _range(states, "carried"),
                *accuracies,
                _number(entry["mean"]),
                _number(entry["scaled"]),
                rate,
                f"{entry['weight_decay']:g}",
                seeds,
            ]
        )
    yield from markdown(titles, rows)


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.3f}"


def _range(states: list[dict[str, int] | None], which: str) -> str:
    if None in states:
        return ""
    sizes = sorted({state[which] for state in states})
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"


def checks(entries: list[dict[str, Any]], size: Size) -> Iterator[str]:
    """Neighbours against what is published for them, or what stands in for it."""
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    if size.name == PUBLISHED_SIZE:
        yield "| task | model | test | published | here | published by |"
        yield "|---|---|---|---|---|---|"
        for figure in PUBLISHED:
            for entry in entries:
                if (entry["task"], entry["model"]) == (figure.task, figure.model):
                    value = entry["tests"][figure.part]["accuracy"]
                    if value is not None and figure.scaled:
                        value = scaled(value, entry["chance"])
                    cells = (
                        figure.task,
                        figure.model,
                        figure.part,
                        f"{figure.value:.3f}",
                        _number(value),
                        figure.source,
                    )
                    yield "| " + " | ".join(cells) + " |"
        for task in tasks:
            if task in WITHOUT:
                yield f"| {task} | | | | | {WITHOUT[task]} |"
        return
    yield (
        f"Nothing has been published at size {size.name}, so no figure here can be held against one. What can be said is "
        f"whether a neighbour learns a task, {LEARNED:g} of its first test, without which its line says nothing about the "
        "others:"
    )
    yield ""
    for task in tasks:
        said = []
        for entry in entries:
            if entry["task"] == task and entry["model"] in NEIGHBOURS:
                value = next(iter(entry["tests"].values()))["accuracy"]
                learned = "learns it" if value is not None and value >= LEARNED else "does not"
                said.append(f"{MODELS[entry['model']]} at width {entry['width']} {learned} ({_number(value)})")
        yield f"- {task}: {'; '.join(said) if said else 'no neighbour was trained'}"


def plot(entries: list[dict[str, Any]]):
    """Two pictures a task, mean accuracy against the numbers a layer recalls from, and accuracy test by test. Ablations are
    in the tables alone.

    Returns the figure."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    entries = [entry for entry in entries if not entry["model"].startswith(ABLATION)] or entries
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    models = list(dict.fromkeys(entry["model"] for entry in entries))
    colors = dict(zip(models, itertools.cycle(colormaps["tab20"].colors)))
    figure = Figure(figsize=(9, 2.6 * len(tasks)), layout="constrained")
    for task, axes in zip(tasks, figure.subplots(len(tasks), 2, squeeze=False), strict=True):
        by_state, by_part = axes
        of_task = [entry for entry in entries if entry["task"] == task and entry["mean"] is not None]
        for model in models:
            color = colors[model]
            lines = [entry for entry in of_task if entry["model"] == model]
            points = [(_memory(entry), entry["mean"]) for entry in lines if _memory(entry) is not None]
            if points:
                by_state.plot(*zip(*points, strict=True), "o-", color=color, label=MODELS.get(model, model))
            for entry in lines:
                values = [test["accuracy"] for test in entry["tests"].values()]
                by_part.plot(list(entry["tests"]), values, "o-", color=color, alpha=0.8, markersize=3)
        for ax in axes:
            if of_task:
                ax.axhline(of_task[0]["chance"], color="0.6", linestyle="--", linewidth=0.8)
            ax.set_ylim(-0.03, 1.03)
            ax.grid(alpha=0.3)
        by_state.set(xscale="log", xlabel="numbers a layer recalls from, mean over tests", ylabel="accuracy")
        by_state.set_title(task, fontsize=9)
        by_part.set_title("by test; dashed is a guess", fontsize=9)
    drawn = {label: line for ax in figure.axes for line, label in zip(*ax.get_legend_handles_labels())}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _memory(entry: dict[str, Any]) -> float | None:
    states = [test["state"] for test in entry["tests"].values()]
    return None if None in states else statistics.fmean(state["memory"] for state in states)


def write_report(folder: Path, size: Size) -> list[str]:
    """Writes `report.md`, `report.json` and `report.png` into the folder; returns the lines of `report.md`."""
    current = functools.partial(is_todays, size=size)
    results = read_results(folder, size.name, current, "by another protocol than the task's or with other defaults")
    entries = summarise(results)
    lines = [
        f"Accuracy of {len(results)} trainings at size {size.name}, {'bfloat16' if size.bf16 else 'float32'}, heads of "
        f"{size.head_dim}, chunks of {size.chunk} where no others stand: of every model the learning rate and weight decay that are best on the "
        "validation set, on the test set. *Memory* is the numbers that a layer recalls from for one sequence, *carried* "
        "all that it keeps for the next token; a Llama's are those after the shortest and the longest test. *Scaled* puts "
        "a guess at 0; (edge) marks a best learning rate at the end of those tried.",
    ]
    for name in dict.fromkeys(entry["task"] for entry in entries):
        of_task = [entry for entry in entries if entry["task"] == name]
        protocol = TASKS[name].protocols[size.name]
        lines += [
            "",
            f"## {name}: {TASKS[name].says}",
            "",
            f"{protocol.vocabulary} tokens, trained on {', '.join(part.name for part in protocol.train)}, "
            f"{protocol.steps:,} steps of {protocol.batch} sequences, {protocol.layers} layers"
            f"{'' if protocol.chunk is None else f', chunks of {protocol.chunk}'}; a guess scores "
            f"{of_task[0]['chance']:.3f}.",
            "",
            *table(of_task),
        ]
    lines += ["", "## The neighbours and what is published", "", *checks(entries, size)]
    content = {"size": results[0]["size"], "trainings": len(results), "entries": entries}
    write_report_files(folder, lines, content, plot(entries), dpi=120)
    return lines


__all__ = ["checks", "plot", "scaled", "summarise", "table", "write_report"]
