"""Files on a disk: written under other names, and given their own when they are whole."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from s3dcp._copies import PARTIAL_SUFFIX
from s3dcp._errors import CommitConflictError

if sys.platform != "win32":
    import fcntl


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have what the disk refuses say of which file, and what to do."""
    try:
        yield
    except OSError as exc:
        if exc.filename is None:
            exc.filename = str(path)
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            exc.strerror = f"{exc.strerror}: make room, and the same copy goes on"
        raise


def partial_of(path: Path) -> Path:
    """Return what a file is called as long as it is not whole."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


def publish_file(file: BinaryIO, path: Path) -> None:
    """Close a partial file and give it its name, once it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    partial_of(path).replace(path)


def fill(file: io.RawIOBase, start: int, view: memoryview) -> None:
    """Read as many bytes as fit.

    Raises:
        EOFError: there are not so many.
    """
    file.seek(start)
    while view.nbytes:
        count = file.readinto(view)
        if not count:
            raise EOFError
        view = view[count:]


def version_of(status: os.stat_result) -> str:
    """Return what stands for a version of a file's bytes."""
    return f"{status.st_ino}-{status.st_mtime_ns}"


def lock(file: BinaryIO, folder: Path) -> None:
    """Keep other processes from copying to a folder, as long as a file in it is open.

    Raises:
        CommitConflictError: one does.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise CommitConflictError(
                f"Another process copies a checkpoint to {folder}: wait until it has ended"
            ) from exc


def sync_folder(path: Path) -> None:
    """Have a folder's entries be on the disk."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
