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
"""The forms of the recurrence give the same numbers: token by token, chunk-parallel, recomputed, decoded."""

import functools

import pytest
import torch
from memory_cases import (
    ARCHITECTURES,
    FORMS,
    GATES,
    MODELS,
    OTHER_FORMS,
    OTHER_RULES,
    RULES,
    Case,
    assert_same,
    decode_miras,
    gradients,
    make_case,
    relative_error,
    rule_of,
    step_size,
    values,
    values_and_gradients,
    weighted_sum,
)

from miras_hf.memory import (
    ATTENTIONAL_BIASES,
    RETENTION_GATES,
    MirasRule,
    MLPMemory,
    chunk_miras,
    recurrent_miras,
)


# tokens, and whether the final state is asked for: chunks that leave something to it are differentiated by other means
CALLS = {"reads": (13, False), "reads and a state": (13, True), "whole chunks and a state": (12, True)}


@functools.cache
def reference(name: str, gates: str, call: str) -> dict[str, torch.Tensor]:
    return read(name, gates, call, recurrent_miras)


def read(name: str, gates: str, call: str, form) -> dict[str, torch.Tensor]:
    tokens, final_state = CALLS[call]
    return values_and_gradients(make_case(rule_of(name), tokens=tokens, gates=gates), form, final_state=final_state)


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", [*RULES, *OTHER_RULES])
def test_forms_agree(name, call, form):
    """Values, final states and all gradients; 13 tokens are three chunks of 4 and one token."""
    assert_same(read(name, "channel", call, FORMS[form]), reference(name, "channel", call), 1e-9)


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("call", ["reads", "reads and a state"])
@pytest.mark.parametrize("gates", [gates for gates in GATES if gates != "channel"])
@pytest.mark.parametrize("name", [*MODELS, "matrix"])
def test_forms_agree_on_gates_per_head(name, gates, call, form):
    assert_same(read(name, gates, call, FORMS[form]), reference(name, gates, call), 1e-9)


@pytest.mark.parametrize("decay_target", ["init", "zero"])
@pytest.mark.parametrize("retention", RETENTION_GATES)
@pytest.mark.parametrize("bias", ATTENTIONAL_BIASES)
def test_every_pair_of_choices(bias, retention, decay_target):
    rule = MirasRule(
        architecture=MLPMemory(expansion=3),
        attentional_bias=ATTENTIONAL_BIASES[bias](),
        retention=RETENTION_GATES[retention](),
        chunk_size=4,
        decay_target=decay_target,
    )
    case = make_case(rule, batch=1, tokens=8, head_dim=6)
    expected = values_and_gradients(case, recurrent_miras)
    assert_same(values_and_gradients(case, chunk_miras), expected, 1e-9)
    assert_same(values(case, decode_miras), {name: expected[name] for name in values(case, decode_miras)}, 1e-9)


@pytest.mark.parametrize("final_state", [True, False])
@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_forms_agree_in_float32(name, form, final_state):
    case = make_case(rule_of(name), dtype=torch.float32)
    expected = values_and_gradients(case, recurrent_miras, final_state=final_state)
    assert_same(values_and_gradients(case, FORMS[form], final_state=final_state), expected, 1e-5)


@pytest.mark.parametrize("chunk_size", [1, 4, 16])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 17, 33])
@pytest.mark.parametrize("name", MODELS)
def test_lengths_and_chunk_sizes(name, tokens, chunk_size):
    """Fewer tokens than a chunk, whole chunks, and what is left over."""
    case = make_case(rule_of(name, chunk_size=chunk_size), batch=1, tokens=tokens)
    expected = values(case, recurrent_miras)
    for form in ("chunk", "chunk_groups_of_2_recomputed", "decode"):
        assert_same(values(case, FORMS[form]), expected, 1e-10)


@pytest.mark.parametrize("form", ["recurrent", "chunk", "chunk_groups_of_1"])
@pytest.mark.parametrize("name", MODELS)
def test_no_tokens(name, form):
    case = make_case(rule_of(name), tokens=0)
    y, state = case(FORMS[form], output_final_state=True)
    assert y.shape == (2, 0, 2, 8)
    assert state.count.tolist() == [0, 0]
    # and the state is where reading starts
    later = make_case(rule_of(name), tokens=5)._replace(parameters=case.parameters)
    assert_same(values(later, FORMS[form], initial_state=state), values(later, FORMS[form]), 0.0)


@pytest.mark.parametrize("final_state", [True, False])
@pytest.mark.parametrize("chunks_per_group", [1, 2, 3, 100, None])
@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_nothing(name, chunks_per_group, final_state):
    """Hardly the rounding: the same operations run a second time."""
    case = make_case(rule_of(name), tokens=29)
    expected = values_and_gradients(case, chunk_miras, final_state=final_state)
    options = {"chunks_per_group": chunks_per_group, "final_state": final_state, "kept_bytes": 0}
    assert_same(values_and_gradients(case, chunk_miras, **options), expected, 1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_saves_memory(name):
    """What is kept between forward and backward: the inputs and a state per group, nothing that a chunk computes."""

    def saved(chunks_per_group):
        case = make_case(rule_of(name), tokens=64).requires_grad()
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
            y, _ = case(chunk_miras, chunks_per_group=chunks_per_group, kept_bytes=0)
        inputs = sum(x.nbytes for x in case.inputs.values())
        parameters = sum(x.nbytes for x in case.parameters.initial)
        return sum(x.nbytes for x in kept.values()), inputs, parameters, y

    grouped, inputs, parameters, y = saved(2)
    whole, _, _, same = saved(16)
    assert torch.equal(y, same)
    rows, groups = 2, 8
    assert whole < 2 * inputs + 4 * rows * parameters, (whole, inputs, parameters)
    assert grouped < whole + 1.5 * groups * rows * parameters, (grouped, whole, parameters)


@pytest.mark.parametrize("final_state", [True, False])
@pytest.mark.parametrize("name", [*RULES, *ARCHITECTURES])
def test_gradcheck(name, final_state):
    """Analytic gradients of the chunk form against finite differences, along random directions."""
    case = make_case(rule_of(name, chunk_size=2), batch=1, tokens=5, heads=1, head_dim=4).requires_grad()
    leaves = case.named_leaves()

    def function(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        inputs = {name: named[name] for name in case.inputs}
        initial = tuple(named[f"initial.{i}"] for i in range(len(case.parameters.initial)))
        parameters = case.parameters._replace(
            initial=initial, norm_weight=named["norm_weight"], norm_bias=named["norm_bias"]
        )
        outputs = values(Case(case.rule, inputs, parameters), chunk_miras, final_state, chunks_per_group=1)
        return outputs["y"], weighted_sum(outputs)

    torch.autograd.gradcheck(function, tuple(leaves.values()), eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_the_memory_itself(name):
    """A training step on the initial memory lowers the loss by what its gradient says: no detached path."""
    case = make_case(rule_of(name))
    target = torch.randn(case.inputs["v"].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def loss(scale, direction=None):
        initial = case.parameters.initial
        if direction is not None:
            initial = tuple(a + scale * g for a, g in zip(initial, direction, strict=True))
        y, _ = case._replace(parameters=case.parameters._replace(initial=initial))(chunk_miras)
        return (y - target).square().sum()

    leaves = case.requires_grad()
    y, _ = leaves(chunk_miras)
    gradient = torch.autograd.grad((y - target).square().sum(), leaves.parameters.initial)
    slope = sum(g.square().sum() for g in gradient)
    step = 1e-5 / slope.sqrt()
    difference = (loss(step, gradient) - loss(-step, gradient)) / (2 * step)
    assert relative_error(difference, slope) < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*MODELS, "yaad_norm"])
def test_bfloat16_inputs(name, form):
    """The memory computes in float32: the only errors are the rounding of what comes in and of what goes out."""
    case = make_case(rule_of(name), dtype=torch.float32)
    half = case.map(lambda x: x.bfloat16())
    rounded = half.map(lambda x: x.float())
    y, state = half(FORMS[form], output_final_state=True)
    exact, exact_state = rounded(FORMS[form], output_final_state=True)
    assert y.dtype == torch.bfloat16
    assert {x.dtype for x in (*state.dual, *state.inputs, *state.gradients, state.eta)} == {torch.float32}
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(state.dual[0], exact_state.dual[0])
    # eight bits in, eight bits out; Yaad's mixture loss jumps at its threshold, which rounding carries some tokens over
    if name != "yaad":
        assert relative_error(y, case(FORMS[form])[0]) < 1e-2


@pytest.mark.parametrize("form", ["chunk", "chunk_groups_of_1"])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_gradients(name, form):
    case = make_case(rule_of(name), dtype=torch.float32)
    half = case.map(lambda x: x.bfloat16())
    got = values_and_gradients(half, FORMS[form], final_state=False)
    expected = values_and_gradients(half.map(lambda x: x.float()), FORMS[form], final_state=False)
    assert got["grad.q"].dtype == torch.bfloat16
    assert_same(got, expected, 1e-2)


def test_mixed_dtypes_of_inputs_and_gates():
    """Gates come in float32 from a bf16 layer; parameters may be kept in bf16."""
    case = make_case(rule_of("yaad"), dtype=torch.float32)
    half = {name: x.bfloat16() if name in "qkv" else x for name, x in case.inputs.items()}
    rounded = {name: x.float() for name, x in half.items()}
    y, _ = case._replace(inputs=half)(chunk_miras)
    assert torch.equal(y, case._replace(inputs=rounded)(chunk_miras)[0].bfloat16())
    kept = case.to(torch.bfloat16).parameters
    assert case._replace(inputs=half, parameters=kept)(chunk_miras)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_autocast_does_not_reach_the_memory(name, form):
    """Its state and products stay in float32 whatever surrounds it, when the backward pass recomputes them too."""
    case = make_case(rule_of(name), dtype=torch.float32).requires_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = values(case, FORMS[form])
    got = {**outputs, **gradients(outputs, case.named_leaves())}
    assert_same(got, values_and_gradients(case, FORMS[form]), 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_backward_under_autocast(name):
    """Not the usual way, but a trainer's: the adjoint keeps to float32 as well."""
    case = make_case(rule_of(name), dtype=torch.float32)
    expected = values_and_gradients(case, chunk_miras, final_state=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = values_and_gradients(case, chunk_miras, final_state=False)
    assert_same(got, expected, 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_memory_layout_of_the_inputs(form):
    """Strides are the caller's business: slices, transposes and expanded gates."""
    case = make_case(rule_of("yaad"), gates="channel")
    inputs = dict(case.inputs)
    inputs["eta"] = inputs["eta"][..., :1].expand(-1, -1, -1, 8)
    inputs["log_alpha"] = inputs["log_alpha"][:, :, :1].expand(-1, -1, 2, -1)
    expected = values(case._replace(inputs={name: x.contiguous() for name, x in inputs.items()}), FORMS[form])
    strided = dict(inputs)
    strided["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["k"] = torch.cat((inputs["k"], inputs["k"]), dim=-1)[..., :8]
    strided["v"] = torch.stack((inputs["v"], inputs["v"]), dim=-1)[..., 0]
    strided["delta"] = inputs["delta"].flip(1).flip(1).mT.contiguous().mT
    assert not any(strided[name].is_contiguous() for name in ("q", "k", "v", "eta", "log_alpha", "delta"))
    assert_same(values(case._replace(inputs=strided), FORMS[form]), expected, 1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_head_gates_are_equal_channel_gates(name, form):
    """One number per head, given as three axes or as four with a last one of 1, is a channel gate with equal entries."""
    case = make_case(rule_of(name), gates="head")
    expected, _ = case(FORMS[form])
    for last in (1, 8):
        inputs = dict(case.inputs)
        for gate in ("eta", "log_alpha"):
            inputs[gate] = inputs[gate].unsqueeze(-1).expand(-1, -1, -1, last)
        y, state = case._replace(inputs=inputs)(FORMS[form], output_final_state=True)
        assert relative_error(y, expected) < 1e-12
        assert state.eta.shape[-1] == last


@pytest.mark.parametrize("form", FORMS)
def test_log_alpha_is_cut_at_its_bounds(form):
    case = make_case(rule_of("yaad", min_log_alpha=-1.5))
    log_alpha = 4 * case.inputs["log_alpha"] + 0.3  # from -1.7 to 0.3
    assert (log_alpha < -1.5).any() and (log_alpha > 0).any()
    y, _ = case._replace(inputs={**case.inputs, "log_alpha": log_alpha})(FORMS[form])
    cut, _ = case._replace(inputs={**case.inputs, "log_alpha": log_alpha.clamp(-1.5, 0.0)})(FORMS[form])
    assert torch.equal(y, cut)


@pytest.mark.parametrize("form", ["chunk", "decode"])
@pytest.mark.parametrize("log_alpha", [0.0, -1e-12, -2.5])
@pytest.mark.parametrize("name", MODELS)
def test_extreme_retention(name, log_alpha, form):
    """No decay at all, and the strongest allowed: a chunk of 64 then spans a factor of exp(160)."""
    case = make_case(rule_of(name, chunk_size=64), batch=1, tokens=70, head_dim=4, dtype=torch.float32)
    inputs = {**case.inputs, "log_alpha": torch.full_like(case.inputs["log_alpha"], log_alpha)}
    case = case._replace(inputs=inputs)
    with torch.no_grad():
        assert_same(values(case, FORMS[form]), values(case, recurrent_miras), 1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_no_steps_is_the_initial_memory(name, form):
    """Without writes the memory toward `init` stays what it was: every read is the network's own output."""
    case = make_case(rule_of(name))
    assert step_size(case.rule) > 0
    case = case._replace(inputs={**case.inputs, "eta": torch.zeros_like(case.inputs["eta"])})
    rule, parameters = case.rule, case.parameters
    weights = [rule.retention.link(a, rule.hidden_axis(i)) for i, a in enumerate(parameters.initial)]
    q = case.inputs["q"].transpose(1, 2)
    norm = (parameters.norm_weight.unsqueeze(1), parameters.norm_bias.unsqueeze(1))
    expected = rule.architecture.read(lambda layer, x: x @ weights[layer], q, *norm).transpose(1, 2)
    assert relative_error(case(FORMS[form])[0], expected) < 1e-12
