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
"""What each step from Gated DeltaNet's layer to Yaad's costs: the same small model, one change at a time, trained on
the same tokens over a grid of learning rates.

    python examples/evaluation/bridge.py --list                    # the rungs, and what is there already
    python examples/evaluation/bridge.py                           # all of them: hours on a CPU, resumed where it stopped
    python examples/evaluation/bridge.py --only mlp 'yaad*'        # some of them
    python examples/evaluation/bridge.py --report                  # table and plot of what is there
    python examples/evaluation/bridge.py --smoke                   # seconds: everything runs
    python examples/evaluation/bridge.py --device cuda             # a wider model on more tokens

Every training is one JSON in `--out`; those that are there are skipped. One command at a time works in a folder, with
`--workers` processes of one thread each. `README.md` beside this file says how to read the result.
"""

import argparse
import sys
from functools import partial
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "examples"), str(ROOT / "benchmarks")]

from bridge_points import ENDS, RUNGS  # noqa: E402
from bridge_report import write_report  # noqa: E402
from bridge_training import SIZES, in_words, jobs_of, loss_in_words, matching, prepare_data, run_job  # noqa: E402
from study import add_arguments, parse_arguments, run_study  # noqa: E402


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, "runs/bridge", SIZES, "cuda", ("RUNG", "rungs to run, with * and ? as in file names"))
    parser.add_argument(
        "--keep-weights", action="store_true", help="a safetensors file beside each JSON, for probe.py and length.py"
    )
    return parse_arguments(parser, argv, SIZES)


def chosen(only: list[str] | None) -> list[str]:
    """Names of the rungs that match, in their order.

    Raises:
        `ValueError`: for a pattern that matches none.
    """
    return matching(only, RUNGS)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    size = SIZES[args.size]
    jobs = jobs_of(size, chosen(args.only), ENDS, args.learning_rates, args.seeds)
    run_study(
        args,
        jobs,
        partial(run_job, size=size, folder=args.out, device=args.device, keep_weights=args.keep_weights),
        groups={job.rung: in_words(RUNGS[job.rung]) for job in jobs},
        group_of=lambda job: job.rung,
        outcome=loss_in_words,
        report=lambda: write_report(args.out, size),
        prepare=lambda: prepare_data(args.out, size),
        trainings=f"trainings of {size.tokens:,} tokens",
    )


if __name__ == "__main__":
    main()
