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
"""The derivatives of the retention gates: of the weights at a chunk's start, and of what the link does to its writes."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..architecture import Factors
from ..retention import KL, ChiSquared, ChunkWeights, FrozenScale, Lq, RetentionGate, Simplex
from ..vjp import derivative_of, with_vjp


@derivative_of(FrozenScale.at_chunk_start)
def frozen_scale(gate: FrozenScale, state: Tensor, base: Tensor | None, hidden_axis: int):
    dual = state if base is None else base + state
    scale, scale_vjp = with_vjp(gate.scale, dual)

    def vjp(bars: ChunkWeights) -> tuple[Tensor, Tensor | None, None]:
        if scale is None:
            dual_bar = bars.weight
        else:
            scale_bar = (bars.weight * dual).sum((-2, -1), keepdim=True).add_(bars.scale)
            dual_bar = scale_vjp(scale_bar)[0].addcmul_(bars.weight, scale)
        state_bar = bars.decaying.add_(dual_bar)
        return state_bar, None if base is None else dual_bar.add_(bars.constant), None

    weight = dual if scale is None else scale * dual
    return ChunkWeights(weight, constant=base, decaying=state, scale=scale), vjp


@derivative_of(FrozenScale.scale)
def cap(gate: FrozenScale, dual: Tensor) -> tuple[Tensor | None, Callable | None]:
    scale = gate.scale(dual)
    if scale is None:
        return None, None
    # below one it is cap / rms(A), of slope -scale^3 / (cap^2 size) A
    size = dual.shape[-2] * dual.shape[-1]

    def vjp(bar: Tensor) -> tuple[Tensor]:
        rate = torch.where(scale < 1.0, bar * scale**3, 0.0) * (-1.0 / (gate.weight_cap**2 * size))
        return (dual * rate,)

    return scale, vjp


@derivative_of(Lq.scale, Lq.norm, Lq.free_scale, Lq.capped_scale)
def lq_scale(gate: Lq, dual: Tensor) -> tuple[Tensor, Callable]:
    q = gate.power
    norm = gate.norm(dual)
    free = gate.free_scale(norm)
    capped = gate.capped_scale(dual, free)
    scale = free if capped is None else torch.minimum(free, capped)

    def vjp(bar: Tensor) -> tuple[Tensor]:
        # free = N^-(q-2), of slope -(q-2) free (|A| / N)^(q-2) / N^2 A where it is not held
        moves = norm > gate.least_norm
        moves = moves if capped is None else moves & (free <= capped)
        squared = norm.square()
        rate = torch.where(moves, bar * free / squared, 0.0) * (2.0 - q)
        if q == 4.0:  # no pass for the quotient
            dual_bar = dual.square().mul_(rate / squared)
        else:
            dual_bar = (dual / norm).abs_().pow_(q - 2.0).mul_(rate)
        if capped is not None:
            size = dual.shape[-2] * dual.shape[-1]
            cubed = capped.clamp(max=1e9) ** 3  # above, the dual state has all but gone out, and the cube overflows
            rate = torch.where(capped < free, bar * cubed, 0.0) * (-1.0 / (gate.weight_cap**2 * size))
            dual_bar.add_(rate)
        return (dual_bar.mul_(dual),)

    return scale, vjp


@derivative_of(RetentionGate.writes)
def scaled_writes(gate: RetentionGate, weights: ChunkWeights, factors: Factors, hidden_axis: int):
    inputs, gradients = factors
    rows, columns = weights.rows, weights.columns

    def vjp(bars: Factors) -> tuple[ChunkWeights | None, Factors, None]:
        rows_bar = None if rows is None else (bars.inputs * inputs).sum(-2, keepdim=True).mT
        columns_bar = None if columns is None else (bars.gradients * gradients).sum(-2, keepdim=True)
        inputs_bar = bars.inputs if rows is None else bars.inputs * rows.mT
        gradients_bar = bars.gradients if columns is None else bars.gradients * columns
        weights_bar = (
            None if rows is None and columns is None else ChunkWeights(None, rows=rows_bar, columns=columns_bar)
        )
        return weights_bar, Factors(inputs_bar, gradients_bar), None

    return gate.writes(weights, factors, hidden_axis), vjp


@derivative_of(Simplex.at_chunk_start)
def simplex(gate: Simplex, state: Tensor, base: Tensor | None, hidden_axis: int):
    weight, link_vjp = with_vjp(gate.link, state if base is None else base + state, hidden_axis)

    def vjp(bars: ChunkWeights) -> tuple[Tensor, Tensor | None, None]:
        dual_bar, _ = link_vjp(bars.constant.add_(bars.weight))
        return dual_bar, None if base is None else dual_bar, None

    return ChunkWeights(weight, constant=weight), vjp


@derivative_of(KL.link, KL.simplex, KL.slope, KL.centred)
def softmax(gate: KL, dual: Tensor, hidden_axis: int):
    weight, (mass, size) = gate.link(dual, hidden_axis), gate.simplex(dual, hidden_axis)

    def vjp(bar: Tensor) -> tuple[Tensor, None]:
        # c softmax(A) along an axis: W o (bar - sum(bar o W) / c)
        positive = weight + mass / size if hidden_axis == -2 else weight
        product = bar * positive
        inner = product.sum(hidden_axis, keepdim=True).div_(mass)
        return product.addcmul_(positive, inner, value=-1.0), None

    return weight, vjp


@derivative_of(ChiSquared.link, ChiSquared.support, ChiSquared.slope, ChiSquared.simplex, ChiSquared.centred)
def chi_squared(gate: ChiSquared, dual: Tensor, hidden_axis: int):
    weight, slope = gate.link(dual, hidden_axis), gate.slope(dual, hidden_axis)
    support = gate.support(dual, hidden_axis)

    def vjp(bar: Tensor) -> tuple[Tensor, None]:
        # among those above zero (c/n) (A - mean(A)) but for a constant; the map is its own adjoint
        met = bar * support
        mean = met.sum(hidden_axis, keepdim=True) / support.sum(hidden_axis, keepdim=True)
        return torch.where(support, slope * (met - mean), 0.0), None

    return weight, vjp


@derivative_of(Simplex.writes, Simplex.slope)
def simplex_writes(gate: Simplex, weights: ChunkWeights, factors: Factors, hidden_axis: int):
    # centring is symmetric: the map on the writes is its own adjoint
    return gate.writes(weights, factors, hidden_axis), lambda bars: (
        None,
        gate.writes(weights, bars, hidden_axis),
        None,
    )
