"""Checkpoints copied between S3 and a disk: whole, cut off and gone on with, damaged, forged."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

import s3dcp
from s3dcp import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CommitConflictError,
    CopyReport,
    CorruptMetadataError,
    DiskError,
    IntegrityError,
    InvalidS3UriError,
    ObjectNotFoundError,
    S3ClientConfig,
    S3ConfigError,
    S3Exception,
    _movers,
    _places,
    copy,
)
from s3dcp._disk import own
from s3dcp.testing import Call, FakeS3, Fault, FlipByte, Record, Refuse, Stall
from tests._catalogs import metadata_of, put_checkpoint, put_data
from tests._fakes import BUCKET
from tests._states import MiB, StateDict, assert_same, blank, fill

if TYPE_CHECKING:
    from pathlib import Path

    from tests._servers import Server

RUN = f"s3://{BUCKET}/run"
COPY = f"s3://{BUCKET}/copy"
_LIMIT_S = 200
# One request after the other.
ONE = S3ClientConfig(max_connections=1, part_size=5 * MiB, memory_budget_bytes=10 * MiB)


def state(seed: int = 1) -> StateDict:
    """Return two objects' worth with `thread_count=2`: one of 17 MiB, and a small one."""
    return {
        "large": fill((17, 1 << 18), seed=seed),
        "small": {f"{n}": fill((n, 5), torch.bfloat16, seed) for n in range(7)},
        "step": seed,
    }


def save(uri: str = RUN, seed: int = 1) -> StateDict:
    saved = state(seed)
    s3dcp.save(saved, uri, thread_count=2)
    return saved


def save_stock(folder: Path, seed: int = 1, **options: Any) -> StateDict:
    """Save with torch's own writer, whose names are the same for all checkpoints."""
    saved = state(seed)
    dcp.save(saved, storage_writer=FileSystemWriter(folder), no_dist=True, **options)
    return saved


def assert_on_disk(folder: Path, saved: StateDict) -> None:
    """Load with torch's own reader; nothing that is not whole may be left."""
    loaded = blank(saved)
    dcp.load(loaded, storage_reader=FileSystemReader(folder), no_dist=True)
    assert_same(loaded, saved)
    assert not [path for path in folder.rglob("*") if path.name.endswith((".partial", "-copy"))]


def assert_on_s3(fake: FakeS3, uri: str, saved: StateDict) -> None:
    loaded = blank(saved)
    s3dcp.load(loaded, uri)
    assert_same(loaded, saved)
    assert not [key for key in fake.keys(BUCKET) if key.endswith("-copy")]
    assert fake.uploads(BUCKET) == {}


def data_key(fake: FakeS3, folder: str = "run/", *, large: bool = True) -> str:
    """Return the key of the object that holds the large tensor, or of the other."""
    keys = [key for key in fake.keys(BUCKET, folder) if key.endswith(".distcp")]
    return sorted(keys, key=lambda key: len(fake.read(BUCKET, key)))[-1 if large else 0]


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class TestWhole:
    def test_from_s3_to_a_disk(self, fake: FakeS3, tmp_path: Path) -> None:
        saved = save()
        told: list[tuple[int, int]] = []

        report = copy(RUN, tmp_path / "new/folder", progress=lambda *step: told.append(step))

        assert_on_disk(tmp_path / "new/folder", saved)
        assert (report.objects, report.copied_objects) == (2, 2)
        assert report.verified == 9
        assert report.unverified == 0
        assert sum(count for count, _ in told) == report.size_bytes == report.copied_bytes
        assert {total for _, total in told} == {report.size_bytes}
        assert report.totals.operations["GetObject"].size_bytes > report.size_bytes

    @pytest.mark.parametrize("stock", [False, True], ids=["s3dcp's", "torch's"])
    def test_from_a_disk_to_s3(self, fake: FakeS3, tmp_path: Path, stock: bool) -> None:
        if stock:
            saved = save_stock(tmp_path)
        else:
            saved = save()
            copy(RUN, tmp_path)

        report = copy(str(tmp_path), COPY)

        assert_on_s3(fake, COPY, saved)
        assert (report.verified, report.unverified) == (9, 0)

    def test_within_s3(self, fake: FakeS3) -> None:
        saved = save()
        fake.forget()

        report = copy(RUN, COPY)

        assert_on_s3(fake, COPY, saved)
        assert (report.verified, report.unverified) == (9, 0)
        assert fake.stats()["CopyObject"] == 2

    def test_a_prefix_of_each_rank_is_a_folder(self, fake: FakeS3, tmp_path: Path) -> None:
        saved = state()
        strategy = s3dcp.RoundRobinPrefixStrategy(["left"], epoch_num=3)
        s3dcp.save(saved, RUN, prefix_strategy=strategy)

        copy(RUN, tmp_path)

        assert_on_disk(tmp_path, saved)
        assert len(list((tmp_path / "left/epoch_3").iterdir())) == 1

    def test_ranks_that_committed_by_themselves(self, fake: FakeS3, tmp_path: Path) -> None:
        """The first rank's commit goes last: a gap below others shows that one is missing."""
        for rank in range(3):
            put_checkpoint(fake, "run/", f"__{rank}_0.distcp", commit=f"__{rank}.metadata")
        copy(RUN, tmp_path)
        refused = fake.inject(
            Refuse("AccessDenied"), operation="PutObject", key="copy/__0.metadata"
        )

        with pytest.raises(S3Exception):
            copy(tmp_path, COPY)

        assert len(refused.struck) == 1
        [found] = s3dcp.list_checkpoints(COPY)
        assert found.problem == "rank 0 did not commit"
        copy(tmp_path, COPY)
        [found] = s3dcp.list_checkpoints(COPY)
        assert (found.complete, found.objects) == (True, 3)

    def test_again_it_has_nothing_to_do(self, fake: FakeS3, tmp_path: Path) -> None:
        save()
        copy(RUN, tmp_path)
        copy(tmp_path, COPY)
        fake.forget()

        assert copy(RUN, tmp_path).copied_objects == 0
        assert copy(tmp_path, COPY).copied_objects == 0
        assert set(fake.stats()) & {"PutObject", "CreateMultipartUpload", "DeleteObject"} == set()

    def test_what_was_lost_of_a_copy_is_copied(self, fake: FakeS3, tmp_path: Path) -> None:
        saved = save()
        copy(RUN, tmp_path)
        min(tmp_path.glob("*.distcp"), key=lambda path: path.stat().st_size).unlink()

        assert copy(RUN, tmp_path).copied_objects == 1
        assert_on_disk(tmp_path, saved)

    def test_what_has_to_be_read_to_compare_is_told(self, fake: FakeS3, tmp_path: Path) -> None:
        """Here, what is on the disk: the store knows its own checksums."""
        save_stock(tmp_path)
        copied: list[tuple[int, int]] = []
        told: list[tuple[int, int]] = []

        report, again = (
            copy(
                tmp_path,
                COPY,
                progress=lambda *step: copied.append(step),
                comparing=lambda *step: told.append(step),
            )
            for _ in range(2)
        )

        assert again.copied_objects == 0
        assert sum(count for count, _ in copied) == report.size_bytes
        assert sum(count for count, _ in told) == report.size_bytes
        assert {total for _, total in told} == {report.size_bytes}
        assert max(count for count, _ in told) <= 8 * MiB

    def test_an_empty_object(self, fake: FakeS3, tmp_path: Path) -> None:
        fake.write(BUCKET, "run/__0_0.distcp", b"")
        fake.write(BUCKET, "run/.metadata", metadata_of({"__0_0.distcp": 0}))

        copy(RUN, tmp_path)
        copy(tmp_path, COPY)

        assert (tmp_path / "__0_0.distcp").read_bytes() == b""
        assert fake.read(BUCKET, "copy/__0_0.distcp") == b""

    def test_from_any_loop_and_cancelled(self, fake: FakeS3, tmp_path: Path) -> None:
        saved = save()
        rule = fake.inject(Stall(), operation="GetObject", key="*.distcp")

        async def run() -> CopyReport:
            copying = asyncio.create_task(s3dcp.acopy(RUN, tmp_path))
            await asyncio.to_thread(rule.wait)
            copying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await copying
            rule.release()
            assert not (tmp_path / ".metadata").exists()
            return await s3dcp.acopy(RUN, tmp_path)

        assert asyncio.run(run()).objects == 2
        assert_on_disk(tmp_path, saved)

    def test_on_rclone(self, server: Server, boto: Any, bucket: str, tmp_path: Path) -> None:
        """Without conditional writes, and with ETags of multipart uploads that change."""
        saved = state()
        s3dcp.save(saved, f"s3://{bucket}/run")

        copy(f"s3://{bucket}/run", tmp_path)
        copy(tmp_path, f"s3://{bucket}/copy")
        copy(f"s3://{bucket}/copy", f"s3://{bucket}/again")

        assert_on_disk(tmp_path, saved)
        loaded = blank(saved)
        s3dcp.load(loaded, f"s3://{bucket}/again")
        assert_same(loaded, saved)


class TestCutOff:
    def test_a_file_on_a_disk_goes_on_where_it_ended(self, fake: FakeS3, tmp_path: Path) -> None:
        saved = save()
        large = data_key(fake)
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key=large, skip=2)

        with pytest.raises(S3Exception):
            copy(RUN, tmp_path, s3client_config=ONE)

        [part] = tmp_path.glob("*.partial")
        assert part.stat().st_size == 10 * MiB
        assert not (tmp_path / ".metadata").exists()
        fake.forget()
        told: list[int] = []
        report = copy(RUN, tmp_path, progress=lambda n, _: told.append(n), s3client_config=ONE)
        ranges = [each.headers["range"] for each in fake.requests if each.key == large]
        assert ranges[0].startswith(f"bytes={10 * MiB}-")
        assert len(ranges) == 2
        small = len(fake.read(BUCKET, data_key(fake, large=False)))
        assert report.copied_bytes in {
            report.size_bytes - 10 * MiB,  # the small one had not been copied yet,
            report.size_bytes - 10 * MiB - small,  # or it had
        }
        assert_on_disk(tmp_path, saved)

    def test_what_a_crash_has_left_of_it_is_not_believed(
        self, fake: FakeS3, tmp_path: Path
    ) -> None:
        saved = save()
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key=data_key(fake), skip=2)
        with pytest.raises(S3Exception):
            copy(RUN, tmp_path, s3client_config=ONE)
        # The large tensor is longer than what is there of it: its CRC tells only in the end.
        [part] = tmp_path.glob("*.partial")
        data = bytearray(part.read_bytes())
        data[7 * MiB] ^= 1
        part.write_bytes(data)
        fake.forget()

        with pytest.raises(IntegrityError, match="large: bytes"):
            copy(RUN, tmp_path, s3client_config=ONE)

        assert not part.exists()
        copy(RUN, tmp_path)
        assert_on_disk(tmp_path, saved)

    def test_a_source_that_was_changed_in_between_starts_over(
        self, fake: FakeS3, tmp_path: Path
    ) -> None:
        """Another object of the same name and size; `.metadata` stays as it was."""
        fake.write(BUCKET, "run/.metadata", metadata_of({"a": 12 * MiB}))
        fake.write(BUCKET, "run/a", bytes(12 * MiB))
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key="run/a", skip=1)
        with pytest.raises(S3Exception):
            copy(RUN, tmp_path, s3client_config=ONE)
        assert (tmp_path / "a.partial").stat().st_size == 5 * MiB
        changed = b"changed " * (12 * MiB // 8)
        fake.write(BUCKET, "run/a", changed)

        report = copy(RUN, tmp_path, s3client_config=ONE)

        assert report.copied_bytes == 12 * MiB
        assert (tmp_path / "a").read_bytes() == changed

    def test_parts_of_another_checkpoint_are_not_taken_over_by_the_one_after_it(
        self, fake: FakeS3, tmp_path: Path
    ) -> None:
        """Cut off as well, before it came to that file: the claim is its own by then."""
        sizes = {"a": 1 * MiB, "b": 12 * MiB}
        for run in "12":
            fake.write(BUCKET, f"run/{run}/.metadata", metadata_of(sizes))
            for name, size in sizes.items():
                fake.write(BUCKET, f"run/{run}/{name}", run.encode() * size)
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key="run/1/b", skip=1)
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key="run/2/a", skip=1)
        for run in "12":
            with pytest.raises(S3Exception):
                copy(f"{RUN}/{run}", tmp_path, overwrite=True, s3client_config=ONE)

        copy(f"{RUN}/2", tmp_path, s3client_config=ONE)

        assert all((tmp_path / name).read_bytes() == b"2" * size for name, size in sizes.items())

    def test_whole_items_that_were_damaged_are_found_before_anything_is_fetched(
        self, fake: FakeS3, tmp_path: Path
    ) -> None:
        saved = {f"{n}": fill((1 << 18,), seed=n) for n in range(12)}
        s3dcp.save(saved, RUN)
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key=data_key(fake), skip=2)
        with pytest.raises(S3Exception):
            copy(RUN, tmp_path, s3client_config=ONE)
        [part] = tmp_path.glob("*.partial")
        data = bytearray(part.read_bytes())
        data[100_000] ^= 1
        part.write_bytes(data)

        report = copy(RUN, tmp_path)

        assert report.copied_bytes == report.size_bytes
        assert_on_disk(tmp_path, saved)

    def test_objects_that_are_up_stay(self, fake: FakeS3, tmp_path: Path) -> None:
        saved = save_stock(tmp_path)
        fake.inject(Refuse("AccessDenied"), operation="PutObject", key="*/.metadata")
        with pytest.raises(S3Exception):
            copy(tmp_path, COPY)
        assert s3dcp.list_checkpoints(COPY) == []
        fake.forget()

        assert copy(tmp_path, COPY).copied_objects == 0

        assert "CreateMultipartUpload" not in fake.stats()
        assert_on_s3(fake, COPY, saved)

    @pytest.mark.parametrize("up", [False, True], ids=["to a disk", "to s3"])
    def test_what_is_there_of_another_checkpoint_is_not_believed(
        self, fake: FakeS3, tmp_path: Path, up: bool
    ) -> None:
        """Torch's writer gives the files of all checkpoints the same names and sizes."""
        first, second = tmp_path / "first", tmp_path / "second"
        save_stock(first, seed=1)
        saved = save_stock(second, seed=2)
        if not up:
            copy(first, f"{RUN}/1")
            copy(second, f"{RUN}/2")
        sources = [str(first), str(second)] if up else [f"{RUN}/1", f"{RUN}/2"]
        target = COPY if up else str(tmp_path / "copy")
        fake.inject(Refuse("AccessDenied"), operation="PutObject", key="copy/.metadata")
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key="run/1/*.distcp", skip=2)
        with pytest.raises(S3Exception):
            copy(sources[0], target, s3client_config=ONE)

        report = copy(sources[1], target, overwrite=up)  # where a whole file is there by now

        assert report.copied_bytes == report.size_bytes
        if up:
            assert_on_s3(fake, COPY, saved)
        else:
            assert_on_disk(tmp_path / "copy", saved)

    @pytest.mark.parametrize("up", [False, True], ids=["to a disk", "to s3"])
    def test_what_a_save_of_others_has_left_meanwhile_is_not_believed(
        self, fake: FakeS3, tmp_path: Path, up: bool
    ) -> None:
        """Cut off too, it has no commit; its file has the copy's name and size."""
        sizes = {"__0_0.distcp": 1 * MiB, "__1_0.distcp": 1 * MiB}
        for name, size in sizes.items():
            fake.write(BUCKET, f"run/{name}", b"1" * size)
        fake.write(BUCKET, "run/.metadata", metadata_of(sizes))
        source, target = (str(tmp_path / "run"), COPY) if up else (RUN, str(tmp_path / "copy"))
        if up:
            copy(RUN, source)
        fake.inject(Refuse("AccessDenied"), operation="PutObject", key="copy/__1_0.distcp")
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key="run/__1_0.distcp")
        with pytest.raises(S3Exception):
            copy(source, target, s3client_config=ONE)
        saved = b"2" * MiB
        if up:
            fake.write(BUCKET, "copy/__0_0.distcp", saved)
        else:
            (tmp_path / "copy/__0_0.distcp").write_bytes(saved)

        with pytest.raises(CheckpointExistsError, match=r"its __0_0\.distcp is another"):
            copy(source, target)
        assert copy(source, target, overwrite=True).copied_objects == 2

        if up:
            copy(target, tmp_path / "copy")
        found = [path.read_bytes() for path in (tmp_path / "copy").glob("*.distcp")]
        assert found == [b"1" * MiB] * 2

    def test_no_part_is_left_of_what_others_put_there_meanwhile(
        self, fake: FakeS3, tmp_path: Path
    ) -> None:
        save_stock(tmp_path / "source")
        copy(tmp_path / "source", RUN)
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key="run/__0_0.distcp")
        with pytest.raises(AccessDeniedError):
            copy(RUN, tmp_path / "copy")
        assert (tmp_path / "copy/__0_0.distcp.partial").is_file()
        shutil.copy(tmp_path / "source/__0_0.distcp", tmp_path / "copy")

        copy(RUN, tmp_path / "copy")

        assert {path.name for path in (tmp_path / "copy").iterdir()} == {
            ".metadata",
            "__0_0.distcp",
        }

    def test_killed(self, fake: FakeS3, tmp_path: Path) -> None:
        """On its way down; `test_resumed_uploads` has the other way."""
        saved = save()
        killed: list[subprocess.Popen[bytes]] = []

        def kill(_: Record) -> Fault:
            killed[0].kill()
            return Stall()

        rule = fake.inject(Call(before=kill), operation="GetObject", key="*.distcp", skip=1)
        command = [sys.executable, "-m", "s3dcp", "cp", RUN, str(tmp_path)]
        with subprocess.Popen(command) as process:
            killed.append(process)
            assert process.wait(_LIMIT_S) == -signal.SIGKILL
        assert rule.struck
        fake.forget()
        assert not (tmp_path / ".metadata").exists()
        there = sum(path.stat().st_size for path in tmp_path.glob("*.distcp*"))

        report = copy(RUN, tmp_path)

        sent = [each for each in fake.requests if each.key.endswith(".distcp")]
        assert report.copied_bytes == report.size_bytes - there
        assert sum(each.bytes_out for each in sent) == report.size_bytes - there
        assert_on_disk(tmp_path, saved)


class TestAnotherCheckpoint:
    @pytest.mark.parametrize("up", [False, True], ids=["on a disk", "on s3"])
    def test_is_not_replaced_unless_told(self, fake: FakeS3, tmp_path: Path, up: bool) -> None:
        save_stock(tmp_path / "first", seed=1)
        saved = save_stock(tmp_path / "second", seed=2)
        first, second = (
            (f"{RUN}/1", f"{RUN}/2")
            if not up
            else (str(tmp_path / "first"), str(tmp_path / "second"))
        )
        if not up:
            copy(tmp_path / "first", first)
            copy(tmp_path / "second", second)
        target = COPY if up else str(tmp_path / "copy")
        copy(first, target)

        with pytest.raises(CheckpointExistsError, match="--overwrite"):
            copy(second, target)

        copy(first, target)  # nothing was changed
        copy(second, target, overwrite=True)
        if up:
            assert_on_s3(fake, COPY, saved)
        else:
            assert_on_disk(tmp_path / "copy", saved)

    def test_stays_loadable_until_the_commit(self, fake: FakeS3, tmp_path: Path) -> None:
        old = save(COPY, seed=1)
        new = save(RUN, seed=2)
        copy(RUN, tmp_path)
        fake.inject(Refuse("AccessDenied"), operation="PutObject", key="copy/.metadata")

        with pytest.raises(S3Exception):
            copy(tmp_path, COPY, overwrite=True)

        loaded = blank(old)
        s3dcp.load(loaded, COPY)
        assert_same(loaded, old)
        copy(tmp_path, COPY, overwrite=True)
        assert_on_s3(fake, COPY, new)
        assert len(fake.keys(BUCKET, "copy/")) == 3  # what only the old one used is gone

    def test_a_copy_of_names_in_use_is_no_checkpoint_before_its_end(
        self, fake: FakeS3, tmp_path: Path
    ) -> None:
        save_stock(tmp_path / "first", seed=1)
        saved = save_stock(tmp_path / "second", seed=2)
        copy(tmp_path / "first", COPY)
        fake.inject(Refuse("AccessDenied"), operation="UploadPart", skip=1)

        with pytest.raises(S3Exception):
            copy(tmp_path / "second", COPY, overwrite=True)

        assert s3dcp.list_checkpoints(COPY) == []
        copy(tmp_path / "second", COPY)
        assert_on_s3(fake, COPY, saved)

    @pytest.mark.parametrize("up", [False, True], ids=["on a disk", "on s3"])
    def test_one_below_it_stays(self, fake: FakeS3, tmp_path: Path, up: bool) -> None:
        """Even if the `.metadata` that is replaced names its files."""
        saved, other = save(RUN, seed=1), save(f"{COPY}/other", seed=2)
        below = [key.removeprefix("copy/") for key in fake.keys(BUCKET, "copy/other/__")]
        put_data(fake, "copy/", "old/x.distcp")
        named = {"old/x.distcp": 10, **dict.fromkeys(below, 10)}
        fake.write(BUCKET, "copy/.metadata", metadata_of(named))
        target = tmp_path / "copy"
        for key in [] if up else fake.keys(BUCKET, "copy/"):
            (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / key).write_bytes(fake.read(BUCKET, key))
        if up:
            copy(RUN, tmp_path / "run")

        copy(tmp_path / "run" if up else RUN, COPY if up else target, overwrite=True)

        if up:
            assert_on_s3(fake, COPY, saved)
            assert_on_s3(fake, f"{COPY}/other", other)
            assert "copy/old/x.distcp" not in fake.keys(BUCKET)
        else:
            assert_on_disk(target, saved)
            assert_on_disk(target / "other", other)
            assert not (target / "old/x.distcp").exists()

    def test_one_that_cannot_be_read(
        self, fake: FakeS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        saved = save()
        put_data(fake, "copy/", ".metadata", "__0_0.distcp")
        copy(RUN, tmp_path)

        copy(tmp_path, COPY, overwrite=True)

        assert_on_s3(fake, COPY, saved)
        assert "left in place" in caplog.text
        assert "copy/__0_0.distcp" in fake.keys(BUCKET)


class TestRefused:
    def test_damaged_in_the_bucket_or_on_the_way(self, fake: FakeS3, tmp_path: Path) -> None:
        save()
        key = data_key(fake, large=False)
        fake.inject(FlipByte(100), operation="GetObject", key=key, times=None)

        with pytest.raises(IntegrityError, match=f"s3://{BUCKET}/{key} differ"):
            copy(RUN, tmp_path)

        assert not (tmp_path / ".metadata").exists()
        assert copy(RUN, tmp_path, verify=False).verified == 0

    @pytest.mark.parametrize("large", [False, True], ids=["one request", "parts"])
    def test_damaged_on_the_disk(self, fake: FakeS3, tmp_path: Path, large: bool) -> None:
        save()
        copy(RUN, tmp_path)
        path = tmp_path / data_key(fake, large=large).removeprefix("run/")
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

        with pytest.raises(IntegrityError, match=f"{path} differ"):
            copy(tmp_path, COPY)

        assert not [key for key in fake.keys(BUCKET, "copy/") if key.endswith(path.name)]
        assert fake.uploads(BUCKET) == {}
        report = copy(tmp_path, COPY, verify=False)
        assert (report.verified, report.unverified > 0) == (0, True)

    def test_incomplete(self, fake: FakeS3, tmp_path: Path) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp", "__1_0.distcp")
        fake.write(BUCKET, "run/__1_0.distcp", b"short")

        with pytest.raises(IntegrityError, match=r"was not copied: cut short: __1_0\.distcp"):
            copy(RUN, tmp_path / "copy")

        assert not (tmp_path / "copy").exists()

    @pytest.mark.parametrize(
        ("source", "target", "error"),
        [
            ("{disk}/a", "{disk}/b", S3ConfigError),
            ("", COPY, S3ConfigError),
            (RUN, "", S3ConfigError),
            (RUN, "{disk}/a\0b", S3ConfigError),
            ("gs://b/run", COPY, InvalidS3UriError),
            (f"{RUN}/none", "{disk}/b", CheckpointNotFoundError),
            ("{disk}/none", COPY, CheckpointNotFoundError),
            ("s3://nowhere/run", "{disk}/b", S3Exception),
            (RUN, "{disk}/file", DiskError),
            (RUN, "{disk}/file/below", DiskError),
            (RUN, "/sys/folder", DiskError),
            ("{disk}/file/below", COPY, CheckpointNotFoundError),
            (RUN, f"{RUN}/", S3ConfigError),
            (f"{RUN}/__0_0.distcp", "{disk}/b", CheckpointNotFoundError),
            (f"{RUN}/.metadata", "{disk}/b", CheckpointNotFoundError),
            ("{disk}", COPY, CheckpointNotFoundError),
            ("{disk}/file", COPY, CheckpointNotFoundError),
        ],
    )
    def test_what_cannot_be(
        self, fake: FakeS3, tmp_path: Path, source: str, target: str, error: type[Exception]
    ) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp")
        (tmp_path / "file").touch()

        with pytest.raises(error):
            copy(source.format(disk=tmp_path), target.format(disk=tmp_path))

        assert not (tmp_path / "b").exists()

    def test_a_slash_at_the_end_is_nothing(self, fake: FakeS3, tmp_path: Path) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp")

        copy(f"{RUN}/", f"{tmp_path}/copy/")
        copy(f"{tmp_path}/copy/", f"{COPY}/")

        assert fake.keys(BUCKET, "copy/") == ["copy/.metadata", "copy/__0_0.distcp"]

    @pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="no disk that is always full")
    @pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
    def test_a_full_disk(
        self, fake: FakeS3, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp")
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key="*.distcp")
        with pytest.raises(S3Exception):
            copy(RUN, tmp_path)

        def opener(path: str, flags: int) -> int:
            full = path == f"{tmp_path}/{name}.partial"
            return own("/dev/full" if full else path, flags)

        with monkeypatch.context() as patch:
            patch.setattr(_places, "own", opener)
            patch.setattr(_movers, "own", opener)
            with pytest.raises(DiskError, match=rf"{name}\.partial: .*: make room, ") as raised:
                copy(RUN, tmp_path)

        assert isinstance(raised.value.__cause__, OSError)
        assert raised.value.errno == raised.value.__cause__.errno == errno.ENOSPC
        assert raised.value.filename == f"{tmp_path}/{name}.partial"
        assert not (tmp_path / name).exists()
        assert not (tmp_path / ".metadata").exists()
        copy(RUN, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {".metadata", "__0_0.distcp"}

    @pytest.mark.parametrize(
        "name", ["../out", "/etc/out", "a//b", "a/../../out", "a/./b", "x.partial"]
    )
    @pytest.mark.parametrize("up", [False, True], ids=["to a disk", "to s3"])
    def test_names_that_lead_out_of_the_folder(
        self, fake: FakeS3, tmp_path: Path, name: str, up: bool
    ) -> None:
        body = metadata_of({name: 10})
        folder = tmp_path / "below" / "folder"
        if up:
            folder.mkdir(parents=True)
            (folder / ".metadata").write_bytes(body)
            (folder / "../out").write_bytes(bytes(10))
        else:
            fake.write(BUCKET, "run/.metadata", body)
            fake.write(BUCKET, "run/" + name, bytes(10))

        with pytest.raises((InvalidS3UriError, CorruptMetadataError)):
            copy(folder, COPY) if up else copy(RUN, folder)

        assert fake.keys(BUCKET, "copy/") == []
        assert up or not folder.exists()
        assert not (tmp_path / "below/out").exists() or up

    def test_the_source_is_replaced_meanwhile(self, fake: FakeS3, tmp_path: Path) -> None:
        save()
        key = data_key(fake)

        def replace(_: Record) -> Fault:
            put_checkpoint(fake, "run/", "__0_0.distcp")
            return Fault()

        rule = fake.inject(Call(before=replace), operation="GetObject", key=key)

        with pytest.raises(CheckpointChangedError):
            copy(RUN, tmp_path)

        assert rule.struck
        assert not (tmp_path / ".metadata").exists()

    @pytest.mark.parametrize("cut", [False, True], ids=["rewritten", "cut short"])
    def test_a_file_changes_meanwhile(self, fake: FakeS3, tmp_path: Path, cut: bool) -> None:
        save_stock(tmp_path)
        [path] = tmp_path.glob("*.distcp")

        def change(_: Record) -> Fault:
            if cut:
                os.truncate(path, 6 * MiB)
            else:
                path.write_bytes(path.read_bytes())
            return Fault()

        fake.inject(Call(before=change), operation="UploadPart")

        with pytest.raises(CheckpointChangedError, match=str(tmp_path)):
            copy(tmp_path, COPY, s3client_config=ONE)

        assert s3dcp.list_checkpoints(COPY) == []
        assert fake.uploads(BUCKET) == {}

    def test_two_copies_to_one_folder(self, fake: FakeS3, tmp_path: Path) -> None:
        saved = save()
        rule = fake.inject(Stall(), operation="GetObject", key="*.distcp")

        async def both() -> None:
            first = asyncio.create_task(s3dcp.acopy(RUN, tmp_path))
            await asyncio.to_thread(rule.wait)
            with pytest.raises(CommitConflictError, match="wait until it has ended"):
                await s3dcp.acopy(RUN, tmp_path)
            rule.release()
            await first

        asyncio.run(both())
        assert_on_disk(tmp_path, saved)

    def test_two_copies_to_one_prefix(self, fake: FakeS3, tmp_path: Path) -> None:
        """The one that began later wins; the other finds out before it commits."""
        save(RUN, seed=1)
        copy(RUN, tmp_path / "first")
        saved = save(RUN, seed=2)
        copy(RUN, tmp_path / "second")
        rule = fake.inject(Stall(head=False), operation="UploadPart")

        async def both() -> None:
            first = asyncio.create_task(s3dcp.acopy(tmp_path / "first", COPY))
            await asyncio.to_thread(rule.wait)
            await s3dcp.acopy(tmp_path / "second", COPY)
            rule.release()
            with pytest.raises(CommitConflictError, match="Another process began to copy"):
                await first

        asyncio.run(both())
        assert_on_s3(fake, COPY, saved)

    def test_what_was_there_already_is_removed_meanwhile(self, fake: FakeS3) -> None:
        """By hand, or by a `gc` with too short a grace."""
        save()
        fake.inject(Refuse("AccessDenied"), operation="PutObject", key="copy/.metadata")
        with pytest.raises(S3Exception):
            copy(RUN, COPY)
        fake.forget()
        fake.delete(BUCKET, data_key(fake, "copy/"))
        [there] = [key for key in fake.keys(BUCKET, "copy/") if key.endswith(".distcp")]

        def remove(_: Record) -> Fault:
            fake.delete(BUCKET, there)
            return Fault()

        fake.inject(Call(before=remove), operation="CopyObject")

        with pytest.raises(CheckpointChangedError, match=there):
            copy(RUN, COPY)

        assert s3dcp.list_checkpoints(COPY) == []

    def test_its_claim_is_removed_meanwhile(self, fake: FakeS3) -> None:
        save()

        def remove(_: Record) -> Fault:
            fake.delete(BUCKET, "copy/.s3dcp-copy")
            return Fault()

        fake.inject(Call(before=remove), operation="CopyObject")

        with pytest.raises(CommitConflictError, match=r"or removed its \.s3dcp-copy"):
            copy(RUN, COPY)

    def test_an_object_that_is_gone(self, fake: FakeS3, tmp_path: Path) -> None:
        save()
        rule = fake.inject(Refuse("NoSuchKey"), operation="CopyObject", key="copy/*")

        with pytest.raises(CheckpointChangedError) as raised:
            copy(RUN, COPY)

        assert rule.struck
        assert isinstance(raised.value.__cause__, ObjectNotFoundError)


class TestChecksumsOfTheStore:
    """Of whole files, whose items have none, or which nobody sees as the store copies them."""

    DATA = bytes(range(256)) * (12 * MiB // 256)

    @pytest.fixture
    def disk(self, tmp_path: Path) -> Path:
        """Return a checkpoint whose only item has no checksum."""
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk/a").write_bytes(self.DATA)
        (tmp_path / "disk/.metadata").write_bytes(metadata_of({"a": len(self.DATA)}))
        return tmp_path / "disk"

    def test_damage_on_the_way(self, fake: FakeS3, disk: Path, tmp_path: Path) -> None:
        copy(disk, RUN)
        fake.inject(FlipByte(100), operation="GetObject", key="run/a", skip=1)

        with pytest.raises(IntegrityError, match=rf"a: bytes .* of s3://{BUCKET}/run/a differ"):
            copy(RUN, tmp_path / "copy", s3client_config=ONE)

        assert not (tmp_path / "copy/a").exists()
        assert copy(RUN, tmp_path / "copy").verified == 1
        assert (tmp_path / "copy/a").read_bytes() == self.DATA

    def test_damage_of_what_was_there_in_part(
        self, fake: FakeS3, disk: Path, tmp_path: Path
    ) -> None:
        copy(disk, RUN)
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key="run/a", skip=1)
        with pytest.raises(S3Exception):
            copy(RUN, tmp_path / "copy", s3client_config=ONE)
        with (tmp_path / "copy/a.partial").open("r+b") as file:
            file.write(b"damaged")

        with pytest.raises(IntegrityError):
            copy(RUN, tmp_path / "copy")

        assert copy(RUN, tmp_path / "copy").verified == 1
        assert (tmp_path / "copy/a").read_bytes() == self.DATA

    def test_damage_in_the_store(self, fake: FakeS3, disk: Path) -> None:
        """While it made its copy, which must not be there for a later run to find."""
        copy(disk, RUN)
        (disk / "a").write_bytes(self.DATA[::-1])
        copy(disk, f"{RUN}/damaged")

        def damage(_: Record) -> Fault:
            objects = fake._s3.buckets[BUCKET].objects
            objects["copy/a"] = objects["run/damaged/a"]
            return Fault()

        rule = fake.inject(Call(before=damage), operation="HeadObject", key="copy/a")

        with pytest.raises(IntegrityError, match=rf"s3://{BUCKET}/copy/a differ"):
            copy(RUN, COPY)

        assert rule.struck
        assert "copy/a" not in fake.keys(BUCKET)
        assert copy(RUN, COPY).verified == 1
        assert fake.read(BUCKET, "copy/a") == self.DATA

    def test_a_store_that_has_none(
        self, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with FakeS3(checksums=False) as fake:
            for name, value in fake.environ().items():
                monkeypatch.setenv(name, value)
            fake.create_bucket(BUCKET)

            for way in ((disk, RUN), (RUN, COPY), (COPY, tmp_path / "copy")):
                report = copy(*way)
                assert (report.copied_objects, report.verified, report.unverified) == (1, 0, 1)

    def test_no_more_requests_for_what_has_its_own(self, fake: FakeS3, tmp_path: Path) -> None:
        save()
        fake.forget()

        assert copy(RUN, tmp_path / "copy").verified == 9

        assert "HeadObject" not in fake.stats()

    def test_it_was_not_asked_for(self, fake: FakeS3, disk: Path, tmp_path: Path) -> None:
        for way in ((disk, RUN), (RUN, COPY), (COPY, tmp_path / "copy")):
            report = copy(*way, verify=False)
            assert (report.verified, report.unverified) == (0, 1)


class TestConditions:
    """Whether a store honours conditions decides whether one writer at a time is a rule there."""

    @pytest.mark.parametrize("honoured", [False, True])
    def test_a_copy_finds_out_before_its_commit(
        self,
        tmp_path: Path,
        honoured: bool,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with FakeS3(conditional_writes=honoured) as fake:
            for name, value in fake.environ().items():
                monkeypatch.setenv(name, value)
            fake.create_bucket(BUCKET)
            (tmp_path / "a").write_bytes(bytes(10))
            (tmp_path / ".metadata").write_bytes(metadata_of({"a": 10}))

            copy(tmp_path, COPY)
            copy(tmp_path, f"{COPY}/2")

            assert fake.keys(BUCKET) == [
                *("copy/.metadata", "copy/2/.metadata"),
                *("copy/2/a", "copy/a"),
            ]
            fake.check()
        assert caplog.text.count("conditional writes") == (0 if honoured else 1)
