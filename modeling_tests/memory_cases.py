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
"""What the tests of the memory's mathematics share: rules, inputs, the forms of the recurrence, and comparisons.

Shapes are tiny (head_dim 8, a dozen tokens): the mathematics has no threshold on size, and every file stays quick.
"""

import dataclasses
import functools
import math
import sys
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

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
    GatedMLPMemory,
    HuberCoordinate,
    HuberMixture,
    HuberNorm,
    Lp,
    Lq,
    LqMirror,
    MatrixMemory,
    MemoryParameters,
    MemoryState,
    MirasRule,
    MLPMemory,
    Robust,
    VectorMemory,
    chunk_miras,
    recurrent_miras,
    step_miras,
)
from miras_hf.sequences import Sequences


# on tensors this small, threads that wait for each other cost up to a hundred times the work on a busy machine
torch.set_num_threads(1)

MODELS = ("moneta", "yaad", "memora")

RULES = {
    # the three models of the paper
    "moneta": MirasRule(attentional_bias=Lp(), retention=Lq()),
    "yaad": MirasRule(attentional_bias=HuberMixture(), retention=Decay()),
    "memora": MirasRule(attentional_bias=L2(), retention=KL()),
    # every other choice at least once, and the paper's decay toward zero with every link
    "moneta_mirror": MirasRule(attentional_bias=Lp(power=2.5, sign="tanh"), retention=LqMirror()),
    "moneta_zero": MirasRule(attentional_bias=Lp(power=4.0), retention=Lq(power=5.0), decay_target="zero"),
    "mirror_zero": MirasRule(attentional_bias=L2(), retention=LqMirror(power=3.5), decay_target="zero"),
    "yaad_coordinate": MirasRule(attentional_bias=HuberCoordinate(), decay_target="zero"),
    "yaad_norm": MirasRule(attentional_bias=HuberNorm(), retention=Decay(weight_cap=None)),
    "memora_zero": MirasRule(attentional_bias=L2(), retention=KL(), decay_target="zero"),
    "matrix": MirasRule(architecture=MatrixMemory(), attentional_bias=L2(), retention=Decay()),
    "matrix_zero": MirasRule(architecture=MatrixMemory(), attentional_bias=Lp(), retention=KL(), decay_target="zero"),
    # guards at work: the weights' cap and the residual's clip
    "guarded": MirasRule(
        architecture=MLPMemory(expansion=2),
        attentional_bias=Lp(residual_clip=0.5, error_cap=1.0),
        retention=Decay(weight_cap=0.3),
    ),
}

# choices that the three models do not make and kernels do not know
OTHER_RULES = {
    "bounded": MirasRule(attentional_bias=Robust(), retention=Bregman()),
    "hebbian": MirasRule(architecture=MatrixMemory(), attentional_bias=Dot(), retention=Decay(), decay_target="zero"),
    "nearest": MirasRule(attentional_bias=L1(), retention=ChiSquared()),
    "nearest_zero": MirasRule(
        architecture=MatrixMemory(),
        attentional_bias=L1(residual_clip=None),
        retention=ChiSquared(),
        decay_target="zero",
    ),
    "sparse": MirasRule(attentional_bias=L2(), retention=ElasticNet(threshold=0.1), decay_target="zero"),
    "shrunk": MirasRule(attentional_bias=HuberNorm(), retention=ElasticNetDecay(threshold=2e-3)),
    "shallow": MirasRule(architecture=MLPMemory(depth=1), attentional_bias=L2(), retention=Lq()),
    "deep": MirasRule(architecture=MLPMemory(expansion=2, depth=3), attentional_bias=L2(), retention=KL()),
    "last": MirasRule(
        MLPMemory(expansion=2, depth=3, update_layers="last"), L2(), Lq(weight_cap=0.5), decay_target="zero"
    ),
    "bare": MirasRule(architecture=MLPMemory(expansion=2, norm=False, residual=False), attentional_bias=HuberNorm()),
    "gated": MirasRule(architecture=GatedMLPMemory(expansion=2), attentional_bias=L2(), retention=LqMirror()),
    "gated_last": MirasRule(architecture=GatedMLPMemory(expansion=2, update_layers="last"), attentional_bias=L2()),
    "vector": MirasRule(architecture=VectorMemory(), attentional_bias=L2(), retention=Decay()),
}
ARCHITECTURES = ("shallow", "deep", "last", "bare", "gated", "gated_last", "vector")
"""Those of them whose architectures the three models do not have, with adjoints of their own."""

# eta and log_alpha, each with one number per channel or per head
GATES = {
    "channel": ("channel", "channel"),
    "head": ("head", "head"),
    "eta_channel": ("channel", "head"),
    "alpha_channel": ("head", "channel"),
}


def rule_of(name: str, **changes) -> MirasRule:
    """A rule by name with a chunk of 4 tokens, or what `changes` say."""
    return dataclasses.replace({**RULES, **OTHER_RULES}[name], **{"chunk_size": 4, **changes})


def step_size(rule: MirasRule) -> float:
    """A step at which the memory moves visibly and the recurrence is not chaotic."""
    return 0.01 if isinstance(rule.retention, Lq) else 0.1


class Case(NamedTuple):
    """A rule with inputs and parameters for it."""

    rule: MirasRule
    inputs: dict[str, Tensor]
    parameters: MemoryParameters

    def tokens(self, start: int | None, stop: int | None) -> "Case":
        return self.map(lambda x: x[:, start:stop])

    def row(self, index: int) -> "Case":
        return self.map(lambda x: x[index : index + 1])

    def map(self, function) -> "Case":
        """The case with `function` applied to every input."""
        return self._replace(inputs={name: function(x) for name, x in self.inputs.items()})

    def to(self, dtype: torch.dtype) -> "Case":
        parameters = MemoryParameters(
            tuple(a.to(dtype) for a in self.parameters.initial),
            self.parameters.norm_weight.to(dtype),
            self.parameters.norm_bias.to(dtype),
        )
        return self.map(lambda x: x.to(dtype))._replace(parameters=parameters)

    def named_leaves(self) -> dict[str, Tensor]:
        """All that a gradient is asked for: inputs and parameters."""
        initial = {f"initial.{i}": a for i, a in enumerate(self.parameters.initial)}
        norm = {"norm_weight": self.parameters.norm_weight, "norm_bias": self.parameters.norm_bias}
        return {**self.inputs, **initial, **norm}

    def requires_grad(self) -> "Case":
        """The case on fresh leaves."""
        parameters = MemoryParameters(
            tuple(a.detach().clone().requires_grad_() for a in self.parameters.initial),
            self.parameters.norm_weight.detach().clone().requires_grad_(),
            self.parameters.norm_bias.detach().clone().requires_grad_(),
        )
        return self.map(lambda x: x.detach().clone().requires_grad_())._replace(parameters=parameters)

    def __call__(self, form, mask=None, **options):
        """What a form makes of the case; with a mask `[batch, tokens]`, of its true tokens, brought to the front as models
        bring them."""
        if mask is None:
            return form(**self.inputs, rule=self.rule, parameters=self.parameters, **options)
        sequences = Sequences(mask)
        first = self.map(lambda x: sequences.gather(x.flatten(2)).view_as(x))
        found = first(form, lengths=sequences.lengths, **options)
        if not isinstance(found[0], Tensor) or found[0].shape[:2] != mask.shape:
            return found
        y, *rest = found
        pads = torch.arange(mask.shape[1]) >= sequences.lengths[:, None]
        assert not y[pads].any()
        return sequences.scatter(y.flatten(2), len(mask)).view_as(y), *rest


def make_parameters(rule: MirasRule, heads: int, head_dim: int, generator: torch.Generator) -> MemoryParameters:
    """An initial memory of the scale that models start from, and a layer norm off its initial values."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    initial = []
    for layer, (fan_in, fan_out) in enumerate(rule.architecture.weight_shapes(head_dim)):
        scale = 2 / math.sqrt(head_dim) if layer == 0 else 1 / math.sqrt(fan_in)
        weight = scale * normal(heads, fan_in, fan_out)
        initial.append(rule.retention.inverse(weight, rule.hidden_axis(layer)))
    return MemoryParameters(tuple(initial), 1 + 0.1 * normal(heads, head_dim), 0.1 * normal(heads, head_dim))


def make_case(
    rule: MirasRule,
    batch: int = 2,
    tokens: int = 13,
    heads: int = 2,
    head_dim: int = 8,
    gates: str = "channel",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """Random unit keys and queries, normal values, gates by `GATES`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, heads, head_dim)
    eta_shape, alpha_shape = (shape if per == "channel" else shape[:-1] for per in GATES[gates])

    def normal():
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "q": torch.nn.functional.normalize(normal(), dim=-1),
        "k": torch.nn.functional.normalize(normal(), dim=-1),
        "v": normal(),
        "eta": step_size(rule) * uniform(eta_shape),
        "log_alpha": -0.5 * uniform(alpha_shape),
    }
    # thresholds around the errors met, so that both sides of each are taken
    granularity = rule.attentional_bias.delta_granularity
    if granularity == "channel":
        inputs["delta"] = 0.5 + 2 * uniform(shape)
    elif granularity == "head":
        inputs["delta"] = math.sqrt(head_dim) * (0.5 + 2 * uniform(shape[:-1]))
    if rule.algorithm.has_erase_key:
        inputs["erase"] = torch.nn.functional.normalize(normal(), dim=-1)
    return Case(rule, inputs, make_parameters(rule, heads, head_dim, generator)).to(dtype)


# -- forms ----------------------------------------------------------------------------------------------------------------


def decode_miras(*, rule, parameters, initial_state=None, output_final_state=False, lengths=None, **inputs: Tensor):
    """`step_miras`, token by token, with the arguments of the other forms."""
    state, outputs = initial_state, []
    for t in range(inputs["q"].shape[1]):
        now = {name: x[:, t : t + 1] for name, x in inputs.items()}
        options = {} if lengths is None else {"lengths": (lengths - t).clamp(0, 1)}
        y, state = step_miras(**now, rule=rule, parameters=parameters, initial_state=state, **options)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state if output_final_state else None


FORMS = {
    "recurrent": recurrent_miras,
    "chunk": chunk_miras,
    "chunk_groups_of_1": functools.partial(chunk_miras, chunks_per_group=1),
    "chunk_groups_of_2_recomputed": functools.partial(chunk_miras, chunks_per_group=2, kept_bytes=0),
    "decode": decode_miras,
}
OTHER_FORMS = [name for name in FORMS if name != "recurrent"]


# -- comparisons ----------------------------------------------------------------------------------------------------------


def state_tensors(state: MemoryState) -> dict[str, Tensor]:
    """The tensors of a state by name."""
    named = {}
    for name, value in zip(state._fields, state, strict=True):
        layers = value if isinstance(value, tuple) else (value,)
        named |= {f"state.{name}.{i}": x for i, x in enumerate(layers)}
    return named


def in_float64(monkeypatch, layer: torch.nn.Module) -> None:
    """Where a layer's module or what it calls says float32, by a method or, in the module, by its name, float64 is meant."""
    wide = SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(sys.modules[type(layer).__module__], "torch", wide)


def layer_and_mixer(layer: torch.nn.Module, mixer: torch.nn.Module, x: Tensor) -> dict:
    """By module, outputs and gradients of the input of a layer and the memory layer that took its weights."""
    found = {}
    for module, call in ((layer, layer), (mixer, lambda x: mixer(x)[0])):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found[module] = y, leaf.grad
    return found


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm expected; the norm itself where zeros are expected."""
    difference = (actual.double() - expected.double()).norm().item()
    return difference / (expected.double().norm().item() or 1.0)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor of the expected shape and within a relative error, NaN being an error."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].shape == expected[name].shape, name
        error = relative_error(actual[name], expected[name])
        assert error <= tolerance, f"{name}: relative error {error:.2e} above {tolerance:.0e}"


def weighted_sum(tensors: dict[str, Tensor]) -> Tensor:
    """A scalar that depends on every entry of every tensor with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for name, x in tensors.items():
        if x.is_floating_point():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            total = total + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    return total


def values(case: Case, form, final_state: bool = True, **options) -> dict[str, Tensor]:
    """Outputs, and the final state where it is asked for."""
    y, state = case(form, output_final_state=final_state, **options)
    return {"y": y, **(state_tensors(state) if final_state else {})}


def gradients(outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a weighted sum of outputs; zeros where nothing depends on a leaf."""
    found = torch.autograd.grad(
        weighted_sum(outputs), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {f"grad.{name}": g for name, g in zip(leaves, found, strict=True)}


def values_and_gradients(case: Case, form, final_state: bool = True, **options) -> dict[str, Tensor]:
    """Outputs, final state, and gradients with respect to all inputs and parameters; options as for `values`."""
    case = case.requires_grad()
    outputs = values(case, form, final_state, **options)
    found = gradients(outputs, case.named_leaves())
    return {**{name: x.detach() for name, x in outputs.items()}, **found}


def assert_taken_over(case: Case, first, then, tolerance: float) -> None:
    """Two forms read thirteen tokens, the second from the middle of a chunk on, with gradients through the state."""
    whole = values_and_gradients(case, recurrent_miras)
    leaves = case.requires_grad()
    y, state = leaves.tokens(0, 6)(first, output_final_state=True)
    more, end = leaves.tokens(6, 13)(then, initial_state=state, output_final_state=True)
    parts = {"y": torch.cat((y, more), dim=1), **state_tensors(end)}
    assert_same({name: t.detach() for name, t in parts.items()}, {n: whole[n] for n in parts}, tolerance)
    of_parts = gradients(parts, leaves.named_leaves())
    assert_same(of_parts, {n: t for n, t in whole.items() if n.startswith("grad.")}, 1e-9)


def assert_pads_and_packs_change_nothing(case: Case, form, tolerance: float, packs: bool = True) -> None:
    """Of one row of thirteen tokens, six and seven are read as two rows with pads among them, and as two packs."""
    rows = [case.tokens(0, 6), case.tokens(6, 13)]
    expected = [row(recurrent_miras, output_final_state=True) for row in rows]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, [0, 1, 4]], mask[1, [2, 8]] = False, False
    padded = {name: torch.full((2, 9, *x.shape[2:]), 0.3, dtype=x.dtype) for name, x in case.inputs.items()}
    for name, x in padded.items():
        for row in range(2):
            x[row, mask[row]] = rows[row].inputs[name][0]
    y, state = case._replace(inputs=padded)(form, mask=mask, output_final_state=True)
    for row, (want, end) in enumerate(expected):
        assert relative_error(y[row, mask[row]], want[0]) < tolerance
        for got, other in zip(state.leaves(), end.leaves(), strict=True):
            assert relative_error(got[row], other[0]) < tolerance
    if packs:
        packed, _ = case(form, cu_seqlens=torch.tensor([0, 6, 13], dtype=torch.int32))
        assert relative_error(packed, torch.cat([want for want, _ in expected], dim=1)) < tolerance
