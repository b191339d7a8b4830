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
"""PEFT by habit: no module is named, every adapted module learns, and what is saved, merged or decoded is the same."""

import sys

import peft
import pytest
import torch
from packaging.version import Version
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.utils import constants
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

import miras_hf
from miras_hf.compat import CACHE_NAME
from miras_hf.peft import MIXER_MODULES, MODEL_TYPES


CLASSES = {"miras": "Miras", "moneta": "Moneta", "yaad": "Yaad", "memora": "Memora"}


def make_config(model_type: str = "yaad", **kwargs):
    """A memory layer and an attention layer: every kind of module that a method may adapt."""
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    layers = {"layer_types": ["miras_memory", "sliding_attention"], "num_hidden_layers": 2, "sliding_window": 6}
    memory = {"chunk_size": 4, "memory_expansion": 2, "gate_rank": 4, "initializer_range": 0.1}
    tokens = {"pad_token_id": 0, "eos_token_id": None}
    return getattr(miras_hf, f"{CLASSES[model_type]}Config")(**{**sizes, **layers, **memory, **tokens, **kwargs})


def make_model(model_type: str = "yaad", **kwargs):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_config(model_type, **kwargs))


@pytest.fixture
def input_ids() -> Tensor:
    return torch.randint(3, 80, (2, 11), generator=torch.Generator().manual_seed(1))


def adapted(model: PeftModel) -> set[str]:
    """Names of the modules that have an adapter, without layer and wrapper."""
    return {name.split(".layers.")[-1][2:] for name in model.targeted_module_names}


def step(model, input_ids: Tensor, steps: int = 1) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model, input_ids: Tensor) -> Tensor:
    """Without gradients: forwards that keep some for a backward sum in another order."""
    return model.eval()(input_ids).logits


def generate(model, input_ids: Tensor, **kwargs) -> Tensor:
    mask = torch.ones_like(input_ids)
    return model.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **kwargs)


def test_peft_is_never_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "peft.utils.constants")
    make_config().to_dict()
    assert "peft.utils.constants" not in sys.modules


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_lora_needs_no_names_and_trains_all_it_adapts(model_type, input_ids):
    model = get_peft_model(make_model(model_type), LoraConfig())
    mixer = {f"mixer.{name}" for name in MIXER_MODULES if name != "e_proj"}  # of erase keys
    attention = {f"self_attn.{name}" for name in MIXER_MODULES if name not in ("e_proj", "g_proj")}
    assert adapted(model) == mixer | attention
    assert_only_adapters_learn(model, input_ids)


@pytest.mark.parametrize(("preset", "without"), [("rwkv-7", set()), ("hgrn2", {"k_proj", "e_proj"})])
def test_lora_adapts_the_projections_that_there_are(preset, without, input_ids):
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "chunk_size": 4}
    model = miras_hf.MirasForCausalLM(miras_hf.MirasConfig.from_preset(preset, size="tiny", **small))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    assert adapted(model) == {f"mixer.{name}" for name in MIXER_MODULES if name not in without}
    assert_only_adapters_learn(model, input_ids)


def assert_only_adapters_learn(model: PeftModel, input_ids: Tensor) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for module in model.targeted_module_names:
        assert any(module in name for name in trainable), module
    with torch.no_grad():  # what starts at zero keeps gradients from others
        for parameter in trainable.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    for name, parameter in trainable.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    model.zero_grad()
    step(model, input_ids)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainable), name


METHODS = {
    "all_linear": LoraConfig(target_modules="all-linear"),
    "dora": LoraConfig(use_dora=True),
    "rslora": LoraConfig(use_rslora=True),
    "ia3": IA3Config(),
    "oft": peft.OFTConfig(r=2, oft_block_size=0),
    "loha": peft.LoHaConfig(),
    "vera": peft.VeraConfig(r=4),
    "norms": peft.LNTuningConfig(),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's word for any RMS norm
def test_other_methods_need_no_names_and_train_all_they_adapt(method, input_ids):
    model = get_peft_model(make_model(), METHODS[method])
    if method == "ia3":  # the gates of the mixer have a `down_proj` as well
        assert {name for name in adapted(model) if "down_proj" in name} == {"mlp.down_proj"}
    if method == "all_linear":
        assert {"mixer.eta.up_proj", "mixer.alpha.down_proj", "mixer.delta.up_proj", "mlp.gate_proj"} <= adapted(model)
    assert_only_adapters_learn(model, input_ids)


def test_defaults_follow_llama_but_for_what_memories_need():
    miras_hf.YaadConfig().to_dict()
    tables = {name: table for name, table in vars(constants).items() if name.endswith("_MODULES_MAPPING")}
    tables = {name: table for name, table in tables.items() if "llama" in table}
    assert len(tables) > 10
    erasing = miras_hf.MirasForCausalLM(miras_hf.MirasConfig.from_preset("rwkv-7", size="tiny", vocab_size=32))
    names = {name.split(".", 2)[-1] for m in (make_model(), erasing) for name, _ in m.model.named_modules()}
    for name, table in tables.items():
        for model_type in MODEL_TYPES:
            assert table[model_type], name
            for module in table[model_type]:
                assert module == "norm" or any(found.endswith(f".{module}") or found == module for found in names)
    assert constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING["yaad"] == ["mlp.down_proj"]


def test_an_entry_of_the_user_stays(monkeypatch):
    monkeypatch.setitem(constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, "yaad", ["v_proj"])
    model = get_peft_model(make_model(), LoraConfig())
    assert adapted(model) == {"mixer.v_proj", "self_attn.v_proj"}


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "memory"])
def test_save_load_and_merge_give_equal_logits(method, input_ids, tmp_path):
    config = {
        "lora": LoraConfig(),
        "dora": LoraConfig(use_dora=True),
        "ia3": IA3Config(),
        "memory": LoraConfig(modules_to_save=["memory"]),
    }[method]
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config)
    plain = logits(model, input_ids)
    step(model, input_ids, 3)
    model.eval()
    trained = logits(model, input_ids)
    assert (trained - plain).abs().max() > 1e-3

    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(again, input_ids), trained)
    found = generate(model, input_ids)
    assert torch.equal(generate(again, input_ids), found)

    merged = again.merge_and_unload()
    assert type(merged).__name__ == "YaadForCausalLM"
    assert not any("lora" in name or "ia3" in name or "modules_to_save" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged, input_ids), trained, rtol=1e-5, atol=1e-5)
    assert torch.equal(generate(merged, input_ids), found)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded, input_ids), logits(merged, input_ids))


def test_learned_initial_memory_trains_beside_an_adapter(input_ids):
    model = get_peft_model(make_model(), LoraConfig(modules_to_save=["memory"]))
    wrapper = model.base_model.model.model.layers[0].mixer.memory
    kept = {name: p.clone() for name, p in wrapper.original_module.named_parameters()}
    losses = step(model, input_ids, 8)
    assert losses[-1] < losses[0]
    for name, parameter in wrapper.modules_to_save["default"].named_parameters():
        assert not torch.equal(parameter, kept[name]), name
        assert torch.equal(wrapper.original_module.get_parameter(name), kept[name]), name

    model.eval()
    trained = logits(model, input_ids)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, input_ids), logits(make_model(), input_ids))

    # decoding token by token, and in generate(), reads from the trained memory
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        steps = [model(token, past_key_values=cache, use_cache=True).logits for token in input_ids.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), trained, rtol=1e-4, atol=1e-5)
    assert torch.equal(generate(model, input_ids), generate(model, input_ids, use_cache=False))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "config", [{"trainable_token_indices": [5, 9]}, {"target_modules": ["q_proj", "embed_tokens"]}], ids=list
)
def test_embeddings_are_adapted_too(config, tied, input_ids, tmp_path):
    """TRL adapts them itself where a chat template brings new tokens."""
    input_ids[:, 0] = 5
    model = get_peft_model(make_model(tie_word_embeddings=tied), LoraConfig(task_type="CAUSAL_LM", **config))
    base = logits(make_model(tie_word_embeddings=tied), input_ids)
    losses = step(model, input_ids, 8)
    trained = logits(model, input_ids)
    assert losses[-1] < losses[0] and not torch.allclose(trained, base, atol=1e-4)
    assert torch.equal(generate(model, input_ids), generate(model, input_ids, use_cache=False))
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(make_model(tie_word_embeddings=tied), tmp_path)
    torch.testing.assert_close(logits(reloaded, input_ids), trained, rtol=1e-5, atol=1e-5)
    if not (tied and "target_modules" in config):  # merged, a tied head would be adapted as well: PEFT warns of it
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(logits(merged, input_ids), trained, rtol=1e-4, atol=1e-5)


needs_new_peft = pytest.mark.skipif(
    CACHE_NAME == "cache" and Version(peft.__version__) < Version("0.22"),
    reason="Transformers 5.24 asks for PEFT 0.22 here",
)


@needs_new_peft
def test_adapters_of_transformers_itself(input_ids, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "base")
    plain = logits(model, input_ids)
    model.add_adapter(LoraConfig(init_lora_weights=False), adapter_name="one")
    tuned = logits(model, input_ids)
    assert (tuned - plain).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"), adapter_name="two")
    torch.testing.assert_close(logits(again, input_ids), tuned)
    again.disable_adapters()
    assert torch.equal(logits(again, input_ids), plain)


def test_classification_heads_are_trained_and_saved(input_ids, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(make_config(num_labels=3))
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))
    model(input_ids=input_ids, labels=torch.tensor([0, 2])).loss.backward()
    head = model.base_model.model.score.modules_to_save["default"].weight
    assert head.grad.abs().max() > 0
    with torch.no_grad():
        head.add_(1.0)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(logits(again, input_ids), logits(model, input_ids))


def test_prompt_tuning_trains_and_generates(input_ids, tmp_path):
    base = make_model()
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable == ["prompt_encoder.default.embedding.weight"]
    losses = step(model, input_ids, 8)
    assert losses[-1] < losses[0]

    model.eval()
    virtual = model.get_prompt(batch_size=2)
    embeds = torch.cat((virtual, base.get_input_embeddings()(input_ids)), dim=1)
    torch.testing.assert_close(logits(model, input_ids), base(inputs_embeds=embeds).logits)
    if CACHE_NAME == "cache" and Version(peft.__version__) < Version("0.22"):
        with pytest.raises(ValueError, match="needs PEFT 0.22 or newer"):
            generate(model, input_ids)
        return
    found = generate(model, input_ids)
    assert torch.equal(found[:, input_ids.shape[1] :], base.generate(inputs_embeds=embeds, max_new_tokens=6))
    model.save_pretrained(tmp_path)
    assert torch.equal(generate(PeftModel.from_pretrained(make_model(), tmp_path), input_ids), found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefix_tuning_is_refused(checkpointing, input_ids):
    model = get_peft_model(make_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    if checkpointing:  # layers get no cache then, and would train without the prefix in silence
        model.base_model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="prefix tuning.*not possible.*prompt tuning and LoRA are"):
        model.train()(input_ids=input_ids, labels=input_ids)
    with pytest.raises(ValueError, match="prefix tuning.*not possible"):
        generate(model.eval(), input_ids)


@pytest.mark.parametrize(
    "name", ["memory.initial_state.0", "initial_state.1", "memory.norm_weight", "memory.norm_bias"]
)
def test_bare_parameters_of_a_memory_are_refused(name):
    config = LoraConfig(target_modules=[], target_parameters=[name])
    with pytest.raises(ValueError, match=r"`target_parameters`.*`initial_state`.*`modules_to_save=\[\"memory\"\]`"):
        get_peft_model(make_model(), config)


def test_bare_parameters_that_can_be_adapted_are(input_ids):
    config = LoraConfig(target_modules=[], target_parameters=["k_conv.weight", "eta.up_proj.weight"], r=2)
    model = get_peft_model(make_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted = model.base_model.model.model.layers[0].mixer.k_conv
    weight = adapted.base_layer.weight + adapted.get_delta_weight("default")

    expected = make_model()
    mixer = expected.model.layers[0].mixer
    with torch.no_grad():
        mixer.k_conv.weight.copy_(weight)
        up_proj = model.base_model.model.model.layers[0].mixer.eta.up_proj
        mixer.eta.up_proj.weight.add_(up_proj.get_delta_weight("default"))
    torch.testing.assert_close(logits(model, input_ids), logits(expected, input_ids))
    assert (logits(expected, input_ids) - logits(make_model(), input_ids)).abs().max() > 1e-3
    assert torch.equal(generate(model, input_ids), generate(expected, input_ids))
