# Copyright 2026 The miras-hf authors.
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
"""Transformers' own common model tests, at the version that is installed.

A test file here reads like one of theirs, with `from transformers_suite import ModelTesterMixin` in the place of
`from ...test_modeling_common import ModelTesterMixin`; after that import all of Transformers' `tests` is importable.

The wheel does not contain `tests`, the source distribution does. It is fetched through pip - hence from the index that
the user has configured - unpacked once per version into a cache, and never committed. The source distribution holds
only `tests/test_*.py`: the companions in sub-folders (`generation`, `exporters`, ...) are not in it, and stand-ins from
`transformers_standins.py` take their place. A full checkout of Transformers has them, and then they are used.

Environment variables:
- `MIRAS_TRANSFORMERS_CHECKOUT`: root of a Transformers checkout of the installed version; nothing is fetched.
- `MIRAS_TEST_CACHE`: where to keep the unpacked tests (default: `.cache` in the root of this repository).
- `MIRAS_SKIP_TRANSFORMERS_SUITE=1`: skip the test files that need the suite. Without it a failure to fetch is an error:
  a suite that quietly does not run is worth nothing.
"""

import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from unittest import mock

import pytest
import transformers
from filelock import FileLock
from transformers.models.auto import modeling_auto


# What the source distribution lacks, and the line that fills the gap.
STANDINS = {
    "__init__.py": "",
    "generation/__init__.py": "",
    "generation/test_utils.py": "from transformers_standins import GenerationTesterMixin  # noqa: F401",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "from transformers_standins import ExportTesterMixin  # noqa: F401",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "from transformers_standins import config_common_kwargs  # noqa: F401",
    "distributed_testing_utils.py": "from transformers_standins import *  # noqa: F403",
}


class SuiteUnavailable(RuntimeError):
    """Transformers' tests could not be had. Says why, and what can be done about it."""


def cache_dir() -> Path:
    return Path(os.environ.get("MIRAS_TEST_CACHE") or Path(__file__).resolve().parents[1] / ".cache")


def download_source_distribution(version: str, dest: Path) -> Path:
    """Let pip fetch `transformers-{version}.tar.gz`: the one way that honours every index, proxy and certificate setting."""
    # pip asks each source distribution for its metadata, which takes a few seconds and nothing but setuptools
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--no-binary", "transformers", "--dest", str(dest), f"transformers=={version}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    archives = list(dest.glob("transformers-*.tar.gz"))
    if run.returncode != 0 or not archives:
        raise SuiteUnavailable(
            f"pip could not fetch the source distribution of transformers {version}, which holds the common model tests. "
            "Set MIRAS_TRANSFORMERS_CHECKOUT to a checkout of that version, or MIRAS_SKIP_TRANSFORMERS_SUITE=1 to do "
            f"without these tests. pip said:\n{run.stderr.strip() or run.stdout.strip()}"
        )
    return archives[0]


def unpack_tests(archive: Path, dest: Path) -> None:
    """Write `tests/*.py` of the archive, and nothing else of it, under `dest`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts[1:]  # without the leading `transformers-x.y.z`
            if member.isfile() and parts[:1] == ("tests",) and member.name.endswith(".py") and ".." not in parts:
                path = dest.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())


def fill_gaps(root: Path) -> None:
    """Add the stand-ins that `root` needs. They only import, so a cached copy stays right when the stand-ins change."""
    for name, text in STANDINS.items():
        path = root / "tests" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n" if text else "")


def suite_root() -> Path:
    """The folder that contains Transformers' `tests` package; fetched if need be, by one process at a time."""
    if checkout := os.environ.get("MIRAS_TRANSFORMERS_CHECKOUT"):
        root = Path(checkout).resolve()
        missing = [name for name in ("test_modeling_common.py", *STANDINS) if not (root / "tests" / name).exists()]
        if missing:
            raise SuiteUnavailable(
                f"MIRAS_TRANSFORMERS_CHECKOUT={checkout} is no full checkout, it lacks tests/{missing}"
            )
        return root

    version, cache = transformers.__version__, cache_dir()
    # the stand-ins are part of the name: another set of them is another folder, so a finished one is never written to
    root = cache / f"transformers-{version}-{zlib.crc32(repr(STANDINS).encode()):08x}"
    if not root.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"transformers-{version}.lock"):  # one worker of pytest-xdist fetches, the others wait
            if not root.is_dir():
                with tempfile.TemporaryDirectory(dir=cache) as scratch:
                    unpacked = Path(scratch) / "unpacked"
                    unpack_tests(download_source_distribution(version, Path(scratch)), unpacked)
                    fill_gaps(unpacked)
                    unpacked.rename(root)  # atomic: a folder of this name is always complete
    return root


def install() -> Path:
    """Put Transformers' `tests` first on the path. Child processes inherit the path, so they find it as well."""
    root = suite_root()
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    import tests

    if Path(tests.__file__).resolve().parent != root / "tests":
        raise SuiteUnavailable(
            f"another package named `tests` was imported before Transformers' own: {tests.__file__}"
        )
    return root


@contextlib.contextmanager
def listed_in_tree(model_type: str, **class_names: str):
    """List classes in the tables of names that Transformers keeps for its own models, e.g. `CAUSAL_LM="MonetaForCausalLM"`.

    The common tests look class names up there to learn which labels a head takes and whether a test concerns it at all;
    a registered out-of-tree class is not listed, and such tests would pass without having looked at it.
    """
    with contextlib.ExitStack() as stack:
        for task, name in class_names.items():
            table = "MODEL_MAPPING_NAMES" if task == "BASE" else f"MODEL_FOR_{task}_MAPPING_NAMES"
            stack.enter_context(mock.patch.dict(getattr(modeling_auto, table), {model_type: name}))
        yield


if os.environ.get("MIRAS_SKIP_TRANSFORMERS_SUITE", "0") not in ("", "0"):
    pytest.skip("MIRAS_SKIP_TRANSFORMERS_SUITE is set", allow_module_level=True)

install()

import tests.test_fsdp_mixin  # noqa: E402
import tests.test_tensor_parallel_mixin  # noqa: E402
from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_fsdp_mixin import FSDPTesterMixin  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402
from tests.test_tensor_parallel_mixin import TensorParallelTesterMixin  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402


# These two run for a few model types of Transformers' own choice only, unless the choice is taken away.
tests.test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
tests.test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None

__all__ = [
    "ConfigTester",
    "FSDPTesterMixin",
    "GenerationTesterMixin",
    "ModelTesterMixin",
    "TensorParallelTesterMixin",
    "TrainingTesterMixin",
    "ids_tensor",
    "listed_in_tree",
]
