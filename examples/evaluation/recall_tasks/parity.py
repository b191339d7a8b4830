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
"""Parity (arXiv 2411.12537, on the data of xLSTM, repository NX-AI/xlstm): whether the ones of a sequence are even.

Tokens are 0 for padding, 1 for a zero and 2 for a one; at the last bit the answer is asked for, 1 for an even number
of ones and 2 for an odd one. A state that is only ever scaled by positive numbers cannot keep it.

**Published protocol and figures**: see `state_tracking.py`; scaled accuracy beyond the training length of a
Transformer 0.022, of mLSTM 0.087, of DeltaNet 0.017 with steps up to 1 and 1.000 with steps up to 2.
"""

import numpy as np

from .state_tracking import protocols
from .task import UNSCORED, Examples, Task


def parity(
    rng: np.random.Generator, count: int, vocabulary: int, training: bool, *, shortest: int, longest: int
) -> Examples:
    """`count` sequences of `shortest - 1` to `longest - 1` bits, each length as likely, padded at the right.

    Raises:
        `ValueError`: for bounds without a bit between.
    """
    if not 2 <= shortest <= longest:
        raise ValueError(f"`shortest` must be from 2 to `longest` = {longest}, got {shortest}.")
    bits = rng.integers(2, size=(count, longest - 1))
    last = rng.integers(shortest, longest + 1, size=(count, 1)) - 2
    bits[np.arange(longest - 1) > last] = 0
    ids = np.where(np.arange(longest - 1) > last, 0, bits + 1)
    labels = np.full(ids.shape, UNSCORED)
    np.put_along_axis(labels, last, bits.sum(axis=1, keepdims=True) % 2 + 1, axis=1)
    return Examples(ids, labels)


TASK = Task(
    name="parity",
    says="whether ones are even, beyond the training length",
    generate=parity,
    answers=lambda vocabulary: 2,
    protocols=protocols(3),
)
