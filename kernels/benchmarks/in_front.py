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
"""What Python takes in front of launches: the kernels are replaced by nothing, all else is done.

    TRITON_INTERPRET=1 python kernels/benchmarks/in_front.py                  # on the host
    python kernels/benchmarks/in_front.py --device cuda

Prints microseconds of a call that decodes a token, of one that reads a chunk in training, and of its backward pass: the
best of many batches of calls, which is what a machine that does other things, too, disturbs least. What Triton's own
launches take comes on top.
"""

import argparse
import contextlib
import time
from collections.abc import Callable
from unittest.mock import patch

import memory_alone  # noqa: F401
import torch
from decoding import decode_call
from paths import Shape, kernel_call

from miras_kernels import (
    backward_delta,
    backward_matrix,
    backward_mlp,
    decode_delta,
    decode_matrix,
    decode_mlp,
    forward_delta,
    forward_pass,
)


CALLS, BATCHES = 200, 30
KERNELS = (
    (decode_mlp, "mlp_decode_kernel"),
    (decode_matrix, "matrix_decode_kernel"),
    (decode_delta, "delta_decode_kernel"),
    (forward_pass, "mlp_forward_kernel"),
    (forward_pass, "matrix_forward_kernel"),
    (forward_delta, "delta_forward_kernel"),
    (backward_mlp, "mlp_backward_kernel"),
    (backward_matrix, "matrix_backward_kernel"),
    (backward_delta, "delta_backward_kernel"),
)


class Nothing:
    """Stands where a kernel stands."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


def best(call: Callable[[], object]) -> float:
    """Microseconds of one call."""
    seconds = []
    for _ in range(BATCHES):
        started = time.perf_counter()
        for _ in range(CALLS):
            call()
        seconds.append((time.perf_counter() - started) / CALLS)
    return 1e6 * min(seconds)


def microseconds(model: str, shape: Shape) -> dict[str, float]:
    """Of one call of each pass."""
    with contextlib.ExitStack() as stack:
        for module, name in KERNELS:
            stack.enter_context(patch.object(module, name, Nothing()))
        with torch.no_grad():
            token, _ = decode_call(model, shape)
            taken = {"decode": best(token)}
        path = kernel_call(model, shape)
        y = path.output()

        def backward() -> None:
            torch.autograd.grad(y, path.leaves, y, allow_unused=True, retain_graph=True)

        return taken | {"forward": best(path.call), "backward": best(backward)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=["yaad", "moneta", "memora"])
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    for model in args.models:
        taken = microseconds(model, Shape(1, 64, 4, 64, 64, dtype, args.device))
        print(f"{model}:", ", ".join(f"{part} {each:.0f} us" for part, each in taken.items()), flush=True)


if __name__ == "__main__":
    main()
