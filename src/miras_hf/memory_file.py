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
"""The file of a saved memory: a header and tensors in one safetensors file, of which nothing is taken on trust.

Anybody can write such a file and its checksum. Whatever is read is looked at before anything is made from it: every
field of the header, and name, dtype, shape and values of every tensor.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .files import atomic_write


FORMAT_VERSION = 1
HEADER = "miras_memory"

# Positions are below it, as `max_position_embeddings` of a config.
MOST_TOKENS = 2**31 - 1
DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
# what safetensors calls those that can be in a file, bool and int64 besides
_STORED_DTYPES = {"F16", "BF16", "F32", "F64", "I64", "BOOL"}


@dataclass(frozen=True)
class Header:
    """
    What a file says of itself.

    Args:
        rows (`int`): rows of the batch.
        tokens (`int`): length of the text read, pads included.
        dtype (`str`): the dtype of the model that has read, one of `DTYPES`.
        config (`dict`): the fields of its config that matter.
        weights (`str`, *optional*): digest of its weights.
        version (`int`): of the format.
    """

    rows: int
    tokens: int
    dtype: str
    config: dict[str, Any]
    weights: str | None
    version: int = FORMAT_VERSION

    def check(self, source: str) -> None:
        """Raises a `ValueError` that names `source`, the field, its value and what is allowed."""
        for name, most in (("rows", MOST_TOKENS), ("tokens", MOST_TOKENS)):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{source}: `{name}` must be an integer from 1 to {most}, got {_short(value)}.")
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(f"{source}: `dtype` must be one of {sorted(DTYPES)}, got {_short(self.dtype)}.")
        if not isinstance(self.config, dict):
            raise ValueError(f"{source}: `config` must be an object of fields, got {_short(self.config)}.")
        digest = self.weights is None or (
            isinstance(self.weights, str) and len(self.weights) == 64 and set(self.weights) <= set("0123456789abcdef")
        )
        if not digest:
            raise ValueError(
                f"{source}: `weights` must be a SHA-256 digest, 64 hexadecimal digits, or null, got {_short(self.weights)}."
            )


@dataclass(frozen=True)
class Expected:
    """
    What a tensor of a file must be.

    Args:
        shape (`list[int]`): its shape.
        dtypes (`tuple[torch.dtype]`): those that are allowed.
        low, high (`float`, *optional*): bounds of its values, which are finite in any case.
    """

    shape: list[int]
    dtypes: tuple[torch.dtype, ...] = field(default_factory=tuple)
    low: float | None = None
    high: float | None = None


def check_tensors(source: str, tensors: dict[str, Tensor], expected: dict[str, Expected]) -> None:
    """Raises a `ValueError` unless the tensors are those expected, no more and no fewer, in shape, dtype and values."""
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    shapes = {name: wanted.shape for name, wanted in expected.items()}
    wrong = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{source} does not hold this model's state: {name} has shape {found.get(name)}, and {shapes.get(name)} "
            f"is needed ({len(wrong)} tensors differ)."
        )
    for name, wanted in expected.items():
        tensor = tensors[name]
        if tensor.dtype not in wanted.dtypes:
            allowed = " or ".join(map(str, wanted.dtypes))
            raise ValueError(f"{source}: {name} must be {allowed}, got {tensor.dtype}.")
        if not tensor.numel():
            continue
        least, most = (bound.item() for bound in tensor.aminmax()) if tensor.dtype != torch.bool else (0, 1)
        if not (-float("inf") < least and most < float("inf")):
            raise ValueError(f"{source}: {name} must be finite, got values from {least} to {most}.")
        if (wanted.low is not None and least < wanted.low) or (wanted.high is not None and most > wanted.high):
            raise ValueError(
                f"{source}: {name} must lie between {wanted.low} and {wanted.high}, got values from {least} to {most}."
            )


def write_memory_file(path: str | os.PathLike, header: Header, tensors: dict[str, Tensor]) -> None:
    """Writes a file, whole or not at all."""
    values = vars(header)
    values = values | {"checksum": _checksum(values, tensors)}
    # not `save_file`, which leaves a temporary of its own when it is killed
    content = save(tensors, metadata={"format": "pt", HEADER: json.dumps(values)})
    with atomic_write(path) as file:
        file.write(content)


def read_memory_file(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of a file, unchanged since it was written.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it is another file, or a field of the header is not what it must be.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a file of `save_memory`, got a folder or device.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if HEADER not in metadata:
                raise ValueError(
                    f"{path} is a safetensors file without a memory in it: it was not made by `save_memory`."
                )
            names = list(file.keys())
            for name in names:
                dtype = file.get_slice(name).get_dtype()
                if dtype not in _STORED_DTYPES:
                    raise ValueError(f"{path}: {name} must be one of {sorted(_STORED_DTYPES)}, got {dtype}.")
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): cut short, or something else?") from error
    damaged = f"{path} is damaged: what it holds has changed since `save_memory` wrote it."
    try:
        values = json.loads(metadata[HEADER])
        version, checksum = values["version"], values.pop("checksum")
        if type(version) is int and version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has version {version} of the format, this miras-hf reads version {FORMAT_VERSION}: read the "
                "text again, or use the version of miras-hf that wrote it."
            )
        unchanged = checksum == _checksum(values, tensors)
    except json.JSONDecodeError as error:
        raise ValueError(damaged) from error
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(damaged) from error
    if not unchanged:
        raise ValueError(damaged)
    fields = {*Header.__dataclass_fields__}
    if values.keys() != fields or type(version) is not int:
        raise ValueError(
            f"{path}: the header must have the fields {sorted(fields)}, `version` an integer, got "
            f"{ {name: _short(value) for name, value in sorted(values.items())} }."
        )
    header = Header(**values)
    header.check(str(path))
    return header, tensors


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _checksum(values: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor))
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
