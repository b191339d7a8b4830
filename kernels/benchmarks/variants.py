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
"""Launches of the main kernels beside the configured ones, one thing changed at a time, each compared with those.

`kernels/tune.py` searches further, and writes configurations.
"""

from collections.abc import Callable
from functools import partial

import compilations
import memory_alone  # noqa: F401
import torch
from clock import per_call
from comparison import Allowed
from decoding import decode_call
from launches import changed, launching
from outcomes import WRONG, NotChecked
from paths import PATHS, Shape
from record import begin
from triton.runtime.errors import OutOfResources

from miras_kernels.configuration import launch_configuration


KERNELS = ("mlp_forward", "mlp_backward", "mlp_decode")
QUICK = {"mlp_forward": 2, "mlp_backward": 0, "mlp_decode": 1}
"""Launches of each that a quick run looks at: in the interpreter they are all the same."""
# of a result whose sums run in another order and whose operands round differently
ALLOWED = Allowed(3e-2, 2e-2, 3e-2)


def main() -> None:
    record, args = begin(__doc__, report)
    if args.device == "cuda":
        compilations.follow(record.facts)
    for kernel in KERNELS:
        shape = shape_of(kernel, args.quick, args.device)
        shipped = configured(kernel, shape)
        for launch in changed(shipped)[: QUICK[kernel] if args.quick else None]:
            record.check(f"{kernel} {words(launch)}", partial(measure, kernel, shape, launch, shipped))


def shape_of(kernel: str, quick: bool, device: str) -> Shape:
    tokens = 1 if kernel == "mlp_decode" else 9 if quick else 2048
    return Shape(1, tokens, 1, 32, 16, device=device) if quick else Shape(8, tokens, 16, 64, 64, device=device)


def configured(kernel: str, shape: Shape) -> dict[str, int]:
    where = {"head_dim": shape.head_dim, "chunk_size": shape.chunk_size, "precision": "bf16"}
    return launch_configuration(kernel, device=torch.device(shape.device), **where)


def words(launch: dict[str, int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in launch.items() if key != "enable_fp_fusion")


def call_of(kernel: str, shape: Shape) -> Callable:
    """What is timed: for a backward kernel with the forward pass before it."""
    if kernel == "mlp_decode":
        return decode_call("yaad", shape)[0]
    path = PATHS["yaad, Triton"](shape, 0)
    return path.training_step() if kernel == "mlp_backward" else path.call


def measure(kernel: str, shape: Shape, launch: dict[str, int], shipped: dict[str, int]) -> dict:
    row = {"kernel": kernel, "launch": launch, "shipped": launch == shipped}
    try:
        with torch.set_grad_enabled(kernel == "mlp_backward"):
            with launching(kernel, launch):
                call = call_of(kernel, shape)
                got = outputs(call())
                found = per_call([call], shape.device, replays=24 if shape.device == "cuda" else 1)
            wanted = got if launch == shipped else outputs(call_of(kernel, shape)())
    except OutOfResources as error:
        raise NotChecked(f"does not fit: {error}") from error
    found.pop("samples")
    errors = [norm_error(one, other) for one, other in zip(got, wanted, strict=True)]
    row |= found | {"differs": max(errors)}
    if not row["differs"] <= ALLOWED.norm:
        row |= {"outcome": WRONG, "why": f"differs from the configured launch by {row['differs']:.1e} of the norm"}
    return row


def once(kernel: str, shape: Shape, launch: dict[str, int]) -> dict:
    """One call, whose binary is in the cache afterwards."""
    try:
        with torch.set_grad_enabled(kernel == "mlp_backward"), launching(kernel, launch):
            call_of(kernel, shape)()
            if shape.device == "cuda":
                torch.cuda.synchronize()
    except OutOfResources as error:
        raise NotChecked(f"does not fit: {error}") from error
    return {}


def outputs(given) -> list[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        return [given.float()]
    flat = [each for x in given for each in (x if isinstance(x, (tuple, list)) else (x,))]
    return [x.float() for x in flat if isinstance(x, torch.Tensor) and x.is_floating_point()]


def norm_error(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm().clamp(min=1e-30)).item()


def report(rows: list[dict]) -> list[str]:
    lines = ["| launch | ms (quartiles) | over the configured | differs by | |", "|" + " --- |" * 5]
    shipped = {row["kernel"]: row["ms"] for row in rows if row.get("shipped")}
    for row in rows:
        times = [""] * 3
        if "ms" in row:
            times = [f"{row['ms']:.4f} ({row['low']:.4f}-{row['high']:.4f})"]
            times += [f"{row['ms'] / shipped[row['kernel']]:.2f}" if row["kernel"] in shipped else ""]
            # what is no number has been made a word
            times += [f"{row['differs']:.1e}" if isinstance(row["differs"], float) else row["differs"]]
        lines.append("| " + " | ".join([row["what"], *times, row["outcome"]]) + " |")
    return lines


if __name__ == "__main__":
    main()
