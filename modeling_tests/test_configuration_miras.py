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
"""Configs: the paper's choices as defaults, presets, kind errors, and a config.json that stock tools can read."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import miras_hf
from miras_hf import MemoraConfig, MirasConfig, MonetaConfig, YaadConfig
from miras_hf.configuration_miras import PRESETS
from miras_hf.memory import KL, L2, Decay, HuberMixture, Lp, Lq, LqMirror
from miras_hf.modeling_miras import memory_rule


def test_defaults_are_the_papers():
    moneta, yaad, memora = (memory_rule(c()) for c in (MonetaConfig, YaadConfig, MemoraConfig))
    assert (type(moneta.attentional_bias), type(moneta.retention)) == (Lp, Lq)
    assert (moneta.attentional_bias.power, moneta.retention.power) == (3.0, 4.0)
    assert (type(yaad.attentional_bias), type(yaad.retention)) == (HuberMixture, Decay)
    assert (type(memora.attentional_bias), type(memora.retention)) == (L2, KL)
    assert {rule.decay_target for rule in (moneta, yaad, memora)} == {"init"}
    assert isinstance(memory_rule(MonetaConfig(lq_map="mirror")).retention, LqMirror)


@pytest.mark.parametrize(
    "preset, millions", [("tiny", 1.6), ("170m", 146), ("340m", 410), ("760m", 868), ("1.3b", 1275)]
)
def test_presets_have_the_documented_sizes(preset, millions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MonetaConfig.from_preset(preset))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.01)


def test_presets_take_overrides():
    assert set(PRESETS) == {"tiny", "170m", "340m", "760m", "1.3b"}
    assert YaadConfig.from_preset("340m", chunk_size=16).chunk_size == 16
    with pytest.raises(ValueError, match="`name` must be one of .*'340m'.*, got '7b'"):
        YaadConfig.from_preset("7b")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": "64"}, "hidden_size.*expected int, got str"),
        ({"attentional_bias": "l7"}, "attentional_bias.*huber_mixture.*got l7"),
        ({"retention": "none"}, "retention.*decay.*got none"),
        ({"chunk_size": 0}, "`chunk_size` must be positive, got 0"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "`hidden_size` .30. must be a multiple"),
        ({"hidden_size": 30, "num_attention_heads": 10}, "`head_dim` must be positive and, with rotary.*got 3"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "`num_key_value_heads` .3. must divide"),
        ({"lp_power": 0.5}, "`lp_power` must be at least 1, got 0.5"),
        ({"lq_power": 1}, "`lq_power` must be at least 2, got 1"),
        ({"chunk_size": 128, "min_log_alpha": -2.5}, "-160 / chunk_size = -1.25 and 0, got -2.5"),
        ({"hidden_act": "relu7"}, "`hidden_act` must be one of"),
        ({"attention_layers": [5], "num_hidden_layers": 2}, r"indices below 2, got \[5\]"),
        ({"attention_layers": [0, 1], "num_hidden_layers": 2}, "at least one memory layer"),
        ({"min_half_life": 100.0, "max_half_life": 10.0}, "must not be below `min_half_life`"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        MirasConfig(**fields)


def test_layer_types_make_hybrids():
    types = ["miras_memory", "sliding_attention", "miras_memory"]
    config = MonetaConfig(num_hidden_layers=3, layer_types=types)
    assert config.layer_types == types
    assert config.attention_layers == [1]
    with pytest.raises(ValueError, match="each 'miras_memory' or 'sliding_attention'"):
        MonetaConfig(num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(ValueError, match="`num_hidden_layers` = 3 entries"):
        MonetaConfig(num_hidden_layers=3, layer_types=types[:2])


@pytest.mark.parametrize("config_class", [MirasConfig, MonetaConfig, YaadConfig, MemoraConfig])
def test_saved_configs_are_readable_by_everyone(config_class, tmp_path):
    config = config_class(num_hidden_layers=2, layer_types=["miras_memory", "sliding_attention"], lp_power=3)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is config_class
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.layer_types == config.layer_types
    # Trainer's resume and AutoTokenizer read the file with the base class, which knows no memory layers
    assert "layer_types" not in json.loads((tmp_path / "config.json").read_text())
    PreTrainedConfig.from_json_file(tmp_path / "config.json")


def test_everything_is_registered():
    for name in ("moneta", "yaad", "memora", "miras"):
        assert AutoConfig.for_model(name).model_type == name
    for name in miras_hf.__all__:
        assert getattr(miras_hf, name).__module__.startswith("miras_hf.")
