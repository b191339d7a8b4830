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
"""A Mamba2 layer of Transformers and the memory layer that took its weights compute the same."""

import pytest
import torch
from memory_cases import in_float64, layer_and_mixer, relative_error
from transformers import DynamicCache
from transformers.models.bamba import modeling_bamba
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.mamba2 import modeling_mamba2

from miras_hf import MirasConfig
from miras_hf.compat import CACHE_NAME
from miras_hf.mamba2 import load_mamba2, mamba2_fields
from miras_hf.modeling_miras import MirasMixer
from miras_hf.sequences import Sequences


WIDTH, TOKENS = 24, 21


def mamba2(groups, states, head, **fields):
    config = modeling_mamba2.Mamba2Config(
        hidden_size=WIDTH, expand=2, num_heads=2 * WIDTH // head, head_dim=head, state_size=states, n_groups=groups,
        conv_kernel=3, chunk_size=4, num_hidden_layers=1, vocab_size=8, **fields,
    )  # fmt: skip
    return modeling_mamba2.Mamba2Mixer(config, 0)


def of_hybrid(module, name, config_name, mixer_name):
    def build(groups, states, head, **fields):
        config = getattr(module, config_name)(
            hidden_size=WIDTH, mamba_expand=2, mamba_n_heads=2 * WIDTH // head, mamba_d_head=head, mamba_d_state=states,
            mamba_n_groups=groups, mamba_d_conv=3, mamba_chunk_size=4, num_hidden_layers=1, vocab_size=8,
            num_attention_heads=2, num_key_value_heads=2, intermediate_size=8, **fields,
        )  # fmt: skip
        return getattr(module, mixer_name)(config, 0)

    return build


bamba = of_hybrid(modeling_bamba, "bamba", "BambaConfig", "BambaMixer")
granite = of_hybrid(
    modeling_granitemoehybrid, "granitemoehybrid", "GraniteMoeHybridConfig", "GraniteMoeHybridMambaLayer"
)
LAYERS = {
    "one group": (mamba2, (1, 8, 8), {}),
    "two groups": (mamba2, (2, 8, 8), {}),
    "wider states": (mamba2, (2, 16, 8), {}),
    "wider heads": (mamba2, (2, 8, 12), {}),
    "all biases": (mamba2, (2, 8, 8), {"use_bias": True}),
    "no biases": (mamba2, (1, 8, 8), {"use_conv_bias": False}),
    "steps up to one": (mamba2, (2, 8, 8), {"time_step_limit": (0.0, 1.0)}),
    "bamba": (bamba, (2, 16, 8), {}),
    "granite": (granite, (1, 16, 8), {"layer_types": ["mamba"]}),
}


def layer_of(case="two groups"):
    build, sizes, fields = LAYERS[case]
    torch.manual_seed(0)
    layer = build(*sizes, **fields).eval()
    with torch.no_grad():  # far from where it starts: gates that open and close, writes that are seen, D of both signs
        for name, p in layer.named_parameters():
            if name == "A_log":
                p.copy_(torch.linspace(-2.0, 1.0, len(p)))
            else:
                p.copy_(torch.randn_like(p) * (1.0 if p.dim() == 1 else p[0].numel() ** -0.5))
    return layer


def mixer_of(layer):
    config = MirasConfig(**mamba2_fields(layer), num_hidden_layers=1)
    mixer = MirasMixer(config, 0).to(layer.D.dtype).eval()
    load_mamba2(mixer, layer)
    return config, mixer


@pytest.mark.parametrize("case", LAYERS)
def test_the_same_is_computed(case):
    """Outputs, and gradients of the input."""
    layer = layer_of(case)
    mixer, x = mixer_of(layer)[1], torch.randn(2, TOKENS, WIDTH)
    found = layer_and_mixer(layer, mixer, x)
    for got, want in zip(found[mixer], found[layer], strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("case", LAYERS)
def test_the_same_is_computed_in_float64(case, monkeypatch):
    """Outputs, and gradients of the input and of the weights that both have."""
    layer = layer_of(case).double()
    mixer, x = mixer_of(layer)[1], torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    in_float64(monkeypatch, layer)
    found = layer_and_mixer(layer, mixer, x)
    for got, want in zip(found[mixer], found[layer], strict=True):
        assert relative_error(got, want) < 1e-9
    heads, values, inner = layer.num_heads, layer.head_dim, layer.intermediate_size
    first = slice(inner, 2 * inner)
    pairs = [
        (mixer.alpha.a_log, layer.A_log.grad),
        (mixer.alpha.bias, layer.dt_bias.grad),
        (mixer.alpha.up_proj.weight, layer.in_proj.weight.grad[-heads:]),
        (mixer.skip.weight, layer.D.grad),
        (mixer.g_proj.weight, layer.in_proj.weight.grad[:inner]),
        (mixer.v_proj.weight, layer.in_proj.weight.grad[first]),
        (mixer.v_conv.weight, layer.conv1d.weight.grad[:inner, 0]),
    ]
    # states may stand before zeros, too
    b, c = layer.in_proj.weight.grad[2 * inner : -heads].view(2, layer.n_groups, -1, WIDTH)
    for projection, theirs in ((mixer.q_proj, c), (mixer.k_proj, b)):
        ours = projection.weight.grad.unflatten(0, (layer.n_groups, -1))[:, : layer.ssm_state_size]
        assert relative_error(ours, theirs) < 1e-9
    if layer.conv1d.bias is not None:
        pairs.append((mixer.v_conv.bias, layer.conv1d.bias.grad[:inner]))
        # those of the heads that share keys add up to theirs
        shared = mixer.k_conv.bias.grad.view(layer.n_groups, -1, mixer.head_dim).sum(1)[:, : layer.ssm_state_size]
        theirs = layer.conv1d.bias.grad[inner:].view(2, layer.n_groups, -1)[0]
        assert relative_error(shared, theirs) < 1e-9
    for ours, theirs in pairs:
        got = ours.grad
        if got.shape[0] not in (heads, inner):  # zeros stand behind the narrower ones
            got = got.unflatten(0, (heads, -1))[:, :values].flatten(0, 1)
        assert relative_error(got, theirs) < 1e-9


@pytest.mark.parametrize("case", ["one group", "two groups", "wider states", "all biases", "bamba"])
@torch.no_grad()
def test_decoding_and_padding(case):
    """Token by token, each beside theirs; and rows that begin with pads."""
    layer = layer_of(case)
    config, mixer = mixer_of(layer)
    x = torch.randn(2, TOKENS, WIDTH)
    whole = layer(x)
    cache = DynamicCache(config=config)
    parts = [mixer(x[:, :6], **{CACHE_NAME: cache})[0]]
    parts += [mixer(x[:, t : t + 1], **{CACHE_NAME: cache})[0] for t in range(6, TOKENS)]
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-5

    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, :5] = False
    padded = mixer(x, sequences=Sequences(mask))[0]
    assert relative_error(padded[:1, 5:], layer(x[:1, 5:])) < 1e-5
    if layer.in_proj.bias is None:  # which enters their convolution at pads
        assert relative_error(padded[mask], layer(x, attention_mask=mask.long())[mask]) < 1e-5


def test_what_cannot_be_taken_is_refused():
    with pytest.raises(TypeError, match="`layer` must be a `Mamba2Mixer` or a `BambaMixer` or .*, got a `Linear`"):
        mamba2_fields(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`layer.activation` must be 'silu', got 'gelu'"):
        mamba2_fields(mamba2(1, 8, 8, hidden_act="gelu"))
    with pytest.raises(ValueError, match=r"`layer.time_step_limit` must begin with 0, got .0\.5, 1\.0."):
        mamba2_fields(mamba2(1, 8, 8, time_step_limit=(0.5, 1.0)))
    other = MirasMixer(MirasConfig.from_preset("mamba2", hidden_size=WIDTH, num_attention_heads=3), 0)
    with pytest.raises(ValueError, match="`mixer` must be of a config with `mamba2_fields`: `alpha.a_log` has"):
        load_mamba2(other, layer_of())
