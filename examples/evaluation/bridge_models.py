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
"""The models of the bridge: a Miras model whose layers are changed to what a `Point` says.

Everything but the layer is the same for all points: embedding, RMS norms, SwiGLU MLP (as wide as makes the parameters
equal), output. What the library has no switch for is done to a model that it has built: starts of parameters, and
`OfPoint`, a module around each memory. Such a model trains, is measured, and goes on from a cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from bridge_points import NO_WRITE, Point
from models import ModelShape, build, fitted
from torch import Tensor, nn
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from miras_hf import MirasConfig, MirasForCausalLM
from miras_hf.memory import Factors, MLPMemory
from miras_hf.mixer_ops import rms_norm
from miras_hf.modeling_miras import MirasMixer
from miras_hf.sequences import Sequences


_NO_CAP = 1e9


def our_config(point: Point, shape: ModelShape, intermediate_size: int) -> MirasConfig:
    """The config of a point of the bridge, as far as fields of a config can say it."""
    values: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": intermediate_size,
        # the delta rule takes the place of a matrix memory
        "memory_architecture": "mlp" if point.rule == "mlp" else "matrix",
        "attentional_bias": point.loss,
        "retention": point.retention,
        "chunk_size": point.chunk,
        "gate_granularity": point.granularity,
        "eta_max": _eta_max(point, shape) if point.write else NO_WRITE,
        # every other field that the library has changed since, as it was; `change` and `OfPoint` do what a point says of it
        "value_norm": False,
        "output_norm_eps": None,
        "conv_initializer_range": None,
        "initial_memory_scale": 1.0,
        "use_rope": point.rope,
        "decay_target": point.decay_target,
    }
    if point.norm_eps is not None:
        values["memory_norm_eps"] = point.norm_eps
    if point.half_lives is not None:
        values |= dict(zip(("min_half_life", "max_half_life"), point.half_lives, strict=True))
    if not point.caps:
        values |= {"residual_clip": _NO_CAP, "weight_cap": None, "min_log_alpha": -160.0 / point.chunk}
    return MirasConfig(**values)


def _eta_max(point: Point, shape: ModelShape) -> float:
    """The largest step, by default that of the first Yaad."""
    if point.eta_max is not None:
        return point.eta_max
    step = 0.09 * min(1.0, 64 / point.chunk)
    return step / math.sqrt(shape.width // shape.heads) if point.loss == "huber_mixture" else step


class FinishedTokens(NamedTuple):
    """Tokens as memories take them, in the place of those that a mixer projects."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    log_alpha: Tensor
    delta: Tensor | None = None
    log_momentum: Tensor | None = None
    skipped = None

    def finished(self, *_, **__) -> "FinishedTokens":
        return self

    def release(self) -> None:
        pass


class ChangedTokens:
    """The tokens of a mixer, of which something is changed where they are finished for a memory."""

    def __init__(self, tokens: Any, change: Callable[..., tuple[Tensor | None, ...]]):
        self.tokens, self.change = tokens, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokens, name)

    def finished(self, *arguments, **keywords) -> tuple[Tensor | None, ...]:
        finished = self.tokens.finished(*arguments, **keywords)
        self.q = finished[0]
        return tuple(self.change(*finished))

    def is_plain(self) -> bool:
        # a kernel that reads projections would miss the change
        return False

    def part(self, first: int, last: int) -> "ChangedTokens":
        raise ValueError("`cache` must not record here: tokens that are changed cannot be taken back.")


class DeltaRule(nn.Module):
    """The gated delta rule of Transformers in the place of a memory, without queries' scale. It keeps no state."""

    def forward(self, tokens: Any, sequences: Sequences, cached: Any = None) -> Tensor:
        if cached is not None:
            raise ValueError(
                "`use_cache` must be False: the delta rule of the bridge is trained and measured, not decoded."
            )
        q, k, v, eta, log_alpha, *_ = tokens.finished(position=sequences.position)
        scaled = q * math.sqrt(q.shape[-1])  # it divides them by this
        y, _ = torch_chunk_gated_delta_rule(scaled, k, v.to(q.dtype), g=log_alpha, beta=eta)
        return y


@dataclass(frozen=True)
class UnitStepMLP(MLPMemory):
    """An MLP memory whose gradients are in units of the read.

    A step eta on a token's gradient in the second layer moves the memory's read at the token's own key by about

        eta |h|^2 gamma^2 / (var + eps)

    of the residual, with h the hidden units and `1 / sqrt(var + eps)` the layer norm's scale. Here the gradients of both
    layers are divided by it, one number a token.
    """

    def write(self, weights, k, residual, norm_weight, norm_bias):
        first, second = super().write(weights, k, residual, norm_weight, norm_bias)
        z2 = second.inputs @ weights[1]
        *_, inverse_std = self.normalise(z2)
        gain = second.inputs.square().sum(-1, keepdim=True) * (inverse_std * norm_weight).square().mean(
            -1, keepdim=True
        )
        unit = 1.0 / (gain + 1e-2)
        return Factors(first.inputs, first.gradients * unit), Factors(second.inputs, second.gradients * unit)


class Around(nn.Module):
    """Base class of what changes the inputs and outputs of a memory.

    Its `memory` is trained, found by hooks, and kept in caches and files, as if it stood alone.
    """

    def __init__(self, memory: nn.Module):
        super().__init__()
        self.memory = memory

    def change(self, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Queries, keys, values and gates as the memory is to have them."""
        return inputs

    def returned(self, y: Tensor, q: Tensor) -> Tensor:
        """What is returned in the place of the memory's reads, of the queries before the change."""
        return y

    def forward(self, tokens: Any, sequences: Sequences, cached: Any = None) -> Tensor:
        changed = ChangedTokens(tokens, self.change)
        y = self.memory(changed, sequences, cached)
        return self.returned(y, changed.q)

    @property
    def rule(self) -> Any:
        return self.memory.rule

    @property
    def initial_state(self) -> nn.ParameterList:
        return self.memory.initial_state

    @property
    def norm_weight(self) -> Tensor:
        return self.memory.norm_weight

    @property
    def norm_bias(self) -> Tensor:
        return self.memory.norm_bias


class OfPoint(Around):
    """A memory with what a point changes at its inputs and outputs."""

    def __init__(self, memory: nn.Module, point: Point, norm_eps: float):
        super().__init__(memory)
        self.point, self.norm_eps = point, norm_eps

    def change(self, q: Tensor, k: Tensor, v: Tensor, *gates: Tensor | None) -> tuple[Tensor | None, ...]:
        if self.point.value_norm:
            v = rms_norm(v, v.new_ones(v.shape[-1]), self.norm_eps)
        if not self.point.read_residual:
            # of M(x) = x + LN: asked for v + k, LN is asked for v
            v = v + k.to(v.dtype)
        return q, k, v, *gates

    def returned(self, y: Tensor, q: Tensor) -> Tensor:
        if not self.point.read_residual:
            y = y - q.to(y.dtype)
        if self.point.query_scale:
            # reads of a matrix are linear in their query
            y = y / math.sqrt(q.shape[-1])
        return y


def change(model: MirasForCausalLM, point: Point) -> MirasForCausalLM:
    """Does to a new model what a point says and its config cannot."""
    for mixer in (module for module in model.modules() if isinstance(module, MirasMixer)):
        _start_gates(mixer, point)
        if point.output_eps is not None:
            mixer.o_norm.variance_epsilon = point.output_eps
        if point.conv_std is not None:
            for conv in (mixer.q_conv, mixer.k_conv, mixer.v_conv):
                conv.weight.data.normal_(0.0, point.conv_std)
        memory = mixer.memory
        if point.rule == "delta":
            memory = DeltaRule()
        else:
            last = memory.initial_state[-1]
            if point.last_layer != 1.0:
                retention, axis = memory.rule.retention, memory.rule.hidden_axis(len(memory.initial_state) - 1)
                last.data = retention.inverse(point.last_layer * retention.link(last.data, axis), axis)
            memory.initial_state.requires_grad_(point.train_initial)
            if point.rule == "matrix" and point.last_layer == 0.0:
                last.requires_grad_(False)
            if point.step == "unit":
                _with_unit_steps(memory)
        mixer.memory = OfPoint(memory, point, model.config.rms_norm_eps)
    return model


def _start_gates(mixer: MirasMixer, point: Point) -> None:
    mixer.eta.bias.data.fill_(math.log(point.eta_start / (1.0 - point.eta_start)))
    if point.half_lives is None:  # as Gated DeltaNet
        mixer.alpha.bias.data.fill_(1.0)
        mixer.alpha.a_log.data.uniform_(0.01, 16.0).log_()


def _with_unit_steps(memory: nn.Module) -> None:
    shipped = memory.rule.architecture
    memory.rule = replace(memory.rule, architecture=UnitStepMLP(shipped.expansion, shipped.norm_eps))
    memory.backend = type(memory.backend)(memory.rule, "pytorch")


def build_model(point: Point, shape: ModelShape, seed: int) -> tuple[nn.Module, Callable[[Tensor], dict[str, Any]]]:
    """A new model of a point, and what its forward takes besides ids."""
    if point.model != "bridge":
        whole = build(point.model, shape, seed=seed)
        whole.module.config.use_cache = False
        if point.published_gates:
            gates_as_published(whole.module)
        return whole.module, whole.arguments

    def built(config: MirasConfig) -> MirasForCausalLM:
        return change(MirasForCausalLM(config), point)

    return built_to_size(built, lambda size: our_config(point, shape, size), shape, seed)


def gates_as_published(model: nn.Module) -> None:
    """Gives Gated DeltaNet the first gates of its authors (arXiv 2412.06464), and takes their rates out of weight decay, as
    they do."""
    start_gates_as_published(model)
    for layer in model.model.layers:
        layer.linear_attn.decays = False  # of its own parameters, `A_log` and `dt_bias`


def start_gates_as_published(model: nn.Module) -> None:
    """Gives Gated DeltaNet its authors' first time steps, log-uniform from 0.001 to 0.1.

    Transformers starts all of them at 1.3, where nearly every head forgets within a token: a language model's few
    hundred heads hold some that do not, and the few of these models hardly ever one.
    """
    for layer in model.model.layers:
        bias = layer.linear_attn.dt_bias
        low, high = math.log(1e-3), math.log(1e-1)
        step = torch.empty_like(bias).uniform_(low, high).exp()
        bias.data.copy_(step + (-torch.expm1(-step)).log())  # softplus of it is the step


def built_to_size(
    built: Callable[[MirasConfig], MirasForCausalLM],
    config_of: Callable[[int], MirasConfig],
    shape: ModelShape,
    seed: int,
) -> tuple[nn.Module, Callable[[Tensor], dict[str, Any]]]:
    """A new model with as many trained parameters as all others, and what its forward takes besides ids: nothing.

    Args:
        built (`Callable`): the model of a config.
        config_of (`Callable`): the config of an MLP so wide.
    """

    class Counted:
        """What is trained of a model: the zeros that a matrix memory starts from are not."""

        def __init__(self, config: MirasConfig):
            self.model = built(config)

        def num_parameters(self) -> int:
            return self.model.num_parameters(only_trainable=True)

    step = 64 if shape.width >= 512 else 8  # as the neighbours in `benchmarks/models.py`
    return built_from_seed(built, fitted(Counted, config_of, shape, step), seed)


def built_from_seed(
    built: Callable[[MirasConfig], MirasForCausalLM], config: MirasConfig, seed: int
) -> tuple[nn.Module, Callable[[Tensor], dict[str, Any]]]:
    """A new model to be trained, and what its forward takes besides ids: nothing."""
    config.use_cache = False
    torch.manual_seed(seed)
    return built(config), lambda input_ids: {}
