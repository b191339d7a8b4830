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
"""The steps of the GPU script, in order of worth, and what they are told."""

import argparse
from dataclasses import dataclass


NEIGHBOURS = ("yaad, PyTorch", "yaad, PyTorch compiled", "titans-pytorch", "Gated DeltaNet (fla)")
WHOLE_MODELS = ("moneta", "yaad", "memora", "llama", "gated-deltanet", "mamba2")
SIZES = ("170m", "340m")


@dataclass(frozen=True)
class Step:
    """A piece of the run that has a process of its own.

    Args:
        name (`str`): as `--steps` takes it.
        what (`str`): for `--list` and the report.
        module (`str`): the script in this folder.
        seconds (`float`): of a run of 7.5 minutes, at most.
        part (`str`): the script's `--part`.
    """

    name: str
    what: str
    module: str
    seconds: float
    part: str = ""


STEPS = (
    Step(
        "machine",
        "the device, versions, clocks, bandwidth, product rate, whether the carried cache fits",
        "machine",
        40,
    ),
    Step("warm_up", "every kernel that the later steps launch, compiled or loaded in 14 processes", "warm_up", 110),
    Step(
        "correctness", "d = C = 64, bfloat16, 128 programs, all families, against float64", "correctness", 90, "main"
    ),
    Step("sanitizer", "mlp_decode and mlp_backward under compute-sanitizer", "tools", 60, "sanitizer"),
    Step("times", "d = C = 64, bfloat16, beside SDPA, and decoding", "layers", 60, "main"),
    Step("variants", "num_stages, num_warps and tile width side by side", "variants", 60),
    Step("ncu", "stall reasons and traffic of mlp_forward and mlp_backward", "tools", 60, "ncu"),
    Step("more_correctness", "d = 128, then other sizes and precisions", "correctness", 90, "more"),
    Step("more_times", "d = 128, then other sizes, batches and lengths", "layers", 60, "more"),
    Step("training", "training steps of whole models", "whole_models", 120, "training"),
    Step("prefill", "long prompts of whole models", "whole_models", 90, "prefill"),
    Step("decode", "decoding with whole models", "whole_models", 120, "decode"),
)
NAMES = tuple(step.name for step in STEPS)
MINUTES = 7.5


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What the script is told and hands on to every step."""
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name holds it")
    parser.add_argument("--neighbours", nargs="*", default=[], choices=NEIGHBOURS, metavar="PATH",
                        help=f"slow ones, timed too: {', '.join(NEIGHBOURS)}")  # fmt: skip
    parser.add_argument("--models", nargs="+", default=["yaad", "llama"], choices=WHOLE_MODELS, help="whole models")
    parser.add_argument("--sizes", nargs="+", default=["170m"], choices=SIZES, help="of whole models")
    parser.add_argument("--compile", action="store_true", help="decode whole models through torch.compile as well")


def common_arguments(args: argparse.Namespace) -> list[str]:
    """The same arguments again, as a command line."""
    words = ["--quick"] * args.quick + ["--compile"] * args.compile
    words += ["--models", *args.models, "--sizes", *args.sizes]
    words += ["--neighbours", *args.neighbours] if args.neighbours else []
    return [*words, *([f"--only={args.only}"] if args.only else [])]
