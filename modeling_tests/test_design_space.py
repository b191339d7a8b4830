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
"""Random points of the whole design space: a text read at once, in two calls, padded, packed and token by token gives the same."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import decode_miras, make_case, relative_error, step_size

from miras_hf.memory import (
    ATTENTIONAL_BIASES,
    L2,
    RETENTION_GATES,
    Decay,
    DeltaRule,
    Exact,
    GatedMLPMemory,
    GradientDescent,
    Implicit,
    MatrixMemory,
    MirasRule,
    MLPMemory,
    Momentum,
    VectorMemory,
    chunk_miras,
    recurrent_miras,
)


# not those that other tests register
BIASES, GATES = (
    [cls for cls in table.values() if cls.__module__.startswith("miras_hf.")]
    for table in (ATTENTIONAL_BIASES, RETENTION_GATES)
)


def networks() -> st.SearchStrategy[MLPMemory]:
    """MLP memories, those of two layers with norm and residual first."""
    depth = st.sampled_from((2, 1, 3, 4))
    switches = {"norm": st.sampled_from((True, False)), "residual": st.sampled_from((True, False))}
    return st.builds(MLPMemory, st.just(2), depth=depth, update_layers=st.sampled_from(("all", "last")), **switches)


@st.composite
def rules(draw) -> MirasRule:
    """Any point that the rule accepts, a chunk of 1 to 6 tokens."""
    chunk_size, decay_target = draw(st.integers(1, 6)), draw(st.sampled_from(("init", "zero")))
    algorithm = draw(
        st.sampled_from(
            (
                GradientDescent(),
                Momentum(),
                DeltaRule(),
                DeltaRule(gradient_at="previous"),
                DeltaRule(erase_key="own"),
                Implicit(),
                Exact(),
            )
        )
    )
    cap = draw(st.sampled_from((None, 0.5, 2.0)))
    if algorithm.gradient_at != "chunk":
        return MirasRule(
            MatrixMemory(), L2(residual_clip=None), Decay(weight_cap=cap), algorithm, chunk_size, decay_target
        )
    if algorithm.has_covariance:
        return MirasRule(
            MatrixMemory(), L2(residual_clip=None), Decay(weight_cap=None), algorithm, chunk_size, decay_target
        )
    bias, gate = draw(st.sampled_from(BIASES)), draw(st.sampled_from(GATES))
    gate = gate(**{"weight_cap": cap} if "weight_cap" in gate.parameters() else {})
    clip = draw(st.sampled_from((None, 0.5, 3.0)))
    memory = draw(
        st.one_of(st.sampled_from((MatrixMemory(), VectorMemory(), GatedMLPMemory(expansion=2))), networks())
    )
    if gate.refusal(memory) is not None:
        memory = MatrixMemory()
    return MirasRule(memory, bias(residual_clip=clip), gate, algorithm, chunk_size, decay_target)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    rule=rules(),
    gates=st.sampled_from(("head", "channel", "alpha_channel", "eta_channel")),
    tokens=st.integers(2, 11),
    split=st.integers(1, 10),
    pads=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 3),
)
def test_a_text_means_the_same_however_it_is_read(rule, gates, tokens, split, pads, seed):
    if rule.algorithm.gate_granularities == ("head",):
        gates = "head"
    elif rule.algorithm.gradient_at != "chunk":
        gates = {"channel": "alpha_channel", "eta_channel": "head"}.get(gates, gates)
    case = make_case(rule, batch=1, tokens=tokens, heads=1, head_dim=4, gates=gates, seed=seed)
    if rule.algorithm.gradient_at != "chunk":  # up to steps that are cut
        case.inputs["eta"] = case.inputs["eta"] * (2.2 / step_size(rule))
    if rule.algorithm.has_momentum:
        case.inputs["log_momentum"] = 2 * case.inputs["log_alpha"] - 0.1
    split = min(split, tokens - 1)
    whole, end = case(chunk_miras, output_final_state=True)

    def same(y, state=None, y_there=whole, there=end):
        assert relative_error(y, y_there) < 1e-9
        for got, want in zip(*(() if state is None else (state.leaves(), there.leaves())), strict=True):
            assert relative_error(got, want) < 1e-9

    same(*case(recurrent_miras, output_final_state=True))
    same(*case(decode_miras, output_final_state=True))
    first, state = case.tokens(0, split)(chunk_miras, output_final_state=True)
    second, state = case.tokens(split, tokens)(chunk_miras, initial_state=state, output_final_state=True)
    same(torch.cat((first, second), dim=1), state)

    left, right = pads
    real = torch.tensor([[False] * left + [True] * tokens + [False] * right])
    padded = case.map(lambda x: torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (left, right), value=0.7))
    y, state = padded(chunk_miras, mask=real, output_final_state=True)
    same(y[real][None], state)
    assert not y[~real].any()

    packed, states = case(chunk_miras, cu_seqlens=torch.tensor([0, split, tokens]), output_final_state=True)
    alone, there = case.tokens(split, tokens)(chunk_miras, output_final_state=True)
    same(packed, states.map(lambda t: t[1:]), torch.cat((first, alone), dim=1), there)
