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
"""What Python takes in front of a launch that decodes a token: the kernel is replaced by nothing, all else is done.

    TRITON_INTERPRET=1 python kernels/benchmarks/in_front.py                  # on the host
    python kernels/benchmarks/in_front.py --device cuda

Prints microseconds of a call of `miras_kernels.decode`: the best of many batches of calls, which is what a machine that
does other things, too, disturbs least. What Triton's own launch takes comes on top.
"""

import argparse
import time
from unittest.mock import patch

import memory_alone  # noqa: F401
import torch
from decoding import decode_call
from paths import Shape

from miras_kernels import decode_matrix, decode_mlp


CALLS, BATCHES = 200, 30


class Nothing:
    """Stands where a kernel stands."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


def microseconds(model: str, shape: Shape) -> float:
    """Of one call."""
    with (
        torch.no_grad(),
        patch.object(decode_mlp, "mlp_decode_kernel", Nothing()),
        patch.object(decode_matrix, "matrix_decode_kernel", Nothing()),
    ):
        call, _ = decode_call(model, shape)
        seconds = []
        for _ in range(BATCHES):
            started = time.perf_counter()
            for _ in range(CALLS):
                call()
            seconds.append((time.perf_counter() - started) / CALLS)
    return 1e6 * min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=["yaad", "moneta", "memora"])
    args = parser.parse_args()
    shape = Shape(1, 1, 4, 64, 64, torch.float32 if args.device == "cpu" else torch.bfloat16, args.device)
    for model in args.models:
        print(f"{model}: {microseconds(model, shape):.0f} us a call", flush=True)


if __name__ == "__main__":
    main()
