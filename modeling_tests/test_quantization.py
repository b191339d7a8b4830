# Copyright 2026 The miras-hf authors..
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
"""Quantised weights on a CPU: bitsandbytes int8 and nf4, torchao int8 and int4. Gates and memory stay as they are."""

import re

import bitsandbytes
import pytest
import torch
from memory_effects import SENSITIVE, assert_memory_matters, relative_error
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, TorchAoConfig

from miras_hf import MemoraConfig, MirasConfig, MirasForCausalLM, MonetaConfig, YaadConfig
from miras_hf.modeling_miras import MirasLowRankGate
from miras_hf.presets import MODELS


SIZES = {"vocab_size": 80, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
MEMORY = {"num_attention_heads": 2, "memory_expansion": 2, "eos_token_id": None, "use_rope": True, **SENSITIVE}

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
BACKENDS = {
    "bitsandbytes_int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes_nf4": lambda: BitsAndBytesConfig(**NF4),
    "torchao_int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao_int4": lambda: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4)),
}
# half the largest gap between two levels, of a weight's row's largest: 127 steps, 15 steps over both signs, and of the
# 16 quantiles of nf4 the two lowest, -1 and -0.6962
HALF_GAPS = {
    "bitsandbytes_int8": 0.5 / 127,
    "bitsandbytes_nf4": 0.5 * (1 - 0.6962),
    "torchao_int8": 0.5 / 127,
    "torchao_int4": 0.5 / 7,
}
# of a model with the same rounding: bitsandbytes multiplies in half precisions
TOLERANCES = {"bitsandbytes_int8": 0.03, "bitsandbytes_nf4": 0.03, "torchao_int8": 1e-4, "torchao_int4": 1e-4}


@pytest.fixture(scope="module", params=[MonetaConfig, YaadConfig, MemoraConfig], ids=lambda c: c.model_type)
def folder(request, tmp_path_factory):
    """A saved model of every kind."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(request.param(**SIZES, **MEMORY)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def input_ids() -> Tensor:
    return torch.randint(3, 80, (2, 14), generator=torch.Generator().manual_seed(1))


def load(folder, backend: str | None = None, **kwargs):
    if backend is not None:
        kwargs["quantization_config"] = BACKENDS[backend]()
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


def is_quantised(module: nn.Module) -> bool:
    return type(module) is not nn.Linear or type(module.weight) is not nn.Parameter


@pytest.mark.parametrize("name", MODELS)
def test_every_gate_of_every_model_is_kept(name):
    """Whatever gates a published model has, by the class that they have in common."""
    with torch.device("meta"):
        model = MirasForCausalLM(MirasConfig.from_preset(name, size="tiny"))
    gates = [name for name, module in model.named_modules() if isinstance(module, MirasLowRankGate)]
    kept = re.compile("|".join(model._keep_in_fp32_modules))
    assert gates and [gate for gate in gates if not kept.search(gate)] == []


@torch.no_grad()
def logits(model, input_ids: Tensor) -> Tensor:
    return model(input_ids).logits


@torch.no_grad()
def decoded(model, input_ids: Tensor) -> Tensor:
    """Logits token by token."""
    cache = DynamicCache(config=model.config)
    steps = [model(token, past_key_values=cache, use_cache=True).logits for token in input_ids.split(1, dim=1)]
    return torch.cat(steps, dim=1)


def rounded_weight(module: nn.Linear) -> Tensor:
    """The weight that a quantised module stands for, float32."""
    weight = module.weight
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return weight.data.float() * weight.SCB[:, None] / 127
    return weight.dequantize().float()


def round_activations(module: nn.Linear, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """What LLM.int8() multiplies with: every token in steps of a 127th of its largest feature, except features that are 6
    or larger for any token, which are left alone."""
    (x,) = inputs
    outliers = (x.abs() >= 6).flatten(0, -2).any(0)
    step = x.masked_fill(x.abs() >= 6, 0.0).abs().amax(-1, keepdim=True) / 127
    return (torch.where(outliers, x, step * (x / step).round()),)


@torch.no_grad()
def round_as(plain: nn.Module, model: nn.Module, half_gap: float) -> None:
    """Gives a float32 model the rounding of the other one; weights are within half a gap of its own."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_quantised(module):
            weight, rounded = plain.get_submodule(name).weight, rounded_weight(module)
            largest = weight.abs().amax(1, keepdim=True)
            # bitsandbytes rounds to float16 before
            assert ((rounded - weight).abs() <= (1.01 * half_gap + 2**-11) * largest).all(), name
            assert not torch.equal(rounded, weight), name
            weight.copy_(rounded)
            if isinstance(module, bitsandbytes.nn.Linear8bitLt):
                plain.get_submodule(name).register_forward_pre_hook(round_activations)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantised_models_read_decode_and_leave_gates_and_memory_alone(backend, folder, input_ids):
    plain, model = load(folder), load(folder, backend)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    gates = {name for name in linear if any(f"mixer.{gate}." in name for gate in ("eta", "alpha", "delta"))}
    assert len(gates) >= 8
    assert {name for name, module in linear.items() if not is_quantised(module)} == gates | {"lm_head"}
    for layer in range(2):
        for mine, its in zip(*(m.model.layers[layer].mixer.memory.parameters() for m in (model, plain))):
            assert torch.equal(mine, its)

    # before the first forward, in which bitsandbytes packs 4-bit weights for CPUs
    round_as(plain, model, HALF_GAPS[backend])
    expected = assert_memory_matters(plain, lambda model: model(input_ids).logits, TOLERANCES[backend])
    found = logits(model, input_ids)
    assert relative_error(found, expected) < TOLERANCES[backend]

    steps, expected_steps = decoded(model, input_ids), decoded(plain, input_ids)
    assert relative_error(steps, expected_steps) < TOLERANCES[backend]
    # rounding decides on which side of its jump Yaad's loss is, and bitsandbytes rounds activations, too
    tolerance = 2e-2 if backend.startswith("bitsandbytes") else 1e-4
    if backend == "bitsandbytes_int8":
        # a feature that is large for one token is rounded for no token of a call, so that a token alone is rounded otherwise:
        # in float32 as well
        tolerance = max(tolerance, 1.2 * relative_error(expected_steps, expected))
    assert relative_error(steps, found) < tolerance

    mask = torch.ones_like(input_ids)
    text = model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert text.shape == (2, 20)


@pytest.mark.parametrize("backend", ["bitsandbytes_int8", "bitsandbytes_nf4", "torchao_int8"])
def test_quantised_models_are_saved_as_they_are(backend, folder, input_ids, tmp_path):
    model = load(folder, backend)
    # before the first forward, in which bitsandbytes packs 4-bit weights for CPUs and would save them so
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    linear = again.model.layers[0].mixer.q_proj
    assert is_quantised(linear) and not is_quantised(again.model.layers[0].mixer.eta.up_proj)
    assert torch.equal(logits(again, input_ids), logits(model, input_ids))


@pytest.mark.parametrize("backend", ["bitsandbytes_int8", "bitsandbytes_nf4"])
def test_qlora_trains_adapters_on_a_frozen_base(backend, folder, input_ids, tmp_path):
    base = prepare_model_for_kbit_training(load(folder, backend), use_gradient_checkpointing=True)
    model = get_peft_model(base, LoraConfig(modules_to_save=["memory"])).train()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(trainable) == 2 * (5 * 2 + 4)  # layers x (adapted modules x (A, B) + the memory's parameters)
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(
        prepare_model_for_kbit_training(load(folder, backend), use_gradient_checkpointing=False), tmp_path
    )
    assert torch.equal(logits(again.eval(), input_ids), logits(model.eval(), input_ids))


def test_float16_keeps_gates_in_float32(folder, input_ids):
    model = load(folder, dtype=torch.float16)
    for name, parameter in model.named_parameters():
        gate = any(f"mixer.{gate}." in name for gate in ("eta", "alpha", "delta"))
        assert parameter.dtype == (torch.float32 if gate else torch.float16), name
    expected = assert_memory_matters(load(folder), lambda model: model(input_ids).logits, 2e-2)
    assert relative_error(logits(model, input_ids), expected) < 2e-2
    assert logits(model.half(), input_ids).isfinite().all()
