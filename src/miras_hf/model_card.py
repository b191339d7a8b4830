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
"""Model cards: what a saved folder says about its model and the training run behind it.

`save_pretrained` and `push_to_hub` of every Miras model write one. A trainer made with [`ModelCardMixin`] adds what it
knows of the run, and a script may add what only it knows (data, command, a sample), in the same nested dict:

```text
data:       name, id, language, train_rows, validation_rows, block_size, vocab_size
training:   steps, tokens, rows_per_step, learning_rate, schedule, weight_decay, optimizer, precision, seed
metrics:    step, and whatever the last evaluation measured
validation: before, after: loss, perplexity, bits_per_byte
seconds:    training, total
machine:    cpu, cpu_capability, cores, threads, gpus, processes, peak_memory (bytes)
versions:   package: version
base_model, command, prompt, sample
```
"""

import json
import os
import platform
import re
import resource
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig, PreTrainedModel

from .files import write_text
from .hub import INSTALL
from .memory.registry import CHOICES, choice_of


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:  # importing it takes a second and accelerate
    _Trainer = object


TEMPLATE = Path(__file__).with_name("model_card.md")
# A card with this line is ours to replace, also the draft that Transformers makes for a new repository.
MARKER = "<!-- Written by miras-hf, and again at the next save. Remove this line to keep your own version. -->"
_TRANSFORMERS_DRAFT = "This model card has been automatically generated"

_TASKS = {
    "ForCausalLM": ("text-generation", "language model"),
    "ForSequenceClassification": ("text-classification", "text classifier"),
    "ForTokenClassification": ("token-classification", "token classifier"),
}
_PACKAGES = ("miras-hf", "torch", "transformers", "datasets", "tokenizers", "accelerate", "peft", "trl")


def model_card(
    model: PreTrainedModel, run: dict[str, Any] | None = None, *, name: str = "model", **metadata
) -> ModelCard:
    """
    The card of a model, with metadata for the Hub.

    Args:
        model (`PreTrainedModel`): any model; those of miras-hf are described by their four choices.
        run (`dict`, *optional*): the training run, see above; by default what a trainer left at the model.
        name (`str`, *optional*, defaults to `"model"`): folder or repository under which the model is loaded.
        metadata: further fields of `huggingface_hub.ModelCardData`, for instance `license` or `datasets`.

    Returns:
        `huggingface_hub.ModelCard`
    """
    run = run or getattr(model, "training_run", None)
    sample = _fenced((run or {}).get("sample"), "text", shortest=4)
    command = _fenced((run or {}).get("command"))
    prompt = python_literal((run or {}).get("prompt") or "The")
    location, name, run = python_literal(name), _one_line(name), _one_line(run)
    config = model.config
    memories = [module for module in model.modules() if hasattr(module, "initial_state") and hasattr(module, "rule")]
    ending = next((ending for ending in _TASKS if type(model).__name__.endswith(ending)), None)
    task, kind = _TASKS.get(ending, ("feature-extraction", "model without a head"))
    data = (run or {}).get("data", {})
    base_model, license = (getattr(config, field, None) for field in ("base_model", "license"))
    fields = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "language": data.get("language"),
        "base_model": (run or {}).get("base_model") or base_model,
        "license": license,
        "datasets": [data["id"]] if data.get("id") else None,
        "tags": ["miras-hf", config.model_type, "arxiv:2504.13173"],
        "model_name": str(name),
        "eval_results": _eval_results(run, task),
    }
    tags = metadata.pop("tags", None) or []
    fields |= {key: value for key, value in metadata.items() if value is not None}
    fields["tags"] = [
        *fields["tags"],
        *(tag for tag in ([tags] if isinstance(tags, str) else tags) if tag not in fields["tags"]),
    ]
    return ModelCard.from_template(
        ModelCardData(ignore_metadata_errors=False, **fields),
        template_path=str(TEMPLATE),
        marker=MARKER,
        title=_in_text(name),
        location=location,
        prompt=prompt,
        sample=sample,
        command=command,
        install=INSTALL,
        task=task,
        kind=kind,
        miras=hasattr(config, "first_memory_layer"),
        parameters=model.num_parameters(),
        choices=four_choices(config) if memories else None,
        memory_bytes=4 * sum(weight.numel() for memory in memories for weight in memory.initial_state),
        config=changed_fields(config),
        converted_from=_in_text(_one_line(base_model)),
        license=_in_text(_one_line(license)),
        run=_in_text(run),
    )


def python_literal(text: Any) -> str:
    r"""A string as Python source on one line, in double quotes, whatever is in it.

    ```python
    >>> python_literal('a "b"\n')
    '"a \\"b\\"\\n"'
    ```"""
    # names of folders may hold bytes that are no text, which Python keeps as lone surrogates
    return json.dumps(str(text), ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _fenced(text: Any, language: str = "", shortest: int = 3) -> str | None:
    """Text between fences longer than any row of backticks in it, which would end them."""
    if not text:
        return None
    text = _encodable(str(text))
    fence = "`" * max(shortest, *(len(row) + 1 for row in re.findall("`+", text) or [""]))
    return f"{fence}{language}\n{text}\n{fence}"


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _one_line(value: Any) -> Any:
    """A value with all that is not printed, line ends and the like, as spaces in its strings."""
    if isinstance(value, str):
        return " ".join("".join(c if c.isprintable() else " " for c in _encodable(value)).split())
    return _in_strings(_one_line, value)


def _in_text(value: Any) -> Any:
    """A value with Markdown's and HTML's characters escaped in its strings, for running text and cells of tables."""
    return re.sub(r"[\\`*\[\]<>&|]", r"\\\g<0>", value) if isinstance(value, str) else _in_strings(_in_text, value)


def _in_strings(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {(change(key) if isinstance(key, str) else key): change(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [change(part) for part in value]
    return value


def four_choices(config: PreTrainedConfig) -> str:
    """The point of the Miras design space that a config names, as a table in Markdown."""
    made = {}
    for field in CHOICES:
        values = choice_of(config, field).meaningful()
        # the power of a loss before the guard that all losses have
        in_order = sorted(values.items(), key=lambda item: item[0].startswith("`"))
        made[field] = ", ".join([f"`{getattr(config, field)}`", *(f"{name} = {value}" for name, value in in_order)])
    if config.retention == "lq":
        made["retention"] += f", `{config.lq_map}` map"
    algorithm = choice_of(config, "learning_algorithm")
    by_chunk = algorithm.gradient_at == "chunk" and not algorithm.has_covariance
    gradients = "gradients taken at the start of chunks of" if by_chunk else "computed in chunks of"
    units = "tokens" if config.writes_per_token == 1 else f"writes, {config.writes_per_token} a token"
    rows = {
        "memory architecture": f"{made['memory_architecture']}, {config.num_attention_heads} memories of width "
        f"{config.head_dim} in a layer",
        "attentional bias": made["attentional_bias"],
        "retention": f"{made['retention']}, decay toward `{config.decay_target}`",
        "learning algorithm": f"{made['learning_algorithm']}, {gradients} {config.chunk_size} {units}",
    }
    return "\n".join(
        ["| choice | here |", "| --- | --- |", *(f"| {choice} | {here} |" for choice, here in rows.items())]
    )


def changed_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of the config that say how the model is built."""
    skipped = {"architectures", "dtype", "transformers_version", "_name_or_path", "auto_map"}
    return {name: value for name, value in config.to_diff_dict().items() if name not in skipped}


def save_model_card(model: PreTrainedModel, folder: str | os.PathLike, *, name: str | None = None, **metadata) -> None:
    """Writes the card of `model` to `folder/README.md`, unless a person wrote the one that is there.

    Args:
        name (`str`, *optional*): as in [`model_card`]; by default the folder's.
    """
    path = Path(folder) / "README.md"
    if path.exists():
        # what is no file, or in another encoding, is not ours
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if MARKER not in text and _TRANSFORMERS_DRAFT not in text:
            return
    write_text(path, str(model_card(model, name=name or Path(folder).resolve().name or "model", **metadata)))


class ModelCardMixin(_Trainer):
    """For a Trainer class: what it saves and pushes carries a card that says how it was trained.

    ```python
    >>> class CardTrainer(ModelCardMixin, Trainer): ...


    >>> class CardSFTTrainer(ModelCardMixin, SFTTrainer): ...
    ```

    Attributes:
        run_details (`dict`): what a trainer cannot know, for instance
            `{"data": {"name": "my notes"}, "command": "python train.py"}`; merged over what it does know.
    """

    run_details: dict[str, Any] | None = None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # PEFT's models hand attributes on to the model inside, and write cards of their own
        self.record_run()
        super()._save(output_dir, state_dict)

    def record_run(self) -> None:
        """Leaves what is known of the run at the model, whose card says it whenever it is saved."""
        self.model_of_card().training_run = _merged(training_run(self), self.run_details or {})

    def model_of_card(self) -> PreTrainedModel:
        """The model that a card is written for."""
        return self.accelerator.unwrap_model(self.model)

    def create_model_card(self, **kwargs) -> None:
        """What `push_to_hub` calls after saving; arguments of `Trainer.create_model_card`."""
        model = self.model_of_card()
        if hasattr(model, "peft_config"):
            super().create_model_card(**kwargs)
        elif self.is_world_process_zero():
            names = {"language": "language", "license": "license", "tags": "tags", "dataset": "datasets"}
            metadata = {ours: kwargs[theirs] for theirs, ours in names.items() if kwargs.get(theirs) is not None}
            save_model_card(
                model, self.args.output_dir, name=self.hub_model_id or kwargs.get("model_name"), **metadata
            )


def training_run(trainer) -> dict[str, Any]:
    """What a `transformers.Trainer` knows about its run, in the form above."""
    args, state = trainer.args, trainer.state
    dataset = trainer.train_dataset
    precision = next((name for name in ("bf16", "fp16") if getattr(args, name)), "float32")
    card_of = getattr(trainer, "model_of_card", lambda: trainer.accelerator.unwrap_model(trainer.model))
    config = card_of().config
    path, base_model = config._name_or_path, getattr(config, "base_model", None)
    run = {
        # a folder on the way from the base model says nothing to others
        "base_model": base_model if base_model and (not path or Path(path).is_dir()) else path or None,
        "data": {"train_rows": len(dataset) if hasattr(dataset, "__len__") else None},
        "training": {
            "steps": state.global_step,
            "tokens": int(state.num_input_tokens_seen) or None,
            "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "learning_rate": args.learning_rate,
            "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
            "weight_decay": args.weight_decay,
            "optimizer": getattr(args.optim, "value", args.optim),
            "precision": precision,
            "seed": args.seed,
        },
        "seconds": {"training": None},
        "machine": machine(processes=args.world_size),
        "versions": versions(),
    }
    for row in state.log_history:
        if "train_runtime" in row:
            run["seconds"]["training"] = row["train_runtime"]
        if "eval_loss" in row:
            skipped = ("runtime", "samples_per_second", "steps_per_second")
            run["metrics"] = {"step": row["step"]} | {
                key.removeprefix("eval_"): value
                for key, value in row.items()
                if key.startswith("eval_") and not key.endswith(skipped) and isinstance(value, int | float)
            }
    return run


def machine(processes: int = 1) -> dict[str, Any]:
    """What this process runs on, without names of hosts; `cpu_capability` are the vector instructions that PyTorch takes, by
    which sums are rounded, and `peak_memory` is in bytes, of the GPU if there is one."""
    cpu = platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    # kilobytes, but bytes on macOS
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "processes": processes,
        "peak_memory": torch.cuda.max_memory_allocated() if gpus else resident,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part in training, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _merged(known: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    both = {key: {**known[key], **added[key]} for key in known.keys() & added.keys() if isinstance(known[key], dict)}
    return known | added | both


def _eval_results(run: dict[str, Any] | None, task: str) -> list[EvalResult] | None:
    if not run:
        return None
    data = run.get("data", {})
    after = (run.get("validation") or {}).get("after")
    measured = {"loss": after["loss"]} if after else {k: v for k, v in run.get("metrics", {}).items() if k != "step"}
    names = {"loss": "Validation loss (nats per token)" if task == "text-generation" else "Validation loss"}
    return [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").title(),
            dataset_type=data.get("id") or "local",
            dataset_name=data.get("name") or "not recorded",
            dataset_split="validation",
            metric_type=metric,
            metric_name=names.get(metric, metric),
            metric_value=round(value, 4),
        )
        for metric, value in measured.items()
    ] or None
