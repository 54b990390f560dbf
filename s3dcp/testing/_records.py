"""What a server saw: a record for each request, and the faults it found with its clients."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from s3dcp.testing._requests import Request

_MAX_RECORDS = 100_000
_SECRET_HEADERS = {"authorization", "x-amz-security-token"}


@dataclass(slots=True, kw_only=True)
class Record:
    """One request and how it was answered; filled in while it is.

    Attributes:
        index: Counts the server's requests from 0, in the order in which their heads came.
        connection: Counts its connections from 0.
        operation: S3's name for what was asked: "PutObject".
        headers: By lower-case name, less what is secret.
        bytes_in: Of the body, as far as it was received, without its framing.
        bytes_out: Of the body, as far as it was sent.
        status: None if no answer was begun.
        code: S3's name for the error that was answered, if one was.
        fault: What was played instead of the normal course, if anything.
    """

    index: int
    connection: int
    operation: str
    method: str
    bucket: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str] = field(repr=False)
    bytes_in: int = 0
    bytes_out: int = 0
    status: int | None = None
    code: str | None = None
    fault: object = None


@dataclass(frozen=True, slots=True)
class Violation:
    """Something a client did that S3 refuses, or lets pass by luck."""

    record: Record
    code: str
    message: str

    def __str__(self) -> str:
        record = self.record
        where = f"{record.operation} {record.bucket}/{record.key}"
        return f"request {record.index}, {where}: {self.code}: {self.message}"


@dataclass(slots=True)
class Journal:
    """All that happened at one server; the last 100,000 requests of it in detail."""

    records: deque[Record] = field(default_factory=lambda: deque(maxlen=_MAX_RECORDS))
    violations: list[Violation] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    bytes_in: int = 0
    bytes_out: int = 0

    def open(self, request: Request, connection: int) -> Record:
        """Begin the record of a request."""
        headers = {k: v for k, v in request.headers.items() if k not in _SECRET_HEADERS}
        record = Record(
            index=self.operations.total(),
            connection=connection,
            operation=request.operation,
            method=request.method,
            bucket=request.bucket,
            key=request.key,
            query=request.query,
            headers=headers,
        )
        self.operations[request.operation] += 1
        self.records.append(record)
        return record

    def received(self, record: Record, nbytes: int) -> None:
        """Count a body's bytes."""
        record.bytes_in += nbytes
        self.bytes_in += nbytes

    def sent(self, record: Record, nbytes: int) -> None:
        """Count an answer's body's bytes."""
        record.bytes_out += nbytes
        self.bytes_out += nbytes

    def clear(self) -> None:
        """Forget everything."""
        self.records.clear()
        self.violations.clear()
        self.failures.clear()
        self.operations.clear()
        self.connections = self.bytes_in = self.bytes_out = 0
