"""Files that are wholly there or not at all."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading

import pytest

from parrot import cli
from parrot.files import write_atomically

# The system's own refusal to write more than a kilobyte.
LIMITED = """
import resource, signal, sys
from pathlib import Path
from parrot.files import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    write_atomically(Path(sys.argv[1]), bytes(5000))
except OSError as error:
    sys.exit(f"{error.errno} {error}")
"""


def test_writers_of_one_file_do_not_meet(tmp_path):
    path, both, errors = tmp_path / "file", threading.Barrier(2), []

    def pieces(letter):
        yield letter * 1000
        both.wait(timeout=10)  # both have a file open
        yield letter * 1000

    def write(letter):
        try:
            write_atomically(path, pieces(letter))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_bytes() in (b"a" * 2000, b"b" * 2000)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"before")

    def pieces():
        yield b"half"
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        write_atomically(path, pieces())
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are Unix's")
def test_what_was_there_stays_where_there_is_no_room(tmp_path):
    path = tmp_path / "result.json"
    write_atomically(path, b"old")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{errno.EFBIG} ")
    assert str(path) in done.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("notes")
    with pytest.raises(NotADirectoryError, match=r"file/result\.json"):
        write_atomically(tmp_path / "file" / "result.json", b"new")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_the_command_line_says_to_make_room(number):
    text = cli._explain(OSError(number, "no room", "/runs/result.json"))
    assert text.startswith(f"[Errno {number}] no room: '/runs/result.json'. What was finished is kept: make room")
    assert "make room" not in cli._explain(PermissionError(errno.EACCES, "denied", "/runs"))
