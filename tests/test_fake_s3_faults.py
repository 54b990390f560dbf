"""Every fault that FakeS3 plays, seen by the byte; and FakeS3 in a process of its own."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

import s3dcp
from s3dcp.testing import (
    Call,
    Cut,
    Drip,
    Drop,
    Exchange,
    Extend,
    FakeS3,
    Fault,
    FlipByte,
    IgnoreRange,
    LocalServerError,
    Record,
    Refuse,
    Stall,
    StopReading,
    WrongRange,
    internal_error,
    lost_response,
    slow_down,
    wrong_region,
)
from s3dcp.testing._fake_process import _PROGRAM
from tests._wire import Wire, request
from tests.test_fake_s3 import client_of

if TYPE_CHECKING:
    from collections.abc import Iterator

BUCKET = "bkt"
MiB = 1 << 20
DATA = b"0123456789"
GET = request("GET", f"/{BUCKET}/k")
PUT = request("PUT", f"/{BUCKET}/new", b"new")


FOLDER = str(Path(s3dcp.__file__).parent)
# `import s3dcp` imports torch, which takes longer than all of these tests.
NO_FRONT_DOOR = """
import sys, types
package = types.ModuleType("s3dcp")
package.__path__ = [sys.argv[1]]
sys.modules["s3dcp"] = package
"""


@pytest.fixture
def fake() -> Iterator[FakeS3]:
    """A server that holds one object, and for which nobody signs."""
    with FakeS3(anonymous=True) as server:
        server.create_bucket(BUCKET)
        server.write(BUCKET, "k", DATA)
        yield server
        server.check()


@pytest.fixture
def wire(fake: FakeS3) -> Iterator[Wire]:
    with Wire(fake.endpoint_url) as wire:
        yield wire


class TestRules:
    def test_the_requests_that_they_take(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(Refuse("A"), operation="GetObject", key="*.x", skip=1, times=2)
        fake.inject(Refuse("B"), index=5)
        fake.inject(Refuse("C"), where=lambda record: "range" in record.headers, times=None)
        keys = ["a.x", "a.y", "b.x", "c.x", "d.x", "e", "f"]
        codes = []
        for key in keys:
            wire.send(request("GET", f"/{BUCKET}/{key}"))
            codes.append(wire.answer().code)
        for _ in range(2):
            wire.send(request("GET", f"/{BUCKET}/k", Range="bytes=0-0"))
            codes.append(wire.answer().code)

        none = "NoSuchKey"
        assert codes == [none, none, "A", "A", none, "B", none, "C", "C"]
        assert [each.index for each in fake.rules[0].struck] == [2, 3]
        assert [isinstance(each.fault, Refuse) for each in fake.requests] == [
            code != none for code in codes
        ]

    def test_they_can_be_waited_for(self, fake: FakeS3, wire: Wire) -> None:
        rule = fake.inject(slow_down(), times=2)
        with pytest.raises(TimeoutError, match="struck 0 times, not 2"):
            rule.wait(2, timeout_s=0.01)
        wire.send(GET * 2)

        assert rule.wait(2).index == 1

    def test_nobody_is_blamed_for_what_a_fault_spoils(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(FlipByte(0, upload=True))
        wire.send(request("PUT", f"/{BUCKET}/new", b"\0", x_amz_checksum_crc32="0gLv1Q=="))

        assert wire.answer().code == "BadDigest"
        assert fake.violations == []
        assert fake.keys(BUCKET) == ["k"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("fault", "status", "code"),
        [
            (slow_down(), 503, "SlowDown"),
            (internal_error(), 500, "InternalError"),
            (internal_error("head"), 500, "InternalError"),
            (Refuse("NoSuchKey"), 404, "NoSuchKey"),
            (Refuse("AccessDenied"), 403, "AccessDenied"),
            (Refuse("ConditionalRequestConflict"), 409, "ConditionalRequestConflict"),
            (Refuse("PreconditionFailed"), 412, "PreconditionFailed"),
            (Refuse("ExpiredToken"), 400, "ExpiredToken"),
            (Refuse("ServiceUnavailable", 503), 503, "ServiceUnavailable"),
            (Refuse("InternalError", 200), 200, "InternalError"),
        ],
    )
    def test_their_answers(
        self, fake: FakeS3, wire: Wire, fault: Refuse, status: int, code: str
    ) -> None:
        fake.inject(fault, times=2)
        wire.send(GET + PUT)

        for _ in range(2):
            answer = wire.answer()
            assert (answer.status, answer.code) == (status, code)
        assert [each.code for each in fake.requests] == [code] * 2
        assert fake.keys(BUCKET) == ["k"]

    def test_a_burst(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(slow_down(retry_after_s=3), times=3)
        wire.send(GET * 4)

        answers = [wire.answer() for _ in range(4)]
        assert [each.status for each in answers] == [503, 503, 503, 200]
        assert [each.headers.get("retry-after") for each in answers] == ["3", "3", "3", None]

    def test_another_region(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(wrong_region("eu-west-1"))
        wire.send(GET)

        answer = wire.answer()
        assert (answer.status, answer.code) == (301, "PermanentRedirect")
        assert answer.headers["x-amz-bucket-region"] == "eu-west-1"
        assert b"<Endpoint>bkt.s3.eu-west-1.amazonaws.com</Endpoint>" in answer.body

    def test_before_the_body_was_read(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(internal_error("head"), operation="PutObject")
        head = request("PUT", f"/{BUCKET}/new", bytes(1 * MiB)).removesuffix(bytes(1 * MiB))
        wire.send(head)  # and the body never

        answer = wire.answer()
        assert (answer.status, answer.headers["connection"]) == (500, "close")
        assert wire.rest() == (b"", "closed")
        assert fake.requests[0].bytes_in == 0

    def test_before_a_body_that_comes_all_the_same(self, fake: FakeS3, wire: Wire) -> None:
        """The answer is not lost to a reset."""
        fake.inject(slow_down(), operation="PutObject")
        wire.send(request("PUT", f"/{BUCKET}/new", bytes(1 * MiB)))
        wire.finish()

        assert wire.answer().status == 503
        assert wire.rest() == (b"", "closed")

    def test_after_the_effect(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(internal_error("effect"), operation="PutObject")
        wire.send(PUT)

        assert wire.answer().status == 500
        assert fake.read(BUCKET, "new") == b"new"


class TestLostConnections:
    def test_at_connect(self, fake: FakeS3) -> None:
        rule = fake.inject(Drop(), operation="Connect")
        # Whether connecting or sending fails already, depends on who is faster.
        with suppress(ConnectionError), Wire(fake.endpoint_url) as wire:
            wire.send(GET)
            assert wire.rest() == (b"", "reset")
        rule.wait()
        with Wire(fake.endpoint_url) as wire:
            wire.send(GET)
            assert wire.answer().body == DATA
        assert [each.operation for each in fake.requests] == ["GetObject"]

    @pytest.mark.parametrize(("reset", "ended"), [(True, "reset"), (False, "closed")])
    def test_without_an_answer(self, fake: FakeS3, wire: Wire, reset: bool, ended: str) -> None:
        fake.inject(Drop(reset=reset))
        wire.send(PUT)

        assert wire.rest() == (b"", ended)
        assert fake.keys(BUCKET) == ["k"]
        assert fake.requests[0].status is None

    def test_before_the_body(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(Drop(at="head"))
        wire.send(PUT.removesuffix(b"new"))

        assert wire.rest() == (b"", "reset")

    def test_a_lost_response(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(lost_response())
        wire.send(PUT)

        assert wire.rest() == (b"", "reset")
        assert fake.read(BUCKET, "new") == b"new"

    @pytest.mark.parametrize(("reset", "ended"), [(True, "reset"), (False, "closed")])
    def test_in_the_middle_of_the_head(
        self, fake: FakeS3, wire: Wire, reset: bool, ended: str
    ) -> None:
        fake.inject(Cut(head_bytes=12, reset=reset))
        wire.send(GET)

        assert wire.rest() == (b"HTTP/1.1 200", ended)

    @pytest.mark.parametrize(("reset", "ended"), [(True, "reset"), (False, "closed")])
    @pytest.mark.parametrize("cut", [0, 1, 2 * MiB + 1])
    def test_in_the_middle_of_the_body(
        self, fake: FakeS3, wire: Wire, cut: int, reset: bool, ended: str
    ) -> None:
        fake.write(BUCKET, "k", bytes(4 * MiB))
        fake.inject(Cut(cut, reset=reset))
        wire.send(GET)

        data, how = wire.rest()
        head, _, body = data.partition(b"\r\n\r\n")
        assert b"Content-Length: 4194304" in head
        assert (len(body), how) == (cut, ended)
        assert fake.requests[0].bytes_out == cut


class TestWrongAnswers:
    def test_a_longer_body(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(Extend(3))
        wire.send(GET)

        assert wire.answer().body == DATA
        assert wire.take(3) == bytes(3)

    def test_the_whole_for_a_range(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(IgnoreRange())
        wire.send(request("GET", f"/{BUCKET}/k", Range="bytes=2-3"))

        answer = wire.answer()
        assert (answer.status, answer.body) == (200, DATA)
        assert "content-range" not in answer.headers

    def test_another_range(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(WrongRange(2))
        wire.send(request("GET", f"/{BUCKET}/k", Range="bytes=2-3"))

        answer = wire.answer()
        assert answer.headers["content-range"] == "bytes 4-5/10"
        assert (answer.status, answer.body) == (206, b"23")

    def test_a_flipped_byte(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(FlipByte(1))
        wire.send(request("GET", f"/{BUCKET}/k", Range="bytes=2-5") + GET)

        assert wire.answer().body == b"2" + bytes([ord("3") ^ 1]) + b"45"
        assert wire.answer().body == DATA

    def test_a_byte_flipped_on_its_way_in(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(FlipByte(2, upload=True))
        wire.send(PUT)

        assert wire.answer().status == 200
        assert fake.read(BUCKET, "new") == b"ne" + bytes([ord("w") ^ 1])


class TestSlowness:
    @pytest.mark.parametrize(
        ("fault", "first"), [(Stall(), 0), (Stall(4), 4), (Stall(head=False), None)]
    )
    def test_a_stall(self, fake: FakeS3, wire: Wire, fault: Fault, first: int | None) -> None:
        rule = fake.inject(fault)
        wire.send(GET)
        rule.wait()
        with Wire(fake.endpoint_url) as other:  # which is served meanwhile
            other.send(GET)
            assert other.answer().body == DATA
        if first is not None:
            while wire.line():
                pass
            assert wire.take(first) == DATA[:first]
            assert wire.pending() == b""
            rule.release()
            assert wire.take(len(DATA) - first) == DATA[first:]
        else:
            assert wire.pending() == b""
            rule.release()
            assert wire.answer().body == DATA

    def test_a_stall_that_the_client_gives_up(self, fake: FakeS3) -> None:
        rule = fake.inject(Stall())
        with Wire(fake.endpoint_url) as wire:
            wire.send(GET)
            rule.wait()
        # The server goes on to the end of the test, which asserts that nothing failed.

    def test_a_drip(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(Drip(step_bytes=4, pause_s=0.001))
        wire.send(GET * 2)

        assert wire.answer().body == DATA
        assert wire.answer().body == DATA

    def test_a_peer_that_stops_reading(self, fake: FakeS3, wire: Wire) -> None:
        size = 64 * MiB
        rule = fake.inject(StopReading(after_bytes=1 * MiB), operation="PutObject")
        head = request("PUT", f"/{BUCKET}/new", b"", Content_Length=str(size))
        wire.send(head + bytes(1 * MiB))
        rule.wait()  # from here on, the kernel alone takes what is sent
        sent = 1 * MiB + wire.fill(bytes(1 * MiB), timeout_s=0.2)
        assert sent < size
        assert fake.keys(BUCKET) == ["k"]

        rule.release()
        wire.send(bytes(size - sent))
        assert wire.answer().status == 200
        assert fake.read(BUCKET, "new") == bytes(size)


class TestCalls:
    def test_before_and_after(self, fake: FakeS3, wire: Wire) -> None:
        seen: list[object] = []

        def before(record: Record) -> None:
            seen.append((record.index, sorted(fake._s3.buckets[BUCKET].objects)))

        def after(record: Record) -> Fault | None:
            seen.append((record.index, sorted(fake._s3.buckets[BUCKET].objects)))
            return internal_error()

        fake.inject(Call(before, after), operation="PutObject")
        wire.send(PUT)

        assert wire.answer().status == 500
        assert seen == [(0, ["k"]), (0, ["k", "new"])]

    def test_another_fault_instead(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(Call(lambda _: Drop(at="head")))
        wire.send(PUT)

        assert wire.rest() == (b"", "reset")
        assert fake.keys(BUCKET) == ["k"]

    def test_clients_that_they_watch_are_blamed(self, fake: FakeS3, wire: Wire) -> None:
        fake.inject(Call())
        wire.send(request("GET", f"/{BUCKET}/k?acl"))

        assert wire.answer().status == 501
        assert [each.code for each in fake.violations] == ["NotImplemented"]
        fake.forget()

    def test_one_that_raises(self, fake: FakeS3, wire: Wire) -> None:
        def broken(_: Record) -> None:
            raise ZeroDivisionError

        fake.inject(Call(broken))
        wire.send(GET)

        assert wire.rest() == (b"", "reset")
        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            fake.check()
        fake.forget()

    @pytest.mark.parametrize(("when", "kept"), [("before", 1), ("after", 2)])
    def test_a_client_killed_at_a_request(self, fake: FakeS3, when: str, kept: int) -> None:
        """Nothing else is served until the client is gone, so what it did is what it did."""
        program = (
            "import sys, http.client\n"
            "wire = http.client.HTTPConnection(sys.argv[1])\n"
            "for n in range(3):\n"
            "    wire.request('PUT', f'/bkt/{n}', b'data')\n"
            "    wire.getresponse().read()\n"
        )
        host = fake.endpoint_url.removeprefix("http://")
        client = subprocess.Popen([sys.executable, "-c", program, host])

        def kill(_: Record) -> Fault | None:
            client.kill()
            client.wait()
            return Drop(at="head") if when == "before" else None

        rule = fake.inject(Call(**{when: kill}), index=1)
        rule.wait()

        assert client.wait() == -signal.SIGKILL
        assert fake.keys(BUCKET) == [*map(str, range(kept)), "k"]

    def test_faults_of_ones_own(self, fake: FakeS3, wire: Wire) -> None:
        class Rename(Fault):
            async def play(self, exchange: Exchange) -> None:
                await exchange.receive()
                exchange.perform()
                exchange.response.headers["ETag"] = '"other"'
                await exchange.send()

        fake.inject(Rename())
        wire.send(GET)

        answer = wire.answer()
        assert (answer.headers["etag"], answer.body) == ('"other"', DATA)


class TestProcess:
    def test_it_serves_and_tells(self) -> None:
        with FakeS3.process(discard="drop/", md5_etags=True, latency_s=0.001) as server:
            server.create_bucket(BUCKET)
            with pytest.raises(LocalServerError, match="no bucket"):
                server.create_bucket("NO")
            client = client_of(server)
            client.put_object(Bucket=BUCKET, Key="drop/k", Body=bytes(5 * MiB))
            client.get_object(Bucket=BUCKET, Key="drop/k", Range="bytes=0-9")["Body"].read()
            client.close()

            counts = server.stats()
            assert (counts["PutObject"], counts["bytes_in"], counts["bytes_out"]) == (
                1,
                5 * MiB,
                10,
            )
            assert server.violations() == []
            assert server.environ()["AWS_ENDPOINT_URL"] == server.endpoint_url
            with Wire(server.endpoint_url) as wire:
                wire.send(GET)
                assert wire.answer().code == "AccessDenied"
            assert len(server.violations()) == 1
            pid = server.pid
        assert gone(pid)
        with pytest.raises(LocalServerError, match="not running"):
            server.endpoint_url  # noqa: B018 - it raises

    def test_it_serves_tls(self, tmp_path: Path) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
        pem = tmp_path / "server.pem"
        with FakeS3.process(certificate=pem, private_key=pem, bucket=BUCKET) as server:
            assert server.endpoint_url.startswith("https://")
            client = client_of(server, verify=str(tmp_path / "ca.pem"))
            client.head_bucket(Bucket=BUCKET)
            client.close()

    def test_it_does_not_start(self) -> None:
        with FakeS3() as taken:
            port = int(taken.endpoint_url.rpartition(":")[2])
            with pytest.raises(LocalServerError, match="ended with status 1"):
                FakeS3.process(port=port).start()

    def test_it_ended_by_itself(self) -> None:
        with FakeS3.process() as server:
            os.kill(server.pid, signal.SIGKILL)
            with pytest.raises(LocalServerError, match="ended"):
                server.stats()

    def test_it_ends_with_its_input(self) -> None:
        """As `python -m s3dcp.testing` runs it, less the import of torch."""
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, FOLDER, "--port", "0", "--bucket", BUCKET],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with process:
            assert process.stdout is not None
            assert process.stdin is not None
            said = json.loads(process.stdout.readline())
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+", said["endpoint_url"])
            assert said["pid"] == process.pid
            process.stdin.close()
            assert process.wait(60) == 0

    def test_it_ends_with_its_parent(self) -> None:
        """Although a child of the parent's holds the server's input open."""
        program = (
            "import os, signal\n"
            "from s3dcp.testing import FakeS3\n"
            "server = FakeS3.process()\n"
            "server.start()\n"
            "if os.fork() == 0:\n"
            "    signal.pause()\n"
            "print(server.pid, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        parent = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", NO_FRONT_DOOR + program, FOLDER],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            with parent:
                assert parent.stdout is not None
                pid = int(parent.stdout.readline())
                assert parent.wait(60) == -signal.SIGKILL
                assert gone(pid, timeout_s=60)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)

    def test_it_needs_no_torch(self) -> None:
        program = (
            "import s3dcp.testing.__main__\n"
            "print(sorted({'torch', 'botocore', 'aiohttp', 'uvloop'} & set(sys.modules)))\n"
        )
        found = subprocess.run(
            [sys.executable, "-c", NO_FRONT_DOOR + program, FOLDER],
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout == "[]\n"


def gone(pid: int, timeout_s: float = 0.0) -> bool:
    """Whether a process has ended, or does in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)
