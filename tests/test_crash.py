"""A save that is killed with SIGKILL at any request leaves the old checkpoint or the new one.

Every test first lets a save be, to learn how many requests it makes, and then kills one at each of
them: every such kill is a subtest. `tests._crash` says how it is done.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp

from s3dcp import CheckpointNotFoundError, S3StorageReader
from s3dcp._metadata import load_metadata
from s3dcp.testing import FakeS3
from tests._crash import (
    Effects,
    FakeTarget,
    Job,
    Kill,
    Moment,
    Outcome,
    RcloneTarget,
    Target,
    performed,
    run,
)
from tests._servers import Server, empty_bucket
from tests._states import StateDict, assert_same, blank

# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

MOMENTS: tuple[Moment, ...] = ("before", "middle", "after")
OLD, NEW, NEXT = 1, 2, 3  # what states are made of


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeS3]:
    with FakeS3() as server:
        yield server


@pytest.fixture
def fake_target(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch, bucket_name: str
) -> Iterator[FakeTarget]:
    for name, value in fake.environ().items():
        monkeypatch.setenv(name, value)
    fake.create_bucket(bucket_name)
    yield FakeTarget(fake)
    fake.check()
    fake.forget()


@pytest.fixture(scope="module")
def _rclone_boto(rclone: Server) -> Iterator[Any]:
    client = rclone.boto()
    yield client
    client.close()


@pytest.fixture
def rclone_target(
    rclone: Server, _rclone_boto: Any, monkeypatch: pytest.MonkeyPatch, bucket_name: str
) -> Iterator[RcloneTarget]:
    for name, value in rclone.environ().items():
        monkeypatch.setenv(name, value)
    _rclone_boto.create_bucket(Bucket=bucket_name)
    yield RcloneTarget(rclone.environ(), _rclone_boto)
    empty_bucket(_rclone_boto, bucket_name)


@pytest.fixture
def bucket_name() -> str:
    return f"crash-{secrets.token_hex(6)}"


@pytest.fixture(params=["fake", "rclone"])
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.getfixturevalue(f"{request.param}_target")
    return found


class Place:
    """A checkpoint's path, and what lies under it.

    Args:
        target: The server.
        bucket: The bucket, of which every place has a folder.
        name: The folder.
    """

    def __init__(self, target: Target, bucket: str, name: str) -> None:
        self.uri = f"s3://{bucket}/{name}"
        self._target = target
        self._bucket = bucket
        self._folder = f"{name}/"
        self.commit = f"{name}/.metadata"

    def objects(self) -> set[str]:
        return {key for key in self._target.keys(self._bucket) if key.startswith(self._folder)}

    def uploads(self) -> list[str]:
        return [key for key in self._target.uploads(self._bucket) if key.startswith(self._folder)]

    def named(self) -> set[str]:
        """The objects of the checkpoint: its `.metadata`, and all that it names."""
        if self.commit not in self.objects():
            return set()
        body = self._target.read(self._bucket, self.commit)
        infos = load_metadata(body, source=self.commit).storage_data.values()
        return {self.commit} | {self._folder + info.relative_path for info in infos}

    def orphans(self) -> set[str]:
        """What nothing refers to, beside the uploads: a tool may remove it at any time."""
        return self.objects() - self.named()

    def load(self, like: StateDict) -> StateDict:
        found: StateDict = blank(like)
        dcp.load(found, storage_reader=S3StorageReader(None, self.uri), no_dist=True)
        return found

    def assert_absent(self, like: StateDict) -> None:
        with pytest.raises(CheckpointNotFoundError):
            S3StorageReader(None, self.uri).read_metadata()
        with pytest.raises(dcp.CheckpointException, match="No checkpoint at"):
            self.load(like)


def save_and_check(
    place: Place, target: Target, new: Job, kill: Kill | None = None, victim: int = 0
) -> list[Outcome]:
    """Save in other processes, of which one may be killed, and check all that is left."""
    before, old = place.objects(), place.named()
    outcomes = run(target, new, kill, victim)
    effects = Effects()
    for outcome in outcomes:
        effects.add(performed(outcome, kill))
    committed = place.commit in effects.written

    if committed:
        assert_same(place.load(new.state()), new.state())
    elif old:
        assert_same(place.load(new.state()), replace(new, seed=OLD).state())
    else:
        place.assert_absent(new.state())

    assert place.objects() == (before | effects.written) - effects.deleted
    assert place.uploads() == sorted(effects.uploads)
    orphans = old - {place.commit} - effects.deleted if committed else effects.written
    assert place.orphans() == orphans

    again = replace(new, seed=NEXT, ranks=1)
    again.save()
    assert_same(place.load(again.state()), again.state())
    assert place.orphans() == orphans
    assert place.uploads() == sorted(effects.uploads)
    return outcomes


def kill_at_every_request(
    target: Target,
    bucket: str,
    subtests: pytest.Subtests,
    moment: Moment,
    new: Job,
    *,
    existing: bool,
    victim: int = 0,
) -> None:
    def prepared(name: str) -> tuple[Place, Job]:
        place = Place(target, bucket, name)
        if existing:
            replace(new, uri=place.uri, seed=OLD, ranks=1).save()
        return place, replace(new, uri=place.uri)

    place, job = prepared("unharmed")
    outcomes = save_and_check(place, target, job)
    assert [outcome.error for outcome in outcomes] == [None] * new.ranks
    sent = outcomes[victim].sent
    points = len(sent) if moment != "middle" else sum(bool(each.body_bytes) for each in sent)
    assert points
    for number in range(points):
        with subtests.test(number=number):
            place, job = prepared(f"{number}")
            outcomes = save_and_check(place, target, job, Kill(moment, number), victim)
            assert outcomes.pop(victim).killed
            # Another rank learns of it, whatever came of the save.
            assert all(outcome.error for outcome in outcomes)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("large", [False, True], ids=["put", "multipart"])
@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "over"])
def test_a_killed_save(
    target: Target,
    bucket_name: str,
    subtests: pytest.Subtests,
    existing: bool,
    large: bool,
    moment: Moment,
) -> None:
    new = Job(uri="", seed=NEW, large=large)
    kill_at_every_request(target, bucket_name, subtests, moment, new, existing=existing)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "other"])
@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "over"])
def test_a_killed_rank(
    target: Target,
    bucket_name: str,
    subtests: pytest.Subtests,
    existing: bool,
    victim: int,
    moment: Moment,
) -> None:
    new = Job(uri="", seed=NEW, large=victim == 1, ranks=2)
    kill_at_every_request(
        target, bucket_name, subtests, moment, new, existing=existing, victim=victim
    )
