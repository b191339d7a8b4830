"""The delta rule and the implicit step: against the PyTorch form in float64, and the system alone against a solver."""

import pytest
import test_backward
import test_decode
import test_forward
import torch
import triton
import triton.language as tl
from test_forward import DEVICE, by_kernel, make_call

from miras_hf import MirasConfig, MirasForCausalLM
from miras_hf.backend import MemoryBackend
from miras_hf.memory import L2, Decay, DeltaRule, Implicit, MatrixMemory, MirasRule, NoRetention, recurrent_miras
from miras_kernels import Choices, triangular


# relative to the largest value, of outputs and gradients
TOLERANCE = 1e-5
ALGORITHMS = {"delta_rule": DeltaRule(), "implicit": Implicit()}


def make_rule(algorithm="delta_rule", chunk_size=16, decay_target="zero", cap=None, forgets=True) -> MirasRule:
    retention = Decay(weight_cap=cap) if forgets else NoRetention(weight_cap=cap)
    return MirasRule(
        MatrixMemory(), L2(residual_clip=None), retention, ALGORITHMS[algorithm], chunk_size, decay_target
    )


def call_of(rule, *args, gates="channel", steps=1.0, similar=0.0, lowest=-0.2, **kwargs):
    """Steps of up to `steps`, one a head, and keys that have `similar` of one direction: writes that erase each other."""
    (q, k, v, eta, log_alpha, delta), parameters = make_call(
        MirasRule(MatrixMemory(), L2(), Decay()), *args, gates=gates, **kwargs
    )
    k = torch.nn.functional.normalize(k + similar * k[:, :1], dim=-1)
    eta = steps * (eta if gates == "head" else eta[..., 0]) / test_forward.STEP["decay"]
    return [q, k, v, eta, log_alpha * lowest / -0.2, delta], parameters


def forward(rule, inputs, parameters, **kwargs):
    return test_forward.check(rule, inputs, parameters, TOLERANCE, **kwargs)


def backward(rule, inputs, parameters, **kwargs):
    return test_backward.check(rule, inputs, parameters, TOLERANCE, **kwargs)


@pytest.mark.parametrize("gates", ["channel", "head"])
@pytest.mark.parametrize("decay_target", ["init", "zero"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gates_and_decay_targets(algorithm, decay_target, gates):
    rule = make_rule(algorithm, decay_target=decay_target)
    inputs, parameters = call_of(rule, gates=gates, similar=1.0)
    forward(rule, inputs, parameters)
    backward(rule, inputs, parameters)


@pytest.mark.parametrize("similar", [0.0, 1e3])
@pytest.mark.parametrize("head_dim, chunk_size", [(48, 32), (32, 64)])
def test_sizes_and_keys_that_are_all_alike(head_dim, chunk_size, similar):
    """Of equal keys and steps of one the system is all ones below its diagonal."""
    rule = make_rule(chunk_size=chunk_size)
    inputs, parameters = call_of(
        rule, tokens=chunk_size + 3, heads=1, head_dim=head_dim, gates="head", similar=similar
    )
    if similar:
        inputs[3], inputs[4] = torch.ones_like(inputs[3]), torch.zeros_like(inputs[4])
    forward(rule, inputs, parameters)
    if not similar:
        backward(rule, inputs, parameters)


def test_steps_that_are_cut_and_their_gradients():
    rule = make_rule()
    inputs, parameters = call_of(rule, gates="head", steps=4.0)
    inputs[1] = 1.3 * inputs[1]
    bounded = rule.algorithm.bound_step_size(inputs[3][..., None], inputs[1])[..., 0]
    assert 0.2 < (bounded < inputs[3]).float().mean() < 0.9
    forward(rule, inputs, parameters)
    got = backward(rule, inputs, parameters)
    assert (got[3][bounded < inputs[3]] == 0).all() and (got[3][bounded == inputs[3]] != 0).all()


@pytest.mark.parametrize("decay_target", ["init", "zero"])
def test_a_cap_that_is_met(decay_target):
    rule = make_rule(decay_target=decay_target, cap=0.05)
    inputs, parameters = call_of(rule, tokens=37, heads=1)
    assert parameters.initial[0].square().mean().sqrt() > 0.1
    forward(rule, inputs, parameters)
    backward(rule, inputs, parameters)


def test_without_retention():
    rule = make_rule(forgets=False)
    inputs, parameters = call_of(rule, gates="head", similar=1.0)
    forward(rule, inputs, parameters)
    assert not backward(rule, inputs, parameters)[4].any()


@pytest.mark.parametrize("gates", ["channel", "head"])
def test_decay_as_fast_as_is_allowed(gates):
    """Products of decays of a chunk are exp(-160): ratios are taken, never their inverses."""
    rule = make_rule(chunk_size=64)
    inputs, parameters = call_of(rule, tokens=70, heads=1, gates=gates, lowest=-5.0)
    inputs[4] = inputs[4].clamp(min=-2.5)
    forward(rule, inputs, parameters)
    backward(rule, inputs, parameters)


@pytest.mark.parametrize("algorithm, decay_target", [("delta_rule", "zero"), ("implicit", "init")])
def test_every_phase_of_a_chunk(algorithm, decay_target):
    """A text in two calls, cut at every token, is what the recurrence gives of all of it, and so are gradients."""
    rule = make_rule(algorithm, decay_target=decay_target)
    inputs, parameters = call_of(rule, tokens=20, heads=1, similar=1.0)
    whole, _, _ = by_kernel(rule, inputs, parameters)
    expected, _ = test_forward.in_float64(rule, inputs, parameters, recurrent_miras)
    test_forward.assert_close("y", whole, expected, TOLERANCE)
    for cut in range(1, 20) if algorithm == "delta_rule" else (5,):
        pieces = [[None if x is None else x[:, part] for x in inputs] for part in (slice(0, cut), slice(cut, None))]
        first, state, _ = by_kernel(rule, pieces[0], parameters)
        second, _, _ = by_kernel(rule, pieces[1], parameters, state=state)
        test_forward.assert_close(f"y, cut at {cut}", torch.cat((first, second), 1), whole, 3e-6)
    for cut in (1, 15, 16):
        backward(rule, inputs, parameters, cuts=(cut,))


def test_pads_and_packs():
    rule = make_rule()
    inputs, parameters = call_of(rule, batch=3, tokens=20, heads=1, gates="head")
    real = torch.arange(20, device=DEVICE) < torch.tensor([[20], [13], [0]], device=DEVICE)
    forward(rule, inputs, parameters, mask=real)
    backward(rule, inputs, parameters, mask=real)
    packed = [None if x is None else x.flatten(0, 1)[None] for x in inputs]
    borders = torch.tensor([0, 17, 17, 41, 60], device=DEVICE)
    forward(rule, packed, parameters, cu_seqlens=borders)
    backward(rule, packed, parameters, cu_seqlens=borders)


def test_chunk_starts_that_are_computed_again():
    rule = make_rule()
    inputs, parameters = call_of(rule, tokens=52, heads=1)
    expected = backward(rule, inputs, parameters, cuts=(5,))
    got = backward(rule, inputs, parameters, cuts=(5,), every=2)
    for one, other in zip(got, expected, strict=True):
        assert one is None or torch.equal(one, other)


def test_broken_tokens_do_not_reach_those_before_them():
    rule = make_rule()
    inputs, parameters = call_of(rule, tokens=37, heads=2)
    sound, _, _ = by_kernel(rule, inputs, parameters)
    inputs[2][0, 21, 0, 3] = torch.nan
    y, state, _ = by_kernel(rule, inputs, parameters)
    assert torch.equal(y[:, :16], sound[:, :16]) and torch.equal(y[:, :, 1], sound[:, :, 1])
    # the chunk's gates are relative to its last token's
    test_forward.assert_close("y", y[:, :21], sound[:, :21], 3e-6)
    assert y[:, 21:, 0].isnan().all() and state[0][0, 0].isnan().any() and not state[0][0, 1].isnan().any()


# -- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", ["channel", "head"])
@pytest.mark.parametrize("algorithm, decay_target", [("delta_rule", "zero"), ("implicit", "init")])
def test_decoding(algorithm, decay_target, gates, monkeypatch):
    """Rows in different phases, over the end of a chunk, with tokens that are not there."""
    monkeypatch.setattr(test_decode, "make_call", lambda rule, *args, **call: call_of(rule, *args, **call))
    rule = make_rule(algorithm, decay_target=decay_target, cap=0.3 if decay_target == "init" else None)
    test_decode.check(rule, tolerance=TOLERANCE, holes=gates == "head", heads=1, gates=gates, steps=3.0)


def test_a_row_alone_has_the_bits_of_a_batch():
    rule = make_rule()
    inputs, parameters = call_of(rule, batch=3, tokens=18, heads=2)
    state, link_cache = test_decode.after_prompt(rule, inputs, parameters, 14)
    alone = [[x[1:2].clone() for x in tensors] for tensors in (state, link_cache)]
    one_by_one = [[x.clone() for x in tensors] for tensors in (state, link_cache)]
    tokens = test_decode.cut(inputs, 14, None)
    y = test_decode.by_decode(rule, tokens, parameters, state, link_cache)
    row = [None if x is None else x[1:2] for x in tokens]
    assert torch.equal(test_decode.by_decode(rule, row, parameters, *alone), y[1:2])
    single = [
        test_decode.by_decode(rule, test_decode.cut(tokens, t, t + 1), parameters, *one_by_one) for t in range(4)
    ]
    assert torch.equal(torch.cat(single, 1), y)
    assert all(torch.equal(a, b) for a, b in zip(state, one_by_one[0], strict=True))


# -- the system alone -------------------------------------------------------------------------------------------------


@triton.jit
def solve_kernel(L, p, r, r_transposed, C: tl.constexpr, N: tl.constexpr):
    o_c, o_n = tl.arange(0, C), tl.arange(0, N)
    b_e, b_n = triangular.factors_of(tl.load(L + o_c[:, None] * C + o_c[None, :]), C, "ieee")
    p_cn = o_c[:, None] * N + o_n[None, :]
    b_p = tl.load(p + p_cn)
    tl.store(r + p_cn, triangular.solved(b_e, b_n, b_p, C, "ieee"))
    tl.store(r_transposed + p_cn, triangular.solved_transposed(b_e, b_n, b_p, C, "ieee"))


@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("kind", ["random", "ones", "twos"])
def test_triangular_systems(kind, chunk_size):
    """Those of writes that erase each other: all ones has powers of up to 1e17, which nothing here takes."""
    draw = torch.Generator().manual_seed(3)
    keys = torch.nn.functional.normalize(torch.randn(chunk_size, 16, generator=draw), dim=-1)
    lower = {"random": 2.0 * keys @ keys.T, "ones": torch.ones(chunk_size, chunk_size)}
    lower["twos"] = 2.0 * lower["ones"]
    lower = lower[kind].tril(-1).to(DEVICE)
    p = torch.randn(chunk_size, 32, generator=draw).to(DEVICE)
    r, r_transposed = torch.empty_like(p), torch.empty_like(p)
    solve_kernel[(1,)](lower, p, r, r_transposed, chunk_size, 32)
    whole = lower.double() + torch.eye(chunk_size, dtype=torch.float64, device=DEVICE)
    test_forward.assert_close("r", r, torch.linalg.solve(whole, p.double()), 2e-6)
    test_forward.assert_close("r of the transposed", r_transposed, torch.linalg.solve(whole.T, p.double()), 2e-6)


# -- models -----------------------------------------------------------------------------------------------------------

SIZE = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "chunk_size": 16,
    "initializer_range": 0.1, "conv_initializer_range": None, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", ["deltanet", "gated-deltanet", "kda", "longhorn"])
def test_presets_run_on_kernels(name, monkeypatch):
    """Losses, gradients and a text that is generated: those of PyTorch, by kernels alone."""
    models = []
    for backend in ("pytorch", "triton"):
        torch.manual_seed(0)
        config = MirasConfig.from_preset(name, **SIZE, memory_backend=backend)
        models.append(MirasForCausalLM(config).to(DEVICE))
    called = []
    for part in ("_by_kernel", "_decode"):
        usual = getattr(MemoryBackend, part)
        spy = lambda *args, usual=usual, part=part, **kwargs: (called.append(part), usual(*args, **kwargs))[1]  # noqa: E731
        monkeypatch.setattr(MemoryBackend, part, spy)
    ids = torch.randint(3, 99, (2, 21), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ids[1, :4] = 0
    losses, found = [], []
    for model in models:
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for parameter, expected in found[0].items():
        test_forward.assert_close(parameter, found[1][parameter], expected, 1e-4)
    with torch.no_grad():
        texts = [model.eval().generate(ids[:1, :14], max_new_tokens=4, do_sample=False) for model in models]
    assert torch.equal(*texts)
    assert called == ["_by_kernel", "_by_kernel", "_decode", "_decode", "_decode"]


@pytest.mark.parametrize(
    "change, why",
    [
        ({"gradient_at": "previous"}, "kernels do not know `gradient_at='previous'`"),
        ({"erase_key": "own"}, "kernels do not know `erase_key='own'`"),
        ({"writes_per_token": 2}, "kernels do not know tokens with 2 writes"),
        ({"chunk_size": 8}, r"`chunk_size` must be one of \(16, 32, 64\), got 8"),
    ],
)
def test_what_kernels_do_not_know_is_named(change, why):
    model = MirasForCausalLM(MirasConfig.from_preset("gated-deltanet", **SIZE | change, memory_backend="triton"))
    with pytest.raises(ValueError, match=f"No kernel serves this call, and the backend is 'triton': {why}"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False)


def test_choices_that_do_not_fit_are_named():
    for name, value in (("memory", "mlp"), ("attentional_bias", "lp"), ("retention", "kl")):
        given = {"memory": "matrix", "learning_algorithm": "delta_rule", name: value}
        with pytest.raises(
            ValueError, match=rf"`{name}` must be '.*' with `learning_algorithm='delta_rule'`, got '{value}'"
        ):
            Choices(**given)
    with pytest.raises(ValueError, match="`learning_algorithm` must be one of .*'momentum'"):
        Choices("matrix", learning_algorithm="momentum")
    rule = make_rule()
    inputs, parameters = call_of(rule)
    inputs[3] = inputs[3][..., None].expand_as(inputs[4])
    with pytest.raises(ValueError, match=r"`eta` must have shape \(1, 21, 2\) or \(1, 21, 2, 1\), got"):
        by_kernel(rule, inputs, parameters)
