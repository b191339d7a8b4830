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
"""Whole models, ours beside a Llama and others of equal size: training steps, long prompts, decoding.

What fails or finds no memory is said by name: of ours it is wrong, of a neighbour, or for want of memory, not checked.
"""

import argparse
import sys
from pathlib import Path

import tables
import torch
from outcomes import NOT_CHECKED, WRONG
from record import Record, begin
from training import ModelShape, Training, measure_training


sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts, not a package
import decode  # noqa: E402
import prefill  # noqa: E402
from decode_report import tables as decode_tables  # noqa: E402
from models import LABELS, OURS, build  # noqa: E402
from timing import Rounds  # noqa: E402


# a kernel or an error, never the slow path in silence
OUR_SETTINGS = {"memory_backend": "triton"}
TINY = ModelShape(width=32, layers=1, heads=1, vocabulary=64, chunk=16)


class Parts:
    """What the measurements of whole models report to: their rows, by part, in a step's record."""

    def __init__(self, record: Record, device: str):
        self.record, self.device = record, device
        self.rows: dict[str, list[dict]] = {"training": [], "prefill": [], "decode": [], "first_token": []}

    def add(self, part: str, row: dict) -> None:
        if part == "skipped":
            return self.skip(row["name"], row["why"])
        self.rows[part].append(row)
        where = ", ".join(f"{key} {row[key]}" for key in ("size", "batch", "context", "tokens") if key in row)
        name = row.get("name") or row["model"]
        what = f"{part.replace('_', ' ')} of {name}, {where}"
        return self.record.add(what, row) if self.record.wanted(what) else None

    def skip(self, name: str, why: str) -> None:
        ours = any(model in name for model in OURS)
        wrong = ours and "OutOfMemory" not in why and not why.startswith(("not ", "its cache needs"))
        if self.record.wanted(name):
            self.record.add(name, {"outcome": WRONG if wrong else NOT_CHECKED, "why": why[:600]})

    def out_of_time(self, what: str) -> bool:
        """Whether to leave out what is named: there is no time, or an earlier process died of it."""
        if what in self.record.done or self.record.out_of_time(what):
            return True
        self.record.start(what)
        return False


def main() -> None:
    record, args = begin(__doc__)
    parts = Parts(record, args.device)
    measures = {"training": measure_training_steps, "prefill": measure_prefill, "decode": measure_decoding}
    measures[args.part](parts, args)


def measure_training_steps(parts: Parts, args: argparse.Namespace) -> None:
    parts.record.report = lambda rows: tables.training(parts.rows["training"])
    trained = [Training(size, ModelShape.preset(size)) for size in args.sizes]
    if args.quick:
        trained = [Training("tiny", TINY, lengths=(9,), step_tokens=9, autocast=False, seconds=0.0)]
    for training in trained:
        measure_training(parts, training, args.models)


def shape_and_dtype(args: argparse.Namespace) -> tuple[ModelShape, torch.dtype]:
    return (TINY, torch.float32) if args.quick else (ModelShape.preset(args.sizes[-1]), torch.bfloat16)


def measure_prefill(parts: Parts, args: argparse.Namespace) -> None:
    plan = prefill.Plan(
        lengths=[20] if args.quick else [131072, 1048576],
        prefill_chunk_size=12 if args.quick else 32768,
        repeat_tokens=131072,
        rounds=Rounds(1, 1, 1.0, 0.0) if args.quick else Rounds(2, 2, 1.0, 0.0),  # the first one loads and compiles
    )

    def report(rows: list[dict]) -> list[str]:
        piece = f"Batch 1, in pieces of {plan.prefill_chunk_size:,} tokens."
        return [piece, "", *prefill.rows_of(parts.rows["prefill"])] if parts.rows["prefill"] else []

    parts.record.report = report
    shape, dtype = shape_and_dtype(args)
    for name in (name for name in args.models if name in OURS):  # one by one: each asks for the time that is left
        model = build(name, shape, args.device, dtype, our_settings=OUR_SETTINGS)
        model.module.eval()
        prefill.measure(
            {name: model},
            plan,
            lambda row: parts.add("prefill", row),
            lambda name, error: parts.skip(f"long prompts of {name}", f"{type(error).__name__}: {error}"),
            parts.out_of_time,
        )


def measure_decoding(parts: Parts, args: argparse.Namespace) -> None:
    plan = decode.Plan(
        batches=[1] if args.quick else [1, 16, 64, 256],
        contexts=[8] if args.quick else [1024, 8192, 65536, 1048576],
        steps=16 if args.quick else 64,
        sample_seconds=0.0 if args.quick else 1.0,
        prefill_tokens=48 if args.quick else 131072,
        repeat_tokens=0 if args.quick else 65536,
        state_tokens=8 if args.quick else 256,
        memory_bytes=decode.available_memory(args.device, 0.8),
        cell_seconds=0.0 if args.quick else 10.0,
        rounds=Rounds(1, 1, 1.0, 0.0) if args.quick else Rounds(3, 3, 1.0, 0.0),
        compiled=args.compile,
    )
    settings = {**vars(plan), "rounds": vars(plan.rounds), "device": args.device}
    facts: dict[str, dict] = {}

    def report(rows: list[dict]) -> list[str]:
        lines = decode_tables(parts.rows, settings) if parts.rows["decode"] else []
        said = [f"- {fact['label']}: {fact['parameters']:,}, {fact['settings']}" for fact in facts.values()]
        return [line.replace("## ", "### ") for line in lines] + ["", *said]

    parts.record.report = report
    shape, dtype = shape_and_dtype(args)
    models, found = decode.prepare(args.models, shape, args.device, dtype, parts.add, OUR_SETTINGS)
    facts.update(found)
    parts.record.facts["models"] = {LABELS[name]: fact for name, fact in found.items()}
    decode.measure(models, plan, parts.add, parts.out_of_time)


if __name__ == "__main__":
    main()
