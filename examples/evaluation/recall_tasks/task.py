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
"""What a task of the recall study is made of: examples, the settings of a size, and who may answer what."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


UNSCORED = -100
"""The label of a position where nothing is asked."""


@dataclass(frozen=True)
class Examples:
    """Sequences and what is asked about them.

    Args:
        ids (`numpy.ndarray` of shape `[count, length]`): tokens.
        labels (`numpy.ndarray` of shape `[count, length]`):
            What the model shall say *at* a position, which is not shifted: the answer at the last token of a question.
            `UNSCORED` where nothing is asked.
    """

    ids: np.ndarray
    labels: np.ndarray

    def __post_init__(self):
        if self.ids.shape != self.labels.shape or self.ids.ndim != 2:
            raise ValueError(
                f"`ids` and `labels` must have one shape [count, length], got {self.ids.shape} and {self.labels.shape}."
            )


@dataclass(frozen=True)
class Part:
    """One setting of a task's generator.

    Args:
        name (`str`): what the report calls it.
        settings (`dict`): the generator's keywords.
        batches (`int`): of a hundred training batches, or of whatever sum, how many are of this part.
    """

    name: str
    settings: dict[str, Any]
    batches: int = 1


@dataclass(frozen=True)
class Protocol:
    """What a task is at one size of the study.

    Args:
        vocabulary (`int`): tokens that there are.
        train (`tuple` of `Part`): what is trained on; a batch is of one part.
        tests (`tuple` of `Part`): what is scored, each for itself; by default what is trained on.
        batch (`int`): sequences a training step.
        steps (`int`): training steps.
        learning_rates, weight_decays (`tuple` of `float`): the grid.
        widths (`tuple` of `int`): of the models, more than one where accuracy is wanted against the state's size.
        layers (`int`): of the models.
        convolution (`bool`): whether a short causal convolution stands before every layer's memory or attention.
        distinct_batches (`int`, *optional*): size of the training set, in batches; `None` for a new one each step.
        test_examples (`int`): sequences a part, of the validation and of the test set.
        chunk (`int`, *optional*):
            Of the models, where training sequences are too short for the size's: a memory that was trained within one
            chunk has never met a chunk's end.
    """

    vocabulary: int
    train: tuple[Part, ...]
    tests: tuple[Part, ...] = ()
    batch: int = 32
    steps: int = 400
    learning_rates: tuple[float, ...] = (2e-3, 4e-3)
    weight_decays: tuple[float, ...] = (0.1,)
    widths: tuple[int, ...] = (64,)
    layers: int = 2
    convolution: bool = False
    distinct_batches: int | None = None
    test_examples: int = 256
    chunk: int | None = None

    def __post_init__(self):
        if not self.tests:
            object.__setattr__(self, "tests", self.train)


@dataclass(frozen=True)
class Task:
    """A task of the study.

    Args:
        name (`str`): its name.
        says (`str`): what it asks, in a few words.
        generate (`Callable`):
            `generate(rng, count, vocabulary, training, **settings)` returns `count` `Examples`. Those for training may
            have labels where nothing is scored in a test, if the published protocol trains so.
        answers (`Callable`): of the vocabulary, between how many tokens a guess without any knowledge of the sequence
            chooses.
        protocols (`dict`): a `Protocol` for every size.
        reads_last_state (`bool`): whether answers are decoded from the last position's output alone, as in MAD's
            compression, instead of from each position's.
        default (`bool`): whether it runs unless it is named.
    """

    name: str
    says: str
    generate: Callable[..., Examples]
    answers: Callable[[int], int]
    protocols: dict[str, Protocol] = field(repr=False)
    reads_last_state: bool = False
    default: bool = True

    def chance(self, size: str) -> float:
        """Accuracy of a guess at a size."""
        return 1.0 / self.answers(self.protocols[size].vocabulary)


def without_replacement(rng: np.random.Generator, count: int, low: int, high: int, chosen: int) -> np.ndarray:
    """`[count, chosen]` whole numbers from `low` to below `high`, all different in a row.

    Raises:
        `ValueError`: for more than there are.
    """
    if chosen > high - low:
        raise ValueError(
            f"`chosen` must be at most {high - low}, the numbers from {low} to below {high}, got {chosen}."
        )
    return low + np.stack([rng.choice(high - low, chosen, replace=False) for _ in range(count)])


def seen_before(keys: np.ndarray) -> np.ndarray:
    """`[count, places]` of whether the row has the same key at an earlier place."""
    count, places = keys.shape
    rows, seen = np.arange(count), np.zeros((count, keys.max(initial=0) + 1), dtype=bool)
    before = np.empty_like(keys, dtype=bool)
    for place in range(places):
        before[:, place] = seen[rows, keys[:, place]]
        seen[rows, keys[:, place]] = True
    return before


__all__ = ["UNSCORED", "Examples", "Part", "Protocol", "Task", "seen_before", "without_replacement"]
