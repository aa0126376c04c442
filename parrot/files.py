"""Files that are either wholly there or not there at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: str | os.PathLike, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write ``data``, given whole or in pieces, to ``path`` so that a reader, or a crash, never sees half of it.

    The bytes go to a temporary file in the same folder, reach the disk, and then take the name in one step. Of several
    writers, threads or processes on one machine or many, the last one's file stays.

    Raises:
        OSError: it can't be written, because the disk is full, say; what ``path`` held is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # which does not tell this name, or none
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
