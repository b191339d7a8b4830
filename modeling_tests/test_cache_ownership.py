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
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from test_generation_miras import CONFIGS, TOLERANCE, build
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import miras_hf
from miras_hf.cache import StaticMirasLayer
from miras_hf.compat import cache_of
from miras_hf.weights_version import weights_version


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


MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]


def new_cache(model, kind):
    arguments = {"max_cache_len": 32} if kind is StaticCache else {}
    return kind(config=model.config, **arguments)


def addresses(cache):
    return [t.data_ptr() for layer in cache.layers for t in tensors(layer)]


@pytest.mark.parametrize("between", ["nothing", "restore", "reset"])
@pytest.mark.parametrize("go_on", MODES)
@pytest.mark.parametrize("begin", MODES)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_any_mode_goes_on_from_any_mode(model, ids, kind, begin, go_on, between):
    """Made and filled in one mode, gone on with in another and in the first one again: as one forward over all."""
    if kind is StaticCache and torch.enable_grad in (begin, go_on):
        pytest.skip("a static cache keeps no graph and says so")
    abroad = kind is StaticCache and begin is torch.inference_mode and go_on is not begin
    if abroad and between == "reset" and model.config.attention_layers:
        pytest.skip("Transformers' static layers cannot be reset where they cannot be written")
    with begin():
        cache = new_cache(model, kind)
        if between != "nothing":
            model(ids.flip(1)[:, :CUT], cache=cache)
        snapshot = miras_hf.snapshot(cache)
    text, read = ids, 0
    if between == "restore":
        with begin():
            model(ids[:, :1], cache=cache)
        with go_on():
            miras_hf.restore(cache, snapshot)
        text, read = torch.cat((ids.flip(1)[:, :CUT], ids), dim=1), CUT
    elif between == "reset":
        with go_on():
            cache.reset()
    outputs, places = [], []
    pieces = [(go_on, CUT), *((go_on, 1),) * 6, (begin, 2), (go_on, 1)]
    if between == "nothing":
        pieces[0] = (begin, CUT)
    for mode, tokens in pieces:
        with mode():
            outputs.append(model(text[:, read : read + tokens], cache=cache).logits.detach().clone())
        read += tokens
        places.append(addresses(cache))
    with torch.no_grad():
        expected = model(text[:, :read], use_cache=False).logits[:, -sum(t for _, t in pieces) :]
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-3, atol=1e-4)
    if kind is StaticCache:
        # moved once at most, and only from inference mode
        assert all(place == places[1] for place in places[2:])
        assert (places[0] != places[1]) == (abroad and between == "nothing")
        marked = [t for layer in cache.layers for t in tensors(layer)]
        assert all(hasattr(t, "_dynamo_static_input_type") for t in marked)


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
    return [layer.keys, layer.values, *([layer.cumulative_length] if isinstance(layer, StaticLayer) else [])]


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


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hybrid_with_a_graph_is_copied_by_a_snapshot(name, ids, weights):
    """`copy.deepcopy` of such a cache is refused by PyTorch, at Transformers' keys and values."""
    model = build(name, True, initializer_range=0.3)
    expected = gradients(model, (model(ids, use_cache=False).logits[:, CUT:] @ weights).sum())
    cache, _ = read_first(model, ids)
    with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
        copy.deepcopy(cache)
    copied = DynamicCache(config=model.config)
    miras_hf.restore(copied, miras_hf.snapshot(cache))
    with torch.no_grad():
        model(ids[:, CUT : CUT + 3], cache=cache)
    assert_same(gradients(model, (model(ids[:, CUT:], cache=copied).logits @ weights).sum()), expected)


def shared_by_copy(layer):
    return copy.copy(layer)


def new_like(layer):
    # static layers have the length of the caches that they stand in
    return type(layer)(**({"max_cache_len": layer.max_cache_len} if isinstance(layer, StaticMirasLayer) else {}))


def shared_by_update(layer):
    other = new_like(layer)
    other.update_memory(layer.memory, layer.conv_tail, int(layer.tokens_seen))
    return other


def shared_by_views(layer):
    other = new_like(layer)
    other.update_memory(layer.memory.map(strided), strided(layer.conv_tail), int(layer.tokens_seen))
    return other


def strided(t):
    return torch.stack((t, t), dim=1)[:, 1]


def shared_by_handing_over(layer):
    """Read now, given to another layer when the first has gone on."""
    return layer.memory, layer.conv_tail, int(layer.tokens_seen)


def shared_with_a_process(layer):
    return pickle.loads(ForkingPickler.dumps(layer))


SHARES = [shared_by_copy, shared_by_update, shared_by_views, shared_by_handing_over, shared_with_a_process]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_shared_state_goes_on_in_two_ways(name, kind, share, ids):
    """Each of two caches, one made of the other's state, goes on with its own text as one forward over it."""
    model = build(name, initializer_range=0.3)
    cache, other = new_cache(model, kind), new_cache(model, kind)
    texts = ids, torch.cat((ids[:, :CUT], ids.flip(1)), dim=1)[:, : ids.shape[1]]
    logits = [[], []]
    with torch.no_grad():
        model(ids[:, : CUT - 1], cache=cache)
        model(ids[:, CUT - 1 : CUT], cache=cache)
        shared = [share(layer) for layer in cache.layers]
        late = share is shared_by_handing_over
        if not late:
            other.layers = shared
        for part in ([0, 1] if late else [0], [1] if late else [1, 0], [0, 1]):
            for i in part:
                if late and i == 1 and not logits[1]:
                    for layer, state in zip(other.layers, shared, strict=True):
                        layer.update_memory(*state)
                start = CUT + sum(x.shape[1] for x in logits[i])
                logits[i].append(model(texts[i][:, start : start + 1], cache=(cache, other)[i]).logits)
        for text, parts in zip(texts, logits, strict=True):
            got = torch.cat(parts, dim=1)
            expected = model(text[:, : CUT + got.shape[1]], use_cache=False).logits[:, CUT:]
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_a_copy_records_on_its_own(ids):
    """Of what two recording caches that share their beginning have read since, each takes back its own."""
    model = build("yaad", initializer_range=0.3)
    cache, other = new_cache(model, DynamicCache), new_cache(model, DynamicCache)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :CUT], cache=cache)
        other.layers = [copy.copy(layer) for layer in cache.layers]
        for c, text in ((cache, ids), (other, ids.flip(1)), (cache, ids)):
            start = c.get_seq_length()
            model(text[:, start : start + 4], cache=c)
        cache.crop(-7)
        other.crop(-2)
        got = [model(ids[:, c.get_seq_length() :], cache=c).logits for c in (cache, other)]
        mixed = torch.cat((ids[:, :CUT], ids.flip(1)[:, CUT : CUT + 2], ids[:, CUT + 2 :]), dim=1)
        for logits, text in zip(got, (ids, mixed), strict=True):
            expected = model(text, use_cache=False).logits[:, -logits.shape[1] :]
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_reading_in_place_stays_in_place(ids):
    """One copy after a call in grad mode or of what was handed out, none after that."""
    model = build("yaad")
    cache, _ = read_first(model, ids)
    memory = cache.layers[0].memory
    places = []
    with torch.no_grad():
        for i in range(CUT, CUT + 6):
            model(ids[:, i : i + 1], cache=cache)
            places.append([t.data_ptr() for t in cache.layers[0]._memory[0]])
    assert all(place == places[0] for place in places)
    assert places[0] != [t.data_ptr() for t in memory.dual]


def test_rows_selected_by_a_slice(ids):
    model = build("yaad", initializer_range=0.3)
    cache, text = new_cache(model, DynamicCache), ids.repeat(2, 1)
    with torch.no_grad():
        model(text[:, :CUT], cache=cache)
        cache.batch_select_indices(slice(0, None, 2))
        logits = model(text[::2, CUT : CUT + 1], cache=cache).logits
        expected = model(text[::2, : CUT + 1], use_cache=False).logits[:, CUT:]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


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
                layer.link_cache = None
        expected = model(ids[:, CUT + 1 : CUT + 2], cache=fresh).logits
        answer = model(ids[:, CUT + 1 : CUT + 2], cache=cache)
    assert cache_of(answer) is None or cache_of(answer) is cache
    torch.testing.assert_close(answer.logits, expected, **TOLERANCE)
    assert (expected - before).abs().max() > 1e-2  # the change matters


def test_derived_values_go_with_weights_that_lie_where_others_have_lain(ids):
    """Other storages at the same addresses, the parameters and their counts of changes the same."""
    model = build("yaad", initializer_range=0.3)
    parameters = [p for layer in model.model.layers for p in layer.mixer.memory.initial_state]
    places = [p.detach().clone().numpy() for p in parameters]
    for p, place in zip(parameters, places, strict=True):
        p.data = torch.from_numpy(place)
    cache = new_cache(model, DynamicCache)
    with torch.no_grad():
        model(ids[:, :CUT], cache=cache)
        before = model(ids[:, CUT : CUT + 1], cache=cache).logits
        numbers = [(id(p), p.data_ptr(), p._version) for p in parameters]
        for p, place in zip(parameters, places, strict=True):
            p.data = torch.zeros(1)
            place *= 1.5
            p.data = torch.from_numpy(place)
        assert numbers == [(id(p), p.data_ptr(), p._version) for p in parameters]
        fresh = pickle.loads(pickle.dumps(cache))
        assert all(layer.link_cache is None for layer in fresh.layers)
        expected = model(ids[:, CUT + 1 : CUT + 2], cache=fresh).logits
        torch.testing.assert_close(model(ids[:, CUT + 1 : CUT + 2], cache=cache).logits, expected, **TOLERANCE)
    assert (expected - before).abs().max() > 1e-2


def test_the_version_of_weights_never_comes_again():
    """Of another parameter over the same storage, at the old one's address and after as many changes."""
    place = torch.ones(3, 4)
    data = [place.data for _ in range(1000)]
    parameter = torch.nn.Parameter(place)
    with torch.no_grad():
        parameter.add_(1.0)
    known = weights_version([parameter])
    assert weights_version([parameter], known) is known
    numbers = id(parameter), parameter.data_ptr(), parameter._version
    others = []
    del parameter
    for one in data:
        others.append(torch.nn.Parameter(one))
        if id(others[-1]) == numbers[0]:
            break
    with torch.no_grad():
        others[-1].add_(1.0)
    assert numbers == (id(others[-1]), others[-1].data_ptr(), others[-1]._version)
    assert weights_version([others[-1]], known) is not known


def test_the_version_of_weights_is_held_by_anything(tmp_path):
    """By copies; it keeps no parameter alive, hinders no swap of tensors, and what was saved holds for nothing."""
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    known = weights_version([parameter])
    assert copy.copy(known) is known and copy.deepcopy([known])[0] is known
    assert pickle.loads(pickle.dumps(known)) is None
    assert weights_version([copy.deepcopy(parameter)], known) is not known
    assert weights_version([], known) is not known
    buffer = io.BytesIO()
    torch.save(parameter, buffer)
    buffer.seek(0)
    assert weights_version([torch.load(buffer, weights_only=True)], known) is not known
    torch.utils.swap_tensors(parameter, torch.nn.Parameter(torch.zeros(2, 3)))
    assert weights_version([parameter], known) is not known
    with torch.inference_mode():
        abroad = torch.nn.Parameter(torch.ones(2, 3))
        known = weights_version([abroad])
        assert weights_version([abroad], known) is not known
    data = torch.ones(2, 3)
    known, storage = weights_version([torch.nn.Parameter(data)]), data.untyped_storage()._weak_ref()
    del data
    assert torch.UntypedStorage._expired(storage)
    torch.UntypedStorage._free_weak_ref(storage)
