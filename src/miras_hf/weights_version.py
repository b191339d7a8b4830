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
"""A key for what is derived from parameters and kept: it holds while nobody has changed or replaced them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class WeightsVersion:
    """Which values parameters had. It can be held by what outlives them: it keeps no parameter alive, and never holds for
    others that lie where they have lain. A copy is the key itself; what was pickled holds for nothing, and becomes `None`.

    Numbers alone would not do: addresses, `id` and versions come again. Of a parameter the key has a mark that is set on
    the very object, of its storage a weak reference. (Weak references to parameters would keep `Module.to` from swapping
    them.)
    """

    __slots__ = ("_parts",)

    def __init__(self, parameters: Iterable[Tensor]):
        self._parts = [(_mark(p), StorageWeakRef(p.untyped_storage()), p.data_ptr(), _count(p)) for p in parameters]

    def holds_for(self, parameters: Iterable[Tensor]) -> bool:
        """Whether these are the parameters, unchanged."""
        parameters = list(parameters)
        return len(parameters) == len(self._parts) and all(
            mark is getattr(p, _MARK, None)
            and count is not None
            and count == _count(p)
            # an address in a storage that is alive is of that storage
            and address == p.data_ptr()
            and not storage.expired()
            for (mark, storage, address, count), p in zip(self._parts, parameters, strict=True)
        )

    def __copy__(self) -> "WeightsVersion":
        return self

    def __deepcopy__(self, memo: dict) -> "WeightsVersion":
        return self

    def __reduce__(self) -> tuple[Any, tuple]:
        return type(None), ()


def weights_version(parameters: Iterable[Tensor], known: WeightsVersion | None = None) -> WeightsVersion:
    """The version of parameters: `known`, if they are still as they were, or a new one. Changes through `.data` that PyTorch
    does not count go unnoticed. Parameters made in inference mode have no count: their version never holds."""
    parameters = list(parameters)
    return known if known is not None and known.holds_for(parameters) else WeightsVersion(parameters)


_MARK = "_miras_weights_version"


def _mark(parameter: Tensor) -> list:
    # a list, since every list is itself alone: no copy of the parameter has the mark, nor one that was loaded
    if not hasattr(parameter, _MARK):
        setattr(parameter, _MARK, [])
    return getattr(parameter, _MARK)


def _count(parameter: Tensor) -> int | None:
    return None if parameter.is_inference() else parameter._version
