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
"""Forecast a time series with a Miras language model: values as tokens, futures as samples.

What one learns: any sequence of ids is a language. A window of the series is standardised by its own past, cut into
bins, and each bin is a word (Chronos, arXiv 2403.07815); `generate(do_sample=True, num_return_sequences=...)` then
draws possible futures, and their quantiles are a probabilistic forecast.

    python examples/forecast.py                                   # sea surface temperatures, two minutes
    python examples/forecast.py --series co2
    python examples/forecast.py --csv sales.csv --column sold --season 7
    python examples/forecast.py --smoke

The last part of the series is held out. The error is given as MASE: one is the error of repeating the last season
within the training part. Beside it stands what repeating the last season gives on the held-out part. One short series
is little to learn from: the point is the way, and a fair comparison.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments, set_seed

import miras_hf


@dataclass
class Arguments:
    series: str = field(default="elnino", metadata={"help": "elnino, co2 or sunspots, which come with statsmodels."})
    csv: str | None = field(default=None, metadata={"help": "A CSV file with a series of your own."})
    column: str | None = field(default=None, metadata={"help": "Its column; by default the last one."})
    season: int | None = field(default=None, metadata={"help": "Length of a season of your own series."})
    context: int = field(default=72, metadata={"help": "Values that a forecast looks back on."})
    horizon: int = field(default=12, metadata={"help": "Values to forecast."})
    bins: int = field(default=96, metadata={"help": "Words of the language, between -4 and 4 deviations."})
    test_fraction: float = field(default=0.2, metadata={"help": "Share of the series held out at its end."})
    samples: int = field(default=40, metadata={"help": "Futures to draw."})
    smoke: bool = field(default=False, metadata={"help": "Few steps and futures."})


@dataclass
class ForecastArguments(TrainingArguments):
    output_dir: str = field(default="runs/forecast", metadata={"help": "Gets the model, forecast.png, forecast.json."})
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Windows per step and device."})
    learning_rate: float = field(default=5e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "Decay of matrices, not of norms, biases, memories."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warmup: steps, or a share of them if below 1."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warmup."})
    logging_steps: float = field(default=25, metadata={"help": "Steps between two training losses."})
    save_strategy: str = field(default="no", metadata={"help": "The model is saved at the end."})
    dataloader_pin_memory: bool = field(default=torch.cuda.is_available(), metadata={"help": "Where there is a GPU."})


SMOKE = {"max_steps": 50, "samples": 10, "logging_steps": 10}


def load(args: Arguments) -> tuple[np.ndarray, int]:
    """The series and the length of its season."""
    if args.csv:
        if args.season is None:
            raise ValueError("--csv needs --season, the number of values after which the series repeats itself.")
        table = pd.read_csv(args.csv)
        return table[args.column or table.columns[-1]].interpolate().to_numpy(float), args.season
    from statsmodels import datasets

    if args.series == "elnino":  # a row a year, a column a month
        return datasets.elnino.load_pandas().data.iloc[:, 1:].to_numpy(float).ravel(), 12
    if args.series == "co2":  # weekly, with gaps
        return datasets.co2.load_pandas().data["co2"].resample("MS").mean().interpolate().to_numpy(float), 12
    if args.series == "sunspots":  # yearly
        return datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy(float), 11
    raise ValueError(f"--series must be elnino, co2 or sunspots, got {args.series!r}.")


class Bins:
    """Values as ids and back, each window standardised by the mean and deviation of its first `context` values."""

    def __init__(self, bins: int, context: int):
        self.edges = np.linspace(-4, 4, bins - 1)
        self.centers = np.concatenate([[-4.0], (self.edges[1:] + self.edges[:-1]) / 2, [4.0]])
        self.context = context

    def scale(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        past = windows[:, : self.context]
        return past.mean(1, keepdims=True), past.std(1, keepdims=True) + 1e-8

    def encode(self, windows: np.ndarray) -> np.ndarray:
        mean, deviation = self.scale(windows)
        return np.digitize((windows - mean) / deviation, self.edges)

    def decode(self, ids: np.ndarray, windows: np.ndarray) -> np.ndarray:
        mean, deviation = self.scale(windows)
        return self.centers[ids] * deviation + mean


def plot_forecast(past: np.ndarray, future: np.ndarray, samples: np.ndarray, ax=None):
    """
    Draw what was known, what came, and the forecast's median with its band of 80%.

    Args:
        past (`np.ndarray` of shape `[context]`): Values before the forecast.
        future (`np.ndarray` of shape `[horizon]`): Values that came.
        samples (`np.ndarray` of shape `[samples, horizon]`): Futures drawn.
        ax (`matplotlib.axes.Axes`, *optional*): Where to draw; a new figure if not given.

    Returns:
        `matplotlib.axes.Axes`
    """
    ax = ax or Figure(figsize=(7, 3.5), layout="constrained").subplots()
    low, median, high = np.quantile(samples, [0.1, 0.5, 0.9], axis=0)
    steps = np.arange(len(past), len(past) + len(future))
    ax.plot(np.arange(len(past)), past, color="0.4", linewidth=1.2, label="past")
    ax.plot(steps, future, "o", color="black", markersize=3, label="what came")
    ax.plot(steps, median, color="#0072b2", label="forecast, median")
    ax.fill_between(steps, low, high, color="#0072b2", alpha=0.25, linewidth=0, label="80% of futures")
    ax.set(xlabel="step", ylabel="value")
    ax.legend(fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return ax


def main(argv: list[str] | None = None) -> dict[str, float]:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser((Arguments, ForecastArguments))
    if "--smoke" in argv:
        parser.set_defaults(**SMOKE)
    args, training = parser.parse_args_into_dataclasses(argv)
    set_seed(training.seed)
    values, season = load(args)
    length, cut = args.context + args.horizon, int(len(values) * (1 - args.test_fraction))
    if cut < 2 * length or args.context < season:
        raise ValueError(
            f"--context {args.context} and --horizon {args.horizon} need a season of {season} to fit into the context "
            f"and {2 * length} values to train on, but the series has {cut}."
        )
    bins = Bins(args.bins, args.context)
    windows = np.lib.stride_tricks.sliding_window_view
    known = Dataset.from_dict({"values": windows(values[:cut], length)})
    noise = np.random.default_rng(training.seed)

    def vary(batch: dict) -> dict:
        # The windows overlap and are soon known by heart: each time one comes, it is stretched, shifted and blurred.
        window = np.array(batch["values"])
        _, deviation = bins.scale(window)
        blur, shift, stretch = noise.normal(size=window.shape), *noise.normal(size=(2, len(window), 1))
        varied = bins.encode(window + 0.15 * deviation * blur)
        mean = varied.mean(1, keepdims=True)
        varied = (varied - mean) * np.exp(0.2 * stretch) + mean + 0.05 * args.bins * shift
        ids = torch.tensor(varied.round().clip(0, args.bins - 1), dtype=torch.long)
        return {"input_ids": ids, "labels": ids}

    train = known.with_transform(vary)

    config = miras_hf.YaadConfig(
        vocab_size=args.bins,
        hidden_size=64,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "miras_memory"],
        sliding_window=2 * season,
        num_attention_heads=4,
        chunk_size=16,
        # every id is a value: nothing ends a series, nothing pads it
        bos_token_id=None,
        eos_token_id=None,
    )
    training.remove_unused_columns = False  # the transform makes the columns that the model takes
    trainer = Trainer(AutoModelForCausalLM.from_config(config), training, train_dataset=train)
    trainer.train()
    model = trainer.model.eval()
    model.config.use_cache = True
    trainer.save_model()

    # forecasts start every half horizon; none looks at a value after its start
    test = windows(values[cut - args.context :], length)[:: max(1, args.horizon // 2)]
    past = torch.tensor(bins.encode(test)[:, : args.context], device=model.device)
    drawn = model.generate(
        past,
        attention_mask=torch.ones_like(past),
        do_sample=True,
        top_k=0,
        max_new_tokens=args.horizon,
        num_return_sequences=args.samples,
        pad_token_id=0,
    )[:, args.context :]
    samples = bins.decode(drawn.cpu().numpy(), test.repeat(args.samples, 0)).reshape(len(test), args.samples, -1)

    future = test[:, args.context :]
    repeated = test[:, args.context - season :][:, np.arange(args.horizon) % season]
    unit = np.abs(values[season:cut] - values[: cut - season]).mean()
    low, median, high = np.quantile(samples, [0.1, 0.5, 0.9], axis=1)
    result = {
        "mase": float(np.abs(median - future).mean() / unit),
        "mase_seasonal_naive": float(np.abs(repeated - future).mean() / unit),
        "coverage_80": float(((low <= future) & (future <= high)).mean()),
        "loss": trainer.state.log_history[-1]["train_loss"],
        "loss_of_guessing": math.log(args.bins),
    }
    folder = Path(training.output_dir)
    (folder / "forecast.json").write_text(json.dumps({**result, "median": median.tolist()}, indent=2))
    plot_forecast(test[-1, : args.context], future[-1], samples[-1]).figure.savefig(folder / "forecast.png", dpi=150)
    print(f"\n{len(test)} forecasts of {args.horizon} values on the held-out end of {len(values)}:")
    print(f"MASE {result['mase']:.3f}; repeating the last season: {result['mase_seasonal_naive']:.3f}")
    print(
        f"{result['coverage_80']:.0%} of the values fell into the band meant for 80%. See {folder / 'forecast.png'}."
    )
    return result


if __name__ == "__main__":
    main()
