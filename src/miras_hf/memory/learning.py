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

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .architecture import Factors, Known, MemoryArchitecture, Residual
from .attentional_bias import AttentionalBias
from .declared import Choice
from .retention import ChunkWeights, RetentionGate
from .vjp import in_transform


class Gates(NamedTuple):
    """Retention and step size of the tokens of a chunk, `B` the decay since its start, last axis `head_dim` or 1.

    Args:
        decay (`torch.Tensor` of shape `[..., queries, c]`): B_t of the tokens that read.
        query (`torch.Tensor` of shape `[..., queries, c]`, *optional*): B_t over a common reference decay.
        key (`torch.Tensor` of shape `[..., tokens, c]`): eta_i times that reference over B_i.
        sees (`str`):
            The writes that token t reads: `"all"`, `"past"` up to its own, those `"before"` it, or its `"own"` alone.
        fold (`torch.Tensor` of shape `[..., tokens, c]`, *optional*): eta_i B_C / B_i, for the chunk's end.
        total (`torch.Tensor` of shape `[..., 1, c]`, *optional*): B_C.
    """

    decay: Tensor
    query: Tensor | None
    key: Tensor
    sees: str
    fold: Tensor | None = None
    total: Tensor | None = None

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
class LearningAlgorithm(Choice):
    """Base class: gradients at a chunk's start, of any memory and loss."""

    has_momentum: ClassVar[bool] = False
    """Whether a layer's state has a second matrix besides the dual state, momentum, with a gate of its own."""

    has_covariance: ClassVar[bool] = False
    """Whether that matrix is the weighted sum of the keys' outer products, by which `Exact` solves."""

    gate_granularities: ClassVar[tuple[str, ...]] = ("channel", "head")
    """What step size and retention may be one number of."""

    step_granularities: ClassVar[tuple[str, ...]] = ("channel", "head")
    """What steps may be one number of; where it is one a head alone, retention may still be one a channel."""

    moves: ClassVar[float] = 1.0
    """How many times its step a write moves the state by in the end, at the gates that a model starts with."""

    gradient_at: ClassVar[str] = "chunk"
    """The memory at which a token's gradient is taken: `"chunk"` for that of its chunk's start, else see `TokenByToken`."""

    @property
    def initial_norm_weight(self) -> float:
        """What a model starts `MemoryParameters.norm_weight` from."""
        return 1.0

    @property
    def has_second_matrix(self) -> bool:
        """Whether a layer's state has any other matrix besides the dual state."""
        return self.has_momentum or self.has_covariance

    @property
    def has_erase_key(self) -> bool:
        """Whether errors are those of what the memory returns for keys of their own, not for those that are written along."""
        return False

    @property
    def largest_step(self) -> float:
        """The step size above which writes along a key of norm 1 would make the memory grow without end."""
        return math.inf

    def refusal(self, architecture: MemoryArchitecture, bias: AttentionalBias, retention: RetentionGate) -> str | None:
        """Why it does not learn under other choices, behind its name; `None` if it does."""
        return None

    def bound_step_size(self, eta: Tensor, k: Tensor, erase: Tensor | None = None) -> Tensor:
        """The step sizes that are taken, of step sizes `[..., c]` and keys `[..., head_dim]`, and erase keys, if there are any:
        cut, where larger ones do harm."""
        return eta

    def chunk_gradient_gates(self, eta: Tensor, *logs: Tensor) -> Gates | None:
        """Gates of the memories at which the gradients of whole chunks are taken, each with the writes before its token;
        `None` for that of the chunk's start. Arguments as of `chunk_gates`."""
        return None

    def step_gradient_gates(self, eta: Tensor, log_decay: Tensor, before: Tensor, now: Tensor) -> Gates | None:
        """The same for one token, as `step_gates`, `before` being the log decay before it and `now` the one after."""
        return None

    def write(
        self,
        weights: ChunkWeights,
        k: Tensor,
        residual: Residual,
        gates: Gates,
        known: Known | None = None,
        erase: Tensor | None = None,
    ) -> Factors:
        """The gradients of a chunk's tokens, each at the memory of its own time, of a memory of one layer.

        Args:
            weights (`ChunkWeights`): the layer's.
            k (`torch.Tensor` of shape `[rows, tokens, head_dim]`): keys.
            residual (`Callable`): of what the memory returns for them.
            gates (`Gates`): of `chunk_gradient_gates`.
            known (`Known`, *optional*): slots whose gradients have been taken.
            erase (`torch.Tensor`, as `k`, *optional*): erase keys.
        """
        raise NotImplementedError

    def chunk_gates(self, eta: Tensor, log_decay: Tensor, *log_momentum: Tensor) -> Any:
        """Gates of whole chunks.

        Args:
            eta (`torch.Tensor` of shape `[..., chunk_size, c]`): step size of every token.
            log_decay (`torch.Tensor` of shape `[..., chunk_size, c]`): log B_t, cumulative inside the chunk.
        """
        raise NotImplementedError

    def step_gates(self, eta: Tensor, log_decay: Tensor, now: Tensor, *log_momentum: Tensor) -> Any:
        """Gates of one token `[..., 1, c]` that reads the tokens `[..., chunk_size, c]` of its chunk so far."""
        raise NotImplementedError

    def own_gates(self, eta: Tensor) -> Any:
        """Gates of tokens `[..., tokens, c]` of which each reads its own write alone, before anything decays."""
        raise NotImplementedError

    def update(self, slots: tuple[Tensor, ...], step: Tensor, alpha: Tensor, *momentum: Tensor) -> tuple[Tensor, ...]:
        """A layer's state after a token, in the reference.

        Args:
            slots (`tuple` of `torch.Tensor`): the state before the token.
            step (`torch.Tensor`): `eta_t o g_t`.
            alpha (`torch.Tensor`): the token's retention.
        """
        raise NotImplementedError

    def read(self, gate_axis: str, weights: ChunkWeights, factors: Factors, x: Tensor, gates: Any) -> Tensor:
        """`x_t W_t` of one layer, all of shape `[rows, tokens, features]`; factors are those that the link has made of the
        chunk's."""
        raise NotImplementedError

    def fold(self, gate_axis: str, slots: tuple[Tensor, ...], factors: Factors, gates: Any) -> tuple[Tensor, ...]:
        """A layer's state after the chunk."""
        raise NotImplementedError


@dataclass(frozen=True)
class GradientDescent(LearningAlgorithm):
    """One step on each token's own gradient: `A_t = alpha_t o A_{t-1} - eta_t o g_t`."""

    def update(self, slots: tuple[Tensor, ...], step: Tensor, alpha: Tensor, *momentum: Tensor) -> tuple[Tensor, ...]:
        return (alpha * slots[0] - step,)

    def chunk_gates(self, eta: Tensor, log_decay: Tensor) -> Gates:
        query, key, half = relative(eta, log_decay, log_decay)
        return Gates(query * half, query, key, "past", key * half, half * half)

    def step_gates(self, eta: Tensor, log_decay: Tensor, now: Tensor) -> Gates:
        return Gates(torch.exp(now), None, eta * torch.exp(now - log_decay), "all")

    def own_gates(self, eta: Tensor) -> Gates:
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
                z = plus_product(z, x * gates.decay, weights.decaying)
            return z if weights.constant is None else plus_product(z, x, weights.constant)
        scores = scores_of(x, inputs, gates.sees)
        z = torch.bmm(scores, gradients * gates.key)
        if gates.query is not None:
            z = z * gates.query
        if weights.decaying is not None:
            z = torch.addcmul(z, torch.bmm(x, weights.decaying), gates.decay)
        if weights.constant is not None:
            z = plus_product(z, x, weights.constant)
        return z if weights.scale is None else z * weights.scale

    def fold(self, gate_axis: str, slots: tuple[Tensor, ...], factors: Factors, gates: Gates) -> tuple[Tensor, ...]:
        """A layer's state after the chunk: `B_C o state - sum_i (B_C / B_i) eta_i o g_i`."""
        (state,), (inputs, gradients) = slots, factors
        if gate_axis == "input":
            return (plus_product(state * gates.total.mT, (inputs * gates.fold).mT, gradients, alpha=-1),)
        return (plus_product(state * gates.total, inputs.mT, gradients * gates.fold, alpha=-1),)


def relative(eta: Tensor, log_decay: Tensor, of_queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What queries and keys of a chunk are multiplied with, and the reference decay that is taken out of both."""
    # exponents are taken relative to half the chunk's decay: their range is halved, and 1/B_i stays finite for every
    # log alpha the rule allows
    reference = 0.5 * log_decay[..., -1:, :]
    # not eta / query: the derivative of the quotient would square a factor that may be exp(80)
    return torch.exp(of_queries - reference), eta * torch.exp(reference - log_decay), torch.exp(reference)


class MomentumGates(NamedTuple):
    """Coefficients of a chunk's tokens with momentum, one number a head; M_t the momentum left since its start.

    Args:
        decay (`torch.Tensor` of shape `[..., queries, 1]`): B_t, of the dual state at the chunk's start.
        momentum (`torch.Tensor` of shape `[..., queries, 1]`):
            What has come of the momentum at the chunk's start, `sum_{j<=t} (B_t / B_j) M_j`.
        writes (`torch.Tensor` of shape `[..., queries, tokens]`):
            What has come of a token's step, `eta_i sum_{i<=j<=t} (B_t / B_j) (M_j / M_i)`.
        fold (`torch.Tensor` of shape `[..., tokens, 1]`): what the momentum holds of it in the end, `eta_i M_C / M_i`.
        total (`torch.Tensor` of shape `[..., 1, 1]`): M_C.
    """

    decay: Tensor
    momentum: Tensor
    writes: Tensor
    fold: Tensor
    total: Tensor

    def broken_from(self, broken: Tensor) -> "MomentumGates":
        """As `Gates.broken_from`."""
        decay, momentum = (torch.where(broken, torch.nan, gate) for gate in (self.decay, self.momentum))
        return self._replace(
            decay=decay, momentum=momentum, total=torch.where(broken[..., -1:, :], torch.nan, self.total)
        )


@dataclass(frozen=True)
class Momentum(LearningAlgorithm):
    """Gradient descent with momentum, data-dependent (arXiv 2501.00663, equations (9), (10)); gates are one number a head:

    S_t = mu_t S_{t-1} - eta_t g_t          A_t = alpha_t A_{t-1} + S_t
    """

    has_momentum: ClassVar[bool] = True
    gate_granularities: ClassVar[tuple[str, ...]] = ("head",)
    moves: ClassVar[float] = 2.0  # 1 / (1 - mu), mu one half

    def update(self, slots: tuple[Tensor, ...], step: Tensor, alpha: Tensor, *momentum: Tensor) -> tuple[Tensor, ...]:
        """As of the base class, with mu."""
        (mu,), (dual, held) = momentum, slots
        held = mu * held - step
        return alpha * dual + held, held

    def chunk_gates(self, eta: Tensor, log_decay: Tensor, log_momentum: Tensor) -> MomentumGates:
        """As `LearningAlgorithm.chunk_gates`, with the logarithm of M_t, cumulative inside the chunk."""
        size = eta.shape[-2]
        before = torch.ones(size, size, dtype=torch.bool, device=eta.device).tril()
        # selected before the exponential, which has no gradient to lose there then
        retained = torch.exp(torch.where(before, log_decay - log_decay.mT, -torch.inf))
        return self._gates(eta, log_decay, log_momentum, retained, before)

    def step_gates(self, eta: Tensor, log_decay: Tensor, now: Tensor, log_momentum: Tensor) -> MomentumGates:
        """As `LearningAlgorithm.step_gates`; slots not yet taken have no momentum, a logarithm of `NONE`."""
        size = eta.shape[-2]
        before = torch.ones(size, size, dtype=torch.bool, device=eta.device).tril()
        return self._gates(eta, now, log_momentum, torch.exp(now - log_decay.mT), before)

    def _gates(self, eta: Tensor, now: Tensor, log_momentum: Tensor, retained: Tensor, before: Tensor):
        # what a token's step adds to the momentum is added to the state at every later token, and decays there
        left = torch.exp(torch.where(before, log_momentum - log_momentum.mT, -torch.inf))
        total = log_momentum[..., -1:, :]
        return MomentumGates(
            decay=torch.exp(now),
            momentum=retained @ torch.exp(log_momentum),
            writes=(retained @ left) * eta.mT,
            fold=eta * torch.exp(total - log_momentum),
            total=torch.exp(total),
        )

    def own_gates(self, eta: Tensor) -> MomentumGates:
        """As `LearningAlgorithm.own_gates`."""
        one = torch.ones_like(eta)
        return MomentumGates(one, 0.0 * one, torch.diag_embed(eta.squeeze(-1)), eta, one[..., -1:, :])

    def read(self, gate_axis: str, weights: ChunkWeights, factors: Factors, x: Tensor, gates: MomentumGates) -> Tensor:
        """As `GradientDescent.read`; for numbers of a head it is the same on both axes."""
        inputs, gradients = factors
        z = gates.momentum * torch.bmm(x, weights.momentum)
        z = z - torch.bmm(torch.bmm(x, inputs.mT) * gates.writes, gradients)
        if weights.decaying is not None:
            z = z + gates.decay * torch.bmm(x, weights.decaying)
        if weights.constant is not None:
            z = z + torch.bmm(x, weights.constant)
        return z if weights.scale is None else z * weights.scale

    def fold(
        self, gate_axis: str, slots: tuple[Tensor, ...], factors: Factors, gates: MomentumGates
    ) -> tuple[Tensor, ...]:
        """The dual state and the momentum after the chunk."""
        (dual, held), (inputs, gradients) = slots, factors
        decay, momentum, writes = (gate[..., -1:, :] for gate in gates[:3])
        after = decay * dual + momentum * held - (inputs * writes.mT).mT @ gradients
        return after, gates.total * held - (inputs * gates.fold).mT @ gradients


NONE = -1e30
"""The logarithm of a momentum that is not there; finite, for differences of two."""


def split_gates(gates, sizes: list[int]) -> list:
    """The gates of consecutive groups of rows."""
    parts = [x.split(sizes) if isinstance(x, Tensor) else [x] * len(sizes) for x in gates]
    return [type(gates)(*part) for part in zip(*parts, strict=True)]


def plus_product(z: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """`z + alpha a b`; may write into z, but not where `torch.func.vmap` batches the factors and not z."""
    return torch.baddbmm(z, a, b, alpha=alpha) if in_transform() else z.baddbmm_(a, b, alpha=alpha)


def scores_of(x: Tensor, keys: Tensor, sees: str) -> Tensor:
    """`-x_t . keys_i` of the i that token t sees of the writes, which go against the gradient."""
    if sees == "own":
        return torch.diag_embed((x * keys).sum(-1)).neg_()
    scores = torch.bmm(x, keys.mT)
    if sees != "all":
        scores = scores.tril_(0 if sees == "past" else -1)
    return scores.neg_()
