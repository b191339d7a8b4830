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
"""Prompts of any length, read in pieces by `generate()`: tokens a second, and the memory it takes.

    python benchmarks/prefill.py --out benchmarks/results/<machine>/

See README.md in this folder for what is measured and how.
"""

import argparse
import datetime
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from memory_probe import release_free_memory, reset_peak, status_kib
from models import LABELS, OURS, ModelShape, WholeModel, add_model_arguments, build, difference, shape_of
from provenance import command_line, machine, say
from report import count, find, made_with, star, table
from timing import CLOCKS, Rounds, Sample, add_noise_arguments, round_robin, summary, timed


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for prefill.json and prefill.md")
    add_model_arguments(parser, OURS, replace(ModelShape(), layers=1))
    parser.add_argument("--lengths", nargs="+", type=int, default=[16384, 131072, 1048576])
    parser.add_argument("--prefill-chunk-size", type=int, default=8192, help="tokens of a piece, as in generate()")
    parser.add_argument("--rounds", type=int, default=3, help="samples of every length")
    parser.add_argument("--repeat-tokens", type=int, default=131072, help="longer prompts than this are read once")
    add_noise_arguments(parser)
    args = parser.parse_args()
    if args.quick:
        args.width, args.layers, args.heads, args.vocabulary, args.chunk, args.preset = 32, 1, 1, 64, 16, None
        args.lengths, args.prefill_chunk_size, args.rounds, args.patience, args.threads = [64, 200], 40, 1, 0.0, 1
    return args


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        lengths (`list` of `int`): tokens of the prompts.
        prefill_chunk_size (`int`): tokens of a piece, as in `generate()`.
        repeat_tokens (`int`): longer prompts than this are read once.
        rounds (`Rounds`): how often the others are.
    """

    lengths: list[int]
    prefill_chunk_size: int
    repeat_tokens: int
    rounds: Rounds


def read(model: WholeModel, input_ids: torch.Tensor, piece: int | None) -> torch.Tensor:
    """The logits after a prompt, as `generate()` reads it: in pieces of so many tokens, or at once."""
    generated = model.module.generate(
        input_ids,
        max_new_tokens=1,
        do_sample=False,
        prefill_chunk_size=piece,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return generated.logits[0]


def prompt(model: WholeModel, tokens: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(6)
    device = next(model.module.parameters()).device
    return torch.randint(3, model.module.config.vocab_size, (1, tokens), generator=draw).to(device)


class Memory:
    """Peak of what is taken from here on, in MiB: of a GPU what is allocated, of a CPU the resident set."""

    def __init__(self, device: torch.device):
        self.device = device
        release_free_memory()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            self.before = status_kib("VmRSS") if reset_peak() else None

    def added(self) -> float | None:
        """None where the system does not tell."""
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 2**20
        return None if self.before is None else (status_kib("VmHWM") - self.before) / 1024


def measure(
    models: dict[str, WholeModel],
    plan: Plan,
    add: Callable[[dict], None],
    skip: Callable[[str, Exception], None],
    out_of_time: Callable[[str], bool] = lambda what: False,
) -> None:
    """Reads prompts with every model, shortest first.

    Args:
        models (`dict`): models by name, on their device.
        plan (`Plan`): what to measure.
        add (`Callable`): takes a row.
        skip (`Callable`): takes the name of a model that raises, and the exception.
        out_of_time (`Callable`): whether there is no time left for what is named; says so itself.
    """
    for length in sorted(plan.lengths):
        if out_of_time(f"{', '.join(models)}, prompts of {length} tokens"):
            return
        added: dict[str, list[float]] = {}

        def take(key: tuple, length=length, added=added) -> Sample:
            (name,) = key
            input_ids = prompt(models[name], length)
            memory = Memory(input_ids.device)
            sample = timed(lambda: read(models[name], input_ids, plan.prefill_chunk_size).cpu(), 1, CLOCKS["wall"])
            added.setdefault(name, []).append(memory.added())
            return sample

        def failed(key: tuple, error: Exception) -> None:
            skip(key[0], error)
            models.pop(key[0], None)

        rounds = plan.rounds if length <= plan.repeat_tokens else replace(plan.rounds, wanted=1, most=1)
        for (name,), samples in round_robin([[(name,) for name in models]], take, rounds, failed).items():
            entry = summary(samples, rounds.quiet_limit)
            known = [mib for mib in added[name] if mib is not None]
            add(
                {
                    "name": name,
                    "label": LABELS[name],
                    "tokens": length,
                    "tokens_per_second": length / entry["seconds"],
                    "added_mib": max(known) if known else None,
                    **entry,
                }
            )


class Run:
    """The results so far, written after every row: a run that is cut short leaves what it had."""

    def __init__(self, args: argparse.Namespace, shape: ModelShape):
        found = machine(args.threads, ("torch", "transformers", "triton"))
        if args.device == "cuda":
            found["gpu"] = torch.cuda.get_device_name()
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "models", *asdict(shape))}
        self.out = args.out
        self.results: dict = {
            "command": command_line(),
            "date": datetime.date.today().isoformat(),
            "machine": found,
            "shape": asdict(shape),
            "settings": settings,
            "models": {},
            "prefill": [],
            "skipped": {},
        }

    def add(self, row: dict) -> None:
        self.results["prefill"].append(row)
        say(json.dumps(row))
        self.save()

    def skip(self, name: str, error: Exception) -> None:
        self.results["skipped"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"skipped {name}: {self.results['skipped'][name]}")
        self.save()

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "prefill.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.out / "prefill.md").write_text(markdown(self.results))


def rows_of(rows: list[dict]) -> list[str]:
    """The table of what `measure` gave."""
    lengths = sorted({row["tokens"] for row in rows})
    head = ["model", *(f"tokens/s, {length:,}" for length in lengths), *(f"MiB, {length:,}" for length in lengths)]

    def cells(name: str, label: str) -> list[str]:
        found = [find(rows, name=name, tokens=length) for length in lengths]
        rates = [f"{row['tokens_per_second']:,.0f}{star(row)}" if row else "" for row in found]
        mib = [f"{row['added_mib']:,.0f}" if row and row["added_mib"] is not None else "" for row in found]
        return [label, *rates, *mib]

    return table(head, [cells(name, label) for name, label in {row["name"]: row["label"] for row in rows}.items()])


def markdown(results: dict) -> str:
    shape, settings = results["shape"], results["settings"]
    device = f"{results['machine']['gpu']}. " if "gpu" in results["machine"] else ""
    lines = [
        "# Long prompts, read in pieces",
        "",
        f"`{results['command']}`, {results['date']}.",
        "",
        device + made_with(results["machine"], ("torch", "transformers", "triton")),
        "",
        f"{count(shape['layers'], 'layer')}, width {shape['width']}, {count(shape['heads'], 'head')}, vocabulary "
        f"{shape['vocabulary']}, {settings['dtype']}, chunk {shape['chunk']}, batch 1, pieces of "
        f"{settings['prefill_chunk_size']:,} tokens. MiB are what the call adds at its peak. Medians of "
        f"{count(settings['rounds'], 'sample')}, one of prompts beyond {settings['repeat_tokens']:,} tokens; \\* marks "
        "those taken beside other load on the machine.",
        "",
        *rows_of(results["prefill"]),
        "",
        "In pieces against at once, largest difference over the largest logit: "
        + ", ".join(
            f"{fact['label']} {fact['pieces_against_whole']['max_relative']:.1e}"
            for fact in results["models"].values()
        )
        + ".",
    ]
    if results["skipped"]:
        lines += ["", *(f"- {name}: {why}" for name, why in results["skipped"].items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    run, models = Run(args, shape_of(args)), {}
    for name in args.models:
        model = build(name, shape_of(args), args.device, getattr(torch, args.dtype))
        model.module.eval()
        # pieces that end inside a chunk, against the prompt at once
        input_ids = prompt(model, 4 * args.chunk + 5)
        models[name] = model
        run.results["models"][name] = {
            "label": LABELS[name],
            "settings": model.settings,
            "parameters": model.parameters(),
            "pieces_against_whole": difference(
                read(model, input_ids, args.chunk + args.chunk // 2), read(model, input_ids, None)
            ),
        }
    rounds = Rounds(args.rounds, args.rounds, args.quiet_limit, args.patience)
    plan = Plan(args.lengths, args.prefill_chunk_size, args.repeat_tokens, rounds)
    measure(models, plan, run.add, run.skip)
    say((args.out / "prefill.md").read_text())


if __name__ == "__main__":
    main()
