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
"""The memory rule: the four choices of Miras in one object, and what it makes of a chunk of tokens.

A chunk has four steps, in this order: `weights`, `write`, `read`, `fold`. Their tensors have rows and heads in one axis,
`[rows * heads, tokens, features]`; what belongs to a layer of the memory is a tuple with one entry a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .architecture import Factors, Known, MemoryArchitecture, MLPMemory
from .attentional_bias import AttentionalBias, Dot, HuberMixture
from .exact import Exact, ExactGates
from .learning import Gates, GradientDescent, LearningAlgorithm, MomentumGates
from .retention import ChunkWeights, Decay, RetentionGate


# exp(80) is the largest factor 1/B_i that leaves float32 room for the numbers it multiplies: a factor of thousands, which
# unit keys and the steps that configs derive stay far below, and keys of norm 5 under steps of 1 do not
_LARGEST_CHUNK_LOG_DECAY = 160.0
_MIN_LOG_ALPHA = -2.5


def least_log_alpha(chunk_size: int) -> float:
    """The lowest bound of a token's log retention that chunks of so many tokens allow."""
    return -_LARGEST_CHUNK_LOG_DECAY / chunk_size


def default_min_log_alpha(chunk_size: int) -> float:
    """The bound of a token's log retention where nobody gives one."""
    return max(_MIN_LOG_ALPHA, least_log_alpha(chunk_size))


@dataclass(frozen=True)
class MirasRule:
    """A point of the Miras design space: what one head's memory is and how it learns while it reads.

    Args:
        architecture (`MemoryArchitecture`): choice (i).
        attentional_bias (`AttentionalBias`): choice (ii).
        retention (`RetentionGate`): choice (iii).
        algorithm (`GradientDescent`, `Momentum`, `DeltaRule`, `Implicit` or `Exact`): choice (iv).
        chunk_size (`int`, *optional*, defaults to 64):
            Tokens whose gradients are taken at the same weights (equation (28)), or with `DeltaRule` and `Implicit` at once. Part of
            the trained model: the grid starts at a sequence's first real token, in training, prefill and decoding alike.
        decay_target (`str`, *optional*, defaults to `"init"`):
            `"init"` decays toward the learned initial memory, `"zero"` toward zero as printed in the paper. Toward
            zero both layers of an MLP memory shrink into a saddle: over thousands of tokens it goes out (its reads
            return the query) or its reads become chaotic (runs in float32 and float64 end up unrelated).
        min_log_alpha (`float`, *optional*, defaults to -2.5): lower bound of a token's log retention; smaller is cut.
    """

    architecture: MemoryArchitecture = field(default_factory=MLPMemory)
    attentional_bias: AttentionalBias = field(default_factory=HuberMixture)
    retention: RetentionGate = field(default_factory=Decay)
    algorithm: LearningAlgorithm = field(default_factory=GradientDescent)
    chunk_size: int = 64
    decay_target: str = "init"
    min_log_alpha: float = _MIN_LOG_ALPHA

    def __post_init__(self):
        kinds = {
            "architecture": MemoryArchitecture,
            "attentional_bias": AttentionalBias,
            "retention": RetentionGate,
            "algorithm": LearningAlgorithm,
        }
        for name, kind in kinds.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"`{name}` must be a {kind.__name__}, got {value!r}.")
        if not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise ValueError(f"`chunk_size` must be an integer of at least 1, got {self.chunk_size}.")
        if self.decay_target not in ("init", "zero"):
            raise ValueError(f"`decay_target` must be 'init' or 'zero', got {self.decay_target!r}.")
        if not least_log_alpha(self.chunk_size) <= self.min_log_alpha <= 0:
            raise ValueError(
                f"`min_log_alpha` must lie between {-_LARGEST_CHUNK_LOG_DECAY} / chunk_size = "
                f"{least_log_alpha(self.chunk_size):g} and 0, got {self.min_log_alpha}."
            )
        refusal = self.retention.refusal(self.architecture)
        if refusal is not None:
            raise ValueError(
                f"`retention` must fit the architecture: {self.retention} {refusal}, got {self.architecture}."
            )
        refusal = self.algorithm.refusal(self.architecture, self.attentional_bias, self.retention)
        if refusal is not None:
            raise ValueError(
                f"`algorithm` must fit the other choices: {self.algorithm} {refusal}, got {self.architecture}, "
                f"{self.attentional_bias}, {self.retention}."
            )

        # made here, and not while a graph is traced, which would be compiled again
        self.written_axes, self.has_mean_gates, self.written_bias  # noqa: B018

    @property
    def least_log_alpha(self) -> float:
        """Where log retention is cut: at zero without a retention gate."""
        return self.min_log_alpha if self.retention.forgets else 0.0

    # looked up for every weight at every decoded token
    @cached_property
    def written_axes(self) -> tuple[str, ...]:
        """`gate_axes` of the weights that a text writes: states, their bases and what waits in slots are of these."""
        return self.architecture.gate_axes[self.architecture.fixed :]

    @cached_property
    def has_mean_gates(self) -> bool:
        """Whether any weight that is written has no `head_dim` axis, and so the mean of the channels' gates."""
        return "hidden" in self.written_axes

    def with_means(self, gates: Tensor) -> Tensor:
        """Steps or log retention `[..., c]`, one a channel, and behind them their mean, if any weight has that."""
        if gates.shape[-1] == 1 or not self.has_mean_gates:
            return gates
        return torch.cat((gates, gates.mean(-1, keepdim=True)), dim=-1)

    def chunk_gates(self, eta: Tensor, *logs: Tensor) -> Gates | MomentumGates | ExactGates:
        """Those of the algorithm, see `LearningAlgorithm.chunk_gates`, of all weights together; as the next two."""
        return self.algorithm.chunk_gates(*map(self.with_means, (eta, *logs)))

    def step_gates(
        self, eta: Tensor, log_decay: Tensor, now: Tensor, *logs: Tensor
    ) -> Gates | MomentumGates | ExactGates:
        return self.algorithm.step_gates(*map(self.with_means, (eta, log_decay, now, *logs)))

    def own_gates(self, eta: Tensor) -> Gates | MomentumGates | ExactGates:
        return self.algorithm.own_gates(self.with_means(eta))

    def gates_of(self, layer: int, gates: Gates | MomentumGates | ExactGates) -> Gates | MomentumGates | ExactGates:
        """A weight's part of them."""
        if gates.decay.shape[-1] == 1 or not self.has_mean_gates:
            return gates
        part = slice(-1, None) if self.architecture.gate_axes[layer] == "hidden" else slice(None, -1)
        return type(gates)(*(x[..., part] if isinstance(x, Tensor) else x for x in gates))

    def hidden_axis(self, layer: int) -> int:
        """Of a weight, those that are not written counted."""
        return -1 if self.architecture.gate_axes[layer] == "input" else -2

    def weights(self, states: Sequence[Tensor], base: Sequence[Tensor | None]) -> tuple[ChunkWeights, ...]:
        """The weights of a chunk, from the states at its start and what the dual ones are deviations from.

        Args:
            states (sequence of `torch.Tensor`): the dual states, and behind them the momenta, if the algorithm has any.
        """
        layers, fixed = len(base), self.architecture.fixed
        weights = tuple(
            self.retention.at_chunk_start(state, from_base, self.hidden_axis(layer))
            for layer, (state, from_base) in enumerate(zip(states[:layers], base, strict=True), start=fixed)
        )
        if not self.algorithm.has_second_matrix:
            return weights
        return tuple(
            w._replace(momentum=self.retention.writes_matrix(w, held, self.hidden_axis(layer)))
            for layer, (w, held) in enumerate(zip(weights, states[layers:], strict=True), start=fixed)
        )

    def write(
        self,
        weights: Sequence[ChunkWeights],
        k: Tensor,
        v: Tensor,
        delta: Tensor | None,
        norm: Sequence[Tensor],
        gates: Gates | None = None,
        known: Known | None = None,
        erase: Tensor | None = None,
    ) -> tuple[Factors, ...]:
        """The gradients of the tokens' losses, at the chunk's start or at their own times.

        Args:
            norm (sequence of `torch.Tensor`): of `MemoryParameters.norm`, here and wherever memories are read.
            gates (`Gates`, *optional*): `chunk_gradient_gates` of the algorithm.
            known (`Known`, *optional*): slots whose gradients an earlier call has taken.
            erase (`torch.Tensor`, as `k`, *optional*): the keys of which errors are taken, of algorithms that have them.
        """

        def residual(prediction: Tensor) -> Tensor:
            return self._residual(prediction, v, delta)

        if gates is not None:
            return (self.algorithm.write(weights[0], k, residual, gates, known, erase),)
        affine, fixed = norm[:2], norm[2:]
        factors = self.architecture.write((*fixed, *(w.weight for w in weights)), k, residual, *affine)
        return factors if known is None else known.into(factors)

    def write_token(
        self,
        weights: Sequence[ChunkWeights],
        factors: Sequence[Factors],
        k: Tensor,
        v: Tensor,
        delta: Tensor | None,
        norm: Sequence[Tensor],
        gates: Gates | None,
        erase: Tensor | None = None,
    ) -> tuple[Factors, ...]:
        """`write` for one token a row, behind what waits in the slots of its chunk.

        Args:
            gates (`Gates`, *optional*): `step_gradient_gates` of the algorithm.
        """
        if gates is None:
            return self.write(weights, k, v, delta, norm)
        asked = k if erase is None else erase
        return (Factors(k, self._residual(self.read(weights, factors, asked, gates, norm), v, delta)),)

    @cached_property
    def written_bias(self) -> AttentionalBias:
        """The loss whose gradients are written: the rule's, or, where a regression is solved, the one whose gradients add up
        to the right-hand side of its normal equations."""
        return Dot(residual_clip=None) if self.algorithm.has_covariance else self.attentional_bias

    def _residual(self, prediction: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        bias = self.written_bias
        return bias.residual(bias.error(prediction, v), delta)

    def recall_to_write(
        self,
        weights: Sequence[ChunkWeights],
        k: Tensor,
        v: Tensor,
        delta: Tensor | None,
        norm: Sequence[Tensor],
        gates: Gates | None,
        erase: Tensor | None = None,
    ) -> Tensor:
        """What the memory returns for the keys, or the erase keys, where the tokens' gradients are taken. Arguments as of `write`."""
        if gates is None:
            return self.recall(weights, k, norm)
        return v + self.write(weights, k, v, delta, norm, gates, erase=erase)[0].gradients

    def read(
        self,
        weights: Sequence[ChunkWeights],
        factors: Sequence[Factors],
        q: Tensor,
        gates: Gates | MomentumGates | ExactGates,
        norm: Sequence[Tensor],
    ) -> Tensor:
        """What the memory returns for each query, at the query's own time."""
        axes, affine, fixed = self.architecture.gate_axes, norm[:2], norm[2:]
        if isinstance(self.algorithm, Exact):
            q = self.algorithm.asked(weights[0], factors[0].inputs, q, gates, norm[0])

        def linear(layer: int, x: Tensor) -> Tensor:
            if layer < len(fixed):
                return x @ fixed[layer]
            own = weights[layer - len(fixed)]
            written = self.retention.writes(own, factors[layer - len(fixed)], self.hidden_axis(layer))
            return self.algorithm.read(axes[layer], own, written, x, self.gates_of(layer, gates))

        return self.architecture.read(linear, q, *affine)

    def recall(self, weights: Sequence[ChunkWeights], x: Tensor, norm: Sequence[Tensor]) -> Tensor:
        """What the memory returns at the chunk's start, before the chunk's writes and its decay."""
        at_start = (*norm[2:], *(w.weight for w in weights))
        if isinstance(self.algorithm, Exact):
            x = self.algorithm.solved(weights[0].momentum.unsqueeze(1), x, norm[0])
        return self.architecture.read(lambda layer, h: h @ at_start[layer], x, *norm[:2])

    def fold(
        self,
        states: Sequence[Tensor],
        factors: Sequence[Factors],
        gates: Gates | MomentumGates | ExactGates,
        chunk_ends: bool = True,
    ) -> tuple[Tensor, ...]:
        """The states after the chunk, or after those of its tokens that have been read if it has not ended."""
        layers, fixed = len(factors), self.architecture.fixed
        slots = [
            self.algorithm.fold(axis, tuple(states[i::layers]), factors[i], self.gates_of(fixed + i, gates))
            for i, axis in enumerate(self.written_axes)
        ]
        if chunk_ends:
            slots = [(self.retention.at_chunk_end(dual, self.chunk_size), *held) for dual, *held in slots]
        return tuple(state for of_kind in zip(*slots, strict=True) for state in of_kind)
