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
"""The forward pass as a PyTorch operator: `torch.ops.miras_kernels.forward`, traced by `torch.compile` without a break.

Triton is imported when the operator first runs.
"""

import dataclasses
import importlib.util
import math
import os

import torch
from torch import Tensor

from .choices import ATTENTIONAL_BIASES, HEAD_DIMS, RETENTION_GATES, Choices
from .configuration import launch_configuration


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRECISIONS = ("bf16", "tf32", "tf32x3", "ieee")

# known once, so that nothing has to be looked up while a graph is traced
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, choices: Choices) -> str | None:
    """Why the kernels do not serve queries like these, or `None` if they do: a sentence without its full stop.

    Looks at nothing that changes while a program runs, so it can be asked before tracing.
    """
    if not _TRITON_INSTALLED:
        return "Triton is not installed (`pip install triton`)"
    if device.type != "cuda" and not (device.type == "cpu" and _INTERPRETED):
        return f"tensors are on {device.type!r}, and Triton kernels run on GPUs"
    if device.type == "cuda" and torch.version.cuda is not None and _capability(device) < 8:
        return f"the GPU has compute capability {_capability(device)}, and kernels need 8 or higher"
    if dtype not in DTYPES:
        return f"the dtype is {dtype}, and kernels take bfloat16, float16 and float32"
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}, and kernels take {', '.join(map(str, HEAD_DIMS))}"
    if choices.memory == "mlp" and choices.expansion * head_dim % 16:
        return f"the memory has {choices.expansion * head_dim} hidden units, not a multiple of 16"
    return None


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).major


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None,
    *,
    choices: Choices,
    initial: tuple[Tensor, ...],
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    state: tuple[Tensor, ...] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    precision: str | None = None,
    save_every: int = 0,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Reads tokens with a memory that learns from each of them; a token's read sees its own write.

    Args:
        q, k (`torch.Tensor` of shape `[batch, tokens, heads, head_dim]`): queries and keys, l2-normalised by the caller.
        v (`torch.Tensor` of the same shape): values.
        eta, log_alpha (`torch.Tensor` of shape `[batch, tokens, heads]` or `[batch, tokens, heads, head_dim]`):
            Step, and log retention, of every token.
        delta (`torch.Tensor`, as `eta`, *optional*): threshold of the Huber biases.
        choices (`Choices`): what the memory is.
        initial (`tuple` of `torch.Tensor` of shape `[heads, in, out]`): initial dual state of each weight.
        norm_weight, norm_bias (`torch.Tensor` of shape `[heads, head_dim]`, *optional*): affine of an MLP memory's norm.
        state (`tuple` of `torch.Tensor`, *optional*):
            Where to go on from, also in the middle of a chunk, what an earlier call returned: for each weight the dual
            state at the chunk's start `[rows, heads, in, out]`, for each the inputs `[rows, heads, chunk_size, in]`, for
            each the gradients `[rows, heads, chunk_size, out]`, then `eta`, `log_decay` `[rows, heads, chunk_size, c]`
            and `count` `[rows]`.
        output_final_state (`bool`, *optional*, defaults to `False`): whether to return the state after the last token.
        cu_seqlens (`torch.Tensor` of shape `[sequences + 1]`, *optional*): borders of sequences packed into one row.
        mask (`torch.Tensor` of shape `[batch, tokens]`, bool, *optional*): false at pads, anywhere in a row.
        precision (`str`, *optional*):
            Operands of the products: `"bf16"`, `"tf32"`, `"tf32x3"` or `"ieee"`. By default bf16 for bfloat16 inputs,
            tf32 for float16, and for float32 what `torch.get_float32_matmul_precision()` allows. Sums, states, norms
            and gates are float32 always.
        save_every (`int`, *optional*, defaults to 0): keep every so-manyth chunk's dual states at its start, 0 for none.

    Returns:
        `y` of the shape and dtype of `q`, the final state (empty if not asked for), and the saved chunk starts, for
        each weight `[saved, heads, in, out]`, sequence after sequence.

    Raises:
        `ValueError`: if no kernel serves the call, or arguments do not fit, naming the reason.
    """
    reason = refusal(q.device, q.dtype, q.shape[-1], choices)
    if reason is not None:
        raise ValueError(f"No kernel serves this call: {reason}.")
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"`precision` must be one of {PRECISIONS} or None, got {precision!r}.")
    if mask is not None and cu_seqlens is not None:
        raise ValueError("`mask` and `cu_seqlens` exclude each other: a pack has no pad tokens.")
    shapes = [(q.shape[2], *shape) for shape in choices.weight_shapes(q.shape[-1])]
    if [tuple(a.shape) for a in initial] != shapes:
        raise ValueError(f"`initial` must have shapes {shapes}, got {[tuple(a.shape) for a in initial]}.")
    values = dataclasses.asdict(choices)
    values["weight_cap"] = values["weight_cap"] or 0.0
    y, final, saved = torch.ops.miras_kernels.forward(
        q,
        k,
        v,
        eta,
        log_alpha,
        delta,
        list(initial),
        norm_weight,
        norm_bias,
        list(state or ()),
        cu_seqlens,
        mask,
        output_final_state,
        save_every,
        precision or "",
        **values,
    )
    return y, tuple(final), tuple(saved)


def default_precision(dtype: torch.dtype) -> str:
    """Operands of the products for inputs of a dtype. Asked inside the operator: settings cannot be traced."""
    if dtype == torch.float32:
        return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "bf16" if dtype == torch.bfloat16 else "tf32"


def _rows(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _saved_chunks(q: Tensor, cu_seqlens: Tensor | None, chunk_size: int, save_every: int) -> int:
    # room for the largest phase, so that no length has to be known on the host
    if cu_seqlens is None:
        return q.shape[0] * (-(-(q.shape[1] + chunk_size - 1) // (chunk_size * save_every)))
    return q.shape[1] // (chunk_size * save_every) + 2 * _rows(q, cu_seqlens)


@torch.library.custom_op("miras_kernels::forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    log_alpha: Tensor,
    delta: Tensor | None,
    initial: list[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    state: list[Tensor],
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    output_final_state: bool,
    save_every: int,
    precision: str,
    memory: str,
    attentional_bias: str,
    retention: str,
    chunk_size: int,
    decay_target: str,
    min_log_alpha: float,
    expansion: int,
    norm_eps: float,
    residual_clip: float,
    lp_power: float,
    lp_smooth_sign: bool,
    lp_sharpness: float,
    lp_error_cap: float,
    lq_power: float,
    lq_norm_floor: float,
    weight_cap: float,
    simplex_mass: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    from .forward_matrix import matrix_forward_kernel
    from .forward_mlp import mlp_forward_kernel

    precision = precision or default_precision(q.dtype)
    batch, tokens, heads, head_dim = q.shape
    device, rows = q.device, _rows(q, cu_seqlens)
    layers = len(initial)
    q, k, v = (x.contiguous() for x in (q, k, v))
    eta, log_alpha = (_gate(x) for x in (eta, log_alpha))
    gate_dim = max(eta.shape[-1], log_alpha.shape[-1])
    eta, log_alpha = (x.expand(*x.shape[:3], gate_dim).float().contiguous() for x in (eta, log_alpha))
    delta = eta if delta is None else _gate(delta).float().contiguous()
    has_delta = attentional_bias.startswith("huber")

    # where each row's tokens are
    order = None
    if cu_seqlens is not None:
        starts = cu_seqlens[:-1].to(torch.int64)
        lengths = cu_seqlens.diff().to(torch.int64)
    else:
        starts = torch.arange(rows, device=device) * tokens
        lengths = torch.full((rows,), tokens, device=device)
        if mask is not None:
            order = torch.argsort(~mask, dim=-1, stable=True)
            lengths = mask.sum(-1)

    base = [a.contiguous() for a in initial]
    toward_init = decay_target == "init"
    if state:
        count = state[-1]
        phases = (count % chunk_size).contiguous()
        dual = [d.to(torch.float32, copy=True).contiguous() for d in state[:layers]]
        if not toward_init:  # a row that has not read anything is at the learned initial memory
            fresh = (count == 0).view(-1, 1, 1, 1)
            dual = [torch.where(fresh, a.float(), d) for a, d in zip(base, dual)]
        earlier = [x.float().contiguous() for x in state[layers:-1]]
    else:
        count, phases = None, lengths
        dual = [torch.zeros(rows, *a.shape, device=device) for a in base]
        if not toward_init:  # copies, which the kernel goes on from
            dual = [d + a for a, d in zip(base, dual)]
        earlier = [eta] * (2 * layers + 2)

    final = [eta] * (2 * layers + 2)
    if output_final_state:
        shapes = [tuple(a.shape[1:]) for a in base]
        widths = [fan_in for fan_in, _ in shapes] + [fan_out for _, fan_out in shapes] + [gate_dim, gate_dim]
        final = [torch.zeros(rows, heads, chunk_size, width, device=device) for width in widths]
    saved = [eta] * layers
    saved_of_row = lengths
    if save_every:
        room = _saved_chunks(q, cu_seqlens, chunk_size, save_every)
        saved = [torch.zeros(room, *a.shape, device=device) for a in base]
        chunks = (lengths + (phases if state else 0) + chunk_size * save_every - 1) // (chunk_size * save_every)
        saved_of_row = chunks.cumsum(0) - chunks

    # pads are not written to
    y = torch.zeros_like(q) if mask is not None else torch.empty_like(q)
    hidden_units = expansion * head_dim if memory == "mlp" else head_dim
    masses = [simplex_mass * hidden_units / math.sqrt(a.shape[-2]) for a in base]
    constants = {
        "C": chunk_size,
        "D": head_dim,
        "BD": max(16, 1 << (head_dim - 1).bit_length()),
        "GATE_DIM": gate_dim,
        "DELTA_DIM": delta.shape[-1] if has_delta else 0,
        "LOSS": ATTENTIONAL_BIASES.index(attentional_bias),
        "POWER": lp_power,
        "SMOOTH_SIGN": lp_smooth_sign,
        "SHARPNESS": lp_sharpness,
        "ERROR_CAP": lp_error_cap,
        "CLIP": residual_clip * math.sqrt(head_dim),
        "LINK": RETENTION_GATES.index(retention),
        "Q": lq_power,
        "FLOOR": lq_norm_floor,
        "CAP": weight_cap,
        "TOWARD_INIT": toward_init,
        "HAS_EARLIER": bool(state),
        "HAS_ORDER": order is not None,
        "KEEP_FINAL": output_final_state,
        "SAVE_EVERY": save_every,
        "PRECISION": "bf16_rounded" if precision == "bf16" and _INTERPRETED else precision,
    }
    where = [starts, lengths, lengths if order is None else order]
    if rows * heads > 0 and tokens > 0:
        launch = launch_configuration(
            f"{memory}_forward", device=device, head_dim=head_dim, chunk_size=chunk_size, precision=precision
        )
        if memory == "mlp":
            scratch = torch.empty(rows * heads, chunk_size, hidden_units, device=device)
            norm = (norm_weight.contiguous(), norm_bias.contiguous())
            arguments = [q, k, v, eta, log_alpha, delta, y, *base, *norm, *dual, *earlier, phases, *final, *where]
            mlp_forward_kernel[(rows * heads,)](
                *arguments,
                scratch,
                *saved,
                saved_of_row,
                tokens,
                heads,
                min_log_alpha,
                *masses,
                N=hidden_units,
                NORM_EPS=norm_eps,
                **constants,
                **launch,
            )
        else:
            arguments = [q, k, v, eta, log_alpha, delta, y, *base, *dual, *earlier, phases, *final, *where]
            matrix_forward_kernel[(rows * heads,)](
                *arguments, *saved, saved_of_row, tokens, heads, min_log_alpha, *masses, **constants, **launch
            )
    elif output_final_state and state:
        final = [x.clone() for x in earlier]

    outputs = []
    if output_final_state:
        outputs = [*dual, *final, lengths if count is None else count + lengths]
    return y, outputs, saved if save_every else []


def _gate(x: Tensor) -> Tensor:
    return x.unsqueeze(-1) if x.dim() == 3 else x


@_forward.register_fake
def _(q, k, v, eta, log_alpha, delta, initial, norm_weight, norm_bias, state, cu_seqlens, mask, *rest, **choices):
    names = ("output_final_state", "save_every", "precision", "memory", "attentional_bias", "retention", "chunk_size")
    known = dict(zip(names, rest)) | choices
    chunk_size, save_every = known["chunk_size"], known["save_every"]
    rows, heads = _rows(q, cu_seqlens), q.shape[2]
    final, saved = [], []
    if known["output_final_state"]:
        shapes = [tuple(a.shape[1:]) for a in initial]
        gate_dim = max(_gate(eta).shape[-1], _gate(log_alpha).shape[-1])
        widths = [fan_in for fan_in, _ in shapes] + [fan_out for _, fan_out in shapes] + [gate_dim, gate_dim]
        final = [q.new_empty((rows, heads, *shape), dtype=torch.float32) for shape in shapes]
        final += [q.new_empty((rows, heads, chunk_size, width), dtype=torch.float32) for width in widths]
        final.append(q.new_empty((rows,), dtype=torch.int64))
    if save_every:
        room = _saved_chunks(q, cu_seqlens, chunk_size, save_every)
        saved = [q.new_empty((room, *a.shape), dtype=torch.float32) for a in initial]
    return torch.empty_like(q), final, saved
