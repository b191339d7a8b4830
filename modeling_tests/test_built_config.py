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
"""What is saved is what was computed: edits of a config that modules do not know of are refused, or read when a model runs."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from miras_hf import (
    MirasForCausalLM,
    MonetaConfig,
    MonetaForCausalLM,
    MonetaForSequenceClassification,
    MonetaForTokenClassification,
    MonetaModel,
    load_memory,
    save_memory,
)
from miras_hf.built_config import READ_WHEN_RUN


SMALL = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "chunk_size": 4,
    "initializer_range": 0.5,
    "attention_layers": [1],
    "sliding_window": 8,
}
EDITS = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "memory_num_key_value_heads": 1,
    "memory_num_query_key_heads": 1,
    "head_dim": 8,
    "hidden_act": "relu",
    "rms_norm_eps": 0.1,
    "chunk_size_feed_forward": 2,
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "qk_norm": True,
    "attention_dropout": 0.5,
    "attention_layers": [0],
    "full_attention_layers": [0],
    "sliding_window": 2,
    "memory_architecture": "matrix",
    "memory_depth": 3,
    "memory_expansion": 2,
    "memory_norm": False,
    "memory_residual": False,
    "update_layers": "last",
    "memory_norm_eps": 0.5,
    "attentional_bias": "l2",
    "lp_power": 1.5,
    "lp_sign": "tanh",
    "lp_sharpness": 2.0,
    "lp_error_cap": 0.1,
    "residual_clip": 0.01,
    "retention": "decay",
    "lq_power": 2.0,
    "lq_map": "mirror",
    "lq_norm_floor": 9.0,
    "simplex_mass": 1.0,
    "bregman_bound": 0.5,
    "elastic_net_threshold": 0.5,
    "elastic_net_decay_threshold": 0.5,
    "weight_cap": 0.1,
    "decay_target": "zero",
    "chunk_size": 2,
    "gate_granularity": "head",
    "learned_step": False,
    "learned_retention": False,
    "tied_step": True,
    "writes_per_token": 2,
    "gate_rank": 2,
    "ridge_floor": 0.5,
    "eta_max": 0.5,
    "min_log_alpha": -0.01,
    "min_half_life": 2.0,
    "max_half_life": 64.0,
    "use_rope": True,
    "value_norm": False,
    "query_key_norm": False,
    "value_skip": True,
    "conv_initializer_range": 0.5,
    "initial_memory_scale": 0.5,
    "initial_hidden_scale": 1.5,
    "conv_kernel_size": 2,
    "conv_act": "linear",
    "conv_bias": True,
    "output_gate_act": "relu",
    "output_gate_first": True,
    "output_norm_groups": 1,
    "output_norm_eps": 0.5,
    "memory_backend": "pytorch",
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MonetaForCausalLM(MonetaConfig(**SMALL)).eval()


IDS = torch.arange(12)[None]


def test_every_field_is_read_when_run_or_known_to_be_built_in(model):
    own = {field.name for field in dataclasses.fields(MonetaConfig)}
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"chunk_size_feed_forward"}
    built = EDITS.keys() | {
        "rope_parameters",
        "learning_algorithm",
        "gradient_at",
        "erase_key",
        "tied_write_key",
    }
    assert own == built | READ_WHEN_RUN | {"max_position_embeddings"} and model.model._built_with.keys() == built


@pytest.mark.parametrize("name", EDITS)
def test_edits_of_what_is_built_in_are_named(name, model, tmp_path):
    edited = copy.deepcopy(model)
    old, new = getattr(model.config, name), EDITS[name]
    setattr(edited.config, name, new)
    for call in (lambda: edited(IDS), lambda: edited.save_pretrained(tmp_path), lambda: edited.generate(IDS)):
        with pytest.raises(ValueError) as raised:
            call()
        message = f"`config.{name}` is {new!r}, and the model was built with {old!r}, which it goes on with"
        assert message in str(raised.value) and f"`from_pretrained(path, {name}={new!r})`" in str(raised.value)
    assert not list(tmp_path.iterdir())
    setattr(edited.config, name, old)
    assert torch.equal(edited(IDS).logits, model(IDS).logits)


def test_what_the_message_says_helps(model, tmp_path):
    model.save_pretrained(tmp_path)
    values = {"chunk_size": 2, "residual_clip": 0.01, "sliding_window": 2}
    wanted = MonetaForCausalLM(MonetaConfig(**{**SMALL, **values}, eta_max=model.config.eta_max)).eval()
    wanted.load_state_dict(model.state_dict())
    other = AutoModelForCausalLM.from_pretrained(tmp_path, **values)
    torch.testing.assert_close(other(IDS).logits, wanted(IDS).logits)
    assert (other(IDS).logits - model(IDS).logits).abs().max() > 1e-3


def test_lists_and_dicts_that_are_edited_in_place(model, tmp_path):
    edited = copy.deepcopy(model)
    edited.config.rope_parameters["rope_theta"] = 3.0
    with pytest.raises(ValueError, match="`config.rope_parameters` is .*'rope_theta': 3.0.*built with .*10000.0"):
        edited(IDS)
    edited = copy.deepcopy(model)
    edited.config.attention_layers.append(2)
    with pytest.raises(ValueError, match=r"`config.attention_layers` is \[1, 2\], and the model was built with \[1\]"):
        edited.save_pretrained(tmp_path)
    # and a length that rotary embeddings are scaled by
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    edited = MonetaModel(MonetaConfig(**SMALL, use_rope=True, rope_parameters=scaled))
    edited.config.max_position_embeddings = 4
    with pytest.raises(
        ValueError, match="`config.max_position_embeddings` is 4, and the model was built with 1048576"
    ):
        edited(IDS)


@pytest.mark.parametrize("head", [MonetaModel, MonetaForSequenceClassification, MonetaForTokenClassification])
def test_every_head_and_a_memory_file_refuse(head, tmp_path):
    model = head(MonetaConfig(**SMALL))
    decoder = model.base_model
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        decoder(IDS, cache=cache)
    model.config.chunk_size = 2
    for call in (model.save_pretrained, lambda path: model(IDS), lambda path: save_memory(cache, path / "m", model)):
        with pytest.raises(ValueError, match="`config.chunk_size` is 2, and the model was built with 4"):
            call(tmp_path)
    model.config.chunk_size = 4
    save_memory(cache, tmp_path / "m.safetensors", model)
    model.config.chunk_size = 2
    with pytest.raises(ValueError, match="`config.chunk_size` is 2, and the model was built with 4"):
        load_memory(tmp_path / "m.safetensors", model)


def test_edits_of_what_is_read_when_run_are_saved_and_computed(model, tmp_path):
    edited = copy.deepcopy(model)
    edited.config.initializer_range, edited.config.use_cache, edited.config.eos_token_id = 0.1, False, 3
    edited.config.pad_token_id, edited.config.max_position_embeddings = 0, 77
    # a draft of the first two layers
    edited.config.num_hidden_layers = 2
    edited.resize_token_embeddings(20, mean_resizing=False)
    edited.save_pretrained(tmp_path)
    loaded = MonetaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.max_position_embeddings == 77 and len(loaded.model.layers) == 2
    torch.testing.assert_close(loaded(IDS).logits, edited(IDS).logits)
    hidden = model.model(IDS, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(loaded(IDS).logits[..., :16], model.lm_head(model.model.norm(hidden)))
    edited.config.num_hidden_layers = 4
    with pytest.raises(ValueError, match="`config.num_hidden_layers` is 4, and the model has 3 layers"):
        edited.save_pretrained(tmp_path)


def test_what_would_not_be_built_is_not_saved(model, tmp_path):
    cut = copy.deepcopy(model)
    cut.config.pad_token_id = 15
    cut.resize_token_embeddings(10, mean_resizing=False)
    with pytest.raises(ValueError, match=r"`pad_token_id` must be below `vocab_size` \(10\) or None, got 15"):
        cut.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_heads_that_are_untied(tmp_path):
    tied = MirasForCausalLM(MonetaConfig(**SMALL, tie_word_embeddings=True)).eval()
    tied.config.tie_word_embeddings = False
    with pytest.raises(
        ValueError, match="`config.tie_word_embeddings` is False, and head and embeddings share one weight"
    ):
        tied.save_pretrained(tmp_path)
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone() * 2)
    tied.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings is False
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, tied(IDS).logits)
