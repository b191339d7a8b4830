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
"""Tables of the GPU script's results, and a plot: python kernels/benchmarks/tables.py kernels/benchmarks/results/<device>"""

import json
import sys
from pathlib import Path

from outcomes import EXIT_CODES, NOT_CHECKED, RIGHT, WRONG, count
from whole_files import write_whole


def write_report(folder: Path) -> None:
    """`results.md` from `results.json`."""
    results = json.loads((folder / "results.json").read_text())
    write_whole(folder / "results.md", "\n".join(report(results)) + "\n")


def report(results: dict) -> list[str]:
    """What was found, what is wrong and what was not checked, before each step's own tables."""
    steps, facts = results["steps"], {}
    for entry in steps:
        facts |= entry["facts"] if entry["name"] == "machine" else {}
    rows = [(entry, row) for entry in steps for row in entry["rows"]]
    said = {RIGHT: "everything that was asked for is right", WRONG: "SOMETHING IS WRONG"}
    said[NOT_CHECKED] = "nothing is wrong, but not everything was checked"
    lines = ["# Kernels on a device", "", ", ".join(f"{key} {value}" for key, value in facts.items() if value) + "."]
    lines += ["", f"{said[results['outcome']]} (exit code {EXIT_CODES[results['outcome']]}): "]
    lines[-1] += f"{count([row for _, row in rows])}. Begun {results['begun']}, {results['minutes']:g} minutes."
    lines += ["", "| step | what | rows | kernels compiled, loaded | s |", "|" + " --- |" * 5]
    for entry in steps:
        compiled = sum(len(found) for found in entry["facts"].get("compiled", {}).values())
        kernels = f"{compiled}, {sum(entry['facts'].get('loaded', {}).values())}"
        lines.append(
            f"| {entry['name']} | {entry['about']} | {count(entry['rows'])} | {kernels} | {entry['seconds']:.0f} |"
        )
    for outcome, title in ((WRONG, "Wrong"), (NOT_CHECKED, "Not checked")):
        found = [
            f"- {entry['name']}: {row['what']}: {row.get('why', '')}"
            for entry, row in rows
            if row["outcome"] == outcome
        ]
        lines += ["", f"## {title}", "", *found] if found else []
    for entry in steps:
        lines += ["", f"## {entry['name']}: {entry['about']}", "", *entry["report"]] if entry["report"] else []
    return lines


def training(rows: list[dict]) -> list[str]:
    """Whole models, and how they compare with the Llama at the same length."""
    lines = []
    for size in dict.fromkeys(row["size"] for row in rows):
        mine = [row for row in rows if row["size"] == size]
        llama = {row["tokens"]: row for row in mine if row["model"] == "llama"}
        lines += ["", f"### {size}: forward, loss and backward", ""]
        lines += [
            "| model | parameters | B | T | ms a step (quartiles) | tokens/s | over Llama | peak MiB | over Llama |",
            "|" + " --- |" * 9,
        ]
        for row in mine:
            reference = llama.get(row["tokens"], {})
            lines.append(
                f"| {row['label']} | {row['parameters']:,} | {row['batch']} | {row['tokens']} | "
                f"{row['median']:.1f} ({row['low']:.1f}-{row['high']:.1f}) | {row['tokens_per_s']:,.0f} | "
                f"{_ratio(row, reference, 'tokens_per_s')} | {row.get('peak_mib', '')} | "
                f"{_ratio(row, reference, 'peak_mib')} |"
            )
        lines += [
            "",
            *(f"- {label}: {text}" for label, text in {row["label"]: row["settings"] for row in mine}.items()),
        ]
    return lines


def _ratio(row: dict, reference: dict, key: str) -> str:
    return f"{row[key] / reference[key]:.2f}" if key in row and key in reference else ""


def overtaking(rows: list[dict]) -> list[str]:
    """The length from which each of our models is faster than attention, of rows of one kind and one number of tokens."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        times.setdefault(row["path"], {})[row["tokens"]] = row["ms"]
    attention = times.get("SDPA attention", {})
    lines = []
    for path in (path for path in times if "Triton" in path and len(attention) > 1):
        both = sorted(times[path].keys() & attention.keys())
        slower = [tokens for tokens in both if times[path][tokens] >= attention[tokens]]
        first = next((tokens for tokens in both if not slower or tokens > slower[-1]), None)
        lines.append(
            f"- {path}: {f'faster than attention from T = {first}' if first else 'not faster than attention'}"
        )
    return ["", *lines] if lines else []


def plot(rows: list[dict], ax=None):
    """Draws milliseconds over the length, of forward passes of one number of tokens, on `ax` or a new figure; returns the
    axes."""
    from matplotlib.figure import Figure

    ax = ax or Figure(figsize=(7, 4.5), layout="constrained").subplots()
    for path in dict.fromkeys(row["path"] for row in rows):
        mine = [row for row in rows if row["path"] == path]
        ax.plot([row["tokens"] for row in mine], [row["ms"] for row in mine], marker="o", label=path)
    ax.set(xscale="log", yscale="log", xlabel="tokens in a sequence (65,536 in all)", ylabel="milliseconds, forward")
    ax.grid(alpha=0.3)
    if ax.lines:
        ax.legend(fontsize="small")
    return ax


def of_constant_tokens(rows: list[dict], tokens: int = 65536) -> list[dict]:
    """Forward passes over so many tokens in all, at d = C = 64."""
    return [
        row
        for row in rows
        if row.get("kind") == "forward"
        and row.get("batch", 0) * row["tokens"] == tokens
        and row["head_dim"] == row["chunk_size"] == 64
        and "ms" in row
    ]


if __name__ == "__main__":
    found = json.loads((Path(sys.argv[1]) / "results.json").read_text())
    timed = [row for entry in found["steps"] for row in entry["rows"]]
    plot(of_constant_tokens(timed)).figure.savefig(Path(sys.argv[1]) / "results.png", dpi=150)
