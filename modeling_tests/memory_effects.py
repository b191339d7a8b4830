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
from pathlib import Path

import torch
from torch import Tensor, nn

from miras_hf import load_memory, save_memory
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


def assert_saved_taken_back_and_speculated(model, ids: Tensor, folder: Path, read: int, decoded: int = 0) -> None:
    """A model says the same through a static cache and speculation, and goes on the same from a memory that was saved after
    `read` tokens at once and `decoded` ones one by one."""
    greedy = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **greedy)
    assert torch.equal(model.generate(ids, cache_implementation="static", **greedy), expected)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **greedy), expected)
    with torch.no_grad():
        cache = model(ids[:, :read], use_cache=True).past_key_values
        for token in range(read, read + decoded):
            model(ids[:, token : token + 1], past_key_values=cache)
        save_memory(cache, folder / "memory.safetensors", model)
        again = load_memory(folder / "memory.safetensors", model)
        logits = [model(ids[:, read + decoded :], past_key_values=c).logits for c in (cache, again)]
    assert torch.equal(*logits)
