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
"""Settings of all tests."""

import os

import pytest


# The models of the tests are so small that a second thread costs more than it brings, and pytest-xdist's workers share
# the cores. Set before torch is imported, and inherited by child processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Transformers' common tests carry these; unregistered they would be errors under `--strict-markers`.
TRANSFORMERS_MARKS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_agent_test",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_staging_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "order",
    "torch_compile_test",
    "torch_export_test",
)


# Families differ in the memory's formulas only, which other tests compare. So Transformers' common tests run for Moneta,
# its hybrid and the matrix memory, and the longest of them not for the latter.
OF_ONE_FAMILY = (
    "test_bc_torch_dtype",
    "test_fsdp2_plan_vs_ddp",
    "test_torch_export",
    "test_tp_",
    "test_training_overfit",
)
OTHER_FAMILIES = ("YaadModelTest", "MemoraModelTest")


@pytest.fixture(autouse=True)
def transformers_says_what_it_says():
    """Studies and demos that a test runs in its process quieten Transformers for good, and some tests listen to it."""
    from transformers.utils import logging  # not before what is set above

    logging.set_verbosity_warning()


@pytest.fixture(autouse=True)
def registered_in_one_test_alone():
    """Choices that a test, or a document that it runs, registers are those of no other test."""
    from miras_hf.memory.registry import CHOICES

    before = {name: dict(table) for name, table in CHOICES.items()}
    yield
    for name, table in before.items():
        CHOICES[name].clear()
        CHOICES[name].update(table)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        family = getattr(item.cls, "__name__", "")
        if family in OTHER_FAMILIES or (family == "MirasMatrixModelTest" and item.name.startswith(OF_ONE_FAMILY)):
            item.add_marker(
                pytest.mark.slow(reason="families differ in the memory's formulas, which other tests compare")
            )


def pytest_configure(config):
    break_on_purpose(os.environ.get("MIRAS_MUTANT"))
    for mark in TRANSFORMERS_MARKS:
        config.addinivalue_line("markers", f"{mark}: a mark of Transformers' common tests")


def break_on_purpose(mutant):
    """Puts the mutant of that name in place, before any test module has taken what it replaces."""
    if mutant is None:
        return
    from mutants import MUTANTS

    if mutant not in MUTANTS:
        raise pytest.UsageError(f"`MIRAS_MUTANT` must be one of {sorted(MUTANTS)}, got {mutant!r}.")
    MUTANTS[mutant]()
