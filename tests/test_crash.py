"""A save that is killed with SIGKILL at any request leaves the old checkpoint or the new one.

Every test first lets a save be, to learn how many requests it makes, and then kills one at each of
them: every such kill is a subtest. `tests._crash` says how that is done.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, product
from threading import Event
from typing import Any

import pytest

from s3dcp.testing import FakeS3
from tests._crash import Job, Kill, Outcome, Process, Target, run
from tests._crash_sites import Effects, FakeTarget, Late, Place, RcloneTarget, performed
from tests._servers import Server, empty_bucket, use
from tests._states import assert_same

pytestmark = [
    pytest.mark.xdist_group("ranks"),  # which start the same fork server
    # torch says so of every save and load without a process group, `no_dist=True` or not.
    pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork"),
]


TARGETS = ("fake", "rclone")
# At how many moments a save is killed: before and after each request, and in the middle of each
# body. PROMISES.md has their sums, as `tests.test_promises` checks.
KILLS_OF_ONE = {  # over another?, in parts?
    (False, False): 11,
    (False, True): 16,
    (True, False): 15,
    (True, True): 20,
}
KILLS_OF_TWO = {  # over another?, which rank
    (False, 0): 8,
    (True, 0): 12,
    (False, 1): 3,
    (True, 1): 11,
}
KILLS_IN_A_ROW = 6
LATE_COMMITS = tuple(product((True, False), (False, True)))  # conditional?, over another?


@pytest.fixture
def fake_target(fake: FakeS3, bucket_name: str) -> FakeTarget:
    fake.create_bucket(bucket_name)
    return FakeTarget(fake)


@pytest.fixture
def rclone_target(server: Server, boto: Any, bucket_name: str) -> Iterator[RcloneTarget]:
    boto.create_bucket(Bucket=bucket_name)
    yield RcloneTarget(server.environ(), boto)
    empty_bucket(boto, bucket_name)


@pytest.fixture
def bucket_name() -> str:
    return f"crash-{secrets.token_hex(6)}"


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    found: Target = request.getfixturevalue(f"{request.param}_target")
    return found


def save_and_check(
    place: Place,
    target: Target,
    old: Job | None,
    new: Job,
    kill: Kill | None = None,
    victim: int = 0,
) -> list[Outcome]:
    """Save in other processes, of which one may be killed, and check all that is left."""
    before, replaced, orphans = place.objects(), place.named(), place.orphans()
    uploads = place.uploads()
    outcomes = run(target, new, kill, victim)
    effects = Effects()
    for outcome in outcomes:
        effects.add(performed(outcome, kill))
    committed = place.commit in effects.written

    if committed:
        assert_same(place.load(new.state()), new.state())
    elif old is not None:
        assert_same(place.load(old.state()), old.state())
    else:
        place.assert_absent(new.state())

    assert place.objects() == (before | effects.written) - effects.deleted
    orphans |= replaced - {place.commit} - effects.deleted if committed else effects.written
    assert place.orphans() == orphans
    uploads = sorted(uploads + effects.uploads)
    assert place.uploads() == uploads

    if kill is None:
        assert [outcome.error for outcome in outcomes] == [None] * new.ranks
        assert committed
    else:
        # The other rank learns of it, whatever came of the save.
        assert [outcome.killed for outcome in outcomes] == [r == victim for r in range(new.ranks)]
        assert all(outcome.killed or outcome.error for outcome in outcomes)

    after = Job(uri=new.uri, seed=new.seed + 1)
    after.save()
    assert_same(place.load(after.state()), after.state())
    assert place.orphans() == orphans  # it leaves none of its own
    assert place.uploads() == uploads
    return outcomes


def kill_at_every_request(
    target: Target,
    bucket: str,
    subtests: pytest.Subtests,
    *,
    existing: bool,
    large: bool,
    expected: int,
    ranks: int = 1,
    victim: int = 0,
) -> None:
    """Save once unharmed, and then be killed at each of the requests that this took.

    Saves over a checkpoint are all to one path, each over what the one before has left.
    """
    seeds = count(step=2)

    def attempt(kill: Kill | None = None) -> Outcome:
        seed = next(seeds)
        place = Place(target, bucket, "over" if existing else f"fresh-{seed}")
        job = Job(uri=place.uri, seed=seed, large=large, ranks=ranks)
        old = Job(uri=place.uri, seed=seed - 1) if existing else None
        return save_and_check(place, target, old, job, kill, victim)[victim]

    if existing:
        Job(uri=f"s3://{bucket}/over", seed=next(seeds) + 1).save()
    sent = attempt().sent
    wanted = {"CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"} if large else set()
    if victim == 0:
        wanted |= {"GetObject", "PutObject"} | ({"DeleteObject"} if existing else set())
    assert wanted <= {each.operation for each in sent}
    kills = [Kill(moment, n) for moment in ("before", "after") for n in range(len(sent))]
    kills += [Kill("middle", n) for n in range(sum(bool(each.body_bytes) for each in sent))]
    assert len(kills) == expected
    for kill in kills:
        with subtests.test(str(kill)):
            attempt(kill)


@pytest.mark.parametrize("large", [False, True], ids=["put", "multipart"])
@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "over"])
def test_a_killed_save(
    target: Target, bucket_name: str, subtests: pytest.Subtests, existing: bool, large: bool
) -> None:
    expected = KILLS_OF_ONE[existing, large]
    kill_at_every_request(
        target, bucket_name, subtests, existing=existing, large=large, expected=expected
    )


@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "over"])
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "other"])
def test_a_killed_rank(
    target: Target, bucket_name: str, subtests: pytest.Subtests, victim: int, existing: bool
) -> None:
    large = existing and victim == 1
    kill_at_every_request(
        *(target, bucket_name, subtests),
        existing=existing,
        large=large,
        expected=KILLS_OF_TWO[existing, victim],
        ranks=2,
        victim=victim,
    )


def test_a_killed_save_is_tried_again_at_once(target: Target, bucket_name: str) -> None:
    """Nothing is looked at in between: every process finds what the one before has left."""
    place = Place(target, bucket_name, "ck")
    whole = Job(uri=place.uri, seed=0)
    whole.save()
    effects = Effects(written=place.objects())
    for number in count():
        kill = Kill("after" if number % 2 else "before", number)
        job = replace(whole, seed=number + 1)
        [outcome] = run(target, job, kill)
        done = performed(outcome, kill)
        effects.add(done)
        if any(each.operation == "PutObject" and each.key == place.commit for each in done):
            whole = job
        if not outcome.killed:
            break
    assert number == KILLS_IN_A_ROW
    assert whole.seed == number + 1
    assert_same(place.load(whole.state()), whole.state())
    assert place.objects() == effects.written - effects.deleted
    assert place.orphans() == place.objects() - place.named() != set()


@pytest.mark.parametrize(("conditional", "existing"), LATE_COMMITS)
def test_the_commit_of_a_killed_save_arrives_late(
    monkeypatch: pytest.MonkeyPatch, bucket_name: str, conditional: bool, existing: bool
) -> None:
    """The next save has long been committed. It stays where the store has conditional writes."""
    with FakeS3(conditional_writes=conditional) as server:
        use(server, monkeypatch)
        server.create_bucket(bucket_name)
        place = Place(FakeTarget(server), bucket_name, "ck")
        if existing:
            Job(uri=place.uri, seed=0).save()
        arrived = Event()
        dying = Process(Job(uri=place.uri, seed=1))
        late = server.inject(
            Late(arrived), operation="PutObject", key=place.commit, where=dying.sent
        )
        dying.start(FakeTarget(server), None)
        late.wait()
        dying.kill()
        assert dying.outcome().killed
        written = place.orphans()

        following = Job(uri=place.uri, seed=2)
        following.save()
        assert place.orphans() == written
        named = place.named() - {place.commit}
        late.release()
        assert arrived.wait(60)

        whole, orphans = (following, written) if conditional else (dying.job, named)
        assert_same(place.load(whole.state()), whole.state())
        assert place.orphans() == orphans
        server.check()
