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
"""Faults that the GPU script is made to have, so that tests see that it finds and names them.

`MIRAS_GPU_CHECK_FAULT="kind:text"` in the environment of a run, or several with a semicolon between; a fault is in the rows
whose name holds its text. Nothing here changes a kernel: what it has given is spoilt, or the process is.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from unittest.mock import patch


VARIABLE = "MIRAS_GPU_CHECK_FAULT"
KINDS = ("crash", "hang", "nan gradient", "stale tile", "unequal bits", "does not fit")


def active(kind: str, what: str) -> bool:
    """Whether the row `what` is to have a fault of this kind.

    Raises:
        `ValueError`: if the environment asks for a fault that there is not.
    """
    for fault in filter(None, os.environ.get(VARIABLE, "").split(";")):
        asked, _, text = fault.partition(":")
        if asked not in KINDS:
            raise ValueError(f"a fault in `{VARIABLE}` must be one of {KINDS}, got {asked!r}.")
        if asked == kind and text in what:
            return True
    return False


def before(what: str) -> None:
    """What happens to the process of a step: it dies of a signal, or never comes back, and does not listen."""
    if active("crash", what):
        os.kill(os.getpid(), signal.SIGSEGV)
    if active("hang", what):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(60.0)


def spoilt(name: str, x, what: str, repeat: int = 0):
    """A result as it is, or spoilt: one gradient has a NaN; 16 tokens of an output lack what came last, as behind a
    barrier that is missing; or a repeated call gives one other bit."""
    if name == "gradient of k" and active("nan gradient", what):
        x = x.clone()
        x.view(-1)[x.numel() // 2] = float("nan")
    if name == "y" and active("stale tile", what):
        x = x.clone()
        x[0, -16:, 0, :16] = x[0, -17:-1, 0, :16].clone()
    if name == "y" and repeat and active("unequal bits", what):
        x = x.clone()
        x.view(-1)[-1] += 1.0
    return x


class _TooLarge:
    def __getitem__(self, grid):
        from triton.runtime.errors import OutOfResources

        raise OutOfResources(258048, 232448, "shared memory")


@contextlib.contextmanager
def launches(what: str) -> Iterator[None]:
    """Launches of the MLP memory's forward kernel in here ask for more shared memory than there is."""
    if not active("does not fit", what):
        yield
        return
    from miras_kernels import forward_pass

    with patch.object(forward_pass, "mlp_forward_kernel", _TooLarge()):
        yield
