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
"""Fills a cache of Triton's with what a GPU will launch, on a machine without one, so that the GPU's first hour is not
spent on compiling.

    make triton36                                                                   # a GPU's Triton, without a GPU
    .venv-triton36/bin/python kernels/precompile.py --arch sm_90 --out build/cache  # here; goes on where it stopped
    .venv-triton36/bin/python kernels/precompile.py --out build/cache --pack build/cache.tar.xz   # where little may be carried
    python3 kernels/precompile.py --adopt build/cache                               # there, once, wherever it lies
    python3 kernels/precompile.py --adopt build/cache.tar.xz                        # or so: makes build/cache of it before
    TRITON_CACHE_DIR=$PWD/build/cache python3 ...                                   # there: launches find their binaries

What is compiled is `PROGRAMS`, those of the main shape first. The public functions are called for real up to their
launches, and Triton's own way from a launch to a binary is taken: signature, constants, divisibility and options are those
of a launch on the GPU with tensors of these dtypes, whose allocations are aligned to 16 bytes there as here.

A binary's place in a cache is the hash of five parts: Triton's own files (`triton_key()`), the kernel (its source, what it
calls, the first line's number; signature, constants, divisibility), the assembler's version and the capability, the
options, and variables of the environment that change what is compiled. Under one version of Triton all but the first are
the same whatever Python, operating system and path; the first has libtriton.so in it, which is another file for every
version of Python. And a cache holds absolute paths. `--adopt` therefore puts each binary where the Triton that runs it
looks for it, and the paths with it. It asks for the same version of Triton. What still makes Triton compile again, after
the cache was adopted: kernels changed since, another launch configuration, another assembler (`TRITON_PTXAS_PATH`).
"""

import argparse
import base64
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from ahead_of_time import CAPABILITIES, Call, compiling, run
from launches import MOST, changed, launching
from packed_cache import pack, unpack
from triton import knobs
from triton.compiler import compiler
from triton.runtime.cache import triton_key

from miras_kernels.choices import CHUNK_SIZES, HEAD_DIMS, Choices
from miras_kernels.configuration import launch_configuration
from miras_kernels.ops import chunks_between_starts


# what models are by default, the matrix memory of the GPU script, Yaad with the loss that its paper prints, an MLP memory whose
# last weight alone is written, and the delta rule
FAMILIES = {
    "yaad": Choices(attentional_bias="huber_norm", retention="decay"),
    "moneta": Choices(attentional_bias="lp", retention="lq"),
    "memora": Choices(attentional_bias="l2", retention="kl"),
    "matrix": Choices(memory="matrix", attentional_bias="l2", retention="decay"),
    "mixture": Choices(attentional_bias="huber_mixture", retention="decay"),
    "last": Choices(attentional_bias="l2", retention="decay", update_layers="last"),
    "delta": Choices(memory="matrix", learning_algorithm="delta_rule"),
}
MODELS = ("yaad", "moneta", "memora")
TIMED_FAMILIES = (*MODELS, "matrix")
# both kernels of training, the forward pass of a prompt, of a prompt that goes on, and without a state, and decoding of a
# token and of several
KINDS = {
    "training": ("backward", {}),
    "prompt": ("forward", {"keeps": True}),
    "decode": ("decode", {}),
    "continued": ("forward", {"continues": True, "keeps": True}),
    "forward": ("forward", {}),
    "several": ("decode", {"several": True}),
}
# kinds of calls that the GPU script checks at every shape, and times with other launches
CHECKED = ("training", "prompt", "decode", "several")
TIMED = ("training", "prompt", "decode")
HEAD_GATES, PADDED = {"channel_gates": False}, {"padded": True}
CONTINUES, NARROW = {"continues": True}, {"narrow": True}
# what it asks of calls beside, at the main shape: packs launch what rows do
ASKED = (
    ("yaad", CHECKED, HEAD_GATES | PADDED | CONTINUES),
    ("memora", ("training", "prompt"), CONTINUES),
    ("moneta", CHECKED, HEAD_GATES | PADDED),
    ("matrix", ("training", "prompt"), HEAD_GATES | CONTINUES),
    ("delta", CHECKED, HEAD_GATES | PADDED | CONTINUES),
    ("memora", ("prompt",), NARROW),
    ("memora", ("decode", "several"), NARROW | {"rotary": False}),
)
MAIN, WIDE = (64, 64, "bf16"), (128, 64, "bf16")
INDEX = "precompiled.json"


def _programs() -> Iterator[tuple[str, Call]]:
    def program(family, kind, shape=MAIN, memory=None, **asked) -> tuple[str, Call]:
        choices = FAMILIES[family]
        memory = memory or choices.family
        part, options = KINDS[kind]
        call = Call(choices, **options | asked).at(f"{memory}_{part}", *shape)
        head_dim, chunk_size, precision = shape
        words = [] if (chunk_size, precision) == MAIN[1:] else [f"C {chunk_size}, {precision}"]
        words += [word for word in ("padded", "continues", "narrow") if word in asked]
        words += ["no rotary"] * (not call.rotary) + ["head gates"] * (not call.channel_gates)
        words += [f"variant {call.variant}"] * (call.variant > 0)
        return ", ".join([f"{memory} {family} {head_dim} {kind}", *words]), call

    def models(head_dim) -> Iterator[tuple[str, Call]]:
        for family, kind in product(MODELS, KINDS):
            # models do not turn queries and keys by default
            asked = ({} if kind == "training" else NARROW) | ({"rotary": False} if KINDS[kind][0] == "decode" else {})
            yield program(family, kind, (head_dim, 64, "bf16"), **asked)
        for family in MODELS:  # under autocast, where convolutions in float32 stand before the memory
            yield program(family, "training", (head_dim, 64, "tf32x3"))

    for family, kind in product(FAMILIES, KINDS):
        yield program(family, kind)
    for family, kinds, asked in ASKED:
        yield from (program(family, kind, **asked) for kind in kinds)
    for kind, variant in product(TIMED, range(1, MOST)):
        yield program("yaad", kind, variant=variant)
    for family, kind in product(FAMILIES, KINDS):
        yield program(family, kind, WIDE)
    for head_dim, chunk_size, kind in product(HEAD_DIMS, CHUNK_SIZES, CHECKED):
        yield program("yaad", kind, (head_dim, chunk_size, "bf16"))
    for head_dim, precision, family, kind in product((64, 128), ("tf32x3", "ieee", "tf32"), TIMED_FAMILIES, CHECKED):
        yield program(family, kind, (head_dim, 64, precision))
    for head_dim in (48, 64):  # of the presets 170m and 340m
        yield from models(head_dim)
    for head_dim in (96, 128):
        yield from models(head_dim)
    # they may have a matrix memory, too
    for shape, family, kind in product((MAIN, WIDE), MODELS, KINDS):
        yield program(family, kind, shape, memory="matrix")


# what a GPU will launch, in the order of the GPU script's steps, and then other models
PROGRAMS: dict[str, Call] = {}
for _name, _call in _programs():
    PROGRAMS.setdefault(_name, _call)


def launch(call: Call, name: str) -> list:
    """Compiles what a call launches on devices of the configuration file `name`.

    Returns:
        The binaries of its launches; none where no launch fits into the devices' shared memory.
    """
    choices, kernels = call.choices, [call.kernel]
    if call.kernel.endswith("_backward"):
        kernels.append(f"{choices.family}_forward")
    shape = {"head_dim": call.head_dim, "chunk_size": choices.chunk_size, "precision": call.precision}
    try:
        configured, *_ = [launch_configuration(kernel, device=name, **shape) for kernel in kernels]
    except ValueError:
        return []
    variants = changed(configured) if call.variant else [configured]
    if call.variant >= len(variants):
        return []
    # a backward pass may go over groups of chunks, of which only the first can begin in the middle of one
    group = chunks_between_starts(choices, call.head_dim, 2 if call.precision == "bf16" else 4)
    # a forward pass by itself is one without gradients
    gradients = nullcontext() if call.kernel.endswith("_backward") else torch.no_grad()
    with compiling(name) as binaries, gradients, launching(call.kernel, variants[call.variant]):
        run(call, tokens=(group + 1) * choices.chunk_size)()
    return binaries


def precompile(name: str, programs: dict[str, Call], out: Path, seconds: float = float("inf")) -> list[str]:
    """Fills the cache `out` for devices of the configuration file `name`.

    Args:
        name (`str`): of `CAPABILITIES`.
        programs (`dict` of `Call`): what is called.
        out (`Path`): of the cache; programs that it holds are not compiled again.
        seconds (`float`, *optional*): no further program is begun after that.

    Returns:
        Names of the programs for which time was too short.
    """
    out.mkdir(parents=True, exist_ok=True)
    index = _index(out) if (out / INDEX).is_file() else {"triton": triton.__version__, "name": name, "binaries": {}}
    if (index["triton"], index["name"]) != (triton.__version__, name):
        raise ValueError(
            f"`out` must be a new folder, or hold binaries of Triton {triton.__version__} for {name}; {out} holds those of "
            f"Triton {index['triton']} for {index['name']}."
        )
    keys: dict[str, str] = {}
    usual = compiler.get_cache_key

    def get_cache_key(*arguments, **options):
        key = usual(*arguments, **options)
        keys[hashlib.sha256(key.encode("utf-8")).hexdigest()] = key
        return key

    end, left = time.monotonic() + seconds, []
    with (
        patch.object(compiler, "get_cache_key", get_cache_key),
        knobs.cache.scope(),
        knobs.compilation.scope(),
    ):
        knobs.cache.dir, knobs.compilation.store_binary_only = str(out.resolve()), True
        for what, call in programs.items():
            if time.monotonic() > end:
                left.append(what)
                continue
            started = time.monotonic()
            binaries = launch(call, name)
            for binary in binaries:
                key = keys[binary.hash]
                held = index["binaries"].setdefault(_folder(key), {"rest": key.removeprefix(triton_key())})
                held |= {"kernel": binary.name, "programs": sorted({*held.get("programs", ()), what})}
            (out / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
            print(f"{what}: {len(binaries)} binaries, {time.monotonic() - started:.1f} s", flush=True)
    for folder in index["binaries"]:
        for path in (out / folder).glob("*.source"):
            path.unlink()
    return left


def adopt(cache: Path) -> int:
    """Makes a cache that `precompile` filled, and that was moved since, one of the Triton that calls this.

    Returns:
        How many binaries it holds.

    Raises:
        `ValueError`: if the cache is another version's, or no such cache.
    """
    index = _index(cache)
    if index["triton"] != triton.__version__:
        raise ValueError(f"`cache` must be of Triton {triton.__version__}, {cache} is of Triton {index['triton']}.")
    adopted = {}
    for folder, held in index["binaries"].items():
        here = _folder(triton_key() + held["rest"])
        target = cache.resolve() / here
        if here != folder:
            (cache / folder).rename(target)
        group = target / f"__grp__{held['kernel']}.json"
        files = [path for path in target.iterdir() if path.suffix in (".json", ".cubin") and path != group]
        group.write_text(json.dumps({"child_paths": {path.name: str(path) for path in files}}), encoding="utf-8")
        adopted[here] = held
        # written every time: who is interrupted begins where he stopped
        left = {k: v for k, v in index["binaries"].items() if k not in (folder, here) and (cache / k).is_dir()}
        text = json.dumps(index | {"binaries": adopted | left}, indent=1) + "\n"
        (cache / INDEX).write_text(text, encoding="utf-8")
    return len(adopted)


def _folder(key: str) -> str:
    # as Triton names it
    digest = hashlib.sha256(key.encode("utf-8")).digest()
    return base64.b32encode(digest).decode("utf-8").rstrip("=")


def _index(cache: Path) -> dict:
    path = cache / INDEX
    if not path.is_file():
        raise ValueError(f"`cache` must hold {INDEX}, which `precompile.py --out` writes; {cache} does not.")
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=CAPABILITIES, default="sm_90")
    parser.add_argument("--out", type=Path, help="the cache to fill")
    parser.add_argument("--only", default="", help="programs whose name has this in it, as 'mlp yaad 64'")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further program after that")
    parser.add_argument(
        "--pack", type=Path, metavar="FILE", help="write the cache --out to one file; nothing is compiled"
    )
    parser.add_argument(
        "--adopt",
        type=Path,
        metavar="CACHE",
        help="the cache to adopt, or a packed one, which is unpacked to --out, by default beside it",
    )
    arguments = parser.parse_args()
    cache, packed = arguments.out, arguments.adopt is not None and arguments.adopt.is_file()
    if arguments.adopt is None and cache is None:
        parser.error("one of --out and --adopt is needed.")
    if arguments.adopt is not None and (arguments.pack is not None or (cache is not None and not packed)):
        parser.error("--adopt goes with neither --pack nor, for a cache that is not packed, --out.")
    try:
        if arguments.pack is not None:
            kernels = {folder: held["kernel"] for folder, held in _index(cache)["binaries"].items()}
            size = pack(cache, cache / INDEX, kernels, arguments.pack)
            print(f"{len(kernels)} binaries of {cache} are in {arguments.pack}, {size / 2**20:.1f} MiB.")
            return 0
        if arguments.adopt is not None:
            here = arguments.adopt
            if packed:
                here = cache or here.with_name(here.name.removesuffix(".xz").removesuffix(".tar"))
                unpack(arguments.adopt, here)
            print(f"{adopt(here)} binaries of {here} are this Triton's, {triton.__version__}.")
            return 0
        programs = {what: call for what, call in PROGRAMS.items() if arguments.only in what}
        if not programs:
            parser.error(f"--only must be part of a program's name, one of {', '.join(PROGRAMS)}.")
        left = precompile(arguments.arch, programs, arguments.out, 60 * arguments.minutes)
    except ValueError as error:
        parser.error(str(error))
    for what in left:
        print("out of time:", what, file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
