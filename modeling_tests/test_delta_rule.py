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
"""The delta rule: gradients token by token, against its recurrence written out and in every form."""

import dataclasses
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from memory_cases import (
    FORMS,
    OTHER_FORMS,
    assert_pads_and_packs_change_nothing,
    assert_same,
    assert_taken_over,
    make_case,
    relative_error,
    values_and_gradients,
)
from memory_effects import assert_saved_taken_back_and_speculated

from miras_hf import MirasConfig, MirasForCausalLM
from miras_hf.memory import (
    L2,
    Decay,
    DeltaRule,
    Dot,
    GradientDescent,
    HuberNorm,
    Implicit,
    Lq,
    MatrixMemory,
    MemoryParameters,
    MirasRule,
    MLPMemory,
    chunk_miras,
    fold_step_,
    folds_at_once,
    recurrent_miras,
    step_miras_,
)
from miras_hf.memory.diagnostics import memory_statistics
from miras_hf.memory.naive import naive_miras
from miras_hf.memory.probe import probe_memory
from miras_hf.model_card import four_choices


def delta_rule(
    gradient_at="decayed", weight_cap=None, decay_target="zero", chunk_size=4, erase_key="write"
) -> MirasRule:
    algorithm = DeltaRule(gradient_at=gradient_at, erase_key=erase_key)
    return MirasRule(
        MatrixMemory(), L2(residual_clip=None), Decay(weight_cap=weight_cap), algorithm, chunk_size, decay_target
    )


RULES = {
    "decayed": delta_rule(),
    "previous": delta_rule("previous"),
    "to_init": delta_rule(decay_target="init"),
    "previous_to_init": delta_rule("previous", decay_target="init"),
    "capped": delta_rule(weight_cap=0.1),
    "own_key": delta_rule(erase_key="own"),
    "own_key_previous_to_init": delta_rule("previous", decay_target="init", erase_key="own"),
}


def delta_case(rule="decayed", gates="alpha_channel", tokens=13, largest=None, **options):
    """Steps from zero up to nearly the largest, where they are cut."""
    rule = rule if isinstance(rule, MirasRule) else RULES[rule]
    case = make_case(rule, tokens=tokens, gates=gates, **options)
    largest = 0.99 * rule.algorithm.largest_step if largest is None else largest
    return case._replace(inputs=case.inputs | {"eta": largest * case.inputs["eta"] / case.inputs["eta"].max()})


def written_out(case, row, head):
    """What the equations in `DeltaRule` say about one head, matrix by matrix: reads, and the state in the end."""
    x = {name: t[row, :, head] for name, t in case.inputs.items()}
    start = case.parameters.initial[0][head]
    base = start if case.rule.decay_target == "init" else torch.zeros_like(start)
    dual, reads = start - base, []
    x.setdefault("erase", x["k"])
    names = ("q", "k", "v", "eta", "log_alpha", "erase")
    for q, k, v, eta, log_alpha, erase in zip(*(x[name] for name in names), strict=True):
        kept = torch.diag(log_alpha.exp().expand(8)) @ dual
        at = dual if case.rule.algorithm.gradient_at == "previous" else kept
        dual = kept - eta * torch.outer(k, erase @ (base + at) - v)
        reads.append(q @ (base + dual))
    return torch.stack(reads), dual


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gates", ["head", "alpha_channel"])
@pytest.mark.parametrize("rule", [name for name in RULES if name != "capped"])
def test_a_head_written_out(rule, gates, form):
    """In float64 and float32, whatever the chunk."""
    case = delta_case(rule, gates)
    expected = [[written_out(case, row, head) for head in range(2)] for row in range(2)]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        for chunk_size in (1, 4, 13):
            given = case._replace(rule=dataclasses.replace(RULES[rule], chunk_size=chunk_size)).to(dtype)
            y, state = given(FORMS[form], output_final_state=True)
            for row, head in itertools.product(range(2), range(2)):
                reads, dual = expected[row][head]
                assert relative_error(y[row, :, head], reads) < tolerance
                if chunk_size != 4:  # nothing waits in slots
                    assert relative_error(state.dual[0][row, head], dual) < tolerance


@pytest.mark.parametrize("form", OTHER_FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_forms_agree(rule, form):
    case = delta_case(rule)
    for final_state in (True, False):
        expected = values_and_gradients(case, recurrent_miras, final_state)
        assert_same(values_and_gradients(case, FORMS[form], final_state), expected, 1e-9)


@pytest.mark.parametrize("rule", ["decayed", "previous_to_init", "own_key"])
def test_the_naive_form_says_the_same(rule):
    case = delta_case(rule, batch=1, heads=1, tokens=9)
    x = {name: t[0, :, 0] for name, t in case.inputs.items()}
    x |= {"eta": x["eta"].unsqueeze(-1), "alpha": x.pop("log_alpha").exp()}
    initial, *norm = case.parameters
    y = naive_miras(**x, rule=case.rule, initial=[a[0] for a in initial], norm=[p[0] for p in norm])
    assert relative_error(y, case(chunk_miras)[0][0, :, 0]) < 1e-13


@pytest.mark.parametrize("then", ["recurrent", "chunk", "chunk_groups_of_1", "decode"])
@pytest.mark.parametrize("first", ["recurrent", "chunk", "decode"])
def test_forms_take_over_from_each_other(first, then):
    assert_taken_over(delta_case("previous_to_init"), FORMS[first], FORMS[then], 1e-12)


@pytest.mark.parametrize("rule", ["decayed", "previous", "capped", "own_key"])
def test_steps_in_place(rule):
    case = delta_case(rule)
    whole, end = case(recurrent_miras, output_final_state=True)
    _, state = case.tokens(0, 2)(chunk_miras, output_final_state=True)
    weights = None
    for t in range(2, 13):
        y, weights = case.tokens(t, t + 1)(step_miras_, state=state, weights=weights)
        assert relative_error(y, whole[:, t : t + 1]) < 1e-12
    for got, want in zip(state.leaves(), end.leaves(), strict=True):
        assert relative_error(got, want) < 1e-12


HEBBIAN = MirasRule(MatrixMemory(), Dot(residual_clip=None), Decay(weight_cap=None), chunk_size=4, decay_target="zero")
AT_ONCE = {"decayed": RULES["decayed"], "previous": RULES["previous"], "own_key": RULES["own_key"], "hebbian": HEBBIAN}
AT_ONCE["implicit"] = dataclasses.replace(RULES["decayed"], algorithm=Implicit())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["decayed", "previous", "own_key"])
def test_infinite_steps_are_no_numbers_with_gradients_and_without(rule, form):
    """Of one head from the token on, and of no other; also where a token is folded at once."""
    case = delta_case(rule)
    case.inputs["eta"] = case.inputs["eta"].clone()
    case.inputs["eta"][0, 3, 0] = torch.inf
    expected = torch.zeros(2, 13, 2, dtype=torch.bool)
    expected[0, 3:, 0] = True
    with torch.no_grad():
        assert torch.equal(case(FORMS[form])[0].isnan().all(-1), expected)
    assert torch.equal(case.requires_grad()(FORMS[form])[0].isnan().all(-1), expected)
    _, state = case.tokens(0, 3)(chunk_miras, output_final_state=True)
    y, _ = case.tokens(3, 4)(fold_step_, state=state)
    assert torch.equal(y.isnan().all(-1), expected[:, 3:4])


def test_what_cannot_be_folded_at_once_is_named():
    capped = dataclasses.replace(RULES["decayed"], retention=Decay(weight_cap=2.0))
    for rule in (capped, dataclasses.replace(RULES["decayed"], decay_target="init")):
        case = delta_case(rule)
        _, state = case.tokens(0, 2)(chunk_miras, output_final_state=True)
        with pytest.raises(ValueError, match="(?s)`rule` must be one that `folds_at_once` knows, got MirasRule"):
            case.tokens(2, 3)(fold_step_, state=state)
    case = delta_case("decayed")
    _, state = case.tokens(0, 2)(chunk_miras, output_final_state=True)
    token = case.tokens(2, 3)
    for step in (fold_step_, step_miras_):
        with pytest.raises(RuntimeError, match=f"`{step.__name__}` writes into its `state`"):
            torch.func.vjp(
                lambda q, step=step: token._replace(inputs=token.inputs | {"q": q})(step, state=state)[0],
                token.inputs["q"],
            )


@pytest.mark.parametrize(
    ("rule", "gates"), [*itertools.product(AT_ONCE, ["head", "alpha_channel"]), ("hebbian", "channel")]
)
def test_tokens_that_are_folded_at_once(rule, gates):
    """From the middle of a chunk and into the middle of another, from which every form goes on; a row without a token stays."""
    rule = AT_ONCE[rule]
    case = make_case(rule, tokens=13, gates=gates)
    assert folds_at_once(rule)
    whole, end = case(recurrent_miras, output_final_state=True)
    _, state = case.tokens(0, 2)(chunk_miras, output_final_state=True)
    weights = None
    for t in range(2, 7):
        y, weights = case.tokens(t, t + 1)(fold_step_, state=state, weights=weights)
        assert relative_error(y, whole[:, t : t + 1]) < 1e-12
    y, weights = case.tokens(7, 8)(fold_step_, state=state, weights=weights, lengths=torch.tensor([1, 0]))
    assert relative_error(y[0], whole[0, 7:8]) < 1e-12 and not y[1].any()
    assert state.count.tolist() == [8, 7] and not any(t.any() for t in state.slots)
    for form in FORMS.values():
        y, behind = case.row(1).tokens(7, None)(
            form, initial_state=state.map(lambda t: t[1:].clone()), output_final_state=True
        )
        assert relative_error(y, whole[1:, 7:]) < 1e-12
        for got, want in zip(behind.leaves(), end.leaves(), strict=True):
            assert relative_error(got[0], want[1]) < 1e-12
    # nobody says that nothing waits, or has read anything
    y, _ = case.row(0).tokens(8, 9)(fold_step_, state=(first := state.map(lambda t: t[:1].clone())))
    assert relative_error(y, whole[:1, 8:9]) < 1e-12
    new = first.map(torch.zeros_like)
    assert relative_error(case.row(0).tokens(0, 1)(fold_step_, state=new)[0], whole[:1, :1]) < 1e-12


def test_what_depends_on_chunks_is_not_folded_at_once():
    assert not any(folds_at_once(RULES[name]) for name in ("to_init", "capped"))
    other = (
        {"attentional_bias": L2(residual_clip=None)},
        {"retention": Lq(weight_cap=None)},
        {"architecture": MLPMemory()},
    )
    assert not any(folds_at_once(dataclasses.replace(HEBBIAN, **fields)) for fields in other)


@pytest.mark.parametrize("form", FORMS)
def test_pads_and_packs(form):
    assert_pads_and_packs_change_nothing(delta_case(batch=1), FORMS[form], 1e-12, packs=form != "decode")


@pytest.mark.parametrize("rule", ["decayed", "previous_to_init", "own_key"])
def test_gradients_of_finite_differences(rule):
    case = delta_case(rule, tokens=6, batch=1, heads=1, head_dim=3)
    leaves = {key: x.requires_grad_() for key, x in case.named_leaves().items()}
    assert torch.autograd.gradcheck(
        lambda *_: case(chunk_miras)[0], tuple(leaves.values()), fast_mode=True, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("rule", ["decayed", "previous"])
@pytest.mark.parametrize("keys", ["one", "two", "large", "zero"])
def test_a_memory_does_not_grow_without_end(rule, keys):
    """Steps far above the largest for keys that come again and again: cut, so that errors at most change sign."""
    case = delta_case(dataclasses.replace(RULES[rule], chunk_size=64), "head", tokens=512, largest=4.0)
    if keys != "large":
        keys = {"one": [1.0, 1.0], "two": [1.0, -1.0], "zero": [0.0, 0.0]}[keys]
        case.inputs["k"] = torch.zeros_like(case.inputs["k"])
        case.inputs["k"][:, ::2, :, 0], case.inputs["k"][:, 1::2, :, 0] = keys
    else:
        case.inputs["k"] = 1e5 * case.inputs["k"]
    case.inputs["log_alpha"] = 1e-3 * case.inputs["log_alpha"]
    exact = values_and_gradients(case, chunk_miras)
    found = values_and_gradients(case.to(torch.float32), chunk_miras)
    assert all(x.isfinite().all() for x in found.values())
    assert found["y"].abs().max() < 1e3 * case.inputs["v"].abs().max()
    assert relative_error(found["y"], exact["y"]) < 1e-3


@pytest.mark.parametrize("gates", ["head", "channel"])
def test_erasures_that_are_made_to_grow(gates):
    """Every token takes `(a o e)^T (e S)` away, of 64 e and a the ones that leave most: with an a that is one number no token
    makes a memory larger, and with one a channel nothing but the weights' cap bounds it."""
    tokens, width = 1500, 4
    generator = torch.Generator().manual_seed(0)
    found, state = [], F.normalize(torch.randn(width, generator=generator, dtype=torch.float64), dim=0)
    initial = state.clone()
    for _ in range(tokens):
        e = F.normalize(torch.randn(64, width, generator=generator, dtype=torch.float64), dim=-1)
        a = torch.rand(64, width if gates == "channel" else 1, generator=generator, dtype=torch.float64).round()
        left = state - a * e * (e @ state).unsqueeze(-1)
        best = left.norm(dim=-1).argmax()
        state = F.normalize(left[best], dim=0)
        found.append((a[best] * e[best], e[best]))
    k, erase = (torch.stack(x).view(1, tokens, 1, width).float() for x in zip(*found, strict=True))
    one, zero = torch.ones(1, tokens, 1), torch.zeros(1, tokens, 1)
    largest = {}
    for cap in (None, 2.0):
        rule = delta_rule("previous", weight_cap=cap, chunk_size=16, erase_key="own")
        start = (initial.unsqueeze(-1).expand(1, width, width).float().contiguous(),)
        parameters = MemoryParameters(start, torch.ones(1, width), torch.zeros(1, width))
        y, end = chunk_miras(
            torch.ones_like(k), k, torch.zeros_like(k), one, zero, erase=erase, rule=rule, parameters=parameters,
            output_final_state=True,
        )  # fmt: skip
        largest[cap] = max(y.abs().nan_to_num(torch.inf).max(), end.dual[0].abs().nan_to_num(torch.inf).max()).item()
    assert largest[2.0] < 1e4
    assert largest[None] > 1e15 if gates == "channel" else largest[None] < 10


@pytest.mark.parametrize("form", FORMS)
def test_a_step_is_cut_at_the_largest(form):
    case = delta_case("decayed", "head", tokens=5, largest=3.0)
    cut = case._replace(inputs=case.inputs | {"eta": case.inputs["eta"].clamp(max=2.0)})
    assert (case.inputs["eta"] > 2.0).any()
    assert relative_error(case(FORMS[form])[0], cut(FORMS[form])[0]) < 1e-13


def test_an_erase_key_that_is_the_write_key_changes_nothing():
    """Neither what is read nor, keys and erase keys together, any gradient; steps far above the largest are cut alike."""
    case = delta_case("decayed", "head", largest=3.0)
    own = case._replace(rule=RULES["own_key"], inputs=case.inputs | {"erase": case.inputs["k"].clone()})
    expected, found = values_and_gradients(case, chunk_miras), values_and_gradients(own, chunk_miras)
    found["grad.k"] = found["grad.k"] + found.pop("grad.erase")
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("form", ["recurrent", "chunk"])
def test_strongest_decay_of_channels(form):
    """Of all that a chunk can forget, in float32: products of keys and queries reach exp(80) each."""
    rule = dataclasses.replace(RULES["previous"], chunk_size=64)
    case = delta_case(rule, tokens=70, batch=1)
    draw = torch.rand(case.inputs["log_alpha"].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    case.inputs["log_alpha"] = torch.where(draw < 0.7, -2.5, 0.0)
    case.inputs["log_alpha"][..., :4] = -2.5
    exact = values_and_gradients(case, recurrent_miras)
    found = values_and_gradients(case.to(torch.float32), FORMS[form])
    assert_same(
        {n: t for n, t in found.items() if n != "state.count.0"},
        {n: t for n, t in exact.items() if n != "state.count.0"},
        1e-4,
    )


@pytest.mark.parametrize("form", FORMS)
def test_a_broken_token_reaches_no_other_before_it(form):
    case = delta_case(tokens=11)
    clean, _ = case(FORMS[form])
    for name in case.inputs:
        x = case.inputs[name]
        here = torch.arange(11).view(1, 11, *[1] * (x.dim() - 2)) == 6
        broken = case._replace(inputs=case.inputs | {name: torch.where(here, torch.nan, x)})
        y, state = broken(FORMS[form], output_final_state=True)
        assert relative_error(y[:, :6], clean[:, :6]) < 1e-15 and y[:, 6].isnan().all()
        if name != "q":
            assert y[:, 6:].isnan().all() and state.dual[0].isnan().any()


def test_what_does_not_fit_is_refused():
    case = delta_case()
    wide = case.inputs["eta"].unsqueeze(-1).expand(-1, -1, -1, 8)
    with pytest.raises(ValueError, match=r"`eta` must have shape \(2, 13, 2\) for DeltaRule, got last axis 8"):
        case._replace(inputs=case.inputs | {"eta": wide})(chunk_miras)
    fitting = {
        "architecture": MatrixMemory(), "attentional_bias": L2(residual_clip=None), "retention": Decay(),
        "algorithm": DeltaRule(),
    }  # fmt: skip
    MirasRule(**fitting)
    for other, why in (
        ({"architecture": MLPMemory()}, "for a matrix memory only.*`chunk_size=1`"),
        ({"attentional_bias": Dot()}, "are the same at every memory"),
        ({"attentional_bias": L2()}, "with `residual_clip=None`"),
        ({"attentional_bias": HuberNorm()}, "of the l2 loss"),
        ({"retention": Lq()}, "with decay or none"),
    ):
        with pytest.raises(ValueError, match=f"(?s)`algorithm` must fit.*DeltaRule.*{why}.*got"):
            MirasRule(**{**fitting, **other})
    with pytest.raises(
        ValueError, match="`erase` must be None: DeltaRule.* takes errors of the keys that it writes along"
    ):
        case._replace(inputs=case.inputs | {"erase": case.inputs["k"]})(chunk_miras)
    own = case._replace(rule=RULES["own_key"])
    with pytest.raises(ValueError, match="`erase` is required by DeltaRule.*erase_key='own'"):
        own(chunk_miras)
    with pytest.raises(
        ValueError, match=r"`erase` must have the shape of `q`, \(2, 13, 2, 8\).*got torch.float64 \(2, 13, 2\)"
    ):
        own._replace(inputs=case.inputs | {"erase": case.inputs["eta"]})(chunk_miras)
    with pytest.raises(ValueError, match="`erase_key` must be one of 'write', 'own', got both"):
        DeltaRule(erase_key="both")
    with pytest.raises(ValueError, match="`gradient_at` must be one of 'decayed', 'previous', got chunk"):
        DeltaRule(gradient_at="chunk")


def test_diagnostics_tell_of_errors_at_the_time_of_the_write():
    """A key that comes back with its value in one chunk finds it there."""
    case = delta_case("decayed", "head", batch=1, tokens=4)
    one = {name: x[:, :1].expand_as(x) for name, x in case.inputs.items()}
    one |= {"eta": torch.ones_like(one["eta"]), "log_alpha": torch.zeros_like(one["log_alpha"])}
    case = case._replace(inputs=one)
    first = case.tokens(0, 1)(memory_statistics).inner_loss
    torch.testing.assert_close(case(memory_statistics).inner_loss, first / 4)
    torch.testing.assert_close(case(memory_statistics).inner_loss_initial, first)
    probe = case(probe_memory, lags=(0,))
    torch.testing.assert_close(probe.write_share, torch.ones(2, dtype=torch.float64))
    at_chunk_start = dataclasses.replace(case.rule, algorithm=GradientDescent())
    torch.testing.assert_close(case._replace(rule=at_chunk_start)(memory_statistics).inner_loss, first)


@pytest.mark.parametrize("algorithm", [DeltaRule(), DeltaRule(erase_key="own"), Implicit()])
def test_diagnostics_do_not_depend_on_chunks(algorithm):
    """With retention one a channel, and steps that the algorithm does not take as they are."""
    rule = dataclasses.replace(RULES["decayed"], algorithm=algorithm)
    case = delta_case(rule, largest=3.0)
    for function in (memory_statistics, functools.partial(probe_memory, lags=(0, 2))):
        at_once, one_by_one = (
            case._replace(rule=dataclasses.replace(rule, chunk_size=size))(function) for size in (13, 1)
        )
        for name in ("inner_loss", "memory_norm", "read_rms", "write_share", "recall"):
            if hasattr(at_once, name):
                assert relative_error(getattr(one_by_one, name), getattr(at_once, name)) < 1e-9, name


# -- models ---------------------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
    "chunk_size": 4, "initializer_range": 0.3,
}  # fmt: skip
DELTA = {"memory_architecture": "matrix", "residual_clip": None, "learning_algorithm": "delta_rule"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MirasForCausalLM(MirasConfig(**SMALL, **DELTA, weight_cap=None)).eval()


IDS = torch.randint(32, (2, 11), generator=torch.Generator().manual_seed(1))


def test_a_model_decodes_as_it_reads(model):
    """Retention is one number a channel, and the step one a head; the chunk is but a way to compute."""
    mixer = model.model.layers[0].mixer
    assert (mixer.eta.bias.numel(), mixer.alpha.bias.numel(), mixer.eta.eta_max) == (4, 32, 1.0)
    assert mixer.memory.backend.reason == "`chunk_size` must be one of (16, 32, 64), got 4"
    with torch.no_grad():
        whole = model(IDS).logits
        cache, parts = None, []
        for start, stop in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 11)):
            out = model(IDS[:, start:stop], past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
        other = MirasForCausalLM(MirasConfig(**SMALL | {"chunk_size": 7}, **DELTA, weight_cap=None)).eval()
        other.load_state_dict(model.state_dict())
        assert relative_error(other(IDS).logits, whole) < 1e-5
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-5


def test_a_memory_is_saved_taken_back_and_speculated(model, tmp_path):
    assert_saved_taken_back_and_speculated(model, IDS[:1], tmp_path, read=6)


def test_a_config_says_what_does_not_fit(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    config = MirasConfig.from_pretrained(tmp_path)
    assert (config.residual_clip, config.gradient_at, config.eta_max) == (None, "decayed", 1.0)
    assert (
        "`delta_rule`, `gradient_at` = decayed, `erase_key` = write, computed in chunks of 4 tokens"
        in four_choices(config)
    )
    for fields, why in (
        ({"memory_architecture": "mlp"}, "for a matrix memory only.*got `memory_architecture='mlp'`"),
        ({"residual_clip": 3.0}, "with `residual_clip=None`, got .*`residual_clip=3.0`"),
        ({"attentional_bias": "huber_norm"}, "of the l2 loss.*`attentional_bias='huber_norm'`"),
        ({"retention": "kl"}, "with decay or none, got .*`retention='kl'`"),
        (
            {"eta_max": 2.5},
            "`eta_max` must be at most 2 with DeltaRule.gradient_at='decayed', erase_key='write'., got 2.5",
        ),
        ({"eta_max": 1.5, "gradient_at": "previous"}, "`eta_max` must be at most 1 with"),
        ({"learning_algorithm": "momentum", "gradient_at": "previous", "gate_granularity": "head"}, "means nothing"),
    ):
        with pytest.raises(StrictDataclassError, match=f"(?s){why}"):
            MirasConfig(**SMALL, **{**DELTA, **fields})
