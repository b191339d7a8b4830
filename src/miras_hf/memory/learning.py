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
"""Choice (iv) of Miras: the learning algorithm, how the memory steps on the gradients of what it reads.

An algorithm answers two questions, both in matrix products over the tokens of a chunk: what does a layer of the
memory return at every token's own time (`read`), and what is its state when the chunk is over (`fold`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .architecture import Factors
from .retention import ChunkWeights
from .vjp import in_transform


class Gates(NamedTuple):
    """Retention and step of the tokens of a chunk, `B` the decay since its start, last axis `head_dim` or 1.

    Args:
        decay (`torch.Tensor` of shape `[..., queries, c]`): B_t of the tokens that read.
        query (`torch.Tensor` of shape `[..., queries, c]`, *optional*): B_t over a common reference decay.
        key (`torch.Tensor` of shape `[..., tokens, c]`): eta_i times that reference over B_i.
        sees (`str`): the writes that token t reads: `"all"`, `"past"` up to its own, or its `"own"` alone.
        fold (`torch.Tensor` of shape `[..., tokens, c]`, *optional*): eta_i B_C / B_i, for the chunk's end.
        total (`torch.Tensor` of shape `[..., 1, c]`, *optional*): B_C.
    """

    decay: Tensor
    query: Tensor | None
    key: Tensor
    sees: str
    fold: Tensor | None = None
    total: Tensor | None = None

    def split(self, sizes: list[int]) -> list["Gates"]:
        """The gates of consecutive groups of rows."""
        parts = [x.split(sizes) if isinstance(x, Tensor) else [x] * len(sizes) for x in self]
        return [Gates(*part) for part in zip(*parts, strict=True)]

    def broken_from(self, broken: Tensor) -> "Gates":
        """The gates, NaN at the tokens that read a chunk which is broken, and at the end of such a chunk.

        Args:
            broken (`torch.Tensor` of shape `[..., tokens, 1]`, bool): of `hold_broken`.
        """

        def spoilt(gate: Tensor | None, where: Tensor) -> Tensor | None:
            return None if gate is None else torch.where(where, torch.nan, gate)

        return self._replace(
            decay=torch.where(broken, torch.nan, self.decay),
            query=spoilt(self.query, broken),
            total=spoilt(self.total, broken[..., -1:, :]),
        )


@dataclass(frozen=True)
class GradientDescent:
    """One step on each token's own gradient: `A_t = alpha_t o A_{t-1} - eta_t o g_t`."""

    def chunk_gates(self, eta: Tensor, log_decay: Tensor) -> Gates:
        """Gates of whole chunks.

        Args:
            eta (`torch.Tensor` of shape `[..., chunk_size, c]`): step of every token.
            log_decay (`torch.Tensor` of shape `[..., chunk_size, c]`): log B_t, cumulative inside the chunk.
        """
        # exponents are taken relative to half the chunk's decay: their range is halved, and 1/B_i stays finite for
        # every log alpha the rule allows
        reference = 0.5 * log_decay[..., -1:, :]
        query = torch.exp(log_decay - reference)
        half = torch.exp(reference)
        # not eta / query: the derivative of the quotient would square a factor that may be exp(80)
        key = eta * torch.exp(reference - log_decay)
        return Gates(query * half, query, key, "past", key * half, half * half)

    def step_gates(self, eta: Tensor, log_decay: Tensor, log_decay_now: Tensor) -> Gates:
        """Gates of one token `[..., 1, c]` that reads the tokens `[..., chunk_size, c]` of its chunk so far."""
        return Gates(torch.exp(log_decay_now), None, eta * torch.exp(log_decay_now - log_decay), "all")

    def own_gates(self, eta: Tensor) -> Gates:
        """Gates of tokens `[..., tokens, c]` of which each reads its own write alone, before anything decays."""
        return Gates(torch.ones_like(eta), None, eta, "own")

    def read(self, gate_axis: str, weights: ChunkWeights, factors: Factors, x: Tensor, gates: Gates) -> Tensor:
        """`x_t W_t` of one layer, all of shape `[rows, tokens, features]`.

        Channel gates on the input axis act on x, those on the output axis on the result, so that W_t is never formed:

            input:   (x_t B_t) W - sum_{i<=t} [(x_t B_t) . (x_i eta_i / B_i)] dz_i
            output:  B_t (x_t W) - B_t sum_{i<=t} (x_t . x_i) (dz_i eta_i / B_i)

        Factors are those that the link has made of the chunk's.
        """
        inputs, gradients = factors
        if gate_axis == "input":
            if weights.scale is not None:
                x = x * weights.scale
            scores = scores_of(x if gates.query is None else x * gates.query, inputs * gates.key, gates.sees)
            z = torch.bmm(scores, gradients)
            if weights.decaying is not None:
                z = _plus_product(z, x * gates.decay, weights.decaying)
            return z if weights.constant is None else _plus_product(z, x, weights.constant)
        scores = scores_of(x, inputs, gates.sees)
        z = torch.bmm(scores, gradients * gates.key)
        if gates.query is not None:
            z = z * gates.query
        if weights.decaying is not None:
            z = torch.addcmul(z, torch.bmm(x, weights.decaying), gates.decay)
        if weights.constant is not None:
            z = _plus_product(z, x, weights.constant)
        return z if weights.scale is None else z * weights.scale

    def fold(self, gate_axis: str, state: Tensor, factors: Factors, gates: Gates) -> Tensor:
        """The dual state after the chunk: `B_C o state - sum_i (B_C / B_i) eta_i o g_i`."""
        inputs, gradients = factors
        if gate_axis == "input":
            return _plus_product(state * gates.total.mT, (inputs * gates.fold).mT, gradients, alpha=-1)
        return _plus_product(state * gates.total, inputs.mT, gradients * gates.fold, alpha=-1)


def _plus_product(z: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """`z + alpha a b`; may write into z, but not where `torch.func.vmap` batches the factors and not z."""
    return torch.baddbmm(z, a, b, alpha=alpha) if in_transform() else z.baddbmm_(a, b, alpha=alpha)


def scores_of(x: Tensor, keys: Tensor, sees: str) -> Tensor:
    """`-x_t . keys_i` of the i that token t sees of the writes, which go against the gradient."""
    if sees == "own":
        return torch.diag_embed((x * keys).sum(-1)).neg_()
    scores = torch.bmm(x, keys.mT)
    return (scores.tril_() if sees == "past" else scores).neg_()


LEARNING_ALGORITHMS: dict[str, type] = {"gradient_descent": GradientDescent}
