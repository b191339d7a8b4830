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
"""Decoding as the GPU script times it: a state after a prompt, then a token for every row from its projections on."""

from collections.abc import Callable
from dataclasses import replace

import torch
from paths import Shape, kernel_arguments, make_inputs, make_rule
from projected import make_projected

from miras_kernels import decode, forward, resident_state


def decode_call(
    model: str, shape: Shape, seed: int = 0, precision: str | None = None
) -> tuple[Callable[[], torch.Tensor], int]:
    """A token for every row, the first call in the middle of a chunk, each later one a token further; and the bytes that
    a call cannot but move: the state, the filled slots of a chunk half full, the token's own slot, inputs and output.
    Initial memories are read once for all rows."""
    rule = make_rule(model, shape.chunk_size)
    raw, projections, parameters = make_projected(model, replace(shape, tokens=1), "channel", seed)
    filled = shape.chunk_size // 2
    prompt, _ = make_inputs(model, replace(shape, tokens=filled), seed=seed)
    arguments = kernel_arguments(rule, parameters) | {"precision": precision}
    with torch.no_grad():
        _, state, _ = forward(*prompt, output_final_state=True, **arguments)
    chosen = {"choices": arguments["choices"], "initial": arguments["initial"]}
    state, link_cache = resident_state(state, **chosen)

    def call() -> torch.Tensor:
        return decode(*raw, state=state, link_cache=link_cache, projections=projections, **arguments)

    layers = len(parameters.initial)
    slots = sum(x.numel() * x.element_size() for x in state[layers:-1]) // shape.chunk_size
    moved = sum(x.numel() * x.element_size() for x in (*state[:layers], *parameters.initial, *raw[:5]))
    return call, moved + (filled + 1) * slots
