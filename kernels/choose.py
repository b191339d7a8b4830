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
"""Chooses launch configurations by what the compiler reports, for devices that nobody has timed yet.

    python kernels/choose.py sm_90                    # all kernels and shapes, some minutes
    python kernels/choose.py sm_90 --kernel matrix_forward

compiles every candidate ahead of time and writes the cheapest of each shape to `configurations/<name>.json`. Where there
is a GPU, `kernels/tune.py` chooses by the clock.
"""

import argparse
import json
import math
from pathlib import Path

from ahead_of_time import CAPABILITIES, Call, compiled, tiles

from miras_kernels import configuration
from miras_kernels.choices import Choices


# Head widths between these take a neighbour's entry: 48 and 96 are padded to 64 and 128.
SHAPES = [(head_dim, chunk_size) for head_dim in (32, 64, 128) for chunk_size in (16, 32, 64)]
CORNERS = [(head_dim, chunk_size) for head_dim in (64, 128) for chunk_size in (16, 64)]
LARGE = [(64, 64), (128, 64)]

# What spills most, the lq norms' sums over a tile and the softmax's third pass over the tiles, and what takes most shared
# memory, a chunk begun before the call.
CALLS = [
    Call(Choices(attentional_bias="lp", retention="lq")),
    Call(Choices(attentional_bias="l2", retention="kl")),
    Call(Choices(attentional_bias="huber_mixture", retention="decay"), continues=True, keeps=True),
]

# the same of the delta rule
DELTA = Call(Choices(memory="matrix", learning_algorithm="delta_rule"), continues=True, keeps=True)

# Cycles that a tile takes whatever its size: about ten dependent products of some 200 cycles. Cycles from one instruction
# of a warp that is alone to its next, whatever others could be issued between them. Neither is measured: guesses that say
# how many spills a wider tile is worth, and what half the warps are.
TILE, ALONE = 2000, 2
# of a multiprocessor: each issues one instruction of a warp in a cycle; and how much an L1 moves in one
SCHEDULERS, L1_BYTES = 4, 128


def shapes(name: str, kernel: str, precision: str) -> list[tuple[int, int]]:
    # Hopper's matrix units need 64 rows, so that shapes there differ in kind. Float32 operands are there to be right, and
    # what fits at the largest shape fits below. A backward kernel takes half a minute to compile
    if precision != "bf16" or not kernel.endswith("_forward"):
        return list(LARGE)
    return list(SHAPES if CAPABILITIES[name][0] >= 90 else CORNERS)


def candidates(
    kernel: str, head_dim: int, chunk_size: int, precision: str, by_clock: bool = False
) -> list[dict[str, int]]:
    """Launch arguments worth trying for a shape, those of the fewest tiles first.

    Args:
        by_clock (`bool`, *optional*, defaults to `False`):
            Also those that a compiler's report cannot judge, after the others: loads begun a tile ahead, and wider tiles
            of kernels that read or put aside much for each.
    """
    # eight warps have all registers of a multiprocessor, four need less of everything and may be there twice
    warps = (8, 4)
    # without a limit of its own, the assembler spills even more where it spills a lot
    launches = [{"num_warps": w, "num_stages": 1, "maxnreg": 255} for w in warps]
    found = launches
    if kernel == "mlp_forward":
        widths = {"bf16": (128, 64, 32, 16), "ieee": (16,)}.get(precision, (32, 16))
        found = [{"TN": width, **launch} for width in widths for launch in launches]
    elif kernel == "mlp_decode":
        # products are at a chunk's end only: two programs of four warps on a multiprocessor wait less for memory than one
        found = [
            {"TN": w, **launch} for w in (32, 16) for launch in reversed(launches if head_dim <= 64 else launches[:1])
        ]
    elif kernel == "delta_backward":
        # nothing is put aside: a tile alone keeps operands out of a loop, and so out of shared memory
        widths = {1 << (head_dim - 1).bit_length(): None, 32: None, 16: None}
        found = [{"TN": max(width, 16), **launch} for width in widths for launch in launches]
    elif kernel.endswith("_backward"):
        # operands of a chunk's rows are held where they are bfloat16; in float32 they would fill the shared memory
        streamed = {"TN": 16, **launches[0], "STREAM": 1}
        held = (
            [{"TN": width, **launch} for width in (64, 32, 16) for launch in launches] if precision == "bf16" else []
        )
        found = [*held, streamed]
    return found + _by_clock(kernel, precision, found) if by_clock else found


def _by_clock(kernel: str, precision: str, found: list[dict[str, int]]) -> list[dict[str, int]]:
    others = []
    if kernel.endswith("_backward") and precision == "bf16":
        others += [{**launch, "TN": 128} for launch in found if "STREAM" not in launch]
    if kernel == "mlp_decode":
        others += [{**launch, "TN": 64} for launch in found]
    if precision == "bf16":
        others += [{**launch, "num_warps": 4} for launch in (*found, *others)]
    others += [{**launch, "num_stages": 2} for launch in (*found, *others)]
    return [x for i, x in enumerate(others) if x not in found and x not in others[:i]]


def cost(call: Call, launch: dict[str, int], counts: dict[str, int]) -> float:
    """Cycles of a chunk, roughly: the mean of a program that is alone on its multiprocessor, whose warps cannot issue at
    every cycle, and of one among many, whose instructions go where others wait; what stacks move, and tiles, come to it."""
    issued = counts["instructions"] * launch["num_warps"] / SCHEDULERS
    alone = max(issued, counts["instructions"] * ALONE)
    return (alone + issued) / 2 + counts["local_bytes"] / L1_BYTES + tiles(call, launch) * TILE


def choose(name: str, kernel: str, head_dim: int, chunk_size: int, precision: str) -> dict[str, int] | None:
    """The cheapest candidate that fits into shared memory, `None` if there is none.

    A generation's own matrix units go before anything else. Of costs within a tenth, which are no different, more warps
    are chosen: they wait less where there are few programs.
    """
    capability, shared = CAPABILITIES[name]
    found: list[tuple[bool, float, dict[str, int]]] = []
    for launch in candidates(kernel, head_dim, chunk_size, precision):
        if found and "STREAM" in launch:
            continue  # for where nothing else fits
        calls = CALLS[-1:] if kernel.endswith("_backward") else CALLS
        calls = [DELTA] if kernel.startswith("delta") else calls
        calls = [call.at(kernel, head_dim, chunk_size, precision) for call in calls]
        best = min(((not units, total) for units, total, _ in found), default=(True, math.inf))
        if (not best[0] or capability < 90) and sum(tiles(c, launch) for c in calls) * TILE >= best[1]:
            continue  # its tiles alone cost more
        total, units = 0.0, True
        for call in calls:
            counts = compiled(call, {"enable_fp_fusion": True, **launch}, capability)
            total += cost(call, launch, counts) if counts["shared"] <= shared * 1024 else math.inf
            units = units and (kernel.endswith("_decode") or counts["wgmma"] + counts["tcgen05"] > 0)
            if math.isinf(total):
                break
        print(name, kernel, head_dim, chunk_size, precision, launch, f"{total:.0f}", units, flush=True)
        if math.isfinite(total):
            found.append((units, total, launch))
        if found and precision != "bf16":
            break  # the first that fits
    if not found:
        return None
    missing, least = min((not units, total) for units, total, _ in found)
    equal = [
        (-launch["num_warps"], total, i)
        for i, (units, total, launch) in enumerate(found)
        if units != missing and total <= 1.1 * least
    ]
    return found[min(equal)[2]][2]


def write(name: str, kernels: dict[str, list[dict]], folder: Path = configuration.DIRECTORY) -> None:
    """Writes `<name>.json`, an entry a line, into the folder of configurations or another."""
    lists = (
        f'"{kernel}": [\n    ' + ",\n    ".join(json.dumps(entry) for entry in found) + "\n  ]"
        for kernel, found in kernels.items()
    )
    path = folder / f"{name}.json"
    path.write_text('{"kernels": {\n  ' + ",\n  ".join(lists) + "\n}}\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(CAPABILITIES))
    parser.add_argument("--kernel", choices=configuration.KERNELS, action="append")
    arguments = parser.parse_args()
    path = configuration.DIRECTORY / f"{arguments.name}.json"
    kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"] if path.is_file() else {}
    for kernel in arguments.kernel or configuration.KERNELS:
        found = []
        for precision in configuration.PRECISIONS:
            wanted = shapes(arguments.name, kernel, precision)
            for head_dim, chunk_size in wanted:
                launch = choose(arguments.name, kernel, head_dim, chunk_size, precision)
                shape = {"head_dim": head_dim, "chunk_size": chunk_size, "precision": precision}
                found.append({**shape, "launch": launch})
                if launch is None and chunk_size > 16:
                    wanted.append((head_dim, chunk_size // 2))
        kernels[kernel] = found
    write(arguments.name, {kernel: kernels[kernel] for kernel in configuration.KERNELS if kernel in kernels})


if __name__ == "__main__":
    main()
