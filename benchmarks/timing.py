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
"""What one measured call is, and how long it took on a machine that may be shared with others."""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from competitors import Competitor


def one_forward(competitor: Competitor, x: torch.Tensor) -> bool:
    competitor.module.eval()
    with torch.no_grad():
        output = competitor.forward(x)
    return bool(torch.isfinite(output[:, -1]).all())


def one_backward(competitor: Competitor, x: torch.Tensor) -> bool:
    """Forward and backward, into the parameters and the input as inside a model."""
    competitor.module.train()
    x = x.detach().requires_grad_(True)
    output = competitor.forward(x)
    # a gradient without structure: ones would vanish in a layer norm
    output.backward(x.detach())
    finite = bool(torch.isfinite(x.grad[:, 0]).all())
    competitor.module.zero_grad(set_to_none=True)
    return finite


Clock = Callable[[], float]
# seconds that passed, or seconds that this process's threads were running: the second is what is left to compare on a
# machine that others keep busy, with one thread (a thread that waits for another one is running)
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def decode(competitor: Competitor, x: torch.Tensor, prompt: int, clock: Clock) -> tuple[torch.Tensor, list[float]]:
    """Feeds `x[:, prompt:]` token by token; the outputs and every token's seconds."""
    competitor.module.eval()
    outputs, seconds = [], []
    with torch.no_grad():
        state = competitor.prefill(x[:, :prompt])
        for t in range(prompt, x.shape[1]):
            token = x[:, t : t + 1]
            start = clock()
            output, state = competitor.step(token, state)
            seconds.append(clock() - start)
            outputs.append(output)
    return torch.cat(outputs, dim=1), seconds


@dataclass
class Sample:
    """Seconds per call, and the share of the machine that others used meanwhile (None where it cannot be known)."""

    seconds: float
    foreign: float | None

    def quiet(self, limit: float) -> bool:
        return self.foreign is None or self.foreign <= limit


class ForeignLoad:
    """Share of all cores that other processes used between `start` and `stop`, from /proc/stat (Linux)."""

    def start(self) -> "ForeignLoad":
        self.wall, self.own, self.busy = time.perf_counter(), time.process_time(), self._busy_seconds()
        return self

    def stop(self) -> float | None:
        busy = self._busy_seconds()
        if busy is None or self.busy is None:
            return None
        wall, own = time.perf_counter() - self.wall, time.process_time() - self.own
        # the kernel counts in ticks of 10 ms, so a short span may come out below zero
        return max(0.0, (busy - self.busy - own) / (wall * (os.cpu_count() or 1)))

    @staticmethod
    def _busy_seconds() -> float | None:
        try:
            with open("/proc/stat") as file:
                user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
        except (OSError, ValueError):
            return None
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(limit: float, patience: float) -> None:
    """Waits while others use the machine, `patience` seconds at most."""
    deadline = time.perf_counter() + patience
    while time.perf_counter() < deadline:
        load = ForeignLoad().start()
        time.sleep(0.3)
        foreign = load.stop()
        if foreign is None or foreign <= limit:
            return


def timed(call: Callable[[], object], calls: int, clock: Clock) -> Sample:
    load = ForeignLoad().start()
    start = clock()
    for _ in range(calls):
        call()
    seconds = (clock() - start) / calls
    return Sample(seconds, load.stop())


def timed_inside(call: Callable[[], float]) -> Sample:
    """For a call that returns its own seconds, because part of it is preparation."""
    seconds = []
    sample = timed(lambda: seconds.append(call()), 1, CLOCKS["wall"])
    return Sample(seconds[0], sample.foreign)


def calls_for(call: Callable[[], object], min_seconds: float, clock: Clock) -> int:
    """Warms up and says how many calls make a sample long enough to be timed and its load to be known."""
    call()
    start = clock()
    call()
    return max(1, round(min_seconds / max(clock() - start, 1e-6)))


@dataclass(frozen=True)
class Rounds:
    """How often everything is measured: until `wanted` samples were quiet, `most` times at most."""

    wanted: int
    most: int
    quiet_limit: float
    patience: float  # seconds to wait for a quiet machine, per sample


def add_noise_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all benchmarks have about the machine, and `--quick`."""
    parser.add_argument("--quiet-limit", type=float, default=0.1, help="others' share of the machine, quiet sample")
    parser.add_argument("--patience", type=float, default=1.0, help="seconds to wait for a quiet machine, per sample")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows that it runs")


def round_robin(
    groups: list[list[tuple]],
    take: Callable[[tuple], Sample],
    rounds: Rounds,
    failed: Callable[[tuple, Exception], object],
    after_round: Callable[[dict, str], object] = lambda samples, text: None,
) -> dict[tuple, list[Sample]]:
    """Everything once, then everything again, each round starting with another: drift hits all alike.

    A key is `(name, ...)`; one that raises goes to `failed`, and no key of that name is measured any more.
    """
    samples: dict[tuple, list[Sample]] = {}
    lost: set[str] = set()

    def enough(key):
        return sum(s.quiet(rounds.quiet_limit) for s in samples.get(key, [])) >= rounds.wanted

    for number in range(rounds.most):
        started, missing = time.perf_counter(), 0
        for group in groups:
            turn = number % max(len(group), 1)
            if all(enough(key) for key in group if key[0] not in lost):
                continue
            for key in group[turn:] + group[:turn]:
                if key[0] in lost:
                    continue
                wait_until_quiet(rounds.quiet_limit, rounds.patience)
                try:
                    taken = take(key)
                except Exception as error:  # whatever a neighbour's package raises costs its own entries only
                    lost.add(key[0])
                    failed(key, error)
                    continue
                samples.setdefault(key, []).append(taken)
                missing += not taken.quiet(rounds.quiet_limit)
        after_round(samples, f"round {number + 1} took {time.perf_counter() - started:.0f} s, {missing} noisy samples")
        if all(enough(key) for group in groups for key in group if key[0] not in lost):
            break
    return samples


def summary(samples: list[Sample], limit: float) -> dict:
    """Median and quartiles of the quiet samples; of all of them, and marked, where fewer than three were quiet."""
    quiet = [s.seconds for s in samples if s.quiet(limit)]
    noisy = len(quiet) < min(3, len(samples))
    seconds = sorted(s.seconds for s in samples) if noisy else sorted(quiet)
    if len(seconds) > 1:
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    else:
        low = middle = high = seconds[0]
    return {
        "seconds": middle,
        "seconds_quartiles": [low, high],
        "samples": len(samples),
        "quiet_samples": len(quiet),
        "noisy": noisy,
    }
