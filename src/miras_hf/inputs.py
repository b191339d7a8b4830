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
"""Checks of what a model is called with, before any work: every error names the argument, the value and what is allowed."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .cache import MirasLayer, memory_layer
from .configuration_miras import MirasConfig
from .sequences import describe


def check_inputs(config: MirasConfig, input_ids: Any, inputs_embeds: Any, position_ids: Any, use_cache: Any) -> None:
    """
    Raises:
        `ValueError`: for types, shapes and dtypes that a forward cannot read, and for a batch without rows or tokens.
    """
    if (input_ids is None) ^ (inputs_embeds is not None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is not None:
        integers = isinstance(input_ids, Tensor) and input_ids.dtype in (torch.int64, torch.int32)
        if not integers or input_ids.dim() != 2:
            raise ValueError(
                f"`input_ids` must be int64 or int32 of shape [batch, tokens], got {describe(input_ids)}."
            )
        name, shape = "input_ids", tuple(input_ids.shape)
    else:
        fits = isinstance(inputs_embeds, Tensor) and inputs_embeds.dim() == 3 and inputs_embeds.is_floating_point()
        if not fits or inputs_embeds.shape[-1] != config.hidden_size:
            raise ValueError(
                f"`inputs_embeds` must be floating point of shape [batch, tokens, {config.hidden_size}], got "
                f"{describe(inputs_embeds)}."
            )
        name, shape = "inputs_embeds", tuple(inputs_embeds.shape[:2])
    if 0 in shape:
        raise ValueError(f"`{name}` must hold at least one row and one token, got [batch, tokens] = {list(shape)}.")
    if position_ids is not None:
        fits = isinstance(position_ids, Tensor) and position_ids.dim() == 2 and not position_ids.is_floating_point()
        if not fits or position_ids.shape[0] not in (1, shape[0]) or position_ids.shape[1] != shape[1]:
            raise ValueError(
                f"`position_ids` must be integers of shape {list(shape)} or {[1, shape[1]]}, got {describe(position_ids)}."
            )
    if use_cache is not None and not isinstance(use_cache, bool):
        raise ValueError(f"`use_cache` must be true or false, got {use_cache!r}.")


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """
    Raises:
        `ValueError`: for ids that are not in the vocabulary. On a CPU only: elsewhere it would wait for the device.
    """
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    lowest, highest = (int(x) for x in input_ids.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"`input_ids` must be at least 0 and below `vocab_size` ({vocab_size}), got ids from {lowest} to {highest}."
        )


def for_losses(labels: Any) -> Any:
    """Classes or token ids in int64, the one integer type that PyTorch's losses take, and contiguous, as Transformers views
    them; anything else as it is."""
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return labels
    return (labels.long() if labels.dtype == torch.int32 else labels).contiguous()


def check_cache(config: MirasConfig, cache: Any, batch: int) -> None:
    """
    Raises:
        `ValueError`: for a cache that is none, was made for another model, or has read another number of rows.
    """
    if cache is None:
        return
    if not isinstance(cache, Cache):
        raise ValueError(f"`cache` must be a `Cache`, `DynamicCache(config=model.config)`, got {describe(cache)}.")
    if config.first_memory_layer is None:  # a draft that exits early may have none
        return
    memory_layer(cache, config.first_memory_layer)
    for layer in cache.layers:
        if isinstance(layer, MirasLayer) and layer.rows is not None and layer.rows != batch:
            raise ValueError(
                f"`cache` has read {layer.rows} rows and cannot go on with {batch}: repeat its rows with "
                "`cache.batch_repeat_interleave`, select some with `cache.batch_select_indices`, or begin a new one."
            )
