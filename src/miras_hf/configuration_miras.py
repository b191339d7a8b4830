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
"""Configurations of Miras models: the four choices, every point the paper leaves open as a named switch, and presets."""

import os
from dataclasses import fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import RopeParameters

from .compat import CACHE_NAMES
from .config_choices import check_algorithm, check_initial_memory, check_own_values, own_keys, take_own_values
from .config_fields import (
    bounded,
    check_dtype,
    check_layer_indices,
    check_rope_parameters,
    choice,
    declared,
    token_ids,
)
from .config_keywords import check_keywords, refuse_unused, without_unknown
from .config_meaning import check_meaning, with_later_fields, without_meaningless
from .hub import WholeFilesOnly, auto_map, write_shim
from .memory.registry import choice_of, chosen
from .memory.rule import default_min_log_alpha, least_log_alpha
from .peft import register_peft_defaults
from .presets import MODELS
from .step_size import largest_step


MEMORY_LAYER = "miras_memory"
ATTENTION_LAYER = "sliding_attention"
FULL_ATTENTION_LAYER = "full_attention"
# which field names the layers of a kind; the others are memories
ATTENTION_FIELDS = {ATTENTION_LAYER: "attention_layers", FULL_ATTENTION_LAYER: "full_attention_layers"}


class RecurrentLayerType(str):
    """Name of a layer that carries a state along the sequence, which is found to contain `"linear_attention"`,
    Transformers' word for such layers.

    Accelerate looks for that word inside the names of a model's layer types, and refuses to split sequences over
    processes where it stands: each would start its memories anew, and train with gradients that are wrong in silence.
    """

    def __contains__(self, part: str) -> bool:
        return part == "linear_attention" or super().__contains__(part)


# Widths, depths and heads of arXiv 2504.13173, table 5; it does not give those of its 1.3B models. The names are the
# paper's: with an untied vocabulary of 32000 and the output gate, Moneta counts 146M, 410M, 868M and 1275M parameters.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "chunk_size": 16,
    },
    "170m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 16},
    "340m": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "760m": {"hidden_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 16},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16},
}

# What the paper prints and the defaults deviate from, and where it says nothing, what modules of PyTorch start from.
PAPER: dict[str, Any] = {
    "decay_target": "zero",
    "gate_granularity": "channel",
    "use_rope": True,
    "value_norm": False,
    "output_norm_eps": None,
    "conv_initializer_range": None,
}

_FLOAT32_TINY = 2.0**-126

# `lq_map` says which of lq retention's two maps
_retention = partial(choice, "retention", part_of=("lq_mirror",))


def _derive_layer_types(layers: int, sliding: tuple[int, ...], full: tuple[int, ...]) -> tuple[str, ...]:
    types = [RecurrentLayerType(MEMORY_LAYER)] * layers
    for kind, indices in ((ATTENTION_LAYER, sliding), (FULL_ATTENTION_LAYER, full)):
        for i in indices:
            if i < layers:  # a draft that exits early has fewer
                types[i] = kind
    return tuple(types)


_layer_types = lru_cache(_derive_layer_types)


@strict
class MirasConfig(PreTrainedConfig):
    r"""
    Configuration of a Miras model (arXiv 2504.13173): a Llama-like decoder whose attention block is an associative
    memory that learns, while it reads, to map keys to values. Equation numbers are the paper's.

    [`MonetaConfig`], [`YaadConfig`] and [`MemoraConfig`] are this class with the paper's choices as defaults.

    Args:
        vocab_size (`int`, *optional*, defaults to 32000): Size of the vocabulary.
        hidden_size (`int`, *optional*, defaults to 1024): Width of the model.
        intermediate_size (`int`, *optional*):
            Width of the SwiGLU MLP; `None` takes 8/3 of `hidden_size`, rounded up to a multiple of 64.
        num_hidden_layers (`int`, *optional*, defaults to 24): Number of layers, memory and attention together.
        num_attention_heads (`int`, *optional*, defaults to 16): Heads of a layer; each has a memory of its own.
        num_key_value_heads (`int`, *optional*): Key/value heads of attention layers; `None` for as many as heads.
        memory_num_key_value_heads (`int`, *optional*):
            Heads of keys and values that memory layers project; several heads, each with a memory and convolutions of
            its own, share one. `None` for as many as heads.
        memory_num_query_key_heads (`int`, *optional*):
            Heads of queries and keys that memory layers project where only those are shared, as in Qwen3-Next and Mamba2, and
            `memory_num_key_value_heads` is `None`. `None` for none that are shared so.
        head_dim (`int`, *optional*): Width of a head; `None` for `hidden_size // num_attention_heads`.
        hidden_act (`str`, *optional*, defaults to `"silu"`): Activation of the MLP.
        max_position_embeddings (`int`, *optional*, defaults to 1048576):
            Length that tools should assume to be possible. A memory has no limit of its own.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of initial projections.
        rms_norm_eps (`float`, *optional*, defaults to 1e-06): Epsilon of the RMS norms.
        use_cache (`bool`, *optional*, defaults to `True`): Whether to return the cache.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): Special tokens.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): Whether the head shares the embedding's weight.
        rope_parameters (`dict`, *optional*): Rotary embedding, of memory and attention layers.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether projections of memory and attention layers have biases.
        attention_output_bias (`bool`, *optional*):
            Whether their output projections have, where that differs (Qwen2); `None` for `attention_bias`.
        mlp_bias (`bool`, *optional*, defaults to `False`): Whether the MLP's projections have biases.
        qk_norm (`bool`, *optional*, defaults to `False`):
            Whether attention layers take the RMS norm of every head's queries and keys (Qwen3). Memories have norms of
            their own.
        attention_dropout (`float`, *optional*, defaults to 0.0): Dropout of attention layers.
        attention_layers (`list[int]`, *optional*):
            Indices of the layers that are sliding-window attention instead of a memory. Also set by passing
            `layer_types`, one of `"miras_memory"`, `"sliding_attention"` and `"full_attention"` per layer.
        full_attention_layers (`list[int]`, *optional*):
            Indices of the layers that are attention to the whole text, whose cache grows with it.
        sliding_window (`int`, *optional*, defaults to 2048): Window of sliding-window attention layers, in tokens.
        memory_architecture (`str`, *optional*, defaults to `"mlp"`):
            Choice (i). `"mlp"`: `x + LN(gelu(x W1) W2)`; `"gated_mlp"`: `x + LN((gelu(x W1) o x W2) W3)`; `"matrix"`:
            `x W`; `"vector"`: `x o w`, not with KL retention. The gated one and the vector run in PyTorch only.
        memory_depth (`int`, *optional*, defaults to 2):
            Weights of the MLP memory, with gelu between them; 1 for `x + LN(x W)`. Those between hidden units, of a depth of
            3 and more, have gates that are the means of the channels'. Other depths than 2 run in PyTorch only.
        memory_expansion (`int`, *optional*, defaults to 4): Hidden width of the MLP memory over `head_dim`.
        memory_norm, memory_residual (`bool`, *optional*, default to `True`):
            Whether the MLP memory has its layer norm, and adds what it is asked with to what it returns. Without either it
            runs in PyTorch only.
        memory_norm_eps (`float`, *optional*, defaults to 0.1):
            Epsilon of the memory's layer norm, which bounds its backward: large against the variance that it meets.
        update_layers (`str`, *optional*, defaults to `"all"`):
            The weights of an MLP memory that a text writes: `"all"`, or the `"last"` alone. The others then stay the learned
            initial ones, and states are as much smaller.
        attentional_bias (`str`, *optional*, defaults to `"l2"`):
            Choice (ii). `"l2"`, `"dot"` (8), `"lp"` (11), `"l1"` (12), `"huber_coordinate"` (14), `"huber_norm"` (15),
            `"huber_mixture"` (16), `"robust"` (17), or one that is registered (`miras_hf.memory.register_attentional_bias`).
            The mixture jumps at its threshold: errors close to it amplify rounding, so that with steps well above the
            default, forms that sum in another order (decoding, kernels) drift apart over hundreds of tokens.
        lp_power (`float`, *optional*, defaults to 3.0): p.
        lp_sign (`str`, *optional*, defaults to `"exact"`): `"exact"`, or `"tanh"` for the smooth sign of Remark 5.
        lp_sharpness (`float`, *optional*, defaults to 10.0): Sharpness of the smooth sign.
        lp_error_cap (`float`, *optional*, defaults to 4.0): Magnitude at which the error is cut before the power.
        residual_clip (`float`, *optional*, defaults to 3.0):
            Largest root mean square of a token's residual; `None` for no limit.
        retention (`str`, *optional*, defaults to `"decay"`):
            Choice (iii). `"none"`, nothing is forgotten; `"decay"` (26), `"lq"` (24), `"kl"` (27), `"chi_squared"` (18),
            `"bregman"` (variant 5, bounded weights), `"elastic_net"` (23), `"elastic_net_decay"` (22), or one that is
            registered.
        lq_power (`float`, *optional*, defaults to 4.0): q.
        lq_map (`str`, *optional*, defaults to `"paper"`):
            `"paper"`: `A / ||A||_q^(q-2)` as printed; `"mirror"`: `sign(A)|A|^(q-1) / ||A||_q^(q-2)`, the mirror map
            of its derivation.
        lq_norm_floor (`float`, *optional*, defaults to 0.01): Smallest norm that is divided by.
        simplex_mass (`float`, *optional*, defaults to 2.0):
            KL and chi-squared retention: weights sum to `c = simplex_mass * hidden / sqrt(fan_in)`, `c softmax(A)` with KL.
        bregman_bound (`float`, *optional*, defaults to 1.0): Bregman retention: magnitude that no weight reaches.
        elastic_net_threshold (`float`, *optional*, defaults to 0.03):
            Elastic net retention: states far below it have weights of nearly zero.
        elastic_net_decay_threshold (`float`, *optional*, defaults to 1e-4):
            Elastic net retention in its first form: what states lose in size with every token, besides their decay.
        weight_cap (`float`, *optional*, defaults to 2.0): Largest root mean square of a head's weights; `None` for no cap.
        decay_target (`str`, *optional*, defaults to `"init"`):
            `"init"` decays toward the learned initial memory; `"zero"` toward zero as printed, where MLP memories
            go out or become chaotic over thousands of tokens.
        learning_algorithm (`str`, *optional*, defaults to `"gradient_descent"`):
            Choice (iv). `"momentum"` is that of Titans, data-dependent, with `gate_granularity="head"`; `"delta_rule"` takes
            every token's gradient at the memory of its own time, of a matrix memory with l2 loss, `residual_clip=None` and
            decay; `"implicit"` does, too, and takes Longhorn's step, `eta / (1 + eta |k|^2)`. `"exact"` takes no steps: what it
            reads is the solution of the ridge regression of all that it has read, as in the Mesa layer, of a matrix memory with l2
            loss, `residual_clip=None`, decay, `weight_cap=None` and `gate_granularity="head"`. Momentum and
            exact solutions run in PyTorch only, the others with `gradient_at="decayed"` and `erase_key="write"` on kernels, too.
        gradient_at (`str`, *optional*, defaults to `"decayed"`):
            The delta rule: whether an error is that of the memory after its decay, `"decayed"` as in Gated DeltaNet, or
            before it, `"previous"`.
        erase_key (`str`, *optional*, defaults to `"write"`):
            The delta rule: `"write"` erases along a token's key what the memory returns for it. With `"own"`, as in RWKV-7, layers
            project erase keys e besides, and have gates a in (0, 1) for them, one a channel or head: a token erases, `S - (a o
            e)^T (e S)`, and then writes, `S + eta k^T v`. Where gates are one a channel, nothing but `weight_cap` keeps a
            memory from growing on streams that are made for it.
        ridge_floor (`float`, *optional*, defaults to 0.25):
            The exact solution: smallest entry of the ridge, a learned positive diagonal a head, which starts at 1.
        chunk_size (`int`, *optional*, defaults to 64):
            Tokens whose gradients are taken at the same weights (28), with the delta rule computed at once; where a token
            writes several times, writes. Part of the trained model, which has to be trained on texts of several chunks: one
            that has never met a chunk's end may fail there.
        gate_granularity (`str`, *optional*, defaults to `"channel"`):
            Whether step and retention are one number per `"channel"` or per `"head"`; with the delta rule retention is,
            and the step is one number per head.
        learned_step (`bool`, *optional*, defaults to `True`):
            Whether steps are functions of the text; else every step is `eta_max`, and nothing of it is learned.
        learned_retention (`bool`, *optional*, defaults to `True`):
            Whether retention is a function of the text; else it is that of the initial half-lives.
        tied_write_key (`bool`, *optional*, defaults to `False`):
            Whether keys are `1 - alpha`, what every channel's retention lets go, as in HGRN2, and layers have no projection
            and no convolution of keys. With the dot-product loss and learned retention of channels, without rotary embedding.
        tied_step (`bool`, *optional*, defaults to `False`):
            Whether one gate gives step and retention, `eta = softplus(.)`, at most `eta_max`, and `log alpha = -exp(a_log) eta`,
            as in Mamba2, and layers have no gate of steps. With both learned, one write a token, and steps of the same
            granularity. It starts from the half-lives.
        writes_per_token (`int`, *optional*, defaults to 1):
            Keys and values, each with a step of its own, that a token writes one after the other, at most 8, before it reads: the
            n of DeltaProduct. What it forgets it forgets before the first. In PyTorch only.
        gate_rank (`int`, *optional*, defaults to 32): Rank of the maps from the layer's input to channel gates.
        eta_max (`float`, *optional*):
            Largest step of one token; `None` for the one whose write, alone and at a new memory, takes a token's own
            error away, or less where a chunk's writes would overshoot (`miras_hf.step_size`). Steps start at a third of
            it.
        min_log_alpha (`float`, *optional*): Smallest log retention of one token; `None` for
            -2.5, or more where `chunk_size` exceeds 64.
        min_half_life, max_half_life (`float`, *optional*, defaults to 1.0 and 512.0):
            Initial half-lives of the memory in tokens, spread log-uniformly over channels or heads.
        use_rope (`bool`, *optional*, defaults to `False`):
            Rotary embedding on queries and keys of the memory, as the paper has it. It turns what an MLP memory reads by the
            absolute position, which is no matter of a dot product any more, and makes no difference in small models
            (`docs/paper_alignment.md`). Attention layers have it always.
        value_norm (`bool`, *optional*, defaults to `True`):
            Whether values have a root mean square of 1 in every head, as queries and keys have norm 1, so that a step
            means the same for every layer and at every time of training.
        query_key_norm (`bool`, *optional*, defaults to `True`):
            Whether memories' queries and keys have norm 1 in every head. Without it, as in Mamba2, with the dot-product loss only.
        value_skip (`bool`, *optional*, defaults to `False`):
            Whether `D v` is added to what a token reads, its own value times a number a head that is learned and starts at
            one, as in Mamba2. With one write a token.
        conv_kernel_size (`int`, *optional*, defaults to 4): Width of the causal convolutions of q, k and v.
        conv_act (`str`, *optional*, defaults to `"silu"`):
            Activation after the convolutions, `"linear"` for none: then one that is the identity changes nothing.
        conv_bias (`bool`, *optional*, defaults to `False`): Whether convolutions have biases, before their activation.
        conv_initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of initial convolutions; `None` for uniform in +-1 / sqrt(conv_kernel_size).
        initial_memory_scale (`float`, *optional*):
            Factor on the initial weights of the memory's last layer, with KL retention on their logarithms; their
            deviation is `1 / sqrt(fan_in)` without it. 0, with decay only, for a memory that starts empty. `None` for
            0.1 in an MLP memory, so that what is written soon outweighs it, and 1 elsewhere.
        initial_hidden_scale (`float`, *optional*, defaults to 2.0):
            Scale of an MLP memory's layers before the last at the start, whose weights have a deviation of
            `initial_hidden_scale / sqrt(fan_in)`: hidden units meet keys, which have norm 1, with a deviation of
            `initial_hidden_scale / sqrt(head_dim)`. Where that is small, an MLP of them is nearly a matrix.
        output_gate_act (`str`, *optional*, defaults to `"silu"`): Activation of the output gate, `"linear"` for none.
        output_gate_first (`bool`, *optional*, defaults to `False`):
            Whether the output gate comes before the norm after the memory, as in Mamba2, and not after it.
        output_norm_groups (`int`, *optional*):
            Groups of heads that stand side by side, each with one mean square in the norm after the memory; `None` for as
            many as heads.
        output_norm_eps (`float`, *optional*, defaults to 1.0):
            Epsilon of the norm after the memory; `None` for `rms_norm_eps`. Where it is large against the mean square of
            what memories return, a head that finds little says little; where it is small, every head says as much as
            any other, and gradients are divided by what it found.
        memory_backend (`str`, *optional*, defaults to `"auto"`):
            What memories compute with. `"auto"`: Triton kernels where they serve the call, PyTorch elsewhere;
            `"triton"` raises where no kernel does; `"pytorch"`. The environment variable `MIRAS_BACKEND` wins over it.
        base_model (`str`, *optional*): Name of the model that this one was converted from, for its model card.
        license (`str`, *optional*): Licence of the weights, as the Hub calls it, for the model card: `"apache-2.0"`.

    Fields that say more about a choice, as `lp_power` does about `attentional_bias="lp"`, must be left at their defaults
    where another choice is made. A stored config in which they are not, which earlier versions wrote, is read without
    them, and with a warning.

    Raises:
        `StrictDataclassError`: for a wrong type or value, naming the field, the value and what is allowed.
        `TypeError`: for a keyword that means nothing here, with the nearest one that does.

    ```python
    >>> from miras_hf import MirasConfig, MirasForCausalLM

    >>> config = MirasConfig.from_preset("tiny", attentional_bias="huber_norm")
    >>> model = MirasForCausalLM(config)
    ```"""

    model_type = "miras"
    # of `PAPER`, what this family's equation has
    _printed: ClassVar[dict[str, Any]] = {}
    keys_to_ignore_at_inference = list(CACHE_NAMES)

    vocab_size: int = bounded(32000, 1, 2**26)
    hidden_size: int = bounded(1024, 1, 2**18)
    intermediate_size: int | None = bounded(None, 1, 2**20)
    num_hidden_layers: int = bounded(24, 1, 4096)
    num_attention_heads: int = bounded(16, 1, 2**14)
    num_key_value_heads: int | None = bounded(None, 1, 2**14)
    memory_num_key_value_heads: int | None = bounded(None, 1, 2**14)
    memory_num_query_key_heads: int | None = bounded(None, 1, 2**14)
    head_dim: int | None = bounded(None, 1, 2**14)
    hidden_act: str = "silu"
    max_position_embeddings: int = bounded(1048576, 1, 2**31 - 1)
    initializer_range: float = bounded(0.02, 0, 1)
    rms_norm_eps: float = bounded(1e-6, 1e-30, 1)
    use_cache: bool = True
    chunk_size_feed_forward: int = bounded(0, 0, 2**31 - 1)
    pad_token_id: int | None = token_ids(None)
    bos_token_id: int | None = token_ids(1)
    eos_token_id: int | list[int] | None = token_ids(2)
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_dropout: int | float = bounded(0.0, 0, 1)
    attention_layers: list[int] | None = None
    full_attention_layers: list[int] | None = None
    sliding_window: int = bounded(2048, 1, 2**31 - 1)

    memory_architecture: str = choice("memory_architecture", "mlp")
    memory_depth: int = declared("memory_depth")
    memory_expansion: int = declared("memory_expansion")
    memory_norm: bool = declared("memory_norm")
    memory_residual: bool = declared("memory_residual")
    update_layers: str = declared("update_layers")
    memory_norm_eps: float = declared("memory_norm_eps")
    attentional_bias: str = choice("attentional_bias", "l2")
    lp_power: int | float = declared("lp_power")
    lp_sign: str = declared("lp_sign")
    lp_sharpness: int | float = declared("lp_sharpness")
    lp_error_cap: int | float = declared("lp_error_cap")
    residual_clip: int | float | None = declared("residual_clip")
    retention: str = _retention("decay")
    lq_power: int | float = declared("lq_power")
    lq_map: Literal["paper", "mirror"] = "paper"
    lq_norm_floor: float = declared("lq_norm_floor")
    simplex_mass: int | float = declared("simplex_mass")
    bregman_bound: int | float = declared("bregman_bound")
    elastic_net_threshold: int | float = declared("elastic_net_threshold")
    elastic_net_decay_threshold: int | float = declared("elastic_net_decay_threshold")
    weight_cap: int | float | None = declared("weight_cap")
    decay_target: Literal["init", "zero"] = "init"
    learning_algorithm: str = choice("learning_algorithm", "gradient_descent")
    gradient_at: str = declared("gradient_at")
    erase_key: str = declared("erase_key")
    ridge_floor: int | float = declared("ridge_floor")
    chunk_size: int = bounded(64, 1, 4096)
    gate_granularity: Literal["channel", "head"] = "channel"
    learned_step: bool = True
    learned_retention: bool = True
    tied_write_key: bool = False
    tied_step: bool = False
    writes_per_token: int = bounded(1, 1, 8)
    gate_rank: int = bounded(32, 1, 2**14)
    eta_max: int | float | None = bounded(None, above=0, high=1e3)
    min_log_alpha: int | float | None = bounded(None, -160, 0)
    min_half_life: int | float = bounded(1.0, 0.01, 2**30)
    max_half_life: int | float = bounded(512.0, 0.01, 2**30)
    use_rope: bool = False
    value_norm: bool = True
    query_key_norm: bool = True
    value_skip: bool = False
    conv_kernel_size: int = bounded(4, 1, 1024)
    conv_act: Literal["silu", "linear"] = "silu"
    conv_bias: bool = False
    conv_initializer_range: float | None = bounded(0.02, 0, 1)
    initial_memory_scale: int | float | None = bounded(None, 0, 1e3)
    initial_hidden_scale: int | float = bounded(2.0, 1e-3, 1e3)
    output_gate_act: str = "silu"
    output_gate_first: bool = False
    output_norm_groups: int | None = bounded(None, 1, 2**14)
    output_norm_eps: int | float | None = bounded(1.0, 1e-30, 1e6)
    memory_backend: Literal["auto", "triton", "pytorch"] = "auto"
    base_model: str | None = None
    license: str | None = None

    def __post_init__(self, **kwargs):
        # Transformers drops some of them without a word, and would make attributes of the others
        check_keywords(self, kwargs)
        take_own_values(self, kwargs)
        for dtype in (self.dtype, kwargs.get("torch_dtype")):
            check_dtype(dtype)
        num_labels = kwargs.get("num_labels")
        if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
            raise ValueError(f"`num_labels` must be an integer of at least 1, got {num_labels!r}.")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.initial_memory_scale is None:
            of_mlp = self.memory_architecture in ("mlp", "gated_mlp")
            self.initial_memory_scale = chosen(self, "retention").last_layer_scale if of_mlp else 1.0
        if self.min_log_alpha is None:
            self.min_log_alpha = default_min_log_alpha(self.chunk_size)
        if self.eta_max is None:
            self.eta_max = largest_step(self)
        layer_types = kwargs.pop("layer_types", None)
        given = {name: getattr(self, name) for name in ATTENTION_FIELDS.values()}
        if layer_types is not None:
            self.layer_types = layer_types
        for kind, name in ATTENTION_FIELDS.items():
            said = given[name]
            if layer_types is not None and said is not None and set(said) != set(getattr(self, name)):
                attention = "attention" if kind == ATTENTION_LAYER else f"`{kind}`"
                raise ValueError(
                    f"`layer_types` has {attention} in the layers {getattr(self, name)}, and `{name}` says {said}: pass "
                    "one of the two."
                )
            if getattr(self, name) is None:
                setattr(self, name, [])
        self.base_model_tp_plan = self.tensor_parallel_plan()  # ty: ignore[invalid-attribute-access]
        super().__post_init__(**kwargs)
        if self.output_attentions and self._attn_implementation is None:
            # Transformers does so at a later assignment only, and then models choose an attention without weights
            self._attn_implementation = "eager"
        self.auto_map = {} if self._family is None else auto_map(self._family)

    @classmethod
    def from_preset(cls, name: str, paper: bool = False, size: str | None = None, **kwargs) -> "MirasConfig":
        """The configuration of a named size, or of a published model, with any field overridden.

        Args:
            name (`str`):
                `"tiny"` or a size of the paper's table 5; or of [`MirasConfig`] a model that is a point of the design space,
                `"gated-deltanet"` and others (`docs/design_space.md`).
            paper (`bool`, *optional*, defaults to `False`):
                Whether fields are what the paper prints where the defaults deviate from it (`docs/paper_alignment.md`).

            size (`str`, *optional*): of a published model, the size: one of the others' names.

        Raises:
            `ValueError`: for an unknown name.
        """
        if name in MODELS:
            if cls.model_type != MirasConfig.model_type:
                raise ValueError(
                    f"`name` must be a size, got {name!r}: a model of `MirasConfig`, not `{cls.__name__}`."
                )
            if paper:
                raise ValueError(f"`paper` must be False with {name!r}, which is another paper's.")
            if size is not None and size not in PRESETS:
                raise ValueError(f"`size` must be one of {sorted(PRESETS)} or None, got {size!r}.")
            return cls(**{**PRESETS.get(size, {}), **MODELS[name].fields, **kwargs})
        if size is not None:
            raise ValueError(f"`size` must be None with a size by name, got {size!r} with {name!r}.")
        if name not in PRESETS:
            raise ValueError(f"`name` must be one of {sorted(PRESETS)} or of {sorted(MODELS)}, got {name!r}.")
        printed = {**PAPER, **cls._printed} if paper else {}
        return cls(**{**PRESETS[name], **printed, **kwargs})

    @property
    def retention_gate(self) -> str:
        """Name of the retention gate in `miras_hf.memory.RETENTION_GATES`."""
        return "lq_mirror" if self.retention == "lq" and self.lq_map == "mirror" else self.retention

    def to_dict(self) -> dict[str, Any]:
        # PEFT asks for the dictionary before it looks up what to adapt
        register_peft_defaults()
        # what cannot be read again is not written
        return without_unknown(self, super().to_dict())

    @property
    def memory_key_value_heads(self) -> int:
        """Heads of keys and values that a memory layer projects."""
        return self.memory_num_key_value_heads or self.num_attention_heads

    def memory_heads_of(self, name: str) -> int:
        """Heads of what a memory layer projects by a name of `memory_projections`."""
        if self.memory_num_query_key_heads is not None:
            return self.num_attention_heads if name == "v" else self.memory_num_query_key_heads
        return self.num_attention_heads if name == "q" else self.memory_key_value_heads

    @property
    def memory_projections(self) -> tuple[str, ...]:
        """What a memory layer projects and convolves, of queries, keys, values and erase keys."""
        keys = () if self.tied_write_key else ("k",)
        return ("q", *keys, "v", "e") if self.has_erase_key else ("q", *keys, "v")

    @property
    def has_erase_key(self) -> bool:
        """Whether tokens erase along keys of their own."""
        return choice_of(self, "learning_algorithm").has_erase_key

    @property
    def slots_per_token(self) -> int:
        """The tokens that a memory reads for one of the text: its writes, and an erasure before them."""
        return self.writes_per_token + self.has_erase_key

    @property
    def has_output_bias(self) -> bool:
        """Whether output projections have biases."""
        return self.attention_bias if self.attention_output_bias is None else self.attention_output_bias

    # A property, and not a field: names of layer types that Transformers does not know must not be stored in
    # config.json, where the base class would refuse them (Trainer's resume, AutoTokenizer).
    @property
    def layer_types(self) -> list[str]:
        """What each layer is, `"miras_memory"`, `"sliding_attention"` or `"full_attention"`."""
        sliding, full = tuple(self.attention_layers or ()), tuple(self.full_attention_layers or ())
        # Dynamo traces what is cached anew, and warns
        derive = _derive_layer_types if torch.compiler.is_compiling() else _layer_types
        return list(derive(self.num_hidden_layers, sliding, full))

    @property
    def has_attention(self) -> bool:
        """Whether any layer is attention, over a window or the whole text."""
        return self.has_sliding_attention or any(i < self.num_hidden_layers for i in self.full_attention_layers or ())

    @property
    def has_sliding_attention(self) -> bool:
        """Whether any layer is sliding-window attention."""
        return any(i < self.num_hidden_layers for i in self.attention_layers or ())

    @property
    def has_retention(self) -> bool:
        """Whether memories forget."""
        return chosen(self, "retention").forgets

    @property
    def has_memory(self) -> bool:
        """Whether any layer is a memory. A converted Transformer may have none."""
        return self.first_memory_layer is not None

    @property
    def first_memory_layer(self) -> int | None:
        """Index of the first memory layer; `None` if there is none, as in a draft that exits early."""
        attention = {*(self.attention_layers or ()), *(self.full_attention_layers or ())}
        return next((i for i in range(self.num_hidden_layers) if i not in attention), None)

    @layer_types.setter
    def layer_types(self, layer_types: list[str]) -> None:
        kinds = (MEMORY_LAYER, *ATTENTION_FIELDS)
        known = isinstance(layer_types, list | tuple) and all(layer_type in kinds for layer_type in layer_types)
        if not known or len(layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` must hold `num_hidden_layers` = {self.num_hidden_layers} entries, each "
                f"{MEMORY_LAYER!r}, {ATTENTION_LAYER!r} or {FULL_ATTENTION_LAYER!r}, got {layer_types}."
            )
        for kind, name in ATTENTION_FIELDS.items():
            setattr(self, name, [i for i, layer_type in enumerate(layer_types) if layer_type == kind])

    def validate_layer_type(self):
        """Part of `@strict`-powered validation: the base class knows only its own layer types."""
        check_layer_indices({n: getattr(self, n) or [] for n in ATTENTION_FIELDS.values()}, self.num_hidden_layers)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: relations between fields; ranges stand beside their defaults."""
        if self.is_encoder_decoder:
            raise ValueError("`is_encoder_decoder` must be False: these models are decoders.")
        if self.id2label is not None and not self.id2label:
            raise ValueError("`id2label` must name at least one label, or be None.")
        check_dtype(self.dtype)
        check_rope_parameters(self.rope_parameters)
        if (
            self.hidden_size % self.num_attention_heads
            and self.head_dim == self.hidden_size // self.num_attention_heads
        ):
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}), unless `head_dim` is given."
            )
        if self.head_dim % 2 and (self.use_rope or self.has_attention):
            raise ValueError(
                f"`head_dim` must be even with rotary embeddings, got {self.head_dim} "
                f"(hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads})."
            )
        shared = ("num_key_value_heads", "memory_num_key_value_heads", "memory_num_query_key_heads")
        for name in (*shared, "output_norm_groups"):
            heads = getattr(self, name) or self.num_attention_heads
            if self.num_attention_heads % heads:
                raise ValueError(f"`{name}` ({heads}) must divide `num_attention_heads` ({self.num_attention_heads}).")
        for name in ("hidden_act", "output_gate_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(f"`{name}` must be one of {sorted(ACT2FN)}, got {getattr(self, name)!r}.")
        if self.lp_power * max(1.0, self.lp_power - 1) * self.lp_error_cap ** (self.lp_power - 1) > 1e17:
            raise ValueError(
                f"`lp_error_cap` ** (`lp_power` - 1) must stay below 1e15 or so, of which float32 holds the square, got {self.lp_error_cap} ** "
                f"{self.lp_power - 1}."
            )
        if self.lq_norm_floor**self.lq_power < _FLOAT32_TINY:
            raise ValueError(
                f"`lq_norm_floor` ** `lq_power` must not be below {_FLOAT32_TINY:.2e}, the smallest number of float32, "
                f"got {self.lq_norm_floor} ** {self.lq_power}."
            )
        check_initial_memory(self)
        if not self.max_half_life >= self.min_half_life:
            raise ValueError(
                f"`max_half_life` ({self.max_half_life}) must not be below `min_half_life` ({self.min_half_life})."
            )
        if not least_log_alpha(self.chunk_size) <= self.min_log_alpha < 0:
            raise ValueError(
                f"`min_log_alpha` must lie between -160 / chunk_size = {least_log_alpha(self.chunk_size):g} and 0, "
                f"got {self.min_log_alpha}."
            )
        granularities = chosen(self, "learning_algorithm").gate_granularities
        if self.gate_granularity not in granularities:
            raise ValueError(
                f"`gate_granularity` must be {' or '.join(map(repr, granularities))} with `learning_algorithm="
                f"{self.learning_algorithm!r}`, got {self.gate_granularity!r}."
            )
        check_own_values(self)
        check_algorithm(self)
        check_meaning(self)
        self._check_layer()
        if self.writes_per_token > 1 and self.tied_write_key:
            raise ValueError(
                f"`tied_write_key` must be False with `writes_per_token={self.writes_per_token}`, got True: the keys of a "
                "token would be one."
            )
        if self.tied_write_key:
            if not self.has_retention:
                raise ValueError(
                    f"`retention` must forget with `tied_write_key=True`, got {self.retention!r}: keys are what it lets go."
                )
            needs = {
                "attentional_bias": "dot",
                "gate_granularity": "channel",
                "learned_retention": True,
                "use_rope": False,
            }
            for name, value in needs.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"`{name}` must be {value!r} with `tied_write_key=True`, got {getattr(self, name)!r}: keys are what "
                        "every channel's retention lets go, and no loss but the dot product has a step that fits their norms."
                    )

    def _check_layer(self) -> None:
        """Raises a `ValueError` for what stands around a memory and does not fit its choices, naming both."""
        if self.memory_num_query_key_heads is not None and self.memory_num_key_value_heads is not None:
            raise ValueError(
                f"`memory_num_key_value_heads` must be None with `memory_num_query_key_heads={self.memory_num_query_key_heads}`, "
                f"got {self.memory_num_key_value_heads}: each says how many heads of keys there are."
            )
        if not self.query_key_norm and self.attentional_bias != "dot":
            raise ValueError(
                f"`query_key_norm` must be True with `attentional_bias={self.attentional_bias!r}`, got False: no loss but the "
                "dot product has a step that fits keys of any norm."
            )
        for name in ("tied_step", "value_skip"):
            if getattr(self, name) and self.writes_per_token > 1:
                raise ValueError(
                    f"`{name}` must be False with `writes_per_token={self.writes_per_token}`, got True: a token would have "
                    "several steps and values, and one gate or number for them."
                )
        if not self.tied_step:
            return
        if not self.has_retention:
            raise ValueError(
                f"`retention` must forget with `tied_step=True`, got {self.retention!r}: steps are what its gate opens."
            )
        for name in ("learned_step", "learned_retention"):
            if not getattr(self, name):
                raise ValueError(
                    f"`{name}` must be True with `tied_step=True`, got False: one gate, learned, gives both."
                )
        granularities = chosen(self, "learning_algorithm").step_granularities
        if self.gate_granularity not in granularities:
            raise ValueError(
                f"`gate_granularity` must be {' or '.join(map(repr, granularities))} with `tied_step=True` and "
                f"`learning_algorithm={self.learning_algorithm!r}`, got {self.gate_granularity!r}: steps have one number a head."
            )

    def check_for_model(self) -> None:
        """
        Check what a model is built from: fields may have been assigned since the config was made, and Transformers
        validates relations between them only then, and when it saves.

        Raises:
            `StrictDataclassError`: as for a new config.
            `ValueError`: for a field that means nothing to a model of these layers.
        """
        self.validate()
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be below `vocab_size` ({self.vocab_size}) or None, got {self.pad_token_id}."
            )
        if not self.return_dict:
            # heads of Transformers 5.24 look for fields in the tuple that it makes of the decoder's output
            raise ValueError(
                f"`return_dict` must be True in a config, got {self.return_dict}: pass it to single calls of the model."
            )
        if self.output_attentions and not self.has_attention:
            raise ValueError(
                "`output_attentions` means nothing to a model without attention layers, got True: leave it at False, or "
                "choose layers by `attention_layers` or `layer_types`."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        As everywhere in Transformers, where `from_pretrained` and the Auto classes come here, too, and stricter:

        - fields that `kwargs` set are checked against the others;
        - stored values that mean nothing under the choices that are made are left out, with a warning that names them:
          earlier versions wrote them. Of a person, in `kwargs` as in a new config, they are refused;
        - fields that a stored config lacks because they came later have the values that it meant without them.

        Raises:
            `StrictDataclassError`: as for a new config.
            `TypeError`: for a keyword that neither configs nor the functions that load models and tokenizers know.
                With `return_unused_kwargs` such keywords are the caller's, who gets them back.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        # Transformers assigns them one by one when the config is made, which is too late for choices that belong together
        own = {field.name for field in fields(cls)} - {field.name for field in fields(PreTrainedConfig)} | own_keys(
            cls
        )
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in own or name == "layer_types"}
        # a person's dictionary has no version
        stored = with_later_fields(config_dict) if "transformers_version" in config_dict else config_dict
        stored = {name: value for name, value in stored.items() if name not in given}
        if "layer_types" in given:
            stored = {name: value for name, value in stored.items() if name not in ATTENTION_FIELDS.values()}
        stored = without_meaningless(cls, stored, given)
        config, unused = super().from_dict({**stored, **given}, return_unused_kwargs=True, **kwargs)
        config.validate()
        if return_unused:
            return config, unused
        refuse_unused(config, unused)
        return config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "MirasConfig":
        """A stored config, with what [`~MirasConfig.from_dict`] says about stored values."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @property
    def _family(self) -> str | None:
        """What the class names of this config's models begin with; unknown for classes derived elsewhere."""
        return type(self).__name__.removesuffix("Config") if type(self).__module__ == __name__ else None

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Writes the config, and beside it the module that its `auto_map` names."""
        super().to_json_file(json_file_path, use_diff=use_diff)
        if self._family is not None:
            write_shim(Path(json_file_path).parent, self._family)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        files_timestamps = WholeFilesOnly(files_timestamps)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)

    def tensor_parallel_plan(self) -> dict[str, str]:
        """Tensor parallelism by heads: each rank has the memories, and the attention, of some heads.

        A plan of what this config has, because Transformers warns about rules that name nothing. `"heads"` is a style
        of ours, see `miras_hf.parallel`.
        """
        plan = {"embed_tokens": "embedding_rowwise"}
        if self.first_memory_layer is not None:
            mixer = {f"{x}_proj": "colwise" for x in (*self.memory_projections, "g")}
            mixer |= {f"{x}_conv": "heads" for x in self.memory_projections}
            gates = {"eta": not self.tied_step, "alpha": True}
            gates["delta"] = chosen(self, "attentional_bias").delta_granularity is not None
            gates["momentum"] = chosen(self, "learning_algorithm").has_momentum
            gates["erase"] = self.has_erase_key
            fixed = {
                "eta": not self.learned_step,
                "alpha": not (self.learned_retention and self.has_retention),
            }
            for gate in (name for name, there in gates.items() if there):
                mixer |= {gate: "heads"} if fixed.get(gate) else {gate: "heads", f"{gate}.up_proj": "colwise"}
            if self.value_skip:
                mixer["skip"] = "heads"
            mixer["memory.initial_state"] = "heads"
            if choice_of(self, "memory_architecture").has_norm or chosen(self, "learning_algorithm").has_covariance:
                mixer["memory"] = "heads"
            mixer |= {"o_norm": "replicated_with_grad_allreduce", "o_proj": "rowwise"}
            plan |= {f"layers.*.mixer.{name}": style for name, style in mixer.items()}
        if self.has_attention:
            plan |= {f"layers.*.self_attn.{x}_proj": "colwise" for x in "qkv"}
            plan["layers.*.self_attn.o_proj"] = "rowwise"
            if self.qk_norm:
                plan |= {f"layers.*.self_attn.{x}_norm": "replicated_with_grad_allreduce" for x in "qk"}
        mlp = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
        return plan | {f"layers.*.mlp.{name}": style for name, style in mlp.items()}

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Does nothing: checkpoints name the installed package instead of carrying copies of its code."""


@strict
class MonetaConfig(MirasConfig):
    r"""
    Configuration of Moneta, equations (24), (25) of arXiv 2504.13173: an MLP memory with lp loss (p = 3) and lq
    retention (q = 4). All fields are those of [`MirasConfig`].

    ```python
    >>> from miras_hf import MonetaConfig, MonetaForCausalLM

    >>> model = MonetaForCausalLM(MonetaConfig(hidden_size=256, num_hidden_layers=4))
    ```"""

    model_type = "moneta"

    attentional_bias: str = choice("attentional_bias", "lp")
    retention: str = _retention("lq")


@strict
class YaadConfig(MirasConfig):
    r"""
    Configuration of Yaad, equation (26) of arXiv 2504.13173: an MLP memory with a Huber loss, its threshold a function
    of the data, and decay. The loss is that of the error's norm (15), which is continuous; (26) prints the mixture (16),
    which jumps at its threshold (`attentional_bias="huber_mixture"`). All fields are those of [`MirasConfig`].

    ```python
    >>> from miras_hf import YaadConfig, YaadForCausalLM

    >>> model = YaadForCausalLM(YaadConfig(hidden_size=256, num_hidden_layers=4))
    ```"""

    model_type = "yaad"
    _printed: ClassVar[dict[str, Any]] = {"attentional_bias": "huber_mixture"}

    attentional_bias: str = choice("attentional_bias", "huber_norm")
    retention: str = _retention("decay")


@strict
class MemoraConfig(MirasConfig):
    r"""
    Configuration of Memora, equations (21), (27) of arXiv 2504.13173: an MLP memory with l2 loss and KL retention, its
    weights scaled simplices. All fields are those of [`MirasConfig`].

    ```python
    >>> from miras_hf import MemoraConfig, MemoraForCausalLM

    >>> model = MemoraForCausalLM(MemoraConfig(hidden_size=256, num_hidden_layers=4))
    ```"""

    model_type = "memora"

    attentional_bias: str = choice("attentional_bias", "l2")
    retention: str = _retention("kl")


__all__ = ["MemoraConfig", "MirasConfig", "MonetaConfig", "YaadConfig"]
