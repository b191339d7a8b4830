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
"""Perplexity by position: does a model predict better the more of a text it has read, and does it stay good?

What one learns: a text of any length is read piece by piece with the cache as the only thing that is carried along, in
constant memory; and the curve shows how far back a model's context really helps, beyond the length it was trained on too.
Lines that fall to the end use the whole text; a line that turns up has met lengths it cannot handle.

    python examples/perplexity_by_position.py --models runs/moneta-stdlib runs/llama --length 8192
    python examples/perplexity_by_position.py --models me/my-model --files 'books/*.txt' --out by-position
    python examples/perplexity_by_position.py --smoke                    # a tiny untrained model, to see that it runs

Writes `<out>.json` (nats per token with the standard error over documents, for each bucket of positions) and `<out>.png`.
By default the documents are the longest files of the Python standard library: use files that were held out from training.
"""

import glob
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser, set_seed
from transformers.cache_utils import Cache

import miras_hf
from miras_hf.compat import CACHE_NAME
from miras_hf.model_card import machine, versions


@dataclass
class Arguments:
    models: list[str] = field(default_factory=list, metadata={"help": "Folders or repositories, tokenizers included."})
    files: list[str] | None = field(default=None, metadata={"help": "Text files or globs, a document each."})
    documents: int = field(default=16, metadata={"help": "Read so many of them, the longest."})
    length: int = field(default=4096, metadata={"help": "Tokens of each; shorter documents are left out."})
    piece: int = field(default=512, metadata={"help": "Tokens read in one forward."})
    buckets: int = field(default=12, metadata={"help": "Buckets of positions, of equal width on a log scale."})
    out: str = field(default="perplexity_by_position", metadata={"help": "Where results go, without an ending."})
    smoke: bool = field(default=False, metadata={"help": "A tiny untrained model and little text."})


def longest_texts(args: Arguments) -> list[str]:
    if args.files:
        paths = [Path(path) for pattern in args.files for path in sorted(glob.glob(pattern, recursive=True))]
    else:
        paths = sorted(Path(json.__file__).parent.parent.glob("*.py"))
    return sorted((path.read_text(errors="replace") for path in paths), key=len, reverse=True)[: 4 * args.documents]


@torch.inference_mode()
def losses_of(
    model,
    ids: torch.Tensor,
    piece: int,
    cache: Cache | None = None,
    after_piece: Callable[[int, Cache], None] = lambda tokens, cache: None,
) -> torch.Tensor:
    """Nats of every token but the first, `[tokens - 1]`, float32; `ids` is `[tokens]`.

    A `cache` that has read something is gone on from. `after_piece` is called with the tokens read so far, and the cache.
    """
    cache, losses = DynamicCache(config=model.config) if cache is None else cache, []
    for start in range(0, len(ids) - 1, piece):
        inputs, targets = ids[start : start + piece], ids[start + 1 : start + piece + 1]
        inputs = inputs[: len(targets)]
        output = model(input_ids=inputs[None], use_cache=True, **{CACHE_NAME: cache})
        losses.append(torch.nn.functional.cross_entropy(output.logits[0].float(), targets, reduction="none"))
        after_piece(start + len(inputs), cache)
    return torch.cat(losses).cpu()


def edges_of(positions: int, buckets: int) -> list[int]:
    """Where buckets end that are equally wide on a log scale, 0 first."""
    return sorted({round(positions ** (i / buckets)) for i in range(buckets + 1)} | {0})


def bucketed(losses: torch.Tensor, buckets: int) -> list[dict[str, float]]:
    """Mean and standard error of `[documents, positions]` in buckets of positions, equally wide on a log scale."""
    edges, rows = edges_of(losses.shape[1], buckets), []
    for first, last in zip(edges, edges[1:]):
        means = losses[:, first:last].mean(-1)
        error = means.std().item() / math.sqrt(len(means)) if len(means) > 1 else float("nan")
        rows.append({"first": first + 1, "last": last, "loss": means.mean().item(), "standard_error": error})
    return rows


def plot(results: dict[str, list[dict[str, float]]], ax=None):
    """Draws the loss over the position, a line for each model, on `ax` or a new figure; returns the axes."""
    from matplotlib.figure import Figure

    ax = ax or Figure(figsize=(6, 4), layout="constrained").subplots()
    for name, rows in results.items():
        middle = [math.sqrt(row["first"] * row["last"]) for row in rows]
        ax.errorbar(middle, [r["loss"] for r in rows], [r["standard_error"] for r in rows], marker="o", label=name)
    ax.set(xscale="log", xlabel="position in the text (tokens)", ylabel="loss (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def tiny_model(folder: str) -> str:
    set_seed(0)
    tokenizer = miras_hf.MirasTokenizer.train_from_iterator([Path(json.__file__).read_text()], vocab_size=300)
    config = miras_hf.MonetaConfig.from_preset("tiny", vocab_size=len(tokenizer), hidden_size=32)
    miras_hf.MonetaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    if args.smoke:
        args.models, args.length, args.piece, args.documents = [tiny_model(tempfile.mkdtemp())], 128, 48, 3
    if not args.models:
        raise ValueError("--models names no model: give the folder or repository of at least one, or --smoke.")
    texts, results = longest_texts(args), {}
    for name in args.models:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        rows = [tokenizer(text, return_tensors="pt", split_special_tokens=True)["input_ids"][0] for text in texts]
        rows = [row[: args.length + 1] for row in rows if len(row) > args.length][: args.documents]
        if not rows:
            raise ValueError(f"No document has more than --length {args.length} tokens of the tokenizer of {name}.")
        losses = torch.stack([losses_of(model, row.to(model.device), args.piece) for row in rows])
        results[name] = bucketed(losses, args.buckets)
        print(f"\n{name}: {len(rows)} documents of {args.length} tokens\n  tokens            nats per token")
        for row in results[name]:
            print(f"  {row['first']:>7} - {row['last']:<7} {row['loss']:.3f} ± {row['standard_error']:.3f}")
    report = {"length": args.length, "results": results, "machine": machine(), "versions": versions()}
    Path(f"{args.out}.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(results).figure.savefig(f"{args.out}.png", dpi=150)
    print(f"\nWritten: {args.out}.json, {args.out}.png. Losses of different tokenizers cannot be compared.")


if __name__ == "__main__":
    main()
