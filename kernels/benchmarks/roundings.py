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
"""How far results in bfloat16 are off that are right: what `cases.py` allows on a device is a multiple of that.

    TRITON_INTERPRET=1 python kernels/benchmarks/roundings.py     # writes roundings.json beside it; minutes, no GPU

Forward and backward passes: the chunk form in PyTorch in float32, with the operands of every product rounded to bfloat16,
as in the kernels, and outputs and gradients rounded to the dtype that they come in; against float64. Decoding has no such
form, because only the fold at a chunk's end has products with rounded operands: there the kernel itself is taken, in Triton's
interpreter. The cases are those of the GPU script, with fewer rows and heads, and fewer chunks.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import memory_alone  # noqa: F401
import torch
from cases import CASES, DECODED, ROUNDINGS, Case, key
from comparison import STATE, TOKENS, Allowed, Comparison
from correctness import Prepared, compared_decode, flat
from paths import Shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from miras_hf.memory import chunk_miras


# products by the number of operands that come before their factors
PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "baddbmm": 1, "addmv": 1, "addbmm": 1}
EVERYTHING = Allowed(*3 * (float("inf"),))


class RoundedProducts(TorchDispatchMode):
    """In here operands of products are rounded to bfloat16, and sums are in float32; in derivatives, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in PRODUCTS:
            first = PRODUCTS[name]
            args = (*args[:first], *(rounded(x) for x in args[first : first + 2]), *args[first + 2 :])
        return func(*args, **(kwargs or {}))


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def emulated(prepared: Prepared, inputs=None, parameters=None, state=None):
    """Outputs and final state as kernels in bfloat16 give them."""
    inputs = inputs or [None if x is None else x.float() for x in prepared.inputs]
    with RoundedProducts():
        return chunk_miras(
            *inputs,
            rule=prepared.rule,
            parameters=parameters or prepared.parameters,
            initial_state=state or prepared.state,
            output_final_state=True,
            **prepared.where,
        )


@torch.no_grad()
def of_forward(case: Case) -> Comparison:
    prepared, found = Prepared(case), Comparison(case.shape.chunk_size)
    (y, state), (expected, after) = emulated(prepared), prepared.expected()
    found.add("y", y.to(case.shape.dtype), expected, EVERYTHING, TOKENS)
    for i, (one, other) in enumerate(zip(flat(state)[:-1], flat(after)[:-1], strict=True)):
        found.add(f"state {i}", one, other, EVERYTHING, STATE)
    return found


def of_backward(case: Case) -> Comparison:
    prepared, found = Prepared(case), Comparison(case.shape.chunk_size)
    for name, one, other, axes in zip(*gradients_of(prepared), strict=True):
        if other is not None:
            found.add(name, one, other, EVERYTHING, axes)
    return found


def gradients_of(prepared: Prepared) -> tuple[list[str], list[Tensor | None], list[Tensor | None], list]:
    """Names, gradients as kernels in bfloat16 give them, those in float64, and along which axes their blocks lie."""
    names, axes = prepared.differentiated()
    with RoundedProducts():
        got = prepared.gradients(
            lambda *given: emulated(prepared, *given)[0].to(prepared.case.shape.dtype), torch.float32
        )
    inputs = [*prepared.inputs, *[None] * (len(got) - len(prepared.inputs))]
    got = [g if x is None or g is None else g.to(x.dtype) for g, x in zip(got, inputs, strict=True)]
    return names, got, prepared.gradients(lambda *given: prepared.expected(*given)[0], torch.float64), axes


def wanted() -> Iterator[Case]:
    """Every case in bfloat16, with four rows of one head and six chunks at most."""
    for part, quick in ((part, quick) for quick in (False, True) for part in CASES):
        for case in CASES[part]("cpu", quick):
            if case.precision == "bf16":
                yield replace(case, shape=smaller(case), repeats=1)


def smaller(case: Case) -> Shape:
    shape, chunk = case.shape, case.shape.chunk_size
    if (
        case.kind == "decode"
    ):  # the first row's first token ends a chunk, and those behind it read what was rounded there
        head_dim = 64 if shape.head_dim <= 64 else 128
        return replace(shape, head_dim=head_dim, chunk_size=64, batch=2, heads=2, tokens=DECODED)
    batch = 1 if case.packed else min(max(shape.batch, 2), 4)
    return replace(
        shape,
        batch=batch,
        heads=1,
        tokens=min(max(shape.tokens, 2 * chunk + 5), (16 if case.packed else 6) * chunk + 7),
    )


def of_decode(case: Case) -> Comparison:
    return compared_decode(case, lambda name: EVERYTHING, singly=False)


MEASURES = {"forward": of_forward, "backward": of_backward, "decode": of_decode}


@torch.no_grad()
def right_norm(case: Case) -> float:
    """The norm of what is right: a case that has it is, under whatever name, the one that was measured."""
    return float(f"{Prepared(case).expected()[0].double().norm():.6g}")


def main() -> None:
    known: dict[str, dict] = json.loads(ROUNDINGS.read_text()) if ROUNDINGS.is_file() else {"errors": {}, "norms": {}}
    measured, norms, seen = known["errors"], known["norms"], set()
    for case in wanted():
        if key(case) in seen:
            continue
        seen.add(key(case))
        norm = right_norm(case)
        if key(case) in measured and math.isclose(norms.get(key(case), 0.0), norm, rel_tol=1e-4):
            continue
        found = MEASURES[case.kind](case)
        assert not found.complaints, found.complaints
        measured[key(case)] = {
            name: {kind: float(f"{value:.1e}") for kind, value in errors.items()}
            for name, errors in found.errors_of.items()
            if not name.startswith("link cache")
        }
        norms[key(case)] = norm
        print(key(case), measured[key(case)], flush=True)
        write(measured, norms)


def write(measured: dict[str, dict], norms: dict[str, float]) -> None:
    command = f"TRITON_INTERPRET=1 python kernels/benchmarks/{Path(__file__).name}"
    errors, right = (
        ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in of_cases.items())
        for of_cases in (measured, norms)
    )
    ROUNDINGS.write_text(
        f'{{"command": {json.dumps(command)}, "torch": "{torch.__version__}", "errors": {{\n{errors}\n}}, "norms": {{\n'
        f"{right}\n}}}}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
