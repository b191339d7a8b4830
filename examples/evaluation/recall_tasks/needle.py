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
"""A single needle: one value in a long text is to be recalled, up to eight times the training length.

A needle of a key and a value stands somewhere in random tokens, the last token is the key again, and its value is
asked for. Keys are tokens 0 to V/4 - 1, one of them in a sequence; values and the text around are all other tokens, so
that nothing but the key before it marks the value. All places are as likely. It is the retrieval of one number by its
key that RULER (arXiv 2404.06654) calls S-NIAH, without a language around it: there are no figures to compare with.

**Protocol**: trained at one length, tested at once, twice, four and eight times that length, with the convolutions of
MQAR.
"""

import numpy as np

from .task import UNSCORED, Examples, Part, Protocol, Task


def needle(rng: np.random.Generator, count: int, vocabulary: int, training: bool, *, length: int) -> Examples:
    """`count` sequences of `length` tokens.

    Raises:
        `ValueError`: for a length without room for the needle and its question.
    """
    if length < 3:
        raise ValueError(f"`length` must be at least 3, got {length}.")
    keys = vocabulary // 4
    ids = rng.integers(keys, vocabulary, size=(count, length))
    place = rng.integers(length - 2, size=count)
    rows, key = np.arange(count), rng.integers(keys, size=count)
    ids[rows, place] = ids[:, -1] = key
    labels = np.full((count, length), UNSCORED)
    labels[:, -1] = ids[rows, place + 1]
    return Examples(ids, labels)


def _part(length: int, trained: int) -> Part:
    return Part(f"{length // trained}x", {"length": length})


def _tests(trained: int) -> tuple[Part, ...]:
    return tuple(_part(times * trained, trained) for times in (1, 2, 4, 8))


TASK = Task(
    name="needle",
    says="one value, up to 8 times the training length",
    generate=needle,
    answers=lambda vocabulary: vocabulary - vocabulary // 4,
    protocols={
        "cpu": Protocol(
            vocabulary=32,
            train=(_part(16, 16),),
            tests=_tests(16),
            batch=64,
            steps=800,
            test_examples=256,
            convolution=True,
            chunk=4,
        ),
        "full": Protocol(
            vocabulary=8192,
            train=(_part(1024, 1024),),
            tests=_tests(1024),
            batch=64,
            steps=10_000,
            convolution=True,
            learning_rates=(1e-3, 10**-2.5, 1e-2),
            widths=(128,),
            test_examples=1000,
        ),
        "smoke": Protocol(
            vocabulary=16,
            train=(_part(8, 8),),
            tests=_tests(8),
            batch=4,
            steps=3,
            learning_rates=(1e-2,),
            widths=(32,),
            test_examples=4,
        ),
    },
)
