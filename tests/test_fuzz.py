"""Damaged and forged bytes for every parser: a typed error or a right result, and nothing else.

The examples start from valid bytes and are changed with the format in mind. `make test` tries some,
the same ones every time; `make fuzz` others, for as long as it is told to.
"""

from __future__ import annotations

import asyncio
import io
import pickle
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from typing import Any, Self, TypeVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from s3dcp import S3ClientConfig, S3ConnectionError, S3Exception
from s3dcp._client import S3Store
from s3dcp._errors import CorruptMetadataError
from s3dcp._keys import S3Uri
from s3dcp._layouts import parse_header
from s3dcp._metadata import _CRCS, ItemCrcs, annotate, crcs_of, load_metadata
from s3dcp._ranges import Fragment, PartCutter, Want, coalesce, cut, even_ranges
from s3dcp._store import Checksum, ObjectInfo, Part, PartList, Receipt, Scatter
from s3dcp._torch_internals import _StorageInfo
from tests._scripted import HANG_UP, Request, Scripted
from tests.test_layouts import check_within
from tests.test_metadata import sample

T = TypeVar("T")

#: How many examples there are of what takes microseconds, in units of those of a request.
_CHEAP = 5


def cheap(test: T) -> T:
    """Try more examples than of others."""
    made: T = settings(max_examples=_CHEAP * settings().max_examples)(test)
    return made


# Where botocore cannot read the head of an answer whose body it leaves to us, nobody has that
# answer to close it: its connection goes when the garbage collector does.
unclosed = pytest.mark.filterwarnings(
    "ignore:Unclosed connection:ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


# How bytes are changed.


@st.composite
def changed(draw: st.DrawFn, seeds: list[bytes], tokens: list[bytes]) -> bytes:
    """Draw one of `seeds` with some changes: flips, cuts, copies, tokens, pieces of another."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(at + draw(st.integers(0, 40)), len(data))
        match draw(st.integers(0, 5)):
            case 0 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1 if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case 2:
                data[at:end] = draw(st.sampled_from(tokens))
            case 3:
                other = draw(st.sampled_from(seeds))
                start = draw(st.integers(0, len(other)))
                data[at:end] = other[start : start + draw(st.integers(0, 200))]
            case 4:
                data[at:at] = data[at:end] * draw(st.integers(1, 3))
            case _:
                del data[at : draw(st.sampled_from([end, len(data)]))]
    return bytes(data)


def traced(call: Callable[[], T], most_bytes: int) -> T:
    """Call, and assert that no more was allocated at any time."""
    tracemalloc.start()
    try:
        return call()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most_bytes


# Metadata.


def with_crcs() -> Metadata:
    metadata = sample(2)
    for info in metadata.storage_data.values():
        annotate(info, ItemCrcs(item=2**63, data_offset=704, data_bytes=100))
    return metadata


PICKLES = [
    *(
        pickle.dumps(metadata, protocol)
        for metadata in (sample(1), with_crcs())
        for protocol in (2, 4)
    ),
    pickle.dumps({"a": [1, (2, 3)]}),
]
OPCODES = [
    *(
        b"r\xff\xff\xff\x0f",
        b"r\0\0\0\x10",
        b"\x96\0\0\0\0\x01\0\0\0",
        b"\x97",
        b"0",
        b"2",
        b"1",
        b"Q",
    ),
    *(b"\x85" * 50, b"(" * 50, b"]" * 50, b"}", b"t", b"u", b"s", b"a", b"e", b"R", b"b", b"\x81"),
    *(b"h\0", b"j\0\0\0\0", b"\x94", b"N", b".", b"cos\nsystem\n", b"\x8c\x02os\x8c\x06system\x93"),
    *(b"X\xff\xff\xff\xff", b"\x95" + bytes(8), b"\x8b\xff\xff\xff\x7f", b"ctorch\nSize\n(t\x85R"),
    b"J\xff\xff\xff\xff",
]


@cheap
@given(changed(PICKLES, OPCODES))
def test_metadata(data: bytes) -> None:
    try:
        metadata = traced(lambda: load_metadata(data, source="x"), 8 << 20)
    except CorruptMetadataError:
        return
    assert type(metadata) is Metadata
    for info in metadata.storage_data.values():
        assert min(info.offset, info.length) >= 0
        try:
            crcs = crcs_of(info)
        except CorruptMetadataError:
            continue
        assert crcs is None or isinstance(crcs, ItemCrcs)


@cheap
@given(st.binary(max_size=300))
def test_metadata_of_noise(noise: bytes) -> None:
    with pytest.raises(CorruptMetadataError):
        load_metadata(b"\x80\x04" + noise, source="x")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.lists(inner, max_size=6).map(tuple),
    max_leaves=8,
)
counts = st.none() | st.integers(-5, 200) | st.integers() | anything


@cheap
@given(
    st.tuples(counts, counts, counts, counts, st.binary(max_size=200)) | anything,
    st.integers(0, 300),
)
def test_checksums(packed: object, length: int) -> None:
    info = _StorageInfo("f", 0, length)
    setattr(info, _CRCS, packed)
    try:
        crcs = crcs_of(info)
    except CorruptMetadataError:
        return
    if crcs is None:
        assert packed is None
    elif crcs.data_bytes is not None and crcs.data_offset is not None:
        assert 0 <= crcs.data_offset <= crcs.data_offset + crcs.data_bytes <= length


# Items.


def saved(tensor: torch.Tensor) -> bytes:
    sink = io.BytesIO()
    torch.save(tensor, sink)
    return sink.getvalue()


TENSORS = [
    torch.arange(6.0),
    torch.ones(2, 3, 4, dtype=torch.uint16).transpose(0, 2),
    torch.tensor(5, dtype=torch.int64),
    torch.empty(0, 3, dtype=torch.complex64),
    torch.zeros(300, dtype=torch.uint8)[100:200],
]
ITEMS = [saved(tensor) for tensor in TENSORS]
ZIP_TOKENS = [
    *(
        b"PK\3\4",
        b"PK\7\10",
        b"PK\1\2",
        b"PK\5\6",
        b"\xff\xff\xff\xff",
        b"\0\0\0\0",
        b"archive/data/0",
    ),
    *(
        b"archive/data.pkl",
        b"archive/byteorder",
        b"big",
        b"little",
        b"K\xff",
        b"\x85",
        b"(",
        b"t",
        b"Q",
    ),
    *(
        b"J\xff\xff\xff\x7f",
        b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"r\xff\xff\xff\x7f",
        b"q\0",
    ),
    *(
        b"ctorch\nFloatStorage\n",
        b"ctorch\nDoubleStorage\n",
        b"ccollections\nOrderedDict\n",
        b"\x08\0",
    ),
]


@cheap
@given(changed(ITEMS, ZIP_TOKENS), st.sampled_from([0, 700, 1500, 1 << 40, 1 << 62]))
def test_items(item: bytes, length: int) -> None:
    traced(lambda: check_within(item, length), 4 << 20)


@given(st.sampled_from(range(len(ITEMS))), st.integers(0, 2000))
def test_items_that_are_whole(number: int, at: int) -> None:
    """Damage behind the header changes nothing that the header says."""
    item, tensor = ITEMS[number], TENSORS[number]
    layout = parse_header(item, len(item))
    assert layout is not None
    assert (layout.dtype, layout.shape) == (tensor.dtype, tuple(tensor.shape))
    damaged = item[: layout.data_offset] + bytes(at)
    again = parse_header(damaged, len(damaged))
    assert again == layout if at >= layout.data_bytes else again is None


# Ranges.

places = st.integers(0, 1 << 50)
lengths = st.integers(0, 1 << 12) | st.integers(0, 1 << 30)


@cheap
@given(
    st.lists(st.tuples(places | st.integers(0, 1 << 13), lengths), max_size=12),
    st.integers(0, 1 << 13) | st.just(float("inf")),
    st.integers(1 << 20, 1 << 26),
)
def test_spans(wanted: list[tuple[int, int]], max_gap: float, max_span: int) -> None:
    wants = [Want(at, at + size, n) for n, (at, size) in enumerate(wanted)]
    spans = coalesce(wants, max_gap=max_gap, max_span=max_span)
    got: dict[int, list[tuple[int, int]]] = {n: [] for n in range(len(wants))}
    for span in spans:
        assert 0 < span.size_bytes <= max_span
        position = span.start
        for piece in span.pieces:
            assert position <= piece.start < piece.end <= span.end
            position = piece.end
            got[piece.owner].append((piece.start, piece.end))
    for n, want in enumerate(wants):
        edges = sorted(got[n])
        if want.start == want.end:
            assert edges == []
            continue
        assert (edges[0][0], edges[-1][1]) == (want.start, want.end)
        assert all(a[1] == b[0] for a, b in pairwise(edges))


@cheap
@given(places, st.integers(0, 1 << 24), st.integers(1 << 12, 1 << 22), places)
def test_cuts(start: int, length: int, size: int, origin: int) -> None:
    pieces = list(cut(start, start + length, size, origin))
    assert sum(b - a for a, b in pieces) == length
    assert all(a == b for (_, a), (b, _) in pairwise(pieces))
    assert all((a - origin) % size == 0 for a, _ in pieces[1:])
    if length:
        parts = even_ranges(start, start + length, size)
        assert sum(b - a for a, b in parts) == length
        assert max(b - a for a, b in parts) <= size


@cheap
@given(st.lists(st.integers(0, 100), max_size=20), st.integers(1, 70))
def test_parts(sizes: list[int], size: int) -> None:
    rope = bytes(n % 251 for n in range(sum(sizes)))
    cutter: PartCutter[int] = PartCutter(size)
    at, parts = 0, list[list[Fragment[int]]]()
    for n, length in enumerate(sizes):
        parts += cutter.push(memoryview(rope)[at : at + length], n)
        at += length
    parts.append(cutter.rest())
    assert b"".join(f.view for part in parts for f in part) == rope
    assert {sum(f.view.nbytes for f in part) for part in parts[:-1]} <= {size}
    assert cutter.position == len(rope)


# Answers, through the real client.

URI = S3Uri("bucket", "key")
BODY = bytes(range(100)) * 3


class Closing(Scripted):
    """Sends one answer on each connection, whatever it says of its own length."""

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: int
    ) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().splitlines()
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        await reader.readexactly(int(headers.get("content-length", "0")))
        made = self.handler(Request("GET", "/", headers, b"", connection, ""))
        assert isinstance(made, bytes)
        writer.write(made)
        await writer.drain()
        writer.close()


class Client:
    """A store that is asked once, on a loop that lasts."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._answers = Closing(lambda _: self.answer)
        self.answer = HANG_UP

    def __enter__(self) -> Self:
        self._answers.__enter__()
        config = S3ClientConfig(
            endpoint_url=self._answers.endpoint_url, unsigned=True, read_timeout_s=5.0
        )
        self._store = S3Store("us-east-1", config)
        self._runner.run(self._store.open())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._runner.run(self._store.close())
        self._runner.close()
        self._answers.__exit__(*exc_info)

    def ask(self, answer: bytes, call: Callable[[S3Store], Awaitable[T]]) -> T | S3Exception:
        """Return what a request makes of an answer: its result, or S3's error."""
        self.answer = answer

        async def asked() -> T:
            return await asyncio.wait_for(call(self._store), 30)

        try:
            try:
                return self._runner.run(asked())
            except S3ConnectionError:
                # The server closes connections, which shows with the next request at times.
                return self._runner.run(asked())
        except S3Exception as exc:
            return exc


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with Client() as client:
            yield client


def said(status: str, headers: dict[str, object], body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def xml(status: str, text: str) -> bytes:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
    return said(status, {"Content-Type": "application/xml", "Content-Length": len(body)}, body)


RANGE = {
    "Content-Length": 200,
    "Content-Range": "bytes 50-249/300",
    "ETag": '"abc"',
    "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT",
    "x-amz-request-id": "1",
}
ERRORS = [
    xml("404 Not Found", "<Error><Code>NoSuchKey</Code><Message>m</Message></Error>"),
    xml("503 Slow Down", "<Error><Code>SlowDown</Code><Message>m</Message></Error>"),
    xml("301 Moved", "<Error><Code>PermanentRedirect</Code><Region>eu-west-1</Region></Error>"),
    xml("200 OK", "<Error><Code>InternalError</Code><Message>m</Message></Error>"),
    said("412 Precondition Failed", {"Content-Length": 0}),
    said("500 Oops", {"Content-Length": 4, "Content-Type": "text/html"}, b"<ht>"),
]
RANGES = [
    said("206 Partial Content", RANGE, BODY[50:250]),
    said("200 OK", RANGE, BODY[50:250]),
    said("200 OK", {"Content-Length": 300, "ETag": '"abc"'}, BODY),
    said("206 Partial Content", RANGE | {"Transfer-Encoding": "chunked"}, b"c8\r\n" + BODY[50:250]),
]
LISTING = """<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name>
<Prefix>a</Prefix><KeyCount>2</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>
<EncodingType>url</EncodingType><Contents><Key>a%20b</Key><Size>5</Size><ETag>"e"</ETag>
<LastModified>2015-10-21T07:28:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>
<CommonPrefixes><Prefix>a/</Prefix></CommonPrefixes></ListBucketResult>"""
LISTINGS = [xml("200 OK", LISTING)]
UPLOADS = [
    xml(
        "200 OK",
        "<InitiateMultipartUploadResult><Bucket>bucket</Bucket><Key>key</Key>"
        "<UploadId>u</UploadId></InitiateMultipartUploadResult>",
    ),
]
PARTS = [
    xml(
        "200 OK",
        "<ListPartsResult><Bucket>bucket</Bucket><Key>key</Key><UploadId>u</UploadId>"
        "<IsTruncated>false</IsTruncated><ChecksumAlgorithm>CRC64NVME</ChecksumAlgorithm>"
        '<ChecksumType>FULL_OBJECT</ChecksumType><Part><PartNumber>2</PartNumber><ETag>"e"</ETag>'
        "<Size>5</Size><ChecksumCRC64NVME>AAAAAAAAAAE=</ChecksumCRC64NVME></Part>"
        "</ListPartsResult>",
    ),
]
COMPLETIONS = [
    xml(
        "200 OK",
        "<CompleteMultipartUploadResult><Location>l</Location><Bucket>bucket</Bucket>"
        '<Key>key</Key><ETag>"e-1"</ETag><ChecksumCRC64NVME>AAAAAAAAAAE=</ChecksumCRC64NVME>'
        "</CompleteMultipartUploadResult>",
    ),
]
PUTS = [
    said(
        "200 OK", {"Content-Length": 0, "ETag": '"e"', "x-amz-checksum-crc64nvme": "AAAAAAAAAAE="}
    ),
]
HTTP_TOKENS = [
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b":",
        b"\xff\xfe",
        b"\r\n\r\n",
        b"-1",
        b"0",
        b"1e3",
        b"+5",
    ),
    *(b"9" * 30, b"99999999999", b"chunked", b"gzip", b"Transfer-Encoding: chunked\r\n"),
    *(b"Content-Encoding: gzip\r\n", b"Content-Range: bytes 0-9/10\r\n", b"Content-Length: 5\r\n"),
    *(b"bytes */300", b"bytes 50-249/*", b"HTTP/1.0 200\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
    *(b"Connection: keep-alive\r\n", b"Location: http://127.0.0.1:1/\r\n", b"X: " + b"y" * 9000),
    *(b"<", b">", b"&", b"&#0;", b"&#xD800;", b"<![CDATA[", b"<!-- ", b"</Error>", b"<Contents>"),
    *(b"<Size>-1</Size>", b"<Size>x</Size>", b"<Key/>", b"<IsTruncated>true</IsTruncated>"),
    *(b'<!DOCTYPE x [<!ENTITY a "b">]>', b"&a;", b"%ff", b"%", b"<ETag/>", b"<UploadId/>"),
]
LAUGHS = (
    "<!DOCTYPE x [<!ENTITY a0 'ha'>"
    + "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 12))
    + "]><ListBucketResult><Contents><Key>&a11;</Key></Contents></ListBucketResult>"
)


@unclosed
@given(changed([*RANGES, *ERRORS], HTTP_TOKENS))
def test_ranges_of_an_object(client: Client, answer: bytes) -> None:
    memory = bytearray(200)

    async def get(store: S3Store) -> ObjectInfo:
        return await store.get_range(URI, 50, Scatter([memoryview(memory)]))

    found = client.ask(answer, get)
    if isinstance(found, ObjectInfo):
        assert b"50-249/" in answer  # nothing else is what was asked for
        assert found.size_bytes >= 0


@unclosed
@given(changed([*RANGES, *ERRORS], HTTP_TOKENS))
def test_objects(client: Client, answer: bytes) -> None:
    async def get(store: S3Store) -> tuple[bytes | bytearray, ObjectInfo]:
        return await store.get(URI)

    found = client.ask(answer, get)
    if isinstance(found, tuple):
        assert len(found[0]) == found[1].size_bytes <= len(answer)


@unclosed
@given(changed([*RANGES, *ERRORS], HTTP_TOKENS))
def test_heads(client: Client, answer: bytes) -> None:
    async def head(store: S3Store) -> ObjectInfo:
        return await store.head(URI)

    found = client.ask(answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n", head)
    if isinstance(found, ObjectInfo):
        assert found.size_bytes >= 0


@unclosed
@given(changed([*LISTINGS, *LISTINGS, *ERRORS], HTTP_TOKENS))
@example(xml("200 OK", LAUGHS))
@example(xml("200 OK", "<a>" * 50_000))
def test_listings(client: Client, answer: bytes) -> None:
    async def entries(store: S3Store) -> list[ObjectInfo]:
        found: list[ObjectInfo] = []
        async for entry in store.list(URI):
            found.append(entry)
            if len(found) > 100:  # an answer that says it is truncated is asked on and on
                break
        return found

    found = client.ask(answer, entries)
    if isinstance(found, list):
        for entry in found:
            assert isinstance(entry.key, str)
            assert len(entry.key) <= len(answer)


@unclosed
@given(changed([*PARTS, *PARTS, *ERRORS], HTTP_TOKENS))
def test_lists_of_parts(client: Client, answer: bytes) -> None:
    async def parts(store: S3Store) -> PartList:
        return await store.list_parts(URI, "u")

    found = client.ask(answer, parts)
    if isinstance(found, PartList):
        for part in found.parts:
            assert part.checksum is None or part.checksum.value < 1 << 64


@unclosed
@given(changed([*UPLOADS, *ERRORS], HTTP_TOKENS))
def test_new_uploads(client: Client, answer: bytes) -> None:
    async def create(store: S3Store) -> str:
        return await store.create_upload(URI, checksum="CRC64NVME")

    found = client.ask(answer, create)
    assert isinstance(found, S3Exception) or found


@unclosed
@given(changed([*PUTS, *ERRORS], HTTP_TOKENS))
def test_puts(client: Client, answer: bytes) -> None:
    async def put(store: S3Store) -> Receipt:
        return await store.put(URI, [memoryview(b"x")], checksum=Checksum("CRC64NVME", 1))

    check_receipt(client.ask(answer, put), answer)


@unclosed
@given(changed([*COMPLETIONS, *ERRORS], HTTP_TOKENS))
def test_completions(client: Client, answer: bytes) -> None:
    sum_of_all = Checksum("CRC64NVME", 1)

    async def complete(store: S3Store) -> Receipt:
        part = Part(number=1, size_bytes=1, etag='"e"', checksum=sum_of_all)
        return await store.complete_upload(URI, "u", [part], checksum=sum_of_all)

    check_receipt(client.ask(answer, complete), answer)


def check_receipt(found: Any, answer: bytes) -> None:
    """Nobody is told that all is well by an answer that is no success."""
    if isinstance(found, Receipt):
        assert b" 2" in answer.partition(b"\r\n")[0] or b"HTTP/1.1 100" in answer
        assert not found.checksum_echoed or b"AAAAAAAAAAE=" in answer


def test_the_answers_are_valid_before_they_are_changed(client: Client) -> None:
    memory = bytearray(200)

    async def get_range(store: S3Store) -> ObjectInfo:
        return await store.get_range(URI, 50, Scatter([memoryview(memory)]))

    async def entries(store: S3Store) -> list[str]:
        return [entry.key async for entry in store.list(URI)]

    async def list_parts(store: S3Store) -> PartList:
        return await store.list_parts(URI, "u")

    async def create(store: S3Store) -> str:
        return await store.create_upload(URI, checksum=None)

    for answer in RANGES[:2]:
        found = client.ask(answer, get_range)
        assert isinstance(found, ObjectInfo)
        assert (found.size_bytes, bytes(memory)) == (300, BODY[50:250])
    assert client.ask(LISTINGS[0], entries) == ["a/", "a b"]
    part = Part(number=2, size_bytes=5, etag='"e"', checksum=Checksum("CRC64NVME", 1))
    parts = PartList(algorithm="CRC64NVME", composite=False, parts=(part,))
    assert client.ask(PARTS[0], list_parts) == parts
    assert client.ask(UPLOADS[0], create) == "u"
    for answer in ERRORS[:3]:
        assert isinstance(client.ask(answer, get_range), S3Exception)
