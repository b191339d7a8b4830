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
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from miras_hf.backend import kernel_choices
from miras_hf.memory import (
    ATTENTIONAL_BIASES,
    RETENTION_GATES,
    MemoryParameters,
    MirasRule,
    MLPMemory,
    chunk_miras,
)
from miras_kernels import forward


MODELS = {"moneta": ("lp", "lq", 1.5e-3), "yaad": ("huber_mixture", "decay", 4e-3), "memora": ("l2", "kl", 0.03)}


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
        """Multiply-adds counted as two, `decay_target="init"`: 72 d^2 + 20 C d a token and head."""
        d = self.head_dim
        return self.batch * self.tokens * self.heads * (72 * d * d + 20 * self.chunk_size * d)


def make_rule(model: str, chunk_size: int) -> MirasRule:
    bias, gate, _ = MODELS[model]
    memory = MLPMemory(norm_eps=0.01 if gate == "kl" else 0.1)
    return MirasRule(memory, ATTENTIONAL_BIASES[bias](), RETENTION_GATES[gate](), chunk_size=chunk_size)


def make_inputs(model: str, shape: Shape, gates: str = "channel", seed: int = 0):
    """q, k, v, eta, log_alpha, delta, and the parameters of a memory."""
    draw = torch.Generator(device=shape.device).manual_seed(seed)
    of_token = (shape.batch, shape.tokens, shape.heads)
    of_channel = (*of_token, shape.head_dim)

    def normal(*size):
        return torch.randn(size, generator=draw, device=shape.device)

    q, k = (F.normalize(normal(*of_channel), dim=-1).to(shape.dtype) for _ in range(2))
    v = normal(*of_channel).to(shape.dtype)
    of_gate = of_channel if gates == "channel" else of_token
    eta = MODELS[model][2] * torch.rand(of_gate, generator=draw, device=shape.device) * (64 / shape.chunk_size)
    log_alpha = -0.02 * torch.rand(of_gate, generator=draw, device=shape.device)
    rule = make_rule(model, shape.chunk_size)
    delta = None
    if rule.attentional_bias.delta_granularity is not None:
        delta = math.sqrt(shape.head_dim) * (0.25 + torch.rand(of_token, generator=draw, device=shape.device))
    initial = []
    for layer, fan in enumerate(rule.architecture.weight_shapes(shape.head_dim)):
        weight = normal(shape.heads, *fan) * ((2.0 if layer == 0 else 1.0) / math.sqrt(fan[0]))
        initial.append(rule.retention.inverse(weight, rule.hidden_axis(layer)))
    affine = (
        torch.ones(shape.heads, shape.head_dim, device=shape.device),
        torch.zeros(shape.heads, shape.head_dim, device=shape.device),
    )
    return (q, k, v, eta, log_alpha, delta), MemoryParameters(tuple(initial), *affine)


def needing_gradients(tensors):
    """The same tensors as leaves that need gradients where the script measures a backward pass."""
    if not torch.is_grad_enabled():
        return tensors
    if isinstance(tensors, MemoryParameters):
        return MemoryParameters(tuple(needing_gradients(tensors.initial)), *needing_gradients(tensors[1:]))
    return [None if x is None else x.requires_grad_() for x in tensors]


def forward_and_backward(call: Callable) -> Callable:
    """One training step of a path: its forward pass, and gradients of everything that it was given."""

    def step():
        y = call()
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))

    return step


def kernel_call(
    model: str, shape: Shape, gates: str = "channel", seed: int = 0, **kwargs
) -> tuple[Callable, list[torch.Tensor]]:
    """The call, and the inputs and initial memory that it is made with."""
    rule = make_rule(model, shape.chunk_size)
    inputs, parameters = (needing_gradients(x) for x in make_inputs(model, shape, gates, seed))
    choices, reason = kernel_choices(rule)
    if choices is None:
        raise ValueError(reason)
    norm = {"norm_weight": parameters.norm_weight, "norm_bias": parameters.norm_bias}
    given = [x for x in (*inputs, *parameters.initial) if x is not None]
    return lambda: forward(*inputs, choices=choices, initial=parameters.initial, **norm, **kwargs), given


def pytorch_call(model: str, shape: Shape, compiled: bool = False) -> Callable:
    rule = make_rule(model, shape.chunk_size)
    inputs, parameters = (needing_gradients(x) for x in make_inputs(model, shape))
    form = torch.compile(chunk_miras, dynamic=False) if compiled else chunk_miras
    return lambda: form(*inputs, rule=rule, parameters=parameters)


def titans_call(shape: Shape) -> Callable:
    from titans_pytorch import NeuralMemory

    memory = NeuralMemory(
        dim=shape.heads * shape.head_dim,
        heads=shape.heads,
        dim_head=shape.head_dim,
        chunk_size=shape.chunk_size,
        batch_size=shape.chunk_size,
    ).to(shape.device, shape.dtype)
    x = torch.randn(shape.batch, shape.tokens, shape.heads * shape.head_dim, device=shape.device, dtype=shape.dtype)
    (x,) = needing_gradients((x,))
    return lambda: memory(x)


def gated_delta_net_call(shape: Shape) -> Callable:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    (q, k, v, eta, log_alpha, _), _ = make_inputs("yaad", shape, gates="head")
    q, k, v, g, beta = needing_gradients((q, k, v, log_alpha, torch.rand_like(eta).to(shape.dtype)))
    return lambda: chunk_gated_delta_rule(q, k, v, g, beta)


def attention_call(shape: Shape) -> Callable:
    q, k, v = needing_gradients([x.transpose(1, 2).contiguous() for x in make_inputs("yaad", shape)[0][:3]])
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)


PATHS: dict[str, Callable[[Shape], Callable]] = {
    **{f"{model}, Triton": (lambda shape, model=model: kernel_call(model, shape)[0]) for model in MODELS},
    "yaad, PyTorch": lambda shape: pytorch_call("yaad", shape),
    "yaad, PyTorch compiled": lambda shape: pytorch_call("yaad", shape, compiled=True),
    "titans-pytorch": titans_call,
    "Gated DeltaNet (fla)": gated_delta_net_call,
    "SDPA attention": attention_call,
}
# compiling unrolls the loop over chunks, and titans materialises the weights of every chunk
LONGEST = {"yaad, PyTorch": 16384, "yaad, PyTorch compiled": 4096, "titans-pytorch": 16384}
