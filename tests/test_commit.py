"""The commit: its decisions as a table, and its outcomes played against a store."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest

from s3dcp._commit import (
    Attempts,
    Found,
    Step,
    after_failure,
    data_name,
    deletions,
    has_token,
    metadata_name,
    nested_commits,
    new_token,
    next_step,
    outside,
)
from s3dcp._errors import (
    AccessDeniedError,
    CheckpointExistsError,
    CommitConflictError,
    ConflictError,
    ObjectNotFoundError,
    PreconditionFailedError,
    S3ConfigError,
    S3ConnectionError,
    S3Exception,
    S3ServiceError,
    ServerError,
    ThrottledError,
)
from s3dcp._keys import S3Uri
from s3dcp._publish import publish
from s3dcp._store import Condition
from tests._stores import MemoryStore, channel_of

OURS, OLD, OTHER = b"ours", b"old", b"other"
URI = S3Uri("bucket", "run/.metadata")
TOKEN = "0123456789abcdef"
ANEW = Attempts(body=OURS, overwrite=True)
KEEP = Attempts(body=OURS, overwrite=False)
BLIND = replace(ANEW, conditional=False)


def found(body: bytes, etag: str | None = '"1"') -> Found:
    return Found(body, etag)


@pytest.mark.parametrize(
    ("attempts", "there", "step", "condition"),
    [
        (ANEW, None, Step.PUT, Condition(absent=True)),
        (ANEW, found(OLD), Step.PUT, Condition(etag='"1"')),
        (ANEW, found(OLD, 'W/"1"'), Step.PUT, None),
        (ANEW, found(OLD, None), Step.PUT, None),
        (ANEW, found(OURS), Step.DONE, None),
        (KEEP, None, Step.PUT, Condition(absent=True)),
        (KEEP, found(OLD), Step.EXISTS, None),
        (KEEP, found(OURS), Step.DONE, None),
        (BLIND, None, Step.PUT, None),
        (BLIND, found(OLD), Step.PUT, None),
        # an attempt's outcome is unknown
        (replace(ANEW, unknown=True, seen=None), None, Step.PUT, Condition(absent=True)),
        (replace(ANEW, unknown=True, seen=None), found(OURS), Step.DONE, None),
        (replace(ANEW, unknown=True, seen=None), found(OTHER), Step.CONFLICT, None),
        (replace(ANEW, unknown=True, seen=found(OLD)), found(OLD), Step.PUT, Condition(etag='"1"')),
        (replace(ANEW, unknown=True, seen=found(OLD)), found(OTHER), Step.CONFLICT, None),
        (replace(ANEW, unknown=True, seen=found(OLD)), None, Step.CONFLICT, None),
        (replace(KEEP, unknown=True, seen=None), found(OURS), Step.DONE, None),
        (replace(KEEP, unknown=True, seen=None), found(OTHER), Step.CONFLICT, None),
    ],
)
def test_next_step(
    attempts: Attempts, there: Found | None, step: Step, condition: Condition | None
) -> None:
    assert next_step(attempts, there) == (step, condition)


@pytest.mark.parametrize(
    ("error", "conditioned", "expected"),
    [
        (PreconditionFailedError(status=412), True, ANEW),
        (ConflictError(status=409), True, ANEW),
        (S3ServiceError(status=501), True, replace(ANEW, conditional=False)),
        (S3ServiceError(status=400), True, replace(ANEW, conditional=False)),
        (S3ServiceError(status=501), False, None),
        (S3ConnectionError(), True, replace(ANEW, unknown=True, seen=found(OLD))),
        (ServerError(status=500), True, replace(ANEW, unknown=True, seen=found(OLD))),
        (ThrottledError(status=503), False, replace(ANEW, unknown=True, seen=found(OLD))),
        (AccessDeniedError(status=403), True, None),
    ],
)
def test_after_failure(error: S3Exception, conditioned: bool, expected: Attempts | None) -> None:
    assert after_failure(ANEW, error, found(OLD), conditioned=conditioned) == expected


def test_names() -> None:
    assert metadata_name() == ".metadata"
    assert metadata_name(3) == "__3.metadata"
    assert data_name("abc/__0_", 2, "f00") == "abc/__0_2.f00.distcp"
    assert deletions(["a", "b", "b"], ["b", "c"]) == ["a"]


@pytest.mark.parametrize(
    ("name", "has"),
    [
        (data_name("__0_", 0, TOKEN), True),
        (data_name("abc/epoch_3/__12_", 345, TOKEN), True),
        (data_name("any prefix at all.", 0, TOKEN), True),
        ("__0_0.distcp", False),  # torch's, and the reference library's
        ("0001/epoch_3/__0_0.distcp", False),
        (f"{TOKEN}/__0_0.distcp", False),
        (f"__0_0.{TOKEN[1:]}.distcp", False),
        (f"__0_0.{TOKEN}0.distcp", False),
        (f"__0_0.{TOKEN.upper()}.distcp", False),
        (f"__0_0.{TOKEN}.distcp.bak", False),
        (f"__0_0.{TOKEN}.safetensors", False),
        (f"__0_.{TOKEN}.distcp", False),
        (f".{TOKEN}.distcp", False),
        ("model-00001-of-00002.safetensors", False),
        ("", False),
    ],
)
def test_names_of_one_save_alone(name: str, has: bool) -> None:
    assert has_token(name) is has


def test_every_save_mints_one() -> None:
    assert has_token(data_name("__0_", 0, new_token()))
    assert new_token() != new_token()


def run(store: MemoryStore, *, overwrite: bool = True) -> Found | None:
    return asyncio.run(publish(channel_of(store), URI, OURS, overwrite=overwrite))


class Once:
    """Acts at the n-th request of a name, and then never again."""

    def __init__(self, name: str, action: object, *, nth: int = 1) -> None:
        self.name, self.action, self.left = name, action, nth

    def __call__(self, name: str, uri: S3Uri) -> None:
        if name != self.name:
            return
        self.left -= 1
        if self.left == 0:
            if isinstance(self.action, Exception):
                raise self.action
            assert callable(self.action)
            self.action()


def test_the_first_commit() -> None:
    store = MemoryStore()
    assert run(store) is None
    assert store.objects[URI][0] == OURS
    assert store.requests == [("get", URI.key), ("put", URI.key)]


def test_replacing_returns_what_was_replaced() -> None:
    store = MemoryStore()
    store.write(URI, OLD)
    replaced = run(store)
    assert replaced is not None
    assert replaced.body == OLD
    assert store.objects[URI][0] == OURS


def test_an_existing_checkpoint_is_kept() -> None:
    store = MemoryStore()
    store.write(URI, OLD)
    with pytest.raises(CheckpointExistsError, match="Checkpoint already exists"):
        run(store, overwrite=False)
    assert store.objects[URI][0] == OLD


@pytest.mark.parametrize("conditions", [True, False])
def test_another_writer_wins_the_race(conditions: bool) -> None:
    store = MemoryStore(honours_conditions=conditions)
    store.before = Once("put", lambda: store.write(URI, OTHER))
    if conditions:
        with pytest.raises(CheckpointExistsError):
            run(store, overwrite=False)
        assert store.objects[URI][0] == OTHER
    else:  # which is why such a store is said to be for a single writer
        run(store, overwrite=False)
        assert store.objects[URI][0] == OURS


def test_the_last_writer_wins_where_it_may_overwrite() -> None:
    store = MemoryStore()
    store.write(URI, OLD)
    store.before = Once("put", lambda: store.write(URI, OTHER))
    replaced = run(store)
    assert replaced is not None
    assert replaced.body == OTHER  # the objects of the other's, and not the old one's, go
    assert store.objects[URI][0] == OURS


def test_a_conditional_request_in_flight_is_waited_for() -> None:
    store = MemoryStore()
    store.before = Once("put", ConflictError("409", status=409))
    assert run(store) is None
    assert store.objects[URI][0] == OURS


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("old", [None, OLD])
def test_a_lost_response_is_settled_by_reading_back(overwrite: bool, old: bytes | None) -> None:
    if old is not None and not overwrite:
        return
    store = MemoryStore()
    if old is not None:
        store.write(URI, old)
    store.after = Once("put", S3ConnectionError("reset"))
    replaced = run(store, overwrite=overwrite)
    assert (replaced and replaced.body) == old
    assert store.objects[URI][0] == OURS
    assert [name for name, _ in store.requests].count("put") == 1


def test_a_request_that_was_lost_is_sent_again() -> None:
    store = MemoryStore()
    store.before = Once("put", S3ConnectionError("reset"))
    run(store)
    assert store.objects[URI][0] == OURS


def test_an_unknown_outcome_and_another_writer_is_a_conflict() -> None:
    store = MemoryStore()
    error = S3ConnectionError("reset")

    def replaced_meanwhile() -> None:
        store.write(URI, OTHER)
        raise error

    store.after = Once("put", replaced_meanwhile)
    with pytest.raises(CommitConflictError, match="another writer committed"):
        run(store)
    assert store.objects[URI][0] == OTHER


def test_a_store_without_conditions_is_used_without_and_said_to_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = MemoryStore()
    store.conditional_writes = None

    def refuse(name: str, uri: S3Uri) -> None:
        if name == "put" and len([n for n, _ in store.requests if n == "put"]) == 1:
            raise S3ServiceError("NotImplemented", code="NotImplemented", status=501)

    store.before = refuse
    uri = S3Uri("bucket-of-a-store-without", ".metadata")
    with caplog.at_level(logging.WARNING, "s3dcp"):
        for _ in range(2):
            store.objects.clear()
            store.requests.clear()
            asyncio.run(publish(channel_of(store), uri, OURS, overwrite=True))
    warnings = [r for r in caplog.records if "conditional writes" in r.message]
    assert len(warnings) == 1


@pytest.mark.parametrize(
    ("etag", "said"),
    [('"1"', False), ('W/"1"', True), (None, True)],
    ids=["strong", "weak", "none"],
)
def test_a_commit_that_could_not_be_conditional_is_said_to_be_for_one_writer(
    caplog: pytest.LogCaptureFixture, etag: str | None, said: bool
) -> None:
    """A proxy, say, weakens the ETags of a store that honours conditions."""
    store = MemoryStore()
    uri = S3Uri(f"bucket-with-etag-{etag}", ".metadata")
    store.write(uri, OLD)
    store.objects[uri] = OLD, etag  # type: ignore[assignment]  # as some store may have it
    with caplog.at_level(logging.WARNING, "s3dcp"):
        asyncio.run(publish(channel_of(store), uri, OURS, overwrite=True))
    assert ("conditional writes" in caplog.text) == said


def test_an_error_that_will_not_go_away_ends_the_commit() -> None:
    store = MemoryStore()
    store.before = Once("put", AccessDeniedError("403", status=403))
    with pytest.raises(AccessDeniedError):
        run(store)
    assert not store.objects


def test_attempts_end() -> None:
    store = MemoryStore()

    def fail(name: str, uri: S3Uri) -> None:
        if name == "put":
            raise ServerError("500", status=500)

    store.before = fail
    with pytest.raises(CommitConflictError, match="every attempt failed") as caught:
        run(store)
    assert isinstance(caught.value.__cause__, ServerError)
    assert [name for name, _ in store.requests].count("put") == 4


@pytest.mark.parametrize("attempts", [1, 3])
def test_the_last_attempt_is_settled_too(attempts: int) -> None:
    store = MemoryStore()

    def lose(name: str, uri: S3Uri) -> None:
        raise S3ConnectionError("reset")

    store.after = lose
    channel = channel_of(store, max_attempts=attempts)
    assert asyncio.run(publish(channel, URI, OURS, overwrite=True)) is None
    assert store.objects[URI][0] == OURS


@pytest.mark.parametrize(
    "error", [S3Exception("?"), S3ConfigError("an answer that cannot be parsed"), ServerError()]
)
def test_an_answer_that_says_nothing_is_no_reason_to_delete(error: S3Exception) -> None:
    store = MemoryStore()
    data = S3Uri("bucket", "run/data")
    store.write(data, b"data")
    store.after = Once("put", error)
    asyncio.run(publish(channel_of(store), URI, OURS, overwrite=True, objects=[data]))
    assert store.objects[URI][0] == OURS
    assert data in store.objects


def test_a_refusal_deletes_what_only_the_refused_commit_named() -> None:
    store = MemoryStore()
    data = S3Uri("bucket", "run/data")
    store.write(data, b"data")
    store.before = Once("put", AccessDeniedError("403", status=403))
    with pytest.raises(AccessDeniedError):
        asyncio.run(publish(channel_of(store), URI, OURS, overwrite=True, objects=[data]))
    assert not store.objects


def test_what_cannot_be_read_back_is_unknown() -> None:
    store = MemoryStore()
    store.after = Once("put", S3ConnectionError("reset"))
    store.before = Once("get", AccessDeniedError("403", status=403), nth=2)
    with pytest.raises(CommitConflictError, match="could not be read back"):
        run(store)


def test_metadata_that_goes_away_meanwhile_is_written_anew() -> None:
    store = MemoryStore()
    store.write(URI, OLD)

    def vanish() -> None:
        store.objects.clear()
        raise ObjectNotFoundError("If-Match of a missing key", status=404)

    store.before = Once("put", vanish)
    run(store)
    assert store.objects[URI][0] == OURS


def test_conditions_are_kept_where_they_are_known_to_hold() -> None:
    store = MemoryStore()
    store.write(URI, OLD)
    store.before = Once("put", S3ServiceError("KMS.Disabled", code="KMS.Disabled", status=400))
    with pytest.raises(S3ServiceError):
        run(store)
    assert store.objects[URI][0] == OLD


def test_no_commit_is_ever_deleted() -> None:
    assert deletions(["a", ".metadata", "b/.metadata", "__1.metadata"], []) == ["a"]


def test_what_lies_below_another_checkpoint_is_spared() -> None:
    names = ["a", "b/c", "b/d/e", "b//f", "g/h"]
    assert nested_commits(names) == [f"{each}/.metadata" for each in ("b", "b/", "b/d", "g")]
    assert outside(names, ["b/d/.metadata", "g/.metadata"]) == ["a", "b/c", "b//f"]
    assert outside(names, []) == names
