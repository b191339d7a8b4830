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
"""MAD's in-context recall (arXiv 2403.17844): a key that was shown before is shown again, and its value is to be said.

A sequence is pairs of a key and a value, keys from the first half of the vocabulary and values from the second. Each
sequence has a map of its own from keys to values. Keys are drawn with repetition; the last pair's key is one of those
before. A test asks, at every key that the sequence had before, for its value. Training is on all next tokens, as
published: keys and first values are noise to it.

**Published protocol**: 16 tokens, length 128, see `mad.py` for the training.
"""

import numpy as np

from .mad import protocols
from .task import UNSCORED, Examples, Task, seen_before


def in_context_recall(
    rng: np.random.Generator,
    count: int,
    vocabulary: int,
    training: bool,
    *,
    length: int,
    noise: float = 0.0,
    noise_vocabulary: int = 0,
) -> Examples:
    """`count` sequences of `length - 1` tokens, the last of which is a key; see `noisy_recall.py` for the noise.

    Raises:
        `ValueError`: for an odd length, or noise without a vocabulary.
    """
    if length % 2 or length < 4:
        raise ValueError(f"`length` must be even and at least 4, got {length}.")
    if noise > 0 and noise_vocabulary < 1:
        raise ValueError(f"`noise_vocabulary` must be at least 1 with `noise` {noise}, got {noise_vocabulary}.")
    pairs, tokens = length // 2, vocabulary - noise_vocabulary
    half = tokens // 2
    values_of = rng.integers(half, tokens, size=(count, half))
    keys = rng.integers(half, size=(count, pairs))
    noisy = rng.random((count, pairs)) < noise
    rows = np.arange(count)
    noisy[rows, rng.integers(pairs - 1, size=count)] = False  # there is something to ask for
    noisy[:, -1] = False
    # the last key is one of those that the row has shown, each as likely, however often it was shown
    shown = np.zeros((count, half), dtype=bool)
    shown[np.nonzero(~noisy[:, :-1])[0], keys[:, :-1][~noisy[:, :-1]]] = True
    keys[:, -1] = np.where(shown, rng.random((count, half)), -1.0).argmax(axis=1)

    ids = np.stack([keys, np.take_along_axis(values_of, keys, axis=1)], axis=2)
    # noise is no key: a key of its own, which no other place has
    asked = seen_before(np.where(noisy, half + np.arange(pairs), keys)) & ~noisy
    labels = np.full((count, pairs, 2), UNSCORED)
    labels[:, :, 0] = np.where(asked, ids[:, :, 1], UNSCORED)
    if noise_vocabulary:
        ids = np.where(noisy[:, :, None], rng.integers(tokens, vocabulary, size=ids.shape), ids)
    ids, labels = ids.reshape(count, length), labels.reshape(count, length)
    return Examples(ids[:, :-1], ids[:, 1:] if training else labels[:, :-1])


TASK = Task(
    name="in-context-recall",
    says="values of keys, one vocabulary for all of training (MAD)",
    generate=in_context_recall,
    answers=lambda vocabulary: vocabulary - vocabulary // 2,
    protocols=protocols(16, {"length": 128}, {"length": 64}, 16, {"length": 16}, 8),
    default=False,
)
