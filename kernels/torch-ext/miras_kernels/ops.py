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
import functools
import importlib.util
import itertools
import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    DTYPES,
    check_inputs,
    check_instance,
    check_lengths,
    check_options,
    check_program,
    check_query,
    check_record,
    checked_borders,
    gate_width,
    state_shapes,
)
from .choices import HEAD_DIMS, Choices, padded
from .configuration import INTERPRETED, PRECISIONS, launch_configuration, threads


LARGEST_STATE_ADJOINT = 1e12  # as in pieces.py
CHUNKS_AT_ONCE = 64  # whose states at their starts are kept for reads that wait for no other
# `miras_kernels`, or what a copy from the Hub was loaded as: of two copies in one process each has operators of its own
NAMESPACE = re.sub(r"\W", "_", __package__)
OPERATORS = getattr(torch.ops, NAMESPACE)

# known once, so that nothing has to be looked up while a graph is traced
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def refusal(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    choices: Choices,
    needs_grad: bool = False,
    precision: str | None = None,
    decode: bool = False,
) -> str | None:
    """Why the kernels do not serve queries like these, or `None` if they do: a sentence without its full stop.

    Looks at nothing that changes while a program runs but the precision that PyTorch allows float32, so it can be asked
    before tracing, and an answer is found once. A device that is not there is a reason like any other.

    Raises:
        `TypeError`: if `choices` are no `Choices`, or `dtype` no dtype.
    """
    check_record("choices", choices, Choices)
    check_instance("dtype", dtype, torch.dtype)
    call = (torch.device(device), dtype, head_dim, choices, needs_grad, decode)
    if torch.compiler.is_compiling():  # a graph keeps the answer, and cannot look into what is kept
        return _reason(*call, precision or "")
    return known_reason(*call, precision or default_precision(dtype))


def _reason(device, dtype, head_dim, choices: Choices, needs_grad, decode, precision: str) -> str | None:
    if not _TRITON_INSTALLED:
        return "Triton is not installed (`pip install triton`)"
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        return f"tensors are on {device.type!r}, and Triton kernels run on GPUs that PyTorch calls 'cuda'"
    if device.type == "cuda" and (reason := _no_gpu(str(device))):
        return reason
    if dtype not in DTYPES:
        return f"the dtype is {dtype}, and kernels take bfloat16, float16 and float32"
    if head_dim not in HEAD_DIMS:
        return f"head_dim is {head_dim}, and kernels take {', '.join(map(str, HEAD_DIMS))}"
    if choices.memory == "mlp" and choices.expansion * head_dim % 16:
        return f"the memory has {choices.expansion * head_dim} hidden units, not a multiple of 16"
    if decode and needs_grad:
        return "gradients are needed, and decoding has none"
    for part in ("decode",) if decode else ("forward", "backward") if needs_grad else ("forward",):
        kernel = f"{choices.family}_{part}"
        reason = _no_launch(kernel, str(device), str(dtype), head_dim, choices.chunk_size, precision)
        if reason:
            return reason
    return None


known_reason = functools.lru_cache(maxsize=None, typed=True)(_reason)


@torch.compiler.assume_constant_result
def _no_gpu(device: str) -> str:
    if not torch.cuda.is_available():
        return f"tensors are on {device!r}, and PyTorch finds no GPU"
    index = torch.device(device).index
    if index is not None and index >= torch.cuda.device_count():
        return f"tensors are on {device!r}, and PyTorch finds {torch.cuda.device_count()} GPUs, counted from 0"
    major = torch.cuda.get_device_properties(device).major
    if torch.version.cuda is not None and major < 8:
        return f"the GPU has compute capability {major}, and kernels need 8 or higher"
    return ""


@torch.compiler.assume_constant_result
def _no_launch(kernel: str, device: str, dtype: str, head_dim: int, chunk_size: int, precision: str) -> str:
    # words in and out, which a trace can take for constants
    precision = precision or default_precision(getattr(torch, dtype.removeprefix("torch.")))
    where = {"device": torch.device(device), "head_dim": head_dim, "chunk_size": chunk_size}
    try:
        launch_configuration(kernel, precision=precision, **where)
    except ValueError as error:
        return str(error).removesuffix(".")
    return ""


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
    lengths: Tensor | None = None,
    precision: str | None = None,
    save_every: int = 0,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Reads tokens with a memory that learns from each of them; a token's read sees its own write.

    Args:
        q, k (`torch.Tensor` of shape `[batch, tokens, heads, head_dim]`): queries and keys, l2-normalised by the caller.
        v (`torch.Tensor` of the same shape): values.
        eta, log_alpha (`torch.Tensor` of shape `[batch, tokens, heads]` or `[batch, tokens, heads, head_dim]`):
            Step size, and log retention, of every token.
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
        cu_seqlens (`torch.Tensor` of shape `[sequences + 1]`, *optional*):
            Borders of sequences packed into one row, from 0 to `tokens`; a sequence may be empty. They may lie on the host,
            where wrong ones raise; on a device an assertion there stops what follows, and nothing waits for it. A call
            that is captured into a CUDA graph needs them on the device.
        lengths (`torch.Tensor` of shape `[batch]`, int32 or int64, *optional*):
            Tokens of each row, from 0 to `tokens`. What stands behind them are pads: they are not read, and their outputs
            are zero. A wrong number raises as wrong borders do.
        precision (`str`, *optional*):
            Operands of the products: `"bf16"`, `"tf32"`, `"tf32x3"` or `"ieee"`. By default bf16 for bfloat16 inputs,
            tf32 for float16, and for float32 what `torch.get_float32_matmul_precision()` allows. Sums, states, norms
            and gates are float32 always.
        save_every (`int`, *optional*, defaults to 0):
            Keep every so-manyth chunk's dual states at its start, 0 for none; where gradients are needed, 0 stands for
            `chunks_between_starts`.

    Returns:
        `y` of the shape and dtype of `q`, the final state (empty if not asked for), and the saved chunk starts, for
        each weight `[saved, heads, in, out]`, sequence after sequence; what room is left is not initialised.

    Raises:
        `TypeError`: if an argument is not of its type.
        `ValueError`: if no kernel serves the call, or arguments do not fit, naming the reason.
    """
    check_query(q, choices)
    check_options(output_final_state, save_every)
    needs_grad = asks_for_gradients([q, k, v, eta, log_alpha, delta, initial, norm_weight, norm_bias, state])
    refuse(q, choices, needs_grad, precision)
    if lengths is not None and cu_seqlens is not None:
        raise ValueError("`lengths` and `cu_seqlens` exclude each other: a pack has no pad tokens.")
    check_inputs(q, k, v, eta, log_alpha, delta, choices, initial, norm_weight, norm_bias, state, cu_seqlens, lengths)
    if choices.fixed and save_every > 1:
        raise ValueError(f"`save_every` must be 0 or 1 with `update_layers='last'`, got {save_every}.")
    if needs_grad and save_every == 0:
        save_every = chunks_between_starts(choices, q.shape[-1], q.element_size())
    y, final, saved = OPERATORS.forward(
        *(q, k, v, eta, log_alpha, delta, list(initial), norm_weight, norm_bias),
        *(list(state or ()), cu_seqlens, lengths, output_final_state, save_every, precision or ""),
        *choice_values(choices),
    )
    return y, tuple(final), tuple(saved)


def asks_for_gradients(arguments: list) -> bool:
    """Whether a tensor among the arguments, or in a tuple of them, is to be differentiated."""
    if not torch.is_grad_enabled():
        return False
    tensors = [x for each in arguments for x in (each if isinstance(each, (tuple, list)) else (each,))]
    return any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def refuse(q: Tensor, choices: Choices, needs_grad: bool, precision: str | None, decode: bool = False) -> None:
    """Raises a `ValueError` with the `refusal` of a call, if there is one."""
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"`precision` must be one of {PRECISIONS} or None, got {precision!r}.")
    reason = refusal(q.device, q.dtype, q.shape[-1], choices, needs_grad, precision, decode)
    if reason is not None:
        raise ValueError(f"No kernel serves this call: {reason}.")


def chunks_between_starts(choices: Choices, head_dim: int, itemsize: int) -> int:
    """G: a call that needs gradients keeps the dual state of every G-th chunk's start.

    The states in between are computed again, one group after the other, which costs another forward pass. G is the
    smallest for which the kept states take no more bytes than inputs, outputs and their gradients, per token and head

        4 state / (C G)  <=  2 (4 d itemsize + 8 d)        state: 8 d^2 numbers of an MLP memory, d^2 of a matrix

    Args:
        itemsize (`int`): bytes of a query's number.
    """
    if choices.fixed:  # the reads ask for every chunk's
        return 1
    state = sum(fan_in * fan_out for fan_in, fan_out in choices.weight_shapes(head_dim))
    budget = 2 * (4 * head_dim * itemsize + 8 * head_dim)
    return max(1, math.ceil(4 * state / (choices.chunk_size * budget)))


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


def gate(x: Tensor) -> Tensor:
    """A gate per head or per channel, with a last axis in both cases."""
    return x.unsqueeze(-1) if x.dim() == 3 else x


class Operands(NamedTuple):
    """The tensors of a call, in the order of the operators' schemas."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    log_alpha: Tensor
    delta: Tensor | None
    initial: list[Tensor]
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    state: list[Tensor]
    cu_seqlens: Tensor | None
    lengths: Tensor | None


def prepared(q, k, v, eta, log_alpha, delta, choices: Choices, precision: str) -> tuple:
    """A call's tokens as kernels read them, contiguous, with gates of one width in float32; the operands of its products; and
    the records of its rule and sizes."""
    from .arguments import Tokens, records_of

    eta, log_alpha = gate(eta), gate(log_alpha)
    gate_dim = max(eta.shape[-1], log_alpha.shape[-1])
    if eta.shape != log_alpha.shape:
        eta, log_alpha = [x.expand(*x.shape[:3], gate_dim) for x in (eta, log_alpha)]
    eta, log_alpha = eta.float().contiguous(), log_alpha.float().contiguous()
    delta = gate(delta).float().contiguous() if choices.threshold else None
    precision = precision or default_precision(q.dtype)
    products = "bf16_rounded" if precision == "bf16" and INTERPRETED else precision
    rule = records_of(choices, q.shape[-1], gate_dim, 0 if delta is None else delta.shape[-1], products)
    return Tokens(q.contiguous(), k.contiguous(), v.contiguous(), eta, log_alpha, delta), precision, rule


class _Call:
    """What both passes need of a call's tensors: contiguous copies, where each row's tokens are, kernel constants."""

    def __init__(self, operands: Operands, precision: str, choices: Choices):
        q, *_, initial, norm_weight, norm_bias, state, cu_seqlens, lengths = operands
        self.batch, self.tokens, self.heads, self.head_dim = q.shape
        self.device, self.rows, self.layers = q.device, _rows(q, cu_seqlens), len(initial) - choices.fixed
        self.programs = self.rows * self.heads
        self.inputs, self.precision, self.rule = prepared(*operands[:6], choices, precision)
        self.q = self.inputs.q
        self.base = [a.contiguous() for a in initial]
        self.written = self.base[choices.fixed :]
        self.shapes = [tuple(a.shape[1:]) for a in self.written]
        self.toward_init = choices.decay_target == "init"
        has_norm = choices.memory == "mlp"
        self.norm = [p.float().contiguous() for p in (norm_weight, norm_bias)] if has_norm else []

        if cu_seqlens is not None:
            borders = cu_seqlens.to(q.device, torch.int64)
            starts, lengths = borders[:-1].contiguous(), borders.diff()
        else:
            starts = torch.arange(self.rows, device=q.device) * self.tokens
            if lengths is None:
                lengths = torch.full((self.rows,), self.tokens, device=q.device)
            lengths = lengths.to(torch.int64)
        self.lengths = lengths
        self.where = [starts, lengths]

        self.choices = choices
        self.memory, self.chunk_size, self.min_log_alpha = choices.memory, choices.chunk_size, choices.min_log_alpha
        self.family = choices.family
        self.count = state[-1] if state else None
        self.phases = (self.count % self.chunk_size).contiguous() if state else lengths
        gate_dim = self.inputs.eta.shape[-1]
        shapes = state_shapes(self.shapes, self.rows, self.heads, self.chunk_size, gate_dim)
        self.factor_shapes = shapes[self.layers : -1]
        self.partial_in = [x.float().contiguous() for x in state[self.layers : -1]]
        self.hidden_units = choices.expansion * self.head_dim if choices.memory == "mlp" else self.head_dim
        self.continues = bool(state)

    def starting_dual(self, state: list[Tensor]) -> list[Tensor]:
        """Copies, which the kernel goes on from."""
        if state:
            dual = [d.to(torch.float32, copy=True).contiguous() for d in state[: self.layers]]
            if not self.toward_init:  # a row that has not read anything is at the learned initial memory
                dual = [torch.where(self.fresh(), a.float(), d) for a, d in zip(self.written, dual)]
            return dual
        dual = [torch.zeros(self.rows, *a.shape, device=self.device) for a in self.written]
        return dual if self.toward_init else [d + a for a, d in zip(self.written, dual)]

    def fresh(self) -> Tensor:
        return (self.count == 0).view(-1, 1, 1, 1)

    def saved_of_row(self, save_every: int) -> Tensor:
        span = self.chunk_size * save_every
        phases = self.phases if self.continues else 0
        chunks = (self.lengths + phases + span - 1) // span
        return chunks.cumsum(0) - chunks

    def launch_parts(self, y, dual, final, kept, kept_of_row) -> None:
        """The same where no text writes the first weight: features of many chunks at once, writes, a chain, and their reads,
        all at once again."""
        from . import forward_pass

        for first, last in self.groups(CHUNKS_AT_ONCE):
            count = last - first
            of_row = kept_of_row + first if kept else torch.arange(self.rows, device=self.device) * count
            saved = kept or [self.scratch(self.rows * count, *a.shape) for a in self.written]
            # chunk after chunk, in each the rows; a row that has fewer chunks than others reads nothing
            chunks = [torch.cat(x) for x in zip(*(self.where_of(i, i + 1) for i in range(first, last)))]
            of_chunk = (
                (of_row + torch.arange(count, device=self.device)[:, None]).flatten().clamp(max=len(saved[0]) - 1)
            )
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32  # as products take them
            hidden = self.scratch(count * self.programs, self.hidden_units, self.chunk_size, dtype=dtype)
            launch = functools.partial(
                self.launch_forward, y, dual, begun=self.continues and first == 0, hidden=hidden
            )
            launch([], chunks, [], of_chunk, 0, part=forward_pass.FEATURES.value)
            launch(final, self.where_of(first, last), saved, of_row, 1, part=forward_pass.WRITES.value)
            launch([], chunks, saved, of_chunk, 0, part=forward_pass.READS.value)

    def groups(self, every: int) -> list[tuple[int, int]]:
        """The longest row's chunks, so many at once; alone the first, if it goes on in the middle of a chunk."""
        chunks = -(-(self.tokens + (self.chunk_size - 1 if self.continues else 0)) // self.chunk_size)
        borders = sorted({0, *range(int(self.continues), chunks, every), chunks})
        return list(itertools.pairwise(borders))

    def where_of(self, first: int, last: int) -> list[Tensor]:
        """Where each row's tokens of some chunks are."""
        starts, lengths = self.where
        phases = self.phases if self.continues else 0
        begin = (torch.full_like(lengths, first * self.chunk_size) - phases).clamp(min=0)
        end = lengths.clamp(max=last * self.chunk_size - phases)
        return [starts + begin, (end - begin).clamp(min=0)]

    def launch_forward(
        self, y, dual, final, where, saved, saved_of_row, save_every, begun=None, part=0, hidden=None
    ) -> None:
        """Reads the tokens `where` says, from `dual` on, which it writes to."""
        from . import forward_delta, forward_pass
        from .arguments import Saved, slots_of

        tokens, rows, partial_in = self.records(where, begun)
        kept = Saved(tuple(saved), saved_of_row) if saved else None
        factors = partial_in, slots_of(final), rows, kept
        programs = len(where[0]) * self.heads
        launch = self.configuration(f"{self.family}_forward")
        if self.memory == "mlp":
            kernel, launch["THREADS"], launch["PART"] = forward_pass.mlp_forward_kernel, threads(launch), part
            hidden = self.scratch(programs, self.hidden_units, self.chunk_size) if hidden is None else hidden
            arguments = (tokens, y, tuple(self.base), self.norm_record(), tuple(dual), *factors, hidden)
        else:
            delta = self.family == "delta"
            kernel = forward_delta.delta_forward_kernel if delta else forward_pass.matrix_forward_kernel
            arguments = (tokens, y, tuple(self.base), tuple(dual), *factors)
        # Triton launches on the current device, which need not be the tensors'
        with torch.cuda.device_of(self.q):
            check_program(kernel[(programs,)](*arguments, self.heads, *self.rule, SAVE_EVERY=save_every, **launch))

    def records(self, where, begun=None) -> tuple:
        """The tokens, where they are, and what the state has of a chunk that was begun, as kernels are handed it."""
        from .arguments import Rows, slots_of

        continues = self.continues if begun is None else begun
        rows = Rows(*where, self.phases if continues else None)
        return self.inputs, rows, slots_of(self.partial_in) if continues else None

    def norm_record(self):
        from .arguments import Norm, constant

        return Norm(*self.norm, constant(float(self.choices.norm_eps)))

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype)

    def configuration(self, kernel: str) -> dict[str, int]:
        return launch_configuration(
            kernel,
            device=self.device,
            head_dim=self.head_dim,
            chunk_size=self.chunk_size,
            precision=self.precision,
        )


_KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]"}
_TENSORS = ", ".join(f"{_KINDS[kind]} {name}" for name, kind in Operands.__annotations__.items())
# the choices, one argument each, in the order of the dataclass; `weight_cap` 0 is no cap
CHOICE_NAMES = {field.name: getattr(field.type, "__name__", "float") for field in dataclasses.fields(Choices)}
CHOICE_SCHEMA = ", ".join(f"{kind} {name}" for name, kind in CHOICE_NAMES.items())


@functools.lru_cache(maxsize=None, typed=True)
def choice_values(choices: Choices) -> tuple:
    """The choices as an operator takes them."""
    return tuple(0.0 if (value := getattr(choices, name)) is None else value for name in CHOICE_NAMES)


def _fixed(values) -> int:
    # `Choices.fixed` of values that may be a trace's
    return int(dict(zip(CHOICE_NAMES, values))["update_layers"] == "last")


@functools.lru_cache(maxsize=None, typed=True)
def choices_of(*values) -> Choices:
    """What `choice_values` was made of."""
    named = dict(zip(CHOICE_NAMES, values))
    return Choices(**named | {"weight_cap": named["weight_cap"] or None})


# Operators are defined in the dispatcher itself: one of `torch.library.custom_op` with this many arguments takes 0.3 ms of
# Python to be called, which looks its schema up argument by argument.
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
LIBRARY.define(
    f"forward({_TENSORS}, bool output_final_state, int save_every, str precision, {CHOICE_SCHEMA})"
    " -> (Tensor, Tensor[], Tensor[])"
)
LIBRARY.define(
    f"backward(Tensor y_bar, Tensor[] final_bars, Tensor[] saved, int save_every, {_TENSORS}, str precision, {CHOICE_SCHEMA})"
    " -> Tensor[]"
)


def _split(arguments: tuple) -> tuple[Operands, tuple]:
    count = len(Operands._fields)
    return Operands(*arguments[:count]), arguments[count:]


@torch.library.impl(LIBRARY, "forward", "CompositeExplicitAutograd")
def _forward(*arguments) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    operands, (output_final_state, save_every, precision, *choices) = _split(arguments)
    q, state = operands.q, operands.state
    cu_seqlens, lengths = operands.cu_seqlens, operands.lengths
    if cu_seqlens is not None:
        cu_seqlens = checked_borders(cu_seqlens, q.shape[1], q.device)
    if lengths is not None:
        check_lengths(lengths, q.shape[1])
    call = _Call(operands._replace(cu_seqlens=cu_seqlens), precision, choices_of(*choices))
    dual = call.starting_dual(state)
    final = [call.zeros(*shape) for shape in call.factor_shapes] if output_final_state else []
    saved, saved_of_row = [], call.lengths
    if save_every:
        room = _saved_chunks(q, cu_seqlens, call.chunk_size, save_every)
        saved = [call.scratch(room, *a.shape) for a in call.written]
        saved_of_row = call.saved_of_row(save_every)

    # pads are not written to
    y = torch.zeros_like(call.q) if lengths is not None else torch.empty_like(call.q)
    if call.programs > 0 and call.tokens > 0 and call.choices.fixed:
        call.launch_parts(y, dual, final, saved, saved_of_row)
    elif call.programs > 0 and call.tokens > 0:
        call.launch_forward(y, dual, final, call.where, saved, saved_of_row, save_every)
    elif output_final_state and state:
        final = [x.clone() for x in call.partial_in]

    outputs = []
    if output_final_state:
        outputs = [*dual, *final, call.lengths.clone() if call.count is None else call.count + call.lengths]
    return y, outputs, saved


@torch.library.register_fake(f"{NAMESPACE}::forward", lib=LIBRARY)
def _(*arguments):
    operands, (output_final_state, save_every, _precision, *choices) = _split(arguments)
    q, cu_seqlens = operands.q, operands.cu_seqlens
    chunk_size = dict(zip(CHOICE_NAMES, choices))["chunk_size"]  # a trace may have made a symbol of it
    written = operands.initial[_fixed(choices) :]
    rows, heads = _rows(q, cu_seqlens), q.shape[2]
    final, saved = [], []
    if output_final_state:
        gate_dim = gate_width(operands.eta, operands.log_alpha)
        shapes = state_shapes([a.shape[1:] for a in written], rows, heads, chunk_size, gate_dim)
        final = [q.new_empty(shape, dtype=torch.float32) for shape in shapes]
        final[-1] = final[-1].to(torch.int64)
    if save_every:
        room = _saved_chunks(q, cu_seqlens, chunk_size, save_every)
        saved = [q.new_empty((room, *a.shape), dtype=torch.float32) for a in written]
    return q.new_empty(q.shape), final, saved


def _groups(call: _Call, saved: list[Tensor], every: int):
    """The groups of chunks that lie between two kept starts, last one first: whether it goes on in the middle of a chunk,
    where its tokens are, and the slots and states of all its chunks' starts, computed again."""
    continues = call.continues
    if every == 1:
        yield continues, call.where, call.saved_of_row(1), saved
        return
    slots = torch.arange(call.rows, device=call.device) * every
    nothing = torch.empty_like(call.q)
    groups = -(-(call.tokens + (call.chunk_size - 1 if continues else 0)) // (every * call.chunk_size))
    for group in reversed(range(groups)):
        where = call.where_of(group * every, (group + 1) * every)
        begun = continues and group == 0
        kept = (call.saved_of_row(every) + group).clamp(max=saved[0].shape[0] - 1)
        dual = [x.index_select(0, kept) for x in saved]
        chunk_starts = [call.scratch(call.rows * every, *x.shape[1:]) for x in saved]
        call.launch_forward(nothing, dual, [], where, chunk_starts, slots, 1, begun)
        yield begun, where, slots, chunk_starts


def _scratch(call: _Call, places: int, mlp: bool, mirrors: bool) -> NamedTuple:
    """What a chunk's backward pass puts aside between its passes over the tiles; rows of tokens at so many places."""
    from .arguments import Scratch

    shapes = [(call.programs, *shape) for shape in call.shapes]
    return Scratch(
        hidden=tuple(call.scratch(call.programs, call.hidden_units, call.chunk_size) for _ in range(4 * mlp)),
        weight_bar=tuple(call.scratch(*shape) for shape in shapes),
        read_bar=call.scratch(*shapes[-1]) if mlp else None,
        link_bar=None,
        slope_bar=tuple(call.scratch(call.programs, call.hidden_units) for _ in call.base) if mirrors else None,
        rows=call.scratch(call.programs, places * call.chunk_size * max(call.chunk_size, padded(call.head_dim))),
    )


@torch.library.impl(LIBRARY, "backward", "CompositeExplicitAutograd")
def _backward(
    y_bar: Tensor, final_bars: list[Tensor], saved: list[Tensor], save_every: int, *arguments
) -> list[Tensor]:
    """Adjoints of q, k, v, eta, log_alpha, delta (empty if there is none), the initial memory, the norm, the state."""
    from . import backward_delta, backward_matrix, backward_mlp
    from .arguments import Saved, slots_of

    operands, (precision, *choices) = _split(arguments)
    q, _, _, eta, log_alpha, delta, initial, norm_weight, norm_bias, state, _, lengths = operands
    choices = choices_of(*choices)
    call = _Call(operands, precision, choices)
    heads, rows, layers = call.heads, call.rows, call.layers
    # pads are not written to
    new = torch.zeros_like if lengths is not None else torch.empty_like
    bars = call.inputs._make(None if x is None else new(x) for x in call.inputs)
    if final_bars:
        state_bars = [x.to(torch.float32, copy=True).contiguous() for x in final_bars[:layers]]
        factor_bars = [x.float().contiguous() for x in final_bars[layers:]]
    else:
        state_bars, factor_bars = [call.zeros(rows, *a.shape) for a in call.written], []
    base_bars = [call.zeros(rows, *a.shape) for a in initial[: choices.fixed]]
    base_bars += [call.zeros(rows, *a.shape) for a in call.written] if call.toward_init else state_bars
    norm_bars = [call.zeros(rows, heads, call.head_dim) for _ in range(2)]
    partial_in_bars = [call.zeros(*shape) for shape in call.factor_shapes] if state else []
    if call.programs > 0 and call.tokens > 0:
        y_bar = y_bar.contiguous()
        module = {"mlp": backward_mlp, "matrix": backward_matrix, "delta": backward_delta}[call.family]
        kernel = getattr(module, f"{call.family}_backward_kernel")
        launch = call.configuration(f"{call.family}_backward")
        mlp, mirrors = call.memory == "mlp", choices.retention == "lq_mirror"
        scratch = []
        if call.family != "delta":  # whose kernel puts nothing aside
            launch.setdefault("STREAM", False)
            scratch.append(_scratch(call, module.places(launch["STREAM"]), mlp, mirrors))
        launch["THREADS"] = threads(launch)
        for begun, where, slots, chunk_starts in _groups(call, saved, save_every):
            for bar in state_bars:  # inside a group the kernel does it
                bar.mul_(LARGEST_STATE_ADJOINT / bar.abs().amax((-2, -1), keepdim=True).clamp(LARGEST_STATE_ADJOINT))
            of_group = [call.zeros(rows, heads, call.head_dim) for _ in call.norm]
            images = tuple(call.zeros(rows, *a.shape) for a in initial) if mirrors and call.toward_init else None
            tokens, of_rows, partial_in = call.records(where, begun)
            norm = [call.norm_record()] if mlp else []
            arguments = [tokens, y_bar, tuple(call.base), *norm, Saved(tuple(chunk_starts), slots)]
            arguments += [bars, tuple(state_bars), tuple(base_bars)]
            arguments += [partial_in, slots_of(partial_in_bars) if begun else None, slots_of(factor_bars)]
            arguments += [tuple(of_group), of_rows] if mlp else [of_rows]
            with torch.cuda.device_of(q):
                program = kernel[(call.programs,)](
                    *arguments,
                    *(aside._replace(link_bar=images) for aside in scratch),
                    heads,
                    *call.rule,
                    **launch,
                )
            check_program(program)
            norm_bars = [total + part for total, part in zip(norm_bars, of_group)] if of_group else norm_bars
    elif state and final_bars:
        partial_in_bars = [x.clone() for x in factor_bars]

    # sums over rows in fixed order
    if state and not call.toward_init:
        base_bars[choices.fixed :] = [torch.where(call.fresh(), x, 0.0) for x in state_bars]
        state_bars = [torch.where(call.fresh(), 0.0, x) for x in state_bars]
    initial_bars = [x.sum(0) for x in base_bars]

    def like(bar: Tensor, x: Tensor) -> Tensor:
        if bar.shape[-1] != gate(x).shape[-1]:
            bar = bar.sum(-1, keepdim=True)
        return bar.reshape(x.shape).to(x.dtype)

    outputs = [*bars[:3], like(bars.eta, eta), like(bars.log_alpha, log_alpha)]
    outputs.append(call.zeros(0) if delta is None else like(bars.delta, delta))
    outputs += [bar.to(a.dtype) for bar, a in zip(initial_bars, initial)]
    norm = (q if norm_weight is None else norm_weight, q if norm_bias is None else norm_bias)
    outputs += [bar.sum(0).to(p.dtype) for bar, p in zip(norm_bars, norm)]
    if state:
        outputs += [bar.to(x.dtype) for bar, x in zip([*state_bars, *partial_in_bars], state)]
    return outputs


@torch.library.register_fake(f"{NAMESPACE}::backward", lib=LIBRARY)
def _(_y_bar, _final_bars, _saved, _save_every, *arguments):
    operands, _ = _split(arguments)
    q, delta = operands.q, operands.delta
    outputs = [x.new_empty(x.shape) for x in operands[:5]]
    outputs.append(q.new_empty((0,), dtype=torch.float32) if delta is None else delta.new_empty(delta.shape))
    norm_shape = (q.shape[2], q.shape[3])
    outputs += [x.new_empty(x.shape) for x in operands.initial]
    outputs += [(q if x is None else x).new_empty(norm_shape) for x in (operands.norm_weight, operands.norm_bias)]
    return outputs + [x.new_empty(x.shape) for x in operands.state[:-1]]


class _Differentiated(torch.autograd.Function):
    """The forward operator as autograd takes it: its tensors one by one."""

    @staticmethod
    def forward(ctx, layers: int, options: tuple, *tensors):
        operands = _gathered(layers, tensors)
        with torch._C._AutoDispatchBelowAutograd():
            y, final, saved = OPERATORS.forward(*operands, *options)
        ctx.layers, ctx.options, ctx.count = layers, options, len(tensors)
        ctx.finals = [(x.shape, x.dtype) for x in final[:-1]]
        ctx.save_for_backward(*tensors, *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # chunk starts take a gigabyte, and so would zeros for them
        return y, *final, *saved

    @staticmethod
    def backward(ctx, y_bar, *bars):
        kept = ctx.saved_tensors  # asked for once: under checkpointing, that computes them again
        tensors, saved = kept[: ctx.count], kept[ctx.count :]
        if not saved:
            raise RuntimeError(
                "`save_every` must not be 0 in a call that is differentiated: no chunk starts were kept."
            )
        operands, (_, save_every, *rest) = _gathered(ctx.layers, tensors), ctx.options
        final_bars = []
        if any(bar is not None for bar in bars):
            final_bars = [
                operands.q.new_zeros(shape, dtype=dtype) if bar is None else bar
                for bar, (shape, dtype) in zip(bars, ctx.finals)
            ]
        y_bar = torch.zeros_like(operands.q) if y_bar is None else y_bar
        found = OPERATORS.backward(y_bar, final_bars, list(saved), save_every, *operands, *rest)
        found = [None if x is None else bar for x, bar in zip(tensors, found)]
        return None, None, *found, *(None,) * (len(tensors) - len(found))


def _gathered(layers: int, tensors: tuple) -> Operands:
    # of tensors one by one, in the order of their adjoints, those without one last
    weights, norm = 6 + layers, 8 + layers
    return Operands(*tensors[:6], [*tensors[6:weights]], *tensors[weights:norm], [*tensors[norm:-2]], *tensors[-2:])


@torch.library.impl(LIBRARY, "forward", "Autograd")
def _forward_with_gradients(*arguments) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    operands, options = _split(arguments)
    if not asks_for_gradients(list(operands)):
        with torch._C._AutoDispatchBelowAutograd():
            return OPERATORS.forward(*arguments)
    layers = len(operands.initial)
    kept = layers - _fixed(options[3:]) if options[1] else 0
    tensors = (*operands[:6], *operands.initial, *operands[7:9], *operands.state, *operands[10:])
    y, *lists = _Differentiated.apply(layers, options, *tensors)
    final = len(lists) - kept
    return y, lists[:final], lists[final:]


def _refuse_second_derivatives(ctx, bars):
    raise RuntimeError(
        "`miras_kernels` has no second derivatives: its adjoint is a kernel, which is not differentiated itself. Set "
        '`memory_backend="pytorch"`, whose derivatives of every order are right.'
    )


torch.library.register_autograd(f"{NAMESPACE}::backward", _refuse_second_derivatives, lib=LIBRARY)
