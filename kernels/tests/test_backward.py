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
"""The backward kernel against autograd of the PyTorch forms in float64: every input, every state, every border."""

import itertools

import pytest
import torch
from test_forward import DEVICE, by_kernel, flat, make_call, make_rule, masked

from miras_hf.backend import kernel_choices
from miras_hf.memory import RETENTION_GATES, MemoryParameters, chunk_miras, recurrent_miras
from miras_kernels import ops


NAMES = ("q", "k", "v", "eta", "log_alpha", "delta")
# relative to the largest entry. KL's reads are small differences of its weights, and so are their derivatives.
TOLERANCE = {"decay": 3e-6, "lq": 3e-6, "lq_mirror": 6e-6, "kl": 3e-5}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """What a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def by_form(rule, inputs, parameters, form, **kwargs):
    return form(*inputs, rule=rule, parameters=parameters, output_final_state=True, **kwargs)


def gradients(rule, inputs, parameters, cuts=(), mask=None, cu_seqlens=None, form=None, of_state=True, every=0):
    """Of a random linear function of the outputs and of the final state; by kernel, or by a form in float64."""
    draw = torch.Generator().manual_seed(5)
    tensors = (*inputs, *parameters.initial, parameters.norm_weight, parameters.norm_bias)
    leaves = [None if t is None else (t if form is None else t.double()).detach().requires_grad_() for t in tensors]
    memory = MemoryParameters(tuple(leaves[6:-2]), *leaves[-2:])
    outputs, state = [], None
    for first, last in itertools.pairwise([0, *cuts, inputs[0].shape[1]]):
        piece = [None if t is None else t[:, first:last] for t in leaves[:6]]
        where = {"mask": None if mask is None else mask[:, first:last], "cu_seqlens": cu_seqlens}
        if form is None:
            y, state, _ = by_kernel(rule, piece, memory, state=state, save_every=every, **where)
        else:
            y, state = masked(by_form)(rule, piece, memory, form=form, initial_state=state, **where)
        outputs.append(y)
    outputs = [torch.cat(outputs, 1), *(state if form is None else flat(state))[: -1 if of_state else 0]]
    weighted = [x * torch.randn(x.shape, generator=draw).to(x) for x in outputs]
    loss = sum(x.sum() for x in weighted if x.requires_grad)
    # a matrix memory has no norm
    found = iter(torch.autograd.grad(loss, [x for x in leaves if x is not None], allow_unused=True))
    return [None if x is None else next(found) for x in leaves]


def check(rule, inputs, parameters, tolerance=None, form=chunk_miras, **kwargs):
    name = next(name for name, gate in RETENTION_GATES.items() if type(rule.retention) is gate)
    got = gradients(rule, inputs, parameters, **kwargs)
    kwargs.pop("every", None)
    expected = gradients(rule, inputs, parameters, form=form, **kwargs)
    names = (*NAMES, *(f"A{i}" for i in range(len(parameters.initial))), "norm_weight", "norm_bias")
    for what, one, other, x in zip(names, got, expected, (*inputs, *parameters.initial, *parameters[1:]), strict=True):
        if other is None:
            assert one is None or not one.any(), what
            continue
        assert one.shape == x.shape and one.dtype == x.dtype, what
        assert torch.isfinite(one).all(), what
        error = (one.double() - other).abs().max() / other.abs().max().clamp(min=1e-9)
        allowed = tolerance or TOLERANCE[name]
        assert error <= allowed, f"{what}: {error:.1e} relative, allowed {allowed:.1e}"
    return got


@pytest.mark.parametrize("retention", TOLERANCE)
@pytest.mark.parametrize("bias", ["l2", "lp", "huber_coordinate", "huber_norm", "huber_mixture"])
@pytest.mark.parametrize("memory", ["mlp", "matrix"])
def test_losses_and_links(memory, bias, retention):
    rule = make_rule(memory, bias, retention)
    check(rule, *make_call(rule))


@pytest.mark.slow  # calls in pieces go through these combinations, too
@pytest.mark.parametrize("gates", ["channel", "head"])
@pytest.mark.parametrize("decay_target", ["init", "zero"])
@pytest.mark.parametrize("retention", TOLERANCE)
@pytest.mark.parametrize("memory", ["mlp", "matrix"])
def test_gates_and_decay_targets(memory, retention, decay_target, gates):
    rule = make_rule(memory, "huber_mixture", retention, decay_target=decay_target)
    check(rule, *make_call(rule, gates=gates, seed=1))


@pytest.mark.parametrize("options", [{"power": 2.5}, {"power": 3.0, "sign": "tanh"}])
def test_powers_of_the_loss(options):
    rule = make_rule(bias="lp", **options)
    check(rule, *make_call(rule))


@pytest.mark.parametrize("retention", ["lq", "lq_mirror"])
def test_power_of_the_retention_and_gates_of_different_granularity(retention):
    rule = make_rule("mlp", "huber_coordinate", retention, q=2.5)
    inputs, parameters = make_call(rule)
    inputs[3], inputs[4], inputs[5] = 0.1 * inputs[3], inputs[4][..., 0], inputs[5][..., 0]
    check(rule, inputs, parameters, tolerance=2e-5)


def test_what_is_cut_has_no_gradient():
    rule = make_rule("mlp", "l2", "decay")
    inputs, parameters = make_call(rule)
    inputs[4][:, 3] = -4.0  # below the bound on log alpha
    inputs[1][:, 5] *= 2e3  # a key beyond its cap
    got = check(rule, inputs, parameters, tolerance=1e-4)
    assert (got[4][:, 3] == 0).all() and (got[1][:, 5][inputs[1][:, 5].abs() > 1e3] == 0).all()


def test_capped_weights_and_floored_norms():
    cases = (("mlp", "decay", 30.0), ("mlp", "lq", 1e-4), ("matrix", "decay", 30.0))
    cases += (("matrix", "lq_mirror", 30.0), ("mlp", "lq_mirror", 1e-4))
    for memory, retention, scale in cases:
        rule = make_rule(memory, "l2", retention)
        inputs, parameters = make_call(rule)
        parameters = parameters._replace(initial=tuple(scale * a for a in parameters.initial))
        check(rule, inputs, parameters, tolerance=2e-5)


@pytest.mark.parametrize(("head_dim", "chunk_size", "retention"), [
    (32, 64, "kl"), (48, 16, "lq"), (64, 32, "decay"), (96, 16, "kl"), (128, 16, "lq"),
])  # fmt: skip
def test_sizes(head_dim, chunk_size, retention):
    rule = make_rule("mlp", "l2", retention, chunk_size=chunk_size)
    inputs, parameters = make_call(rule, tokens=chunk_size + 3, heads=1, head_dim=head_dim)
    inputs[3] = inputs[3] * (16 / chunk_size)
    check(rule, inputs, parameters)


@pytest.mark.parametrize("retention", ["decay", "kl"])
@pytest.mark.parametrize("memory", ["mlp", "matrix", "last"])
def test_operands_that_are_read_again_for_every_tile(memory, retention, monkeypatch):
    """What a launch asks for where shared memory is small: the same bits."""
    rule = make_rule(memory, "huber_mixture", retention)
    inputs, parameters = make_call(rule, heads=1, head_dim=48)
    found = []
    for stream, run in ((False, gradients), (True, check)):
        backward = {"TN": 32, "num_warps": 4, "STREAM": stream}
        forward = {"num_warps": 4} if memory == "matrix" else {"TN": 64, "num_warps": 4}
        kernel = "matrix" if memory == "matrix" else "mlp"
        launches = {f"{kernel}_forward": forward, f"{kernel}_backward": backward}
        monkeypatch.setattr(ops, "launch_configuration", lambda kernel, found=launches, **_: found[kernel])
        found.append(run(rule, inputs, parameters))
    assert all(torch.equal(one, other) for one, other in zip(*found) if one is not None)


@pytest.mark.skipif(DEVICE == "cuda", reason="what a device does is not seen place by place")
@pytest.mark.parametrize("memory", ["mlp", "last", "matrix"])
def test_what_tiles_read_again_is_not_written_over_before_all_threads_have_read_it(memory, monkeypatch):
    # in the interpreter a program is one thread, and right without any barrier: so what is asked is the order
    from triton.runtime import interpreter

    # imported now, with a `put` and `get` of their own: what is put aside once is read by the threads that wrote it
    from miras_kernels import backward_matrix, backward_mlp, rows  # noqa: F401

    read, too_early, seen = set(), [], set()

    def hold(x, PLACE, *rest, usual=rows.put):
        place = int(getattr(PLACE, "value", PLACE))
        seen.add(place)
        if place in read:
            too_early.append(place)
        return usual(x, PLACE, *rest)

    def held(x, PLACE, *rest, usual=rows.get):
        read.add(int(getattr(PLACE, "value", PLACE)))
        return usual(x, PLACE, *rest)

    monkeypatch.setattr(rows, "put", hold)
    monkeypatch.setattr(rows, "get", held)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_barrier", lambda *_: read.clear())
    kernel = "matrix" if memory == "matrix" else "mlp"
    launches = {
        f"{kernel}_forward": {"num_warps": 4} if memory == "matrix" else {"TN": 64, "num_warps": 4},
        f"{kernel}_backward": {"TN": 32, "num_warps": 4, "STREAM": True},
    }
    monkeypatch.setattr(ops, "launch_configuration", lambda kernel, **_: launches[kernel])
    rule = make_rule(memory, "l2", "decay")
    gradients(rule, *make_call(rule, heads=1))
    assert len(seen) > 1 and too_early == []


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 47])
@pytest.mark.parametrize("memory", ["mlp", "last"])
def test_lengths(memory, tokens):
    rule = make_rule(memory, "huber_norm", "lq")
    check(rule, *make_call(rule, batch=2, tokens=tokens, heads=1))


def test_against_autograd_of_the_recurrent_reference():
    rule = make_rule("mlp", "lp", "lq")
    check(rule, *make_call(rule, tokens=20, heads=1), form=recurrent_miras)


@pytest.mark.parametrize(("bias", "retention", "decay_target", "gates"), [
    ("l2", "decay", "init", "channel"), ("huber_mixture", "decay", "zero", "head"), ("lp", "lq", "init", "head"),
    ("l2", "kl", "init", "channel"), ("huber_coordinate", "kl", "zero", "head"), ("lp", "lq_mirror", "init", "channel"),
    ("l2", "lq_mirror", "zero", "head"),
])  # fmt: skip
@pytest.mark.parametrize("cuts", [slow((21,)), slow((16,)), (7, 9, 16, 30)])
@pytest.mark.parametrize("memory", ["mlp", "matrix", "last"])
def test_through_states_in_the_middle_of_a_chunk(memory, cuts, bias, retention, decay_target, gates):
    """Truncated and full backpropagation over several calls: gradients of the final and of the initial state."""
    rule = make_rule(memory, bias, retention, decay_target=decay_target)
    check(rule, *make_call(rule, tokens=37, heads=1, gates=gates), cuts=cuts)


@pytest.mark.parametrize("retention", ["decay", "lq_mirror", "kl"])
@pytest.mark.parametrize("memory", ["mlp", "matrix", "last"])
def test_packs(memory, retention):
    rule = make_rule(memory, "huber_mixture", retention)
    inputs, parameters = make_call(rule, tokens=39, heads=1)
    check(rule, inputs, parameters, cu_seqlens=torch.tensor([0, 5, 5, 22, 38, 39], device=DEVICE))


@pytest.mark.parametrize(("memory", "cuts", "retention"), [
    ("mlp", (), "lq"), ("mlp", (11,), "lq"), ("mlp", (11,), "lq_mirror"), ("last", (11,), "lq"),
])  # fmt: skip
def test_pads_on_any_side_and_in_between(memory, cuts, retention):
    rule = make_rule(memory, "l2", retention)
    inputs, parameters = make_call(rule, batch=4, tokens=24, heads=1)
    mask = torch.ones(4, 24, dtype=torch.bool, device=DEVICE)
    mask[0, 17:], mask[1, :9], mask[3] = False, False, False
    mask[2] = torch.arange(24, device=DEVICE) % 3 > 0
    got = check(rule, inputs, parameters, mask=mask, cuts=cuts)
    assert all((grad[~mask] == 0).all() for grad in got[:5])


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
def test_initial_memory_is_mapped_once_for_each_group_of_chunks(memory):
    rule = make_rule(memory, "l2", "lq_mirror")
    check(rule, *make_call(rule, tokens=53, heads=1), every=2)


@pytest.mark.parametrize(
    ("memory", "every"), [("mlp", 2), slow("mlp", 3), ("matrix", 1), slow("matrix", 2), ("matrix", 3)]
)
def test_states_between_kept_chunk_starts_are_computed_again(memory, every):
    rule = make_rule(memory, "huber_norm", "decay")
    inputs, parameters = make_call(rule, batch=2, tokens=57, heads=1)
    check(rule, inputs, parameters, every=every, cuts=(21,))
    mask = torch.arange(57, device=DEVICE) >= torch.tensor([[0], [25]], device=DEVICE)
    check(rule, inputs, parameters, every=every, mask=mask)
    one = [None if x is None else x[:1] for x in inputs]
    check(rule, one, parameters, every=every, cu_seqlens=torch.tensor([0, 3, 57], device=DEVICE))


def test_kept_chunk_starts_take_no_more_than_inputs_outputs_and_their_gradients():
    from miras_kernels import Choices
    from miras_kernels.ops import chunks_between_starts

    for head_dim, chunk_size, itemsize in itertools.product((32, 64, 128), (16, 32, 64), (2, 4)):
        every = chunks_between_starts(Choices(chunk_size=chunk_size), head_dim, itemsize)
        budget = 2 * (4 * head_dim * itemsize + 8 * head_dim)
        kept = [32 * head_dim**2 / (chunk_size * g) for g in (every, every - 1) if g]
        assert kept[0] <= budget and all(other > budget for other in kept[1:])
    assert chunks_between_starts(Choices(chunk_size=64), 64, 2) == 1


def test_two_runs_give_equal_bits():
    rule = make_rule("mlp", "huber_mixture", "lq")
    inputs, parameters = make_call(rule, batch=2, tokens=21)
    one, other = (gradients(rule, inputs, parameters) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other) if a is not None)


@pytest.mark.parametrize("retention", TOLERANCE)
def test_bfloat16(retention):
    """Operands of 8 bits: within 6e-2 of the largest gradient, KL within 0.15."""
    rule = make_rule("mlp", "l2", retention)
    inputs, parameters = make_call(rule, tokens=37, dtype=torch.bfloat16)
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y, _, _ = by_kernel(rule, leaves, parameters, precision="bf16")
    wide = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    double = MemoryParameters(tuple(a.double() for a in parameters.initial), *(p.double() for p in parameters[1:]))
    expected, _ = chunk_miras(*wide, rule=rule, parameters=double)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    y.backward(weights.to(y.dtype))
    expected.backward(weights.double())
    for what, one, other in zip(NAMES, leaves, wide):
        if one is not None:
            assert one.grad.dtype == one.dtype
            error = (one.grad.double() - other.grad).abs().max() / other.grad.abs().max()
            assert error <= (0.15 if retention == "kl" else 6e-2), f"{what}: {error:.1e}"


def test_adjoint_stays_finite_on_streams_that_make_it_grow():
    rule = make_rule("mlp", "lp", "decay", decay_target="zero")
    inputs, parameters = make_call(rule, tokens=400, heads=1)
    inputs[2], inputs[3] = inputs[2] * 1e6, inputs[3] * 30
    got = gradients(rule, inputs, parameters)
    assert all(torch.isfinite(grad).all() for grad in got if grad is not None)


@pytest.mark.parametrize("memory", ["mlp", "last"])
def test_operator_is_well_formed(memory):
    rule = make_rule(memory, "huber_mixture", "lq")
    # two chunks, as many as there is room for
    inputs, parameters = make_call(rule, tokens=17, heads=1)
    check_operator(rule, inputs, parameters, [], None, chunks=2)


def test_operator_is_well_formed_with_a_pack():
    rule = make_rule("mlp", "huber_mixture", "lq")
    # memories a token short of a chunk's end: with two tokens each, both sequences have as many chunks as can be
    earlier, parameters = make_call(rule, batch=2, tokens=rule.chunk_size - 1, heads=1)
    _, state, _ = by_kernel(rule, earlier, parameters)
    inputs, _ = make_call(rule, tokens=4, heads=1, seed=1)
    check_operator(rule, inputs, parameters, list(state), torch.tensor([0, 2, 4], device=DEVICE), chunks=4)


def check_operator(rule, inputs, parameters, state, cu_seqlens, chunks):
    """`opcheck` compares all outputs of two runs, and so the room for chunk starts that is left, which is not initialised:
    there must be none."""
    inputs = [x.requires_grad_() for x in inputs]
    choices = vars(kernel_choices(rule)[0]).values()
    options = (state, cu_seqlens, None, False, 1, "ieee", *choices)
    arguments = (*inputs, list(parameters.initial), *parameters[1:], *options)
    _, _, saved = torch.ops.miras_kernels.forward(*arguments)
    # memory that is not written is NaN here
    assert [x.shape[0] for x in saved] == [chunks] * len(saved) and all(x.isfinite().all() for x in saved)
    torch.library.opcheck(torch.ops.miras_kernels.forward.default, arguments, test_utils=(
        "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static",
    ))  # fmt: skip


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
@pytest.mark.parametrize("of", ["q", "initial", "adjoint"])
def test_second_derivatives_are_refused_by_name(memory, of):
    rule = make_rule(memory)
    inputs, parameters = make_call(rule, tokens=3)
    q = inputs[0].requires_grad_()
    initial = parameters.initial[0].requires_grad_()
    y, *_ = by_kernel(rule, inputs, parameters)
    adjoint = torch.ones_like(y).requires_grad_()
    first = torch.autograd.grad(y, [q, initial], adjoint, create_graph=True)
    # a penalty on the gradients would otherwise train without them
    with pytest.raises(RuntimeError, match='`miras_kernels` has no second derivatives.*`memory_backend="pytorch"`'):
        torch.autograd.grad(sum(x.square().sum() for x in first), {"q": q, "initial": initial, "adjoint": adjoint}[of])
