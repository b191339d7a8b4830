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
"""Which field of a config means something under which choices, the refusal of those that mean nothing, and what stored
configs meant that were written before a field was there."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from .memory.declared import is_made
from .memory.registry import CHOICES, declared_keys
from .memory.rule import default_min_log_alpha
from .step_size import largest_step


logger = logging.get_logger(__name__)

Alternatives = tuple[dict[str, Any], ...]

_ATTENTION: Alternatives = ({"has_attention": True},)
_MEMORY: Alternatives = ({"has_memory": True},)
_RETENTION: Alternatives = ({"has_retention": True},)
_IN_WORDS = {
    "has_attention": "attention layers (`attention_layers`, `full_attention_layers` or `layer_types`)",
    "has_sliding_attention": "sliding-window attention layers (`attention_layers` or `layer_types`)",
    "has_memory": "memory layers (`layer_types`)",
    "has_retention": "a gate that forgets (`retention`)",
}

# What says something about a model without any memory, as a converted Transformer may be; all other fields are memories'.
_WITHOUT_MEMORY = frozenset(
    {
        "attention_bias",
        "attention_dropout",
        "attention_layers",
        "attention_output_bias",
        "base_model",
        "bos_token_id",
        "chunk_size_feed_forward",
        "eos_token_id",
        "full_attention_layers",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "license",
        "max_position_embeddings",
        "mlp_bias",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "qk_norm",
        "rms_norm_eps",
        "rope_parameters",
        "sliding_window",
        "tie_word_embeddings",
        "use_cache",
        "vocab_size",
    }
)


def means_something_with() -> dict[str, Alternatives]:
    """Each field means something where all choices of one of its lines are made; those that are not here always do."""
    found: dict[str, Alternatives] = {"lq_map": ({"retention": "lq"},)}
    for field, table in CHOICES.items():
        for name, cls in table.items():
            if name == "lq_mirror":  # it takes what `"lq"` does
                continue
            for parameter in cls.parameters().values():
                if not all(parameter in other.parameters().values() for other in table.values()):
                    taken = {p.key for p in cls.parameters().values()}
                    others = {key: value for key, value in parameter.only_with.items() if key in taken}
                    line = {field: name, **others}
                    found[parameter.key] = (*found.get(parameter.key, ()), line)
    thresholds = (name for name, cls in CHOICES["attentional_bias"].items() if cls.delta_granularity == "channel")
    found["gate_rank"] = ({"gate_granularity": "channel"}, *({"attentional_bias": name} for name in thresholds))
    found |= dict.fromkeys(("learned_retention", "min_half_life", "max_half_life", "min_log_alpha"), _RETENTION)
    found["initial_hidden_scale"] = ({"memory_architecture": "mlp"}, {"memory_architecture": "gated_mlp"})
    found["rope_parameters"] = ({"use_rope": True}, *_ATTENTION)
    found |= dict.fromkeys(("num_key_value_heads", "attention_dropout", "qk_norm"), _ATTENTION)
    return found | {"sliding_window": ({"has_sliding_attention": True},)}


ROUNDING = 1e-9
"""Relative difference up to which two numbers of configs are the same."""

# What models did before there was a field to say so: configs and memories that were stored then lack it.
BEFORE_THERE_WAS: dict[str, Any] = {"value_norm": False, "output_norm_eps": None}


def with_later_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Stored values, and what they meant of fields that came later."""
    return {**BEFORE_THERE_WAS, **stored}


def meaningless(config: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that differ from their defaults and mean nothing under a config's choices, with their defaults.

    Args:
        config: anything with the attributes of a `MirasConfig`.
        defaults (`dict`): the defaults of its class.
    """
    # what `None` stands for
    derived = {
        "min_log_alpha": (default_min_log_alpha(config.chunk_size),),
        "num_key_value_heads": (config.num_attention_heads,),
        "rope_parameters": ({"rope_type": "default", "rope_theta": PreTrainedConfig.default_theta},),
    }
    found = {}
    for name, alternatives in means_something_with().items():
        if _any_is_made(config, alternatives):
            continue
        if not _is_one_of(getattr(config, name, defaults[name]), (defaults[name], *derived.get(name, ()))):
            found[name] = defaults[name]
    if not config.has_memory:
        inherited = {field.name for field in fields(PreTrainedConfig)}
        derived |= {
            "initial_memory_scale": {1.0, *(gate.last_layer_scale for gate in CHOICES["retention"].values())},
            "eta_max": _default_step(config),
        }
        for name in defaults.keys() - inherited - _WITHOUT_MEMORY - found.keys():
            if not _is_one_of(getattr(config, name, defaults[name]), (defaults[name], *derived.get(name, ()))):
                found[name] = defaults[name]
    return found


def _any_is_made(config: Any, alternatives: Alternatives) -> bool:
    return any(all(is_made(getattr(config, n), v) for n, v in choices.items()) for choices in alternatives)


def _is_one_of(value: Any, known: Iterable[Any]) -> bool:
    """Whether a value is among others; a number may differ by rounding, as defaults that are measured do between processors."""
    if type(value) is float:
        return any(isinstance(other, int | float) and math.isclose(value, other, rel_tol=ROUNDING) for other in known)
    return value in known


def _default_step(config: Any) -> tuple[float, ...]:
    # a stored config may leave open what it follows from
    follows_from = (config.head_dim, config.memory_norm_eps, config.initial_memory_scale)
    return () if None in follows_from else (largest_step(config),)


def _defaults_once(config: Any) -> dict[str, tuple[float, ...]]:
    """Of fields whose defaults were others once, what earlier versions wrote where they mean nothing."""
    once: dict[str, tuple[float, ...]] = {"memory_norm_eps": (0.01,)}  # with a simplex
    if not config.has_memory:
        once["eta_max"] = tuple(step * 2.0**times for step in _default_step(config) for times in range(5))
    return once


def check_meaning(config: PreTrainedConfig) -> None:
    """Raises a `ValueError` for a field that says more about a choice that is not made, naming both."""
    for name, default in meaningless(config, _defaults(type(config))).items():
        alternatives = means_something_with().get(name, _MEMORY)
        # what its own choices would allow, no memory layer has
        choice = _in_words(_MEMORY if _any_is_made(config, alternatives) else alternatives)
        raise ValueError(
            f"`{name}` means nothing without {choice}, got {getattr(config, name)!r}: leave it at {default!r}, or choose "
            f"{choice}."
        )


def without_meaningless(
    config_class: type[PreTrainedConfig], stored: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Stored values without those that mean nothing, which earlier versions accepted and wrote. A warning names them.

    Args:
        config_class (`type`): whose values they are.
        stored (`dict`): the values of a `config.json`.
        given (`dict`): what a person sets in their place. It counts among the choices, and nothing of it is dropped.
    """
    defaults = _defaults(config_class)
    choices = SimpleNamespace(**{**defaults, **stored, **given})
    choices.retention_gate = config_class.retention_gate.fget(choices)  # ty: ignore[missing-attribute]
    choices.has_retention = CHOICES["retention"][choices.retention_gate].forgets
    layers = getattr(choices, "layer_types", None)
    sliding, full = choices.attention_layers or (), choices.full_attention_layers or ()
    if layers is None:
        choices.has_sliding_attention, choices.has_attention = bool(sliding), bool(sliding or full)
        choices.has_memory = not choices.num_hidden_layers <= len({*sliding, *full})
    else:
        choices.has_sliding_attention = "sliding_attention" in layers
        choices.has_attention = choices.has_sliding_attention or "full_attention" in layers
        choices.has_memory = "miras_memory" in layers
    dropped = meaningless(choices, defaults).keys() & stored.keys() - given.keys()
    once = _defaults_once(choices)
    said = sorted(name for name in dropped if not _is_one_of(stored[name], once.get(name, ())))
    if said:
        logger.warning_once(
            f"The stored {config_class.__name__} sets fields that mean nothing under its choices, and they are left at "
            f"their defaults: {', '.join(f'{name}={stored[name]!r}' for name in said)}."
        )
    # a step that followed from another value that is dropped would differ from its default by then
    if not choices.has_memory and "eta_max" not in given:
        dropped |= {"eta_max"}
    return {name: value for name, value in stored.items() if name not in dropped}


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    own = {key: parameter.default for key, parameter in declared_keys().items()}
    return own | {field.name: field.default for field in fields(config_class)}


def _in_words(alternatives: Alternatives) -> str:
    return " or ".join(
        " and ".join(_IN_WORDS.get(name, _value_in_words(name, value)) for name, value in choices.items())
        for choices in alternatives
    )


def _value_in_words(name: str, value: Any) -> str:
    return f"`{name}` of at least {value.start}" if isinstance(value, range) else f"`{name}={value!r}`"
