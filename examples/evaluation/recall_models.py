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
"""The models of the recall study, what reads answers from them, and the size of what they carry along a sequence.

All have the vocabulary of a task, one width and depth, and as many parameters as Moneta, by the width of their MLP,
like those of `benchmarks/models.py`.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ablation_models
import bridge_models
import torch
import torch.nn.functional as F
from ablation_points import ABLATIONS
from bridge_points import RUNGS
from models import ModelShape, build, fitted
from stored_config import config_fields
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from miras_hf import MirasConfig, MirasForCausalLM, YaadConfig, YaadForCausalLM
from miras_hf.cache import MirasLayer
from miras_hf.compat import cache_of
from miras_hf.presets import MODELS as PRESETS


@dataclass(frozen=True)
class RecallShape(ModelShape):
    """A shape whose heads are as wide for the neighbours as for ours."""

    head_dim: int = 32

    @property
    def neighbours_head_dim(self) -> int:
        return self.head_dim

    @staticmethod
    def of(width: int, layers: int, head_dim: int, vocabulary: int, chunk: int) -> "RecallShape":
        """The shape with as many heads as fill the width.

        Raises:
            `ValueError`: for a width that is no multiple of `head_dim`.
        """
        if width % head_dim:
            raise ValueError(f"`width` must be a multiple of `head_dim` = {head_dim}, got {width}.")
        return RecallShape(width, layers, width // head_dim, vocabulary, chunk, head_dim)


MODELS = {
    "yaad": "Yaad",
    "moneta": "Moneta",
    "memora": "Memora",
    "matrix": "our matrix memory",
    "deltanet": "our DeltaNet, steps up to 1",
    "signed-deltanet": "our DeltaNet, steps up to 2",
    "yaad-1": "Yaad in chunks of one token",
    "signed-yaad-1": "that, steps twice as large",
    "llama": "Llama",
    "gated-deltanet": "Gated DeltaNet (Qwen3-Next, linear layers alone)",
    "mamba2": "Mamba2",
}
DEFAULT_MODELS = ("yaad", "moneta", "memora", "matrix", "llama", "gated-deltanet")
NEIGHBOURS = ("llama", "gated-deltanet", "mamba2")
RUNG, ABLATION = "rung-", "ablation-"
"""Before the name of a rung of the bridge, or of an ablation, which are models like the others."""
PRESET = "preset-"
"""Before the name of a published model that `MirasConfig.from_preset` knows."""


def named(pattern: str) -> list[str]:
    """Names of models that match, with `*` and `?` as in file names, those of rungs, ablations and presets where `rung-`,
    `ablation-` or `preset-` is written.

    Raises:
        `ValueError`: for a pattern that matches none.
    """
    if pattern.startswith(RUNG):
        names = [f"{RUNG}{name}" for name in RUNGS]
    elif pattern.startswith(ABLATION):
        # corrupted text is one of a language model
        names = [f"{ABLATION}{name}" for name, ablation in ABLATIONS.items() if ablation.trained_with is None]
    elif pattern.startswith(PRESET):
        names = [f"{PRESET}{name}" for name in PRESETS]
    else:
        names = list(MODELS)
    found = fnmatch.filter(names, pattern)
    if not found:
        raise ValueError(
            f"{pattern!r} names no model; there are {', '.join(MODELS)}, {RUNG} with a rung of bridge.py, {ABLATION} with one "
            f"of ablations.py, and {PRESET} with a model of `MirasConfig.from_preset`."
        )
    return found


def build_model(name: str, shape: RecallShape, seed: int) -> tuple[nn.Module, Callable[[Tensor], dict[str, Any]]]:
    """A new model, and what its forward takes besides ids."""
    if name.startswith(RUNG):
        return bridge_models.build_model(RUNGS[name.removeprefix(RUNG)].point, shape, seed)
    if name.startswith(ABLATION):
        return ablation_models.build_model(ABLATIONS[name.removeprefix(ABLATION)], shape, seed)
    if name in OURS or name.startswith(PRESET):
        model_class, config_of = OURS[name] if name in OURS else _preset(name.removeprefix(PRESET))
        config = fitted(model_class, lambda size: config_of(**_fields(shape, size)), shape, 8)
        torch.manual_seed(seed)
        return _without_cache(model_class(config)), lambda input_ids: {}
    whole = build(name, shape, seed=seed)
    if name == "gated-deltanet":
        bridge_models.start_gates_as_published(whole.module)
    return _without_cache(whole.module), whole.arguments


def _without_cache(model: nn.Module) -> nn.Module:
    model.config.use_cache = False
    return model


def _fields(shape: ModelShape, intermediate_size: int) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": intermediate_size,
        "chunk_size": shape.chunk,
    }


def _preset(name: str, **fields: Any) -> tuple[type, Callable[..., MirasConfig]]:
    return MirasForCausalLM, lambda **shape: MirasConfig(**{**shape, **PRESETS[name].fields, **fields})


def _yaad_of_tokens(times: float) -> tuple[type, Callable[..., YaadConfig]]:
    """Yaad whose gradients are every token's own; the default's largest step, which takes a token's error away, some times."""

    def config(**shape: Any) -> YaadConfig:
        shape["chunk_size"] = 1
        return YaadConfig(**shape, eta_max=times * YaadConfig(**shape).eta_max)

    return YaadForCausalLM, config


OURS = {
    "matrix": (MirasForCausalLM, lambda **shape: MirasConfig(**shape, memory_architecture="matrix")),
    "deltanet": _preset("deltanet"),
    # a write that takes twice the error away turns it round, which following a state needs (arXiv 2411.12537)
    "signed-deltanet": _preset("deltanet", eta_max=2.0),
    "yaad-1": _yaad_of_tokens(1.0),
    "signed-yaad-1": _yaad_of_tokens(2.0),
}
"""Class and config of models that `benchmarks/models.py` does not have."""


def described(name: str, model: nn.Module) -> dict[str, Any]:
    """What a model of `build_model` is, for the JSON of its training: its config if it is one of ours, and what was done to
    it after it was built; of the neighbours nothing, which their own defaults make.
    """
    config = model.config
    about = {
        "config": config_fields(config) if isinstance(config, MirasConfig) else None,
        "change": None,
        "refitted": True,
    }
    if name.startswith(RUNG):
        about["change"] = RUNGS[name.removeprefix(RUNG)].point.as_dict()
    elif name.startswith(ABLATION):
        ablation = ABLATIONS[name.removeprefix(ABLATION)]
        about |= {"change": ablation.change, "refitted": ablation.refitted}
    return about


class ShortConvolution(nn.Module):
    """What comes in, and a causal convolution of three tokens, channel by channel, added to it."""

    def __init__(self, width: int, taps: int = 3):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(width, 1, taps))

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, length, width]` of as many."""
        past = F.pad(x.transpose(1, 2), (self.weight.shape[-1] - 1, 0))
        return x + F.conv1d(past, self.weight, groups=x.shape[-1]).transpose(1, 2)


def add_convolutions(model: nn.Module) -> None:
    """Puts a `ShortConvolution` between every layer's first norm and what mixes its tokens. Such a model trains and is
    measured; it does not decode token by token.

    Raises:
        `TypeError`: for a layer whose first norm has no name that is known here.
    """
    for layer in model.base_model.layers:
        norm = getattr(layer, "input_layernorm", None) or getattr(layer, "norm", None)
        if norm is None:
            raise TypeError(f"The first norm of a {type(layer).__name__} is not known.")
        layer.short_convolution = ShortConvolution(model.config.hidden_size)
        # layers look at their norm's weight, so it stays where it is
        norm.register_forward_hook(lambda norm, args, output, layer=layer: layer.short_convolution(output))


class Reader(nn.Module):
    """Logits of a causal language model at the positions that are asked about."""

    def __init__(self, model: nn.Module, arguments: Callable[[Tensor], dict[str, Any]]):
        super().__init__()
        self.model, self.arguments = model, arguments

    def hidden(self, ids: Tensor) -> Tensor:
        return self.model.base_model(ids, **self.arguments(ids)).last_hidden_state

    def forward(self, ids: Tensor, asked: Tensor) -> Tensor:
        """`[number of True in asked, vocabulary]` of `ids` and `asked`, `[batch, length]`, in their order."""
        return self.model.get_output_embeddings()(self.hidden(ids)[asked])


class StateReader(Reader):
    """Logits at every position from the output at the last one, by an MLP that is told the position: MAD's decoder for
    compression (arXiv 2403.17844), two layers as wide as the model, on the model's own output matrix."""

    def __init__(self, model: nn.Module, arguments: Callable[[Tensor], dict[str, Any]]):
        super().__init__(model, arguments)
        width = model.config.hidden_size
        layers = (nn.RMSNorm(width), nn.Linear(width, width), nn.GELU())
        more = (nn.RMSNorm(width), nn.Linear(width, width), nn.GELU(), nn.RMSNorm(width))
        self.decoder = nn.Sequential(*layers, *more)

    def forward(self, ids: Tensor, asked: Tensor) -> Tensor:
        last = self.hidden(ids)[:, -1:]
        x = last + positions(ids.shape[1], last.shape[-1]).to(last)
        return self.model.get_output_embeddings()(self.decoder(x[asked]))


def positions(length: int, width: int) -> Tensor:
    """`[length, width]` sines and cosines of positions, with periods from 2 pi to 20,000 pi."""
    rates = 10_000.0 ** -torch.linspace(0, 1, width // 2)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@torch.no_grad()
def state_size(model: nn.Module, arguments: Callable[[Tensor], dict[str, Any]], length: int) -> dict[str, int] | None:
    """Numbers that the first layer carries for one sequence after `length` tokens.

    `memory` is what it recalls from: keys and values, the state of a recurrence, or the weights of a memory. `carried`
    is all it needs for the next token: the last inputs of convolutions, those of `add_convolutions` as well, and what
    waits in an unfinished chunk. `None` for a rung of the bridge whose memory is Transformers' delta rule: it has no cache
    here.

    Raises:
        `TypeError`: for a cache that is not known here.
    """
    if any(isinstance(module, bridge_models.DeltaRule) for module in model.modules()):
        return None
    training, device = model.training, next(model.parameters()).device
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    layer = cache_of(model.eval()(ids, use_cache=True, **arguments(ids))).layers[0]
    model.train(training)
    if isinstance(layer, MirasLayer):
        state = layer.memory
        waiting = [*state.inputs, *state.gradients, state.eta, state.log_decay, layer.conv_tail]
        memory = list(state.dual)
    elif isinstance(layer, LinearAttentionLayer):
        memory, waiting = list(layer.recurrent_states.values()), list(layer.conv_states.values())
    elif isinstance(layer, DynamicLayer):
        memory, waiting = [layer.keys, layer.values], []
    else:
        raise TypeError(f"The numbers that a {type(layer).__name__} carries are not known.")
    before = [module for module in model.base_model.layers[0].modules() if isinstance(module, ShortConvolution)]
    inputs = sum(module.weight.shape[0] * (module.weight.shape[-1] - 1) for module in before)
    size = sum(t.numel() for t in memory)
    return {"memory": size, "carried": size + sum(t.numel() for t in waiting) + inputs}


__all__ = [
    "ABLATION",
    "DEFAULT_MODELS",
    "MODELS",
    "NEIGHBOURS",
    "PRESET",
    "RUNG",
    "Reader",
    "RecallShape",
    "ShortConvolution",
    "StateReader",
    "add_convolutions",
    "build_model",
    "described",
    "named",
    "positions",
    "state_size",
]
