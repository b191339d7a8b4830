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
"""A memory on disk: read a long text once, keep what the model made of it as one safetensors file, ask later.

The file holds what `generate()` needs to go on exactly where the reading stopped, for every row of the batch, and what
tells whether a model understands it: the config's fields, a digest of the weights, and a checksum of the whole.
"""

import copy
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticCache

from .built_config import check_as_built
from .cache import MirasLayer
from .config_choices import own_parameters
from .config_meaning import with_later_fields, without_meaningless
from .configuration_miras import ATTENTION_LAYER, FULL_ATTENTION_LAYER, MEMORY_LAYER, MirasConfig
from .memory import MemoryParameters, MemoryState, folds_at_once, initial_memory_state
from .memory_file import (
    DTYPES,
    Expected,
    Header,
    as_bytes,
    check_tensors,
    read_memory_file,
    write_memory_file,
)
from .modeling_miras import MirasModel


# What a memory means does not depend on these; any other field, those to come included, changes what the model computes.
NEUTRAL_FIELDS = {
    "attention_dropout",
    "base_model",
    "bos_token_id",
    "conv_initializer_range",
    "eos_token_id",
    "initial_hidden_scale",
    "initial_memory_scale",
    "initializer_range",
    "license",
    "max_half_life",
    "memory_backend",
    "min_half_life",
    "pad_token_id",
    "tie_word_embeddings",
    "use_cache",
    # what was read is in the memory, not its ids
    "vocab_size",
}
WEIGHT_SAMPLES = 64

_CACHE_LAYERS = {
    MEMORY_LAYER: MirasLayer,
    ATTENTION_LAYER: DynamicSlidingWindowLayer,
    FULL_ATTENTION_LAYER: DynamicLayer,
}


def save_memory(
    cache: Cache,
    path: str | os.PathLike,
    model: nn.Module,
    *,
    attention_mask: Tensor | None = None,
    check_weights: bool = True,
) -> None:
    """
    Write what a model has read to one safetensors file. Its size does not grow with the text, unless the model has layers
    of full attention, whose keys and values are written, too.

    Args:
        cache (`Cache`):
            The cache after reading, of `generate()` or of a forward with `use_cache=True`; not a `StaticCache`.
        path (`str` or `os.PathLike`): File to write. It appears complete or not at all.
        model (`nn.Module`): The Miras model that has read, with any head, wrapped by PEFT or not.
        attention_mask (`torch.Tensor` of shape `[rows, tokens]`, *optional*):
            Mask of the text read, for [`load_memory`] to give back. Needed only if rows have pads and the model has
            attention layers, which must be told again where the pads are.
        check_weights (`bool`, *optional*, defaults to `True`):
            Whether to store a digest of the weights.

    Raises:
        `ValueError`: if the model has no memory layers; if the cache has read nothing, is not this model's, holds what is not finite, or would need the mask;
            if the mask is not that of the text read; if the weights are spread over processes, or offloaded and not
            excepted by `check_weights=False`.
        `OSError`: if `path` cannot be written.

    ```python
    >>> cache = DynamicCache(config=model.config)
    >>> with torch.no_grad():
    ...     model(**tokenizer(book, return_tensors="pt"), cache=cache, logits_to_keep=1)
    >>> save_memory(cache, "book.safetensors", model)

    >>> cache = load_memory("book.safetensors", model)
    >>> question = tokenizer("Who did it?", add_special_tokens=False, return_tensors="pt").input_ids
    >>> model.generate(question, cache=cache, max_new_tokens=64)
    ```"""
    path, decoder = _path(path), _decoder_with_memories(model)
    tensors = _tensors(cache, decoder)
    tokens = int(cache.get_seq_length())
    counts = next(layer.memory.count for layer in cache.layers if isinstance(layer, MirasLayer))
    if attention_mask is not None:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        if got != (len(counts), tokens):
            raise ValueError(
                f"`attention_mask` must have the shape of the text read, {(len(counts), tokens)}, got {got}."
            )
        tensors["attention_mask"] = attention_mask.bool()
        if not torch.equal(tensors["attention_mask"].to(attention_mask.dtype), attention_mask):
            raise ValueError("`attention_mask` must hold 0 and 1 only, got other values.")
    elif decoder.config.has_attention and bool((counts != tokens).any()):
        raise ValueError(
            "`attention_mask` must be given, the mask of the text read: rows of this cache have pads, and attention "
            "layers cannot go on without knowing where."
        )
    # own contiguous copies: safetensors refuses views that share memory
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    header = Header(
        rows=len(counts),
        tokens=tokens,
        dtype=str(decoder.dtype),
        config=config_fingerprint(decoder.config),
        weights=weights_fingerprint(decoder) if check_weights else None,
    )
    # what could not be loaded is not written
    header.check("`cache`")
    _check_state("`cache`", header, tensors, decoder)
    write_memory_file(path, header, tensors)


@overload
def load_memory(
    path: str | os.PathLike,
    model: nn.Module,
    *,
    check_weights: bool = True,
    return_attention_mask: Literal[False] = False,
) -> DynamicCache: ...


@overload
def load_memory(
    path: str | os.PathLike, model: nn.Module, *, check_weights: bool = True, return_attention_mask: Literal[True]
) -> tuple[DynamicCache, Tensor]: ...


def load_memory(
    path: str | os.PathLike, model: nn.Module, *, check_weights: bool = True, return_attention_mask: bool = False
) -> DynamicCache | tuple[DynamicCache, Tensor]:
    """
    Read a file of [`save_memory`] into a cache from which `generate()` continues exactly as from the one saved.

    The text itself is not read again: pass only new ids, with an attention mask that spans the text and them. A cache
    moves on as it is used; take `copy.deepcopy(cache)` for each of several questions.

    Args:
        path (`str` or `os.PathLike`): The file.
        model (`nn.Module`): The model to go on with, which must be the one that has read.
        check_weights (`bool`, *optional*, defaults to `True`):
            Whether to compare the weights, by a sample rounded to bfloat16, so that they may be loaded in another
            dtype. Adapters of PEFT count while they are in use, with their scaling; idle ones do not. `False` for
            weights that are meant to differ: quantized, fine-tuned, or with resized embeddings since; and for files that
            were saved without their digest.
        return_attention_mask (`bool`, *optional*, defaults to `False`):
            Whether to return the mask of the text read, too.

    Returns:
        `DynamicCache`, on the model's devices; `get_seq_length()` is the number of tokens read, pads included. With
        `return_attention_mask` a tuple of it and a `torch.Tensor` of shape `[rows, tokens]`.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if the file is damaged or something else, or of another model, with the fields of the config that
            differ and both values; if anything in it is not what this model could have saved, whoever signed it, with
            the field or tensor, its value and what is allowed. Nothing is made of such a file.
    """
    path, decoder = _path(path), _decoder_with_memories(model)
    header, tensors = read_memory_file(path)
    _check_model(path, header, decoder, check_weights)
    _check_state(str(path), header, tensors, decoder)

    cache, tokens = DynamicCache(config=decoder.config), header.tokens
    if str(decoder.dtype) != header.dtype:
        # memories compute in float32, whatever the model around them does
        wide = torch.promote_types(decoder.dtype, torch.float32)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                narrow = name.endswith((".conv_tail", ".keys", ".values"))
                tensors[name] = tensor.to(decoder.dtype if narrow else wide)
    for i, (cached, layer) in enumerate(zip(cache.layers, decoder.layers, strict=True)):
        state = {name: tensors[f"layers.{i}.{name}"].to(_device(layer)) for name in _shapes(layer, 1)}
        if isinstance(cached, MirasLayer):
            conv_tail = state.pop("conv_tail")
            cached.update_memory(_unflatten(state), conv_tail, tokens)
        else:
            cached.update(state["keys"], state["values"])
            if layer.layer_type == ATTENTION_LAYER:  # a window keeps the last of them only
                cached.cumulative_length = tokens
    if not return_attention_mask:
        return cache
    mask = tensors.get("attention_mask")
    if mask is None:
        # without attention layers the number of pads matters, their place does not
        mask = torch.arange(tokens) >= tokens - _first_count(tensors)[:, None]
    return cache, mask.long().to(_device(decoder))


def config_fingerprint(config: MirasConfig) -> dict[str, Any]:
    """The fields of a Miras config that decide what a memory means, as JSON gives them back."""
    own, inherited = ({field.name for field in fields(kind)} for kind in (type(config), PreTrainedConfig))
    names = sorted(own - inherited - NEUTRAL_FIELDS | own_parameters(config).keys())
    values = {"model_type": config.model_type, **{name: getattr(config, name) for name in names}}
    return json.loads(json.dumps(values))


def weights_fingerprint(model: nn.Module) -> str:
    """
    A digest of a Miras model's weights, without its head, that is the same in float32 and bfloat16.

    It takes `WEIGHT_SAMPLES` numbers of every parameter, and of what scales those that are integers: enough to notice any
    training step, and no guard against forgery. Of PEFT's adapters it sees those in use, with their scaling: a model whose
    adapters are disabled or idle has the digest of the one without them.

    Raises:
        `ValueError`: if weights are not in this process's memory, or are about to be changed by PEFT.
    """
    decoder = _decoder(model)
    names = {name: _name_in_use(decoder, name) for name, _ in decoder.named_parameters()}
    digest = _digest(decoder, {name: used for name, used in names.items() if used is not None})
    for name, layer in decoder.named_modules():
        for i, adapter in enumerate(_adapters_in_use(layer) if _is_adapted(layer) else ()):
            for key, scales in sorted(vars(layer).items()):
                if key.endswith("scaling") and isinstance(scales, Mapping) and adapter in scales:
                    digest.update(f"{name}.{key}.{i} {float(scales[adapter])}".encode())
    return digest.hexdigest()


def _earlier_fingerprint(decoder: MirasModel) -> str | None:
    """
    The digest of earlier versions, which took the floating point parameters of all adapters, and no scaling. `None` without
    adapters, where it is the same as now, and where it leaves open which of them were in use or what the integers were.
    """
    layers = [layer for layer in decoder.modules() if _is_adapted(layer) or _is_wrapper(layer)]
    loaded = {adapter for layer in layers for by_adapter in _by_adapter(layer).values() for adapter in by_adapter}
    if len(loaded) != 1 or any(layer.disable_adapters or {*layer.active_adapters} != loaded for layer in layers):
        return None
    if not all(parameter.is_floating_point() for parameter in decoder.parameters()):
        return None
    return _digest(decoder, {name: name for name, _ in decoder.named_parameters()}).hexdigest()


def _digest(decoder: MirasModel, names: Mapping[str, str]) -> "hashlib._Hash":
    """
    Of a sample of some parameters.

    Args:
        decoder (`MirasModel`): whose they are.
        names (`Mapping[str, str]`): their names, and under which they are taken.

    Raises:
        `ValueError`: if one is not in this process's memory.
    """
    digest, parameters = hashlib.sha256(), dict(decoder.named_parameters())
    for name, used in sorted(names.items(), key=lambda pair: pair[1]):
        parameter = parameters[name]
        if parameter.is_meta:
            raise ValueError(f"`model` has offloaded weights ({name}): pass `check_weights=False` to do without them.")
        weight = _unpacked(parameter)
        # torchao's quantized tensors are made of others and have no flat view
        sample = _sample(weight.dequantize() if hasattr(weight, "__tensor_flatten__") else weight)
        if sample.is_floating_point():
            digest.update(f"{used} {tuple(weight.shape)}".encode())
            digest.update(as_bytes(sample.to(device="cpu", dtype=torch.bfloat16)))
            continue
        digest.update(f"{used} {tuple(weight.shape)} {sample.dtype}".encode())
        digest.update(as_bytes(sample.cpu()))
        scales = _scales(parameter, decoder.get_submodule(name.rpartition(".")[0]))
        if scales is not None:
            digest.update(as_bytes(_sample(scales).to(device="cpu", dtype=torch.bfloat16)))
    return digest


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // WEIGHT_SAMPLES)][:WEIGHT_SAMPLES]


def _unpacked(parameter: nn.Parameter) -> Tensor:
    """A weight in the order in which it was loaded: on some CPUs the first forward of bitsandbytes changes that of 4 bits."""
    state = getattr(parameter, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return parameter.detach()
    # its inverse changes the state that it is given
    unpack = sys.modules["bitsandbytes"].functional._convert_weight_packed_for_cpu_inverse
    return unpack(parameter.detach(), copy.copy(state))[0]


def _scales(parameter: nn.Parameter, module: nn.Module) -> Tensor | None:
    """What bitsandbytes multiplies integers by, the same before and after the first forward, which moves it."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        scales = getattr(parameter, "SCB", None)
        return getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
    if getattr(state, "packing_format_for_cpu", False):
        return state.absmax.T
    if not state.nested:
        return state.absmax
    outer = state.state2
    blocks = outer.absmax.repeat_interleave(outer.blocksize)[: state.absmax.numel()]
    return outer.code[state.absmax.flatten().long()] * blocks + state.offset


# PEFT's layers are known by what they have: it need not be installed.
def _is_adapted(module: nn.Module) -> bool:
    return "base_layer" in module._modules and hasattr(module, "active_adapters")


def _is_wrapper(module: nn.Module) -> bool:
    return "modules_to_save" in module._modules and "original_module" in module._modules


def _by_adapter(layer: Any) -> dict[str, nn.ModuleDict | nn.ParameterDict]:
    """Those parts of one of PEFT's layers that have something for each adapter."""
    children = layer.named_children()
    return {
        name: x for name, x in children if isinstance(x, nn.ModuleDict | nn.ParameterDict) and name != "base_layer"
    }


def _adapters_in_use(layer: Any) -> list[str]:
    """The adapters that one of PEFT's layers computes beside what it wraps.

    Raises:
        `ValueError`: if they are merged and disabled.
    """
    merged = getattr(layer, "merged_adapters", ())
    if merged and layer.disable_adapters:
        raise ValueError(
            f"`model` has adapters that are merged and disabled ({', '.join(merged)}), which PEFT takes out of the weights "
            "at its next call only: call `unmerge_adapter()` before, or pass `check_weights=False`."
        )
    return [] if merged or layer.disable_adapters else list(layer.active_adapters)


def _name_in_use(decoder: MirasModel, name: str) -> str | None:
    """
    The name of a parameter as if PEFT had wrapped nothing, with an adapter's place among those in use for its name. `None`
    if the model computes without it.
    """
    module: Any = decoder
    names, parts = [], iter(name.split("."))
    for part in parts:
        inside = getattr(module, part)
        if _is_wrapper(module):
            # it computes what it wraps, or one adapter's copy of that
            copies, adapters = module.modules_to_save, _adapters_in_use(module)
            wanted = adapters[0] if adapters and {*adapters} <= {*copies} else None
            adapter = next(parts) if inside is copies else None
            if adapter != wanted:
                return None
            inside = inside if adapter is None else copies[adapter]
        elif _is_adapted(module) and part in _by_adapter(module):
            adapter, adapters = next(parts), _adapters_in_use(module)
            if adapter not in adapters:
                return None
            inside = inside[adapter]
            names += [part, str(adapters.index(adapter))]
        elif part != "token_adapter" and not (part == "base_layer" and _is_adapted(module)):
            names.append(part)
        module = inside
    return ".".join(names)


def _path(path: str | os.PathLike) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"`path` must be a string or path, got {type(path).__name__}.")
    return Path(path)


def _decoder(model: nn.Module) -> MirasModel:
    """The decoder inside a model with a head, an adapter, a wrapper."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    decoder = next((module for module in modules if isinstance(module, MirasModel)), None)
    if decoder is None:
        raise ValueError(f"`model` must be a Miras model, got {type(model).__name__}.")
    if any(isinstance(parameter, DTensor) for parameter in decoder.parameters()):
        raise ValueError(
            "`model` is spread over processes, each of which holds a part of the memory only: save and load memories "
            "with a model that is whole."
        )
    check_as_built(decoder.config, decoder._built_with)
    return decoder


def _decoder_with_memories(model: nn.Module) -> MirasModel:
    decoder = _decoder(model)
    if not decoder.config.has_memory:
        raise ValueError(
            f"`model` must have memory layers, got a {type(model).__name__} whose layers are all attention: there is no "
            "memory to save."
        )
    return decoder


def _device(layer: nn.Module) -> torch.device:
    """Where a layer computes: Accelerate may keep its weights elsewhere until then."""
    hooks = (getattr(module, "_hf_hook", None) for module in layer.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), None)
    return next(layer.parameters()).device if device is None else torch.device(device)


def _flatten(memory: MemoryState) -> dict[str, Tensor]:
    tensors = {}
    for field, value in memory._asdict().items():
        tensors |= {f"{field}.{i}": x for i, x in enumerate(value)} if isinstance(value, tuple) else {field: value}
    return tensors


def _unflatten(tensors: dict[str, Tensor]) -> MemoryState:
    values: dict[str, Any] = {}
    for name, tensor in tensors.items():
        field, _, part = name.partition(".")
        values[field] = (*values.get(field, ()), tensor) if part else tensor
    return MemoryState(**values)


def _tensors(cache: Cache, decoder: MirasModel) -> dict[str, Tensor]:
    """What the layers of a cache hold, by name.

    Raises:
        `ValueError`: if the cache is of another model or has read nothing.
    """
    if isinstance(cache, StaticCache):
        raise ValueError(
            "`cache` must be a `DynamicCache`, the default, got a StaticCache, which cannot be saved: read with "
            '`DynamicCache(config=model.config)`, or `generate()` without `cache_implementation="static"`.'
        )
    kinds = [_CACHE_LAYERS[layer_type] for layer_type in decoder.config.layer_types]
    layers = cache.layers if isinstance(cache, Cache) else ()
    if [type(layer) for layer in layers] != kinds:
        got = [type(layer).__name__ for layer in layers] if isinstance(cache, Cache) else f"a {type(cache).__name__}"
        raise ValueError(
            "`cache` must be made for this model, `DynamicCache(config=model.config)` with layers "
            f"{[kind.__name__ for kind in kinds]}, got {got}."
        )
    lengths = {layer.get_seq_length() for layer in cache.layers}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"`cache` must have read a text, the same in all layers, got lengths {sorted(lengths)}.")
    tensors = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, MirasLayer):
            state = {**_flatten(layer.memory), "conv_tail": layer.conv_tail}
        else:
            # one that records what may be taken back keeps more than its window
            filled = _filled(decoder.layers[i], int(layer.get_seq_length()))
            state = {"keys": layer.keys, "values": layer.values}
            state = {name: x[:, :, max(x.shape[2] - filled, 0) :] for name, x in state.items()}
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in state.items()}
    return tensors


def _filled(layer: Any, tokens: int) -> int:
    """How many keys and values an attention layer needs of a text to go on."""
    window = layer.self_attn.sliding_window
    return tokens if window is None else min(tokens, window - 1)


def _shapes(layer: Any, rows: int, tokens: int = 0) -> dict[str, list[int]]:
    """Names and shapes of a decoder layer's state after `tokens`."""
    if layer.layer_type != MEMORY_LAYER:
        config, filled = layer.self_attn.config, _filled(layer, tokens)
        return dict.fromkeys(("keys", "values"), [rows, config.num_key_value_heads, filled, config.head_dim])
    mixer = layer.mixer
    memory, head_dim = mixer.memory, mixer.head_dim
    parameters = MemoryParameters(
        tuple(parameter.to("meta") for parameter in memory.initial_state),
        memory.norm_weight.to("meta"),
        memory.norm_bias.to("meta"),
    )
    gates = (mixer.alpha,) if mixer.eta is None else (mixer.eta, mixer.alpha)
    gate_dim = head_dim if any(gate.per_channel for gate in gates) else 1
    state = _flatten(initial_memory_state(memory.rule, parameters, 1, gate_dim))
    channels = sum(mixer.convolution(name).weight.shape[0] for name in mixer.projected)
    return {
        **{name: [rows, *tensor.shape[1:]] for name, tensor in state.items()},
        "conv_tail": [rows, mixer.conv_kernel_size - 1, channels],
    }


def _first_count(tensors: dict[str, Tensor]) -> Tensor:
    return next(tensor for name, tensor in tensors.items() if name.endswith(".count"))


def _check_model(path: str | os.PathLike, header: Header, decoder: MirasModel, check_weights: bool) -> None:
    """Raises a `ValueError` unless the file is of this model."""
    here, stored = config_fingerprint(decoder.config), with_later_fields(header.config)
    # earlier versions also wrote fields that mean nothing, under the choices that are made or at all
    there = without_meaningless(type(decoder.config), stored, {})
    there = {name: value for name, value in there.items() if name not in NEUTRAL_FIELDS}
    # any other field younger than the file means, at its default, what was computed before it was there
    default = config_fingerprint(type(decoder.config)()) | there
    differing = [
        f"`{name}` ({default.get(name)!r} there, {value!r} here)"
        for name, value in here.items()
        if name not in default or not _same(default[name], value)
    ]
    if differing or set(there) - set(here):
        differing += [f"`{name}` ({there[name]!r} there, unknown here)" for name in sorted(set(there) - set(here))]
        raise ValueError(f"{path} is the memory of a model with another config: {', '.join(differing)}.")
    if check_weights and header.weights is None:
        raise ValueError(
            f"{path} has no digest of the weights, since it was saved with `check_weights=False`: pass that here, too."
        )
    if check_weights and header.weights not in (weights_fingerprint(decoder), _earlier_fingerprint(decoder)):
        raise ValueError(
            f"{path} is the memory of a model with other weights: load the weights that have read, with the same adapters "
            "in use, or pass `check_weights=False` if they are meant to differ (quantized, fine-tuned or with resized "
            "embeddings since)."
        )


def _same(there: Any, here: Any) -> bool:
    """Equality of JSON values, where Python takes `True` for 1."""
    if isinstance(there, list) and isinstance(here, list):
        return len(there) == len(here) and all(map(_same, there, here))
    if isinstance(there, dict) and isinstance(here, dict):
        return there.keys() == here.keys() and all(_same(there[name], value) for name, value in here.items())
    return there == here and isinstance(there, bool) == isinstance(here, bool)


def _check_state(source: str, header: Header, tensors: dict[str, Tensor], decoder: MirasModel) -> None:
    """Raises a `ValueError` unless the tensors are a state of this model after that many tokens, and agree with each
    other."""
    config, rows, tokens = decoder.config, header.rows, header.tokens
    dtype = DTYPES[header.dtype]
    # memories compute in float32 at least; what the projections gave, autocast may have narrowed
    wide, narrow = torch.promote_types(dtype, torch.float32), {dtype, torch.float32, torch.bfloat16, torch.float16}
    ranges = {
        # rounding may put the product of the largest step and a sigmoid of one above it
        "eta": (0.0, max(config.eta_max, float(config.has_erase_key)) * (1 + 1e-6)),
        "log_decay": (config.min_log_alpha * config.chunk_size * (1 + 1e-5), 0.0),
        "count": (0, tokens),
    }
    expected = {"attention_mask": Expected([rows, tokens], (torch.bool,))} if "attention_mask" in tensors else {}
    for i, layer in enumerate(decoder.layers):
        for name, shape in _shapes(layer, rows, tokens).items():
            dtypes = (wide,) if name not in ("conv_tail", "keys", "values") else tuple(sorted(narrow, key=str))
            dtypes = (torch.int64,) if name == "count" else dtypes
            expected[f"layers.{i}.{name}"] = Expected(shape, dtypes, *ranges.get(name, (None, None)))
    check_tensors(source, tensors, expected)

    counts = {name: tensor.tolist() for name, tensor in tensors.items() if name.endswith(".count")}
    first, read = next(iter(counts.items()))
    for name, other in counts.items():
        if other != read:
            raise ValueError(f"{source}: {name} must be the tokens that {first} has, {read}, got {other}.")
    mask = tensors.get("attention_mask")
    if mask is not None and mask.sum(-1).tolist() != read:
        raise ValueError(
            f"{source}: attention_mask must have as many real tokens as the memories have read, {read}, got "
            f"{mask.sum(-1).tolist()}."
        )
    if mask is None and config.has_attention and read != [tokens] * rows:
        raise ValueError(
            f"{source}: {first} must be {tokens} in every row, since there is no attention_mask, got {read}."
        )
    slots = torch.arange(config.chunk_size)
    phase = (torch.tensor(read) * config.slots_per_token % config.chunk_size)[:, None]
    for i, layer in enumerate(decoder.layers):
        if layer.layer_type != MEMORY_LAYER:
            continue
        eta, log_decay = (tensors[f"layers.{i}.{name}"].ne(0).any(-1).any(1) for name in ("eta", "log_decay"))
        taken = eta | (log_decay & (slots < phase))
        # tokens that were folded at once have left theirs empty
        wrong = taken & (slots >= phase) if folds_at_once(layer.mixer.memory.rule) else taken != (slots < phase)
        if wrong.any():
            raise ValueError(
                f"{source}: layers.{i}.eta must have written to the first `count % chunk_size` = "
                f"{phase[:, 0].tolist()} slots of a chunk and to no others, got {taken.sum(-1).tolist()} slots."
            )


__all__ = ["config_fingerprint", "load_memory", "save_memory", "weights_fingerprint"]
