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
"""Triton kernels for memories that learn while they read (Miras, arXiv 2504.13173).

Knows of tensors only, of no models. Importing it needs no Triton and touches no driver.
"""

from .choices import Choices
from .configuration import launch_configuration
from .decoding import LARGEST_CALL, Projections, decode, resident_state
from .ops import forward, refusal


__all__ = [
    "LARGEST_CALL",
    "Choices",
    "Projections",
    "decode",
    "forward",
    "launch_configuration",
    "refusal",
    "resident_state",
]
