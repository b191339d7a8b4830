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
"""A choice of your own: one class gives configs, models, checkpoints and cards that know it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from memory_cases import assert_same, make_case, values_and_gradients
from torch import Tensor

from miras_hf import MirasConfig, MirasForCausalLM, YaadConfig, load_memory, save_memory
from miras_hf.backend import kernel_choices
from miras_hf.memory import (
    ATTENTIONAL_BIASES,
    KL,
    L2,
    RETENTION_GATES,
    AttentionalBias,
    ChiSquared,
    Decay,
    HuberNorm,
    Lp,
    MatrixMemory,
    MirasRule,
    MLPMemory,
    RetentionGate,
    chunk_miras,
    parameter,
    recurrent_miras,
    register_attentional_bias,
    register_memory_architecture,
    register_retention_gate,
)
from miras_hf.memory.registry import CHOICES
from miras_hf.model_card import four_choices
from miras_hf.modeling_miras import memory_rule
from miras_hf.step_size import loss_gain, start_of


SIZES = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "chunk_size": 4}


@dataclass(frozen=True)
class StudentT(AttentionalBias):
    freedom: float = parameter("student_t_freedom", 3.0, above=0, high=1e3, symbol="nu")
    tail: str = parameter("student_t_tail", "heavy", one_of=("heavy", "light"))

    def gradient(self, error: Tensor, delta=None) -> Tensor:
        return (self.freedom + 1.0) * error / (self.freedom + error.square())


def test_a_model_with_an_own_loss_trains_decodes_and_comes_back(tmp_path):
    register_attentional_bias("student_t")(StudentT)
    config = MirasConfig(**SIZES, attentional_bias="student_t", student_t_freedom=5)
    rule = memory_rule(config)
    assert rule.attentional_bias == StudentT(freedom=5.0) and isinstance(rule.attentional_bias.freedom, float)
    assert config.student_t_tail == "heavy"
    assert kernel_choices(rule) == (None, "kernels do not know StudentT")
    assert "| attentional bias | `student_t`, nu = 5.0, `residual_clip` = 3.0, `student_t_tail` = heavy |" in (
        four_choices(config)
    )

    torch.manual_seed(0)
    model = MirasForCausalLM(config)
    ids = torch.randint(32, (1, 10))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        whole = model(ids).logits
        out = model(ids[:, :6], use_cache=True)
        steps = [out.logits]
        for t in range(6, 10):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)

    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["student_t_freedom"], stored["student_t_tail"]) == (5, "heavy")
    again = MirasForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, whole)
    assert MirasConfig.from_pretrained(tmp_path, student_t_freedom=7.0).student_t_freedom == 7.0
    model.config.student_t_freedom = 2.0
    with pytest.raises(ValueError, match=r"`config.student_t_freedom` is 2.0, and the model was built with 5"):
        model(ids)

    del CHOICES["attentional_bias"]["student_t"]
    with pytest.raises(
        StrictDataclassError,
        match="(?s)attentional_bias.*'huber_mixture'.*registered by `miras_hf.memory.register_attentional_bias`, got student_t",
    ):
        MirasConfig.from_pretrained(tmp_path)


def test_own_values_are_checked():
    with pytest.raises(TypeError, match="does not know `student_t_freedom`"):
        MirasConfig(**SIZES, student_t_freedom=3.0)
    register_attentional_bias("student_t")(StudentT)
    for value, words in {0.0: "must be above 0 and at most 1000, got 0.0", float("nan"): "got nan"}.items():
        with pytest.raises(ValueError, match=f"`student_t_freedom` .*{words}"):
            MirasConfig(**SIZES, attentional_bias="student_t", student_t_freedom=value)
    with pytest.raises(ValueError, match="`student_t_tail` must be one of 'heavy', 'light', got thick"):
        YaadConfig(**SIZES, attentional_bias="student_t", student_t_tail="thick")
    with pytest.raises(
        StrictDataclassError, match="`student_t_freedom` means nothing without `attentional_bias='student_t'`"
    ):
        MirasConfig(**SIZES, student_t_freedom=5.0)
    config = MirasConfig(**SIZES, attentional_bias="student_t")
    config.student_t_freedom = -1.0
    with pytest.raises(StrictDataclassError, match="`student_t_freedom` must be above 0"):
        MirasForCausalLM(config)
    with pytest.raises(ValueError, match="`freedom` must be above 0, got -1.0"):
        StudentT(freedom=-1.0)


@dataclass(frozen=True)
class Doubled(RetentionGate):
    """`W = 2 A`, which is decay of a memory that is written twice as strongly."""

    def link(self, dual: Tensor, hidden_axis: int) -> Tensor:
        return 2.0 * dual

    def at_chunk_start(self, state: Tensor, base: Tensor | None, hidden_axis: int):
        dual = state if base is None else base + state
        plain = Decay(weight_cap=None).at_chunk_start(state, base, hidden_axis)
        return plain._replace(weight=2.0 * dual, scale=torch.full_like(dual[..., :1, :1], 2.0))

    def inverse(self, weight: Tensor, hidden_axis: int) -> Tensor:
        return 0.5 * weight


def test_an_own_retention_gate_computes_what_it_says():
    register_retention_gate("doubled")(Doubled)
    fields = SIZES | {"memory_architecture": "matrix", "decay_target": "zero", "initializer_range": 0.2}
    torch.manual_seed(0)
    doubled = MirasForCausalLM(MirasConfig(**fields, retention="doubled", eta_max=0.01)).eval()
    decay = MirasForCausalLM(MirasConfig(**fields, retention="decay", weight_cap=None, eta_max=0.02)).eval()
    weights = {name: 2.0 * t if "initial_state" in name else t for name, t in doubled.state_dict().items()}
    decay.load_state_dict(weights)
    ids = torch.randint(32, (2, 11))
    with torch.no_grad():
        assert torch.allclose(doubled(ids).logits, decay(ids).logits, atol=1e-5)
    # the step it starts with is half of that of decay, as it writes twice as strongly
    default = [MirasConfig(**fields, retention=gate).eta_max for gate in ("doubled", "decay")]
    assert default[0] == pytest.approx(default[1] / 2.0, rel=1e-6)


@dataclass(frozen=True)
class Deaf(AttentionalBias):
    def gradient(self, error: Tensor, delta=None) -> Tensor:
        return 0.0 * error


@dataclass(frozen=True)
class Broken(AttentionalBias):
    def gradient(self, error: Tensor, delta=None) -> Tensor:
        return error / 0.0


class Uncentred(KL):
    def centred(self, weight, hidden_axis):
        return 3.0 * weight


class Steeper(KL):
    def slope(self, dual, hidden_axis):
        return 2.0 * super().slope(dual, hidden_axis)


class UncentredChiSquared(ChiSquared):
    centred = Uncentred.centred


@pytest.mark.parametrize("cls", [Uncentred, Steeper, UncentredChiSquared])
def test_gradients_are_those_of_a_part_that_was_overridden(cls):
    case = make_case(MirasRule(MLPMemory(expansion=2), L2(), cls(), chunk_size=4), tokens=9).requires_grad()
    assert_same(values_and_gradients(case, chunk_miras), values_and_gradients(case, recurrent_miras), 1e-9)


@pytest.mark.parametrize("cls", [Deaf, Broken])
def test_a_loss_without_a_step_asks_for_one(cls):
    register_attentional_bias("own")(cls)
    with pytest.raises(ValueError, match="`eta_max` must be given with `attentional_bias='own'`"):
        MirasConfig(**SIZES, attentional_bias="own")
    assert MirasConfig(**SIZES, attentional_bias="own", eta_max=0.1).eta_max == 0.1


def test_a_link_of_more_weights_than_are_drawn_asks_for_a_step():
    register_retention_gate("doubled")(Doubled)
    with pytest.raises(ValueError, match="`eta_max` must be given with `Doubled` and weights of shape"):
        MirasConfig(hidden_size=2**14, num_attention_heads=1, retention="doubled")


def test_a_keyword_of_another_choice_is_not_stored(tmp_path):
    register_attentional_bias("student_t")(StudentT)
    MirasConfig(**SIZES, student_t_freedom=3.0).save_pretrained(tmp_path)
    del CHOICES["attentional_bias"]["student_t"]
    assert MirasConfig.from_pretrained(tmp_path).attentional_bias == "l2"
    with pytest.raises(
        StrictDataclassError,
        match="(?s)learning_algorithm.*must be one of 'gradient_descent', 'momentum', 'delta_rule', 'implicit', 'exact', got",
    ):
        MirasConfig(**SIZES, learning_algorithm="adam")


def test_an_own_memory_architecture():
    @register_memory_architecture("shifted")
    @dataclass(frozen=True)
    class Shifted(MatrixMemory):
        def read(self, linear, x, norm_weight, norm_bias):
            return linear(0, x) + x

        def write(self, weights, k, residual, norm_weight, norm_bias):
            return super().write(weights, k, lambda prediction: residual(prediction + k), norm_weight, norm_bias)

    class Deep(MatrixMemory):
        gate_axes = ("input", "hidden", "output")

    with pytest.raises(TypeError, match="`gate_axes` of `Deep` must be one or two of 'input' and 'output'"):
        register_memory_architecture("deep")(dataclass(frozen=True)(Deep))
    with pytest.raises(ValueError, match="`eta_max` must be given with `memory_architecture='shifted'`"):
        MirasConfig(**SIZES, memory_architecture="shifted")
    model = MirasForCausalLM(MirasConfig(**SIZES, memory_architecture="shifted", eta_max=0.1))
    ids = torch.randint(32, (1, 9))
    model(ids, labels=ids).loss.backward()
    assert type(model.model.layers[0].mixer.memory.rule.architecture) is Shifted


class Plain(AttentionalBias):
    def gradient(self, error, delta=None):
        return error


@dataclass(frozen=True)
class WithoutGradient(AttentionalBias):
    pass


@dataclass(frozen=True)
class WithPlainField(L2):
    size: float = field(default=1.0)


@dataclass(frozen=True)
class WithForeignKey(L2):
    size: float = parameter("hidden_size", 1.0, 0, 1)


@pytest.mark.parametrize(
    "name, cls, error, words",
    [
        ("l2", StudentT, ValueError, "`name` must be none of the library's, .*'huber_norm'.*got 'l2'"),
        ("student-t", StudentT, ValueError, "could name a variable, got 'student-t'"),
        ("mine", Doubled, TypeError, "must be a class derived from `AttentionalBias`"),
        ("mine", Plain, TypeError, r"`Plain` must be decorated by `dataclass\(frozen=True\)`"),
        ("mine", WithoutGradient, TypeError, "`WithoutGradient` must have `gradient`"),
        ("mine", WithPlainField, TypeError, r"fields \['size'\] of `WithPlainField` must be made by `parameter`"),
        ("mine", WithForeignKey, ValueError, "`key` must begin with 'mine_', got 'hidden_size'"),
    ],
)
def test_what_is_no_choice_gets_no_name(name, cls, error, words):
    before = dict(ATTENTIONAL_BIASES)
    with pytest.raises(error, match=words):
        register_attentional_bias(name)(cls)
    assert before == ATTENTIONAL_BIASES


@pytest.mark.parametrize(
    "bias",
    [L2(), L2(residual_clip=0.5), L2(residual_clip=None), Lp(), Lp(power=2.0), Lp(power=1.5), HuberNorm()],
    ids=str,
)
def test_the_step_of_an_own_loss_is_that_of_the_formulas(bias):
    class Own(type(bias)):  # another class, which nobody has derived anything for
        pass

    own = Own(*(getattr(bias, name) for name in bias.parameters()))
    assert loss_gain(own, 128) == pytest.approx(loss_gain(bias, 128), rel=0.03)


@pytest.mark.parametrize("name", sorted(RETENTION_GATES))
@pytest.mark.parametrize("hidden_axis", [-1, -2])
def test_the_start_of_an_own_gate_is_that_of_the_formulas(name, hidden_axis):
    gate = RETENTION_GATES[name]()

    class Own(type(gate)):
        pass

    shape = (64, 256) if hidden_axis == -1 else (256, 64)
    derived, measured = (start_of(g, shape, 1.0 / shape[0] ** 0.5, hidden_axis) for g in (gate, Own()))
    assert measured.std == pytest.approx(derived.std, rel=0.05)
    assert measured.slope == pytest.approx(derived.slope, rel=0.05)
    assert measured.mean == pytest.approx(derived.mean, abs=0.05 * derived.std)


def test_the_documents_table_is_what_classes_declare():
    text = (Path(__file__).resolve().parents[1] / "docs" / "choices.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", text, flags=re.M)
    declared = {}
    for table in CHOICES.values():
        for name, cls in table.items():
            for p in cls.parameters().values():
                declared.setdefault((p.key, str(p.default), p.allowed), []).append(name)
    declared = {
        row: "every loss" if row[0] == "residual_clip" else ", ".join(f"`{n}`" for n in names if n != "lq_mirror")
        for row, names in declared.items()
    }
    assert {(key, default, allowed): names for key, names, default, allowed in rows} == declared


def test_a_memory_of_an_own_loss_is_saved_with_its_name(tmp_path):
    register_attentional_bias("student_t")(StudentT)
    ids = torch.arange(9)[None]
    models = {}
    for name, fields in {
        "own": {"attentional_bias": "student_t", "eta_max": 0.1},
        "other value": {"attentional_bias": "student_t", "eta_max": 0.1, "student_t_freedom": 9.0},
        "l2": {"eta_max": 0.1},
    }.items():
        torch.manual_seed(0)
        models[name] = MirasForCausalLM(MirasConfig(**SIZES, **fields)).eval()
        save_memory(models[name](ids, use_cache=True).past_key_values, tmp_path / name, models[name])
    load_memory(tmp_path / "own", models["own"])
    with pytest.raises(ValueError, match=r"`student_t_freedom` \(9.0 there, 3.0 here\)"):
        load_memory(tmp_path / "other value", models["own"])
    with pytest.raises(ValueError, match=r"`attentional_bias` \('l2' there, 'student_t' here\)"):
        load_memory(tmp_path / "l2", models["own"])
    with pytest.raises(ValueError, match=r"`attentional_bias` \('student_t' there, 'l2' here\)"):
        load_memory(tmp_path / "own", models["l2"])
