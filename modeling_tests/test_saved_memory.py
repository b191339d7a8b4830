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
"""A memory on disk: generation goes on from it as from the one in memory, and no other model or file is taken for it."""

import copy
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from memory_effects import SENSITIVE, assert_memory_matters, relative_error
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, StaticCache

from miras_hf import MemoraConfig, MirasConfig, MonetaConfig, YaadConfig
from miras_hf.memory_file import HEADER
from miras_hf.saved_memory import config_fingerprint, load_memory, save_memory, weights_fingerprint


CONFIGS = {"moneta": MonetaConfig, "yaad": YaadConfig, "memora": MemoraConfig, "miras": MirasConfig}
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "chunk_size": 8,
    "pad_token_id": 0,
    # by position, which is not the default
    "use_rope": True,
    # answers are compared: none may stop early
    "eos_token_id": None,
}
# a window shorter than the text, so that the cache has let go of keys
HYBRID = {"layer_types": ["sliding_attention", "miras_memory"], "sliding_window": 6, "num_key_value_heads": 1}
UNUSUAL = {
    "memory_architecture": "matrix",
    "gate_granularity": "head",
    "conv_kernel_size": 1,
    "decay_target": "zero",
    "use_rope": False,
}


def build(name, hybrid=False, seed=0, **overrides):
    torch.manual_seed(seed)
    config = CONFIGS[name](**{**SMALL, **(HYBRID if hybrid else {}), **overrides})
    return AutoModelForCausalLM.from_config(config).eval()


CASES = {
    **{f"{name}{'-hybrid' * hybrid}": (name, hybrid, {}) for name in CONFIGS for hybrid in (False, True)},
    "unusual": ("miras", False, UNUSUAL),
    "gated": ("miras", False, {"memory_architecture": "gated_mlp"}),
    "vector": ("miras", False, {"memory_architecture": "vector"}),
    "full-attention": ("yaad", True, {"layer_types": ["full_attention", "miras_memory"], "sliding_window": 2048}),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def model(request):
    name, hybrid, overrides = request.param
    return build(name, hybrid, **overrides)


@pytest.fixture(scope="module")
def yaad():
    return build("yaad", hybrid=True)


@pytest.fixture
def saved(yaad, tmp_path):
    save_memory(read(yaad, text(19)), tmp_path / "text.safetensors", yaad)
    return tmp_path / "text.safetensors"


def text(tokens, rows=1, seed=0):
    return torch.randint(1, 99, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, input_ids, attention_mask=None):
    return model(input_ids, attention_mask=attention_mask, use_cache=True).past_key_values


def ask(model, cache, question, mask=None, repeats=1, **kwargs):
    """Scores and ids of a generation that goes on from a copy of the cache."""
    cache = copy.deepcopy(cache)
    if mask is None:
        mask = torch.ones(question.shape[0], cache.get_seq_length(), dtype=torch.long)
    mask = torch.cat((mask, torch.ones_like(question)), dim=1)
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
        question, mask = question.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
    output = model.generate(
        question,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=12,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return torch.stack(output.scores, 1), output.sequences


def beams(model, cache, question, **kwargs):
    cache = copy.deepcopy(cache)
    mask = torch.ones(1, cache.get_seq_length() + question.shape[1], dtype=torch.long)
    cache.batch_repeat_interleave(kwargs["num_beams"])
    return model.generate(
        question, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False, **kwargs
    )


def assert_equal(got, expected):
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


# in a chunk's middle, at its end, before the first one's end, and after one token
@pytest.mark.parametrize("tokens", [19, 16, 3, 1])
def test_generation_goes_on_as_from_the_cache_in_memory(model, tokens, tmp_path):
    cache, question = read(model, text(tokens)), text(3, seed=1)
    save_memory(cache, tmp_path / "text.safetensors", model)
    loaded = load_memory(tmp_path / "text.safetensors", model)
    assert type(loaded) is DynamicCache and loaded.get_seq_length() == tokens
    assert_equal(ask(model, loaded, question), ask(model, cache, question))
    assert os.listdir(tmp_path) == ["text.safetensors"]


def test_saved_in_the_middle_of_a_generation(model, tmp_path):
    output = model.generate(text(9), max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    save_memory(output.past_key_values, tmp_path / "talk.safetensors", model)
    whole = model.generate(text(9), max_new_tokens=16, do_sample=False)
    # the last token is written, but not read yet; the mask has the ids' length: they are the whole text
    kwargs = {"attention_mask": torch.ones_like(output.sequences), "max_new_tokens": 10, "do_sample": False}
    loaded = load_memory(tmp_path / "talk.safetensors", model)
    assert loaded.get_seq_length() == output.sequences.shape[1] - 1
    assert torch.equal(model.generate(output.sequences, past_key_values=loaded, **kwargs), whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_with_their_mask(model, side, tmp_path):
    rows, lengths = text(21, rows=3), (21, 13, 8)
    mask = torch.stack([torch.arange(21) < length for length in lengths]).long()
    if side == "left":
        mask = mask.flip(-1)
    elif model.config.attention_layers:
        return  # refused by the model: pads between real tokens, beyond its window
    cache, question = read(model, rows * mask, mask), text(3, rows=3, seed=1)
    save_memory(cache, tmp_path / "batch.safetensors", model, attention_mask=mask)
    loaded, read_mask = load_memory(tmp_path / "batch.safetensors", model, return_attention_mask=True)
    assert torch.equal(read_mask, mask)
    assert_equal(ask(model, loaded, question, read_mask), ask(model, cache, question, mask))


def test_pads_without_their_mask(tmp_path):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    hybrid, pure = build("moneta", hybrid=True), build("moneta")
    with pytest.raises(ValueError, match="`attention_mask` must be given.*rows of this cache have pads"):
        save_memory(read(hybrid, text(5, rows=2) * mask, mask), tmp_path / "batch.safetensors", hybrid)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match=r"shape of the text read, \(2, 5\), got \(2, 4\)"):
        save_memory(read(pure, text(5, rows=2), mask), tmp_path / "a", pure, attention_mask=mask[:, 1:])
    # memories need no more than the number of pads
    save_memory(read(pure, text(5, rows=2) * mask, mask), tmp_path / "batch.safetensors", pure)
    _, read_mask = load_memory(tmp_path / "batch.safetensors", pure, return_attention_mask=True)
    assert torch.equal(read_mask, mask)


def test_several_answers_and_beams_from_one_memory(model, tmp_path):
    cache, question = read(model, text(19)), text(3, seed=1)
    save_memory(cache, tmp_path / "text.safetensors", model)
    loaded = load_memory(tmp_path / "text.safetensors", model)
    for kwargs in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}):
        assert torch.equal(beams(model, loaded, question, **kwargs), beams(model, cache, question, **kwargs))
    assert_equal(ask(model, loaded, question, repeats=2), ask(model, cache, question, repeats=2))


def test_size_of_the_file_does_not_grow_with_the_text(tmp_path):
    model = build("yaad")
    for tokens in (10, 300):
        save_memory(read(model, text(tokens)), tmp_path / f"{tokens}", model)
    assert abs((tmp_path / "10").stat().st_size - (tmp_path / "300").stat().st_size) < 100


def test_another_process_goes_on(yaad, tmp_path):
    cache, question = read(yaad, text(19)), text(3, seed=1)
    yaad.save_pretrained(tmp_path / "model")
    save_memory(cache, tmp_path / "text.safetensors", yaad)
    program = f"""
import torch
from transformers import AutoModelForCausalLM
from miras_hf.saved_memory import load_memory

model = AutoModelForCausalLM.from_pretrained("model")
cache = load_memory("text.safetensors", model)
question = torch.tensor({question.tolist()})
mask = torch.ones(1, cache.get_seq_length() + 3)
print(model.generate(question, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False).tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        # the package under test, installed or not
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ask(yaad, cache, question)[1].tolist()


def test_heads_wrappers_and_the_decoder_share_a_memory(yaad, saved):
    decoder = yaad.model
    assert weights_fingerprint(yaad) == weights_fingerprint(decoder)
    assert weights_fingerprint(torch.nn.Sequential(yaad)) == weights_fingerprint(yaad)
    assert load_memory(saved, decoder).get_seq_length() == 19


def test_adapters_change_the_weights_and_merging_keeps_what_they_read(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = build("moneta")
    plain = weights_fingerprint(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    cache = read(adapted, text(11))
    save_memory(cache, tmp_path / "text.safetensors", adapted)
    assert_equal(
        ask(adapted, load_memory(tmp_path / "text.safetensors", adapted), text(3)), ask(adapted, cache, text(3))
    )
    with pytest.raises(ValueError, match="other weights"):
        load_memory(tmp_path / "text.safetensors", build("moneta"))
    merged = adapted.merge_and_unload()
    assert weights_fingerprint(merged) != plain
    load_memory(tmp_path / "text.safetensors", merged, check_weights=False)


def adapted(alpha=8, others=(), name="first", **kwargs):
    """A model with one adapter that is always the same but for its scaling, and idle ones."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(init_lora_weights=False, lora_alpha=alpha, **{"target_modules": ["q_proj"], **kwargs})
    model = get_peft_model(build("moneta", **SENSITIVE), config, adapter_name=name)
    with torch.no_grad():
        # copies and tokens that are trained start as what they are copies of
        for key, parameter in model.named_parameters():
            if "modules_to_save" in key or "trainable_tokens_delta" in key:
                parameter.add_(torch.randn_like(parameter))
    for other in others:
        model.add_adapter(other, config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{other}." in f"{key}.":
                    parameter.add_(torch.randn_like(parameter))
    return model.eval()


ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "two-modules": {"target_modules": ["embed_tokens", "v_proj"]},
    "parameter": {"target_parameters": ["q_conv.weight"]},
    "modules-to-save": {"modules_to_save": ["memory", "lm_head"]},
    "modules-to-save-embeddings": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("kwargs", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_of_adapters_those_count_that_are_in_use(kwargs, tmp_path):
    plain, path = weights_fingerprint(build("moneta", **SENSITIVE)), tmp_path / "text.safetensors"
    model = adapted(others=["second"], **kwargs)
    save_memory(read(model, text(11)), path, model)
    assert load_memory(path, model).get_seq_length() == 11
    # without the idle one, and under another name
    for same in (adapted(**kwargs), adapted(name="third", **kwargs)):
        assert_equal(ask(same, load_memory(path, same), text(3)), ask(model, read(model, text(11)), text(3)))
    for name in ("first", "second"):
        model.set_adapter(name)
        with model.disable_adapter():
            assert weights_fingerprint(model) == plain
            with pytest.raises(ValueError, match="other weights.*with the same adapters in use"):
                load_memory(path, model)
    with pytest.raises(ValueError, match="other weights"):
        load_memory(path, model)
    model.base_model.set_adapter("first")
    load_memory(path, model)
    # some have no scaling
    other = adapted(alpha=16, **kwargs)
    with pytest.raises(ValueError, match="other weights"):
        load_memory(path, other)
    # and all of this is about what is computed
    with torch.no_grad():
        found = [m(text(11)).logits[:, -1] for m in (model, other)]
    assert not torch.allclose(*found, atol=1e-5)


def test_several_adapters_at_once_are_not_one_of_them():
    model = adapted(others=["second"])
    one = weights_fingerprint(model)
    model.base_model.set_adapter(["first", "second"])
    assert weights_fingerprint(model) != one
    model.delete_adapter("second")
    assert weights_fingerprint(model) == one


def test_merged_adapters_are_part_of_the_weights(tmp_path):
    model, path = adapted(others=["second"], modules_to_save=["memory"]), tmp_path / "text.safetensors"
    plain = weights_fingerprint(build("moneta", **SENSITIVE))
    model.merge_adapter()
    save_memory(read(model, text(11)), path, model)
    with model.disable_adapter():
        with pytest.raises(ValueError, match=r"merged and disabled \(first\).*call `unmerge_adapter\(\)` before"):
            load_memory(path, model)
        # which is what PEFT does
        read(model, text(3))
        assert weights_fingerprint(model) == plain
    model.merge_adapter()
    assert load_memory(path, model.merge_and_unload()).get_seq_length() == 11


def earlier_fingerprint(model):
    """As versions made it that looked at names and at parameters of floating point only."""
    from miras_hf.memory_file import as_bytes

    digest = hashlib.sha256()
    for name, parameter in sorted(getattr(model, "model", model).named_parameters()):
        if parameter.is_floating_point():
            flat = parameter.detach().flatten()
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            digest.update(as_bytes(flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16)))
    return digest.hexdigest()


def test_digests_of_earlier_versions_without_adapters(model):
    assert weights_fingerprint(model) == earlier_fingerprint(model)


def test_digests_of_earlier_versions_with_one_adapter_in_use(tmp_path, monkeypatch):
    from miras_hf import saved_memory

    def written_earlier(model, name):
        with monkeypatch.context() as patch:
            patch.setattr(saved_memory, "weights_fingerprint", earlier_fingerprint)
            save_memory(read(model, text(11)), tmp_path / name, model)
        return tmp_path / name

    one, two = adapted(modules_to_save=["memory"]), adapted(others=["second"], modules_to_save=["memory"])
    assert load_memory(written_earlier(one, "one"), one).get_seq_length() == 11
    # it does not tell what has read
    with one.disable_adapter(), pytest.raises(ValueError, match="other weights"):
        load_memory(tmp_path / "one", one)
    with pytest.raises(ValueError, match="other weights"):
        load_memory(written_earlier(two, "two"), two)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.04), (torch.float64, 1e-4)])
def test_the_same_weights_in_another_dtype(dtype, tolerance, tmp_path):
    model = build("yaad", hybrid=True, seed=1, **SENSITIVE)
    model.save_pretrained(tmp_path / "model")
    save_memory(read(model, text(19, rows=4)), tmp_path / "text.safetensors", model)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    assert weights_fingerprint(other) == weights_fingerprint(model)
    loaded = load_memory(tmp_path / "text.safetensors", other)
    assert loaded.layers[1].conv_tail.dtype == loaded.layers[0].keys.dtype == dtype
    assert loaded.layers[1].memory.eta.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    question = text(3, rows=4, seed=1)
    whole = torch.cat((text(19, rows=4), question), dim=1)
    expected = assert_memory_matters(model, lambda model: model(whole).logits[:, -1], tolerance)
    # generations may part where two ids are close: the first step tells
    assert relative_error(ask(other, loaded, question)[0][:, 0], expected) < tolerance


def test_autocast_goes_on_as_it_read(yaad, tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        cache = read(yaad, text(19))
        save_memory(cache, tmp_path / "text.safetensors", yaad)
        loaded = load_memory(tmp_path / "text.safetensors", yaad)
        assert loaded.layers[1].conv_tail.dtype == cache.layers[1].conv_tail.dtype
        assert_equal(ask(yaad, loaded, text(3, seed=1)), ask(yaad, cache, text(3, seed=1)))


def test_other_weights_are_refused_unless_told(yaad, saved):
    other = build("yaad", hybrid=True, seed=1)
    with pytest.raises(ValueError, match="other weights.*`check_weights=False`"):
        load_memory(saved, other)
    assert load_memory(saved, other, check_weights=False).get_seq_length() == 19
    # one small training step is noticed
    trained = copy.deepcopy(yaad)
    trained(text(8), labels=text(8)).loss.backward()
    torch.optim.AdamW(trained.parameters(), lr=1e-2).step()
    with pytest.raises(ValueError, match="other weights"):
        load_memory(saved, trained)


def test_quantized_weights_are_other_weights(yaad, saved, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")

    quantized = copy.deepcopy(yaad)
    torchao.quantize_(quantized.model.layers[1].mlp, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="other weights"):
        load_memory(saved, quantized)
    cache = read(quantized, text(19))
    save_memory(cache, tmp_path / "own.safetensors", quantized)
    loaded = load_memory(tmp_path / "own.safetensors", quantized)
    assert_equal(ask(quantized, loaded, text(3, seed=1)), ask(quantized, cache, text(3, seed=1)))


BITSANDBYTES = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


@pytest.fixture(params=BITSANDBYTES.values(), ids=BITSANDBYTES.keys())
def quantized(request, tmp_path):
    """What loads a model quantized by bitsandbytes, with its projections changed as a merged adapter would or not."""
    pytest.importorskip("bitsandbytes")
    model = build("yaad", hidden_size=64, intermediate_size=128)

    def load(change=lambda weight: weight):
        changed = copy.deepcopy(model)
        for name, parameter in changed.named_parameters():
            if name.endswith("mixer.v_proj.weight"):
                parameter.data = change(parameter.data)
        changed.save_pretrained(tmp_path / "model")
        config = BitsAndBytesConfig(**request.param)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config).eval()

    return load


def test_integers_of_quantized_weights_count(quantized, tmp_path):
    model, path = quantized(), tmp_path / "text.safetensors"
    before = weights_fingerprint(model)
    cache = read(model, text(19))
    # the first forward moves what scales the integers
    assert weights_fingerprint(model) == before
    save_memory(cache, path, model)
    again = quantized()
    assert_equal(ask(again, load_memory(path, again), text(3, seed=1)), ask(model, cache, text(3, seed=1)))
    noise = 0.2 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    # with the same integers, other scales
    for change in (lambda weight: weight + noise, lambda weight: 2 * weight):
        other = quantized(change)
        with pytest.raises(ValueError, match="other weights"):
            load_memory(path, other)
        assert load_memory(path, other, check_weights=False).get_seq_length() == 19


def test_weights_of_four_bits_are_the_same_when_packed_for_a_cpu(quantized):
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    model = quantized()
    before, packed = weights_fingerprint(model), 0
    for name, parameter in model.named_parameters():
        if getattr(parameter, "quant_state", None) is not None:
            # in the first forward, on processors that have the instructions
            bits = parameter.data.clone()
            parameter.data, _ = _convert_weight_packed_for_cpu(parameter.data, parameter.quant_state)
            packed += not torch.equal(parameter.data.flatten(), bits.flatten())
    assert packed or not model.config.quantization_config.load_in_4bit
    # twice: it leaves the weights as they are
    assert weights_fingerprint(model) == before == weights_fingerprint(model)


def test_resized_embeddings_are_other_weights_only(yaad, saved):
    model = copy.deepcopy(yaad)
    model.resize_token_embeddings(110)
    with pytest.raises(ValueError, match="other weights.*`check_weights=False`.*resized embeddings"):
        load_memory(saved, model)
    loaded, question = load_memory(saved, model, check_weights=False), text(3, seed=1)
    with torch.no_grad():
        (mine, its), mask = ((model, loaded), (yaad, load_memory(saved, yaad))), torch.ones(1, 22)
        found, expected = (m(question, attention_mask=mask, past_key_values=cache).logits for m, cache in (mine, its))
    torch.testing.assert_close(found[..., :99], expected)
    # earlier versions wrote it down
    for size in (99, 110):
        resigned(saved, config(vocab_size=size))
        assert load_memory(saved, yaad).get_seq_length() == 19


def test_fields_that_differ_are_named_with_both_values(saved):
    other = build("yaad", hybrid=True, chunk_size=16, rms_norm_eps=1e-5)
    with pytest.raises(ValueError, match=r"`chunk_size` \(8 there, 16 here\)") as raised:
        load_memory(saved, other)
    assert "`rms_norm_eps` (1e-06 there, 1e-05 here)" in str(raised.value)
    assert "`num_hidden_layers`" not in str(raised.value)
    with pytest.raises(ValueError, match=r"`attention_layers` \(\[0\] there, \[\] here\)"):
        load_memory(saved, build("yaad"))
    with pytest.raises(ValueError, match=r"`model_type` \('yaad' there, 'memora' here\)"):
        load_memory(saved, build("memora", hybrid=True))


def test_fields_without_meaning_for_the_memory_may_differ(yaad, saved):
    other = copy.deepcopy(yaad)
    other.config.eos_token_id, other.config.use_cache, other.config.initializer_range = 5, False, 0.5
    assert load_memory(saved, other).get_seq_length() == 19
    assert config_fingerprint(other.config) == config_fingerprint(yaad.config)


def test_every_field_of_the_config_is_either_fingerprinted_or_neutral(yaad):
    from miras_hf.saved_memory import NEUTRAL_FIELDS

    known = {*config_fingerprint(yaad.config), *NEUTRAL_FIELDS}
    stored = {*yaad.config.to_dict(), "layer_types"}
    # of PreTrainedConfig: about the file, outputs and heads
    stored -= {"architectures", "auto_map", "dtype", "id2label", "label2id", "problem_type", "transformers_version"}
    stored -= {"output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "_name_or_path"}
    assert stored - known - {"layer_types", "output_attentions"} == set()


def rewritten(path, change_header=None, change_tensors=None, metadata=None):
    """The file with something in it changed by somebody else."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER])
    tensors = load_file(path)
    if change_header:
        change_header(header)
    if change_tensors:
        change_tensors(tensors)
    metadata = {HEADER: json.dumps(header)} if metadata is None else metadata
    save_file(tensors, path, metadata=metadata)
    return path


def test_damaged_and_foreign_files_are_refused(yaad, saved, tmp_path):
    whole = saved.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            load_memory(saved, yaad)
    saved.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match="is damaged"):
        load_memory(saved, yaad)
    changes = [
        ({"change_header": lambda header: header.update(tokens=20)}, "is damaged"),
        ({"change_header": lambda header: header.update(version=2)}, "version 2 of the format.*reads version 1"),
        ({"change_header": lambda header: header.pop("checksum")}, "is damaged"),
        ({"change_tensors": lambda tensors: tensors.pop("layers.1.eta")}, "is damaged"),
        ({"metadata": {"format": "pt"}}, "without a memory in it"),
        ({"metadata": {HEADER: "[]"}}, "is damaged"),
        ({"metadata": {HEADER: "{"}}, "is damaged"),
    ]
    for change, message in changes:
        saved.write_bytes(whole)
        with pytest.raises(ValueError, match=message):
            load_memory(rewritten(saved, **change), yaad)
    with pytest.raises(FileNotFoundError):
        load_memory(tmp_path / "nothing.safetensors", yaad)


def test_state_of_another_layout_is_refused(yaad, saved, monkeypatch):
    from miras_hf import memory_file

    def cut(tensors):
        tensors["layers.1.eta"] = tensors["layers.1.eta"][:, :, :4].clone()

    # as another version of this package might write it: whole, and not what is needed here
    monkeypatch.setattr(memory_file, "_checksum", lambda header, tensors: "same")
    rewritten(saved, lambda header: header.update(checksum="same"), cut)
    with pytest.raises(ValueError, match=r"layers.1.eta has shape \[1, 2, 4, 16\], and \[1, 2, 8, 16\] is needed"):
        load_memory(saved, yaad)


def resigned(path, change):
    """The file with something changed by a stranger who knows how its checksum is made."""
    from miras_hf import memory_file

    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()[HEADER])
    tensors = load_file(path)
    del values["checksum"]
    change(values, tensors)
    values["checksum"] = memory_file._checksum(values, tensors)
    save_file(tensors, path, metadata={HEADER: json.dumps(values)})
    return path


def header(**fields):
    return lambda values, tensors: values.update(fields)


def config(**fields):
    return lambda values, tensors: values["config"].update(fields)


def tensor(name, change):
    return lambda values, tensors: tensors.update({name: change(tensors[name]).contiguous().clone()})


def put(name, index, value):
    def change(values, tensors):
        tensors[name][index] = value

    return change


def both(*changes):
    def change(values, tensors):
        for one in changes:
            one(values, tensors)

    return change


COUNT, ETA, DECAY = "layers.1.count", "layers.1.eta", "layers.1.log_decay"
# of the hybrid after 19 tokens: chunks of 8, three slots taken, five keys
MANIPULATIONS = {
    # fields of the header
    "tokens-huge": (header(tokens=10**12), "`tokens` must be an integer from 1 to 2147483647, got 1000000000000"),
    "tokens-and-counts-huge": (
        both(header(tokens=10**12), put(COUNT, 0, 10**12)), "`tokens` must be an integer .* got 1000000000000"
    ),
    "tokens-float": (header(tokens=9.5), "`tokens` must be an integer .* got 9.5"),
    "tokens-whole-float": (header(tokens=19.0), "`tokens` must be an integer .* got 19.0"),
    "tokens-zero": (header(tokens=0), "`tokens` must be an integer .* got 0"),
    "tokens-negative": (header(tokens=-19), "`tokens` must be an integer .* got -19"),
    "tokens-bool": (header(tokens=True), "`tokens` must be an integer .* got True"),
    "tokens-text": (header(tokens="19"), "`tokens` must be an integer .* got '19'"),
    "tokens-null": (header(tokens=None), "`tokens` must be an integer .* got None"),
    "tokens-list": (header(tokens=[19]), "`tokens` must be an integer .* got .19."),
    "tokens-nan": (header(tokens=float("nan")), "`tokens` must be an integer .* got nan"),
    "tokens-fewer": (header(tokens=18), r"layers.1.count must lie between 0 and 18, got values from 19 to 19"),
    "tokens-more": (header(tokens=20), r"layers.1.count must be 20 in every row.*got \[19\]"),
    "tokens-few": (header(tokens=4), r"layers.0.keys has shape \[1, 1, 5, 16\], and \[1, 1, 4, 16\] is needed"),
    "rows-huge": (header(rows=10**18), "`rows` must be an integer .* got 1000000000000000000"),
    "rows-zero": (header(rows=0), "`rows` must be an integer .* got 0"),
    "rows-float": (header(rows=1.0), "`rows` must be an integer .* got 1.0"),
    "rows-more": (header(rows=2), r"has shape \[1, 1, 5, 16\], and \[2, 1, 5, 16\] is needed"),
    "rows-many": (header(rows=2**31 - 1), r"and \[2147483647, 1, 5, 16\] is needed"),
    "dtype-unknown": (header(dtype="torch.banana"), "`dtype` must be one of .*'torch.float32'.* got 'torch.banana'"),
    "dtype-integer": (header(dtype="torch.int64"), "`dtype` must be one of .* got 'torch.int64'"),
    "dtype-number": (header(dtype=32), "`dtype` must be one of .* got 32"),
    "dtype-list": (header(dtype=["torch.float32"]), "`dtype` must be one of .* got .'torch.float32'."),
    "dtype-wider": (header(dtype="torch.float64"), "must be torch.float64, got torch.float32"),
    "config-list": (header(config=["yaad"]), "`config` must be an object of fields, got .'yaad'."),
    "config-null": (header(config=None), "`config` must be an object of fields, got None"),
    "config-text": (header(config="yaad"), "`config` must be an object of fields, got 'yaad'"),
    "config-bool-for-number": (config(conv_kernel_size=True, memory_expansion=True), "`conv_kernel_size` .True there, 4"),
    "config-number-for-bool": (config(use_rope=1), "`use_rope` .1 there, True here."),
    "config-nested-bool": (config(attention_layers=[False]), r"`attention_layers` \(\[False\] there, \[0\] here"),
    "config-nan": (config(eta_max=float("nan")), "`eta_max` .nan there"),
    "config-unknown": (config(momentum=0.9), "`momentum` .0.9 there, unknown here."),
    "weights-number": (header(weights=5), "`weights` must be a SHA-256 digest.* got 5"),
    "weights-short": (header(weights="ab"), "`weights` must be a SHA-256 digest.* got 'ab'"),
    "weights-removed": (header(weights=None), "no digest of the weights.*`check_weights=False`"),
    "version-bool": (header(version=True), "`version` an integer, got .*'version': 'True'"),
    "version-text": (header(version="1"), "`version` an integer, got .*'1'"),
    "version-newer": (header(version=7), "version 7 of the format"),
    "field-more": (header(note="hello"), "the header must have the fields .*'rows'.* got .*'note'"),
    "field-less": (lambda values, tensors: values.pop("rows"), "the header must have the fields .*'rows'"),
    # tensors that are there
    "tensor-more": (lambda values, tensors: tensors.update(extra=torch.ones(1)), r"extra has shape \[1\], and None is needed"),
    "tensor-less": (lambda values, tensors: tensors.pop(ETA), "layers.1.eta has shape None"),
    "tensor-of-no-layer": (
        lambda values, tensors: tensors.update({"layers.2.eta": tensors[ETA].clone()}), "layers.2.eta has shape"
    ),
    "shape-flat": (tensor(ETA, torch.flatten), r"layers.1.eta has shape \[256\]"),
    "shape-swapped": (tensor("layers.1.dual.0", lambda x: x.mT), r"dual.0 has shape \[1, 2, 64, 16\], and \[1, 2, 16, 64\]"),
    "shape-scalar": (tensor(COUNT, lambda x: x[0]), r"layers.1.count has shape \[\], and \[1\]"),
    "shape-empty": (tensor("layers.0.keys", lambda x: x[:, :, :0]), r"keys has shape \[1, 1, 0, 16\]"),
    "keys-fewer": (tensor("layers.0.values", lambda x: x[:, :, 1:]), r"values has shape \[1, 1, 4, 16\]"),
    # their dtypes
    "count-bool": (tensor(COUNT, lambda x: x.bool()), "layers.1.count must be torch.int64, got torch.bool"),
    "count-float": (tensor(COUNT, lambda x: x.float()), "layers.1.count must be torch.int64, got torch.float32"),
    "eta-half": (tensor(ETA, lambda x: x.half()), "layers.1.eta must be torch.float32, got torch.float16"),
    "eta-double": (tensor(ETA, lambda x: x.double()), "layers.1.eta must be torch.float32, got torch.float64"),
    "dual-integer": (tensor("layers.1.dual.0", lambda x: x.long()), "dual.0 must be torch.float32, got torch.int64"),
    "inputs-int16": (tensor("layers.1.inputs.0", lambda x: x.to(torch.int16)), "inputs.0 must be one of .*'F32'.* got I16"),
    "keys-integer": (tensor("layers.0.keys", lambda x: x.long()), "layers.0.keys must be .*torch.float32.* got torch.int64"),
    "tail-double": (tensor("layers.1.conv_tail", lambda x: x.double()), "conv_tail must be .* got torch.float64"),
    # and their values
    **{
        f"{value}-in-{name}": (
            put(f"layers.{name}", (0,) * 3, value), f"layers.{name} must be finite, got values from .*{str(value).strip('-')}"
        )
        for name in ("1.dual.0", "1.dual.1", "1.inputs.1", "1.gradients.0", "1.eta", "1.log_decay", "1.conv_tail", "0.keys", "0.values")
        for value in (float("nan"), float("inf"), float("-inf"))
    },
    "count-more": (put(COUNT, 0, 20), "layers.1.count must lie between 0 and 19, got values from 20"),
    "count-negative": (put(COUNT, 0, -1), "layers.1.count must lie between 0 and 19, got values from -1"),
    "count-fewer": (put(COUNT, 0, 11), r"layers.1.count must be 19 in every row.*no attention_mask, got \[11\]"),
    "count-of-another-phase": (
        both(header(tokens=20), put(COUNT, 0, 20)), r"layers.1.eta must have written to the first .* = \[4\] slots.*got \[3\]"
    ),
    "count-of-an-earlier-phase": (
        both(header(tokens=18), put(COUNT, 0, 18)), r"first `count % chunk_size` = \[2\] slots.* got \[3\] slots"
    ),
    "eta-in-a-free-slot": (put(ETA, (0, 1, 5, 3), 1e-4), r"layers.1.eta must have written .* got \[4\] slots"),
    "eta-negative": (put(ETA, (0, 0, 0, 0), -1e-3), "layers.1.eta must lie between 0.0 and .* got values from -0.001"),
    "eta-above-its-largest": (put(ETA, (0, 0, 0, 0), 1.0), "layers.1.eta must lie between .* to 1.0"),
    "decay-positive": (put(DECAY, (0, 0, 0, 0), 0.1), "layers.1.log_decay must lie between -20.* and 0.0"),
    "decay-below-its-least": (put(DECAY, (0, 0, 0, 0), -1e3), "layers.1.log_decay must lie between -20.* from -1000.0"),
    "mask-of-another-text": (
        lambda values, tensors: tensors.update(attention_mask=torch.arange(19)[None] > 3),
        r"attention_mask must have as many real tokens as the memories have read, \[19\], got \[15\]",
    ),
    "mask-of-another-length": (
        lambda values, tensors: tensors.update(attention_mask=torch.ones(1, 18, dtype=torch.bool)),
        r"attention_mask has shape \[1, 18\], and \[1, 19\] is needed",
    ),
    "mask-of-numbers": (
        lambda values, tensors: tensors.update(attention_mask=torch.ones(1, 19)),
        "attention_mask must be torch.bool, got torch.float32",
    ),
}  # fmt: skip


def test_what_a_stranger_has_changed_is_refused_by_name(yaad, saved, monkeypatch):
    from miras_hf import saved_memory

    whole = saved.read_bytes()
    assert load_memory(resigned(saved, lambda values, tensors: None), yaad).get_seq_length() == 19
    # nothing may be made of such a file
    monkeypatch.setattr(saved_memory, "DynamicCache", None)
    assert len(MANIPULATIONS) >= 40
    for name, (change, message) in MANIPULATIONS.items():
        saved.write_bytes(whole)
        with pytest.raises(ValueError) as raised:
            load_memory(resigned(saved, change), yaad, return_attention_mask=True)
        assert re.search(message, str(raised.value)), (name, str(raised.value))
        assert str(saved) in str(raised.value), name


def test_layers_that_have_read_different_texts_are_refused(tmp_path):
    model = build("moneta")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    path = tmp_path / "batch.safetensors"
    save_memory(read(model, text(5, rows=2) * mask, mask), path, model)
    resigned(path, put("layers.1.count", 0, 4))
    with pytest.raises(ValueError, match=r"layers.1.count must be .* layers.0.count has, \[3, 5\], got \[4, 5\]"):
        load_memory(path, model)


def test_arguments_of_other_types_are_named(yaad, saved):
    cache = read(yaad, text(3))
    with pytest.raises(TypeError, match="`path` must be a string or path, got int"):
        save_memory(cache, 5, yaad)
    with pytest.raises(TypeError, match="`path` must be a string or path, got NoneType"):
        load_memory(None, yaad)
    with pytest.raises(ValueError, match="`cache` must be made for this model.*got a tuple"):
        save_memory(((torch.ones(1),),), saved, yaad)
    for model in (None, yaad.state_dict(), yaad.config):
        with pytest.raises(ValueError, match=f"`model` must be a Miras model, got {type(model).__name__}"):
            load_memory(saved, model)


def test_folders_are_not_files(yaad, tmp_path):
    with pytest.raises(ValueError, match="must be a file of `save_memory`, got a folder"):
        load_memory(tmp_path, yaad)
    with pytest.raises(IsADirectoryError):
        save_memory(read(yaad, text(3)), tmp_path, yaad)


def test_what_could_not_be_loaded_is_not_written(yaad, tmp_path):
    cache = read(yaad, text(19))
    cache.layers[1].memory.dual[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="`cache`: layers.1.dual.0 must be finite"):
        save_memory(cache, tmp_path / "text.safetensors", yaad)
    cache = read(yaad, text(19))
    with pytest.raises(
        ValueError, match=r"`cache`: attention_mask must have as many real tokens .*\[19\], got \[15\]"
    ):
        save_memory(cache, tmp_path / "text.safetensors", yaad, attention_mask=torch.arange(19)[None] > 3)
    with pytest.raises(ValueError, match="`attention_mask` must hold 0 and 1 only"):
        save_memory(cache, tmp_path / "text.safetensors", yaad, attention_mask=torch.full((1, 19), 0.5))
    with pytest.raises(ValueError, match="`attention_mask` must have the shape .* got list"):
        save_memory(cache, tmp_path / "text.safetensors", yaad, attention_mask=[[1] * 19])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("cache_class", ["dynamic", "recording", "static", "saved"])
def test_a_window_of_one_token(tmp_path, cache_class):
    """Attention to oneself alone: whatever was read before, a token's attention is a map of its own value."""
    model = build("yaad", hybrid=True, sliding_window=1)
    tokens = text(12)
    whole = model(tokens, use_cache=False).logits
    attention, seen = model.model.layers[0].self_attn, []
    attention.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output[0])))
    make = {"static": lambda: StaticCache(config=model.config, max_cache_len=16)}
    cache = make.get(cache_class, lambda: DynamicCache(config=model.config))()
    if cache_class == "recording":
        cache.activate_past_recording()
    with torch.no_grad():
        for part in tokens.split([5, 1, 3, 1, 1, 1], dim=1):
            before = cache.get_seq_length()
            logits = model(part, past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(logits, whole[:, before : before + part.shape[1]], rtol=1e-4, atol=1e-5)
            inputs, output = seen.pop()
            values = attention.v_proj(inputs).unflatten(-1, (1, 16)).repeat_interleave(2, dim=-2)
            torch.testing.assert_close(output, attention.o_proj(values.flatten(-2)), rtol=1e-4, atol=1e-6)
            if cache_class == "saved":
                assert cache.layers[0].keys.shape[2] == 0
                save_memory(cache, tmp_path / "text.safetensors", model)
                cache = load_memory(tmp_path / "text.safetensors", model)


def test_fields_younger_or_older_than_the_package(yaad, saved, monkeypatch):
    from miras_hf import memory_file

    monkeypatch.setattr(memory_file, "_checksum", lambda header, tensors: "same")
    rewritten(saved, lambda header: header.update(checksum="same"))
    rewritten(saved, lambda header: header["config"].pop("residual_clip"))
    assert load_memory(saved, yaad).get_seq_length() == 19
    with pytest.raises(ValueError, match=r"`residual_clip` \(3.0 there, 2.0 here\)"):
        load_memory(saved, build("yaad", hybrid=True, residual_clip=2.0))
    rewritten(saved, lambda header: header["config"].update(momentum=0.9))
    with pytest.raises(ValueError, match=r"another config: `momentum` \(0.9 there, unknown here\)"):
        load_memory(saved, yaad)


def test_mistakes_are_named_before_anything_is_written(yaad, tmp_path):
    path = tmp_path / "text.safetensors"
    with pytest.raises(ValueError, match=r"must have read a text, the same in all layers, got lengths \[0\]"):
        save_memory(DynamicCache(config=yaad.config), path, yaad)
    static = StaticCache(config=yaad.config, max_cache_len=32)
    with torch.no_grad():
        yaad(text(3), past_key_values=static)
    with pytest.raises(
        ValueError, match=r"StaticCache, which cannot be saved: read with `DynamicCache\(config=model.config"
    ):
        save_memory(static, path, yaad)
    with pytest.raises(ValueError, match="`cache` must be made for this model"):
        save_memory(read(build("yaad"), text(3)), path, yaad)
    with pytest.raises(ValueError, match="`model` must be a Miras model, got Linear"):
        save_memory(read(yaad, text(3)), path, torch.nn.Linear(2, 2))
    assert os.listdir(tmp_path) == []


def test_an_unfinished_write_leaves_the_old_file(yaad, saved, monkeypatch):
    def fail(descriptor):
        raise OSError("No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_memory(read(yaad, text(5)), saved, yaad)
    assert saved.read_bytes() == before and os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("part", ["layers.1", "layers.1.mlp", ""])
def test_offloaded_weights(yaad, saved, part):
    from accelerate import cpu_offload

    model = copy.deepcopy(yaad)
    cpu_offload(model.model.get_submodule(part), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"offloaded weights \(.*pass `check_weights=False`"):
        load_memory(saved, model)
    loaded = load_memory(saved, model, check_weights=False)
    assert loaded.layers[1].conv_tail.device.type == "cpu"
    assert_equal(ask(model, loaded, text(3, seed=1)), ask(yaad, read(yaad, text(19)), text(3, seed=1)))


def test_float_sizes_of_head_gates_and_windows_longer_than_the_text(tmp_path):
    model = build("miras", hybrid=True, sliding_window=64, gate_granularity="head")
    cache = read(model, text(19))
    save_memory(cache, tmp_path / "text.safetensors", model)
    loaded = load_memory(tmp_path / "text.safetensors", model)
    assert_equal(ask(model, loaded, text(3, seed=1)), ask(model, cache, text(3, seed=1)))
