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
"""One call of a kernel, small enough for a tool that slows it down a hundredfold."""

import argparse

import memory_alone  # noqa: F401
import torch
from decoding import decode_call
from paths import PATHS, Shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", nargs="+", choices=["mlp_forward", "mlp_backward", "mlp_decode"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=129, help="of the forward and backward pass")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head_dim", type=int, default=64)
    args = parser.parse_args()
    shape = Shape(args.batch, args.tokens, args.heads, args.head_dim, 64)
    for kernel in args.kernels:
        with torch.set_grad_enabled(kernel == "mlp_backward"):
            if kernel == "mlp_decode":
                call, _ = decode_call("yaad", shape)
                for _ in range(34):  # over a chunk's end: the products are there
                    call()
            else:
                path = PATHS["yaad, Triton"](shape, 0)
                (path.training_step() if kernel == "mlp_backward" else path.call)()
        torch.cuda.synchronize()
    print("done", flush=True)


if __name__ == "__main__":
    main()
