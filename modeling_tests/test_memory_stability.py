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
"""Every finite input keeps outputs, states and gradients finite and bounded; and what decay toward zero does.

At head_dim 16, with the largest steps that the models are meant for: all streams are rows of one batch, and three
retentions are its heads.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from memory_cases import MODELS, OTHER_RULES, Case, gradients, make_case, rule_of, state_tensors

from miras_hf.memory import KL, MemoryParameters, MirasRule, chunk_miras, step_miras
from miras_hf.memory.inputs import KEY_CAP, VALUE_CAP


HEAD_DIM = 16
RETENTIONS = (0.9, 0.99, 0.9999)
STEPS = {
    "moneta": 1.5e-3,
    "yaad": 0.03,
    "memora": 0.07,
    "bounded": 0.03,
    "sparse": 0.03,
    "shrunk": 0.03,
    "hebbian": 0.03,
}
STEPS |= {
    "shallow": 1.5e-3,
    "deep": 0.02,
    "bare": 0.03,
    "last": 1.5e-3,
    "gated": 1.5e-3,
    "gated_last": 0.03,
    "vector": 0.03,
    "nearest": 0.03,
    "nearest_zero": 0.03,
}


def random_tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def initial_memory(rule: MirasRule, heads: int) -> MemoryParameters:
    """Where models start from, the same for every head, so that heads differ in their gates alone."""
    initial = []
    for layer, (fan_in, fan_out) in enumerate(rule.architecture.weight_shapes(HEAD_DIM)):
        (weight,) = random_tensors((1, fan_in, fan_out), seed=layer)
        if isinstance(rule.retention, KL):
            dual = 0.5 * weight
        else:
            scale = 2 / math.sqrt(HEAD_DIM) if layer == 0 else 1 / math.sqrt(fan_in)
            dual = rule.retention.inverse(scale * weight, rule.hidden_axis(layer))
        initial.append(dual.expand(heads, -1, -1).clone())
    return MemoryParameters(tuple(initial), torch.ones(heads, HEAD_DIM), torch.zeros(heads, HEAD_DIM))


def streams(tokens: int, chunk_size: int) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries, keys and values `[tokens, head_dim]` that nobody hopes to meet, and one that everybody does."""
    q, k, v = random_tensors(*3 * [(tokens, HEAD_DIM)])
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    one_key, one_value = k[:1].expand(tokens, -1), v[:1].expand(tokens, -1)
    token = torch.arange(tokens).view(-1, 1)
    spikes = torch.where(torch.rand(tokens, 1, generator=torch.Generator().manual_seed(1)) < 0.01, 1e4, 1.0)
    huge = (v * 1e37).clamp(-3e38, 3e38)
    return {
        "normal values": (q, k, v),
        "values of 1e-2": (q, k, v * 1e-2),
        "values of 1e2": (q, k, v * 1e2),
        "values of 1e6": (q, k, v * 1e6),
        "values of 1e18": (q, k, v * 1e18),
        "values of 1e37": (q, k, huge),
        "sign flips every token": (one_key, one_key, v[:1] * (1 - 2 * (token % 2))),
        "sign flips every chunk": (one_key, one_key, v[:1] * (1 - 2 * (token // chunk_size % 2))),
        "constant values": (q, k, torch.ones_like(v)),
        "zero values": (q, k, torch.zeros_like(v)),
        "one-hot values": (q, k, F.one_hot(token[:, 0] % HEAD_DIM, HEAD_DIM).float()),
        "zero keys": (q, torch.zeros_like(k), v),
        "zeros": (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)),
        "eight keys": (q, k[token[:, 0] % 8], v),
        "spikes": (q, k, v * spikes),
        "huge queries and keys": (q * 1e30, k * 1e30, v),
        "equal tokens": (one_key, one_key, one_value),
    }


def stream_case(name: str, chunk_size: int, tokens: int) -> Case:
    """All streams as rows, all retentions as heads."""
    rule = rule_of(name, chunk_size=chunk_size)
    rows, heads = streams(tokens, chunk_size).values(), len(RETENTIONS)
    q, k, v = (torch.stack(parts).unsqueeze(2).expand(-1, -1, heads, -1) for parts in zip(*rows, strict=True))
    shape = q.shape[:3]
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "eta": torch.full(shape, STEPS[name]),
        "log_alpha": torch.tensor(RETENTIONS).log().expand(shape),
    }
    if rule.attentional_bias.delta_granularity is not None:
        inputs["delta"] = torch.full(shape, 2 * math.sqrt(HEAD_DIM))
    return Case(rule, inputs, initial_memory(rule, heads))


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean((-2, -1)).sqrt()


def dual_states(case: Case, state) -> list[torch.Tensor]:
    """A, from the deviation that decay toward the initial memory keeps."""
    return [a + d for a, d in zip(case.parameters.written(case.rule), state.dual, strict=True)]


def assert_finite(tensors: dict[str, torch.Tensor], rows) -> None:
    for name, x in tensors.items():
        assert x.isfinite().all(), (
            f"{name} of {[r for r, row in zip(rows, x, strict=True) if not row.isfinite().all()]}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("name", [*MODELS, *OTHER_RULES])
def test_adversarial_streams(name, chunk_size, dtype):
    """8192 tokens: outputs finite, weights within their cap, dual states within bounds of the initial one.

    The memory computes bf16 inputs in float32, where they are inputs like others: fewer tokens of them.
    """
    tokens = 8192 if dtype == torch.float32 else 2048
    case = stream_case(name, chunk_size, tokens)
    rows = list(streams(2, 1))
    # the softmax bounds the weights of a hidden slice by its mass alone: 2 sqrt(n / d) at one hot
    cap = 4.0 if isinstance(case.rule.retention, KL) else 2.0
    sane = [row != "huge queries and keys" for row in rows]
    state = None
    with torch.no_grad():
        for start in range(0, tokens, 1024):
            piece = case.tokens(start, start + 1024).map(lambda x: x.to(dtype) if x.shape[-1] == HEAD_DIM else x)
            y, state = piece(chunk_miras, initial_state=state, output_final_state=True)
            assert_finite({"y": y, **state_tensors(state)}, rows)
            for layer, dual in enumerate(dual_states(case, state), start=case.rule.architecture.fixed):
                weights = case.rule.retention.link(dual, case.rule.hidden_axis(layer))
                assert rms(weights).amax() <= cap * (1 + 1e-5)
                assert (rms(dual)[sane] <= 100 * rms(case.parameters.initial[layer])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("name", [*MODELS, *OTHER_RULES])
def test_gradients_of_adversarial_streams(name, chunk_size, dtype):
    """Finite for all inputs and parameters; recomputed groups included."""
    tokens = 1024 if dtype == torch.float32 else 256
    case = stream_case(name, chunk_size, tokens).map(lambda x: x.to(dtype) if x.shape[-1] == HEAD_DIM else x)
    leaves = case.requires_grad()
    y, _ = leaves(chunk_miras)
    found = gradients({"y": y}, leaves.named_leaves())
    assert_finite({name: found[f"grad.{name}"] for name in case.inputs}, list(streams(2, 1)))
    assert all(x.isfinite().all() for x in found.values())
    assert all(found[f"grad.{name}"].any() for name in ("q", "k", "v", "eta", "log_alpha"))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_over_8192_tokens(name):
    """These streams are locally chaotic: without a bound on the states' adjoints they overflow on the way back."""
    rows = [row in ("sign flips every chunk", "zero values", "values of 1e37") for row in streams(2, 1)]
    leaves = stream_case(name, 16, 8192).map(lambda x: x[rows]).requires_grad()
    y, _ = leaves(chunk_miras)
    found = gradients({"y": y}, leaves.named_leaves())
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("name", ["yaad", "yaad_norm"])
def test_an_infinite_threshold_is_none(name):
    rule = rule_of(name)
    case = make_case(rule, tokens=13).requires_grad()
    without = case._replace(inputs=case.inputs | {"delta": torch.full_like(case.inputs["delta"], math.inf)})
    large = case._replace(inputs=case.inputs | {"delta": torch.full_like(case.inputs["delta"], 1e9)})
    y, _ = without(chunk_miras)
    torch.testing.assert_close(y, large(chunk_miras)[0], rtol=1e-9, atol=1e-9)
    leaves = {name: leaf for name, leaf in case.named_leaves().items() if name != "delta"}
    for name, gradient in gradients({"y": y}, leaves).items():
        assert gradient.isfinite().all(), name


def test_shapes_are_told_without_data():
    case = make_case(rule_of("yaad_norm"), tokens=13)
    meta = case.map(lambda x: x.to("meta"))._replace(parameters=on_meta(case.parameters))
    y, state = meta(chunk_miras, output_final_state=True)
    assert y.is_meta and y.shape == case.inputs["q"].shape
    y, _ = meta.tokens(0, 1)(step_miras, initial_state=state, output_final_state=True)
    assert y.is_meta and y.shape == case.inputs["q"][:, :1].shape


def on_meta(parameters: MemoryParameters) -> MemoryParameters:
    initial, *norm = parameters
    return MemoryParameters(tuple(a.to("meta") for a in initial), *(p.to("meta") for p in norm))


def test_a_batch_of_nothing_is_read():
    case = make_case(rule_of("yaad"), tokens=13).map(lambda x: x[:0])
    assert case(chunk_miras)[0].shape == case.inputs["q"].shape


def test_magnitudes_are_cut():
    """Inputs beyond the caps act as at the caps."""
    case = stream_case("yaad", 16, 32)
    case = case.map(lambda x: x[:1])
    cut = {**case.inputs, "q": case.inputs["q"].sign() * KEY_CAP, "k": case.inputs["k"].sign() * KEY_CAP}
    cut["v"] = case.inputs["v"].sign() * VALUE_CAP
    beyond = {**cut, **{name: cut[name] * 1e10 for name in "qkv"}}
    assert torch.equal(case._replace(inputs=beyond)(chunk_miras)[0], case._replace(inputs=cut)(chunk_miras)[0])


@pytest.mark.parametrize("name", MODELS)
def test_bounded_state_over_131072_tokens(name):
    """At three times the steps: the state neither grows nor drifts from one half to the other."""
    tokens, piece = 131072, 8192
    rule = rule_of(name, chunk_size=64)
    parameters = initial_memory(rule, 2)
    state, sizes = None, []
    with torch.no_grad():
        for part in range(tokens // piece):
            q, k, v = random_tensors(*3 * [(1, piece, 2, HEAD_DIM)], seed=part)
            inputs = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v}
            inputs["eta"] = torch.full((1, piece, 2), 3 * STEPS[name])
            inputs["log_alpha"] = torch.tensor([0.999, 0.9999]).log().expand(1, piece, 2)
            if rule.attentional_bias.delta_granularity is not None:
                inputs["delta"] = torch.full((1, piece, 2), 2 * math.sqrt(HEAD_DIM))
            case = Case(rule, inputs, parameters)
            y, state = case(chunk_miras, initial_state=state, output_final_state=True)
            assert y.isfinite().all()
            sizes.append([rms(dual).amax().item() for dual in dual_states(case, state)])
    assert state.count.tolist() == [tokens]
    half = len(sizes) // 2
    for early, late, initial in zip(
        zip(*sizes[:half], strict=True), zip(*sizes[half:], strict=True), parameters.initial, strict=True
    ):
        assert max(late) <= 1.5 * max(early)
        assert max(late) <= 50 * rms(initial).amax()


# -- decay toward the initial memory, and toward zero ---------------------------------------------------------------------


def random_case(name: str, alpha: float, **changes) -> Case:
    """4096 normal tokens."""
    rule = rule_of(name, chunk_size=16, **changes)
    case = make_case(rule, batch=1, tokens=4096, heads=2, head_dim=HEAD_DIM, gates="head", dtype=torch.float32)
    inputs = dict(case.inputs)
    inputs["eta"] = torch.full_like(inputs["eta"], STEPS[name.split("_")[0]])
    inputs["log_alpha"] = torch.full_like(inputs["log_alpha"], math.log(alpha))
    return case._replace(inputs=inputs, parameters=initial_memory(rule, 2))


def rounding_and_effect(case: Case) -> tuple[float, float]:
    """Error of float32 against float64, and what it makes of its reads to have written, over their second half."""
    with torch.no_grad():
        y = case(chunk_miras)[0].double()[:, 2048:]
        exact = case.to(torch.float64)(chunk_miras)[0][:, 2048:]
        unwritten = case._replace(inputs={**case.inputs, "eta": 0 * case.inputs["eta"]})
        effect = exact - unwritten.to(torch.float64)(chunk_miras)[0][:, 2048:]
    return ((y - exact).norm() / exact.norm()).item(), (effect.norm() / exact.norm()).item()


@pytest.mark.parametrize("alpha", [0.9, 0.99])
@pytest.mark.parametrize("name", ["moneta", "yaad_norm", "yaad_coordinate", "memora"])
def test_float32_follows_float64_with_decay_toward_init(name, alpha):
    """The default. The softmax's weights are sums of near-equal numbers, hence the wider bound for Memora."""
    error, effect = rounding_and_effect(random_case(name, alpha, decay_target="init"))
    assert error < (1e-4 if name == "memora" else 1e-5)
    assert effect > 0.1


def test_mixture_threshold_makes_reads_sensitive():
    """A fact about equation (16): its residual jumps at the threshold, from norm delta to delta sqrt(head_dim).

    Where thresholds lie among the errors, rounding carries tokens over, and at this step reads of two precisions end
    up unrelated; with thresholds beyond all errors they agree. The losses (14) and (15) have no such jump.
    """
    case = random_case("yaad", 0.99)
    among, beyond = (
        case._replace(inputs={**case.inputs, "delta": torch.full_like(case.inputs["delta"], delta)})
        for delta in (math.sqrt(HEAD_DIM), 1e3)
    )
    assert rounding_and_effect(among)[0] > 0.1
    assert rounding_and_effect(beyond)[0] < 1e-5


@pytest.mark.parametrize("alpha", [0.9, 0.99])
def test_decay_toward_zero_is_chaotic_for_moneta(alpha):
    """A fact about the paper's rule, not a wish: runs of the same input in two precisions end up unrelated."""
    error, effect = rounding_and_effect(random_case("moneta", alpha, decay_target="zero"))
    assert error > 0.1 < effect


@pytest.mark.parametrize("alpha", [0.9, 0.97])
def test_decay_toward_zero_kills_yaad(alpha):
    """The other half of the trap: zero weights have zero gradients, and the memory returns its queries."""
    case = random_case("yaad", alpha, decay_target="zero").to(torch.float64)
    with torch.no_grad():
        y, q = (x[:, 2048:] for x in (case(chunk_miras)[0], case.inputs["q"]))
    assert (y - q).norm() < 1e-6 * y.norm()


@pytest.mark.parametrize("by_hand", [True, False], ids=["adjoint", "autograd"])
def test_gradients_survive_the_fastest_decay(by_hand, monkeypatch):
    """A whole chunk at the smallest log alpha: factors of exp(80) meet their inverses, in the backward too."""
    if not by_hand:
        monkeypatch.setattr("miras_hf.memory.chunk.has_adjoint", lambda rule: False)
    case = make_case(rule_of("moneta", chunk_size=64), tokens=150, dtype=torch.float32)
    case.inputs["log_alpha"] = torch.full_like(case.inputs["log_alpha"], -2.5)
    case = case.requires_grad()
    y, _ = case(chunk_miras)
    y.square().sum().backward()
    assert y.isfinite().all()
    for name, leaf in case.named_leaves().items():
        assert leaf.grad.isfinite().all(), name
