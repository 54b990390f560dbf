"""The errors: their tree, how they travel, and how a failed request becomes one of them."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
import re
import ssl
import subprocess
import sys
import traceback
from typing import Any

import aiohttp
import botocore.exceptions as boto
import pytest
from botocore.parsers import ResponseParserError
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

import s3dcp
from s3dcp import _errors as errors
from s3dcp._failures import map_error, mapped
from s3dcp._keys import S3Uri
from tests._scripted import LEAN

URI = S3Uri("bucket", "run/.metadata")
ATTRIBUTES = {
    "operation": "GetObject",
    "bucket": "bucket",
    "key": "run/.metadata",
    "code": "NoSuchKey",
    "status": 404,
    "request_id": "4442587FB7D0A2F9",
}
CLASSES = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.S3Exception)
]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


class TestTheTree:
    def test_it_is_the_classes(self) -> None:
        drawn: dict[str, list[str]] = {}
        above: list[str] = []
        for line in (errors.__doc__ or "").splitlines():
            if not (found := re.fullmatch(r"([│├└─ ]*)(\w+)(?: \((\w+)\))?(?:  .*)?", line)):
                continue
            if found[1] or found[2] == "S3Exception":
                depth = len(found[1]) // 4
                above[depth:] = [found[2]]
                drawn[found[2]] = [*above[depth - 1 : depth], *filter(None, [found[3]])]
        assert drawn.pop("S3Exception") == []

        tree = {cls.__name__: [base.__name__ for base in cls.__bases__] for cls in CLASSES}
        assert tree.pop("S3Exception") == ["Exception"]
        assert drawn == tree

    @every_class
    def test_all_are_public(self, cls: type[errors.S3Exception]) -> None:
        assert getattr(s3dcp, cls.__name__) is cls
        assert cls.__name__ in s3dcp.__all__

    def test_what_may_be_tried_again(self) -> None:
        assert {cls.__name__ for cls in CLASSES if cls.retryable} == {
            "S3ConnectionError",
            "S3TimeoutError",
            "S3ProtocolError",
            "ConflictError",
            "ThrottledError",
            "ServerError",
        }


def made(kind: type[errors.S3Exception]) -> errors.S3Exception:
    error = kind("what happened; what to do", **ATTRIBUTES)  # type: ignore[arg-type]
    error.retryable = not kind.retryable
    return error


class TestTravel:
    @staticmethod
    def check(again: BaseException | None, error: errors.S3Exception) -> None:
        assert type(again) is type(error)
        assert isinstance(again, errors.S3Exception)
        assert str(again) == error.message == "what happened; what to do"
        assert vars(again) == vars(error)
        assert {name: getattr(again, name) for name in ATTRIBUTES} == ATTRIBUTES
        assert again.retryable == error.retryable

    @every_class
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_by_pickle(self, cls: type[errors.S3Exception], protocol: int) -> None:
        error = made(cls)
        self.check(pickle.loads(pickle.dumps(error, protocol)), error)

    @every_class
    def test_by_copy(self, cls: type[errors.S3Exception]) -> None:
        error = made(cls)
        self.check(copy.copy(error), error)
        self.check(copy.deepcopy(error), error)

    @every_class
    def test_as_a_cause(self, cls: type[errors.S3Exception]) -> None:
        error = made(cls)
        with pytest.raises(errors.CheckpointError) as caught:
            raise errors.CheckpointError("outer") from error
        self.check(caught.value.__cause__, error)
        # Python's pickles drop causes; what carries them, carries them whole.
        again, cause = pickle.loads(pickle.dumps((caught.value, caught.value.__cause__)))
        assert str(again) == "outer"
        self.check(cause, error)

    @every_class
    def test_between_ranks(self, cls: type[errors.S3Exception]) -> None:
        """As DCP does it: with a traceback's summary, gathered in one exception."""
        error = made(cls)
        try:
            raise error
        except errors.S3Exception as exc:
            wrapped = _wrap_exception(exc)
        failed = CheckpointException("save", {3: pickle.loads(pickle.dumps(wrapped))})

        found, frames = failed.failures[3]
        self.check(found, error)
        assert isinstance(frames, traceback.StackSummary)
        assert "what happened; what to do" in str(failed)

    def test_to_another_process(self) -> None:
        error = made(errors.AccessDeniedError)
        program = """
import json, pickle, sys
error = pickle.load(sys.stdin.buffer)
print(json.dumps([type(error).__name__, str(error), vars(error)]))
"""
        done = subprocess.run(
            [sys.executable, "-c", LEAN + program],
            input=pickle.dumps(error),
            capture_output=True,
            check=True,
        )
        assert json.loads(done.stdout) == ["AccessDeniedError", error.message, vars(error)]

    @every_class
    def test_the_text_is_the_message(self, cls: type[errors.S3Exception]) -> None:
        # OSError would print `[Errno ...]`, KeyError would quote.
        assert str(cls("text")) == "text"
        assert cls("text").args == ("text",)
        assert str(cls()) == ""
        error = cls("one")
        error.message = "two"
        assert str(pickle.loads(pickle.dumps(error))) == str(error) == "two"


def refused(
    code: str,
    status: int,
    headers: dict[str, str] | None = None,
    **more: str,
) -> boto.ClientError:
    answer: Any = {
        "Error": {"Code": code, "Message": "said the store", **more},
        "ResponseMetadata": {
            "HTTPStatusCode": status,
            "RequestId": "4442587FB7D0A2F9",
            "HTTPHeaders": headers or {},
        },
    }
    return boto.ClientError(answer, "GetObject")


@pytest.mark.parametrize(
    ("code", "status", "kind", "hint"),
    [
        ("NoSuchKey", 404, s3dcp.ObjectNotFoundError, "which checkpoints are complete"),
        ("NoSuchUpload", 404, s3dcp.ObjectNotFoundError, "a lifecycle rule"),
        ("NoSuchVersion", 404, s3dcp.ObjectNotFoundError, "which checkpoints are complete"),
        ("404", 404, s3dcp.ObjectNotFoundError, "which checkpoints are complete"),  # a HEAD's
        ("NoSuchBucket", 404, s3dcp.BucketNotFoundError, "create the bucket"),
        ("AccessDenied", 403, s3dcp.AccessDeniedError, "s3:PutObject"),
        ("AllAccessDisabled", 403, s3dcp.AccessDeniedError, "check the policy"),
        ("403", 403, s3dcp.AccessDeniedError, "s3:ListBucket"),
        ("SomethingNew", 403, s3dcp.AccessDeniedError, "check the policy"),
        ("InvalidAccessKeyId", 403, s3dcp.S3CredentialsError, "AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, s3dcp.S3CredentialsError, "AWS_SECRET_ACCESS_KEY"),
        ("ExpiredToken", 400, s3dcp.S3CredentialsError, "renew the credentials"),
        ("RequestTimeTooSkewed", 403, s3dcp.AccessDeniedError, "clock"),
        ("InvalidObjectState", 403, s3dcp.AccessDeniedError, "restore the object"),
        ("InvalidToken", 400, s3dcp.S3CredentialsError, "unsigned=True"),
        ("TokenRefreshRequired", 400, s3dcp.S3CredentialsError, "a role"),
        ("PermanentRedirect", 301, s3dcp.WrongRegionError, "the bucket's own region"),
        ("TemporaryRedirect", 307, s3dcp.WrongRegionError, "the bucket's own region"),
        ("301", 301, s3dcp.WrongRegionError, "the bucket's own region"),
        ("307", 307, s3dcp.WrongRegionError, "the bucket's own region"),
        ("AuthorizationHeaderMalformed", 400, s3dcp.WrongRegionError, "own region"),
        ("IllegalLocationConstraintException", 400, s3dcp.WrongRegionError, "own region"),
        ("PreconditionFailed", 412, s3dcp.PreconditionFailedError, "read it again"),
        ("412", 412, s3dcp.PreconditionFailedError, "read it again"),
        ("304", 304, s3dcp.PreconditionFailedError, "read it again"),
        ("ConditionalRequestConflict", 409, s3dcp.ConflictError, "one client at a time"),
        ("OperationAborted", 409, s3dcp.ConflictError, "one client at a time"),
        ("409", 409, s3dcp.ConflictError, "one client at a time"),
        ("SlowDown", 503, s3dcp.ThrottledError, "a prefix strategy"),
        ("ServiceUnavailable", 503, s3dcp.ThrottledError, "a prefix strategy"),
        ("503", 503, s3dcp.ThrottledError, "a prefix strategy"),
        ("RequestLimitExceeded", 503, s3dcp.ThrottledError, "a prefix strategy"),
        ("BandwidthLimitExceeded", 503, s3dcp.ThrottledError, "a prefix strategy"),
        ("Throttling", 400, s3dcp.ThrottledError, "a prefix strategy"),
        ("ThrottlingException", 400, s3dcp.ThrottledError, "a prefix strategy"),
        ("TooManyRequestsException", 429, s3dcp.ThrottledError, "a prefix strategy"),
        ("429", 429, s3dcp.ThrottledError, "a prefix strategy"),
        ("InternalError", 500, s3dcp.ServerError, "try again later"),
        # After CompleteMultipartUpload's 200.
        ("InternalError", 200, s3dcp.ServerError, "try again later"),
        ("502", 502, s3dcp.ServerError, "try again later"),
        ("504", 504, s3dcp.ServerError, "try again later"),
        ("RequestTimeout", 400, s3dcp.ServerError, "try again later"),
        ("IncompleteBody", 400, s3dcp.ServerError, "try again later"),
        ("BadDigest", 400, s3dcp.ServerError, "try again later"),
        ("XAmzContentChecksumMismatch", 400, s3dcp.ServerError, "try again later"),
        ("XAmzContentSHA256Mismatch", 400, s3dcp.ServerError, "try again later"),
        ("NotImplemented", 501, s3dcp.S3ServiceError, "look the code up"),
        ("InvalidArgument", 400, s3dcp.S3ServiceError, "look the code up"),
        ("400", 400, s3dcp.S3ServiceError, "look the code up"),
        ("InvalidRange", 416, s3dcp.S3ServiceError, "look the code up"),
        ("EntityTooLarge", 400, s3dcp.S3ServiceError, "look the code up"),
    ],
)
def test_an_answer(code: str, status: int, kind: type[s3dcp.S3Exception], hint: str) -> None:
    error = map_error(refused(code, status), "GetObject", URI)

    assert type(error) is kind
    text = str(error)
    assert text.startswith(f"GetObject s3://bucket/run/.metadata failed: {code} ({status})")
    assert "said the store" in text
    assert hint in text.partition("To mend it, ")[2]
    assert vars(error) == {
        "message": text,
        "operation": "GetObject",
        "bucket": "bucket",
        "key": "run/.metadata",
        "code": code,
        "status": status,
        "request_id": "4442587FB7D0A2F9",
    }


@pytest.mark.parametrize(
    "answer",
    [
        refused("PermanentRedirect", 301, {"x-amz-bucket-region": "eu-west-1"}),
        refused("301", 301, {"x-amz-bucket-region": "eu-west-1"}),
        refused("400", 400, {"x-amz-bucket-region": "eu-west-1"}),
        refused("AuthorizationHeaderMalformed", 400, Region="eu-west-1"),
    ],
)
def test_a_wrong_region_names_the_right_one(answer: boto.ClientError) -> None:
    error = map_error(answer, "HeadObject", URI)

    assert type(error) is s3dcp.WrongRegionError
    assert "pass region='eu-west-1'" in str(error)


def test_an_answer_with_nothing_in_it() -> None:
    error = map_error(boto.ClientError({}, "GetObject"), "GetObject", URI)

    assert type(error) is s3dcp.S3ServiceError
    assert (error.code, error.status, error.request_id) == ("0", 0, None)


def _caused(
    kind: type[boto.BotoCoreError], cause: BaseException, **more: object
) -> boto.BotoCoreError:
    error: boto.BotoCoreError = kind(error=cause, endpoint_url="http://localhost:1", **more)
    return error


@pytest.mark.parametrize(
    ("raised", "kind", "hint"),
    [
        (boto.NoCredentialsError(), s3dcp.S3CredentialsError, "AWS_ACCESS_KEY_ID"),
        (
            boto.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"),
            s3dcp.S3CredentialsError,
            "AWS_SECRET_ACCESS_KEY",
        ),
        (
            boto.CredentialRetrievalError(provider="custom-process", error_msg="exit 1"),
            s3dcp.S3CredentialsError,
            "a profile, or a role",
        ),
        (boto.UnauthorizedSSOTokenError(), s3dcp.S3CredentialsError, "a role"),
        (boto.ProfileNotFound(profile="x"), s3dcp.S3ConfigError, "S3ClientConfig.profile"),
        (boto.ConfigParseError(path="x"), s3dcp.S3ConfigError, "configuration file"),
        (_caused(boto.ConnectTimeoutError, TimeoutError()), s3dcp.S3TimeoutError, "timeouts"),
        (_caused(boto.ReadTimeoutError, TimeoutError()), s3dcp.S3TimeoutError, "the endpoint"),
        (TimeoutError(), s3dcp.S3TimeoutError, "timeouts in S3ClientConfig"),
        (aiohttp.ServerTimeoutError(), s3dcp.S3TimeoutError, "timeouts in S3ClientConfig"),
        (
            _caused(boto.EndpointConnectionError, OSError("refused")),
            s3dcp.S3ConnectionError,
            "check the endpoint's address",
        ),
        (
            boto.ProxyConnectionError(proxy_url="http://proxy", error=OSError()),
            s3dcp.S3ConnectionError,
            "the network",
        ),
        (
            _caused(boto.ConnectionClosedError, aiohttp.ServerDisconnectedError(), request=None),
            s3dcp.S3ConnectionError,
            "check the network",
        ),
        (aiohttp.ClientPayloadError("cut"), s3dcp.S3ConnectionError, "check the network"),
        (ConnectionResetError(104, "reset"), s3dcp.S3ConnectionError, "check the network"),
        (_caused(boto.HTTPClientError, OSError("x")), s3dcp.S3ConnectionError, "check the network"),
        (
            _caused(boto.HTTPClientError, FileNotFoundError(2, "x")),
            s3dcp.S3ConfigError,
            "ca_bundle",
        ),
        (_caused(boto.HTTPClientError, ssl.SSLError("x")), s3dcp.S3ConfigError, "AWS_CA_BUNDLE"),
        (  # a header of an answer that was damaged on its way
            _caused(boto.HTTPClientError, UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x")),
            s3dcp.S3ConnectionError,
            "check the network",
        ),
        (
            _caused(boto.HTTPClientError, ValueError("control character in headers")),
            s3dcp.S3ConfigError,
            "line ends and blanks in the credentials",
        ),
        (ResponseParserError("no XML"), s3dcp.S3ProtocolError, "a proxy"),
        (boto.NoRegionError(), s3dcp.S3ConfigError, "correct S3ClientConfig"),
        (boto.ParamValidationError(report="bad"), s3dcp.S3ConfigError, "correct S3ClientConfig"),
        (ValueError("Invalid endpoint: x"), s3dcp.S3ConfigError, "correct S3ClientConfig"),
        (KeyError("x"), s3dcp.S3Exception, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_a_library_raised(raised: Exception, kind: type[Exception], hint: str) -> None:
    error = map_error(raised, "PutObject", URI)

    assert type(error) is kind
    assert str(error).startswith("PutObject s3://bucket/run/.metadata failed: ")
    assert str(raised) in str(error)
    assert hint in str(error)
    assert (error.operation, error.bucket, error.key) == ("PutObject", "bucket", URI.key)
    pickle.loads(pickle.dumps(error))


def test_a_certificate_is_not_tried_again() -> None:
    cause = ssl.SSLCertVerificationError("self-signed certificate in chain")
    error = map_error(_caused(boto.SSLError, cause), "GetObject", URI)

    assert type(error) is s3dcp.S3ConnectionError
    assert error.retryable is False
    assert "AWS_CA_BUNDLE or S3ClientConfig.ca_bundle" in str(error)
    assert pickle.loads(pickle.dumps(error)).retryable is False


class TestMapped:
    def test_the_library_error_is_the_cause(self) -> None:
        cause = boto.NoCredentialsError()
        with pytest.raises(s3dcp.S3CredentialsError) as caught, mapped("GetObject", URI):
            raise cause
        assert caught.value.__cause__ is cause

    def test_an_error_of_ours_learns_where_it_happened_once(self) -> None:
        error = s3dcp.S3TimeoutError("nothing came")
        for operation in ("GetObject", "Outer"):
            with pytest.raises(s3dcp.S3TimeoutError) as caught, mapped(operation, URI):
                raise error
            assert caught.value is error
        assert str(error) == (
            "GetObject s3://bucket/run/.metadata failed: nothing came. To mend it, check the "
            "endpoint and the network, or raise the timeouts in S3ClientConfig"
        )
        assert (error.operation, error.bucket, error.key) == ("GetObject", "bucket", URI.key)

    @pytest.mark.parametrize("raised", [asyncio.CancelledError, KeyboardInterrupt, GeneratorExit])
    def test_what_is_no_error_passes(self, raised: type[BaseException]) -> None:
        with pytest.raises(raised), mapped("GetObject", URI):
            raise raised
