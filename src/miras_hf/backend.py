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
"""Which path reads: Triton kernels where they serve the call, PyTorch everywhere else. Decided before tracing.

`MIRAS_BACKEND` in the environment wins over `memory_backend` in the config. `"auto"` takes a kernel where one serves the
call, and says once if a GPU is left to the slow path; `"triton"` raises where none does; `"pytorch"` takes none.
"""

import os
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from miras_kernels import LARGEST_CALL, Choices, Projections, decode, forward, refusal, resident_state
from miras_kernels.choices import ATTENTIONAL_BIASES, MEMORIES, RETENTION_GATES

from .memory import MemoryParameters, MemoryState, MirasRule, chunk_miras, step_miras, step_miras_
from .memory.learning import GradientDescent
from .memory.registry import CHOICES
from .memory.retention import ChunkWeights


logger = logging.get_logger(__name__)

BACKENDS = ("auto", "triton", "pytorch")

# the choices that kernels know, by the config's names, and what they call otherwise than configs do
_KERNELS_KNOW = {"memory_architecture": MEMORIES, "attentional_bias": ATTENTIONAL_BIASES, "retention": RETENTION_GATES}
_KERNEL_WORDS = {"memory_architecture": "memory", "memory_expansion": "expansion", "memory_norm_eps": "norm_eps"}


class MemoryBackend:
    """Reads tokens with the memory of a rule.

    Args:
        rule (`MirasRule`): the four choices.
        backend (`str`, *optional*, defaults to `"auto"`): one of `BACKENDS`.

    Raises:
        `ValueError`: for an unknown backend; at a call, if `"triton"` is asked for and no kernel serves it.
    """

    def __init__(self, rule: MirasRule, backend: str = "auto"):
        name = "MIRAS_BACKEND" if "MIRAS_BACKEND" in os.environ else "memory_backend"
        backend = os.environ.get("MIRAS_BACKEND", backend)
        if backend not in BACKENDS:
            raise ValueError(f"`{name}` must be one of {BACKENDS}, got {backend!r}.")
        self.rule, self.backend = rule, backend
        self.choices, self.reason = kernel_choices(rule)

    def why_pytorch(self, v: Tensor, needs_grad: bool, in_place: bool = False) -> str | None:
        """The reason for which no kernel serves values like `v`, `None` if one does."""
        if self.choices is None:
            return self.reason
        return refusal(v.device, v.dtype, v.shape[-1], self.choices, needs_grad, decode=in_place)

    def _takes_kernel(self, v: Tensor, needs_grad: bool, in_place: bool = False) -> bool:
        if self.backend == "pytorch":
            return False
        reason = self.why_pytorch(v, needs_grad, in_place)
        if reason is None:
            return True
        if self.backend == "triton":
            raise ValueError(f"No kernel serves this call, and the backend is 'triton': {reason}.")
        if v.device.type == "cuda":
            _say_once(f"Miras memories run on the slow PyTorch path on a GPU: {reason}.")
        return False

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        eta: Tensor,
        log_alpha: Tensor,
        delta: Tensor | None = None,
        log_momentum: Tensor | None = None,
        *,
        parameters: MemoryParameters,
        initial_state: MemoryState | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState | None, Any]:
        """Arguments as in [`~miras_hf.memory.chunk_miras`].

        Returns:
            `y`, the final state or `None`, and what belongs to the state for `read_in_place`, which may be `None`.
        """
        tensors = [q, k, v, eta, log_alpha, delta, *parameters.initial, *parameters[1:]]
        if initial_state is not None:
            tensors += initial_state.leaves()
        needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
        arguments = {"initial_state": initial_state, "output_final_state": output_final_state, "mask": mask}
        if self._takes_kernel(v, needs_grad):
            y, state = self._by_kernel(q, k, v, eta, log_alpha, delta, parameters, cu_seqlens, **arguments)
            if state is None or torch.is_grad_enabled():
                return y, state, None
            return y, *self._resident(state, parameters)
        arguments |= {"rule": self.rule, "parameters": parameters}
        if q.shape[1] == 1 and initial_state is not None:
            return *step_miras(q, k, v, eta, log_alpha, delta, log_momentum, **arguments), None
        return *chunk_miras(q, k, v, eta, log_alpha, delta, log_momentum, cu_seqlens=cu_seqlens, **arguments), None

    def reads_in_place(self, v: Tensor) -> bool:
        """Whether `read_in_place` serves values like `v`: few tokens, and nothing to differentiate."""
        if torch.is_grad_enabled():
            return False
        return v.shape[1] == 1 or (v.shape[1] <= LARGEST_CALL and self._takes_kernel(v, False, in_place=True))

    def takes_projections(self, v: Tensor) -> bool:
        """Whether `read_in_place` does what stands between a layer's projections and its memory, too."""
        return self._takes_kernel(v, False, in_place=True)

    def read_in_place(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        eta: Tensor,
        log_alpha: Tensor,
        delta: Tensor | None = None,
        log_momentum: Tensor | None = None,
        *,
        parameters: MemoryParameters,
        state: MemoryState,
        companions: Any = None,
        projections: Projections | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, MemoryState, Any]:
        """Reads a few tokens per row, and updates `state` and `companions`, what an earlier call returned, where they lie.

        Args:
            companions (*optional*): `None` if the state comes from elsewhere.
            projections (`Projections`, *optional*): only where `takes_projections`.

        Returns:
            `y`, and the state and companions, the same tensors wherever they could be.
        """
        if not self._takes_kernel(v, False, in_place=True):
            weights = companions.weights if isinstance(companions, _ChunkStart) else None
            arguments = {"rule": self.rule, "parameters": parameters, "state": state, "mask": mask}
            y, weights = step_miras_(q, k, v, eta, log_alpha, delta, log_momentum, weights=weights, **arguments)
            return y, state, None if weights is None else _ChunkStart(weights)
        if not isinstance(companions, tuple):
            state, companions = self._resident(state, parameters)
        y = decode(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            eta,
            log_alpha,
            delta,
            choices=self.choices,
            initial=parameters.initial,
            norm_weight=parameters.norm_weight,
            norm_bias=parameters.norm_bias,
            state=_flat(state),
            companions=companions,
            projections=projections,
            mask=mask,
        )
        return y, state, companions

    def _resident(self, state: MemoryState, parameters: MemoryParameters) -> tuple[MemoryState, tuple[Tensor, ...]]:
        flat, companions = resident_state(_flat(state), choices=self.choices, initial=parameters.initial)
        return MemoryState.of_leaves(flat), companions

    def _by_kernel(
        self, q, k, v, eta, log_alpha, delta, parameters, cu_seqlens, initial_state, output_final_state, mask
    ):
        # queries and keys come from their norm in float32: the values' dtype is the one that the model computes in
        q, k = q.to(v.dtype), k.to(v.dtype)
        y, final, _ = forward(
            q,
            k,
            v,
            eta,
            log_alpha,
            delta,
            choices=self.choices,
            initial=parameters.initial,
            norm_weight=parameters.norm_weight,
            norm_bias=parameters.norm_bias,
            state=None if initial_state is None else _flat(initial_state),
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            mask=mask,
        )
        return y, MemoryState.of_leaves(final) if output_final_state else None


class _ChunkStart:
    """The weights of the present chunk, which the next step needs again.

    Shows no attributes: Transformers' exporters walk through all that a cache holds, and compare it with what a traced
    step leaves, which keeps none.
    """

    __slots__ = ("weights", "made_with")
    __dict__ = property(lambda self: {})

    def __init__(self, weights: list[ChunkWeights]):
        self.weights, self.made_with = weights, None


def _flat(state: MemoryState) -> tuple[Tensor, ...]:
    return tuple(state.leaves())


# in a compiled model too: said while the graph is traced
@torch.compiler.assume_constant_result
def _say_once(message: str) -> bool:
    logger.warning_once(message)
    return True


def kernel_choices(rule: MirasRule) -> tuple[Choices | None, str | None]:
    """The rule as the kernels see it, or the reason for which they do not know it."""
    if type(rule.algorithm) is not GradientDescent:
        return None, f"kernels do not know {type(rule.algorithm).__name__}"
    parts = {
        "memory_architecture": rule.architecture,
        "attentional_bias": rule.attentional_bias,
        "retention": rule.retention,
    }
    found = {}
    for field, part in parts.items():
        # the classes themselves: a subclass may compute something else
        name = next((name for name, cls in CHOICES[field].items() if cls is type(part)), None)
        if name not in _KERNELS_KNOW[field]:
            return None, f"kernels do not know {type(part).__name__}"
        found |= {field: name, **part.keys()}
    if "lp_sign" in found:
        found["lp_smooth_sign"] = found.pop("lp_sign") == "tanh"
    found = {_KERNEL_WORDS.get(name, name): value for name, value in found.items()}
    try:
        choices = Choices(
            **found,
            chunk_size=rule.chunk_size,
            decay_target=rule.decay_target,
            min_log_alpha=rule.min_log_alpha,
        )
    except ValueError as error:
        return None, str(error).removesuffix(".")
    return choices, None
