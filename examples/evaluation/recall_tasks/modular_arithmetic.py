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
"""Modular arithmetic without brackets (arXiv 2411.12537, on the data of xLSTM, repository NX-AI/xlstm).

`3 * 4 - 2 + 1 =`, with numbers below the modulus and products before sums; at the sign of equality the result modulo
their number is asked for. Tokens are 0 for padding, 1 to 4 for `+ - * =`, and the numbers after them.

**Published protocol and figures**: see `state_tracking.py`, 10 tokens, so modulo 5; scaled accuracy beyond the
training length of a Transformer 0.031, of mLSTM 0.040, of DeltaNet 0.314 with steps up to 1 and 0.971 with steps up to
2.
"""

import numpy as np

from .state_tracking import protocols
from .task import UNSCORED, Examples, Task


PLUS, MINUS, TIMES, EQUALS, ZERO = 1, 2, 3, 4, 5


def modular_arithmetic(
    rng: np.random.Generator, count: int, vocabulary: int, training: bool, *, shortest: int, longest: int
) -> Examples:
    """`count` sequences, with their answer of an odd length from `shortest` to `longest`, each as likely, and of at
    least one number; padded at the right.

    Raises:
        `ValueError`: for bounds without an odd length between.
    """
    odd = [length for length in range(max(shortest, 3), longest + 1) if length % 2]
    if not odd:
        raise ValueError(f"`shortest` and `longest` must have an odd length between, got {shortest} and {longest}.")
    shortest_numbers, longest_numbers = odd[0] // 2, odd[-1] // 2
    modulus = vocabulary - ZERO
    numbers = rng.integers(modulus, size=(count, longest_numbers))
    signs = rng.integers(PLUS, EQUALS, size=(count, longest_numbers))
    last = rng.integers(shortest_numbers, longest_numbers + 1, size=(count, 1)) - 1
    places = np.arange(longest_numbers)

    # one pass, products first: `total` of what is finished, and the product that is still open, with its sign
    total, product = np.zeros(count, dtype=np.int64), numbers[:, 0].copy()
    for place in range(1, longest_numbers):
        sign, within = signs[:, place - 1], place <= last[:, 0]
        times = sign == TIMES
        total = np.where(within & ~times, (total + product) % modulus, total)
        factor = np.where(times, product, np.where(sign == MINUS, -1, 1))
        product = np.where(within, factor * numbers[:, place] % modulus, product)
    answers = (total + product) % modulus

    np.put_along_axis(signs, last, EQUALS, axis=1)
    ids = np.stack([numbers + ZERO, signs], axis=2)
    ids[places > last] = 0
    ids = ids.reshape(count, -1)
    labels = np.full(ids.shape, UNSCORED)
    np.put_along_axis(labels, 2 * last + 1, answers[:, None] + ZERO, axis=1)
    return Examples(ids, labels)


TASK = Task(
    name="modular-arithmetic",
    says="sums and products modulo 5, beyond the training length",
    generate=modular_arithmetic,
    answers=lambda vocabulary: vocabulary - ZERO,
    protocols=protocols(10),
    default=False,
)
