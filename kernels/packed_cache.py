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
"""A cache that `precompile.py` filled, as one file: a machine with a GPU may take no more than some tens of megabytes.

The binaries of a kernel are much alike, and lie beside each other in here: xz makes an eighth of them.
"""

import os
import shutil
import tarfile
from pathlib import Path


def pack(cache: Path, index: Path, kernels: dict[str, str], file: Path) -> int:
    """Writes a cache's binaries, and what is known of them, to a file.

    Args:
        cache (`Path`): the cache.
        index (`Path`): of what is in it, which comes first.
        kernels (`dict` of `str`): by folder of the cache, of what kernel it holds a binary. Other folders stay.
        file (`Path`): to write, a tar compressed by xz.

    Returns:
        Its size in bytes.
    """
    partial = file.with_name(file.name + ".partial")
    with tarfile.open(partial, "w:xz") as archive:
        archive.add(index, index.relative_to(cache))
        for folder in sorted(kernels, key=lambda folder: (kernels[folder], folder)):
            for path in sorted((cache / folder).iterdir()):
                # with absolute paths, which whoever adopts the cache writes anew
                if not path.name.startswith("__grp__"):
                    archive.add(path, path.relative_to(cache))
    os.replace(partial, file)
    return file.stat().st_size


def unpack(file: Path, cache: Path) -> None:
    """Makes a cache of what `pack` wrote.

    Raises:
        `ValueError`: if there is something where the cache is to be, or the file is none that can be unpacked there.
    """
    if cache.exists():
        raise ValueError(
            f"`cache` must be a new folder, for what {file} holds; {cache} is there: adopt it, or name another."
        )
    partial = cache.with_name(cache.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with tarfile.open(file, "r:xz") as archive:
            archive.extractall(partial, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"`file` must be what `precompile.py --pack` wrote, {file} is not: {error}.") from error
    os.replace(partial, cache)
