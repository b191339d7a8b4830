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
"""A decoding run's decode.json as a Markdown page and a picture.

    python benchmarks/decode_report.py benchmarks/results/<machine>/

writes both again from the numbers. `tables` serves other reports.
"""

import json
import sys
from pathlib import Path

from report import COLOURS, axis, errors, find, made_with, star, table


REFERENCE = "llama"


def write_report(results: dict, out: Path) -> None:
    (out / "decode.md").write_text(markdown(results))
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return  # the numbers are there, the picture is an extra
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), layout="constrained")
    batches, contexts = (sorted({row[key] for row in results["decode"]}) for key in ("batch", "context"))
    if batches:
        plot(results["decode"], "context", milliseconds, {"batch": batches[0]}, axes[0, 0])
        plot(results["decode"], "batch", milliseconds, {"context": contexts[len(contexts) // 2]}, axes[0, 1])
        axes[0, 0].set_ylabel("ms a step")
        axes[0, 1].set_ylabel("ms a step")
        plot(results["first_token"], "context", lambda row: row["seconds"], {"batch": batches[0]}, axes[1, 0])
        axes[1, 0].set_ylabel("seconds to the first token")
        plot(results["decode"], "context", mebibytes, {"batch": batches[0]}, axes[1, 1])
        axes[1, 1].set_ylabel("MiB of cache a sequence")
    figure.suptitle(f"Decoding, {shape_text(results)} ({results['machine'].get('gpu', results['machine']['cpu'])})")
    figure.savefig(out / "decode.png", dpi=120)
    pyplot.close(figure)


def shape_text(results: dict) -> str:
    shape = results["shape"]
    return (
        f"{shape['layers']} layers, width {shape['width']}, {shape['heads']} heads, vocabulary {shape['vocabulary']}, "
        f"{results['settings']['dtype']}"
    )


def markdown(results: dict) -> str:
    settings = results["settings"]
    lines = [
        "# Decoding with whole models",
        "",
        f"`{results['command']}`, {results['date']}.",
        "",
        made_with(results["machine"], ("torch", "transformers", "triton")),
        "",
        f"{shape_text(results)}, chunk {results['shape']['chunk']}; neighbours of equal parameters. Medians of "
        "interleaved rounds; ± is half the distance between the quartiles, \\* marks a median that had to take in "
        "samples with other load on the machine.",
    ]
    if results["settings"]["device"] == "cuda":
        lines[4] = f"{results['machine']['gpu']}. {lines[4]}"
    lines += tables(results, settings)
    rows = [
        [fact["label"], f"{fact['parameters']:,}", *errors(fact["decode_against_forward"]), fact["settings"]]
        for fact in results["models"].values()
    ]
    head = ["model", "parameters", "decode - forward: largest", "relative to the largest logit", "settings"]
    lines += ["", "## What was compared, and that decoding gives the numbers of the forward pass", ""]
    lines += table(head, rows)
    if results["skipped"]:
        lines += ["", "## Not measured", "", *(f"- {row['name']}: {row['why']}" for row in results["skipped"])]
    return "\n".join(lines) + "\n"


def tables(results: dict, settings: dict) -> list[str]:
    """The tables of the rows in `results["decode"]` and `results["first_token"]`."""
    lines = []
    decoded, first = results["decode"], results["first_token"]
    for batch in sorted({row["batch"] for row in decoded}):
        lines += [
            "",
            f"## Milliseconds a step, batch {batch}",
            "",
            *grid(decoded, {"batch": batch}, step_cell, f"over {REFERENCE}", milliseconds),
        ]
    if decoded:
        lines += ["", *notes(decoded, settings)]
    for batch in sorted({row["batch"] for row in first}):
        lines += [
            "",
            f"## Seconds to the first token, batch {batch}",
            "",
            *grid(first, {"batch": batch}, seconds_cell, f"over {REFERENCE}", lambda row: row["seconds"]),
        ]
    if first:
        lines += [
            "",
            "A real prefill of random tokens. Attention reads it into a growing cache, as `generate()` does, and decodes "
            f"from a static one. Prompts of more than {settings['repeat_tokens']:,} tokens, of all sequences together, "
            f"were read once; of more than {settings['prefill_tokens']:,} not at all.",
        ]
    smallest = min((row["batch"] for row in decoded), default=None)
    if smallest is not None:
        lines += [
            "",
            "## Cache, MiB a sequence",
            "",
            "Counted from the cache's tensors; attention's have room for the context and a sample's steps.",
            "",
            *grid(decoded, {"batch": smallest}, lambda row: f"{mebibytes(row):,.2f}", f"over {REFERENCE}", mebibytes),
        ]
    for batch in sorted({row["batch"] for row in decoded} if settings["device"] == "cuda" else ()):
        lines += [
            "",
            f"## GB/s, batch {batch}",
            "",
            "Bytes of weights (without the embedding, which is looked up) and of the cache, over the time of a step.",
            "",
            *grid(decoded, {"batch": batch}, lambda row: f"{row['gb_per_second']:,.1f}"),
        ]
    return lines


def grid(rows: list[dict], keys: dict, cell, ratio_name: str | None = None, value=None) -> list[str]:
    """Models down, contexts across, and, where `value` is given, as ratios to the Llama beside."""
    rows = [row for row in rows if all(row[key] == wanted for key, wanted in keys.items())]
    contexts = sorted({row["context"] for row in rows})
    with_ratios = value is not None and any(row["name"] == REFERENCE for row in rows)
    head = ["model", *(f"{context:,}" for context in contexts)]
    head += [f"{ratio_name}, {context:,}" for context in contexts] if with_ratios else []
    lines = []
    for name, label in {row["name"]: row["label"] for row in rows}.items():
        found = [find(rows, name=name, context=context) for context in contexts]
        line = [label, *("" if row is None else cell(row) for row in found)]
        if with_ratios:
            references = [find(rows, name=REFERENCE, context=context) for context in contexts]
            line += [
                f"{value(row) / value(reference):.2f}" if row and reference else ""
                for row, reference in zip(found, references, strict=True)
            ]
        lines.append(line)
    return table(head, lines)


def notes(rows: list[dict], settings: dict) -> list[str]:
    """What the caches held, where it was not the whole context."""
    filled = sorted({(row["label"], row["filled"]) for row in rows if row["filled"] != "read"})
    if not filled:
        return []
    text = (
        f"° not the whole context was read (contexts up to {settings['prefill_tokens']:,} tokens of all sequences are): "
        "a state of one size was left by fewer tokens, keys and values of attention were random numbers: "
    )
    return [text + "; ".join(f"{label}, {how}" for label, how in filled) + "."]


def step_cell(row: dict) -> str:
    low, high = (1e3 * s for s in row["seconds_quartiles"])
    spread = f" ±{50 * (high - low) / milliseconds(row):.0f}%" if row["samples"] > 1 else ""
    return f"{milliseconds(row):.2f}{spread}{star(row)}{'' if row['filled'] == 'read' else '°'}"


def seconds_cell(row: dict) -> str:
    low, high = row["seconds_quartiles"]
    spread = f" ±{50 * (high - low) / row['seconds']:.0f}%" if row["samples"] > 1 else ""
    return f"{row['seconds']:.3f}{spread}{star(row)}"


def milliseconds(row: dict) -> float:
    return 1e3 * row["seconds"]


def mebibytes(row: dict) -> float:
    return row["cache_bytes_per_sequence"] / 2**20


def plot(rows: list[dict], across: str, value, keys: dict, ax=None):
    """Lines of `value` over `across`, one a model, on `ax` or the current axes."""
    ax = axis(ax)
    rows = [row for row in rows if all(row[key] == wanted for key, wanted in keys.items())]
    for i, (name, label) in enumerate({row["name"]: row["label"] for row in rows}.items()):
        mine = sorted((row[across], value(row)) for row in rows if row["name"] == name)
        ax.plot(
            *zip(*mine, strict=True),
            marker="o",
            linestyle="--" if name.endswith("-compiled") else "-",
            color=COLOURS[i % len(COLOURS)],
            label=label,
        )
    if rows:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.legend(fontsize="small")
    ax.set_xlabel(across)
    ax.set_title(", ".join(f"{key} {wanted:,}" for key, wanted in keys.items()))
    ax.grid(alpha=0.3)
    return ax


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write_report(json.loads((folder / "decode.json").read_text()), folder)
