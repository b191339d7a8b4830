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
"""The synthetic tasks of `recall.py`, one file each, whose docstring has the source and the published protocol."""

from . import (
    compression,
    forgetting_mqar,
    fuzzy_recall,
    in_context_recall,
    memorisation,
    modular_arithmetic,
    mqar,
    needle,
    noisy_recall,
    parity,
    selective_copying,
)
from .task import UNSCORED, Examples, Part, Protocol, Task


TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        mqar,
        forgetting_mqar,
        compression,
        in_context_recall,
        fuzzy_recall,
        noisy_recall,
        selective_copying,
        memorisation,
        parity,
        modular_arithmetic,
        needle,
    )
}

__all__ = ["TASKS", "UNSCORED", "Examples", "Part", "Protocol", "Task"]
