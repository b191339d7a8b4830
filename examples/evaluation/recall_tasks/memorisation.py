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
"""MAD's memorisation (arXiv 2403.17844): one map from keys to values for all sequences, to be learned by the weights.

A sequence is a key, the last token of the vocabulary, a key, that token again, and so on; at each of these tokens the
value of the key before is asked for. Nothing in the sequence tells it.

**Published protocol**: 256 tokens, length 32, 256 training sequences, see `mad.py` for the training.
"""

import numpy as np

from .mad import protocols
from .task import UNSCORED, Examples, Task


MAP_SEED = 12345


def map_of(vocabulary: int) -> np.ndarray:
    """The value of every key, no two the same."""
    keys, tokens = (vocabulary - 1) // 2, vocabulary - 1
    return np.random.default_rng([MAP_SEED, vocabulary]).permutation(np.arange(keys, tokens))[:keys]


def memorisation(rng: np.random.Generator, count: int, vocabulary: int, training: bool, *, length: int) -> Examples:
    """`count` sequences of `length` tokens, every second one a key.

    Raises:
        `ValueError`: for an odd length.
    """
    if length % 2:
        raise ValueError(f"`length` must be even, got {length}.")
    values = map_of(vocabulary)
    keys = rng.integers(len(values), size=(count, length // 2))
    ids = np.full((count, length), vocabulary - 1)
    ids[:, ::2] = keys
    labels = np.full((count, length), UNSCORED)
    labels[:, 1::2] = values[keys]
    return Examples(ids, labels)


TASK = Task(
    name="memorisation",
    says="values that only training can tell (MAD)",
    generate=memorisation,
    answers=lambda vocabulary: (vocabulary - 1) // 2,
    protocols=protocols(256, {"length": 32}, {"length": 32}, 64, {"length": 8}, 16, batches=2),
    default=False,
)
