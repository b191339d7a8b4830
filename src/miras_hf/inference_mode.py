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
"""Tensors of a cache that were made in `torch.inference_mode()`: where that is off, PyTorch lets nobody write into them or
save them for a backward pass, and a cache has to go on with copies."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import CacheLayerMixin


def is_abroad(tensors: Iterable[Tensor]) -> bool:
    """Whether some of the tensors were made in inference mode, and that is off. Compiled graphs do not ask."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return any(map(Tensor.is_inference, tensors))


def leave_inference_mode(layer: CacheLayerMixin) -> None:
    """Replaces the tensors of a static cache's layer that are abroad by copies, marked as such a layer marks its tensors.
    Compiled graphs look at the addresses and are made again."""

    def moved(t: Tensor) -> Tensor:
        if not is_abroad((t,)):
            return t
        copied = t.clone()
        if hasattr(t, "_dynamo_static_input_type"):
            torch._dynamo.mark_static_address(copied)
        return copied

    layer.__dict__ = tree_map_only(Tensor, moved, vars(layer))
