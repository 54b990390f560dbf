"""Two jobs that save to one path at once, over HTTP; every order is forced by the server.

`tests/test_commit_interleavings.py` has the orders and failures that nobody thought of.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from s3dcp import (
    AccessDeniedError,
    CheckpointExistsError,
    CommitConflictError,
    ConflictError,
    S3ClientConfig,
    S3Exception,
)
from s3dcp.testing import Drop, FakeS3, Fault, Record, Refuse, internal_error, lost_response
from tests._fakes import (
    BUCKET,
    METADATA,
    Hold,
    Late,
    addressed,
    assert_holds,
    data_keys,
    load,
    named,
    save,
)
from tests._states import MiB, StateDict, assert_same, fill

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests._ranks import RankPool

# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

CONFIG = S3ClientConfig(max_attempts=4, conditional_writes=True)
OLD: StateDict = {"weights": fill((8, 9), seed=1), "step": 1}
A: StateDict = {"weights": fill((8, 9), seed=2), "step": 2}
B: StateDict = {"weights": fill((8, 9), seed=3), "step": 3}
KEY = f"ck/{METADATA}"


@pytest.fixture
def jobs() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.fixture
def fake(jobs: ThreadPoolExecutor, fake: FakeS3) -> FakeS3:
    """The server; what it holds back goes on before the jobs are waited for."""
    return fake


def outcome(job: Callable[[], None]) -> S3Exception | None:
    """Return the error that a job ends with, if it does."""
    try:
        job()
    except S3Exception as exc:
        return exc
    return None


def saving(state: StateDict, *, overwrite: bool = True) -> Callable[[], None]:
    return partial(save, state, "ck", CONFIG, overwrite=overwrite)


# One job has its whole save while another stands at one of its requests.

# What the first job asks for, in order: what it may replace, the data, the commit; and, where it
# replaced a checkpoint, that one's object.
_COMMIT = 2


@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("b_overwrites", [True, False])
@pytest.mark.parametrize(
    ("old", "a_overwrites", "index"),
    [
        *((True, True, index) for index in range(_COMMIT + 2)),
        *((False, True, index) for index in range(_COMMIT + 1)),
        *((False, False, index) for index in range(_COMMIT + 1)),
    ],
)
def test_a_save_within_another(
    fake: FakeS3,
    jobs: ThreadPoolExecutor,
    index: int,
    answered: bool,
    a_overwrites: bool,
    b_overwrites: bool,
    old: bool,
) -> None:
    if old:
        save(OLD, "ck", CONFIG)
    hold = fake.inject(Hold(answer=answered), index=len(fake.requests) + index)
    first = jobs.submit(outcome, saving(A, overwrite=a_overwrites))
    hold.wait()
    named(fake, "ck")

    second = outcome(saving(B, overwrite=b_overwrites))
    named(fake, "ck")
    hold.release()
    first_error = first.result(60)

    committed = index > _COMMIT or (index == _COMMIT and answered)
    b_wins = b_overwrites or not (old or committed)
    a_wins = committed or a_overwrites or not b_wins
    assert (second is None) == b_wins
    assert (first_error is None) == a_wins
    for error in (first_error, second):
        assert error is None or isinstance(error, CheckpointExistsError)
    assert_holds(fake, "ck", B if b_wins and (committed or not a_wins) else A)


@pytest.mark.parametrize(("old", "overwrite"), [(True, True), (False, True), (False, False)])
def test_commits_that_set_out_together(
    fake: FakeS3, jobs: ThreadPoolExecutor, overwrite: bool, old: bool
) -> None:
    """All have seen the same key, and all have sent their commit, before any takes effect."""
    if old:
        save(OLD, "ck", CONFIG)
    states: list[StateDict] = [{"weights": fill((8, 9), seed=n), "step": n} for n in range(4)]
    hold = fake.inject(Hold(), operation="PutObject", key=KEY, times=len(states))
    running = [jobs.submit(outcome, saving(state, overwrite=overwrite)) for state in states]
    hold.wait(len(states))
    hold.release()
    errors = [each.result(60) for each in running]

    if overwrite:
        assert errors == [None] * len(states)
        last = load(OLD, "ck", CONFIG)["step"]
    else:
        assert sorted(map(type, errors), key=str) == sorted(
            [type(None), *[CheckpointExistsError] * (len(states) - 1)], key=str
        )
        last = errors.index(None)
    assert_holds(fake, "ck", states[last])


def test_a_large_checkpoint_is_replaced_whole(fake: FakeS3, jobs: ThreadPoolExecutor) -> None:
    """The loser's parts are gone, too."""
    large: StateDict = {"weights": fill((3 * MiB, 1), seed=4), "step": 4}
    hold = fake.inject(Hold(), operation="CompleteMultipartUpload")
    first = jobs.submit(outcome, saving(large, overwrite=False))
    hold.wait()
    save(B, "ck", CONFIG, overwrite=False)
    hold.release()

    assert isinstance(first.result(60), CheckpointExistsError)
    assert_holds(fake, "ck", B)
    assert not fake.uploads(BUCKET)


# Every outcome of a commit.


@dataclass(frozen=True)
class Outcome:
    """How a commit's requests go, and what follows.

    Attributes:
        put: What happens to the PUT of `.metadata`, the first of them or all.
        b: When the other job saves: before the first PUT takes effect, or after it did or was
            lost; never by default.
        error: What the save raises; None if it succeeds.
        holds: What the path holds in the end.
        left: Whether objects are left over: those of a commit that may still arrive.
        overwrite: The save's.
    """

    name: str
    put: Fault | None
    b: str = ""
    error: type[S3Exception] | None = None
    holds: str = "A"
    left: bool = False
    overwrite: bool = True
    times: int | None = 1
    read_back: Fault | None = None


_NO_EFFECT = Drop()  # the connection is reset once the request has been read
_REFUSED = Refuse("AccessDenied")

OUTCOMES = [
    Outcome("success", None),
    Outcome("success, the first", None, overwrite=False),
    Outcome("412: another's came first", None, b="before"),
    Outcome(
        "412: another's came first, and stays",
        None,
        b="before",
        overwrite=False,
        error=CheckpointExistsError,
        holds="B",
    ),
    Outcome("409: another's under way", Refuse("ConditionalRequestConflict"), times=2),
    Outcome("409 and then 412", Refuse("ConditionalRequestConflict"), b="before"),
    Outcome(
        "409 without end",
        Refuse("ConditionalRequestConflict"),
        times=None,
        error=ConflictError,
        holds="old",
    ),
    Outcome("403", _REFUSED, error=AccessDeniedError, holds="old"),
    Outcome("503, without effect", Refuse("SlowDown")),
    Outcome("500, with effect", internal_error("effect")),
    Outcome("lost, without effect", _NO_EFFECT),
    Outcome("lost, with effect", lost_response()),
    Outcome("lost, with effect, the first", lost_response(), overwrite=False),
    Outcome("a success that is an error", Refuse("InternalError", 200, at="effect")),
    Outcome("lost twice, the first with effect", lost_response(), read_back=Drop()),
    Outcome(
        "lost, without effect, and another's came",
        _NO_EFFECT,
        b="after",
        error=CommitConflictError,
        holds="B",
        left=True,
    ),
    Outcome(
        "lost, with effect, and another's came",
        lost_response(),
        b="after",
        error=CommitConflictError,
        holds="B",
        left=True,  # the replaced checkpoint's
    ),
    Outcome(
        "lost, without effect, and another's came, the first",
        _NO_EFFECT,
        b="after",
        overwrite=False,
        error=CommitConflictError,
        holds="B",
        left=True,
    ),
    Outcome(
        "lost, with effect, and cannot be read back",
        lost_response(),
        read_back=_REFUSED,
        error=CommitConflictError,
        left=True,  # the replaced checkpoint's
    ),
    Outcome(
        "lost, without effect, without end",
        _NO_EFFECT,
        times=None,
        error=CommitConflictError,
        holds="old",
        left=True,
    ),
]


@pytest.mark.parametrize("case", OUTCOMES, ids=lambda case: case.name)
def test_every_outcome_of_a_commit(fake: FakeS3, jobs: ThreadPoolExecutor, case: Outcome) -> None:
    if case.overwrite:
        save(OLD, "ck", CONFIG)
    if case.put is not None:
        fake.inject(case.put, operation="PutObject", key=KEY, times=case.times)
    # The GETs of `.metadata`: what is there, and, if need be, read back.
    if case.read_back is not None:
        fake.inject(case.read_back, operation="GetObject", key=KEY, skip=1)
    reads = {"before": 0, "after": 1, "": 99}[case.b]
    hold = fake.inject(Hold(answer=case.b == "before"), operation="GetObject", key=KEY, skip=reads)
    job: Future[S3Exception | None] = jobs.submit(outcome, saving(A, overwrite=case.overwrite))
    if case.b:
        hold.wait()
        fake.rules.clear()
        save(B, "ck", CONFIG)
        hold.release()
    error = job.result(60)

    assert type(error) is (case.error or type(None))
    fake.rules.clear()
    state = {"A": A, "B": B, "old": OLD}[case.holds]
    if case.left:
        assert data_keys(fake, "ck") > named(fake, "ck")
        assert_same(load(state, "ck"), state)
    else:
        assert_holds(fake, "ck", state)
    # Whatever happened, the next save is the one that is there.
    save(B, "ck", CONFIG)
    named(fake, "ck")
    assert_same(load(B, "ck"), B)


def test_a_commit_that_arrives_late_changes_nothing(fake: FakeS3, jobs: ThreadPoolExecutor) -> None:
    """The first is given up on its way, and arrives after two later saves."""
    impatient = replace(CONFIG, read_timeout_s=0.2)
    save(OLD, "ck", CONFIG)
    late = Late()
    rule = fake.inject(late, operation="PutObject", key=KEY)
    save(A, "ck", impatient)
    save(B, "ck", CONFIG)
    rule.release()

    assert late.arrived.wait(60)
    assert rule.struck[0].code == "PreconditionFailed"
    assert_holds(fake, "ck", B)


def test_jobs_of_two_processes(fake: FakeS3, jobs: ThreadPoolExecutor, ranks2: RankPool) -> None:
    """As above, without anything shared."""
    hold = fake.inject(Hold(), operation="PutObject", key=KEY, times=2)
    running = jobs.submit(ranks2.run, _save_as_rank)
    hold.wait(2)
    hold.release()
    outcomes = running.result(60)

    assert sorted(outcomes) == ["CheckpointExistsError", "saved"]
    assert_holds(fake, "ck", _of_rank(outcomes.index("saved")))


def _of_rank(rank: int) -> StateDict:
    return {"weights": fill((8, 9), seed=rank), "step": rank}


def _save_as_rank() -> str:
    error = outcome(saving(_of_rank(int(os.environ["RANK"])), overwrite=False))
    return "saved" if error is None else type(error).__name__


# Stores without conditional writes.


def is_conditional(record: Record) -> bool:
    return record.method == "PUT" and not {"if-match", "if-none-match"}.isdisjoint(record.headers)


@pytest.mark.parametrize(
    ("setting", "refusal"),
    [
        (None, None),
        (False, None),
        (None, Refuse("NotImplemented")),
        (None, Refuse("InvalidRequest")),
    ],
    ids=["ignored", "off", "refused with 501", "refused with 400"],
)
def test_a_store_without_conditions_is_for_one_writer(
    caplog: pytest.LogCaptureFixture, setting: bool | None, refusal: Fault | None
) -> None:
    """It is said once, and the two that save at once are not told of each other."""
    config = replace(CONFIG, conditional_writes=setting)
    with (
        FakeS3(conditional_writes=False) as server,
        addressed(server) as fake,
        caplog.at_level(logging.WARNING, "s3dcp"),
    ):
        if refusal is not None:
            fake.inject(refusal, where=is_conditional, times=None)
        for state in (OLD, A, B):  # one after the other, it works
            save(state, "ck", config)
            assert_holds(fake, "ck", state)
        with pytest.raises(CheckpointExistsError):
            save(A, "ck", config, overwrite=False)
        assert_holds(fake, "ck", B)
        sent = [each for each in fake.requests if each.key == KEY and each.operation == "PutObject"]
        assert any(map(is_conditional, sent)) == (setting is None)
    warnings = [each.getMessage() for each in caplog.records if each.name.startswith("s3dcp")]
    assert len(warnings) == 1
    assert "let one job at a time save to a path" in warnings[0]
