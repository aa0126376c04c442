"""Files that are wholly there or not at all."""

from __future__ import annotations

import threading

import pytest

from parrot.files import write_atomically


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
