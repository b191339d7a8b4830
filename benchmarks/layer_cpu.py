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
"""One layer against its neighbours on a CPU: speed, memory, decoding, side by side in one run.

    python benchmarks/layer_cpu.py --out benchmarks/results/<machine>/

See README.md in this folder for what is measured and how.
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

import torch
from competitors import BUILDERS, LABELS, OURS, Competitor, Shape, build, small_models
from models import WholeModel, decode_difference, difference
from provenance import command_line, machine, say
from report import write_report
from timing import (
    CLOCKS,
    Rounds,
    add_noise_arguments,
    calls_for,
    decode,
    one_backward,
    one_forward,
    round_robin,
    summary,
    timed,
    timed_inside,
)


HERE = Path(__file__).resolve().parent
MODES = {"forward": one_forward, "backward": one_backward}
PARTS = ["speed", "decode", "memory", "model"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, results.md, results.png")
    names = sorted(BUILDERS, key=lambda name: name not in OURS)
    parser.add_argument("--competitors", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, metavar="PART")
    parser.add_argument("--lengths", nargs="*", type=int, default=[2048, 8192], help="lengths for the speed")
    parser.add_argument("--recurrent-length", type=int, default=512, help="length for the token-by-token reference")
    parser.add_argument("--memory-lengths", nargs="*", type=int, default=[8192, 32768, 131072])
    parser.add_argument("--memory-common-length", type=int, default=8192, help="the one length measured for all")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens before the decoded ones")
    parser.add_argument("--decode-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="quiet samples wanted of everything")
    parser.add_argument("--max-rounds", type=int, default=15, help="rounds after which noisy ones are taken too")
    parser.add_argument("--min-seconds", type=float, default=0.5, help="length of one sample")
    add_noise_arguments(parser)
    parser.set_defaults(patience=2.0)
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu, with --threads 1, for a machine that is never quiet: all samples count then",
    )
    parser.add_argument("--width", type=int, default=Shape.width)
    parser.add_argument("--heads", type=int, default=Shape.heads)
    parser.add_argument("--chunk", type=int, default=Shape.chunk)
    args = parser.parse_args()
    if args.quick:
        args.width, args.heads, args.chunk = 64, 2, 16
        args.lengths, args.recurrent_length = [64], 32
        args.memory_lengths, args.memory_common_length = [128], 0
        args.prompt, args.decode_tokens = 32, 20
        # one thread: two of them wait for each other where something else runs beside
        args.rounds, args.max_rounds, args.min_seconds, args.patience, args.threads = 1, 1, 0.0, 0.0, 1
    if args.clock == "cpu":
        if args.threads != 1:
            parser.error("--clock cpu needs --threads 1: threads that wait for each other are running")
        args.quiet_limit = 1.0
    return args


class Run:
    """The results so far, written after every step: a run that is cut short leaves what it had."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.clock = CLOCKS[args.clock]
        self.rounds = Rounds(args.rounds, args.max_rounds, args.quiet_limit, args.patience)
        self.shape = Shape(args.width, args.heads, args.chunk)
        self.results: dict = {
            "command": command_line(),
            "date": datetime.date.today().isoformat(),
            "machine": machine(args.threads),
            "shape": self.shape.as_dict(),
            "settings": {k: v for k, v in vars(args).items() if k not in ("out", "competitors", "parts")},
            "competitors": {},
            "skipped": {},
            "speed": [],
            "decode": [],
            "memory": [],
            "model": [],
        }
        self.built: dict[str, Competitor] = {}

    def save(self) -> None:
        self.args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.results, indent=1)
        (self.args.out / "results.json").write_text(text + "\n")

    def skip(self, name: str, error: Exception | str) -> None:
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.results["skipped"][name] = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
        self.built.pop(name, None)
        say(f"skipped {name}: {self.results['skipped'][name]}")

    def build_all(self) -> None:
        """Correctness first: what is built has to give finite numbers, and the same ones when it decodes."""
        args, shape = self.args, self.shape
        for name in args.competitors:
            try:
                competitor = build(name, shape)
                # past two chunks, and not a whole number of them
                x = torch.randn(1, 3 * shape.chunk + 5, shape.width, generator=torch.Generator().manual_seed(1))
                if not (one_forward(competitor, x) and one_backward(competitor, x)):
                    raise FloatingPointError("not finite")
                with torch.no_grad():
                    full = competitor.forward(x)[:, 2 * shape.chunk :]
                stepped, _ = decode(competitor, x, 2 * shape.chunk, self.clock)
            except Exception as error:  # whatever a neighbour's package raises costs its own entry only
                self.skip(name, error)
                continue
            self.built[name] = competitor
            self.results["competitors"][name] = {
                "label": LABELS[name],
                "ours": name in OURS,
                "settings": competitor.settings,
                "parameters": sum(p.numel() for p in competitor.module.parameters()),
                "decode_against_forward": difference(stepped, full),
            }
        self.save()

    def measure_speed(self) -> None:
        args = self.args
        recurrent = [name for name in self.built if name.endswith("-recurrent")]
        groups = [
            [(n, seq_len, mode) for n in self.built if n not in recurrent]
            for seq_len in args.lengths
            for mode in MODES
        ]
        if recurrent:
            both = [n for name in recurrent for n in (name.removesuffix("-recurrent"), name) if n in self.built]
            groups += [[(n, args.recurrent_length, mode) for n in both] for mode in MODES]
        calls: dict[tuple, int] = {}

        def take(key):
            name, seq_len, mode = key
            x = torch.randn(1, seq_len, self.shape.width, generator=torch.Generator().manual_seed(2))

            def call():
                return MODES[mode](self.built[name], x)

            if key not in calls:
                calls[key] = calls_for(call, args.min_seconds, self.clock)
            call()  # others' turns have changed caches and heap: a training step finds those of the step before
            return timed(call, calls[key], self.clock)

        def row(key, samples):
            name, seq_len, mode = key
            entry = summary(samples, args.quiet_limit)
            return {"name": name, "T": seq_len, "mode": mode, "tokens_per_second": seq_len / entry["seconds"], **entry}

        self._round_robin("speed", groups, take, row)

    def measure_decode(self) -> None:
        args = self.args
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(1, args.prompt + args.decode_tokens, self.shape.width, generator=generator)
        names = [name for name in self.built if not name.endswith("-recurrent")]

        def seconds_per_token(name):
            _, seconds = decode(self.built[name], x, args.prompt, self.clock)
            return sum(seconds) / len(seconds)

        def row(key, samples):
            entry = summary(samples, args.quiet_limit)
            return {
                "name": key[0],
                "prompt": args.prompt,
                "tokens": args.decode_tokens,
                "ms_per_token": 1e3 * entry.pop("seconds"),
                "ms_per_token_quartiles": [1e3 * s for s in entry.pop("seconds_quartiles")],
                **entry,
            }

        def take(key):
            return timed_inside(lambda: seconds_per_token(key[0]))

        self._round_robin("decode", [[(name,) for name in names]], take, row)

    def _round_robin(self, part, groups, take, row) -> None:
        """Keys begin with the name of what they measure, which is skipped for good where it raises."""

        def after_round(samples, text):
            self.results[part] = [row(key, taken) for key, taken in samples.items()]
            self.save()
            say(f"{part}: {text}")

        round_robin(groups, take, self.rounds, lambda key, error: self.skip(key[0], error), after_round)

    def measure_memory(self) -> None:
        args = self.args
        names = [n for n in self.built if not n.endswith("-recurrent")]
        todo = [(n, args.memory_common_length) for n in names if args.memory_common_length]
        todo += [
            (n, t) for n in names if n in OURS or not OURS & set(names) or args.quick for t in args.memory_lengths
        ]
        if args.quick:
            # a process each is most of a quick run's time: two show that it works
            todo = [(n, t) for n, t in todo if n in ("yaad", "ttt-mlp")]
        for name, seq_len in dict.fromkeys(todo):
            for mode in ["backward"] if args.quick else MODES:
                command = [sys.executable, str(HERE / "memory_probe.py"), name, str(seq_len), mode]
                for flag in ("width", "heads", "chunk", "threads"):
                    command += [f"--{flag}", str(getattr(args, flag))]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode == 0:
                    entry = json.loads(done.stdout.strip().splitlines()[-1])
                else:
                    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
                    entry = {"name": name, "T": seq_len, "mode": mode, "failed": reason}
                self.results["memory"].append(entry)
                self.save()
                say(f"memory: {entry}")

    def measure_models(self) -> None:
        """Decoding token by token against one forward pass, for a small whole model of each kind."""
        models = small_models()
        while True:
            try:
                name, model = next(models)
                entry = {"name": name, **decode_difference(WholeModel(model))}
            except StopIteration:
                return
            except Exception as error:
                return self.skip("whole models", error)
            self.results["model"].append(entry)
            self.save()
            say(f"model: {entry}")


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    run = Run(args)
    run.build_all()
    measure = dict(
        zip(PARTS, (run.measure_speed, run.measure_decode, run.measure_memory, run.measure_models), strict=True)
    )
    for part in args.parts:
        measure[part]()
        write_report(run.results, args.out)
    say((args.out / "results.md").read_text())


if __name__ == "__main__":
    main()
