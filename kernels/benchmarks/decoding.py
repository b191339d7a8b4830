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
"""Decoding as the GPU script checks and times it: a state after a prompt, then tokens through the decode kernel."""

from collections.abc import Callable

import torch
from paths import Shape, make_inputs, make_rule

from miras_hf.backend import kernel_choices
from miras_kernels import Projections, decode, forward, resident_state


TOKENS = 9
"""Tokens that a check decodes, in one call, over the end of a chunk."""


def decoded(model: str, shape: Shape, precision: str) -> torch.Tensor:
    """The last `TOKENS` outputs of a sequence whose other tokens the forward kernel has read."""
    inputs, parameters = make_inputs(model, shape)
    arguments = {
        "choices": kernel_choices(make_rule(model, shape.chunk_size))[0],
        "initial": parameters.initial,
        "norm_weight": parameters.norm_weight,
        "norm_bias": parameters.norm_bias,
        "precision": precision,
    }
    prompt, rest = (
        [None if x is None else x[:, part] for x in inputs] for part in (slice(-TOKENS), slice(-TOKENS, None))
    )
    with torch.no_grad():
        _, state, _ = forward(*prompt, output_final_state=True, **arguments)
        state, companions = resident_state(state, choices=arguments["choices"], initial=parameters.initial)
        return decode(*rest, state=state, companions=companions, **arguments)


def decode_call(model: str, shape: Shape) -> tuple[Callable[[], torch.Tensor], int]:
    """One token for every row, from the projections on, in the middle of a chunk; and the bytes that it cannot but move:
    the state, the filled slots, the token's own slot, inputs and output. Initial memories are read once for all rows."""
    inputs, parameters = make_inputs(model, shape)
    rule = make_rule(model, shape.chunk_size)
    choices, width, device = kernel_choices(rule)[0], shape.heads * shape.head_dim, shape.device
    filled = shape.chunk_size // 2
    prompt = make_inputs(model, Shape(**{**vars(shape), "tokens": filled}))[0]
    arguments = {
        "choices": choices,
        "initial": parameters.initial,
        "norm_weight": parameters.norm_weight,
        "norm_bias": parameters.norm_bias,
    }
    with torch.no_grad():
        _, state, _ = forward(*prompt, output_final_state=True, **arguments)
    state, companions = resident_state(state, choices=choices, initial=parameters.initial)
    # a call writes the state: each begins in the middle of the chunk
    phases = companions[0].clone()
    projections = Projections(
        conv_weights=tuple(torch.randn(width, 4, device=device, dtype=shape.dtype) for _ in "qkv"),
        conv_tail=torch.randn(shape.batch, 3, 3 * width, device=device, dtype=shape.dtype),
        a_log=torch.zeros(shape.heads, device=device),
        eta_max=0.01,
        cos=torch.ones(1, 1, shape.head_dim, device=device, dtype=shape.dtype),
        sin=torch.zeros(1, 1, shape.head_dim, device=device, dtype=shape.dtype),
    )

    def call() -> torch.Tensor:
        companions[0].copy_(phases)
        return decode(*inputs, state=state, companions=companions, projections=projections, **arguments)

    slots = sum(x.numel() * x.element_size() for x in state[len(parameters.initial) : -1]) // shape.chunk_size
    moved = sum(
        x.numel() * x.element_size() for x in (*state[: len(parameters.initial)], *parameters.initial, *inputs[:5])
    )
    return call, moved + (filled + 1) * slots
