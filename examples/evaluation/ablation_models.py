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
"""The models of the ablations: those of the library, changed after they are built where no field of a config can say it.

Equal parameters by the width of the MLP, unless a name says otherwise, counting what is trained: what a change leaves
without use is held.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ablation_points import ABLATIONS, Ablation
from bridge_models import Around, built_from_seed, built_to_size
from models import ModelShape
from stored_config import config_fields
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from miras_hf import MirasConfig
from miras_hf.backend import MemoryBackend
from miras_hf.memory import MirasRule
from miras_hf.memory.rule import least_log_alpha
from miras_hf.modeling_miras import MirasMemory, MirasMixer


class Ascent(Around):
    """A memory whose writes go up the gradient: its steps are negative."""

    def change(self, q: Tensor, k: Tensor, v: Tensor, eta: Tensor, *gates: Tensor | None) -> tuple[Tensor | None, ...]:
        return q, k, v, -eta, *gates


class KeysAsQueries(Around):
    """A memory that is asked with the keys that it has just learned."""

    def change(self, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor | None) -> tuple[Tensor | None, ...]:
        return k, k, v, *gates


def change(model: nn.Module, name: str | None) -> nn.Module:
    """Does to a new model what a change says, see `CHANGES`."""
    for mixer in (module for module in model.modules() if isinstance(module, MirasMixer)):
        if name == "ascent":
            mixer.memory = Ascent(mixer.memory)
        elif name == "keys":
            mixer.memory = KeysAsQueries(mixer.memory)
            _hold(mixer.q_proj, mixer.q_conv)
        elif name == "constant-delta":
            # the bias is left: a number a head
            mixer.delta.up_proj.weight.data.zero_()
            _hold(mixer.delta.up_proj)
        elif name == "constant-alpha":
            _hold(mixer.alpha)
        elif name == "fixed-start":
            _hold(mixer.memory.initial_state)
    return model


def _hold(*modules: nn.Module) -> None:
    for module in modules:
        module.requires_grad_(False)


def set_rule(memory: MirasMemory, rule: MirasRule) -> None:
    memory.rule, memory.backend = rule, MemoryBackend(rule, memory.backend.backend)


def config_of(ablation: Ablation, shape: ModelShape, intermediate_size: int) -> MirasConfig:
    """The config of an ablation, as far as a config can say it."""
    values = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": intermediate_size,
    }
    values |= {"chunk_size": shape.chunk, **ablation.settings}
    config = AutoConfig.for_model(ablation.model, **values)
    if ablation.steps == 1.0:
        return config
    return AutoConfig.for_model(ablation.model, **values, eta_max=ablation.steps * config.eta_max)


def build_model(
    ablation: Ablation, shape: ModelShape, seed: int
) -> tuple[nn.Module, Callable[[Tensor], dict[str, Any]]]:
    """A new model of an ablation, and what its forward takes besides ids."""

    def built(config: MirasConfig) -> nn.Module:
        return change(AutoModelForCausalLM.from_config(config), ablation.change)

    if not ablation.refitted:
        own, _ = build_model(ABLATIONS[ablation.model], shape, seed)
        return built_from_seed(built, config_of(ablation, shape, own.config.intermediate_size), seed)
    return built_to_size(built, lambda size: config_of(ablation, shape, size), shape, seed)


def point_of(name: str, shape: ModelShape) -> dict[str, Any] | None:
    """What an ablation means today, the library's defaults included; `None` for a name that there is not."""
    if name not in ABLATIONS:
        return None
    ablation = ABLATIONS[name]
    corruption = ablation.trained_with
    return {
        "change": ablation.change,
        "refitted": ablation.refitted,
        "trained_with": None if corruption is None else vars(corruption),
        "config": config_fields(config_of(ablation, shape, intermediate_size=shape.width)),
    }


@contextmanager
def served_at(model: nn.Module, chunk_size: int) -> Iterator[None]:
    """Inside, the memories of a model take their gradients at the starts of other chunks.

    Where a chunk is longer, a token may forget less at most, as the library's bound has it.
    """
    memories = [module for module in model.modules() if isinstance(module, MirasMemory)]
    before = [memory.rule for memory in memories]
    for memory, rule in zip(memories, before, strict=True):
        lowest = max(rule.min_log_alpha, least_log_alpha(chunk_size))
        set_rule(memory, replace(rule, chunk_size=chunk_size, min_log_alpha=lowest))
    try:
        yield
    finally:
        for memory, rule in zip(memories, before, strict=True):
            set_rule(memory, rule)


__all__ = [
    "Ascent",
    "KeysAsQueries",
    "build_model",
    "change",
    "config_of",
    "point_of",
    "served_at",
    "set_rule",
]
