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
"""Triton's interpreter, imported with this, does the same with less work.

It prepares its language once a launch, not once more at every call of a device function: interpreted functions stand in the
modules of `triton.language` until the launch ends, and a second preparation within it finds nothing to replace. And it does
not compute every sum and product of indices a second time, in int64, to look for overflows: it asserts nothing of what it
finds unless its option `debug` is on. A Triton whose interpreter is built otherwise is left as it is, and
`tests/test_quick_interpreter.py` fails.
"""

import dataclasses
import functools
import os


def prepare_once(interpreter) -> None:
    """Replace `_patch_lang` of Triton's module `interpreter` by one that skips modules that are prepared already."""
    usual = interpreter._patch_lang
    # by a module's variables, which are kept: which of `tl` and `tl.core` it sees
    languages: dict[int, tuple[dict, frozenset[int]]] = {}
    prepared: set[int] = set()

    class Scope(interpreter._LangPatchScope):
        """What a launch restores when it ends: from then on nothing is prepared."""

        def restore(self) -> None:
            prepared.clear()
            super().restore()

    @functools.wraps(usual)
    def patch(fn):
        variables = fn.__globals__
        if id(variables) not in languages:
            known = (interpreter.tl, interpreter.tl.core)
            seen = frozenset(id(x) for x in variables.values() if any(x is y for y in known))
            languages[id(variables)] = variables, seen
        wanted = languages[id(variables)][1]
        if wanted and wanted <= prepared:
            return interpreter._LangPatchScope()
        scope = usual(fn)
        if not prepared:
            scope.__class__ = Scope
        prepared.update(wanted)
        return scope

    interpreter._patch_lang = patch


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "_LangPatchScope"):
        prepare_once(interpreter)
    builder = interpreter.interpreter_builder
    if getattr(builder.options, "sanitize_overflow", False) and not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
