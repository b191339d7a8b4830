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
"""A run's results.json as a Markdown page and a picture.

    python benchmarks/report.py benchmarks/results/<machine>/

writes both again from the numbers.
"""

import json
import sys
from pathlib import Path


# Okabe and Ito's colours, told apart by colour-blind readers as well
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000"]


def write_report(results: dict, out: Path) -> None:
    (out / "results.md").write_text(markdown(results))
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return  # the numbers are there, the picture is an extra
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    plot_speed(results, "forward", axes[0, 0])
    plot_speed(results, "backward", axes[0, 1])
    plot_memory(results, axes[1, 0])
    plot_decode(results, axes[1, 1])
    machine, shape = results["machine"], results["shape"]
    figure.suptitle(
        f"One layer, width {shape['width']}, {shape['heads']} heads, chunk {shape['chunk']}, batch 1, float32, "
        f"{count(machine['threads'], 'thread')} ({machine['cpu']})"
    )
    figure.savefig(out / "results.png", dpi=120)
    pyplot.close(figure)


def markdown(results: dict) -> str:
    machine, shape = results["machine"], results["shape"]
    lines = [
        "# One layer on a CPU",
        "",
        f"`{results['command']}`, {results['date']}.",
        "",
        made_with(machine, ("torch", "transformers", "titans-pytorch")),
        "",
        f"One layer with its projections: width {shape['width']}, {shape['heads']} heads of {shape['head_dim']}, chunk "
        f"{shape['chunk']}, batch 1, float32. Medians of interleaved rounds; ± is half the distance between the "
        "quartiles, * marks a median that had to take in samples with other load on the machine.",
    ]
    if results["settings"]["clock"] == "cpu":
        lines += ["", "**Seconds are CPU seconds of one thread**: the machine was busy with other work."]
    if "note" in results:
        lines += ["", results["note"]]
    for section in (overview, ratios, memory, recurrent, correctness, skipped):
        lines += ["", *section(results)] if section(results) else []
    return "\n".join(lines) + "\n"


def made_with(machine: dict, packages: tuple[str, ...]) -> str:
    """The machine and the versions in a line."""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['cpu_capability']}, "
        f"{machine['system']}; Python {machine['python']}, {', '.join(f'{name} {machine[name]}' for name in packages)}; "
        f"{count(machine['threads'], 'thread')}."
    )


def overview(results: dict) -> list[str]:
    names = [n for n in results["competitors"] if not n.endswith("-recurrent")]
    lengths = results["settings"]["lengths"]
    common = results["settings"]["memory_common_length"]
    head = ["layer"] + [f"{mode}, T = {t}" for mode in ("forward", "fwd+bwd") for t in lengths]
    head += [f"memory added at {common}, MiB: forward", "fwd+bwd", "decode, ms/token"]
    rows = []
    for name in names:
        row = [label(results, name)]
        row += [rate(find(results["speed"], name=name, mode=m, T=t)) for m in ("forward", "backward") for t in lengths]
        row += [mib(find(results["memory"], name=name, mode=m, T=common)) for m in ("forward", "backward")]
        row.append(milliseconds(find(results["decode"], name=name)))
        rows.append(row)
    return ["## Tokens per second, memory, decoding", "", *table(head, rows)] if rows else []


def ratios(results: dict) -> list[str]:
    """Ours over each neighbour: tokens per second, so above 1 is faster; memory and decoding, below 1 is less."""
    names = [n for n in results["competitors"] if not n.endswith("-recurrent")]
    ours = [n for n in names if results["competitors"][n]["ours"]]
    others = [n for n in names if n not in ours]
    common = results["settings"]["memory_common_length"]
    kinds = [
        (f"{text}, T = {t}", "speed", {"mode": mode, "T": t}, "tokens_per_second")
        for mode, text in (("forward", "forward"), ("backward", "fwd+bwd"))
        for t in results["settings"]["lengths"]
    ]
    kinds += [
        (f"memory, fwd+bwd at {common}", "memory", {"mode": "backward", "T": common}, "added_mib"),
        ("decode, ms/token", "decode", {}, "ms_per_token"),
    ]
    rows = []
    for name in ours:
        for text, part, keys, value in kinds:
            mine = find(results[part], name=name, **keys)
            theirs = [find(results[part], name=other, **keys) for other in others]
            if mine and any(theirs):
                rows.append([label(results, name), text, *(ratio(mine, entry, value) for entry in theirs)])
    if not rows:
        return []
    head = ["layer", "quantity", *(label(results, n) for n in others)]
    text = "Tokens per second: above 1 is faster. Memory and decoding: below 1 is less."
    return ["## Ours as a ratio to each neighbour", "", text, "", *table(head, rows)]


def memory(results: dict) -> list[str]:
    lengths = sorted({entry["T"] for entry in results["memory"]})
    names = list(dict.fromkeys(entry["name"] for entry in results["memory"]))
    rows = [
        [
            label(results, name),
            *(mib(find(results["memory"], name=name, mode=m, T=t)) for m in ("forward", "backward") for t in lengths),
        ]
        for name in names
    ]
    head = ["layer"] + [f"{mode}, T = {t}" for mode in ("forward", "fwd+bwd") for t in lengths]
    methods = " / ".join(sorted({entry["method"] for entry in results["memory"] if "method" in entry}))
    text = f"Peak added by one call, a process each ({methods}). The output alone is T x {results['shape']['width']} x 4 bytes."
    return ["## Memory added, MiB", "", text, "", *table(head, rows)] if rows else []


def recurrent(results: dict) -> list[str]:
    length = results["settings"]["recurrent_length"]
    rows = []
    for name in results["competitors"]:
        if not name.endswith("-recurrent"):
            continue
        row = [label(results, name.removesuffix("-recurrent"))]
        for mode in ("forward", "backward"):
            slow = find(results["speed"], name=name, mode=mode, T=length)
            fast = find(results["speed"], name=name.removesuffix("-recurrent"), mode=mode, T=length)
            row += [rate(slow), rate(fast), ratio(fast, slow, "tokens_per_second") if slow and fast else ""]
        rows.append(row)
    head = ["layer", "forward: token by token", "chunk", "ratio", "fwd+bwd: token by token", "chunk", "ratio"]
    return [f"## Chunk-parallel against token by token, T = {length}", "", *table(head, rows)] if rows else []


def correctness(results: dict) -> list[str]:
    lines = []
    rows = [
        [entry["label"], f"{entry['parameters']:,}", *errors(entry["decode_against_forward"]), entry["settings"]]
        for entry in results["competitors"].values()
    ]
    if rows:
        head = ["layer", "parameters", "decode - forward: largest", "relative to the largest output", "settings"]
        lines += [
            "## What was compared, and that decoding gives the numbers of the forward pass",
            "",
            *table(head, rows),
        ]
    rows = [
        [
            e["name"],
            f"{e['layers']} layers, batch {e['batch']}, {e['tokens']} tokens, prompt {e['prompt']}",
            *errors(e),
        ]
        for e in results["model"]
    ]
    if rows:
        head = ["whole model", "size", "largest difference in logits", "relative to the largest logit"]
        lines += ["", *table(head, rows)]
    return lines


def skipped(results: dict) -> list[str]:
    if not results["skipped"]:
        return []
    return ["## Skipped", "", *(f"- {name}: {reason}" for name, reason in results["skipped"].items())]


def plot_speed(results: dict, mode: str, ax=None):
    ax = axis(ax)
    entries = [e for e in results["speed"] if e["mode"] == mode and e["T"] in results["settings"]["lengths"]]
    names = list(dict.fromkeys(e["name"] for e in entries))
    lengths = sorted({e["T"] for e in entries})
    height = 0.8 / max(len(lengths), 1)
    for i, length in enumerate(lengths):
        found = [(j, find(entries, name=name, T=length)) for j, name in enumerate(names)]
        found = [(j, e) for j, e in found if e]
        values = [e["tokens_per_second"] / 1e3 for _, e in found]
        spread = [
            (value - length / e["seconds_quartiles"][1] / 1e3, length / e["seconds_quartiles"][0] / 1e3 - value)
            for value, (_, e) in zip(values, found, strict=True)
        ]
        ax.barh(
            [j + (i - (len(lengths) - 1) / 2) * height for j, _ in found],
            values,
            height,
            xerr=list(zip(*spread, strict=True)),
            color=COLOURS[i % len(COLOURS)],
            label=f"T = {length}",
        )
    name_axis(ax, results, names)
    seconds = {"wall": "second", "cpu": "CPU second"}[results["settings"]["clock"]]
    ax.set_xlabel(f"thousand tokens per {seconds}")
    ax.set_title({"forward": "forward", "backward": "forward + backward"}[mode])
    if lengths:
        ax.legend()
    return ax


def plot_memory(results: dict, ax=None):
    ax = axis(ax)
    entries = [e for e in results["memory"] if e["mode"] == "backward" and "added_mib" in e]
    for i, name in enumerate(dict.fromkeys(e["name"] for e in entries)):
        mine = sorted((e["T"], e["added_mib"]) for e in entries if e["name"] == name)
        ours = results["competitors"].get(name, {}).get("ours")
        ax.plot(
            *zip(*mine, strict=True),
            marker="o" if ours else "s",
            linestyle="-" if ours else "none",
            color=COLOURS[i % len(COLOURS)],
            # eight colours for more layers than that: the second eight are hollow
            markerfacecolor="none" if i >= len(COLOURS) else None,
            label=label(results, name),
        )
    if entries:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.legend(fontsize="small")
    ax.set_xlabel("T")
    ax.set_ylabel("MiB")
    ax.set_title("memory added by forward + backward")
    return ax


def plot_decode(results: dict, ax=None):
    ax = axis(ax)
    entries = results["decode"]
    values = [e["ms_per_token"] for e in entries]
    spread = [
        (v - e["ms_per_token_quartiles"][0], e["ms_per_token_quartiles"][1] - v)
        for v, e in zip(values, entries, strict=True)
    ]
    if entries:
        ax.barh(range(len(entries)), values, 0.6, xerr=list(zip(*spread, strict=True)), color=COLOURS[0])
    name_axis(ax, results, [e["name"] for e in entries])
    ax.set_xlabel("ms per token")
    ax.set_title(f"decoding after {results['settings']['prompt']} tokens")
    return ax


def axis(ax):
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.gca()
    return ax


def name_axis(ax, results: dict, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), [label(results, name) for name in names])
    ax.invert_yaxis()


def count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def label(results: dict, name: str) -> str:
    return results["competitors"].get(name, {}).get("label", name)


def find(entries: list[dict], **keys) -> dict | None:
    return next((e for e in entries if all(e.get(k) == v for k, v in keys.items())), None)


def rate(entry: dict | None) -> str:
    if entry is None:
        return ""
    low, high = entry["seconds_quartiles"]
    return f"{entry['tokens_per_second'] / 1e3:.1f}k ±{50 * (high - low) / entry['seconds']:.0f}%{star(entry)}"


def milliseconds(entry: dict | None) -> str:
    if entry is None:
        return ""
    low, high = entry["ms_per_token_quartiles"]
    return f"{entry['ms_per_token']:.2f} ±{50 * (high - low) / entry['ms_per_token']:.0f}%{star(entry)}"


def star(entry: dict) -> str:
    return "\\*" if entry["noisy"] else ""


def mib(entry: dict | None) -> str:
    if entry is None:
        return ""
    return f"{entry['added_mib']:,.0f}" if "added_mib" in entry else f"failed: {entry['failed']}"


def ratio(mine: dict | None, theirs: dict | None, value: str) -> str:
    if not mine or not theirs or not mine.get(value) or not theirs.get(value):
        return ""
    return f"{mine[value] / theirs[value]:.2f}"


def errors(entry: dict) -> list[str]:
    return [f"{entry['max_absolute']:.1e}", f"{entry['max_relative']:.1e}"]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_report(json.loads((folder / "results.json").read_text()), folder)
