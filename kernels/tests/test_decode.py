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
"""The decode kernels against the mathematics in float64, and against themselves: bits do not depend on company."""

import pytest
import torch
from test_forward import (
    DEVICE,
    GATES,
    TOLERANCE,
    assert_close,
    by_kernel,
    flat,
    in_float64,
    make_call,
    make_rule,
    masked,
)

from miras_hf.backend import MemoryBackend, kernel_choices
from miras_hf.memory import MemoryState, initial_memory_state, step_miras
from miras_kernels import LARGEST_CALL, Projections, decode, refusal, resident_state
from miras_kernels.choices import ATTENTIONAL_BIASES, RETENTION_GATES


def cut(inputs, first, last):
    return [None if x is None else x[:, first:last] for x in inputs]


def after_prompt(rule, inputs, parameters, tokens, mask=None):
    """Resident state after the first tokens, and its link cache."""
    _, state, _ = by_kernel(rule, cut(inputs, 0, tokens), parameters, mask=mask)
    return resident_state(state, choices=kernel_choices(rule)[0], initial=parameters.initial)


@masked
def by_decode(rule, inputs, parameters, state, link_cache, precision="ieee", **kwargs):
    return decode(
        *inputs,
        choices=kernel_choices(rule)[0],
        initial=parameters.initial,
        norm_weight=parameters.norm_weight,
        norm_bias=parameters.norm_bias,
        state=state,
        link_cache=link_cache,
        precision=precision,
        **kwargs,
    )


def check(rule, prompt=(14, 3), tokens=4, tolerance=None, holes=False, **call):
    """Rows with prompts of different lengths: the first ends its chunk of 16, the second does not. `holes`: the first
    row has no token at the second position, the second none at all."""
    inputs, parameters = make_call(rule, len(prompt), max(prompt) + tokens, **call)
    lengths = torch.tensor(prompt, device=DEVICE)
    real = torch.arange(max(prompt), device=DEVICE) < lengths[:, None]
    state, link_cache = after_prompt(rule, inputs, parameters, max(prompt), real)
    new = torch.ones(len(prompt), tokens, dtype=torch.bool, device=DEVICE)
    if holes:
        new[0, 1] = new[1] = False
    y = by_decode(rule, cut(inputs, max(prompt), None), parameters, state, link_cache, mask=new if holes else None)
    mask = torch.cat((real, new), dim=1)
    expected, final = in_float64(rule, inputs, parameters, mask=mask)
    name = next(name for name, gate in GATES.items() if type(rule.retention) is gate)
    tolerance = tolerance or TOLERANCE[name]
    assert_close("y", y, expected[:, max(prompt) :], tolerance)
    for i, (got, wanted) in enumerate(zip(state, final, strict=True)):
        assert_close(f"state[{i}]", got, wanted, 3 * tolerance)
    # what the kernel has kept is what would be made anew
    _, fresh = resident_state(state, choices=kernel_choices(rule)[0], initial=parameters.initial)
    for i, (got, wanted) in enumerate(zip(link_cache, fresh, strict=True)):
        assert_close(f"link_cache[{i}]", got, wanted, 1e-5)


@pytest.mark.parametrize("decay_target", ["init", "zero"])
@pytest.mark.parametrize("retention", RETENTION_GATES)
@pytest.mark.parametrize("memory", ["mlp", "matrix", "last"])
def test_links(memory, retention, decay_target):
    check(make_rule(memory, "huber_mixture", retention, decay_target=decay_target), heads=1)


@pytest.mark.parametrize("gates", ["channel", "head"])
@pytest.mark.parametrize("bias", ATTENTIONAL_BIASES)
def test_losses(bias, gates):
    check(make_rule("mlp" if gates == "channel" else "matrix", bias), heads=1, gates=gates)


@pytest.mark.parametrize("head_dim, chunk_size", [(48, 16), (64, 32), (128, 64)])
def test_sizes(head_dim, chunk_size):
    check(
        make_rule(chunk_size=chunk_size, retention="lq"),
        heads=1,
        head_dim=head_dim,
        prompt=(chunk_size - 1,),
        tokens=2,
    )


@pytest.mark.parametrize(
    "options", [{"bias": "lp", "power": 2.5, "sign": "tanh"}, {"retention": "lq", "q": 3.0}], ids=str
)
def test_unusual_choices(options):
    check(make_rule(**options), heads=2, prompt=(15, 9), tokens=2)


@pytest.mark.parametrize("memory", ["mlp", "matrix", "last"])
def test_rows_without_a_token_stay(memory):
    rule = make_rule(memory, "l2", "decay" if memory == "matrix" else "kl", decay_target="zero")
    check(rule, prompt=(14, 0), holes=True, heads=1)


@pytest.mark.parametrize(("memory", "retention"), [("mlp", "decay"), ("mlp", "kl"), ("last", "lq")])
def test_bits_do_not_depend_on_company(memory, retention):
    """A row alone, in a batch, with all its tokens at once or one by one: the same bits, in the state, too."""
    rule = make_rule(memory, "huber_mixture", retention)
    inputs, parameters = make_call(rule, 3, 17, heads=2, dtype=torch.bfloat16)
    prompt = torch.arange(13, device=DEVICE) < torch.tensor([[13], [2], [7]], device=DEVICE)
    start, link_cache = after_prompt(rule, inputs, parameters, 13, prompt)
    new = cut(inputs, 13, None)

    def fresh(rows=slice(None)):
        return tuple(x[rows].clone() for x in start), tuple(x[rows].clone() for x in link_cache)

    batch = fresh()
    y = by_decode(rule, new, parameters, *batch, precision="bf16")
    for row in (0, 2):
        rows = slice(row, row + 1)
        alone = fresh(rows)
        of_row = [None if x is None else x[rows] for x in new]
        outputs = [by_decode(rule, cut(of_row, t, t + 1), parameters, *alone, precision="bf16") for t in range(4)]
        assert torch.equal(torch.cat(outputs, dim=1), y[rows])
        for got, wanted in zip((*alone[0], *alone[1]), (*batch[0], *batch[1]), strict=True):
            assert torch.equal(got, wanted[rows])


def test_bfloat16():
    rule = make_rule("mlp", "lp", "lq")
    inputs, parameters = make_call(rule, 1, 18, heads=1, dtype=torch.bfloat16)
    state, link_cache = after_prompt(rule, inputs, parameters, 14)
    y = by_decode(rule, cut(inputs, 14, None), parameters, state, link_cache, precision="bf16")
    assert y.dtype == torch.bfloat16
    expected, _ = in_float64(rule, inputs, parameters)
    assert_close("y", y, expected[:, 14:], 0.02)


def test_first_token_needs_no_prompt():
    for target in ("init", "zero"):
        rule = make_rule(decay_target=target, chunk_size=16)
        inputs, parameters = make_call(rule, 1, 2, heads=1)
        empty = flat(initial_memory_state(rule, parameters, 1, 32))
        if target == "zero":
            empty[:2] = [torch.zeros_like(x) for x in empty[:2]]  # a row of zeros is at the learned initial memory
        state, link_cache = resident_state(tuple(empty), choices=kernel_choices(rule)[0], initial=parameters.initial)
        y = by_decode(rule, inputs, parameters, state, link_cache)
        assert_close("y", y, in_float64(rule, inputs, parameters)[0], 3e-6)


@pytest.mark.parametrize(
    ("gates", "size", "value_norm"), [("channel", 1.0, False), ("head", 1.0, True), ("channel", 1e25, True)]
)
def test_projections(gates, size, value_norm):
    """Convolution, rotary embedding, l2 norms and activations of the gates, against their PyTorch forms in float64."""
    rule = make_rule("mlp", "huber_coordinate" if gates == "channel" else "huber_norm")
    (q, k, v, *_), parameters = make_call(rule, 2, 3, heads=2, gates=gates)
    for spiked in (q, k, *([v] if value_norm else [])):  # larger than float32 can square
        spiked[0, 1] *= size
    draw = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(DEVICE)

    width, of_gate = 2 * 32, (2, 3, 2, *((32,) if gates == "channel" else ()))
    logits = [3.0 * normal(*of_gate), 4.0 * normal(*of_gate) - 8.0, normal(*of_gate)]
    weights, tail = tuple(normal(width, 4) for _ in "qkv"), normal(2, 3, 3 * width)
    angle, a_log = normal(2, 3, 16).repeat(1, 1, 2), normal(2)
    start = initial_memory_state(rule, parameters, 2, logits[0].shape[-1] if gates == "channel" else 1)

    def convolved(x, part, weight):
        window = torch.cat((tail[..., part * width : (part + 1) * width], x.flatten(-2)), dim=1).double()
        taps = [window[:, j : j + 3] * weight[:, j].double() for j in range(4)]
        return torch.nn.functional.silu(sum(taps)).unflatten(-1, (2, 32))

    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return (
            x * angle.double().cos()[:, :, None] + torch.cat((-second, first), -1) * angle.double().sin()[:, :, None]
        )

    def unit(x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    parts = [convolved(x, i, w) for i, (x, w) in enumerate(zip((q, k, v), weights, strict=True))]
    rate = torch.nn.functional.softplus(logits[1].double())
    finished = [
        unit(turned(parts[0])),
        unit(turned(parts[1])),
        unit(parts[2]) * 32**0.5 if value_norm else parts[2],
        0.05 * logits[0].double().sigmoid(),
        -rate * (a_log.double().exp()[:, None] if gates == "channel" else a_log.double().exp()),
        torch.nn.functional.softplus(logits[2].double()) + 1e-4,
    ]
    expected, _ = in_float64(rule, finished, parameters)
    state, link_cache = resident_state(tuple(flat(start)), choices=kernel_choices(rule)[0], initial=parameters.initial)
    new_tail = tail.clone()
    projections = Projections(weights, new_tail, a_log, 0.05, angle.cos(), angle.sin(), value_norm)
    y = by_decode(rule, [q, k, v, *logits], parameters, state, link_cache, projections=projections)
    assert_close("y", y, expected, 5e-6)
    assert_close("eta", state[-3][:, :, :3].transpose(1, 2).reshape(of_gate), finished[3], 1e-6)
    log_decay = finished[4].cumsum(1).clamp(min=-2.5 * 3)
    bounded = finished[4].clamp(min=-2.5).cumsum(1)
    assert_close("log_decay", state[-2][:, :, :3].transpose(1, 2).reshape(of_gate), bounded, 1e-6)
    assert log_decay.shape == bounded.shape
    # a rate of 1e-6, a half-life of a million tokens, keeps its digits
    tiny = finished[4][finished[4] > -1e-4]
    assert tiny.numel()
    assert torch.equal(new_tail, torch.cat([x.flatten(-2)[:, :3] for x in (q, k, v)], dim=-1))


def test_hidden_state_passes_between_kernels_and_pytorch():
    """One token by the kernel, one by PyTorch, a longer piece by the forward kernel: one memory."""
    rule = make_rule("mlp", "lp", "lq")
    inputs, parameters = make_call(rule, 1, 24, heads=1)
    state, link_cache = after_prompt(rule, inputs, parameters, 13)
    ys = [by_decode(rule, cut(inputs, 13, 15), parameters, state, link_cache)]
    parts = (tuple(state[i : i + 2]) for i in (0, 2, 4))
    y, after = step_miras(
        *cut(inputs, 15, 16), rule=rule, parameters=parameters, initial_state=MemoryState(*parts, *state[6:])
    )
    ys.append(y)
    y, last, _ = by_kernel(rule, cut(inputs, 16, 23), parameters, state=tuple(flat(after)))
    ys.append(y)
    state, link_cache = resident_state(last, choices=kernel_choices(rule)[0], initial=parameters.initial)
    ys.append(by_decode(rule, cut(inputs, 23, 24), parameters, state, link_cache))
    expected, _ = in_float64(rule, inputs, parameters)
    assert_close("y", torch.cat(ys, dim=1), expected[:, 13:], 3e-6)


def test_mistakes_are_named():
    rule = make_rule("mlp", "huber_mixture")
    inputs, parameters = make_call(rule, 1, 20, heads=1)
    state, link_cache = after_prompt(rule, inputs, parameters, 2)
    one = cut(inputs, 2, 3)

    def fails(words, inputs=one, state=state, link_cache=link_cache, **kwargs):
        with pytest.raises(ValueError, match=words):
            by_decode(rule, inputs, parameters, state, link_cache, **kwargs)

    fails(f"`q` must hold 1 to {LARGEST_CALL} tokens", cut(inputs, 2, 20))
    fails("`link_cache` must have shapes", link_cache=link_cache[:1])
    fails("`state` must have shapes", state=state[1:])
    fails("`state` must be contiguous and float32", state=(state[0].double(), *state[1:]))
    fails("`lengths` must be of int", lengths=torch.ones(1, device=DEVICE))
    weights = tuple(torch.ones(32, 4, device=DEVICE) for _ in "qkv")
    tail, a_log = torch.zeros(1, 3, 96, device=DEVICE), torch.zeros(1, device=DEVICE)
    fails(
        r"`projections.conv_tail` must have shape \(1, 3, 96\)",
        projections=Projections(weights, tail[:, 1:], a_log, 1.0),
    )
    fails("`projections.cos` must have shape", projections=Projections(weights, tail, a_log, 1.0, tail, tail))
    needs_grad = refusal(torch.device(DEVICE), torch.float32, 32, kernel_choices(rule)[0], True, decode=True)
    assert needs_grad == "gradients are needed, and decoding has none"


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
def test_operator_is_well_formed(memory):
    rule = make_rule(memory)
    inputs, parameters = make_call(rule, 1, 4, heads=1)
    state, link_cache = after_prompt(rule, inputs, parameters, 2)
    weights = [torch.ones(32, 4, device=DEVICE) for _ in "qkv"]
    tail, a_log = torch.zeros(1, 3, 96, device=DEVICE), torch.zeros(1, device=DEVICE)
    choices = vars(kernel_choices(rule)[0]).values()
    arguments = (*cut(inputs, 2, 3), list(parameters.initial), *parameters[1:], [*state, *link_cache])
    projections = (weights, tail, a_log, 0.1, None, None, False)
    torch.library.opcheck(
        torch.ops.miras_kernels.decode.default,
        (*arguments, *projections, None, "ieee", *choices),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


def test_backend_reads_in_place_only_without_gradients():
    rule = make_rule("mlp", "l2")
    inputs, parameters = make_call(rule, 1, 20, heads=1)
    backend = MemoryBackend(rule, "triton")
    v = inputs[2]
    assert not backend.reads_in_place(v[:, :1])  # gradients may be asked for
    with torch.no_grad():
        assert backend.reads_in_place(v[:, :1]) and backend.reads_in_place(v[:, :LARGEST_CALL])
        assert not backend.reads_in_place(v)
        assert not MemoryBackend(rule, "pytorch").reads_in_place(v[:, :2])
        assert MemoryBackend(rule, "pytorch").reads_in_place(v[:, :1])
