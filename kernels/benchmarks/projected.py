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
"""What a layer's projections give to decoding, with the finished inputs of the memory computed from it in PyTorch."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from paths import Shape, largest_step, make_inputs, make_rule

from miras_hf.memory import MemoryParameters
from miras_hf.mixer_ops import causal_convolution, l2norm, negative_softplus, scaled_sigmoid
from miras_kernels import Projections


KERNEL_SIZE = 4


def make_projected(model: str, shape: Shape, gates: str, seed: int = 0, rotary: bool = True):
    """q, k, v and the gates' logits as projections give them, what stands between them and the memory, and its
    parameters."""
    draw = torch.Generator(device=shape.device).manual_seed(seed)
    width = shape.heads * shape.head_dim
    of_gate = (shape.batch, shape.tokens, shape.heads, *((shape.head_dim,) if gates == "channel" else ()))

    def normal(*size):
        return torch.randn(size, generator=draw, device=shape.device)

    raw = [normal(shape.batch, shape.tokens, shape.heads, shape.head_dim).to(shape.dtype) for _ in "qkv"]
    # half-lives of some 30 to 3,000 tokens
    of_step = of_gate[:3] if model == "delta" else of_gate
    raw += [normal(*of_step).to(shape.dtype), (1.5 * normal(*of_gate) - 5.0).to(shape.dtype)]
    has_delta = make_rule(model, shape.chunk_size).attentional_bias.delta_granularity is not None
    delta = normal(*of_gate[:3]) + 40.0
    # beyond delta the residual is a sign, exact only before a fold in bfloat16: of the first tokens
    delta[:, 0] -= 40.0
    raw.append(delta.to(shape.dtype) if has_delta else None)
    angle = normal(shape.batch, shape.tokens, shape.head_dim // 2).repeat(1, 1, 2)
    projections = Projections(
        conv_weights=tuple(0.5 * normal(width, KERNEL_SIZE).to(shape.dtype) for _ in "qkv"),
        conv_tail=normal(shape.batch, KERNEL_SIZE - 1, 3 * width).to(shape.dtype),
        a_log=0.3 * normal(shape.heads),
        eta_max=largest_step(model, shape),
        cos=angle.cos().to(shape.dtype) if rotary else None,
        sin=angle.sin().to(shape.dtype) if rotary else None,
        value_norm=True,
    )
    _, parameters = make_inputs(model, replace(shape, tokens=1), gates, seed)
    return raw, projections, parameters


def finished(raw: list, projections: Projections, lengths: torch.Tensor) -> list:
    """The memory's inputs in float64. Rows without a token there have none: the convolution does not see it.

    Args:
        raw (`list` of `torch.Tensor`): of `make_projected`.
        lengths (`torch.Tensor` of shape `[batch]`): tokens of each row, before its pads.
    """
    (batch, tokens, heads, head_dim), p = raw[0].shape, projections
    width = heads * head_dim
    q, k, v = (torch.zeros(batch, tokens, width, dtype=torch.float64, device=lengths.device) for _ in "qkv")
    for row in range(batch):
        real = slice(0, int(lengths[row]))
        for i, out in enumerate((q, k, v)):
            x = raw[i][row : row + 1, real].flatten(-2).double()
            tail = p.conv_tail[row : row + 1, :, i * width : (i + 1) * width].double()
            out[row, real] = causal_convolution(x, p.conv_weights[i].double(), tail)[0]
    q, k, v = (x.unflatten(-1, (heads, head_dim)) for x in (q, k, v))

    def turned(x):
        if p.cos is None:
            return x
        cos, sin = p.cos.double().unsqueeze(2), p.sin.double().unsqueeze(2)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), -1) * sin

    rate = p.a_log.double().exp()
    eta, log_alpha, delta = (None if x is None else x.double() for x in raw[3:])
    return [
        l2norm(turned(q)),
        l2norm(turned(k)),
        l2norm(v) * head_dim**0.5 if p.value_norm else v,
        scaled_sigmoid(eta, p.eta_max),
        negative_softplus(log_alpha, rate[:, None] if log_alpha.dim() == 4 else rate),
        None if delta is None else F.softplus(delta) + 1e-4,
    ]


def wide(parameters: MemoryParameters) -> MemoryParameters:
    """The parameters in float64."""
    return MemoryParameters(tuple(a.double() for a in parameters.initial), *(p.double() for p in parameters[1:]))
