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
    lines += [f"{len(checked)} configurations checked against float64, {len(wrong)} wrong."]
    lines += [f"- wrong: {json.dumps(row)}" for row in wrong]
    for setting in dict.fromkeys(row["setting"] for row in results["times"]):
        lines += ["", f"## {setting}", ""]
        lines += [
            "| path | B | T | heads x width | chunk | ms (quartiles) | peak MiB | TFLOP/s | of matmul |",
            "|" + " --- |" * 9,
        ]
        for row in (row for row in results["times"] if row["setting"] == setting):
            share = f"{row['share_of_matmul']:.1%}" if "share_of_matmul" in row else ""
            lines.append(
                f"| {row['path']} | {row['batch']} | {row['tokens']} | {row['heads']} x {row['head_dim']} | "
                f"{row['chunk_size']} | {row['median']:.3f} ({row['low']:.3f}-{row['high']:.3f}) | "
                f"{row.get('peak_mib', '')} | {row.get('tflops', '')} | {share} |"
            )
        lines += overtaking(results, setting)
    if results["skipped"]:
        lines += ["", "## Not measured", "", *(f"- {row['name']}: {row['why']}" for row in results["skipped"])]
    return lines


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
