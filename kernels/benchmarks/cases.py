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
"""What the GPU script checks, in order: a memory at a shape, and what is asked of the call beside."""

import functools
import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from comparison import Allowed
from paths import MODELS, TIMED, Shape

from miras_kernels.choices import CHUNK_SIZES, HEAD_DIMS


@dataclass(frozen=True)
class Case:
    """One row of the correctness steps, `repeats` calls that have to agree to the bit.

    Args:
        kind (`str`): `"forward"`, `"backward"` or `"decode"`.
        model (`str`): one of `MODELS`.
        shape (`Shape`): bfloat16 inputs if the precision is `"bf16"`, float32 if not.
        precision (`str`): operands of the products.
        gates (`str`): `"channel"` or `"head"`.
        padded (`bool`): rows have pads behind their tokens; at decoding some have no token.
        packed (`bool`): sequences of different lengths lie in one row.
        continued (`bool`): every row goes on from a state in the middle of a chunk, each at a phase of its own.
        narrow (`bool`): the parameters are in bfloat16, as those of a bfloat16 model.
        rotary (`bool`): decoding turns queries and keys, which models do not by default.
        margin (`float`): how many times what is allowed of results is allowed, where only their order is asked for.
    """

    kind: str
    model: str
    shape: Shape
    precision: str = "bf16"
    gates: str = "channel"
    padded: bool = False
    packed: bool = False
    continued: bool = False
    narrow: bool = False
    rotary: bool = True
    repeats: int = 10
    margin: float = 1.0

    def __post_init__(self):
        if self.kind == "decode":
            object.__setattr__(self, "shape", replace(self.shape, tokens=min(DECODED, self.shape.tokens)))

    def __str__(self) -> str:
        asked = [name for name in ("padded", "packed", "continued", "narrow") if getattr(self, name)]
        asked += [] if self.rotary else ["no rotary"]
        words = [f"{self.kind} of {self.model}", str(self.shape), self.precision, f"{self.gates} gates", *asked]
        return ", ".join(words)

    def allowed(self, name: str) -> Allowed:
        """Errors of one result: `"y"`, `"state 0"`, or of gradients what they are of.

        Raises:
            `ValueError`: if nobody has measured what is right in bfloat16.
        """
        if self.precision == "bf16":
            measured = roundings().get(key(self), {}).get(name)
            if measured is None:
                raise ValueError(f"{ROUNDINGS.name} lacks {name!r} of {key(self)!r}: `roundings.py` adds it.")
            allowed = Allowed(*(HEADROOM[kind] * measured[kind] for kind in HEADROOM)).at_least(FLOAT32)
            return allowed.times(self.margin)
        allowed = (KL_ALLOWED if self.model == "memora" else ALLOWED)[self.precision].times(self.margin)
        # gradients of begun chunks, in a state, are differences of reads
        return allowed.times(GRADIENT) if self.kind == "backward" else allowed.times(1.0 if name == "y" else 3.0)


def key(case: Case) -> str:
    """What a case's errors in bfloat16 depend on: not on numbers of rows, tokens and heads, nor on how parameters are kept;
    of decoding, which rounds operands in the fold alone, on the model and about the width."""
    if case.kind == "decode":
        return f"decode of {case.model}, {64 if case.shape.head_dim <= 64 else 128}"
    asked = [name for name in ("padded", "packed", "continued") if getattr(case, name)]
    words = [
        f"{case.kind} of {case.model}",
        f"{case.shape.head_dim}, C {case.shape.chunk_size}",
        f"{case.gates} gates",
    ]
    return ", ".join([*words, *asked])


@functools.cache
def roundings() -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(ROUNDINGS.read_text(encoding="utf-8"))["errors"]


ROUNDINGS = Path(__file__).with_name("roundings.json")
"""Errors in bfloat16 of results that are right, by case and result; `roundings.py` measures them."""
HEADROOM = {"largest": 4.0, "norm": 3.0, "block": 4.0}
"""How many times further off a device may be, which adds in another order: in what are extremes there of more heads."""
# KL's reads are small differences of its weights. The largest error is what tests of one precision allow everywhere.
ALLOWED = {
    "ieee": Allowed(1e-5, 1e-5, 3e-5),
    "tf32x3": Allowed(5e-5, 5e-5, 1.5e-4),
    "tf32": Allowed(2e-2, 5e-3, 1.5e-2),
}
KL_ALLOWED = {
    "ieee": Allowed(5e-5, 5e-5, 1.5e-4),
    "tf32x3": Allowed(2e-4, 2e-4, 6e-4),
    "tf32": Allowed(5e-2, 1.5e-2, 5e-2),
}
FLOAT32 = KL_ALLOWED["ieee"].times(3.0)
"""Of what is float32 whatever the precision, and where rounding of operands does no more."""
GRADIENT = 3.0
"""How much more gradients may err than outputs."""
KINDS = ("forward", "backward", "decode")
DECODED = 9
"""Tokens that a check decodes, over the end of a chunk."""


def main_cases(device: str, quick: bool) -> list[Case]:
    """d = C = 64 in bfloat16, 128 programs and more than a thousand tokens: every family, then every kind of call."""
    if quick:
        shape = Shape(1, 18, 1, 32, 16, device=device)
        return [
            Case("forward", "yaad", shape, repeats=2),
            *(Case("forward", model, replace(shape, tokens=9), repeats=1) for model in MODELS if model != "yaad"),
            Case("backward", "memora", replace(shape, tokens=9), repeats=1),
            Case("backward", "yaad", replace(shape, tokens=9), gates="head", padded=True, continued=True, repeats=1),
            Case("decode", "yaad", replace(shape, batch=2, tokens=2), padded=True, repeats=2),
            Case("decode", "moneta", replace(shape, tokens=2), gates="head", repeats=1),
            Case("forward", "matrix", shape, packed=True, continued=True, repeats=1),
        ]
    shape = Shape(8, 1031, 16, 64, 64, device=device)
    plain = [Case(kind, model, shape) for model, kind in itertools.product(MODELS, KINDS)]
    one_row = replace(shape, batch=1, tokens=shape.batch * shape.tokens)
    return [
        *plain,
        *(Case(kind, "yaad", shape, gates="head", padded=True, continued=True) for kind in KINDS),
        *(Case(kind, "memora", one_row, packed=True, continued=True) for kind in KINDS[:2]),
        *(Case(kind, "moneta", shape, gates="head", padded=True) for kind in KINDS),
        *(Case(kind, "matrix", one_row, gates="head", packed=True, continued=True) for kind in KINDS[:2]),
        *(Case(kind, "delta", shape, gates="head", padded=True, continued=True) for kind in KINDS),
        Case("forward", "memora", shape, narrow=True),
        Case("decode", "memora", shape, narrow=True, rotary=False),
    ]


def more_cases(device: str, quick: bool) -> list[Case]:
    """d = 128 in bfloat16; then the other widths and chunks, and the other precisions at two widths."""
    if quick:
        shape = Shape(1, 17, 1, 32, 16, torch.float32, device)
        decoded = Case("decode", "memora", replace(shape, tokens=2), "tf32x3", repeats=1)
        return [Case("backward", "matrix", shape, "ieee", repeats=1), decoded]
    wide = Shape(8, 1031, 16, 128, 64, device=device)
    found = [Case(kind, model, wide) for model, kind in itertools.product(MODELS, KINDS)]
    for head_dim, chunk_size in itertools.product(HEAD_DIMS, CHUNK_SIZES):
        shape = Shape(4, 6 * chunk_size + 7, 8, head_dim, chunk_size, device=device)
        if (head_dim, chunk_size) not in ((64, 64), (128, 64)):
            found += [Case(kind, "yaad", shape) for kind in KINDS]
    for head_dim, precision in itertools.product((64, 128), ("tf32x3", "ieee", "tf32")):
        shape = Shape(4, 263, 8, head_dim, 64, torch.float32, device)
        found += [Case(kind, model, shape, precision) for model, kind in itertools.product(TIMED, KINDS)]
    return found


CASES = {"main": main_cases, "more": more_cases}
