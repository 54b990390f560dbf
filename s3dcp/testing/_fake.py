"""FakeS3: an S3 in memory that breaks on demand and forgives nothing."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime
from threading import Thread
from types import TracebackType
from typing import Any, Self, TypeVar

from s3dcp.testing._answers import Blob
from s3dcp.testing._fake_process import FakeS3Process
from s3dcp.testing._faults import Fault
from s3dcp.testing._objects import Bucket, Limits, StoredObject, now
from s3dcp.testing._process import LocalServerError
from s3dcp.testing._records import Journal, Record, Violation
from s3dcp.testing._rules import Rule
from s3dcp.testing._s3 import S3, Options, valid_bucket
from s3dcp.testing._service import Link, Service
from s3dcp.testing._signatures import Verifier

T = TypeVar("T")

_OWNER = "123456789012"
_STOP_TIMEOUT_S = 10.0


class FakeS3:
    """An S3 server in this process, on a thread of its own and a free port of 127.0.0.1.

    What it holds is in memory and stays when it is stopped; it can be started again. It may be
    used from any thread.

    Args:
        strict: Refuse what S3 lets pass although the client cannot mean it.
        checksums: Verify and echo checksums; False ignores them, as some stores do.
        conditional_writes: Honour If-Match and If-None-Match on writes; False ignores them.
        md5_etags: Make ETags of MD5 sums as S3 does; they are unique by default, and free.
        anonymous: Serve requests that are not signed.
        limits: Part sizes and numbers, and the size of listings' pages.
        latency_s: From a request's last byte to its answer's first.
        bytes_per_s: The speed of each connection, each way.
        discard: Bodies of over 4 MiB put under keys with this prefix are dropped and read as
            zeros, so that there is no end to what can be saved.
        ssl_context: Serve https with it.
        hostname: The endpoint's: "localhost" for clients that put buckets into host names.
        port: 0 for a free one.
        session_token: Must come with the credentials, if given.

    Attributes:
        access_key: The only one that is accepted.
        region: The region to sign for; another one is refused.
        rules: The faults that were injected, in the order in which they are tried.
    """

    def __init__(
        self,
        *,
        strict: bool = True,
        checksums: bool = True,
        conditional_writes: bool = True,
        md5_etags: bool = False,
        anonymous: bool = False,
        limits: Limits | None = None,
        latency_s: float = 0.0,
        bytes_per_s: float | None = None,
        discard: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        hostname: str = "127.0.0.1",
        port: int = 0,
        region: str = "us-east-1",
        session_token: str | None = None,
    ) -> None:
        self.access_key = secrets.token_hex(10).upper()
        self.secret_key = secrets.token_hex(20)
        self.session_token = session_token
        self.region = region
        self._scheme, self._hostname = "https" if ssl_context else "http", hostname
        self._s3 = S3(
            Options(
                region=region,
                owner=_OWNER,
                strict=strict,
                checksums=checksums,
                conditional_writes=conditional_writes,
                md5_etags=md5_etags,
                discard=discard,
                limits=limits or Limits(),
            )
        )
        self._link = Link(
            host="127.0.0.1",
            port=port,
            ssl_context=ssl_context,
            latency_s=latency_s,
            bytes_per_s=bytes_per_s,
        )
        self._anonymous = anonymous
        self._journal = Journal()
        self.rules: list[Rule] = []
        self._running: _Running | None = None

    def __repr__(self) -> str:
        state = f"endpoint_url={self.endpoint_url!r}" if self._running else "stopped"
        return f"<FakeS3 {state}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @classmethod
    def process(cls, **options: Any) -> FakeS3Process:
        """Return a server in a process of its own, so that it shares no core and no GIL.

        Args:
            options: `strict`, `checksums`, `conditional_writes`, `md5_etags`, `anonymous`,
                `latency_s`, `bytes_per_s`, `discard`, `hostname`, `port`, `region`; and
                `certificate` and `private_key`, paths of PEM files, for https.
        """
        return FakeS3Process(**options)

    # Its life.

    def start(self) -> None:
        """Start the server and return when it listens.

        Raises:
            LocalServerError: It runs already, or cannot listen.
        """
        if self._running is not None:
            raise LocalServerError("FakeS3 is running already")
        service = Service(
            s3=self._s3,
            verifier=Verifier(
                access_key=self.access_key,
                secret_key=self.secret_key,
                region=self.region,
                session_token=self.session_token,
            ),
            anonymous=self._anonymous,
            link=self._link,
            journal=self._journal,
            rules=self.rules,
        )
        self._running = _Running(service)

    def stop(self) -> None:
        """Stop the server; nothing if it is not running."""
        if self._running is not None:
            running, self._running = self._running, None
            running.stop()

    @property
    def endpoint_url(self) -> str:
        """Where the server listens."""
        return f"{self._scheme}://{self._hostname}:{self._active.port}"

    def environ(self) -> dict[str, str]:
        """What a child process needs in its environment to find this server and sign for it."""
        token = {"AWS_SESSION_TOKEN": self.session_token} if self.session_token else {}
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            **token,
        }

    # Faults.

    def inject(
        self,
        fault: Fault,
        *,
        operation: str | None = None,
        key: str | None = None,
        index: int | None = None,
        where: Callable[[Record], bool] | None = None,
        skip: int = 0,
        times: int | None = 1,
    ) -> Rule:
        """Play a fault to the requests that fit; the first rule that takes a request has it.

        Args:
            fault: What is played.
            operation: S3's name for the operation: "PutObject"; "Connect" for new connections.
            key: A shell pattern of keys.
            index: The index of a request among all of the server's, from 0.
            where: Further asked of a request's record.
            skip: How many requests that fit are let pass first.
            times: How many are then played the fault; None for all.

        Returns:
            What tells when it has struck, and releases what it stalls.
        """
        rule = Rule(
            fault=fault,
            operation=operation,
            key=key,
            index=index,
            where=where,
            skip=skip,
            times=times,
        )
        self.rules.append(rule)
        return rule

    # What happened.

    @property
    def requests(self) -> list[Record]:
        """The requests so far, by index."""
        return list(self._journal.records)

    @property
    def violations(self) -> list[Violation]:
        """What clients did that no client should; none of it where a fault was played."""
        return list(self._journal.violations)

    def stats(self) -> dict[str, int]:
        """Count requests, each operation, connections, and bodies' bytes in and out."""
        journal = self._journal
        return {
            "requests": journal.operations.total(),
            "connections": journal.connections,
            "bytes_in": journal.bytes_in,
            "bytes_out": journal.bytes_out,
            **journal.operations,
        }

    def check(self) -> None:
        """Assert that there are no violations, and that the server itself did not fail.

        Raises:
            AssertionError: There are, or it did.
        """
        found = [*map(str, self._journal.violations), *map(repr, self._journal.failures)]
        if found:
            raise AssertionError("\n".join(["FakeS3 found:", *found]))

    def forget(self) -> None:
        """Forget requests, violations, counts and rules; what is stalled goes on."""
        for rule in self.rules:
            rule.release()
        self.rules.clear()
        self._on_loop(self._journal.clear)

    # What is stored.

    def create_bucket(self, name: str, region: str | None = None) -> None:
        """Make a bucket; nothing if it exists.

        Args:
            name: Its name.
            region: Where it is, if not in the server's own region. As S3 does, the server then
                sends away (301) what was signed for its own; it plays the other endpoint, too.

        Raises:
            LocalServerError: S3 does not allow the name.
        """
        if not valid_bucket(name):
            raise LocalServerError(f"S3 allows no bucket to be called {name!r}")
        self._on_loop(lambda: self._s3.buckets.setdefault(name, Bucket(region or self.region)))

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Return the keys of a bucket's objects, in order."""
        return self._on_loop(
            lambda: sorted(k for k in self._s3.buckets[bucket].objects if k.startswith(prefix))
        )

    def read(self, bucket: str, key: str) -> bytes:
        """Return an object's bytes."""
        return bytes(self._on_loop(lambda: self._s3.buckets[bucket].objects[key].blob))

    def write(
        self, bucket: str, key: str, data: bytes, *, modified: datetime | None = None
    ) -> None:
        """Put an object without a request: as another client would, to damage it, or at a time."""
        blob = Blob.of(data)

        def put() -> None:
            stored = StoredObject(
                blob=blob,
                etag=self._s3.etag(blob),
                headers={},
                modified=modified or now(),
            )
            self._s3.buckets[bucket].objects[key] = stored

        self._on_loop(put)

    def delete(self, bucket: str, key: str) -> None:
        """Remove an object without a request."""
        self._on_loop(lambda: self._s3.buckets[bucket].objects.pop(key))

    def uploads(self, bucket: str) -> dict[str, str]:
        """Return the multipart uploads under way: ids and keys."""
        return self._on_loop(
            lambda: {each.id: each.key for each in self._s3.buckets[bucket].uploads.values()}
        )

    def _on_loop(self, function: Callable[[], T]) -> T:
        return function() if self._running is None else self._running.service.call(function)

    @property
    def _active(self) -> _Running:
        if self._running is None:
            raise LocalServerError("FakeS3 is not running: use `with FakeS3() as server`")
        return self._running


class _Running:
    """A service on a thread."""

    def __init__(self, service: Service) -> None:
        self.service = service
        listening: Future[int] = Future()
        self._thread = Thread(
            target=self._run, args=(listening,), name="s3dcp-fake-s3", daemon=True
        )
        self._thread.start()
        try:
            self.port = listening.result()
        except OSError as error:
            self._thread.join()
            raise LocalServerError(f"FakeS3 cannot listen: {error}") from error

    def stop(self) -> None:
        self.service.stop()
        self._thread.join(_STOP_TIMEOUT_S)
        if self._thread.is_alive():
            raise LocalServerError("FakeS3 does not stop: does a callback of its rules block?")

    def _run(self, listening: Future[int]) -> None:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(self.service.run(listening))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.new_event_loop
    return new_event_loop
