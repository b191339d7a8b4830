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
"""The forward kernels against the PyTorch chunk form in float64, over choices, sizes, lengths, packs and states."""

import functools
import itertools
import math

import pytest
import torch
import triton
import triton.language as tl

from miras_hf.backend import Carry, MemoryBackend, kernel_choices
from miras_hf.memory import (
    ATTENTIONAL_BIASES as BIASES,
)
from miras_hf.memory import (
    MEMORY_ARCHITECTURES,
    MemoryParameters,
    MemoryState,
    MirasRule,
    MLPMemory,
    chunk_miras,
    recurrent_miras,
)
from miras_hf.memory import (
    RETENTION_GATES as GATES,
)
from miras_hf.sequences import Sequences
from miras_kernels import Choices, forward, ops, pieces, refusal
from miras_kernels.choices import ATTENTIONAL_BIASES, CHUNK_SIZES, HEAD_DIMS, RETENTION_GATES


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# steps at which a chunk changes the memory much without making it chaotic
STEP = {"decay": 0.03, "lq": 1.5e-3, "lq_mirror": 0.3, "kl": 0.05}
# relative to the largest value. KL's reads are small differences of its weights: float32 PyTorch is as far away.
TOLERANCE = {"decay": 3e-6, "lq": 3e-6, "lq_mirror": 6e-6, "kl": 3e-5}


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """What a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def make_rule(memory="mlp", bias="l2", retention="decay", chunk_size=16, decay_target="init", **options) -> MirasRule:
    bias = BIASES[bias](**{k: v for k, v in options.items() if k in ("power", "sign")} if bias == "lp" else {})
    gate = GATES[retention](**{"power": options["q"]} if "q" in options and retention.startswith("lq") else {})
    # "last": an MLP memory whose first weight no text writes
    architecture = MLPMemory(update_layers="last") if memory == "last" else MEMORY_ARCHITECTURES[memory]()
    return MirasRule(architecture, bias, gate, chunk_size=chunk_size, decay_target=decay_target)


def make_call(rule, batch=1, tokens=21, heads=2, head_dim=32, gates="channel", dtype=torch.float32, seed=0):
    """Arguments of every form, and the memory's parameters."""
    draw = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, heads, head_dim)
    q, k = (torch.nn.functional.normalize(torch.randn(shape, generator=draw), dim=-1) for _ in range(2))
    v = torch.randn(shape, generator=draw)
    of_gate = shape if gates == "channel" else shape[:3]
    name = next(name for name, gate in GATES.items() if type(rule.retention) is gate)
    eta = STEP[name] * torch.rand(of_gate, generator=draw)
    log_alpha = -0.2 * torch.rand(of_gate, generator=draw)
    granularity = rule.attentional_bias.delta_granularity
    delta = {None: None, "head": shape[:3], "channel": shape}[granularity]
    if delta is not None:  # on both sides of the errors' sizes
        scale = 2.0 * math.sqrt(head_dim) if granularity == "head" else 2.0
        delta = scale * torch.rand(delta, generator=draw) + 0.1
    initial = []
    for layer, fan in enumerate(rule.architecture.weight_shapes(head_dim)):
        weight = torch.randn(heads, *fan, generator=draw) * ((2.0 if layer == 0 else 1.0) / math.sqrt(fan[0]))
        initial.append(rule.retention.inverse(weight, rule.hidden_axis(layer)).to(DEVICE))
    affine = (
        1.0 + 0.1 * torch.randn(heads, head_dim, generator=draw),
        0.1 * torch.randn(heads, head_dim, generator=draw),
    )
    inputs = [None if x is None else x.to(DEVICE) for x in (q, k, v, eta, log_alpha, delta)]
    inputs[:3] = [x.to(dtype) for x in inputs[:3]]
    return inputs, MemoryParameters(tuple(initial), *(x.to(DEVICE) for x in affine))


def flat(state: MemoryState) -> list[torch.Tensor]:
    return [*state.dual, *state.inputs, *state.gradients, state.eta, state.log_decay, state.count]


def masked(read):
    """`read`, which also takes a mask `[batch, tokens]`: true tokens are brought to the front, as models bring them."""

    @functools.wraps(read)
    def wrapped(rule, inputs, parameters, *args, mask=None, **kwargs):
        if mask is None:
            return read(rule, inputs, parameters, *args, **kwargs)
        sequences = Sequences(mask)
        first = [None if x is None else sequences.gather(x.flatten(2)).view_as(x) for x in inputs]
        found = read(rule, first, parameters, *args, lengths=sequences.lengths, **kwargs)
        y, *rest = found if isinstance(found, tuple) else (found,)
        assert not y[torch.arange(mask.shape[1], device=y.device) >= sequences.lengths[:, None]].any()
        y = sequences.scatter(y.flatten(2), len(mask)).view_as(y)
        return (y, *rest) if rest else y

    return wrapped


@masked
def by_kernel(rule, inputs, parameters, state=None, precision="ieee", **kwargs):
    choices, reason = kernel_choices(rule)
    assert choices is not None, reason
    return forward(
        *inputs,
        choices=choices,
        initial=parameters.initial,
        norm_weight=parameters.norm_weight,
        norm_bias=parameters.norm_bias,
        state=state,
        output_final_state=True,
        precision=precision,
        **kwargs,
    )


@torch.no_grad()
@masked
def in_float64(rule, inputs, parameters, form=chunk_miras, state=None, **kwargs):
    double = [None if x is None else x.double() for x in inputs]
    wide = MemoryParameters(tuple(a.double() for a in parameters.initial), *(p.double() for p in parameters[1:]))
    y, final = form(*double, rule=rule, parameters=wide, initial_state=state, output_final_state=True, **kwargs)
    return y, flat(final)


def assert_close(name, got, expected, tolerance):
    assert got.shape == expected.shape, (name, got.shape, expected.shape)
    assert torch.isfinite(got).all(), f"{name} is not finite"
    if not expected.numel():
        return
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-9)
    assert error <= tolerance, f"{name}: {error:.1e} relative, allowed {tolerance:.1e}"


def check(rule, inputs, parameters, tolerance=None, precision="ieee", form=chunk_miras, **kwargs):
    name = next(name for name, gate in GATES.items() if type(rule.retention) is gate)
    tolerance = tolerance or TOLERANCE[name]
    y, final, _ = by_kernel(rule, inputs, parameters, precision=precision, **kwargs)
    expected, state = in_float64(rule, inputs, parameters, form, **kwargs)
    assert y.dtype == inputs[0].dtype
    assert_close("y", y, expected, tolerance)
    for i, (got, wanted) in enumerate(zip(final, state, strict=True)):
        # gradients of begun chunks are differences of reads
        assert_close(f"state[{i}]", got, wanted, 3 * tolerance)
    return y, final


# -- choices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retention", RETENTION_GATES)
@pytest.mark.parametrize("bias", ATTENTIONAL_BIASES)
@pytest.mark.parametrize("memory", ["mlp", "matrix"])
def test_losses_and_links(memory, bias, retention):
    rule = make_rule(memory, bias, retention)
    check(rule, *make_call(rule))


@pytest.mark.parametrize("gates", ["channel", "head"])
@pytest.mark.parametrize("decay_target", ["init", "zero"])
@pytest.mark.parametrize("retention", RETENTION_GATES)
@pytest.mark.parametrize("memory", ["mlp", "matrix", "last"])
def test_gates_and_decay_targets(memory, retention, decay_target, gates):
    rule = make_rule(memory, "huber_mixture", retention, decay_target=decay_target)
    check(rule, *make_call(rule, gates=gates, seed=1))


@pytest.mark.parametrize("decay_target", ["init", "zero"])
@pytest.mark.parametrize("retention", RETENTION_GATES)
@pytest.mark.parametrize("memory", ["mlp", "last"])
def test_chunks_of_as_many_tokens_as_a_memory_has_channels(memory, retention, decay_target):
    """Their sums over tiles have tokens as rows; those of shorter chunks, which most of these tests have, channels."""
    rule = make_rule(memory, "huber_mixture", retention, chunk_size=32, decay_target=decay_target)
    check(rule, *make_call(rule, tokens=37, heads=1, seed=2))


@pytest.mark.parametrize("options", [{"power": 2.5}, {"power": 3.0, "sign": "tanh"}, {"power": 1.0}])
def test_powers_of_the_loss(options):
    rule = make_rule(bias="lp", **options)
    check(rule, *make_call(rule))


@pytest.mark.parametrize("q", [2.0, 2.5, 3.0, 5.0])
@pytest.mark.parametrize("retention", ["lq", "lq_mirror"])
def test_powers_of_the_retention(retention, q):
    rule = make_rule(retention=retention, q=q)
    inputs, parameters = make_call(rule)
    inputs[3] = inputs[3] * 0.1  # other powers, other scales
    check(rule, inputs, parameters, tolerance=2e-5)


def test_gates_of_different_granularity_and_channel_thresholds():
    rule = make_rule(bias="huber_coordinate")
    inputs, parameters = make_call(rule)
    inputs[4] = inputs[4][..., 0]
    check(rule, inputs, parameters)


@pytest.mark.parametrize("scale", [1e-2, 1e2, 1e6, 1e18, 1e37])
@pytest.mark.parametrize("retention", RETENTION_GATES)
def test_finite_for_values_of_any_size(scale, retention):
    rule = make_rule(bias="lp", retention=retention)
    inputs, parameters = make_call(rule, tokens=40)
    inputs[2] = inputs[2] * scale
    inputs[1][:, 7] = 0.0
    inputs[4] = inputs[4] * 100.0
    y, final, _ = by_kernel(rule, inputs, parameters)
    assert torch.isfinite(y).all() and all(torch.isfinite(x).all() for x in final)


# -- sizes and lengths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_sizes(head_dim, chunk_size, memory):
    retention = ("lq", "kl", "decay")[CHUNK_SIZES.index(chunk_size)]
    rule = make_rule(memory, "l2", retention, chunk_size=chunk_size)
    inputs, parameters = make_call(rule, tokens=chunk_size + 3, heads=1, head_dim=head_dim)
    inputs[3] = inputs[3] * (16 / chunk_size)
    check(rule, inputs, parameters)


@pytest.mark.parametrize("tokens", [0, 1, 2, 15, 16, 17, 32, 47])
@pytest.mark.parametrize("memory", ["mlp", "matrix", "last"])
def test_lengths(memory, tokens):
    rule = make_rule(memory, "huber_norm", "lq")
    check(rule, *make_call(rule, batch=2, tokens=tokens, heads=1))


def test_against_the_recurrent_reference():
    rule = make_rule("mlp", "lp", "lq")
    check(rule, *make_call(rule, tokens=35), form=recurrent_miras)


@pytest.mark.parametrize("memory", ["mlp", "matrix", "last"])
@pytest.mark.parametrize("borders", [[0, 5, 5, 22, 38, 39], [0, 0, 16, 33], [0, 40]])
def test_packs(memory, borders):
    rule = make_rule(memory, "huber_mixture", "decay")
    inputs, parameters = make_call(rule, tokens=borders[-1])
    y, _ = check(rule, inputs, parameters, cu_seqlens=torch.tensor(borders, device=DEVICE))
    for first, last in itertools.pairwise(borders):
        if first < last:
            alone, _, _ = by_kernel(rule, [None if x is None else x[:, first:last] for x in inputs], parameters)
            assert torch.equal(y[:, first:last], alone)


@pytest.mark.parametrize("memory", ["mlp", "matrix", "last"])
def test_pads_on_any_side_and_in_between(memory):
    rule = make_rule(memory, "l2", "lq")
    inputs, parameters = make_call(rule, batch=4, tokens=24)
    mask = torch.ones(4, 24, dtype=torch.bool, device=DEVICE)
    mask[0, 17:], mask[1, :9], mask[3] = False, False, False
    mask[2] = torch.arange(24, device=DEVICE) % 3 > 0
    y, _ = check(rule, inputs, parameters, mask=mask)
    assert (y[~mask] == 0).all()


# -- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "retention", "decay_target"), [
    ("mlp", "decay", "init"), ("mlp", "lq", "zero"), ("mlp", "kl", "init"), ("matrix", "lq_mirror", "init"),
    ("matrix", "kl", "zero"), ("last", "lq_mirror", "init"), ("last", "kl", "zero"),
])  # fmt: skip
@pytest.mark.parametrize("cuts", [(1,), (15, 16), (16,), (7, 9, 30)])
def test_reading_in_pieces_is_reading_at_once(cuts, memory, retention, decay_target):
    rule = make_rule(memory, "huber_mixture", retention, decay_target=decay_target)
    inputs, parameters = make_call(rule, tokens=37, heads=1)
    whole, final = check(rule, inputs, parameters)
    pieces, state = [], None
    for first, last in itertools.pairwise([0, *cuts, 37]):
        piece = [None if x is None else x[:, first:last] for x in inputs]
        y, state, _ = by_kernel(rule, piece, parameters, state=state)
        pieces.append(y)
    assert_close("y", torch.cat(pieces, 1), whole, TOLERANCE[retention])
    for got, expected in zip(state, final, strict=True):
        assert_close("state", got, expected, 3 * TOLERANCE[retention])


@pytest.mark.parametrize("memory", ["mlp", "last"])
def test_rows_continue_at_phases_of_their_own(memory):
    rule = make_rule(memory, "l2", "decay")
    inputs, parameters = make_call(rule, batch=3, tokens=40)
    mask = torch.arange(40, device=DEVICE) < torch.tensor([[21], [0], [16]], device=DEVICE)
    whole = [None if x is None else x for x in inputs]
    _, state, _ = by_kernel(rule, whole, parameters, mask=mask)
    assert state[-1].tolist() == [21, 0, 16]
    again = [None if x is None else x[:, :11] for x in inputs]
    y, final, _ = by_kernel(rule, again, parameters, state=state)
    for row, before in enumerate((21, 0, 16)):
        alone = [
            None if x is None else torch.cat((x[row : row + 1, :before], x[row : row + 1, :11]), 1) for x in inputs
        ]
        expected, _, _ = by_kernel(rule, alone, parameters)
        assert_close("y", y[row : row + 1], expected[:, before:], 3e-6)
    assert final[-1].tolist() == [32, 11, 27]


@pytest.mark.parametrize("memory", ["mlp", "last"])
def test_no_tokens_hand_the_state_on(memory):
    rule = make_rule(memory, "l2", "lq")
    inputs, parameters = make_call(rule, tokens=21)
    _, state, _ = by_kernel(rule, inputs, parameters)
    _, again, _ = by_kernel(rule, [None if x is None else x[:, :0] for x in inputs], parameters, state=state)
    mask = torch.zeros(1, 21, dtype=torch.bool, device=DEVICE)
    _, masked, _ = by_kernel(rule, inputs, parameters, state=state, mask=mask)
    for one, other, third in zip(state, again, masked, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_reads_of_some_chunks_at_once_are_those_of_all(precision, monkeypatch):
    rule = make_rule("last", "huber_mixture", "lq")
    inputs, parameters = make_call(rule, batch=2, tokens=75, heads=1)
    first = [None if x is None else x[:, :21] for x in inputs]
    _, state, _ = by_kernel(rule, first, parameters, precision=precision)
    whole, *_ = by_kernel(rule, inputs, parameters, state=state, precision=precision)
    monkeypatch.setattr(ops, "CHUNKS_AT_ONCE", 2)
    assert torch.equal(by_kernel(rule, inputs, parameters, state=state, precision=precision)[0], whole)


def test_arguments_are_not_written_to():
    for decay_target in ("init", "zero"):
        rule = make_rule("mlp", "l2", "decay", decay_target=decay_target)
        inputs, parameters = make_call(rule, tokens=21, heads=1)
        _, state, _ = by_kernel(rule, inputs, parameters)
        kept = [x.clone() for x in (*parameters.initial, *state)]
        by_kernel(rule, inputs, parameters)
        by_kernel(rule, inputs, parameters, state=state)
        assert all(torch.equal(a, b) for a, b in zip(kept, (*parameters.initial, *state)))


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
@pytest.mark.parametrize("every", [1, 2])
def test_chunk_starts_that_are_kept(memory, every):
    rule = make_rule(memory, "l2", "decay")
    inputs, parameters = make_call(rule, tokens=75)
    borders = [0, 37, 75]
    _, _, saved = by_kernel(
        rule, inputs, parameters, cu_seqlens=torch.tensor(borders, device=DEVICE), save_every=every
    )
    slot = 0
    for first, last in itertools.pairwise(borders):
        for start in range(first, last, 16 * every):
            read = [None if x is None else x[:, first:start] for x in inputs]
            _, state, _ = by_kernel(rule, read, parameters)
            for layer, kept in enumerate(saved):
                assert_close("saved", kept[slot], state[layer][0], 1e-6)
            slot += 1


# -- dtypes, layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "dtype", "precision"),
    [("mlp", torch.bfloat16, "bf16"), ("mlp", torch.float16, "tf32"), ("last", torch.bfloat16, "bf16")],
)
@pytest.mark.parametrize("retention", RETENTION_GATES)
def test_half_precision(memory, dtype, precision, retention):
    """bfloat16 operands carry 8 bits: 2e-2 of the largest output, 6e-2 for KL, whose reads are small differences."""
    rule = make_rule(memory, "l2", retention)
    inputs, parameters = make_call(rule, tokens=37, dtype=dtype)
    y, final, _ = by_kernel(rule, inputs, parameters, precision=precision)
    expected, _ = in_float64(rule, inputs, parameters)
    assert y.dtype == dtype and all(x.dtype == torch.float32 for x in final[:-1])
    assert_close("y", y, expected, 6e-2 if retention == "kl" else 2e-2)


def test_layouts_of_any_kind():
    rule = make_rule("mlp", "huber_norm", "lq")
    inputs, parameters = make_call(rule, batch=2)
    expected, _, _ = by_kernel(rule, inputs, parameters)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not strided[0].is_contiguous()
    assert torch.equal(by_kernel(rule, strided, parameters)[0], expected)
    inputs[3] = inputs[3][:, :, :, :1].expand(-1, -1, -1, 32)
    assert inputs[3].stride(-1) == 0
    check(rule, inputs, parameters)
    one = [None if x is None else x[:1].expand(3, *x.shape[1:]) for x in inputs]
    y, _, _ = by_kernel(rule, one, parameters)
    assert torch.equal(y[0], y[2])


# -- the seam ---------------------------------------------------------------------------------------------------------


def test_a_refusal_is_looked_up_once_for_every_precision(monkeypatch):
    """What float32 is multiplied in may be set while a program runs."""
    usual, asked = ops._no_launch, []

    def no_launch(kernel, *where):
        asked.append((kernel, where[-1]))
        return "none is configured" if where[-1] == "tf32" else usual(kernel, *where)

    monkeypatch.setattr(ops, "_no_launch", no_launch)
    before = torch.get_float32_matmul_precision()
    ops.known_reason.cache_clear()
    try:
        for _ in range(2):
            torch.set_float32_matmul_precision("highest")
            assert refusal(DEVICE, torch.float32, 64, Choices(), needs_grad=True) is None
            torch.set_float32_matmul_precision("high")
            assert refusal(DEVICE, torch.float32, 64, Choices(), needs_grad=True) == "none is configured"
            assert refusal(DEVICE, torch.float32, 64, Choices(), precision="tf32x3") is None
    finally:
        torch.set_float32_matmul_precision(before)
        ops.known_reason.cache_clear()
    both = [("mlp_forward", "tf32x3"), ("mlp_backward", "tf32x3")]
    assert asked == [*both, ("mlp_forward", "tf32"), ("mlp_forward", "tf32x3")]


def test_refusals_name_the_reason():
    choices = Choices()
    device = torch.device(DEVICE)
    assert refusal(device, torch.float32, 64, choices) is None
    assert "float64" in refusal(device, torch.float64, 64, choices)
    assert "head_dim is 40" in refusal(device, torch.float32, 40, choices)
    assert "'meta'" in refusal(torch.device("meta"), torch.float32, 64, choices)
    with pytest.raises(ValueError, match="`chunk_size` must be one of"):
        Choices(chunk_size=48)
    with pytest.raises(ValueError, match="`retention` must be one of"):
        Choices(retention="elastic")
    rule = make_rule()
    inputs, parameters = make_call(rule, head_dim=24)
    with pytest.raises(ValueError, match="No kernel serves this call: head_dim is 24"):
        by_kernel(rule, inputs, parameters)
    inputs, parameters = make_call(rule)
    with pytest.raises(ValueError, match="`precision` must be one of"):
        by_kernel(rule, inputs, parameters, precision="fp8")
    with pytest.raises(ValueError, match="`initial` must have shapes"):
        by_kernel(make_rule("matrix"), inputs, parameters)


def test_arguments_that_do_not_fit_are_named():
    """A kernel would read beyond them."""
    rule = make_rule("mlp", "huber_norm", "lq")
    inputs, parameters = make_call(rule, tokens=21)
    for index, name in enumerate(("k", "v", "eta", "log_alpha", "delta"), start=1):
        wrong = list(inputs)
        wrong[index] = wrong[index][:, :20]
        with pytest.raises(ValueError, match=f"`{name}` must have shape .*, got "):
            by_kernel(rule, wrong, parameters)
    with pytest.raises(ValueError, match="`delta` is required by huber_norm"):
        by_kernel(rule, [*inputs[:5], None], parameters)
    with pytest.raises(ValueError, match="`delta` must be None: l2"):
        by_kernel(make_rule("mlp", "l2", "lq"), inputs, parameters)
    with pytest.raises(ValueError, match="`norm_weight` must have shape"):
        by_kernel(rule, inputs, parameters._replace(norm_weight=parameters.norm_weight[:1]))
    with pytest.raises(ValueError, match="`lengths` must have shape"):
        by_kernel(rule, inputs, parameters, lengths=torch.ones(2, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match="`lengths` must be of int"):
        by_kernel(rule, inputs, parameters, lengths=torch.ones(1, device=DEVICE))
    with pytest.raises(ValueError, match="`cu_seqlens` must have shape"):
        by_kernel(rule, inputs, parameters, cu_seqlens=torch.tensor([21], device=DEVICE))
    _, state, _ = by_kernel(rule, inputs, parameters)
    two, _ = make_call(rule, batch=2, tokens=21)
    with pytest.raises(ValueError, match="`state` must have shapes"):
        by_kernel(rule, two, parameters, state=state)


def test_operator_is_well_formed():
    rule = make_rule("mlp", "huber_mixture", "lq")
    inputs, parameters = make_call(rule, tokens=5, heads=1)
    values = list(vars(kernel_choices(rule)[0]).values())
    _, state, _ = by_kernel(rule, inputs, parameters)
    for earlier in ([], list(state)):
        arguments = (*inputs, list(parameters.initial), *parameters[1:], earlier, None, None, True, 1, "ieee", *values)
        torch.library.opcheck(torch.ops.miras_kernels.forward.default, arguments, test_utils=(
            "test_schema", "test_faketensor",
        ))  # fmt: skip


def test_compiled_without_a_break():
    rule = make_rule("mlp", "lp", "lq")
    inputs, parameters = make_call(rule, tokens=19)
    backend = MemoryBackend(rule, "triton")

    class Finished:
        """Tokens as a memory takes them, whose convolutions leave nothing to the next call."""

        skipped = None

        def __init__(self, *inputs):
            self.inputs, self.v = inputs, inputs[2]

        def finished(self, tail, position):
            return *self.inputs, None

        def next_tail(self, tail, lengths):
            return self.v[:, :0]

        def release(self):
            pass

    def read(*inputs):
        y, carry = backend(Finished(*inputs), Sequences(), parameters, Carry())
        return y * 2.0, carry.state.dual[0].sum()

    with torch.no_grad():
        expected = read(*inputs)
        got = torch.compile(read, fullgraph=True, backend="aot_eager")(*inputs)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


# -- gelu -------------------------------------------------------------------------------------------------------------


@triton.jit
def gelu_kernel(z, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    o = tl.arange(0, SIZE)
    h, slope, curvature = pieces.gelu_slope_curvature(tl.load(z + o), PRECISION)
    tl.store(out + o, h)
    tl.store(out + SIZE + o, slope)
    tl.store(out + 2 * SIZE + o, curvature)


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter has no instructions")
@pytest.mark.parametrize(("precision", "error"), [("bf16", 2.0**-11), ("bf16", 0.0), ("ieee", 0.0)])
def test_gelu_and_its_derivatives_with_the_instruction_and_without(precision, error, monkeypatch):
    asked = []

    def instruction(text, constraints, arguments, **_):
        asked.append(text)
        x = arguments[0]
        exact = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
        return exact * (1.0 + error)

    monkeypatch.setattr(tl, "inline_asm_elementwise", instruction)
    z = torch.linspace(-12.0, 12.0, 64)
    out = torch.empty(3, 64)
    gelu_kernel[(1,)](z, out, SIZE=64, PRECISION=precision)
    assert bool(asked) == (precision == "bf16") and all("tanh.approx.f32" in text for text in asked)
    wide = z.double().requires_grad_()
    h = torch.nn.functional.gelu(wide, approximate="tanh")
    (slope,) = torch.autograd.grad(h.sum(), wide, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), wide)
    # the gate is off by half the instruction's error, h by z times that, its derivatives by polynomials of z times that
    allowed = [scale * (2e-6 + error) for scale in (6.0, 12.0, 100.0)]
    for got, expected, most in zip(out, (h, slope, curvature), allowed, strict=True):
        near = z.abs() < 4.0 if error else torch.ones(64, dtype=torch.bool)
        assert (got - expected)[near].abs().max() <= most
