"""What is in a copy's way on a disk, and what a disk refuses."""

from __future__ import annotations

import asyncio
import errno
import gc
import threading
from typing import TYPE_CHECKING

import pytest

from s3dcp import DiskError, S3Exception, copy
from s3dcp._disk import refused
from s3dcp._movers import to_its_end
from s3dcp.testing import Refuse
from tests._catalogs import metadata_of, put_checkpoint
from tests._fakes import uri_of

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from s3dcp.testing import FakeS3

RUN = uri_of("run")


class TestInTheWay:
    """What is at a target on a disk, and is no file of a copy."""

    NAME = "below/deep/x.distcp"

    def refuse(self, fake: FakeS3, target: Path, match: str, **options: Any) -> None:
        """Copy, in vain: nothing must have been fetched, nor written."""
        put_checkpoint(fake, "run/", self.NAME)
        before = {str(path): path.lstat().st_mtime_ns for path in target.parent.rglob("*")}

        with pytest.raises(DiskError, match=match):
            copy(RUN, target, **options)

        after = {str(path): path.lstat().st_mtime_ns for path in target.parent.rglob("*")}
        changed = set(before.items()) ^ set(after.items())
        assert {path for path, _ in changed} <= {str(target)}  # for the time of its claim
        assert not [each for each in fake.requests if each.key == f"run/{self.NAME}"]

    @pytest.mark.parametrize("name", [".metadata", NAME])
    def test_a_folder_of_a_files_name(self, fake: FakeS3, tmp_path: Path, name: str) -> None:
        (tmp_path / "copy" / name).mkdir(parents=True)

        self.refuse(fake, tmp_path / "copy", rf"{name} is a folder, .*: copy to", overwrite=True)

    @pytest.mark.parametrize("name", ["below", "below/deep"])
    def test_a_file_of_a_folders_name(self, fake: FakeS3, tmp_path: Path, name: str) -> None:
        (tmp_path / "copy" / name).parent.mkdir(parents=True)
        (tmp_path / "copy" / name).touch()

        self.refuse(fake, tmp_path / "copy", rf"{name} is no folder: copy to")

    @pytest.mark.parametrize("name", ["below", "below/deep"])
    @pytest.mark.parametrize("there", [False, True])
    def test_a_link_to_a_folder(self, fake: FakeS3, tmp_path: Path, name: str, there: bool) -> None:
        """Nothing is written or removed through it."""
        (tmp_path / "elsewhere/deep").mkdir(parents=True)
        (tmp_path / "elsewhere/deep/x.distcp").write_bytes(b"mine")
        (tmp_path / "copy" / name).parent.mkdir(parents=True)
        (tmp_path / "copy" / name).symlink_to(tmp_path / ("elsewhere" if there else "nowhere"))

        self.refuse(fake, tmp_path / "copy", rf"{name} is a link, ", overwrite=True)

    def test_a_link_instead_of_its_claim(self, fake: FakeS3, tmp_path: Path) -> None:
        (tmp_path / "mine").write_bytes(b"mine")
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy/.s3dcp-copy").symlink_to(tmp_path / "mine")

        self.refuse(fake, tmp_path / "copy", r"\.s3dcp-copy: .* is in the way")

        assert (tmp_path / "mine").read_bytes() == b"mine"

    def test_a_link_instead_of_a_part(self, fake: FakeS3, tmp_path: Path) -> None:
        put_checkpoint(fake, "run/", "x.distcp")
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key="run/x.distcp")
        with pytest.raises(S3Exception):
            copy(RUN, tmp_path / "copy")
        (tmp_path / "mine").write_bytes(b"mine")
        part = tmp_path / "copy/x.distcp.partial"
        part.unlink()
        part.symlink_to(tmp_path / "mine")

        with pytest.raises(DiskError, match=rf"{part}: .* is in the way"):
            copy(RUN, tmp_path / "copy")

        assert (tmp_path / "mine").read_bytes() == b"mine"

    def test_what_is_replaced_is_not_removed_through_a_link(
        self, fake: FakeS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        put_checkpoint(fake, "run/", "x.distcp")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere/old").write_bytes(b"mine")
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy/below").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "copy/.metadata").write_bytes(metadata_of({"below/old": 4}))

        copy(RUN, tmp_path / "copy", overwrite=True)

        assert (tmp_path / "elsewhere/old").read_bytes() == b"mine"
        assert "left in place" in caplog.text

    def test_the_folder_itself_may_be_a_link(self, fake: FakeS3, tmp_path: Path) -> None:
        put_checkpoint(fake, "run/", self.NAME)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "copy").symlink_to(tmp_path / "elsewhere")

        copy(RUN, tmp_path / "copy")

        assert (tmp_path / "elsewhere" / self.NAME).is_file()

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (OSError(errno.ENOSPC, "Full", "/x"), "/x: Full: make room, and copy again"),
            (PermissionError(errno.EACCES, "Denied", "/x"), "/x: Denied: let this user do that"),
            (OSError(errno.EROFS, "Read-only", "/x"), "/x: Read-only: let this user do that"),
            (IsADirectoryError(errno.EISDIR, "Folder", "/x"), "/x: Folder: something else is in"),
            (OSError(errno.EIO, "Broken", "/x"), "/x: Broken: look at the disk"),
            (OSError(errno.EMFILE, "Many"), f"[Errno {errno.EMFILE}] Many: look at the disk"),
            (OSError("no number"), "no number: look at the disk"),
        ],
    )
    def test_what_the_disk_says(self, error: OSError, said: str) -> None:
        assert str(refused(error)).startswith(said)


def test_what_is_refused_once_the_copy_has_failed_is_told_to_nobody() -> None:
    """A full disk refuses the files of all connections; the first error is the copy's."""
    told: list[dict[str, Any]] = []
    begun, go_on = threading.Event(), threading.Event()

    def write() -> None:
        begun.set()
        go_on.wait()
        raise OSError(errno.ENOSPC, "Full")

    async def cancelled() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
        writing = asyncio.create_task(to_its_end(write))
        await asyncio.to_thread(begun.wait)
        writing.cancel()
        asyncio.get_running_loop().call_soon(go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await writing

    asyncio.run(cancelled())
    gc.collect()
    assert not told
