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
"""Fields that say more about a choice: they change what a model computes, or they are refused, and nothing lies between."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from miras_hf import MemoraConfig, MirasConfig, MirasForCausalLM, MonetaConfig, YaadConfig, config_meaning
from miras_hf.config_meaning import means_something_with


# far enough from the defaults to be seen in what a small model computes
OTHER = {
    "initial_hidden_scale": 1.0,
    "memory_depth": 3,
    "memory_expansion": 2,
    "memory_norm": False,
    "memory_residual": False,
    "update_layers": "last",
    "memory_norm_eps": 3e-1,
    "lp_power": 1.5,
    "lp_sign": "tanh",
    "lp_sharpness": 0.1,
    "lp_error_cap": 1e-2,
    "lq_power": 3.0,
    "lq_map": "mirror",
    "lq_norm_floor": 90.0,
    "simplex_mass": 0.1,
    "bregman_bound": 1e-2,
    "elastic_net_threshold": 3.0,
    "elastic_net_decay_threshold": 0.3,
    "weight_cap": 1e-2,
    "gradient_at": "previous",
    "erase_key": "own",
    "ridge_floor": 3.0,
    "gate_rank": 2,
    "num_key_value_heads": 1,
    "attention_dropout": 0.5,
    "qk_norm": True,
    "sliding_window": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3.0},
    "learned_retention": False,
    "min_half_life": 2.0,
    "max_half_life": 64.0,
    "min_log_alpha": -1e-9,
}
CHOICES = {
    "attentional_bias": ["l2", "lp", "huber_coordinate", "huber_norm", "huber_mixture", "robust", "dot", "l1"],
    "retention": ["none", "decay", "lq", "kl", "chi_squared", "bregman", "elastic_net", "elastic_net_decay"],
    "memory_architecture": ["mlp", "gated_mlp", "matrix"],
    "memory_depth": [1, 2],
    "memory_norm": [True, False],
    "learning_algorithm": ["gradient_descent", "delta_rule", "exact"],
    "lp_sign": ["exact", "tanh"],
    "gate_granularity": ["channel", "head"],
    "attention_layers": [[], [0]],
    "full_attention_layers": [[], [1]],
    "use_rope": [True, False],
}
SMALL = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"chunk_size": 2, "initializer_range": 0.5}


def computed(config: MirasConfig, monkeypatch) -> dict[str, torch.Tensor]:
    """What a model of this config computes, and the weights it has."""
    monkeypatch.setattr(MirasConfig, "validate", lambda self: None)
    torch.manual_seed(0)
    model = MirasForCausalLM(config).train()
    ids = torch.randint(16, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for gate in (module for name, module in model.named_modules() if name.endswith((".eta", ".delta"))):
            gate.bias += 0.5
        torch.manual_seed(0)
        result = dict(model.named_parameters()) | {"logits": model(ids).logits}
    monkeypatch.undo()
    return result


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", OTHER)
def test_a_field_changes_what_is_computed_or_is_refused(name, monkeypatch):
    about = {choice for choices in means_something_with()[name] for choice in choices} - {name}
    if about & {"has_attention", "has_sliding_attention"}:
        about = about - {"has_attention", "has_sliding_attention"} | {"attention_layers", "full_attention_layers"}
    else:
        about = about - {"has_retention"} | {"retention"}
    outcomes = set()
    for values in itertools.product(*(CHOICES[choice] for choice in sorted(about))):
        choices = dict(zip(sorted(about), values, strict=True))
        if choices.get("attention_layers") and choices.get("full_attention_layers"):  # no memory is left
            continue
        if choices.get("attentional_bias") != "lp" and choices.get("lp_sign") == "tanh":
            continue
        if choices.get("memory_architecture") != "mlp" and choices.get("memory_depth") == 1:
            continue
        if choices.get("memory_architecture") == "matrix" and choices.get("memory_norm") is False:
            continue
        if choices.get("learning_algorithm") in ("delta_rule", "exact"):
            choices |= {"memory_architecture": "matrix", "residual_clip": None, "retention": "decay"}
        if choices.get("learning_algorithm") == "exact":
            choices |= {"weight_cap": None, "gate_granularity": "head"}
        default = MirasConfig(**SMALL, **choices)
        other = copy.deepcopy(default)
        setattr(other, name, OTHER[name])
        means_something = not same(computed(default, monkeypatch), computed(other, monkeypatch))
        outcomes.add(means_something)
        if means_something:
            assert getattr(MirasConfig(**SMALL, **choices, **{name: OTHER[name]}), name) == OTHER[name]
        else:
            with pytest.raises(StrictDataclassError, match=f"`{name}` means nothing without .*got .*: leave it at "):
                MirasConfig(**SMALL, **choices, **{name: OTHER[name]})
            with pytest.raises(StrictDataclassError, match=f"`{name}` means nothing without"):
                MirasForCausalLM(other)
    assert outcomes == {True, False}


def test_fields_that_are_not_in_the_table_always_mean_something(monkeypatch):
    # a new field is either put into the table or seen to change a model of other choices
    assert OTHER.keys() == means_something_with().keys()
    other = {
        "vocab_size": 17, "hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 1,
        "head_dim": 6, "hidden_act": "relu", "initializer_range": 0.1, "rms_norm_eps": 0.5, "attention_bias": True,
        "attention_output_bias": True, "mlp_bias": True, "memory_num_key_value_heads": 1, "conv_act": "linear",
        "attention_layers": [1], "full_attention_layers": [1], "attentional_bias": "lp", "retention": "lq", "residual_clip": 1e-3,
        "memory_architecture": "matrix", "decay_target": "zero", "chunk_size": 3, "gate_granularity": "head",
        "eta_max": 1e-3, "use_rope": True,
        "learned_step": False, "writes_per_token": 2,
        "value_norm": False, "initial_memory_scale": 5.0, "conv_initializer_range": 0.5, "conv_kernel_size": 2, "output_gate_act": "relu", "output_norm_eps": 0.5, "tie_word_embeddings": True,
        "tied_step": True, "value_skip": True, "conv_bias": True, "output_gate_first": True, "output_norm_groups": 1, "memory_num_query_key_heads": 1,
    }  # fmt: skip
    # for others than the decoder: tools, tokenizers, how it is run; and those that ask for other choices: gates of heads,
    # whose parameters `test_momentum.py` counts, or the dot product, see `test_presets.py`
    told = {"max_position_embeddings", "use_cache", "chunk_size_feed_forward", "pad_token_id", "bos_token_id"}
    told |= {
        "eos_token_id",
        "memory_backend",
        "learning_algorithm",
        "tied_write_key",
        "query_key_norm",
        "base_model",
        "license",
    }
    own = {field.name for field in dataclasses.fields(MirasConfig)}
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"chunk_size_feed_forward"}
    assert own == other.keys() | told | means_something_with().keys()
    for fields in ({}, {"attentional_bias": "huber_coordinate", "retention": "kl", "memory_architecture": "matrix"}):
        default = computed(MirasConfig(**SMALL, **fields), monkeypatch)
        for name in other.keys() - fields.keys():
            assert not same(default, computed(MirasConfig(**{**SMALL, **fields, name: other[name]}), monkeypatch)), (
                name
            )


def test_the_message_names_every_choice():
    for fields, words in {
        "lp_sharpness=3.0 attentional_bias=lp": "`attentional_bias='lp'` and `lp_sign='tanh'`, got 3.0: leave it at 10.0",
        "weight_cap=3.0 retention=kl": "`retention='none'` or `retention='decay'` or `retention='lq'` or "
        "`retention='bregman'` or `retention='elastic_net'` or `retention='elastic_net_decay'`, got 3.0: leave it at 2.0",
        "sliding_window=8": "sliding-window attention layers .`attention_layers` or `layer_types`., got 8: leave it at "
        "2048",
        "attention_dropout=0.5": "attention layers .`attention_layers`, `full_attention_layers` or `layer_types`., got 0.5: "
        "leave it at 0.0",
    }.items():
        values = dict(field.split("=") for field in fields.split())
        values = {k: json.loads(v) if v[0].isdigit() else v for k, v in values.items()}
        with pytest.raises(StrictDataclassError, match=f"`{[*values][0]}` means nothing without {words}, or choose"):
            MirasConfig(**values)


def test_without_a_memory_its_fields_mean_nothing(monkeypatch):
    alone = {name: value for name, value in SMALL.items() if name != "chunk_size"} | {"full_attention_layers": [0, 1]}
    own = {field.name for field in dataclasses.fields(MirasConfig)}
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"chunk_size_feed_forward"}
    # far from what memories start with: whatever is not refused must change what is computed, or be told to others
    other = OTHER | {
        "memory_num_key_value_heads": 1, "conv_act": "linear", "attentional_bias": "lp", "retention": "lq",
        "residual_clip": 1e-3, "memory_architecture": "matrix", "decay_target": "zero", "chunk_size": 3,
        "gate_granularity": "head", "eta_max": 1e-3, "min_log_alpha": -1e-9, "min_half_life": 2.0, "max_half_life": 64.0,
        "use_rope": True, "learned_step": False, "learned_retention": False, "tied_write_key": True, "writes_per_token": 2, "value_norm": False, "initial_memory_scale": 5.0, "conv_initializer_range": 0.5,
        "conv_kernel_size": 2, "output_gate_act": "relu", "output_norm_eps": 0.5, "memory_backend": "pytorch",
        "tied_step": True, "query_key_norm": False, "value_skip": True, "conv_bias": True, "output_gate_first": True,
        "output_norm_groups": 1, "memory_num_query_key_heads": 1,
    }  # fmt: skip
    default = computed(MirasConfig(**alone), monkeypatch)
    refused = set()
    for name, value in other.items():
        edited = copy.deepcopy(MirasConfig(**alone))
        setattr(edited, name, value)
        if same(default, computed(edited, monkeypatch)):
            refused.add(name)
            with pytest.raises(StrictDataclassError, match=f"`{name}` means nothing without"):
                MirasConfig(**alone, **{name: value})
        else:
            assert getattr(MirasConfig(**alone, **{name: value}), name) == value
    assert other.keys() - refused == {"num_key_value_heads", "attention_dropout", "qk_norm", "rope_parameters"}
    # all others are of the decoder around, or need the gates of heads, which are refused
    shared = {*SMALL, "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "use_cache"}
    shared |= {"chunk_size_feed_forward", "tie_word_embeddings", "attention_bias", "attention_output_bias", "mlp_bias"}
    shared |= {
        "learning_algorithm",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "attention_layers",
        "full_attention_layers",
        "base_model",
        "license",
    }
    assert own == shared | other.keys()
    # and a stored config that lost its memories is read without what was said about them
    monkeypatch.setattr(config_meaning.logger, "warning_once", lambda message: None)
    stored = MirasConfig(**SMALL, value_norm=False, eta_max=0.5).to_dict()
    read = MirasConfig.from_dict(stored | {"full_attention_layers": [0, 1]})
    assert read.value_norm and read.eta_max == MirasConfig(**alone).eta_max


@pytest.mark.parametrize("of_default, refused", [(1.0 + 1e-13, False), (1.0 - 1e-13, False), (1.0 + 1e-6, True)])
def test_a_default_that_another_processor_measured_is_none_that_a_person_set(of_default, refused):
    alone = {**SMALL, "chunk_size": 64, "full_attention_layers": [0, 1]}
    eta_max = MirasConfig(**alone).eta_max * of_default
    if refused:
        with pytest.raises(StrictDataclassError, match="`eta_max` means nothing without memory layers"):
            MirasConfig(**alone, eta_max=eta_max)
    else:
        assert MirasConfig(**alone, eta_max=eta_max).eta_max == eta_max


def test_what_was_once_a_default_is_none_that_a_person_set(tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(config_meaning.logger, "warning_once", warned.append)
    # a Memora with a matrix wrote the epsilon of a norm that it does not have
    for memory_norm_eps, heard in ((0.01, 0), (0.02, 1)):
        stored = MemoraConfig(**SMALL, memory_architecture="matrix").to_dict() | {"memory_norm_eps": memory_norm_eps}
        (tmp_path / "config.json").write_text(json.dumps(stored))
        MemoraConfig.from_pretrained(tmp_path)
        assert len(warned) == heard
    # and one with an MLP keeps its own
    stored = MemoraConfig(**SMALL).to_dict() | {"memory_norm_eps": 0.01, "eta_max": 0.006}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    read = MemoraConfig.from_pretrained(tmp_path)
    assert (read.memory_norm_eps, read.eta_max, len(warned)) == (0.01, 0.006, 1)
    # a Memora without memories wrote the step that one with memories would have had, which was larger once
    small = {**SMALL, "chunk_size": 64}
    alone = {**small, "full_attention_layers": [0, 1]}
    todays = MemoraConfig(**alone)
    for memory_norm_eps, times, heard in ((0.01, 1.0, 1), (0.01, 4.0, 1), (0.1, 2.0, 1), (0.1, 3.0, 2)):
        of_then = times * MemoraConfig(**small, memory_norm_eps=memory_norm_eps).eta_max
        stored = todays.to_dict() | {"memory_norm_eps": memory_norm_eps, "eta_max": of_then}
        (tmp_path / "config.json").write_text(json.dumps(stored))
        read = MemoraConfig.from_pretrained(tmp_path)
        assert (read.memory_norm_eps, read.eta_max, len(warned)) == (0.1, todays.eta_max, heard)
    # who sets them says something, whatever they were once
    for values in ({"eta_max": 2.0 * todays.eta_max}, {"memory_norm_eps": 0.01}):
        with pytest.raises(StrictDataclassError, match="means nothing without memory layers"):
            MemoraConfig(**alone, **values)


def test_a_derived_class_has_defaults_of_its_own():
    class Sharp(MonetaConfig):
        model_type = "sharp"
        lp_power: int | float = 2.5
        retention: str = "kl"
        attentional_bias: str = "l2"

    assert Sharp().lp_power == 2.5
    with pytest.raises(StrictDataclassError, match="`lp_power` means nothing.*got 3.0: leave it at 2.5"):
        Sharp(lp_power=3.0).validate()


def older_file(folder, config, **values):
    """A `config.json` as a version wrote it that refused nothing of the kind."""
    config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | values))


def test_stored_values_that_mean_nothing_are_left_out_aloud(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(config_meaning.logger, "warning_once", said.append)
    older_file(tmp_path, YaadConfig.from_preset("tiny"), lp_power=2.5, sliding_window=64, residual_clip=2.0)
    for load in (
        lambda: AutoConfig.from_pretrained(tmp_path),
        lambda: YaadConfig.from_pretrained(tmp_path),
        lambda: YaadConfig.from_json_file(tmp_path / "config.json"),
        lambda: AutoModel.from_config(AutoConfig.from_pretrained(tmp_path)).config,
    ):
        said.clear()
        config = load()
        assert (config.lp_power, config.sliding_window, config.residual_clip) == (3.0, 2048, 2.0)
        [warning] = said
        assert "lp_power=2.5, sliding_window=64." in warning and "residual_clip" not in warning
    # what is not there is not spoken of
    said.clear()
    YaadConfig.from_preset("tiny", residual_clip=2.0).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).residual_clip == 2.0 and not said


def test_choices_that_are_made_while_loading(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(config_meaning.logger, "warning_once", said.append)
    MonetaConfig.from_preset("tiny", lp_power=2.5, num_attention_heads=4).save_pretrained(tmp_path)
    # with the choice that the value belongs to, in one call
    loaded = AutoConfig.from_pretrained(tmp_path, retention="kl", simplex_mass=1.0)
    assert (loaded.retention, loaded.simplex_mass, loaded.lp_power) == ("kl", 1.0, 2.5)
    hybrid = AutoConfig.from_pretrained(tmp_path, layer_types=["miras_memory", "sliding_attention"], sliding_window=8)
    assert hybrid.attention_layers == [1] and hybrid.sliding_window == 8
    hybrid.save_pretrained(tmp_path / "hybrid")
    assert not said
    # stored values of a choice that is changed go with it; what a person says in the same breath does not
    assert AutoConfig.from_pretrained(tmp_path, attentional_bias="l2").lp_power == 3.0
    assert AutoConfig.from_pretrained(tmp_path / "hybrid", layer_types=["miras_memory"] * 2).sliding_window == 2048
    assert ["lp_power=2.5." in said[0], "sliding_window=8." in said[1]] == [True, True] and len(said) == 2
    for keywords in ({"attentional_bias": "l2", "lp_power": 2.0}, {"simplex_mass": 1.0}, {"sliding_window": 8}):
        with pytest.raises(StrictDataclassError, match=f"`{[*keywords][-1]}` means nothing without"):
            AutoConfig.from_pretrained(tmp_path, **keywords)
    # what a stored file leaves open is worked out from what was given: a quarter of the step for chunks four times as long
    longer = AutoConfig.from_pretrained(tmp_path, chunk_size=64, eta_max=None, min_log_alpha=None)
    assert longer.eta_max == pytest.approx(AutoConfig.from_pretrained(tmp_path).eta_max / 4)
