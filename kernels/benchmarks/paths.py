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
"""What the GPU script measures: each path of a layer's recurrence at one shape, as a function without arguments.

All get inputs of the same width, `heads * head_dim`, drawn once. A path that is not installed, or does not serve the
shape, raises; the script writes down what it said.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import quick_interpreter  # noqa: F401
import torch
import torch.nn.functional as F

from miras_hf.backend import kernel_choices
from miras_hf.memory import (
    ATTENTIONAL_BIASES,
    L2,
    RETENTION_GATES,
    DeltaRule,
    MatrixMemory,
    MemoryArchitecture,
    MemoryParameters,
    MirasRule,
    MLPMemory,
    chunk_miras,
)
from miras_kernels import forward


# attentional bias, retention, and the largest step at a chunk of 64, for initial memories at full size (models start smaller, with
# other steps): of the three families, of a matrix memory, the linear one beside them, of Yaad as the paper prints it, of an MLP
# memory whose last weight alone is written, and of the delta rule
MODELS = {
    "yaad": ("huber_norm", "decay", 4e-3),
    "moneta": ("lp", "lq", 1.5e-3),
    "memora": ("l2", "kl", 0.03),
    "matrix": ("l2", "decay", 0.1),
    "mixture": ("huber_mixture", "decay", 4e-3),
    "last": ("l2", "decay", 0.01),
    "delta": ("l2", "decay", 0.9),
}
TIMED = ("yaad", "moneta", "memora", "matrix")
"""Models that are timed, and checked in other precisions: a loss differs from another in a few operations of a tile."""


@dataclass(frozen=True)
class Shape:
    batch: int
    tokens: int
    heads: int
    head_dim: int
    chunk_size: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def miras_flops(self) -> float:
        """Multiply-adds counted as two, `decay_target="init"`: 72 d^2 + 20 C d a token and head of an MLP memory."""
        d = self.head_dim
        return self.batch * self.tokens * self.heads * (72 * d * d + 20 * self.chunk_size * d)

    def __str__(self) -> str:
        return f"B {self.batch}, T {self.tokens}, {self.heads} x {self.head_dim}, C {self.chunk_size}"


class Path(NamedTuple):
    """A path at a shape: its call, and everything that a training step needs gradients of."""

    call: Callable[[], Any]
    leaves: list[torch.Tensor]

    def output(self) -> torch.Tensor:
        y = self.call()
        return y[0] if isinstance(y, tuple) else y

    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.leaves)

    def training_step(self) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Forward pass and gradients of all leaves, for a fixed random adjoint of the output.

        Ones would not do: behind a layer norm they have no gradient at all. Nor would `backward`, which adds to what the last
        call left.
        """
        draw = torch.Generator(self.leaves[0].device).manual_seed(1)
        y = self.output()
        y_bar = torch.randn(y.shape, generator=draw, device=y.device, dtype=torch.float32).to(y.dtype)
        return lambda: torch.autograd.grad(self.output(), self.leaves, y_bar, allow_unused=True)


def make_rule(model: str, chunk_size: int) -> MirasRule:
    bias, gate, _ = MODELS[model]
    if model == "delta":
        return MirasRule(MatrixMemory(), L2(residual_clip=None), algorithm=DeltaRule(), chunk_size=chunk_size)
    memory: MemoryArchitecture = MatrixMemory()
    if model != "matrix":
        written = "last" if model == "last" else "all"
        memory = MLPMemory(update_layers=written)
    return MirasRule(memory, ATTENTIONAL_BIASES[bias](), RETENTION_GATES[gate](), chunk_size=chunk_size)


def largest_step(model: str, shape: Shape) -> float:
    """Of the delta rule, that of a write that erases what stood there; of others, more where chunks are shorter."""
    return MODELS[model][2] * (1.0 if model == "delta" else 64 / shape.chunk_size)


def make_inputs(model: str, shape: Shape, gates: str = "channel", seed: int = 0):
    """q, k, v, eta, log_alpha, delta, and the parameters of a memory.

    The mixture's residual jumps, at errors of norm delta and, beyond it, at every coordinate's zero; the derivatives of the
    others do, of Yaad's at that norm, of Moneta's at the error cap, of all where a residual begins to be clipped. A number in
    bfloat16 that is near a jump may be on its other side, and differ by all of it: tokens of Yaad and of the mixture are far
    from both, some inside and some outside, and Moneta's errors small.
    """
    draw = torch.Generator(device=shape.device).manual_seed(seed)
    of_token = (shape.batch, shape.tokens, shape.heads)
    of_channel = (*of_token, shape.head_dim)

    def normal(*size):
        return torch.randn(size, generator=draw, device=shape.device)

    q, k = (F.normalize(normal(*of_channel), dim=-1).to(shape.dtype) for _ in range(2))
    v = normal(*of_channel).to(shape.dtype)
    if model == "moneta":
        v = (1.6 * torch.rand(of_channel, generator=draw, device=shape.device) - 0.8).to(shape.dtype)
    of_gate = of_channel if gates == "channel" else of_token
    of_step = of_token if model == "delta" else of_gate
    eta = largest_step(model, shape) * torch.rand(of_step, generator=draw, device=shape.device)
    log_alpha = -0.02 * torch.rand(of_gate, generator=draw, device=shape.device)
    rule = make_rule(model, shape.chunk_size)
    delta = None
    if rule.attentional_bias.delta_granularity is not None:
        outside = torch.rand(of_token, generator=draw, device=shape.device) < 0.5
        far = v.sign() * (8.0 + torch.rand(v.shape, generator=draw, device=shape.device))
        v = torch.where(outside[..., None], far, v).to(shape.dtype)
        delta = math.sqrt(shape.head_dim) * torch.where(
            outside, 0.25 + torch.rand(of_token, generator=draw, device=shape.device), 100.0
        )
    initial = []
    for layer, fan in enumerate(rule.architecture.weight_shapes(shape.head_dim)):
        weight = normal(shape.heads, *fan) * ((2.0 if layer == 0 else 1.0) / math.sqrt(fan[0]))
        initial.append(rule.retention.inverse(weight, rule.hidden_axis(layer)))
    affine = (
        (0.3 if model == "moneta" else 1.0) * (1.0 + 0.1 * normal(shape.heads, shape.head_dim)),
        0.1 * normal(shape.heads, shape.head_dim),
    )
    return [q, k, v, eta, log_alpha, delta], MemoryParameters(tuple(initial), *affine)


def leaves_of(inputs: list[torch.Tensor | None], parameters: MemoryParameters) -> list[torch.Tensor]:
    """All that a memory has gradients of, as leaves that need them where this is called with gradients."""
    found = [x for x in (*inputs, *parameters.initial, *parameters[1:]) if x is not None]
    return [x.requires_grad_(torch.is_grad_enabled()) for x in found]


def kernel_arguments(rule: MirasRule, parameters: MemoryParameters) -> dict[str, Any]:
    """What the operators take beside a token's inputs.

    Raises:
        `ValueError`: if no kernel knows the rule, with the reason.
    """
    choices, reason = kernel_choices(rule)
    if choices is None:
        raise ValueError(reason)
    norm = {"norm_weight": parameters.norm_weight, "norm_bias": parameters.norm_bias}
    return {"choices": choices, "initial": parameters.initial, **norm}


def kernel_call(model: str, shape: Shape, gates: str = "channel", seed: int = 0, **kwargs) -> Path:
    """A forward pass by kernel; without gradients it keeps the final state, as before decoding."""
    rule = make_rule(model, shape.chunk_size)
    inputs, parameters = make_inputs(model, shape, gates, seed)
    leaves = leaves_of(inputs, parameters)
    arguments = kernel_arguments(rule, parameters) | {"output_final_state": not torch.is_grad_enabled()} | kwargs
    return Path(lambda: forward(*inputs, **arguments), leaves)


def pytorch_call(shape: Shape, seed: int, compiled: bool = False) -> Path:
    rule = make_rule("yaad", shape.chunk_size)
    inputs, parameters = make_inputs("yaad", shape, seed=seed)
    leaves = leaves_of(inputs, parameters)
    form = torch.compile(chunk_miras, dynamic=False) if compiled else chunk_miras
    return Path(lambda: form(*inputs, rule=rule, parameters=parameters), leaves)


def titans_call(shape: Shape, seed: int) -> Path:
    from titans_pytorch import NeuralMemory

    torch.manual_seed(seed)
    memory = NeuralMemory(
        dim=shape.heads * shape.head_dim,
        heads=shape.heads,
        dim_head=shape.head_dim,
        chunk_size=shape.chunk_size,
        batch_size=shape.chunk_size,
    ).to(shape.device, shape.dtype)
    x = torch.randn(shape.batch, shape.tokens, shape.heads * shape.head_dim, device=shape.device, dtype=shape.dtype)
    leaves = [x.requires_grad_(torch.is_grad_enabled()), *memory.parameters()]
    return Path(lambda: memory(x), leaves)


def gated_delta_net_call(shape: Shape, seed: int) -> Path:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    (q, k, v, eta, log_alpha, _), _ = make_inputs("yaad", shape, gates="head", seed=seed)
    leaves = [q, k, v, log_alpha, torch.rand_like(eta).to(shape.dtype)]
    leaves = [x.requires_grad_(torch.is_grad_enabled()) for x in leaves]
    return Path(lambda: chunk_gated_delta_rule(*leaves), leaves)


def attention_call(shape: Shape, seed: int) -> Path:
    leaves = [x.transpose(1, 2).contiguous() for x in make_inputs("yaad", shape, seed=seed)[0][:3]]
    leaves = [x.requires_grad_(torch.is_grad_enabled()) for x in leaves]
    return Path(lambda: F.scaled_dot_product_attention(*leaves, is_causal=True), leaves)


PATHS: dict[str, Callable[[Shape, int], Path]] = {
    **{f"{model}, Triton": (lambda shape, seed, model=model: kernel_call(model, shape, seed=seed)) for model in TIMED},
    "SDPA attention": attention_call,
    "yaad, PyTorch": pytorch_call,
    "yaad, PyTorch compiled": lambda shape, seed: pytorch_call(shape, seed, compiled=True),
    "titans-pytorch": titans_call,
    "Gated DeltaNet (fla)": gated_delta_net_call,
}
# compiling unrolls the loop over chunks, and titans materialises the weights of every chunk
LONGEST = {"yaad, PyTorch": 16384, "yaad, PyTorch compiled": 4096, "titans-pytorch": 16384}


def small(shape: Shape, **changes) -> Shape:
    """A shape like another for what depends on sizes that a launch is compiled for, and on no others."""
    return replace(shape, batch=1, heads=1, tokens=2 * shape.chunk_size + 5, **changes)
