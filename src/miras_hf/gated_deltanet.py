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
"""Gated DeltaNet's layer as Qwen3-Next and OLMo Hybrid have it in Transformers, taken into a memory layer that computes the
same.

What stands elsewhere there, and comes to the same: queries are divided by the root of the keys' width, which here the epsilon of
the norm after the memory takes; convolutions of keys serve several values' heads, and are repeated in the weights here; where
keys and values differ in width, the narrower ones have zeros behind them here, in weights, because a matrix memory is square;
decay has no bound there, and here, in chunks of 8 tokens, one below which nothing is left (`exp(-20)`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer_weights import CHUNK_SIZE, by_heads, check_activation, copy_weights, kind_of
from .memory.rule import least_log_alpha
from .modeling_miras import MirasMixer
from .presets import MODELS


class _Weights(NamedTuple):
    """What the layers have by other names.

    Args:
        q, k, v, gate, beta, decay (`torch.Tensor` of shape `[features, hidden_size]`): projections.
        norm (`torch.Tensor` of shape `[head_v_dim]`), eps (`float`): of the norm after the memory.
        out (`torch.Tensor` of shape `[hidden_size, value features]`): the projection after it.
        largest_step (`float`): what beta is at most.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    beta: Tensor
    decay: Tensor
    norm: Tensor
    eps: float
    out: Tensor
    largest_step: float


def _of_qwen3_next(layer: Any) -> _Weights:
    groups, keys, values = layer.num_k_heads, layer.head_k_dim, layer.head_v_dim
    shared = layer.num_v_heads // groups

    def parted(weight: Tensor, *sizes: int) -> list[Tensor]:  # what belongs to a head of keys stands together
        return [w.flatten(0, 1) for w in weight.unflatten(0, (groups, -1)).split(sizes, dim=1)]

    q, k, v, gate = parted(layer.in_proj_qkvz.weight, keys, keys, shared * values, shared * values)
    beta, decay = parted(layer.in_proj_ba.weight, shared, shared)
    return _Weights(
        q, k, v, gate, beta, decay, layer.norm.weight, layer.layer_norm_epsilon, layer.out_proj.weight, 1.0
    )


def _of_olmo_hybrid(layer: Any) -> _Weights:
    projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.g_proj, layer.b_proj, layer.a_proj)
    largest_step = 2.0 if layer.allow_neg_eigval else 1.0
    norm, eps = layer.o_norm.weight, layer.o_norm.variance_epsilon
    return _Weights(*(p.weight for p in projections), norm, eps, layer.o_proj.weight, largest_step)


_LAYERS: dict[str, tuple[str, Callable[[Any], _Weights]]] = {
    "Qwen3NextGatedDeltaNet": ("transformers.models.qwen3_next.modeling_qwen3_next", _of_qwen3_next),
    "OlmoHybridGatedDeltaNet": ("transformers.models.olmo_hybrid.modeling_olmo_hybrid", _of_olmo_hybrid),
}


def gated_deltanet_fields(layer: nn.Module) -> dict[str, Any]:
    """The fields of a `MirasConfig` whose memory layers compute what a layer does.

    Args:
        layer (`Qwen3NextGatedDeltaNet` or `OlmoHybridGatedDeltaNet`): of Transformers' `qwen3_next` or `olmo_hybrid`.

    Raises:
        `TypeError`: for another layer.
        `ValueError`: for a layer with another activation, naming it.
    """
    weights = _weights_of(layer)
    check_activation(layer)
    keys, values = layer.head_k_dim, layer.head_v_dim
    width = max(keys, values)
    return {
        **MODELS["gated-deltanet"].fields,
        "hidden_size": layer.hidden_size,
        "num_attention_heads": layer.num_v_heads,
        "memory_num_query_key_heads": layer.num_k_heads,
        "head_dim": width,
        "conv_kernel_size": layer.conv_kernel_size,
        # of a mean over zeros, too
        "output_norm_eps": weights.eps * keys * values / width,
        "eta_max": weights.largest_step,
        "chunk_size": CHUNK_SIZE,
        "min_log_alpha": least_log_alpha(CHUNK_SIZE),
    }


@torch.no_grad()
def load_gated_deltanet(mixer: MirasMixer, layer: nn.Module) -> None:
    """Copies the weights of a layer into a memory layer of `gated_deltanet_fields`.

    Raises:
        `TypeError`: for another layer.
        `ValueError`: if the memory layer's weights are of other shapes, naming one.
    """
    found = _weights_of(layer)
    groups, heads, keys, values = layer.num_k_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim
    width = max(keys, values)

    def of_keys(weight: Tensor, repeats: int = 1) -> Tensor:
        return by_heads(weight, groups, width, repeats)

    def of_values(weight: Tensor) -> Tensor:
        return by_heads(weight, heads, width)

    q_conv, k_conv, v_conv = layer.conv1d.weight.squeeze(1).split([layer.key_dim, layer.key_dim, layer.value_dim])
    weights = {
        "q_proj.weight": of_keys(found.q),
        "k_proj.weight": of_keys(found.k),
        "v_proj.weight": of_values(found.v),
        "g_proj.weight": of_values(found.gate),
        # a convolution of its own for every head of values
        "q_conv.weight": of_keys(q_conv, heads // groups),
        "k_conv.weight": of_keys(k_conv, heads // groups),
        "v_conv.weight": of_values(v_conv),
        "eta.up_proj.weight": found.beta,
        "eta.bias": torch.zeros_like(layer.dt_bias),
        "alpha.up_proj.weight": found.decay,
        "alpha.bias": layer.dt_bias,
        "alpha.a_log": layer.A_log,
        "memory.initial_state.0": torch.zeros(heads, width, width),
        "o_norm.weight": F.pad(found.norm * (values / width) ** 0.5, (0, width - values)),
        "o_proj.weight": of_values(found.out.mT).mT,
    }
    copy_weights(mixer, weights, "gated_deltanet_fields")


def _weights_of(layer: Any) -> _Weights:
    return _LAYERS[kind_of(layer, {name: module for name, (module, _) in _LAYERS.items()})][1](layer)


__all__ = ["gated_deltanet_fields", "load_gated_deltanet"]
