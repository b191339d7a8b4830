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
"""What the steps of the GPU script launch on Hopper, and which of it `precompile.py` leaves to be compiled there.

    python kernels/tests/launched.py FOLDER/steps.json

Each step's own code goes over all its rows, as on a device, but with few and short sequences of one head on the CPU, and
every launch stops where Triton would compile. What it would compile is all that a binary's place in a cache is made of:
types, divisibility, constants, options. So nothing is compiled and nothing runs. Writes for each step its number of rows, rows
that launched nothing, what raised, the programs of `precompile.PROGRAMS` that it launches, and others by the row that is first.
"""

import contextlib
import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch


KERNELS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(KERNELS), str(KERNELS / "benchmarks")]

import cases  # noqa: E402
import correctness  # noqa: E402
import machine  # noqa: E402
import one_call  # noqa: E402
import paths  # noqa: E402
import precompile  # noqa: E402
import tools  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
import variants  # noqa: E402
import warm_up  # noqa: E402
import whole_models  # noqa: E402
from ahead_of_time import compiling  # noqa: E402
from record import Record  # noqa: E402
from steps import SIZES, STEPS, Step  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402

from miras_hf import backend  # noqa: E402
from miras_hf.memory import initial_memory_state  # noqa: E402
from miras_kernels import configuration  # noqa: E402


NAME = "sm_90"


class Seen:
    """The programs that are asked for, each with the name of what asked first."""

    def __init__(self):
        self.programs: dict[str, str] = {}
        self.asks, self.asked = "", set()

    @contextlib.contextmanager
    def looking(self) -> Iterator["Seen"]:
        """In here launches stop before they compile; what they would compile is kept."""

        def look(kernel, key, signature, device, constexprs, options, attrs, warmup) -> None:
            self.asked.add(self.asks)
            program = str((kernel.__name__, signature, constexprs, sorted(attrs.items()), options))
            self.programs.setdefault(program, self.asks)

        with patch.object(JITFunction, "_do_compile", look):
            yield self


def listed() -> Seen:
    """What `precompile` fills a cache with."""
    with Seen().looking() as seen:
        for name, call in precompile.PROGRAMS.items():
            seen.asks = name
            precompile.launch(call, NAME)
    return seen


def launched(step: Step, folder: Path) -> tuple[Seen, list[dict]]:
    """What a step launches, and its rows."""
    path = folder / f"{step.name}.json"
    command = [step.module, "--json", str(path), "--part", step.part, "--models", "yaad", "moneta", "memora"]
    usual = Record.check

    def check(record, what, call):
        seen.asks = what
        usual(record, what, call)

    with (
        Seen().looking() as seen,
        compiling(NAME),
        on_the_cpu(),
        patch.object(Record, "check", check),
        patch.object(sys, "argv", command),
    ):
        seen.asks = step.name
        RUN.get(step.module, importlib.import_module(step.module).main)()
    rows = json.loads(path.read_text())["rows"]
    return seen, rows


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """The steps believe that they are on a device, and their tensors are small and are not."""
    with contextlib.ExitStack() as stack:

        def smaller(constructor):
            def construct(self, batch, tokens, heads, head_dim, chunk_size, dtype=torch.bfloat16, device="cpu"):
                # packs and begun chunks of eight rows have to find room
                constructor(
                    self, min(batch, 8), min(tokens, 2 * chunk_size + 5), 1, head_dim, chunk_size, dtype, "cpu"
                )

            return construct

        def one_repeat(constructor):
            return lambda self, *given, **named: constructor(self, *given, **named | {"repeats": 1})

        def chunk_miras(q, *_, rule, parameters, cu_seqlens=None, **__):
            rows = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            gate_dim = max(gate.shape[-1] if gate.dim() == 4 else 1 for gate in _[2:4])
            return q.clone(), initial_memory_state(rule, parameters, rows, gate_dim)

        def launch_configuration(kernel, *, device, usual=configuration.launch_configuration, **shape):
            return usual(kernel, device=NAME, **shape)

        stack.enter_context(patch.object(paths.Shape, "__init__", smaller(paths.Shape.__init__)))
        stack.enter_context(patch.object(cases.Case, "__init__", one_repeat(cases.Case.__init__)))
        stack.enter_context(patch.object(correctness, "chunk_miras", chunk_miras))
        for module in (configuration, variants):
            stack.enter_context(patch.object(module, "launch_configuration", launch_configuration))
        stack.enter_context(patch.object(backend, "refusal", lambda *_, **__: None))
        stack.enter_context(patch.object(torch.cuda, "synchronize", lambda *_: None))
        # what no kernel has written is finite
        for name in ("empty", "empty_like"):
            stack.enter_context(patch.object(torch, name, getattr(torch, name.replace("empty", "zeros"))))
        yield


def take_jobs() -> None:
    record, args = warm_up.begin(warm_up.__doc__)
    for what, job in warm_up.jobs(args.device, args.quick).items():
        record.check(what, job)


def take_commands() -> None:
    """What the tools are given to run."""

    def run(record, command, *_, **__):
        at = next(i for i, word in enumerate(command) if word.endswith("one_call.py"))
        with patch.object(sys, "argv", command[at:]):
            one_call.main()
        raise tools.NotChecked("not run under a tool")

    with (
        patch.object(tools, "said_by", run),
        patch.object(tools, "tool", lambda name: name),
        patch.object(tools, "of_kernel", lambda *_: []),
    ):
        tools.main()


def ask_for_the_cache() -> None:
    record, args = machine.begin(machine.__doc__)
    record.check("carried cache", lambda: machine.carried_cache(record, args.device))


def take_models() -> None:
    """One layer of one head of each preset's width, in the dtypes of a run on a device."""
    usual = training.ModelShape.preset

    def preset(name):
        found = usual(name)
        return replace(found, width=found.width // found.heads, heads=1, layers=1, vocabulary=64)

    record, args = whole_models.begin(whole_models.__doc__)
    args.device, parts = "cpu", whole_models.Parts(record, "cpu")
    shape_and_dtype, plan, trained = whole_models.shape_and_dtype, whole_models.prefill.Plan, whole_models.Training
    measures = {
        "training": whole_models.measure_training_steps,
        "prefill": whole_models.measure_prefill,
        "decode": whole_models.measure_decoding,
    }
    for size in SIZES:
        with patch.object(training.ModelShape, "preset", staticmethod(preset)):
            args.quick, args.sizes = False, [size]
            shape, dtype = shape_and_dtype(args)
        # a quick run, of this shape in this dtype, with pieces that are too long to be decoded
        args.quick = True
        with (
            patch.object(whole_models, "shape_and_dtype", lambda _, found=(shape, dtype): found),
            patch.object(
                whole_models,
                "Training",
                lambda *_, shape=shape, **given: trained(size, shape, **given | {"autocast": trained.autocast}),
            ),
            patch.object(
                whole_models.prefill,
                "Plan",
                lambda **given: plan(**given | {"lengths": [150], "prefill_chunk_size": 64}),
            ),
        ):
            measures[args.part](parts, args)


RUN = {"machine": ask_for_the_cache, "warm_up": take_jobs, "tools": take_commands, "whole_models": take_models}


def main(out: Path) -> None:
    held = listed().programs
    found = {}
    for step in STEPS:
        seen, rows = launched(step, out.parent)
        raised = [row["why"] for row in rows if re.match(r"\w+(Error|Exception|Interrupt): ", row.get("why", ""))]
        found[step.name] = {
            "rows": len(rows),
            "without": sorted({row["what"] for row in rows if row["outcome"] != "not checked"} - seen.asked),
            "raised": raised,
            "programs": len(seen.programs),
            "listed": sorted({held[program] for program in seen.programs if program in held}),
            "missing": [what for program, what in seen.programs.items() if program not in held],
        }
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
