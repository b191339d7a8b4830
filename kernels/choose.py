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

from ahead_of_time import CAPABILITIES, Call, compiled

from miras_kernels import configuration
from miras_kernels.choices import Choices


# Head widths between these take a neighbour's entry: 48 and 96 are padded to 64 and 128.
SHAPES = [(head_dim, chunk_size) for head_dim in (32, 64, 128) for chunk_size in (16, 32, 64)]
CORNERS = [(head_dim, chunk_size) for head_dim in (64, 128) for chunk_size in (16, 64)]

# What spills most: the lq norms' sums over a tile, and the softmax's third pass over the tiles.
MODELS = [{"attentional_bias": "lp", "retention": "lq"}, {"attentional_bias": "l2", "retention": "kl"}]

# Cycles that a tile takes whatever its size: about ten dependent products of some 200 cycles. Not measured: a guess that
# says how many spills a wider tile is worth.
TILE = 2000


def shapes(name: str, precision: str) -> list[tuple[int, int]]:
    # without bf16 products a kernel is there to be right, not fast, and neighbours do
    return SHAPES if precision == "bf16" and name != configuration.DEFAULT else CORNERS


def candidates(kernel: str, head_dim: int, chunk_size: int, precision: str) -> list[dict[str, int]]:
    """Launch arguments worth trying for a shape."""
    # eight warps have all registers of a multiprocessor; small tiles are spread too thin over them
    warps = (8,) if chunk_size == 64 or head_dim == 128 else (4, 8)
    # without a limit of its own, the assembler spills even more where it spills a lot
    launches = [{"num_warps": w, "num_stages": 1, "maxnreg": 255} for w in warps]
    if kernel == "mlp_forward":
        tiles = (16, 32, 64) if precision == "bf16" else (16, 32)
        return [{"TN": tile, **launch} for tile in tiles for launch in launches]
    return launches


def cost(call: Call, launch: dict[str, int], counts: dict[str, int]) -> float:
    """Cycles of a chunk that depend on the launch, roughly: spills go at 128 bytes a cycle, tiles take their time."""
    width = launch["num_warps"] * 32 / 128
    hidden = call.choices.weight_shapes(call.head_dim)[0][1]
    tiles = math.ceil(hidden / launch["TN"]) if "TN" in launch else 0
    per_tile = TILE + width * counts["spilled_bytes_per_tile"]
    return width * counts["spilled_bytes_per_chunk"] + tiles * per_tile


def choose(name: str, kernel: str, head_dim: int, chunk_size: int, precision: str) -> dict[str, int]:
    capability, shared = CAPABILITIES[name]
    best = None
    for launch in candidates(kernel, head_dim, chunk_size, precision):
        total, units = 0.0, 0
        for model in MODELS:
            call = Call(Choices(**model)).at(kernel, head_dim, chunk_size, precision)
            counts = compiled(call, {"enable_fp_fusion": True, **launch}, capability)
            total += cost(call, launch, counts)
            units += min(counts["wgmma"] + counts["tcgen05"], 1)
            total += math.inf if counts["shared"] > shared * 1024 else 0.0
        print(name, kernel, head_dim, chunk_size, precision, launch, f"{total:.0f}", units, flush=True)
        # a generation's own matrix units before anything else
        if math.isfinite(total) and (best is None or (-units, total) < best[0]):
            best = ((-units, total), launch)
    if best is None:
        raise RuntimeError(f"No candidate of {kernel} fits {shared} KiB at {head_dim}, {chunk_size}, {precision}.")
    return best[1]


def write(name: str, kernels: dict[str, list[dict]]) -> None:
    """Writes `configurations/<name>.json`, an entry a line."""
    lists = (
        f'"{kernel}": [\n    ' + ",\n    ".join(json.dumps(entry) for entry in found) + "\n  ]"
        for kernel, found in kernels.items()
    )
    path = configuration.DIRECTORY / f"{name}.json"
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
            for head_dim, chunk_size in shapes(arguments.name, precision):
                launch = choose(arguments.name, kernel, head_dim, chunk_size, precision)
                shape = {"head_dim": head_dim, "chunk_size": chunk_size, "precision": precision}
                found.append({**shape, "launch": launch})
        kernels[kernel] = found
    write(arguments.name, {kernel: kernels[kernel] for kernel in configuration.KERNELS if kernel in kernels})


if __name__ == "__main__":
    main()
