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
"""The models' promises: decoding equals one forward, pads and packs equal rows alone, `generate()` of every kind."""

import copy

import pytest
import torch
from memory_effects import SENSITIVE, assert_memory_matters, never_writing, relative_error
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation import CompileConfig

from miras_hf import MemoraConfig, MirasConfig, MirasLayer, MonetaConfig, YaadConfig


CONFIGS = {"moneta": MonetaConfig, "yaad": YaadConfig, "memora": MemoraConfig}
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "chunk_size": 8,
    "pad_token_id": 0,
    # by position, which is not the default
    "use_rope": True,
    # generation must not stop early where lengths are compared
    "eos_token_id": None,
}
HYBRID = {"layer_types": ["miras_memory", "sliding_attention"], "sliding_window": 64}
# what a converted Transformer has: attention to the whole text, shared keys and values, norms and biases
CONVERTED = {
    "layer_types": ["miras_memory", "full_attention"],
    "num_key_value_heads": 1,
    "memory_num_key_value_heads": 1,
    "qk_norm": True,
    "attention_bias": True,
    "attention_output_bias": False,
    "mlp_bias": True,
    "conv_act": "linear",
}
LAYERS = {False: {}, True: HYBRID, "converted": CONVERTED}
# weights as large as after training, and memories that forget within the texts of these tests
SPOKEN = {"initializer_range": 0.1, "min_half_life": 2.0, "max_half_life": 64.0}
# what float32 leaves of two orders of summation over logits of order one
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def build(name, hybrid=False, seed=0, **overrides):
    torch.manual_seed(seed)
    config = CONFIGS[name](**{**SMALL, **LAYERS[hybrid], **overrides})
    return AutoModelForCausalLM.from_config(config).eval()


KINDS = [(name, hybrid) for name in CONFIGS for hybrid in (False, "converted" if name == "memora" else True)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def model(request):
    return build(*request.param)


@pytest.fixture(scope="module", params=KINDS, ids=str)
def speaker(request):
    """A model that says another text where its memory has not read this one, so that equal tokens mean something."""
    return build(*request.param, **SPOKEN)


@pytest.fixture(scope="module")
def input_ids():
    return torch.randint(1, 99, (3, 21), generator=torch.Generator().manual_seed(0))


def padded(rows, side, length=26):
    """Rows of different lengths as one batch: ids, mask.

    At pads stand words like any other: a new model's embedding of its pad token is zero, and a memory that reads zeros
    by mistake learns next to nothing.
    """
    ids = torch.randint(1, 99, (len(rows), length), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        if side == "holes":
            columns = torch.randperm(length, generator=torch.Generator().manual_seed(i))[: len(row)].sort().values
        else:
            columns = torch.arange(len(row)) + (length - len(row) if side == "left" else 0)
        ids[i, columns], mask[i, columns] = row, 1
    return ids, mask


def assert_same_gradients(got, expected):
    for g, e in zip(got, expected, strict=True):
        assert (g - e).norm() <= 1e-4 * e.norm() + 1e-7


@pytest.mark.parametrize("splits", [[5], [8, 16], [1, 2, 3], [7, 8, 9], list(range(1, 21))])
def test_decoding_equals_one_forward(model, input_ids, splits):
    with torch.no_grad():
        full = model(input_ids, use_cache=False).logits
        cache, logits = None, []
        for start, stop in zip([0, *splits], [*splits, 21], strict=True):
            output = model(input_ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), full, **TOLERANCE)
    assert cache.get_seq_length() == 21


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padded_rows_equal_rows_alone(model, input_ids, side):
    rows = [input_ids[0], input_ids[1, :9], input_ids[2, :1]]
    ids, mask = padded(rows, side)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for i, row in enumerate(rows):
            torch.testing.assert_close(logits[i][mask[i].bool()], model(row[None]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_go_on_as_rows_alone(model, input_ids, side):
    rows = [input_ids[0, :13], input_ids[1, :8], input_ids[2, :2]]
    ids, mask = padded(rows, side, length=16)
    more = input_ids[:, -4:]
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        for step in range(2):
            mask = torch.cat((mask, torch.ones(3, 2, dtype=torch.long)), dim=1)
            tokens = more[:, 2 * step : 2 * step + 2]
            logits = model(tokens, attention_mask=mask, past_key_values=cache, use_cache=True).logits
            for i, row in enumerate(rows):
                alone = model(torch.cat((row, more[i, : 2 * step + 2]))[None]).logits[0, -2:]
                torch.testing.assert_close(logits[i], alone, **TOLERANCE)


def test_pads_leave_gradients_alone(input_ids):
    rows = [input_ids[0, :19], input_ids[1, :6]]
    ids, mask = padded(rows, "left")
    model = build("yaad")

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    weights = torch.randn(99, generator=torch.Generator().manual_seed(1))
    batch = gradients(((model(ids, attention_mask=mask).logits @ weights) * mask).sum())
    alone = gradients(sum((model(row[None]).logits @ weights).sum() for row in rows))
    assert_same_gradients(batch, alone)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q", "seq_idx"])
def test_packed_rows_equal_rows_alone(model, input_ids, how):
    rows = [input_ids[0, :11], input_ids[1, :1], input_ids[2, :9]]
    lengths = torch.tensor([len(row) for row in rows])
    borders = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32),
        "seq_idx": torch.repeat_interleave(torch.arange(3), lengths)[None].int(),
    }
    with torch.no_grad():
        packed = model(torch.cat(rows)[None], **{how: borders[how]}, use_cache=False).logits[0]
        alone = torch.cat([model(row[None]).logits[0] for row in rows])
    torch.testing.assert_close(packed, alone, **TOLERANCE)


def test_a_batch_of_packed_rows(input_ids):
    model = build("moneta")
    position_ids = torch.stack((torch.arange(21), torch.cat((torch.arange(6), torch.arange(15))))).expand(2, -1)
    with torch.no_grad():
        logits = model(input_ids[:2], position_ids=position_ids).logits
        torch.testing.assert_close(logits[0], model(input_ids[:1]).logits[0], **TOLERANCE)
        torch.testing.assert_close(logits[1, 6:], model(input_ids[1:2, 6:]).logits[0], **TOLERANCE)


def test_gradients_of_a_pack(input_ids):
    model = build("memora")
    rows = [input_ids[0, :11], input_ids[1, :1], input_ids[2, :9]]
    position_ids = torch.cat([torch.arange(len(row)) for row in rows])[None]
    grads = []
    for logits in (
        lambda: model(torch.cat(rows)[None], position_ids=position_ids).logits[0],
        lambda: torch.cat([model(row[None]).logits[0] for row in rows]),
    ):
        model.zero_grad()
        logits().square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert_same_gradients(*grads)


def test_generate_uses_the_cache(speaker, input_ids):
    greedy = {"max_new_tokens": 20, "do_sample": False}
    expected = speaker.generate(input_ids[:, :5], use_cache=False, **greedy)
    output = speaker.generate(input_ids[:, :5], return_dict_in_generate=True, **greedy)
    assert torch.equal(output.sequences, expected)
    assert isinstance(output.past_key_values.layers[0], MirasLayer)


@pytest.mark.parametrize(
    "choices",
    [{}, {"decay_target": "zero"}, {"memory_architecture": "matrix"}, {"memory_architecture": "vector"}],
    ids=str,
)
def test_generation_leaves_the_parameters_alone(choices):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MirasConfig(**SMALL, retention="decay", **choices)).eval()
    before = [parameter.clone() for parameter in model.parameters()]
    for cache_implementation in (None, "static"):
        # decoding writes into the memory that a prompt shorter than a chunk leaves
        model.generate(torch.arange(1, 4)[None], max_new_tokens=12, cache_implementation=cache_implementation)
    assert all(map(torch.equal, model.parameters(), before))


def test_generate_prompts_shorter_than_a_chunk(speaker):
    for length in (1, 2, 3, 9):
        prompt = torch.arange(1, length + 1)[None]
        options = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(speaker.generate(prompt, **options), speaker.generate(prompt, use_cache=False, **options))


def test_generate_left_padded_batch(speaker, input_ids):
    rows = [input_ids[0, :13], input_ids[1, :8], input_ids[2, :2]]
    ids, mask = padded(rows, "left", length=13)
    batch = speaker.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    for i, row in enumerate(rows):
        alone = speaker.generate(row[None], max_new_tokens=12, do_sample=False, use_cache=False)
        assert torch.equal(batch[i, 13:], alone[0, len(row) :])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "num_beams": 2, "top_k": 20},
    ],
    ids=str,
)
def test_generate_beams_and_sampling(speaker, input_ids, options):
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outputs.append(speaker.generate(input_ids[:, :9], max_new_tokens=10, use_cache=use_cache, **options))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_generate_chunked_prefill(speaker, input_ids, chunk):
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = speaker.generate(input_ids, use_cache=False, **options)
    assert torch.equal(speaker.generate(input_ids, prefill_chunk_size=chunk, **options), expected)


def test_generate_goes_on_from_a_cache(speaker, input_ids):
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = speaker.generate(input_ids, use_cache=False, **options)
    cache = DynamicCache(config=speaker.config)
    with torch.no_grad():
        speaker(input_ids[:, :17], past_key_values=cache, use_cache=True)
    for _ in range(2):  # one reading serves many questions
        reused = copy.deepcopy(cache)
        assert torch.equal(speaker.generate(input_ids, past_key_values=reused, **options), expected)


def test_generate_goes_on_from_a_cache_with_beams(speaker, input_ids):
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}
    expected = speaker.generate(input_ids, use_cache=False, **options)
    cache = DynamicCache(config=speaker.config)
    with torch.no_grad():
        speaker(input_ids[:, :17], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    assert torch.equal(speaker.generate(input_ids, past_key_values=cache, **options), expected)


def test_static_cache(speaker, input_ids):
    rows = [input_ids[0, :13], input_ids[1, :8], input_ids[2, :2]]
    ids, mask = padded(rows, "left", length=13)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    for beams in (1, 2):
        static = speaker.generate(ids, cache_implementation="static", num_beams=beams, **options)
        assert torch.equal(static, speaker.generate(ids, num_beams=beams, use_cache=False, **options))
        for row, said in zip(rows, static, strict=True):
            alone = speaker.generate(row[None], num_beams=beams, use_cache=False, **options | {"attention_mask": None})
            assert torch.equal(said[13:], alone[0, len(row) :])


def test_a_static_cache_keeps_its_tensors(model, input_ids):
    """Over tokens, over a second text and, reset, over another prompt: what a captured graph has to find again."""
    cache = StaticCache(config=model.config, max_cache_len=64)
    addresses = set()
    with torch.no_grad():
        for start in (0, 1):
            outputs = [model(input_ids[:, start:14], past_key_values=cache).logits]
            for t in range(14, 21):
                outputs.append(model(input_ids[:, t : t + 1], past_key_values=cache).logits)
                layer = next(layer for layer in cache.layers if isinstance(layer, MirasLayer))
                memory, _ = layer.to_read()
                addresses.add((*(x.data_ptr() for x in (*memory.dual, *memory.inputs, memory.count)),))
            expected = model(input_ids[:, start:], use_cache=False).logits
            torch.testing.assert_close(torch.cat(outputs, dim=1), expected, **TOLERANCE)
            assert cache.get_seq_length() == 21 - start
            cache.reset()
    assert len(addresses) == 1


@pytest.mark.parametrize(
    ("name", "hybrid"),
    [
        pytest.param(name, hybrid, marks=[] if hybrid == (name == "moneta") else pytest.mark.slow)
        for name in CONFIGS
        for hybrid in (False, True)
    ],
)
def test_compiled_generation(name, hybrid, input_ids):
    """One graph without a break serves every token, of padded rows and over the ends of their chunks."""
    model = build(name, hybrid, **SPOKEN)
    ids, mask = padded([input_ids[0, :13], input_ids[1, :8], input_ids[2, :2]], "left", length=13)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, use_cache=False, **options)
    compile_config = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    compile_config._compile_all_devices = True  # `generate()` would leave CPUs alone
    torch._dynamo.reset()
    counters.clear()
    compiled = model.generate(ids, cache_implementation="static", compile_config=compile_config, **options)
    assert torch.equal(compiled, expected)
    # Transformers' own layers of the window are traced once more, for a length that grows
    assert counters["stats"]["unique_graphs"] == (2 if hybrid else 1)


def test_reset_goes_back_to_the_learned_memory(model, input_ids):
    stock = DynamicSlidingWindowLayer(sliding_window=4)
    stock.update(*torch.zeros(2, 1, 1, 3, 2))
    stock.reset()
    keys, _ = stock.update(*torch.ones(2, 1, 1, 1, 2))
    if model.config.attention_layers and keys.shape[2] > 1:
        pytest.skip("the sliding layers of this Transformers keep what they have read when they are reset")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(input_ids, past_key_values=cache, use_cache=True).logits
        cache.reset()
        again = model(input_ids, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(again, first)
    assert model.config.attention_layers or cache.get_seq_length() == 21


def test_batch_operations_on_the_cache(input_ids):
    model = build("yaad")
    with torch.no_grad():
        cache = model(input_ids[:, :13], use_cache=True).past_key_values
        expected = model(input_ids).logits[:, 13:]
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 2, 4]))
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        rows = torch.tensor([2, 0, 1])
        logits = model(input_ids[rows, 13:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, expected[rows], **TOLERANCE)


def test_offloaded_layer_comes_back(input_ids):
    model = build("yaad")
    with torch.no_grad():
        cache = model(input_ids[:, :13], use_cache=True).past_key_values
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        logits = model(input_ids[:, 13:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits, model(input_ids).logits[:, 13:], **TOLERANCE)
    assert torch.equal(
        model.generate(input_ids, cache_implementation="offloaded", max_new_tokens=4, do_sample=False),
        model.generate(input_ids, max_new_tokens=4, do_sample=False, use_cache=False),
    )


def test_state_does_not_grow(input_ids):
    model = build("moneta")

    def numbers(cache):
        return sum(
            t.numel()
            for layer in cache.layers
            for part in layer.memory
            for t in (part if isinstance(part, tuple) else (part,))
        )

    with torch.no_grad():
        short = model(input_ids[:, :3], use_cache=True).past_key_values
        long = model(input_ids.repeat(1, 9), use_cache=True).past_key_values
    assert numbers(short) == numbers(long)


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_decoding_stays_close(name, input_ids):
    # bfloat16 rounds every activation to 3 digits; the memory itself stays in float32
    model = build(name, **SENSITIVE)
    full = assert_memory_matters(model, lambda model: model(input_ids).logits[:, 13:], tolerance=0.05)
    with torch.no_grad():
        half = model.to(torch.bfloat16)
        cache = half(input_ids[:, :13], use_cache=True).past_key_values
        steps = [half(input_ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(13, 21)]
    assert cache.layers[0].memory.dual[0].dtype == torch.float32
    assert relative_error(torch.cat(steps, dim=1), full) < 0.05


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_leaves_the_memory_in_float32(name, input_ids):
    model = build(name, **SENSITIVE).train()
    expected = assert_memory_matters(model, lambda model: model(input_ids).logits, tolerance=0.05)
    loss = model(input_ids, labels=input_ids).loss
    with torch.no_grad(), never_writing(model):
        assert (model(input_ids, labels=input_ids).loss - loss).abs() > 0.03
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids, labels=input_ids, use_cache=True)
    output.loss.backward()
    memory = output.past_key_values.layers[0].memory
    assert all(t.dtype == torch.float32 for t in (*memory.dual, *memory.inputs, *memory.gradients, memory.eta))
    assert relative_error(output.logits, expected) < 0.05
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-2)


def test_gradient_checkpointing_changes_nothing(input_ids):
    model = build("moneta").train()
    losses = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        losses.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, checkpointed in zip(*losses, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_bad_input_is_named(input_ids):
    model = build("moneta")
    ones = torch.ones(3, 21, dtype=torch.long)
    cases = [
        ({"attention_mask": ones * 2}, "0 and 1 only, got values \\[2\\]"),
        ({"attention_mask": ones[:, :20]}, r"must have shape \(3, 21\), got \(3, 20\)"),
        ({"attention_mask": torch.ones(3, 1, 21, 21)}, r"shape \[batch, tokens\]"),
        ({"past_key_values": DynamicCache()}, "made for this model"),
        ({"attention_mask": 1 - ones.triu(), "seq_idx": ones.cumsum(-1)}, "must not have pads"),
        ({"cu_seq_lens_q": torch.tensor([0, 21])}, "one packed row"),
        ({"seq_idx": ones[:, :3]}, r"`seq_idx` must be integers of shape \(3, 21\)"),
    ]
    for kwargs, message in cases:
        with pytest.raises(ValueError, match=message):
            model(input_ids, **kwargs)
    with pytest.raises(ValueError, match="cannot be used with packed sequences"):
        positions = torch.cat((torch.arange(10), torch.arange(11)))[None]
        model(input_ids[:1], position_ids=positions, past_key_values=DynamicCache(config=model.config))


def test_cache_of_another_model_is_named(input_ids):
    with torch.no_grad():
        cache = build("moneta", chunk_size=4)(input_ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="another model's state"):
            build("moneta")(input_ids[:, :1], past_key_values=cache, use_cache=True)


def test_hybrid_windows_do_not_count_pads_in_silence(input_ids):
    model = build("yaad", hybrid=True, sliding_window=8)
    ids, mask = padded([input_ids[0, :12], input_ids[1, :5]], "right", length=12)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
        with pytest.raises(ValueError, match="pads between real tokens"):
            model(ids[:, :1], attention_mask=mask, past_key_values=cache)


def test_hybrid_with_a_short_window_decodes_exactly(input_ids):
    model = build("yaad", hybrid=True, sliding_window=6)
    with torch.no_grad():
        full = model(input_ids).logits
        cache = model(input_ids[:, :9], use_cache=True).past_key_values
        steps = [model(input_ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(9, 21)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full[:, 9:], **TOLERANCE)


def test_general_model_takes_any_choices(input_ids):
    torch.manual_seed(0)
    for bias in ("l2", "huber_coordinate", "huber_norm"):
        for extra in (
            {"retention": "decay", "decay_target": "zero", "gate_granularity": "head"},
            {"retention": "lq", "lq_map": "mirror"},
            {"retention": "kl", "use_rope": False, "memory_expansion": 2},
            {"memory_architecture": "matrix", "conv_kernel_size": 1},
        ):
            model = AutoModelForCausalLM.from_config(MirasConfig(**SMALL | {"attentional_bias": bias} | extra)).eval()
            with torch.no_grad():
                full = model(input_ids).logits
                cache = model(input_ids[:, :9], use_cache=True).past_key_values
                last = model(input_ids[:, 9:], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(last, full[:, 9:], **TOLERANCE)
