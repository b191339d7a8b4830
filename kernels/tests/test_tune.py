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
"""Tuning times the kernel it means to, decoding too, and what does not run has its reason and no entry."""

import json

import pytest
import torch
from ahead_of_time import CAPABILITIES
from choose import candidates, write
from launches import launching
from test_decode import after_prompt, by_decode, cut
from test_forward import by_kernel, make_call, make_rule
from test_launch import KERNELS
from triton.runtime.errors import OutOfResources
from tune import keep, tune

from miras_kernels import configuration


SHAPE = {"head_dim": 64, "chunk_size": 64, "precision": "bf16"}


@pytest.mark.parametrize("part", ["forward", "backward", "decode"])
def test_a_launch_reaches_the_kernel_it_is_for_and_no_other(part, monkeypatch):
    rule = make_rule()
    inputs, parameters = make_call(rule, tokens=20)
    state, link_cache = after_prompt(rule, inputs, parameters, 18)
    seen = {}

    class Watched:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.update({self.name: options["num_stages"]})

    for module, name in KERNELS["mlp"]:
        monkeypatch.setattr(module, name, Watched(name.removesuffix("_kernel")))
    with launching(f"mlp_{part}", {"TN": 16, "num_warps": 4, "num_stages": 7}):
        y, _, _ = by_kernel(rule, [None if x is None else x.clone().requires_grad_() for x in inputs], parameters)
        y.sum().backward()
        with torch.no_grad():
            by_decode(rule, cut(inputs, 18, None), parameters, state, link_cache)
    assert seen.pop(f"mlp_{part}") == 7
    assert len(seen) == 2 and 7 not in seen.values()


def test_what_does_not_run_has_its_reason_and_no_entry():
    fast = {"TN": 32, "num_warps": 4, "num_stages": 2, "maxnreg": 255}

    def time(kernel, shape, launch):
        if launch["TN"] == 64:
            raise OutOfResources(258048, 232448, "shared memory")
        if launch["num_stages"] == 2 and launch["num_warps"] == 8:
            raise RuntimeError("the assembler gave up")
        return 1.0 if launch == fast else 2.0

    log = []
    assert tune("mlp_backward", SHAPE, time, log) == fast
    reasons = {entry["skipped"].split(":")[0] for entry in log if "skipped" in entry}
    assert reasons == {"OutOfResources", "RuntimeError"} and all(("ms" in e) != ("skipped" in e) for e in log)

    def nothing_fits(kernel, shape, launch):
        raise OutOfResources(258048, 232448, "shared memory")

    kernels = {"mlp_backward": [{**SHAPE, "launch": fast}]}
    keep(kernels, "mlp_backward", SHAPE, tune("mlp_backward", SHAPE, nothing_fits, log))
    assert kernels == {"mlp_backward": [{**SHAPE, "launch": fast}]}


def test_the_clock_gets_more_candidates_than_the_report_and_the_report_the_same_as_before():
    for kernel in configuration.KERNELS:
        by_report = candidates(kernel, **SHAPE)
        by_clock = candidates(kernel, **SHAPE, by_clock=True)
        assert by_clock[: len(by_report)] == by_report
        assert all(by_clock.count(launch) == 1 for launch in by_clock)
        assert {launch["num_stages"] for launch in by_clock} == {1, 2}
        assert {launch["num_warps"] for launch in by_clock} == {4, 8}
    assert any(launch["TN"] == 64 for launch in candidates("mlp_backward", **SHAPE, by_clock=True))
    # what nothing but a clock can rank, a report's choice must not see
    assert all(launch["num_stages"] == 1 for name in CAPABILITIES for launch in candidates("mlp_forward", **SHAPE))


def test_configurations_are_written_where_they_are_asked_for(tmp_path):
    write("nvidia_h200", {"mlp_decode": [{**SHAPE, "launch": {"TN": 32, "num_warps": 4, "num_stages": 1}}]}, tmp_path)
    found = json.loads((tmp_path / "nvidia_h200.json").read_text())["kernels"]
    assert found["mlp_decode"][0]["launch"]["TN"] == 32
    assert not (configuration.DIRECTORY / "nvidia_h200.json").exists()
