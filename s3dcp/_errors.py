"""Everything that s3dcp raises, in one tree.

S3Exception
├── S3ConfigError (ValueError)            a setting that cannot work
│   └── InvalidS3UriError                 not an S3 URI, no bucket, a path that leaves its prefix
├── S3CredentialsError                    none found, incomplete, or expired
├── S3ConnectionError (ConnectionError)   no answer, or one cut short: DNS, TCP, TLS, reset
│   └── S3TimeoutError (TimeoutError)     the peer stopped reading or writing
├── S3ProtocolError                       an answer that breaks HTTP's or S3's rules
├── S3ServiceError                        an error that the store answered with
│   ├── AccessDeniedError (PermissionError)
│   ├── BucketNotFoundError (FileNotFoundError)
│   ├── ObjectNotFoundError (FileNotFoundError)
│   ├── WrongRegionError
│   ├── PreconditionFailedError           412, or 304
│   ├── ConflictError                     409: another conditional request was in flight
│   ├── ThrottledError                    503 SlowDown and its kin
│   └── ServerError                       500 and above
├── CheckpointError                       the request worked, the checkpoint does not
│   ├── CheckpointNotFoundError (FileNotFoundError)
│   ├── CheckpointExistsError (RuntimeError)
│   ├── CheckpointChangedError            replaced while it was being read
│   ├── CommitConflictError               another writer's commit won, or ours is unsettled
│   ├── IncompleteSaveError               an item was not written: nothing is published
│   ├── CorruptMetadataError              `.metadata`, an index or a header: truncated or hostile
│   ├── IntegrityError                    stored bytes differ from those that were saved
│   └── UnsafeItemError                   an item's pickle names what `weights_only=True` refuses
├── DiskError (OSError)                   a folder on a disk: full, not ours, or in the way
└── PortalError (RuntimeError)            the I/O thread refused or lost a call

All of them pickle: DCP carries errors between ranks. Requests are mapped once, in `_client`,
by code and status, never by text.
"""

from __future__ import annotations


class S3Exception(Exception):  # noqa: N818 - the reference library's name
    """The root of s3dcp's errors.

    Args:
        message: What happened, to whom, and what to do next.
        operation: S3's name of the request, such as `UploadPart`.
        bucket: The bucket that was addressed.
        key: The key that was addressed.
        code: S3's error code, such as `NoSuchKey`.
        status: The HTTP status.
        request_id: The store's name of the request, for its support desk.
    """

    #: Whether the same request, sent again, may succeed.
    retryable = False
    #: How often it may be sent at most, where the policy allows more.
    max_attempts: int | None = None
    #: How long the store asks to be left alone, in seconds.
    retry_after_s: float | None = None

    def __init__(
        self,
        message: str = "",
        *,
        operation: str | None = None,
        bucket: str | None = None,
        key: str | None = None,
        code: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.operation = operation
        self.bucket = bucket
        self.key = key
        self.code = code
        self.status = status
        self.request_id = request_id

    def __str__(self) -> str:
        # OSError's __str__ (a base of several errors below) would print errno's form.
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        # OSError's __reduce__ would drop the message of those that derive from it.
        return type(self), (self.message,), self.__dict__


class S3ConfigError(S3Exception, ValueError):
    """A setting, an argument or a combination of them that cannot work."""


class InvalidS3UriError(S3ConfigError):
    """A path that is no S3 URI, has no bucket, or leaves its own prefix."""


class S3CredentialsError(S3Exception):
    """Credentials are missing, incomplete or expired."""


class S3ConnectionError(S3Exception, ConnectionError):
    """The endpoint did not answer, or the connection broke before the answer was whole."""

    retryable = True


class S3TimeoutError(S3ConnectionError, TimeoutError):
    """The peer made no progress within the configured time."""


class S3ProtocolError(S3Exception):
    """The store answered with something that HTTP or S3 does not allow."""

    retryable = True
    max_attempts = 3  # a flipped bit goes away, a store's habit does not


class S3ServiceError(S3Exception):
    """The store refused a request."""


class AccessDeniedError(S3ServiceError, PermissionError):
    """The credentials do not allow the request (403)."""


class BucketNotFoundError(S3ServiceError, FileNotFoundError):
    """The bucket does not exist."""


class ObjectNotFoundError(S3ServiceError, FileNotFoundError):
    """The object, or the multipart upload, does not exist."""


class WrongRegionError(S3ServiceError):
    """The bucket is in another region than the one that was given."""


class PreconditionFailedError(S3ServiceError):
    """A conditional request's condition did not hold (412)."""


class ConflictError(S3ServiceError):
    """A concurrent conditional request was in flight (409)."""

    retryable = True


class ThrottledError(S3ServiceError):
    """The store asks for fewer requests (503 SlowDown, 429)."""

    retryable = True


class ServerError(S3ServiceError):
    """The store failed (5xx)."""

    retryable = True


class CheckpointError(S3Exception):
    """The store works; the checkpoint does not."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no committed checkpoint at the path."""


class CheckpointExistsError(CheckpointError, RuntimeError):
    """A checkpoint is there and `overwrite=False`."""


class CheckpointChangedError(CheckpointError):
    """The checkpoint was replaced while it was being read."""


class CommitConflictError(CheckpointError):
    """Another writer's commit won, or the outcome of ours cannot be known."""


class IncompleteSaveError(CheckpointError):
    """An item of the plan was not written, so nothing was published."""


class CorruptMetadataError(CheckpointError):
    """The checkpoint's `.metadata`, index or file headers are truncated, foreign or hostile."""


class IntegrityError(CheckpointError):
    """Stored bytes differ from those that were saved."""


class UnsafeItemError(CheckpointError):
    """An item that is no tensor, whose pickle names more than `weights_only=True` admits."""


class DiskError(S3Exception, OSError):
    """A disk refused what a copy needs; what it said itself, if anything, is the cause."""


class PortalError(S3Exception, RuntimeError):
    """The I/O thread refused or lost a call."""
