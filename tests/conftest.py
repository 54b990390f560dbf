"""Servers, buckets and ranks for every test.

A test says which server it speaks to by what it asks for: `moto`, `rclone`, or `s3` for one run
on each. `server`, `bucket`, `boto` and `tls_endpoint` follow, and belong to rclone where a test
asks for none of the three. One that asks for `fake` speaks to a FakeS3.
"""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import closing
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from s3dcp.testing import FakeS3
from tests._fakes import addressed
from tests._forked import Zygote
from tests._ranks import RankPool
from tests._servers import Server, empty_bucket, serve_moto, serve_rclone, use
from tests._tls import TlsEndpoint, serve_tls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# The machine is shared: how long an example took says nothing of the code.
# And a test that passes for one who has not touched it passes for the next: `make fuzz` explores.
hypothesis.settings.register_profile("shared", deadline=None, derandomize=True)
hypothesis.settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "10000")),
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("shared")

_SERVERS = {"rclone", "moto", "s3"}
_RANKS = {"ranks", "ranks1", "ranks2", "ranks4"}
_SLOW_TO_START = {"moto", "outcomes", "zygote"}  # processes that import for seconds
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests together on one worker where every worker that has one starts its own server.

    Those that give their process an accelerator are last.
    """
    items.sort(key=lambda item: "device" in _asked(item))
    for item in items:
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))


def _group(item: pytest.Item) -> str | None:
    asked = _asked(item)
    if asked & _RANKS:
        return "ranks"
    if "s3" in asked:
        asked.add(item.callspec.params["s3"])  # type: ignore[attr-defined]
    return min(asked & _SLOW_TO_START, default=None)


def _asked(node: pytest.Item) -> set[str]:
    """The fixtures that a test names, itself or through others."""
    return set(getattr(node, "fixturenames", ()))


@pytest.fixture(autouse=True)
def _no_user_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's credentials, profile, region, endpoint and proxies out of every test."""
    nowhere = tmp_path_factory.getbasetemp() / "no-such-folder"
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("AWS_") or name.lower() in _PROXIES:
                patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", str(nowhere / "config"))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nowhere / "credentials"))
        yield


@pytest.fixture(scope="session")
def rclone() -> Iterator[Server]:
    """`rclone serve s3`, one for each worker."""
    with serve_rclone() as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[Server]:
    """The server of moto, one for each worker."""
    with serve_moto() as server:
        yield server


@pytest.fixture(params=["rclone", "moto"])
def s3(request: pytest.FixtureRequest) -> Server:
    """Each of the servers in turn."""
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The test's server; the environment points to it, with its credentials and region."""
    asked = _SERVERS & _asked(request.node)
    if len(asked) > 1:
        pytest.fail(f"which is the test's server, of {sorted(asked)}?")
    found: Server = request.getfixturevalue(asked.pop() if asked else "rclone")
    use(found, monkeypatch)
    return found


@pytest.fixture(scope="session")
def _boto_clients() -> Iterator[dict[Server, Any]]:
    # Making a client takes longer than most tests.
    clients: dict[Server, Any] = {}
    yield clients
    for client in clients.values():
        client.close()


@pytest.fixture
def boto(server: Server, _boto_clients: dict[Server, Any]) -> Any:
    """A boto3 client of the test's server, to look at what is in the bucket."""
    if server not in _boto_clients:
        _boto_clients[server] = server.boto()
    return _boto_clients[server]


@pytest.fixture
def bucket(boto: Any) -> Iterator[str]:
    """The name of a new, empty bucket on the test's server."""
    name = f"test-{secrets.token_hex(8)}"
    boto.create_bucket(Bucket=name)
    yield name
    empty_bucket(boto, name)


@pytest.fixture
def tls_endpoint(server: Server, tmp_path: Path) -> Iterator[TlsEndpoint]:
    """The test's server by https, with a certificate authority of its own."""
    with serve_tls(server.endpoint_url, tmp_path) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def shared_fake() -> Iterator[FakeS3]:
    """The module's FakeS3; a module that wants another kind has a fixture of this name."""
    with FakeS3() as server:
        yield server


@pytest.fixture
def fake(shared_fake: FakeS3) -> Iterator[FakeS3]:
    """The module's FakeS3, in the environment; its bucket is empty, and retries follow at once."""
    with addressed(shared_fake):
        yield shared_fake


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """What forks processes of their own, one for each worker."""
    with Zygote() as made:
        yield made


@pytest.fixture(scope="session")
def ranks1() -> Iterator[RankPool]:
    """A single rank."""
    with closing(RankPool(1)) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """Two ranks."""
    with closing(RankPool(2)) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    """Four ranks."""
    with closing(RankPool(4)) as pool:
        yield pool


@pytest.fixture(params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest) -> RankPool:
    """1, 2 and 4 ranks in turn."""
    found: RankPool = request.getfixturevalue(f"ranks{request.param}")
    return found


@pytest.fixture
def unlogged() -> Iterator[None]:
    """Log nothing: pytest keeps every record, and torch logs one of each key of a state dict."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
