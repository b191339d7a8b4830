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
"""MAD's selective copying (arXiv 2403.17844): tokens among blanks are to be said again in their order.

The last token but one is a blank, the last one asks for the copy. Blanks stand before the tokens to be copied, as many
before each as chance wants; then comes the token that asks, and a blank for every answer.

**Published protocol**: 16 tokens, length 256, 16 tokens to be copied, see `mad.py` for the training.
"""

import numpy as np

from .mad import protocols
from .task import UNSCORED, Examples, Task


def selective_copying(
    rng: np.random.Generator, count: int, vocabulary: int, training: bool, *, length: int, copied: int
) -> Examples:
    """`count` sequences of `length` tokens with `copied` among them.

    Raises:
        `ValueError`: for more than fit.
    """
    blanks = length - 2 * copied - 1
    if copied < 1 or blanks < 1:
        raise ValueError(f"`copied` must be from 1 to {(length - 2) // 2} in {length} tokens, got {copied}.")
    blank, ask = vocabulary - 2, vocabulary - 1
    tokens = rng.integers(blank, size=(count, copied))
    before = rng.multinomial(blanks, np.full(copied, 1 / copied), size=count)
    ids = np.full((count, length), blank)
    np.put_along_axis(ids, np.arange(copied) + before.cumsum(axis=1), tokens, axis=1)
    ids[:, copied + blanks] = ask
    labels = np.full((count, length), UNSCORED)
    labels[:, -copied:] = tokens
    return Examples(ids, labels)


TASK = Task(
    name="selective-copying",
    says="tokens between blanks, in their order (MAD)",
    generate=selective_copying,
    answers=lambda vocabulary: vocabulary - 2,
    protocols=protocols(
        16, {"length": 256, "copied": 16}, {"length": 64, "copied": 8}, 16, {"length": 16, "copied": 2}, 8
    ),
    default=False,
)
