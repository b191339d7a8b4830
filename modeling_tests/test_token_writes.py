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
"""What a token of a layer writes: several times, along tied keys, with tied steps, and beside what it reads. Against the recurrence written out, and in every way in which
a text can be read."""

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import relative_error
from transformers import DynamicCache, StaticCache

from miras_hf import MirasConfig, MirasForCausalLM, load_memory, restore, save_memory, snapshot
from miras_hf.callbacks import measure_memories
from miras_hf.compat import CACHE_NAME, cache_of


# far from where models start: gates that open and close, writes that are seen
POINTS = {
    "delta": {"name": "delta-product", "eta_max": 2.0},
    "three": {"name": "delta-product", "writes_per_token": 3, "memory_num_key_value_heads": 1},
    "kda": {"name": "kda", "writes_per_token": 2, "gradient_at": "previous", "use_rope": True},
    "rwkv": {"name": "rwkv-7"},
    "erase": {
        "name": "gated-deltanet",
        "erase_key": "own",
        "writes_per_token": 2,
        "memory_num_key_value_heads": 1,
        "use_rope": True,
        "eta_max": 0.5,
    },
    "mlp": {"name": "tiny", "writes_per_token": 2, "attentional_bias": "huber_norm", "retention": "lq"},
    "momentum": {"name": "titans-lmm", "writes_per_token": 3},
    "hebbian": {"name": "gla", "writes_per_token": 2},
    "tied": {"name": "hgrn2"},
    "mamba": {"name": "mamba2"},
    "shared": {
        "name": "gated-deltanet",
        "erase_key": "own",
        "writes_per_token": 2,
        "memory_num_query_key_heads": 1,
        "eta_max": 0.5,
    },
    "tied step": {"name": "tiny", "tied_step": True, "value_skip": True, "conv_bias": True, "output_norm_groups": 1},
    "solved": {"name": "mesa", "writes_per_token": 2},
}


def model_of(point: str, **fields) -> MirasForCausalLM:
    values = {"chunk_size": 4} | POINTS[point] | fields
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = MirasForCausalLM(MirasConfig.from_preset(**{**small, "num_attention_heads": 2, **values})).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".mixer." in name and p.requires_grad and p.dim() == 2:
                p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5)
    return model


IDS = torch.randint(32, (2, 13), generator=torch.Generator().manual_seed(0))


def test_a_layer_written_out():
    """Gated DeltaProduct: convolutions, gates and three steps a token by hand, in the order in which the layer has them."""
    mixer = model_of("three").model.layers[0].mixer
    rows, tokens, heads, writes, width = 2, 13, 2, 3, 8
    x = torch.randn(rows, tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def convolved(name, of_head):
        projected = getattr(mixer, f"{name}_proj")(x)
        if name != "q":  # both heads have those of one
            projected = projected.repeat(1, 1, heads)
        weight = getattr(mixer, f"{name}_conv").weight[:, None]
        y = F.conv1d(projected.mT, weight, padding=3, groups=len(weight))[..., :tokens]
        return F.silu(y).mT.view(rows, tokens, heads, of_head, width)

    with torch.no_grad():
        q = F.normalize(convolved("q", 1), dim=-1)[:, :, :, 0]
        k, v = F.normalize(convolved("k", writes), dim=-1), convolved("v", writes)
        beta = 2.0 * torch.sigmoid(mixer.eta.logits(x)).view(rows, tokens, heads, writes)
        alpha = torch.exp(-F.softplus(mixer.alpha.logits(x)) * mixer.alpha.a_log.exp())
        assert (beta > 1.5).any() and (beta < 0.5).any() and alpha.log().min() > -2.5
        reads = torch.empty(rows, tokens, heads, width, dtype=torch.float64)
        for row in range(rows):
            for head in range(heads):
                state = torch.zeros(width, width, dtype=torch.float64)
                for t in range(tokens):
                    state = alpha[row, t, head] * state
                    for j in range(writes):
                        key = k[row, t, head, j]
                        state = state - beta[row, t, head, j] * torch.outer(key, key @ state - v[row, t, head, j])
                    reads[row, t, head] = q[row, t, head] @ state
        gate = F.silu(mixer.g_proj(x)).view_as(reads)
        expected = mixer.o_proj((F.rms_norm(reads, (width,), eps=1e-6) * gate).flatten(-2))
        assert relative_error(mixer(x)[0], expected) < 1e-5  # gates, queries and keys are float32's


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    point=st.sampled_from(list(POINTS)),
    chunk_size=st.integers(1, 6),
    split=st.integers(1, 12),
    pads=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_a_text_means_the_same_however_it_is_read(point, chunk_size, split, pads):
    """At once, in two calls, token by token, padded and packed; chunks may end between the writes of a token."""
    model, ids = model_of(point, chunk_size=chunk_size), IDS[:1]
    with torch.no_grad():
        whole = model(ids).logits

        def same(logits, expected=whole):
            # queries and keys are float32's
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-5)

        out = model(ids[:, :split], use_cache=True)
        first, cache = out.logits, cache_of(out)
        before = snapshot(cache)
        same(torch.cat((first, model(ids[:, split:], **{CACHE_NAME: cache}).logits), dim=1))
        restore(cache, before)
        parts = [model(ids[:, t : t + 1], **{CACHE_NAME: cache}).logits for t in range(split, 13)]
        same(torch.cat([first, *parts], dim=1))
        assert all((layer.memory.count == 13).all() for layer in cache.layers)

        mask = torch.zeros(2, 13 + sum(pads), dtype=torch.long)
        mask[0, pads[0] : pads[0] + 13], mask[1, : split + 1] = 1, 1
        padded = torch.full_like(mask, 7)
        padded[0, pads[0] : pads[0] + 13], padded[1, : split + 1] = ids[0], ids[0, : split + 1]
        logits = model(padded, attention_mask=mask).logits
        same(logits[:1, pads[0] : pads[0] + 13])
        same(logits[1:, : split + 1], whole[:, : split + 1])

        position_ids = torch.cat((torch.arange(split), torch.arange(13 - split)))[None]
        packed = model(ids, position_ids=position_ids).logits
        same(packed, torch.cat((first, model(ids[:, split:]).logits), dim=1))


@pytest.mark.parametrize("point", POINTS)
def test_what_was_read_is_taken_back_saved_and_kept_in_static_caches(point, tmp_path):
    model = model_of(point, chunk_size=4).float()
    with torch.no_grad():
        whole = model(IDS).logits
        for back in (1, 2, 5, 9):
            cache = DynamicCache(config=model.config)
            for layer in cache.layers:
                layer.activate_past_recording()
            model(IDS[:, :7], **{CACHE_NAME: cache})
            for t in range(7, 11):
                model(IDS[:, t : t + 1], **{CACHE_NAME: cache})
            for layer in cache.layers:
                layer.crop(-back)
            again = model(IDS[:, 11 - back :], **{CACHE_NAME: cache}).logits
            torch.testing.assert_close(again, whole[:, 11 - back :], rtol=1e-4, atol=2e-5)
        cache = StaticCache(config=model.config, max_cache_len=16)
        parts = [model(IDS[:, a:b], **{CACHE_NAME: cache}).logits for a, b in ((0, 6), (6, 7), (7, 8), (8, 13))]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=2e-5)
        cache = DynamicCache(config=model.config)
        model(IDS[:, :6], **{CACHE_NAME: cache})
        save_memory(cache, tmp_path / "read.safetensors", model)
        cache = load_memory(tmp_path / "read.safetensors", model)
        again = model(IDS[:, 6:], **{CACHE_NAME: cache}).logits
        torch.testing.assert_close(again, whole[:, 6:], rtol=1e-4, atol=2e-5)
    statistics = measure_memories(model, {"input_ids": IDS})
    assert all(torch.isfinite(value).all() for found in statistics.values() for value in found)


@pytest.mark.parametrize("point", ["three", "mlp"])
def test_gradients_go_through_caches(point):
    """Of all that a mixer learns: a text at once, and in three calls of which one is a single token."""
    model = model_of(point)
    weights = {name: p for name, p in model.named_parameters() if ".mixer." in name and p.requires_grad}

    def loss(parts):
        cache, logits = DynamicCache(config=model.config), []
        for a, b in parts:
            logits.append(model(IDS[:, a:b], **{CACHE_NAME: cache}).logits)
        return torch.cat(logits, dim=1).tanh().sum()

    whole = torch.autograd.grad(loss([(0, 13)]), list(weights.values()))
    parts = torch.autograd.grad(loss([(0, 6), (6, 7), (7, 13)]), list(weights.values()))
    for name, a, b in zip(weights, whole, parts, strict=True):
        assert relative_error(b, a) < 1e-4, name


@pytest.mark.parametrize("point", ["three", "rwkv", "mlp", "solved", "tied", "mamba", "tied step"])
def test_gradients_of_finite_differences(point, monkeypatch):
    """Of a layer's inputs and of all that it learns, where models compute in float64: their gates and norms take float32."""
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t)
    mixer = model_of(point).model.layers[0].mixer
    learned = {name: p for name, p in mixer.named_parameters() if p.requires_grad}
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)

    def layer(x, *parameters):
        return torch.func.functional_call(mixer, dict(zip(learned, parameters, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(layer, (x, *learned.values()), fast_mode=True, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("point", ["rwkv", "tied", "mamba"])
def test_compiled_is_eager(point):
    """One graph of a layer: tokens that erase and write, keys that are what is forgotten, and all of Mamba2."""
    mixer = model_of(point, num_attention_heads=1, chunk_size=8).model.layers[0].mixer
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    learned = {name: p for name, p in mixer.named_parameters() if p.requires_grad}

    def read(form):
        given = x.clone().requires_grad_()
        y = form(given)[0]
        return [y, *torch.autograd.grad(y.tanh().sum(), [given, *learned.values()])]

    torch._dynamo.reset()
    compiled = read(torch.compile(mixer, fullgraph=True, backend="aot_eager"))
    for name, a, b in zip(["output", "input", *learned], compiled, read(mixer), strict=True):
        assert relative_error(a, b) < 1e-5, name


def test_what_means_nothing_is_refused():
    with pytest.raises(
        StrictDataclassError, match="`tied_write_key` must be False with `writes_per_token=2`, got True"
    ):
        MirasConfig.from_preset("hgrn2", writes_per_token=2)
    for name in ("tied_step", "value_skip"):
        with pytest.raises(StrictDataclassError, match=f"`{name}` must be False with `writes_per_token=2`, got True"):
            MirasConfig(writes_per_token=2, **{name: True})
    for value in (0, 9, 1.5, True):
        with pytest.raises(StrictDataclassError, match="writes_per_token"):
            MirasConfig(writes_per_token=value)
    model = MirasForCausalLM(MirasConfig.from_preset("tiny", writes_per_token=2, memory_backend="triton"))
    with pytest.raises(ValueError, match="the backend is 'triton': kernels do not know tokens with 2 writes"):
        model(IDS)
