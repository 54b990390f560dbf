"""Checkpoints under a URI, on a server whose listings have pages of ten."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import s3dcp
from s3dcp import (
    AccessDeniedError,
    BucketNotFoundError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    CorruptMetadataError,
    S3Client,
    S3StorageWriter,
)
from s3dcp._flow import Channel
from s3dcp._keys import S3Uri, parse_s3_uri
from s3dcp._verifying import Verdict, inspect, verify
from s3dcp.testing import Call, FakeS3, Limits, Refuse, internal_error, lost_response
from tests._catalogs import metadata_of, put_checkpoint, put_data
from tests._fakes import BUCKET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests._servers import Server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

KiB, MiB = 1 << 10, 1 << 20
RUN = f"s3://{BUCKET}/run"


@pytest.fixture(scope="module")
def shared_fake() -> Iterator[FakeS3]:
    """A server of short pages and small parts."""
    with FakeS3(limits=Limits(min_part_bytes=KiB, max_keys=10)) as server:
        yield server


def save(uri: str, state: dict[str, Any], **kwargs: Any) -> None:
    dcp.save(state, storage_writer=S3StorageWriter(None, uri, **kwargs), no_dist=True)


def sent(server: FakeS3, operation: str) -> list[str]:
    return [each.key for each in server.requests if each.operation == operation]


class TestList:
    def test_what_was_saved(self, fake: FakeS3) -> None:
        save(f"{RUN}/step-5", {"w": torch.ones(1000), "b": torch.zeros(2), "note": "n"})

        [found] = s3dcp.list_checkpoints(f"s3://{BUCKET}")

        data = [key for key in fake.keys(BUCKET) if key.endswith(".distcp")]
        assert found.uri == f"{RUN}/step-5"
        assert (found.step, found.ranks, found.objects, found.tensors) == (5, 1, 1, 2)
        assert found.size_bytes == sum(len(fake.read(BUCKET, key)) for key in data)
        assert found.complete
        assert found.committed_at is not None

    def test_every_depth_oldest_first(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp", days=3)
        put_checkpoint(fake, "run/a/b/step-2/", "left/__0_0.distcp", days=1)
        put_checkpoint(fake, "run/step-9/", *(f"__{n}_0.distcp" for n in range(12)), days=2)
        put_checkpoint(fake, "runner/", "__0_0.distcp")
        put_data(fake, "run/step-10/", "__0_0.distcp")  # a save that has not been committed

        found = s3dcp.list_checkpoints(f"{RUN}/")

        assert [(each.uri, each.objects) for each in found] == [
            (RUN, 1),
            (f"{RUN}/step-9", 12),
            (f"{RUN}/a/b/step-2", 1),
        ]
        assert all(each.complete for each in found)
        assert [each.ranks for each in found] == [1, 12, 1]

    def test_ranks_that_saved_without_collectives_are_one(self, fake: FakeS3) -> None:
        for rank in range(3):
            put_checkpoint(fake, "run/", f"__{rank}_0.distcp", commit=f"__{rank}.metadata")

        [found] = s3dcp.list_checkpoints(RUN)

        assert (found.uri, found.ranks, found.objects, found.tensors) == (RUN, 3, 3, 3)
        assert found.complete
        fake.delete(BUCKET, "run/__1.metadata")
        assert s3dcp.list_checkpoints(RUN)[0].problem == "rank 1 did not commit"

    def test_damage(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/a/", "__0_0.distcp", days=5)
        fake.delete(BUCKET, "run/a/__0_0.distcp")
        put_checkpoint(fake, "run/b/", "__0_0.distcp", days=4)
        fake.write(BUCKET, "run/b/__0_0.distcp", bytes(9))
        put_checkpoint(fake, "run/c/", "__0_0.distcp", days=3)
        fake.write(BUCKET, "run/d/.metadata", b"no pickle")
        fake.write(BUCKET, "run/e/.metadata", metadata_of({"../c/__0_0.distcp": 1}))

        found = {each.uri[-1]: each.problem for each in s3dcp.list_checkpoints(RUN)}

        assert found["a"] == "missing: run/a/__0_0.distcp"
        assert found["b"] == "cut short: run/b/__0_0.distcp"
        assert found["c"] is None
        assert "is truncated or no checkpoint metadata" in str(found["d"])
        assert "'.' and '..' are not allowed" in str(found["e"])

    def test_nothing_there(self, fake: FakeS3) -> None:
        assert s3dcp.list_checkpoints(RUN) == []
        with pytest.raises(BucketNotFoundError):
            s3dcp.list_checkpoints("s3://nowhere/run")

    def test_requests_are_repeated(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp")
        fake.inject(internal_error(), operation="ListObjectsV2")
        fake.inject(internal_error(), operation="GetObject")

        assert len(s3dcp.list_checkpoints(RUN)) == 1

    def test_a_checkpoint_that_is_replaced_meanwhile(self, fake: FakeS3) -> None:
        """Its new commit is read after the listing that has its old objects."""
        put_checkpoint(fake, "run/", "old.distcp")

        def replace() -> None:
            put_checkpoint(fake, "run/", "new.distcp", days=0)
            fake.delete(BUCKET, "run/old.distcp")

        fake.inject(_before(replace), operation="GetObject")

        [found] = s3dcp.list_checkpoints(RUN)

        assert found.complete
        assert found.objects == 1

    def test_a_checkpoint_that_is_deleted_meanwhile(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp")
        fake.inject(_before(lambda: fake.delete(BUCKET, "run/.metadata")), operation="GetObject")

        assert s3dcp.list_checkpoints(RUN) == []


class TestLatest:
    def test_by_time_then_by_step(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/step-30/", "__0_0.distcp", days=3)
        for step in (9, 10, 2):
            put_checkpoint(fake, f"run/step-{step}/", "__0_0.distcp", days=1)

        found = s3dcp.latest(RUN)

        assert found is not None
        assert found.uri == f"{RUN}/step-10"

    def test_incomplete_ones_are_passed_over(
        self, fake: FakeS3, caplog: pytest.LogCaptureFixture
    ) -> None:
        for step in (1, 2, 3):
            put_checkpoint(fake, f"run/step-{step}/", "__0_0.distcp", days=9 - step)
        fake.write(BUCKET, "run/step-4/.metadata", b"no pickle")
        fake.delete(BUCKET, "run/step-3/__0_0.distcp")

        found = s3dcp.latest(RUN)

        assert found is not None
        assert found.uri == f"{RUN}/step-2"
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
        # The metadata of older ones is not read.
        assert "run/step-1/.metadata" not in sent(fake, "GetObject")

    def test_none(self, fake: FakeS3) -> None:
        put_data(fake, "run/step-1/", "__0_0.distcp")

        assert s3dcp.latest(RUN) is None

    def test_it_can_be_loaded(self, fake: FakeS3) -> None:
        save(f"{RUN}/step-1", {"w": torch.ones(3)})
        found = s3dcp.latest(RUN)
        assert found is not None
        state = {"w": torch.zeros(3)}

        dcp.load(state, storage_reader=s3dcp.S3StorageReader(None, found.uri), no_dist=True)

        assert state["w"].tolist() == [1, 1, 1]


class TestDelete:
    def test_the_commit_goes_first_and_nothing_else_goes(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/", "a/__0_0.distcp", "b/__1_0.distcp")
        put_checkpoint(fake, "run/a/", "__0_1.distcp")
        others = ["run/__9_9.distcp", "run/notes.txt", "run2/__0_0.distcp"]
        put_data(fake, "", *others)

        s3dcp.delete(RUN)

        kept = [*others, "run/a/.metadata", "run/a/__0_1.distcp"]
        assert fake.keys(BUCKET) == sorted(kept)
        assert sent(fake, "DeleteObject")[0] == "run/.metadata"
        assert len(sent(fake, "DeleteObject")) == 3

    def test_what_another_checkpoint_names_stays(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "", "run/step-1/shared.distcp", days=3)
        put_checkpoint(fake, "run/step-1/", "shared.distcp", "in/below.distcp", "own.distcp")
        put_checkpoint(fake, "run/step-1/in/", "below.distcp")

        s3dcp.delete(f"{RUN}/step-1")

        assert fake.keys(BUCKET) == [
            ".metadata",
            "run/step-1/in/.metadata",
            "run/step-1/in/below.distcp",
            "run/step-1/shared.distcp",
        ]

    def test_all_ranks_that_saved_without_collectives(self, fake: FakeS3) -> None:
        for rank in range(3):
            put_checkpoint(fake, "run/", f"__{rank}_0.distcp", commit=f"__{rank}.metadata")

        s3dcp.delete(RUN)

        assert fake.keys(BUCKET) == []
        assert sent(fake, "DeleteObject")[:3] == [f"run/__{rank}.metadata" for rank in range(3)]

    def test_a_forged_one_takes_no_other_with_it(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/step-1/", "__0_0.distcp")
        put_checkpoint(fake, "run/", "step-1/.metadata", "step-1/__0_0.distcp")
        put_checkpoint(fake, "run/step-1/", "__0_0.distcp")  # which the line above overwrote

        s3dcp.delete(RUN)

        assert fake.keys(BUCKET) == ["run/step-1/.metadata", "run/step-1/__0_0.distcp"]

    def test_none_there(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/step-1/", "__0_0.distcp")

        with pytest.raises(CheckpointNotFoundError, match=r"bkt/run: there is no \.metadata"):
            s3dcp.delete(RUN)
        assert len(fake.keys(BUCKET)) == 2

    @pytest.mark.parametrize("name", ["step-1", "step-1/in"])
    def test_one_that_cannot_be_read(self, fake: FakeS3, name: str) -> None:
        put_checkpoint(fake, f"run/{name}/", "__0_0.distcp")
        put_data(fake, "run/step-1/", ".metadata", "__0_0.distcp")
        before = fake.keys(BUCKET)

        with pytest.raises(CorruptMetadataError, match="Nothing was deleted"):
            s3dcp.delete(f"{RUN}/{name}")
        assert fake.keys(BUCKET) == before

    @pytest.mark.parametrize("conditional", [True, None])
    def test_lost_answers(self, fake: FakeS3, conditional: bool | None) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp", "__1_0.distcp")
        fake.inject(lost_response(), operation="DeleteObject", times=2)

        s3dcp.delete(RUN, s3client_config=s3dcp.S3ClientConfig(conditional_writes=conditional))

        assert fake.keys(BUCKET) == []

    def test_one_that_is_replaced_meanwhile_stays(
        self, fake: FakeS3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put_checkpoint(fake, "run/", "old.distcp")
        fake.inject(
            _before(lambda: put_checkpoint(fake, "run/", "new.distcp", days=0)),
            operation="DeleteObject",
        )
        config = s3dcp.S3ClientConfig(conditional_writes=True)

        with pytest.raises(CheckpointChangedError, match="delete it again"):
            s3dcp.delete(RUN, s3client_config=config)

        assert fake.keys(BUCKET) == ["run/.metadata", "run/new.distcp", "run/old.distcp"]

    def test_interrupted_it_leaves_no_checkpoint_and_gc_the_rest(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/", *(f"__{n}_0.distcp" for n in range(30)))
        fake.inject(Refuse("AccessDenied", status=403), operation="DeleteObject", skip=9, times=1)

        with pytest.raises(AccessDeniedError):
            s3dcp.delete(RUN)

        assert s3dcp.list_checkpoints(RUN) == []
        assert fake.keys(BUCKET)
        s3dcp.gc(RUN, dry_run=False)
        assert fake.keys(BUCKET) == []


class TestGc:
    def test_it_tells_and_then_does(self, fake: FakeS3) -> None:
        for day in range(1, 6):
            put_checkpoint(fake, f"run/step-{day}/", "__0_0.distcp", days=9 - day)
        put_data(fake, "run/step-6/", "__0_0.lost.distcp")
        put_data(fake, "run/step-7/", "__0_0.saving.distcp", days=0.9)
        before = fake.keys(BUCKET)

        told = s3dcp.gc(RUN, keep=2)

        assert fake.keys(BUCKET) == before
        assert [each.step for each in told.checkpoints] == [3, 2, 1]
        assert [each.key for each in told.objects] == ["run/step-6/__0_0.lost.distcp"]
        assert told.unreadable == ()
        assert s3dcp.gc(RUN, keep=2, dry_run=False) == told
        assert fake.keys(BUCKET) == [
            "run/step-4/.metadata",
            "run/step-4/__0_0.distcp",
            "run/step-5/.metadata",
            "run/step-5/__0_0.distcp",
            "run/step-7/__0_0.saving.distcp",
        ]
        assert s3dcp.gc(RUN, keep=2) == s3dcp.Garbage(checkpoints=(), objects=(), unreadable=())

    def test_what_a_failed_save_left(self, fake: FakeS3) -> None:
        """Saved over a checkpoint, which stays; every object of both saves is one or the other."""
        save(RUN, {"w": torch.ones(4)})
        whole = fake.keys(BUCKET)
        fake.inject(Refuse("AccessDenied", status=403), operation="PutObject", key="*/.metadata")
        fake.inject(Refuse("AccessDenied", status=403), operation="DeleteObject", times=None)
        with pytest.raises(BaseException, match="AccessDenied"):
            save(RUN, {"w": torch.zeros(4)})
        fake.forget()
        assert len(fake.keys(BUCKET)) == 3

        assert s3dcp.gc(RUN, dry_run=False).objects == ()  # it has just been written
        found = s3dcp.gc(RUN, dry_run=False, grace_s=0)

        assert len(found.objects) == 1
        assert fake.keys(BUCKET) == whole

    def test_data_of_a_checkpoint_above_is_not_touched(self, fake: FakeS3) -> None:
        """A prefix strategy puts it into folders, which somebody may take for runs."""
        put_checkpoint(fake, "run/step-1/", "left/__0_0.distcp", "right/__1_0.distcp")
        put_checkpoint(fake, "all/", "left/__0_0.distcp", commit="__0.metadata")

        for uri in (f"{RUN}/step-1/left", f"s3://{BUCKET}/all/left"):
            assert s3dcp.gc(uri, dry_run=False).objects == ()
        assert len(fake.keys(BUCKET)) == 5

    def test_above_may_be_out_of_bounds(
        self, fake: FakeS3, caplog: pytest.LogCaptureFixture
    ) -> None:
        put_data(fake, "team/run/", "__0_0.distcp")
        fake.inject(
            Refuse("AccessDenied", status=403),
            operation="ListObjectsV2",
            where=lambda request: not request.query["prefix"].startswith("team/"),
            times=None,
        )

        found = s3dcp.gc(f"s3://{BUCKET}/team/run")

        assert [each.key for each in found.objects] == ["team/run/__0_0.distcp"]
        assert "not looked for checkpoints in s3://bkt/" in caplog.text

    def test_metadata_that_cannot_be_read_protects_what_is_below(self, fake: FakeS3) -> None:
        put_data(fake, "run/a/", ".metadata", "__0_0.distcp", "in/__1_0.distcp")
        put_data(fake, "run/b/", "__0_0.distcp")
        put_checkpoint(fake, "run/a/step-1/", "__0_0.distcp", days=9)
        put_checkpoint(fake, "run/step-2/", "__0_0.distcp", days=1)
        before = fake.keys(BUCKET)

        found = s3dcp.gc(RUN, keep=1, dry_run=False)

        assert [each.uri for each in found.unreadable] == [f"{RUN}/a"]
        assert [each.key for each in found.objects] == ["run/b/__0_0.distcp"]
        assert found.checkpoints == ()
        assert set(before) - set(fake.keys(BUCKET)) == {"run/b/__0_0.distcp"}

    def test_what_is_committed_while_it_looks_stays(self, fake: FakeS3) -> None:
        """A save took longer than the grace: its commit comes between the look and the deletion."""
        put_data(fake, "run/step-1/", "__0_0.distcp", "__0_1.distcp")
        fake.inject(
            _before(lambda: put_checkpoint(fake, "run/step-1/", "__0_0.distcp")),
            operation="ListObjectsV2",
            where=lambda request: request.query["prefix"] == "run/",
            skip=1,
        )

        found = s3dcp.gc(RUN, dry_run=False)

        assert [each.key for each in found.objects] == ["run/step-1/__0_1.distcp"]
        assert fake.keys(BUCKET) == ["run/step-1/.metadata", "run/step-1/__0_0.distcp"]

    def test_an_old_checkpoint_that_is_saved_anew_meanwhile_stays(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/step-1/", "old.distcp", days=3)
        put_checkpoint(fake, "run/step-2/", "__0_0.distcp", days=2)
        fake.inject(
            _before(lambda: put_checkpoint(fake, "run/step-1/", "new.distcp", days=0)),
            operation="ListObjectsV2",
            where=lambda request: request.query["prefix"] == "run/",
            skip=1,
        )

        found = s3dcp.gc(RUN, keep=1, dry_run=False)

        assert found.checkpoints == ()
        assert "run/step-1/new.distcp" in fake.keys(BUCKET)
        assert len(s3dcp.list_checkpoints(RUN)) == 2

    def test_broken_off_anywhere_it_leaves_whole_checkpoints(self, fake: FakeS3) -> None:
        names = ["__0_0.distcp", "__1_0.distcp"]
        for broken_at in range(12):
            for step in range(4):
                put_checkpoint(fake, f"run/step-{step}/", *names, days=9 - step)
            put_data(fake, "run/step-9/", "__0_0.distcp")
            rule = fake.inject(
                Refuse("AccessDenied", status=403), operation="DeleteObject", skip=broken_at
            )
            try:
                s3dcp.gc(RUN, keep=1, dry_run=False)
            except AccessDeniedError:
                assert broken_at < 10  # three checkpoints of three objects each, and an orphan
            else:
                assert broken_at >= 10
                assert fake.keys(BUCKET) == [f"run/step-3/{name}" for name in [".metadata", *names]]
            left = s3dcp.list_checkpoints(RUN)
            assert left[-1].step == 3
            assert all(each.complete for each in left)
            fake.rules.remove(rule)
            s3dcp.gc(RUN, keep=1, dry_run=False)
            assert len(fake.keys(BUCKET)) == 3

    @pytest.mark.parametrize(
        "wrong",
        [
            *({"keep": keep} for keep in (0, -1, True, 1.5, "3")),
            *({"grace_s": grace_s} for grace_s in (-1, 1e15, float("nan"), "24h")),
            *({"dry_run": dry_run} for dry_run in (None, 0, "no")),
        ],
    )
    def test_arguments_that_cannot_be_meant(self, fake: FakeS3, wrong: dict[str, Any]) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp")

        with pytest.raises(s3dcp.S3ConfigError, match="must be"):
            s3dcp.gc(RUN, **{"dry_run": False} | wrong)
        assert len(fake.keys(BUCKET)) == 2

    def test_commits_are_read_once(self, fake: FakeS3) -> None:
        for step in range(3):
            put_checkpoint(fake, f"run/step-{step}/", "__0_0.distcp", days=9 - step)

        s3dcp.gc(RUN, keep=1, dry_run=False)

        read = sent(fake, "GetObject")
        assert sorted(read) == [f"run/step-{step}/.metadata" for step in range(3)]


async def start_upload(channel: Channel, uri: S3Uri) -> str:
    return await channel.store.create_upload(uri, checksum=None)


class TestUploads:
    def test_old_ones_are_aborted(self, fake: FakeS3) -> None:
        for n in range(12):
            _call(start_upload, f"{RUN}/{n}.distcp")

        assert s3dcp.abort_uploads(RUN) == []  # they have just been started
        told = s3dcp.abort_uploads(RUN, grace_s=0)
        assert len(fake.uploads(BUCKET)) == 12
        assert {each.upload_id: each.key for each in told} == fake.uploads(BUCKET)
        assert s3dcp.abort_uploads(f"{RUN}ner", grace_s=0, dry_run=False) == []
        fake.inject(lost_response(), operation="AbortMultipartUpload")

        assert s3dcp.abort_uploads(RUN, grace_s=0, dry_run=False) == told

        assert fake.uploads(BUCKET) == {}

    def test_there_are_none(self, s3: Server, bucket: str) -> None:
        """Which rclone answers with an error."""
        assert s3dcp.abort_uploads(f"s3://{bucket}/run", grace_s=0, dry_run=False) == []


class TestInspect:
    def test_entries(self, fake: FakeS3) -> None:
        state = {
            "model": {"w": torch.ones(300, 7), "b": torch.zeros((), dtype=torch.bfloat16)},
            "step": 5,
        }
        save(RUN, state, thread_count=3)

        found = {entry.name: entry for entry in _call(inspect, RUN)}

        assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
            "model.b": ((), "bfloat16"),
            "model.w": ((300, 7), "float32"),
            "step": (None, None),
        }
        [empty] = {key for key in fake.keys(BUCKET) if key.endswith(".distcp")} - {
            key for entry in found.values() for key in entry.keys
        }
        assert fake.read(BUCKET, empty) == b""  # the third thread had no item
        assert found["model.w"].size_bytes > 300 * 7 * 4

    def test_pieces_of_ranks_that_committed_by_themselves(self, fake: FakeS3) -> None:
        for rank in range(2):
            fake.write(BUCKET, f"run/__{rank}.metadata", metadata_of({"shard": 10}))

        [entry] = _call(inspect, RUN)

        assert len(entry.pieces) == 2
        assert entry.size_bytes == 20

    def test_no_checkpoint(self, fake: FakeS3) -> None:
        with pytest.raises(CheckpointNotFoundError):
            _call(inspect, RUN)


class TestVerify:
    def verify(self, **kwargs: Any) -> Verdict:
        verdict: Verdict = _call(verify, RUN, budget_bytes=kwargs.pop("budget", MiB), **kwargs)
        return verdict

    def test_what_was_saved_is_whole(self, fake: FakeS3) -> None:
        state = {f"w{n}": torch.rand(1000) for n in range(20)}
        save(RUN, {**state, "large": torch.rand(5 * MiB), "note": "n"}, thread_count=2)
        seen: list[tuple[int, int]] = []

        verdict = self.verify(
            budget=20 * MiB, progress=lambda count, total: seen.append((count, total))
        )

        assert verdict.problems == ()
        assert (verdict.objects, verdict.verified, verdict.unverified) == (2, 22, 0)
        size = sum(len(fake.read(BUCKET, k)) for k in fake.keys(BUCKET) if k.endswith(".distcp"))
        assert verdict.size_bytes == size == sum(count for count, _ in seen)
        assert {total for _, total in seen} == {size}
        largest = max(each.headers["range"] for each in fake.requests if "range" in each.headers)
        first, last = map(int, largest.removeprefix("bytes=").split("-"))
        assert last - first < 8 * MiB

    def test_every_flipped_byte_is_found(self, fake: FakeS3) -> None:
        save(RUN, {"a": torch.rand(100), "b": torch.rand(100)})
        [key] = [key for key in fake.keys(BUCKET) if key.endswith(".distcp")]
        whole = fake.read(BUCKET, key)
        for position in range(0, len(whole), 97):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            fake.write(BUCKET, key, bytes(damaged))

            [problem] = self.verify().problems

            assert f"of s3://{BUCKET}/{key}, of" in problem
            assert "differ from those that were saved" in problem

    def test_missing_and_short_objects(self, fake: FakeS3) -> None:
        save(RUN, {f"w{n}": torch.rand(100) for n in range(3)}, single_file_per_rank=False)
        gone, short, _ = (key for key in fake.keys(BUCKET) if key.endswith(".distcp"))
        size = len(fake.read(BUCKET, short))
        fake.delete(BUCKET, gone)
        fake.write(BUCKET, short, fake.read(BUCKET, short)[:-1])

        verdict = self.verify()

        assert verdict.problems == (
            f"s3://{BUCKET}/{gone} is missing",
            f"s3://{BUCKET}/{short} has {size - 1} bytes, not {size}",
        )
        assert verdict.verified == 1

    def test_without_checksums_sizes_are_checked(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp", "__1_0.distcp")

        verdict = self.verify()

        assert verdict.problems == ()
        assert (verdict.verified, verdict.unverified, verdict.size_bytes) == (0, 2, 0)

    def test_metadata_that_cannot_be_read_is_damage(self, fake: FakeS3) -> None:
        fake.write(BUCKET, "run/.metadata", b"no pickle")

        [problem] = self.verify().problems

        assert "no checkpoint metadata" in problem

    def test_no_checkpoint(self, fake: FakeS3) -> None:
        with pytest.raises(CheckpointNotFoundError):
            self.verify()

    def test_an_object_is_deleted_meanwhile(self, fake: FakeS3) -> None:
        save(RUN, {"w": torch.rand(100)})
        [key] = [key for key in fake.keys(BUCKET) if key.endswith(".distcp")]
        fake.inject(
            _before(lambda: fake.delete(BUCKET, key)), operation="GetObject", key="*.distcp"
        )

        with pytest.raises(CheckpointChangedError, match="verify again"):
            self.verify()

    @pytest.mark.parametrize(("operation", "skip"), [("GetObject", 0), ("ListObjectsV2", 3)])
    def test_it_is_replaced_meanwhile(self, fake: FakeS3, operation: str, skip: int) -> None:
        """Before its commit is read it is the new one that counts; after that, nothing is known."""
        put_checkpoint(fake, "run/", "old.distcp")

        def replace() -> None:
            put_checkpoint(fake, "run/", "new.distcp", days=0)
            fake.delete(BUCKET, "run/old.distcp")

        fake.inject(_before(replace), operation=operation, skip=skip)

        if operation == "GetObject":
            assert self.verify().problems == ()
        else:
            with pytest.raises(CheckpointChangedError, match="verify again"):
                self.verify()


def _call(function: Callable[..., Any], uri: str, **kwargs: Any) -> Any:
    return S3Client().call(function, parse_s3_uri(uri), **kwargs)


def _before(function: Callable[[], None]) -> Call:
    """Have something happen when a request has come, and before it takes effect."""
    return Call(before=lambda _: function())
