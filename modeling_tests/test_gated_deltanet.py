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
"""A Gated DeltaNet layer of Transformers and the memory layer that took its weights compute the same."""

import importlib.util

import pytest
import torch
import transformers
from memory_cases import in_float64, layer_and_mixer, relative_error
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from miras_hf import MirasConfig
from miras_hf.gated_deltanet import gated_deltanet_fields, load_gated_deltanet
from miras_hf.modeling_miras import MirasMixer
from miras_hf.sequences import Sequences


def layer_of(key_heads=2, value_heads=4, model="qwen3_next", **fields):
    torch.manual_seed(0)
    config, kind = (
        qwen3_next(key_heads, value_heads, **fields)
        if model == "qwen3_next"
        else olmo_hybrid(key_heads, value_heads, **fields)
    )
    layer = kind(config, 0)
    with torch.no_grad():  # far from where it starts: gates that open and close, writes that are seen
        for name, p in layer.named_parameters():
            if name != "A_log":
                p.copy_(torch.randn_like(p) * (1.0 if p.dim() == 1 else p[0].numel() ** -0.5))
    return layer


def olmo_hybrid(key_heads, value_heads, **fields):
    if importlib.util.find_spec("transformers.models.olmo_hybrid") is None:
        pytest.skip(f"Transformers {transformers.__version__} has no OLMo Hybrid")
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid

    config = modeling_olmo_hybrid.OlmoHybridConfig(
        hidden_size=24, linear_num_key_heads=key_heads, linear_num_value_heads=value_heads, num_hidden_layers=2,
        linear_conv_kernel_dim=3, layer_types=["linear_attention", "full_attention"], num_attention_heads=2,
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, **fields},
    )  # fmt: skip
    return config, modeling_olmo_hybrid.OlmoHybridGatedDeltaNet


def qwen3_next(key_heads, value_heads, **fields):
    config = Qwen3NextConfig(
        hidden_size=24, linear_num_key_heads=key_heads, linear_num_value_heads=value_heads,
        linear_conv_kernel_dim=3, num_hidden_layers=1, layer_types=["linear_attention"], num_experts=2,
        num_experts_per_tok=1, **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, **fields},
    )  # fmt: skip
    return config, Qwen3NextGatedDeltaNet


def mixer_of(layer):
    config = MirasConfig(**gated_deltanet_fields(layer), num_hidden_layers=1)
    mixer = MirasMixer(config, 0).to(layer.A_log.dtype)
    load_gated_deltanet(mixer, layer)
    return mixer


WIDER_VALUES, WIDER_KEYS = {"linear_value_head_dim": 16}, {"linear_key_head_dim": 16}
LAYERS = {
    "shared keys": ("qwen3_next", (2, 4), {}),
    "own keys": ("qwen3_next", (2, 2), {}),
    "one key": ("qwen3_next", (1, 3), {}),
    "wider values": ("qwen3_next", (2, 4), WIDER_VALUES),
    "wider keys": ("qwen3_next", (2, 4), WIDER_KEYS),
    "olmo": ("olmo_hybrid", (2, 2), {}),
    "olmo, wider values": ("olmo_hybrid", (2, 2), WIDER_VALUES),
    "olmo, shared keys, wider": ("olmo_hybrid", (2, 4), WIDER_KEYS),
    "olmo, steps up to one": ("olmo_hybrid", (2, 2), {"linear_allow_neg_eigval": False}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_the_same_is_computed(case):
    """Outputs, and gradients of the input; also of a row that is padded."""
    layer = forgetting_layer_of(case)
    mixer, x = mixer_of(layer), torch.randn(2, 21, 24)
    found = layer_and_mixer(layer, mixer, x)
    for got, want in zip(found[mixer], found[layer], strict=True):
        assert relative_error(got, want) < 1e-5
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[0, :5] = False
    with torch.no_grad():
        alone = layer(x[:1, 5:])
        padded = mixer(x, sequences=Sequences(mask))[0]
    assert relative_error(padded[:1, 5:], alone) < 1e-5


@pytest.mark.parametrize("case", LAYERS)
def test_the_same_is_computed_in_float64(case, monkeypatch):
    """Outputs, and gradients of the input and of the weights that both have."""
    # of what forgets more than all but exp(-20), that much stays here
    layer = forgetting_layer_of(case, 0.5).double()
    mixer, x = mixer_of(layer), torch.randn(2, 21, 24, dtype=torch.float64)
    in_float64(monkeypatch, layer)
    found = layer_and_mixer(layer, mixer, x)
    for got, want in zip(found[mixer], found[layer], strict=True):
        assert relative_error(got, want) < 1e-9
    out = layer.o_proj if hasattr(layer, "o_proj") else layer.out_proj
    by_heads = mixer.o_proj.weight.grad.unflatten(1, (layer.num_v_heads, -1))[..., : layer.head_v_dim].flatten(1)
    for ours, theirs in ((mixer.alpha.a_log.grad, layer.A_log.grad), (by_heads, out.weight.grad)):
        assert relative_error(ours, theirs) < 1e-9


def forgetting_layer_of(case, most=2.0):
    model, heads, fields = LAYERS[case]
    layer = layer_of(*heads, model=model, **fields)
    with torch.no_grad():  # tokens that forget more than the default bound lets them, and less than the largest does
        layer.A_log.copy_(torch.linspace(-1.0, most, len(layer.A_log)))
    return layer


def test_what_cannot_be_taken_is_refused():
    with pytest.raises(
        TypeError, match="`layer` must be a `Qwen3NextGatedDeltaNet` or a `OlmoHybrid.*`, got a `Linear`"
    ):
        gated_deltanet_fields(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`layer.activation` must be 'silu', got 'gelu'"):
        gated_deltanet_fields(layer_of(hidden_act="gelu"))
    layer = layer_of()
    other = MirasMixer(MirasConfig.from_preset("kda", **{"hidden_size": 24, "num_attention_heads": 3}), 0)
    with pytest.raises(
        ValueError, match="`mixer` must be of a config with `gated_deltanet_fields`: `alpha.a_log` has"
    ):
        load_gated_deltanet(other, layer)
