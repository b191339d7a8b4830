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
"""Launch configurations: what is shipped, which one a shape and a device get, and what is said when there is none."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from miras_kernels import configuration
from miras_kernels.choices import CHUNK_SIZES, HEAD_DIMS
from miras_kernels.configuration import KERNELS, PRECISIONS, device_names, launch_configuration
from miras_kernels.ops import PRECISIONS as PRECISIONS_OF_THE_OPERATOR


ROOT = Path(__file__).resolve().parents[2]
FORWARD = [kernel for kernel in KERNELS if kernel.endswith("_forward")]


def launch(name, kernel="mlp_forward", head_dim=64, chunk_size=64, precision="bf16"):
    return launch_configuration(kernel, device=name, head_dim=head_dim, chunk_size=chunk_size, precision=precision)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A function that puts a configuration file into an otherwise empty folder."""
    monkeypatch.setattr(configuration, "DIRECTORY", tmp_path)
    caches = (configuration.entries, configuration.device_names, configuration._found)

    def put(name, *entries, kernel="mlp_forward"):
        for cache in caches:
            cache.cache_clear()
        names = ("head_dim", "chunk_size", "precision", "launch")
        found = [dict(zip(names, entry)) for entry in entries]
        (tmp_path / f"{name}.json").write_text(json.dumps({"kernels": {kernel: found}}), encoding="utf-8")

    yield put
    for cache in caches:
        cache.cache_clear()


def tile(number):
    return {"TN": number, "num_warps": 8, "num_stages": 1}


@pytest.mark.parametrize("name", ("default", "sm_80", "sm_90", "sm_100"))
def test_every_shape_that_forward_kernels_take_has_a_launch(name):
    assert name in configuration.shipped()
    for kernel, head_dim, chunk_size in itertools.product(FORWARD, HEAD_DIMS, CHUNK_SIZES):
        found = launch(name, kernel, head_dim, chunk_size, "bf16")
        assert found["num_warps"] in (1, 2, 4, 8, 16) and found["num_stages"] >= 1
        assert ("TN" in found) == kernel.startswith("mlp")
        # Triton is about to change its default: what ships says which
        assert found["enable_fp_fusion"] is True
    # other operands may not fit at the largest shape, but do where memories are small
    for kernel, precision in itertools.product(FORWARD, PRECISIONS):
        if kernel.startswith("delta") and precision != "bf16":  # not compiled for any device yet
            with pytest.raises(
                ValueError, match=f"No configuration of `{kernel}` at precision '{precision}' in '{name}'"
            ):
                launch(name, kernel, 64, 16, precision)
        else:
            assert launch(name, kernel, 64, 16, precision)


@pytest.mark.parametrize("name", ("default", "sm_80", "sm_90", "sm_100"))
def test_the_delta_rule_trains_wide_heads_where_a_program_for_them_was_made(name):
    for chunk_size, kernel in itertools.product(CHUNK_SIZES, ("delta_forward", "delta_backward", "delta_decode")):
        for head_dim in HEAD_DIMS:
            if kernel == "delta_backward" and head_dim > 64 and name in ("default", "sm_100"):
                with pytest.raises(ValueError, match=f"No launch of `delta_backward` .* at head_dim {head_dim}"):
                    launch(name, kernel, head_dim, chunk_size, "bf16")
            else:
                assert launch(name, kernel, head_dim, chunk_size, "bf16")


@pytest.mark.parametrize("name", ("default", "sm_80", "sm_90", "sm_100"))
def test_every_shape_trains_in_every_precision(name):
    for memory, head_dim, chunk_size, precision in itertools.product(
        ("mlp", "matrix"), HEAD_DIMS, CHUNK_SIZES, PRECISIONS
    ):
        assert launch(name, f"{memory}_backward", head_dim, chunk_size, precision)["TN"] % 16 == 0


def test_the_operator_knows_the_same_precisions():
    assert set(PRECISIONS) == set(PRECISIONS_OF_THE_OPERATOR)


@pytest.mark.parametrize("name", configuration.shipped())
def test_every_launch_has_tiles_of_a_number_for_each_thread(name):
    # what the kernels assert, of every launch that a device may get
    for kernel, head_dim, chunk_size, precision in itertools.product(KERNELS, HEAD_DIMS, CHUNK_SIZES, PRECISIONS):
        try:
            found = launch(name, kernel, head_dim, chunk_size, precision)
        except ValueError:
            continue  # nothing fits
        if "TN" in found:
            assert min(chunk_size, head_dim) * found["TN"] >= 32 * found["num_warps"], (kernel, head_dim, chunk_size)


def test_a_call_does_not_change_what_the_next_one_gets():
    launch("default")["num_warps"] = 99
    assert launch("default")["num_warps"] != 99


def test_nearest_in_log_space(files):
    files("a", (32, 16, "bf16", tile(16)), (128, 64, "bf16", tile(64)), (64, 16, "tf32", tile(32)))
    assert launch("a", head_dim=32, chunk_size=16)["TN"] == 16
    assert launch("a", head_dim=48, chunk_size=16)["TN"] == 16
    assert launch("a", head_dim=96, chunk_size=64)["TN"] == 64
    # as far from both: the larger one's launch needs no more than it has
    assert launch("a", head_dim=64, chunk_size=32)["TN"] == 64
    # operands take registers and shared memory of their own, so precisions are never mixed
    assert launch("a", head_dim=128, precision="tf32")["TN"] == 32
    with pytest.raises(ValueError, match="precision 'ieee'"):
        launch("a", precision="ieee")


def test_what_an_earlier_triton_makes_too_large_is_refused_there(files, monkeypatch):
    files("a", (128, 64, "bf16", tile(16)), (128, 32, "bf16", tile(32)))
    path = configuration.DIRECTORY / "a.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    held["kernels"]["mlp_forward"][0]["since"] = "3.10"
    path.write_text(json.dumps(held), encoding="utf-8")
    monkeypatch.setattr(configuration, "_installed", lambda: "3.10.0")
    assert launch("a", head_dim=128)["TN"] == 16 and launch("a", head_dim=128, chunk_size=32)["TN"] == 32
    configuration.entries.cache_clear(), configuration._found.cache_clear()
    monkeypatch.setattr(configuration, "_installed", lambda: "3.9.1+git")
    with pytest.raises(ValueError, match="chunk_size 64, precision 'bf16'.*or Triton 3.10 or newer"):
        launch("a", head_dim=128)
    assert launch("a", head_dim=128, chunk_size=32)["TN"] == 32
    held["kernels"]["mlp_forward"][0]["since"] = "newest"
    path.write_text(json.dumps(held), encoding="utf-8")
    configuration.entries.cache_clear()
    with pytest.raises(ValueError, match="no kernel understands"):
        configuration.entries("a")


def test_a_device_goes_before_its_capability_and_both_before_the_default(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda", 0)
    files("default", (64, 64, "bf16", tile(16)), (64, 64, "tf32", tile(16)))
    assert device_names(device) == () and launch(device)["TN"] == 16
    files("sm_90", (64, 64, "bf16", tile(32)))
    assert device_names(device) == ("sm_90",) and launch(device)["TN"] == 32
    files("nvidia_h200", (128, 64, "bf16", tile(64)))
    assert device_names(device) == ("nvidia_h200", "sm_90") and launch(device)["TN"] == 64
    # a file without the precision leaves it to the next
    assert launch(device, precision="tf32")["TN"] == 16


def test_a_device_without_a_file_gets_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Someone's GPU (2031)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (31, 7))
    assert launch(torch.device("cuda", 93)) == launch(torch.device("meta")) == launch("default")
    assert configuration.file_name("Someone's GPU (2031)") == "someone_s_gpu_2031"


def test_the_interpreter_runs_every_shape():
    for kernel, precision in itertools.product(KERNELS, PRECISIONS):
        for head_dim, chunk_size in itertools.product(HEAD_DIMS, CHUNK_SIZES):
            assert launch(torch.device("cpu"), kernel, head_dim, chunk_size, precision)


def test_what_does_not_fit_is_said(files):
    files("a", (64, 16, "tf32", tile(32)), (128, 64, "tf32", None))
    assert launch("a", head_dim=64, chunk_size=16, precision="tf32")["TN"] == 32
    # channels are padded to a power of two
    with pytest.raises(ValueError, match=r"serves 'a' at head_dim 96, chunk_size 64, precision 'tf32': shared memory"):
        launch("a", head_dim=96, precision="tf32")
    # what is smaller is not refused for being nearer to what does not fit
    files("a", (64, 16, "tf32", tile(32)), (64, 64, "tf32", None))
    assert launch("a", head_dim=32, chunk_size=64, precision="tf32")["TN"] == 32
    with pytest.raises(ValueError, match="shared memory"):
        launch("a", head_dim=128, chunk_size=64, precision="tf32")
    files("a", (64, 64, "tf32", None))
    with pytest.raises(ValueError, match="shared memory"):
        launch("a", head_dim=32, chunk_size=16, precision="tf32")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kernel": "mlp_fly"}, r"`kernel` must be one of \('mlp_forward', .*'mlp_fly'"),
        ({"precision": "fp8"}, r"`precision` must be one of \('bf16', .*'fp8'"),
        ({"head_dim": 0}, "`head_dim` must be a positive integer, got 0"),
        ({"chunk_size": 16.0}, "`chunk_size` must be a positive integer, got 16.0"),
        ({"name": "sm_1"}, r"`device` must be a torch.device or one of \(.*'sm_90'.*'sm_1'"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        launch(**{"name": "default", **change})


@pytest.mark.parametrize("entry", [(64, 64, "fp8", tile(32)), (64, 64, "bf16", {"TN": 32}), (64, 64)])
def test_a_broken_file_is_named(files, entry):
    files("a", entry)
    with pytest.raises(ValueError, match=r"a\.json holds an entry of 'mlp_forward' that no kernel understands"):
        launch("a")


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune for minutes, and write what it finds")
def test_tuning_without_a_gpu_says_so(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "kernels" / "torch-ext")])
    command = [sys.executable, str(ROOT / "kernels" / "tune.py"), "--out", str(tmp_path / "tuned")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "No GPU here" in done.stderr and "Traceback" not in done.stderr
