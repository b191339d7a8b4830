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
"""Models that have been trained: a saved folder, or what a training of the bridge or of the ablations has kept."""

import hashlib
import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from miras_hf.modeling_miras import MirasMixer


def model_of_training(file: Path, at_start: bool = False) -> nn.Module:
    """The model of a training's JSON, with the weights beside it, or before its first step.

    Raises:
        `ValueError`: for a training whose weights were not kept, and for one of an ablation that the library's defaults
            make another model today.
    """
    from bridge_training import SIZES
    from safetensors.torch import load_model

    result = json.loads(file.read_text())
    size, point = SIZES[result["size"]["name"]], result["point"]
    if "config" in point:
        from ablation_models import build_model
        from ablation_points import ABLATIONS
        from ablation_report import is_todays

        if not is_todays(result, size):
            raise ValueError(f"{file} was trained as its name no longer says: run it again.")
        model, _ = build_model(ABLATIONS[result["job"]["rung"]], size.shape, result["job"]["seed"])
    else:
        from bridge_models import build_model
        from bridge_points import Point

        if point["half_lives"] is not None:
            point["half_lives"] = tuple(point["half_lives"])
        model, _ = build_model(Point(**point), size.shape, result["job"]["seed"])
    weights = file.with_suffix(".safetensors")
    if not at_start:
        if not weights.exists():
            raise ValueError(f"{weights} is not there: train with --keep-weights, or probe --at-start.")
        load_model(model, weights)
    return model


def trained_model(checkpoint: str, dtype: torch.dtype, device: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A trained model with memories in eval mode, and its tokenizer.

    Args:
        checkpoint (`str`): a folder or name of a saved model, or the JSON of a training.

    Raises:
        `ValueError`: as `model_of_training`, and for a model without memories.
    """
    if checkpoint.endswith(".json"):
        model, tokenizer = model_of_training(Path(checkpoint)), Path(checkpoint).parent / "tokenizer"
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), checkpoint
    if not any(isinstance(module, MirasMixer) for module in model.modules()):
        raise ValueError(f"{checkpoint} is a {type(model).__name__}, which has no memories.")
    # parameters only, as when a model is loaded in a dtype: rotary frequencies in bfloat16 would turn far positions wrongly
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(tokenizer)


def fingerprint(model: nn.Module) -> str:
    """Of all weights, in the dtype that they have: what was measured of one model is nothing of another by its name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_fingerprint(file: Path, model: nn.Module) -> None:
    """Raises a `ValueError` if a file of results is there that is of another model, or does not say of which."""
    if file.exists() and (there := json.loads(file.read_text()).get("weights")) != fingerprint(model):
        of = "does not say of which weights it is" if there is None else "is of other weights"
        raise ValueError(f"{file} {of}: move it away, or take another --out.")


__all__ = ["check_fingerprint", "fingerprint", "model_of_training", "trained_model"]
