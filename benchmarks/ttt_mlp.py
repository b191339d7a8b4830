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
"""TTT-MLP (arXiv 2407.04620), the published layer in its dual form: a comparison point for the benchmarks.

The memory of a head is `f(x; W) = x + LN(gelu(x W1 + b1) W2 + b2)` with `W1: d x 4d`, trained on `|f(k) - v|^2 / 2`.
Inside a mini-batch every gradient is taken at its start (`W_0`), and token `i` reads

    W_i = W_0 - s_i sum_{j <= i} eta_j grad_j,     s_i = 1/i + learned,     eta_j = base_lr sigmoid(theta x_j + b) / d

The dual form never builds the gradients: their effect on a read is a masked product of the mini-batch's own rows
(appendix A of the paper). The layer around it is the paper's Transformer backbone: q, k, v and output projections,
rotary positions that restart with each mini-batch, a layer norm before the output projection; neither short
convolutions nor an output gate, so it carries less around the memory than its Mamba backbone does.
Outer gradients are autograd's.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


LN_EPS = 1e-6


@dataclass
class TTTState:
    """A sequence's memory between two tokens: the mini-batch's start and the steps summed since then."""

    start: tuple[torch.Tensor, ...]  # W1, b1, W2, b2 at the start of the mini-batch, each [B, H, ., .]
    step: tuple[torch.Tensor, ...]  # sum of eta_j grad_j for the same four
    phase: int = 0  # tokens of the mini-batch already seen


class TTTMLP(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mini_batch_size: int = 64, base_lr: float = 0.1):
        super().__init__()
        self.num_heads, self.mini_batch_size, self.base_lr = num_heads, mini_batch_size, base_lr
        self.head_dim = head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.lr_proj = nn.Linear(hidden_size, num_heads)
        self.post_norm = nn.LayerNorm(hidden_size, eps=LN_EPS)
        self.token_scale = nn.Parameter(torch.zeros(mini_batch_size))
        self.memory_norm_weight = nn.Parameter(torch.ones(num_heads, 1, head_dim))
        self.memory_norm_bias = nn.Parameter(torch.zeros(num_heads, 1, head_dim))
        self.w1 = nn.Parameter(torch.randn(num_heads, head_dim, 4 * head_dim) * 0.02)
        self.b1 = nn.Parameter(torch.zeros(num_heads, 1, 4 * head_dim))
        self.w2 = nn.Parameter(torch.randn(num_heads, 4 * head_dim, head_dim) * 0.02)
        self.b2 = nn.Parameter(torch.zeros(num_heads, 1, head_dim))

        positions = torch.arange(mini_batch_size, dtype=torch.float32)
        inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(positions, inv_freq).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("inv_position", 1.0 / (positions + 1), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.run(hidden_states, self.initial_state(hidden_states.shape[0]))[0]

    def initial_state(self, batch_size: int) -> TTTState:
        start = tuple(p.unsqueeze(0).expand(batch_size, -1, -1, -1) for p in (self.w1, self.b1, self.w2, self.b2))
        return TTTState(start, tuple(torch.zeros_like(p) for p in start))

    def run(self, hidden_states: torch.Tensor, state: TTTState) -> tuple[torch.Tensor, TTTState]:
        """Reads and writes a whole piece; it starts at a mini-batch's start, and so must the next piece."""
        if state.phase != 0:
            raise ValueError("`run` starts at a mini-batch's start, use `step` inside one")
        seq_len, size = hidden_states.shape[1], self.mini_batch_size
        q, k, v, eta = self._inputs(hidden_states, torch.arange(seq_len, device=hidden_states.device) % size)
        weights, outputs = state.start, []
        for i in range(0, seq_len, size):
            chunk = slice(i, min(i + size, seq_len))
            weights, output = self._mini_batch(
                weights, q[:, :, chunk], k[:, :, chunk], v[:, :, chunk], eta[:, :, chunk]
            )
            outputs.append(output)
        state = TTTState(weights, tuple(torch.zeros_like(w) for w in weights))
        return self._output(torch.cat(outputs, dim=2)), state

    def step(self, hidden_states: torch.Tensor, state: TTTState) -> tuple[torch.Tensor, TTTState]:
        """One token: the primal form, with the steps of the mini-batch kept summed."""
        position = torch.tensor([state.phase], device=hidden_states.device)
        q, k, v, eta = self._inputs(hidden_states, position)
        grads = self._write(state.start, k, v)
        z1, h, dz1, dz2 = grads
        step = (
            torch.baddbmm(state.step[0].flatten(0, 1), (eta * k).flatten(0, 1).mT, dz1.flatten(0, 1)).view_as(
                state.step[0]
            ),
            state.step[1] + eta * dz1,
            torch.baddbmm(state.step[2].flatten(0, 1), (eta * h).flatten(0, 1).mT, dz2.flatten(0, 1)).view_as(
                state.step[2]
            ),
            state.step[3] + eta * dz2,
        )
        scale = self._token_scale()[state.phase]
        w1, b1, w2, b2 = (w - scale * s for w, s in zip(state.start, step, strict=True))
        output = q + self._memory_norm(F.gelu(q @ w1 + b1, approximate="tanh") @ w2 + b2)
        if state.phase + 1 == self.mini_batch_size:
            state = TTTState((w1, b1, w2, b2), tuple(torch.zeros_like(s) for s in step))
        else:
            state = TTTState(state.start, step, state.phase + 1)
        return self._output(output), state

    def _mini_batch(self, weights, q, k, v, eta):
        w1, b1, w2, b2 = weights
        z1, h, dz1, dz2 = self._write(weights, k, v)
        # coefficients[i, j] = s_i eta_j for j <= i: what is left of token j's step in token i's read
        scale = self._token_scale()[: q.shape[2]]
        coefficients = torch.tril(scale[:, None] * eta.mT)

        z1q = q @ w1 + b1 - (coefficients * (q @ k.mT + 1)) @ dz1
        hq = F.gelu(z1q, approximate="tanh")
        z2q = hq @ w2 + b2 - (coefficients * (hq @ h.mT + 1)) @ dz2

        last = scale[-1] * eta
        new_weights = (
            w1 - (last * k).mT @ dz1,
            b1 - (last * dz1).sum(dim=2, keepdim=True),
            w2 - (last * h).mT @ dz2,
            b2 - (last * dz2).sum(dim=2, keepdim=True),
        )
        return new_weights, q + self._memory_norm(z2q)

    def _write(self, weights, k, v):
        """Forward of the memory at `weights` and the gradient of its loss in its two pre-activations."""
        w1, b1, w2, b2 = weights
        z1 = k @ w1 + b1
        h = F.gelu(z1, approximate="tanh")
        z2 = h @ w2 + b2
        var, mean = torch.var_mean(z2, dim=-1, keepdim=True, correction=0)
        inv_std = torch.rsqrt(var + LN_EPS)
        z2_hat = (z2 - mean) * inv_std
        dz2_hat = (k + z2_hat * self.memory_norm_weight + self.memory_norm_bias - v) * self.memory_norm_weight
        centred = dz2_hat - dz2_hat.mean(dim=-1, keepdim=True)
        dz2 = inv_std * (centred - z2_hat * (dz2_hat * z2_hat).mean(dim=-1, keepdim=True))
        return z1, h, (dz2 @ w2.mT) * gelu_derivative(z1), dz2

    def _memory_norm(self, x):
        return F.layer_norm(x, (self.head_dim,), eps=LN_EPS) * self.memory_norm_weight + self.memory_norm_bias

    def _token_scale(self):
        return (self.inv_position + self.token_scale).clamp_min(0.0)

    def _inputs(self, hidden_states, positions):
        batch_size, seq_len, _ = hidden_states.shape
        shape = (batch_size, seq_len, self.num_heads, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        eta = self.base_lr * torch.sigmoid(self.lr_proj(hidden_states)).mT.unsqueeze(-1) / self.head_dim
        cos, sin = self.cos[positions], self.sin[positions]
        return rotate(q, cos, sin), rotate(k, cos, sin), v, eta

    def _output(self, x):
        return self.o_proj(self.post_norm(x.transpose(1, 2).flatten(2)))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def gelu_derivative(x: torch.Tensor) -> torch.Tensor:
    """Derivative of gelu's tanh form, written out because autograd must go through it once more."""
    c = math.sqrt(2 / math.pi)
    tanh = torch.tanh(c * x * (1 + 0.044715 * x * x))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * c * (1 + 3 * 0.044715 * x * x)
