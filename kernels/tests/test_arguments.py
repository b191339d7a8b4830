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
"""Every argument of the public functions, wrong in every way that a type, dtype, device, layout or shape can be wrong:
an error that names it, and nothing is launched."""

import dataclasses
import math
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from test_forward import DEVICE, by_kernel, make_call, make_rule

from miras_hf.backend import kernel_choices
from miras_kernels import (
    Choices,
    Projections,
    decode,
    decode_matrix,
    decode_mlp,
    forward,
    forward_pass,
    ops,
    refusal,
    resident_state,
)
from miras_kernels.checks import checked_borders
from miras_kernels.choices import ATTENTIONAL_BIASES, THRESHOLDS


# sizes of which no two are equal, so that no wrong shape is right by chance
BATCH, TOKENS, HEADS, HEAD_DIM = 2, 5, 3, 32
TENSORS = ("q", "k", "v", "eta", "log_alpha", "delta")


class Launched:
    """Stands where a kernel stands."""

    def __getitem__(self, grid):
        raise AssertionError("a kernel was launched")


def forbid_launches(monkeypatch):
    for module, name in (
        (forward_pass, "mlp_forward_kernel"),
        (forward_pass, "matrix_forward_kernel"),
        (decode_mlp, "mlp_decode_kernel"),
        (decode_matrix, "matrix_decode_kernel"),
    ):
        monkeypatch.setattr(module, name, Launched())


def right_call(function, memory="mlp"):
    """Arguments by name that the function takes."""
    rule = make_rule(memory, "huber_coordinate", "lq")
    inputs, parameters = make_call(rule, BATCH, TOKENS, HEADS, HEAD_DIM)
    choices = kernel_choices(rule)[0]
    _, state, _ = by_kernel(rule, inputs, parameters)
    lengths = torch.tensor([TOKENS, TOKENS - 1], device=DEVICE, dtype=torch.int32)
    shared = {"choices": choices, "initial": parameters.initial}
    if function is resident_state:
        return shared | {"state": state}
    shared |= dict(zip(TENSORS, inputs)) | {"lengths": lengths, "precision": "ieee"}
    shared |= {"norm_weight": parameters.norm_weight, "norm_bias": parameters.norm_bias}
    if function is forward:
        return shared | {"state": state, "output_final_state": True, "save_every": 1}
    state, link_cache = resident_state(state, choices=choices, initial=parameters.initial)
    width = HEADS * HEAD_DIM
    projections = Projections(
        tuple(torch.randn(width, 4, device=DEVICE) for _ in "qkv"),
        torch.zeros(BATCH, 3, 3 * width, device=DEVICE),
        torch.zeros(HEADS, device=DEVICE),
        0.1,
        torch.ones(1, TOKENS, HEAD_DIM, device=DEVICE),
        torch.ones(1, TOKENS, HEAD_DIM, device=DEVICE),
    )
    return shared | {"state": state, "link_cache": link_cache, "projections": projections}


def wrong_tensors(x):
    """Name of the fault and a tensor, or what is none, that has it."""
    yield from (("text", "x"), ("number", 1.0), ("list", [1.0]), ("module", torch.nn.Linear(1, 1)))
    dtypes = (torch.complex64, torch.uint8, torch.float8_e4m3fn)
    dtypes += (torch.float32,) if x.dtype in (torch.bool, torch.int64, torch.int32) else (torch.int64, torch.bool)
    for dtype in dtypes:
        yield str(dtype), x.to(dtype)
    yield "meta", x.to("meta")
    yield "sparse", x.to_sparse()
    yield "more axes", x[None]
    yield "fewer axes", x[0]
    yield "no axis", x.flatten()[0]
    for axis in range(x.dim()):
        yield f"axis {axis} shorter", x.narrow(axis, 0, x.shape[axis] - 1)
        yield f"axis {axis} longer", torch.cat((x, x.narrow(axis, 0, 1)), axis)
    yield "nested", torch.nested.nested_tensor([x])


def wrong_tuples(xs):
    yield from (("text", "x"), ("tensor", xs[0]), ("empty", ()), ("longer", (*xs, xs[-1])))
    if len(xs) > 1:
        yield "shorter", xs[:-1]
    if len({x.shape for x in xs}) > 1:
        yield "turned", tuple(xs[::-1])
    yield "none inside", (*xs[:-1], None)
    for i, x in enumerate(xs):
        for fault, wrong in wrong_tensors(x):
            yield f"{i}: {fault}", (*xs[:i], wrong, *xs[i + 1 :])


OTHER = {
    "choices": [("none", None), ("dict", {}), ("class", Choices)],
    "precision": [("number", 3), ("unknown", "fp8"), ("empty", "")],
    "output_final_state": [("number", 1), ("none", None), ("text", "yes")],
    "save_every": [("negative", -1), ("float", 1.5), ("none", None), ("bool", True)],
}
REQUIRED = ("q", "k", "v", "eta", "log_alpha", "delta", "initial", "norm_weight", "norm_bias", "link_cache")


def wrong_calls(function):
    """Argument, fault, and a call of which nothing else is wrong."""
    right = right_call(function)
    for name, value in right.items():
        faults = [("none", None)] if name in REQUIRED or (name == "state" and function is not forward) else []
        if name in OTHER:
            faults = OTHER[name]
        elif isinstance(value, torch.Tensor):
            faults += list(wrong_tensors(value))
        elif name == "projections":
            faults += [("tuple", tuple(value)), ("number", 1)]
            for field in value._fields:
                part = getattr(value, field)
                if field == "eta_max":
                    found = [("none", None), ("text", "x"), ("tensor", torch.ones(2))]
                elif field == "value_norm":
                    found = [("none", None), ("number", 1), ("text", "x"), ("tensor", torch.tensor(True))]
                else:
                    found = [("none", None), *(wrong_tuples(part) if isinstance(part, tuple) else wrong_tensors(part))]
                faults += [(f"{field}: {fault}", value._replace(**{field: wrong})) for fault, wrong in found]
        else:
            faults += list(wrong_tuples(value))
        for fault, wrong in faults:
            yield name, fault, right | {name: wrong}


@pytest.mark.parametrize("function", [forward, decode, resident_state])
def test_what_is_wrong_is_named(function, monkeypatch):
    calls = list(wrong_calls(function))
    assert len(calls) > 100
    # decoding remembers what it has checked: not what is wrong
    function(**right_call(function))
    forbid_launches(monkeypatch)
    silent = []
    for name, fault, arguments in calls:
        try:
            function(**arguments)
        except (TypeError, ValueError) as error:
            said = str(error)
            # what no kernel serves is said of the query, and where its shape is wrong, others do not fit
            if f"`{name}" in said or (name == "q" and ("No kernel serves this call" in said or "axis" in fault)):
                continue
            silent.append((name, fault, repr(error)))
        except Exception as error:
            silent.append((name, fault, repr(error)))
        else:
            silent.append((name, fault, "accepted"))
    assert not silent, "\n".join(map(str, silent))


def test_memory_without_a_norm_does_not_take_a_wrong_one(monkeypatch):
    right = right_call(forward, "matrix")
    forbid_launches(monkeypatch)
    with pytest.raises(ValueError, match="`norm_bias` must have shape"):
        forward(**right | {"norm_bias": right["norm_bias"][:1]})
    with pytest.raises(AssertionError, match="launched"):
        forward(**right)


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
@pytest.mark.parametrize(
    "borders",
    [
        [0, 25], [0, 19], [1, 20], [-5, 20], [0, 12, 8, 20], [0, -3, 20], [0, 2**40, 20], [0, 21, 20], [20, 0], [0, 0],
    ],
)  # fmt: skip
def test_borders_that_do_not_run_through_the_pack(borders, memory, monkeypatch):
    rule = make_rule(memory)
    inputs, parameters = make_call(rule, tokens=20)
    forbid_launches(monkeypatch)
    with pytest.raises(ValueError, match="`cu_seqlens` must begin with 0, never decrease and end with 20"):
        by_kernel(rule, inputs, parameters, cu_seqlens=torch.tensor(borders))


@pytest.mark.parametrize(
    "borders",
    [
        torch.tensor([[0, 20]]), torch.tensor(20), torch.tensor([20]), torch.tensor([], dtype=torch.int64),
        torch.tensor([0.0, 20.0]), torch.tensor([0, 20], dtype=torch.int16), torch.tensor([False, True]),
        torch.tensor([0, 20], device="meta"), [0, 20], "x",
    ],
)  # fmt: skip
def test_borders_that_are_none(borders, monkeypatch):
    rule = make_rule()
    inputs, parameters = make_call(rule, tokens=20)
    forbid_launches(monkeypatch)
    with pytest.raises((TypeError, ValueError), match="`cu_seqlens` must"):
        by_kernel(rule, inputs, parameters, cu_seqlens=borders)


def test_borders_of_either_integer_and_of_the_host_are_one_answer():
    rule = make_rule("matrix")
    inputs, parameters = make_call(rule, tokens=20)
    borders = torch.tensor([0, 7, 7, 20])
    expected, *_ = by_kernel(rule, inputs, parameters, cu_seqlens=borders.to(DEVICE))
    for same in (borders, borders.int(), torch.stack((borders, borders), 1)[:, 0]):
        y, *_ = by_kernel(rule, inputs, parameters, cu_seqlens=same)
        assert torch.equal(y, expected)


def test_borders_of_the_host_are_moved_to_where_the_queries_are():
    borders = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    moved = checked_borders(borders, 20, torch.device("meta"))
    assert (moved.device.type, moved.dtype, moved.shape) == ("meta", torch.int64, borders.shape)
    # their values are looked at before
    with pytest.raises(ValueError, match="`cu_seqlens` must begin with 0, never decrease and end with 21"):
        checked_borders(borders, 21, torch.device("meta"))


@pytest.mark.skipif(
    DEVICE != "cpu", reason="on a device an assertion looks, and decoding takes what is too large for all"
)
@pytest.mark.parametrize("function", [forward, decode])
@pytest.mark.parametrize("lengths", [[-1, 5], [2, 6]])
def test_lengths_beyond_the_tokens_are_named(function, lengths, monkeypatch):
    right = right_call(function)
    forbid_launches(monkeypatch)
    with pytest.raises(ValueError, match=f"`lengths` must lie between 0 and 5, .* got {re.escape(str(lengths))}"):
        function(**right | {"lengths": torch.tensor(lengths)})


def test_lengths_of_either_integer_are_one_answer():
    for function in (forward, decode):
        ys = []
        for dtype in (torch.int32, torch.int64):
            torch.manual_seed(0)
            right = right_call(function)
            y = function(**right | {"lengths": right["lengths"].to(dtype)})
            ys.append(y if function is decode else y[0])
        assert torch.equal(*ys) and ys[0][1, : TOKENS - 1].any() and not ys[0][1, TOKENS - 1 :].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="an assertion on the device")
def test_borders_on_a_device_are_looked_at_there():
    program = (
        "import sys; sys.path[:0] = {path!r}\n"
        "from test_forward import *\n"
        "rule = make_rule()\n"
        "by_kernel(rule, *make_call(rule, tokens=20), cu_seqlens=torch.tensor([0, 25], device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    run = subprocess.run([sys.executable, "-c", program.format(path=sys.path)], capture_output=True, text=True)
    assert run.returncode != 0 and "device-side assert" in run.stderr


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Choices)])
def test_choices_that_are_none(field):
    wrong = ["x", math.nan, math.inf, -1e9, (), 1j]
    wrong += [None] if field != "weight_cap" else []
    for value in wrong:
        with pytest.raises(ValueError, match=f"`{field}` must"):
            Choices(**{field: value})
    assert Choices(weight_cap=None) and Choices(chunk_size=16, min_log_alpha=-10)
    with pytest.raises(ValueError, match="`min_log_alpha` must lie between -2.5 and 0"):
        Choices(min_log_alpha=-10)


def test_devices_that_are_not_there_are_a_reason():
    for device in ("cuda:63", "meta", "mps", "xpu:1", "cuda" if DEVICE == "cpu" else "meta"):
        for asked in (device, torch.device(device)):
            reason = refusal(asked, torch.float32, 64, Choices())
            assert reason is not None and repr(device.partition(":")[0])[:-1] in reason, device
            assert not reason.endswith(".")
    right = (torch.device(DEVICE), torch.float32, 64, Choices())
    assert refusal(*right) is None
    assert "head_dim is None" in refusal(*right[:2], None, right[3])
    assert "`precision` must be one of" in refusal(*right, precision="fp8")
    with pytest.raises(TypeError, match="`choices` must be a Choices"):
        refusal(*right[:3], None)
    with pytest.raises(TypeError, match="`dtype` must be a dtype"):
        refusal(right[0], "float32", *right[2:])


def test_biases_that_take_a_threshold_say_what_it_is_a_number_for():
    # each bias is read with what it says that it takes, and with nothing else
    found = {bias: Choices(attentional_bias=bias).threshold for bias in ATTENTIONAL_BIASES}
    assert [bias for bias, threshold in found.items() if threshold] == list(THRESHOLDS)
    for bias, threshold in found.items():
        rule = make_rule("matrix", bias, "decay")
        inputs, parameters = make_call(rule, 1, 3, HEADS, HEAD_DIM)
        given = {"choices": kernel_choices(rule)[0], "initial": parameters.initial}
        read = partial(forward, *inputs[:5], **given)
        assert (inputs[5] is not None) == (threshold is not None)
        read(inputs[5])
        wrong = torch.ones(1, 3, HEADS, HEAD_DIM, device=DEVICE)
        if threshold == "channel":
            read(wrong)
        else:
            with pytest.raises(ValueError, match="`delta`"):
                read(wrong)
        if threshold:
            with pytest.raises(ValueError, match="`delta` is required"):
                read(None)


def test_operators_take_the_choices_apart_and_put_them_together():
    for choices in (Choices(), Choices("matrix", "lp", "kl", 16, "zero", weight_cap=None, lp_smooth_sign=True)):
        assert ops.choices_of(*ops.choice_values(choices)) == choices
