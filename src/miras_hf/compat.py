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
"""What Transformers names differently from version to version, and the refusal of names that nobody knows.

Transformers 5.24 renamed the models' argument and output `past_key_values` to `cache`. Models here take both names on
every version, hand on the one that the installed version knows, and refuse keywords that they do not understand: a
renaming that this file does not know ends in an error that names it, and never in a model that decodes without a memory.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast


CACHE_NAMES = ("cache", "past_key_values")


def _name_of_installed_version() -> str:
    fields = [field.name for field in dataclasses.fields(BaseModelOutputWithPast)]
    for name in CACHE_NAMES:
        if name in fields:
            return name
    raise ImportError(
        f"Transformers {transformers.__version__} calls the cache of a model by a name that this version of miras-hf does "
        f"not know: it is none of {CACHE_NAMES}, and outputs have {fields}. Install a version of Transformers that "
        "miras-hf was tested with."
    )


CACHE_NAME = _name_of_installed_version()
"""How the installed version of Transformers calls the argument and the output: `cache`, or `past_key_values`."""


def cache_named(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments whose cache is called `name`, whichever of `CACHE_NAMES` it had. Warns of the old name where the
    installed version does.

    Raises:
        `ValueError`: if there are two caches.
    """
    renamed = {key: value for key, value in arguments.items() if key not in CACHE_NAMES}
    given = [arguments[key] for key in CACHE_NAMES if key in arguments]
    caches = [cache for cache in given if cache is not None]
    if len(caches) > 1:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: give one of them, not both.")
    if CACHE_NAME == "cache" and "past_key_values" in arguments and not torch.compiler.is_compiling():
        warnings.warn("`past_key_values` is deprecated in Transformers 5.24, use `cache` instead.", FutureWarning, 3)
    if given:
        renamed[name] = caches[0] if caches else None
    return renamed


def cache_of(output: Any) -> Any:
    """The cache in the output of a model, whichever name it has there."""
    return getattr(output, CACHE_NAME)


def takes_cache(function: Callable) -> Callable:
    """Decorates a function with an argument `cache`: it takes `past_key_values`, too, and its signature shows both, which
    `generate()` and `Trainer` read."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    other = inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY, default=None)
    end = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        return function(*args, **cache_named("cache", kwargs))

    wrapped.__signature__ = signature.replace(parameters=[*parameters[:end], other, *parameters[end:]])  # ty: ignore[missing-attribute]
    return wrapped


def refuse_unknown(function: str, arguments: Mapping[str, Any], known: Mapping[str, tuple]) -> None:
    """
    Raises a `TypeError` for a keyword that no part of a model consumes, as Python does for functions without `**kwargs`.

    Args:
        function (`str`): whose keywords they are.
        arguments (`dict`): the keywords that are left over.
        known (`dict` of `str` to `tuple`): keywords that are understood, with the values that are; an empty tuple stands
            for any value.
    """
    for name, value in arguments.items():
        if name not in known:
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}. Besides its parameters it takes "
                f"{', '.join(sorted(known))}."
            )
        if known[name] and not any(value is allowed for allowed in known[name]):
            raise ValueError(f"`{name}` must be one of {known[name]} for {function}(), got {value!r}.")
