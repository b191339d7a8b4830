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
"""The tests' interpreter computes what Triton's does, bit for bit, and prepares its language once a launch."""

import dataclasses

import pytest
import quick_interpreter
import torch
from test_forward import by_kernel, make_call, make_rule
from torch.utils._pytree import tree_leaves


interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not used where there is a GPU")


def results():
    rule = make_rule(bias="huber_norm")
    return [x for x in tree_leaves(by_kernel(rule, *make_call(rule, heads=1))) if isinstance(x, torch.Tensor)]


def test_bits_are_those_of_tritons_interpreter(monkeypatch):
    usual, calls = interpreter._patch_lang.__wrapped__, []

    def counted(fn):
        calls.append(fn)
        return usual(fn)

    quick = results()
    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    whole = results()
    assert len(calls) > 20  # one for every call of a device function
    assert len(quick) == len(whole) > 1 and all(map(torch.equal, quick, whole))


def test_a_launch_prepares_each_module_of_the_language_once(monkeypatch):
    usual, calls = interpreter._patch_lang.__wrapped__, []

    def counted(fn):
        calls.append(fn)
        return usual(fn)

    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    quick_interpreter.prepare_once(interpreter)
    for launches in (1, 2):
        results()
        # triton.language by the kernel and, by functions of Triton's own, triton.language.core
        assert launches <= len(calls) <= 2 * launches


def test_the_language_is_restored_after_a_launch():
    before = dict(vars(interpreter.tl))
    results()
    assert dict(vars(interpreter.tl)) == before


def test_sums_are_not_checked_for_overflow_where_nothing_is_asserted_of_them(monkeypatch):
    builder, semantic = interpreter.interpreter_builder, interpreter.interpreter_semantic
    usual, checked, asserted = semantic.device_assert, [], []
    monkeypatch.setattr(semantic, "device_assert", lambda *x: checked.append(x) or usual(*x))
    monkeypatch.setattr(builder, "create_assert", lambda *x: asserted.append(x))
    quick = results()
    assert not checked
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))
    whole = results()
    assert len(checked) > 100 and not asserted
    assert all(map(torch.equal, quick, whole))
