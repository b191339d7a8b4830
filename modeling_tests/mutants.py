# Copyright 2026 The miras-hf authors.
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

"""Memories that are broken on purpose, to show that the tests notice: `MIRAS_MUTANT=never_writes pytest ...`.

A mutant is put in place before any test module is imported, and replaces what all forms of the recurrence and all models
go through, in the PyTorch path. `test_mutants.py` lists the tests that each must fail, and runs this file: it imports
what is slow to import once, and runs the tests of every mutant in a fork of its own.
"""

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import miras_hf.backend
import miras_hf.memory
from miras_hf.memory import MemoryState, initial_memory_state
from miras_hf.memory.inputs import MemoryInputs, bound_inputs
from miras_hf.modeling_miras import MirasMixer
from miras_hf.sequences import Sequences


def _of_every_token(change: Callable[[MemoryInputs], MemoryInputs]) -> None:
    """Changes what every form reads of its tokens, after checks and bounds."""

    def changed(x: MemoryInputs, rule) -> MemoryInputs:
        return change(bound_inputs(x, rule))

    for form in ("recurrent", "chunk", "step"):
        # by their names in sys.modules: packages may show functions of the same name
        module = inspect.getmodule(inspect.unwrap(getattr(miras_hf.memory, f"{form}_miras")))
        assert module.bound_inputs is bound_inputs
        module.bound_inputs = changed


def _of_every_call(change: Callable[[dict], None]) -> None:
    """Changes the keywords with which any form is called, `state` being that of `step_miras_`."""

    def changed(form):
        @functools.wraps(form)
        def call(*args, **kwargs):
            change(kwargs)
            return form(*args, **kwargs)

        return call

    for name in ("recurrent_miras", "chunk_miras", "step_miras", "step_miras_"):
        form = changed(getattr(miras_hf.memory, name))
        for package in (miras_hf.memory, miras_hf.backend):
            if hasattr(package, name):
                setattr(package, name, form)


def never_writes() -> None:
    """The step is zero: memories stay what training has made them, whatever they read."""
    _of_every_token(lambda x: x._replace(eta=0 * x.eta))


def never_forgets() -> None:
    """The retention is one: nothing decays."""
    _of_every_token(lambda x: x._replace(log_alpha=0 * x.log_alpha))


def ignores_cache() -> None:
    """A call gets to know how much was read before it, and starts from the learned memory all the same."""

    def forget(kwargs: dict) -> None:
        if kwargs.get("initial_state") is not None:
            kwargs["initial_state"] = _forgotten(kwargs["initial_state"], kwargs)
        if kwargs.get("state") is not None:
            state = kwargs["state"]
            state.map(Tensor.copy_, _forgotten(state, kwargs))
            kwargs["weights"] = None

    _of_every_call(forget)


def _forgotten(state: MemoryState, kwargs: dict) -> MemoryState:
    rows, gate_dim = len(state.count), state.eta.shape[-1]
    start = initial_memory_state(kwargs["rule"], kwargs["parameters"], rows, gate_dim, state.dual[0].dtype)
    return start._replace(count=state.count)


def ignores_mask() -> None:
    """Pads are read as if they were text."""

    def unmasked(kwargs: dict) -> None:
        kwargs["lengths"] = None

    read = MirasMixer.forward

    def of_a_model(self, hidden_states: Tensor, position_embeddings=None, sequences=None, cache=None, **kwargs):
        if sequences is not None and sequences.mask is not None:
            sequences = Sequences()
        return read(self, hidden_states, position_embeddings, sequences, cache, **kwargs)

    _of_every_call(unmasked)
    MirasMixer.forward = of_a_model


def ignores_borders() -> None:
    """The sequences of a pack are read as one text."""

    def whole(kwargs: dict) -> None:
        borders = kwargs.get("cu_seqlens")
        if borders is not None and borders.numel() > 2:
            kwargs["cu_seqlens"] = torch.stack((borders[0], borders[-1]))

    _of_every_call(whole)


MUTANTS = {
    mutant.__name__: mutant for mutant in (never_writes, never_forgets, ignores_cache, ignores_mask, ignores_borders)
}


class _Outcomes:
    """A plugin that keeps how every test ended: "passed", "skipped", or the first line of its error."""

    def __init__(self):
        self.of_test: dict[str, str] = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            self.of_test[report.nodeid] = report.outcome if crash is None else crash.message.splitlines()[0]


def outcomes(mutant: str, tests: list[str], path: str) -> dict[str, str]:
    """How the tests end under a mutant, or in health for an empty name; in a fork, through a file at `path`."""
    child = os.fork()
    if child == 0:
        try:
            os.environ.pop("MIRAS_MUTANT", None)
            if mutant:
                os.environ["MIRAS_MUTANT"] = mutant
            kept = _Outcomes()
            pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests], plugins=[kept])
            with open(path, "w") as file:
                json.dump(kept.of_test, file)
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)
    with open(path) as file:
        return json.load(file)


if __name__ == "__main__":
    # a file that says which tests to run under which mutant, and gets in their place how they ended
    with open(sys.argv[1]) as file:
        found = {name: outcomes(name, tests, sys.argv[1] + ".part") for name, tests in json.load(file).items()}
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
