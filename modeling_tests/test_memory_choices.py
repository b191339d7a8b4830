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
"""The choices one by one: gradients of the attentional biases, properties of the retention gates' links, the memory."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from memory_cases import make_case, relative_error
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

from miras_hf import MirasConfig
from miras_hf.memory import (
    KL,
    L1,
    L2,
    Bregman,
    ChiSquared,
    Decay,
    Dot,
    ElasticNet,
    ElasticNetDecay,
    Factors,
    GatedMLPMemory,
    HuberCoordinate,
    HuberMixture,
    HuberNorm,
    Lp,
    Lq,
    LqMirror,
    MatrixMemory,
    MemoryParameters,
    MirasRule,
    MLPMemory,
    NoRetention,
    Robust,
    VectorMemory,
    chunk_miras,
    recurrent_miras,
)
from miras_hf.memory.retention import ChunkWeights, soft_threshold
from miras_hf.memory.vjp import with_vjp


BIASES = {
    "l2": L2(),
    "lp_1": Lp(power=1.0),
    "lp_2.5": Lp(power=2.5),
    "lp_3": Lp(power=3.0),
    "lp_4": Lp(power=4.0),
    "l1": L1(),
    "huber_coordinate": HuberCoordinate(),
    "huber_norm": HuberNorm(),
    "huber_mixture": HuberMixture(),
    "robust": Robust(),
}
SCALED_LINKS = {"decay": Decay(), "lq": Lq(), "lq_5": Lq(power=5.0)}
ELEMENTWISE = {"bregman": Bregman(bound=4.0), "elastic_net": ElasticNet(threshold=0.2)}
LINKS = {**SCALED_LINKS, **ELEMENTWISE, "mirror": LqMirror(), "mirror_3": LqMirror(power=3.0)}
SIMPLICES = {"kl": KL(), "chi_squared": ChiSquared()}
LINKS |= SIMPLICES
SHAPES = {-1: (6, 10), -2: (10, 6)}  # the hidden axis is the longer one


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def threshold_for(bias, errors):
    """Thresholds around the errors' sizes."""
    if bias.delta_granularity is None:
        return None
    spread = 0.3 + 1.5 * torch.rand(errors.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return spread if bias.delta_granularity == "channel" else spread[..., :1] * math.sqrt(errors.shape[-1])


# -- attentional biases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BIASES)
def test_gradient_is_that_of_the_loss(name):
    bias = BIASES[name]
    errors = normal(50, 8)
    # lp: the exact sign leaves the smoothed size near zero, and the cap cuts large errors
    errors = (errors.sign() * (errors.abs() + 0.05)).clamp(-3.9, 3.9).requires_grad_()
    delta = threshold_for(bias, errors)
    (expected,) = torch.autograd.grad(bias.loss(errors, delta).sum(), errors)
    tolerance = 1e-4 if isinstance(bias, Lp) else 1e-12
    assert bias.loss(errors, delta).shape == (50, 1)
    assert relative_error(bias.gradient(errors, delta), expected) < tolerance
    if delta is not None:
        beyond = (errors.abs() if bias.delta_granularity == "channel" else errors.norm(dim=-1, keepdim=True)) > delta
        assert 0.1 < beyond.double().mean() < 0.9


def test_lp_near_zero_and_beyond_its_cap():
    bias = Lp(power=3.0, error_cap=2.0)
    errors = torch.tensor([-9.0, -2.0, -1e-9, 0.0, 1e-9, 2.0, 9.0], dtype=torch.float64)
    expected = torch.tensor([-12.0, -12.0, -3e-6, 0.0, 3e-6, 12.0, 12.0], dtype=torch.float64)
    torch.testing.assert_close(bias.gradient(errors), expected, rtol=1e-6, atol=0.0)
    smooth = Lp(power=3.0, sign="tanh", sharpness=5.0)
    at = torch.tensor([-1.0, 0.1, 0.0], dtype=torch.float64)
    expected = 3 * torch.tanh(5 * at) * (at.square() + 1e-6)
    torch.testing.assert_close(smooth.gradient(at), expected, rtol=1e-12, atol=0.0)


def test_lp_special_power_is_the_general_one():
    errors = normal(50, 8)
    assert relative_error(Lp(power=3.0).gradient(errors), Lp(power=3.0 + 1e-12).gradient(errors)) < 1e-11


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 1e3, 1e18])
def test_residual_is_bounded_and_keeps_its_direction(name, scale):
    bias = BIASES[name]
    errors = scale * normal(50, 8)
    delta = None if bias.delta_granularity is None else 1e20 * torch.ones(50, 8 if "coord" in name else 1)
    residual, gradient = bias.residual(errors, delta), bias.gradient(errors, delta)
    size, limit = gradient.norm(dim=-1, keepdim=True), 3 * math.sqrt(8)
    assert (residual.norm(dim=-1) <= limit * (1 + 1e-12)).all()
    expected = torch.where(size <= limit, gradient, gradient * limit / size)
    torch.testing.assert_close(residual, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", BIASES)
def test_residual_has_finite_derivatives_everywhere(name):
    bias = BIASES[name]
    errors = torch.cat([scale * normal(4, 8) for scale in (0.0, 1e-20, 1e-6, 1.0, 1e6, 1e15)]).float().requires_grad_()
    delta = None
    if bias.delta_granularity is not None:
        delta = torch.ones(24, 8 if bias.delta_granularity == "channel" else 1, requires_grad=True)
    residual = bias.residual(errors, delta)
    leaves = [errors] if delta is None else [errors, delta]
    for gradient in torch.autograd.grad(residual.sum(), leaves):
        assert gradient.isfinite().all()


def test_dot_product_is_linear_attention():
    """`y_t = sum_i (q_t . k_i) eta_i v_i`, decayed from i to t, whatever is read."""
    rule = MirasRule(MatrixMemory(), Dot(residual_clip=1e9), Decay(weight_cap=None), chunk_size=4, decay_target="zero")
    case = make_case(rule, tokens=11, gates="head")
    case = case._replace(parameters=case.parameters._replace(initial=(torch.zeros(2, 8, 8, dtype=torch.float64),)))
    q, k, v, eta, log_alpha = (case.inputs[name] for name in ("q", "k", "v", "eta", "log_alpha"))
    since = log_alpha.cumsum(1)
    decay = (since[:, :, None] - since[:, None]).exp()
    causal = torch.ones(11, 11, dtype=torch.float64).tril()
    scores = torch.einsum("bthd,bihd->btih", q, k) * decay * eta[:, None] * causal[None, :, :, None]
    y, _ = case(chunk_miras)
    assert relative_error(y, torch.einsum("btih,bihd->bthd", scores, v)) < 1e-12
    prediction, value = normal(5, 8, seed=2).requires_grad_(), normal(5, 8, seed=3)
    (expected,) = torch.autograd.grad(Dot().loss_at(prediction, value).sum(), prediction)
    assert torch.equal(Dot().gradient(Dot().error(prediction, value)), expected)


# -- retention gates ------------------------------------------------------------------------------------------------------


def states(gate, hidden_axis, heads=3):
    """A base and a state around it, at the scale of an initial memory."""
    base = gate.inverse(normal(heads, *SHAPES[hidden_axis]) * 0.5, hidden_axis)
    return base, base.std() * 0.3 * normal(*base.shape, seed=1)


def random_factors(hidden_axis, tokens=4, heads=3):
    fan_in, fan_out = SHAPES[hidden_axis]
    return Factors(normal(heads, tokens, fan_in, seed=2), normal(heads, tokens, fan_out, seed=3))


@pytest.mark.parametrize("hidden_axis", SHAPES)
@pytest.mark.parametrize("name", LINKS)
def test_writes_on_factors_equal_writes_on_the_matrix(name, hidden_axis):
    base, state = states(LINKS[name], hidden_axis)
    weights = LINKS[name].at_chunk_start(state, base, hidden_axis)
    factors = random_factors(hidden_axis)
    whole = factors.inputs.mT @ factors.gradients
    mapped = LINKS[name].writes(weights, factors, hidden_axis)
    on_matrix = LINKS[name].writes_matrix(weights, whole, hidden_axis)
    assert relative_error(mapped.inputs.mT @ mapped.gradients, on_matrix) < 1e-12


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("hidden_axis", SHAPES)
@pytest.mark.parametrize("name", LINKS)
def test_chunk_start_is_the_link(name, hidden_axis, with_base):
    """Without decay or writes since the chunk's start, a read meets exactly `phi(A_c)`."""
    gate = LINKS[name]
    base, state = states(gate, hidden_axis)
    weights = gate.at_chunk_start(state, base if with_base else None, hidden_axis)
    dual = base + state if with_base else state
    assert relative_error(weights.weight, gate.link(dual, hidden_axis)) < 1e-12
    read = sum(part for part in (weights.constant, weights.decaying) if part is not None)
    assert relative_error(read if weights.scale is None else weights.scale * read, weights.weight) < 1e-12


@pytest.mark.parametrize("hidden_axis", SHAPES)
@pytest.mark.parametrize("name", [name for name in LINKS if name not in SIMPLICES])
def test_complete_decay_reads_the_base(name, hidden_axis):
    """With everything decayed, toward zero nothing is left, toward the base the base is (its scalar held)."""
    gate = LINKS[name]
    base, state = states(gate, hidden_axis)
    assert gate.at_chunk_start(state, None, hidden_axis).constant is None
    weights = gate.at_chunk_start(state, base, hidden_axis)
    expected = gate.link(base, hidden_axis) if weights.scale is None else weights.scale * base
    left = weights.constant if weights.scale is None else weights.scale * weights.constant
    assert relative_error(left, expected) < 1e-12


@pytest.mark.parametrize("hidden_axis", SHAPES)
@pytest.mark.parametrize("link", [KL, ChiSquared])
def test_slices_of_a_simplex_sum_to_the_mass(link, hidden_axis):
    gate = link(mass=1.7)
    fan_in, fan_out = SHAPES[hidden_axis]
    dual = 30 * normal(3, fan_in, fan_out)
    weights = gate.link(dual, hidden_axis)
    mass = 1.7 * 10 / math.sqrt(fan_in)  # the hidden axis has 10 entries
    # the last layer's have no common part, which its layer norm would take out
    positive = weights + mass / 10 if hidden_axis == -2 else weights
    assert (positive >= -1e-15 * mass).all()
    torch.testing.assert_close(positive.sum(hidden_axis), torch.full_like(positive.sum(hidden_axis), mass))
    # a constant per slice is no information
    shifted = dual + normal(3, fan_in, 1) if hidden_axis == -1 else dual + normal(3, 1, fan_out)
    assert relative_error(gate.link(shifted, hidden_axis), weights) < 1e-12


@pytest.mark.parametrize("hidden_axis", SHAPES)
@pytest.mark.parametrize("name", SIMPLICES)
def test_writes_to_a_simplex_are_the_derivative_of_its_link_at_uniform_weights(name, hidden_axis):
    gate, write = SIMPLICES[name], normal(*SHAPES[hidden_axis])
    uniform = torch.zeros_like(write)
    _, expected = torch.autograd.functional.jvp(lambda a: gate.link(a, hidden_axis), uniform, write)
    writes = gate.writes_matrix(gate.at_chunk_start(uniform, None, hidden_axis), write, hidden_axis)
    assert relative_error(writes, expected) < 1e-12


def test_degrees_of_homogeneity():
    dual = normal(3, 6, 10)
    for power in (3.0, 4.0, 5.0):
        mirror, printed = LqMirror(power=power, weight_cap=None), Lq(power=power, weight_cap=None)
        # the mirror map has degree one, the printed map 3 - q: it turns scales over
        assert relative_error(mirror.link(2 * dual, -1), 2 * mirror.link(dual, -1)) < 1e-12
        assert relative_error(printed.link(2 * dual, -1), 2 ** (3 - power) * printed.link(dual, -1)) < 1e-12


def test_lq_at_two_is_the_identity():
    dual = normal(3, 6, 10)
    for gate in (Lq(power=2.0, weight_cap=None), LqMirror(power=2.0, weight_cap=None), Decay(weight_cap=None)):
        assert relative_error(gate.link(dual, -1), dual) < 1e-12


def test_mirror_map_is_the_gradient_of_half_the_squared_norm():
    """Its derivation (Shalev-Shwartz, section 2.6): `phi = grad (1/2) ||A||_q^2`."""
    dual = normal(6, 10).requires_grad_()
    for power in (3.0, 4.0):
        half_square = 0.5 * dual.abs().pow(power).sum().pow(2 / power)
        (expected,) = torch.autograd.grad(half_square, dual)
        assert relative_error(LqMirror(power=power, weight_cap=None).link(dual, -1), expected) < 1e-12


@pytest.mark.parametrize("name", ["lq", "lq_5", "mirror"])
def test_norms_are_those_of_each_head_alone(name):
    gate = LINKS[name]
    dual = normal(3, 6, 10) * torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64).view(3, 1, 1)
    together = gate.link(dual, -1)
    for head in range(3):
        assert relative_error(together[head], gate.link(dual[head], -1)) < 1e-12


def test_l1_is_the_sign_but_near_zero():
    errors = torch.tensor([-7.0, -0.5, 0.5, 7.0, 1e-2, 1e-6, 0.0], dtype=torch.float64)
    gradient = L1().gradient(errors)
    torch.testing.assert_close(gradient[:4], errors[:4].sign(), rtol=2e-4, atol=0.0)
    expected = torch.tensor([2**-0.5, 1e-4, 0.0], dtype=torch.float64)  # one and a ten-thousandth of its width
    torch.testing.assert_close(gradient[4:], expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("hidden_axis", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e30])
def test_chi_squared_is_the_nearest_point_of_the_simplex(scale, hidden_axis):
    """Found by halving intervals, where the link sorts."""
    gate = ChiSquared(mass=3.0)
    dual = scale * normal(3, *SHAPES[hidden_axis])
    weight, size = gate.link(dual, hidden_axis), dual.shape[hidden_axis]
    unit = gate.mass / math.sqrt(dual.shape[-2])  # c / n
    if hidden_axis == -2:  # without their common part
        weight = weight + unit
    low, high = (dual.amax(hidden_axis, keepdim=True) - size * where for where in (1.0, 0.0))
    for _ in range(200):
        middle = (low + high) / 2
        too_much = (dual - middle).clamp(min=0.0).sum(hidden_axis, keepdim=True) > size
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    if scale < 1e15:  # above, rounding is larger than what is looked for
        assert relative_error(weight, unit * (dual - low).clamp(min=0.0)) < 1e-12
    assert (weight >= 0.0).all()
    torch.testing.assert_close(weight.sum(hidden_axis), torch.full_like(weight.sum(hidden_axis), unit * size))
    assert (weight == 0.0).any() == (scale >= 1.0)


def test_chi_squared_keeps_what_is_not_a_number_where_it_is():
    dual = normal(2, 6, 10)
    dual[0, 2, 3] = math.nan
    for axis in SHAPES:
        weight = ChiSquared().link(dual, axis)
        met = torch.zeros(6, 10, dtype=torch.bool)
        met[2 if axis == -1 else slice(None), 3 if axis == -2 else slice(None)] = True
        assert torch.equal(weight[0].isnan(), met) and weight[1].isfinite().all()


def test_elastic_net_decay_is_equation_22():
    gamma, rule = 2e-3, MirasRule(MatrixMemory(), L2(residual_clip=None), chunk_size=1, decay_target="zero")
    rule = dataclasses.replace(rule, retention=ElasticNetDecay(weight_cap=None, threshold=gamma))
    case = make_case(rule, batch=1, tokens=40, heads=1, gates="head")
    q, k, v = (case.inputs[name][0, :, 0] for name in "qkv")
    eta, alpha = case.inputs["eta"].flatten(), case.inputs["log_alpha"].flatten().exp()
    w, expected = case.parameters.initial[0][0], []
    for t in range(len(q)):
        moved = alpha[t] * w - eta[t] * torch.outer(k[t], k[t] @ w - v[t])
        expected.append(q[t] @ moved)  # a token reads in its own chunk, which is not over
        w = moved - gamma * torch.tanh(moved / gamma)
    y, state = case(chunk_miras, output_final_state=True)
    assert relative_error(y[0, :, 0], torch.stack(expected)) < 1e-12
    assert relative_error(state.dual[0][0, 0], w) < 1e-12
    # small weights go out, and large ones lose gamma
    far = moved.abs() > 20.0 * gamma
    assert far.any() and relative_error(w[far], moved[far].sign() * (moved[far].abs() - gamma)) < 1e-12
    near = soft_threshold(gamma / 10 * torch.linspace(-1.0, 1.0, 11), gamma)
    assert near.abs().max() < gamma / 2000


@pytest.mark.parametrize("form", [chunk_miras, recurrent_miras])
def test_without_a_retention_gate_nothing_is_forgotten(form):
    case = make_case(MirasRule(attentional_bias=L2(), retention=NoRetention(), chunk_size=4), tokens=13)
    inputs = {**case.inputs, "log_alpha": torch.zeros_like(case.inputs["log_alpha"])}
    kept = case._replace(rule=dataclasses.replace(case.rule, retention=Decay()), inputs=inputs)
    assert case.inputs["log_alpha"].lt(0).all()
    for one, other in zip(*(c(form, output_final_state=True) for c in (case, kept)), strict=True):
        for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x.leaves() for x in (one, other)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_slopes_and_maps_of_single_entries(name):
    gate = ELEMENTWISE[name]
    dual = (3.0 * normal(6, 10)).requires_grad_()
    mapped = gate.function(dual)
    (expected,) = torch.autograd.grad(mapped.sum(), dual)
    assert relative_error(gate.slope(dual), expected) < 1e-12
    if name == "bregman":  # the sigmoid, from 0 to 1, stretched over -c to c
        assert relative_error(mapped, gate.bound * (2.0 * torch.sigmoid(2.0 * dual / gate.bound) - 1.0)) < 1e-12
    else:  # the soft threshold, where it is not smoothed
        far = dual.abs() > 20.0 * gate.threshold
        shrunk = dual.sign() * (dual.abs() - gate.threshold).clamp(min=0.0)
        assert far.any() and relative_error(mapped[far], shrunk[far]) < 1e-12


@pytest.mark.parametrize("hidden_axis", SHAPES)
@pytest.mark.parametrize("name", LINKS)
def test_inverse(name, hidden_axis):
    """`phi(inverse(W)) = W`: exactly, or for a simplex to first order in the deviation from its mean."""
    gate = LINKS[name]
    weight = 0.5 * normal(3, *SHAPES[hidden_axis])
    if name in SIMPLICES:
        weight = 1e-4 * weight
        weight = weight - weight.mean(hidden_axis, keepdim=True)
        image = gate.link(gate.inverse(weight, hidden_axis), hidden_axis)
        assert relative_error(image - image.mean(hidden_axis, keepdim=True), weight) < 1e-3
    else:
        assert relative_error(gate.link(gate.inverse(weight, hidden_axis), hidden_axis), weight) < 1e-12


@pytest.mark.parametrize("power", [3.0])
def test_inverse_of_a_map_without_scale_keeps_the_direction(power):
    gate = Lq(power=power)
    weight = 0.1 * normal(6, 10)
    image = gate.link(gate.inverse(weight, -1), -1)
    assert relative_error(image / image.norm(), weight / weight.norm()) < 1e-12


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("name", [name for name in LINKS if name not in SIMPLICES])
def test_weight_cap(name, size):
    """`rms(W)` stays below the cap at every size of A, in float32, and the cap changes no direction."""
    gate = LINKS[name]
    dual = (size * normal(3, 6, 10)).float().requires_grad_()
    weights = gate.link(dual, -1)
    assert weights.isfinite().all()
    assert (weights.square().mean((-2, -1)).sqrt() <= 2.0 * (1 + 1e-5)).all()
    (gradient,) = torch.autograd.grad(weights.sum(), dual)
    assert gradient.isfinite().all()
    if size == 1e3 and name != "lq" and name != "lq_5":  # the printed map shrinks what is large
        assert (weights.square().mean((-2, -1)).sqrt() >= 2.0 * (1 - 1e-5)).all()


def test_weight_cap_is_inactive_below_it():
    dual = normal(3, 6, 10)
    assert torch.equal(Decay(weight_cap=10.0).link(dual, -1), dual)
    assert torch.equal(Lq(weight_cap=10.0).link(dual, -1), Lq(weight_cap=None).link(dual, -1))


def test_floor_of_the_printed_map():
    """Below the floor the map is linear: it cannot blow a vanishing dual state up."""
    gate = Lq(norm_floor=0.5, weight_cap=None)
    dual = 0.01 * normal(6, 10)
    assert dual.norm(p=4) < 0.5
    assert relative_error(gate.link(dual, -1), dual / 0.25) < 1e-12


# -- architectures --------------------------------------------------------------------------------------------------------


NETWORKS = [
    MLPMemory(),
    MLPMemory(expansion=1, norm_eps=1e-3),
    MLPMemory(depth=1),
    MLPMemory(expansion=2, depth=4),
    MLPMemory(residual=False),
    MLPMemory(depth=3, norm=False),
    MLPMemory(depth=3, update_layers="last"),
    GatedMLPMemory(expansion=2),
    GatedMLPMemory(expansion=2, norm=False, residual=False),
    GatedMLPMemory(expansion=2, update_layers="last"),
    MatrixMemory(),
    VectorMemory(),
]


@pytest.mark.parametrize("architecture", NETWORKS, ids=str)
def test_write_is_the_gradient_of_the_read(architecture):
    """Rank-one factors times each other are the gradients by autograd, and so are their derivatives."""
    d, tokens = 6, 5
    weights = [normal(2, *shape, seed=i).requires_grad_() for i, shape in enumerate(architecture.weight_shapes(d))]
    k, v = normal(2, tokens, d, seed=5).requires_grad_(), normal(2, tokens, d, seed=6)
    norm = [(1 + 0.1 * normal(2, 1, d, seed=7)).requires_grad_(), (0.1 * normal(2, 1, d, seed=8)).requires_grad_()]
    factors = architecture.write(tuple(weights), k, lambda m: (m - v).pow(3), *norm)
    written = [f.inputs.mT @ f.gradients for f in factors]

    prediction = architecture.read(lambda layer, x: x @ weights[layer], k, *norm)
    written_weights = weights[architecture.fixed :]
    expected = torch.autograd.grad((prediction - v).pow(4).sum() / 4, written_weights, create_graph=True)
    leaves = [*weights, k, *(norm if architecture.has_norm else [])]
    for got, want in zip(written, expected, strict=True):
        assert relative_error(got, want) < 1e-12
    first, second = (
        torch.autograd.grad(sum((x * normal(*x.shape, seed=9)).sum() for x in xs), leaves)
        for xs in (written, expected)
    )
    for got, want in zip(first, second, strict=True):
        assert relative_error(got, want) < 1e-11


def test_other_depths_and_what_stands_around():
    d, x, affine = 6, normal(5, 6, seed=3), (normal(6, seed=4), normal(6, seed=5))

    def read(memory):
        weights = [normal(*shape, seed=i) for i, shape in enumerate(memory.weight_shapes(d))]
        return weights, memory.read(lambda layer, h: h @ weights[layer], x, *affine)

    (w,), found = read(MLPMemory(depth=1, norm_eps=1e-6))
    assert w.shape == (d, d) and relative_error(found, x + F.layer_norm(x @ w, (d,), *affine, 1e-6)) < 1e-12
    memory = MLPMemory(expansion=3, depth=4, norm=False)
    (a, b, c, e), found = read(memory)
    assert [tuple(w.shape) for w in (a, b, c, e)] == [(d, 3 * d), (3 * d, 3 * d), (3 * d, 3 * d), (3 * d, d)]
    assert memory.gate_axes == ("input", "hidden", "hidden", "output")

    def act(z):
        return F.gelu(z, approximate="tanh")

    expected = act(act(act(x @ a) @ b) @ c) @ e
    assert relative_error(found, x + expected) < 1e-12
    assert relative_error(read(MLPMemory(expansion=3, depth=4, norm=False, residual=False))[1], expected) < 1e-12


def test_mlp_memory_is_the_equation():
    """`x + LN(gelu(x W1) W2)`."""
    memory, d = MLPMemory(norm_eps=0.1), 6
    (w1, w2), x = (normal(*shape) for shape in memory.weight_shapes(d)), normal(5, d, seed=3)
    gamma, beta = normal(d, seed=4), normal(d, seed=5)
    read = memory.read(lambda layer, h: h @ (w1, w2)[layer], x, gamma, beta)
    expected = x + F.layer_norm(F.gelu(x @ w1, approximate="tanh") @ w2, (d,), gamma, beta, 0.1)
    assert (w1.shape, w2.shape) == ((d, 4 * d), (4 * d, d))
    assert relative_error(read, expected) < 1e-12


def test_gated_memory_is_the_equation():
    memory, d = GatedMLPMemory(expansion=3, norm_eps=0.2), 6
    w1, w2, w3 = weights = [normal(*shape, seed=i) for i, shape in enumerate(memory.weight_shapes(d))]
    x, gamma, beta = normal(5, d, seed=4), normal(d, seed=5), normal(d, seed=6)
    read = memory.read(lambda layer, h: h @ weights[layer], x, gamma, beta)
    gated = F.gelu(x @ w1, approximate="tanh") * (x @ w2)
    assert [tuple(w.shape) for w in weights] == [(d, 3 * d), (d, 3 * d), (3 * d, d)]
    assert relative_error(read, x + F.layer_norm(gated @ w3, (d,), gamma, beta, 0.2)) < 1e-12


def test_vector_memory_is_a_diagonal_recurrence():
    """With the dot product, one linear recurrence a channel: that of Griffin's RG-LRU, as Transformers has it."""
    d, tokens, heads, rows = 6, 21, 2, 3
    x, carry = normal(rows, tokens, heads * d), 0.2 + 0.8 * torch.rand(rows, tokens, heads * d, dtype=torch.float64)
    config = RecurrentGemmaConfig(num_hidden_layers=1, num_attention_heads=heads, lru_width=heads * d)
    reset = torch.zeros(rows, tokens, 1, dtype=torch.bool)
    expected, _ = RecurrentGemmaRglru(config)._rnn_scan(x, carry, reset, None, acc_dtype=torch.float64)
    q, k = (torch.full((rows, tokens, heads, d), d**-0.5, dtype=torch.float64) for _ in range(2))
    rule = MirasRule(VectorMemory(), Dot(residual_clip=1e9), Decay(weight_cap=None), chunk_size=4, decay_target="zero")
    parameters = MemoryParameters(
        (torch.zeros(heads, 1, d, dtype=torch.float64),), torch.ones(heads, d), torch.zeros(heads, d)
    )
    v, eta, log_alpha = (t.unflatten(-1, (heads, d)) for t in (x, torch.ones_like(x), carry.log()))
    for form in (chunk_miras, recurrent_miras):
        y, _ = form(q, k, v, eta, log_alpha, rule=rule, parameters=parameters)
        assert relative_error(y.flatten(-2) * d, expected) < 1e-9


def test_a_simplex_over_one_unit_is_refused():
    with pytest.raises(ValueError, match="`retention` must fit the architecture: KL.*one unit here.*VectorMemory"):
        MirasRule(VectorMemory(), L2(), KL())
    with pytest.raises(StrictDataclassError, match="`retention='kl'` keeps the sum.*`memory_architecture='vector'`"):
        MirasConfig(memory_architecture="vector", retention="kl")


# -- what has decayed away, and what has grown ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e-5, 1e-3, 1.0, 1e3, 1e7])
@pytest.mark.parametrize("power", [2.0, 2.5, 3.0, 4.0, 6.0, 30.0])
def test_mirror_map_of_any_scale(power, scale):
    """Map and slope in float32 against the printed formulas in float64; no power or quotient leaves float32."""
    gate = LqMirror(power=power)
    dual = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * scale
    dual[0, 0] = 0.0
    leaf = dual[None].clone().requires_grad_()
    chunk = gate.at_chunk_start(leaf, None, -1)
    slope = gate.writes_matrix(chunk, torch.ones(1, 6, 5), -1)
    (gradient,) = torch.autograd.grad(chunk.weight.sum() + slope.sum(), leaf)
    assert gradient.isfinite().all()

    exact = dual.double()
    powered = exact.abs() ** (power - 2.0) / max(float((exact.abs() ** power).sum() ** (1 / power)), 1e-2) ** (
        power - 2.0
    )
    weight = exact * powered
    cap = min(1.0, gate.weight_cap / max(float(weight.square().mean().sqrt()), 1e-300))
    torch.testing.assert_close(chunk.weight[0].double(), cap * weight, rtol=1e-5, atol=1e-30)
    means = powered.mean(1, keepdim=True) * powered.mean(0) / powered.mean().clamp(min=1e-300)
    torch.testing.assert_close(slope[0].double(), (power - 1.0) * cap * means, rtol=1e-5, atol=1e-28)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-5, 1.0, 1e3])
@pytest.mark.parametrize("weight_cap", [None, 2.0])
@pytest.mark.parametrize("power", [2.0, 2.5, 4.0, 6.0, 30.0])
def test_printed_map_of_any_scale_is_a_number(power, weight_cap, scale):
    gate = Lq(power=power, weight_cap=weight_cap)
    leaf = (torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(0)) * scale).requires_grad_()
    weight = gate.link(leaf, -1)
    (gradient,) = torch.autograd.grad(weight.sum(), leaf)
    linked, vjp = with_vjp(gate.at_chunk_start, leaf.detach(), None, -1)
    ones = torch.ones_like(weight)
    by_hand, *_ = vjp(ChunkWeights(ones, None, torch.zeros_like(ones), torch.zeros(1, 1, 1)))
    assert all(x.isfinite().all() for x in (weight, gradient, linked.weight, by_hand))


@pytest.mark.parametrize("final_state", [False, True])
def test_a_mirrored_memory_that_has_gone_out(final_state):
    """A weight of exactly zero, as an initial memory and as what decay has left: reads return the query."""
    rule = MirasRule(attentional_bias=Lp(), retention=LqMirror(power=6.0), chunk_size=4, decay_target="zero")
    case = make_case(rule, tokens=9, dtype=torch.float32)
    parameters = case.parameters._replace(
        initial=tuple(torch.zeros_like(a) for a in case.parameters.initial),
        norm_bias=torch.zeros_like(case.parameters.norm_bias),
    )
    case = case._replace(parameters=parameters).requires_grad()
    y, _ = case(chunk_miras, output_final_state=final_state)
    torch.testing.assert_close(y, case.inputs["q"])
    y.square().sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in case.named_leaves().values())
