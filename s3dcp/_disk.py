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
from s3dcp._errors import CommitConflictError, DiskError, S3Exception

if sys.platform != "win32":
    import fcntl


_NEXT_STEPS = {
    "make room, and copy again: it goes on where it ended": {errno.ENOSPC, errno.EDQUOT},
    "let this user do that, and copy again": {errno.EACCES, errno.EPERM, errno.EROFS},
    "something else is in the way: copy to another folder, or remove it": {
        *(errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENOTDIR)
    },
}


def refused(exc: OSError) -> DiskError:
    """Return the error for what a disk refused: which file, why, and what to do."""
    steps = (step for step, numbers in _NEXT_STEPS.items() if exc.errno in numbers)
    step = next(steps, "look at the disk, and copy again")
    what = f"{exc.filename}: {exc.strerror}" if exc.filename is not None else str(exc)
    error = DiskError(f"{what}: {step}")
    error.errno, error.strerror, error.filename = exc.errno, exc.strerror, exc.filename
    return error


@contextmanager
def typed() -> Iterator[None]:
    """Raise a disk's errors as ours.

    Raises:
        DiskError: it refused something.
    """
    try:
        yield
    except S3Exception:  # some of which are OSErrors too
        raise
    except OSError as exc:
        raise refused(exc) from exc


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have what the disk refuses say of which file."""
    try:
        yield
    except OSError as exc:
        if exc.filename is None:
            exc.filename = str(path)
        raise


def own(path: str, flags: int) -> int:
    """Open a file that only copies write: never a link, which may lead elsewhere. An opener."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


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
