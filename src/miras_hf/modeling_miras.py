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
"""Miras models: a Llama-like decoder whose attention block is a memory that learns while it reads (arXiv 2504.13173).

Reads top to bottom: norms, rotary embedding, convolution, gates, the memory, the mixer around it, attention for hybrids,
MLP, decoder layer, models. Moneta, Yaad and Memora are the same modules under different choices of the config.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer, StaticLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from miras_kernels import Projections

from .backend import Carry, MemoryBackend
from .built_config import built_values, check_as_built
from .cache import MirasLayer, memory_layer, tokens_read
from .compat import CACHE_NAME, CACHE_NAMES, cache_named, cache_of, refuse_unknown, takes_cache
from .config_keywords import refuse_model_keywords
from .configuration_miras import (
    ATTENTION_LAYER,
    FULL_ATTENTION_LAYER,
    MEMORY_LAYER,
    MemoraConfig,
    MirasConfig,
    MonetaConfig,
    YaadConfig,
)
from .hub import WholeFilesOnly
from .inference_mode import is_abroad, leave_inference_mode
from .inputs import check_cache, check_ids, check_inputs, for_losses
from .memory import MemoryParameters, MirasRule
from .memory.registry import CHOICES, choice_of, chosen
from .memory.state import compute_dtype
from .mixer_ops import (
    causal_convolution,
    l2norm,
    negative_softplus,
    rms_norm,
    rms_norm_of_heads,
    scaled_sigmoid,
    silu_gated_rms_norm,
)
from .model_card import save_model_card
from .parallel import check_distributed_config
from .peft import NotByParameter, check_prompt_learning
from .sequences import (
    Sequences,
    check_kernel_arguments,
    check_no_pads_read,
    check_text_read,
    check_window,
    describe,
    last_tokens,
    learned_labels,
    mask_of_attention,
    mask_of_whole_text,
    packed_sequences,
    padded_sequences,
)
from .weight_decay import exempt_from_trainer
from .weights_version import WeightsVersion, weights_version


logger = logging.get_logger(__name__)

# Keywords that reach a model besides its parameters, and the values that mean something here; `()` for any value.
_OF_LOSSES = ("num_items_in_batch", "shift_labels", "ignore_index")
_KEYWORDS: dict[str, tuple] = {
    "output_hidden_states": (),
    "output_attentions": (),
    "return_dict": (),
    "cu_seq_lens_k": (),
    "max_length_q": (),
    "max_length_k": (),
    "is_causal": (None, True),
    "output_router_logits": (None, False),
    **dict.fromkeys(_OF_LOSSES, ()),
}


class MirasRMSNorm(nn.Module):
    decays = False

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MirasRMSNormGated(MirasRMSNorm):
    """RMS norm of every head, or of several together, multiplied by an activated gate, or of that product.

    Args:
        hidden_size (`int`): width of a head.
        eps (`float`, *optional*, defaults to 1e-6): what is added to mean squares.
        activation (`str`, *optional*, defaults to `"silu"`): that of the gate.
        together (`int`, *optional*, defaults to 1): heads that have one mean square.
        gate_first (`bool`, *optional*, defaults to `False`): whether the gate comes before the norm.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        activation: str = "silu",
        together: int = 1,
        gate_first: bool = False,
    ):
        super().__init__(hidden_size, eps)
        self.activation, self.act_fn = activation, ACT2FN[activation]
        self.together, self.gate_first = together, gate_first

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        if self.activation == "silu" and self.together == 1 and not self.gate_first:
            return silu_gated_rms_norm(hidden_states, gate, self.weight, self.variance_epsilon)
        if self.gate_first:
            wide = compute_dtype(gate)
            product = hidden_states.to(wide) * self.act_fn(gate.to(wide))
            return self.normed(product).to(gate.dtype)
        return self.normed(hidden_states) * self.act_fn(gate)

    def normed(self, hidden_states: Tensor) -> Tensor:
        if self.together == 1:
            return super().forward(hidden_states)
        return rms_norm_of_heads(hidden_states, self.weight, self.variance_epsilon, self.together)


class MirasRotaryEmbedding(nn.Module):
    def __init__(self, config: MirasConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config

        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)

        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MirasConfig, **kwargs) -> tuple[Tensor, float]:
        """Inverse frequencies of the original rotary embedding, and its scaling of attention, one."""
        base = config.rope_parameters["rope_theta"]
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (base**exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> Tensor:
    """Rotates x; `unsqueeze_dim` is where `cos` and `sin`, `[batch, tokens, head_dim]`, lack the heads."""
    return x * cos.unsqueeze(unsqueeze_dim) + rotate_half(x) * sin.unsqueeze(unsqueeze_dim)


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
    return rotate(q, cos, sin, unsqueeze_dim), rotate(k, cos, sin, unsqueeze_dim)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    tail: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """`causal_convolution` with an activation, in the dtype of its inputs."""
    # under autocast the weights are wider than what they meet, and wide values would take kernels' slow path
    return causal_convolution(x, weight, tail, position, bias=bias, silu=activation == "silu").to(x.dtype)


class MirasShortConvolution(nn.Module):
    """Causal depthwise convolution over time, then SiLU or nothing."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        initializer_range: float | None = None,
        activation: str = "silu",
        bias: bool = False,
    ):
        super().__init__()
        self.kernel_size, self.initializer_range, self.activation = kernel_size, initializer_range, activation
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.zeros(channels)) if bias else None)

    def forward(self, hidden_states: Tensor, tail: Tensor | None = None, position: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `[batch, tokens, channels]`): inputs.
            tail (`torch.Tensor` of shape `[batch, kernel_size - 1, channels]`, *optional*): the inputs before them.
            position (`torch.Tensor` of shape `[batch, tokens]`, *optional*): tokens since the sequence's start.
        """
        return convolve(hidden_states, self.weight, self.bias, self.activation, tail, position)

    def extra_repr(self):
        bias = ", bias=True" if self.bias is not None else ""
        return f"{self.weight.shape[0]}, kernel_size={self.kernel_size}, activation={self.activation}{bias}"


def is_plain(module: nn.Module, kind: type, x: Tensor) -> bool:
    """Whether a module is what it seems, so that others may do with its own parameters, to tensors like `x`, what it does: not
    wrapped by an adapter, hooked, sharded or offloaded."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    # Accelerate puts a forward of its own on the object
    if type(module) is not kind or any(hooks) or "forward" in vars(module):
        return False
    parameters = module._parameters.values()
    return all(p is None or (type(p) is nn.Parameter and p.device == x.device) for p in parameters)


class MirasLowRankGate(nn.Module):
    """A map from the layer's input to one number per head, or per channel through a low rank; of a gate that is not learned
    its bias alone."""

    decays = False  # nor does what its kinds add to the bias; its projections do

    def __init__(self, config: MirasConfig, granularity: str, learned: bool = True, writes: int = 1):
        super().__init__()
        self.per_channel, self.learned = granularity == "channel", learned
        width = config.num_attention_heads * writes * (config.head_dim if self.per_channel else 1)
        if self.per_channel and learned:
            self.down_proj = nn.Linear(config.hidden_size, config.gate_rank, bias=False)
        if learned:
            self.up_proj = nn.Linear(config.gate_rank if self.per_channel else config.hidden_size, width, bias=False)
        # its own parameter, not the projection's: gates start far from zero, and adapters leave it alone
        self.bias = nn.Parameter(torch.zeros(width), requires_grad=learned)
        self.head_dim = config.head_dim

    def train(self, mode: bool = True):
        # checkpoints are loaded into new parameters, which ask for gradients, before the model is put into evaluation mode
        return super().train(mode) if self.learned else super().train(mode).requires_grad_(False)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """`[batch, tokens, hidden_size]` to float32 `[batch, tokens, heads, head_dim]`, or `[batch, tokens, heads]`, the writes
        of a head behind each other where a token has several."""
        bias = self.bias
        if self.learned:
            hidden_states = hidden_states.to(bias.dtype)  # float32 in a float16 model
            if self.per_channel:
                hidden_states = self.down_proj(hidden_states)
            gate = self.up_proj(hidden_states).float() + bias.float()
        else:
            gate = bias.float().expand(*hidden_states.shape[:-1], -1)
        return gate.unflatten(-1, (-1, self.head_dim)) if self.per_channel else gate


class MirasStepGate(MirasLowRankGate):
    """Step size of every token, `eta = eta_max sigmoid(.)`, float32."""

    def __init__(self, config: MirasConfig):
        granularities = chosen(config, "learning_algorithm").step_granularities
        granularity = config.gate_granularity if config.gate_granularity in granularities else "head"
        super().__init__(config, granularity, config.learned_step, config.writes_per_token)
        self.eta_max = config.eta_max

    def forward(self, hidden_states: Tensor) -> Tensor:
        return scaled_sigmoid(self.logits(hidden_states), self.eta_max)

    def initial_bias(self) -> Tensor:
        # a third of the largest step size: the one that simulations found stable; or all of it, to the last bit of float32
        return torch.full_like(self.bias, math.log(0.5) if self.learned else 30.0)


class MirasEraseGate(MirasLowRankGate):
    """What every token takes away of what the memory returns for its erase key, `sigmoid(.)`, float32; a third at first."""

    def __init__(self, config: MirasConfig):
        super().__init__(config, config.gate_granularity)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return scaled_sigmoid(self.logits(hidden_states), 1.0)

    def initial_bias(self) -> Tensor:
        return torch.full_like(self.bias, math.log(0.5))


class MirasRetentionGate(MirasLowRankGate):
    """Log retention of every token, `log alpha = -exp(a_log) softplus(.)`, float32; the memory bounds it below. It is zero,
    and nothing of it is learned, where a memory forgets nothing."""

    def __init__(self, config: MirasConfig):
        super().__init__(config, config.gate_granularity, config.learned_retention and config.has_retention)
        self.forgets = config.has_retention
        self.half_lives = (config.min_half_life, config.max_half_life)
        self.a_log = nn.Parameter(torch.zeros(config.num_attention_heads), requires_grad=self.learned)

    def forward(self, hidden_states: Tensor) -> Tensor:
        scale = self.a_log.float().exp()
        return negative_softplus(self.logits(hidden_states), scale[:, None] if self.per_channel else scale)

    def initial_bias(self) -> Tensor:
        if not self.forgets:
            return torch.zeros_like(self.bias)
        shortest, longest = (math.log(half_life) for half_life in self.half_lives)
        half_life = torch.linspace(shortest, longest, self.bias.numel(), device=self.bias.device).exp()
        rate = math.log(2.0) / half_life
        return rate + torch.log(-torch.expm1(-rate))  # the inverse of softplus


class MirasTiedGate(MirasRetentionGate):
    """Step of every token, `eta = softplus(.)`, `eta_max` at most, and its log retention, `-exp(a_log) eta`, float32."""

    def __init__(self, config: MirasConfig):
        super().__init__(config)
        self.eta_max = config.eta_max

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.a_log.float().exp()
        eta = F.softplus(self.logits(hidden_states)).clamp(max=self.eta_max)
        return eta, -eta * (scale[:, None] if self.per_channel else scale)


class MirasThresholdGate(MirasLowRankGate):
    """Threshold of the Huber biases, `delta = softplus(.)`, positive, float32."""

    def __init__(self, config: MirasConfig):
        bias = choice_of(config, "attentional_bias")
        super().__init__(config, bias.delta_granularity)
        self.initial = bias.initial_delta(config.head_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        # the floor keeps the l1 branch from writing nothing at all
        return F.softplus(self.logits(hidden_states)) + 1e-4

    def initial_bias(self) -> Tensor:
        threshold = torch.linspace(*self.initial, self.bias.numel(), device=self.bias.device)
        return torch.log(torch.expm1(threshold))  # the inverse of softplus


class MirasValueSkip(nn.Module):
    """What of a token's own value is added to what it reads: `D v`, D one number a head, that starts at one."""

    decays = False

    def __init__(self, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads))

    def forward(self, values: Tensor) -> Tensor:
        """Of `[batch, tokens, heads, head_dim]`."""
        return self.weight[:, None] * values


class MirasMomentumGate(MirasLowRankGate):
    """Log momentum of every token and head, `log mu = -softplus(.)`, float32; it starts at one half."""

    def __init__(self, config: MirasConfig):
        super().__init__(config, "head")

    def forward(self, hidden_states: Tensor) -> Tensor:
        return -F.softplus(self.logits(hidden_states))

    def initial_bias(self) -> Tensor:
        return torch.zeros_like(self.bias)


def memory_rule(config: MirasConfig) -> MirasRule:
    """The point of the Miras design space that a config names."""
    return MirasRule(
        *(choice_of(config, field) for field in CHOICES),
        chunk_size=config.chunk_size,
        decay_target=config.decay_target,
        min_log_alpha=config.min_log_alpha,
    )


class MirasInitialState(NotByParameter, nn.ParameterList):
    """The dual state that every text starts from. A list that is called, so that what wraps the forward of modules
    (offloading, tensor parallelism) reaches its parameters."""

    decays = False
    __call__ = nn.Module.__call__  # a parameter list's own raises

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(self)


class MirasMemory(NotByParameter, nn.Module):
    """The memory of a layer's heads: what is learned about it in training, and the rule by which it learns itself."""

    decays = False

    def __init__(self, config: MirasConfig):
        super().__init__()
        self.rule = memory_rule(config)
        self.backend = MemoryBackend(self.rule, config.memory_backend, config.slots_per_token)
        self.hidden_scale, self.last_scale = config.initial_hidden_scale, config.initial_memory_scale
        heads, head_dim = config.num_attention_heads, config.head_dim
        self.initial_state = MirasInitialState(
            nn.Parameter(torch.empty(heads, *shape)) for shape in self.rule.architecture.weight_shapes(head_dim)
        )
        start = self.rule.algorithm.initial_norm_weight
        affine = {"norm_weight": torch.full((heads, head_dim), start), "norm_bias": torch.zeros(heads, head_dim)}
        for name, value in affine.items():
            if self.rule.architecture.has_norm or (name == "norm_weight" and self.rule.algorithm.has_covariance):
                self.register_parameter(name, nn.Parameter(value))
            else:  # a parameter that never gets a gradient would trip DistributedDataParallel
                self.register_buffer(name, value, persistent=False)

    def forward(self, tokens: "ProjectedTokens", sequences: Sequences, cached: MirasLayer | None = None) -> Tensor:
        """What tokens read, `[batch, tokens, heads, head_dim]`. Their layer of the cache, if there is one, has the memory
        after them."""
        _, columns, heads, _ = tokens.q.shape
        norm = (self.norm_weight, self.norm_bias)
        if norm[0].shape[0] != heads or norm[1].shape[0] != heads:
            # tensor parallelism leaves buffers whole: as many as this rank has heads
            norm = tuple(p[:heads] for p in norm)
        parameters = MemoryParameters(self.initial_state(), *norm)
        if cached is None:
            return self.backend(tokens, sequences, parameters)[0]
        held = cached.to_read()  # what else the layer of the cache holds may change by it
        version = self.version(cached.made_with)
        carry = Carry(*held, cached.link_cache_of(version))
        y, (state, tail, link_cache) = self.backend(tokens, sequences, parameters, carry, cached.recording)
        cached.update_memory(state, tail, columns, link_cache, version, handed_over=True)
        return y

    def version(self, known: WeightsVersion | None) -> WeightsVersion | None:
        """What the initial memory is now, for what is derived from it and kept: `known` itself if that still holds; `None`
        in a compiled graph, where it stands still."""
        return (
            None
            if torch.compiler.is_compiling()
            else weights_version(self.initial_state.parameters(recurse=False), known)
        )

    def sample_initial_state(self, layer: int) -> Tensor:
        """A dual state whose weights have the scale that simulations found stable."""
        shape = self.initial_state[layer].shape
        last = layer == len(self.initial_state) - 1
        std = (self.last_scale if last else self.hidden_scale) / math.sqrt(shape[1])
        weight = torch.randn(shape, device=self.initial_state[layer].device) * std
        return self.rule.retention.inverse(weight, self.rule.hidden_axis(layer))


@dataclass
class ProjectedTokens:
    """The tokens of a call as a mixer projects them. What stands between that and its memory (convolutions, rotary
    embedding, norms, gates) is done by whoever reads them: by `finished`, or in the launch that decodes.

    Args:
        mixer (`MirasMixer`): whose projections they are.
        hidden_states (`torch.Tensor` of shape `[batch, tokens, hidden_size]`): inputs, which the gates look at.
        q, k, v (`torch.Tensor` of shape `[batch, tokens, heads, head_dim]`):
            Projections; `k` is `None` where keys are what retention lets go, and where a token writes several times, `k` and `v`
            have the writes of a head behind each other, `[batch, tokens, heads * writes, head_dim]`.
        e (`torch.Tensor`, as `q`, *optional*): projected erase keys, where they are not those that are written.
        rotary (`tuple` of `torch.Tensor`, *optional*): cosines and sines, `[batch, tokens, head_dim]`.

    `skipped`, `[batch, tokens, heads, head_dim]`, is what is added to what they read once they are finished; or `None`.
    """

    mixer: "MirasMixer"
    hidden_states: Tensor
    q: Tensor
    v: Tensor
    k: Tensor | None = None
    e: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    skipped: Tensor | None = field(default=None, init=False)
    _joined: Tensor | None = field(default=None, init=False, repr=False)

    @property
    def projected(self) -> dict[str, Tensor]:
        """The projections by their names, in the order of the convolutions' inputs."""
        return {name: getattr(self, name) for name in self.mixer.projected}

    def part(self, first: int, last: int) -> "ProjectedTokens":
        """Some of the tokens."""
        cut = {name: x[:, first:last] for name, x in self.projected.items()}
        rotary = None if self.rotary is None else tuple(x[:, first:last] for x in self.rotary)
        return replace(self, hidden_states=self.hidden_states[:, first:last], rotary=rotary, **cut)

    def finished(self, tail: Tensor | None = None, position: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Queries, keys, values, steps, log retention, thresholds, log momentum and erase keys, as memories take them: `[batch,
        tokens, heads, ...]`, with tokens that erase and write, or write several times, as so many tokens of the memory.

        Args:
            tail (`torch.Tensor` of shape `[batch, conv_kernel_size - 1, channels]`, *optional*):
                The convolutions' last inputs before the tokens.
            position (`torch.Tensor` of shape `[batch, tokens]`, *optional*): tokens since the sequence's start.
        """
        mixer = self.mixer
        together = tail is not None and self.v.shape[1] == 1 and self._has_plain_convolutions()
        found = self._of_one_token(tail) if together else self._one_by_one(tail, position)
        q, k, v, e = (found.get(name) for name in "qkve")
        if mixer.value_norm:
            v = l2norm(v.float(), length=mixer.head_dim**0.5).to(v.dtype)
        self.skipped = None if mixer.skip is None else mixer.skip(v)
        gates = (mixer.eta, mixer.alpha, mixer.delta, mixer.momentum)
        gates = [None if gate is None else gate(self.hidden_states) for gate in gates]
        if mixer.eta is None:
            gates[:2] = gates[1]
        if k is None:  # 1 - alpha, of the retention that there is after the cut
            k = -gates[1].clamp(min=mixer.memory.rule.least_log_alpha).expm1()
        found = (q, k, v, *gates, e)
        return found if mixer.slots == 1 else self._by_slots(*found)

    def _one_by_one(self, tail: Tensor | None, position: Tensor | None) -> dict[str, Tensor]:
        """The projections after convolution, and all but values after rotary embedding and norm."""
        mixer, parts = self.mixer, {name: x.flatten(-2) for name, x in self.projected.items()}
        widths = [x.shape[-1] for x in parts.values()]
        tails = (None,) * len(parts) if tail is None else tail.split(widths, dim=-1)
        found = {
            name: mixer.by_heads(mixer.convolution(name)(x, t, position))
            for (name, x), t in zip(parts.items(), tails, strict=True)
        }
        for name in mixer.projected:
            if name != "v":
                found[name] = self._normed(found[name])
        return found

    def _of_one_token(self, tail: Tensor) -> dict[str, Tensor]:
        """`_one_by_one` of one token, in a tensor of all heads: operations on so few numbers take as long as it takes to begin
        them, and the values stand among those whose rotation and norm they do not have."""
        mixer, projected = self.mixer, self.projected
        convolutions = [mixer.convolution(name) for name in projected]
        weight = torch.cat([module.weight for module in convolutions])
        bias = torch.cat([module.bias for module in convolutions]) if mixer.conv_bias else None
        x = mixer.by_heads(convolve(self.side_by_side(), weight, bias, mixer.conv_act, tail))
        heads = [part.shape[2] for part in projected.values()]
        normed = self._normed(x).split_with_sizes(heads, dim=2)
        found = dict(zip(projected, normed, strict=True))
        found["v"] = x.split_with_sizes(heads, dim=2)[list(projected).index("v")]
        return found

    def _normed(self, x: Tensor) -> Tensor:
        """Queries, keys or erase keys as memories take them, float32."""
        x = (x if self.rotary is None else rotate(x, *self.rotary, unsqueeze_dim=2)).float()
        return l2norm(x) if self.mixer.query_key_norm else x

    def _has_plain_convolutions(self) -> bool:
        """Whether convolutions do nothing but convolve with their parameters, so that they can do so together."""
        modules = [self.mixer.convolution(name) for name in self.mixer.projected]
        own = ["weight", "bias"]
        return all(is_plain(x, MirasShortConvolution, self.v) and [*x._parameters] == own for x in modules)

    def _by_slots(self, q, k, v, eta, log_alpha, delta, log_momentum, e) -> tuple[Tensor | None, ...]:
        """`finished` of tokens for which the memory reads several: one that erases, and one a write. What is forgotten is so
        before the first of them, and what is read is read after the last."""
        writes, slots = self.mixer.writes, self.mixer.slots

        def writing(x: Tensor, erasure: Tensor | None) -> Tensor:  # the writes of a head stand behind each other
            x = x.unflatten(2, (-1, writes))
            x = x if erasure is None else torch.cat((erasure.to(x.dtype).unsqueeze(3), x), dim=3)
            return x.transpose(2, 3).flatten(1, 2)

        def alike(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.repeat_interleave(slots, dim=1)

        def only(x: Tensor, place: int) -> Tensor:  # zeros for the others
            zeros = torch.zeros_like(x)
            return torch.stack([x if i == place else zeros for i in range(slots)], dim=2).flatten(1, 2)

        erasures: tuple[Tensor | None, ...] = (None, None, None)
        if e is not None:
            gate = self.mixer.erase(self.hidden_states)
            gate = gate if gate.dim() == e.dim() else gate.unsqueeze(-1)
            # no value, and a step of one: what the memory returns for e is taken away along a o e
            erasures = gate * e, torch.zeros_like(e), torch.ones_like(e[..., 0])
        k, v, eta = (writing(x, erasure) for x, erasure in zip((k, v, eta), erasures, strict=True))
        # a write that has no erase key of its own has no error to take away
        erase = None if e is None else only(e, 0)
        return only(q, slots - 1), k, v, eta, only(log_alpha, 0), alike(delta), alike(log_momentum), erase

    def release(self) -> None:
        """Lets the projections go, which are as large as what was made of them, while the memory reads."""
        for name in self.mixer.projected:
            delattr(self, name)

    def side_by_side(self) -> Tensor:
        """The projections as `[batch, tokens, channels]`, in the order of the convolutions' inputs; those of a single token,
        which the tail wants, too, are kept."""
        if self._joined is not None:
            return self._joined
        joined = torch.cat(list(self.projected.values()), dim=2).flatten(2)
        self._joined = joined if joined.shape[1] == 1 else None
        return joined

    def conv_inputs(self, earlier: Tensor | None) -> Tensor:
        """What enters the convolutions, `[batch, earlier + tokens, channels]`, zeros before a text's first token."""
        inputs = self.side_by_side()
        if earlier is None:
            return F.pad(inputs, (0, 0, self.mixer.conv_kernel_size - 1, 0))
        return torch.cat((earlier.to(inputs.dtype), inputs), dim=1)

    def next_tail(self, tail: Tensor | None, lengths: Tensor | None) -> Tensor:
        """The convolutions' last inputs of each row's real tokens, `lengths` of them, for the next call."""
        before = self.mixer.conv_kernel_size - 1
        if lengths is None and tail is not None and self.v.shape[1] < before:
            return self.conv_inputs(tail[:, self.v.shape[1] :])  # a new tensor already
        inputs = self.conv_inputs(tail)
        if lengths is None:
            return inputs[:, inputs.shape[1] - before :].clone()
        index = lengths[:, None] + torch.arange(before, device=inputs.device)
        return inputs.gather(1, index[..., None].expand(-1, -1, inputs.shape[-1]))

    def is_plain(self) -> bool:
        """Whether the small modules before the memory are what they seem, so that a kernel can do what they do: none is
        wrapped by an adapter, sharded or offloaded, convolutions have the activation that kernels know and no bias, queries
        and keys have their norm, steps are their own gate's, and nothing is added to what is read."""
        mixer = self.mixer
        if mixer.conv_act != "silu" or mixer.projected != ("q", "k", "v") or not mixer.query_key_norm:
            return False
        if mixer.conv_bias or mixer.eta is None or mixer.skip is not None:
            return False
        modules = [(MirasShortConvolution, mixer.convolution(name)) for name in mixer.projected]
        modules += [(MirasStepGate, mixer.eta), (MirasRetentionGate, mixer.alpha)]
        if mixer.delta is not None:
            modules.append((MirasThresholdGate, mixer.delta))
        return all(is_plain(module, kind, self.v) for kind, module in modules)

    def for_kernel(self, tail: Tensor) -> tuple[tuple[Tensor | None, ...], Projections]:
        """What `finished` returns before anything is done, and what there is to do; `tail` is updated where it lies."""
        mixer = self.mixer
        gates = (mixer.eta, mixer.alpha, mixer.delta)
        logits = (None if gate is None else gate.logits(self.hidden_states) for gate in gates)
        weights = (mixer.q_conv.weight, mixer.k_conv.weight, mixer.v_conv.weight)
        rotary = (None, None) if self.rotary is None else self.rotary
        projections = Projections(
            weights, tail, mixer.alpha.a_log, mixer.eta.eta_max, *rotary, value_norm=mixer.value_norm
        )
        return (self.q, self.k, self.v, *logits), projections


class MirasMixer(nn.Module):
    """The sequence layer around the memory: projections, convolutions, gates, memory, gated norm, projection."""

    def __init__(self, config: MirasConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.use_rope = config.use_rope
        self.value_norm = config.value_norm
        self.query_key_norm = config.query_key_norm
        self.conv_kernel_size, self.conv_act = config.conv_kernel_size, config.conv_act
        self.conv_bias = config.conv_bias
        heads, width = config.num_attention_heads, config.num_attention_heads * self.head_dim

        self.projected = config.memory_projections
        # heads that share one of what is projected
        self.sharing = {name: heads // config.memory_heads_of(name) for name in self.projected}
        self.writes, self.slots = config.writes_per_token, config.slots_per_token
        for name in self.projected:
            features = config.memory_heads_of(name) * self.head_dim * self.writes_of(name)
            self.add_module(f"{name}_proj", nn.Linear(config.hidden_size, features, bias=config.attention_bias))
        convolution = (config.conv_kernel_size, config.conv_initializer_range, config.conv_act, config.conv_bias)
        for name in self.projected:
            self.add_module(f"{name}_conv", MirasShortConvolution(width * self.writes_of(name), *convolution))

        self.eta = None if config.tied_step else MirasStepGate(config)
        self.alpha = MirasTiedGate(config) if config.tied_step else MirasRetentionGate(config)
        thresholded = chosen(config, "attentional_bias").delta_granularity is not None
        self.delta = MirasThresholdGate(config) if thresholded else None
        has_momentum = chosen(config, "learning_algorithm").has_momentum
        self.momentum = MirasMomentumGate(config) if has_momentum else None

        self.erase = MirasEraseGate(config) if config.has_erase_key else None
        self.skip = MirasValueSkip(heads) if config.value_skip else None

        self.memory = MirasMemory(config)
        self.g_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        eps = config.rms_norm_eps if config.output_norm_eps is None else config.output_norm_eps
        together = heads // (config.output_norm_groups or heads)
        self.o_norm = MirasRMSNormGated(
            config.head_dim, eps, config.output_gate_act, together, config.output_gate_first
        )
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.has_output_bias)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        sequences: Sequences | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `[batch, tokens, hidden_size]`): inputs.
            position_embeddings (`tuple` of `torch.Tensor`, *optional*): cosines and sines, `[batch, tokens, head_dim]`.
            sequences (`Sequences`, *optional*): pads and packs; `None` if every row is one sequence.
            cache (`Cache`, *optional*): holds this layer's memory, and takes it after the call.
        """
        sequences = Sequences() if sequences is None else sequences
        cached = memory_layer(cache, self.layer_idx)
        batch = hidden_states.shape[0]
        hidden_states = sequences.gather(hidden_states)
        rotary = None
        if self.use_rope and position_embeddings is not None:
            rotary = tuple(sequences.gather(x.expand(batch, -1, -1)) for x in position_embeddings)

        # no name for the projections: `ProjectedTokens.release` could not free them
        tokens = ProjectedTokens(self, hidden_states, **dict(self.projections(hidden_states)), rotary=rotary)
        # convolutions, rotary embedding, norms and gates stand before it: `ProjectedTokens.finished`
        memory = self.memory(tokens, sequences, cached)
        gate = self.by_heads(self.g_proj(hidden_states))
        output = self.o_norm(memory.to(gate.dtype), gate).flatten(-2)
        return sequences.scatter(self.o_proj(output), batch), None

    def projections(self, hidden_states: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Queries, keys and values, `[batch, tokens, heads, head_dim]`, by name one after the other, held by nobody else."""
        for name in self.projected:
            projected = self.by_heads(getattr(self, f"{name}_proj")(hidden_states))
            if self.sharing[name] > 1:
                # every head has its own memory, and convolutions, of what it shares
                by_heads = projected.unflatten(2, (-1, self.writes_of(name)))
                projected = repeat_heads(by_heads, self.sharing[name], dim=2).flatten(2, 3)
            yield name, projected

    def writes_of(self, name: str) -> int:
        """How many of what is projected a head has."""
        return self.writes if name in ("k", "v") else 1

    def convolution(self, name: str) -> nn.Module:
        """That of queries, keys, values or erase keys."""
        return getattr(self, f"{name}_conv")

    def by_heads(self, x: Tensor) -> Tensor:
        # `unflatten` is Python, which takes longer than this on a token
        return x.view(*x.shape[:-1], -1, self.head_dim)


def repeat_heads(x: Tensor, n_rep: int, dim: int) -> Tensor:
    """Every entry along an axis, the heads of keys and values, `n_rep` times in a row."""
    return x.repeat_interleave(n_rep, dim=dim) if n_rep > 1 else x


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[Tensor, Tensor]:
    key_states = repeat_heads(key, module.num_key_value_groups, dim=1)
    value_states = repeat_heads(value, module.num_key_value_groups, dim=1)

    attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = F.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value_states)
    return attn_output.transpose(1, 2).contiguous(), attn_weights


class MirasAttention(nn.Module):
    """Attention over a sliding window or the whole text, the other half of a hybrid."""

    def __init__(self, config: MirasConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == ATTENTION_LAYER else None
        self.is_causal = True

        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.has_output_bias)
        if config.qk_norm:
            self.q_norm = MirasRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = MirasRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = None

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape)
        key_states = self.k_proj(hidden_states).view(hidden_shape)
        if self.q_norm is not None:
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        query_states, key_states = query_states.transpose(1, 2), key_states.transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        query_states, key_states = apply_rotary_pos_emb(
            query_states, key_states, *position_embeddings, unsqueeze_dim=1
        )
        if cache is not None:
            layer = cache.layers[self.layer_idx]
            if (
                isinstance(layer, StaticLayer)
                and layer.is_initialized
                and is_abroad((layer.keys, layer.cumulative_length))
            ):
                leave_inference_mode(layer)
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx)
            recorded = self.sliding_window is not None and getattr(layer, "record_past", False)
            if recorded or self.sliding_window == 1:
                # in Transformers 5.17 a layer that records gives all that it has kept, more than masks cover; and one
                # with a window of a single token keeps everything, where it should keep nothing
                visible = self.sliding_window - 1 + query_states.shape[2]
                key_states, value_states = key_states[:, :, -visible:], value_states[:, :, -visible:]
                if self.sliding_window == 1 and isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past:
                    layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class MirasMLP(nn.Module):
    def __init__(self, config: MirasConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.chunk_size_feed_forward = config.chunk_size_feed_forward

    def forward(self, x: Tensor) -> Tensor:
        if 0 < self.chunk_size_feed_forward < x.shape[1]:
            # Transformers' helper wants a multiple of the chunk
            return torch.cat([self.forward(part) for part in x.split(self.chunk_size_feed_forward, dim=1)], dim=1)
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MirasDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MirasConfig, layer_idx: int):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.layer_type = config.layer_types[layer_idx]
        if self.layer_type == MEMORY_LAYER:
            self.mixer = MirasMixer(config, layer_idx)
        else:
            self.self_attn = MirasAttention(config, layer_idx)
        self.mlp = MirasMLP(config)
        self.input_layernorm = MirasRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MirasRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        sequences: Sequences | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        if self.layer_type == MEMORY_LAYER:
            hidden_states, _ = self.mixer(
                hidden_states,
                position_embeddings=position_embeddings,
                sequences=sequences,
                cache=cache,
            )
        else:
            hidden_states, _ = self.self_attn(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                cache=cache,
                **kwargs,
            )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return residual + hidden_states


def attention_masks(
    config: MirasConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> dict[str, Any]:
    """The masks of the kinds of attention layers that a model has, as its attention implementation takes them."""
    kinds = config.layer_types
    makers = {ATTENTION_LAYER: create_sliding_window_causal_mask, FULL_ATTENTION_LAYER: create_causal_mask}
    return {
        kind: make(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
        )
        for kind, make in makers.items()
        if kind in kinds
    }


class MirasPreTrainedModel(PreTrainedModel):
    config: MirasConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MirasDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # a converted Transformer without memories included: its masks come with the sequences, which nobody would split
    _supports_context_parallel = False
    # a memory that records can give tokens back: generate() may speculate
    _is_stateful = False
    # Quantisation leaves these alone, too: they are a few percent of the weights, and what enters `up_proj` is narrower
    # than the blocks of 4-bit formats, which bitsandbytes refuses on CPUs.
    _keep_in_fp32_modules = [r".*\.mixer\.(eta|alpha|delta|momentum|erase)"]
    _can_record_outputs = {
        "hidden_states": MirasDecoderLayer,
        "attentions": MirasAttention,
    }

    # before any `__init__`, which have no keywords, so that Python's own error would name no field
    def __new__(cls, config: Any = None, *args, **kwargs):
        refuse_model_keywords(cls, config, kwargs)
        return super().__new__(cls)

    # whether the loss is divided by `num_items_in_batch`; if not, Trainer divides that of accumulated batches
    _divides_loss = True

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `num_items_in_batch` is understood. `Trainer` asks before it makes an optimizer."""
        exempt_from_trainer()
        return self._divides_loss

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, MirasShortConvolution):
            if module.initializer_range is None:
                bound = 1.0 / math.sqrt(module.kernel_size)
                init.uniform_(module.weight, -bound, bound)
            else:
                init.normal_(module.weight, std=module.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, MirasValueSkip):
            init.ones_(module.weight)
        elif isinstance(module, MirasLowRankGate):
            init.copy_(module.bias, module.initial_bias())
            if isinstance(module, MirasRetentionGate):
                init.constant_(module.a_log, 0.0 if module.forgets else -math.inf)
        elif isinstance(module, MirasMemory):
            for layer, parameter in enumerate(module.initial_state):
                init.copy_(parameter, module.sample_initial_state(layer))
            init.constant_(module.norm_weight, module.rule.algorithm.initial_norm_weight)
            init.zeros_(module.norm_bias)

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """
        As everywhere in Transformers, and a model card (`README.md`), unless a person wrote the one that is there.

        Raises:
            `ValueError`: if fields of the config were assigned that the modules were built with: what would be loaded
                is another model; and for a config of which no model would be built.
        """
        check_as_built(self.config, self.base_model._built_with)
        self.config.check_for_model()  # what would be built of it
        if self.config.num_hidden_layers > len(self.base_model.layers):
            raise ValueError(
                f"`config.num_hidden_layers` is {self.config.num_hidden_layers}, and the model has "
                f"{len(self.base_model.layers)} layers: a model that is loaded would begin the others anew."
            )
        head = self.get_output_embeddings()
        if head is not None and not self.config.tie_word_embeddings:
            if head.weight is self.get_input_embeddings().weight:
                raise ValueError(
                    "`config.tie_word_embeddings` is False, and head and embeddings share one weight, which is stored "
                    "once: a model that is loaded would begin its head anew. Set it back, or give the head a weight of its "
                    "own."
                )
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if self.should_save_on_this_rank(is_main_process):
            save_model_card(self, save_directory)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        # after Transformers put its draft of a card, or the repository's own card, into the folder
        save_model_card(self, working_dir, name=repo_id, tags=getattr(self, "model_tags", None))
        files_timestamps = WholeFilesOnly(files_timestamps)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)

    @staticmethod
    @takes_cache
    def create_masks_for_generate(
        config: MirasConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        is_first_iteration: bool = True,
        **kwargs,
    ) -> dict[str, Any]:
        """What `generate()` gives a step that may be compiled, in place of a mask that grows: for memories the mask of the
        new tokens, `None` for one that was generated, and for attention layers theirs."""
        tokens = inputs_embeds.shape[1]
        generated = tokens == 1 and not is_first_iteration
        if attention_mask is not None and tokens > 1:
            check_text_read(attention_mask, tokens, tokens_read(cache))
        masks = {MEMORY_LAYER: None if attention_mask is None or generated else attention_mask[:, -tokens:]}
        return masks | attention_masks(config, inputs_embeds, attention_mask, position_ids, cache)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Does nothing: checkpoints name the installed package instead of carrying copies of its code."""


class MirasModel(MirasPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: MirasConfig):
        super().__init__(config)
        config.check_for_model()
        check_distributed_config(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([MirasDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MirasRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MirasRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self._built_with = built_values(config)

        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.LongTensor | None = None,
        seq_idx: torch.IntTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `[batch, tokens]`, *optional*): token ids.
            attention_mask (`torch.Tensor` of shape `[batch, tokens]` or `[batch, past + tokens]`, *optional*):
                1 at real tokens, 0 at pads. A padded row gives exactly what the row gives alone, wherever its pads are.
                Or what `create_masks_for_generate` returns.
            position_ids (`torch.LongTensor` of shape `[batch, tokens]`, *optional*):
                Counted from the real tokens if not given. Ids that do not go up by one begin a packed sequence.
            cache (`Cache`, *optional*): `DynamicCache(config=model.config)`, with what has been read.
            inputs_embeds (`torch.FloatTensor` of shape `[batch, tokens, hidden_size]`, *optional*): embeddings.
            use_cache (`bool`, *optional*): whether to return the cache.
            cu_seq_lens_q (`torch.LongTensor` of shape `[sequences + 1]`, *optional*): borders of a pack.
            seq_idx (`torch.IntTensor` of shape `[batch, tokens]`, *optional*):
                Number of each token's sequence. Where several of these three are given, they must agree.

        Raises:
            `ValueError`: for masks, packs and caches that do not fit, naming the argument and what is allowed.
        """
        refuse_unknown(f"{type(self).__name__}.forward", kwargs, _KEYWORDS)
        if not torch.compiler.is_compiling():
            check_as_built(self.config, self._built_with)
        check_inputs(self.config, input_ids, inputs_embeds, position_ids, use_cache)
        if inputs_embeds is None:
            # of the config: PEFT may have wrapped the embeddings
            check_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        batch, tokens = inputs_embeds.shape[:2]
        # before any layer: under activation checkpointing they get no cache, and one that does not fit goes unnoticed
        check_cache(self.config, cache, batch)
        if cache is not None and self.gradient_checkpointing and self.training:
            raise ValueError(
                "`cache` cannot be used with activation checkpointing in training: Transformers takes it away from every "
                "layer, and the text would be read as if nothing came before. Turn one of them off."
            )

        # `generate()` makes the masks of steps that may be compiled itself: `create_masks_for_generate`
        prepared = isinstance(attention_mask, dict)
        masks = attention_mask if prepared else {}
        if prepared:
            attention_mask = attention_mask[MEMORY_LAYER]

        past, attends = 0, self.config.has_attention
        if attention_mask is not None and cache is not None and not prepared:
            past = cache.get_seq_length()
        sequences = padded_sequences(attention_mask, batch, tokens, past)
        if past and attends:
            counted = MEMORY_LAYER in self.config.layer_types
            attention_mask = mask_of_attention(attention_mask, tokens, past, tokens_read(cache), counted)
        elif attention_mask is None and cache is not None and attends and not prepared:
            # no branch on a static cache's length, which is a tensor: a whole graph of this step has none
            check_no_pads_read(tokens, cache.get_seq_length(), tokens_read(cache))
        covers = past and attention_mask.shape[1] == past + tokens
        if covers:
            check_text_read(attention_mask, tokens, tokens_read(cache))
        check_kernel_arguments(kwargs, cu_seq_lens_q)
        pack = packed_sequences(
            position_ids, batch, tokens, cu_seqlens=cu_seq_lens_q, seq_idx=seq_idx, mask=sequences.mask
        )
        # what attention goes by; rotary embeddings go by what the caller says
        attention_positions = position_ids
        if pack is not None:
            if cache is not None:
                raise ValueError(
                    "`cache` cannot be used with packed sequences (`position_ids` that start again, `cu_seq_lens_q` or "
                    "`seq_idx`): a pack's sequences end with it."
                )
            sequences, attention_mask, use_cache = pack, None, False
            attention_positions = sequences.position.view(batch, tokens)
            if position_ids is None:
                position_ids = attention_positions
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        if position_ids is None:
            position_ids = torch.arange(tokens, device=inputs_embeds.device).unsqueeze(0)
            if sequences.mask is not None:
                position_ids = (sequences.mask.long().cumsum(-1) - 1).clamp(min=0)
            read = tokens_read(cache)
            if covers and not isinstance(read, Tensor):
                # a model without memories: nobody else has counted pads
                read = attention_mask[:, :past].sum(-1)
            position_ids = position_ids + (
                read.to(position_ids.device).unsqueeze(1) if isinstance(read, Tensor) else read
            )
        if attention_positions is None:
            attention_positions = position_ids

        if not prepared:
            if attention_mask is not None and self.config.has_sliding_attention:
                check_window(attention_mask, self.config.sliding_window)
            masks = attention_masks(self.config, inputs_embeds, attention_mask, attention_positions, cache)
        if cu_seq_lens_q is not None and self.config.has_attention:
            kwargs["cu_seq_lens_q"] = cu_seq_lens_q.to(torch.int32)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=masks.get(decoder_layer.layer_type),
                sequences=sequences,
                position_embeddings=position_embeddings,
                position_ids=attention_positions,
                # by the name that activation checkpointing takes away
                **{CACHE_NAME: cache},
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            **{CACHE_NAME: cache if use_cache else None},
        )


class MirasForCausalLM(MirasPreTrainedModel, GenerationMixin):
    """The decoder with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MirasConfig):
        super().__init__(config)
        self.model = MirasModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        Arguments of [`MirasModel`], and:

        Args:
            labels (`torch.LongTensor` of shape `[batch, tokens]`, *optional*): token ids to predict, -100 to ignore.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                How many of the last positions get logits (0 for all), or which.

        ```python
        >>> from transformers import AutoTokenizer
        >>> from miras_hf import MonetaForCausalLM

        >>> model = MonetaForCausalLM.from_pretrained("runs/demo")
        >>> tokenizer = AutoTokenizer.from_pretrained("runs/demo")
        >>> inputs = tokenizer("def read(", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0])
        ```"""
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"`logits_to_keep` must be zero, for all, or positive, got {logits_to_keep}.")
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        slice_indices = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, slice_indices, :])

        loss = None
        if labels is not None or kwargs.get("shift_labels") is not None:
            for name, given in (("labels", labels), ("shift_labels", kwargs.get("shift_labels"))):
                if given is not None and given.shape != logits.shape[:2]:
                    raise ValueError(
                        f"`{name}` must have the shape of the logits, {tuple(logits.shape[:2])}, got {describe(given)}."
                    )
            # labels that are shifted already among them
            options = {name: for_losses(value) for name, value in kwargs.items()}
            if "shift_labels" in options:
                options["shift_labels"] = learned_labels(options["shift_labels"], attention_mask, shifted=True)
            labels = learned_labels(for_losses(labels), attention_mask)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: cache_of(outputs)},
        )

    def generate(self, inputs: Tensor | None = None, *args, **kwargs):
        """
        `generate()` of Transformers, which takes the cache by both of its names. After a cache, the input ids of the new
        tokens are enough, as long as they are not more than were read and those had no pads: as everywhere in
        Transformers, more ids than that are taken for the whole text unless the mask covers it.

        Raises:
            `ValueError`: for a mask that does not cover the whole text, and embeddings that do not.
        """
        check_prompt_learning(self.prepare_inputs_for_generation)
        kwargs = cache_named(CACHE_NAME, kwargs)
        cache = kwargs.get(CACHE_NAME)
        past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if past and isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1]:
            mask = kwargs.get("attention_mask")
            kwargs["attention_mask"] = mask_of_whole_text(mask, *ids.shape, past, tokens_read(cache), ids.device)
        elif past and isinstance(embeds := kwargs.get("inputs_embeds"), Tensor) and embeds.shape[1] <= past:
            raise ValueError(
                f"`inputs_embeds` must be those of the whole text after a cache, more than the {past} tokens that were "
                f"read, got {embeds.shape[1]}."
            )
        return super().generate(inputs, *args, **kwargs)

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        # `generate()` hands on to every step what it consumes itself
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def _assisted_decoding(self, *args, **kwargs):
        cache = kwargs.get(CACHE_NAME)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                "`cache` must be empty for assisted decoding and prompt lookup, got a cache that has read "
                f"{cache.get_seq_length()} tokens: Transformers would read the whole text into it once more. Leave "
                "`cache` out, or go on from it without `assistant_model` and `prompt_lookup_num_tokens`."
            )
        return super()._assisted_decoding(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: raises a `ValueError`. `generate_batch` and `cache_implementation="paged"` come here, too."""
        raise ValueError(
            "Continuous batching (`generate_batch`, `cache_implementation='paged'`, `transformers serve "
            "--continuous-batching`) pages keys and values, and a memory has none: its state has a constant "
            "size. Use `generate()`, whose padded batches give every row what it gives alone, and `transformers serve` "
            "without the flag."
        )


class MirasForSequenceClassification(GenericForSequenceClassification, MirasPreTrainedModel):
    """The decoder with a classification head on the last real token."""

    _divides_loss = False

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        r"""
        Arguments of [`MirasModel`], and:

        Args:
            attention_mask (`torch.Tensor` of shape `[batch, tokens]`, *optional*):
                Which tokens are real, and so which is the last. Without a mask, ids of `pad_token_id` at the end of a
                row are pads; embeddings have none.
            labels (`torch.LongTensor` of shape `[batch]`, *optional*): classes, or numbers to regress to.

        Raises:
            `ValueError`: for a row without a real token, for packs, and for several rows of ids without a mask in a
                model without `pad_token_id`.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        batch, tokens = hidden_states.shape[:2]
        borders = {"cu_seqlens": kwargs.get("cu_seq_lens_q"), "seq_idx": kwargs.get("seq_idx")}
        past = 0 if attention_mask is None else attention_mask.shape[1] - tokens
        mask = padded_sequences(attention_mask, batch, tokens, past).mask
        if packed_sequences(position_ids, batch, tokens, mask=mask, **borders) is not None:
            raise ValueError("A sequence classifier reads one sequence a row, and this call packs several into a row.")
        last = torch.full((batch,), tokens - 1, device=given.device)
        if attention_mask is not None:
            last = last_tokens(attention_mask[:, -tokens:].bool())
        elif input_ids is not None:
            if batch > 1 and self.config.pad_token_id is None:
                raise ValueError(
                    "`attention_mask` must be given for several rows where `config.pad_token_id` is None, or the pads of "
                    "shorter rows cannot be told from text."
                )
            if self.config.pad_token_id is not None:
                last = last_tokens(input_ids != self.config.pad_token_id)
        pooled = hidden_states[torch.arange(batch, device=hidden_states.device), last.to(hidden_states.device)]
        logits = self.score(pooled)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=for_losses(labels), pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: cache_of(outputs)},
        )


class MirasForTokenClassification(GenericForTokenClassification, MirasPreTrainedModel):
    """The decoder with a classification head on every token."""

    _divides_loss = False

    @takes_cache
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:
        r"""
        Arguments of [`MirasModel`], and:

        Args:
            labels (`torch.LongTensor` of shape `[batch, tokens]`, *optional*): classes, -100 to ignore.
        """
        # Transformers' own forward takes the cache by one name and drops the other with a warning
        return super().forward(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, for_losses(labels), use_cache, **kwargs
        )


class MonetaModel(MirasModel):
    config: MonetaConfig


class MonetaForCausalLM(MirasForCausalLM):
    config: MonetaConfig


class MonetaForSequenceClassification(MirasForSequenceClassification):
    config: MonetaConfig


class MonetaForTokenClassification(MirasForTokenClassification):
    config: MonetaConfig


class YaadModel(MirasModel):
    config: YaadConfig


class YaadForCausalLM(MirasForCausalLM):
    config: YaadConfig


class YaadForSequenceClassification(MirasForSequenceClassification):
    config: YaadConfig


class YaadForTokenClassification(MirasForTokenClassification):
    config: YaadConfig


class MemoraModel(MirasModel):
    config: MemoraConfig


class MemoraForCausalLM(MirasForCausalLM):
    config: MemoraConfig


class MemoraForSequenceClassification(MirasForSequenceClassification):
    config: MemoraConfig


class MemoraForTokenClassification(MirasForTokenClassification):
    config: MemoraConfig


__all__ = [
    f"{family}{suffix}"
    for family in ("Miras", "Moneta", "Yaad", "Memora")
    for suffix in ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
] + ["MirasPreTrainedModel"]
