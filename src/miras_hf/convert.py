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
"""A pretrained Transformer as a Miras hybrid: the same decoder, in which some attention layers have become memories.

A memory begins as the heir of its attention layer: the same queries, keys and values reach it, and what it returns leaves by
the same projection. It has read nothing yet, and must be trained: `miras_hf.distillation`.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, try_to_load_from_cache
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from .configuration_miras import (
    ATTENTION_LAYER,
    FULL_ATTENTION_LAYER,
    MEMORY_LAYER,
    MemoraConfig,
    MirasConfig,
    MonetaConfig,
    YaadConfig,
)
from .modeling_miras import MirasForCausalLM, MirasMixer


@dataclass(frozen=True)
class Family:
    """How a family of Transformers says what a Miras model says.

    Args:
        causal_lm (`str`): Name of its class with a language modelling head, of Transformers.
        fields (`dict`): Fields of a Miras config that hold for all of its models.
        windowed (`bool`): Whether a `sliding_window` makes all layers sliding, where no `layer_types` say which.
    """

    causal_lm: str
    fields: dict[str, Any] = field(default_factory=dict)
    windowed: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", windowed=True),
    "qwen2": Family("Qwen2ForCausalLM", {"attention_bias": True, "attention_output_bias": False}),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}),
}
"""Families that can be converted, by their `model_type`. SmolLM, SmolLM2 and many others are Llamas."""

# fields of a teacher's config that mean the same here
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)
_OF_THE_TEACHER = {
    *_SHARED,
    "attention_dropout",
    "attention_layers",
    "attention_output_bias",
    "base_model",
    "full_attention_layers",
    "layer_types",
    "license",
    "num_key_value_heads",
    "qk_norm",
    "rope_parameters",
    "sliding_window",
}
_CONFIGS = {config.model_type: config for config in (YaadConfig, MonetaConfig, MemoraConfig, MirasConfig)}
_WEIGHTS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def convert(
    model: PreTrainedModel,
    layers: Sequence[int],
    memory: str | Mapping[str, Any] = "yaad",
    *,
    base_model: str | None = None,
    license: str | None = None,
) -> MirasForCausalLM:
    """
    A Miras hybrid with the weights of a pretrained Transformer, copied.

    Layers that stay attention compute what they computed: with `layers=[]` logits, caches and generated texts are the
    teacher's, bit for bit. Only in the positions of a batch padded on the left the two differ when they are called without
    `position_ids`, which Miras models count from the first real token.

    A layer of `layers` becomes a memory that starts as the heir of its attention: its queries, keys, values and outputs are
    projected by the same weights, convolutions are the identity, the output gate is open. Norms of queries and keys (Qwen3)
    are folded into the projections, since a memory norms both itself.

    Args:
        model (`PreTrainedModel`): The teacher, a causal language model of one of `FAMILIES`, with plain weights.
        layers (`list[int]`): Indices of the layers that become memories.
        memory (`str` or `dict`, *optional*, defaults to `"yaad"`):
            What they become: `"yaad"`, `"moneta"`, `"memora"` or `"miras"`; or fields of a [`MirasConfig`], `model_type`
            among them if it is none of `"yaad"`. Those of [`heir_fields`] are set unless they are given.
        base_model (`str`, *optional*): Name of the teacher on the Hub, by default the one that it was loaded by.
        license (`str`, *optional*):
            Licence of its weights, and so of these, by default what its own card says, where that is in its folder or in
            the Hub's cache. Config and model card keep both.

    Returns:
        `MirasForCausalLM` of the kind that `memory` names, in the teacher's dtype, on its device and in its mode, with its
        generation config.

    Raises:
        `ValueError`: for a model that cannot be converted (an unknown block, an encoder, several modalities, quantised,
            sharded or offloaded weights, adapters, a head that should be tied and is not), layers that it does not have,
            and fields that are the teacher's to say, each by name.
        `StrictDataclassError`, `TypeError`: for fields that a Miras config refuses.

    ```python
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from miras_hf import convert

    >>> teacher = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4))
    >>> student = convert(teacher, layers=[1, 3], memory="yaad")
    >>> student.config.layer_types
    ['full_attention', 'miras_memory', 'full_attention', 'miras_memory']
    ```"""
    family = _family(model)
    layers = _layers(layers, model.config.num_hidden_layers)
    config = _config(model.config, family, layers, memory)
    found = lineage(model)
    config.base_model, config.license = base_model or found["base_model"], license or found["license"]
    heir = AutoModelForCausalLM.from_config(
        config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    ).to(model.device)
    _copy_weights(model, heir, layers)
    heir.generation_config = copy.deepcopy(model.generation_config)
    return heir.train(model.training)


def heir_fields(teacher: PreTrainedConfig) -> dict[str, Any]:
    """Fields of a memory that starts as an attention layer's heir, where nobody says otherwise."""
    return {
        # keys and values are shared as they were
        "memory_num_key_value_heads": teacher.num_key_value_heads,
        # queries and keys were trained to be turned
        "use_rope": True,
        # without an activation a convolution can be the identity
        "conv_act": "linear",
        # half open at zero, and the norm after the memory doubles it
        "output_gate_act": "sigmoid",
    }


def lineage(model: PreTrainedModel) -> dict[str, str | None]:
    """`base_model` and `license` of a model that was loaded from the Hub, or of a folder with a card, as far as they can be
    known without a network."""
    name = model.config._name_or_path
    in_folder = bool(name) and Path(name).is_dir()
    on_hub = not in_folder and re.fullmatch(r"[\w.-]+/[\w.-]+", name or "") is not None
    card = Path(name) / "README.md" if in_folder else try_to_load_from_cache(name, "README.md") if on_hub else None
    license = None
    if isinstance(card, str | Path) and Path(card).is_file():
        license = ModelCard(Path(card).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    return {"base_model": name if on_hub else None, "license": license if isinstance(license, str) else None}


def _family(model: Any) -> Family:
    if not isinstance(model, PreTrainedModel):
        adapters = " Merge its adapters first (`merge_and_unload`)." if hasattr(model, "merge_and_unload") else ""
        raise ValueError(f"`model` must be a model of Transformers, got {type(model).__name__}.{adapters}")
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"`model` must be a decoder, got {name}, which has an encoder.")
    if config.get_text_config(decoder=True) is not config:
        raise ValueError(f"`model` must be a language model alone, got {name}, which has several modalities.")
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"`model` must have blocks that are known, those of {', '.join(FAMILIES)}, got {name} of model type "
            f"{config.model_type!r}. A family with the same blocks is one more line of `FAMILIES` in `miras_hf/convert.py`."
        )
    if name != family.causal_lm or not type(model).__module__.startswith("transformers."):
        raise ValueError(
            f"`model` must be a {family.causal_lm} of Transformers, got a {type(model).__module__}.{name}."
        )
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not path.endswith(("_proj", "lm_head", "embed_tokens")):
            continue
        plain = type(module) in (nn.Linear, nn.Embedding) and type(weight) is nn.Parameter
        if not plain or type(weight.data) is not Tensor or weight.dtype not in _WEIGHTS or weight.is_meta:
            dtype = str(getattr(weight, "dtype", None)).removeprefix("torch.")
            where = " on the meta device" if weight is not None and weight.is_meta else ""
            raise ValueError(
                f"`model` must have plain floating point weights, got {path}, a {type(module).__name__} with a "
                f"{type(weight).__name__} of {dtype}{where}: load it without quantisation, adapters, sharding and "
                "offloading."
            )
    if config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        raise ValueError(
            "`model.config.tie_word_embeddings` is True, and the head has a weight of its own, which a converted model "
            "would lose: call `model.tie_weights()`, or set it to False."
        )
    return family


def attention_window(teacher: PreTrainedConfig, layer: int) -> int | None:
    """Tokens that an attention layer of a teacher looks back on, itself included; `None` for the whole text."""
    types = getattr(teacher, "layer_types", None)
    slides = types[layer] == ATTENTION_LAYER if types else FAMILIES[teacher.model_type].windowed
    return getattr(teacher, "sliding_window", None) if slides else None


def _layers(layers: Any, number: int) -> list[int]:
    known = isinstance(layers, Sequence) and not isinstance(layers, str) and all(type(i) is int for i in layers)
    if not known or len(set(layers)) < len(layers) or not all(0 <= i < number for i in layers):
        raise ValueError(f"`layers` must be different indices from 0 to {number - 1}, in a list, got {layers!r}.")
    return sorted(layers)


def _config(
    teacher: PreTrainedConfig, family: Family, layers: list[int], memory: str | Mapping[str, Any]
) -> MirasConfig:
    """The config of the hybrid. What would mean nothing to its layers is left out."""
    if isinstance(memory, str):
        memory = {"model_type": memory}
    if not isinstance(memory, Mapping):
        raise ValueError(f"`memory` must be a model type or fields of a Miras config, got {memory!r}.")
    own = dict(memory)
    kind = own.pop("model_type", "yaad")
    if kind not in _CONFIGS:
        raise ValueError(f"`memory` must be one of {[*_CONFIGS]}, or fields of their configs, got {kind!r}.")
    taken = sorted(own.keys() & _OF_THE_TEACHER)
    if taken:
        raise ValueError(
            f"`memory` must leave to the teacher what is the teacher's, got {', '.join(f'`{name}`' for name in taken)}."
        )
    windows = [attention_window(teacher, i) for i in range(teacher.num_hidden_layers)]
    types = [FULL_ATTENTION_LAYER if window is None else ATTENTION_LAYER for window in windows]
    for i in layers:
        types[i] = MEMORY_LAYER
    fields = {name: getattr(teacher, name) for name in _SHARED if getattr(teacher, name, None) is not None}
    # where nobody says so, there is no such token, whatever the default is
    fields |= {name: getattr(teacher, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    fields |= family.fields | {"layer_types": types}
    attends = any(kind != MEMORY_LAYER for kind in types)
    if attends:
        fields["num_key_value_heads"] = teacher.num_key_value_heads
        fields["attention_dropout"] = teacher.attention_dropout or 0.0
    else:
        fields.pop("qk_norm", None)
    if ATTENTION_LAYER in types:
        fields["sliding_window"] = teacher.sliding_window
    if layers:
        own = {**heir_fields(teacher), **own}
    if attends or own["use_rope"]:
        fields["rope_parameters"] = copy.deepcopy(teacher.rope_parameters)
    gate = own.get("output_gate_act")
    if gate in ACT2FN and not ACT2FN[gate](torch.zeros(())) > 0:
        raise ValueError(
            f"`output_gate_act` must be open where its projection is zero, as 'sigmoid' is, got {gate!r}."
        )
    config = _CONFIGS[kind](**fields, **own)
    if layers and config.memory_key_value_heads % teacher.num_key_value_heads:
        raise ValueError(
            f"`memory_num_key_value_heads` must be a multiple of the teacher's {teacher.num_key_value_heads}, got "
            f"{config.memory_key_value_heads}."
        )
    if layers and config.memory_num_query_key_heads is not None:
        raise ValueError(
            f"`memory_num_query_key_heads` must be None, got {config.memory_num_query_key_heads}: an attention layer shares no "
            "queries."
        )
    return config


@torch.no_grad()
def _copy_weights(model: PreTrainedModel, heir: MirasForCausalLM, layers: list[int]) -> None:
    """Every weight of the teacher to its place.

    Raises:
        `ValueError`: for weights that have none, or another shape, and places that are left empty.
    """
    inherited = tuple(f"model.layers.{i}.self_attn." for i in layers)
    mixers = tuple(f"model.layers.{i}.mixer." for i in layers)
    theirs, ours = (
        {name: x for name, x in module.named_parameters(remove_duplicate=False) if not name.startswith(others)}
        for module, others in ((model, inherited), (heir, mixers))
    )
    strange = sorted(theirs.keys() ^ ours.keys())
    strange += sorted(name for name in theirs.keys() & ours.keys() if theirs[name].shape != ours[name].shape)
    if strange:
        raise ValueError(
            f"`model` must have the weights of a {type(model).__name__} and no others, got these without a place of their "
            f"shape: {', '.join(strange[:6])}."
        )
    for name, weight in theirs.items():
        ours[name].copy_(weight)
    for i in layers:
        start_as_heir(heir.model.layers[i].mixer, model.model.layers[i].self_attn)


@torch.no_grad()
def start_as_heir(mixer: MirasMixer, attention: nn.Module) -> None:
    """Gives a mixer what an attention layer has learned, and opens what it has besides.

    Args:
        mixer (`MirasMixer`): with as many heads, and a multiple of the heads of keys and values.
        attention (`nn.Module`): with `q_proj`, `k_proj`, `v_proj` and `o_proj`, and perhaps `q_norm` and `k_norm`.
    """
    for x in "qkv":
        theirs, ours = (getattr(module, f"{x}_proj") for module in (attention, mixer))
        norm = getattr(attention, f"{x}_norm", None)
        for name in ("weight", "bias"):
            value = getattr(theirs, name)
            if value is None:
                continue
            heads = value.unflatten(0, (-1, mixer.head_dim))
            if norm is not None:  # of which the norm that follows in the memory leaves the weight
                heads = heads * norm.weight.view(1, -1, *(1,) * (value.dim() - 1))
            repeats = getattr(ours, name).shape[0] // value.shape[0]
            getattr(ours, name).copy_(heads.repeat_interleave(repeats, 0).flatten(0, 1))
        convolution = getattr(mixer, f"{x}_conv").weight
        convolution.zero_()
        convolution[:, -1] = 1.0
    mixer.o_proj.load_state_dict(attention.o_proj.state_dict())
    for parameter in mixer.g_proj.parameters():
        parameter.zero_()
    mixer.o_norm.weight.fill_(1.0 / float(mixer.o_norm.act_fn(torch.zeros(()))))


__all__ = ["FAMILIES", "Family", "convert", "heir_fields", "lineage", "start_as_heir"]
