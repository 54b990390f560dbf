"""Copies to S3 that were cut off: the parts that are up stay, if they are the file's own."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import s3dcp
from s3dcp import CommitConflictError, S3ClientConfig, S3Exception, copy
from s3dcp._checksums import crc_of, encoded
from s3dcp._client import S3Store
from s3dcp._store import Checksum
from s3dcp.testing import Call, Drop, FakeS3, Fault, Limits, Record, Refuse, Stall
from tests._catalogs import metadata_of
from tests._fakes import BUCKET, addressed
from tests._servers import Server
from tests._states import MiB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Any

NAME = "__0_0.distcp"
KEY = f"copy/{NAME}"
COPY = f"s3://{BUCKET}/copy"
SIZE = 17 * MiB  # four parts
PART = 5 * MiB
# One request after the other.
ONE = S3ClientConfig(max_connections=1, part_size=PART, memory_budget_bytes=2 * PART)
_LIMIT_S = 200
_COPY = """
import sys
from s3dcp import S3ClientConfig, copy
copy(*sys.argv[1:], s3client_config=S3ClientConfig(
    max_connections=1, part_size=5 << 20, memory_budget_bytes=10 << 20))
"""


@pytest.fixture(scope="module")
def shared_fake() -> Iterator[FakeS3]:
    with FakeS3(limits=Limits(max_keys=2)) as server:  # so that there are pages
        yield server


@pytest.fixture
def boto_s3(fake: FakeS3) -> Any:
    """A client of somebody else."""
    return Server(
        name="fake",
        endpoint_url=fake.endpoint_url,
        access_key=fake.access_key,
        secret_key=fake.secret_key,
        region=fake.region,
    ).boto()


@contextmanager
def fresh(**options: Any) -> Iterator[FakeS3]:
    """Serve from another server."""
    with FakeS3(**options) as server, addressed(server):
        yield server


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return a checkpoint on a disk: one file, whose items have no checksums."""
    (tmp_path / NAME).write_bytes(random.Random(1).randbytes(SIZE))
    (tmp_path / ".metadata").write_bytes(metadata_of({NAME: SIZE}))
    return tmp_path


def cut_off(fake: FakeS3, disk: Path, after: int = 2, config: S3ClientConfig = ONE) -> str:
    """Begin a copy that ends after some parts, and return the id of its upload."""
    fake.inject(Refuse("AccessDenied"), operation="UploadPart", skip=after)
    before = set(fake.uploads(BUCKET))
    with pytest.raises(S3Exception):
        copy(disk, COPY, s3client_config=config)
    [upload_id] = set(fake.uploads(BUCKET)) - before
    fake.forget()
    return upload_id


def sent(fake: FakeS3) -> list[int]:
    """Return the numbers of the parts that were sent."""
    return [
        int(each.query["partNumber"])
        for each in fake.requests
        if each.operation == "UploadPart" and each.status == 200
    ]


def put_part(boto: Any, upload_id: str, number: int, data: bytes) -> None:
    crc = Checksum("CRC64NVME", crc_of([memoryview(data)]))
    boto.upload_part(
        Bucket=BUCKET,
        Key=KEY,
        UploadId=upload_id,
        PartNumber=number,
        Body=data,
        ChecksumCRC64NVME=encoded(crc),
    )


def begin(boto: Any) -> str:
    answer = boto.create_multipart_upload(
        Bucket=BUCKET, Key=KEY, ChecksumAlgorithm="CRC64NVME", ChecksumType="FULL_OBJECT"
    )
    return str(answer["UploadId"])


def assert_copied(fake: FakeS3, disk: Path, left: tuple[str, ...] = ()) -> None:
    assert fake.read(BUCKET, KEY) == (disk / NAME).read_bytes()
    assert fake.keys(BUCKET) == ["copy/.metadata", KEY]
    assert sorted(fake.uploads(BUCKET)) == sorted(left)


class TestTheSameCopyAgain:
    def test_sends_only_what_is_missing(
        self, fake: FakeS3, disk: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cut_off(fake, disk)
        assert "unfinished uploads below s3://bkt/copy are kept (1)" in caplog.text
        told: list[int] = []

        report = copy(disk, COPY, progress=lambda n, _: told.append(n), s3client_config=ONE)

        assert sent(fake) == [3, 4]
        assert report.copied_bytes == SIZE - 2 * PART
        assert sum(told) == report.size_bytes == SIZE
        assert "CreateMultipartUpload" not in fake.stats()
        assert_copied(fake, disk)

    def test_after_a_kill(self, fake: FakeS3, disk: Path) -> None:
        killed: list[subprocess.Popen[bytes]] = []

        def kill(_: Record) -> Fault:
            killed[0].kill()
            return Drop(at="head")

        fake.inject(Call(before=kill), operation="UploadPart", skip=2)
        with subprocess.Popen([sys.executable, "-c", _COPY, str(disk), COPY]) as process:
            killed.append(process)
            assert process.wait(_LIMIT_S) == -signal.SIGKILL
        assert len(fake.uploads(BUCKET)) == 1
        fake.forget()

        copy(disk, COPY, s3client_config=ONE)

        assert sent(fake) == [3, 4]
        assert_copied(fake, disk)

    def test_has_only_the_end_to_do_where_all_parts_are_up(self, fake: FakeS3, disk: Path) -> None:
        fake.inject(Refuse("AccessDenied"), operation="CompleteMultipartUpload")
        with pytest.raises(S3Exception):
            copy(disk, COPY, s3client_config=ONE)
        fake.forget()

        report = copy(disk, COPY, s3client_config=ONE)

        assert (sent(fake), report.copied_bytes) == ([], 0)
        assert_copied(fake, disk)

    def test_uses_an_upload_that_has_nothing_yet(
        self, fake: FakeS3, disk: Path, boto_s3: Any
    ) -> None:
        """As a kill between its creation and its first part leaves it."""
        fake.inject(Refuse("AccessDenied"), operation="CreateMultipartUpload")
        with pytest.raises(S3Exception):
            copy(disk, COPY, s3client_config=ONE)
        begin(boto_s3)

        copy(disk, COPY, s3client_config=ONE)

        assert_copied(fake, disk)

    def test_has_the_parts_of_before_whatever_the_settings_now(
        self, fake: FakeS3, disk: Path
    ) -> None:
        cut_off(fake, disk)

        copy(disk, COPY, s3client_config=S3ClientConfig(part_size=6 * MiB, max_connections=2))

        assert sorted(sent(fake)) == [3, 4]
        assert_copied(fake, disk)

    def test_does_not_take_more_memory_for_it(self, fake: FakeS3, disk: Path) -> None:
        larger = S3ClientConfig(max_connections=1, part_size=2 * PART, memory_budget_bytes=4 * PART)
        upload_id = cut_off(fake, disk, after=1, config=larger)

        copy(disk, COPY, s3client_config=ONE)

        assert sent(fake) == [1, 2, 3, 4]
        assert_copied(fake, disk, left=(upload_id,))

    @pytest.mark.parametrize("md5", [False, True])
    def test_on_a_store_without_checksums(self, disk: Path, md5: bool) -> None:
        """What cannot be compared is sent again."""
        with fresh(checksums=False, md5_etags=md5) as fake:
            upload_id = cut_off(fake, disk)

            copy(disk, COPY, s3client_config=ONE)

            assert sent(fake) == ([3, 4] if md5 else [1, 2, 3, 4])
            assert_copied(fake, disk, left=() if md5 else (upload_id,))

    def test_on_rclone(
        self,
        server: Server,
        bucket: str,
        boto: Any,
        disk: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Whose ETags of parts are MD5 sums, and which knows no checksums."""
        real, numbers = S3Store.upload_part, []

        async def cut(
            self: S3Store, uri: Any, upload_id: str, number: int, *a: Any, **k: Any
        ) -> Any:
            numbers.append(number)
            if numbers == [1, 2, 3]:
                raise S3Exception("cut off")
            return await real(self, uri, upload_id, number, *a, **k)

        monkeypatch.setattr(S3Store, "upload_part", cut)
        target = f"s3://{bucket}/copy"
        with pytest.raises(S3Exception, match="cut off"):
            copy(disk, target, s3client_config=ONE)

        copy(disk, target, s3client_config=ONE)

        assert numbers == [1, 2, 3, 3, 4]
        body = boto.get_object(Bucket=bucket, Key=KEY)["Body"].read()
        assert body == (disk / NAME).read_bytes()

    def test_with_another_checksum_goes_on_with_that_of_before(
        self, fake: FakeS3, disk: Path
    ) -> None:
        """S3 refuses parts with another."""
        config = S3ClientConfig(
            max_connections=1, part_size=PART, memory_budget_bytes=2 * PART, checksum="CRC32C"
        )
        cut_off(fake, disk, config=config)

        copy(disk, COPY, s3client_config=ONE)

        assert sent(fake) == [3, 4]
        assert_copied(fake, disk)

    def test_starts_over_where_it_may_not_look(
        self, fake: FakeS3, disk: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        upload_id = cut_off(fake, disk)
        fake.inject(Refuse("AccessDenied"), operation="ListMultipartUploads")

        copy(disk, COPY, s3client_config=ONE)

        assert sent(fake) == [1, 2, 3, 4]
        assert "start over: " in caplog.text
        assert_copied(fake, disk, left=(upload_id,))

    def test_does_not_look_the_first_time(self, fake: FakeS3, disk: Path) -> None:
        copy(disk, COPY, s3client_config=ONE)

        assert "ListMultipartUploads" not in fake.stats()


class TestWhatIsNotOurs:
    @pytest.mark.parametrize("told", [False, True], ids=["in secret", "by its time"])
    def test_a_file_that_was_changed_in_between(self, fake: FakeS3, disk: Path, told: bool) -> None:
        upload_id = cut_off(fake, disk)
        path = disk / NAME
        before = path.stat()
        with path.open("r+b") as file:
            file.write(b"changed")
        if not told:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

        copy(disk, COPY, s3client_config=ONE)

        assert sent(fake) == [1, 2, 3, 4]
        assert_copied(fake, disk, left=(upload_id,))

    def test_another_upload_of_the_same_key(self, fake: FakeS3, disk: Path, boto_s3: Any) -> None:
        """However much of it there is: its bytes are others, or its parts are."""
        cut_off(fake, disk)
        data = (disk / NAME).read_bytes()
        foreign, uneven = begin(boto_s3), begin(boto_s3)
        for number in range(1, 4):
            put_part(boto_s3, foreign, number, bytes(PART))
        put_part(boto_s3, uneven, 1, data[: 5 * PART // 2])
        put_part(boto_s3, uneven, 2, data[5 * PART // 2 : SIZE - MiB])
        fake.forget()

        copy(disk, COPY, s3client_config=ONE)

        assert sent(fake) == [3, 4]
        assert_copied(fake, disk, left=(foreign, uneven))

    def test_of_several_the_one_with_the_most(self, fake: FakeS3, disk: Path, boto_s3: Any) -> None:
        less, more = begin(boto_s3), begin(boto_s3)
        cut_off(fake, disk, after=1)
        data = (disk / NAME).read_bytes()
        put_part(boto_s3, less, 1, data[:PART])
        for number in (1, 3):
            put_part(boto_s3, more, number, data[(number - 1) * PART : number * PART])
        [own] = set(fake.uploads(BUCKET)) - {less, more}
        fake.forget()

        copy(disk, COPY, s3client_config=ONE)

        assert sent(fake) == [2, 4]
        assert_copied(fake, disk, left=(less, own))


class TestEnds:
    def test_what_was_refused_as_a_whole_is_aborted(self, fake: FakeS3, disk: Path) -> None:
        """Else every later run would go on with it, and be refused again."""
        fake.inject(Refuse("InvalidPart"), operation="CompleteMultipartUpload")

        with pytest.raises(S3Exception, match="InvalidPart"):
            copy(disk, COPY, s3client_config=ONE)

        assert fake.uploads(BUCKET) == {}

    def test_without_a_part_it_is_aborted(self, fake: FakeS3, disk: Path) -> None:
        fake.inject(Refuse("AccessDenied"), operation="UploadPart")

        with pytest.raises(S3Exception):
            copy(disk, COPY, s3client_config=ONE)

        assert fake.uploads(BUCKET) == {}

    def test_two_runs_of_one_copy(self, fake: FakeS3, disk: Path) -> None:
        """The second goes on with what the first is sending, and the first finds out."""
        rule = fake.inject(Stall(head=False), operation="UploadPart", skip=2)

        async def both() -> None:
            first = asyncio.create_task(s3dcp.acopy(disk, COPY, s3client_config=ONE))
            await asyncio.to_thread(rule.wait)
            config = S3ClientConfig(max_connections=2, part_size=PART)
            await s3dcp.acopy(disk, COPY, s3client_config=config)
            rule.release()
            with pytest.raises(CommitConflictError, match="Somebody else has ended"):
                await first

        asyncio.run(both())
        assert_copied(fake, disk)

    def test_somebody_aborts_it(self, fake: FakeS3, disk: Path) -> None:
        def abort(_: Record) -> Fault:
            fake._s3.buckets[BUCKET].uploads.clear()
            return Fault()

        fake.inject(Call(before=abort), operation="UploadPart", skip=1)
        with pytest.raises(CommitConflictError, match="Copy again"):
            copy(disk, COPY, s3client_config=ONE)

        copy(disk, COPY, s3client_config=ONE)
        assert_copied(fake, disk)
