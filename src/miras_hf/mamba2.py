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
"""Mamba2's layer as Mamba2, Bamba and Granite 4 (`granitemoehybrid`) have it in Transformers, taken into a memory layer that
computes the same.

The state update is a matrix memory with the dot-product loss: `x` are its values, `B` its keys, `C` its queries, the step `dt`
its step, `dt A` its log retention. What stands elsewhere there, and comes to the same: the convolutions of `B` and `C` serve a
group of heads, and are repeated in the weights here; where states and heads differ in width, the narrower ones have zeros
behind them here, in weights, because a matrix memory is square; the weight of the norm is in the projection after it; decay has
no bound there, and here, in chunks of 8 tokens, one below which nothing is left (`exp(-20)`).
"""

from typing import Any

import torch
from torch import Tensor, nn

from .layer_weights import CHUNK_SIZE, by_heads, check_activation, copy_weights, kind_of
from .memory.rule import least_log_alpha
from .modeling_miras import MirasMixer
from .presets import MODELS


LARGEST_STEP = 1e3
"""The largest `eta_max` that configs know, in the place of no limit."""

_LAYERS = {
    "Mamba2Mixer": "transformers.models.mamba2.modeling_mamba2",
    "BambaMixer": "transformers.models.bamba.modeling_bamba",
    "GraniteMoeHybridMambaLayer": "transformers.models.granitemoehybrid.modeling_granitemoehybrid",
}


def mamba2_fields(layer: nn.Module) -> dict[str, Any]:
    """The fields of a `MirasConfig` whose memory layers compute what a layer does.

    Args:
        layer (`Mamba2Mixer`, `BambaMixer` or `GraniteMoeHybridMambaLayer`): of Transformers.

    Raises:
        `TypeError`: for another layer.
        `ValueError`: for a layer with another activation, or a smallest step, naming it.
    """
    layer = _checked(layer)
    states, values = layer.ssm_state_size, layer.head_dim
    width = max(states, values)
    smallest, largest = layer.time_step_limit
    if smallest > 0:
        raise ValueError(f"`layer.time_step_limit` must begin with 0, got {layer.time_step_limit}.")
    return {
        **MODELS["mamba2"].fields,
        "hidden_size": layer.hidden_size,
        "num_attention_heads": layer.num_heads,
        "memory_num_query_key_heads": layer.n_groups,
        "head_dim": width,
        "attention_bias": layer.in_proj.bias is not None,
        "attention_output_bias": layer.out_proj.bias is not None,
        "conv_kernel_size": layer.conv_kernel_size,
        "conv_bias": layer.conv1d.bias is not None,
        # in Transformers 5.17 it has one mean square, however many groups there are
        "output_norm_groups": layer.intermediate_size // getattr(layer.norm, "group_size", layer.intermediate_size),
        # of a mean over zeros, too
        "output_norm_eps": layer.norm.variance_epsilon * values / width,
        "eta_max": min(largest, LARGEST_STEP),
        "chunk_size": CHUNK_SIZE,
        "min_log_alpha": least_log_alpha(CHUNK_SIZE),
    }


@torch.no_grad()
def load_mamba2(mixer: MirasMixer, layer: nn.Module) -> None:
    """Copies the weights of a layer into a memory layer of `mamba2_fields`.

    Raises:
        `TypeError`: for another layer.
        `ValueError`: if the memory layer's weights are of other shapes, naming one.
    """
    layer = _checked(layer)
    groups, heads, states, values = layer.n_groups, layer.num_heads, layer.ssm_state_size, layer.head_dim
    inner, width = layer.intermediate_size, max(states, values)

    def of_states(weight: Tensor, repeats: int = 1) -> Tensor:
        return by_heads(weight, groups, width, repeats)

    def of_values(weight: Tensor) -> Tensor:
        return by_heads(weight, heads, width)

    weights = {
        "alpha.bias": layer.dt_bias,
        "alpha.a_log": layer.A_log,
        "skip.weight": layer.D,
        "memory.initial_state.0": torch.zeros(heads, width, width),
        "o_norm.weight": layer.norm.weight.new_full((width,), (values / width) ** 0.5),
        "o_proj.weight": of_values((layer.out_proj.weight * layer.norm.weight).mT).mT,
    }
    sizes = [inner, inner, groups * states, groups * states, heads]
    for name in ("weight", "bias"):
        convolved, projected = getattr(layer.conv1d, name), getattr(layer.in_proj, name)
        if convolved is not None:
            x, b, c = convolved.flatten(1).split(sizes[1:4]) if name == "weight" else convolved.split(sizes[1:4])
            weights |= {f"{x}_conv.{name}": of_states(y, heads // groups) for x, y in (("q", c), ("k", b))}
            weights[f"v_conv.{name}"] = of_values(x)
        if projected is not None:
            gate, x, b, c, step = projected.split(sizes)
            weights |= {f"q_proj.{name}": of_states(c), f"k_proj.{name}": of_states(b), f"v_proj.{name}": of_values(x)}
            weights[f"g_proj.{name}"] = of_values(gate)
            if name == "weight":
                weights["alpha.up_proj.weight"] = step
            else:
                weights["alpha.bias"] = layer.dt_bias + step
    if layer.out_proj.bias is not None:
        weights["o_proj.bias"] = layer.out_proj.bias
    copy_weights(mixer, weights, "mamba2_fields")


def _checked(layer: Any) -> Any:
    kind_of(layer, _LAYERS)
    check_activation(layer)
    return layer


__all__ = ["load_mamba2", "mamba2_fields"]
