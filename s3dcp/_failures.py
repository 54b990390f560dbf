"""What botocore and aiohttp raise, turned into s3dcp's errors: once, by type, code and status."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import ssl
from collections.abc import Iterator
from typing import Any

import aiohttp
import botocore.exceptions as boto
from botocore.parsers import ResponseParserError

from s3dcp import _errors as errors
from s3dcp._errors import S3Exception, S3ProtocolError, S3ServiceError
from s3dcp._keys import S3Uri

_log = logging.getLogger("s3dcp.client")

_BY_CODE: dict[str, type[S3ServiceError | errors.S3CredentialsError]] = {
    "NoSuchKey": errors.ObjectNotFoundError,
    "NoSuchUpload": errors.ObjectNotFoundError,
    "NoSuchVersion": errors.ObjectNotFoundError,
    "NoSuchBucket": errors.BucketNotFoundError,
    "AccessDenied": errors.AccessDeniedError,
    "AllAccessDisabled": errors.AccessDeniedError,
    "InvalidAccessKeyId": errors.S3CredentialsError,
    "SignatureDoesNotMatch": errors.S3CredentialsError,
    "ExpiredToken": errors.S3CredentialsError,
    "InvalidToken": errors.S3CredentialsError,
    "TokenRefreshRequired": errors.S3CredentialsError,
    "PermanentRedirect": errors.WrongRegionError,
    "TemporaryRedirect": errors.WrongRegionError,
    "AuthorizationHeaderMalformed": errors.WrongRegionError,
    "IllegalLocationConstraintException": errors.WrongRegionError,
    "PreconditionFailed": errors.PreconditionFailedError,
    "ConditionalRequestConflict": errors.ConflictError,
    "OperationAborted": errors.ConflictError,
    "SlowDown": errors.ThrottledError,
    "RequestLimitExceeded": errors.ThrottledError,
    "BandwidthLimitExceeded": errors.ThrottledError,
    "Throttling": errors.ThrottledError,
    "ThrottlingException": errors.ThrottledError,
    "TooManyRequestsException": errors.ThrottledError,
    "ServiceUnavailable": errors.ThrottledError,
    "InternalError": errors.ServerError,
    # 400 by status, yet the request was fine and the next one may arrive whole.
    "RequestTimeout": errors.ServerError,
    "IncompleteBody": errors.ServerError,
    "BadDigest": errors.ServerError,
    "XAmzContentChecksumMismatch": errors.ServerError,
    "XAmzContentSHA256Mismatch": errors.ServerError,
}
_BY_STATUS: dict[int, type[S3ServiceError]] = {
    301: errors.WrongRegionError,
    304: errors.PreconditionFailedError,
    307: errors.WrongRegionError,
    403: errors.AccessDeniedError,
    404: errors.ObjectNotFoundError,
    409: errors.ConflictError,
    412: errors.PreconditionFailedError,
    429: errors.ThrottledError,
    503: errors.ThrottledError,
}
_HINTS: dict[type[S3Exception], str] = {
    errors.AccessDeniedError: (
        "check the policy of these credentials (s3:GetObject, s3:PutObject, s3:ListBucket, "
        "s3:DeleteObject, s3:AbortMultipartUpload; s3:ListBucketMultipartUploads and "
        "s3:ListMultipartUploadParts to abort uploads, and to go on with a copy's; "
        "kms:GenerateDataKey and kms:Decrypt where a KMS key encrypts); without s3:ListBucket a "
        "missing key is answered like this too"
    ),
    errors.BucketNotFoundError: "create the bucket, or correct its name or the endpoint",
    errors.ObjectNotFoundError: "look which checkpoints are complete, and load one of those",
    errors.S3CredentialsError: (
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role; "
        "S3ClientConfig(unsigned=True), or --unsigned, reads public buckets"
    ),
    errors.WrongRegionError: "pass the bucket's own region",
    errors.PreconditionFailedError: (
        "read it again: the object is not the one that was expected, another client has written it"
    ),
    errors.ConflictError: "let one client at a time write to this key, and try again",
    errors.ThrottledError: "use a prefix strategy, or a lower max_connections",
    errors.ServerError: "try again later: the store failed",
    errors.S3TimeoutError: (
        "check the endpoint and the network, or raise the timeouts in S3ClientConfig"
    ),
    errors.S3ConnectionError: "check the network, the endpoint and the proxy, if there is one",
    errors.S3ProtocolError: "look for a proxy that changes answers, or report it to the store",
    S3ServiceError: (
        "look the code up in the store's documentation; of an S3-compatible store, see checksum "
        "and conditional_writes in S3ClientConfig"
    ),
}
# Where the code says more than the kind of error.
_HINTS_BY_CODE = {
    "NoSuchUpload": "save again: the upload was aborted, by another job or by a lifecycle rule",
    "RequestTimeTooSkewed": "set this machine's clock",
    "InvalidObjectState": "restore the object from its archive (RestoreObject), then load again",
    "ExpiredToken": "renew the credentials: a role's or a profile's renew themselves",
}


@contextlib.contextmanager
def mapped(operation: str, uri: S3Uri) -> Iterator[None]:
    """Turn whatever botocore and aiohttp raise into one of `_errors`."""
    try:
        yield
    except S3Exception as exc:
        _log.debug("%s %s failed: %s", operation, uri, exc)
        if exc.operation is None:
            exc.operation, exc.bucket, exc.key = operation, uri.bucket, uri.key
            hint = _HINTS.get(type(exc), "")
            exc.message = _sentence(f"{operation} {uri} failed", exc.message, hint)
        raise
    except Exception as exc:
        failure = map_error(exc, operation, uri)
        _log.debug("%s %s failed: %s", operation, uri, failure)
        raise failure from exc


def setup_error(exc: Exception) -> S3Exception:
    """Return the typed error for what a library raised before there was a request."""
    kind, hint = _kind_of(exc)
    return kind(_sentence("The S3 client cannot be made", str(exc) or type(exc).__name__, hint))


def map_error(exc: Exception, operation: str, uri: S3Uri) -> S3Exception:
    """Return the typed error for what a library raised during a request."""
    if isinstance(exc, boto.ClientError):
        return _map_answer(exc, operation, uri)
    kind: type[S3Exception]
    lost = getattr(exc, "kwargs", {}).get("error")
    if type(lost) is aiohttp.ClientOSError and lost.errno:
        # In the middle of a request; botocore says that it could not connect.
        kind, cause = errors.S3ConnectionError, os.strerror(lost.errno)
        hint = _HINTS[kind]
    else:
        kind, hint = _kind_of(exc)
        cause = str(exc) or type(exc).__name__
    failure = kind(
        _sentence(f"{operation} {uri} failed", cause, hint),
        operation=operation,
        bucket=uri.bucket,
        key=uri.key,
    )
    if isinstance(exc, boto.SSLError):
        # A certificate that is not trusted now will not be in a second.
        failure.retryable = False
    return failure


def _kind_of(exc: Exception) -> tuple[type[S3Exception], str]:
    cause = getattr(exc, "kwargs", {}).get("error")
    if type(exc) is boto.HTTPClientError and isinstance(cause, _FILE_ERRORS):
        return errors.S3ConfigError, "check the file that ca_bundle or AWS_CA_BUNDLE names"
    if type(exc) is boto.HTTPClientError and type(cause) is ValueError:
        return errors.S3ConfigError, _UNSENDABLE
    for types, kind, hint in _LIBRARY_ERRORS:
        if isinstance(exc, types):
            return kind, hint
    return S3Exception, ""


# What loading certificates raises, before there is a connection.
_FILE_ERRORS = (FileNotFoundError, IsADirectoryError, PermissionError, ssl.SSLError)

# Of a request that aiohttp does not send. A `UnicodeError` is of an answer, and another may do.
_UNSENDABLE = "look for line ends and blanks in the credentials, the region and the endpoint"

_LIBRARY_ERRORS: tuple[tuple[tuple[type[Exception], ...], type[S3Exception], str], ...] = (
    (
        (
            boto.NoCredentialsError,
            boto.PartialCredentialsError,
            boto.CredentialRetrievalError,
            boto.TokenRetrievalError,
            boto.UnauthorizedSSOTokenError,
            boto.NoAuthTokenError,
        ),
        errors.S3CredentialsError,
        _HINTS[errors.S3CredentialsError],
    ),
    (
        (boto.ProfileNotFound, boto.ConfigNotFound, boto.ConfigParseError, boto.InvalidConfigError),
        errors.S3ConfigError,
        "check S3ClientConfig.profile, or --profile, and the AWS configuration file",
    ),
    (
        (boto.ConnectTimeoutError, boto.ReadTimeoutError, TimeoutError),
        errors.S3TimeoutError,
        _HINTS[errors.S3TimeoutError],
    ),
    (
        (boto.SSLError,),
        errors.S3ConnectionError,
        "to trust another certificate authority set AWS_CA_BUNDLE or S3ClientConfig.ca_bundle",
    ),
    (
        (boto.EndpointConnectionError, boto.ProxyConnectionError),
        errors.S3ConnectionError,
        "check the endpoint's address, the region and the network",
    ),
    ((ResponseParserError,), S3ProtocolError, _HINTS[S3ProtocolError]),
    (
        (boto.HTTPClientError, aiohttp.ClientError, OSError),
        errors.S3ConnectionError,
        _HINTS[errors.S3ConnectionError],
    ),
    (
        (
            boto.ParamValidationError,
            boto.NoRegionError,
            boto.InvalidRegionError,
            boto.BotoCoreError,
            ValueError,
        ),
        errors.S3ConfigError,
        "correct S3ClientConfig, the environment's AWS_ variables or the AWS configuration file",
    ),
)


def _map_answer(exc: boto.ClientError, operation: str, uri: S3Uri) -> S3Exception:
    answer: dict[str, Any] = dict(exc.response)
    error = answer.get("Error", {})
    meta = answer.get("ResponseMetadata", {})
    headers = meta.get("HTTPHeaders", {})
    status = int(meta.get("HTTPStatusCode", 0))
    code = str(error.get("Code", status))
    kind: type[S3Exception] = _BY_CODE.get(code) or _BY_STATUS.get(status) or S3ServiceError
    region = headers.get("x-amz-bucket-region") or error.get("Region")
    if kind is S3ServiceError and status >= 500 and status != 501:
        kind = errors.ServerError
    elif kind is S3ServiceError and status == 400 and region and code in {"400", "BadRequest"}:
        kind = errors.WrongRegionError  # what a HEAD, which has no body, is told
    hint = _HINTS_BY_CODE.get(code) or _HINTS[kind]
    if kind is errors.WrongRegionError and region:
        hint = f"the bucket is in {region!r}: pass region={region!r}"
    cause = f"{code} ({status}) {error.get('Message', '')}".strip()
    failure = kind(
        _sentence(f"{operation} {uri} failed", cause, hint),
        operation=operation,
        bucket=uri.bucket,
        key=uri.key,
        code=code,
        status=status,
        request_id=meta.get("RequestId") or headers.get("x-amz-request-id"),
    )
    # The header's other form, a date, is not S3's.
    if asked := re.fullmatch(r"\d{1,6}", headers.get("retry-after", "")):
        failure.retry_after_s = float(asked[0])
    return failure


def _sentence(what: str, cause: str, hint: str) -> str:
    return f"{what}: {cause.rstrip('.')}. To mend it, {hint}" if hint else f"{what}: {cause}"
