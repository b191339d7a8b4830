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
"""What each part of Moneta, Yaad and Memora is worth: the library's defaults, and each of them with one thing changed.

    python examples/evaluation/ablations.py --list                       # the changes, and what is there already
    python examples/evaluation/ablations.py                              # all: half a day of one thread, resumed
    python examples/evaluation/ablations.py --only yaad 'yaad-*'         # one model, its noisy trainings included
    python examples/evaluation/ablations.py --learning-rates 4e-3 --seeds 0  # one training each
    python examples/evaluation/ablations.py --report                     # tables and plot of what is there
    python examples/evaluation/ablations.py --smoke                      # a minute: everything runs
    python examples/evaluation/ablations.py --device cuda --minutes 9    # a wider model on more tokens

Every training is one JSON in `--out`; those that are there are skipped. One command at a time works in a folder, with
`--workers` processes of one thread each. `README.md` beside this file says how to read the result.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "examples"), str(ROOT / "benchmarks")]

from ablation_models import build_model, point_of, served_at  # noqa: E402
from ablation_points import ABLATIONS, MODELS, SERVED_AT  # noqa: E402
from ablation_report import write_report  # noqa: E402
from bridge_training import (  # noqa: E402
    SIZES,
    Job,
    Size,
    Trained,
    in_words,
    jobs_of,
    loss_in_words,
    matching,
    next_token_loss,
    prepare_data,
    run_training,
)
from corruption import CORRUPTIONS, corrupted_loss, under_corruption  # noqa: E402
from study import add_arguments, parse_arguments, run_study  # noqa: E402


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    only = "what to train, with * and ? as in file names"
    add_arguments(parser, "runs/ablations", SIZES, "cuda", ("NAME", only))
    parser.add_argument(
        "--keep-weights", action="store_true", help="a safetensors file beside each JSON, for length.py"
    )
    return parse_arguments(parser, argv, SIZES)


def measures(trained: Trained, name: str) -> dict[str, Any]:
    """What is measured of a trained model besides its loss."""
    ablation, found = ABLATIONS[name], {}
    if ablation.served:
        found["served"] = {}
        for chunk in SERVED_AT:
            with served_at(trained.model, chunk):
                found["served"][str(chunk)] = trained.validate()
    if ablation.tried:
        found["corrupted"] = {corruption.name: under_corruption(trained, corruption) for corruption in CORRUPTIONS}
    return found


def run_job(
    job: Job, size: Size, folder: Path, device: str, keep_weights: bool, deadline: float = math.inf
) -> dict[str, Any] | None:
    """Trains one ablation, see `bridge_training.run_training`."""
    ablation = ABLATIONS[job.rung]
    corruption = ablation.trained_with
    return run_training(
        job,
        size,
        folder,
        partial(build_model, ablation, size.shape, job.seed),
        {"says": ablation.says, "parent": ablation.parent, "point": point_of(job.rung, size.shape)},
        device=device,
        keep_weights=keep_weights,
        deadline=deadline,
        loss=next_token_loss if corruption is None else corrupted_loss(corruption, job.seed),
        measure=partial(measures, name=job.rung),
    )


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    size = SIZES[args.size]
    jobs = jobs_of(size, matching(args.only, ABLATIONS), MODELS, args.learning_rates, args.seeds)
    run_study(
        args,
        jobs,
        partial(run_job, size=size, folder=args.out, device=args.device, keep_weights=args.keep_weights),
        groups={job.rung: in_words(ABLATIONS[job.rung]) for job in jobs},
        group_of=lambda job: job.rung,
        outcome=loss_in_words,
        report=lambda: write_report(args.out, size),
        prepare=lambda: prepare_data(args.out, size),
        trainings=f"trainings of {size.tokens:,} tokens",
        width=24,
    )


if __name__ == "__main__":
    main()
