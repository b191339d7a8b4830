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
"""Files that appear complete or not at all, whoever else writes or dies meanwhile."""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


# Trainer leaves names with this beginning out of what it uploads.
_PREFIX, _SUFFIX = "_miras_hf-", ".unfinished"


def is_temporary(path: str | os.PathLike) -> bool:
    """Whether a file is one that `atomic_write` has not finished."""
    name = Path(path).name
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Generator[BinaryIO, None, None]:
    """
    Open an empty file to write bytes to, in the folder of `path`, that takes the place of `path` when the block ends.

    If the block raises, `path` stays as it was. A symbolic link at `path` is replaced, and what it points to stays as it
    was. The content is on the disk before the name is. Every call has a file of its own, which it keeps locked, so that
    the files of writers that were killed are known by their missing locks: each call removes those in its folder.

    Args:
        path (`str` or `os.PathLike`): where the content shall be.

    Raises:
        `FileNotFoundError`, `IsADirectoryError` and other `OSError`: if nothing can be written there.
    """
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    remove_stale_temporaries(path.parent)
    temporary, descriptor = _locked_temporary(path.parent)
    # closed, and so unlocked, when it has its name or is gone
    with open(descriptor, "wb") as file:
        try:
            yield file
            file.flush()
            os.fsync(descriptor)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text by `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


def remove_stale_temporaries(folder: str | os.PathLike) -> None:
    """Removes what writers of this module left in a folder when they were killed; those at work are left alone."""
    for temporary in Path(folder).glob(f"{_PREFIX}*{_SUFFIX}"):
        try:
            # neither waits for the other end of a pipe nor follows a link that somebody else put there
            descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                temporary.unlink(missing_ok=True)
        except OSError:  # locked: its writer lives; or a file system without locks, where nobody can know
            continue
        finally:
            os.close(descriptor)


def _locked_temporary(folder: Path) -> tuple[Path, int]:
    """A new file that its descriptor keeps locked."""
    while True:
        temporary = folder / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        # no `mkstemp`, whose files only their owner may read
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody who cleans up took it for a dead writer's between the two calls
            os.close(descriptor)
            continue
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(descriptor)
                temporary.unlink(missing_ok=True)
                raise
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot, and the file is in its place
        pass
    finally:
        os.close(descriptor)
