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
"""What a field of a config may hold, stated once beside its default."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from numbers import Real
from typing import Any

import torch
from huggingface_hub.dataclasses import validated_field
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from .config_keywords import MEANINGLESS
from .memory.declared import Parameter
from .memory.registry import CHOICES, REGISTERED_BY, declared_keys


def bounded(
    default: float | None, low: float | None = None, high: float | None = None, *, above: float | None = None
) -> Any:
    """A field for a number with `low <= value <= high`, or `above < value <= high`; also at every later assignment.

    NaN is within no bounds. `None` passes: whether it may be there is the annotation's matter.
    """
    return _field(Parameter("", default, low, high, above), default)


def declared(key: str, default: Any = MISSING) -> Any:
    """A field for what choices of `miras_hf.memory` take under this name, as they declare it.

    Args:
        default (*optional*): another default than theirs.
    """
    found = declared_keys()[key]
    return _field(found, found.default if default is MISSING else default)


def choice(field: str, default: str, part_of: tuple[str, ...] = ()) -> Any:
    """A field for the name of one of the four choices.

    Args:
        field (`str`): its name, a key of `CHOICES`.
        part_of (`tuple` of `str`): names of classes that other fields choose among those of one name.
    """

    def validate(name: Any) -> None:
        names = [known for known in CHOICES[field] if known not in part_of]
        if name not in names:
            own = f", or registered by `miras_hf.memory.{REGISTERED_BY[field]}`" if field in REGISTERED_BY else ""
            raise ValueError(f"must be one of {', '.join(map(repr, names))}{own}, got {name}")

    return validated_field(validate, default=default)


def _field(parameter: Parameter, default: Any) -> Any:
    def validate(value: Any) -> None:
        refusal = None if value is None else parameter.refusal(value)
        if refusal is not None:
            raise ValueError(refusal)

    return validated_field(validate, default=default)


def token_ids(default: int | None) -> Any:
    """A field for the id of a special token, or for several."""

    def validate(value: Any) -> None:
        wrong = [i for i in (value if isinstance(value, list) else [value]) if i is not None and not 0 <= i < 2**31]
        if wrong:
            raise ValueError(f"must be at least 0 and below 2**31, or None for no such token, got {value}")

    return validated_field(validate, default=default)


def check_dtype(dtype: Any) -> None:
    """Raises a `ValueError` unless it is `None` or a floating point dtype, or the name of one, or `"auto"`, by which
    `transformers serve` asks for a checkpoint's own."""
    if isinstance(dtype, str) and dtype == "auto":
        return
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"`dtype` must be a floating point dtype of PyTorch or the name of one, got {dtype!r}.")


def check_rope_parameters(parameters: Any) -> None:
    """Raises a `ValueError` unless rotary embeddings of one known kind, for all layers, follow from them."""
    kinds = ["default", *ROPE_INIT_FUNCTIONS]
    if not isinstance(parameters, dict):
        raise ValueError(f"`rope_parameters` must be a dict with `rope_type` and `rope_theta`, got {parameters!r}.")
    if parameters.get("rope_type") not in kinds:
        raise ValueError(
            f"`rope_parameters['rope_type']` must be one of {kinds}, got {parameters.get('rope_type')!r}."
        )
    # the length of the pretraining texts says something about a checkpoint without scaling too
    plain = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    known = plain if parameters["rope_type"] == "default" else (*plain, *RopeParameters.__annotations__)
    unknown = sorted(parameters.keys() - set(known) | parameters.keys() & {"mrope_section"})
    if unknown:
        raise ValueError(
            f"`rope_parameters` of type {parameters['rope_type']!r} must have keys of {sorted({*known})}, got {unknown}."
        )
    for name, value in parameters.items():
        if name in ("rope_type", "type") or value is None:
            continue
        if name == "partial_rotary_factor" and value != 1:
            raise ValueError(f"`rope_parameters[{name!r}]` must be 1, got {value!r}: {MEANINGLESS[name]}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool):
                continue
            if not isinstance(number, Real) or not math.isfinite(number) or number <= 0:
                raise ValueError(f"`rope_parameters[{name!r}]` must be positive and finite, got {value!r}.")
    theta = parameters.get("rope_theta")
    if isinstance(theta, bool) or theta is None or theta > 1e30:
        raise ValueError(f"`rope_parameters['rope_theta']` must be above 0 and at most 1e30, got {theta!r}.")


def check_layer_indices(indices: Mapping[str, Iterable[int]], layers: int) -> None:
    """Raises a `ValueError` unless they are different layers of the model.

    Args:
        indices (`dict`): layers by the field that names them.
        layers (`int`): how many the model has.
    """
    named_by: dict[int, str] = {}
    for name, of_one_kind in indices.items():
        of_one_kind = list(of_one_kind)
        wrong = [i for i in of_one_kind if not 0 <= i < layers]
        if wrong:
            raise ValueError(f"`{name}` must be indices below {layers}, got {wrong}.")
        if len(set(of_one_kind)) < len(of_one_kind):
            raise ValueError(f"`{name}` must be different layers, got {of_one_kind}.")
        twice = sorted(named_by.keys() & set(of_one_kind))
        if twice:
            raise ValueError(f"`{name}` must be other layers than `{named_by[twice[0]]}`, got {twice} in both.")
        named_by |= dict.fromkeys(of_one_kind, name)
