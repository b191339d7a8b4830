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
"""Files are written whole: by threads at once, over links, and after writers that were killed."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest

from miras_hf import files
from miras_hf.files import atomic_write, is_temporary, write_text


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", str(b))), replace(a, b)))
    with atomic_write(tmp_path / "a") as file:
        file.write(b"1")
        assert not (tmp_path / "a").exists()
        [temporary] = os.listdir(tmp_path)
    assert calls == [("fsync", str(tmp_path / temporary)), ("replace", str(tmp_path / "a")), ("fsync", str(tmp_path))]
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"1"
    # as open() gives it, and not for its owner only
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_changes_nothing(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)), atomic_write(tmp_path / "a") as file:
        file.write(b"half")
        file.flush()
        raise error
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_folders_are_not_overwritten(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(IsADirectoryError, match="a'"), atomic_write(tmp_path / "a"):
        pass
    with pytest.raises(FileNotFoundError, match="nowhere"), atomic_write(tmp_path / "nowhere" / "a"):
        pass
    assert os.listdir(tmp_path) == ["a"]


def test_threads_that_write_one_path_do_not_take_each_others_file(tmp_path):
    contents, errors = [str(i) * 10_000 for i in range(8)], []
    barrier = threading.Barrier(len(contents))

    def work(content):
        try:
            barrier.wait()
            for _ in range(30):
                write_text(tmp_path / "a", content)
                assert (tmp_path / "a").read_text() in contents
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and os.listdir(tmp_path) == ["a"]


def test_links_are_replaced_and_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "a").symlink_to("elsewhere")
    (tmp_path / "b").symlink_to("nothing")
    (tmp_path / "c").symlink_to(tmp_path)
    for name in "abc":
        write_text(tmp_path / name, "new")
        assert not (tmp_path / name).is_symlink() and (tmp_path / name).read_text() == "new"
    assert (tmp_path / "elsewhere").read_text() == "precious" and not (tmp_path / "nothing").exists()


def test_what_killed_writers_leave_is_removed_and_what_others_write_is_not(tmp_path):
    program = """
        import os, runpy, sys

        atomic_write = runpy.run_path(sys.argv[1])["atomic_write"]
        before = set(os.listdir())
        with atomic_write("killed") as file:
            file.write(b"half")
            file.flush()
            print(*set(os.listdir()) - before, flush=True)
            sys.stdin.read()
    """

    def start():
        # the file alone: the package would bring in PyTorch
        command = [sys.executable, "-c", textwrap.dedent(program), files.__file__]
        process = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return process, process.stdout.readline().strip()

    (living, kept), (killed, left) = start(), start()
    killed.kill()
    killed.wait()
    assert set(os.listdir(tmp_path)) == {left, kept} and is_temporary(left) and not is_temporary("killed")
    # other people's things of such a name are neither opened nor removed
    os.mkfifo(tmp_path / "_miras_hf-pipe.unfinished")
    (tmp_path / "_miras_hf-link.unfinished").symlink_to(tmp_path / kept)
    write_text(tmp_path / "a", "whole")
    others = {"_miras_hf-pipe.unfinished", "_miras_hf-link.unfinished"}
    assert set(os.listdir(tmp_path)) == {"a", kept} | others
    living.communicate("")
    assert living.returncode == 0
    assert set(os.listdir(tmp_path)) == {"a", "killed"} | others and (tmp_path / "killed").read_text() == "half"
