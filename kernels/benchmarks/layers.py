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
"""How fast is a layer's recurrence, beside attention and, where asked for, its slower neighbours; and decoding with it.

A training step takes gradients of everything for a fixed random adjoint. Between a call and the next one on the same inputs
lie others, on inputs that together are larger than the L2. What was timed must have given finite numbers.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import compilations
import memory_alone  # noqa: F401
import torch
from clock import per_call, sets_beyond_l2
from decoding import decode_call
from outcomes import WRONG, NotChecked
from paths import LONGEST, PATHS, TIMED, Shape
from record import begin
from tables import of_constant_tokens, overtaking


OURS = tuple(f"{model}, Triton" for model in TIMED)
DEFAULT = (*OURS, "SDPA attention")
PASSES = ("forward", "training forward", "forward and backward")


def main() -> None:
    record, args = begin(__doc__, report)
    if args.device == "cuda":
        compilations.follow(record.facts)
    for name, shape, kind in (main_rows if args.part == "main" else more_rows)(args):
        take = measure_token if kind == "one token" else measure
        record.check(f"{kind} of {name}, {shape}", lambda take=take, at=(name, shape, kind): take(*at))


def main_rows(args: argparse.Namespace) -> Iterator[tuple[str, Shape, str]]:
    """d = C = 64 with every multiprocessor busy, and a single sequence; ours and attention first, then what was asked for."""
    if args.quick:
        shape = Shape(1, 9, 1, 32, 16, torch.float32, args.device)
        yield from ((name, shape, "forward") for name in ("yaad, Triton", "SDPA attention", *args.neighbours))
        yield "matrix, Triton", shape, "forward and backward"
        yield "SDPA attention", shape, "forward and backward"
        yield "yaad", Shape(1, 1, 1, 32, 16, torch.float32, args.device), "one token"
        return
    full, alone = Shape(8, 4096, 16, 64, 64, device=args.device), Shape(1, 8192, 16, 64, 64, device=args.device)
    for name in ("yaad, Triton", "SDPA attention"):
        yield from ((name, shape, kind) for shape in (full, alone) for kind in PASSES)
    for batch in (1, 64):
        yield "yaad", replace(full, batch=batch, tokens=1), "one token"
    for name in (*OURS[1:], *args.neighbours):
        yield from ((name, shape, kind) for shape in (full, alone) for kind in PASSES)
    for model in TIMED[1:]:
        yield model, replace(full, batch=1, tokens=1), "one token"


def more_rows(args: argparse.Namespace) -> Iterator[tuple[str, Shape, str]]:
    """d = 128, then other widths and chunks, batches of decoding, and lengths at a constant number of tokens."""
    if args.quick:
        yield "matrix, Triton", Shape(1, 17, 1, 32, 16, torch.float32, args.device), "forward"
        return
    wide = Shape(8, 4096, 16, 128, 64, device=args.device)
    yield from ((name, wide, kind) for name in (*DEFAULT, *args.neighbours) for kind in PASSES)
    for model in TIMED:
        yield model, replace(wide, batch=1, tokens=1), "one token"
    for head_dim, chunk_size in ((64, 16), (64, 32), (48, 64), (96, 64)):
        shape = Shape(8, 4096, 16, head_dim, chunk_size, device=args.device)
        yield from (("yaad, Triton", shape, kind) for kind in PASSES)
    for batch in (8, 256):
        yield "yaad", Shape(batch, 1, 16, 64, 64, device=args.device), "one token"
    for tokens in (2048, 8192, 16384, 32768, 65536, 131072):
        shape = Shape(max(1, 65536 // tokens), tokens, 16, 64, 64, device=args.device)
        yield from ((name, shape, "forward") for name in (*DEFAULT, *args.neighbours))


def measure(name: str, shape: Shape, kind: str) -> dict:
    if shape.tokens > LONGEST.get(name, shape.tokens):
        raise NotChecked(f"not measured beyond T = {LONGEST[name]}")
    row = {"path": name, "kind": kind, "batch": shape.batch, "tokens": shape.tokens, "heads": shape.heads}
    row |= {"head_dim": shape.head_dim, "chunk_size": shape.chunk_size}
    with torch.set_grad_enabled(kind != "forward"):
        path = PATHS[name](shape, 0)
        paths = [path, *(PATHS[name](shape, i) for i in range(1, sets_beyond_l2(path.bytes(), shape.device)))]
        steps = [path.training_step() if kind == "forward and backward" else path.call for path in paths]
        given = steps[0]()
        row |= finite([given] if isinstance(given, torch.Tensor) else list(given))
        del given
        if shape.device == "cuda":
            row["peak_mib"] = peak_mib(steps[0])
        found = per_call(steps, shape.device)
    row |= {key: value for key, value in found.items() if key != "samples"} | {"sets": len(paths)}
    if name in OURS and "matrix" not in name:
        row["tflops"] = round((3 if "backward" in kind else 1) * shape.miras_flops() / row["ms"] / 1e9, 2)
    return row


def measure_token(model: str, shape: Shape, kind: str) -> dict:
    """One token of one layer for every row, over all phases of a chunk."""
    row = {"path": f"{model}, Triton", "kind": kind, "batch": shape.batch, "tokens": 1, "heads": shape.heads}
    row |= {"head_dim": shape.head_dim, "chunk_size": shape.chunk_size}
    with torch.no_grad():
        call, moved = decode_call(model, shape, 0)
        others = range(1, sets_beyond_l2(moved, shape.device))
        calls = [call, *(decode_call(model, shape, seed)[0] for seed in others)]
        row |= finite([call()])
        found = per_call(calls, shape.device, replays=2 * shape.chunk_size)
    samples = found.pop("samples")
    # one replay in every chunk_size folds
    row |= found | {"mean": sum(samples) / len(samples), "with_fold": max(samples), "sets": len(calls)}
    return row | {"tb_per_s": float(f"{moved / row['ms'] / 1e9:.3g}")}


def finite(given: list) -> dict:
    broken = sum(int((~torch.isfinite(x)).sum()) for x in given if isinstance(x, torch.Tensor))
    return {"outcome": WRONG, "why": f"{broken} numbers are not finite"} if broken else {}


def peak_mib(step) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def report(rows: list[dict]) -> list[str]:
    lines = [
        "| path | what | B | T | heads x width | chunk | ms (quartiles) | Python, ms | peak MiB | TFLOP/s | TB/s | by |"
    ]
    lines += ["|" + " --- |" * 12]
    for row in (row for row in rows if "ms" in row):
        fold = f"; with a fold {row['with_fold']:.4f}" if "with_fold" in row else ""
        lines.append(
            f"| {row['path']} | {row['kind']} | {row['batch']} | {row['tokens']} | {row['heads']} x {row['head_dim']} | "
            f"{row['chunk_size']} | {row['ms']:.4f} ({row['low']:.4f}-{row['high']:.4f}){fold} | {row['python_ms']:.3f} | "
            f"{row.get('peak_mib', '')} | {row.get('tflops', '')} | {row.get('tb_per_s', '')} | {row['by']} |"
        )
    return [*lines, *overtaking(of_constant_tokens(rows))]


if __name__ == "__main__":
    main()
