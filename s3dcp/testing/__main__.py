"""`python -m s3dcp.testing`: FakeS3 in a process of its own.

It prints one line of JSON with its endpoint and credentials, and ends when its standard input or
its parent does, or at the line "stop". "stats", "violations" and "create_bucket NAME" are answered
with a line of JSON each.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import sys
from collections.abc import Sequence
from contextlib import suppress
from threading import Event, Thread
from typing import Any

from s3dcp.testing._fake import FakeS3
from s3dcp.testing._process import LocalServerError

_TICK_S = 0.5


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until told to stop."""
    options = _options(argv)
    buckets = options.pop("bucket")
    _end_with(os.getppid())
    with suppress(KeyboardInterrupt), FakeS3(**options) as server:
        for name in buckets:
            server.create_bucket(name)
        _say(
            {
                "endpoint_url": server.endpoint_url,
                "access_key": server.access_key,
                "secret_key": server.secret_key,
                "region": server.region,
                "pid": os.getpid(),
                "environ": server.environ(),
            }
        )
        for line in sys.stdin:
            if line.strip() == "stop":
                break
            _say(_answer(server, line.strip()))


def _options(argv: Sequence[str] | None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog="python -m s3dcp.testing", description="An S3 server in memory, for tests and benches."
    )
    parser.add_argument("--port", type=int, default=0, help="0 for a free one")
    parser.add_argument("--hostname", default="127.0.0.1", help="the endpoint's name")
    parser.add_argument("--region", default="us-east-1")
    parser.add_argument("--bucket", action="append", default=[], help="made at the start")
    parser.add_argument("--latency-s", type=float, default=0.0, help="to an answer's first byte")
    parser.add_argument("--bytes-per-s", type=float, help="of each connection, each way")
    parser.add_argument("--discard", help="drop large bodies under keys with this prefix")
    parser.add_argument("--certificate", help="PEM file, for https")
    parser.add_argument("--private-key", help="PEM file, for https")
    for name in ("strict", "checksums", "conditional-writes"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True)
    for name in ("md5-etags", "anonymous"):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=False)
    options = vars(parser.parse_args(argv))
    certificate, key = options.pop("certificate"), options.pop("private_key")
    if certificate:
        options["ssl_context"] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        options["ssl_context"].load_cert_chain(certificate, key)
    return options


def _answer(server: FakeS3, line: str) -> dict[str, Any]:
    command, _, argument = line.partition(" ")
    if command == "stats":
        return dict(server.stats())
    if command == "violations":
        return {"violations": [str(each) for each in server.violations]}
    if command == "create_bucket":
        try:
            server.create_bucket(argument)
        except LocalServerError as error:
            return {"error": str(error)}
        return {}
    return {"error": f"unknown: {command!r}"}


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _end_with(parent_pid: int) -> None:
    """End this process once its parent has, even where a fork of that holds our input open."""

    def watch() -> None:
        while os.getppid() == parent_pid:
            Event().wait(_TICK_S)
        os._exit(0)

    Thread(target=watch, name="s3dcp-fake-s3-parent", daemon=True).start()


if __name__ == "__main__":
    main()
