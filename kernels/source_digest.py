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
"""A digest of what a kernel says, by which a report knows whether a row is of today's kernel.

Triton's own key has the line that a function stands on, and its comments: it changes where the program does not.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable

import triton
from triton import language as tl


def source_digest(kernel: triton.JITFunction) -> str:
    """Twelve hexadecimal digits of a kernel's code, that of all the functions it calls, and the constants they name.

    Comments, docstrings, layout and order of the functions do not count, and neither does Triton: what a launch passes
    has to be known besides.

    Raises:
        `TypeError`: for a name that stands for anything else, as a module of one's own, whose changes would go unseen.
    """
    parts: dict[str, str] = {}
    _collect(kernel, parts)
    text = "\n".join(parts[name] for name in sorted(parts))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]


def _collect(function: triton.JITFunction, parts: dict[str, str]) -> None:
    name = f"{function.fn.__module__}.{function.fn.__qualname__}"
    if name in parts:
        return
    tree = _code(function.fn)
    parts[name] = ast.unparse(tree)
    known = inspect.getclosurevars(function.fn).nonlocals | function.fn.__globals__
    for used in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & set(known)):
        value = known[used]
        if isinstance(value, triton.JITFunction):
            _collect(value, parts)
        elif isinstance(value, (tl.constexpr, bool, int, float, str)):
            value = value.value if isinstance(value, tl.constexpr) else value
            parts[f"{name}, {used}"] = repr(value)
        elif isinstance(value, type) and issubclass(value, tuple):  # what a kernel's functions hand over together
            parts[f"{value.__module__}.{value.__qualname__}"] = ast.unparse(_code(value))
        elif not _of_triton(value):
            raise TypeError(
                f"`{used}` in {name} is neither a kernel's function nor a number, got {type(value).__name__}."
            )


def _code(of: Callable) -> ast.Module:
    tree = ast.parse(textwrap.dedent(inspect.getsource(of)))
    (definition,) = tree.body
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:] or [ast.Pass()]
    return tree


def _of_triton(value: object) -> bool:
    home = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
    return home is not None and home.partition(".")[0] == "triton"


__all__ = ["source_digest"]
