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


class Gates(NamedTuple):
    """Retention and step of the tokens of a chunk, `B` the decay since its start, last axis `head_dim` or 1.

    Args:
        decay (`torch.Tensor` of shape `[..., queries, c]`): B_t of the tokens that read.
        query (`torch.Tensor` of shape `[..., queries, c]`, *optional*): B_t over a common reference decay.
        key (`torch.Tensor` of shape `[..., tokens, c]`): eta_i times that reference over B_i.
        causal (`bool`): whether token t reads the writes up to its own only.
        fold (`torch.Tensor` of shape `[..., tokens, c]`, *optional*): eta_i B_C / B_i, for the chunk's end.
        total (`torch.Tensor` of shape `[..., 1, c]`, *optional*): B_C.
    """

    decay: Tensor
    query: Tensor | None
    key: Tensor
    causal: bool
    fold: Tensor | None = None
    total: Tensor | None = None

    def split(self, sizes: list[int]) -> list["Gates"]:
        """The gates of consecutive groups of rows."""
        parts = [x.split(sizes) if isinstance(x, Tensor) else [x] * len(sizes) for x in self]
        return [Gates(*part) for part in zip(*parts, strict=True)]


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
        key = eta / query
        return Gates(query * half, query, key, True, key * half, half * half)

    def step_gates(self, eta: Tensor, log_decay: Tensor, log_decay_now: Tensor) -> Gates:
        """Gates of one token `[..., 1, c]` that reads the tokens `[..., chunk_size, c]` of its chunk so far."""
        return Gates(torch.exp(log_decay_now), None, eta * torch.exp(log_decay_now - log_decay), False)

    def read(self, gate_axis: str, weights: ChunkWeights, factors: Factors, x: Tensor, gates: Gates) -> Tensor:
        """`x_t W_t` of one layer, all of shape `[rows, tokens, features]`.

        Channel gates on the input axis act on x, those on the output axis on the result, so that W_t is never formed:

            input:   (x_t B_t) W - sum_{i<=t} [(x_t B_t) . (x_i eta_i / B_i)] dz_i
            output:  B_t (x_t W) - B_t sum_{i<=t} (x_t . x_i) (dz_i eta_i / B_i)
        """
        inputs, gradients = factors if weights.writes is None else weights.writes(factors)
        scores_of, decayed = x, x
        on_input = gate_axis == "input"
        if on_input:
            if weights.scale is not None:
                x = x * weights.scale
            scores_of = x if gates.query is None else x * gates.query
            inputs = inputs * gates.key
            decayed = x * gates.decay
        else:
            gradients = gradients * gates.key
        scores = torch.bmm(scores_of, inputs.mT)
        if gates.causal:
            scores = torch.tril(scores)
        if on_input:
            z = torch.bmm(scores, gradients).neg_()
            if weights.decaying is not None:
                z = z.baddbmm_(decayed, weights.decaying)
            if weights.constant is not None:
                z = z.baddbmm_(x, weights.constant)
            return z
        writes = torch.bmm(scores, gradients)
        if gates.query is not None:
            writes = writes * gates.query
        if weights.decaying is None:
            z = torch.baddbmm(writes, x, weights.constant, beta=-1)
        else:
            z = torch.addcmul(writes, torch.bmm(x, weights.decaying), gates.decay, value=-1).neg_()
            if weights.constant is not None:
                z = z.baddbmm_(x, weights.constant)
        return z if weights.scale is None else z * weights.scale

    def fold(self, gate_axis: str, state: Tensor, factors: Factors, gates: Gates) -> Tensor:
        """The dual state after the chunk: `B_C o state - sum_i (B_C / B_i) eta_i o g_i`."""
        inputs, gradients = factors
        if gate_axis == "input":
            return torch.baddbmm(state * gates.total.mT, (inputs * gates.fold).mT, gradients, alpha=-1)
        return torch.baddbmm(state * gates.total, inputs.mT, gradients * gates.fold, alpha=-1)


LEARNING_ALGORITHMS: dict[str, type] = {"gradient_descent": GradientDescent}
