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
"""Decoding as a PyTorch operator, `torch.ops.miras_kernels.decode`: a few tokens for every row, in one launch.

It updates the state where it lies, so a state is first made resident: contiguous, in float32, beside what the kernel
would otherwise have to compute from all weights at every token.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, strided
from torch.nn import Parameter

from .checks import (
    FLOATS,
    INTEGERS,
    check_inputs,
    check_lengths,
    check_program,
    check_projections,
    check_query,
    check_record,
    check_resident,
    check_shapes,
    check_tensors,
    is_on_host,
    state_shapes,
)
from .choices import Choices
from .configuration import launch_configuration, threads
from .ops import (
    CHOICE_SCHEMA,
    LIBRARY,
    NAMESPACE,
    OPERATORS,
    asks_for_gradients,
    choice_values,
    choices_of,
    default_precision,
    prepared,
    refuse,
)


LARGEST_CALL = 16
"""Tokens a row may have in a call; the kernel reads them one by one, and from there on the forward kernel is faster."""


class Projections(NamedTuple):
    """What stands between a layer's projections and its memory: short convolutions with SiLU, a rotary embedding, the
    l2 norm of queries and keys (epsilon 1e-6), that of values if they have one, and the gates' activations

        eta = eta_max sigmoid(.)      log alpha = -exp(a_log) softplus(.)      delta = softplus(.) + 1e-4

    Args:
        conv_weights (`tuple` of `torch.Tensor` of shape `[heads * head_dim, kernel]`): of queries, keys and values.
        conv_tail (`torch.Tensor` of shape `[rows, kernel - 1, 3 * heads * head_dim]`):
            The convolutions' last inputs, queries, keys and values side by side. Updated where it lies.
        a_log (`torch.Tensor` of shape `[heads]`): log rate of retention.
        eta_max (`float`): largest step size.
        cos, sin (`torch.Tensor` of shape `[rows or 1, tokens, head_dim]`, *optional*): of the rotary embedding.
        value_norm (`bool`, *optional*, defaults to `False`):
            Whether values are divided by their l2 norm, too, and multiplied by `sqrt(head_dim)`.
    """

    conv_weights: tuple[Tensor, Tensor, Tensor]
    conv_tail: Tensor
    a_log: Tensor
    eta_max: float
    cos: Tensor | None = None
    sin: Tensor | None = None
    value_norm: bool = False


def resident_state(
    state: tuple[Tensor, ...], *, choices: Choices, initial: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Makes a state ready for `decode`.

    Args:
        state (`tuple` of `torch.Tensor`): as `forward` takes and returns it.
        choices, initial: as in `forward`.

    Returns:
        The state, its tensors as they are where nothing has to change; and its link cache: the phase of every row and
        head, `[rows, heads]`, and for an MLP memory what its link needs of the whole weights, `[rows, heads, numbers]`.
        They belong together: after a change of the state by anything but `decode` the link cache has to be made anew.

    Raises:
        `TypeError`: if an argument is not of its type.
        `ValueError`: if arguments do not fit, naming the reason.
    """
    check_record("choices", choices, Choices)
    check_tensors("initial", initial)
    check_tensors("state", state, last=INTEGERS)
    if not initial or initial[0].dim() != 3:
        raise ValueError(f"`initial` must have shapes [heads, in, out], got {[tuple(a.shape) for a in initial]}.")
    heads, head_dim, _ = initial[0].shape
    check_shapes("initial", initial, [(heads, *shape) for shape in choices.weight_shapes(head_dim)])
    rows = state[-1].numel() if state else 0
    gate_dim = head_dim if len(state) > 1 and state[-2].shape[-1:] == (head_dim,) else 1
    written = choices.weight_shapes(head_dim)[choices.fixed :]
    check_shapes("state", state, state_shapes(written, rows, heads, choices.chunk_size, gate_dim))
    for name, tensors, last in (("initial", initial, FLOATS), ("state", state, INTEGERS)):
        check_tensors(name, tensors, state[0].device, last=last, beside="state[0]")
    layers = len(initial) - choices.fixed
    count = state[-1].to(torch.int64).contiguous()
    rest = [x.float().contiguous() for x in state[:-1]]
    if choices.decay_target != "init":  # a row that has not read anything is at the learned initial memory
        fresh = (count == 0).view(-1, 1, 1, 1)
        rest[:layers] = [torch.where(fresh, a.float(), d) for a, d in zip(initial[choices.fixed :], rest)]
    heads = rest[0].shape[1]
    phases = (count % choices.chunk_size).to(torch.int32)[:, None].expand(-1, heads).contiguous()
    link_cache = [phases]
    if choices.memory == "mlp":
        gradients = rest[2 * layers]
        link_cache.append(_links(choices, initial, rest[:layers], gradients))
    return (*rest, count), tuple(link_cache)


def _links(choices: Choices, initial, duals, gradients: Tensor) -> Tensor:
    # [rows, heads, 4 + 4 head_dim + chunk_size]: the layout that decode_mlp.py reads and writes
    bases = [a.float() for a in initial]
    if choices.decay_target == "init":
        duals = [a + d for a, d in zip(bases[choices.fixed :], duals)]
    duals = [*(a.expand(len(gradients), *a.shape) for a in bases[: choices.fixed]), *duals]
    scales = [_scale(choices, x) for x in duals]
    base_scales = [_scale(choices, a).expand_as(s) for a, s in zip(bases, scales)]
    vectors = []
    for dual, axis in zip(duals, (-1, -2)):
        if choices.retention == "kl":
            top = dual.amax(axis)
            vectors += [top, (dual - top.unsqueeze(axis)).exp().sum(axis)]
        elif choices.retention == "lq_mirror":
            slope = dual.abs().pow(choices.lq_power - 2.0).sum(axis)
            vectors += [slope, torch.zeros_like(slope)]
        else:
            vectors += [torch.zeros_like(dual.sum(axis))] * 2
    means = gradients.mean(-1) if choices.retention == "kl" else torch.zeros_like(gradients[..., 0])
    return torch.cat((torch.stack((*scales, *base_scales), -1), *vectors, means), -1).contiguous()


def _scale(choices: Choices, dual: Tensor) -> Tensor:
    # the scalar of links phi(A) = s(A) A
    q = choices.lq_power
    scale = torch.ones_like(dual[..., 0, 0])
    if choices.retention in ("lq", "lq_mirror"):
        total = dual.abs().pow(q).sum((-2, -1)).clamp(min=choices.lq_norm_floor**q)
        scale = total.pow(-(q - 2.0) / q)
    if choices.weight_cap is not None and choices.retention != "kl":
        mapped = dual * dual.abs().pow(q - 2.0) if choices.retention == "lq_mirror" else dual
        rms = mapped.square().sum((-2, -1)).sqrt().clamp(min=1e-12) / math.sqrt(dual.shape[-2] * dual.shape[-1])
        scale = torch.minimum(scale, choices.weight_cap / rms)
    return scale


def decode(
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
    state: tuple[Tensor, ...],
    link_cache: tuple[Tensor, ...],
    projections: Projections | None = None,
    lengths: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """Reads a few tokens per row; several at once give the bits of one after the other, and a row those of the row alone.

    Args:
        q, k, v, eta, log_alpha, delta: as in `forward`, or, with `projections`, what the layer's projections give.
        choices, initial, norm_weight, norm_bias, precision: as in `forward`; `precision` is that of the fold at a chunk's
            end, everything else is float32.
        state, link_cache (`tuple` of `torch.Tensor`): what `resident_state` returns. Updated where they lie.
        projections (`Projections`, *optional*): what stands before the memory, to be done in the same launch.
        lengths (`torch.Tensor` of shape `[rows]`, int32 or int64, *optional*):
            Tokens of each row, from 0 to `tokens`. What stands behind them are pads: outputs there are zero, and the state
            stays. On a device nothing looks at the values, and more than `tokens` are `tokens`.

    Returns:
        `y` of the shape and dtype of `q`.

    Raises:
        `TypeError`: if an argument is not of its type.
        `ValueError`: if no kernel serves the call, or arguments do not fit, naming the reason.
    """
    check_query(q, choices)
    needs_grad = asks_for_gradients([q, k, v, eta, log_alpha, delta, initial, norm_weight, norm_bias, state])
    inputs, parameters = (q, k, v, eta, log_alpha, delta), (initial, norm_weight, norm_bias)
    call = None
    if (
        not torch.compiler.is_compiling()
    ):  # a token's call is like the one before, and checks cost more than to see that
        looks = tuple(map(_looks, (inputs, parameters, state, link_cache, projections, lengths)))
        call = (looks, choices, precision, precision or default_precision(q.dtype), needs_grad)
    if call is None or call not in _served:
        refuse(q, choices, needs_grad, precision, decode=True)
        if not 1 <= q.shape[1] <= LARGEST_CALL:
            raise ValueError(
                f"`q` must hold 1 to {LARGEST_CALL} tokens a row, got {q.shape[1]}: longer calls take `forward`."
            )
        check_tensors("state", state, last=(*INTEGERS, *FLOATS))
        check_inputs(*inputs, choices, *parameters, state, None, lengths)
        check_resident(state, link_cache, choices, q)
        check_projections(projections, Projections, q)
        _remember(call)
    raw = ([], None, None, 0.0, None, None, False)
    if projections is not None:
        conv_weights, conv_tail, a_log, eta_max, *rest = projections
        raw = (list(conv_weights), conv_tail, a_log, float(eta_max), *rest)
    return OPERATORS.decode(
        *(*inputs, list(initial), norm_weight, norm_bias, [*state, *link_cache]),
        *(*raw, lengths, precision or "", *choice_values(choices)),
    )


_served: set[tuple] = set()
"""Calls that have passed the checks of `decode`, as far as these look at them."""


def _remember(call: tuple | None) -> None:
    if call is not None:
        if len(_served) >= 4096:  # of a server that has seen every batch size
            _served.clear()
        _served.add(call)


def _looks(x: Any) -> Any:
    # all that a check reads of an argument; an object that is equal to no other where there is more to it
    if x is None:
        return None
    kind = type(x)
    if kind is Tensor or kind is Parameter:
        if x.layout is strided and not x.is_nested:
            return kind, x.shape, x.dtype, x.device, x.is_contiguous()
        return object()
    if isinstance(x, (tuple, list)):
        return kind, *map(_looks, x)
    return object() if isinstance(x, Tensor) else kind


LIBRARY.define(
    "decode(Tensor q, Tensor k, Tensor v, Tensor eta, Tensor log_alpha, Tensor? delta, Tensor[] initial, "
    "Tensor? norm_weight, Tensor? norm_bias, Tensor(a!)[] state, Tensor[] conv_weights, Tensor(b!)? conv_tail, "
    "Tensor? a_log, float eta_max, Tensor? cos, Tensor? sin, bool value_norm, "
    f"Tensor? lengths, str precision, {CHOICE_SCHEMA}) -> Tensor"
)


@torch.library.impl(LIBRARY, "decode", "CompositeExplicitAutograd")
def _decode(*arguments) -> Tensor:
    from .arguments import Norm, Raw, constant, slots_of

    inputs, (initial, norm_weight, norm_bias, state) = arguments[:6], arguments[6:10]
    conv_weights, conv_tail, a_log, eta_max, cos, sin, value_norm = arguments[10:17]
    lengths, precision, *choices = arguments[17:]
    c = choices_of(*choices)
    rows, length, heads, head_dim = inputs[0].shape
    if lengths is not None:
        if is_on_host(lengths):
            check_lengths(lengths, length)
        lengths = lengths.to(torch.int32).contiguous()
    tokens, precision, rule = prepared(*inputs, c, precision)
    y = torch.empty_like(tokens.q)
    if rows == 0:
        return y
    raw, rotary_tokens = None, 0
    if conv_weights:
        taps = conv_weights[0].shape[-1]
        if cos is not None:
            rotary_tokens = 0 if cos.shape[0] == 1 else length
            cos, sin = cos.contiguous(), sin.contiguous()
        raw = Raw(
            *(conv_tail, tuple(w.contiguous() for w in conv_weights), cos, sin, a_log.float(), eta_max),
            *(constant(taps), constant(1 << (taps - 1).bit_length())),
            constant(math.sqrt(head_dim) if value_norm else 0.0),
        )
    launch = launch_configuration(
        f"{c.family}_decode", device=y.device, head_dim=head_dim, chunk_size=c.chunk_size, precision=precision
    )
    layers = len(initial) - c.fixed
    dual, slots = tuple(state[:layers]), slots_of(state[layers : 3 * layers + 2])
    records = [tokens, y, tuple(a.contiguous() for a in initial)]
    if c.memory == "mlp":
        from .decode_mlp import mlp_decode_kernel as kernel

        launch["THREADS"] = threads(launch)
        scratch = torch.empty(rows * heads, 3, initial[0].shape[2], device=y.device)
        norm = [p.float().contiguous() for p in (norm_weight, norm_bias)]
        records += [Norm(*norm, constant(float(c.norm_eps))), dual, slots, *state[-3:], raw, lengths, scratch]
    else:
        if c.family == "delta":
            from .decode_delta import delta_decode_kernel as kernel
        else:
            from .decode_matrix import matrix_decode_kernel as kernel

        records += [dual, slots, *state[-2:], raw, lengths]
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(y):
        check_program(kernel[(rows * heads,)](*records, length, heads, rotary_tokens, *rule, **launch))
    return y


@torch.library.register_fake(f"{NAMESPACE}::decode", lib=LIBRARY)
def _(q, *_):
    return q.new_empty(q.shape)
