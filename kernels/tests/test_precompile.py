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
"""A launch finds what was compiled ahead for it, although the cache was moved and another build of Triton looks for it."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]

COMMON = """
import sys
from pathlib import Path
import torch, triton
import precompile
from ahead_of_time import Call, run
from miras_kernels.choices import Choices

cache = Path(sys.argv[1])
choices = Choices(memory="matrix", attentional_bias="huber_mixture", retention="decay", chunk_size=16)
call = Call(choices, "matrix_forward", head_dim=32, channel_gates=False)
"""
COMPILES = (
    COMMON
    + """
from triton.compiler import compiler
from triton.runtime import cache as of_triton
# another build of the same version, as another Python's is
other = of_triton.triton_key() + "-of-another-build"
of_triton.triton_key = precompile.triton_key = lambda: other
assert precompile.precompile("sm_90", {"small": call}, cache) == []
assert precompile.precompile("sm_90", {"late": call}, cache, -1.0) == ["late"]
"""
)
# a driver that hands binaries out to nobody, under a launch that is otherwise Triton's own; nothing may be compiled
ADOPTS = (
    COMMON
    + """
import contextlib, io, json
from unittest.mock import patch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from miras_kernels import configuration, ops

loaded, launched = [], []

class Utilities:
    def load_binary(self, name, binary, shared, device):
        loaded.append(binary)
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

class Driver:
    utils = Utilities()

    def launcher_cls(self, source, metadata):
        return lambda *arguments: launched.append((metadata.name, metadata.num_warps, arguments[:3]))

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

def refuse(*_, **__):
    raise AssertionError("Triton compiles again")

def launch_configuration(kernel, *, device, **shape):
    return configuration.launch_configuration(kernel, device="sm_90", **shape)

def launch():
    with (
        patch.object(driver, "_active", Driver()),
        patch.object(CUDABackend, "add_stages", refuse),
        patch.object(ops, "launch_configuration", launch_configuration),
        patch.object(ops, "refusal", lambda *_: None),
        torch.no_grad(),
    ):
        # other sizes than those it was compiled with, of which none is a constant
        for heads, batch, tokens in ((1, 1, 16), (4, 3, 96), (16, 1, 4096)):
            run(call, heads, batch, tokens)()

# not before: it lies under another build's key, and names paths that are gone
try:
    launch()
except AssertionError as error:
    print(error)
with patch.object(sys, "argv", ["precompile.py", "--adopt", str(cache)]):
    assert precompile.main() == 0
held = (cache / precompile.INDEX).read_text()
# adopting what is adopted changes nothing
assert precompile.adopt(cache) == 1 and (cache / precompile.INDEX).read_text() == held
launch()
cubin, = cache.glob("*/*.cubin")
assert loaded == [cubin.read_bytes()]
print(launched)
"""
)


def python(*arguments, cache=None):
    # in a process of its own: this one may be the interpreter's, which compiles nothing
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "kernels" / "torch-ext")])
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    cache = tmp_path_factory.mktemp("here") / "cache"
    done = python("-c", COMPILES, str(cache))
    assert done.returncode == 0, done.stderr
    there = tmp_path_factory.mktemp("there") / "moved"
    cache.rename(there)
    return there


def test_a_launch_finds_its_binary_when_its_cache_is_adopted(filled):
    done = python("-c", ADOPTS, str(filled), cache=filled)
    assert done.returncode == 0, done.stderr
    refused, adopted, launched = done.stdout.splitlines()
    assert refused == "Triton compiles again" and adopted.startswith("1 binaries of ")
    assert launched == str([("matrix_forward_kernel", 8, (programs, 1, 1)) for programs in (1, 12, 16)])


def test_no_size_of_a_call_makes_another_binary():
    # of every kind of call: rows, heads and tokens, of which 1 and multiples of 16 are constants to Triton where it is
    # let. What a launch would compile is looked at, nothing is compiled
    program = """
import json
from unittest.mock import patch
from triton.runtime import JITFunction
from ahead_of_time import compiling

found = {}

def look(kernel, key, signature, device, constexprs, options, attrs, warmup):
    found.setdefault(what, set()).add(str((kernel.__name__, signature, constexprs, sorted(attrs.items()), options)))

with patch.object(JITFunction, "_do_compile", look):
    for name, call in precompile.PROGRAMS.items():
        if name.split()[1:3] not in (["yaad", "64"],) or "," in name:
            continue
        for heads, rows, tokens in ((1, 1, 64), (3, 2, 192), (16, 1, 256)):
            what = name
            torch.set_grad_enabled(call.kernel.endswith("_backward"))
            with compiling("sm_90"):
                run(call, heads, rows, tokens)()
print(json.dumps({name: len(seen) for name, seen in found.items()}))
"""
    done = python("-c", COMMON + program, "unused")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    # a forward and a backward kernel for training, one for every other kind
    assert seen == {name: 2 if "training" in name else 1 for name in seen} and len(seen) == 12


def test_a_cache_of_another_version_is_refused(tmp_path):
    import precompile

    (tmp_path / "precompiled.json").write_text(json.dumps({"triton": "0.0", "name": "sm_90", "binaries": {}}))
    with pytest.raises(ValueError, match="is of Triton 0.0"):
        precompile.adopt(tmp_path)
    with pytest.raises(ValueError, match="holds those of Triton 0.0 for sm_90"):
        precompile.precompile("sm_90", {}, tmp_path)
    with pytest.raises(ValueError, match="must hold precompiled.json"):
        precompile.adopt(tmp_path / "nothing")


def small_cache(folder, version):
    """One that nobody compiled: two binaries of one kernel, of which what stays here is less than is in it."""
    rests = {"one": "a", "other": "b"}
    index = {"triton": version, "name": "sm_90", "binaries": {}}
    for name, rest in rests.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "kernel.cubin").write_bytes(name.encode() * 1000)
        (folder / name / "kernel.json").write_text("{}")
        (folder / name / "__grp__kernel.json").write_text("a path of this machine")
        index["binaries"][name] = {"rest": rest, "kernel": "kernel", "programs": [name]}
    (folder / "of_no_program").mkdir()
    (folder / "of_no_program" / "kernel.cubin").write_bytes(b"x")
    (folder / "precompiled.json").write_text(json.dumps(index))
    return folder


def test_a_packed_cache_is_adopted_where_it_is_unpacked(tmp_path, monkeypatch, capsys):
    import precompile
    import triton

    cache, file = small_cache(tmp_path / "here" / "cache", triton.__version__), tmp_path / "there" / "cache.tar.xz"
    file.parent.mkdir()
    monkeypatch.setattr(precompile, "triton_key", lambda: "there")

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["precompile.py", *map(str, words)])
        return precompile.main()

    assert command("--out", cache, "--pack", file) == 0
    assert command("--adopt", file) == 0 and command("--adopt", file, "--out", tmp_path / "third") == 0
    assert capsys.readouterr().out.count("2 binaries of ") == 3
    for unpacked in (file.parent / "cache", tmp_path / "third"):
        index = json.loads((unpacked / "precompiled.json").read_text())
        found = {}
        for folder, held in index["binaries"].items():
            # Triton's name for a folder, made as it makes it
            digest = hashlib.sha256(("there" + held["rest"]).encode()).digest()
            assert folder == base64.b32encode(digest).decode().rstrip("=")
            group = json.loads((unpacked / folder / "__grp__kernel.json").read_text())["child_paths"]
            assert group == {name: str(unpacked / folder / name) for name in ("kernel.cubin", "kernel.json")}
            found[held["programs"][0]] = (unpacked / folder / "kernel.cubin").read_bytes()
        assert found == {name: name.encode() * 1000 for name in ("one", "other")}
        assert len(list(unpacked.iterdir())) == 3
    # what is there already is not written over, and what is no such file is named
    with pytest.raises(SystemExit):
        command("--adopt", file)
    assert "must be a new folder" in capsys.readouterr().err
    (tmp_path / "no.tar.xz").write_bytes(file.read_bytes()[:200])
    with pytest.raises(SystemExit):
        command("--adopt", tmp_path / "no.tar.xz")
    assert "must be what `precompile.py --pack` wrote" in capsys.readouterr().err


def test_a_packed_cache_writes_nothing_outside_of_its_folder(tmp_path):
    import packed_cache

    with tarfile.open(tmp_path / "evil.tar.xz", "w:xz") as archive:
        found = tarfile.TarInfo("../outside")
        archive.addfile(found)
    with pytest.raises(ValueError, match="evil.tar.xz is not"):
        packed_cache.unpack(tmp_path / "evil.tar.xz", tmp_path / "cache")
    assert not (tmp_path / "outside").exists() and not (tmp_path / "cache").exists()


def test_what_is_compiled_ahead_is_what_the_gpu_script_launches(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "src", ROOT / "kernels" / "torch-ext")))
    command = [sys.executable, str(Path(__file__).with_name("launched.py")), str(tmp_path / "steps.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "No module named 'transformers'" in done.stderr:
        pytest.skip("an environment for compiling only")
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "steps.json").read_text())
    assert len(steps) == 12
    for name, step in steps.items():
        assert step["rows"] and step["programs"] and not step["raised"] and not step["missing"], (name, step)
        # every row has launched a program, but those of attention; whole models' rows are named after they launched
        whole = name in ("training", "prefill", "decode")
        assert whole or all("SDPA" in what for what in step["without"]), (name, step["without"])
    # not all the same: what is asked of calls makes programs of their own
    assert {
        "mlp yaad 64 several, padded, continues, head gates",
        "matrix matrix 64 training, continues, head gates",
        "mlp memora 64 decode, narrow, no rotary",
    } <= set(steps["correctness"]["listed"])
    assert {"mlp memora 128 training", "mlp moneta 128 several, C 64, tf32x3"} <= set(
        steps["more_correctness"]["listed"]
    )
    assert "mlp yaad 64 training, variant 3" in steps["variants"]["listed"]
    assert {"mlp yaad 48 continued, narrow", "mlp moneta 64 prompt, narrow"} <= set(steps["prefill"]["listed"])
    assert any(name.startswith("mlp yaad 48 training") for name in steps["training"]["listed"])
    assert set(steps["warm_up"]["listed"]) >= {*steps["correctness"]["listed"], *steps["more_correctness"]["listed"]}
