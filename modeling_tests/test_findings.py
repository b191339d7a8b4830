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
"""What `docs/does_it_learn.md` says was measured is what the committed results say.

Every table of the page is made anew from the JSON files under `examples/evaluation/results` and compared cell by cell; a
table that none of the functions here makes fails. Sentences are held to those numbers by their own words.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "examples" / "evaluation" / "results"
PAGE = (ROOT / "docs" / "does_it_learn.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
MODELS = ("moneta", "yaad", "memora")

Rows = list[list[str]]
"""Cells of the rows below a table's titles. The first cell of a row that was made anew is how the page's begins."""

TABLES: dict[str, Callable[[], Rows]] = {}
"""What makes a table anew, by its titles."""


def table(titles: str):
    def keep(rows: Callable[[], Rows]) -> Callable[[], Rows]:
        assert titles not in TABLES
        TABLES[titles] = rows
        return rows

    return keep


def tables_of(page: str) -> dict[str, Rows]:
    """The tables by their titles, without what makes a cell bold."""
    found = {}
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        titles, _, *lines = block.splitlines()
        assert titles not in found
        found[titles] = [[cell.strip() for cell in line.replace("**", "").strip()[1:-1].split("|")] for line in lines]
    return found


@cache
def result(study: str, name: str, rate: float = 0.004, seed: int = 0) -> dict[str, Any]:
    return json.loads((RESULTS / study / f"{name}-lr{rate:g}-seed{seed}.json").read_text())


def loss(study: str, name: str, rate: float = 0.004, seed: int = 0) -> float:
    return result(study, name, rate, seed)["validation"]


def recalled(task: str, name: str, rates: Sequence[float] = (0.004,), width: int = 64) -> dict[str, Any]:
    """The result of a model at the rate that was best on the validation set."""
    found = [
        json.loads((RESULTS / "recall" / f"{task}-{name}-w{width}-lr{rate:g}-wd0.1-seed0.json").read_text())
        for rate in rates
    ]
    return max(found, key=lambda one: sum(test["validation"] for test in one["tests"].values()))


def of_seeds(task: str, name: str, test: str, seeds: int) -> list[float]:
    """Accuracies of trainings at 4e-3 that differ by their seed."""
    names = (f"{task}-{name}-w64-lr0.004-wd0.1-seed{seed}.json" for seed in range(seeds))
    return [json.loads((RESULTS / "recall-seeds" / one).read_text())["tests"][test]["accuracy"] for one in names]


def accuracies(of: dict[str, Any], tests: Sequence[str]) -> list[str]:
    return [f"{of['tests'][test]['accuracy']:.2f}" for test in tests]


def rows_of(models: dict[str, str], cells: Callable[[str], list[str]]) -> Rows:
    """A row for every model, whose names stand behind how their rows begin."""
    return [[words, *cells(name)] for words, name in models.items()]


@pytest.mark.parametrize("titles", tables_of(PAGE))
def test_a_table_of_the_page_is_that_of_the_results(titles):
    assert titles in TABLES, "no function here makes this table from results"
    said, found = tables_of(PAGE)[titles], TABLES[titles]()
    assert [cells for _, *cells in said] == [cells for _, *cells in found]
    assert all(row.startswith(words) for (row, *_), (words, *_) in zip(said, found, strict=True))


def test_no_function_here_makes_a_table_that_is_gone():
    assert set(TABLES) == set(tables_of(PAGE))


# Text


def trainings_of(size: str, neighbours: dict[str, tuple[str, float]]) -> Rows:
    """Losses halfway and at the end, and how long it took, of neighbours, whose learning rates stand behind their names,
    and of our models with and without writes."""
    trainings = [(words, f"bridge-{size}", name, rate) for words, (name, rate) in neighbours.items()]
    for name in ("yaad", "moneta", "memora"):
        trainings.append((name.capitalize(), f"ablations-{size}", name, 0.004))
        trainings.append(("the same, its writes", f"ablations-{size}", f"{name}-no-write", 0.004))
    rows = []
    for words, study, name, rate in trainings:
        of = result(study, name, rate)
        losses = [f"{value:.2f}" for _, value in of["validation_by_step"]]
        rows.append([words, *losses, f"{of['seconds']['cpu'] / 60:.0f}"])
    return rows


@table("| model | 1.0M tokens | 2.0M tokens | CPU minutes of training |")
def long_trainings() -> Rows:
    neighbours = {
        "Llama, at a rate of 4e-3": ("llama", 0.004),
        "Llama, at a rate of 2e-3": ("llama", 0.002),
        "Gated DeltaNet, as": ("gated-deltanet", 0.004),
        "Gated DeltaNet, its gates": ("gated-deltanet-gates", 0.004),
        "an MLP memory": ("store-eps", 0.004),
        "the same, its writes": ("store-eps-no-write", 0.004),
    }
    return trainings_of("long", neighbours)


@table("| model of width 256 | 1.0M tokens | 2.0M tokens | CPU minutes of training |")
def wide_trainings() -> Rows:
    neighbours = {
        "Llama, at a rate of 4e-3": ("llama", 0.004),
        "Llama, at a rate of 2e-3": ("llama", 0.002),
        "Gated DeltaNet": ("gated-deltanet", 0.004),
    }
    return trainings_of("wide", neighbours)


RATES_OF_TEXT = (0.002, 0.004, 0.008)


def difference(value: float) -> str:
    """With its sign, unless it is nothing."""
    return f"{value:+.2f}" if f"{value:.2f}" not in ("0.00", "-0.00") else "0.00"


def rates_of(study: str, name: str) -> list[float]:
    return [rate for rate in RATES_OF_TEXT if (RESULTS / study / f"{name}-lr{rate:g}-seed0.json").exists()]


def losses_by_rate(study: str, name: str) -> list[str]:
    """Nothing where there was no training."""
    there = rates_of(study, name)
    return [f"{loss(study, name, rate):.2f}" if rate in there else "" for rate in RATES_OF_TEXT]


def rates_of_rung(name: str) -> list[float]:
    return rates_of("bridge", name)


def best_of_rung(name: str, rates: Sequence[float] = RATES_OF_TEXT) -> float:
    return min(loss("bridge", name, rate) for rate in rates_of_rung(name) if rate in rates)


def cost_of_rung(name: str, before: str) -> str:
    """At the rates that both were tried with."""
    both = [rate for rate in rates_of_rung(name) if rate in rates_of_rung(before)]
    return difference(best_of_rung(name, both) - best_of_rung(before, both))


@table("| model | 2e-3 | 4e-3 | 8e-3 | cost of the change | and with an epsilon of 1 in the norm behind the memory |")
def path_to_an_mlp() -> Rows:
    path = [
        ("Gated DeltaNet", "gated-deltanet", None, None),
        ("the same layer", "delta", "gated-deltanet", None),
        ("(beside the path)", "delta-values", "delta", "delta-values-eps"),
        ("queries of norm 1", "delta-queries", "delta", None),
        ("gradients at the starts", "matrix", "delta-queries", None),
        ("values of rms 1", "matrix-values", "matrix", "matrix-values-eps"),
        ("a learned initial memory", "matrix-start", "matrix-values", "matrix-start-eps"),
        ("an MLP memory", "mlp", "matrix-start", None),
        ("half-lives", "mlp-half-lives", "mlp", None),
        ("steps up to", "mlp-steps", "mlp-half-lives", None),
        ("caps", "store", "mlp-steps", "store-eps"),
    ]
    rows = []
    for words, name, before, with_epsilon in path:
        losses = losses_by_rate("bridge", name)
        cost = "" if before is None else cost_of_rung(name, before)
        rows.append([words, *losses, cost, "" if with_epsilon is None else f"{best_of_rung(with_epsilon):.2f}"])
    return rows


@table("| on the way to the first Yaad | 2e-3 | 4e-3 | 8e-3 | cost of the change | largest gradient norm |")
def path_to_the_first_yaad() -> Rows:
    path = {
        "an MLP memory": "mlp",
        "the loss": "mlp-mixture",
        "gates a channel": "mlp-channel",
        "caps": "mlp-caps",
        "half-lives": "mlp-gates",
        "the second layer": "mlp-random",
        "values as they come": "mlp-plain-values",
        "steps": "mlp-shipped-eta",
        "chunks of 64": "mlp-64",
        "rotary embedding": "mlp-with-rope",
        "convolutions": "yaad",
    }
    rows, before = [], None
    for words, name in path.items():
        norms = [result("bridge", name, rate)["gradient_norm_max"] for rate in rates_of_rung(name)]
        cost = "" if before is None else cost_of_rung(name, before)
        rows.append([words, *losses_by_rate("bridge", name), cost, f"{max(norms):.1f}"])
        before = name
    return rows


def test_what_the_studies_readme_says_of_rungs():
    readme = (ROOT / "examples" / "evaluation" / "README.md").read_text(encoding="utf-8")
    (rows,) = [rows for titles, rows in tables_of(readme).items() if titles == "| rung | validation loss |"]
    assert len(rows) > 10
    for words, losses in rows:
        names = re.findall(r"`([\w-]+)`", words.split(":")[0])
        assert losses == ", ".join(f"{loss('bridge', name):.2f}" for name in names), words


@table("| learning rate | 2e-3 | 4e-3 | 8e-3 |")
def learning_rates() -> Rows:
    trainings = [("Llama", "bridge", "llama"), ("Gated DeltaNet, as", "bridge", "gated-deltanet")]
    trainings += [("Gated DeltaNet, its gates", "bridge", "gated-deltanet-gates")]
    trainings += [(name.capitalize(), "ablations", name) for name in ("yaad", "moneta", "memora")]
    return [[words, *(f"{loss(study, name, rate):.2f}" for rate in RATES_OF_TEXT)] for words, study, name in trainings]


def test_the_best_rates_of_the_page_are_bold():
    for line in PAGE.split("| learning rate | 2e-3")[1].split("\n\n")[0].splitlines()[2:]:
        losses = line.strip("| ").split(" | ")[1:]
        best = min(float(cell.strip("*")) for cell in losses)
        assert [cell for cell in losses if cell.startswith("**")] == [f"**{best:.2f}**"], line


def test_what_is_said_of_learning_rates():
    todays, twice = (
        {name: [result("ablations", name + end, rate) for rate in RATES_OF_TEXT] for name in MODELS}
        for end in ("", "-double-steps")
    )
    largest, jumped = (
        {name: max(one["gradient_norm_max"] for one in runs) for name, runs in of.items()} for of in (todays, twice)
    )
    same = max(
        abs(b["validation"] - a["validation"])
        for name in MODELS
        for a, b in zip(todays[name], twice[name], strict=True)
    )
    far = result("ablations", "memora-quadruple-steps", 0.008)
    assert (
        f"largest gradient norm is {max(largest.values()):.1f}. With steps twice as large it is {jumped['yaad']:.0f} in "
        f"Yaad, {jumped['moneta']:.0f} in Moneta and {jumped['memora']:.0f} in Memora, and losses are the same to {same:.2f}; "
        f"with four times as large ones {far['gradient_norm_max']:,.0f} in Memora, which at 8e-3 loses "
        f"{far['validation'] - todays['memora'][2]['validation']:.1f} nats by it."
    ) in WORDS
    lost = {name: f"{todays[name][2]['validation'] - todays[name][1]['validation']:.1f}" for name in MODELS}
    assert f"at 8e-3 Yaad loses {lost['yaad']} nats, Moneta {lost['moneta']} and Memora {lost['memora']}." in WORDS


@table("| model | loss | against the defaults | largest gradient norm |")
def surroundings() -> Rows:
    changes = [
        ("the defaults", "yaad", ""),
        ("one gate a head", "yaad", "-head-gates"),
        ("rotary embedding, as", "yaad", "-rotary"),
        ("rotary embedding and", "yaad", "-rotary-head-gates"),
        ("Yaad, its initial", "yaad", "-full-start"),
        ("Moneta with", "moneta", ""),
        ("Moneta, its", "moneta", "-full-start"),
        ("Memora with", "memora", ""),
        ("Memora, its", "memora", "-full-start"),
    ]
    rows = []
    for words, model, change in changes:
        before = result("ablations", model)
        of = result("ablations", model + change)
        more = difference(of["validation"] - before["validation"]) if change else ""
        rows.append([words, f"{of['validation']:.2f}", more, f"{of['gradient_norm_max']:.1f}"])
    return rows


@table("| epsilon | 1e-6, the usual one | 0.1 | 1, the default | 10 | 100 |")
def epsilons() -> Rows:
    rows = []
    for name in ("yaad", "moneta"):
        row = [name.capitalize()]
        for end in ("-usual-eps", "-eps-0.1", "", "-eps-10", "-eps-100"):
            there = (RESULTS / "ablations" / f"{name}{end}-lr0.004-seed0.json").exists()
            row.append(f"{loss('ablations', name + end):.2f}" if there else "")
        rows.append(row)
    return rows


@table("| Memora | 2e-3 | 4e-3 | 8e-3 | largest gradient norm |")
def epsilons_of_memora() -> Rows:
    models = {
        "an epsilon of 0.1": "memora",
        "steps twice": "memora-double-steps",
        "steps four times": "memora-quadruple-steps",
        "steps eight times": "memora-octuple-steps",
        "steps four times as large, and an epsilon of 0.01": "memora-earlier",
        "the same, 0.03": "memora-earlier-norm-eps-0.03",
        "the same, 0.3": "memora-earlier-norm-eps-0.3",
        "the same, 1": "memora-earlier-norm-eps-1",
        "the earlier default, and an initial memory 0.03": "memora-earlier-small-start",
    }

    def cells(name: str) -> list[str]:
        norms = (result("ablations", name, rate)["gradient_norm_max"] for rate in rates_of("ablations", name))
        return [*losses_by_rate("ablations", name), f"{max(norms):.1f}"]

    return rows_of(models, cells)


@table("| largest step, of today's | 2.0M tokens, texts of 512 | of 2,048 | largest gradient norm | of 2,048 |")
def steps() -> Rows:
    rows = []
    for name, ends in {
        "yaad": ("-double-steps", "", "-half-steps"),
        "moneta": ("-double-steps", ""),
        "memora": ("-quadruple-steps", "-double-steps", ""),
    }.items():
        for end in ends:
            of = [result("ablations-long", name + end)]
            of += [result("ablations-context-2048", name + end)] if name == "yaad" else []
            words = {"-quadruple": ", four times", "-double": ", twice", "": "", "-half": ", half"}[
                end.removesuffix("-steps")
            ]
            losses, norms = (
                [f"{one['validation']:.2f}" for one in of],
                [f"{one['gradient_norm_max']:.1f}" for one in of],
            )
            empty = [""] * (2 - len(of))
            rows.append([name.capitalize() + words, *losses, *empty, *norms, *empty])
    return rows


def test_what_is_said_of_long_trainings():
    largest = [
        max(
            json.loads(path.read_text())["gradient_norm_max"]
            for path in (RESULTS / "ablations-long").glob(f"{name}-lr0.004-seed*.json")  # of all seeds
        )
        for name in ("yaad", "moneta", "memora")
    ]
    said = "before clipping, has a norm of {:.1f} (Yaad), {:.1f} (Moneta) and {:.1f} (Memora)."
    assert said.format(*largest) in WORDS
    seeds = (
        f"{words} {', '.join(f'{loss(study, name, seed=seed):.2f}' for seed in range(2))} and {loss(study, name, seed=2):.2f}"
        for words, study, name in (
            ("Llama", "bridge", "llama"),
            ("Gated DeltaNet", "bridge", "gated-deltanet"),
            ("Yaad", "ablations", "yaad"),
        )
    )
    assert f"Three seeds of 4e-3: {', '.join(seeds)}." in WORDS


def gains_at_width_256() -> tuple[str, str]:
    """On Gated DeltaNet and on themselves without writes, from the smallest to the largest of the three models."""
    delta = loss("bridge-wide", "gated-deltanet")
    at = {name: loss("ablations-wide", name) for name in MODELS}
    ahead = [delta - one for one in at.values()]
    writes = [loss("ablations-wide", f"{name}-no-write") - one for name, one in at.items()]
    on_delta, on_no_writes = (f"{min(gains):.2f} to {max(gains):.2f}" for gains in (ahead, writes))
    return on_delta, on_no_writes


def test_what_the_readme_and_the_page_say_against_the_neighbours():
    transformer = min(loss("bridge-long", "llama", rate) for rate in (0.002, 0.004))
    delta = min(loss("bridge-long", name) for name in ("gated-deltanet", "gated-deltanet-gates"))
    at = {name: loss("ablations-long", name) for name in MODELS}
    writes = {name: loss("ablations-long", f"{name}-no-write") - at[name] for name in MODELS}
    writes["store-eps"] = loss("bridge-long", "store-eps-no-write") - loss("bridge-long", "store-eps")
    ahead = {name: f"{delta - one:.2f}" for name, one in at.items()}
    assert ahead["moneta"] == ahead["memora"]
    below = f"{transformer - max(at.values()):.2f} to {transformer - min(at.values()):.2f} below a Transformer"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    of_models = [writes[name] for name in MODELS]
    assert (
        f"Yaad, Moneta and Memora are {ahead['yaad']}, {ahead['moneta']} and {ahead['memora']} nats below Gated "
        f"DeltaNet, {below}, and {min(of_models):.2f} to {max(of_models):.2f} below themselves without writes; at width 256 (5.2M) "
        f"all three are {gains_at_width_256()[0]} below Gated DeltaNet and {gains_at_width_256()[1]} below themselves"
    ) in readme
    assert (
        f"level with Gated DeltaNet at this size** ({ahead['yaad']} nats below it in Yaad, {ahead['moneta']} in Moneta and Memora), "
        f"{below}, and "
    ) in WORDS
    assert (
        f"**{writes['store-eps']:.2f} nats (`store-eps`), {writes['yaad']:.2f} (Yaad), {writes['moneta']:.2f} (Moneta) and "
        f"{writes['memora']:.2f} (Memora) below themselves without writes**"
    ) in WORDS
    in_short = WORDS.split("## In short")[1].split("## ")[0]
    assert f"{min(of_models):.2f} to {max(of_models):.2f} nats below the same models without writes, and " in in_short
    assert f"{gains_at_width_256()[1]} at width 256" in in_short
    assert (
        f"at width 128 Yaad is {ahead['yaad']} nats below it, Moneta and Memora {ahead['memora']}, about as much"
        in in_short
    )
    assert f"at width 256 all three are below it by {gains_at_width_256()[0]}" in in_short
    again = [result("ablations-long-amd", "yaad"), *(result("ablations-long", "yaad", seed=seed) for seed in (0, 1))]
    losses = [f"{one['validation']:.3f}" for one in again]
    assert f"ended at {losses[0]} (" in WORDS
    assert f"in the table, at {losses[1]}; with another seed at {losses[2]}." in WORDS
    assert again[0]["point"]["config"].items() <= again[1]["point"]["config"].items()


# Stability


def deviation(*names: str, study: str = "stability") -> str:
    """The largest of a window, of all named."""
    of = [json.loads((RESULTS / study / f"{name}.json").read_text()) for name in names]
    return f"{max(max(one['deviation']) for one in of):.0e}".replace("e-0", "e-")


def deviations_of(cut: str) -> Rows:
    """By chunk size, of three widths of a head the worst."""
    sizes = ("tiny", "170m", "340m")
    return [
        [
            str(chunk),
            *(deviation(*(f"{name}-{size}-chunk{chunk}-{cut}-100000-seed0" for size in sizes)) for name in MODELS),
        ]
        for chunk in (16, 64)
    ]


@table("| chunks of | Moneta | Yaad | Memora |")
def in_pieces() -> Rows:
    return deviations_of("pieces")


@table("| token by token, chunks of | Moneta | Yaad | Memora |")
def token_by_token() -> Rows:
    return deviations_of("compiled")


def test_what_the_readme_says_of_memoras_rounding():
    def worst(name: str) -> float:
        files = (RESULTS / "stability").glob(f"{name}-*-chunk*-pieces-100000-seed0.json")
        return max(max(json.loads(path.read_text())["deviation"]) for path in files)

    memora, others = worst("memora"), max(worst("moneta"), worst("yaad"))
    times = {"4": "four"}[f"{memora / others:.0f}"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    size = f"{memora:.0e}".replace("e-0", "e-")
    assert f"new models differ from one call by {size}, {times} times as much as the others" in readme


def test_what_is_said_of_trained_models():
    pieces, compiled = (
        "{} (Moneta), {} (Yaad) and {} (Memora)".format(
            *(deviation(f"{name}-lr0.004-seed0-{cut}-100000") for name in MODELS)
        )
        for cut in ("pieces", "compiled")
    )
    assert f"it is {pieces}, chunks of 64;" in WORDS
    assert f"The trained models are {compiled} from one call," in WORDS
    short = {
        cut: {deviation(f"{name}-chunk-16-lr0.004-seed0-{cut}-100000") for name in ("moneta", "yaad")}
        for cut in ("pieces", "compiled")
    }
    losses = [f"{loss('ablations-long', f'{name}-chunk-16'):.2f}" for name in ("moneta", "yaad")]
    assert f"`yaad-chunk-16`, at {losses[0]} and {losses[1]}) {' or '.join(short['pieces'])}." in WORDS
    assert f"those with chunks of 16 {' or '.join(short['compiled'])}." in WORDS


# Length


OF_LENGTH = {"Yaad": "yaad", "Memora": "memora", "`store-eps`": "store-eps", "the same": "store-eps-no-write"}


def of_length(name: str, part: str, dtype: str = "float32") -> dict[str, Any]:
    return json.loads((RESULTS / "length" / f"{name}-lr0.004-seed0-{part}-{dtype}.json").read_text())


@table("| model | a memory that goes on, from token 317 | saved and loaded | and frozen | one stream of documents |")
def over_100_000_tokens() -> Rows:
    def cells(name: str) -> list[str]:
        of = of_length(name, "saved")["conditions"]
        against = [
            worth_of_going_on(of_length(name, "long")),
            *(of[one]["difference"] for one in ("warm", "warm and frozen", "stream")),
        ]
        return ["0.000" if abs(one) < 5e-4 else f"{one:+.3f}" for one in against]

    return rows_of(OF_LENGTH, cells)


@table("| a new memory every | 32 tokens | 64 | 128 | 512 |")
def new_memories() -> Rows:
    costs = {}
    for every, end in {32: "-restart32", 64: "-restart64", 128: "-restart128", 512: ""}.items():
        costs[every] = -worth_of_going_on(of_length("yaad-chunk-16", "long", f"float32{end}"))
    each = {every: every * cost for every, cost in costs.items()}
    assert min(each.values()) > 6 and max(each.values()) < 7.5 and "six to seven nats each time" in WORDS
    return [
        ["costs, a token", *(f"{cost:.3f}" for cost in costs.values())],
        ["costs, each time", *(f"{cost:.1f}" for cost in each.values())],
    ]


def worth_of_going_on(result: dict[str, Any]) -> float:
    """The loss of a memory that goes on less that of one that begins anew, a token from 317 on."""
    rows = [row for row in result["by_position"] if row["first"] >= 317]
    tokens = [row["last"] - row["first"] + 1 for row in rows]
    return sum(n * (row["loss"] - row["restarted"]) for n, row in zip(tokens, rows, strict=True)) / sum(tokens)


def test_what_is_said_of_100_000_tokens():
    gaps, sizes = [], set()
    for name in OF_LENGTH.values():
        exact, half = (of_length(name, "long", dtype) for dtype in ("float32", "bfloat16"))
        pairs = zip(exact["by_position"], half["by_position"], strict=True)
        gaps += [abs(a["loss"] - b["loss"]) for a, b in pairs if a["first"] >= 38]
        first, *_, last = exact["states"]
        assert (first["tokens"], last["tokens"]) == (512, 100_000)
        for layer in first["memories"]:
            rms = [state["memories"][layer]["rms"] for state in exact["states"]]
            assert max(rms) < 1.01 * min(rms)
        assert first["cache_mib"] == pytest.approx(last["cache_mib"], rel=0.02)
        sizes.add(f"{last['cache_mib']:.1f}")
    assert f"to {max(gaps):.3f} from token 38 on" in PAGE
    assert sizes == {"2.5", "1.3"} and "2.5 MiB with a gate a channel, 1.3 with one a head" in PAGE


# Recall

RATES = (0.002, 0.004)


@table("| model | memory | 4 in 32 | 8 in 64 | 16 in 64 | 24 in 128 |")
def values_of_many_keys() -> Rows:
    def cells(name: str) -> list[str]:
        of = recalled("mqar", name, RATES)
        sizes = sorted({test["state"]["memory"] for test in of["tests"].values()})
        memory = " to ".join(f"{size:,}" for size in (sizes[0], sizes[-1])[: len(sizes)])
        return [memory, *accuracies(of, ("32/4", "64/8", "64/16", "128/24"))]

    models = {
        "Llama": "llama",
        "Yaad": "yaad",
        "Moneta": "moneta",
        "Memora": "memora",
        "Gated DeltaNet": "gated-deltanet",
        "a matrix memory of ours": "matrix",
        "DeltaNet as a point": "signed-deltanet",
    }
    return rows_of(models, cells)


@table("| at widths 32, 64 and 128 | memory | 8 in 64 | 16 in 64 | 24 in 128 |")
def by_width() -> Rows:
    def cells(name: str) -> list[str]:
        found = [recalled("mqar", name, width=width) for width in (32, 64, 128)]
        memory = [max(test["state"]["memory"] for test in of["tests"].values()) for of in found]
        columns = zip(*(accuracies(of, ("64/8", "64/16", "128/24")) for of in found), strict=True)
        return [", ".join(column) for column in ([f"{size:,}" for size in memory], *columns)]

    return rows_of({"Llama": "llama", "Yaad": "yaad", "Moneta": "moneta", "Memora": "memora"}, cells)


OF_SEEDS = {
    "Yaad": "yaad",
    "Moneta": "moneta",
    "Memora": "memora",
    "the same, steps twice": "ablation-memora-double-steps",
}


@table("| 24 pairs in 128 tokens | four seeds | mean |")
def many_keys_by_seed() -> Rows:
    def cells(name: str) -> list[str]:
        found = of_seeds("mqar", name, "128/24", 4)
        return [", ".join(f"{one:.2f}" for one in found), f"{mean(found):.2f}"]

    return rows_of(OF_SEEDS | {"Memora's earlier default": "ablation-memora-earlier"}, cells)


@table("| three seeds | 8 pairs, the newest counts | noisy recall | selective copying |")
def tasks_by_seed() -> Rows:
    tasks = {"forgetting-mqar": "64/8", "noisy-recall": "baseline", "selective-copying": "baseline"}

    def cells(name: str) -> list[str]:
        return [", ".join(f"{one:.2f}" for one in of_seeds(task, name, test, 3)) for task, test in tasks.items()]

    return rows_of(OF_SEEDS, cells)


@table("| Yaad | memory | 16 in 64 | 24 in 128 |")
def what_of_yaad_recalls() -> Rows:
    def cells(change: str) -> list[str]:
        of = recalled("mqar", f"ablation-yaad-{change}")
        (memory,) = {test["state"]["memory"] for test in of["tests"].values()}
        return [f"{memory:,}", *accuracies(of, ("64/16", "128/24"))]

    changes = {
        "without writes": "no-write",
        "a matrix": "linear",
        "rotary embedding": "rotary",
        "memories are asked with": "keys",
        "writes up": "ascent",
        "the memory's last layer": "last-layer",
        "lp loss": "lp",
        "l2 loss": "l2",
        "one gate a head": "head-gates",
        "no forgetting": "no-retention",
        "hidden units that meet": "hidden-4",
        "of 2": "hidden-8",
    }
    return rows_of(changes, cells)


@table("| model | 4 in 32 | 4 in 64 | 8 in 64 |")
def newest_values_of_keys() -> Rows:
    models = {
        "Yaad": "yaad",
        "Gated DeltaNet": "gated-deltanet",
        "Memora": "memora",
        "Llama": "llama",
        "Moneta": "moneta",
        "a matrix": "matrix",
    }
    tests = ("32/4", "64/4", "64/8")
    return rows_of(models, lambda name: accuracies(recalled("forgetting-mqar", name, RATES), tests))


NEEDLE = ("1x", "2x", "4x", "8x")


@table("| model | 16 tokens | 32 | 64 | 128 |")
def a_single_value() -> Rows:
    def cells(name: str) -> list[str]:
        return accuracies(recalled("needle", name), NEEDLE)

    assert cells("yaad") == cells("memora") == cells("matrix")
    models = {"Yaad, Memora, a matrix": "yaad", "Gated DeltaNet": "gated-deltanet", "Llama": "llama"}
    return rows_of({**models, "Moneta": "moneta"}, cells)


@table("| model | compression | fuzzy recall | in-context recall | noisy recall | selective copying | memorisation |")
def six_tasks_of_mad() -> Rows:
    tasks = ("compression", "fuzzy-recall", "in-context-recall", "noisy-recall", "selective-copying", "memorisation")
    models = {
        "Yaad": "yaad",
        "Moneta": "moneta",
        "Memora": "memora",
        "a matrix memory of ours": "matrix",
        "Gated DeltaNet": "gated-deltanet",
        "Llama": "llama",
    }
    return [
        ["a guess", *(f"{recalled(task, 'yaad')['chance']:.2f}" for task in tasks)],
        *rows_of(models, lambda name: [accuracies(recalled(task, name), ["baseline"])[0] for task in tasks]),
    ]


@table("| changed | noisy recall | selective copying |")
def what_makes_moneta_slow() -> Rows:
    models = {
        "Moneta: lp loss": "moneta",
        "the mirror map": "ablation-moneta-mirror",
        "p = 2, q = 4": "ablation-moneta-p-2",
        "p = 3, q = 2": "ablation-moneta-q-2",
        "Yaad with that lp loss": "ablation-yaad-lp",
        "Yaad with l2 loss": "ablation-yaad-l2",
    }
    tasks = ("noisy-recall", "selective-copying")
    return rows_of(models, lambda name: [accuracies(recalled(task, name), ["baseline"])[0] for task in tasks])


@table("| model | 3 to 16 tokens | 16 to 64 tokens |")
def parity() -> Rows:
    def cells(names: str) -> list[str]:
        found = [accuracies(recalled("parity", name, RATES), ("3-16", "16-64")) for name in names.split()]
        return [", ".join(column) for column in zip(*found, strict=True)]

    models = {
        "Llama": "llama",
        "Gated DeltaNet": "gated-deltanet",
        "Mamba2": "mamba2",
        "DeltaNet as a point": "deltanet",
        "the same, steps up to 2": "signed-deltanet",
        "Yaad, Moneta, Memora": "yaad moneta memora",
        "Yaad in chunks of one": "yaad-1",
        "the same, steps up to twice": "signed-yaad-1",
    }
    return rows_of(models, cells)


# Sentences


def test_what_is_said_of_width_256():
    said = WORDS.split("**At width 256**")[1].split("## How large")[0]
    delta = loss("bridge-wide", "gated-deltanet")
    ahead = {name: f"{delta - loss('ablations-wide', name):.2f}" for name in MODELS}
    assert (
        f"Yaad is {ahead['yaad']} nats below Gated DeltaNet, Memora {ahead['memora']} and Moneta {ahead['moneta']}, and"
    ) in said
    writes = [
        f"{loss('ablations-wide', f'{name}-no-write') - loss('ablations-wide', name):.2f} ({name.capitalize()})"
        for name in ("yaad", "moneta", "memora")
    ]
    assert f"writes are worth {writes[0]}, {writes[1]} and {writes[2]}." in said
    norms = [f"{result('ablations-wide', name)['gradient_norm_max']:.1f}" for name in ("yaad", "moneta", "memora")]
    assert f"gradient norms are {norms[0]}, {norms[1]} and {norms[2]}." in said
    before = [f"{loss('ablations-wide', f'{name}-double-steps'):.2f}" for name in ("yaad", "moneta", "memora")]
    assert (
        f"With steps twice as large Yaad is at {before[0]}, Moneta at {before[1]} and Memora at {before[2]}." in said
    )


def test_what_is_said_of_a_matrix():
    said = WORDS.split("## A matrix is as good, here")[1].split("## After fewer")[0].replace("**", "")
    for words, study, name in (
        ("(`yaad-linear-alone`), is at {}, level with Yaad", "ablations-long", "yaad-linear-alone"),
        ("the matrix is at {}, below all three Yaads", "ablations-long", "yaad-linear"),
        ("(`yaad-no-norm`) is at {}.", "ablations-long", "yaad-no-norm"),
        ("Yaad is at {} and the matrix", "ablations-context-2048", "yaad"),
        ("and the matrix in its place at {}.", "ablations-context-2048", "yaad-linear-alone"),
        ("twice as large as today's, where Yaad is at {} (", "ablations-long", "yaad-double-steps"),
        ("whose block has what they took, was at {}:", "ablations-long-double-steps", "yaad-fixed-start"),
        ("(`yaad-eps-10`) gave {}", "ablations-long-double-steps", "yaad-eps-10"),
        ("(`yaad-norm-eps-1`) {}", "ablations-long-double-steps", "yaad-norm-eps-1"),
    ):
        assert words.format(f"{loss(study, name):.2f}") in said, words
    yaads = [loss("ablations-long-amd", "yaad"), *(loss("ablations-long", "yaad", seed=seed) for seed in (0, 1))]
    assert f"level with Yaad ({min(yaads):.2f} to {max(yaads):.2f})" in said
    assert min(yaads) < loss("ablations-long", "yaad-linear-alone") < max(yaads)
    assert loss("ablations-long", "yaad-linear") < min(yaads)


def test_what_is_said_of_surroundings():
    plain, delta = loss("ablations", "yaad-plain-values"), loss("bridge", "gated-deltanet")
    assert f"are as good as normalised ones ({plain:.2f})" in WORDS
    assert f"{loss('ablations', 'yaad-eps-10'):.2f}" == f"{delta:.2f}"
    assert f"With 10, Yaad is where Gated DeltaNet is after so few tokens ({delta:.2f})" in WORDS


def test_what_is_said_of_memoras_epsilon():
    quiet = [loss("ablations", name) for name in ("memora-quadruple-steps", "memora-earlier-small-start")]
    gained = sorted(f"{loss('ablations', 'memora-earlier') - one:.2f}" for one in quiet)
    assert f"a quieter start is worth {gained[0]} to {gained[1]} nats" in WORDS
    names = ("memora", "memora-double-steps", "memora-quadruple-steps", "memora-earlier")
    of = [result("ablations-long", name) for name in names]
    losses, norms = (
        [f"{one[key]:{form}}" for one in of] for key, form in (("validation", ".2f"), ("gradient_norm_max", ".1f"))
    )
    said = (
        "it is at {}, with steps twice as large at {}, four times as large at {}, and with the earlier default at {}; largest "
        "gradient norms are {}, {}, {} and {}."
    )
    assert said.format(*losses, *norms) in WORDS.replace("**", "")
    assert loss("ablations", "memora-double-steps", 0.008) < min(loss("ablations", name, 0.008) for name in MODELS)
    assert "bears 8e-3 better than any other model" in WORDS


def test_what_is_said_of_seeds():
    said = WORDS.split("**One seed says little of a model that learns a task only partly.**")[1].split(
        "What of Yaad it is"
    )[0]
    yaad, moneta, memora, twice, earlier = (
        of_seeds("mqar", name, "128/24", 4) for name in (*OF_SEEDS.values(), "ablation-memora-earlier")
    )
    assert f"Yaad has {min(yaad):.2f} to {max(yaad):.2f} of 24 pairs whatever the seed" in said
    assert (
        f"Moneta's accuracies lie {max(moneta) - min(moneta):.2f} apart, Memora's {max(memora) - min(memora):.2f}"
        in said
    )
    assert f"({mean(twice):.2f} in the mean, {mean(earlier):.2f} before)" in said
    of_newest = [
        mean(of_seeds("forgetting-mqar", name, "64/8", 3)) for name in ("memora", "ablation-memora-double-steps")
    ]
    copied = [
        mean(of_seeds("selective-copying", name, "baseline", 3)) for name in ("memora", "ablation-memora-double-steps")
    ]
    assert (
        f"({mean(memora):.2f} for {mean(twice):.2f} in the mean, {of_newest[0]:.2f} for {of_newest[1]:.2f} where the newest value "
        f"counts, {copied[0]:.2f} for {copied[1]:.2f} in selective copying)"
    ) in said
    _, *others = (f"{one:.2f}" for one in of_seeds("forgetting-mqar", "yaad", "64/8", 3))
    assert set(others) == {"0.83"} and "two others have 0.83 of 8 pairs at 4e-3" in WORDS
    tasks = ("noisy-recall", "selective-copying")
    for name in ("ablation-yaad-l2", "ablation-moneta-q-2"):
        of_tasks = (of_seeds(task, name, "baseline", 3) for task in tasks)
        assert f"({' and '.join(', '.join(f'{one:.2f}' for one in found) for found in of_tasks)})" in WORDS, name
    assert sum(one > 0.9 for one in of_seeds("noisy-recall", "memora", "baseline", 3)) == 1
    assert max(one for task in tasks for one in of_seeds(task, "moneta", "baseline", 3)) < 0.25
    fast = [of_seeds(task, "ablation-memora-quadruple-steps", "baseline", 3) for task in reversed(tasks)]
    learned, missed = ("{:.2f}, {:.2f} and {:.2f}".format(*found) for found in fast)
    assert f"with every seed ({learned}) and noisy recall with none ({missed})" in WORDS
    of_yaad = of_seeds("selective-copying", "yaad", "baseline", 3)
    assert "its own Huber loss has {:.2f}, {:.2f} and {:.2f} of selective copying".format(*of_yaad) in WORDS
    assert f"with one seed, too ({min(of_seeds('noisy-recall', 'yaad', 'baseline', 3)):.2f}). In text" in WORDS


def test_what_is_said_of_chunks_that_overshoot():
    trained, new = (
        list(
            json.loads((RESULTS / "probe" / f"yaad-double-steps-2048{end}" / "probe.json").read_text())[
                "layers"
            ].values()
        )
        for end in ("", "-at-start")
    )
    first = [64 * layer["key_alignment"] for layer in trained]
    assert {round(64 * layer["key_alignment"]) for layer in new} == {8}
    assert f"is 8 in a new model and, in the four layers of that one, {min(first):.0f} to {max(first):.0f}." in WORDS
    shares, before = ([100 * layer["write_share"] for layer in of] for of in (trained, new))
    assert {f"{share:.0f}" for share in before} == {"14"}
    assert f"from 14 % of their own error to {min(shares):.0f} to {max(shares):.0f} %" in WORDS
    at_first, together = ([f"{layer['chunk_share']:.1f}" for layer in of] for of in (new, trained))
    assert (
        f"{', '.join(at_first[:3])} and {at_first[3]} of it in a new model and {', '.join(together[:3])} and {together[3]} at "
        "the end"
    ) in WORDS
    (grown,) = [layer["largest_growth"] for layer in trained if layer["largest_growth"] > 0]
    assert f"a difference grew in one layer for a while, by a factor of {math.exp(grown):.1f}," in WORDS


def test_what_is_said_token_by_token():
    said = WORDS.split("As `generate()` does it without a compiler")[1].split("from one call")[0]
    for name in MODELS:
        largest = deviation(f"{name}-340m-chunk64-tokens-100000-seed0", study="stability-double-steps")
        assert f"{largest} ({name.capitalize()})" in said, name


def test_what_is_said_of_the_way_to_the_first_yaad():
    seeds = [f"{loss('bridge', 'yaad', seed=seed):.2f}" for seed in range(3)]
    assert f"The first Yaad is at {seeds[0]}, {seeds[1]} and {seeds[2]} in three seeds" in WORDS
    steps, before = result("bridge", "mlp-shipped-eta"), loss("bridge", "mlp-plain-values")
    slow = loss("bridge", "mlp-shipped-eta", 0.002)
    assert (
        f"seems to cost {steps['validation'] - before:.2f} nats, and gradients of norm {steps['gradient_norm_max']:.0f}; at 2e-3 "
        f"the same model is at {slow:.2f}, {slow - best_of_rung('mlp-plain-values'):.2f} behind."
    ) in WORDS
    chunks, rotary = cost_of_rung("mlp-64", "mlp-shipped-eta"), cost_of_rung("mlp-with-rope", "mlp-64")
    assert (
        f"chunks of 64 where they were of 16 ({chunks[1:]}), and rotary embedding nearly so ({rotary[1:]})." in WORDS
    )
    delta = [loss("bridge", "gated-deltanet", seed=seed) for seed in range(3)]
    spread = max(delta) - min(delta)
    assert f"the spread of seeds ({spread:.2f} in Gated DeltaNet)" in WORDS
    for name in ("mlp-mixture", "mlp-channel", "mlp-caps", "mlp-plain-values", "yaad"):
        assert abs(float(cost_of_rung(name, result("bridge", name)["parent"]))) < spread, name


def costs_of_noise(study: str, share: int, rms: int) -> list[str]:
    """Of values of a share in per cent, at the tokens that were left alone, in Memora, Moneta and Yaad."""
    found = (
        result(study, name)["corrupted"][f"{share}% of values, noise of {rms} rms"]
        for name in ("memora", "moneta", "yaad")
    )
    return [f"{at['corrupted'] - at['clean']:.3f}" for at in found]


@table("| loss | validation | 8 rms in 2 % of the values | in 10 % | 1 rms in 10 % |")
def losses_under_noise() -> Rows:
    def cells(name: str) -> list[str]:
        of = result("ablations-long", name)
        kinds = ("2% of values, noise of 8 rms", "10% of values, noise of 8 rms", "10% of values, noise of 1 rms")
        lost = (of["corrupted"][kind]["corrupted"] - of["corrupted"][kind]["clean"] for kind in kinds)
        return [f"{of['validation']:.2f}", *(f"{one:.3f}" for one in lost)]

    return rows_of({"Huber's": "yaad", "lp": "yaad-lp", "l2": "yaad-l2"}, cells)


def test_what_is_said_of_corrupted_text():
    some, many, weak, many_weak = (costs_of_noise("ablations-long", share, rms) for rms in (8, 1) for share in (2, 10))
    assert (
        f"cost Memora, whose loss is l2, {some[0]} nats, Moneta, whose loss is lp with a cap, {some[1]}, and Yaad with its "
        f"Huber loss {some[2]}; of 10 % of the values {many[0]}, {many[1]} and {many[2]}. Of noise of 1 rms it is "
        f"{weak[0]}, {weak[1]} and {weak[2]}, of 10 % {many_weak[0]}, {many_weak[1]} and {many_weak[2]}"
    ) in WORDS
    twice = result("ablations-long", "memora-double-steps")["corrupted"]["10% of values, noise of 8 rms"]
    wide = result("ablations-wide", "memora-double-steps")["corrupted"]["10% of values, noise of 8 rms"]
    costs = [f"{one['corrupted'] - one['clean']:.3f}" for one in (twice, wide)]
    assert f"With steps twice as large, 10 % cost Memora {costs[0]}, and {costs[1]} at width 256." in WORDS
    some, many = (costs_of_noise("ablations-wide", share, 8) for share in (2, 10))
    assert (
        f"noise of 8 rms costs them {some[0]}, {some[1]} and {some[2]}, and of 10 % of the values "
        f"{many[0]}, {many[1]} and {many[2]}."
    ) in WORDS


def test_what_is_said_of_rates_of_matrices():
    at, above = (
        [accuracies(recalled("mqar", name, rates), ["64/16"])[0] for name in ("gated-deltanet", "matrix")]
        for rates in ((0.004,), RATES)
    )
    assert f"{at[0]} and {at[1]} of 16 pairs at 4e-3 where they have {above[0]} and {above[1]} at 2e-3" in WORDS


def test_what_is_said_of_the_mirror_map():
    said = WORDS.split('with the mirror map of its derivation (`lq_map="mirror"`')[1].split("The default is")[0]
    assert accuracies(recalled("needle", "ablation-moneta-mirror"), NEEDLE) == ["1.00"] * 4
    few, many = accuracies(recalled("mqar", "ablation-moneta-mirror"), ("32/4", "128/24"))
    assert f"{few} of 4 pairs in 32 tokens and {many} of 24 in 128" in said
    assert accuracies(recalled("mqar", "moneta"), ("32/4", "128/24")) == list(
        re.search(r"has ([\d.]+) and ([\d.]+\d)", said).groups()
    )
