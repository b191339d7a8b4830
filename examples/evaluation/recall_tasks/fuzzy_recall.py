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
"""MAD's fuzzy in-context recall (arXiv 2403.17844): keys and values are one to three tokens long.

The last token pads at the left. Of the others the first half makes keys and the rest values: sequences of one to three
different tokens, drawn anew for each pair, with a map of the sequence's own from keys to values. A key that the
sequence had before is followed by its value, whose every token a test asks for. The last pair has been shown before.
In a test all keys are three tokens long; training has all lengths, and all next tokens as targets, pads aside.

A pair that is asked for at the end always stands in the sequence; in the published generator it is left out when its
place is drawn behind the sequence's end, and then nothing can answer.

**Published protocol**: 16 tokens, length 128, up to three tokens, see `mad.py` for the training.
"""

import numpy as np

from .mad import protocols
from .task import UNSCORED, Examples, Task


def fuzzy_recall(
    rng: np.random.Generator, count: int, vocabulary: int, training: bool, *, length: int, longest: int = 3
) -> Examples:
    """`count` sequences of `length` tokens; keys and values have up to `longest`.

    Raises:
        `ValueError`: for a vocabulary without so long keys, or a length without room for three pairs.
    """
    half = (vocabulary - 1) // 2
    if longest > half:
        raise ValueError(f"`longest` must be at most the {half} tokens of keys, got {longest}.")
    if length < 6 * longest:
        raise ValueError(f"`length` must have room for three pairs, {6 * longest}, got {length}.")
    rows = [_row(rng, vocabulary, training, length, longest) for _ in range(count)]
    ids, labels = (np.array(part) for part in zip(*rows, strict=True))
    return Examples(ids, labels)


def _row(
    rng: np.random.Generator, vocabulary: int, training: bool, length: int, longest: int
) -> tuple[list[int], list[int]]:
    pad, half = vocabulary - 1, (vocabulary - 1) // 2

    def key() -> tuple[int, ...]:
        size = rng.integers(1, longest + 1) if training else longest
        return tuple(rng.permutation(half)[:size].tolist())

    def value() -> tuple[int, ...]:
        return tuple((half + rng.permutation(pad - half)[: rng.integers(1, longest + 1)]).tolist())

    values: dict[tuple[int, ...], tuple[int, ...]] = {}
    ids: list[int] = []
    targets: list[int] = []  # of each token, what a test asks the one before it for

    last, v_last = key(), value()

    def add(k: tuple[int, ...]) -> None:
        known = k in values
        if not known:
            values[k] = v_last if k == last else value()
        ids.extend(k + values[k])
        targets.extend([UNSCORED] * len(k) + (list(values[k]) if known else [UNSCORED] * len(values[k])))

    room = length + 1 - len(last) - len(v_last)  # before the last pair
    # the last pair is shown first at the next border of pairs from here, which there is: none is longer than two runs
    place = rng.integers(room - 4 * longest + 1)
    while len(ids) + 2 * longest <= room:
        add(last if len(ids) >= place and last not in values else key())
    add(last)
    left = length + 1 - len(ids)
    ids, targets = [pad] * left + ids, [UNSCORED] * left + targets
    if training:
        targets = [UNSCORED if token == pad else token for token in ids]
    return ids[:-1], targets[1:]


TASK = Task(
    name="fuzzy-recall",
    says="the same with keys and values of several tokens (MAD)",
    generate=fuzzy_recall,
    answers=lambda vocabulary: vocabulary - 1 - (vocabulary - 1) // 2,
    protocols=protocols(16, {"length": 128}, {"length": 48, "longest": 2}, 9, {"length": 24}, 10, cpu_steps=800),
    default=False,
)
