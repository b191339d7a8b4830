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
"""The derivatives of what a rule makes of a chunk: those of the choices, put together as the rule does the choices."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architecture import Factors
from ..learning import Gates
from ..retention import ChunkWeights, RetentionGate
from ..rule import MirasRule
from ..vjp import added, by_autograd, derivative_of, with_vjp


@derivative_of(MirasRule.weights)
def weights(rule: MirasRule, states: Sequence[Tensor], base: Sequence[Tensor | None]):
    linked = [
        with_vjp(rule.retention.at_chunk_start, state, from_base, rule.hidden_axis(layer))
        for layer, (state, from_base) in enumerate(zip(states, base, strict=True), start=rule.architecture.fixed)
    ]

    def vjp(bars: Sequence[ChunkWeights]):
        states_bar, base_bar, _ = zip(
            *(link_vjp(bar) for (_, link_vjp), bar in zip(linked, bars, strict=True)), strict=True
        )
        return states_bar, base_bar

    return tuple(of_layer for of_layer, _ in linked), vjp


@derivative_of(MirasRule.chunk_gates, MirasRule.with_means)
def chunk_gates(rule: MirasRule, eta: Tensor, log_decay: Tensor):
    wide = rule.with_means(eta).shape[-1] != eta.shape[-1]
    gates, gates_vjp = with_vjp(rule.algorithm.chunk_gates, rule.with_means(eta), rule.with_means(log_decay))

    def vjp(bar: Gates):
        bars = gates_vjp(bar)
        if not wide:
            return bars
        return tuple(b[..., :-1] + b[..., -1:] / eta.shape[-1] for b in bars)

    return gates, vjp


def _gates_bar(rule: MirasRule, layer: int, of_layer: Gates, channels: int) -> Gates:
    """The adjoint of a weight's gates as that of all weights', `MirasRule.gates_of`."""
    if channels == 1 or not rule.has_mean_gates:
        return of_layer
    before, behind = (channels - 1, 0) if rule.architecture.gate_axes[layer] == "hidden" else (0, 1)
    return Gates(*(F.pad(x, (before, behind)) if isinstance(x, Tensor) else x for x in of_layer))


@derivative_of(MirasRule.write)
def write(
    rule: MirasRule,
    weights: Sequence[ChunkWeights],
    k: Tensor,
    v: Tensor,
    delta: Tensor | None,
    norm: Sequence[Tensor],
):
    bars_of_residual = []

    def residual(prediction: Tensor):
        error, error_vjp = with_vjp(rule.attentional_bias.error, prediction, v)
        r, residual_vjp = with_vjp(rule.attentional_bias.residual, error, delta)

        def vjp(bar: Tensor) -> Tensor:
            error_bar, delta_bar = residual_vjp(bar)
            prediction_bar, v_bar = error_vjp(error_bar)
            bars_of_residual[:] = v_bar, delta_bar
            return torch.zeros_like(v) if prediction_bar is None else prediction_bar

        return r, vjp

    affine, fixed = norm[:2], norm[2:]
    all_weights = (*fixed, *(w.weight for w in weights))
    factors, write_vjp = with_vjp(rule.architecture.write, all_weights, k, residual, *affine)

    def vjp(bars: Sequence[Factors]):
        weight_bars, k_bar, _, *norm_bar = write_vjp(bars)
        v_bar, delta_bar = bars_of_residual
        fixed_bars, weight_bars = weight_bars[: len(fixed)], weight_bars[len(fixed) :]
        return tuple(map(ChunkWeights, weight_bars)), k_bar, v_bar, delta_bar, (*norm_bar, *fixed_bars)

    return factors, vjp


@derivative_of(MirasRule.read)
def read(
    rule: MirasRule,
    weights: Sequence[ChunkWeights],
    factors: Sequence[Factors],
    q: Tensor,
    gates: Gates,
    norm: Sequence[Tensor],
):
    axes, affine, fixed = rule.written_axes, norm[:2], norm[2:]
    channels = gates.decay.shape[-1]
    weights_bar, factors_bar, gates_bar = [None] * len(axes), [None] * len(axes), [None]
    fixed_bars = [None] * len(fixed)

    def linear_fixed(layer: int, x: Tensor):
        def vjp(z_bar: Tensor) -> Tensor:
            fixed_bars[layer] = torch.bmm(x.mT, z_bar)
            return torch.bmm(z_bar, fixed[layer].mT)

        return torch.bmm(x, fixed[layer]), vjp

    def linear(layer: int, x: Tensor):
        if layer < len(fixed):
            return linear_fixed(layer, x)
        i = layer - len(fixed)
        written, writes_vjp = with_vjp(rule.retention.writes, weights[i], factors[i], rule.hidden_axis(layer))
        z, linear_vjp = with_vjp(rule.algorithm.read, axes[i], weights[i], written, x, rule.gates_of(layer, gates))

        def vjp(z_bar: Tensor) -> Tensor:
            _, by_read, written_bar, x_bar, of_gates = linear_vjp(z_bar)
            by_writes, of_factors, _ = writes_vjp(written_bar)
            weights_bar[i] = added(weights_bar[i], added(by_read, by_writes))
            factors_bar[i] = added(factors_bar[i], of_factors)
            gates_bar[0] = added(gates_bar[0], _gates_bar(rule, layer, of_gates, channels))
            return x_bar

        return z, vjp

    y, read_vjp = with_vjp(rule.architecture.read, linear, q, *affine)

    def vjp(y_bar: Tensor):
        _, q_bar, *norm_bar = read_vjp(y_bar)
        return tuple(weights_bar), tuple(factors_bar), q_bar, gates_bar[0], (*norm_bar, *fixed_bars)

    return y, vjp


@derivative_of(MirasRule.fold)
def fold(rule: MirasRule, states: Sequence[Tensor], factors: Sequence[Factors], gates: Gates):
    """Without the result, as that of the algorithm."""
    if type(rule.retention).at_chunk_end is not RetentionGate.at_chunk_end:
        return by_autograd(functools.partial(MirasRule.fold, rule), states, factors, gates)
    axes = rule.written_axes
    channels = gates.decay.shape[-1]

    def vjp(bars: Sequence[Tensor | None]):
        states_bar, factors_bar, gates_bar = [], [], None
        of_layers = zip(axes, states, factors, bars, strict=True)
        for layer, (axis, state, of_layer, bar) in enumerate(of_layers, start=rule.architecture.fixed):
            state_bar = of_factors = None
            if bar is not None:
                fold_vjp = with_vjp(rule.algorithm.fold, axis, (state,), of_layer, rule.gates_of(layer, gates))[1]
                _, (state_bar,), of_factors, of_gates = fold_vjp((bar,))
                gates_bar = added(gates_bar, _gates_bar(rule, layer, of_gates, channels))
            states_bar.append(state_bar)
            factors_bar.append(of_factors)
        return tuple(states_bar), tuple(factors_bar), gates_bar

    return None, vjp
