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
"""A key for what is derived from parameters and kept: equal while nobody has changed them."""

from collections.abc import Iterable

from torch import nn


def weights_version(parameters: Iterable[nn.Parameter]) -> tuple:
    """Which values parameters have: equal only while nobody has changed or replaced them. Changes through `.data`, which
    PyTorch does not count, go unnoticed. Parameters made in inference mode have no count, and are equal to nothing."""
    return tuple((id(p), p.data_ptr(), float("nan") if p.is_inference() else p._version) for p in parameters)
