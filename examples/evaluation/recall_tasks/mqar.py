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
"""Multi-query associative recall (Zoology, arXiv 2312.04927; repository HazyResearch/zoology).

Pairs of a key and a value, then the keys again, each once and in any order, and its value is asked for. Keys are
tokens 1 to V/2 - 1, values V/2 to V - 1, both without repetition in a sequence. A query stands at the first of two
tokens of the rest of the sequence; the place of each is drawn without repetition with probabilities in proportion to
`place ** (power - 1)`, so that most stand soon after the pairs. All other tokens of the rest are random, of the whole
vocabulary: what stands after a query is never its value, except by chance.

**Published protocol**, that of Based (arXiv 2402.18668, figure 2, in Zoology's repository): V = 8192, `power` 0.01,
training on length 64 with 4 pairs (100,000 sequences), 128/8, 256/16, 256/32 and 256/64 (20,000 each), tests of 1,000
sequences on 64/4, 64/8, 64/16, 128/32, 256/64, 512/128 and 1024/256, batches of 256, 32 epochs, learning rates
logspace(-3, -1.5, 4), widths 48 to 256, two layers without MLPs: a gated convolution of three tokens, and behind it the
attention or recurrence. Published are plots, in which recurrent models recall the more the larger their state is.
(Zoology's own figure, arXiv 2312.04927, trains on one length at a time, with tokens that are 0 where ours are random.)

**Not as published** are the models: both of our layers are attention or recurrence, each behind a convolution of three
tokens that is not gated, and all have MLPs, for equal parameters. So the published plots are no figures for them, and
*memory* counts one layer of the two. With a convolution a layer can join a key to its value; without it a Llama must
first learn to look one token back, which it did not in 1,600 steps of the size `cpu`.

In a small vocabulary random tokens would be keys and values all the time. At the size `cpu` the rest is token 0
instead, as in the repository's second configuration (`random_non_queries=False`).
"""

import numpy as np

from .task import UNSCORED, Examples, Part, Protocol, Task, without_replacement


def mqar(
    rng: np.random.Generator,
    count: int,
    vocabulary: int,
    training: bool,
    *,
    length: int,
    pairs: int,
    reassigned: int = 0,
    power: float = 0.01,
    random_rest: bool = True,
) -> Examples:
    """`count` sequences of `length` tokens; `reassigned` of the keys get a second value, see `forgetting_mqar.py`.

    Without `random_rest` the tokens that are no query are 0.

    Raises:
        `ValueError`: for more pairs than fit.
    """
    context = 2 * (pairs + reassigned)
    places = (length - context) // 2
    if places < pairs:
        raise ValueError(
            f"`pairs` must leave two tokens a query in {length} tokens, got {pairs} and {reassigned} again."
        )
    half = vocabulary // 2
    keys = without_replacement(rng, count, 1, half, pairs)
    values = without_replacement(rng, count, half, vocabulary, pairs + reassigned)
    ids = rng.integers(vocabulary, size=(count, length)) if random_rest else np.zeros((count, length), dtype=np.int64)
    again = without_replacement(rng, count, 0, pairs, reassigned)
    ids[:, 0:context:2] = np.concatenate([keys, np.take_along_axis(keys, again, axis=1)], axis=1)
    ids[:, 1:context:2] = values

    newest = values[:, :pairs].copy()
    np.put_along_axis(newest, again, values[:, pairs:], axis=1)
    at = context + 2 * _places(rng, count, places, pairs, power)
    np.put_along_axis(ids, at, keys, axis=1)
    labels = np.full((count, length), UNSCORED)
    np.put_along_axis(labels, at, newest, axis=1)
    return Examples(ids, labels)


def _places(rng: np.random.Generator, count: int, places: int, chosen: int, power: float) -> np.ndarray:
    """Without repetition, one after the other with the probabilities of those that are left: the order of exponential
    times with these rates."""
    rates = np.arange(1, places + 1) ** (power - 1.0)
    return (rng.exponential(size=(count, places)) / rates).argsort(axis=1)[:, :chosen]


def parts(*settings: tuple, **more) -> tuple[Part, ...]:
    """Parts of a length, a number of pairs and, for training, batches."""
    return tuple(
        Part(f"{length}/{pairs}", {"length": length, "pairs": pairs, **more}, *batches)
        for length, pairs, *batches in settings
    )


# 100,000 and 20,000 sequences in batches of 256
PUBLISHED_TRAIN = ((64, 4, 391), (128, 8, 78), (256, 16, 78), (256, 32, 78), (256, 64, 78))
PUBLISHED_TESTS = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
PUBLISHED_RATES = (1e-3, 10**-2.5, 1e-2, 10**-1.5)

TASK = Task(
    name="mqar",
    says="values of many keys",
    generate=mqar,
    answers=lambda vocabulary: vocabulary // 2,
    protocols={
        "cpu": Protocol(
            vocabulary=64,
            train=parts((32, 4, 3), (64, 8, 1), random_rest=False),
            tests=parts((32, 4), (64, 8), (64, 16), (128, 24), random_rest=False),
            steps=800,
            convolution=True,
        ),
        "full": Protocol(
            vocabulary=8192,
            train=parts(*PUBLISHED_TRAIN),
            tests=parts(*PUBLISHED_TESTS),
            batch=256,
            steps=32 * 703,
            learning_rates=PUBLISHED_RATES,
            widths=(64, 128, 256),
            distinct_batches=703,
            convolution=True,
            test_examples=1000,
        ),
        "smoke": Protocol(
            vocabulary=16,
            train=parts((16, 2)),
            batch=4,
            steps=3,
            learning_rates=(1e-2,),
            widths=(32,),
            convolution=True,
            test_examples=4,
        ),
    },
)
