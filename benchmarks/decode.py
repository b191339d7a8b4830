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
"""Decoding with whole models of equal size: time of a step, time to first token, bytes of cache, side by side in one run.

    python benchmarks/decode.py --out benchmarks/results/<machine>/

See README.md in this folder for what is measured and how. `measure` serves other scripts, on whatever device the models
are.
"""

import argparse
import datetime
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from decode_report import write_report
from models import (
    BUILDERS,
    LABELS,
    OURS,
    ModelShape,
    WholeModel,
    add_model_arguments,
    build,
    decode_difference,
    shape_of,
)
from provenance import command_line, machine, say
from timing import Rounds, Sample, add_noise_arguments, round_robin, summary, timed_inside
from transformers import DynamicCache
from transformers.cache_utils import Cache, StaticLayer


COMPILED = "-compiled"


@dataclass(frozen=True)
class Plan:
    """What to measure, and what is too much.

    Args:
        batches, contexts (`list` of `int`): sequences, and tokens that each has behind it.
        steps (`int`): steps of one sample; of ours rounded up to whole chunks.
        sample_seconds (`float`): seconds after which a sample ends early, of ours at the end of a chunk.
        prefill_tokens (`int`): tokens, of all sequences together, up to which a context is really read.
        repeat_tokens (`int`): tokens up to which time to first token is measured more than once.
        state_tokens (`int`): tokens of each sequence that models with a state of one size read in place of more.
        memory_bytes (`int`): largest sum of caches.
        cell_seconds (`float`): about how long the steps of one batch and context may take: fewer rounds, one at least.
        rounds (`Rounds`): how often.
        compiled (`bool`): whether to measure compiled steps beside eager ones.
    """

    batches: list[int]
    contexts: list[int]
    steps: int
    sample_seconds: float
    prefill_tokens: int
    repeat_tokens: int
    state_tokens: int
    memory_bytes: int
    cell_seconds: float
    rounds: Rounds
    compiled: bool = False


@dataclass
class Ready:
    """A model with its cache filled, and the token to go on with."""

    cache: Cache
    token: torch.Tensor
    filled: str
    read: int


def measure(
    models: dict[str, WholeModel],
    plan: Plan,
    add: Callable[[str, dict], None],
    out_of_time: Callable[[str], bool] = lambda what: False,
) -> None:
    """Measures every batch and context, smallest first.

    Args:
        models (`dict`): models by name, on their device; `LABELS` has the names' labels.
        plan (`Plan`): what to measure.
        add (`Callable`): takes a part, `"first_token"`, `"decode"` or `"skipped"`, and a row of it.
        out_of_time (`Callable`): whether there is no time left for what is named; says so itself.
    """
    with torch.no_grad():
        one_sequence = {name: bytes_of_one_sequence(model) for name, model in models.items()}
        for batch, context in sorted(cells(plan), key=lambda cell: (cell[0] * cell[1], cell)):
            names = []
            for name, model in models.items():
                needed = cache_bytes_needed(model, batch, context + plan.steps, one_sequence[name])
                if needed > plan.memory_bytes:
                    why = f"its cache needs {gib(needed)}, more than {gib(plan.memory_bytes)}"
                    add("skipped", {"name": cell_name(name, batch, context), "why": why})
                else:
                    names.append((name, needed))
            together = sum(needed for _, needed in names) <= plan.memory_bytes
            for group in [[n for n, _ in names]] if together else [[n] for n, _ in names]:
                if group and not out_of_time(f"decoding, batch {batch}, context {context}: {', '.join(group)}"):
                    _Cell({n: models[n] for n in group}, batch, context, plan, add).measure()


def cells(plan: Plan) -> Iterator[tuple[int, int]]:
    return ((batch, context) for batch in plan.batches for context in plan.contexts)


class _Cell:
    """Some models at one batch and context, interleaved."""

    def __init__(self, models: dict[str, WholeModel], batch: int, context: int, plan: Plan, add):
        self.models, self.batch, self.context, self.plan, self.add = models, batch, context, plan, add
        self.device = next(next(iter(models.values())).module.parameters()).device
        self.ready: dict[str, Ready] = {}

    def measure(self) -> None:
        if self.batch * self.context <= self.plan.prefill_tokens:
            self.measure_first_token()
        for name in list(self.models):
            if name not in self.ready:
                self.attempt(name, lambda name=name: self.fill(name))
        self.measure_steps()
        self.ready.clear()
        release(self.device)
        if self.plan.compiled:  # else the next shape would be compiled for any shape, and a few later not at all
            torch.compiler.reset()

    def row(self, name: str, samples: list[Sample]) -> dict:
        label = LABELS[name.removesuffix(COMPILED)] + (", compiled" if name.endswith(COMPILED) else "")
        entry = summary(samples, self.plan.rounds.quiet_limit)
        return {"name": name, "label": label, "batch": self.batch, "context": self.context, **entry}

    def failed(self, name: str, error: Exception) -> None:
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        self.add("skipped", {"name": cell_name(name, self.batch, self.context), "why": why[:300]})
        self.ready.pop(name, None)
        release(self.device)

    def attempt(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a neighbour that raises, or runs out of memory, costs its own cells
            self.failed(name, error)

    # -- time to first token ------------------------------------------------------------------------------------------

    def measure_first_token(self) -> None:
        lost: list[str] = []

        def failed(key, error):
            lost.append(key[0])
            self.failed(key[0], error)

        rounds = self.plan.rounds
        if self.batch * self.context > self.plan.repeat_tokens:
            rounds = replace(rounds, wanted=1, most=1)
        keys = [(name,) for name in self.models]
        if self.device.type == "cuda":  # kernels are loaded and compiled at the first call of a shape
            round_robin([keys], self.take_first_token, Rounds(1, 1, 1.0, 0.0), failed)
        keys = [key for key in keys if key[0] not in lost]
        for (name,), samples in round_robin([keys], self.take_first_token, rounds, failed).items():
            self.add("first_token", self.row(name, samples))
        for name in lost:
            self.models.pop(name, None)

    def take_first_token(self, key: tuple) -> Sample:
        (name,) = key
        self.ready.pop(name, None)
        release(self.device)
        return timed_inside(lambda: self.prefill(name, self.context))

    def prefill(self, name: str, tokens: int) -> float:
        """Reads so many random tokens; the seconds until the next one is known."""
        model = self.models[name]
        draw = torch.Generator().manual_seed(5)
        input_ids = torch.randint(model.module.config.vocab_size, (self.batch, tokens), generator=draw)
        input_ids = input_ids.to(self.device)
        start = self.clock()
        # attention over a static cache has a mask of all its keys; `generate` reads prompts into a growing one
        cache = DynamicCache(config=model.module.config) if grows(model) else self.cache(name)
        token = model.read(input_ids, cache).argmax(-1, keepdim=True)
        seconds = self.clock() - start
        if grows(model):
            growing, cache = cache, self.cache(name)
            for i, layer in enumerate(growing.layers):
                cache.update(layer.keys, layer.values, i)
        self.ready[name] = Ready(cache, token, "read" if tokens == self.context else f"{tokens} tokens read", tokens)
        return seconds

    def cache(self, name: str) -> Cache:
        return self.models[name].cache(self.context + self.plan.steps)

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # -- steps --------------------------------------------------------------------------------------------------------

    def fill(self, name: str) -> None:
        """A cache for a context that is too long to be read."""
        model, plan = self.models[name], self.plan
        if not grows(model):
            self.prefill(name, max(1, min(self.context, plan.state_tokens, plan.prefill_tokens // self.batch)))
            return
        cache, config = self.cache(name), model.module.config
        cache.early_initialization(
            self.batch, config.num_key_value_heads, config.head_dim, model.module.dtype, self.device
        )
        for layer in cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        rewind(cache, self.context)
        token = torch.zeros(self.batch, 1, dtype=torch.long, device=self.device)
        self.ready[name] = Ready(cache, token, "random keys and values", 0)

    def measure_steps(self) -> None:
        names = [
            name + ending
            for name in self.models
            if name in self.ready
            for ending in ([""] + [COMPILED] * self.plan.compiled)
        ]
        steps: dict[str, int] = {}

        def take(key):
            def seconds():
                spent, steps[key[0]] = self.decode(key[0])
                return spent

            return timed_inside(seconds)

        def failed(key, error):
            self.failed(key[0], error)

        predicted: dict[str, float] = {}

        def warm_up(name: str) -> None:
            """Touches memory and compiles outside the clock; then the next steps say how long a sample will be."""
            self.decode(name, most=2)
            period = self.models[name.removesuffix(COMPILED)].period
            seconds = self.decode(name, most=2)[0]
            predicted[name] = max(min(seconds * self.plan.steps, self.plan.sample_seconds), seconds * period)

        for name in names:
            if name.removesuffix(COMPILED) in self.ready:
                self.attempt(name, lambda name=name: warm_up(name))
        keys = [(name,) for name in predicted if name.removesuffix(COMPILED) in self.ready]
        rounds = self.plan.rounds
        affordable = max(1, int(self.plan.cell_seconds / max(sum(predicted.values()), 1e-6)))
        rounds = replace(rounds, wanted=min(rounds.wanted, affordable), most=min(rounds.most, affordable))
        for (name,), samples in round_robin([keys], take, rounds, failed).items():
            ready = self.ready.get(name.removesuffix(COMPILED))
            if ready is not None:
                self.add("decode", self.row(name, samples) | self.sizes(name, ready, samples, steps[name]))

    def decode(self, name: str, most: int | None = None) -> tuple[float, int]:
        """Seconds a step, and how many steps were taken."""
        base = name.removesuffix(COMPILED)
        model, ready = self.models[base], self.ready[base]
        call = model.module.get_compiled_call(None) if name.endswith(COMPILED) else None
        wanted = most or model.period * -(-self.plan.steps // model.period)
        if grows(model):
            rewind(ready.cache, self.context)
        start, step = self.clock(), 0
        while step < wanted:
            ready.token = model.read(ready.token, ready.cache, call).argmax(-1, keepdim=True)
            step += 1
            if step % model.period == 0 and time.perf_counter() - start > self.plan.sample_seconds:
                break
        return (self.clock() - start) / step, step

    def sizes(self, name: str, ready: Ready, samples: list[Sample], steps: int) -> dict:
        model = self.models[name.removesuffix(COMPILED)]
        seconds = summary(samples, self.plan.rounds.quiet_limit)["seconds"]
        state = cache_bytes(ready.cache, model)
        return {
            "steps": steps,
            "tokens_per_second": self.batch / seconds,
            "filled": ready.filled,
            "tokens_read": ready.read,
            "cache_bytes_per_sequence": state / self.batch,
            "step_bytes": model.weight_bytes() + state,
            "gb_per_second": (model.weight_bytes() + state) / seconds / 1e9,
        }


def grows(model: WholeModel) -> bool:
    """Whether the cache holds keys and values."""
    return any(isinstance(layer, StaticLayer) for layer in model.cache(1).layers)


def rewind(cache: Cache, tokens: int) -> None:
    """A static cache back to its first `tokens` keys and values, so that every sample is of the same context."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)


def tensors_of(x: Any) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        for value in x.values():
            yield from tensors_of(value)
    elif isinstance(x, (list, tuple)):
        for value in x:
            yield from tensors_of(value)


def cache_bytes(cache: Cache, model: WholeModel) -> int:
    """Bytes of the storages behind a cache's tensors, each once; those of the model's weights are not the cache's."""
    weights = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
    storages = {}
    for layer in cache.layers:
        for tensor in tensors_of(vars(layer)):
            storage = tensor.untyped_storage()
            # on the meta device all pointers are zero
            storages[id(tensor) if tensor.is_meta else storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in storages.items() if pointer not in weights)


def bytes_of_one_sequence(model: WholeModel) -> int:
    """Of a cache that does not grow, after a prompt and a step, with what they leave beside the state."""
    if grows(model):
        return 0
    device = next(model.module.parameters()).device
    cache = model.cache(5)
    for tokens in (4, 1):
        model.read(torch.zeros(1, tokens, dtype=torch.long, device=device), cache)
    return cache_bytes(cache, model)


def cache_bytes_needed(model: WholeModel, batch: int, length: int, one_sequence: int) -> int:
    """Bytes of the cache of `batch` sequences of `length` tokens, without making it."""
    if not grows(model):
        return batch * one_sequence
    cache, config = model.cache(length), model.module.config
    cache.early_initialization(
        batch, config.num_key_value_heads, config.head_dim, model.module.dtype, torch.device("meta")
    )
    return cache_bytes(cache, model)


def available_memory(device: str, share: float) -> int:
    """`share` of the bytes that are free now."""
    if device == "cuda":
        return int(share * torch.cuda.mem_get_info()[0])
    with open("/proc/meminfo") as file:
        kib = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return int(share * kib * 1024)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cell_name(name: str, batch: int, context: int) -> str:
    return f"{name}, batch {batch}, context {context}"


def gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


class Run:
    """The results so far, written after every row: a run that is cut short leaves what it had."""

    def __init__(self, out: Path, head: dict):
        self.out = out
        self.results: dict = {**head, "models": {}, "first_token": [], "decode": [], "skipped": []}

    def add(self, part: str, row: dict) -> None:
        self.results[part].append(row)
        say(f"{part}: {json.dumps(row)}")
        self.save()

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "decode.json").write_text(json.dumps(self.results, indent=1) + "\n")


def prepare(
    names: list[str],
    shape: ModelShape,
    device: str,
    dtype: torch.dtype,
    add: Callable[[str, dict], None],
    our_settings: dict[str, Any] | None = None,
) -> tuple[dict[str, WholeModel], dict[str, dict]]:
    """Correctness first: models that decode what they read, and what the report says about each."""
    models, facts = {}, {}
    for name in names:
        try:
            model = build(name, shape, device, dtype, our_settings=our_settings)
            # past a chunk, and not a whole number of them
            found = decode_difference(model, seq_len=shape.chunk + 13, prompt=shape.chunk - 5)
            if not found["max_absolute"] < float("inf"):
                raise FloatingPointError("not finite")
        except Exception as error:
            add("skipped", {"name": name, "why": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
            continue
        models[name] = model
        facts[name] = {
            "label": LABELS[name],
            "ours": name in OURS,
            "settings": model.settings,
            "parameters": model.parameters(),
            "weight_bytes": model.weight_bytes(),
            "decode_against_forward": found,
        }
    return models, facts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for decode.json, decode.md, decode.png")
    add_model_arguments(parser, BUILDERS, ModelShape())
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 8192, 65536, 1048576])
    parser.add_argument("--compile", action="store_true", help="steps through torch.compile as well, as generate()'s")
    parser.add_argument("--steps", type=int, default=64, help="steps of a sample; of ours whole chunks")
    parser.add_argument("--sample-seconds", type=float, default=2.0, help="samples longer than this end early")
    parser.add_argument(
        "--prefill-tokens", type=int, default=65536, help="contexts are read up to so many tokens of all sequences"
    )
    parser.add_argument(
        "--repeat-tokens", type=int, default=8192, help="longer prompts than this are read once, not every round"
    )
    parser.add_argument("--state-tokens", type=int, default=256, help="tokens read in place of a longer context")
    parser.add_argument("--memory-share", type=float, default=0.5, help="of the memory free at the start, for caches")
    parser.add_argument("--cell-seconds", type=float, default=30.0, help="for the steps of one batch and context")
    parser.add_argument("--rounds", type=int, default=3, help="quiet samples wanted of everything")
    parser.add_argument("--max-rounds", type=int, default=5, help="rounds after which noisy ones are taken too")
    add_noise_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.width, args.layers, args.heads, args.vocabulary, args.chunk = 32, 2, 1, 64, 16
        args.batches, args.contexts, args.steps, args.state_tokens = [1, 2], [24, 100], 16, 8
        args.prefill_tokens, args.repeat_tokens, args.threads = 100, 50, 1
        args.rounds, args.max_rounds, args.patience, args.preset = 1, 1, 0.0, None
    return args


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    shape = shape_of(args)
    found = machine(args.threads, ("torch", "transformers", "triton"))
    if args.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "models", *asdict(shape))}
    run = Run(
        args.out,
        {
            "command": command_line(),
            "date": datetime.date.today().isoformat(),
            "machine": found,
            "shape": asdict(shape),
            "settings": settings,
        },
    )
    models, run.results["models"] = prepare(args.models, shape, args.device, getattr(torch, args.dtype), run.add)
    plan = Plan(
        batches=args.batches,
        contexts=args.contexts,
        steps=args.steps,
        sample_seconds=args.sample_seconds,
        prefill_tokens=args.prefill_tokens,
        repeat_tokens=args.repeat_tokens,
        state_tokens=args.state_tokens,
        memory_bytes=available_memory(args.device, args.memory_share),
        cell_seconds=args.cell_seconds,
        rounds=Rounds(args.rounds, args.max_rounds, args.quiet_limit, args.patience),
        compiled=args.compile,
    )
    measure(models, plan, run.add)
    if not run.results["decode"]:
        sys.exit("nothing could be measured, see the reasons above")
    write_report(run.results, args.out)
    say((args.out / "decode.md").read_text())


if __name__ == "__main__":
    main()
