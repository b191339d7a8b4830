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
"""Whether a model says the same however its text is cut: in one call, in pieces, token by token, over 100,000 tokens.

    python examples/evaluation/stability.py                                # new models of every family, hours
    python examples/evaluation/stability.py --models yaad --sizes 340m --chunks 16
    python examples/evaluation/stability.py --checkpoint runs/yaad-stdlib  # a trained model on its tokenizer's text
    python examples/evaluation/stability.py --checkpoint runs/ablations/yaad-lr0.004-seed0.json  # of --keep-weights there
    python examples/evaluation/stability.py --report                       # the table of what is done

Token by token is done twice: as `generate()` does it, and in a compiled step with a static cache
(`generate(cache_implementation="static")`), which takes half as long and rounds otherwise again.

The forms sum in different orders. A memory that contracts forgets such differences; one whose steps are too large makes
them grow until rounding decides what it says. The deviation of a window of 1,000 tokens is `||a - b|| / ||b||` of the
last hidden states, `b` those of the single call. Every cut of every model is one JSON in `--out`; those that are there
are not computed again.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "examples"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from checkpoints import check_fingerprint, fingerprint, trained_model  # noqa: E402
from pretrain import stdlib_files  # noqa: E402
from probe import text_ids  # noqa: E402
from provenance import command_line, machine  # noqa: E402
from stored_config import config_fields, means_the_same  # noqa: E402
from study import write_json  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache  # noqa: E402

from miras_hf import MirasConfig  # noqa: E402
from miras_hf.compat import CACHE_NAME  # noqa: E402
from miras_hf.configuration_miras import PRESETS  # noqa: E402


WINDOW = 1000
"""Tokens whose deviation is one number."""

LIMIT = 1e-3
"""Deviation up to which two forms are said to agree in float32."""

LAYERS, HEADS = 4, 2
MODELS = ("moneta", "yaad", "memora")
SIZES = ("tiny", "170m", "340m")
CHUNKS = (16, 64)


class Cut(NamedTuple):
    """How a text is cut: into calls of so many tokens, compiled by a backend or not at all."""

    piece: int
    backend: str | None
    says: str


CUTS = {
    "pieces": Cut(777, None, "pieces of 777"),
    "tokens": Cut(1, None, "token by token"),
    "compiled": Cut(1, "inductor", "token by token, compiled"),
}


@dataclass(frozen=True)
class Job:
    """One model and one way to cut its text.

    Args:
        model (`str`): a family, new from its seed; or a trained one, its folder or its training's JSON.
        size (`str`): the preset whose width of a head is taken; empty for a checkpoint.
        chunk_size (`int`): of the memory; 0 for a checkpoint's own.
        cut (`str`): of `CUTS`.
        tokens (`int`): length of the text.
        seed (`int`): of a new model's weights.
    """

    model: str
    size: str
    chunk_size: int
    cut: str
    tokens: int
    seed: int = 0

    @property
    def name(self) -> str:
        parts = [
            Path(self.model.removesuffix(".json")).name,
            self.size,
            f"chunk{self.chunk_size}" if self.size else "",
            self.cut,
        ]
        parts += [str(self.tokens), f"seed{self.seed}" if self.size else ""]
        return "-".join(part for part in parts if part)


def model_and_text(job: Job):
    """The model, and the ids of its text: that of the standard library, as bytes for a new model."""
    if job.size:
        return new_model(job)
    model, tokenizer = trained_model(job.model, torch.float32, "cpu")
    return model, text_ids(tokenizer, None, job.tokens)


def config_of(job: Job) -> MirasConfig:
    """Four layers and two heads as wide as those of the preset."""
    preset = PRESETS[job.size]
    head_dim = preset["hidden_size"] // preset["num_attention_heads"]
    return AutoConfig.for_model(
        job.model,
        vocab_size=256,
        hidden_size=HEADS * head_dim,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        chunk_size=job.chunk_size,
    )


def new_model(job: Job):
    """A model of `config_of`, and the bytes of a text for it."""
    torch.manual_seed(job.seed)
    text = b""
    for file in stdlib_files():
        text += Path(file).read_bytes()
        if len(text) >= job.tokens:
            break
    return AutoModelForCausalLM.from_config(config_of(job)), torch.tensor([list(text[: job.tokens])])


@torch.inference_mode()
def hidden_states(model, ids: Tensor, piece: int | None, backend: str | None = None) -> Tensor:
    """Last hidden states `[tokens, hidden_size]`, of one call or of calls of `piece` tokens that go on from a cache.

    With the `backend` of a compiler the cache is a static one, and all calls but the first, which makes its tensors, are
    compiled.
    """
    decoder = model.get_decoder().eval()
    if piece is None:
        return decoder(ids, use_cache=False).last_hidden_state[0]
    cache, call, parts = None, decoder, []
    if backend is not None:
        cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
    for part in ids.split(piece, dim=1):
        output = call(part, **{CACHE_NAME: cache}, use_cache=True)
        cache = output[CACHE_NAME]
        parts.append(output.last_hidden_state[0])
        if backend is not None and call is decoder:
            torch.compiler.reset()  # of models before, after some of which a compiler gives the same code up
            call = torch.compile(decoder, fullgraph=True, backend=backend)
    return torch.cat(parts)


def deviations(found: Tensor, expected: Tensor) -> list[float]:
    """`||a - b|| / ||b||` of each window."""
    pairs = zip(found.double().split(WINDOW), expected.double().split(WINDOW), strict=True)
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


def run_job(job: Job, model, ids: Tensor, expected: Tensor, folder: Path) -> dict[str, Any]:
    """Reads the text in pieces, and writes how far the result is from `expected`."""
    started = time.perf_counter()
    cut = CUTS[job.cut]
    by_window = deviations(hidden_states(model, ids, cut.piece, cut.backend), expected)
    config = model.config
    result = {
        "job": asdict(job),
        "read": ids.shape[1],
        "head_dim": config.head_dim,
        "layers": config.num_hidden_layers,
        "chunk_size": config.chunk_size,
        "config": config_fields(config),
        **({} if job.size else {"weights": fingerprint(model)}),
        "window": WINDOW,
        "deviation": [x if math.isfinite(x) else None for x in by_window],
        "seconds": time.perf_counter() - started,
        "command": command_line(),
        "machine": machine(torch.get_num_threads(), packages=("torch", "transformers", "miras-hf")),
    }
    write_json(folder / f"{job.name}.json", result)
    return result


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder.

    Raises:
        `ValueError`: for a new model of other defaults than today's.
    """
    results = []
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text())
        job = Job(**result["job"])
        if job.size and not means_the_same(result["config"], config_fields(config_of(job))):
            raise ValueError(f"{file} is of a model with other defaults than today's: move it away or run it again.")
        results.append(result)
    return results


def worst(result: dict[str, Any]) -> float:
    """The largest deviation of a window; infinite where something was not a number."""
    return max(math.inf if x is None else x for x in result["deviation"])


def table(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | head_dim | chunk | cut | tokens | first window | largest | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        job, largest = result["job"], worst(result)
        first = result["deviation"][0]
        cells = [
            Path(job["model"].removesuffix(".json")).name,
            str(result["head_dim"]),
            str(result["chunk_size"]),
            CUTS[job["cut"]].says,
            f"{result['read']:,}",
            "not a number" if first is None else f"{first:.1e}",
            "not a number" if math.isinf(largest) else f"{largest:.1e}",
            "" if largest <= LIMIT else f"above {LIMIT:g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    of_new_models = {"models": list(MODELS), "sizes": list(SIZES), "chunks": list(CHUNKS), "seed": 0}
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="whose width of a head")
    parser.add_argument("--chunks", nargs="+", type=int)
    parser.add_argument(
        "--checkpoint", help="a trained model in the place of new ones, its folder or its training's JSON"
    )
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument("--report", action="store_true", help="the table of what is done, run nothing")
    args = parser.parse_args(argv)
    for name, default in of_new_models.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.checkpoint is not None:
            parser.error(f"--{name} is of new models, and goes with no --checkpoint")
    if args.tokens < 2 * WINDOW:
        parser.error(f"--tokens must be at least {2 * WINDOW}, got {args.tokens}")
    return args


def jobs_of(args: argparse.Namespace) -> list[list[Job]]:
    """The jobs, those of one model together."""
    if args.checkpoint is not None:
        return [[Job(args.checkpoint, "", 0, cut, args.tokens) for cut in args.cuts]]
    return [
        [Job(model, size, chunk, cut, args.tokens, args.seed) for cut in args.cuts]
        for model in args.models
        for size in args.sizes
        for chunk in args.chunks
    ]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    read_results(args.out)  # refused before any work
    for jobs in jobs_of(args) if not args.report else ():
        files = {job: args.out / f"{job.name}.json" for job in jobs}
        waiting = [job for job, file in files.items() if not file.exists()]
        if not waiting and args.checkpoint is None:
            continue
        model, ids = model_and_text(jobs[0])
        for file in files.values() if args.checkpoint is not None else ():
            check_fingerprint(file, model)
        if not waiting:
            continue
        expected = hidden_states(model, ids, None)
        for job in waiting:
            result = run_job(job, model, ids, expected, args.out)
            print(f"{job.name}: {worst(result):.1e}, {result['seconds']:.0f} s", flush=True)
    results = read_results(args.out)
    lines = table(results)
    (args.out / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return results


if __name__ == "__main__":
    main()
