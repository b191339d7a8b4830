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
"""Whole language models of equal size, ours and their neighbours from Transformers, looked up by name.

All have the same vocabulary, untied. Ours have the shape asked for; the Llama and Gated DeltaNet have its width and
depth and an MLP as wide as makes their parameters equal Moneta's, Mamba2, which has no MLP, as many layers. Heads of the
neighbours are 64 wide, as they are published.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from competitors import LABELS as LAYER_LABELS
from torch import nn
from transformers import StaticCache
from transformers.cache_utils import Cache

from miras_hf.compat import CACHE_NAME


@dataclass(frozen=True)
class ModelShape:
    """The shape of ours; the neighbours follow from its size."""

    width: int = 256
    layers: int = 4
    heads: int = 4
    vocabulary: int = 8192
    chunk: int = 64

    @staticmethod
    def preset(name: str, vocabulary: int = 32000) -> "ModelShape":
        """One of the paper's sizes, `"170m"`, `"340m"`, ..."""
        from miras_hf.configuration_miras import PRESETS

        size = PRESETS[name]
        return ModelShape(size["hidden_size"], size["num_hidden_layers"], size["num_attention_heads"], vocabulary)

    @property
    def neighbours_head_dim(self) -> int:
        return min(64, self.width)


def add_model_arguments(parser: argparse.ArgumentParser, names: Iterable[str], default: ModelShape) -> None:
    """Which models, where, and one flag a field of their shape, with `--preset` for all of them."""
    names = list(names)
    parser.add_argument("--models", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--preset", help="one of the paper's sizes instead of the shape below, such as 340m")
    for name, value in asdict(default).items():
        parser.add_argument(f"--{name}", type=int, default=value)


def shape_of(args: argparse.Namespace) -> ModelShape:
    """The shape that the flags of `add_model_arguments` ask for."""
    if args.preset:
        return ModelShape.preset(args.preset)
    return ModelShape(**{name: getattr(args, name) for name in asdict(ModelShape())})


@dataclass
class WholeModel:
    """A causal language model and how it is called token by token."""

    module: nn.Module
    settings: str = ""
    period: int = 1
    """Steps after which decoding repeats itself: a chunk of ours, whose end folds its writes."""
    cache_argument: str = CACHE_NAME
    arguments: Callable[[torch.Tensor], dict[str, Any]] = lambda input_ids: {}
    """What a call with a cache needs besides."""

    def cache(self, length: int) -> Cache:
        """What `generate(cache_implementation="static")` builds for `length` tokens: nothing that grows."""
        return StaticCache(config=self.module.config, max_cache_len=length)

    def read(self, input_ids: torch.Tensor, cache: Cache, call: Callable | None = None) -> torch.Tensor:
        """Logits after the last of `input_ids`, `[batch, vocabulary]`; `call` stands in for the module, compiled."""
        arguments = {self.cache_argument: cache, **self.arguments(input_ids)}
        return (call or self.module)(input_ids, use_cache=True, logits_to_keep=1, **arguments).logits[:, -1]

    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def weight_bytes(self) -> int:
        """Bytes of all weights that a step reads: an input embedding of its own is looked up, not read."""
        weights = {id(p): p for p in self.module.parameters()}
        embedding = self.module.get_input_embeddings().weight
        if self.module.get_output_embeddings().weight is not embedding:
            weights.pop(id(embedding))
        return sum(p.numel() * p.element_size() for p in weights.values())


BUILDERS: dict[str, Callable[..., WholeModel]] = {}
LABELS: dict[str, str] = {}
OURS = ("moneta", "yaad", "memora")


def register(name: str, label: str):
    def add(builder):
        BUILDERS[name], LABELS[name] = builder, label
        return builder

    return add


def build(
    name: str,
    shape: ModelShape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    our_settings: dict[str, Any] | None = None,
) -> WholeModel:
    """The model with random weights, on a device; `our_settings` go into the configs of ours."""
    torch.manual_seed(seed)
    settings = (our_settings or {}) if name in OURS else {}
    with torch.device(device):
        model = BUILDERS[name](shape, **settings)
    model.module.to(dtype)
    return model


def size_of(model_class: type, config) -> int:
    with torch.device("meta"):
        return model_class(config).num_parameters()


def fitted(model_class: type, config_of: Callable[[int], Any], shape: ModelShape, step: int):
    """Of `config_of(step)`, `config_of(2 step)`, ... the config whose parameters are closest to Moneta's."""
    from miras_hf import MonetaForCausalLM

    wanted = size_of(MonetaForCausalLM, _our_config("moneta", shape))
    smallest, next_one = (size_of(model_class, config_of(n * step)) for n in (1, 2))
    return config_of(step * max(1, 1 + round((wanted - smallest) / (next_one - smallest))))


def _our_config(kind: str, shape: ModelShape, **settings):
    import miras_hf

    return getattr(miras_hf, f"{kind.capitalize()}Config")(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        chunk_size=shape.chunk,
        **settings,
    )


def _ours(kind: str, shape: ModelShape, **settings) -> WholeModel:
    import miras_hf

    config = _our_config(kind, shape, **settings)
    module = getattr(miras_hf, f"{kind.capitalize()}ForCausalLM")(config)
    text = f"{shape.layers} layers, {shape.heads} heads, {type(config).__name__}'s defaults"
    text += "".join(f", {key}={value!r}" for key, value in settings.items())
    return WholeModel(module, text, period=shape.chunk)


for _kind in OURS:
    register(_kind, LAYER_LABELS[_kind])(lambda shape, kind=_kind, **settings: _ours(kind, shape, **settings))


@register("llama", "Llama")
def build_llama(shape: ModelShape) -> WholeModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    def config_of(intermediate_size: int) -> LlamaConfig:
        return LlamaConfig(
            **_common(shape), num_attention_heads=_heads(shape), intermediate_size=intermediate_size, eos_token_id=None
        )

    config = fitted(LlamaForCausalLM, config_of, shape, _step(shape))
    config._attn_implementation = "sdpa"
    settings = f"{config.num_hidden_layers} layers, {_heads(shape)} heads, MLP {config.intermediate_size}, sdpa"
    return WholeModel(LlamaForCausalLM(config), settings)


@register("gated-deltanet", LAYER_LABELS["gated-deltanet"])
def build_gated_deltanet(shape: ModelShape) -> WholeModel:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    def config_of(intermediate_size: int) -> Qwen3NextConfig:
        return Qwen3NextConfig(
            **_common(shape),
            linear_num_key_heads=_heads(shape),
            linear_num_value_heads=_heads(shape),
            linear_key_head_dim=shape.neighbours_head_dim,
            linear_value_head_dim=shape.neighbours_head_dim,
            layer_types=["linear_attention"] * shape.layers,
            intermediate_size=intermediate_size,
            num_experts=0,
        )

    config = fitted(Qwen3NextForCausalLM, config_of, shape, _step(shape))

    def arguments(input_ids: torch.Tensor) -> dict[str, Any]:
        # without them the model asks its cache for a length, which one of linear layers alone refuses to say
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        return {"position_ids": positions, "attention_mask": {"full_attention": None, "linear_attention": None}}

    settings = (
        f"Qwen3NextForCausalLM, linear layers alone: {config.num_hidden_layers} layers, {_heads(shape)} heads, "
        f"dense MLP {config.intermediate_size}, {_path('fla', 'causal_conv1d')}"
    )
    return WholeModel(Qwen3NextForCausalLM(config), settings, arguments=arguments)


@register("mamba2", LAYER_LABELS["mamba2"])
def build_mamba2(shape: ModelShape) -> WholeModel:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    def config_of(layers: int) -> Mamba2Config:
        return Mamba2Config(
            **_common(replace(shape, layers=layers)),
            expand=2,
            num_heads=2 * _heads(shape),
            head_dim=shape.neighbours_head_dim,
            state_size=128,
            n_groups=1,
            chunk_size=shape.chunk,
        )

    config = fitted(Mamba2ForCausalLM, config_of, shape, 1)
    settings = (
        f"{config.num_hidden_layers} layers, expand 2, state 128, 1 group, chunk {config.chunk_size}, "
        f"{_path('mamba_ssm', 'causal_conv1d')}"
    )
    return WholeModel(
        Mamba2ForCausalLM(config), settings, cache_argument="cache" if CACHE_NAME == "cache" else "cache_params"
    )


def _common(shape: ModelShape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "tie_word_embeddings": False,
    }


def _heads(shape: ModelShape) -> int:
    return shape.width // shape.neighbours_head_dim


def _step(shape: ModelShape) -> int:
    """MLP widths are multiples of it: 64 as the matrix units like it, less where a model is small."""
    return 64 if shape.width >= 512 else 8


def _path(*packages: str) -> str:
    """Which path Transformers takes: its own PyTorch one, unless the packages with the kernels are there."""
    missing = [name for name in packages if find_spec(name) is None]
    return f"PyTorch path ({', '.join(missing)} not installed)" if missing else f"kernels of {', '.join(packages)}"


@torch.no_grad()
def decode_difference(model: WholeModel, batch: int = 2, seq_len: int = 150, prompt: int = 7) -> dict:
    """Decoding token by token against one forward pass: the largest difference in logits."""
    module = model.module.eval()
    device = next(module.parameters()).device
    generator = torch.Generator().manual_seed(4)
    input_ids = torch.randint(0, module.config.vocab_size, (batch, seq_len), generator=generator).to(device)
    full = module(input_ids, use_cache=False).logits
    cache = model.cache(seq_len)
    logits = [model.read(input_ids[:, :prompt], cache)]
    logits += [model.read(input_ids[:, t : t + 1], cache) for t in range(prompt, seq_len)]
    settings = {"tokens": seq_len, "prompt": prompt, "batch": batch, "layers": module.config.num_hidden_layers}
    return {**settings, **difference(torch.stack(logits, dim=1), full[:, prompt - 1 :])}


def difference(value: torch.Tensor, reference: torch.Tensor) -> dict:
    error = (value - reference).abs().max().item()
    return {"max_absolute": error, "max_relative": error / reference.abs().max().item()}
