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
"""The layers that `layer_cpu.py` compares, each behind the same small interface and looked up by name.

A builder imports what it needs when it is called, so that a missing package costs one entry and not the run.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Shape:
    """One layer's shape, the same for everybody."""

    width: int = 256
    heads: int = 4
    chunk: int = 64

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "head_dim": self.head_dim}


@dataclass
class Competitor:
    """A layer with its projections: `forward` maps `[B, T, width]` to the same, `prefill` and `step` decode."""

    module: nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    prefill: Callable[[torch.Tensor], Any]
    step: Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]
    settings: str


BUILDERS: dict[str, Callable[[Shape], Competitor]] = {}
LABELS: dict[str, str] = {}
OURS: set[str] = set()


def register(name: str, label: str, ours: bool = False):
    def add(builder):
        BUILDERS[name], LABELS[name] = builder, label
        if ours:
            OURS.add(name)
        return builder

    return add


def build(name: str, shape: Shape, seed: int = 0) -> Competitor:
    torch.manual_seed(seed)
    return BUILDERS[name](shape)


@register("titans", "titans-pytorch")
def build_titans(shape: Shape) -> Competitor:
    return _titans(shape, "defaults: every gradient at the initial memory")


@register("titans-anchored", "titans-pytorch, re-anchored")
def build_titans_anchored(shape: Shape) -> Competitor:
    # with the defaults for the other two this is NaN after some 700 tokens of unit gaussian input; these two are
    # what the package's own training script sets
    settings = {"batch_size": shape.chunk, "qk_rmsnorm": True, "default_step_transform_max_lr": 0.1}
    return _titans(shape, ", ".join(f"{k}={v}" for k, v in settings.items()), **settings)


def _titans(shape: Shape, text: str, **settings) -> Competitor:
    from titans_pytorch import NeuralMemory

    module = NeuralMemory(
        dim=shape.width, dim_head=shape.head_dim, heads=shape.heads, chunk_size=shape.chunk, **settings
    )
    return Competitor(
        module,
        forward=lambda x: module(x)[0],
        prefill=lambda x: module(x)[1],
        step=lambda x, state: module(x, state=state),
        settings=f"titans-pytorch {version('titans-pytorch')} NeuralMemory, 2-layer MLP memory, {text}",
    )


@register("ttt-mlp", "TTT-MLP")
def build_ttt_mlp(shape: Shape) -> Competitor:
    from ttt_mlp import TTTMLP

    module = TTTMLP(shape.width, shape.heads, mini_batch_size=shape.chunk)
    return Competitor(
        module,
        forward=module,
        prefill=lambda x: module.run(x, module.initial_state(x.shape[0]))[1],
        step=module.step,
        settings=f"benchmarks/ttt_mlp.py, mini-batch {shape.chunk}",
    )


@register("gated-deltanet", "Gated DeltaNet")
def build_gated_deltanet(shape: Shape) -> Competitor:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=shape.width,
        linear_num_key_heads=shape.heads,
        linear_num_value_heads=shape.heads,
        linear_key_head_dim=shape.head_dim,
        linear_value_head_dim=shape.head_dim,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    module = Qwen3NextGatedDeltaNet(config, layer_idx=0)
    return _with_cache_params(module, config, "Qwen3NextGatedDeltaNet, chunk 64 (fixed by the module)")


@register("mamba2", "Mamba2")
def build_mamba2(shape: Shape) -> Competitor:
    return _mamba2(shape, chunk_size=shape.chunk)


@register("mamba2-chunk256", "Mamba2, chunk 256")
def build_mamba2_chunk256(shape: Shape) -> Competitor:
    return _mamba2(shape, chunk_size=256)


def _mamba2(shape: Shape, chunk_size: int) -> Competitor:
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    # the published layer: twice the width inside, a state of 128 per channel, one group
    config = Mamba2Config(
        hidden_size=shape.width,
        expand=2,
        num_heads=2 * shape.heads,
        head_dim=shape.head_dim,
        state_size=128,
        n_groups=1,
        chunk_size=chunk_size,
        num_hidden_layers=1,
    )
    module = Mamba2Mixer(config, layer_idx=0)
    return _with_cache_params(module, config, f"Mamba2Mixer, expand 2, state 128, 1 group, chunk {chunk_size}")


def _with_cache_params(module: nn.Module, config, settings: str) -> Competitor:
    from transformers import DynamicCache

    def prefill(x):
        cache = DynamicCache(config=config)
        module(x, cache_params=cache)
        return cache

    return Competitor(
        module,
        forward=module,
        prefill=prefill,
        step=lambda x, cache: (module(x, cache_params=cache), cache),
        settings=f"transformers {version('transformers')} {settings}",
    )


@register("sdpa", "SDPA attention")
def build_sdpa(shape: Shape) -> Competitor:
    from transformers import DynamicCache, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_dim,
        num_hidden_layers=1,
    )
    config._attn_implementation = "sdpa"
    module, rotary = LlamaAttention(config, layer_idx=0), LlamaRotaryEmbedding(config)

    def call(x, cache=None):
        # positions are part of the layer here: a model shares them over its layers
        start = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(start, start + x.shape[1], device=x.device).unsqueeze(0)
        return module(x, rotary(x, positions), attention_mask=None, past_key_values=cache)[0]

    def prefill(x):
        cache = DynamicCache(config=config)
        call(x, cache)
        return cache

    return Competitor(
        module,
        forward=call,
        prefill=prefill,
        step=lambda x, cache: (call(x, cache), cache),
        settings=f"transformers {version('transformers')} LlamaAttention, sdpa, no mask (causal flag)",
    )


def _register_ours(kind: str) -> None:
    label = kind.capitalize()
    register(kind, label, ours=True)(lambda shape: _ours(kind, shape))
    register(f"{kind}-recurrent", f"{label}, token by token", ours=True)(lambda shape: _ours(kind, shape, True))


def _ours(kind: str, shape: Shape, recurrent: bool = False) -> Competitor:
    import miras_hf

    config = _our_config(kind, shape)
    form = "`recurrent_miras`" if recurrent else "`chunk_miras`, decoding with `step_miras`"
    layer = _our_layer(
        getattr(miras_hf, f"{kind.capitalize()}Model"), config, f"{type(config).__name__}'s defaults, {form}"
    )
    if recurrent:
        layer.module.memory.forward = _recurrent_memory(layer.module.memory)
    return layer


@register("miras-gated-deltanet", "Gated DeltaNet, a point of Miras", ours=True)
def build_miras_gated_deltanet(shape: Shape) -> Competitor:
    from miras_hf import MirasConfig, MirasModel

    config = MirasConfig.from_preset(
        "gated-deltanet",
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        chunk_size=shape.chunk,
        num_hidden_layers=1,
        vocab_size=16,
    )
    return _our_layer(MirasModel, config, "preset `gated-deltanet`, `chunk_miras`, decoding with `fold_step_`")


def _our_layer(model_class, config, text: str) -> Competitor:
    from transformers import DynamicCache

    import miras_hf
    from miras_hf.modeling_miras import MirasRotaryEmbedding

    # a whole model of one layer, for its initial values; only its mixer is measured
    module = model_class(config).layers[0].mixer
    rotary = MirasRotaryEmbedding(config)

    def call(x, cache=None):
        embeddings = None
        if config.use_rope:
            start = 0 if cache is None else cache.get_seq_length()
            embeddings = rotary(x, torch.arange(start, start + x.shape[1], device=x.device).unsqueeze(0))
        return module(x, position_embeddings=embeddings, past_key_values=cache)[0]

    def prefill(x):
        cache = DynamicCache(config=config)
        call(x, cache)
        return cache

    return Competitor(
        module,
        forward=call,
        prefill=prefill,
        step=lambda x, cache: (call(x, cache), cache),
        settings=f"miras-hf {miras_hf.__version__} {type(module).__name__}, {text}",
    )


def _our_config(kind: str, shape: Shape, **settings):
    import miras_hf

    settings = {"num_hidden_layers": 1, "vocab_size": 16, **settings}
    return getattr(miras_hf, f"{kind.capitalize()}Config")(
        hidden_size=shape.width, num_attention_heads=shape.heads, chunk_size=shape.chunk, **settings
    )


def _recurrent_memory(memory: nn.Module):
    """The mixer's memory with the token-by-token reference in place of the chunk-parallel form."""
    from miras_hf.memory import MemoryParameters, recurrent_miras

    def forward(tokens, sequences, cached):
        parameters = MemoryParameters(tuple(memory.initial_state), memory.norm_weight, memory.norm_bias)
        state, tail = (None, None) if cached is None else cached.to_read()
        y, state = recurrent_miras(
            *tokens.finished(tail, sequences.position),
            rule=memory.rule,
            parameters=parameters,
            initial_state=state,
            output_final_state=cached is not None,
            cu_seqlens=sequences.cu_seqlens,
            lengths=sequences.lengths,
        )
        if cached is not None:
            tail = tokens.next_tail(tail, sequences.lengths)
            cached.update_memory(state, tail, tokens.v.shape[1], handed_over=True)
        return y

    return forward


for _kind in ("moneta", "yaad", "memora"):
    _register_ours(_kind)


def small_models() -> Iterator[tuple[str, nn.Module]]:
    """A small whole model of each of ours, several chunks long at the lengths it is tested with."""
    import miras_hf

    for kind in ("moneta", "yaad", "memora"):
        torch.manual_seed(0)
        config = _our_config(kind, Shape(64, 2, 16), num_hidden_layers=4, vocab_size=256)
        yield kind, getattr(miras_hf, f"{kind.capitalize()}ForCausalLM")(config)
