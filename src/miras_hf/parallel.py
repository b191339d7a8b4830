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
"""Tensor parallelism by heads: the one sharding style that Transformers lacks for a memory, and the check of sizes.

The plan itself is `MirasConfig.tensor_parallel_plan`.
"""

from typing import TYPE_CHECKING

from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from .configuration_miras import MirasConfig


if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class HeadsParallel(TensorParallelLayer):
    """A module with bare parameters of shape `[heads, ...]` or `[heads * head_dim, ...]`: each rank has some heads, and
    the module's forward sees them as plain tensors."""

    def should_use_local_tensors(self, module: nn.Module) -> bool:
        return True

    def shard_param(self, module: nn.Module, param: str, mesh: "DeviceMesh") -> None:
        # here, and not above: torch can be built without it
        from torch.distributed.tensor import Shard, distribute_tensor

        whole = module._parameters[param]
        shard = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(shard, requires_grad=whole.requires_grad)


ALL_PARALLEL_STYLES.register("heads", HeadsParallel())


def check_distributed_config(config: MirasConfig) -> None:
    """Called before any weight is read.

    Raises:
        `ValueError`: if the `DistributedConfig` that Transformers put into the config asks for sizes that do not fit it.
    """
    distributed = getattr(config, "distributed_config", None)
    tp_size, fsdp_size = (getattr(distributed, name, None) or 1 for name in ("tp_size", "fsdp_size"))
    heads = {"num_attention_heads": config.num_attention_heads}
    if config.has_attention:
        heads["num_key_value_heads"] = config.num_key_value_heads
    if config.has_memory:
        heads["memory_num_key_value_heads"] = config.memory_key_value_heads
        heads["memory_num_query_key_heads"] = config.memory_num_query_key_heads or config.num_attention_heads
        heads["output_norm_groups"] = config.output_norm_groups or config.num_attention_heads
    for name, number in heads.items():
        if number % tp_size:
            raise ValueError(
                f"`{name}` ({number}) must be a multiple of the tensor parallel size ({tp_size}): "
                "memories and attention are sharded by heads."
            )
    # Transformers 5.23, for every model: shards of different sizes are copied, and the head keeps the old ones
    if config.tie_word_embeddings and config.vocab_size % fsdp_size:
        raise ValueError(
            f"`vocab_size` ({config.vocab_size}) must be a multiple of `fsdp_size` ({fsdp_size}) with "
            "`tie_word_embeddings`, or the head would go on with weights from before the first step. Resize the "
            "embeddings with `pad_to_multiple_of`, or let Accelerate shard the model."
        )
