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
"""Whether the memories of a checkpoint store what they read: scales, recall, forgetting, and what grows.

    python examples/evaluation/probe.py runs/moneta-stdlib                       # any Miras checkpoint, a folder or a name
    python examples/evaluation/probe.py runs/moneta-stdlib --text book.txt --tokens 8192
    python examples/evaluation/probe.py runs/bridge/mlp-lr0.004-seed0.json       # of bridge.py with --keep-weights
    python examples/evaluation/probe.py runs/bridge/mlp-lr0.004-seed0.json --at-start

Writes `probe.json` and `probe.png` into `--out` and prints a table, one row a layer. What the numbers mean stands in
`miras_hf.memory.probe`; `MemoryMonitorCallback(full=True)` logs them while a model trains.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT / "examples"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from provenance import command_line, machine  # noqa: E402
from study import without_nan  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase  # noqa: E402

from miras_hf.callbacks import measure_memories  # noqa: E402
from miras_hf.memory.probe import LAGS, MemoryProbe, probe_memory, summary  # noqa: E402
from miras_hf.modeling_miras import MirasMixer  # noqa: E402


COLUMNS = (
    "value_rms",
    "initial_rms",
    "write_rms",
    "write_cosine",
    "write_share",
    "key_alignment",
    "chunk_share",
    "writing_heads",
    *(f"recall_{lag}" for lag in LAGS),
    "half_life_10",
    "half_life_50",
    "half_life_90",
    "lyapunov",
    "largest_growth",
)


def text_ids(tokenizer: PreTrainedTokenizerBase, text: Path | None, tokens: int) -> Tensor:
    """`[1, tokens]` ids of a text, by default of the standard library's source, module after module."""
    import pretrain

    ids: list[int] = []
    for file in [text] if text is not None else map(Path, pretrain.stdlib_files()):
        ids += tokenizer(file.read_text(encoding="utf-8", errors="replace"), split_special_tokens=True)["input_ids"]
        if len(ids) >= tokens:
            break
    return torch.tensor([ids[:tokens]])


def of_training(file: Path, tokens: int, at_start: bool) -> tuple[nn.Module, Tensor]:
    """The model of a training of `bridge.py` or `ablations.py`, and its validation text.

    Raises:
        `ValueError`: for a training whose weights were not kept.
    """
    from checkpoints import model_of_training

    model = model_of_training(file, at_start)
    rows = torch.load(file.parent / "data.pt")["rows"]["validation"]
    return model, rows.flatten()[None, :tokens].long()


def curves(probe: MemoryProbe) -> dict[str, Any]:
    """What single numbers leave out: recall by lag, all half-lives in order, log growth summed over the text."""
    growth = probe.log_growth.cumsum(0).mean(-1)
    return {
        "recall": probe.recall.mean(-1).tolist(),
        "chance": probe.chance.mean(-1).tolist(),
        "half_lives": probe.half_lives.flatten().sort().values.tolist(),
        "growth_tokens": [(2 + chunk) * probe.chunk_size for chunk in range(len(growth))],
        "growth": growth.tolist(),
    }


def table(layers: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "| layer | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for layer, found in layers.items():
        cells = ["" if found[name] is None else f"{found[name]:.3g}" for name in COLUMNS]
        yield f"| {layer} | " + " | ".join(cells) + " |"


def plot(layers: dict[str, dict[str, Any]]):
    """Four pictures: scales by layer, recall by lag, half-lives, and the growth of a difference; returns the figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    (scales, recall), (spectrum, growth) = figure.subplots(2, 2)
    names = list(layers)
    for name in ("value_rms", "initial_rms", "read_rms", "write_rms"):
        scales.plot(names, [layers[layer][name] for layer in names], "o-", label=name.replace("_", " "))
    scales.set(xlabel="layer", ylabel="root mean square", yscale="log")
    for i, (layer, found) in enumerate(layers.items()):
        for name, style in (("recall", "o-"), ("chance", ":")):
            points = [
                (lag + 1, value) for lag, value in zip(LAGS, found["curves"][name], strict=True) if value is not None
            ]
            label = f"layer {layer}" if name == "recall" else None
            recall.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label)
        half_lives = found["curves"]["half_lives"]
        share = [(j + 0.5) / len(half_lives) for j in range(len(half_lives))]
        spectrum.plot(half_lives, share, color=f"C{i}", label=f"layer {layer}")
        growth.plot(found["curves"]["growth_tokens"], found["curves"]["growth"], color=f"C{i}", label=f"layer {layer}")
    recall.set(xlabel="1 + tokens since", ylabel="cosine of recall and value (dots: another)", xscale="log")
    spectrum.set(xlabel="half-life (tokens)", ylabel="share of gates below", xscale="log")
    growth.set(xlabel="tokens", ylabel="log growth of a small difference")
    for ax in (scales, recall, spectrum, growth):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    return figure


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", help="a folder or name of a saved model, or the JSON of a training")
    parser.add_argument("--text", type=Path, help="a text file to read; by default the standard library's source")
    parser.add_argument("--tokens", type=int, default=2048, help="how much of the text is read")
    parser.add_argument("--at-start", action="store_true", help="a training's model before its first step")
    parser.add_argument("--out", type=Path, default=Path("runs/probe"), help="folder of probe.json and probe.png")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        parser.error(f"--tokens must be at least 1, got {args.tokens}")
    of_bridge = args.checkpoint.endswith(".json")
    if of_bridge and args.text is not None:
        parser.error("--text is for saved models: trainings are probed on their own validation text")
    if args.at_start and not of_bridge:
        parser.error("--at-start is for trainings of bridge.py")
    if of_bridge:
        model, ids = of_training(Path(args.checkpoint), args.tokens, args.at_start)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint)
        ids = text_ids(AutoTokenizer.from_pretrained(args.checkpoint), args.text, args.tokens)
    if not any(isinstance(module, MirasMixer) for module in model.modules()):
        parser.error(f"{args.checkpoint} is a {type(model).__name__}, which has no memories")
    probes = measure_memories(model, {"input_ids": ids}, probe_memory)
    if not probes:
        parser.error(f"{args.checkpoint} has layers, but no memory of ours in them")
    layers = {str(layer): summary(probe) | {"curves": curves(probe)} for layer, probe in probes.items()}
    report = without_nan(
        {
            "checkpoint": args.checkpoint,
            "at_start": args.at_start,
            "tokens": ids.shape[1],
            "lags": LAGS,
            "layers": layers,
            "command": command_line(),
            "machine": machine(torch.get_num_threads(), packages=("torch", "transformers", "miras-hf")),
        }
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "probe.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    plot(report["layers"]).savefig(args.out / "probe.png", dpi=150)
    for line in table(report["layers"]):
        print(line)
    return report


if __name__ == "__main__":
    main()
