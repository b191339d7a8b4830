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
"""Times launch configurations on this machine's GPU and keeps the fastest of each shape for its name.

    python kernels/tune.py                                   # every kernel and shape at bf16
    python kernels/tune.py --kernel mlp_forward --head_dim 64 --chunk_size 64 --precision bf16 tf32

writes `configurations/<device>.json`, entry by entry, which then goes before its compute capability's file. Entries of
other shapes stay.
"""

import argparse
import json
import sys
from unittest.mock import patch

import torch
import triton
from ahead_of_time import run
from choose import CALLS, candidates, write
from triton.testing import do_bench

from miras_kernels import configuration, ops
from miras_kernels.choices import CHUNK_SIZES, HEAD_DIMS


def time(kernel: str, shape: dict, launch: dict[str, int], options: argparse.Namespace) -> float:
    """Milliseconds of the calls together; infinite if the device cannot run the launch."""
    total = 0.0
    launch = {"enable_fp_fusion": True, **launch}
    for call in CALLS:
        step = run(call.at(kernel, **shape), options.heads, options.batch, options.tokens, "cuda")
        # the forward pass that a backward one follows has a launch of its own
        with patch.object(
            ops,
            "launch_configuration",
            lambda name, **where: (
                dict(launch) if name == kernel else configuration.launch_configuration(name, **where)
            ),
        ):
            try:
                total += do_bench(step, return_mode="median")
            except triton.runtime.errors.OutOfResources:
                return float("inf")
    return total


def tune(kernel: str, shape: dict, options: argparse.Namespace) -> dict[str, int] | None:
    best, launch_of_best = float("inf"), None
    for candidate in candidates(kernel, **shape):
        for stages in (1, 2):
            launch = {**candidate, "num_stages": stages}
            milliseconds = time(kernel, shape, launch, options)
            print(kernel, *shape.values(), launch, f"{milliseconds:.3f} ms", flush=True)
            if milliseconds < best:
                best, launch_of_best = milliseconds, launch
    return launch_of_best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=configuration.KERNELS, default=configuration.KERNELS)
    parser.add_argument("--head_dim", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--chunk_size", nargs="+", type=int, choices=CHUNK_SIZES, default=CHUNK_SIZES)
    parser.add_argument("--precision", nargs="+", choices=configuration.PRECISIONS, default=["bf16"])
    parser.add_argument("--batch", type=int, default=8, help="8 by default; with --heads enough to fill the device")
    parser.add_argument("--heads", type=int, default=16, help="16 by default")
    parser.add_argument("--tokens", type=int, default=2048, help="of each sequence, 2048 by default")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "No GPU here to time launches on. `python kernels/choose.py sm_90` chooses by what the compiler reports.",
            file=sys.stderr,
        )
        return 1

    name = configuration.file_name(torch.cuda.get_device_name())
    path = configuration.DIRECTORY / f"{name}.json"
    kernels = json.loads(path.read_text(encoding="utf-8"))["kernels"] if path.is_file() else {}
    shapes = [(d, c, p) for p in options.precision for d in options.head_dim for c in options.chunk_size]
    for kernel in options.kernel:
        for head_dim, chunk_size, precision in shapes:
            shape = {"head_dim": head_dim, "chunk_size": chunk_size, "precision": precision}
            launch = tune(kernel, shape, options)
            others = [e for e in kernels.get(kernel, ()) if any(e[part] != value for part, value in shape.items())]
            kernels[kernel] = [*others, {**shape, "launch": launch}]
            write(name, kernels)
    print(f"Wrote {path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
