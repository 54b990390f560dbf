"""What somebody can do who may write to the bucket, or who reads the logs: nothing.

A hostile checkpoint is refused: quickly, in little memory, and without running any of it. What it
names outside of itself is not read. Credentials stay where they are.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import pickle
import pickletools
import re
import ssl
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import trustme
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

import s3dcp
from s3dcp import (
    CorruptMetadataError,
    InvalidS3UriError,
    ObjectNotFoundError,
    S3Client,
    S3ClientConfig,
    S3ConnectionError,
    S3Exception,
    S3FileSystem,
    S3StorageReader,
    S3StorageWriter,
    UnsafeItemError,
    _pickles,
)
from s3dcp._metadata import dump_metadata, load_metadata
from s3dcp._opcodes import OpcodeError, check_opcodes
from s3dcp.testing import FakeS3, Refuse
from tests._bounded import Outcome, try_bounded
from tests._fakes import BUCKET
from tests._servers import use
from tests._states import StateDict, assert_same, fill
from tests.test_metadata import Call, forged, global_of, sample

# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")


@pytest.fixture(scope="module")
def shared_fake() -> Iterator[FakeS3]:
    """A server that wants a session token."""
    with FakeS3(session_token="s3ss10n-t0ken+/=" * 8) as server:
        yield server


@pytest.fixture
def fake(fake: FakeS3) -> FakeS3:
    """The module's, with a bucket beside the one that is meant."""
    fake.create_bucket("other")
    return fake


STATE: StateDict = {"w": fill((6, 7), seed=1), "step": 7}


def save(config: S3ClientConfig | None = None, **kwargs: Any) -> None:
    writer = S3StorageWriter(None, f"s3://{BUCKET}/run", config, **kwargs)
    dcp.save(STATE, storage_writer=writer, no_dist=True)


def load(**kwargs: Any) -> StateDict:
    found: StateDict = {"w": torch.zeros(6, 7), "step": 0}
    reader = S3StorageReader(None, f"s3://{BUCKET}/run", **kwargs)
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def failure(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(CheckpointException) as caught:
        call()
    [(error, _)] = caught.value.failures.values()
    return error


def forge(fake: FakeS3, change: Callable[[Any], None]) -> None:
    """Change where the saved checkpoint says that its items are."""
    body = fake.read(BUCKET, "run/.metadata")
    metadata = load_metadata(body, source="the test")
    for info in metadata.storage_data.values():
        change(info)
    fake.write(BUCKET, "run/.metadata", dump_metadata(metadata))


# Pickles.


def number(value: int, size: int) -> bytes:
    return value.to_bytes(size, "little")


def nested(opcodes: bytes, times: int) -> bytes:
    return b"\x80\x04" + opcodes * times + b"."


#: An item is one that stays in the memo; each pickle names it, or what was made of it, many times.
POSIX = global_of("pathlib", "PurePosixPath") + b"\x94"
SIZE = global_of("torch", "Size") + b"\x94"
ORDERED = global_of("collections", "OrderedDict") + b"\x94"
LONG_LIST = b"](" + b"K\x01" * 100_000 + b"e"
LONG_DICT = b"}(" + b"".join(b"J" + number(n, 4) + b"N" for n in range(50_000)) + b"u"

BOMBS: dict[str, bytes] = {
    # Opcodes that allocate, or fill, what they state.
    "LONG_BINPUT": b"\x80\x02Nr" + number(1 << 28, 4) + b".",
    "PUT": b"\x80\x02Np4000000000\n.",
    "BINBYTES8": b"\x80\x04\x8e" + number(3 << 30, 8) + b"x.",
    "BYTEARRAY8": b"\x80\x05\x96" + number(3 << 30, 8) + b"x.",
    "BINUNICODE": b"\x80\x02X\xff\xff\xff\x7fx.",
    "BINUNICODE8": b"\x80\x04\x8d" + number(3 << 30, 8) + b"x.",
    "BINSTRING": b"\x80\x02T\xff\xff\xff\x7fx.",
    "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7fx.",
    "LONG": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "FRAME": b"\x80\x04\x95" + number(3 << 30, 8) + b"N.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "FRAME in a FRAME": b"\x80\x04\x95" + number(20, 8) + b"\x95" + number(3, 8) + b"N" * 11 + b".",
    # A reader that drops the rest of a frame would meet the bomb in the string.
    "FRAME that ends in an opcode": (
        b"\x80\x04\x95"
        + number(4, 8)
        + b"\x8c\x0eNr"
        + b"\x8c\x0eNNNNNr"
        + number(1 << 28, 4)
        + b"NNN0."
    ),
    # Structures.
    "lists in lists": b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "tuples in tuples": nested(b")" + b"\x85" * 200_000, 1),
    "dicts in dicts": b"\x80\x04" + b"}K\x01" * 100_000 + b"}" + b"s" * 100_000 + b".",
    "objects in objects": b"\x80\x04" + SIZE + b")R\x85" * 100_000 + b".",
    "marks": nested(b"(", 1_000_000),
    "twice the last, again and again": (
        b"\x80\x04]\x94"
        + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"e\x94" for n in range(60))
        + b"h\x3c."
    ),
    "itself": b"\x80\x04]\x94h\x00a.",
    # Calls of what is admitted, that make more of less.
    "paths of paths": (
        b"\x80\x04"
        + POSIX
        + b"\x8c\x03a/b\x85R\x94"
        + b"".join(b"h\x00h" + bytes([n]) + b"h" + bytes([n]) + b"\x86R\x94" for n in range(1, 60))
        + b"."
    ),
    "long paths": b"\x80\x04"
    + POSIX
    + b"X"
    + number(100_000, 4)
    + b"a/" * 50_000
    + b"\x94("
    + b"h\x00("
    + b"h\x01" * 1000
    + b"tR"
    + b"t.",
    "sizes of a list": b"\x80\x04"
    + SIZE
    + LONG_LIST
    + b"\x94("
    + b"h\x00h\x01\x85R" * 1000
    + b"t.",
    "sizes of a tuple": (
        b"\x80\x04"
        + SIZE
        + b"("
        + b"K\x01" * 100_000
        + b"t\x94("
        + b"h\x00h\x01\x85R" * 1000
        + b"t."
    ),
    "copies of a dict": (
        b"\x80\x04" + ORDERED + LONG_DICT + b"\x94(" + b"h\x00h\x01\x85R" * 1000 + b"t."
    ),
    "an entry's name of a billion parts": (
        b"\x80\x04" + global_of(_pickles._METADATA, "Metadata") + b")\x81}\x8c\x13"
        b"state_dict_metadata}]\x94"
        + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"e\x94" for n in range(60))
        + b"h\x3cNssb."
    ),
}


def flipped(data: bytes) -> list[bytes]:
    """Flip each of the bits that make an opcode one that allocates, and others."""
    return [
        data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        for at in range(len(data))
        for bit in {1, 4, at % 8}
    ]


def metadata_of_one() -> bytes:
    return pickle.dumps(sample(1))  # as other libraries write it: without a checksum of its own


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """What became of all that is hostile: from one process, since to start one takes seconds."""
    cases = {f"bomb {name}": ("loaded_metadata", data) for name, data in BOMBS.items()}
    items = LYING_ITEMS | {"honest": ITEM}
    cases |= {f"item {name}": ("loaded_item", data) for name, data in items.items()}
    cases["flipped"] = ("loaded_each", pickle.dumps(flipped(metadata_of_one())))
    return try_bounded("tests._bounded", cases)


@linux_only
class TestBombs:
    @pytest.mark.parametrize("name", BOMBS)
    def test_it_is_refused(self, outcomes: dict[str, Outcome], name: str) -> None:
        found = outcomes[f"bomb {name}"]
        assert found.kind == "CorruptMetadataError", found
        assert found.text.startswith("hostile ")
        assert len(found.text) < 300

    def test_flipped_bits_are_no_bombs(self, outcomes: dict[str, Outcome]) -> None:
        """A real checkpoint's: one that is flipped makes an opcode that fills 64 GB."""
        found = outcomes["flipped"]
        assert found.kind == "value", found
        refused, taken = (int(n) for n in re.findall(r"\d+", found.text))
        assert refused + taken == len(flipped(metadata_of_one()))
        assert refused > taken


class TestOpcodes:
    ADMITTED = frozenset(
        {
            *(
                "PROTO",
                "STOP",
                "FRAME",
                "MEMOIZE",
                "BINPUT",
                "LONG_BINPUT",
                "BINGET",
                "LONG_BINGET",
            ),
            *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
            *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "MARK"),
            *(
                "EMPTY_TUPLE",
                "TUPLE",
                "TUPLE1",
                "TUPLE2",
                "TUPLE3",
                "EMPTY_LIST",
                "APPEND",
                "APPENDS",
            ),
            *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
            *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"),
        }
    )

    @pytest.mark.parametrize("opcode", pickletools.opcodes, ids=lambda opcode: opcode.name)
    def test_those_that_are_admitted(self, opcode: pickletools.OpcodeInfo) -> None:
        arguments = {
            "LONG_BINPUT": number(7, 4),
            "BINGET": b"a",
            "GLOBAL": b"a\nb\n",
            "SHORT_BINUNICODE": b"\x01a",
            "SHORT_BINBYTES": b"\x01a",
            "LONG1": b"\x01a",
            "BINUNICODE": number(1, 4) + b"a",
            "BINBYTES": number(1, 4) + b"a",
            "FRAME": number(1, 8),
        }
        sizes = {"uint1": 1, "uint2": 2, "int4": 4, "uint4": 4, "float8": 8, "uint8": 8}
        size = sizes.get(opcode.arg.name, 0) if opcode.arg else 0
        data = opcode.code.encode("latin-1") + arguments.get(opcode.name, bytes(size))
        if opcode.name not in {"PROTO", "STOP"}:
            data = b"\x80\x04" + data
        if opcode.name in self.ADMITTED - {"STOP", "PROTO"}:
            assert check_opcodes(data + b".") == len(data) + 1
        elif opcode.name != "PROTO":
            with pytest.raises(OpcodeError):
                check_opcodes(data + b"\0" * 20 + b"\n.")

    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize(
        "thing",
        [
            None,
            [1, -5, 1 << 20, -(1 << 40), 1 << 1000, 1.5, True, False],
            ["x" * 255, "x" * 256, "x" * 70_000, "ü" * 40_000],
            [b"x" * 255, b"x" * 256, b"x" * 70_000],
            {"a": (1,), "b": (1, 2), "c": (1, 2, 3), "d": (1, 2, 3, 4), "e": ()},
            [list(range(3000)), {str(n): [n] for n in range(3000)}, [[]], {1: {}}],
            sample(50),
        ],
        ids=lambda thing: type(thing).__name__,
    )
    def test_all_that_picklers_write(self, protocol: int, thing: object) -> None:
        """Of bytes before protocol 3, they write a call of a codec: as metadata, it is refused."""
        data = pickle.dumps(thing, protocol)
        assert check_opcodes(data) == len(data)
        assert check_opcodes(memoryview(data + b"more")) == len(data)
        assert check_opcodes(bytearray(data)) == len(data)

    def test_more_behind_the_end(self) -> None:
        data = dump_metadata(sample())
        with pytest.raises(CorruptMetadataError, match="goes on after its end"):
            load_metadata(data + b"\0", source="x")


class TestNames:
    """Beyond those that tests/test_metadata.py refuses."""

    @pytest.mark.parametrize(
        ("call", "name"),
        [
            ([Call(os.getcwd), Call(os.system)], r"posix\.getcwd|nt\.getcwd"),
            ([Call(__import__, "os"), Call(getattr)], r"builtins\.__import__"),
            (Call(torch.hub.load, "x", "y"), r"torch\.hub\.load"),
            (Call(torch._utils._rebuild_tensor_v2, 1), r"torch\._utils\._rebuild_tensor_v2"),
            (Call(torch.serialization._load, 1), r"torch\.serialization\._load"),
            (Call(torch.storage._load_from_bytes, b"x"), r"torch\.storage\._load_from_bytes"),
            (Call(torch.package.PackageImporter, "x"), r"PackageImporter"),
            (Call(torch.jit.load, "x"), r"torch\.jit\._serialization\.load"),
            (Call(copy.copy, 1), r"copy\.copy"),
            (Call(pickle.loads, pickle.dumps(1)), r"_pickle\.loads"),
            (OrderedDict(a=Call(re.compile, "x")), r"re\.compile|re\._compile"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_they_are_refused(self, call: object, name: str) -> None:
        for thing in (call, forged(planner_data=call), forged(version=[call])):
            with pytest.raises(CorruptMetadataError, match=name):
                load_metadata(pickle.dumps(thing), source="x")

    def test_a_stand_in_keeps_no_state(self) -> None:
        """BUILD sets attributes, a function's defaults among them, on what it finds."""
        for (module, name), stand_in in _pickles._GLOBALS.items():
            if isinstance(stand_in, (torch.dtype, torch.layout)):
                continue
            assert isinstance(stand_in, type), (module, name)
            assert type(stand_in) is _pickles._Sealed, (module, name)
            with pytest.raises(AttributeError):
                stand_in.x = 1
            with pytest.raises(AttributeError):
                del stand_in.__new__


# Where items are.


class TestPlaces:
    REFUSED = (
        *(
            "",
            "/",
            "//",
            "/run/x",
            "//other/x",
            "..",
            "../x",
            "a/../x",
            "a/..",
            ".",
            "./x",
            "a/./x",
        ),
        *("../../other/x", "a\0b", "\ud800", "x" * 1100, "/etc/passwd", "a/../../../other/x"),
    )
    TAKEN_LITERALLY = (
        *("s3://other/x", "..%2f..%2fother/x", "%2e%2e/other/x", "..\\other\\x", "a//b", "a/"),
        *("\u2024\u2024/x", "\uff0e\uff0e/x", "\u202e/x", "a\u0301", "C:\\x", "~/x", "a?b=c&d#e"),
        *("...", "..a", "a..", " ..", ".. /x", "file:///etc/passwd", "http://other/x", "a\nb\rc"),
    )

    @pytest.mark.parametrize("name", REFUSED, ids=ascii)
    def test_none_outside_is_asked_for(self, fake: FakeS3, name: str) -> None:
        save()
        forge(fake, lambda info: setattr(info, "relative_path", name))
        fake.forget()
        error = failure(load)
        assert isinstance(error, InvalidS3UriError), repr(error)
        assert {record.key for record in fake.requests} == {"run/.metadata"}

    @pytest.mark.parametrize("name", TAKEN_LITERALLY, ids=ascii)
    def test_a_key_is_the_name_as_it_is(self, fake: FakeS3, name: str) -> None:
        save()
        forge(fake, lambda info: setattr(info, "relative_path", name))
        fake.forget()
        assert isinstance(failure(load), ObjectNotFoundError)
        assert {(r.bucket, r.key) for r in fake.requests if r.key != "run/.metadata"} == {
            (BUCKET, f"run/{name}")
        }

    def test_what_another_checkpoint_holds_outlives_one_that_names_it(self, fake: FakeS3) -> None:
        """And is replaced, when all else that it names goes."""
        below = S3StorageWriter(None, f"s3://{BUCKET}/run/best")
        dcp.save(STATE, storage_writer=below, no_dist=True)
        [theirs] = [key for key in fake.keys(BUCKET) if key.endswith(".distcp")]
        fake.write(BUCKET, "run/spare/x", b"")
        save()
        names = iter([theirs.removeprefix("run/"), "spare/x"])
        forge(fake, lambda info: setattr(info, "relative_path", next(names)))

        save()

        assert theirs in fake.keys(BUCKET)
        assert "run/spare/x" not in fake.keys(BUCKET)

    @pytest.mark.parametrize(
        "descriptors", [["no-such/1"], ["os.system/1"], ["zstd"], [""], ["a/b/c"]]
    )
    def test_transforms_that_nobody_knows(self, fake: FakeS3, descriptors: list[str]) -> None:
        save()
        forge(fake, lambda info: setattr(info, "transform_descriptors", descriptors))
        assert "extension" in str(failure(load))


# Items.


def archive(records: dict[str, bytes], **kwargs: Any) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", **kwargs) as target:
        for name, data in records.items():
            target.writestr(name, data)
    return sink.getvalue()


def saved(thing: object) -> bytes:
    sink = io.BytesIO()
    torch.save(thing, sink)
    return sink.getvalue()


ITEM = saved(torch.arange(6.0))


def records_of(item: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(item)) as source:
        return {info.filename: source.read(info) for info in source.infolist()}


def changed(item: bytes, signature: bytes, number: int, at: int, value: bytes) -> bytes:
    """Overwrite a field of the zip's `number`-th structure of a kind."""
    start = -1
    for _ in range(number + 1):
        start = item.index(signature, start + 1)
    return item[: start + at] + value + item[start + at + len(value) :]


LOCAL, CENTRAL, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"
_HUGE = struct.pack("<I", 0xFFFFFFF0)
_DATA_RECORD = list(records_of(ITEM)).index("archive/data/0")

#: Items that lie: none of them may be more than an error, or than the tensor that was saved.
LYING_ITEMS: dict[str, bytes] = {
    "empty": b"",
    "not a zip": b"x" * 1000,
    "cut": ITEM[:-30],
    "header alone": ITEM[:704],
    "directory alone": ITEM[-200:],
    "twice": ITEM + ITEM,
    "data's size, central": changed(ITEM, CENTRAL, _DATA_RECORD, 24, _HUGE),
    "data's packed size, central": changed(ITEM, CENTRAL, _DATA_RECORD, 20, _HUGE),
    "both sizes, central": changed(ITEM, CENTRAL, _DATA_RECORD, 20, _HUGE * 2),
    "data's offset": changed(ITEM, CENTRAL, _DATA_RECORD, 42, _HUGE),
    "another record's offset": changed(ITEM, CENTRAL, _DATA_RECORD, 42, bytes(4)),
    "zip64 marks without sizes": changed(ITEM, CENTRAL, _DATA_RECORD, 20, b"\xff" * 8),
    "compressed, says the directory": changed(ITEM, CENTRAL, _DATA_RECORD, 10, b"\x08\0"),
    "compressed, says the header": changed(ITEM, LOCAL, _DATA_RECORD, 8, b"\x08\0"),
    "unknown method": changed(ITEM, CENTRAL, _DATA_RECORD, 10, b"\x63\0"),
    "encrypted": changed(ITEM, CENTRAL, _DATA_RECORD, 8, b"\x01\0"),
    "long name, central": changed(ITEM, CENTRAL, _DATA_RECORD, 28, b"\xff\xff"),
    "long extra field, central": changed(ITEM, CENTRAL, _DATA_RECORD, 30, b"\xff\xff"),
    "long name, local": changed(ITEM, LOCAL, _DATA_RECORD, 26, b"\xff\xff"),
    "long extra field, local": changed(ITEM, LOCAL, _DATA_RECORD, 28, b"\xff\xff"),
    "directory elsewhere": changed(ITEM, END, 0, 16, _HUGE),
    "directory of many": changed(ITEM, END, 0, 8, b"\xff\xff\xff\xff"),
    "large directory": changed(ITEM, END, 0, 12, _HUGE),
    "long comment": changed(ITEM, END, 0, 20, b"\xff\xff"),
    "stated shape is larger": ITEM.replace(b"K\x00K\x06\x85q", b"K\x00K\x07\x85q"),
    "stated storage is larger": ITEM.replace(b"cpuq\x04K\x06", b"cpuq\x04K\x60"),
    "a zip bomb": archive(
        {**records_of(ITEM), "archive/data/0": bytes(64 << 20)}, compression=zipfile.ZIP_DEFLATED
    ),
    "a pickle bomb": archive({**records_of(ITEM), "archive/data.pkl": BOMBS["LONG_BINPUT"]}),
    "a call": archive({**records_of(ITEM), "archive/data.pkl": pickle.dumps(Call(os.getpid))}),
    "a whole model": saved(torch.nn.Linear(2, 2)),
    "a list": saved([torch.zeros(2)]),
    "a number": saved(5),
}
assert all(item != ITEM for item in LYING_ITEMS.values())


@linux_only
class TestItems:
    """Without checksums: where the header is no plain tensor's, torch.load has all to say."""

    @pytest.mark.parametrize("name", LYING_ITEMS)
    def test_it_is_refused_or_read_right(self, outcomes: dict[str, Outcome], name: str) -> None:
        found = outcomes[f"item {name}"]
        assert found.kind not in {"died", "memory"}, found
        if found.kind == "value":
            assert found == outcomes["item honest"]

    def test_pickles_are_not_executed(
        self, fake: FakeS3, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Those of items that are no tensors."""
        writer = S3StorageWriter(None, f"s3://{BUCKET}/run")
        hook = Call(os.system, "echo executed")
        dcp.save({"hook": hook}, storage_writer=writer, no_dist=True)
        with pytest.raises(UnsafeItemError, match="hook is a pickle that"):
            s3dcp.load({"hook": None}, f"s3://{BUCKET}/run")
        assert capfd.readouterr().out == ""

    def test_an_honest_one(self, outcomes: dict[str, Outcome]) -> None:
        assert outcomes["item honest"].text.startswith("(torch.float32, (6,), [0.0, 1.0, ")


# Credentials.


class TestCredentials:
    @pytest.fixture
    def log(self) -> Iterator[io.StringIO]:
        """All that any logger says, at any level."""
        stream = io.StringIO()
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
        root = logging.getLogger()
        ours = [
            logging.getLogger(name)
            for name in logging.root.manager.loggerDict
            if name.split(".")[0] == "s3dcp"
        ]
        levels = {logger: logger.level for logger in (root, *ours)}
        for logger in levels:
            logger.setLevel(logging.DEBUG)
        root.addHandler(handler)
        yield stream
        root.removeHandler(handler)
        for logger, level in levels.items():
            logger.setLevel(level)

    @pytest.mark.parametrize("code", ["AccessDenied", "InternalError", "SignatureDoesNotMatch"])
    def test_not_in_logs_and_errors(self, fake: FakeS3, log: io.StringIO, code: str) -> None:
        assert fake.session_token is not None
        secrets = [fake.secret_key, fake.session_token]
        config = S3ClientConfig(max_attempts=2)
        save()
        fake.inject(Refuse(code), operation="PutObject", times=None)
        error = failure(lambda: save(config))
        assert isinstance(error, S3Exception)
        fake.forget()
        fake.inject(Refuse(code), operation="GetObject", key="*.distcp", times=None)
        other = failure(lambda: load(s3client_config=config))
        said = [str(error), repr(error), repr(vars(error)), str(pickle.dumps(error)), str(other)]
        causes: BaseException | None = error
        while causes is not None:
            said += [repr(causes), repr(vars(causes))]
            causes = causes.__cause__ or causes.__context__
        own = [line for line in log.getvalue().splitlines() if line.startswith("s3dcp.")]
        assert any(line.startswith("s3dcp.client DEBUG") for line in own)
        for secret in secrets:
            assert not [text for text in said if secret in text]
            assert not [line for line in own if secret in line]
            # The signing key's own secret is said by nobody.
        assert fake.secret_key not in log.getvalue()

    def test_not_in_reprs_and_pickles(self, fake: FakeS3) -> None:
        save()
        load()
        uri = f"s3://{BUCKET}/run"
        fs = S3FileSystem(None)
        reader = S3StorageReader(None, uri)
        reader.read_metadata()
        for thing in (
            *(S3ClientConfig(), S3Client(None), fs, fs.client, reader, S3StorageWriter(None, uri)),
            fake,
        ):
            texts = [repr(thing), str(thing)]
            if thing is not fake:
                texts.append(str(pickle.dumps(thing)))
            for text in texts:
                assert fake.secret_key not in text
                assert str(fake.session_token) not in text

    def test_not_in_metadata(self, fake: FakeS3) -> None:
        save()
        for key in fake.keys(BUCKET):
            body = fake.read(BUCKET, key)
            assert fake.secret_key.encode() not in body
            assert str(fake.session_token).encode() not in body

    def test_not_a_proxys(self, fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
        """A password in HTTPS_PROXY is one too."""
        monkeypatch.setenv("HTTP_PROXY", "http://user:pr0xy-passw0rd@127.0.0.1:1")
        error = failure(lambda: save(S3ClientConfig(max_attempts=1)))
        assert isinstance(error, S3ConnectionError)
        assert "pr0xy-passw0rd" not in str(error) + repr(error) + str(pickle.dumps(error))


# TLS.


class TestTls:
    @pytest.fixture
    def authority(self, tmp_path: Path) -> tuple[trustme.CA, Path]:
        authority = trustme.CA()
        path = tmp_path / "ca.pem"
        authority.cert_pem.write_to_path(str(path))
        return authority, path

    def meet(self, certificate: trustme.LeafCert, config: S3ClientConfig, patch: Any) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        with FakeS3(ssl_context=context, hostname="localhost") as server:
            server.create_bucket(BUCKET)
            use(server, patch)
            try:
                save(config)
                assert_same(load(s3client_config=config), STATE)
            finally:
                trusted = [record for record in server.requests if record.status is not None]
                self.served = len(trusted)

    def test_one_that_is_trusted(
        self, authority: tuple[trustme.CA, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ca, path = authority
        config = S3ClientConfig(ca_bundle=path, force_path_style=True)
        self.meet(ca.issue_cert("localhost"), config, monkeypatch)
        assert self.served

    @pytest.mark.parametrize("why", ["an unknown authority", "another host", "another's name"])
    def test_one_that_is_not(
        self, authority: tuple[trustme.CA, Path], monkeypatch: pytest.MonkeyPatch, why: str
    ) -> None:
        ca, path = authority
        config = S3ClientConfig(ca_bundle=path, force_path_style=True, max_attempts=3)
        if why == "an unknown authority":
            certificate = trustme.CA().issue_cert("localhost")
        elif why == "another host":
            certificate = ca.issue_cert("s3.example.com")
        else:
            certificate = ca.issue_cert("localhost.example.com", "notlocalhost")
        error = failure(lambda: self.meet(certificate, config, monkeypatch))
        assert isinstance(error, S3ConnectionError)
        assert not error.retryable
        assert self.served == 0

    def test_by_default(
        self, authority: tuple[trustme.CA, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ca, _ = authority
        config = S3ClientConfig(force_path_style=True)
        error = failure(lambda: self.meet(ca.issue_cert("localhost"), config, monkeypatch))
        assert isinstance(error, S3ConnectionError)
        assert "certificate" in str(error).lower()
        assert self.served == 0


def test_the_type_that_is_loaded_is_torchs_own() -> None:
    assert type(load_metadata(dump_metadata(sample()), source="x")) is Metadata
