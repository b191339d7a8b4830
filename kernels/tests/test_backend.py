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
"""Whole models on the kernels: the same logits and tokens as on PyTorch, one graph when compiled, kind refusals."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.generation import CompileConfig
from transformers.utils import logging

import miras_hf
from miras_hf.backend import MemoryBackend, kernel_choices
from miras_hf.memory import L2, GatedMLPMemory, MirasRule, MLPMemory, VectorMemory


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = {
    "moneta": (miras_hf.MonetaConfig, {"use_rope": True}),
    "yaad": (miras_hf.YaadConfig, {"use_rope": True}),
    "memora": (miras_hf.MemoraConfig, {}),
    "mirror": (miras_hf.MonetaConfig, {"lq_map": "mirror"}),
    "hybrid": (miras_hf.YaadConfig, {"use_rope": True, "attention_layers": [1], "sliding_window": 8}),
    "matrix": (miras_hf.MirasConfig, {"memory_architecture": "matrix", "gate_granularity": "head"}),
    "last": (miras_hf.YaadConfig, {"update_layers": "last"}),
    "none": (miras_hf.MirasConfig, {"memory_architecture": "matrix", "retention": "none"}),
}
THREE = ["moneta", "yaad", "memora"]
SLOW_MONETA, SLOW_MIRROR, SLOW_HYBRID = (
    pytest.param(family, marks=pytest.mark.slow) for family in ("moneta", "mirror", "hybrid")
)
SIZE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "chunk_size": 16,
    "initializer_range": 0.1,
    # at 0.02 steps of AdamW make 1e-4 of the loss out of what rounding leaves between two backends
    "conv_initializer_range": None,
    "pad_token_id": 0,
}


def make_models(family, **options):
    config_class, extra = FAMILIES[family]
    torch.manual_seed(0)
    config = config_class(**SIZE | extra | options, memory_backend="pytorch")
    slow = AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    fast = AutoModelForCausalLM.from_config(config_class(**SIZE | extra | options, memory_backend="triton"))
    fast.load_state_dict(slow.state_dict())
    return slow, fast.to(DEVICE).eval()


def calls_of(monkeypatch, name="_by_kernel"):
    """Counts what the operator is called for."""
    calls = []
    method = getattr(MemoryBackend, name)

    def counted(self, *args, **kwargs):
        calls.append(args[0].shape)
        return method(self, *args, **kwargs)

    monkeypatch.setattr(MemoryBackend, name, counted)
    return calls


@pytest.fixture
def ids():
    return torch.randint(3, 99, (2, 21), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits(family, ids, monkeypatch):
    slow, fast = make_models(family)
    calls = calls_of(monkeypatch)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    tolerance = {"rtol": 1e-4, "atol": 1e-4 if family == "memora" else 1e-5}
    torch.testing.assert_close(fast(input_ids=ids).logits, slow(input_ids=ids).logits, **tolerance)
    padded = [model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in (fast, slow)]
    torch.testing.assert_close(*padded, **tolerance)
    positions = torch.cat((torch.arange(9), torch.arange(12)))[None].to(DEVICE)
    packed = [model(input_ids=ids[:1], position_ids=positions).logits for model in (fast, slow)]
    torch.testing.assert_close(*packed, **tolerance)
    assert len(calls) == 3 * fast.config.layer_types.count("miras_memory")


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, ids, monkeypatch):
    """Left-padded rows whose chunks end at different tokens, a prompt read in pieces."""
    slow, fast = make_models(family)
    calls = calls_of(monkeypatch)
    few = calls_of(monkeypatch, "_decode")
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    options = {"max_new_tokens": 5, "do_sample": False, "prefill_chunk_size": 18, "attention_mask": mask}
    expected = slow.generate(ids, **options)
    few.clear()
    assert torch.equal(fast.generate(ids, **options), expected)
    # the prompt's first piece by the forward kernel, its last three tokens and all others by the decode kernel
    assert {shape[1] for shape in calls} == {18} and {shape[1] for shape in few} == {3, 1}


@torch.no_grad()
def test_tokens_that_kernels_have_read_are_taken_back(ids, monkeypatch):
    """Over the ends of chunks: a prompt by the forward kernel, pieces and single tokens by the decode kernel."""
    slow, fast = make_models("yaad", num_hidden_layers=1)
    ids = torch.cat((ids, ids.flip(1)), dim=1)[:1]
    few = calls_of(monkeypatch, "_decode")
    cache = DynamicCache(config=fast.config)
    cache.activate_past_recording()
    for first, last in ((0, 29), (29, 34), (34, 35)):  # chunks of 16 end in the first two
        fast(input_ids=ids[:, first:last], cache=cache)
    assert [shape[1] for shape in few] == [14, 2, 3, 1]
    for length, tokens in ((33, 4), (31, 1), (14, 3)):
        cropped = copy.deepcopy(cache)
        cropped.crop(length - 35)
        logits = fast(input_ids=ids[:, length : length + tokens], cache=cropped).logits
        expected = slow(input_ids=ids[:, : length + tokens], use_cache=False).logits[:, length:]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("switch", ["conv_bias", "value_skip", "tied_step"])
@torch.no_grad()
def test_what_kernels_do_not_know_around_a_memory_is_not_left_to_them(switch, ids, monkeypatch):
    slow, fast = make_models("yaad", num_hidden_layers=1, **{switch: True})
    for name, p in slow.named_parameters():
        if name.endswith(("_conv.bias", "skip.weight")):
            p.normal_()
    fast.load_state_dict(slow.state_dict())
    few, cache = calls_of(monkeypatch, "_decode"), DynamicCache(config=fast.config)
    parts = [fast(input_ids=ids[:, a:b], cache=cache).logits for a, b in ((0, 18), (18, 20), (20, 21))]
    torch.testing.assert_close(torch.cat(parts, dim=1), slow(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert [shape[1] for shape in few] == [2, 1]


def test_generate_with_beams(ids):
    slow, fast = make_models("yaad")
    options = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    assert torch.equal(fast.generate(ids, **options), slow.generate(ids, **options))


@pytest.mark.parametrize("family", [SLOW_MONETA, "hybrid"])
def test_compiled_generation(family, ids):
    """One graph without a break serves every token, also over the end of a chunk."""
    slow, fast = make_models(family)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    options = {"max_new_tokens": 7, "do_sample": False, "attention_mask": mask}
    compile_config = CompileConfig(fullgraph=True, mode=None, backend="aot_eager")
    compile_config._compile_all_devices = True  # `generate()` would leave CPUs alone
    torch._dynamo.reset()
    counters.clear()
    static = {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(fast.generate(ids, **options, **static), slow.generate(ids, **options))
    # the window's own layers, Transformers', are traced again for a length that grows
    assert counters["stats"]["unique_graphs"] == (1 if family == "moneta" else 2)


@torch.no_grad()
def test_bfloat16_model(ids):
    slow, fast = (model.to(torch.bfloat16) for model in make_models("moneta"))
    one, other = (model(input_ids=ids).logits.float() for model in (fast, slow))
    assert (one - other).abs().max() <= 0.05 * other.abs().max()


@torch.no_grad()
def test_whole_model_is_one_graph(ids):
    _, fast = make_models("yaad")
    expected = fast(input_ids=ids, use_cache=False).logits
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["moneta", SLOW_MIRROR, "memora", SLOW_HYBRID, "matrix", "last", "none"])
def test_training_gives_the_same_losses(family, ids, monkeypatch):
    """Steps of AdamW, packs and pads among them, with the memory's own cache in the way as in a loop by hand."""
    models = make_models(family)
    calls = calls_of(monkeypatch)
    losses = []
    for model in models:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        of_model = []
        for step in range(3):
            positions = torch.cat((torch.arange(9), torch.arange(12)))[None].to(DEVICE) if step == 2 else None
            batch = ids[:1] if step == 2 else ids
            loss = model(input_ids=batch, position_ids=positions, labels=batch, use_cache=step == 1).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            of_model.append(loss.item())
        losses.append(torch.tensor(of_model))
    assert len(calls) == 3 * models[1].config.layer_types.count("miras_memory")
    torch.testing.assert_close(losses[1], losses[0], rtol=3e-5, atol=3e-5)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("family", THREE)
def test_fifty_steps_give_the_same_losses(family):
    """In float32; rounding grows from step to step, to 7e-5 of a loss near 5 in models of two layers."""
    losses = []
    for model in make_models(family, num_hidden_layers=1):
        draw = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
        of_model = []
        for _ in range(50):
            batch = torch.randint(3, 99, (1, 17), generator=draw).to(DEVICE)
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            of_model.append(loss.item())
        losses.append(torch.tensor(of_model))
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-4)


def test_training_of_what_kernels_do_not_know_takes_the_pytorch_path(ids, monkeypatch):
    slow, fast = (model.double() for model in make_models("moneta"))
    with pytest.raises(ValueError, match="backend is 'triton': the dtype is torch.float64"):
        fast(input_ids=ids)
    for module in fast.modules():
        if hasattr(module, "rule"):
            module.backend.backend = "auto"
    calls = calls_of(monkeypatch)
    one, other = (model(input_ids=ids, labels=ids).loss for model in (fast, slow))
    assert not calls and torch.equal(one, other)
    one.backward()


def test_training_step_is_one_graph(ids):
    slow, fast = make_models("yaad")
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    compiled(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    slow(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for (name, one), other in zip(fast.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_checkpointing_and_adapters_train_through_the_kernels(ids, monkeypatch):
    from peft import LoraConfig, get_peft_model

    slow, fast = make_models("moneta")
    calls = calls_of(monkeypatch)
    fast.gradient_checkpointing_enable()
    gradients = []
    for model in (slow, fast):
        torch.manual_seed(1)
        adapted = get_peft_model(model, LoraConfig(init_lora_weights=False)).train()
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
        assert all(grad.abs().sum() > 0 for grad in found.values())
        gradients.append(found)
    assert calls and gradients[0].keys() == gradients[1].keys()
    for name, one in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], one, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_slow_paths_are_said_in_compiled_models_too(monkeypatch):
    said = []
    monkeypatch.setattr(miras_hf.backend.logger, "warning_once", said.append)

    def model(x):
        miras_hf.backend._say_once("slow")
        return x + 1

    torch.compile(model, backend="eager", fullgraph=True)(torch.ones(1))
    assert said == ["slow"]


def test_environment_wins_over_the_config(monkeypatch):
    rule = MirasRule(attentional_bias=L2(), chunk_size=16)
    assert MemoryBackend(rule, "pytorch").backend == "pytorch"
    monkeypatch.setenv("MIRAS_BACKEND", "triton")
    assert MemoryBackend(rule, "pytorch").backend == "triton"
    monkeypatch.setenv("MIRAS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="`MIRAS_BACKEND` must be one of"):
        MemoryBackend(rule)


def test_rules_that_kernels_do_not_know_say_why(ids):
    class Own(L2):
        pass

    choices, reason = kernel_choices(MirasRule(attentional_bias=Own(), chunk_size=16))
    assert choices is None and "Own" in reason
    for memory in (VectorMemory, GatedMLPMemory):
        choices, reason = kernel_choices(MirasRule(memory(), L2(), chunk_size=16))
        assert choices is None and reason == f"kernels do not know {memory.__name__}"
    choices, reason = kernel_choices(MirasRule(attentional_bias=L2(), chunk_size=8))
    assert choices is None and "`chunk_size`" in reason and "8" in reason
    slow, fast = make_models("yaad", chunk_size=8)
    with pytest.raises(ValueError, match="backend is 'triton': `chunk_size` must be one of"), torch.no_grad():
        fast(input_ids=ids)
    assert MemoryBackend(MirasRule(MLPMemory(expansion=2), L2(), chunk_size=16)).choices.expansion == 2
    for changed in ({"depth": 3}, {"depth": 1}, {"norm": False}, {"residual": False}):
        ((name, value),) = changed.items()
        choices, reason = kernel_choices(MirasRule(MLPMemory(**changed), L2(), chunk_size=16))
        assert choices is None and reason == f"kernels do not know `memory_{name}={value}`"
    assert MemoryBackend(MirasRule(MLPMemory(update_layers="last"), L2(), chunk_size=16)).choices.fixed == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the slow path is only slow where there is a GPU")
def test_slow_path_on_a_gpu_is_said_once(ids, caplog):
    slow, _ = make_models("yaad", chunk_size=8)
    for module in slow.modules():
        if hasattr(module, "rule"):
            module.backend.backend = "auto"
    logging.enable_propagation()
    with torch.no_grad():
        slow(input_ids=ids)
        slow(input_ids=ids)
    assert sum("slow PyTorch path" in record.message for record in caplog.records) == 1
