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
"""The kernels' home: a package on its own that the `kernels` library accepts and loads from a local path."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
from kernels.validate import AllValidator, ArchValidator, default_metadata_validators
from test_decode import after_prompt, cut
from test_forward import make_call, make_rule

import miras_kernels
from kernels import get_kernel, get_local_kernel


KERNELS = Path(__file__).resolve().parent.parent
PACKAGE = KERNELS / "torch-ext" / "miras_kernels"


@pytest.fixture
def offline(monkeypatch):
    # the library's own way to replace a repository by a folder; it remembers what it has parsed
    from kernels.load import _parse_local_kernel_overrides

    _parse_local_kernel_overrides.cache_clear()
    yield monkeypatch
    _parse_local_kernel_overrides.cache_clear()


def test_build_file():
    build = Build.open(KERNELS)
    assert {str(backend).lower() for backend in build.general.backends} == {"cuda", "cpu"}


def test_build_file_of_an_unknown_field_is_refused(tmp_path):
    text = (KERNELS / "build.toml").read_text(encoding="utf-8")
    (tmp_path / "build.toml").write_text(text + "\n[torch-nonsense]\n", encoding="utf-8")
    with pytest.raises(ValueError, match="torch-nonsense"):
        Build.open(tmp_path)


def test_metadata():
    metadata = Metadata.read_from_file(PACKAGE / "metadata.json")
    assert metadata.name.python_name == PACKAGE.name
    assert (metadata.version, metadata.license, metadata.python_depends) == (0, "Apache-2.0", [])
    validator = AllValidator([*default_metadata_validators(), ArchValidator()])
    validator.validate_metadata(metadata=metadata, variant="torch-cpu")


def check(module):
    """A loaded kernel computes what the package of `import miras_kernels` does, from files of its own."""
    assert module.__name__ != miras_kernels.__name__
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5, 1, 32, generator=generator).to(device) for _ in "qkv")
    eta, log_alpha = torch.full((1, 5, 1), 0.1, device=device), torch.full((1, 5, 1), -0.1, device=device)
    initial = (torch.randn(1, 32, 32, generator=generator).to(device),)
    outputs = []
    for kernels in (module, miras_kernels):
        choices = kernels.Choices(memory="matrix", chunk_size=16)
        y, _, _ = kernels.forward(q, k, v, eta, log_alpha, None, choices=choices, initial=initial)
        outputs.append(y)
    assert torch.equal(*outputs) and not torch.equal(outputs[0], (q @ initial[0]))
    assert "meta" in module.refusal(torch.device("meta"), torch.float32, 32, choices)


def test_loads_from_its_source_folder():
    check(get_local_kernel(PACKAGE, backend="cpu"))


def test_loads_under_a_repository_name(offline):
    offline.setenv("LOCAL_KERNELS", f"someone/miras-kernels={PACKAGE}")
    check(get_kernel("someone/miras-kernels", version=0, backend="cpu"))


def test_copies_in_one_process_launch_their_own_kernels(tmp_path, monkeypatch):
    folder = shutil.copytree(PACKAGE, tmp_path / "miras_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    (folder / "metadata.json").write_text(json.dumps(metadata | {"id": "_miras-kernels_another"}), encoding="utf-8")
    copies = [miras_kernels, get_local_kernel(folder, backend="cpu")]
    rule = make_rule("matrix")
    inputs, parameters = make_call(rule, tokens=3)
    state, link_cache = after_prompt(rule, inputs, parameters, 2)
    launched = []

    class Watched:
        def __init__(self, *names):
            self.names = names

        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(self.names)

    for copy in copies:
        for part, file in {
            "forward": "forward_pass",
            "backward": "backward_matrix",
            "decode": "decode_matrix",
        }.items():
            module = importlib.import_module(f".{file}", copy.__name__)
            monkeypatch.setattr(module, f"matrix_{part}_kernel", Watched(copy.__name__, part))
    for copy in copies:
        launched.clear()
        call = {"choices": copy.Choices(memory="matrix", chunk_size=16), "initial": parameters.initial}
        y, _, _ = copy.forward(*(x if x is None else x.clone().requires_grad_() for x in inputs), **call)
        y.sum().backward()
        copy.decode(*cut(inputs, 2, None), **call, state=state, link_cache=link_cache)
        assert launched == [(copy.__name__, part) for part in ("forward", "backward", "decode")]


def test_loads_as_it_is_built(tmp_path, offline):
    # what kernel-builder makes of a package without compiled parts: a copy for each backend with its digest
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    digest = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
    metadata["id"] = "_miras_kernels_built"
    (variant / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    assert {"__init__.py", "configurations/default.json"} <= digest.files.keys()
    module = get_local_kernel(tmp_path, backend="cpu")
    check(module)
    assert Path(module.__file__).parent == variant


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_are_its_own_or_torch_triton_and_the_standard_library(path):
    for level, module in imports(path):
        top = module.partition(".")[0]
        allowed = level == 1 or (level == 0 and top in sys.stdlib_module_names | {"torch", "triton"})
        assert allowed, f"{path.name} imports {'.' * level}{module}"


def test_import_needs_no_triton_and_no_driver():
    # a machine on which neither can be had: importing Triton fails, asking CUDA anything fails
    code = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = None\n"
        "import miras_kernels\n"
        "print(miras_kernels.refusal(torch.device('cpu'), torch.float32, 64, miras_kernels.Choices()))\n"
        "assert set(miras_kernels.__all__) <= set(dir(miras_kernels))\n"
        "assert not [name for name in sys.modules if name.startswith('triton.')]\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(PACKAGE.parent)
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed" in done.stdout
