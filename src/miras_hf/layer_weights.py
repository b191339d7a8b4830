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
"""What loaders share that take a layer of Transformers into a memory layer which computes the same."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .modeling_miras import MirasMixer


CHUNK_SIZE = 8
"""The log retention of a chunk must stay above -160: of a token, above -20, below which nothing is left."""


def kind_of(layer: Any, kinds: Mapping[str, str]) -> str:
    """The name of a layer's class, one of `kinds`, which name their modules.

    Raises:
        `TypeError`: for another layer.
    """
    for name, module in kinds.items():
        # whoever has such a layer has imported its module
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(layer, kind):
            return name
    names = " or a ".join(f"`{name}`" for name in kinds)
    raise TypeError(f"`layer` must be a {names}, got a `{type(layer).__name__}`.")


def check_activation(layer: Any) -> None:
    """Raises a `ValueError` unless a layer's convolutions are followed by SiLU."""
    if layer.activation != "silu":
        raise ValueError(f"`layer.activation` must be 'silu', got {layer.activation!r}.")


def by_heads(weight: Tensor, heads: int, width: int, repeats: int = 1) -> Tensor:
    """`[heads * features, ...]` as `[heads * repeats * width, ...]`: every head so often, with zeros behind its features."""
    features = weight.shape[0] // heads
    padded = F.pad(weight.unflatten(0, (heads, features)), (0, 0) * (weight.dim() - 1) + (0, width - features))
    return padded.repeat_interleave(repeats, dim=0).flatten(0, 1)


def copy_weights(mixer: MirasMixer, weights: Mapping[str, Tensor], fields: str) -> None:
    """Copies all parameters of a memory layer, by name, from a config with the fields that the function `fields` gives.

    Raises:
        `ValueError`: if the memory layer's are others, or of other shapes, naming one.
    """
    own = dict(mixer.named_parameters())
    shapes, wanted = ({name: tuple(w.shape) for name, w in found.items()} for found in (own, weights))
    wrong = sorted(name for name in {*shapes, *wanted} if shapes.get(name) != wanted.get(name))
    if wrong:
        raise ValueError(
            f"`mixer` must be of a config with `{fields}`: `{wrong[0]}` has shape {shapes.get(wrong[0])}, and "
            f"{wanted.get(wrong[0])} is needed."
        )
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)
