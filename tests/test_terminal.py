"""The command line in a real terminal, piped, interrupted, killed, and asked for what cannot be."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

import s3dcp
from s3dcp import S3ClientConfig
from s3dcp.testing import Call, Drop, FakeS3, Fault, Record, Stall
from tests._catalogs import put_checkpoint, put_data
from tests._commands import LIMIT_S, command, run, shown, terminal
from tests._fakes import BUCKET
from tests._forked import Zygote
from tests._servers import use

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests._forked import Child

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

RUN = f"s3://{BUCKET}/run"
_COLUMNS = 80
SMALL = ("--size", "64KiB", "--tensors", "3", "--repeats", "1")


def on_terminal(zygote: Zygote, *arguments: str) -> tuple[int, str]:
    """Run a command on a terminal; return its exit status and all that it wrote there."""
    with terminal() as (ours, theirs):
        status, piped = zygote.start(command, arguments, os.ttyname(theirs)).end()
        assert piped == ""
        return status, shown(ours, theirs)


def put_a_bit_of_everything(fake: FakeS3) -> None:
    for step in (1, 2, 3):
        put_checkpoint(fake, f"run/step-{step}/", "__0_0.distcp", days=9 - step)
    put_data(fake, "run/lost/", "__0_0.distcp", "__1_0.distcp")
    s3dcp.save({"w": torch.ones(1 << 18)}, f"{RUN}/step-4", no_dist=True)


COMMANDS = {
    "ls": ("ls", RUN),
    "inspect": ("inspect", f"{RUN}/step-4"),
    "verify": ("verify", f"{RUN}/step-4"),
    "gc": ("gc", RUN, "--keep", "1"),
    "abort-uploads": ("abort-uploads", RUN, "--grace", "0s"),
    "bench": ("bench", f"{RUN}/bench", *SMALL),
}
WITH_A_BAR = {"verify", "bench"}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_terminal_and_a_pipe(fake: FakeS3, zygote: Zygote, name: str) -> None:
    """The same text; on a terminal with a bar, which fits and is taken away in the end."""
    put_a_bit_of_everything(fake)

    status, shown = on_terminal(zygote, *COMMANDS[name])
    assert status == 0
    if name in WITH_A_BAR:
        status, piped = zygote.start(command, COMMANDS[name], None).end()
        assert status == 0
    else:
        piped = run(*COMMANDS[name]).output

    assert "\x1b" not in shown + piped  # neither colours nor a cursor that jumps
    assert "\r" not in piped
    assert "B/s]" not in piped
    assert ("B/s]" in shown) == (name in WITH_A_BAR)  # which one so short may not fill
    lines = [line.split("\r") for line in shown.split("\r\n")]
    for line in lines:
        assert all(len(drawn) < _COLUMNS for drawn in line[:-1])  # what is drawn over
    left = [line[-1] for line in lines if line[-1].strip()]
    if name == "bench":  # whose figures are never the same
        assert [line.split()[0] for line in left[-3:]] == ["OPERATION", "save", "load"]
    else:
        assert sorted(left) == sorted(piped.splitlines())  # of two streams


INTERRUPTED = {
    "verify": ("GetObject", ("verify", f"{RUN}/step-4")),
    "gc": ("DeleteObject", ("gc", RUN, "--keep", "1", "--delete")),
    "abort-uploads": ("ListMultipartUploads", ("abort-uploads", RUN)),
    "bench": ("GetObject", ("bench", f"{RUN}/bench", *SMALL)),
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_ctrl_c_on_a_terminal(fake: FakeS3, zygote: Zygote, name: str) -> None:
    put_a_bit_of_everything(fake)
    operation, arguments = INTERRUPTED[name]
    rule = fake.inject(Stall(), operation=operation, where=lambda each: "metadata" not in each.key)

    with terminal() as (ours, theirs):
        child = zygote.start(command, arguments, os.ttyname(theirs))
        rule.wait(timeout_s=LIMIT_S)
        os.write(ours, b"\x03")
        status, _ = child.end()
        text = shown(ours, theirs)

    rule.release()
    assert (status, "Traceback" in text) == (130, False), text
    assert not any("bench" in key for key in fake.keys(BUCKET))


@pytest.mark.parametrize(("number", "moment"), [(0, "after"), (2, "before"), (5, "before")])
def test_gc_is_killed(fake: FakeS3, zygote: Zygote, number: int, moment: str) -> None:
    """Checkpoints are whole or gone, at any moment; the next run does the rest."""
    put_a_bit_of_everything(fake)
    arguments = ("gc", RUN, "--keep", "2", "--delete")
    killed(fake, zygote, arguments, "DeleteObject", number, moment)

    assert all(each.complete for each in s3dcp.list_checkpoints(RUN))
    assert run(*arguments).exit_code == 0

    folders = {key.split("/")[1] for key in fake.keys(BUCKET)}
    assert folders == {"step-3", "step-4"}
    assert [each.step for each in s3dcp.list_checkpoints(RUN) if each.complete] == [3, 4]


@pytest.mark.parametrize("number", [0, 2])
def test_abort_uploads_is_killed(fake: FakeS3, zygote: Zygote, number: int) -> None:
    put_a_bit_of_everything(fake)
    there = fake.keys(BUCKET)
    fake.inject(Drop(), operation="AbortMultipartUpload", times=None)
    fake.inject(Drop(), operation="UploadPart", times=None)
    for step in range(3):
        with pytest.raises(s3dcp.S3Exception):
            s3dcp.save(
                {"w": torch.ones(3 << 20)},
                f"{RUN}/lost-{step}",
                no_dist=True,
                s3client_config=S3ClientConfig(part_size=5 << 20, max_attempts=1),
            )
    fake.forget()
    assert len(fake.uploads(BUCKET)) == 3
    arguments = ("abort-uploads", RUN, "--grace", "0s", "--delete")
    killed(fake, zygote, arguments, "AbortMultipartUpload", number, "after")

    assert run(*arguments).exit_code == 0

    assert fake.uploads(BUCKET) == {}
    assert fake.keys(BUCKET) == there


def killed(
    fake: FakeS3,
    zygote: Zygote,
    arguments: tuple[str, ...],
    operation: str,
    number: int,
    moment: str,
) -> None:
    """Run a command that SIGKILL ends at a request."""
    child: Future[Child] = Future()

    def kill(_: Record) -> Fault:
        child.result(LIMIT_S).signal(signal.SIGKILL)
        return Drop(at="head")

    fake.inject(Call(**{moment: kill}), operation=operation, skip=number)
    child.set_result(zygote.start(command, arguments, None))
    status, _ = child.result().end()
    assert status == -signal.SIGKILL
    fake.forget()


WRONG = {
    "no URI": ([], {}, "Missing argument"),
    "not S3": (["/a/folder"], {}, "s3://"),
    "no bucket": (["s3://nowhere/run"], {}, "nowhere"),
    "secret": ([RUN], {"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
    "key": ([RUN], {"AWS_ACCESS_KEY_ID": "AKIANOBODY"}, "InvalidAccessKeyId"),
    "no credentials": ([RUN], {"AWS_PROFILE": "nobody"}, "nobody"),
    "endpoint": ([RUN, "--endpoint-url", "http://127.0.0.1:1"], {}, "Could not connect"),
    "region": ([RUN, "--region", "nowhere-1"], {}, "the region 'nowhere-1' is wrong"),
}


@pytest.fixture(scope="module")
def deceived() -> Iterator[FakeS3]:
    """A server of its own: wrong signatures, which it takes note of, may come after a test."""
    with FakeS3() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", [*COMMANDS, "cp"])
def test_what_is_wrong_is_one_line(
    deceived: FakeS3, monkeypatch: pytest.MonkeyPatch, name: str, wrong: str
) -> None:
    use(deceived, monkeypatch)
    monkeypatch.setattr("s3dcp._options.S3ClientConfig", partial(S3ClientConfig, max_attempts=1))
    arguments, environ, says = WRONG[wrong]
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    options = {"bench": [*SMALL], "cp": ["/no/such/copy"] if arguments else []}.get(name, [])

    result = run(name, *arguments[:1], *options, *arguments[1:])

    assert (result.exit_code, result.stdout) == (2, "")
    *usage, error = result.stderr.splitlines()
    assert error.startswith("Error: ")
    assert says in error
    assert all(line.startswith(("Usage:", "Try ")) or not line for line in usage)
    assert not usage or wrong == "no URI"
