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
"""What the public functions ask of their arguments before anything is launched.

A kernel reads and writes where shapes, dtypes and borders say, whatever is there: on a device a wrong one is an illegal
access, or another tensor's numbers. Everything but the borders' values is known without looking at a device.
"""

import functools
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .choices import Choices


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOATS = (*DTYPES, torch.float64)
INTEGERS = (torch.int32, torch.int64)


@functools.cache
def check_program(program: Any) -> None:
    """Raises a `RuntimeError` for a compiled program that stores nothing: Triton makes some for Blackwell, of sources that
    store, and what was launched would leave numbers that nobody wrote.

    Args:
        program: what a launch returns. The interpreter returns `None`.
    """
    text = getattr(program, "asm", {}).get("ptx")  # other assemblers have not been seen to
    if text is not None and "st.global" not in text:
        name = program.metadata.name
        raise RuntimeError(
            f"This Triton compiles `{name}` to a program that does nothing, here and for this shape. Take another "
            "chunk_size, head_dim or precision, another Triton, or PyTorch in the kernels' place."
        )


def check_instance(name: str, x: Any, kind: type) -> None:
    """Raises a `TypeError` if `x` is no `kind`."""
    # to Python, True is an integer
    if not isinstance(x, kind) or (isinstance(x, bool) and kind is not bool):
        raise TypeError(f"`{name}` must be a {kind.__name__}, got {type(x).__name__}.")


def check_record(name: str, x: Any, kind: type) -> None:
    """Raises a `TypeError` if `x` is no `kind`, of this package or of another copy of it, which the Hub may have loaded."""
    if type(x) is kind:
        return
    if isinstance(x, type) or type(x).__name__ != kind.__name__ or type(x).__annotations__ != kind.__annotations__:
        raise TypeError(f"`{name}` must be a {kind.__name__}, got {type(x).__name__}.")


def check_tensor(
    name: str, x: Any, dtypes: Sequence[torch.dtype], device: torch.device | None = None, beside: str = "q"
) -> None:
    """Raises a `TypeError` if `x` is no tensor, a `ValueError` for a dtype, layout or device that no kernel reads."""
    check_instance(name, x, Tensor)
    if x.layout != torch.strided or x.is_nested:
        raise ValueError(f"`{name}` must be a dense tensor, got one of layout {x.layout}.")
    if x.dtype not in dtypes:
        raise ValueError(f"`{name}` must be of {' or '.join(map(_dtype_name, dtypes))}, got {x.dtype}.")
    if device is not None and x.device != device:
        raise ValueError(f"`{name}` must be on {str(device)!r}, where `{beside}` is, got {str(x.device)!r}.")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensors(
    name: str,
    tensors: Any,
    device: torch.device | None = None,
    *,
    first: Sequence[torch.dtype] = FLOATS,
    last: Sequence[torch.dtype] = FLOATS,
    beside: str = "q",
) -> None:
    """The same of a tuple or list of floating-point tensors, those at its ends of dtypes `first` and `last`."""
    if not isinstance(tensors, (tuple, list)):
        raise TypeError(f"`{name}` must be a tuple of tensors, got {type(tensors).__name__}.")
    for i, x in enumerate(tensors):
        dtypes = last if i + 1 == len(tensors) else first if i == 0 else FLOATS
        check_tensor(f"{name}[{i}]", x, dtypes, device, beside)


def check_shape(name: str, x: Tensor, allowed: Sequence[tuple[int, ...]]) -> None:
    """Raises a `ValueError` if `x` has none of the shapes `allowed`."""
    if tuple(x.shape) not in allowed:
        raise ValueError(f"`{name}` must have shape {' or '.join(map(str, allowed))}, got {tuple(x.shape)}.")


def check_shapes(name: str, tensors: Sequence[Tensor], expected: Sequence[tuple[int, ...]]) -> None:
    """Raises a `ValueError` if a tuple's tensors do not have the shapes `expected`."""
    if [tuple(x.shape) for x in tensors] != list(expected):
        raise ValueError(f"`{name}` must have shapes {list(expected)}, got {[tuple(x.shape) for x in tensors]}.")


def check_query(q: Any, choices: Any) -> None:
    """What has to be known before a kernel can be asked for. Its dtype and head_dim are left to `refusal`."""
    check_record("choices", choices, Choices)
    check_instance("q", q, Tensor)
    if q.layout != torch.strided or q.is_nested:
        raise ValueError(f"`q` must be a dense tensor, got one of layout {q.layout}.")
    if q.dim() != 4:
        raise ValueError(f"`q` must have shape [batch, tokens, heads, head_dim], got {tuple(q.shape)}.")


def gate_width(eta: Tensor, log_alpha: Tensor) -> int:
    """Numbers a gate has for each token and head, of both the larger."""
    return max(x.shape[-1] if x.dim() == 4 else 1 for x in (eta, log_alpha))


def state_shapes(
    written: Sequence[tuple[int, ...]], rows: int, heads: int, chunk_size: int, gate_dim: int
) -> list[tuple[int, ...]]:
    """Shapes of a state's tensors, as `forward` takes and returns them, from those `[in, out]` of weights that texts write."""
    widths = [fan_in for fan_in, _ in written] + [fan_out for _, fan_out in written] + [gate_dim, gate_dim]
    shapes: list[tuple[int, ...]] = [(rows, heads, *weight) for weight in written]
    return shapes + [(rows, heads, chunk_size, width) for width in widths] + [(rows,)]


def check_inputs(
    q: Tensor,
    k: Any,
    v: Any,
    eta: Any,
    log_alpha: Any,
    delta: Any,
    choices: Choices,
    initial: Any,
    norm_weight: Any,
    norm_bias: Any,
    state: Any,
    cu_seqlens: Any,
    lengths: Any,
) -> None:
    """Types, dtypes, devices and shapes of what `forward` and `decode` share; `q` has passed `check_query`.

    Raises:
        `TypeError`: for what is no tensor, or no tuple of tensors.
        `ValueError`: for what does not fit, naming the argument, what it is and what is allowed.
    """
    batch, tokens, heads, head_dim = q.shape
    device = q.device
    of_head = (batch, tokens, heads)
    of_gate = [of_head, (*of_head, 1), (*of_head, head_dim)]
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, (q.dtype,), device)
        check_shape(name, x, [tuple(q.shape)])
    # what a token erases along its key it writes along its key
    of_step = of_gate if choices.learning_algorithm == "gradient_descent" else of_gate[:2]
    for name, x, allowed in (("eta", eta, of_step), ("log_alpha", log_alpha, of_gate)):
        check_tensor(name, x, FLOATS, device)
        check_shape(name, x, allowed)
    if choices.threshold:
        if delta is None:
            raise ValueError(f"`delta` is required by {choices.attentional_bias}, a threshold per token.")
        check_tensor("delta", delta, FLOATS, device)
        check_shape("delta", delta, of_gate if choices.threshold == "channel" else of_gate[:2])
    elif delta is not None:
        raise ValueError(f"`delta` must be None: {choices.attentional_bias} has no threshold.")
    check_tensors("initial", initial, device)
    check_shapes("initial", initial, [(heads, *shape) for shape in choices.weight_shapes(head_dim)])
    for name, x in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if x is not None:
            check_tensor(name, x, FLOATS, device)
            check_shape(name, x, [(heads, head_dim)])
        elif choices.memory == "mlp":
            raise ValueError(f"`{name}` is required by an MLP memory.")
    if lengths is not None:
        check_tensor("lengths", lengths, INTEGERS, device)
        check_shape("lengths", lengths, [(batch,)])
    rows = batch
    if cu_seqlens is not None:
        # its own values are looked at where it lies, and it may come from the host
        check_tensor("cu_seqlens", cu_seqlens, INTEGERS, None if is_on_host(cu_seqlens) else device)
        if batch != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                "`cu_seqlens` must have shape [sequences + 1] and needs a batch of one packed row, got "
                f"{tuple(cu_seqlens.shape)} and a batch of {batch}."
            )
        rows = cu_seqlens.shape[0] - 1
    if state is not None:
        check_tensors("state", state, device, last=INTEGERS)
        written = choices.weight_shapes(head_dim)[choices.fixed :]
        expected = state_shapes(written, rows, heads, choices.chunk_size, gate_width(eta, log_alpha))
        check_shapes("state", state, expected)


def is_on_host(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cpu"


def checked_borders(cu_seqlens: Tensor, tokens: int, device: torch.device) -> Tensor:
    """`cu_seqlens` on `device`, of int64, after a look at its values: on the host where it is there, and by an assertion
    on the device where it is there, for which nothing waits.

    Raises:
        `ValueError`: for borders on the host that do not run from 0 to `tokens`. On a device the kernels that follow do
            not run, and the next synchronisation raises.
    """
    if is_on_host(cu_seqlens):
        borders = cu_seqlens.tolist()
        if borders[0] != 0 or borders[-1] != tokens or any(a > b for a, b in zip(borders, borders[1:])):
            raise ValueError(
                f"`cu_seqlens` must begin with 0, never decrease and end with {tokens}, the tokens of the pack, got "
                f"{_few(borders)}."
            )
    else:
        fits = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
        torch._assert_async(
            fits, "`cu_seqlens` must begin with 0, never decrease and end with the tokens of the pack."
        )
    return cu_seqlens.to(device, torch.int64)


def check_lengths(lengths: Tensor, tokens: int) -> None:
    """Looks at the values of `lengths` as `checked_borders` does at those of `cu_seqlens`.

    Raises:
        `ValueError`: for lengths on the host below 0 or above `tokens`; on a device as there.
    """
    if is_on_host(lengths):
        values = lengths.tolist()
        if any(not 0 <= length <= tokens for length in values):
            raise ValueError(f"`lengths` must lie between 0 and {tokens}, the tokens of a row, got {_few(values)}.")
    else:
        fits = ((lengths >= 0) & (lengths <= tokens)).all()
        torch._assert_async(fits, "`lengths` must lie between 0 and the tokens of a row.")


def _few(values: list[int]) -> str:
    return str(values) if len(values) <= 16 else f"{str(values[:12])[:-1]}, ..., {values[-1]}]"


def check_options(output_final_state: Any, save_every: Any) -> None:
    check_instance("output_final_state", output_final_state, bool)
    check_instance("save_every", save_every, int)
    if save_every < 0:
        raise ValueError(f"`save_every` must be 0 or more chunks, got {save_every}.")


def check_resident(state: tuple[Tensor, ...], link_cache: Any, choices: Choices, q: Tensor) -> None:
    """What `decode` updates where it lies has to lie as `resident_state` returns it."""
    rows, _, heads, head_dim = q.shape
    phases = (torch.int32, *FLOATS)
    check_tensors("link_cache", link_cache, q.device, first=phases, last=phases)
    expected = [(rows, heads)]
    if choices.memory == "mlp":
        expected.append((rows, heads, 4 + 4 * head_dim + choices.chunk_size))
    check_shapes("link_cache", link_cache, expected)
    dtypes = {"state": [torch.float32] * (len(state) - 1) + [torch.int64], "link_cache": [torch.int32, torch.float32]}
    for name, tensors in (("state", state), ("link_cache", link_cache)):
        if any(t.dtype != d or not t.is_contiguous() for t, d in zip(tensors, dtypes[name])):
            raise ValueError(
                f"`{name}` must be contiguous and float32, counts int64 and phases int32, as `resident_state` returns it."
            )


def check_projections(projections: Any, kind: type, q: Tensor) -> None:
    """Of `Projections`, whose class is `kind`."""
    if projections is None:
        return
    check_record("projections", projections, kind)
    rows, tokens, heads, head_dim = q.shape
    device, width = q.device, heads * head_dim
    p = projections
    check_tensors("projections.conv_weights", p.conv_weights, device)
    shapes = [tuple(w.shape) for w in p.conv_weights]
    kernel = shapes[0][-1] if shapes and shapes[0] else 0
    if kernel < 1 or shapes != [(width, kernel)] * 3:
        raise ValueError(f"`projections.conv_weights` must have shapes {[(width, 'kernel')] * 3}, got {shapes}.")
    check_tensor("projections.conv_tail", p.conv_tail, FLOATS, device)
    check_shape("projections.conv_tail", p.conv_tail, [(rows, kernel - 1, 3 * width)])
    if not p.conv_tail.is_contiguous():
        raise ValueError("`projections.conv_tail` must be contiguous: it is updated where it lies.")
    check_tensor("projections.a_log", p.a_log, FLOATS, device)
    check_shape("projections.a_log", p.a_log, [(heads,)])
    check_instance("projections.eta_max", p.eta_max, Real)
    check_instance("projections.value_norm", p.value_norm, bool)
    if (p.cos is None) != (p.sin is None):
        raise ValueError("`projections.cos` and `projections.sin` come together, got one without the other.")
    for name, x in (("projections.cos", p.cos), ("projections.sin", p.sin)):
        if x is not None:
            check_tensor(name, x, FLOATS, device)
            check_shape(name, x, [(rows, tokens, head_dim), (1, tokens, head_dim)])
    if p.cos is not None and p.cos.shape != p.sin.shape:
        raise ValueError(
            f"`projections.sin` must have shape {tuple(p.cos.shape)}, as `cos`, got {tuple(p.sin.shape)}."
        )
