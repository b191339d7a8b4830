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
"""What a launch is given: the tensors' device, one binary whatever dtype parameters have, sizes that compile nothing."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_decode import after_prompt, by_decode, cut
from test_forward import DEVICE, by_kernel, make_call, make_rule
from torch.utils._pytree import tree_leaves

from miras_hf.memory import L2, DeltaRule, MatrixMemory, MirasRule
from miras_kernels import (
    backward_delta,
    backward_matrix,
    backward_mlp,
    decode_delta,
    decode_matrix,
    decode_mlp,
    decoding,
    forward_delta,
    forward_pass,
    ops,
)


KERNELS = {
    "mlp": (
        (forward_pass, "mlp_forward_kernel"),
        (backward_mlp, "mlp_backward_kernel"),
        (decode_mlp, "mlp_decode_kernel"),
    ),
    "matrix": (
        (forward_pass, "matrix_forward_kernel"),
        (backward_matrix, "matrix_backward_kernel"),
        (decode_matrix, "matrix_decode_kernel"),
    ),
    "delta": (
        (forward_delta, "delta_forward_kernel"),
        (backward_delta, "delta_backward_kernel"),
        (decode_delta, "delta_decode_kernel"),
    ),
}


def rule_of(family):
    if family != "delta":
        return make_rule(family)
    return MirasRule(MatrixMemory(), L2(residual_clip=None), algorithm=DeltaRule(), chunk_size=16)


class Watched:
    """Stands where a kernel stands, and does not run it."""

    def __init__(self, seen):
        self.seen = seen

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.seen(arguments)


@pytest.mark.parametrize("memory", KERNELS)
def test_launches_are_made_on_the_tensors_device(memory, monkeypatch):
    rule = rule_of(memory)
    inputs, parameters = make_call(rule, tokens=20, gates="head")
    state, link_cache = after_prompt(rule, inputs, parameters, 18)
    active, launched = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        active.append(tensor.device)
        yield
        active.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, name in KERNELS[memory]:
        monkeypatch.setattr(module, name, Watched(lambda _, name=name: launched.append((name, *active))))
    y, _, _ = by_kernel(rule, [None if x is None else x.clone().requires_grad_() for x in inputs], parameters)
    y.sum().backward()
    by_decode(rule, cut(inputs, 18, None), parameters, state, link_cache)
    assert {name for name, *_ in launched} == {name for _, name in KERNELS[memory]}
    assert all(devices == [inputs[0].device] for _, *devices in launched)


@pytest.mark.parametrize("memory", ["mlp", "matrix"])
def test_dtypes_of_gates_and_norms_do_not_make_other_binaries(memory, monkeypatch):
    rule = make_rule(memory, "huber_mixture")
    inputs, parameters = make_call(rule, tokens=20)
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        state, link_cache = after_prompt(rule, inputs, parameters, 18)
        norm = {name: getattr(parameters, name).to(dtype) for name in ("norm_weight", "norm_bias")}
        with monkeypatch.context() as patch:
            module, name = KERNELS[memory][2]
            patch.setattr(module, name, Watched(found.append))
            gates = [x.to(dtype) for x in inputs[3:]]
            new = cut([*inputs[:3], *gates], 18, None)
            by_decode(rule, new, parameters._replace(**norm), state, link_cache)
    dtypes = [[x.dtype for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)] for arguments in found]
    assert dtypes[0] == dtypes[1] == dtypes[2] and torch.float32 in dtypes[0]


def test_time_in_front_of_a_launch(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    import in_front

    monkeypatch.setattr(in_front, "CALLS", 2)
    monkeypatch.setattr(in_front, "BATCHES", 1)
    kernels = [getattr(module, name) for module, name in in_front.KERNELS]
    taken = in_front.microseconds("yaad", in_front.Shape(1, 16, 1, 32, 16, torch.float32, DEVICE))
    assert list(taken) == ["decode", "forward", "backward"] and min(taken.values()) > 0.0
    assert kernels == [getattr(module, name) for module, name in in_front.KERNELS]


def test_sizes_that_change_from_call_to_call_compile_nothing():
    program = (
        "import miras_kernels\n"
        "from miras_kernels import backward_delta, backward_matrix, backward_mlp, decode_delta, decode_matrix, decode_mlp\n"
        "from miras_kernels import forward_delta, forward_pass\n"
        "for module in (backward_delta, backward_matrix, backward_mlp, decode_delta, decode_matrix, decode_mlp, "
        "forward_delta, forward_pass):\n"
        "    for kernel in (x for name, x in vars(module).items() if name.endswith('_kernel')):\n"
        "        print({p.name for p in kernel.params if not (p.is_constexpr or p.do_not_specialize)} & "
        "{'H', 'ROTARY_TOKENS'})\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.stdout.split("\n")[:-1] == ["set()"] * 9, run.stderr


# A number of a tile that two threads hold, one of them may read after the other has written it back. The cases are at a
# launch's limit: 16 x 16 numbers are 8 warps' threads.
@pytest.mark.parametrize(
    "kernel, tile, warps, fits",
    [
        ("mlp_forward", 16, 8, True),
        ("mlp_forward", 16, 16, False),
        ("mlp_decode", 16, 8, True),
        ("mlp_decode", 16, 16, False),
        ("mlp_backward", 16, 8, True),
        ("mlp_backward", 16, 16, False),
        ("matrix_backward", 16, 8, True),
        ("matrix_backward", 32, 32, False),  # of C x BD, whatever the tile
        ("delta_backward", 16, 16, True),
        ("delta_backward", 16, 32, False),
    ],
)
def test_more_threads_than_numbers_of_a_tile_are_refused(kernel, tile, warps, fits, monkeypatch):
    memory, _, part = kernel.partition("_")
    rule = rule_of(memory)
    inputs, parameters = make_call(rule, tokens=20, gates="head")
    state, link_cache = after_prompt(rule, inputs, parameters, 18)
    usual = ops.launch_configuration

    def launch_configuration(name, **shape):
        return usual(name, **shape) | ({"TN": tile, "num_warps": warps} if name == kernel else {})

    monkeypatch.setattr(ops, "launch_configuration", launch_configuration)
    monkeypatch.setattr(decoding, "launch_configuration", launch_configuration)

    def call():
        if part == "decode":
            return by_decode(rule, cut(inputs, 18, None), parameters, state, link_cache)
        leaves = [None if x is None else x.clone().requires_grad_(part == "backward") for x in inputs]
        y, _, _ = by_kernel(rule, leaves, parameters)
        return y.sum().backward() if part == "backward" else y

    if fits:
        call()
        return
    with pytest.raises(Exception, match="more threads than one of its tiles has numbers"):
        call()


class Program:
    """What a launch returns of a GPU."""

    def __init__(self, ptx):
        self.asm, self.metadata = {"ptx": ptx}, SimpleNamespace(name="a_kernel")


@pytest.mark.parametrize("part", ["forward", "backward", "decode"])
def test_a_program_that_stores_nothing_is_refused(part, monkeypatch):
    """As Triton makes some for Blackwell; what such a launch leaves are numbers that nobody wrote."""
    rule = make_rule()
    inputs, parameters = make_call(rule, tokens=20)
    state, link_cache = after_prompt(rule, inputs, parameters, 18)
    stores, nothing = "st.global.b32 [%rd1], %r1;\nret;", "ld.global.b32 %r1, [%rd1];\nret;"
    ptx = {name.removesuffix("_kernel").removeprefix("mlp_"): stores for _, name in KERNELS["mlp"]}

    def run():
        y, _, _ = by_kernel(rule, [None if x is None else x.clone().requires_grad_() for x in inputs], parameters)
        y.sum().backward()
        with torch.no_grad():
            by_decode(rule, cut(inputs, 18, None), parameters, state, link_cache)

    for module, name in KERNELS["mlp"]:
        which = name.removesuffix("_kernel").removeprefix("mlp_")
        launched = type(
            "Launched", (), {"__getitem__": lambda self, grid, of=which: lambda *_, **__: Program(ptx[of])}
        )
        monkeypatch.setattr(module, name, launched())
    run()
    ptx[part] = nothing
    with pytest.raises(RuntimeError, match="compiles `a_kernel` to a program that does nothing"):
        run()
