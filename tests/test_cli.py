"""The command line: as a person runs it, in a terminal and in scripts."""

from __future__ import annotations

import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import s3dcp
from s3dcp import S3ClientConfig, S3StorageWriter
from s3dcp import _catalog as catalog
from s3dcp.__main__ import main
from s3dcp._cli import cli
from s3dcp._terminal import Bar
from s3dcp.testing import Call, Drop, FakeS3, Fault, Record, Refuse, Stall
from tests._catalogs import put_checkpoint, put_data
from tests._commands import LIMIT_S, own_terminal, program, run, shown, terminal
from tests._fakes import BUCKET

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

RUN = f"s3://{BUCKET}/run"


def save(name: str, **tensors: torch.Tensor) -> None:
    writer = S3StorageWriter(None, f"{RUN}/{name}")
    dcp.save({"model": tensors, "step": 7}, storage_writer=writer, no_dist=True)


class TestLs:
    def test_a_table(self, fake: FakeS3) -> None:
        save("step-10", w=torch.ones(1000))
        put_checkpoint(fake, "run/step-9/", "__0_0.distcp", "__1_0.distcp")
        fake.delete(BUCKET, "run/step-9/__1_0.distcp")

        result = run("ls", RUN)

        assert (result.exit_code, result.stderr) == (0, "")
        head, *rows = result.stdout.splitlines()
        assert head.split() == [
            *("COMMITTED", "FORMAT", "STEP", "RANKS", "TENSORS", "SIZE", "CHECKPOINT", "STATE")
        ]
        assert [row.split()[2:] for row in rows] == [
            f"dcp 9 2 2 20 B {RUN}/step-9 incomplete: missing: run/step-9/__1_0.distcp".split(),
            ["dcp", "10", "1", "1", rows[1].split()[6], "KiB", f"{RUN}/step-10", "complete"],
        ]
        assert rows[0].index(RUN) == rows[1].index(RUN)

    def test_json(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/step-9/", "__0_0.distcp")

        [row] = json.loads(run("ls", "--json", RUN).stdout)

        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row.pop("committed_at"))
        assert row == {
            "uri": f"{RUN}/step-9",
            "format": "dcp",
            "step": 9,
            "ranks": 1,
            "objects": 1,
            "tensors": 1,
            "size_bytes": 10,
            "problem": None,
            "complete": True,
        }

    def test_nothing(self, fake: FakeS3) -> None:
        assert run("ls", "--json", RUN).stdout == "[]\n"
        assert run("ls", RUN).exit_code == 0

    def test_names_cannot_steer_the_terminal(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/\x1b[2J/", "__0_0.distcp")

        assert f"{RUN}/\\x1b[2J" in run("ls", RUN).stdout


class TestInspect:
    def test_a_table(self, fake: FakeS3) -> None:
        save("step-1", w=torch.ones(300, 7), b=torch.tensor(1, dtype=torch.bfloat16))

        result = run("inspect", f"{RUN}/step-1")

        assert result.exit_code == 0
        [key] = [key for key in fake.keys(BUCKET) if key.endswith(".distcp")]
        file = key.removeprefix("run/step-1/")
        rows = [row.split() for row in result.stdout.splitlines()]
        assert [[*row[:3], row[-1]] for row in rows] == [
            ["NAME", "SHAPE", "DTYPE", "FILE"],
            ["model.b", "scalar", "bfloat16", file],
            ["model.w", "300x7", "float32", file],
            ["step", "-", "-", file],
        ]

    def test_json(self, fake: FakeS3) -> None:
        save("step-1", w=torch.ones(300, 7))

        tensor, other = json.loads(run("inspect", "--json", f"{RUN}/step-1").stdout)

        assert (tensor["name"], tensor["shape"], tensor["dtype"]) == (
            "model.w",
            [300, 7],
            "float32",
        )
        [piece] = tensor["pieces"]
        assert fake.read(BUCKET, piece["key"])
        assert tensor["size_bytes"] == piece["length"] > 8400
        assert re.fullmatch("[0-9a-f]{16}", piece["crc64nvme"])
        assert (other["name"], other["shape"], other["dtype"]) == ("step", None, None)


class TestSafetensors:
    """A checkpoint of safetensors files, beside one of DCP's own."""

    @pytest.fixture(autouse=True)
    def _saved(self, fake: FakeS3) -> None:
        writer = s3dcp.S3HuggingFaceStorageWriter(None, f"{RUN}/step-1")
        dcp.save({"w": torch.ones(300, 7)}, storage_writer=writer, no_dist=True)

    def test_ls_and_inspect(self, fake: FakeS3) -> None:
        _, row = run("ls", RUN).stdout.splitlines()
        assert row.split()[2:] == f"safetensors 1 - 1 8.414 KiB {RUN}/step-1 complete".split()
        _, row = run("inspect", f"{RUN}/step-1").stdout.splitlines()
        file = "model-00001-of-00001.safetensors"
        assert row.split() == ["w", "300x7", "float32", "8.203", "KiB", file]

    def test_verify(self, fake: FakeS3) -> None:
        assert run("verify", f"{RUN}/step-1").stdout.startswith(
            f"{RUN}/step-1 is whole: 1 objects, 1 items compared with their checksums"
        )
        fake.delete(BUCKET, "run/step-1/model-00001-of-00001.safetensors")
        damaged = run("verify", f"{RUN}/step-1")
        assert damaged.exit_code == 1
        assert "names a file that is not there" in damaged.stdout

    def test_where_there_are_both(self, fake: FakeS3) -> None:
        save("step-1", v=torch.ones(3))

        refused = run("inspect", f"{RUN}/step-1")
        assert refused.exit_code == 2
        assert "say which with format= (--format)" in refused.stderr
        for name, tensor in (("safetensors", "w"), ("dcp", "model.v")):
            found = run("inspect", f"{RUN}/step-1", "--format", name, "--json").stdout
            assert tensor in {entry["name"] for entry in json.loads(found)}
            assert run("verify", f"{RUN}/step-1", "--format", name).exit_code == 0


class TestVerify:
    def test_whole(self, fake: FakeS3) -> None:
        save("step-1", w=torch.ones(300))

        result = run("verify", f"{RUN}/step-1")

        assert (result.exit_code, result.stderr) == (0, "")  # and no bar, off a terminal
        assert result.stdout.startswith(
            f"{RUN}/step-1 is whole: 1 objects, 2 items compared with their checksums ("
        )

    def test_without_checksums(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp")

        result = run("verify", RUN)

        assert result.exit_code == 0
        assert "1 items have no checksum: their sizes were checked" in result.stdout

    def test_damaged(self, fake: FakeS3) -> None:
        save("step-1", w=torch.ones(300))
        [key] = [key for key in fake.keys(BUCKET) if key.endswith(".distcp")]
        data = bytearray(fake.read(BUCKET, key))
        data[-1000] ^= 4
        fake.write(BUCKET, key, bytes(data))

        result = run("verify", f"{RUN}/step-1")

        assert result.exit_code == 1
        assert "of 'model.w', differ from those that were saved" in result.stdout

    def test_json(self, fake: FakeS3) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp")
        whole = run("verify", "--json", RUN)
        fake.delete(BUCKET, "run/__0_0.distcp")
        damaged = run("verify", "--json", RUN)

        assert (whole.exit_code, damaged.exit_code) == (0, 1)
        assert json.loads(whole.stdout) == {
            "objects": 1,
            "verified": 0,
            "unverified": 1,
            "size_bytes": 0,
            "problems": [],
            "whole": True,
        }
        found = json.loads(damaged.stdout)
        assert (found["whole"], found["problems"]) == (
            False,
            [f"s3://{BUCKET}/run/__0_0.distcp is missing"],
        )

    def test_it_could_not_be_found_out(self, fake: FakeS3) -> None:
        save("step-1", w=torch.ones(300))
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key="*.distcp", times=None)

        result = run("verify", f"{RUN}/step-1")

        assert result.exit_code == 2
        assert result.stderr.startswith("Error: GetObject s3://")
        assert run("verify", f"{RUN}/step-2").exit_code == 2


class TestGc:
    def test_a_dry_run_tells_and_delete_does(self, fake: FakeS3) -> None:
        for step in (1, 2, 3):
            put_checkpoint(fake, f"run/step-{step}/", "__0_0.distcp", days=9 - step)
        put_data(fake, "run/step-4/", "__0_0.distcp", days=2)
        put_data(fake, "run/step-5/", "__0_0.distcp", days=0.5)
        lines = [
            f"checkpoint {RUN}/step-2 (10 B)",
            f"checkpoint {RUN}/step-1 (10 B)",
            f"object {RUN}/step-4/__0_0.distcp (10 B)",
        ]

        told = run("gc", RUN, "--keep", "1")
        assert told.exit_code == 0
        assert told.stdout.splitlines() == [f"would delete {line}" for line in lines]
        assert "repeat it with --delete" in told.stderr
        assert len(fake.keys(BUCKET)) == 8

        assert run("gc", RUN).stdout.splitlines() == [f"would delete {lines[-1]}"]

        done = run("gc", RUN, "--keep", "1", "--delete")
        assert done.exit_code == 0
        assert done.stdout.splitlines() == [f"deleted {line}" for line in lines]
        assert fake.keys(BUCKET) == [
            "run/step-3/.metadata",
            "run/step-3/__0_0.distcp",
            "run/step-5/__0_0.distcp",
        ]

    @pytest.mark.parametrize("options", [[], ["--delete"], ["--keep", "1"]], ids=" ".join)
    def test_nothing(self, fake: FakeS3, options: list[str]) -> None:
        put_checkpoint(fake, "run/step-1/", "__0_0.distcp")
        put_data(fake, "run/step-2/", "__0_0.distcp", days=0.5)

        found = run("gc", RUN, *options)

        assert (found.exit_code, found.stdout) == (0, "")
        left = "what is younger than --grace is left alone."
        assert found.stderr == f"Nothing to delete below {RUN}: {left}\n"
        assert run("gc", RUN, "--json", *options).stderr == ""

    def test_json(self, fake: FakeS3) -> None:
        """Checkpoints are described as by `ls`."""
        for step in (1, 2):
            put_checkpoint(fake, f"run/step-{step}/", "__0_0.distcp", days=9 - step)
        put_data(fake, "run/lost/", "__0_0.distcp")
        put_data(fake, "run/unread/", ".metadata")
        listed = {row["uri"]: row for row in json.loads(run("ls", "--json", RUN).stdout)}

        told, done = (
            run("gc", RUN, "--keep", "1", "--json", *options) for options in ([], ["--delete"])
        )

        assert (told.exit_code, told.stderr, done.stderr) == (0, "", "")
        found = json.loads(told.stdout)
        assert json.loads(done.stdout) == found | {"dry_run": False}
        assert found["dry_run"] is True
        assert found["checkpoints"] == [listed[f"{RUN}/step-1"]]
        assert found["unreadable"] == [listed[f"{RUN}/unread"]]
        [lost] = found["objects"]
        assert lost.pop("last_modified").endswith("+00:00")
        assert lost == {"uri": f"{RUN}/lost/__0_0.distcp", "size_bytes": 10}

    @pytest.mark.parametrize(
        ("grace", "found"), [("11h", 1), ("13h", 0), ("0.1d", 1), ("750m", 0), ("43100s", 1)]
    )
    def test_grace(self, fake: FakeS3, grace: str, found: int) -> None:
        put_data(fake, "run/", "__0_0.distcp", days=0.5)

        assert len(run("gc", RUN, "--grace", grace).stdout.splitlines()) == found

    def test_metadata_that_cannot_be_read_is_told_of(self, fake: FakeS3) -> None:
        put_data(fake, "run/", ".metadata", "__0_0.distcp")

        result = run("gc", RUN, "--delete")

        assert (result.exit_code, result.stdout) == (0, "")
        assert result.stderr.startswith(f"Left alone, with all below it: {RUN}: ")
        assert len(fake.keys(BUCKET)) == 2


class TestAbortUploads:
    def test_a_dry_run_tells_and_delete_does(self, fake: FakeS3) -> None:
        fake.inject(Drop(), operation="AbortMultipartUpload", times=None)
        fake.inject(Refuse("AccessDenied"), operation="UploadPart", times=None)
        with pytest.raises(BaseException, match="AccessDenied"):
            save("step-1", w=torch.ones(8 << 20))
        fake.forget()
        [key] = fake.uploads(BUCKET).values()

        none = run("abort-uploads", RUN)  # it is younger than a day
        assert (none.exit_code, none.stdout) == (0, "")
        left = "what is younger than --grace is left alone."
        assert none.stderr == f"Nothing to abort below {RUN}: {left}\n"
        told = run("abort-uploads", RUN, "--grace", "0s")
        assert told.stdout == f"would abort upload s3://{BUCKET}/{key}\n"
        assert fake.uploads(BUCKET)

        found = json.loads(run("abort-uploads", RUN, "--grace", "0s", "--json").stdout)
        [upload_id] = fake.uploads(BUCKET)
        [upload] = found["uploads"]
        assert upload.pop("initiated").endswith("+00:00")
        assert upload == {"uri": f"s3://{BUCKET}/{key}", "upload_id": upload_id}
        assert found["dry_run"] is True

        done = run("abort-uploads", RUN, "--grace", "0s", "--delete")

        assert done.stdout == f"aborted upload s3://{BUCKET}/{key}\n"
        assert fake.uploads(BUCKET) == {}


class TestOptions:
    def test_the_version(self) -> None:
        assert run("--version").stdout == f"s3dcp {s3dcp.__version__}\n"

    @pytest.mark.parametrize(
        "arguments",
        [
            ["ls"],
            ["ls", "/a/file"],
            ["ls", "s3://"],
            ["ls", "s3://nowhere/run"],
            ["ls", RUN, "--endpoint-url", "ftp://host"],
            ["ls", RUN, "--profile", "nobody"],
            ["inspect", RUN],
            ["verify", RUN],
            ["cp", RUN],
            ["cp", RUN, "somewhere"],
            ["cp", "/a/folder", "/another"],
            ["cp", "/no/such/folder", RUN],
            ["bench", "s3://nowhere/run", "--size", "1KiB"],
            ["gc", RUN, "--keep", "0"],
            ["gc", RUN, "--grace", "1 week"],
            ["gc", RUN, "--grace", "9999999d"],
            ["no-such-command"],
        ],
        ids=" ".join,
    )
    def test_what_cannot_be_done_is_one_line_and_status_2(
        self, fake: FakeS3, arguments: list[str]
    ) -> None:
        result = run(*arguments)

        assert (result.exit_code, result.stdout) == (2, "")
        *usage, error = result.stderr.splitlines()
        assert error.startswith("Error: ")
        assert all(line.startswith(("Usage:", "Try ")) or not line for line in usage)

    def test_the_store(self, fake: FakeS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        put_checkpoint(fake, "run/", "__0_0.distcp")
        credentials = tmp_path / "credentials"
        credentials.write_text(
            f"[me]\naws_access_key_id={fake.access_key}\naws_secret_access_key={fake.secret_key}\n"
        )
        for name in fake.environ():
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
        store = ["--region", fake.region, "--endpoint-url", fake.endpoint_url]

        result = run("ls", RUN, *store, "--profile", "me", "--path-style", "--json")

        assert [row["uri"] for row in json.loads(result.stdout)] == [RUN]

    @pytest.mark.parametrize(
        ("said", "region", "config"),
        [
            ([], None, {}),
            (["--region", "eu-west-1"], "eu-west-1", {}),
            (["--endpoint-url", "http://host"], None, {"endpoint_url": "http://host"}),
            (["--profile", "me"], None, {"profile": "me"}),
            (["--path-style"], None, {"force_path_style": True}),
            (["--unsigned"], None, {"unsigned": True}),
            (["--requester-pays"], None, {"requester_pays": True}),
        ],
    )
    def test_what_is_said_of_the_store_arrives(
        self,
        monkeypatch: pytest.MonkeyPatch,
        said: list[str],
        region: str | None,
        config: dict[str, Any],
    ) -> None:
        asked: list[dict[str, Any]] = []

        def list_checkpoints(_: str, **store: Any) -> list[s3dcp.CheckpointInfo]:
            asked.append(store)
            return []

        monkeypatch.setattr(catalog, "list_checkpoints", list_checkpoints)

        assert run("ls", RUN, *said).exit_code == 0
        assert asked == [{"region": region, "s3client_config": S3ClientConfig(**config)}]

    def test_help_names_every_command(self) -> None:
        text = run("--help").stdout
        for name, command in cli.commands.items():
            assert f"  {name} " in text
            assert command.get_short_help_str(80).endswith(".")
            assert not command.get_short_help_str(45).endswith("...")


def test_nobody_reads(
    fake: FakeS3, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_checkpoint(fake, "run/", "__0_0.distcp")
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as ended:
            cli(["ls", RUN])

    assert ended.value.code == 141
    assert capsys.readouterr().err == ""


def test_ctrl_c(fake: FakeS3) -> None:
    """Its status is not that of a damaged checkpoint."""
    save("step-1", w=torch.ones(300))

    def interrupt(_: Record) -> Fault:
        os.kill(os.getpid(), signal.SIGINT)
        return Stall()

    rule = fake.inject(Call(before=interrupt), operation="GetObject", key="*.distcp")

    result = run("verify", f"{RUN}/step-1")

    rule.release()
    assert (result.exit_code, result.output) == (130, "")


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "s3dcp._cli")
    monkeypatch.setitem(sys.modules, "click", None)

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", 's3dcp: click is missing: pip install "s3dcp[cli]"\n')


class TestProcesses:
    def test_a_bar_on_a_terminal(self, fake: FakeS3) -> None:
        save("step-1", w=torch.ones(1 << 20))
        with terminal() as (ours, theirs):
            process = program("verify", f"{RUN}/step-1", stdout=subprocess.PIPE, stderr=theirs)
            out, _ = process.communicate(timeout=LIMIT_S)
            text = shown(ours, theirs)

        assert process.returncode == 0
        assert out.startswith(f"{RUN}/step-1 is whole")
        assert "%|" in text
        assert text.rstrip(" ").endswith("\r")  # the bar is taken away in the end

    def test_serve_and_ctrl_c(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What it prints can be pasted into another terminal, whose commands then reach it."""
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, "of-another-store")
        with terminal() as (ours, theirs):
            process = program(
                "serve", "--port", "0", "--bucket", BUCKET, stdin=theirs, stdout=theirs
            )
            text = ""
            while text.count("\n") < 6:
                assert select.select([ours], [], [], LIMIT_S)[0]
                text += os.read(ours, 1 << 16).decode()
            for names in re.findall(r"^unset (.+)\r$", text, re.MULTILINE):
                for name in names.split():
                    monkeypatch.delenv(name)
            for name, value in re.findall(r"^export (\w+)=(\S+)\r$", text, re.MULTILINE):
                monkeypatch.setenv(name, value)

            save("step-1", w=torch.ones(3))
            assert json.loads(run("ls", RUN, "--json").stdout)[0]["complete"]

            process.send_signal(signal.SIGINT)
            assert process.wait(LIMIT_S) == 0


def test_serve_listens_where_it_is_told_to(fake: FakeS3) -> None:
    """Here, where another one does."""
    port = fake.endpoint_url.rpartition(":")[2]
    process = program("serve", "--port", port, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        printed, error = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()

    assert (process.returncode, printed) == (2, "")
    assert "cannot listen" in error


def test_a_bar_of_one_thing_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal() as (ours, theirs), open(theirs, "w", closefd=False) as err:
        monkeypatch.setattr(sys, "stderr", err)
        with Bar() as bar:
            bar.advance(10, 10, "comparing")
            bar.refresh()
            bar.advance(1, 4, "copying")
            bar.refresh()
            assert (bar.n, bar.total) == (1, 4)
        text = shown(ours, theirs)

    assert "comparing: 100%|" in text
    assert "copying:  25%|" in text.partition("comparing: 100%|")[2]


def test_what_is_logged_stands_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal() as (ours, theirs), open(theirs, "w", closefd=False) as err:
        monkeypatch.setattr(sys, "stderr", err)
        with Bar() as bar:
            bar.advance(1, 10)
            bar.refresh()
            logging.getLogger("s3dcp.copies").warning("something odd")
        shown = b""
        while shown.count(b"%|") < 2 and select.select([ours], [], [], LIMIT_S)[0]:
            shown += os.read(ours, 1 << 16)

    before, _, after = shown.decode(errors="replace").partition("something odd")
    assert "%|" in before
    assert before.rpartition("\r")[2] == ""  # at the line's beginning; what stood there is blank
    assert before.rpartition("\r")[0].rpartition("\r")[2].isspace()
    assert after.startswith("\r\n")
    assert "%|" in after


class TestCp:
    def test_both_ways(self, fake: FakeS3, tmp_path: Path) -> None:
        save("step-1", w=torch.ones(300))

        down = run("cp", f"{RUN}/step-1", str(tmp_path / "copy"))
        up = run("cp", str(tmp_path / "copy"), f"{RUN}/step-2")
        again = run("cp", str(tmp_path / "copy"), f"{RUN}/step-2")

        for result in (down, up, again):
            assert (result.exit_code, result.stderr) == (0, "")
        first, copied, compared = down.stdout.splitlines()
        assert first.startswith(f"{tmp_path}/copy is a copy of {RUN}/step-1: 1 objects (")
        assert re.fullmatch(r"1 objects were copied: .* KiB in .* s \(.*/s\)", copied)
        assert compared == "2 items were compared with checksums"
        assert f"{RUN}/step-2 is a copy of {tmp_path}/copy already: " in again.stdout
        assert run("verify", f"{RUN}/step-2").exit_code == 0

    def test_json(self, fake: FakeS3, tmp_path: Path) -> None:
        save("step-1", w=torch.ones(300))

        found = json.loads(run("cp", "--json", f"{RUN}/step-1", str(tmp_path)).stdout)

        assert (found["objects"], found["copied_objects"], found["verified"]) == (1, 1, 2)
        assert found["totals"]["retries"] == 0
        assert found["wall_s"] > 0

    def test_another_checkpoint(self, fake: FakeS3, tmp_path: Path) -> None:
        save("step-1", w=torch.ones(300))
        save("step-2", w=torch.ones(300))
        run("cp", f"{RUN}/step-1", str(tmp_path))

        refused = run("cp", f"{RUN}/step-2", str(tmp_path))
        assert refused.exit_code == 2
        assert refused.stderr.startswith(f"Error: There is another checkpoint at {tmp_path}")
        assert run("cp", "--overwrite", f"{RUN}/step-2", str(tmp_path)).exit_code == 0

    def test_what_the_disk_refuses_is_one_line(self, fake: FakeS3, tmp_path: Path) -> None:
        save("step-1", w=torch.ones(300))
        (tmp_path / "file").touch()

        result = run("cp", f"{RUN}/step-1", str(tmp_path / "file" / "folder"))

        assert (result.exit_code, result.stdout) == (2, "")
        [line] = result.stderr.splitlines()
        assert line == (
            f"Error: {tmp_path}/file/folder: Not a directory: something else is in the way: copy "
            "to another folder, or remove it"
        )

    def test_ctrl_c_and_on_it_goes(self, fake: FakeS3, tmp_path: Path) -> None:
        """In a terminal: a bar, Ctrl-C from the keyboard, and the same command again."""
        save("step-1", w=torch.ones(3 << 20))
        rule = fake.inject(Stall(), operation="GetObject", key="*.distcp", skip=1)
        command = ("cp", f"{RUN}/step-1", str(tmp_path))
        with terminal() as (ours, theirs):
            process = program(
                *command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal
            )
            rule.wait(timeout_s=LIMIT_S)
            os.write(ours, b"\x03")
            assert process.wait(LIMIT_S) == 130
            shown = os.read(ours, 1 << 16).decode()
        rule.release()
        assert "%|" in shown
        assert "Traceback" not in shown
        assert not (tmp_path / ".metadata").exists()

        assert run(*command).exit_code == 0
        assert (tmp_path / ".metadata").exists()


class TestBench:
    SMALL = ("bench", RUN, "--size", "64KiB", "--tensors", "3")

    def test_a_table(self, fake: FakeS3) -> None:
        result = run(*self.SMALL, "--connections", "2", "--connections", "4", "--repeats", "2")

        assert (result.exit_code, result.stderr) == (0, "")
        head, *rows, save, load = result.stdout.splitlines()
        assert head.split()[:2] == ["OPERATION", "CONNECTIONS"]
        assert [row.split()[:4] for row in rows] == [
            ["save", "2", "8", "MiB"],
            ["load", "2", "8", "MiB"],
            ["save", "4", "8", "MiB"],
            ["load", "4", "8", "MiB"],
        ]
        assert save.startswith("Of these, the fastest save was with ")
        assert load.startswith("Of these, the fastest load was with ")
        assert fake.keys(BUCKET) == []

    def test_json_and_a_plot(self, fake: FakeS3, tmp_path: Path) -> None:
        plot = tmp_path / "plot.png"

        result = run(*self.SMALL, "--part-size", "16MiB", "--json", "--plot", str(plot))

        trials = json.loads(result.stdout)
        assert [trial["operation"] for trial in trials] == ["save", "load"] * 3
        for trial in trials:
            assert (trial["part_bytes"], trial["size_bytes"]) == (16 << 20, 3 * (65536 // 3))
            assert trial["gib_per_s"] > 0
            assert trial["requests"]["size_bytes"] > trial["size_bytes"]
        assert plot.read_bytes().startswith(b"\x89PNG")

    def test_what_it_leaves(self, fake: FakeS3) -> None:
        """Nothing, if it is interrupted; and what was there before stays."""
        put_checkpoint(fake, "run/", "__0_0.distcp")
        before = fake.keys(BUCKET)

        def interrupt(_: Record) -> Fault:
            os.kill(os.getpid(), signal.SIGINT)
            return Stall()

        rule = fake.inject(Call(before=interrupt), operation="UploadPart")

        result = run("bench", RUN, "--size", "20MiB", "--tensors", "1")

        rule.release()
        assert (result.exit_code, result.stdout) == (130, "")
        assert fake.keys(BUCKET) == before
        assert fake.uploads(BUCKET) == {}

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--plot", "plot.xyz"], "--plot plot.xyz: the name must end in one of "),
            (["--plot", "/no/such/plot.png"], "--plot /no/such/plot.png: there is no such folder"),
            (["--size", "0"], "'0' is not a size, such as 64MiB or 1.5GiB."),
            (["--part-size", "big"], "'big' is not a size"),
            (["--repeats", "0"], "0 is not in the range"),
            (["--size", "900TiB"], "GiB are free: make the checkpoint smaller"),
            (["--tensors", "1000000000"], "GiB are free: make the checkpoint smaller"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_cannot_be_is_said_at_once(
        self, fake: FakeS3, options: list[str], said: str
    ) -> None:
        result = run("bench", RUN, *options)

        assert (result.exit_code, result.stdout) == (2, "")
        assert said in result.stderr
        assert fake.requests == []

    def test_without_matplotlib(self, fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

        result = run(*self.SMALL, "--plot", "plot.png")

        assert result.exit_code == 2
        assert 'Error: --plot needs matplotlib: pip install "s3dcp[bench]"' in result.stderr
        assert fake.requests == []

    def test_a_store_that_refuses(self, fake: FakeS3) -> None:
        fake.inject(Refuse("AccessDenied"), operation="PutObject", times=None)

        result = run(*self.SMALL)

        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("Error: PutObject ")
