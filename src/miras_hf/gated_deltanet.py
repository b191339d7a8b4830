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
"""Gated DeltaNet's layer as Qwen3-Next has it in Transformers, taken into a memory layer that computes the same.

What stands elsewhere there, and comes to the same: queries are divided by `sqrt(head_dim)`, which here the epsilon of the norm
after the memory takes; keys serve several values' heads, and are repeated in the weights here; decay has no bound there, and
here, in chunks of 8 tokens, one below which nothing is left (`exp(-20)`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from .memory.rule import least_log_alpha
from .modeling_miras import MirasMixer
from .presets import MODELS


CHUNK_SIZE = 8
"""The log retention of a chunk must stay above -160: of a token, above -20."""


def gated_deltanet_fields(layer: nn.Module) -> dict[str, Any]:
    """The fields of a `MirasConfig` whose memory layers compute what a layer does.

    Args:
        layer (`Qwen3NextGatedDeltaNet`): of Transformers' `qwen3_next`.

    Raises:
        `TypeError`: for another layer.
        `ValueError`: for a layer whose keys and values differ in width, or with another activation, naming both.
    """
    _check(layer)
    if layer.head_k_dim != layer.head_v_dim:
        raise ValueError(
            f"`layer` must have keys as wide as values, got `head_k_dim` {layer.head_k_dim} and `head_v_dim` "
            f"{layer.head_v_dim}: a matrix memory is square."
        )
    if layer.activation != "silu":
        raise ValueError(f"`layer.activation` must be 'silu', got {layer.activation!r}.")
    return {
        **MODELS["gated-deltanet"].fields,
        "hidden_size": layer.hidden_size,
        "num_attention_heads": layer.num_v_heads,
        "head_dim": layer.head_v_dim,
        "conv_kernel_size": layer.conv_kernel_size,
        "output_norm_eps": layer.layer_norm_epsilon * layer.head_v_dim,
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
    _check(layer)
    groups, width = layer.num_k_heads, layer.head_v_dim
    shared = layer.num_v_heads // groups

    def repeated(weight: Tensor) -> Tensor:
        """`[groups * width, n]` of keys' heads, for the heads of values that they serve."""
        return weight.unflatten(0, (groups, width)).repeat_interleave(shared, dim=0).flatten(0, 1)

    of_groups = layer.in_proj_qkvz.weight.unflatten(0, (groups, -1))
    q, k, v, z = (w.flatten(0, 1) for w in of_groups.split([width, width, shared * width, shared * width], dim=1))
    of_gates = layer.in_proj_ba.weight.unflatten(0, (groups, -1))
    beta, decay = (w.flatten(0, 1) for w in of_gates.split([shared, shared], dim=1))
    q_conv, k_conv, v_conv = layer.conv1d.weight.squeeze(1).split([layer.key_dim, layer.key_dim, layer.value_dim])
    weights = {
        "q_proj.weight": repeated(q),
        "k_proj.weight": repeated(k),
        "v_proj.weight": v,
        "g_proj.weight": z,
        "q_conv.weight": repeated(q_conv),
        "k_conv.weight": repeated(k_conv),
        "v_conv.weight": v_conv,
        "eta.up_proj.weight": beta,
        "eta.bias": torch.zeros_like(layer.dt_bias),
        "alpha.up_proj.weight": decay,
        "alpha.bias": layer.dt_bias,
        "alpha.a_log": layer.A_log,
        "memory.initial_state.0": torch.zeros(layer.num_v_heads, width, width),
        "o_norm.weight": layer.norm.weight,
        "o_proj.weight": layer.out_proj.weight,
    }
    own = dict(mixer.named_parameters())
    shapes, wanted = ({name: tuple(w.shape) for name, w in found.items()} for found in (own, weights))
    wrong = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
    if wrong:
        raise ValueError(
            f"`mixer` must be of a config with `gated_deltanet_fields`: `{wrong[0]}` has shape {shapes.get(wrong[0])}, and "
            f"{wanted.get(wrong[0])} is needed."
        )
    for name, weight in weights.items():
        own[name].copy_(weight)


def _check(layer: nn.Module) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    if not isinstance(layer, Qwen3NextGatedDeltaNet):
        raise TypeError(f"`layer` must be a `Qwen3NextGatedDeltaNet`, got a `{type(layer).__name__}`.")


__all__ = ["gated_deltanet_fields", "load_gated_deltanet"]
