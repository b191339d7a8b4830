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
"""Table and plot of the GPU script's results: python kernels/benchmarks/tables.py kernels/benchmarks/results/<device>"""

import json
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, not a package


def write_report(folder: Path) -> None:
    """`results.md` and `results.png` from `results.json`; the plot only where matplotlib is installed."""
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.md").write_text("\n".join(table(results)) + "\n")
    try:
        plot(results).figure.savefig(folder / "results.png", dpi=150)
    except ImportError:
        print("matplotlib is not installed: no results.png")


def table(results: dict) -> list[str]:
    machine = results["machine"]
    lines = ["# Kernels on a device", "", ", ".join(f"{key} {value}" for key, value in machine.items()) + ".", ""]
    checked = results["correctness"]
    wrong = [row for row in checked if not row["right"]]
    if checked:
        lines += [f"{len(checked)} configurations checked against float64, {len(wrong)} wrong."]
    lines += [f"- wrong: {json.dumps(row)}" for row in wrong]
    for setting in dict.fromkeys(row["setting"] for row in results["times"]):
        lines += ["", f"## {setting}", ""]
        lines += [
            "| path | B | T | heads x width | chunk | ms (quartiles) | peak MiB | TFLOP/s | of matmul | TB/s |",
            "|" + " --- |" * 10,
        ]
        for row in (row for row in results["times"] if row["setting"] == setting):
            share = f"{row['share_of_matmul']:.1%}" if "share_of_matmul" in row else ""
            lines.append(
                f"| {row['path']} | {row['batch']} | {row['tokens']} | {row['heads']} x {row['head_dim']} | "
                f"{row['chunk_size']} | {row['median']:.3f} ({row['low']:.3f}-{row['high']:.3f}) | "
                f"{row.get('peak_mib', '')} | {row.get('tflops', '')} | {share} | {row.get('tb_per_s', '')} |"
            )
        lines += overtaking(results, setting)
    lines += training(results.get("training", []))
    if results.get("prefill"):
        lines += prefill(results)
    if results.get("decode"):
        lines += decoding(results)
    if results["skipped"]:
        lines += ["", "## Not measured", "", *(f"- {row['name']}: {row['why']}" for row in results["skipped"])]
    return lines


def training(rows: list[dict]) -> list[str]:
    """Whole models, and how they compare with the Llama at the same length."""
    lines = []
    for size in dict.fromkeys(row["size"] for row in rows):
        mine = [row for row in rows if row["size"] == size]
        llama = {row["tokens"]: row for row in mine if row["model"] == "llama"}
        lines += ["", f"## Training of whole models, {size}: forward, loss and backward", ""]
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


def prefill(results: dict) -> list[str]:
    from prefill import rows_of

    piece = results["prefill_settings"]["prefill_chunk_size"]
    return ["", f"## Long prompts, batch 1, in pieces of {piece:,} tokens", "", *rows_of(results["prefill"])]


def decoding(results: dict) -> list[str]:
    from decode_report import tables

    lines = [
        f"- {fact['label']}: {fact['parameters']:,}, {fact['settings']}" for fact in results["decode_models"].values()
    ]
    return [*tables(results, results["decode_settings"]), "", *lines]


def overtaking(results: dict, setting: str) -> list[str]:
    """The length from which each of our models is faster than attention."""
    times: dict[str, dict[int, float]] = {}
    for row in results["times"]:
        if row["setting"] == setting:
            times.setdefault(row["path"], {})[row["tokens"]] = row["median"]
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


def plot(results: dict, ax=None):
    """Draws milliseconds over the length at a constant number of tokens, on `ax` or a new figure; returns the axes."""
    from matplotlib.figure import Figure

    ax = ax or Figure(figsize=(7, 4.5), layout="constrained").subplots()
    for path in dict.fromkeys(row["path"] for row in results["times"]):
        rows = [
            row
            for row in results["times"]
            if row["path"] == path
            and row["setting"].startswith("constant tokens, forward")
            and "+" not in row["setting"]
        ]
        if rows:
            ax.plot([row["tokens"] for row in rows], [row["median"] for row in rows], marker="o", label=path)
    ax.set(xscale="log", yscale="log", xlabel="tokens in a sequence (65,536 in all)", ylabel="milliseconds, forward")
    ax.grid(alpha=0.3)
    if ax.lines:
        ax.legend(fontsize="small")
    return ax


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
