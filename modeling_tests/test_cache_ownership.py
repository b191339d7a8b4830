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
"""Whose tensors a cache holds: reading on never touches what a graph, a copy or the model needs, and what is derived from
parameters goes with them."""

import copy

import pytest
import torch
from test_generation_miras import CONFIGS, TOLERANCE, build
from transformers import DynamicCache, StaticCache

import miras_hf
from miras_hf.compat import cache_of


CUT = 11  # in the middle of a chunk of 8


@pytest.fixture(scope="module", params=[(name, hybrid) for name in CONFIGS for hybrid in (False, True)], ids=str)
def model(request):
    return build(*request.param, initializer_range=0.3)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 99, (2, 21), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def weights():
    return torch.randn(99, generator=torch.Generator().manual_seed(3))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            got[name], gradient, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def read_first(model, ids):
    cache = DynamicCache(config=model.config)
    return cache, model(ids[:, :CUT], cache=cache).logits


@pytest.mark.parametrize(
    "between", ["nothing", "a token", "an eager chunk", "a token of a snapshot", "a token of a copy"]
)
def test_gradients_go_through_a_cache(model, ids, weights, between):
    """Of a loss over two segments, against one forward over both, whatever was read without gradients in between."""
    expected = gradients(model, (model(ids, use_cache=False).logits @ weights).sum())
    cache, first = read_first(model, ids)
    before = miras_hf.snapshot(cache)
    if between == "a token of a copy" and not model.config.attention_layers:
        other = copy.deepcopy(cache)
        with torch.no_grad():
            model(ids[:, CUT : CUT + 1], cache=other)
    elif between != "nothing":
        with torch.no_grad():
            model(ids[:, CUT : CUT + (9 if between == "an eager chunk" else 1)], cache=cache)
        miras_hf.restore(cache, before)
    second = model(ids[:, CUT:], cache=cache).logits
    assert_same(gradients(model, (first @ weights).sum() + (second @ weights).sum()), expected)


def test_tokens_without_gradients_cut_the_graph_and_nothing_else(model, ids, weights):
    """Sampling on the very cache: values go on truly, and the loss of the first segment has its own gradient."""
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    expected = gradients(model, (model(ids[:, :CUT], use_cache=False).logits @ weights).sum())
    cache, first = read_first(model, ids)
    with torch.no_grad():
        for i in range(CUT, ids.shape[1]):
            logits = model(ids[:, i : i + 1], cache=cache).logits
            torch.testing.assert_close(logits[:, 0], whole[:, i], rtol=1e-3, atol=1e-4)
    assert_same(gradients(model, (first @ weights).sum()), expected)


def test_tokens_in_inference_mode_go_on_anywhere(model, ids):
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :CUT], cache=cache)
    for i, mode in enumerate((torch.no_grad, torch.no_grad)):
        with mode():
            logits = model(ids[:, CUT + i : CUT + i + 1], cache=cache).logits
        torch.testing.assert_close(logits[:, 0], whole[:, CUT + i], rtol=1e-3, atol=1e-4)


def test_detach_truncates(model, ids, weights):
    """The second segment after `detach` has the gradient that it has with the memory as a constant."""
    with torch.no_grad():
        constant, _ = read_first(model, ids)
    expected = gradients(model, (model(ids[:, CUT:], cache=constant).logits @ weights).sum())
    cache, _ = read_first(model, ids)
    miras_hf.detach(cache)
    assert not any(t.requires_grad for layer in cache.layers for t in tensors(layer))
    assert_same(gradients(model, (model(ids[:, CUT:], cache=cache).logits @ weights).sum()), expected)


def tensors(layer):
    if isinstance(layer, miras_hf.MirasLayer):
        return layer._all_tensors()
    return [layer.keys, layer.values]


def test_truncated_backpropagation_runs_over_many_segments(model, ids):
    """Without `detach` the second backward would go through the first segment's freed graph."""
    cache = DynamicCache(config=model.config)
    for part in ids.split(4, dim=1):
        if part.shape[1] > 1:
            model(part, labels=part, cache=cache).loss.backward()
            miras_hf.detach(cache)
    model.zero_grad()


def test_a_copy_of_a_cache_with_a_graph(ids, weights):
    model = build("yaad", initializer_range=0.3)
    expected = gradients(model, (model(ids, use_cache=False).logits[:, CUT:] @ weights).sum())
    cache, _ = read_first(model, ids)
    copied = copy.deepcopy(cache)
    model(ids[:, CUT:], cache=cache)
    assert_same(gradients(model, (model(ids[:, CUT:], cache=copied).logits @ weights).sum()), expected)


def test_a_static_cache_keeps_no_graph(model, ids):
    cache = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(ValueError, match="A static cache keeps its tensors and cannot keep graphs"):
        model(ids, cache=cache)


def test_a_recording_cache_gives_back_what_a_graph_needs(ids, weights):
    model = build("moneta", initializer_range=0.3)
    expected = gradients(model, (model(ids[:, :CUT], use_cache=False).logits @ weights).sum())
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    first = model(ids[:, :CUT], cache=cache).logits
    with torch.no_grad():
        drafted = model(ids[:, CUT : CUT + 3], cache=cache).logits
        cache.crop(-3)
        again = model(ids[:, CUT : CUT + 3], cache=cache).logits
    torch.testing.assert_close(again, drafted, **TOLERANCE)
    assert_same(gradients(model, (first @ weights).sum()), expected)


def changed_by_an_optimizer(model):
    loss = model(torch.ones(1, 5, dtype=torch.long), labels=torch.ones(1, 5, dtype=torch.long), use_cache=False).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    model.zero_grad()


def changed_by_loading(model):
    other = build(model.config.model_type, bool(model.config.attention_layers), seed=7, initializer_range=0.3)
    model.load_state_dict(other.state_dict())


def changed_by_replacing(model):
    for layer in model.model.layers:
        if hasattr(layer, "mixer"):
            state = layer.mixer.memory.initial_state
            for i, p in enumerate(state):
                state[i] = torch.nn.Parameter(p.detach() * 1.5)


@pytest.mark.parametrize("change", [changed_by_an_optimizer, changed_by_loading, changed_by_replacing])
@pytest.mark.parametrize("family", CONFIGS)
def test_derived_values_go_with_the_weights(family, change, ids):
    """Between two tokens the weights change: the cache answers as its own copy of before, which kept nothing derived."""
    model = build(family, True, initializer_range=0.3)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :CUT], cache=cache)
        model(ids[:, CUT : CUT + 1], cache=cache)
        before = model(ids[:, CUT + 1 : CUT + 2], cache=copy.deepcopy(cache)).logits
    change(model)
    with torch.no_grad():
        fresh = copy.deepcopy(cache)
        for layer in fresh.layers:
            if isinstance(layer, miras_hf.MirasLayer):
                layer.companions = None
        expected = model(ids[:, CUT + 1 : CUT + 2], cache=fresh).logits
        answer = model(ids[:, CUT + 1 : CUT + 2], cache=cache)
    assert cache_of(answer) is None or cache_of(answer) is cache
    torch.testing.assert_close(answer.logits, expected, **TOLERANCE)
    assert (expected - before).abs().max() > 1e-2  # the change matters
