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
"""Weight decay: what of a Miras model it is for, told to `Trainer` and to whoever asks.

Matrices decay: embeddings, projections, and the filters of convolutions. Norms, biases, the rates `a_log` of retention
gates and the learned initial memories do not: decay would pull them toward a memory that answers nothing.
"""

import functools
import sys

from torch import nn


_TOLD: set[type] = set()


def undecayed_parameter_names(model: nn.Module) -> set[str]:
    """
    Names of the parameters, as in `model.named_parameters()`, that weight decay is not for. Of modules that are no Miras
    module, which may be there beside (adapters, heads), only biases are named.

    ```python
    >>> undecayed = undecayed_parameter_names(model)
    >>> groups = [
    ...     {"params": [p for n, p in model.named_parameters() if n not in undecayed], "weight_decay": 0.1},
    ...     {"params": [p for n, p in model.named_parameters() if n in undecayed], "weight_decay": 0.0},
    ... ]
    ```"""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if name == "bias" or getattr(module, "decays", True) is False
    }


def exempt_from_trainer() -> None:
    """
    Makes `Trainer`, if it is loaded, leave out of weight decay what [`undecayed_parameter_names`] names, besides what it
    leaves out itself. Models without Miras modules are decayed as before.

    `Trainer.get_decay_parameter_names` knows norms by patterns of names, and has no table that could be filled; names of
    parameters are those of checkpoints. A trainer that replaces the method keeps its own rule.

    Called by `MirasPreTrainedModel.accepts_loss_kwargs`, which `Trainer` asks for when it is made.
    """
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer is None or trainer in _TOLD:
        return
    _TOLD.add(trainer)
    by_name = trainer.get_decay_parameter_names

    @functools.wraps(by_name)
    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        names = by_name(self, model)
        if all(getattr(module, "decays", True) for module in model.modules()):
            return names
        undecayed = undecayed_parameter_names(model)
        return [name for name in names if name not in undecayed]

    trainer.get_decay_parameter_names = get_decay_parameter_names


__all__ = ["undecayed_parameter_names"]
