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
"""A broken run must look broken: NaN in, NaN out from that token on, and nothing before it touched.

And the other way round: finite inputs give finite numbers, also where a weight has decayed to zero.
"""

import math

import pytest
import torch
from test_backward import NAMES
from test_decode import after_prompt, by_decode, cut
from test_forward import DEVICE, TOLERANCE, assert_close, by_kernel, in_float64, make_call, make_rule

from miras_hf.memory import MemoryParameters, recurrent_miras


NAN = float("nan")


def some_slow(rules, fast):
    """All rules, those that are not at the places `fast` as slow ones."""
    return [rule if i in fast else pytest.param(*rule, marks=pytest.mark.slow) for i, rule in enumerate(rules)]


# each loss and each link with both memories
RULES = [
    ("mlp", "l2", "decay"),
    ("mlp", "lp", "lq_mirror"),
    ("mlp", "huber_coordinate", "lq"),
    ("mlp", "huber_mixture", "kl"),
    ("matrix", "huber_norm", "decay"),
    ("matrix", "huber_mixture", "lq"),
    ("matrix", "lp", "kl"),
    ("matrix", "huber_coordinate", "lq_mirror"),
]


def broken(inputs, name, token, value=NAN, head=1):
    """One number of one head's token is `value`, a single channel's where there are channels."""
    inputs = [None if x is None else x.clone() for x in inputs]
    x = inputs[NAMES.index(name)]
    x[(0, token, head) if x.dim() == 3 else (0, token, head, 5)] = value
    return inputs


def names_of(inputs):
    return [name for name, x in zip(NAMES, inputs, strict=True) if x is not None]


def expected_nan(y, name, token, head=1):
    """Outputs of a head from a token on; a query is read by its own token alone."""
    wanted = torch.zeros_like(y, dtype=torch.bool)
    wanted[0, token : token + 1 if name == "q" else None, head] = True
    return wanted


def assert_pattern(y, clean, wanted, tolerance, what):
    assert torch.equal(torch.isnan(y), wanted), what
    assert_close(what, y[~wanted], clean[~wanted], tolerance)


@pytest.mark.parametrize(
    ("memory", "bias", "retention", "token"),
    [(*rule, (7, 16, 36)[i % 3]) for i, rule in enumerate(RULES)] + [(*RULES[0], 36), (*RULES[4], 36)],
)
def test_nan_of_an_input_stays_from_its_token_on(memory, bias, retention, token):
    rule = make_rule(memory, bias, retention)
    inputs, parameters = make_call(rule, tokens=37)
    clean, _ = in_float64(rule, inputs, parameters)
    for name in names_of(inputs):
        y, state, _ = by_kernel(rule, broken(inputs, name, token), parameters)
        assert_pattern(y, clean, expected_nan(y, name, token), TOLERANCE[retention], name)
        # whoever goes on from the state says so, too
        again, _, _ = by_kernel(rule, cut(inputs, 0, 5), parameters, state=state)
        assert torch.equal(torch.isnan(again).all(-1)[0].all(0).cpu(), torch.tensor([False, name != "q"])), name
        assert not torch.isnan(again[:, :, 0]).any()


def test_nan_has_the_recurrence_s_pattern():
    """The reference that reads token by token, without chunks: NaN where it says NaN."""
    rule = make_rule("mlp", "l2", "decay")
    inputs, parameters = make_call(rule, tokens=20)
    for name in names_of(inputs):
        wrong = broken(inputs, name, 7)
        expected, _ = in_float64(rule, wrong, parameters, recurrent_miras)
        y, _, _ = by_kernel(rule, wrong, parameters)
        assert torch.equal(torch.isnan(y), torch.isnan(expected)), name


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
def test_gates_and_thresholds_of_a_head(memory):
    rule = make_rule(memory, "huber_coordinate", "decay")
    inputs, parameters = make_call(rule, tokens=20, gates="head")
    inputs[5] = inputs[5][..., 0]
    clean, _ = in_float64(rule, inputs, parameters)
    for name in ("eta", "log_alpha", "delta"):
        y, _, _ = by_kernel(rule, broken(inputs, name, 7), parameters)
        assert_pattern(y, clean, expected_nan(y, name, 7), TOLERANCE["decay"], name)


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
def test_infinite_inputs(memory):
    """What is bounded anyway is as good as its bound, an infinite step as bad as none."""
    rule = make_rule(memory, "huber_coordinate", "decay")
    inputs, parameters = make_call(rule, tokens=20)
    clean, _ = in_float64(rule, inputs, parameters)
    y, _, _ = by_kernel(rule, broken(inputs, "eta", 7, math.inf), parameters)
    assert_pattern(y, clean, expected_nan(y, "eta", 7), TOLERANCE["decay"], "eta")
    for name, value, bound in (("v", -math.inf, -1e15), ("log_alpha", -math.inf, -2.5), ("delta", math.inf, 1e30)):
        y, _, _ = by_kernel(rule, broken(inputs, name, 7, value), parameters)
        same, _, _ = by_kernel(rule, broken(inputs, name, 7, bound), parameters)
        assert torch.isfinite(y).all() and torch.equal(y, same), name


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
def test_nan_in_a_pack_or_at_a_pad_stays_where_it_is(memory):
    rule = make_rule(memory, "huber_norm", "lq")
    inputs, parameters = make_call(rule, tokens=37)
    borders = torch.tensor([0, 5, 21, 37], device=DEVICE)
    clean, _ = in_float64(rule, inputs, parameters, cu_seqlens=borders)
    mask = torch.ones(1, 37, dtype=torch.bool, device=DEVICE)
    mask[:, 7] = False
    masked, _ = in_float64(rule, inputs, parameters, mask=mask)
    for name in names_of(inputs):
        wrong = broken(inputs, name, 7)
        y, _, _ = by_kernel(rule, wrong, parameters, cu_seqlens=borders)
        wanted = expected_nan(y, name, 7)
        wanted[:, 21:] = False
        assert_pattern(y, clean, wanted, TOLERANCE["lq"], name)
        y, state, _ = by_kernel(rule, wrong, parameters, mask=mask)
        assert_close(name, y, masked, TOLERANCE["lq"])
        assert all(torch.isfinite(x).all() for x in state)


@pytest.mark.parametrize("retention", ["decay", "lq", "lq_mirror", "kl"])
@pytest.mark.parametrize("memory", ["mlp", "matrix"])
def test_nan_of_a_memory_s_own_numbers(memory, retention):
    """The initial memory, the norm, any part of a state: every output of that head."""
    rule = make_rule(memory, "l2", retention)
    inputs, parameters = make_call(rule, tokens=21)
    _, state, _ = by_kernel(rule, inputs, parameters)

    def with_nan(x, *where):
        x = x.clone()
        x[where] = NAN
        return x

    cases = {}
    for i, a in enumerate(parameters.initial):
        initial = (*parameters.initial[:i], with_nan(a, 1, 3, 4), *parameters.initial[i + 1 :])
        cases[f"initial {i}"] = (parameters._replace(initial=initial), state)
    if memory == "mlp":
        cases["norm_weight"] = (parameters._replace(norm_weight=with_nan(parameters.norm_weight, 1, 4)), state)
    for i, x in enumerate(state[:-1]):
        cases[f"state {i}"] = (parameters, (*state[:i], with_nan(x, 0, 1, 3, 4), *state[i + 1 :]))
    for name, (wrong, start) in cases.items():
        y, _, _ = by_kernel(rule, cut(inputs, 0, 14), wrong, state=start)
        # a matrix's channels meet in the residual's norm: at the next chunk at the latest
        found = torch.isnan(y[0, -1]).all(-1)
        assert found.tolist() == [False, True], name
        assert not torch.isnan(y[:, :, 0]).any(), name


@pytest.mark.parametrize(("memory", "bias", "retention"), some_slow(RULES, (0, 3, 5, 6)))
def test_nan_while_decoding(memory, bias, retention):
    """Also over the end of the chunk, where factors are folded into the state."""
    rule = make_rule(memory, bias, retention)
    inputs, parameters = make_call(rule, tokens=20)
    clean, _ = in_float64(rule, inputs, parameters)
    for name in names_of(inputs):
        wrong = broken(inputs, name, 14)
        state, link_cache = after_prompt(rule, wrong, parameters, 12)
        y = by_decode(rule, cut(wrong, 12, None), parameters, state, link_cache)
        assert_pattern(y, clean[:, 12:], expected_nan(y, name, 2), TOLERANCE[retention], name)


@pytest.mark.parametrize(("memory", "bias", "retention"), some_slow(RULES, (1, 2, 4, 7)))
def test_gradients_of_a_broken_call(memory, bias, retention):
    """Its own and those of the memory it starts from are no numbers, those of the other head are what they were."""
    rule = make_rule(memory, bias, retention)
    inputs, parameters = make_call(rule, tokens=9)

    def of(inputs):
        leaves = [None if x is None else x.clone().requires_grad_() for x in (*inputs, *parameters.initial)]
        own = parameters._replace(initial=tuple(leaves[6:]))
        y, _, _ = by_kernel(rule, leaves[:6], own)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        (y * weights).sum().backward()
        return [None if x is None else x.grad for x in leaves]

    clean = of(inputs)
    for name in names_of(inputs):
        got = of(broken(inputs, name, 7))
        if (memory, name) not in (("matrix", "q"), ("matrix", "eta")):  # in which its reads are linear
            assert torch.isnan(got[NAMES.index(name)][0, 7, 1]).any(), name
        for grad, before in zip(got[:6], clean[:6], strict=True):
            assert grad is None or torch.equal(grad[:, :, 0], before[:, :, 0]), name
        for grad, before in zip(got[6:], clean[6:], strict=True):
            assert torch.isnan(grad[1]).any(), name
            assert torch.equal(grad[0], before[0]), name


# -- weights that have decayed to zero ----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
@pytest.mark.parametrize(("size", "q"), [(0.0, 4.0), (0.0, 6.0), (1e-30, 3.0), (1e-12, 8.0), (1e-6, 6.0)])
def test_mirror_map_of_small_weights(size, memory, q):
    rule = make_rule(memory, "l2", "lq_mirror", q=q, decay_target="zero")
    inputs, parameters = make_call(rule, tokens=21, heads=1)
    parameters = parameters._replace(initial=tuple(size * a for a in parameters.initial))
    state, link_cache = after_prompt(rule, inputs, parameters, 3)
    decoded = by_decode(rule, cut(inputs, 3, 5), parameters, state, link_cache)
    leaves = [None if x is None else x.clone().requires_grad_() for x in (*inputs, *parameters.initial)]
    y, final, _ = by_kernel(rule, leaves[:6], MemoryParameters(tuple(leaves[6:]), *parameters[1:]))
    assert torch.isfinite(decoded).all() and all(torch.isfinite(x).all() for x in (y, *final))
    expected, _ = in_float64(rule, inputs, parameters)
    assert_close("y", y.detach(), expected, 2e-5)
    assert_close("decoded", decoded, expected[:, 3:5], 2e-5)
    y.square().sum().backward()
    for name, x in zip((*NAMES, "A1", "A2"), leaves, strict=False):
        assert x is None or torch.isfinite(x.grad).all(), name
