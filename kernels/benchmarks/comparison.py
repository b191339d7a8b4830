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
"""What a kernel gives against float64: the largest error, the error's norm, and the norm in the worst block alone.

The norm of everything hides what one missing barrier does: a tile of one program, in a thousand that are right. So errors
are also taken block by block, a chunk of one head or one head's state, and the worst is named.
"""

import torch
from torch import Tensor


NOTHING = 1e-6
"""Of a result's natural scale: what is expected and has no larger number is nothing, but for rounding."""


class Allowed:
    """Errors relative to the reference's largest entry, to its norm, and to the norm of a block of average size."""

    def __init__(self, largest: float, norm: float, block: float):
        self.largest, self.norm, self.block = largest, norm, block

    def times(self, factor: float) -> "Allowed":
        return Allowed(self.largest * factor, self.norm * factor, self.block * factor)

    def at_least(self, other: "Allowed") -> "Allowed":
        return Allowed(*(max(getattr(x, kind) for x in (self, other)) for kind in ("largest", "norm", "block")))


class Comparison:
    """Collects named tensors and what is wrong with them, for one row."""

    def __init__(self, chunk_size: int):
        self.chunk_size = chunk_size
        self.errors: dict[str, float] = {"largest": 0.0, "norm": 0.0, "block": 0.0}
        self.errors_of: dict[str, dict[str, float]] = {}
        self.complaints: list[str] = []

    def add(
        self,
        name: str,
        got: Tensor | None,
        expected: Tensor,
        allowed: Allowed,
        axes: tuple[int, ...],
        scale: float = 0.0,
    ) -> None:
        """Compares a tensor with what it should be.

        Args:
            axes (`tuple` of `int`): along which blocks lie; of axis 1 of a token's tensor chunk by chunk.
            scale (`float`, *optional*): how large such a number is by nature. Where nothing is expected, errors are relative
                to that: of rounding, relative to what is nothing, would come any number. Without it, only zeros are.
        """
        if got is None or got.shape != expected.shape:
            shape = None if got is None else tuple(got.shape)
            self.complaints.append(f"{name} has shape {shape}, expected {tuple(expected.shape)}")
            return
        if not expected.numel():
            return
        broken = int((~torch.isfinite(got)).sum())
        if broken:
            first = tuple((~torch.isfinite(got)).nonzero()[0].tolist())
            self.complaints.append(f"{name}: {broken} of {got.numel()} numbers are not finite, the first at {first}")
            return
        expected = expected.detach().double()
        if not torch.isfinite(expected).all():
            self.complaints.append(f"{name}: the reference is not finite")
            return
        difference = got.detach().double() - expected
        if scale and expected.abs().max() <= NOTHING * scale:
            expected = torch.full_like(expected, scale)
        errors, sizes = (self.block_norms(x, axes) for x in (difference, expected))
        blocks = (errors / sizes.square().mean().sqrt().clamp(min=1e-30)).flatten()
        found = {
            "largest": (difference.abs().max() / expected.abs().max().clamp(min=1e-30)).item(),
            "norm": (difference.norm() / expected.norm().clamp(min=1e-30)).item(),
            "block": blocks.max().item(),
        }
        self.errors_of[name] = found
        for kind, value in found.items():
            self.errors[kind] = max(self.errors[kind], value)
            if not value <= getattr(allowed, kind):
                text = f"{name}: {kind} error {value:.1e}, allowed {getattr(allowed, kind):.1e}"
                if kind == "block":
                    where = torch.unravel_index(blocks.argmax(), errors.shape)
                    text += f", worst in block {tuple(int(i) for i in where)} of axes {axes}"
                self.complaints.append(text)

    def block_norms(self, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        if 1 in axes and x.dim() >= 3 and x.shape[1] > self.chunk_size and axes == TOKENS:
            pad = -x.shape[1] % self.chunk_size
            x = torch.cat((x, x.new_zeros(x.shape[0], pad, *x.shape[2:])), 1)
            x = x.unflatten(1, (-1, self.chunk_size)).transpose(1, 2).flatten(1, 1)
            # [batch, chunk_size, chunks, heads, ...]
            x = x.movedim(1, -1)
        others = tuple(axis for axis in range(x.dim()) if axis not in axes)
        return x.square().sum(others).sqrt() if others else x.abs()

    def equal(self, name: str, one: Tensor, other: Tensor, repeat: int) -> None:
        """Complains if two results of the same call differ in a bit."""
        if not torch.equal(one, other):
            different = int((one != other).sum())
            self.complaints.append(f"{name}: repeat {repeat} gives {different} other numbers of {one.numel()}")

    def row(self) -> dict:
        found = {kind: float(f"{value:.2e}") for kind, value in self.errors.items()}
        if self.complaints:
            found |= {"outcome": "wrong", "why": "; ".join(self.complaints)[:900]}
        return found


# axes of the blocks: of a token's tensor [batch, tokens, heads, ...], of a state's [rows, heads, ...], of a parameter's
TOKENS, STATE, PARAMETER = (0, 1, 2), (0, 1), (0,)
