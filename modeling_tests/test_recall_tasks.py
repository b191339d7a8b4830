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
"""The recall study's tasks ask what they say: each is solved by a few lines that know nothing of its generator."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples" / "evaluation"), str(ROOT / "examples"), str(ROOT / "benchmarks")]

from recall_tasks import TASKS, UNSCORED, Examples, Protocol  # noqa: E402
from recall_training import SIZES as TRAINING_SIZES  # noqa: E402
from recall_training import TEST, VALIDATION, TrainingSet, examples_of  # noqa: E402


SIZES = ("smoke", "cpu", "full")
PARTS = [
    pytest.param(name, size, part, id=f"{name}-{size}-{part.name}")
    for name, task in TASKS.items()
    for size in SIZES
    for part in dict.fromkeys(p.name for p in task.protocols[size].tests)
    for part in [next(p for p in task.protocols[size].tests if p.name == part)]
]


def made(name: str, size: str, part, count: int = 20, training: bool = False, seed: int = 7) -> Examples:
    task = TASKS[name]
    vocabulary = task.protocols[size].vocabulary
    return task.generate(np.random.default_rng(seed), count, vocabulary, training, **part.settings)


def solve_mqar(ids: list[int], settings: dict, vocabulary: int) -> list[int]:
    pairs = settings["pairs"] + settings.get("reassigned", 0)
    values = {}
    for key, value in zip(ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True):
        assert 1 <= key < vocabulary // 2 <= value < vocabulary
        values[key] = value  # the newest
    assert len(values) == settings["pairs"]
    answers = [UNSCORED] * len(ids)
    # at every second place a key that has not been asked for yet, and by chance again a random token that is one
    for t in range(2 * pairs, len(ids), 2):
        if ids[t] in values:
            answers[t] = values[ids[t]]
    return answers


def solve_pairs(ids: list[int], settings: dict, vocabulary: int) -> list[int]:
    noise_from = vocabulary - settings.get("noise_vocabulary", 0)
    values, answers = {}, [UNSCORED] * len(ids)
    for t in range(0, len(ids), 2):
        if ids[t] < noise_from:
            answers[t] = values.get(ids[t], UNSCORED)
            if t + 1 < len(ids):
                assert values.setdefault(ids[t], ids[t + 1]) == ids[t + 1]
    return answers


def runs_of_kinds(tokens: list[int], pad: int) -> list[tuple[int, tuple[int, ...]]]:
    """Start and tokens of runs of keys' tokens, values' tokens, and pads."""
    kinds = [2 if token == pad else int(token >= pad // 2) for token in tokens]
    runs, start = [], 0
    for t in range(1, len(tokens) + 1):
        if t == len(tokens) or kinds[t] != kinds[start]:
            runs.append((kinds[start], start, tuple(tokens[start:t])))
            start = t
    return runs


def solve_fuzzy(ids: list[int], labels: list[int], settings: dict, vocabulary: int) -> list[int]:
    runs = runs_of_kinds([*ids, labels[-1]], vocabulary - 1)
    if runs[0][0] == 2:
        runs = runs[1:]
    assert [kind for kind, *_ in runs] == [0, 1] * (len(runs) // 2)
    values, answers, longest = {}, [UNSCORED] * len(ids), settings.get("longest", 3)
    for (_, _, key), (_, start, value) in zip(runs[::2], runs[1::2], strict=True):
        assert len(key) == len(set(key)) == longest and len(set(value)) == len(value) <= longest
        if key in values:
            assert values[key] == value
            answers[start - 1 : start - 1 + len(value)] = value
        values[key] = value
    return answers


def solve_copying(ids: list[int], settings: dict, vocabulary: int) -> list[int]:
    blank, ask, copied = vocabulary - 2, vocabulary - 1, settings["copied"]
    at = ids.index(ask)
    tokens = [token for token in ids[:at] if token != blank]
    assert len(tokens) == copied and ids[at + 1 :] == [blank] * copied
    return [UNSCORED] * (at + 1) + tokens


def solve_parity(ids: list[int], settings: dict, vocabulary: int) -> list[int]:
    state, answers = 1, [UNSCORED] * len(ids)
    last = max(t for t, token in enumerate(ids) if token)
    for token in ids[: last + 1]:
        assert token in (1, 2)
        state = {(1, 1): 1, (1, 2): 2, (2, 1): 2, (2, 2): 1}[state, token]
    answers[last] = state
    return answers


def solve_arithmetic(ids: list[int], settings: dict, vocabulary: int) -> list[int]:
    written = "".join("_+-*="[token] if token < 5 else str(token - 5) for token in ids)
    term, _, rest = written.partition("=")
    assert set(rest) <= {"_"}
    answers = [UNSCORED] * len(ids)
    answers[len(term)] = eval(term) % (vocabulary - 5) + 5
    return answers


def solve_needle(ids: list[int], settings: dict, vocabulary: int) -> list[int]:
    places = [t for t, token in enumerate(ids) if token < vocabulary // 4]
    assert len(places) == 2 and places[1] == len(ids) - 1 and ids[places[0]] == ids[-1]
    return [UNSCORED] * (len(ids) - 1) + [ids[places[0] + 1]]


SOLVERS = {
    "mqar": solve_mqar,
    "forgetting-mqar": solve_mqar,
    "in-context-recall": solve_pairs,
    "noisy-recall": solve_pairs,
    "selective-copying": solve_copying,
    "compression": lambda ids, settings, vocabulary: [*ids[:-1], UNSCORED],
    "parity": solve_parity,
    "modular-arithmetic": solve_arithmetic,
    "needle": solve_needle,
}


@pytest.mark.parametrize("name, size, part", PARTS)
def test_a_solver_that_reads_the_sequence_knows_all_labels_and_no_other(name, size, part):
    vocabulary = TASKS[name].protocols[size].vocabulary
    examples = made(name, size, part)
    assert examples.ids.min() >= 0 and examples.ids.max() < vocabulary
    learned = {}
    if name == "memorisation":
        known = made(name, size, part, count=200, training=True, seed=8)
        learned = dict(zip(known.ids[:, ::2].flatten(), known.labels[:, 1::2].flatten(), strict=True))
        assert len(set(learned.values())) == len(learned) == (vocabulary - 1) // 2
    for ids, labels in zip(examples.ids.tolist(), examples.labels.tolist(), strict=True):
        assert any(label != UNSCORED for label in labels)
        if name == "memorisation":
            expected = [x for key in ids[::2] for x in (UNSCORED, learned[key])]
        elif name == "fuzzy-recall":
            expected = solve_fuzzy(ids, labels, part.settings, vocabulary)
        else:
            expected = SOLVERS[name](ids, part.settings, vocabulary)
        if name.endswith("mqar"):
            # the random rest holds keys by chance: what is asked, once each, is right
            asked = [t for t, label in enumerate(labels) if label != UNSCORED]
            assert len(asked) == part.settings["pairs"] == len({ids[t] for t in asked})
            assert [labels[t] for t in asked] == [expected[t] for t in asked]
        else:
            assert labels == expected


@pytest.mark.parametrize("name", TASKS)
def test_training_has_the_labels_of_tests_or_all_next_tokens(name):
    part = TASKS[name].protocols["cpu"].train[0]
    train = made(name, "cpu", part, training=True)
    if name in ("in-context-recall", "noisy-recall", "fuzzy-recall"):
        pad = TASKS[name].protocols["cpu"].vocabulary - 1 if name == "fuzzy-recall" else None
        next_tokens = np.where(train.ids[:, 1:] == pad, UNSCORED, train.ids[:, 1:])
        assert (train.labels[:, :-1] == next_tokens).all() and (train.labels[:, -1] >= 0).all()
    else:
        test = made(name, "cpu", part)
        assert (train.ids == test.ids).all() and (train.labels == test.labels).all()


@pytest.mark.parametrize("name", TASKS)
def test_a_random_guess_scores_at_chance(name):
    task, rng = TASKS[name], np.random.default_rng(0)
    for size in ("smoke", "cpu"):
        labels = np.concatenate(
            [made(name, size, part, count=600).labels.flatten() for part in task.protocols[size].tests]
        )
        labels = labels[labels != UNSCORED]
        answers = np.unique(labels)
        assert len(answers) == round(1 / task.chance(size)), f"{name} has answers {answers}"
        right = (rng.choice(answers, size=labels.shape) == labels).mean()
        chance = 1 / len(answers)
        assert abs(right - chance) < 5 * (chance * (1 - chance) / len(labels)) ** 0.5


@pytest.mark.parametrize("name", TASKS)
def test_sets_share_no_sequence_and_are_the_same_each_time(name):
    task = TASKS[name]
    protocol = task.protocols["cpu"]

    def rows(examples: Examples) -> list[tuple[int, ...]]:
        # others are so short that chance makes some twice
        return [
            tuple(row) for row in examples.ids.tolist() if sum(token != 0 for token in row) > min(12, len(row) - 3)
        ]

    sets = [
        [row for step in (1, 2, 3) for row in rows(TrainingSet(task, protocol, seed)[step])] for seed in (0, 1)
    ] + [
        [row for part in protocol.tests for row in rows(examples_of(task, protocol, part, split))]
        for split in (VALIDATION, TEST)
    ]
    assert all(len(found) > 20 and len(set(found)) == len(found) for found in sets)
    for i, one in enumerate(sets):
        for other in sets[:i]:
            assert not set(one) & set(other)
    again = examples_of(task, protocol, protocol.tests[0], TEST)
    assert (again.ids == examples_of(task, protocol, protocol.tests[0], TEST).ids).all()
    assert (TrainingSet(task, protocol, 0)[2].ids == TrainingSet(task, protocol, 0)[2].ids).all()


def test_only_the_newest_value_of_a_reassigned_key_is_right():
    part = TASKS["forgetting-mqar"].protocols["cpu"].train[0]
    examples = made("forgetting-mqar", "cpu", part, count=50)
    pairs, reassigned = part.settings["pairs"], part.settings["reassigned"]
    for ids, labels in zip(examples.ids.tolist(), examples.labels.tolist(), strict=True):
        first = dict(zip(ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
        right = sum(first[key] == label for key, label in zip(ids, labels, strict=True) if label != UNSCORED)
        assert right == pairs - reassigned


def test_queries_stand_where_the_power_law_puts_them():
    generate, count = TASKS["mqar"].generate, 20_000
    examples = generate(np.random.default_rng(3), count, 64, False, length=22, pairs=1, power=0.3)
    found = Counter(np.nonzero(examples.labels != UNSCORED)[1].tolist())
    weights = np.arange(1, 11) ** -0.7
    for place, share in enumerate(weights / weights.sum()):
        assert abs(found[2 + 2 * place] / count - share) < 5 * (share * (1 - share) / count) ** 0.5


def test_noise_is_a_fifth_and_lengths_and_places_are_as_likely():
    noisy = made("noisy-recall", "full", TASKS["noisy-recall"].protocols["full"].tests[0], count=500)
    assert (noisy.ids >= 16).mean() == pytest.approx(0.2, abs=0.02)
    part = TASKS["parity"].protocols["full"].train[0]
    lengths = Counter((made("parity", "full", part, count=7600).ids > 0).sum(axis=1).tolist())
    assert min(lengths) == 2 and max(lengths) == 39 and all(120 < n < 290 for n in lengths.values())
    part = TASKS["needle"].protocols["cpu"].tests[0]
    needles = made("needle", "cpu", part, count=1400)
    places = Counter((needles.ids[:, :-1] < 8).argmax(axis=1).tolist())
    assert set(places) == set(range(14)) and all(50 < n < 160 for n in places.values())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TASKS)
def test_training_sequences_have_more_than_one_chunk(name, size):
    protocol = TASKS[name].protocols[size]
    examples = TrainingSet(TASKS[name], protocol, 0)[1]
    assert examples.ids.shape[1] >= 2 * (protocol.chunk or TRAINING_SIZES[size].chunk)


def test_training_sets_repeat_their_batches_in_another_order():
    task = TASKS["compression"]
    protocol = Protocol(vocabulary=8, train=task.protocols["smoke"].train, batch=2, distinct_batches=5)
    batches = TrainingSet(task, protocol, 0)
    epochs = [[batches[epoch * 5 + i].ids.tobytes() for i in range(1, 6)] for epoch in range(3)]
    assert len(set(epochs[0])) == 5 and all(set(epoch) == set(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_parts_of_training_have_their_shares():
    task = TASKS["mqar"]
    protocol = task.protocols["full"]
    lengths = Counter(part.name for part in protocol.train for _ in range(part.batches))
    assert lengths["64/4"] * 256 == pytest.approx(100_000, rel=0.002) and lengths["256/64"] * 256 == pytest.approx(
        20_000, rel=0.002
    )
    few = Protocol(vocabulary=64, train=TASKS["mqar"].protocols["cpu"].train, batch=1)
    seen = Counter(TrainingSet(task, few, 0)[step].ids.shape[1] for step in range(1, 201))
    assert set(seen) == {part.settings["length"] for part in few.train}
    shares = {part.settings["length"]: part.batches for part in few.train}
    for length, share in shares.items():
        p = share / sum(shares.values())
        assert abs(seen[length] / 200 - p) < 5 * (p * (1 - p) / 200) ** 0.5 + 1e-9


@pytest.mark.parametrize(
    "name, settings, complaint",
    [
        ("mqar", {"length": 16, "pairs": 5}, "`pairs` must leave two tokens a query in 16 tokens, got 5"),
        ("mqar", {"length": 256, "pairs": 40}, "`chosen` must be at most 31"),
        ("in-context-recall", {"length": 7}, "`length` must be even and at least 4, got 7"),
        ("noisy-recall", {"length": 8, "noise": 0.2}, "`noise_vocabulary` must be at least 1"),
        ("fuzzy-recall", {"length": 17}, "`length` must have room for three pairs, 18, got 17"),
        ("fuzzy-recall", {"length": 256, "longest": 40}, "`longest` must be at most the 31"),
        ("selective-copying", {"length": 8, "copied": 4}, "`copied` must be from 1 to 3 in 8 tokens, got 4"),
        ("memorisation", {"length": 5}, "`length` must be even, got 5"),
        ("parity", {"shortest": 9, "longest": 8}, "`shortest` must be from 2 to `longest` = 8, got 9"),
        ("modular-arithmetic", {"shortest": 6, "longest": 6}, "must have an odd length between, got 6 and 6"),
        ("needle", {"length": 2}, "`length` must be at least 3, got 2"),
    ],
)
def test_what_cannot_be_is_named(name, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        TASKS[name].generate(np.random.default_rng(0), 2, 64, False, **settings)
