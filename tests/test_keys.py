"""S3 URIs and keys: tables of what is taken as written, mended, and refused."""

from __future__ import annotations

import pickle
from os import PathLike
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3dcp._errors import InvalidS3UriError
from s3dcp._keys import S3Uri, child_key, join, parse_s3_uri, uri_text

ACCESS_POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint/mine"
COLON_ACCESS_POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint:mine"
OUTPOST = "arn:aws:s3-outposts:eu-west-1:123456789012:outpost/op-01/accesspoint/mine"
MULTI_REGION = "arn:aws:s3::123456789012:accesspoint/mine.mrap"


class Place(PathLike[str]):
    """A path object that is not pathlib's."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return self.path


class BytesPlace(PathLike[bytes]):
    def __fspath__(self) -> bytes:
        return b"s3://bucket/key"


@pytest.mark.parametrize(
    ("path", "bucket", "key"),
    [
        ("s3://bucket/key", "bucket", "key"),
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("s3://bucket/a/b/c", "bucket", "a/b/c"),
        ("s3://my.bucket-1/key", "my.bucket-1", "key"),
        # Taken as written: bytes, not a file.
        ("s3://bucket/a/", "bucket", "a/"),
        ("s3://bucket//a", "bucket", "/a"),
        ("s3://bucket/a//b", "bucket", "a//b"),
        ("s3://bucket/a///", "bucket", "a///"),
        ("s3://bucket/a b/ c ", "bucket", "a b/ c "),
        ("s3://bucket/a+b", "bucket", "a+b"),
        ("s3://bucket/a%41%2Fb%", "bucket", "a%41%2Fb%"),
        ("s3://bucket/a?b#c&d=e", "bucket", "a?b#c&d=e"),
        ("s3://bucket/ключ/鍵/🔑", "bucket", "ключ/鍵/🔑"),
        ("s3://bucket/e\u0301/\u00e9", "bucket", "e\u0301/\u00e9"),
        ("s3://bucket/a\\b", "bucket", "a\\b"),
        ("s3://bucket/a\nb", "bucket", "a\nb"),
        # Dots that are no segment of their own.
        ("s3://bucket/.metadata", "bucket", ".metadata"),
        ("s3://bucket/...", "bucket", "..."),
        ("s3://bucket/a.b/..c/d..", "bucket", "a.b/..c/d.."),
        # Access points.
        (f"s3://{ACCESS_POINT}/key", ACCESS_POINT, "key"),
        (f"s3://{ACCESS_POINT}/a//b/", ACCESS_POINT, "a//b/"),
        (f"s3://{ACCESS_POINT}", ACCESS_POINT, ""),
        (f"s3://{ACCESS_POINT}/", ACCESS_POINT, ""),
        (f"s3://{COLON_ACCESS_POINT}/key", COLON_ACCESS_POINT, "key"),
        (f"s3://{MULTI_REGION}/key", MULTI_REGION, "key"),
        (f"s3://{OUTPOST}/a/b", OUTPOST, "a/b"),
        ("s3://mine-abcdef-s3alias/key", "mine-abcdef-s3alias", "key"),
        # Path objects, whose slashes pathlib has folded.
        (Path("s3://bucket/key"), "bucket", "key"),
        (PurePosixPath("s3://bucket/a b+%41/ключ"), "bucket", "a b+%41/ключ"),
        (PurePosixPath("s3://bucket"), "bucket", ""),
        (Path("s3:/bucket/key"), "bucket", "key"),
        (Place("s3://bucket/a//b/"), "bucket", "a//b/"),
    ],
)
def test_parse(path: str | PathLike[str], bucket: str, key: str) -> None:
    assert parse_s3_uri(path) == S3Uri(bucket, key)


def test_a_uri_is_text_again() -> None:
    for text in ("s3://bucket/key", "s3://bucket/a//b/", "s3://bucket/", f"s3://{ACCESS_POINT}/k"):
        assert str(parse_s3_uri(text)) == text


@given(st.text(max_size=50))
def test_keys_are_never_changed(key: str) -> None:
    try:
        uri = parse_s3_uri(f"s3://bucket/{key}")
    except InvalidS3UriError:
        assert {".", ".."}.intersection(key.split("/")) or "\0" in key
    else:
        assert uri == S3Uri("bucket", key)
        assert parse_s3_uri(str(uri)) == uri


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("", "Only s3:// URIs"),
        ("bucket/key", "Only s3:// URIs"),
        ("/tmp/checkpoint", "Only s3:// URIs"),
        ("file:///tmp/checkpoint", "Only s3:// URIs"),
        ("https://bucket.s3.amazonaws.com/key", "Only s3:// URIs"),
        ("gs://bucket/key", "Only s3:// URIs"),
        ("s3a://bucket/key", "Only s3:// URIs"),
        ("S3://bucket/key", "Only s3:// URIs"),
        (" s3://bucket/key", "Only s3:// URIs"),
        # Text has not been through pathlib: one slash is a mistake.
        ("s3:/bucket/key", "Only s3:// URIs"),
        ("s3:bucket/key", "Only s3:// URIs"),
        (Path("checkpoint"), "Only s3:// URIs"),
        (Path("/s3:/bucket"), "Only s3:// URIs"),
        (PureWindowsPath("s3://bucket/key"), "Only s3:// URIs"),
        ("s3://", "Bucket name"),
        ("s3://key:secret@bucket/a", "A bucket's name has no @"),
        ("s3:///key", "Bucket name"),
        (Path("s3:/"), "Only s3:// URIs"),
        ("s3://bucket/.", "not allowed as a segment"),
        ("s3://bucket/..", "not allowed as a segment"),
        ("s3://bucket/../other/key", "not allowed as a segment"),
        ("s3://bucket/a/./b", "not allowed as a segment"),
        ("s3://bucket/a/../b", "not allowed as a segment"),
        ("s3://bucket/a/..", "not allowed as a segment"),
        (Path("s3://bucket/a/../b"), "not allowed as a segment"),
        (f"s3://{ACCESS_POINT}/../b", "not allowed as a segment"),
        ("s3://bucket/a\0b", "NUL"),
        ("s3://bucket/\ud800", "valid unicode"),
        (f"s3://bucket/{'k' * 1025}", "1024 bytes"),
        (f"s3://bucket/{'é' * 513}", "1024 bytes, this has 1026"),
    ],
)
def test_refused(path: str | PathLike[str], complaint: str) -> None:
    with pytest.raises(InvalidS3UriError, match=complaint) as caught:
        parse_s3_uri(path)

    assert isinstance(caught.value, ValueError)
    assert "secret" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (InvalidS3UriError, str(caught.value))


@pytest.mark.parametrize("path", [None, 3, b"s3://bucket/key", BytesPlace(), ["s3://bucket/key"]])
def test_no_path_at_all(path: object) -> None:
    with pytest.raises(InvalidS3UriError, match=f"URI.*, got {type(path).__name__}$"):
        parse_s3_uri(path)  # type: ignore[arg-type]


def test_the_longest_key() -> None:
    assert len(parse_s3_uri(f"s3://bucket/{'k' * 1024}").key) == 1024
    assert len(parse_s3_uri(f"s3://bucket/{'é' * 512}").key) == 512


def test_uri_text() -> None:
    assert uri_text("anything") == "anything"
    assert uri_text(Path("s3://bucket/key")) == "s3://bucket/key"
    assert uri_text(Path("s3:") / "bucket" / "key") == "s3://bucket/key"
    assert uri_text(Place("s3://bucket//key/")) == "s3://bucket//key/"
    assert uri_text(PurePosixPath("s3x:/bucket")) == "s3x:/bucket"


@pytest.mark.parametrize(
    ("base", "suffix", "joined"),
    [
        ("s3://bucket/key", ".metadata", "s3://bucket/key/.metadata"),
        ("s3://bucket/key/", ".metadata", "s3://bucket/key/.metadata"),
        ("s3://bucket/key//", ".metadata", "s3://bucket/key//.metadata"),
        ("s3://bucket", "a/b", "s3://bucket/a/b"),
        ("s3://bucket/", "a", "s3://bucket/a"),
        ("", "a", "a"),
        ("a b", "c+%41", "a b/c+%41"),
    ],
)
def test_join(base: str, suffix: str, joined: str) -> None:
    assert join(base, suffix) == joined


@pytest.mark.parametrize(
    ("prefix", "relative", "key"),
    [
        ("run/step", "__0_0.distcp", "run/step/__0_0.distcp"),
        ("run/step/", "__0_0.distcp", "run/step/__0_0.distcp"),
        ("", "__0_0.distcp", "__0_0.distcp"),
        ("/run", "a/b c", "/run/a/b c"),
        ("run", "0123/epoch_1/__0_0.distcp", "run/0123/epoch_1/__0_0.distcp"),
        ("run", "..a/b..", "run/..a/b.."),
        ("run", "a//b", "run/a//b"),
        ("run", "a\\..\\b", "run/a\\..\\b"),
    ],
)
def test_child_key(prefix: str, relative: str, key: str) -> None:
    assert child_key(prefix, relative, source="the test") == key


@pytest.mark.parametrize(
    "relative",
    [
        *("", "/", "/etc/passwd", "//a", ".", "..", "../other/.metadata", "a/../../b", "a/.."),
        *("a/./b", "a\0b", "\ud800", "k" * 1024),
    ],
)
def test_a_hostile_relative_path(relative: str) -> None:
    with pytest.raises(InvalidS3UriError) as caught:
        child_key("run/step", relative, source="s3://bucket/run/step/.metadata")

    assert "s3://bucket/run/step/.metadata" in str(caught.value)
    str(caught.value).encode()  # it can be printed
