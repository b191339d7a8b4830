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
"""The mixer's own operations: their hand-written adjoints are those of autograd, and keep what they say they keep."""

import math

import pytest
import torch
from torch import func
from torch.autograd import gradgradcheck

from miras_hf import MirasConfig, MirasModel, MonetaConfig, MonetaModel, YaadConfig, YaadModel
from miras_hf.mixer_ops import (
    causal_convolution,
    l2norm,
    negative_softplus,
    rms_norm,
    scaled_sigmoid,
    silu_gated_rms_norm,
)
from miras_hf.modeling_miras import MirasMemory, MirasShortConvolution, ProjectedTokens


def leaf(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def convolution(tokens, position=None, silu=True):
    inputs = (leaf(2, tokens, 6), leaf(6, 4))
    return inputs, lambda x, weight: causal_convolution(x, weight, position=position, silu=silu)


CASES = {
    **{f"convolution of {tokens}": convolution(tokens) for tokens in (1, 2, 3, 4, 9)},
    "convolution of packs": convolution(7, torch.tensor([[0, 1, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5]])),
    "convolution of short packs": convolution(2, torch.tensor([[0, 0], [0, 1]])),
    "linear convolution of packs": convolution(
        7, torch.tensor([[0, 1, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5]]), silu=False
    ),
    "convolution with a bias": (
        (leaf(2, 9, 6), leaf(6, 4), leaf(6)),
        lambda x, weight, bias: causal_convolution(x, weight, bias=bias),
    ),
    "linear convolution with a bias of packs": (
        (leaf(2, 7, 6), leaf(6, 4), leaf(6)),
        lambda x, weight, bias: causal_convolution(
            x, weight, position=torch.tensor([[0, 1, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5]]), bias=bias, silu=False
        ),
    ),
    "l2 norm": ((leaf(2, 5, 3, 4),), l2norm),
    "l2 norm of a length": ((leaf(2, 5, 3, 4),), lambda x: l2norm(x, length=2.0)),
    "step": ((leaf(2, 5, 3),), lambda u: scaled_sigmoid(u, 0.09)),
    "retention of channels": ((leaf(2, 5, 3, 4), leaf(3, 1)), lambda u, a: negative_softplus(u, a.exp())),
    "retention of heads": ((leaf(2, 5, 3), leaf(3)), lambda u, a: negative_softplus(u, a.exp())),
    "gated norm": (
        (leaf(2, 5, 3, 4), leaf(2, 5, 3, 4), leaf(4)),
        lambda x, gate, weight: silu_gated_rms_norm(x, gate, weight, 1e-6),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_adjoints_are_those_of_autograd(name, monkeypatch):
    inputs, function = CASES[name]
    y = function(*inputs)
    y_bar = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    bars = torch.autograd.grad(y, inputs, y_bar)
    # the formulas as they are left to the compiler
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    expected = function(*inputs)
    tolerance = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(y, expected, **tolerance)
    for bar, other in zip(bars, torch.autograd.grad(expected, inputs, y_bar), strict=True):
        torch.testing.assert_close(bar, other, **tolerance)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name):
    inputs, function = CASES[name]
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_transforms(name):
    """Of `torch.func`, forward mode and traces, against the backward pass."""
    inputs, function = CASES[name]
    y = function(*inputs)
    y_bar = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    bars = torch.autograd.grad(y, inputs, y_bar)
    plain = tuple(x.detach() for x in inputs)
    for bar, other in zip(func.vjp(function, *plain)[1](y_bar), bars, strict=True):
        torch.testing.assert_close(bar, other, rtol=1e-10, atol=1e-12)
    tangent = func.jvp(function, plain, plain)[1]
    torch.testing.assert_close((tangent * y_bar).sum(), sum((x * b).sum() for x, b in zip(plain, bars, strict=True)))
    found = func.vmap(function)(*(torch.stack((x, 0.9 * x)) for x in plain))
    torch.testing.assert_close(found, torch.stack((y, function(*(0.9 * x for x in plain)))), rtol=1e-10, atol=1e-12)
    traced = torch.jit.trace(function, inputs)
    torch.testing.assert_close(traced(*(0.9 * x for x in plain)), function(*(0.9 * x for x in plain)))


def test_mixed_precision():
    """Half-precision inputs beside float32 weights, as under autocast: adjoints have the dtypes of what they belong to."""
    x, gate = (leaf(2, 5, 3, 4, dtype=torch.bfloat16) for _ in range(2))
    weight, taps = leaf(4, dtype=torch.float32), leaf(12, 4, dtype=torch.float32)
    y = silu_gated_rms_norm(x, gate, weight, 1e-6)
    convolved = causal_convolution(x.flatten(-2), taps)
    assert y.dtype == convolved.dtype == torch.float32
    (y.sum() + convolved.square().sum()).backward()
    for tensor in (x, gate, weight, taps):
        assert tensor.grad.dtype == tensor.dtype and tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0


def test_what_a_mixer_keeps():
    """Twelve tensors of the whole length: its input, what enters the convolutions, what the memory reads, its output,
    the output gate, and what enters the output projection."""
    torch.manual_seed(0)
    config = YaadConfig(
        vocab_size=16,
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        chunk_size=16,
        memory_backend="pytorch",
    )
    mixer = YaadModel(config).layers[0].mixer
    hidden_states = torch.randn(1, 512, 64, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = mixer(hidden_states)
    whole = hidden_states.numel() * hidden_states.element_size()
    assert sum(size >= whole for size in kept.values()) == 12
    output.sum().backward()


NORMS = {
    "l2 norm": (l2norm, lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()),
    "l2 norm of a length": (
        lambda x: l2norm(x, length=3.0),
        lambda x: 3.0 * x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt(),
    ),
    "rms norm": (
        lambda x: rms_norm(x, torch.ones(x.shape[-1]), 1e-6),
        lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(),
    ),
    "gated norm": (
        lambda x: silu_gated_rms_norm(x, torch.ones_like(x), torch.ones(x.shape[-1]), 1e-6),
        lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() / (1 + math.exp(-1)),
    ),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e14, 1e18, 1e30, 1e37])
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_any_scale(name, scale, compiled, monkeypatch):
    """Squares leave float32 above 1e19, values and gradients do not: against float64."""
    if compiled:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    function, exact = NORMS[name]
    x, bar = (leaf(3, 5, 8).detach().roll(shift, -1) for shift in (0, 1))
    x[1] *= scale  # beside rows that are as always
    x[1, 0, :4] = 1.0  # and in a row of both
    x = x.float()
    wide, narrow = x.double().requires_grad_(), x.clone().requires_grad_()
    y, expected = function(narrow), exact(wide)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    (found,), (expected,) = torch.autograd.grad(y, narrow, bar.float()), torch.autograd.grad(expected, wide, bar)
    # of rows of 1e37 gradients are of 1e-37
    largest = expected.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(found / largest, expected / largest, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_packs_keep_what_is_not_a_number():
    """A border is selected, not multiplied by."""
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    x, weight = leaf(1, 8, 6), leaf(6, 4)
    broken = x.detach().clone()
    broken[:, 3] = torch.nan
    y = causal_convolution(broken, weight, position=position)
    assert y[:, 3].isnan().all()
    torch.testing.assert_close(y[:, 4:], causal_convolution(x, weight, position=position)[:, 4:])


@pytest.mark.parametrize("config,model", [(YaadConfig, YaadModel), (MonetaConfig, MonetaModel)])
def test_spikes_in_the_inputs_of_a_model(config, model):
    """A token of 1e30 is read by its direction, as one of 1e4 is, and its gradient is a number."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    model = model(config(num_hidden_layers=2, chunk_size=16, memory_backend="pytorch", **sizes))
    tokens = torch.randn(1, 300, 32)
    outputs = []
    for scale in (1e4, 1e30):
        embeds = torch.where(torch.arange(300).view(1, -1, 1) % 20 == 7, tokens * scale, tokens).requires_grad_()
        outputs.append(model(inputs_embeds=embeds, use_cache=False).last_hidden_state)
        outputs[-1].square().sum().backward()
        assert embeds.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-2, atol=1e-2)


def test_a_token_that_is_not_a_number_reaches_the_future_alone():
    """Of a whole model, in the middle of a chunk."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    model = YaadModel(YaadConfig(num_hidden_layers=2, chunk_size=16, memory_backend="pytorch", **sizes))
    embeds = torch.randn(1, 40, 32)
    broken = embeds.clone()
    broken[:, 23] = torch.nan
    y, whole = (model(inputs_embeds=x, use_cache=False).last_hidden_state for x in (broken, embeds))
    torch.testing.assert_close(y[:, :23], whole[:, :23])
    assert y[:, 23:].isnan().all()


def test_values_under_autocast_are_those_of_a_half_precision_model():
    """Kernels take their precision from the values, so that wider ones would be slower and no more exact."""
    seen = []

    def look(memory, inputs):
        tokens, sequences, *_ = inputs
        seen.append(tokens.finished(position=sequences.position)[2].dtype)

    model = MonetaModel(MonetaConfig.from_preset("tiny"))
    for memory in (module for module in model.modules() if isinstance(module, MirasMemory)):
        memory.register_forward_pre_hook(look)
    ids = torch.arange(20)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)
    model.bfloat16()(ids)
    assert seen == 4 * [torch.bfloat16]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "preset,fields",
    [
        ("gated-deltanet", {}),
        ("gated-deltanet", {"use_rope": True, "memory_num_key_value_heads": 1}),
        ("hgrn2", {}),  # without keys
        ("rwkv-7", {"use_rope": True}),  # with erase keys
        ("delta-product", {"value_norm": True}),  # with several writes
        ("mamba2", {"use_rope": True}),  # with biases, and of any norm
        ("delta-product", {"conv_kernel_size": 1, "conv_act": "linear"}),
    ],
)
def test_a_token_is_finished_as_it_is_in_a_text(preset, fields, batch, monkeypatch):
    """All heads of queries, keys, values and erase keys together, where a text takes one after the other; and a convolution
    that is hooked is called by both."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "chunk_size": 8}
    config = MirasConfig.from_preset(preset, **sizes, **fields)
    mixer = MirasModel(config).layers[0].mixer.double()
    for name in mixer.projected:
        for parameter in mixer.convolution(name).parameters():
            torch.nn.init.normal_(parameter)
    x = torch.randn(batch, 9, 32, dtype=torch.float64)
    rotary = (torch.randn(batch, 9, 16, dtype=torch.float64),) * 2 if config.use_rope else None

    def of_tokens(first, last):
        return ProjectedTokens(mixer, x, **dict(mixer.projections(x)), rotary=rotary).part(first, last)

    def in_a_text():
        return [None if t is None else t[:, -mixer.slots :] for t in of_tokens(0, 9).finished()]

    def alone():
        return of_tokens(8, 9).finished(of_tokens(0, 8).conv_inputs(None)[:, 8:])

    calls = []
    forward = MirasShortConvolution.forward
    monkeypatch.setattr(MirasShortConvolution, "forward", lambda *args: calls.append(args) or forward(*args))
    plain = alone()
    assert not calls
    for found, expected in zip(plain, in_a_text(), strict=True):
        torch.testing.assert_close(found, expected)
    hook = mixer.v_conv.register_forward_hook(lambda module, args, output: 2.0 * output + 1.0)
    hooked = alone()
    for found, expected in zip(hooked, in_a_text(), strict=True):
        torch.testing.assert_close(found, expected)
    assert not torch.allclose(hooked[2], plain[2])
    hook.remove()
    # as Accelerate does
    mixer.v_conv.forward = lambda *args: 3.0 * MirasShortConvolution.forward(mixer.v_conv, *args)
    patched = alone()
    for found, expected in zip(patched, in_a_text(), strict=True):
        torch.testing.assert_close(found, expected)
    if not config.value_norm:
        assert not torch.allclose(patched[2], plain[2])
    del mixer.v_conv.forward
    calls.clear()
    mixer.v_conv.register_full_backward_hook(lambda module, of_inputs, of_outputs: None)
    alone()
    assert calls
