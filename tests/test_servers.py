"""LocalS3, and what the fixtures of conftest.py promise."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
import pytest
import torch
import torch.distributed as dist
from botocore.config import Config
from botocore.exceptions import ClientError

import s3dcp
from s3dcp.testing import LocalS3, LocalServerError
from s3dcp.testing._process import ServerProcess
from tests._ranks import RankPool, RanksFailedError, run_ranks
from tests._servers import Server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests._tls import TlsEndpoint

MiB = 1 << 20


@contextmanager
def idle_connection(endpoint_url: str) -> Iterator[socket.socket]:
    """A kept-alive connection with no request on it, which ends when the server does."""
    connection = HTTPConnection(urlsplit(endpoint_url).netloc, timeout=60)
    with closing(connection):
        connection.request("GET", "/")
        assert connection.getresponse().read()
        yield connection.sock


def client_of(server: LocalS3, **credentials: str) -> Any:
    return Server(
        name="rclone",
        endpoint_url=server.endpoint_url,
        access_key=server.access_key,
        secret_key=credentials.get("secret_key", server.secret_key),
    ).boto()


class TestLocalS3:
    def test_it_serves_its_folder_and_removes_it(self) -> None:
        with LocalS3() as server:
            root = server.root
            server.create_bucket("bucket")
            client = client_of(server)
            client.put_object(Bucket="bucket", Key="a/b", Body=b"data")
            client.close()

            assert (root / "bucket" / "a" / "b").read_bytes() == b"data"

        assert not root.exists()

    def test_a_given_folder_is_made_and_kept(self, tmp_path: Path) -> None:
        root = tmp_path / "new folder"
        for body in (b"1", b"2"):
            with LocalS3(root) as server:
                assert server.root == root
                server.create_bucket("bucket")
                server.create_bucket("bucket")
                client = client_of(server)
                client.put_object(Bucket="bucket", Key=body.decode(), Body=body)
                client.close()

        assert sorted(path.name for path in (root / "bucket").iterdir()) == ["1", "2"]

    def test_a_bucket_name_that_s3_refuses(self) -> None:
        with LocalS3() as server, pytest.raises(LocalServerError, match="InvalidBucketName"):
            server.create_bucket("No")

    def test_it_takes_its_own_credentials_only(self) -> None:
        with LocalS3() as server, LocalS3() as other:
            assert (server.access_key, server.secret_key) != (other.access_key, other.secret_key)
            client = client_of(server, secret_key=other.secret_key)
            with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
                client.list_buckets()
            client.close()

    def test_a_child_finds_it_by_its_environment(self) -> None:
        program = """
import boto3
client = boto3.client("s3")
client.create_bucket(Bucket="made-by-a-child")
print(client.meta.endpoint_url, client.meta.region_name)
"""
        with LocalS3() as server:
            done = subprocess.run(
                [sys.executable, "-c", program],
                env=os.environ | server.environ(),
                capture_output=True,
                text=True,
                check=True,
            )

            assert done.stdout.split() == [server.endpoint_url, server.region]
            assert (server.root / "made-by-a-child").is_dir()

    def test_the_secret_is_not_on_the_command_line(self) -> None:
        with LocalS3() as server:
            assert server._process is not None
            arguments = server._process._process.args

            assert str(server.root) in str(arguments)
            assert server.secret_key not in str(arguments)
            assert server.secret_key not in repr(server)

    def test_a_users_rclone_settings_do_not_matter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RCLONE_READ_ONLY", "true")
        with LocalS3() as server:
            server.create_bucket("bucket")

    def test_it_can_be_used_again(self) -> None:
        server = LocalS3()
        with server, pytest.raises(LocalServerError, match="running already"):
            server.start()
        with server:
            server.create_bucket("bucket")
        server.stop()

        assert repr(server) == "<LocalS3 stopped>"
        with pytest.raises(LocalServerError, match="not running"):
            _ = server.endpoint_url
        with pytest.raises(LocalServerError, match="not running"):
            _ = server.root

    def test_it_is_gone_when_the_context_ends(self) -> None:
        with LocalS3() as server, ExitStack() as later:
            connection = later.enter_context(idle_connection(server.endpoint_url))
            connections = later.pop_all()

        with connections:
            assert connection.recv(1) == b""

    @pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit()"])
    def test_it_ends_with_its_parent(self, end: str) -> None:
        program = f"""
import os, signal, sys
from s3dcp.testing import LocalS3
server = LocalS3()
server.start()
print(server.endpoint_url, server.root, flush=True)
sys.stdin.read()
{end}
"""
        with subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as parent:
            assert parent.stdout is not None
            assert parent.stdin is not None
            endpoint_url, root = parent.stdout.readline().split()
            with idle_connection(endpoint_url) as connection:
                parent.stdin.close()

                assert connection.recv(1) == b""
                assert parent.wait(60) == (-signal.SIGKILL if "SIGKILL" in end else 0)
                assert Path(root).exists() == ("SIGKILL" in end)

    def test_a_fork_does_not_end_it(self) -> None:
        with LocalS3() as server:
            pid = os.fork()
            if pid == 0:
                server.stop()
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0

            server.create_bucket("bucket")

    def test_rclone_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_distribution(name: str) -> None:
            raise PackageNotFoundError(name)

        monkeypatch.setattr("s3dcp.testing._rclone.metadata.distribution", no_distribution)

        with pytest.raises(LocalServerError, match=r'pip install "s3dcp\[testing\]"'), LocalS3():
            pass

    def test_rclone_does_not_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("s3dcp.testing._rclone._FLAGS", ("--addr=127.0.0.1:0", "--no-such"))
        server = LocalS3()

        with pytest.raises(LocalServerError, match=r"(?s)ended with status \d.*no-such"), server:
            pass

        assert repr(server) == "<LocalS3 stopped>"

    def test_a_server_that_never_listens_is_ended(self) -> None:
        class Writes(ServerProcess):
            def _await_port(self, timeout_s: float) -> int:
                while not self.log_tail():
                    os.sched_yield()
                return super()._await_port(timeout_s)

        with pytest.raises(LocalServerError, match=r"(?s)sleeper did not listen.*here I am"):
            Writes(
                "sleeper",
                ["/bin/sh", "-c", "echo here I am; exec sleep 1000"],
                listening=re.compile("never"),
                env=os.environ,
                start_timeout_s=0.2,
            )

    def test_a_server_that_ignores_the_signal_is_killed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("s3dcp.testing._process._STOP_TIMEOUT_S", 0.2)
        with ServerProcess(
            "stubborn",
            ["/bin/sh", "-c", "trap '' TERM; echo port 1; exec sleep 1000"],
            listening=re.compile(r"port (\d)"),
            env=os.environ,
            start_timeout_s=60,
        ) as stubborn:
            pass

        assert not stubborn.running
        assert stubborn.log_tail() == ""

    def test_importing_it_does_not_import_torch(self) -> None:
        # s3dcp itself does: an empty package stands for it here.
        program = """
import sys, types
package = sys.modules["s3dcp"] = types.ModuleType("s3dcp")
package.__path__ = sys.argv[1:]
import s3dcp.testing
assert "torch" not in sys.modules
"""
        folder = str(Path(s3dcp.__file__).parent)
        subprocess.run([sys.executable, "-c", program, folder], check=True)


class TestEveryServer:
    def test_a_write_is_read_at_once(self, s3: Server, bucket: str, boto: Any) -> None:
        for body in (b"first", b"", b"the third, and longest"):
            etag = boto.put_object(Bucket=bucket, Key="folder/key", Body=body)["ETag"]

            got = boto.get_object(Bucket=bucket, Key="folder/key")
            with got["Body"] as stream:
                assert stream.read() == body
            head = boto.head_object(Bucket=bucket, Key="folder/key")
            (listed,) = boto.list_objects_v2(Bucket=bucket)["Contents"]
            assert got["ETag"] == head["ETag"] == etag
            assert got["ContentLength"] == head["ContentLength"] == listed["Size"] == len(body)

    def test_ranges(self, s3: Server, bucket: str, boto: Any) -> None:
        boto.put_object(Bucket=bucket, Key="key", Body=b"0123456789")

        got = boto.get_object(Bucket=bucket, Key="key", Range="bytes=3-5")

        with got["Body"] as stream:
            assert stream.read() == b"345"
        assert got["ContentRange"] == "bytes 3-5/10"
        with pytest.raises(ClientError, match="InvalidRange"):
            boto.get_object(Bucket=bucket, Key="key", Range="bytes=10-12")

    def test_copy_and_delete(self, s3: Server, bucket: str, boto: Any) -> None:
        boto.put_object(Bucket=bucket, Key="from", Body=b"data")
        boto.copy_object(Bucket=bucket, Key="to/here", CopySource={"Bucket": bucket, "Key": "from"})
        boto.delete_object(Bucket=bucket, Key="from")

        assert [o["Key"] for o in boto.list_objects_v2(Bucket=bucket)["Contents"]] == ["to/here"]
        with pytest.raises(ClientError, match="404"):
            boto.head_object(Bucket=bucket, Key="from")

    def test_multipart_uploads(self, s3: Server, bucket: str, boto: Any) -> None:
        body = bytes(5 * MiB) + b"tail"
        upload = {"Bucket": bucket, "Key": "key"}
        upload["UploadId"] = boto.create_multipart_upload(**upload)["UploadId"]
        parts = [
            {
                "PartNumber": number,
                "ETag": boto.upload_part(**upload, PartNumber=number, Body=part)["ETag"],
            }
            for number, part in ((2, body[5 * MiB :]), (1, body[: 5 * MiB]))
        ]
        with pytest.raises(ClientError, match="404"):
            boto.head_object(Bucket=bucket, Key="key")
        boto.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts[::-1]})

        with boto.get_object(Bucket=bucket, Key="key")["Body"] as stream:
            assert stream.read() == body

    def test_every_test_has_a_bucket_of_its_own(self, s3: Server, bucket: str, boto: Any) -> None:
        assert "Contents" not in boto.list_objects_v2(Bucket=bucket)
        assert bucket in {found["Name"] for found in boto.list_buckets()["Buckets"]}

    def test_the_environment_points_to_it(self, s3: Server, server: Server, bucket: str) -> None:
        client = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
        try:
            assert server == s3
            assert client.meta.endpoint_url == server.endpoint_url
            client.head_bucket(Bucket=bucket)
        finally:
            client.close()

    def test_it_is_reached_by_https(
        self, s3: Server, tls_endpoint: TlsEndpoint, bucket: str, boto: Any
    ) -> None:
        client = boto3.client(
            "s3",
            endpoint_url=tls_endpoint.endpoint_url,
            verify=str(tls_endpoint.ca_bundle),
            # By https boto3 would send its checksums in a trailer, which rclone refuses (411).
            config=Config(
                s3={"addressing_style": "path"}, request_checksum_calculation="when_required"
            ),
        )
        body = os.urandom(3 * MiB)
        client.put_object(Bucket=bucket, Key="key", Body=body)
        client.close()

        with boto.get_object(Bucket=bucket, Key="key")["Body"] as stream:
            assert stream.read() == body


def test_no_system_trusts_the_https_endpoint(tls_endpoint: TlsEndpoint) -> None:
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(tls_endpoint.endpoint_url, context=ssl.create_default_context())


class TestWhatTheServersLack:
    """What tests on one server rest on. A new release that changes it shows here first."""

    def test_moto_keeps_preconditions(self, moto: Server, bucket: str, boto: Any) -> None:
        etag = boto.put_object(Bucket=bucket, Key="key", Body=b"1", IfNoneMatch="*")["ETag"]

        with pytest.raises(ClientError, match="PreconditionFailed"):
            boto.put_object(Bucket=bucket, Key="key", Body=b"2", IfNoneMatch="*")
        with pytest.raises(ClientError, match="PreconditionFailed"):
            boto.put_object(Bucket=bucket, Key="key", Body=b"2", IfMatch='"other"')
        with pytest.raises(ClientError, match="PreconditionFailed"):
            boto.get_object(Bucket=bucket, Key="key", IfMatch='"other"')
        with pytest.raises(ClientError, match="NoSuchKey"):
            boto.put_object(Bucket=bucket, Key="none", Body=b"2", IfMatch=etag)
        boto.put_object(Bucket=bucket, Key="key", Body=b"2", IfMatch=etag)

    def test_rclone_ignores_preconditions(self, rclone: Server, bucket: str, boto: Any) -> None:
        boto.put_object(Bucket=bucket, Key="key", Body=b"1")
        boto.put_object(Bucket=bucket, Key="key", Body=b"2", IfNoneMatch="*")
        boto.put_object(Bucket=bucket, Key="key", Body=b"3", IfMatch='"other"')

        with boto.get_object(Bucket=bucket, Key="key", IfMatch='"other"')["Body"] as stream:
            assert stream.read() == b"3"

    def test_rclone_changes_a_multipart_etag(self, rclone: Server, bucket: str, boto: Any) -> None:
        upload = {"Bucket": bucket, "Key": "key"}
        upload["UploadId"] = boto.create_multipart_upload(**upload)["UploadId"]
        part = boto.upload_part(**upload, PartNumber=1, Body=b"data")
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        completed = boto.complete_multipart_upload(**upload, MultipartUpload=parts)

        heads = {boto.head_object(Bucket=bucket, Key="key")["ETag"] for _ in range(2)}

        assert completed["ETag"].endswith('-1"')
        assert heads == {part["ETag"]}

    def test_rclone_refuses_keys_that_are_not_paths(
        self, rclone: Server, bucket: str, boto: Any
    ) -> None:
        for key in ("a//b", "/a", "a/./b", "a/../b"):
            with pytest.raises(ClientError, match="InvalidArgument"):
                boto.put_object(Bucket=bucket, Key=key, Body=b"")


def test_user_settings_stay_outside() -> None:
    assert os.environ["AWS_EC2_METADATA_DISABLED"] == "true"
    assert not Path(os.environ["AWS_CONFIG_FILE"]).exists()
    assert not Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).exists()
    assert "AWS_PROFILE" not in os.environ


def add_ranks(values: list[int]) -> tuple[int, int, str | None]:
    total = torch.tensor(values[dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), int(total), os.environ.get("AWS_ENDPOINT_URL")


def process_id() -> int:
    return os.getpid()


def fail_on_one_rank() -> None:
    if dist.get_rank() == 1:
        msg = "only here"
        raise KeyError(msg)
    dist.barrier()


def never_return() -> None:
    dist.barrier()
    signal.pause()


def die() -> None:
    os._exit(3)


class TestRanks:
    def test_they_are_one_group_in_the_tests_environment(
        self, ranks: RankPool, server: Server
    ) -> None:
        size = ranks.world_size

        answers = ranks.run(add_ranks, [1, 10, 100, 1000])

        total = int("1111"[:size])
        assert answers == [(rank, total, server.endpoint_url) for rank in range(size)]

    def test_they_stay(self, ranks2: RankPool) -> None:
        assert ranks2.run(process_id) == ranks2.run(process_id)

    def test_a_failure_names_its_rank_and_line(self) -> None:
        with RankPool(2) as pool:
            first = pool.run(process_id)
            with pytest.raises(RanksFailedError) as caught:
                pool.run(fail_on_one_rank)

            assert "in fail_on_one_rank" in caught.value.tracebacks[1]
            assert "KeyError: 'only here'" in str(caught.value)
            assert set(first).isdisjoint(pool.run(process_id))

    def test_a_rank_that_does_not_return(self) -> None:
        with RankPool(1, timeout_s=30) as pool:
            pool.run(process_id)
            pool._timeout_s = 1.0
            with pytest.raises(RanksFailedError, match=r"(?s)did not return.*in never_return"):
                pool.run(never_return)

    def test_a_rank_that_dies(self) -> None:
        with pytest.raises(RanksFailedError, match="exit code 3"):
            run_ranks(1, die)

    def test_failures_pickle(self) -> None:
        error = RanksFailedError({1: "text"})

        assert pickle.loads(pickle.dumps(error)).tracebacks == error.tracebacks
