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
"""Presets are the recurrences that their papers publish: against code installed with Transformers, and against loops of a few
lines in float64."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from memory_cases import relative_error
from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import mamba2_selective_state_update
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from miras_hf import MirasConfig, MirasForCausalLM, MonetaConfig
from miras_hf.memory import MemoryParameters, chunk_miras, recurrent_miras
from miras_hf.modeling_miras import memory_rule
from miras_hf.presets import MODELS, NOT_EXPRESSED, table


ROWS, TOKENS, HEADS, WIDTH = 2, 21, 2, 8
FORMS = {"recurrent": recurrent_miras, "chunk": chunk_miras}


def rule_of(name: str, chunk_size: int = 8):
    return memory_rule(MirasConfig.from_preset(name, chunk_size=chunk_size))


def read(name, form, q, k, v, eta, log_alpha, rule=None, initial=None, norm=None, **others):
    """What the preset's memory reads; matrices start empty."""
    rule = rule_of(name) if rule is None else rule
    initial = (torch.zeros(HEADS, WIDTH, WIDTH, dtype=q.dtype),) if initial is None else initial
    if norm is None:
        norm = torch.ones(HEADS, WIDTH, dtype=q.dtype), torch.zeros(HEADS, WIDTH, dtype=q.dtype)
    given = {"eta": eta.expand(log_alpha.shape[:3]), "log_alpha": log_alpha, **others}
    y = FORMS[form](q, k, v, **given, rule=rule, parameters=MemoryParameters(initial, *norm))[0]
    writes = MirasConfig.from_preset(name).slots_per_token
    return y[:, writes - 1 :: writes]


def draw(dtype=torch.float64, seed=0):
    """Queries and keys of norm 1, values, two numbers between 0.1 and 1 a head, and one a channel."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, TOKENS, HEADS, WIDTH)
    q, k, v = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    one, two = 0.1 + 0.9 * torch.rand(2, *shape[:-1], generator=generator, dtype=torch.float64)
    channels = 0.1 + 0.9 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return tuple(x.to(dtype) for x in (q, k, v, one, two, channels))


ONE, NONE = torch.ones(()), torch.zeros(ROWS, TOKENS, HEADS)


def loop(q, k, v, step):
    """`S = step(S, t)` from zero, and `q S`."""
    state, outputs = torch.zeros(ROWS, HEADS, WIDTH, WIDTH, dtype=q.dtype), []
    for t in range(TOKENS):
        state = step(state, t)
        outputs.append(torch.einsum("bhi,bhij->bhj", q[:, t], state))
    return torch.stack(outputs, dim=1)


def outer(a, b):
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def delta_step(state, k, v, beta):
    error = torch.einsum("bhi,bhij->bhj", k, state) - v
    return state - beta[..., None, None] * outer(k, error)


def published(name):
    """Inputs of the preset's memory, and what the paper's recurrence makes of its own, in float64."""
    q, k, v, one, two, channels = draw()
    slopes = 2.0 ** -(1.0 + torch.arange(HEADS, dtype=torch.float64))
    if name == "linear-attention":
        return (q, k, v, ONE, NONE), loop(q, k, v, lambda s, t: s + outer(k[:, t], v[:, t]))
    if name == "retnet":
        gamma = 1 - 2.0 ** (-5.0 - torch.arange(HEADS, dtype=torch.float64))
        expected = loop(q, k, v, lambda s, t: gamma[:, None, None] * s + outer(k[:, t], v[:, t]))
        return (q, k, v, ONE, gamma.log().expand(ROWS, TOKENS, HEADS)), expected
    if name == "lightning":
        expected = loop(q, k, v, lambda s, t: torch.exp(-slopes)[:, None, None] * s + outer(k[:, t], v[:, t]))
        return (q, k, v, ONE, -slopes.expand(ROWS, TOKENS, HEADS)), expected
    if name == "gla":
        x = 4 * channels - 2
        alpha = torch.sigmoid(x) ** (1 / 16)
        expected = loop(q, k, v, lambda s, t: alpha[:, t].unsqueeze(-1) * s + outer(k[:, t], v[:, t]))
        return (q, k, v, ONE, -torch.tensor(-16.0).abs().reciprocal().double() * F.softplus(-x)), expected
    if name == "hgrn2":
        expected = loop(q, k, v, lambda s, t: channels[:, t].unsqueeze(-1) * s + outer(1 - channels[:, t], v[:, t]))
        return (q, 1 - channels, v, ONE, channels.log()), expected
    if name == "mamba2":
        a, dt = -1 - torch.arange(HEADS, dtype=torch.float64), 0.5 * one
        expected = loop(
            q,
            k,
            v,
            lambda s, t: (dt[:, t] * a).exp()[..., None, None] * s + outer(dt[:, t, :, None] * k[:, t], v[:, t]),
        )
        return (q, k, v, dt, dt * a), expected
    if name == "deltanet":
        return (q, k, v, one, NONE), loop(q, k, v, lambda s, t: delta_step(s, k[:, t], v[:, t], one[:, t]))
    if name == "delta-product":
        more = draw(seed=1)
        keys, values = torch.stack((k, more[1]), 2), torch.stack((v, more[2]), 2)
        betas = 2 * torch.stack((one, more[3]), 2)

        def two_steps(s, t):
            s = two[:, t, :, None, None] * s
            for j in range(2):
                s = delta_step(s, keys[:, t, j], values[:, t, j], betas[:, t, j])
            return s

        zeros = torch.zeros_like
        inputs = (torch.stack((zeros(q), q), 2), keys, values, betas, torch.stack((two.log(), zeros(two)), 2))
        return tuple(x.flatten(1, 2) for x in inputs), loop(q, k, v, two_steps)
    if name in ("gated-deltanet", "kda"):
        decay = channels if name == "kda" else two.unsqueeze(-1)
        expected = loop(q, k, v, lambda s, t: delta_step(decay[:, t].unsqueeze(-1) * s, k[:, t], v[:, t], one[:, t]))
        return (q, k, v, one, decay.log()), expected
    if name == "mesa":
        eye = torch.eye(WIDTH, dtype=torch.float64)
        (h, g), reads = torch.zeros(2, ROWS, HEADS, WIDTH, WIDTH, dtype=torch.float64), []
        for t in range(TOKENS):
            beta, gamma = (x[:, t, :, None, None] for x in (one, two))
            h = gamma * h + beta * outer(k[:, t], k[:, t])
            g = gamma * g + beta * outer(k[:, t], v[:, t])
            # logits of one
            ridge = (0.25 + F.softplus(torch.tensor(1.0, dtype=torch.float64))) * eye
            reads.append((torch.linalg.solve(h + ridge, q[:, t].unsqueeze(-1)).mT @ g).squeeze(-2))
        return (q, k, v, one, two.log()), torch.stack(reads, dim=1)
    assert name == "longhorn"
    k, beta = 2 * k, 3 * one
    eye = torch.eye(WIDTH, dtype=torch.float64)

    def implicit(s, t):  # the gradient of the objective is zero where (1 + beta k^T k) S = S' + beta k^T v
        weight = beta[:, t, :, None, None]
        return torch.linalg.solve(eye + weight * outer(k[:, t], k[:, t]), s + weight * outer(k[:, t], v[:, t]))

    return (q, k, v, beta, NONE), loop(q, k, v, implicit)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", [name for name in MODELS if name not in ("titans-lmm", "ttt-linear", "ttt-mlp", "rwkv-7")]
)
def test_a_preset_is_the_published_recurrence(name, form):
    inputs, expected = published(name)
    assert relative_error(read(name, form, *inputs), expected) < 1e-9
    inputs = [x.float() for x in inputs]
    assert relative_error(read(name, form, *inputs), expected) < 1e-5


class _Open(torch.nn.Module):
    def forward(self, x):
        return torch.full((), torch.inf)


def by_transformers(name):
    """Inputs of the preset's memory, and what the code installed with Transformers makes of the model's own, in float32."""
    q, k, v, one, two, channels = draw(torch.float32)
    scale = WIDTH**-0.5  # theirs multiply queries by it
    if name in ("deltanet", "gated-deltanet"):
        g = two.log() if name == "gated-deltanet" else NONE
        return [
            ((q * scale, k, v, one, g), function(q, k, v, g=g, beta=one, use_qk_l2norm_in_kernel=False)[0])
            for function in (torch_recurrent_gated_delta_rule, torch_chunk_gated_delta_rule)
        ]
    if name == "kda":
        g = channels.log()
        return [((q * scale, k, v, one, g), recurrent_kimi_delta_attention(q, k, v, g, one, None, False)[0])]
    if name == "mamba2":
        a, state = -1.0 - torch.arange(HEADS), torch.zeros(ROWS, HEADS, WIDTH, WIDTH)
        each = (HEADS, WIDTH)
        outputs = [
            mamba2_selective_state_update(
                state, v[:, t], one[:, t, :, None].expand(ROWS, *each), a[:, None, None].expand(*each, WIDTH),
                k[:, t], q[:, t],
            )
            for t in range(TOKENS)
        ]  # fmt: skip
        return [((q, k, v, one, one * a), torch.stack(outputs, dim=1))]
    assert name in ("lightning", "linear-attention")
    # with a slope of zero it masks nothing inside its blocks
    config = MiniMaxConfig(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_hidden_layers=2, hidden_act="linear",
        layer_types=["linear_attention"] * 2, block_size=8 if name == "lightning" else 1,
    )  # fmt: skip
    layer = MiniMaxLightningAttention(config, 0)
    # queries, keys and values of a head stand beside each other; what comes after the memory does nothing
    x = torch.cat((q, k, v), dim=-1).flatten(-2)
    layer.qkv_proj, layer.norm, layer.out_proj = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()
    layer.output_gate = _Open()
    slopes = layer.slope_rate.flatten()
    if name == "linear-attention":
        slopes = 0.0 * slopes
        layer.slope_rate = slopes[:, None, None]
        layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)
    expected = layer(x, None, None)[0].unflatten(-1, (HEADS, WIDTH))
    return [((q, k, v, ONE, -slopes.expand(ROWS, TOKENS, HEADS)), expected)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name, preset in MODELS.items() if preset.oracle])
def test_a_preset_is_what_transformers_computes(name, form):
    for inputs, expected in by_transformers(name):
        assert relative_error(read(name, form, *inputs), expected) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_rwkv7(form):
    """`S (diag(w) - kappa^T (a o kappa)) + v^T k~`, its rows the values' channels as in the paper, `y = S r`."""
    r, key, v, _, _, a = draw()
    kappa, w = draw(seed=1)[1], draw(seed=2)[5]
    state, expected = torch.zeros(ROWS, HEADS, WIDTH, WIDTH, dtype=torch.float64), []
    for t in range(TOKENS):
        transition = torch.diag_embed(w[:, t]) - outer(kappa[:, t], a[:, t] * kappa[:, t])
        state = state @ transition + outer(v[:, t], key[:, t])
        expected.append((state @ r[:, t].unsqueeze(-1)).squeeze(-1))
    expected = torch.stack(expected, dim=1)

    def two(first, second):
        return torch.stack((first, second), 2).flatten(1, 2)

    zero = torch.zeros_like(r)
    inputs = two(zero, r), two(a * kappa, key), two(zero, v), ONE.double(), two(w.log(), zero)
    erase = two(kappa, zero)
    assert relative_error(read("rwkv-7", form, *inputs, erase=erase), expected) < 1e-9
    inputs, erase = [x.float() for x in inputs], erase.float()
    assert relative_error(read("rwkv-7", form, *inputs, erase=erase), expected) < 1e-5


def test_hgrn2s_layer_writes_along_what_it_forgets():
    """The tie is the layer's: its outputs are those of the published recurrence of its own forget gates."""
    torch.manual_seed(0)
    config = MirasConfig.from_preset("hgrn2", size="tiny", hidden_size=16, num_attention_heads=2, chunk_size=4)
    mixer = MirasForCausalLM(config).double().model.layers[0].mixer
    assert not {"k_proj", "k_conv"} & dict(mixer.named_children()).keys()
    with torch.no_grad():
        gates = [p for name, p in mixer.alpha.named_parameters() if name != "a_log"]
        for p in (mixer.q_conv.weight, mixer.v_conv.weight, mixer.v_proj.weight, *gates):
            p.copy_(torch.randn_like(p))
        x = torch.randn(ROWS, TOKENS, 16, dtype=torch.float64)

        def convolved(name):
            y = F.conv1d(
                getattr(mixer, f"{name}_proj")(x).mT, getattr(mixer, f"{name}_conv").weight[:, None],
                padding=3, groups=16,
            )  # fmt: skip
            return F.silu(y[..., :TOKENS]).mT.unflatten(-1, (HEADS, WIDTH))

        f = torch.sigmoid(-mixer.alpha.logits(x)).double().clamp(min=torch.tensor(-2.5).exp())
        assert (f < 0.1).any() and (f > 0.9).any()
        q = F.normalize(convolved("q"), dim=-1, eps=0)
        v = convolved("v")
        memory = loop(q, f, v, lambda s, t: f[:, t].unsqueeze(-1) * s + outer(1 - f[:, t], v[:, t]))
        gate = F.silu(mixer.g_proj(x)).unflatten(-1, (HEADS, WIDTH))
        normed = F.rms_norm(memory, (WIDTH,), eps=config.rms_norm_eps) * gate
        expected = mixer.o_proj(normed.flatten(-2))
        assert relative_error(mixer(x)[0], expected) < 1e-5  # gates and queries are float32's


def test_a_tied_write_key_is_refused_where_it_means_nothing():
    for field, value in (
        ("attentional_bias", "l2"),
        ("gate_granularity", "head"),
        ("learned_retention", False),
        ("use_rope", True),
    ):
        with pytest.raises(
            StrictDataclassError, match=f"`{field}` must be .* with `tied_write_key=True`, got {value!r}"
        ):
            MirasConfig.from_preset("hgrn2", **{field: value})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_of_mamba2_computes_the_same_with_the_presets_memory(groups, form, monkeypatch):
    """Its weights, convolution, gates and norm, and in the place of its scan the memory; gradients, too."""
    config = modeling_mamba2.Mamba2Config(
        hidden_size=8, expand=4, num_heads=4, head_dim=8, state_size=8, n_groups=groups, conv_kernel=3, chunk_size=4,
        num_hidden_layers=1, vocab_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = modeling_mamba2.Mamba2Mixer(config, 0).eval()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name != "A_log":
                p.copy_(torch.randn_like(p) * (1.0 if p.dim() == 1 else p[0].numel() ** -0.5))
    # no token forgets more than the rule's chunks can tell from all
    rule, calls = memory_rule(MirasConfig.from_preset("mamba2", chunk_size=8, min_log_alpha=-20.0)), []

    def scan(x, dt, a, b, c, *, D, dt_bias, **_):
        calls.append(x.shape)
        heads, dt = x.shape[2], F.softplus(dt + dt_bias)
        k, q = (t.repeat_interleave(heads // groups, dim=2) for t in (b, c))
        memory = MemoryParameters((torch.zeros(heads, 8, 8),), torch.ones(heads, 8), torch.zeros(heads, 8))
        return FORMS[form](q, k, x, dt, dt * a, rule=rule, parameters=memory)[0] + D[:, None] * x

    hidden = torch.randn(ROWS, TOKENS, 8)
    found = {}
    for name in ("theirs", "ours"):
        if name == "ours":
            monkeypatch.setattr(modeling_mamba2, "mamba2_chunk_scan", scan)
        layer.zero_grad()
        y = layer(hidden)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found[name] = {"y": y.detach(), **{n: p.grad.clone() for n, p in layer.named_parameters()}}
    assert calls == [(ROWS, TOKENS, 4, 8)]
    for name, want in found["theirs"].items():
        assert relative_error(found["ours"][name], want) < 1e-5, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("chunk_size", "depth"), [(1, 2), (8, 2), (8, 1), (8, 3)])
def test_titans(chunk_size, depth, form):
    """Its memory written out, gradients by autograd: at every token's own time, and at the start of its chunks."""
    q, k, v, eta, theta, _ = draw()
    keep, theta, eta, v = 1 - 0.1 * eta, 0.8 * theta, 0.1 * theta, 0.3 * v
    generator = torch.Generator().manual_seed(1)
    initial = tuple(
        torch.randn(HEADS, a, b, generator=generator, dtype=torch.float64) / a**0.5
        for a, b in itertools.pairwise((WIDTH, *(4 * WIDTH,) * (depth - 1), WIDTH))
    )
    expected = torch.empty_like(q)
    for row, head in itertools.product(range(ROWS), range(HEADS)):
        weights, momenta, eps = [w[head] for w in initial], [0.0] * depth, 0.1

        def memory(x, w, eps=eps):
            z = x @ w[0]
            for weight in w[1:]:
                z = F.gelu(z, approximate="tanh") @ weight
            return x + F.layer_norm(z, (WIDTH,), eps=eps)

        for t in range(TOKENS):
            if t % chunk_size == 0:
                at = [w.detach().requires_grad_() for w in weights]
            loss = 0.5 * (memory(k[row, t, head], at) - v[row, t, head]).square().sum()
            grads = torch.autograd.grad(loss, at)
            momenta = [theta[row, t, head] * s - eta[row, t, head] * g for s, g in zip(momenta, grads, strict=True)]
            weights = [keep[row, t, head] * w + s for w, s in zip(weights, momenta, strict=True)]
            expected[row, t, head] = memory(q[row, t, head], weights)
    rule = memory_rule(MirasConfig.from_preset("titans-lmm", chunk_size=chunk_size, memory_depth=depth))
    found = read("titans-lmm", form, q, k, v, eta, keep.log(), rule, initial, log_momentum=theta.log())
    assert relative_error(found, expected) < 1e-9


def layer_norm_and_gradient(z, target, weight, bias):
    """TTT's layer norm, and the gradient of half the squared distance between it and the target: its code's formula."""
    std = (z.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    normed = (z - z.mean(-1, keepdim=True)) / std
    y = normed * weight + bias
    if target is None:
        return y, None
    g = (y - target) * weight
    along = (g * normed).sum(-1, keepdim=True)
    return y, (z.shape[-1] * g - g.sum(-1, keepdim=True) - normed * along) / (z.shape[-1] * std)


def gelu_slope(z):
    """Of the tanh form, as its code has it."""
    tanh = torch.tanh(0.79788456 * z * (1 + 0.044715 * z * z))
    return 0.5 * z * ((1 - tanh * tanh) * (0.79788456 + 0.1070322243 * z * z)) + 0.5 * (1 + tanh)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["ttt-linear", "ttt-mlp"])
def test_ttt(name, form):
    """Its mini-batches written out, gradients by its code's formulas, weights token by token."""
    q, k, v, one, _, _ = draw()
    eta = one / WIDTH if name == "ttt-linear" else 0.1 * one
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(HEADS, *shape, generator=generator, dtype=torch.float64)

    widths = (WIDTH, WIDTH) if name == "ttt-linear" else (WIDTH, 4 * WIDTH, WIDTH)
    initial = tuple(normal(a, b) / a**0.5 for a, b in itertools.pairwise(widths))
    norm = 1 + 0.1 * normal(WIDTH), 0.1 * normal(WIDTH)
    expected = torch.empty_like(q)
    for row, head in itertools.product(range(ROWS), range(HEADS)):
        weights, affine = [w[head] for w in initial], [p[head] for p in norm]
        for t in range(TOKENS):
            if t % 16 == 0:
                at = list(weights)
            key, step = k[row, t, head][None], eta[row, t, head]
            target = v[row, t, head] - key
            inputs, first = [key], key @ at[0]
            if name == "ttt-mlp":
                inputs.append(F.gelu(first, approximate="tanh"))
            _, g = layer_norm_and_gradient(inputs[-1] @ at[-1], target, *affine)
            gradients = [g] if name == "ttt-linear" else [g @ at[1].T * gelu_slope(first), g]
            weights = [w - step * x.T @ g for w, x, g in zip(weights, inputs, gradients, strict=True)]
            z = q[row, t, head] @ weights[0]
            if name == "ttt-mlp":
                z = F.gelu(z, approximate="tanh") @ weights[1]
            expected[row, t, head] = q[row, t, head] + layer_norm_and_gradient(z, None, *affine)[0]
    rule = rule_of(name, 16)
    assert relative_error(read(name, form, q, k, v, eta, NONE.double(), rule, initial, norm), expected) < 1e-9
    inputs = [x.float() for x in (q, k, v, eta, NONE)]
    initial, norm = ([x.float() for x in xs] for xs in (initial, norm))
    assert relative_error(read(name, form, *inputs, rule, tuple(initial), norm), expected) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_makes_a_model(name):
    """Gates that a model does not have stand still, and one that is not wanted is not there; decoding is reading."""
    config = MirasConfig.from_preset(name, size="tiny", vocab_size=32, chunk_size=4)
    assert (config.hidden_size, config.num_hidden_layers) == (128, 2)
    torch.manual_seed(0)
    model = MirasForCausalLM(config)
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    mixer = model.model.layers[0].mixer
    assert (mixer.eta is None) == config.tied_step
    assert [hasattr(gate, "up_proj") for gate in (mixer.eta, mixer.alpha)] == [
        config.learned_step and not config.tied_step, config.learned_retention and config.has_retention,
    ]  # fmt: skip
    with torch.no_grad():
        x = torch.randn(2, 3, 128)
        if not config.learned_step:
            assert mixer.eta(x).shape[:3] == (2, 3, 4) and (mixer.eta(x) == 1.0).all()
        if not config.has_retention:
            assert mixer.alpha(x).shape[:3] == (2, 3, 4) and not mixer.alpha(x).any()
        elif not config.learned_retention:
            half_lives = -torch.log(torch.tensor(2.0)) / mixer.alpha(x)
            ends = torch.tensor([config.min_half_life, config.max_half_life])
            torch.testing.assert_close(half_lives[..., [0, -1]], ends.expand(2, 3, 2), rtol=1e-3, atol=0)
        if config.initial_memory_scale == 0.0:
            assert not mixer.memory.initial_state[0].any()
        model.eval()
        whole, out = model(ids).logits, model(ids[:, :6], use_cache=True)
        parts = [out.logits]
        for t in range(6, 9):
            out = model(ids[:, t : t + 1], cache=out.past_key_values)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_gates_that_stand_still_are_not_trained_after_they_are_loaded(tmp_path):
    config = MirasConfig.from_preset("retnet", size="tiny", vocab_size=32)
    MirasForCausalLM(config).save_pretrained(tmp_path)
    model = MirasForCausalLM.from_pretrained(tmp_path)
    still = {name for name, p in model.named_parameters() if not p.requires_grad}
    layers = range(config.num_hidden_layers)
    assert still == {f"model.layers.{i}.mixer.{x}" for i in layers for x in ("eta.bias", "alpha.bias", "alpha.a_log")}
    plan = config.tensor_parallel_plan()
    assert plan["layers.*.mixer.eta"] == "heads" and "layers.*.mixer.eta.up_proj" not in plan
    plan = MirasConfig.from_preset("mamba2").tensor_parallel_plan()
    assert plan["layers.*.mixer.skip"] == "heads" and not any(name.endswith(("eta", "eta.up_proj")) for name in plan)


def test_what_is_no_preset_is_refused():
    with pytest.raises(ValueError, match="`name` must be one of .*'tiny'.* or of .*'kda'.*, got 'rwkv'"):
        MirasConfig.from_preset("rwkv")
    with pytest.raises(
        ValueError, match="`name` must be a size, got 'kda': a model of `MirasConfig`, not `MonetaConfig`"
    ):
        MonetaConfig.from_preset("kda")
    with pytest.raises(ValueError, match="`paper` must be False with 'kda'"):
        MirasConfig.from_preset("kda", paper=True)
    with pytest.raises(ValueError, match="`size` must be one of .*'tiny'.* or None, got 'huge'"):
        MirasConfig.from_preset("kda", size="huge")
    with pytest.raises(ValueError, match="`size` must be None with a size by name, got 'tiny' with '170m'"):
        MirasConfig.from_preset("170m", size="tiny")
    for retention in ("kl", "lq"):
        with pytest.raises(
            StrictDataclassError, match=f"`initial_memory_scale` must .*`retention='{retention}'`, got 0"
        ):
            MirasConfig(initial_memory_scale=0.0, retention=retention)


def test_the_documents_table_is_that_of_the_presets():
    page = (Path(__file__).resolve().parents[1] / "docs" / "design_space.md").read_text(encoding="utf-8")
    assert table() in page
    assert not MODELS.keys() & NOT_EXPRESSED.keys()
