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
"""What a config says about choices: that they fit each other, and of choices that are not the library's the keywords that
their classes declare, and that are no fields."""

from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from .memory.declared import Parameter
from .memory.registry import CHOICES, choice_of, chosen, declared_keys


def own_keys(config_class: type[PreTrainedConfig]) -> set[str]:
    """The keywords of all registered choices that are no fields of a config."""
    return declared_keys().keys() - {field.name for field in fields(config_class)}


def own_parameters(config: PreTrainedConfig) -> dict[str, Parameter]:
    """Those of the choices that a config makes."""
    own, made = own_keys(type(config)), (chosen(config, field) for field in CHOICES)
    return {p.key: p for cls in made for p in cls.parameters().values() if p.key in own}


def take_own_values(config: PreTrainedConfig, keywords: dict[str, Any]) -> None:
    """Makes attributes of the keywords, or of their defaults. Those of choices that are not made are left, unless they say
    no more than the default, which no config stores."""
    made = own_parameters(config)
    for key, parameter in made.items():
        setattr(config, key, keywords.pop(key, parameter.default))
    for key in own_keys(type(config)) - made.keys() & keywords.keys():
        if keywords[key] == declared_keys()[key].default:
            del keywords[key]
    check_own_values(config)


def check_algorithm(config: PreTrainedConfig) -> None:
    """Raises a `ValueError` if retention or learning algorithm do not fit the other choices, or the latter takes no steps
    of such a size."""
    architecture, bias, retention, algorithm = (choice_of(config, field) for field in CHOICES)
    refusal = retention.refusal(architecture)
    if refusal is not None:
        raise ValueError(
            f"`retention={config.retention!r}` {refusal}, got `memory_architecture={config.memory_architecture!r}`."
        )
    refusal = algorithm.refusal(architecture, bias, retention)
    if refusal is not None:
        raise ValueError(
            f"`learning_algorithm={config.learning_algorithm!r}` {refusal}, got `memory_architecture="
            f"{config.memory_architecture!r}`, `attentional_bias={config.attentional_bias!r}`, `residual_clip="
            f"{config.residual_clip}`, `retention={config.retention!r}`."
        )
    if config.eta_max > algorithm.largest_step:
        raise ValueError(
            f"`eta_max` must be at most {algorithm.largest_step:g} with {algorithm}, got {config.eta_max}: the memory would "
            "grow with every token."
        )


def check_initial_memory(config: PreTrainedConfig) -> None:
    """Raises a `ValueError` for a memory that is to start nearly empty, or empty under a link that has no such state."""
    scale, empty = config.initial_memory_scale, config.retention in ("none", "decay", "elastic_net_decay")
    if scale < 1e-6 and not (empty and scale == 0.0):
        or_empty = " or 0" if empty else f" with `retention={config.retention!r}`"
        raise ValueError(f"`initial_memory_scale` must be at least 1e-06{or_empty}, got {scale}.")


def check_own_values(config: PreTrainedConfig) -> None:
    """Raises a `ValueError` for a value that is not allowed, naming its keyword."""
    for key, parameter in own_parameters(config).items():
        refusal = parameter.refusal(getattr(config, key))
        if refusal is not None:
            raise ValueError(f"`{key}` {refusal}.")
