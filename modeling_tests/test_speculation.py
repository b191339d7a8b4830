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
"""Taking tokens back: speculative decoding is lossless, `crop` exact, and a snapshot brings a cache back bit by bit."""

import copy

import pytest
import torch
from test_generation_miras import HYBRID, SMALL, build, padded
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import miras_hf
from miras_hf import MirasConfig, MirasLayer
from miras_hf.rollback import MAX_TOKENS_BACK


GREEDY = {
    "max_new_tokens": 20,
    "do_sample": False,
    # an assistant cannot tell a pad that was generated from one that was given
    "suppress_tokens": [SMALL["pad_token_id"]],
}
# the text is longer than the window and three chunks, and says something else at every token
VARIED = {"initializer_range": 0.3}
KINDS = {
    "moneta": ("moneta", False, VARIED),
    "yaad-every-token-a-chunk": ("yaad", False, VARIED | {"chunk_size": 1}),
    "memora-one-chunk": ("memora", False, VARIED | {"chunk_size": 64}),
    "moneta-hybrid": ("moneta", True, VARIED | {"sliding_window": 6}),
    "yaad-converted": ("yaad", "converted", VARIED),
    "memora-hybrid": ("memora", True, VARIED | {"sliding_window": 64}),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def model(request):
    name, hybrid, overrides = request.param
    return build(name, hybrid, **overrides)


def text(tokens, rows=1, seed=0):
    return torch.randint(1, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def draft(model):
    """A model that guesses some of what the model says."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    other.generation_config.num_assistant_tokens = 4
    return other


@torch.no_grad()
def read(model, input_ids, cache=None, attention_mask=None, recording=False):
    cache = DynamicCache(config=model.config) if cache is None else cache
    if recording:
        cache.activate_past_recording()
    output = model(input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
    return output.logits, cache


def held(cache):
    """All tensors of a cache that decide how it goes on, and its lengths."""
    tensors, lengths = [], []
    for layer in cache.layers:
        lengths.append(layer.get_seq_length())
        if isinstance(layer, MirasLayer):
            dual, inputs, gradients, eta, log_decay, count, momentum, log_momentum = layer.memory
            # what stands in slots to come means nothing
            slots = torch.arange(eta.shape[2]).view(1, 1, -1, 1) < (count % eta.shape[2]).view(-1, 1, 1, 1)
            waiting = (*inputs, *gradients, eta, log_decay, *log_momentum)
            tensors += [*dual, *momentum, *(slots * x for x in waiting), count, layer.conv_tail]
        else:
            # while it records, a window keeps more than it shows
            window = layer.max_cache_len if isinstance(cache, StaticCache) else getattr(layer, "sliding_window", 0) - 1
            tensors += [x[:, :, -window:] if window > 0 else x for x in (layer.keys, layer.values)]
    return tensors, lengths


def assert_same(cache, expected):
    """Bit by bit."""
    (tensors, lengths), (others, other_lengths) = held(cache), held(expected)
    assert lengths == other_lengths
    assert all(map(torch.equal, tensors, others))


def assert_close(cache, expected):
    """To what float32 leaves of two orders of summation, relative to a tensor's norm."""
    (tensors, lengths), (others, other_lengths) = held(cache), held(expected)
    assert lengths == other_lengths
    for tensor, other in zip(tensors, others, strict=True):
        assert_near(tensor, other)


def assert_near(tensor, other):
    assert tensor.shape == other.shape
    assert (tensor - other).double().norm() <= 1e-4 * other.double().norm()


def forwards(model, *args, **kwargs):
    """What `generate()` says, and with how many forwards."""
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        return model.generate(*args, **kwargs), len(calls)
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", ["lookup", "assistant", "itself"])
def test_speculation_says_what_greedy_decoding_says(model, kind):
    speculation = {
        "lookup": {"prompt_lookup_num_tokens": 5},
        "assistant": {"assistant_model": draft(model)},
        "itself": {"assistant_model": copy.deepcopy(model)},
    }[kind]
    # said twice, so that there is something to look up
    for prompt in (text(3), text(7).repeat(1, 3)):
        expected, plain = forwards(model, prompt, **GREEDY)
        output, speculative = forwards(model, prompt, **GREEDY, **speculation)
        assert torch.equal(output, expected)
        assert speculative <= plain == GREEDY["max_new_tokens"]
    assert kind == "lookup" or speculative < plain


def test_speculation_with_pads_and_after_an_early_exit():
    model = build("yaad", hybrid=True, **VARIED)
    prompt, mask = padded([text(9)[0]], "left", length=13)
    expected = model.generate(prompt, attention_mask=mask, **GREEDY)
    for speculation in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": draft(model)}):
        assert torch.equal(model.generate(prompt, attention_mask=mask, **GREEDY, **speculation), expected)
    for layer_types in (HYBRID["layer_types"], HYBRID["layer_types"][::-1]):
        model = build("yaad", layer_types=layer_types, sliding_window=6, **VARIED)
        expected = model.generate(text(9), **GREEDY)
        assert torch.equal(model.generate(text(9), assistant_early_exit=1, **GREEDY), expected)


def test_a_conversation_goes_on_after_speculation(model):
    first = {"return_dict_in_generate": True, **GREEDY}
    said = model.generate(text(9), prompt_lookup_num_tokens=4, **first)
    turn = torch.cat((said.sequences, text(5, seed=1)), dim=1)
    expected = model.generate(turn, **GREEDY)
    with pytest.raises(ValueError, match="must be empty for assisted decoding.* has read 28 tokens"):
        model.generate(turn, past_key_values=said.past_key_values, assistant_model=model, **GREEDY)
    assert torch.equal(model.generate(turn, past_key_values=said.past_key_values, **GREEDY), expected)


def test_crop_is_exact_token_by_token(model):
    """Steps are undone bit by bit, over the borders of chunks and of the window."""
    ids = text(24, rows=2)
    _, cache = read(model, ids[:, :5], recording=True)
    states = {5: copy.deepcopy(cache)}
    for i in range(5, 24):
        read(model, ids[:, i : i + 1], cache)
        states[i + 1] = copy.deepcopy(cache)
    for length, state in states.items():
        cropped = copy.deepcopy(cache)
        cropped.crop(length - 24)
        assert_same(cropped, state)


def test_crop_is_exact_after_long_calls(model):
    ids = text(24)
    _, cache = read(model, ids, recording=True)
    for back in (1, 7, 8, 9, 17, 20, 23):
        cropped = copy.deepcopy(cache)
        cropped.crop(-back)
        logits, cropped = read(model, ids[:, 24 - back :], cropped)
        assert_near(logits, model(ids).logits[:, 24 - back :])
        assert_close(cropped, cache)
        # and once more from there
        cropped.crop(-back)
        assert cropped.get_seq_length() == 24 - back


def test_everything_can_be_taken_back(model):
    ids = text(20)
    cache = DynamicCache(config=model.config)
    expected, _ = read(model, ids, cache, recording=True)
    cache.crop(-20)
    assert cache.get_seq_length() == 0
    logits, _ = read(model, ids, cache)
    assert_near(logits, expected)


def test_columns_are_taken_back_pads_among_them():
    model = build("memora", **VARIED)
    ids, mask = padded([text(15)[0]] * 2, "holes", length=20)
    mask[1], ids[1] = mask[0], ids[0]
    _, cache = read(model, ids, attention_mask=mask, recording=True)
    for back in range(1, 20):
        cropped = copy.deepcopy(cache)
        cropped.crop(-back)
        stop = 20 - back
        if mask[0, :stop].any():
            assert_close(cropped, read(model, ids[:, :stop], attention_mask=mask[:, :stop])[1])


@pytest.mark.parametrize(
    "choices",
    [
        {"memory_architecture": "matrix", "conv_kernel_size": 1, "gate_granularity": "head"},
        {"decay_target": "zero", "retention": "decay"},
        {"learning_algorithm": "momentum", "gate_granularity": "head"},
    ],
    ids=["matrix", "toward-zero", "momentum"],
)
def test_other_choices_of_the_design_space(choices):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MirasConfig(**SMALL, **VARIED, **choices)).eval()
    ids = text(20)
    _, cache = read(model, ids, recording=True)
    for back in (3, 5, 13, 20):
        cropped = copy.deepcopy(cache)
        cropped.crop(-back)
        assert_close(read(model, ids[:, 20 - back :], cropped)[1], cache)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **GREEDY), model.generate(ids, **GREEDY))


def test_a_recording_does_not_grow():
    model = build("moneta", **VARIED)
    ids = text(MAX_TOKENS_BACK + 60)
    _, cache = read(model, ids, recording=True)
    for layer in cache.layers:
        assert len(layer.recording.borders) <= MAX_TOKENS_BACK // SMALL["chunk_size"] + 1
        assert layer.recording.inputs.shape[1] == MAX_TOKENS_BACK + model.config.conv_kernel_size - 1
    with pytest.raises(ValueError, match=f"at least -{MAX_TOKENS_BACK} here, got -{MAX_TOKENS_BACK + 1}"):
        cache.crop(-MAX_TOKENS_BACK - 1)
    cache.crop(-MAX_TOKENS_BACK)
    assert_close(cache, read(model, ids[:, :60])[1])


def test_batch_operations_keep_the_recording():
    model = build("yaad", **VARIED)
    ids = text(20, rows=3)
    _, cache = read(model, ids, recording=True)
    rows = torch.tensor([2, 0])
    cache.batch_select_indices(rows)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.crop(-11)
    assert_close(cache, read(model, ids[[0, 0, 2, 2], :9])[1])


def test_what_cannot_be_taken_back_is_named():
    model = build("moneta")
    ids = text(9, rows=2)
    _, cache = read(model, ids)
    with pytest.raises(RuntimeError, match="activate_past_recording.*miras_hf.snapshot"):
        cache.crop(-1)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="at least 0 here, got -1"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="zero or negative, got 3"):
        cache.crop(3)
    ids, mask = padded([ids[0], ids[1, :4]], "left", length=9)
    with pytest.raises(ValueError, match="all rows have the same pads"):
        read(model, ids, attention_mask=mask, recording=True)
    _, cache = read(model, ids, attention_mask=mask)
    with pytest.raises(ValueError, match="all rows have the same pads"):
        cache.activate_past_recording()


@pytest.mark.parametrize("recording", [False, True])
def test_a_snapshot_brings_a_cache_back(model, recording):
    """A text read once, continued in several ways, in one cache."""
    ids = text(21, rows=2)
    _, cache = read(model, ids, recording=recording)
    before, expected = miras_hf.snapshot(cache), copy.deepcopy(cache)
    answers = []
    for seed in (1, 2, 1):
        question = torch.cat((ids, text(3, rows=2, seed=seed)), dim=1)
        answers.append(model.generate(question, past_key_values=cache, **GREEDY))
        assert torch.equal(answers[-1], model.generate(question, **GREEDY))
        miras_hf.restore(cache, before)
        assert_same(cache, expected)
        # full attention keeps all that it has read anyway
        assert {layer.record_past for layer in cache.layers if hasattr(layer, "record_past")} == {recording}
    assert torch.equal(answers[0], answers[2]) and not torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("kind", ["moneta", "yaad", "memora", "toward-zero"])
def test_copies_in_the_middle_of_a_chunk_stay_apart(kind):
    name, choices = ("yaad", {"decay_target": "zero"}) if kind == "toward-zero" else (kind, {})
    model, ids = build(name, **VARIED, **choices), text(24)
    _, cache = read(model, ids[:, :5])
    for i in range(5, 10):
        read(model, ids[:, i : i + 1], cache)
    copied, before = copy.deepcopy(cache), miras_hf.snapshot(cache)
    expected = [read(model, ids[:, i : i + 1], cache)[0] for i in range(10, 24)]
    assert all(torch.equal(read(model, ids[:, i : i + 1], copied)[0], expected[i - 10]) for i in range(10, 24))
    miras_hf.restore(cache, before)
    assert all(torch.equal(read(model, ids[:, i : i + 1], cache)[0], expected[i - 10]) for i in range(10, 24))


def test_a_snapshot_of_padded_rows_before_beams():
    model = build("yaad", hybrid=True, **VARIED)
    ids, mask = padded([text(13)[0], text(5)[0]], "left", length=13)
    _, cache = read(model, ids, attention_mask=mask)
    before, expected = miras_hf.snapshot(cache), copy.deepcopy(cache)
    cache.batch_repeat_interleave(3)
    whole = torch.nn.functional.pad(mask.repeat_interleave(3, dim=0), (0, 4), value=1)
    read(model, text(4, rows=6), cache, attention_mask=whole)
    miras_hf.restore(cache, before)
    assert_same(cache, expected)


def test_a_static_cache_is_restored_in_place():
    model = build("moneta", hybrid=True, **VARIED)
    ids = text(12)
    cache = StaticCache(config=model.config, max_cache_len=40)
    read(model, ids, cache)
    before = miras_hf.snapshot(cache)
    expected = copy.deepcopy(held(cache)[0])
    memory, attention = cache.layers

    def places():
        state, tail = memory.to_read()
        tensors = (*state.dual, state.eta, tail, attention.keys, attention.values)
        return [tensor.data_ptr() for tensor in tensors]

    first, _ = read(model, text(4, seed=1), cache)
    before_restoring = places()
    miras_hf.restore(cache, before)
    assert places() == before_restoring
    assert all(map(torch.equal, held(cache)[0], expected))
    again, _ = read(model, text(4, seed=1), cache)
    assert torch.equal(first, again)


def test_a_snapshot_of_another_cache_is_named():
    model, hybrid = build("moneta"), build("moneta", hybrid=True)
    with pytest.raises(ValueError, match="layers .*MirasLayer.*DynamicSlidingWindowLayer.*, got one with"):
        miras_hf.restore(read(hybrid, text(3))[1], miras_hf.snapshot(read(model, text(3))[1]))
    _, cache = read(model, text(3))
    cache.layers[0].note = object()
    with pytest.raises(ValueError, match="tensors and numbers only, got a object"):
        miras_hf.snapshot(cache)
