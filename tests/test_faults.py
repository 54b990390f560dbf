"""Every fault of a network and a store, and what a whole save and a whole load make of it.

The table below is the test: a fault, the requests that it is played to, and what follows for the
one who called `dcp.save` or `dcp.load`. Either nothing, but for requests that were sent again; or
one typed error, after which what was there before is there still, and nothing else.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from threading import Event, Semaphore
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from s3dcp import (
    CheckpointChangedError,
    ConflictError,
    IntegrityError,
    PreconditionFailedError,
    S3ClientConfig,
    S3ConnectionError,
    S3CredentialsError,
    S3Exception,
    S3ProtocolError,
    S3TimeoutError,
    ServerError,
    ThrottledError,
)
from s3dcp._loop_thread import worker_count
from s3dcp.testing import (
    Cut,
    Drip,
    Drop,
    Exchange,
    Extend,
    FakeS3,
    Fault,
    FlipByte,
    IgnoreRange,
    Record,
    Refuse,
    Stall,
    StopReading,
    WrongRange,
    internal_error,
    lost_response,
    slow_down,
)
from tests._fakes import BUCKET, METADATA, addressed, assert_holds, data_keys, load, named, save
from tests._states import MiB, StateDict, assert_same, fill

if TYPE_CHECKING:
    from pathlib import Path

# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

#: How often a request is tried here.
TRIES = 4
CONFIG = S3ClientConfig(
    max_attempts=TRIES, conditional_writes=True, part_size=5 * MiB, max_connections=8
)
#: With it a peer that makes no progress is given up within the test; a machine that is busy is not.
IMPATIENT = replace(CONFIG, read_timeout_s=0.5)

OLD: StateDict = {"old": fill((16, 8), seed=1), "step": 1}
#: An item that is copied when it arrives, in an object of one PUT.
SMALL: StateDict = {"weights": fill((64, 64), seed=2), "step": 2}
#: One that is received straight into the tensor, in one request.
DIRECT: StateDict = {"weights": fill((1, MiB), seed=3), "step": 3}
#: One that is sent in three parts, straight from the tensor.
LARGE: StateDict = {"weights": fill((3, MiB), seed=4), "step": 4}


@dataclass(frozen=True)
class Request:
    """The requests of a save or a load that a fault is played to.

    Attributes:
        part: Which part, of a multipart upload.
    """

    name: str
    state: StateDict
    operation: str
    key: str = "*.distcp"
    part: str | None = None

    def is_meant(self, record: Record) -> bool:
        """Tell whether it is this one, asked of those with its operation and key."""
        return self.part is None or record.query.get("partNumber") == self.part

    def count(self, server: FakeS3) -> int:
        """Return how often it was sent."""
        suffix = self.key.removeprefix("*")
        return sum(
            record.operation == self.operation
            and record.key.endswith(suffix)
            and self.is_meant(record)
            for record in server.requests
        )


PUT = Request("the PUT", SMALL, "PutObject")
CREATE = Request("the start of an upload", LARGE, "CreateMultipartUpload")
PART = Request("a part", LARGE, "UploadPart", part="2")
COMPLETE = Request("the completion", LARGE, "CompleteMultipartUpload")
SAVES = (PUT, CREATE, PART, COMPLETE)
BODIES = (PUT, PART)  # those with one

METADATA_GET = Request("the GET of the metadata", SMALL, "GetObject", f"*/{METADATA}")
COPIED = Request("a GET that is copied", SMALL, "GetObject")
INTO_TENSOR = Request("a GET into the tensor", DIRECT, "GetObject")
LOADS = (METADATA_GET, COPIED, INTO_TENSOR)
RANGES = (COPIED, INTO_TENSOR)


@dataclass(frozen=True)
class Then:
    """What follows.

    Attributes:
        tries: How often the request is sent in all.
        least: How often at least, if that is less.
        error: What the save or the load raises, if it fails.
            says: A word of the error's text.
        uploads: How many are left behind, for the bucket's lifecycle rule to remove.
    """

    tries: int
    error: type[S3Exception] | None = None
    says: str = ""
    uploads: int = 0
    least: int | None = None


once = Then(1)
again = Then(2)
once_or_again = Then(2, least=1)


def fails(error: type[S3Exception], tries: int = 1, says: str = "") -> Then:
    return Then(tries, error, says)


@dataclass(frozen=True)
class Row:
    """A fault, how often it is played, to which requests, and what follows."""

    name: str
    fault: Fault
    requests: tuple[Request, ...]
    then: Then
    times: int | None = 1
    config: S3ClientConfig = CONFIG


BOTH = (*SAVES, *LOADS)

TABLE = [
    # The store is not well.
    Row("503 SlowDown, three times", slow_down(), BOTH, Then(4), times=3),
    Row("503 SlowDown, on and on", slow_down(), BOTH, fails(ThrottledError, TRIES), times=None),
    Row("500 before the body", internal_error("head"), BOTH, again),
    Row("500 after the body", internal_error(), BOTH, again),
    Row("500, on and on", internal_error(), BOTH, fails(ServerError, TRIES), times=None),
    Row("500 although it took effect", internal_error("effect"), (PUT, PART, *LOADS), again),
    Row("400 RequestTimeout", Refuse("RequestTimeout"), BODIES, again),
    Row("409", Refuse("OperationAborted"), BOTH, again),
    Row("409, on and on", Refuse("OperationAborted"), BOTH, fails(ConflictError, TRIES), None),
    # Nobody asked for a condition.
    Row("412", Refuse("PreconditionFailed"), SAVES, fails(PreconditionFailedError)),
    Row("412", Refuse("PreconditionFailed"), (METADATA_GET,), fails(PreconditionFailedError)),
    Row("412", Refuse("PreconditionFailed"), RANGES, fails(CheckpointChangedError)),
    Row("an expired token", Refuse("ExpiredToken"), BOTH, fails(S3CredentialsError)),
    # The connection is lost.
    Row("reset before the body", Drop(at="head"), BOTH, again),
    Row("reset before the answer", Drop(), BOTH, again),
    Row("closed before the answer", Drop(reset=False), BOTH, again),
    Row("reset, on and on", Drop(), BOTH, fails(S3ConnectionError, TRIES), times=None),
    Row("the answer is lost", lost_response(), (PUT, PART, COMPLETE, *LOADS), again),
    Row("reset within the head", Cut(head_bytes=20, reset=True), (PUT, PART, *LOADS), again),
    Row("closed within the head", Cut(head_bytes=20), (PUT, PART, COMPLETE, *LOADS), again),
    # Nobody knows the id of the upload.
    Row("the answer is lost", lost_response(), (CREATE,), Then(2, uploads=1)),
    Row("reset before the body's first byte", Cut(0, reset=True), LOADS, again),
    Row("reset within the body", Cut(200, reset=True), LOADS, again),
    Row("a body that ends early", Cut(200), LOADS, again),
    Row("a body that ends late in it", Cut(2 * MiB + 1), (INTO_TENSOR,), again),
    Row("every body ends early", Cut(10), LOADS, fails(S3ConnectionError, TRIES), None),
    # It is slow.
    Row("no answer", Stall(head=False), (*BODIES, *LOADS), again, config=IMPATIENT),
    Row("a body that stops", Stall(200), LOADS, again, config=IMPATIENT),
    Row(
        "every body stops",
        Stall(1000),
        (COPIED, INTO_TENSOR),
        fails(S3TimeoutError, TRIES),
        times=None,
        config=replace(IMPATIENT, read_timeout_s=0.1),
    ),
    Row("a reader that stops", StopReading(1000), (PART,), again, config=IMPATIENT),
    Row("a slow drip", Drip(4096, 0.02), (COPIED,), once),
    Row("a slow drip", Drip(MiB, 0.1), (INTO_TENSOR,), once),
    # The answer is wrong.
    # Whether the client sees it depends on what the kernel hands out together.
    Row("a longer body", Extend(), (PUT, PART, COMPLETE, *LOADS), once_or_again),
    Row("the whole for a range", IgnoreRange(), RANGES, again),
    Row("the whole for every range", IgnoreRange(), RANGES, fails(S3ProtocolError, 3), times=None),
    Row("another range", WrongRange(), RANGES, again),
    Row("other ranges", WrongRange(), RANGES, fails(S3ProtocolError, 3), times=None),
    # Bytes are not what was sent.
    Row("a byte flipped on its way up", FlipByte(900, upload=True), BODIES, again),
    Row(
        "bytes flipped on their way up",
        FlipByte(900, upload=True),
        BODIES,
        fails(ServerError, TRIES, "BadDigest"),
        times=None,
    ),
    Row(
        "a byte flipped on its way down",
        FlipByte(2000),
        RANGES,
        fails(IntegrityError, 1, "weights"),
    ),
]
CASES = [
    pytest.param(row, request, id=f"{row.name}: {request.name}")
    for row in TABLE
    for request in row.requests
]


def strike(server: FakeS3, row: Row, request: Request) -> None:
    server.inject(
        row.fault,
        operation=request.operation,
        key=request.key,
        where=request.is_meant,
        times=row.times,
    )


def outcome(function: Callable[[], object]) -> Exception | None:
    try:
        function()
    except (S3Exception, AssertionError) as exc:
        return exc
    return None


@pytest.mark.parametrize(("row", "request_"), CASES)
def test_every_fault(fake: FakeS3, row: Row, request_: Request) -> None:
    saves = request_ in SAVES
    save(OLD if saves else request_.state, "ck", CONFIG)
    fake.forget()
    strike(fake, row, request_)
    # Of what is loaded a part, so that its range is not the whole object's.
    wanted = {"weights": request_.state["weights"]}

    if saves:
        error = outcome(lambda: save(request_.state, "ck", row.config))
    else:
        error = outcome(lambda: assert_same(load(wanted, "ck", row.config), wanted))

    assert (row.then.least or row.then.tries) <= request_.count(fake) <= row.then.tries
    if request_ is METADATA_GET and row.then.error is not None:
        assert type(error) is AssertionError  # torch keeps the text alone
    else:
        assert type(error) is (row.then.error or type(None))
    if error is not None:
        assert request_.key.removeprefix("*") in str(error)
        assert row.then.says in str(error)
    fake.forget()
    assert_holds(fake, "ck", OLD if saves and error else request_.state)
    assert len(fake.uploads(BUCKET)) == row.then.uploads


@pytest.mark.parametrize("held", [100_000, 2 * MiB + 1])
def test_a_body_is_resumed_from_what_came(fake: FakeS3, held: int) -> None:
    wanted = {"weights": DIRECT["weights"]}
    save(DIRECT, "ck", CONFIG)
    fake.forget()
    fake.inject(Cut(held), operation="GetObject", key=INTO_TENSOR.key)
    assert_same(load(wanted, "ck", CONFIG), wanted)

    first, second = (each for each in fake.requests if each.key.endswith(".distcp"))
    start, end = first.headers["range"].removeprefix("bytes=").split("-")
    assert second.headers["range"] == f"bytes={int(start) + held}-{end}"
    assert "if-match" in second.headers


@dataclass(frozen=True)
class CutAndReplace(Cut):
    """The object is another one by the time the client comes back for the rest."""

    async def play(self, exchange: Exchange) -> None:
        await super().play(exchange)
        objects = exchange.s3.buckets[BUCKET].objects
        key = exchange.record.key
        objects[key] = replace(objects[key], etag='"another"')


@pytest.mark.parametrize("held", [200, 100_000])
def test_a_body_is_not_resumed_from_another_object(fake: FakeS3, held: int) -> None:
    save(DIRECT, "ck", CONFIG)
    fake.inject(CutAndReplace(held), operation="GetObject", key=INTO_TENSOR.key)
    with pytest.raises(CheckpointChangedError):
        load({"weights": DIRECT["weights"]}, "ck", CONFIG)


@dataclass(frozen=True)
class Weaken(Fault):
    """Makes the ETag weak, as proxies do that may change how a body is encoded."""

    async def play(self, exchange: Exchange) -> None:
        await exchange.receive()
        exchange.perform()
        headers = exchange.response.headers
        if etag := headers.get("ETag"):
            headers["ETag"] = f"W/{etag}"
        await super().play(exchange)


def test_weak_etags(fake: FakeS3) -> None:
    """`If-Match` never matches them; whether ranges are of one object, answers tell."""
    save(LARGE, "ck", CONFIG)
    fake.forget()
    weak = fake.inject(Weaken(), operation="GetObject", key="*.distcp", times=None)
    one_by_one = replace(CONFIG, max_connections=1, memory_budget_bytes=10 * MiB)
    assert_same(load(LARGE, "ck", one_by_one), LARGE)
    assert len(weak.struck) > 1


@pytest.mark.parametrize("state", [SMALL, LARGE], ids=["small", "large"])
def test_connections_that_are_refused(state: StateDict) -> None:
    """As many as there are tries, of one client's first request."""
    with FakeS3() as server, addressed(server) as fake:
        refused = fake.inject(Drop(), operation="Connect", times=TRIES - 1)
        save(state, "ck", CONFIG)
        refused.wait(TRIES - 1)
        assert_holds(fake, "ck", state)


@pytest.mark.parametrize("moved", [save, load], ids=["save", "load"])
def test_a_server_that_is_not_there(moved: Callable[..., object]) -> None:
    with FakeS3() as server:
        gone = replace(CONFIG, endpoint_url=server.endpoint_url)
        with addressed(server):
            server.stop()
            error = outcome(lambda: moved(SMALL, "ck", gone))
            server.start()
    assert isinstance(error, S3ConnectionError | AssertionError)
    assert "check the endpoint's address" in str(error)


@pytest.mark.parametrize("moved", [save, load], ids=["save", "load"])
def test_a_name_that_does_not_resolve(fake: FakeS3, moved: Callable[..., object]) -> None:
    # RFC 6761: no name under .invalid exists.
    nowhere = replace(CONFIG, endpoint_url="http://s3.invalid", force_path_style=True)
    error = outcome(lambda: moved(SMALL, "ck", nowhere))
    assert isinstance(error, S3ConnectionError | AssertionError)
    assert "check the endpoint's address" in str(error)


@pytest.mark.parametrize("moved", [save, load], ids=["save", "load"])
def test_a_certificate_that_is_not_trusted(moved: Callable[..., object], tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with FakeS3(ssl_context=context) as server, addressed(server) as fake:
        error = outcome(lambda: moved(SMALL, "ck", CONFIG))
        assert isinstance(error, S3ConnectionError | AssertionError)
        assert "ca_bundle" in str(error)
        # Tried once: it will not be trusted in a second either.
        assert fake.stats()["connections"] <= 1
        trusting = replace(CONFIG, ca_bundle=tmp_path / "ca.pem")
        save(SMALL, "ck", trusting)
        assert_same(load(SMALL, "ck", trusting), SMALL)


@pytest.mark.parametrize("operation", ["PutObject", "GetObject"])
def test_many_requests_that_stall_end_together(fake: FakeS3, operation: str) -> None:
    """Of 100 objects over 2 connections, `retry_timeout_s` and one try after the first stalled.

    Those that stalled are tried again before others are tried at all, but for those that got the
    connections when the first two stalled. In turn, 12 would have been; without a limit, 100.
    """
    connections = 2
    config = replace(
        IMPATIENT,
        max_connections=connections,
        max_attempts=1000,
        read_timeout_s=0.1,
        retry_timeout_s=0.6,
    )
    state: StateDict = {f"layer.{number}": fill((4,), seed=number) for number in range(100)}
    options = {"single_file_per_rank": False}
    save(state, "ck", CONFIG, **options)
    before = fake.keys(BUCKET)
    stalled = fake.inject(Stall(head=False), operation=operation, key="*.distcp", times=None)
    with pytest.raises(S3TimeoutError, match="given up after"):
        load(state, "ck", config) if operation == "GetObject" else save(
            state, "ck", config, **options
        )
    assert len({record.key for record in stalled.struck}) <= 2 * connections
    fake.forget()
    if operation == "GetObject":
        assert fake.keys(BUCKET) == before
    assert_same(load(state, "ck", CONFIG), state)


def test_a_resolver_that_hangs_is_its_own_clients_alone(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves and loads elsewhere go on meanwhile, checksums and all."""
    release, asked = Event(), Semaphore(0)
    look_up = socket.getaddrinfo

    def hang(host: str, *args: Any, **kwargs: Any) -> Any:
        if host.endswith(".invalid") and not kwargs["flags"] & socket.AI_NUMERICHOST:
            asked.release()
            release.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    hosts = [f"http://host{number}.invalid" for number in range(worker_count() + 1)]
    with ThreadPoolExecutor(len(hosts)) as threads:
        config = replace(CONFIG, max_attempts=1)
        lost = [
            threads.submit(
                outcome, partial(save, SMALL, "lost", replace(config, endpoint_url=host))
            )
            for host in hosts
        ]
        try:
            assert asked.acquire(timeout=60)
            save(LARGE, "ck", CONFIG)
            assert_holds(fake, "ck", LARGE)
            assert not any(each.done() for each in lost)
        finally:
            release.set()
        for each in lost:
            assert isinstance(each.result(), S3ConnectionError)


@pytest.mark.parametrize("operation", ["PutObject", "UploadPart", "CompleteMultipartUpload"])
def test_credentials_that_expire_within_a_save(fake: FakeS3, operation: str) -> None:
    """What was sent is gone, the checkpoint that was there is there still."""
    save(OLD, "ck", CONFIG)
    fake.inject(Refuse("ExpiredToken"), operation=operation, times=1)
    with pytest.raises(S3CredentialsError, match="ExpiredToken"):
        save(SMALL if operation == "PutObject" else LARGE, "ck", CONFIG)
    assert_holds(fake, "ck", OLD)
    assert not fake.uploads(BUCKET)


# Requests that only tidy up: their failure is logged, and nobody's error.


@pytest.mark.parametrize(
    ("fault", "tries"),
    [(Refuse("AccessDenied"), 1), (internal_error(), 3), (Drop(), 3)],
    ids=["403", "500", "reset"],
)
def test_a_replaced_object_that_cannot_be_deleted(
    fake: FakeS3, caplog: pytest.LogCaptureFixture, fault: Fault, tries: int
) -> None:
    save(OLD, "ck", CONFIG)
    old = data_keys(fake, "ck")
    deleting = fake.inject(fault, operation="DeleteObject", times=None)
    save(SMALL, "ck", CONFIG)

    assert len(deleting.struck) == tries
    assert_same(load(SMALL, "ck", CONFIG), SMALL)
    assert data_keys(fake, "ck") == named(fake, "ck") | old
    [warning] = [each for each in caplog.records if each.levelname == "WARNING"]
    assert f"could not delete s3://{BUCKET}/{old.pop()}" in warning.getMessage()


@pytest.mark.parametrize("fault", [Refuse("AccessDenied"), Drop()], ids=["403", "reset"])
def test_an_upload_that_cannot_be_aborted(
    fake: FakeS3, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    """The error is that of the part."""
    save(OLD, "ck", CONFIG)
    fake.inject(Refuse("ExpiredToken"), operation="UploadPart", times=None)
    fake.inject(fault, operation="AbortMultipartUpload", times=None)
    with pytest.raises(S3CredentialsError, match="ExpiredToken"):
        save(LARGE, "ck", CONFIG)

    fake.forget()
    assert_holds(fake, "ck", OLD)
    [upload] = fake.uploads(BUCKET)
    assert f"could not abort upload {upload}" in caplog.text
