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
"""Kernels compiled as the public operator would launch them, without a GPU, and what the compiler made of them.

The operator is called for real, on CPU tensors, up to the launch itself; there the kernel is compiled for the wanted
compute capability. Types, specialisations and constants are therefore those of a launch, whatever a kernel's signature.
"""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import own_packages  # noqa: F401
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from miras_kernels import (
    Projections,
    backward_delta,
    backward_matrix,
    backward_mlp,
    configuration,
    decode_delta,
    decode_matrix,
    decode_mlp,
    decoding,
    forward_delta,
    forward_pass,
    ops,
    resident_state,
)
from miras_kernels.choices import Choices


# where the operator finds a kernel when it launches it
KERNELS = {
    "mlp_forward": (forward_pass, "mlp_forward_kernel"),
    "mlp_backward": (backward_mlp, "mlp_backward_kernel"),
    "mlp_decode": (decode_mlp, "mlp_decode_kernel"),
    "matrix_forward": (forward_pass, "matrix_forward_kernel"),
    "matrix_backward": (backward_matrix, "matrix_backward_kernel"),
    "matrix_decode": (decode_matrix, "matrix_decode_kernel"),
    "delta_forward": (forward_delta, "delta_forward_kernel"),
    "delta_backward": (backward_delta, "delta_backward_kernel"),
    "delta_decode": (decode_delta, "delta_decode_kernel"),
}
# shared memory that one program may use, KiB, for what a configuration file's name says: sm_89 stands for every device
# that has to do with the default, and has the least of those that PyTorch and Triton still serve
CAPABILITIES = {"sm_80": (80, 163), "sm_90": (90, 227), "sm_100": (100, 227), "default": (89, 99)}


@dataclass(frozen=True)
class Call:
    """A call of the operator that is worth compiling: a point of the design space, and what is asked of the call."""

    choices: Choices
    kernel: str = "mlp_forward"
    head_dim: int = 64
    precision: str = "bf16"
    channel_gates: bool = True
    continues: bool = False  # from a state in the middle of a chunk
    keeps: bool = False  # the state after the last token
    padded: bool = False
    save_every: int = 0
    narrow: bool = False  # parameters in bfloat16, as a bfloat16 model has them
    several: bool = False  # tokens at once, of decoding
    rotary: bool = True  # queries and keys are turned by their position, of decoding
    nth: int = -1  # of a forward pass's launches, which to count
    variant: int = 0  # which of `launches.changed`; 0 is the configured launch

    def at(self, kernel: str, head_dim: int, chunk_size: int, precision: str) -> "Call":
        """The same for another kernel, whose name begins with its family, and another shape."""
        family = kernel.partition("_")[0]
        # a family of its own, whose other choices are given
        choices = self.choices if family == "delta" else replace(self.choices, memory=family)
        choices = replace(choices, chunk_size=chunk_size)
        nth = self.nth if kernel.endswith("_forward") else -1
        return replace(self, choices=choices, kernel=kernel, head_dim=head_dim, precision=precision, nth=nth)


def run(call: Call, heads: int = 4, batch: int = 1, tokens: int = 64, device: str = "cpu") -> Callable[[], object]:
    """The call, ready to be made, on random inputs; `tokens` is rounded up to whole chunks."""
    choices, head_dim = call.choices, call.head_dim
    decodes = call.kernel.endswith("_decode")
    tokens = (9 if call.several else 1) if decodes else -(-tokens // choices.chunk_size) * choices.chunk_size
    dtype = torch.bfloat16 if call.precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    q, k = (torch.nn.functional.normalize(normal(batch, tokens, heads, head_dim), dim=-1).to(dtype) for _ in "qk")
    v = normal(batch, tokens, heads, head_dim).to(dtype)
    gate = (batch, tokens, heads, *((head_dim,) if call.channel_gates else ()))
    of_step = gate[:3] if choices.family == "delta" else gate
    eta, log_alpha = 0.01 * normal(*of_step).sigmoid(), -0.01 * normal(*gate).sigmoid()
    delta = None
    if choices.threshold:
        per_channel = call.channel_gates and choices.threshold == "channel"
        delta = normal(*(gate if per_channel else gate[:3])).exp()
    shapes = choices.weight_shapes(head_dim)
    stored = torch.bfloat16 if call.narrow else torch.float32
    arguments = {
        "choices": choices,
        "initial": tuple((normal(heads, *shape) / shape[0] ** 0.5).to(stored) for shape in shapes),
        "precision": call.precision,
    }
    if choices.memory == "mlp":
        arguments["norm_weight"] = torch.ones(heads, head_dim, device=device, dtype=stored)
        arguments["norm_bias"] = torch.zeros(heads, head_dim, device=device, dtype=stored)
    if call.padded:
        arguments["lengths"] = torch.full((batch,), max(tokens - 3, 0), dtype=torch.int32, device=device)
    if call.continues or decodes:
        shapes = shapes[choices.fixed :]
        widths = [fan_in for fan_in, _ in shapes] + [fan_out for _, fan_out in shapes] + 2 * [(*gate, 1)[3]]
        factors = (torch.zeros(batch, heads, choices.chunk_size, width, device=device) for width in widths)
        dual = (torch.zeros(batch, heads, *shape, device=device) for shape in shapes)
        arguments["state"] = (*dual, *factors, torch.full((batch,), 5, device=device))
    if decodes:
        state, link_cache = resident_state(arguments["state"], choices=choices, initial=arguments["initial"])
        width = heads * head_dim
        projections = Projections(
            conv_weights=tuple(normal(width, 4).to(dtype) for _ in "qkv"),
            conv_tail=normal(batch, 3, 3 * width).to(dtype),
            a_log=torch.zeros(heads, device=device),
            eta_max=0.03,
            cos=normal(1, tokens, head_dim).to(dtype) if call.rotary else None,
            sin=normal(1, tokens, head_dim).to(dtype) if call.rotary else None,
            value_norm=True,
        )
        arguments |= {"state": state, "link_cache": link_cache, "projections": projections}
        return lambda: decoding.decode(q, k, v, eta, log_alpha, delta, **arguments)
    arguments |= {"output_final_state": call.keeps, "save_every": call.save_every}
    if not call.kernel.endswith("_backward"):
        return lambda: ops.forward(q, k, v, eta, log_alpha, delta, **arguments)

    def step():
        y, *_ = ops.forward(*(x.requires_grad_() for x in (q, k, v)), eta, log_alpha, delta, **arguments)
        y.sum().backward()

    return step


def compiled(call: Call, launch: dict[str, int], capability: int) -> dict[str, int]:
    """Compiles the kernel that `call` launches.

    Args:
        call (`Call`): what is called.
        launch (`dict`): launch arguments, as `launch_configuration` returns them.
        capability (`int`): compute capability, 90 for sm_90.

    Returns:
        Of one thread: `registers`, `stack` in bytes, spilled loads and stores in the program's text, and the bytes they
        move in the loop over chunks and in the loops over tiles inside it; `shared` memory of one program in bytes; how
        many instructions of the matrix units the text holds, `wgmma` and `tcgen05` those that only Hopper and Blackwell
        have, `mma` those of all; how many products are `asynchronous`; and what `work` counts.

    Raises:
        `RuntimeError`: of Triton or its assembler, if there is no such program; for one that does nothing; and for one that
            does not wait for each asynchronous product at once.
    """
    # a backward pass follows a forward pass, whose kernel is not what is asked for
    skipped = [call.kernel.replace("_backward", "_forward")] if call.kernel.endswith("_backward") else []
    with (
        _compilers([call.kernel], skipped, lambda *_, **__: dict(launch), capability) as binaries,
        # nothing is read from or left in the user's cache: what is counted was compiled here
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
    ):
        knobs.cache.dir = cache
        run(call)()
    binary = binaries[call.nth]
    asynchronous, unawaited = asynchronous_products(binary.asm["ttgir"])
    if unawaited:
        raise RuntimeError(f"{call.kernel} goes on before an asynchronous product has its result: {unawaited[0]}")
    every_chunk, threads = not call.kernel.endswith("_decode"), 32 * launch["num_warps"]
    done = work(_sass(binary, "-sass"), tiles(call, launch), threads, every_chunk)
    return _counts(binary) | {"asynchronous": len(asynchronous)} | done


def tiles(call: Call, launch: dict[str, int]) -> int:
    """How many tiles a pass over the memory's hidden units, or a matrix's outputs, has; one without tiles."""
    width = call.choices.weight_shapes(call.head_dim)[0][1]
    return -(-width // launch.get("TN", width))


@contextlib.contextmanager
def compiling(name: str) -> Iterator[list]:
    """Public functions that are called inside, on CPU tensors, compile what they would launch on a device of the
    configuration file `name`, and launch nothing. Binaries come from Triton's cache, or are left there; those of all
    launches are in the list that is given."""

    def launch_configuration(kernel: str, *, device: object, **shape) -> dict[str, int]:
        return configuration.launch_configuration(kernel, device=name, **shape)

    with _compilers(list(KERNELS), [], launch_configuration, CAPABILITIES[name][0]) as binaries:
        yield binaries


@contextlib.contextmanager
def _compilers(kernels: list[str], skipped: list[str], launch_configuration: Callable, capability: int):
    binaries: list = []
    with contextlib.ExitStack() as stack:
        for kernel in (*kernels, *skipped):
            module, attribute = KERNELS[kernel]
            stand_in = _Nothing() if kernel in skipped else _Compiler(getattr(module, attribute), binaries)
            stack.enter_context(patch.object(module, attribute, stand_in))
        for module in (ops, decoding):
            stack.enter_context(patch.object(module, "launch_configuration", launch_configuration))
        # there is no GPU, and none is needed
        stack.enter_context(patch.object(ops, "refusal", lambda *_: None))
        stack.enter_context(_target(capability))
        yield binaries


def asynchronous_products(ttgir: str) -> tuple[list[str], list[str]]:
    """A program's asynchronous products, and those of them that do not wait for their result on the next line.

    Triton before 3.8 may let one of two warpgroups overwrite shared memory that such a product of the other still reads.
    """
    lines = [line.strip() for line in ttgir.splitlines()]
    found = [i for i, line in enumerate(lines) if re.search(r"\bwarp_group_dot .*isAsync = true", line)]
    return [lines[i] for i in found], [
        lines[i] for i in found if "warp_group_dot_wait" not in "".join(lines[i + 1 : i + 2])
    ]


class _Nothing:
    """A kernel that does not run."""

    def __getitem__(self, grid):
        return lambda *arguments, **launch: None


class _Compiler:
    """Stands where a kernel stands, and compiles where it would launch."""

    def __init__(self, kernel: triton.JITFunction, binaries: list):
        self.kernel, self.binaries = kernel, binaries

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def compile(*args, **kwargs):
            self.binaries.append(self.kernel.warmup(*args, grid=grid, **kwargs))
            return self.binaries[-1]

        return compile


@contextlib.contextmanager
def _target(capability: int):
    class Driver:
        # Triton keeps kernels by device: a capability's number stands for its device
        def get_current_device(self):
            return capability

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

    with patch.object(driver, "_active", Driver()):
        yield


def _sass(binary, option: str) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _instructions(text: str) -> list[tuple[int, str]]:
    return [(int(a, 16), i) for a, i in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)]


def work(text: str, tiles: int, threads: int, every_chunk: bool = True) -> dict[str, int]:
    """What a program does in a chunk, or, where it has no loop over chunks, in its call, counted in its assembler's text.

    What stands in a loop inside the one over chunks counts once for each tile, everything else once: of a branch both
    sides, of a predicated instruction what it would do.

    Args:
        text (`str`): what `cuobjdump -sass` prints.
        tiles (`int`): how often a loop over tiles goes round.
        threads (`int`): of a program.
        every_chunk (`bool`, *optional*, defaults to `True`): whether there is a loop over chunks. It is the longest.

    Returns:
        Of one thread: `instructions`, and those of the `special_functions` units; of the program: `global_bytes` and
        `local_bytes`, the latter those of its threads' stacks, loads and stores together.
    """
    instructions = _instructions(text)
    loops = _loops(instructions)
    first, last = 0, instructions[-1][0]
    if every_chunk and loops:
        first, last = max(loops, key=lambda loop: loop[1] - loop[0])
        loops.remove((first, last))
    done = dict.fromkeys(("instructions", "special_functions", "global_bytes", "local_bytes"), 0)
    for address, instruction in instructions:
        if not first <= address <= last or re.search(r"\bNOP\b", instruction):
            continue
        times = tiles if any(begin <= address <= end for begin, end in loops) else 1
        done["instructions"] += times
        done["special_functions"] += times * bool(re.search(r"\bMUFU\b", instruction))
        for space, names in (("global_bytes", r"LDG|STG|LDGSTS"), ("local_bytes", r"LDL|STL")):
            if access := re.search(rf"\b(?:{names})\b([.\w]*)", instruction):
                done[space] += times * threads * _width(access[1])
    return done


def _width(options: str) -> int:
    # bytes a thread, as in LDG.E.128 or STG.E.U16
    bits = re.search(r"\.[US]?(8|16|64|128)\b", options)
    return int(bits[1]) // 8 if bits else 4


def _counts(binary) -> dict[str, int]:
    usage, text = _sass(binary, "-res-usage"), _sass(binary, "-sass")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions = _instructions(text)
    accesses = [(address, re.search(r"\b(?:LDL|STL)\b([.\w]*)", i)) for address, i in instructions]
    spills = [(address, _width(access[1])) for address, access in accesses if access]
    loops = _loops(instructions)
    depths = [sum(first <= address <= last for first, last in loops) for address, _ in spills]
    count = {name: len(re.findall(rf"\b{name}\b", text)) for name in ("LDL", "STL", "HGMMA", "HMMA", "UTCHMMA")}
    return {
        "registers": registers,
        "stack": stack,
        "spilled_loads": count["LDL"],
        "spilled_stores": count["STL"],
        "spilled_bytes_per_chunk": sum(size for (_, size), depth in zip(spills, depths) if depth == 1),
        "spilled_bytes_per_tile": sum(size for (_, size), depth in zip(spills, depths) if depth > 1),
        "shared": binary.metadata.shared,
        "wgmma": count["HGMMA"],
        "tcgen05": count["UTCHMMA"],
        "mma": count["HMMA"],
    }


def _loops(instructions: list[tuple[int, str]]) -> list[tuple[int, int]]:
    # from a backward branch's target to the branch. One that follows another is the way back from a barrier's waiting
    # loop, which lies behind the program's end
    loops, last = [], None
    for address, instruction in instructions:
        target = re.search(r"\bBRA\b[^;]*?0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) < address:
            if last is None or address - last > 16:
                loops.append((int(target[1], 16), address))
            last = address
    return loops
