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
"""Choice (iv) of Miras with gradients token by token: the delta rule, in matrix products and a triangular solve a chunk."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .architecture import Factors, Known, MatrixMemory, MemoryArchitecture, Residual
from .attentional_bias import L2, AttentionalBias, Dot
from .declared import parameter
from .learning import Gates, GradientDescent, plus_product, relative, scores_of
from .retention import ChunkWeights, Decay, NoRetention, RetentionGate


@dataclass(frozen=True)
class TokenByToken(GradientDescent):
    """Base class: gradient descent whose gradients are taken at every token's own time, not at its chunk's start, of a
    matrix memory with l2 loss, after its decay (9) or before it (26):

        decayed:   A_t = alpha_t A_{t-1} - eta_t k_t^T (k_t (alpha_t A_{t-1}) - v_t)
        previous:  A_t = alpha_t A_{t-1} - eta_t k_t^T (k_t A_{t-1} - v_t)

    The residuals r of a chunk then depend on each other, linearly: with what the state at its start, decayed, returns
    for the keys, `p_t = (k_t B_t) A_c`, they solve a triangular system,

        r_t + sum_{i<t} [(k_t B_t) . (k_i eta_i / B_i)] r_i = p_t - v_t

    (B_{t-1} in the place of B_t for `"previous"`), and all the rest is that of gradient descent. Numbers do not depend on
    `chunk_size`, which says how much is computed at once, but for the weights' cap, which is met at chunk starts.

    Step sizes are one number a head: a write erases along the key what it writes along the key.
    """

    step_granularities: ClassVar[tuple[str, ...]] = ("head",)

    def refusal(self, architecture: MemoryArchitecture, bias: AttentionalBias, retention: RetentionGate) -> str | None:
        # of the classes themselves: what a subclass computes may not be linear in the writes
        if type(architecture) is not MatrixMemory:
            return (
                "takes gradients token by token, which chunks compute together for a matrix memory only; gradient descent "
                "with `chunk_size=1` takes those of any memory, at the token before"
            )
        if type(bias) is Dot:
            return "takes gradients token by token, and those of the dot product are the same at every memory"
        if type(bias) is not L2 or bias.residual_clip is not None:
            return (
                "takes gradients token by token, which chunks compute together where they are linear in the memory: of the "
                "l2 loss, with `residual_clip=None`"
            )
        if type(retention) not in (Decay, NoRetention):
            return (
                "takes gradients token by token, which chunks compute together where weights are the state itself: with "
                "decay or none"
            )
        return None

    def chunk_gradient_gates(self, eta: Tensor, log_decay: Tensor) -> Gates:
        of_queries = log_decay
        if self.gradient_at == "previous":
            of_queries = torch.cat((torch.zeros_like(log_decay[..., :1, :]), log_decay[..., :-1, :]), dim=-2)
        query, key, half = relative(eta, log_decay, of_queries)
        return Gates(query * half, query, key, "before")

    def step_gradient_gates(self, eta: Tensor, log_decay: Tensor, before: Tensor, now: Tensor) -> Gates:
        return self.step_gates(eta, log_decay, before if self.gradient_at == "previous" else now)

    def write(
        self,
        weights: ChunkWeights,
        k: Tensor,
        residual: Residual,
        gates: Gates,
        known: Known | None = None,
        erase: Tensor | None = None,
    ) -> Factors:
        asked = k if erase is None else erase
        if known is not None:
            k = torch.where(known.where, known.factors[0].inputs, k)
        scaled = asked if weights.scale is None else asked * weights.scale
        prediction = torch.bmm(scaled * gates.decay, weights.decaying)
        if weights.constant is not None:
            prediction = plus_product(prediction, scaled, weights.constant)
        alone = residual(prediction)
        of_others = scores_of(scaled * gates.query, k * gates.key, gates.sees).neg()
        if known is not None:
            alone = torch.where(known.where, known.factors[0].gradients, alone)
            of_others = torch.where(known.where, 0.0, of_others)
        solved = torch.linalg.solve_triangular(of_others, alone, upper=False, unitriangular=True)
        return Factors(k, solved.contiguous())  # it comes column by column


@dataclass(frozen=True)
class DeltaRule(TokenByToken):
    """The delta rule as DeltaNet, Gated DeltaNet and Kimi Delta Attention publish it. Step sizes of more than
    `largest_step / |k|^2` are cut there: without end, the memory would grow by a factor with every token.

    With erase keys e of their own, as RWKV-7 and Comba have them, a write goes along another key than the error is taken of,

        A_t = alpha_t A_{t-1} - eta_t k_t^T (e_t (alpha_t A_{t-1}) - v_t)

    and above the chunk's diagonal `e_t . k_i` stands in the place of `k_t . k_i`. Steps are cut at `largest_step / |e| |k|`; where e
    and k are not parallel, a memory may grow all the same.

    Args:
        gradient_at (`str`, *optional*, defaults to `"decayed"`): `"decayed"` or `"previous"`.
        erase_key (`str`, *optional*, defaults to `"write"`): `"write"`: errors are of the key that is written; or `"own"`.
    """

    gradient_at: str = parameter("gradient_at", "decayed", one_of=("decayed", "previous"))
    erase_key: str = parameter("erase_key", "write", one_of=("write", "own"))

    @property
    def has_erase_key(self) -> bool:
        return self.erase_key == "own"

    @property
    def largest_step(self) -> float:
        # neither diag(alpha) - eta k^T k nor (1 - eta k^T k) diag(alpha) makes any vector longer then
        return 1.0 if self.gradient_at == "previous" else 2.0

    def bound_step_size(self, eta: Tensor, k: Tensor, erase: Tensor | None = None) -> Tensor:
        squared = (k * k).sum(-1, keepdim=True)
        if erase is not None:
            # no slope of a root at zero, where nothing is cut
            squared = (squared * erase.square().sum(-1, keepdim=True)).clamp(min=1e-30).sqrt()
        return eta / (eta * (squared / self.largest_step)).clamp(min=1.0)


@dataclass(frozen=True)
class Implicit(TokenByToken):
    """The implicit step (Longhorn, arXiv 2407.14207), the online learner's closed form:

        A_t = argmin_A |A - alpha_t A_{t-1}|^2 / 2 + eta_t |k_t A - v_t|^2 / 2

    whose gradient is that of the memory after the step. It is the explicit step of size `eta_t / (1 + eta_t |k_t|^2)`, which
    moves towards the value and never beyond it, however large eta is.
    """

    gradient_at: ClassVar[str] = "decayed"

    def bound_step_size(self, eta: Tensor, k: Tensor, erase: Tensor | None = None) -> Tensor:
        return eta / (1.0 + eta * k.square().sum(-1, keepdim=True))
