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
"""What these models rely on in the installed Transformers, read from its own signatures.

A renaming there fails here, with the new name in the message, before it can fail silently anywhere else.
"""

import dataclasses
import inspect

import pytest
import torch
from test_generation_miras import CONFIGS, build
from transformers import GenerationMixin, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.masking_utils import create_masks_for_generate, create_sliding_window_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import TransformersKwargs

import miras_hf
from miras_hf.cache import MirasLayer
from miras_hf.compat import CACHE_NAME, CACHE_NAMES
from miras_hf.modeling_miras import _KEYWORDS


def names(function) -> set[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name for name, p in inspect.signature(function).parameters.items() if p.kind not in kinds} - {"self"}


@pytest.fixture(scope="module")
def model():
    return build("yaad", True)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 99, (2, 11), generator=torch.Generator().manual_seed(3))


def test_models_take_what_llama_takes():
    for ours, theirs in ((miras_hf.MirasForCausalLM, LlamaForCausalLM), (miras_hf.MirasModel, LlamaModel)):
        assert names(theirs.forward) - names(ours.forward) == set()


def test_every_keyword_of_transformers_is_known():
    known = set(_KEYWORDS) | names(miras_hf.MirasModel.forward)
    assert set(TransformersKwargs.__annotations__) - known == set()


def test_what_generate_puts_into_a_step():
    expected = {
        "input_ids",
        "next_sequence_length",
        "attention_mask",
        "inputs_embeds",
        "is_first_iteration",
        CACHE_NAME,
    }
    assert names(GenerationMixin.prepare_inputs_for_generation) == expected
    assert CACHE_NAME in names(miras_hf.MirasForCausalLM.forward)
    assert CACHE_NAME in names(create_sliding_window_causal_mask)


def test_masks_for_compiled_steps():
    ours = names(miras_hf.MirasForCausalLM.create_masks_for_generate)
    needed = {"config", "inputs_embeds", "attention_mask", "position_ids", CACHE_NAME}
    assert needed <= ours and needed <= names(create_masks_for_generate)


def test_outputs_have_one_cache():
    for output in (BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutputWithPast):
        fields = {field.name for field in dataclasses.fields(output)}
        assert fields & set(CACHE_NAMES) == {CACHE_NAME}


def test_a_memory_layer_answers_all_that_a_cache_asks():
    """Whatever a cache calls on or reads from its layers is there, and abstract methods have bodies."""
    public = {name for name in vars(CacheLayerMixin) if not name.startswith("_")}
    answered = {name for kind in MirasLayer.__mro__[:2] for name in vars(kind)}
    inherited = {"activate_past_recording", "is_dummy", "is_compileable", "offload", "prefetch", "get_max_cache_shape"}
    assert public - answered - inherited == set()
    assert not getattr(MirasLayer, "__abstractmethods__", None)
    reads = {"is_sliding", "is_compileable", "is_croppable", "is_initialized", "record_past"}
    assert all(hasattr(MirasLayer(), name) for name in reads)


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("family", CONFIGS)
def test_both_names_of_the_cache(family, name, ids):
    """Two calls over one cache say what one call without says, whatever the cache is called."""
    model = build(family, True, initializer_range=0.3)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :6], **{name: cache})
        assert getattr(first, CACHE_NAME) is cache
        second = model(ids[:, 6:], **{name: cache}).logits
        torch.testing.assert_close(second, whole[:, 6:], rtol=1e-4, atol=1e-5)
        # and the memory matters: the second half alone says something else
        assert (model(ids[:, 6:]).logits - whole[:, 6:]).abs().max() > 1e-2


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generate_takes_both_names(name, model, ids):
    greedy = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **greedy)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], **{name: cache})
    assert torch.equal(model.generate(ids, **{name: cache}, **greedy), expected)


@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"])
def test_every_head_takes_both_names(head, ids):
    config = build("moneta", True).config
    torch.manual_seed(0)
    head = getattr(miras_hf, f"Moneta{head}")(config).eval()
    with torch.no_grad():
        for name in CACHE_NAMES:
            cache = DynamicCache(config=config)
            head(ids, attention_mask=torch.ones_like(ids), **{name: cache})
            assert cache.get_seq_length() == ids.shape[1]
        with pytest.raises(ValueError, match="two names of one argument"):
            head.forward(ids, **{name: DynamicCache(config=config) for name in CACHE_NAMES})


@pytest.mark.parametrize("keyword", ["banana", "cache_params", "layer_past", "mems", "token_type_ids"])
@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification"])
def test_a_keyword_that_nobody_consumes_is_refused(head, keyword, ids):
    head = getattr(miras_hf, f"Yaad{head}")(build("yaad").config)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        head(ids[:1], **{keyword: DynamicCache(config=head.config)})


@pytest.mark.parametrize("keyword", [{"is_causal": False}, {"output_router_logits": True}], ids=str)
def test_a_value_that_means_nothing_is_refused(model, ids, keyword):
    with pytest.raises(ValueError, match=f"`{next(iter(keyword))}` must be one of"):
        model(ids, **keyword)


def test_a_layer_can_be_cropped_while_it_records(model, ids):
    cache = DynamicCache(config=model.config)
    assert not cache.is_croppable
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids, **{CACHE_NAME: cache})
    assert cache.is_croppable
    assert isinstance(cache, Cache)


def test_trainers_leave_the_cache_out_of_predictions(model):
    assert set(model.config.keys_to_ignore_at_inference) == set(CACHE_NAMES)
