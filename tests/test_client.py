"""S3Client: from any loop, thread and process; and what the store below it takes for an answer."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiobotocore
import botocore
import pytest
import uvloop
from botocore.loaders import JSONFileLoader
from botocore.utils import parse_timestamp

from s3dcp import (
    BucketNotFoundError,
    InvalidS3UriError,
    ObjectInfo,
    ObjectNotFoundError,
    S3Client,
    S3ClientConfig,
    S3ConnectionError,
    S3Exception,
    S3ProtocolError,
    ServerError,
    _botocore,
)
from s3dcp._keys import S3Uri
from s3dcp._portal import portal
from s3dcp._store import Scatter, Store
from tests._scripted import (
    HANG_UP,
    LEAN,
    Handler,
    Request,
    Scripted,
    Serve,
    answer,
    error,
    forward,
    hang,
)
from tests._servers import Server

MiB = 1 << 20
_TIMEOUT_S = 60.0

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def contents(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def run_uvloop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)


@pytest.fixture(params=[asyncio.run, run_uvloop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    chosen: Run = request.param
    return chosen


@pytest.fixture
def client(server: Server) -> S3Client:
    return S3Client(server.region)


@pytest.mark.usefixtures("s3")
class TestObjects:
    def test_all_of_it(self, run: Run, client: S3Client, bucket: str) -> None:
        async def scenario() -> None:
            async with client:
                await client.put_object(bucket, "a/1", b"body")
                await client.put_object(bucket, "a/b/2", bytearray(b"more"))
                await client.put_object(bucket, "empty", memoryview(b""))
                assert await client.get_object(bucket, "a/1") == b"body"
                assert await client.get_object(bucket, "empty") == b""
                assert await client.get_object(bucket, "a/1", 1, 3) == b"od"
                assert await client.get_object(bucket, "a/1", 2) == b"dy"

                info = await client.head_object(bucket, "a/1")
                assert isinstance(info, ObjectInfo)
                assert (info.key, info.size, info.size_bytes) == ("a/1", 4, 4)
                assert info.etag is not None
                assert info.last_modified is not None

                found = [info async for info in client.list_objects(bucket)]
                assert [(f.key, f.size) for f in found] == [("a/1", 4), ("a/b/2", 4), ("empty", 0)]
                folder = [info.key async for info in client.list_objects(bucket, "a/", "/")]
                assert sorted(folder) == ["a/1", "a/b/"]

                await client.copy_object(bucket, "a/1", bucket, "copy of + %41")
                assert await client.get_object(bucket, "copy of + %41") == b"body"
                await client.delete_object(bucket, "a/1")
                await client.delete_object(bucket, "a/1")
                with pytest.raises(ObjectNotFoundError) as caught:
                    await client.get_object(bucket, "a/1")
                assert (caught.value.bucket, caught.value.key) == (bucket, "a/1")

        run(scenario())

    @pytest.mark.parametrize("size", [8 * MiB, 20 * MiB + 3])
    def test_large_ones(self, client: S3Client, boto: Any, bucket: str, size: int) -> None:
        body = contents(size)

        async def scenario() -> bool:
            await client.put_object(bucket, "key", body)
            return await client.get_object(bucket, "key") == body

        assert asyncio.run(scenario())
        assert boto.head_object(Bucket=bucket, Key="key")["ContentLength"] == size

    def test_in_a_bucket_that_is_missing(self, client: S3Client, bucket: str) -> None:
        missing = f"{bucket}-missing"

        async def scenario() -> None:
            for call in (
                client.put_object(missing, "key", b""),
                client.delete_object(missing, "key"),
                client.get_object(missing, "key", 0, 1),
                anext(client.list_objects(missing)),
            ):
                with pytest.raises(BucketNotFoundError):
                    await call
            for call in (client.head_object(missing, "key"), client.get_object(missing, "key")):
                with pytest.raises(ObjectNotFoundError):  # a HEAD's 404 says no more
                    await call

        asyncio.run(scenario())


@pytest.mark.parametrize(
    ("bucket", "key"), [("", "key"), ("bucket", ""), ("bucket/a", "key"), ("b", "a/../key")]
)
def test_what_is_no_place(bucket: str, key: str) -> None:
    client = S3Client("us-east-1")

    async def scenario() -> None:
        for call in (
            client.get_object(bucket, key),
            client.put_object(bucket, key, b""),
            client.head_object(bucket, key),
            client.delete_object(bucket, key),
            client.copy_object(bucket, key, "other", "key"),
            client.copy_object("other", "key", bucket, key),
        ):
            with pytest.raises(InvalidS3UriError):
                await call

    asyncio.run(scenario())


def test_a_bucket_to_list_is_no_path() -> None:
    async def scenario() -> None:
        with pytest.raises(InvalidS3UriError):
            await anext(S3Client("us-east-1").list_objects("bucket/a"))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("said", "is_simple"),
    [
        ("Wed, 21 Oct 2015 07:28:00 GMT", True),
        ("Wed, 1 Jul 2015 07:28:00 +0200", False),
        ("Wed, 1 Jul 2015 07:28:00 -0000", False),
        ("2009-10-12T17:50:30.000Z", True),
        ("2009-10-12T17:50:30Z", True),
        ("2009-10-12T17:50:30.123456789Z", True),
        ("2009-10-12T19:50:30+02:00", True),
        ("2009-10-12T17:50:30", True),
        ("2009-10-12T17:50:30 UTC", False),
        ("Wednesday, 21-Oct-15 07:28:00 GMT", False),
        ("Wed, 21 Oct 2015 07:28:00 PM GMT", False),
        ("2015 Oct 21 07:28:00 GMT", False),
        ("2009-10-12 17:50:30", False),
        ("1445412480", False),
        (1445412480, False),
        (1445412480.5, False),
    ],
)
def test_times_are_what_botocore_reads_itself(
    monkeypatch: pytest.MonkeyPatch, said: object, is_simple: bool
) -> None:
    expected: datetime = parse_timestamp(said)
    asked: list[object] = []

    def slowly(text: object) -> datetime:
        asked.append(text)
        return expected

    monkeypatch.setattr(_botocore, "parse_timestamp", slowly)
    found = _botocore._moment(said)
    assert (found, found.utcoffset()) == (expected, expected.utcoffset())
    assert asked == ([] if is_simple else [said])


@pytest.mark.parametrize(
    "name", ["partitions", "s3/2006-03-01/service-2", "s3/2006-03-01/paginators-1", "no-such"]
)
def test_models_are_what_botocore_reads_itself(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made: list[object] = []

    def noted(pairs: list[tuple[str, Any]], ordered: Any = _botocore._ordered) -> Any:
        made.append(found := ordered(pairs))
        return found

    monkeypatch.setattr(_botocore, "_ordered", noted)
    path = str(Path(botocore.__file__).parent / "data" / name)
    found = _botocore._ModelFiles().load_file(path)
    assert found == JSONFileLoader().load_file(path)
    assert not found or found is made[-1]  # each object by a call of Python's


class TestFromAnywhere:
    """The I/O is the portal's; its users may be on any loop."""

    def test_from_several_loops_at_once(self, client: S3Client, bucket: str) -> None:
        together = threading.Barrier(6)

        async def scenario(number: int) -> None:
            together.wait(_TIMEOUT_S)
            body = contents(number * 200_000)
            keys = [f"{number}/{index}" for index in range(4)]
            await asyncio.gather(*(client.put_object(bucket, key, body) for key in keys))
            found = await asyncio.gather(*(client.get_object(bucket, key) for key in keys))
            assert all(got == body for got in found)

        def loop(number: int) -> None:
            (asyncio.run if number % 2 else run_uvloop)(scenario(number))

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(loop, range(6)))

    def test_from_loops_after_each_other(self, client: S3Client, bucket: str) -> None:
        for number in range(3):
            asyncio.run(client.put_object(bucket, "key", b"%d" % number))
            assert run_uvloop(client.get_object(bucket, "key")) == b"%d" % number

    def test_from_the_portals_own_thread(self, client: S3Client, bucket: str) -> None:
        async def scenario() -> bytearray:
            await client.put_object(bucket, "key", b"body")
            return await client.get_object(bucket, "key")

        assert portal().call(scenario) == b"body"

    def test_the_callers_loop_is_not_held_up(self, client: S3Client, bucket: str) -> None:
        async def scenario() -> int:
            rounds = 0
            task = asyncio.create_task(client.put_object(bucket, "key", contents(8 * MiB)))
            while not task.done():
                await asyncio.sleep(0)
                rounds += 1
            await task
            return rounds

        assert asyncio.run(scenario()) > 10

    def test_pickled(self, server: Server, bucket: str) -> None:
        config = S3ClientConfig(max_attempts=3)
        client = S3Client(server.region, config)
        client.connect()
        again = pickle.loads(pickle.dumps(client))
        assert (again.region, again.s3client_config) == (server.region, config)
        assert repr(again) == f"S3Client(region={server.region!r})"
        asyncio.run(again.put_object(bucket, "key", b"body"))
        assert asyncio.run(client.get_object(bucket, "key")) == b"body"


class TestPools:
    def test_handles_share_one(self, server: Server) -> None:
        config = S3ClientConfig(max_attempts=3)
        first = S3Client(server.region, config).connect()
        assert S3Client(server.region, S3ClientConfig(max_attempts=3)).connect() == first
        assert S3Client(server.region, S3ClientConfig(max_attempts=4)).connect() != first
        assert S3Client("eu-west-1", config).connect() != first

    def test_the_environment_tells_them_apart(
        self, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = S3Client(server.region)
        before = client.connect()
        assert client.connect() == before
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        other = client.connect()
        assert other != before
        assert "another" not in repr(client.__dict__)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_key)
        assert client.connect() == before

    def test_at_once_they_make_one(self, server: Server) -> None:
        config = S3ClientConfig(max_attempts=7)
        with ThreadPoolExecutor(8) as threads:
            made = list(
                threads.map(lambda _: S3Client(server.region, config).connect()[1], range(8))
            )
        assert len({id(channel) for channel in made}) == 1

    def test_the_region_may_come_from_the_environment(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_REGION", "eu-west-3")
        assert S3Client().region == "eu-west-3"
        assert S3Client("eu-west-1").region == "eu-west-1"
        monkeypatch.delenv("AWS_REGION")
        assert S3Client().region is None

    def test_a_closed_portal_takes_them_along(self, client: S3Client, bucket: str) -> None:
        portal().close()
        gc.freeze()  # so that to collect takes no time over what was there before
        asyncio.run(client.put_object(bucket, "key", b"body"))
        here, channel = client.connect()
        pool = weakref.ref(channel.store)
        here.close()
        del here, channel

        assert asyncio.run(client.get_object(bucket, "key")) == b"body"
        client.connect()
        gc.collect()
        gc.unfreeze()
        assert pool() is None


class TestCancellation:
    @pytest.mark.parametrize("hanging", ["GET", "PUT"])
    def test_it_leaves_the_pool_usable(
        self, ask: Ask, run: Run, server: Server, bucket: str, hanging: str
    ) -> None:
        entered = threading.Event()
        real = forward(server.endpoint_url)
        body = contents(MiB)

        async def handle(request: Request) -> bytes:
            if request.method == hanging and not entered.is_set():
                entered.set()
                # The head and a part of the body: the receiver has taken over by then.
                return b"HTTP/1.1 206 OK\r\nContent-Length: 1048576\r\n" + (
                    b"Content-Range: bytes 0-1048575/1048576\r\n\r\n" + body[:500_000]
                    if hanging == "GET"
                    else b""
                )
            made = real(request)
            return made if isinstance(made, bytes) else await made

        async def scenario(endpoint_url: str) -> None:
            config = S3ClientConfig(endpoint_url=endpoint_url, max_connections=1)
            client = S3Client(server.region, config)
            if hanging == "GET":
                await client.put_object(bucket, "key", body)
                task = asyncio.create_task(client.get_object(bucket, "key"))
            else:
                task = asyncio.create_task(client.put_object(bucket, "key", body))  # type: ignore[arg-type]
            await asyncio.to_thread(entered.wait, _TIMEOUT_S)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await client.put_object(bucket, "key", body)
            assert await client.get_object(bucket, "key") == body

        with Scripted(handle) as scripted:
            run(scenario(scripted.endpoint_url))
            # The connection that was given up is not the one that is used since.
            requests = [r for r in scripted.requests if r.method in {"GET", "PUT"}]
            given_up = next(r for r in requests if r.method == hanging)
            later = requests[requests.index(given_up) + 1 :]
            assert later
            assert given_up.connection not in {request.connection for request in later}
        assert entered.is_set()


FORK = f"""{LEAN}
import asyncio, os, warnings
from s3dcp._s3client import S3Client
from s3dcp._portal import portal
# Python 3.12 and later warn of a fork beside threads, which is what is tested.
warnings.simplefilter("ignore", DeprecationWarning)
client, bucket = S3Client(), sys.argv[1]

def use(who):
    asyncio.run(client.put_object(bucket, who, who.encode() * 300_000))
    assert asyncio.run(client.get_object(bucket, who)) == who.encode() * 300_000
    client.connect()

use("before")
reading, writing = os.pipe()
child = os.fork()
if not child:
    if sys.argv[2] == "child last":
        os.close(writing)
        os.read(reading, 1)
    use("child")
    use("before")
    sys.exit(7)
os.close(reading)
if sys.argv[2] == "child last":
    use("parent")
    os.close(writing)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
use("parent")
use("before")
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("order", ["child first", "child last"])
def test_after_a_fork(server: Server, boto: Any, bucket: str, order: str) -> None:
    """Parent and child share the handle, and nothing that it stands for."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, bucket, order],
        env=os.environ | server.environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    found = boto.list_objects_v2(Bucket=bucket)["Contents"]
    assert [entry["Key"] for entry in found] == ["before", "child", "parent"]


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


Ask = Callable[..., tuple[Any, list[Request]]]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    with Scripted(hang) as scripted:
        yield scripted.answering


@pytest.fixture
def ask(serve: Serve, credentials: None) -> Ask:
    """Lets a scripted store answer one call; returns its outcome and the requests."""

    def ask(
        handler: Handler, call: Callable[[S3Client], Coroutine[Any, Any, Any]], **settings: Any
    ) -> tuple[Any, list[Request]]:
        with serve(handler) as scripted:
            config = S3ClientConfig(endpoint_url=scripted.endpoint_url, **settings)
            try:
                outcome = asyncio.run(call(S3Client("us-east-1", config)))
            except S3Exception as exc:
                outcome = exc
            return outcome, scripted.requests

    return ask


async def first_of(client: S3Client) -> ObjectInfo:
    return await anext(client.list_objects("bucket"))


def ranged(body: bytes, shown: str | None, status: int = 206) -> bytes:
    return answer(status, body, **({"Content_Range": shown} if shown else {}), ETag='"e"')


KEY = S3Uri("bucket", "key")
CONDITIONAL: dict[str, Callable[[Store, str], Awaitable[object]]] = {
    "GetObject": lambda store, etag: store.get_range(
        KEY, 0, Scatter([memoryview(bytearray(4))]), if_match=etag
    ),
    "DeleteObject": lambda store, etag: store.delete(KEY, if_match=etag),
    "CopyObject": lambda store, etag: store.copy(KEY, KEY, if_match=etag),
    "UploadPartCopy": lambda store, etag: store.copy_part(KEY, 0, 4, KEY, "id", 1, if_match=etag),
}


@pytest.mark.parametrize("operation", CONDITIONAL)
@pytest.mark.parametrize(("etag", "matched"), [('"e"', True), ('W/"e"', False)])
def test_weak_etags_are_not_matched(ask: Ask, operation: str, etag: str, matched: bool) -> None:
    """RFC 9110: they never would."""
    _, [request] = ask(
        lambda _: error(403, "AccessDenied"),
        lambda c: c._run(lambda channel: CONDITIONAL[operation](channel.store, etag)),
        conditional_writes=True,
    )
    conditions = [value for name, value in request.headers.items() if name.endswith("if-match")]
    assert conditions == ([etag] if matched else [])


class TestAnswers:
    """What a store may and may not say."""

    @pytest.mark.parametrize(
        "said",
        [
            ranged(b"body", "bytes 0-3/10"),
            ranged(b"body", "bytes 0-3/10", 200),  # rclone's
            ranged(b"body", None, 200),  # the whole object is what was asked for
        ],
    )
    def test_a_range(self, ask: Ask, said: bytes) -> None:
        outcome, requests = ask(lambda _: said, lambda c: c.get_object("bucket", "key", 0, 4))
        assert outcome == b"body"
        assert requests[0].headers["range"] == "bytes=0-3"

    @pytest.mark.parametrize(
        "said",
        [
            ranged(b"body", "bytes 1-4/10"),
            ranged(b"body", "bytes 0-4/10"),
            ranged(b"bodybody", "bytes 0-3/10"),
            ranged(b"bodybody", None, 200),
            ranged(b"bod", None, 200),
            ranged(b"body", None, 206),
            ranged(b"body", "bytes */10"),
            ranged(b"body", "bytes 0-3/*"),
            ranged(b"body", "bytes 0-3/" + "9" * 30),
            ranged(b"body", "b0dy"),
            b"HTTP/1.1 206 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
        ],
    )
    def test_another_range(self, ask: Ask, said: bytes) -> None:
        """A store's habit does not go away: it is asked three times at most."""
        outcome, requests = ask(lambda _: said, lambda c: c.get_object("bucket", "key", 0, 4))
        assert type(outcome) is S3ProtocolError
        assert "Asked for bytes [0, 4)" in str(outcome)
        assert len(requests) == 3

    def test_the_whole_is_no_range_though_it_is_as_long(self, ask: Ask) -> None:
        said = ranged(b"body", None, 200)
        outcome, _ = ask(lambda _: said, lambda c: c.get_object("bucket", "key", 4, 8))
        assert type(outcome) is S3ProtocolError
        assert "Asked for bytes [4, 8)" in str(outcome)

    def test_another_object_in_between(self, ask: Ask) -> None:
        """A range of one object is never joined with a range of another."""

        def handle(request: Request) -> bytes:
            start, end = (int(n) for n in request.headers["range"][6:].split("-"))
            body, shown = bytes(end + 1 - start), f"bytes {start}-{end}/{10 * MiB}"
            return answer(206, body, Content_Range=shown, ETag=f'"{start}"')

        outcome, _ = ask(
            handle, lambda c: c.get_object("bucket", "key", 0, 10 * MiB), part_size=5 * MiB
        )
        assert "was replaced while it was being read" in str(outcome)

    def test_nonsense(self, ask: Ask) -> None:
        outcome, _ = ask(
            lambda _: answer(200, b"<html>Welcome"),
            first_of,
            max_attempts=2,
        )
        # botocore takes it for one of S3's errors after a 200.
        assert type(outcome) in {S3ProtocolError, ServerError}

    @pytest.mark.parametrize(
        "said", ["yesterday", "", "9" * 40, f"Wed, 21 Oct {'9' * 40} 07:28:00 GMT"]
    )
    def test_no_time(self, ask: Ask, said: str) -> None:
        outcome, requests = ask(
            lambda _: answer(200, Last_Modified=said, ETag='"e"'),
            lambda c: c.head_object("bucket", "key"),
        )
        assert type(outcome) is S3ProtocolError
        assert "HeadObject s3://bucket/key" in str(outcome)
        assert len(requests) == 3

    def test_an_upload_without_an_id(self, ask: Ask) -> None:
        outcome, requests = ask(
            lambda _: answer(200, b"<InitiateMultipartUploadResult/>"),
            lambda c: c.put_object("bucket", "key", bytes(9 * MiB)),
        )
        assert type(outcome) is S3ProtocolError
        assert len(requests) == 3

    def test_an_error_after_200(self, ask: Ask) -> None:
        """S3 answers a completion before it knows how it ends."""
        failed = error(200, "InternalError")

        def handle(request: Request) -> bytes:
            if "uploads" in request.query:
                return answer(200, b"<R><UploadId>id</UploadId></R>")
            if request.method == "POST":
                return failed
            return answer(200, ETag='"e"')

        outcome, requests = ask(
            handle, lambda c: c.put_object("bucket", "key", bytes(9 * MiB)), max_attempts=2
        )
        assert type(outcome) is ServerError
        posts = [request for request in requests if request.method == "POST"]
        assert len(posts) == 1 + 2
        # And then the upload is dropped.
        assert [request.method for request in requests][-1] == "DELETE"

    def test_a_checksum_that_is_not_that_of_what_was_sent(self, ask: Ask) -> None:
        outcome, requests = ask(
            lambda _: answer(200, x_amz_checksum_crc64nvme="AAAAAAAAAAA=", ETag='"e"'),
            lambda c: c.put_object("bucket", "key", b"body"),
        )
        assert type(outcome) is S3ProtocolError
        assert "is not that of the bytes sent" in str(outcome)
        assert len(requests) == 3

    @pytest.mark.parametrize("code", [500, 502, 503, 504])
    def test_what_may_be_tried_again_is(self, ask: Ask, code: int) -> None:
        answers = [error(code, str(code)), answer(200, ETag='"e"')]
        outcome, requests = ask(
            lambda _: answers.pop(0),
            lambda c: c.put_object("bucket", "key", b"body"),
        )
        assert outcome is None
        assert [request.body for request in requests] == [b"body"] * 2

    def test_each_attempt_is_signed_anew(self, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
        """A signature is good for 15 minutes, and a retry may come later."""
        clock = iter(datetime.now(UTC) + n * timedelta(minutes=10) for n in itertools.count())
        for signer in ("botocore.auth", "botocore.crt.auth"):
            monkeypatch.setattr(f"{signer}.get_current_datetime", lambda **_: next(clock))
        answers = [error(500, "InternalError"), error(503, "SlowDown"), answer(200, ETag='"e"')]
        outcome, requests = ask(
            lambda _: answers.pop(0), lambda c: c.put_object("bucket", "key", b"body")
        )
        assert outcome is None
        for name in ("x-amz-date", "authorization", "amz-sdk-invocation-id"):
            assert len({request.headers[name] for request in requests}) == 3

    def test_attempts_are_counted_once(self, ask: Ask) -> None:
        """Those of botocore are off: these are all the engine's."""
        outcome, requests = ask(
            lambda _: error(500, "InternalError"),
            lambda c: c.put_object("bucket", "key", b"body"),
            max_attempts=3,
        )
        assert type(outcome) is ServerError
        assert len(requests) == 3

    def test_a_connection_that_is_closed_instead(self, ask: Ask) -> None:
        outcome, requests = ask(
            lambda _: HANG_UP, lambda c: c.put_object("bucket", "key", b"body"), max_attempts=2
        )
        assert type(outcome) is S3ConnectionError
        assert len(requests) == 2  # aiohttp, by itself, would send each once more

    def test_what_a_request_carries(self, ask: Ask) -> None:
        cases: list[tuple[dict[str, Any], str | None]] = [
            ({}, "x-amz-checksum-crc64nvme"),
            ({"checksum": "CRC32C"}, "x-amz-checksum-crc32c"),
            ({"checksum": "CRC32"}, "x-amz-checksum-crc32"),
            ({"checksum": None}, None),
        ]
        for settings, checksum in cases:
            _, [request] = ask(
                lambda _: answer(200, ETag='"e"'),
                lambda c: c.put_object("bucket", "key", contents(200_000)),
                **settings,
            )
            assert request.body == contents(200_000)
            headers = request.headers
            sums = {name for name in headers if name.startswith("x-amz-checksum-")}
            assert sums == ({checksum} if checksum else set())
            assert headers["content-length"] == "200000"
            assert headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
            assert "lib/s3dcp" in headers["user-agent"]
            assert {"expect", "transfer-encoding", "content-encoding"}.isdisjoint(headers)

    def test_who_asks(self, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
        def agent() -> str:
            _, [request] = ask(
                lambda _: answer(200, ETag='"e"'), lambda c: c.head_object("bucket", "key")
            )
            return request.headers["user-agent"]

        for name in (f"aiobotocore/{aiobotocore.__version__}", f"botocore/{botocore.__version__}"):
            assert agent().count(name) == 1
        assert agent().endswith(" lib/s3dcp")
        monkeypatch.setenv("AWS_EXECUTION_ENV", "cluster")
        assert "exec-env/cluster" in agent().split()
        monkeypatch.setenv("AWS_EXECUTION_ENV", "a\nb: c")  # which botocore makes a name of
        assert "exec-env/a-b--c" in agent().split()
        monkeypatch.setenv("AWS_SDK_UA_APP_ID", "trainer 7")
        assert "app/trainer-7" in agent().split()
        assert agent().endswith(" lib/s3dcp")
