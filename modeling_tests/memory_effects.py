# Copyright 2026 The miras-hf authors.
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

"""How much of a model's answer is its memories' work, without which a tolerance says nothing.

A tiny model of the usual initialisation hardly changes when its memories stop to learn: a test with the tolerance of a
lower precision passes for a memory that is never written. Such tests take `SENSITIVE` models, compare by
`relative_error`, and ask `assert_memory_matters` first.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from miras_hf.modeling_miras import MirasRetentionGate, MirasStepGate


# What memories write and what they forget each moves the logits by a third and more: large weights, many chunks, and half
# of what was written gone after 2 to 64 tokens.
SENSITIVE = {"initializer_range": 0.3, "chunk_size": 4, "min_half_life": 2.0, "max_half_life": 64.0}
SENSITIVE["output_norm_eps"] = 1e-6  # small reads count as much as large ones


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm expected, in float64."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@contextlib.contextmanager
def never_writing(model: nn.Module) -> Iterator[None]:
    """The model with memories that stay what training has made them."""
    gates = [module for module in model.modules() if isinstance(module, MirasStepGate)]
    largest = [gate.eta_max for gate in gates]
    try:
        for gate in gates:
            gate.eta_max = 1e-20  # the derivative divides by it
        yield
    finally:
        for gate, eta_max in zip(gates, largest, strict=True):
            gate.eta_max = eta_max


@contextlib.contextmanager
def never_forgetting(model: nn.Module) -> Iterator[None]:
    """The model with memories whose retention is one."""
    gates = [module for module in model.modules() if isinstance(module, MirasRetentionGate)]
    scales = [gate.a_log.detach().clone() for gate in gates]
    try:
        for gate in gates:
            gate.a_log.data.fill_(-float("inf"))
        yield
    finally:
        for gate, a_log in zip(gates, scales, strict=True):
            gate.a_log.data.copy_(a_log)


@torch.no_grad()
def assert_memory_matters(model: nn.Module, answer: Callable[[nn.Module], Tensor], tolerance: float) -> Tensor:
    """Asserts that memories that never write or never forget would move the answer by more than three tolerances, and
    returns the answer."""
    expected = answer(model)
    for broken in (never_writing, never_forgetting):
        with broken(model):
            moved = relative_error(answer(model), expected)
        assert moved > 3 * tolerance, f"{broken.__name__}: {moved:.3f}, for a tolerance of {tolerance:g}"
    return expected
