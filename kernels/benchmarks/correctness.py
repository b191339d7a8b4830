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
"""Are the kernels right on this device? Every result against float64, with fresh memory full of NaN, ten times over.

The reference is the PyTorch chunk form in float64 on the same device, over all heads and rows: a race may be anywhere.
Whatever is compared must be finite, and equal to the last bit when the call is made again.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import compilations
import faults
import memory_alone  # noqa: F401
import rounded_interpreter  # noqa: F401
import torch
from cases import CASES, FLOAT32, Case
from comparison import PARAMETER, STATE, TOKENS, Allowed, Comparison
from outcomes import NotChecked
from paths import kernel_arguments, make_inputs, make_rule
from projected import finished, make_projected, wide
from record import begin
from torch import Tensor

from miras_hf.memory import MemoryParameters, MemoryState, chunk_miras
from miras_kernels import Projections, decode, forward, resident_state


INPUTS = ("q", "k", "v", "eta", "log_alpha", "delta")


def main() -> None:
    record, args = begin(__doc__, report)
    if args.device == "cuda":
        compilations.follow(record.facts)
    for case in CASES[args.part](args.device, args.quick):
        record.check(str(case), partial(check, case))


@contextlib.contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """What a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Prepared:
    """A case's tensors: what is read, from where it goes on, and where the tokens are."""

    def __init__(self, case: Case):
        shape = case.shape
        self.case, self.rule = case, make_rule(case.model, shape.chunk_size)
        self.inputs, self.parameters = make_inputs(case.model, shape, case.gates)
        self.parameters = stored(self.parameters, case)
        self.arguments = kernel_arguments(self.rule, self.parameters) | {"precision": case.precision}
        self.where: dict[str, Tensor] = {}
        draw = torch.Generator().manual_seed(2)
        if case.padded:
            pads = torch.arange(1, shape.batch + 1) * max(1, shape.tokens // (2 * shape.batch))
            self.where["lengths"] = (shape.tokens - pads).to(shape.device, torch.int32)
        rows = shape.batch
        if case.packed:
            rows = 2 if shape.tokens < 64 else 8
            cuts = 1 + torch.randperm(shape.tokens - 1, generator=draw)[: rows - 1].sort().values
            borders = [0, *cuts.tolist(), shape.tokens]
            self.where["cu_seqlens"] = torch.tensor(borders, device=shape.device)
        self.state = after_prompt(case, self.rule, self.parameters, rows) if case.continued else None

    def expected(self, inputs=None, parameters=None, state=None) -> tuple[Tensor, MemoryState]:
        return chunk_miras(
            *(inputs or [None if x is None else x.double() for x in self.inputs]),
            rule=self.rule,
            parameters=parameters or wide(self.parameters),
            initial_state=state or (self.state and self.state.map(in_float64)),
            output_final_state=True,
            **self.where,
        )

    def differentiated(self) -> tuple[list[str], list[tuple[int, ...]]]:
        """Names of what gradients are taken of, and along which axes blocks of them lie."""
        layers = len(self.parameters.initial)
        names = [*INPUTS, *(f"A{i}" for i in range(layers)), "norm weight", "norm bias"]
        names += [f"state {i}" for i in range(len(flat(self.state)) - 1)]
        return names, [TOKENS] * 6 + [PARAMETER] * (layers + 2) + [STATE] * (len(names) - 8 - layers)

    def scales(self, y: Tensor) -> list[float]:
        """How large gradients of all that is differentiated are by nature, for the outputs `y` and an adjoint of size one:
        those of a read that doubles with whatever it is taken of."""
        tensors = [*self.inputs, *self.parameters.initial, *self.parameters[1:], *flat(self.state)[:-1]]
        sizes = [0.0 if x is None else root_mean_square(x) for x in tensors]
        return [root_mean_square(y) / size if size else 0.0 for size in sizes]

    def gradients(self, read: Callable, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """Of all that is differentiated, for a fixed random adjoint; `None` where there is none.

        Args:
            read (`Callable`): from inputs, parameters and the state to outputs.
            dtype (`torch.dtype`, *optional*): of all leaves, their own by default.
        """
        parameters = self.parameters
        tensors = [*self.inputs, *parameters.initial, *parameters[1:], *flat(self.state)[:-1]]
        leaves = [None if x is None else x.to(dtype or x.dtype).detach().requires_grad_() for x in tensors]
        end = 6 + len(parameters.initial)
        memory = type(parameters)(tuple(leaves[6:end]), *leaves[end : end + 2])
        state = None
        if self.state is not None:
            state = unflat([*leaves[end + 2 :], self.state.count], len(self.state.dual))
        y = read(leaves[:6], memory, state)
        draw = torch.Generator(y.device).manual_seed(5)
        y_bar = torch.randn(y.shape, generator=draw, device=y.device).to(self.inputs[0].dtype).to(y.dtype)
        given = iter(torch.autograd.grad(y, [x for x in leaves if x is not None], y_bar, allow_unused=True))
        return [None if x is None else next(given) for x in leaves]


def stored(parameters: MemoryParameters, case: Case) -> MemoryParameters:
    """The parameters as the case's model has them."""
    dtype = torch.bfloat16 if case.narrow else torch.float32
    return MemoryParameters(tuple(a.to(dtype) for a in parameters.initial), *(p.to(dtype) for p in parameters[1:]))


def after_prompt(case: Case, rule, parameters, rows: int) -> MemoryState:
    """A state in float32, each row's in the middle of a chunk, at a phase of its own, the last one's at the end of one."""
    shape, chunk = case.shape, case.shape.chunk_size
    prompt = type(shape)(rows, 2 * chunk, shape.heads, shape.head_dim, chunk, shape.dtype, shape.device)
    inputs, _ = make_inputs(case.model, prompt, case.gates, seed=3)
    lengths = torch.tensor([2 * chunk - 1 - (7 * row) % (chunk - 2) for row in range(rows)])
    lengths = lengths.to(shape.device)
    double = [None if x is None else x.double() for x in inputs]
    _, state = chunk_miras(*double, rule=rule, parameters=wide(parameters), lengths=lengths, output_final_state=True)
    return state.map(lambda x: x.float() if x.is_floating_point() else x)


def root_mean_square(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def in_float64(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def flat(state: MemoryState | None) -> list[Tensor]:
    if state is None:
        return []
    return [*state.dual, *state.inputs, *state.gradients, state.eta, state.log_decay, state.count]


@torch.no_grad()
def check_forward(case: Case) -> dict:
    """Outputs and final state."""
    prepared, found = Prepared(case), Comparison(case.shape.chunk_size)
    first: list[Tensor] = []
    for repeat in range(case.repeats):
        with fresh_memory_is_nan(), faults.launches(str(case)):
            y, state, _ = forward(
                *prepared.inputs,
                state=tuple(flat(prepared.state)) or None,
                output_final_state=True,
                **prepared.arguments,
                **prepared.where,
            )
        got = [faults.spoilt("y", y, str(case), repeat), *state]
        first = first or got
        for name, one, other in zip(names_of_outputs(got), first, got, strict=True):
            found.equal(name, one, other, repeat)
    y, state = prepared.expected()
    wanted = [y, *flat(state)]
    for name, one, other in zip(names_of_outputs(first)[:-1], first[:-1], wanted[:-1], strict=True):
        found.add(name, one, other, case.allowed(name), TOKENS if name == "y" else STATE)
    if not torch.equal(first[-1], wanted[-1]):
        found.complaints.append(f"count is {first[-1].tolist()}, expected {wanted[-1].tolist()}")
    return found.row()


def names_of_outputs(got: list[Tensor]) -> list[str]:
    return ["y", *(f"state {i}" for i in range(len(got) - 2)), "count"]


def check_backward(case: Case) -> dict:
    """Gradients of every input, of the initial memory, the norm, and the state that the call goes on from."""
    prepared, found = Prepared(case), Comparison(case.shape.chunk_size)

    def by_kernel(inputs, memory, state):
        arguments = kernel_arguments(prepared.rule, memory) | {"precision": case.precision}
        return forward(*inputs, state=tuple(flat(state)) or None, **arguments, **prepared.where)[0]

    outputs: list[Tensor] = []

    def by_form(*given):
        outputs.append(prepared.expected(*given)[0])
        return outputs[0]

    names, kinds = prepared.differentiated()
    expected = prepared.gradients(by_form, torch.float64)
    scales = prepared.scales(outputs.pop())
    first: list[Tensor | None] = []
    for repeat in range(case.repeats):
        with fresh_memory_is_nan(), faults.launches(str(case)):
            got = prepared.gradients(by_kernel)
        first = first or got
        for name, one, other in zip(names, first, got, strict=True):
            if one is not None and other is not None:
                found.equal(f"gradient of {name}", one, other, repeat)
    for name, one, other, kind, scale in zip(names, first, expected, kinds, scales, strict=True):
        if other is None:  # a matrix memory has no norm
            if one is not None and one.any():
                found.complaints.append(f"gradient of {name}: there is none, and some is given")
            continue
        allowed, name = case.allowed(name), f"gradient of {name}"
        found.add(name, one if one is None else faults.spoilt(name, one, str(case)), other, allowed, kind, scale)
    return found.row()


def unflat(tensors: list[Tensor], layers: int) -> MemoryState:
    parts = (tuple(tensors[i * layers : (i + 1) * layers]) for i in range(3))
    return MemoryState(*parts, *tensors[3 * layers :])


def check_decode(case: Case) -> dict:
    """Tokens from the projections on, one call over a chunk's end, each row at a phase of its own; and the state after."""
    return compared_decode(case, case.allowed).row()


@torch.no_grad()
def compared_decode(case: Case, allowed: Callable[[str], Allowed], singly: bool = True) -> Comparison:
    """The comparison of `check_decode`; with `singly` also of the same tokens one call each."""
    shape = case.shape
    found, rule = Comparison(shape.chunk_size), make_rule(case.model, shape.chunk_size)
    raw, projections, parameters = make_projected(case.model, shape, case.gates, rotary=case.rotary)
    parameters = stored(parameters, case)
    start = after_prompt(case, rule, parameters, shape.batch)
    lengths = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=shape.device)
    if case.padded:
        lengths[0], lengths[-1] = shape.tokens - 1, shape.tokens // 2
    arguments = kernel_arguments(rule, parameters) | {"precision": case.precision}
    chosen = {"choices": arguments["choices"], "initial": arguments["initial"]}

    def decoded(pieces: list[slice]) -> list[Tensor]:
        state, link_cache = resident_state(tuple(x.clone() for x in flat(start)), **chosen)
        tail, given = projections.conv_tail.clone(), []
        for piece in pieces:
            # tensors of their own, aligned as those of a model: a view's address may ask for another binary
            turns = {"cos": projections.cos, "sin": projections.sin}
            at = {name: None if x is None else x[:, piece].clone() for name, x in turns.items()}
            y = decode(
                *(None if x is None else x[:, piece].clone() for x in raw),
                state=state,
                link_cache=link_cache,
                projections=projections._replace(conv_tail=tail, **at),
                lengths=(lengths - piece.start).clamp(0, piece.stop - piece.start) if case.padded else None,
                **arguments,
            )
            given.append(y)
        return [torch.cat(given, 1), *state, *link_cache, tail]

    first: list[Tensor] = []
    for repeat in range(case.repeats):
        with fresh_memory_is_nan():
            got = decoded([slice(0, shape.tokens)])
        got[0] = faults.spoilt("y", got[0], str(case), repeat)
        first = first or got
        for i, (one, other) in enumerate(zip(first, got, strict=True)):
            found.equal(f"result {i}", one, other, repeat)
    expected, after = chunk_miras(
        *finished(raw, projections, lengths),
        rule=rule,
        parameters=wide(parameters),
        initial_state=start.map(in_float64),
        lengths=lengths,
        output_final_state=True,
    )
    wanted = flat(after)
    results = {"": first}
    if singly:  # a single token has a binary of its own, the one that models decode with
        with fresh_memory_is_nan():
            results[" one by one"] = decoded([slice(t, t + 1) for t in range(shape.tokens)])
    for words, got in results.items():
        found.add("y" + words, got[0], expected, allowed("y"), TOKENS)
        for i, (one, other) in enumerate(zip(got[1:], wanted[:-1], strict=False)):
            found.add(f"state {i}{words}", one, other, allowed(f"state {i}"), STATE)
    if not torch.equal(first[len(wanted)], wanted[-1]):
        found.complaints.append(f"count is {first[len(wanted)].tolist()}, expected {wanted[-1].tolist()}")
    _, fresh = resident_state(tuple(first[1 : 1 + len(wanted)]), **chosen)
    for i, (one, other) in enumerate(zip(first[1 + len(wanted) : -1], fresh, strict=True)):
        # what the kernel has kept is what would be made anew
        found.add(f"link cache {i}", one, other, FLOAT32, STATE)
    check_tail(found, first[-1], raw, projections, lengths)
    return found


def check_tail(found: Comparison, tail: Tensor, raw: list, projections: Projections, lengths: Tensor) -> None:
    """The convolution's last inputs, each row's, to the bit."""
    given = torch.cat([x.flatten(-2) for x in raw[:3]], -1)
    for row in range(tail.shape[0]):
        seen = torch.cat((projections.conv_tail[row], given[row, : lengths[row]]))[-tail.shape[1] :]
        found.equal(f"the convolution's tail of row {row}", tail[row], seen.to(tail.dtype), 0)


CHECKS = {"forward": check_forward, "backward": check_backward, "decode": check_decode}


def check(case: Case) -> dict:
    """A case's row.

    Raises:
        `NotChecked`: if the device has too little shared memory for any launch, which the kernels say.
    """
    try:
        return CHECKS[case.kind](case)
    except ValueError as error:
        if "No launch of `" in str(error):
            raise NotChecked(str(error)) from error
        raise


def report(rows: list[dict]) -> list[str]:
    lines = ["| what | largest | norm | worst block | |", "|" + " --- |" * 5]
    for row in rows:
        numbers = [f"{row[kind]:.1e}" if kind in row else "" for kind in ("largest", "norm", "block")]
        lines.append("| " + " | ".join([row["what"], *numbers, row["outcome"]]) + " |")
    return lines


if __name__ == "__main__":
    main()
