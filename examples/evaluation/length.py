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
"""What a long text does to a trained model, and what its memory is worth once it is saved.

    python examples/evaluation/length.py runs/moneta-stdlib                          # any Miras checkpoint
    python examples/evaluation/length.py runs/ablations/yaad-lr0.004-seed0.json      # of --keep-weights
    python examples/evaluation/length.py runs/*-stdlib --dtypes float32 --parts saved
    python examples/evaluation/length.py runs/moneta-stdlib --tokens 1000000 --text 'books/*.txt' --device cuda
    python examples/evaluation/length.py --report                                    # tables and plot of what is done

Two parts. `long` reads one text of 100,000 tokens in pieces with the cache: the loss by position, how large the memories'
weights become, and the memory in use; and the same text with a new memory every 512 tokens, because the text itself is
not equally hard everywhere. `saved` reads an earlier text, saves the memory, and compares the loss of other documents with
a new memory (fresh), from the saved one (warm), from the saved one without writes (warm and frozen), and in one stream.
Every part of every model and dtype is one JSON in `--out`; those that are there are not computed again.
"""

import argparse
import glob
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "examples"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from checkpoints import check_fingerprint, fingerprint, trained_model  # noqa: E402
from length_measures import (  # noqa: E402
    CONDITIONS,
    held_out,
    one_text,
    read_long_text,
    read_with_saved_memory,
    split_documents,
)
from provenance import command_line, machine  # noqa: E402
from study import markdown, quiet, without_nan, write_json, write_report_files  # noqa: E402


PARTS = ("long", "saved")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESTART = 512


@dataclass(frozen=True)
class Job:
    """One part of one model in one dtype.

    Args:
        checkpoint (`str`): a folder or name of a saved model, or the JSON of a training.
        dtype (`str`): of `DTYPES`.
        part (`str`): of `PARTS`.
        text (`tuple` of `str`): files, empty for the held-out ones of the standard library.
        piece (`int`): tokens of a call.
        device (`str`): where it computes.
        tokens, restart (`int`): of the part `long`: the text's length, and tokens after which the other reading begins anew.
        earlier, documents, document_tokens (`int`): of the part `saved`.
    """

    checkpoint: str
    dtype: str
    part: str
    text: tuple[str, ...]
    piece: int
    device: str
    tokens: int
    restart: int
    earlier: int
    documents: int
    document_tokens: int

    @property
    def name(self) -> str:
        anew = f"-restart{self.restart}" if self.part == "long" and self.restart != RESTART else ""
        return f"{Path(self.checkpoint).name.removesuffix('.json')}-{self.part}-{self.dtype}{anew}"


def run_job(job: Job, model, documents: list[torch.Tensor], folder: Path) -> dict[str, Any]:
    """Measures one part and writes its JSON.

    Raises:
        `ValueError`: if the text is too short.
    """
    started = time.perf_counter()
    if job.part == "long":
        ids = one_text(documents, job.tokens + 1).to(job.device)
        found = read_long_text(model, ids, job.piece, job.restart, job.device)
    else:
        earlier, tests = split_documents(
            documents, job.earlier, job.documents, job.document_tokens, model.config.chunk_size
        )
        tests = [ids.to(job.device) for ids in tests]
        file = folder / f"{job.name}.safetensors"
        found = read_with_saved_memory(model, earlier.to(job.device), tests, job.piece, file)
    result = {
        "job": asdict(job),
        "weights": fingerprint(model),
        **found,
        "seconds": time.perf_counter() - started,
        "command": command_line(),
        "machine": machine(torch.get_num_threads(), packages=("torch", "transformers", "miras-hf")),
    }
    if job.device == "cuda":
        result["machine"]["gpu"] = torch.cuda.get_device_name()
    write_json(folder / f"{job.name}.json", without_nan(result))
    return result


def done(job: Job, folder: Path) -> bool:
    """Whether the job's JSON is there.

    Raises:
        `ValueError`: if it is of other settings.
    """
    file = folder / f"{job.name}.json"
    if not file.exists():
        return False
    there = json.loads(file.read_text())["job"]
    here = json.loads(json.dumps(asdict(job)))
    differing = [
        f"{name} {there.get(name)!r}, not {value!r}" for name, value in here.items() if there.get(name) != value
    ]
    if differing:
        raise ValueError(f"{file} was made with {', '.join(differing)}: take another --out.")
    return True


def said(value: float | None, form: str) -> str:
    return "not a number" if value is None else format(value, form)


def long_table(result: dict[str, Any]) -> list[str]:
    rows = [
        [f"{row['first']:,} - {row['last']:,}", said(row["loss"], ".3f"), said(row["restarted"], ".3f")]
        for row in result["by_position"]
    ]
    return markdown(["position", "loss", "restarted"], rows)


def state_table(result: dict[str, Any]) -> list[str]:
    layers = list(result["states"][0]["memories"])
    titles = ["tokens", *(f"layer {i}: rms, moved" for i in layers), "cache, MiB", "peak, MiB"]
    rows = [
        [
            f"{state['tokens']:,}",
            *(", ".join(said(state["memories"][i][name], ".3g") for name in ("rms", "moved")) for i in layers),
            f"{state['cache_mib']:.2f}",
            f"{state['peak_mib']:.0f}",
        ]
        for state in result["states"]
    ]
    return markdown(titles, rows)


def saved_table(result: dict[str, Any]) -> list[str]:
    def with_error(value: float | None, error: float | None, form: str) -> str:
        return said(value, form) + ("" if error is None else f" ± {error:.3f}")

    rows = [
        [
            name,
            CONDITIONS[name],
            with_error(found["loss"], found["standard_error"], ".3f"),
            "" if name == "fresh" else with_error(found["difference"], found["difference_error"], "+.3f"),
        ]
        for name, found in result["conditions"].items()
    ]
    return markdown(["condition", "", "loss", "against fresh"], rows)


def plot(results: list[dict[str, Any]]):
    """Loss by position, the memories' way from their start, memory in use, and the four conditions; returns the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    (losses, moved), (memory, conditions) = figure.subplots(2, 2)

    def middle(rows: list[dict[str, Any]]) -> list[float]:
        return [(row["first"] * row["last"]) ** 0.5 for row in rows]

    for i, result in enumerate(results):
        color, label = f"C{i}", result["name"]
        if result["job"]["part"] == "long":
            rows, states = result["by_position"], result["states"]
            losses.plot(middle(rows), [row["loss"] for row in rows], "o-", color=color, markersize=3, label=label)
            losses.plot(middle(rows), [row["restarted"] for row in rows], ":", color=color)
            tokens = [state["tokens"] for state in states]
            for layer in states[0]["memories"]:
                first = layer == next(iter(states[0]["memories"]))
                values = [state["memories"][layer]["moved"] for state in states]
                moved.plot(tokens, values, color=color, alpha=0.7, label=label if first else None)
            memory.plot(tokens, [state["peak_mib"] for state in states], "o-", color=color, markersize=3, label=label)
        else:
            for name, style in zip(CONDITIONS, ("-", "--", "-.", ":"), strict=True):
                rows = result["conditions"][name]["by_position"]
                conditions.plot(
                    middle(rows), [row["loss"] for row in rows], style, color=color, label=f"{label}: {name}"
                )
    losses.set(xlabel="position in the text (dots: restarted)", ylabel="loss (nats per token)")
    moved.set(xlabel="tokens read", ylabel="way from the initial memory, a line a layer")
    memory.set(xlabel="tokens read", ylabel="peak memory in use, MiB")
    conditions.set(xlabel="position in the document", ylabel="loss (nats per token)")
    for ax in (losses, moved, memory, conditions):
        ax.set_xscale("log")
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=6)
    return figure


def write_report(folder: Path) -> list[str]:
    """Writes `report.md`, `report.json` and `report.png` of what a folder holds; returns the lines of `report.md`.

    Raises:
        `ValueError`: if it holds nothing.
    """
    files = sorted(file for part in PARTS for file in folder.glob(f"*-{part}-*.json"))
    if not files:
        raise ValueError(f"{folder} holds no measurement yet.")
    results = [{"name": file.stem} | json.loads(file.read_text()) for file in files]
    lines = []
    for result in results:
        job = result["job"]
        text = "held-out files of the standard library" if not job["text"] else ", ".join(job["text"])
        lines += [f"## {result['name']}", ""]
        if job["part"] == "long":
            lines += [
                f"{job['tokens']:,} tokens of {text}, in pieces of {job['piece']}, with a memory that goes on and with a new "
                f"one every {job['restart']:,} tokens.",
                "",
                *long_table(result),
                "",
                "The memories after so many tokens: root mean square of their weights, how far they have moved from the "
                "initial ones relative to those, what the cache holds, and the largest memory in use since the row before "
                f"({result['peak_method']}).",
                "",
                *state_table(result),
                "",
            ]
        else:
            lines += [
                f"{result['documents']} documents of {result['document_tokens']:,} tokens after {result['earlier']:,} tokens, "
                f"{text}; the saved memory takes {result['file_mib']:.2f} MiB. Standard errors are those over documents.",
                "",
                *saved_table(result),
                "",
            ]
    write_report_files(folder, lines, results, plot(results))
    return lines


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoints", nargs="*", help="folders or names of saved models, or JSONs of trainings")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument(
        "--text", nargs="+", default=[], help="files or globs, a document each, instead of held-out ones"
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="of the long text")
    parser.add_argument(
        "--restart", type=int, default=RESTART, help="tokens after which the other reading begins anew"
    )
    parser.add_argument("--piece", type=int, default=512, help="tokens of a call")
    parser.add_argument("--earlier", type=int, default=16_384, help="tokens of the text before the memory is saved")
    parser.add_argument("--documents", type=int, default=16, help="how many are read after it, at most")
    parser.add_argument("--document-tokens", type=int, default=1024, help="how much of each")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/length"))
    parser.add_argument("--report", action="store_true", help="tables and plot of what is done, run nothing")
    args = parser.parse_args(argv)
    for name in ("tokens", "restart", "piece", "earlier", "documents", "document_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if not args.checkpoints and not args.report:
        parser.error("name at least one checkpoint, or --report")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that PyTorch finds")
    return args


def main(argv: list[str] | None = None) -> list[str]:
    args = arguments(argv)
    quiet()
    args.out.mkdir(parents=True, exist_ok=True)
    files = tuple(sorted(file for pattern in args.text for file in glob.glob(pattern, recursive=True)))
    if args.text and not files:
        raise ValueError(f"--text {' '.join(args.text)} names no file.")
    settings = {
        name: getattr(args, name)
        for name in ("piece", "device", "tokens", "restart", "earlier", "documents", "document_tokens")
    }
    for checkpoint in args.checkpoints if not args.report else ():
        for dtype in args.dtypes:
            jobs = [Job(checkpoint, dtype, part, files, **settings) for part in args.parts]
            waiting = [job for job in jobs if not done(job, args.out)]
            model, tokenizer = trained_model(checkpoint, DTYPES[dtype], args.device)
            for job in jobs:
                check_fingerprint(args.out / f"{job.name}.json", model)
            if not waiting:
                continue
            texts = [Path(file).read_text(encoding="utf-8", errors="replace") for file in files] or None
            documents = held_out(tokenizer, texts)
            for job in waiting:
                print(f"{job.name}: {run_job(job, model, documents, args.out)['seconds']:.0f} s", flush=True)
    lines = write_report(args.out)
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main()
