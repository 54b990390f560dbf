"""Uploads and downloads of the engine, against a store in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import nullcontext
from typing import Any

import pytest

from s3dcp._checksums import combine, crc_of
from s3dcp._downloads import Downloads
from s3dcp._errors import (
    AccessDeniedError,
    CheckpointChangedError,
    IncompleteSaveError,
    ObjectNotFoundError,
    S3ConnectionError,
    S3ProtocolError,
    ServerError,
    ThrottledError,
)
from s3dcp._flow import RetryPolicy, wait_all
from s3dcp._keys import S3Uri
from s3dcp._store import Scatter
from s3dcp._uploads import Upload, checksums_of
from tests._stores import MemoryStore, channel_of

URI = S3Uri("bucket", "key")
DATA = bytes(range(256)) * 40


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def views(*sizes: int) -> list[memoryview]:
    data, out = memoryview(DATA), []
    for size in sizes:
        out.append(data[:size])
        data = data[size:]
    return out


@pytest.mark.parametrize("way", ["put", "send"])
def test_no_byte_is_sent_before_what_comes_first(way: str) -> None:
    """But an upload is begun, and the body's checksums are made."""
    store, seen = MemoryStore(), list[list[str]]()

    async def first() -> None:
        seen.append([name for name, _ in store.requests])
        raise S3ConnectionError("no")

    upload = Upload(channel_of(store), URI, after=first)
    sending = upload.put(views(10)) if way == "put" else upload.send(1, views(10))
    with pytest.raises(S3ConnectionError):
        run(sending)
    assert seen == [[] if way == "put" else ["create_upload"]]
    assert [name for name, _ in store.requests] == seen[0]
    assert not upload.touched


def test_put_returns_the_crc_of_each_view() -> None:
    store = MemoryStore()
    crcs = run(Upload(channel_of(store), URI).put(views(10, 0, 100)))
    assert crcs == [crc_of([v]) for v in views(10, 0, 100)]
    assert store.objects[URI][0] == DATA[:110]


def test_parts_in_any_order_make_the_object() -> None:
    store = MemoryStore()

    async def upload() -> None:
        up = Upload(channel_of(store), URI)
        parts = views(100, 200, 50)
        await asyncio.gather(*[up.send(n, [parts[n - 1]]) for n in (3, 1, 2)])
        assert URI not in store.objects
        await up.complete(3)

    run(upload())
    assert store.objects[URI][0] == DATA[:350]
    assert [name for name, _ in store.requests].count("create_upload") == 1


def test_an_upload_without_all_its_parts_is_not_completed() -> None:
    store = MemoryStore()

    async def upload() -> None:
        up = Upload(channel_of(store), URI)
        await up.send(2, views(5))
        with pytest.raises(IncompleteSaveError, match="1 of 2 parts"):
            await up.complete(2)
        await up.abort()
        await up.abort()
        with pytest.raises(IncompleteSaveError):
            await up.send(1, views(5))

    run(upload())
    assert not store.objects
    assert not store.uploads


@pytest.mark.parametrize("error", [ServerError("500"), S3ConnectionError("reset")])
def test_a_failed_part_is_sent_again(error: Exception) -> None:
    store = MemoryStore()
    failures = iter([error, error])

    def fail(name: str, uri: S3Uri) -> None:
        if name == "upload_part" and (exc := next(failures, None)):
            raise exc

    store.before = fail

    async def upload() -> None:
        up = Upload(channel_of(store), URI)
        await up.send(1, views(5))
        await up.complete(1)

    run(upload())
    assert store.objects[URI][0] == DATA[:5]


def test_a_part_that_fails_for_good_leaves_nothing() -> None:
    store = MemoryStore()

    def fail(name: str, uri: S3Uri) -> None:
        if name == "upload_part" and len(store.requests) > 3:
            raise AccessDeniedError("403")

    store.before = fail
    with pytest.raises(AccessDeniedError):
        run(Upload(channel_of(store), URI).send_all(views(10, 10, 10, 10)))
    assert not store.objects
    assert not store.uploads
    assert store.requests[-1][0] == "abort_upload"


def test_a_lost_response_to_the_completion_is_settled() -> None:
    store = MemoryStore()
    lost = iter([S3ConnectionError("reset")])

    def lose(name: str, uri: S3Uri) -> None:
        if name == "complete_upload" and (exc := next(lost, None)):
            raise exc

    store.after = lose
    run(Upload(channel_of(store), URI).send_all(views(10, 10)))
    assert store.objects[URI][0] == DATA[:20]


def test_a_lost_completion_is_not_taken_for_another_object() -> None:
    """Of what is there instead, the size tells that it is not what was sent."""
    store = MemoryStore()

    def lose(name: str, uri: S3Uri) -> None:
        if name == "complete_upload":
            store.write(uri, DATA[:19])
            raise S3ConnectionError("reset")

    store.after = lose
    with pytest.raises(ObjectNotFoundError):
        run(Upload(channel_of(store), URI).send_all(views(10, 10)))
    assert store.requests[-2][0] == "head"


def test_abort_cancels_what_is_being_sent() -> None:
    store = MemoryStore()

    async def upload() -> None:
        started, never = asyncio.Event(), asyncio.Event()
        original = store.upload_part

        async def hang(*args: Any, **kwargs: Any) -> Any:
            started.set()
            await never.wait()
            return await original(*args, **kwargs)

        store.upload_part = hang  # type: ignore[method-assign]
        up = Upload(channel_of(store), URI)
        sending = asyncio.create_task(up.send(1, views(5)))
        await started.wait()
        await up.abort()
        assert sending.cancelled()

    run(upload())
    assert not store.uploads


@pytest.mark.parametrize("algorithm", ["CRC64NVME", "CRC32C", "CRC32", None])
def test_one_pass_gives_both_checksums(algorithm: Any) -> None:
    body = views(100, 28, 1)
    crcs, checksum = checksums_of(body, algorithm)
    assert crcs == [crc_of([v]) for v in body]
    if algorithm is None:
        assert checksum is None
    else:
        assert checksum is not None
        assert checksum.value == crc_of([memoryview(DATA[:129])], algorithm)


def test_crcs_combine() -> None:
    body = views(7, 0, 100, 3)
    pieces = [(crc_of([v]), v.nbytes) for v in body]
    assert combine(pieces) == crc_of(body) == crc_of([memoryview(DATA[:110])])


def test_scatter() -> None:
    places = [bytearray(3), bytearray(0), bytearray(5)]
    scatter = Scatter([memoryview(p) for p in places])
    scatter.write(b"ab")
    assert scatter.remaining == 6
    assert scatter.free().nbytes == 1
    scatter.write(b"cdefgh")
    assert (bytes(places[0]), bytes(places[2])) == (b"abc", b"defgh")
    assert scatter.received == scatter.size_bytes == 8


def test_a_range_goes_where_it_is_wanted() -> None:
    store = MemoryStore()
    store.write(URI, DATA)
    places = [memoryview(bytearray(n)) for n in (5, 20)]
    crcs = run(Downloads(channel_of(store)).fetch(URI, 100, places, checked=places[1:]))
    assert b"".join(places) == DATA[100:125]
    assert crcs == [crc_of([memoryview(DATA[105:125])])]


def test_a_body_is_resumed_from_the_bytes_held() -> None:
    store = MemoryStore()
    store.write(URI, DATA)
    asked: list[tuple[int, int, str | None]] = []
    whole = store.get_range

    async def break_off(
        uri: S3Uri, start: int, into: Scatter, *, if_match: str | None = None
    ) -> Any:
        asked.append((start, into.remaining, if_match))
        if len(asked) == 2:
            into.write(DATA[start : start + 7])
            raise S3ConnectionError("reset")
        return await whole(uri, start, into, if_match=if_match)

    store.get_range = break_off  # type: ignore[method-assign]
    place = memoryview(bytearray(30))

    async def fetch() -> None:
        downloads = Downloads(channel_of(store))
        await downloads.fetch(URI, 0, [memoryview(bytearray(1))])
        await downloads.fetch(URI, 10, [place])

    run(fetch())
    assert place == DATA[10:40]
    assert asked == [(0, 1, None), (10, 30, '"1"'), (17, 23, '"1"')]


def test_a_body_is_resumed_from_the_same_object_even_if_it_is_the_first() -> None:
    store = MemoryStore()
    store.write(URI, DATA)
    whole = store.get_range

    async def break_off(
        uri: S3Uri, start: int, into: Scatter, *, if_match: str | None = None
    ) -> Any:
        if not into.received:
            into.etag = '"1"'
            into.write(DATA[start : start + 7])
            store.write(URI, DATA[::-1])
            raise S3ConnectionError("reset")
        return await whole(uri, start, into, if_match=if_match)

    store.get_range = break_off  # type: ignore[method-assign]
    with pytest.raises(CheckpointChangedError, match="replaced"):
        run(Downloads(channel_of(store)).fetch(URI, 0, [memoryview(bytearray(30))]))


def test_a_body_that_was_too_long_is_read_again_from_the_start() -> None:
    store = MemoryStore()
    store.write(URI, DATA)
    whole = store.get_range
    asked: list[int] = []

    async def too_long(
        uri: S3Uri, start: int, into: Scatter, *, if_match: str | None = None
    ) -> Any:
        asked.append(into.remaining)
        if len(asked) == 1:
            into.write(bytes(into.remaining))
            raise S3ProtocolError("longer than its Content-Length")
        return await whole(uri, start, into, if_match=if_match)

    store.get_range = too_long  # type: ignore[method-assign]
    place = memoryview(bytearray(30))
    run(Downloads(channel_of(store)).fetch(URI, 10, [place]))
    assert place == DATA[10:40]
    assert asked == [30, 30]


def test_an_object_that_changes_is_not_mixed() -> None:
    store = MemoryStore()
    store.write(URI, DATA)

    async def fetch() -> None:
        downloads = Downloads(channel_of(store))
        await downloads.fetch(URI, 0, [memoryview(bytearray(5))])
        store.write(URI, DATA[::-1])
        with pytest.raises(CheckpointChangedError, match="replaced"):
            await downloads.fetch(URI, 5, [memoryview(bytearray(5))])

    run(fetch())


@pytest.mark.parametrize(
    ("first", "then", "same"),
    [
        ('"a"', '"a"', True),
        ('"a"', 'W/"a"', True),
        ('W/"a"', '"a"', True),
        ('W/"a"', 'W/"b"', False),
        ('W/"a"', '"b"', False),
        ('"a"', '"b"', False),
        ('"a"', None, True),
    ],
)
def test_which_answers_are_of_one_object(first: str, then: str | None, same: bool) -> None:
    downloads = Downloads(channel_of(MemoryStore()))
    downloads.pin(URI, first)
    with nullcontext() if same else pytest.raises(CheckpointChangedError):
        downloads.pin(URI, then)


def test_a_store_that_ignores_if_match_is_found_out() -> None:
    store = MemoryStore()
    store.write(URI, DATA)
    whole = store.get_range

    async def careless(
        uri: S3Uri, start: int, into: Scatter, *, if_match: str | None = None
    ) -> Any:
        return await whole(uri, start, into)

    store.get_range = careless  # type: ignore[method-assign]

    async def fetch() -> None:
        downloads = Downloads(channel_of(store))
        await downloads.fetch(URI, 0, [memoryview(bytearray(5))])
        store.write(URI, DATA[::-1])
        with pytest.raises(CheckpointChangedError):
            await downloads.fetch(URI, 5, [memoryview(bytearray(5))])

    run(fetch())


@pytest.mark.parametrize(
    ("error", "tries"),
    [(ServerError("500"), 6), (S3ProtocolError("?"), 3), (AccessDeniedError(), 1)],
)
def test_attempts_are_bounded(error: Exception, tries: int) -> None:
    store = MemoryStore()

    def fail(name: str, uri: S3Uri) -> None:
        raise error

    store.before = fail
    channel = channel_of(store, max_attempts=6)
    with pytest.raises(type(error)):
        run(Upload(channel, URI).put(views(3)))
    assert len(store.requests) == tries


def test_delays_are_jittered_bounded_and_longer_when_throttled() -> None:
    policy = RetryPolicy(jitter=lambda: 1.0)
    delays = [policy.delay_s(n, ServerError()) for n in range(1, 12)]
    assert delays[:3] == [0.05, 0.1, 0.2]
    assert max(delays) == 20.0
    assert policy.delay_s(1, ThrottledError()) == 0.5
    assert RetryPolicy(jitter=lambda: 0.0).delay_s(5, ServerError()) == 0


def test_slots_bound_what_is_on_the_wire() -> None:
    store = MemoryStore()
    now, most = 0, 0
    original = store.put

    async def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return await original(*args, **kwargs)

    store.put = count  # type: ignore[method-assign]

    async def upload() -> None:
        channel = channel_of(store, slots=3)
        await asyncio.gather(
            *[Upload(channel, S3Uri("b", str(n))).put(views(1)) for n in range(20)]
        )

    run(upload())
    assert most == 3


def test_one_failure_cancels_the_others_and_comes_alone() -> None:
    async def check() -> None:
        never = asyncio.Event()
        cancelled: list[bool] = []

        async def wait() -> None:
            try:
                await never.wait()
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        async def fail() -> None:
            raise ServerError("500")

        with pytest.raises(ServerError):
            await wait_all([wait, fail, wait])
        assert cancelled == [True, True]

    run(check())
