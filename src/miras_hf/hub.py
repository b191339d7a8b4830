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
"""How a saved folder finds its code: `auto_map`, and the one file it points to.

A checkpoint carries no copy of the models' code. `config.json` names a module beside it that imports the installed
package: with `miras_hf` imported nobody looks at it, and `trust_remote_code=True` runs it for people who have not. Where
the package is not installed, that module says how it is.
"""

from pathlib import Path

from .files import is_temporary, write_text


SHIM_MODULE = "require_miras_hf"

_AUTO_CLASSES = {
    "AutoConfig": "Config",
    "AutoModel": "Model",
    "AutoModelForCausalLM": "ForCausalLM",
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModelForTokenClassification": "ForTokenClassification",
}

# Package indexes do not have the package, and a name that nobody holds there is not to be recommended.
INSTALL = "`pip install -e .` in a clone of the repository of miras-hf, not from a package index"

# Transformers would answer a missing import with `pip install miras_hf`, unless the import is in a try block.
_SHIM = '''\
"""The classes of this checkpoint are those of the package miras-hf. To install it: {install}."""

try:
    from miras_hf import (
        {names},
    )
except ModuleNotFoundError as error:
    if error.name != "miras_hf":
        raise
    raise ImportError(
        "This model needs the package miras-hf, which is not installed: {install}."
    ) from error


__all__ = [
    {strings},
]
'''


class WholeFilesOnly(dict):
    """The times of a folder's files before a save, by which Transformers finds what to upload after it; to them, what
    somebody else is writing there at the moment has not changed.

    ```python
    >>> times = WholeFilesOnly({"config.json": 5.0})
    >>> "config.json" in times, "model.safetensors" in times
    (True, False)
    ```"""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or is_temporary(str(name))

    def __missing__(self, name: str) -> float:
        if is_temporary(name):
            return float("inf")
        raise KeyError(name)


def _class_names(family: str) -> list[str]:
    return sorted(family + suffix for suffix in _AUTO_CLASSES.values())


def auto_map(family: str) -> dict[str, str]:
    """What `config.json` tells the Auto classes.

    Args:
        family (`str`): what the class names begin with, for instance `"Moneta"`.
    """
    return {auto_class: f"{SHIM_MODULE}.{family}{suffix}" for auto_class, suffix in _AUTO_CLASSES.items()}


def write_shim(folder: str | Path, family: str) -> None:
    """Writes the module that `auto_map` points to."""
    names = _class_names(family)
    strings = ",\n    ".join(f'"{name}"' for name in names)
    text = _SHIM.format(install=INSTALL, names=",\n        ".join(names), strings=strings)
    write_text(Path(folder) / f"{SHIM_MODULE}.py", text)
