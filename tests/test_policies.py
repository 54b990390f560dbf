"""The policies to copy, and the table of who needs what, against what s3dcp asks of S3.

Every call is made to a FakeS3, well and badly. From the requests that this has recorded follow the
permissions that AWS wants for them, and those are compared with what docs/aws.md says.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import boto3
import pytest
import torch
import torch.distributed.checkpoint as dcp
from botocore.validate import ParamValidator
from click.testing import CliRunner

import s3dcp
from s3dcp import S3ClientConfig, S3Exception, S3FileSystem
from s3dcp._bench import run_trials
from s3dcp._cli import cli
from s3dcp._failures import _HINTS
from s3dcp.testing import FakeS3, internal_error
from tests._fakes import unwrapped
from tests._pages import all_blocks, rows_of

if TYPE_CHECKING:
    from pathlib import Path

    from s3dcp.testing import Record

# torch says so of every save and load without a process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

MiB = 1 << 20
BUCKET, RUN = "my-bucket", "s3://my-bucket/run"
KEY = "arn:aws:kms:eu-west-1:123456789012:key/my-key-id"
CONFIG = S3ClientConfig(part_size=5 * MiB, max_attempts=1, conditional_writes=True)
ENCRYPTED = replace(CONFIG, server_side_encryption="aws:kms", sse_kms_key_id=KEY)
SMALL = {"bias": torch.ones(4)}
LARGE = {"weight": torch.ones(3 * MiB)}  # a multipart upload

# AWS, "Required permissions for Amazon S3 API operations". What is not here is asked of nobody.
ACTIONS = {
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CopyObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListParts": "s3:ListMultipartUploadParts",
}
# Other headers (tags, ACLs, locks, an owner's) may need permissions of their own.
HEADERS = re.compile(
    "date|content-sha256|checksum-.*|sdk-checksum-algorithm|copy-source|copy-source-if-match"
    "|server-side-encryption|server-side-encryption-aws-kms-key-id"
)


@dataclass(frozen=True, order=True)
class Need:
    """A permission, on something."""

    action: str
    resource: str


def needs_of(records: Iterable[Record]) -> set[Need]:
    """Return what these requests needed to be permitted."""
    found: set[Need] = set()
    encrypted: set[str] = set()
    for record in records:
        bucket = f"arn:aws:s3:::{record.bucket}"
        place = f"{bucket}/{record.key}" if record.key else bucket
        special = {name[6:] for name in record.headers if name.startswith("x-amz-")}
        assert all(map(HEADERS.fullmatch, special)), special
        found.add(Need(ACTIONS[record.operation], place))
        if record.method != "GET" and "if-match" in record.headers:
            found.add(Need("s3:GetObject", place))  # the answer tells what is there
        if source := record.headers.get("x-amz-copy-source"):
            found.add(Need("s3:GetObject", f"arn:aws:s3:::{source}"))
        if record.key and record.status == 404:
            found.add(Need("s3:ListBucket", bucket))  # else it were a 403
        if record.headers.get("x-amz-server-side-encryption") == "aws:kms":
            encrypted.add(place)
            found.add(Need("kms:GenerateDataKey", KEY))
        if place in encrypted and record.operation in {"GetObject", "UploadPart"}:
            found.add(Need("kms:Decrypt", KEY))
    return found


@dataclass(frozen=True)
class World:
    """A server with checkpoints in it, and a folder."""

    server: FakeS3
    folder: Path

    def run(self, *arguments: str) -> None:
        """Run a command of ours."""
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output

    def fails(self, call: Callable[[], object], operation: str) -> None:
        """Make a call whose requests of a kind all fail."""
        with pytest.raises(S3Exception):
            self.struck(call, operation)

    def struck(self, call: Callable[[], object], operation: str) -> None:
        rule = self.server.inject(internal_error(), operation=operation, times=None)
        try:
            call()
        finally:
            self.server.rules.remove(rule)
        assert rule.struck


def _save(state: dict[str, Any], name: str, config: S3ClientConfig = CONFIG) -> None:
    s3dcp.save(state, f"{RUN}/{name}", s3client_config=config)


def save(world: World) -> None:
    """New, over another, and in vain."""
    _save(SMALL | LARGE, "saved")
    _save(SMALL | LARGE, "saved")
    world.fails(lambda: _save(LARGE, "saved"), "UploadPart")


def async_save(world: World) -> None:
    def saved() -> None:
        s3dcp.async_save(LARGE, f"{RUN}/async", s3client_config=CONFIG).result()

    saved()
    asyncio.run(s3dcp.asave(SMALL, f"{RUN}/async", s3client_config=CONFIG))
    world.fails(saved, "UploadPart")


def load(_: World) -> None:
    """One that is there, and one that is not."""
    s3dcp.load(dict(SMALL), f"{RUN}/step-1", s3client_config=CONFIG)
    with pytest.raises(s3dcp.CheckpointNotFoundError):
        asyncio.run(s3dcp.aload(dict(SMALL), f"{RUN}/none", s3client_config=CONFIG))


def listed(_: World) -> None:
    assert s3dcp.list_checkpoints(RUN)
    assert s3dcp.latest(RUN)


def delete(_: World) -> None:
    s3dcp.delete(f"{RUN}/step-2", s3client_config=CONFIG)


def gc(world: World) -> None:
    for name in ("old", "new"):
        _save(SMALL, f"pruned/{name}")
    world.server.write(BUCKET, "run/pruned/new/__9_0.lost.distcp", b"lost")
    world.server.forget()
    world.run("gc", f"{RUN}/pruned", "--keep", "1", "--grace", "0s", "--delete")
    assert len(world.server.keys(BUCKET, "run/pruned")) == 2


def abort_uploads(world: World) -> None:
    world.fails(
        lambda: world.struck(lambda: _save(LARGE, "cut"), "UploadPart"), "AbortMultipartUpload"
    )
    world.server.forget()
    world.run("abort-uploads", RUN, "--grace", "0s", "--delete")
    assert not world.server.uploads(BUCKET)


def copy_down(world: World) -> None:
    world.run("cp", f"{RUN}/step-1", str(world.folder / "copy"))


def copy_up(world: World) -> None:
    """From a disk, over another, within S3, in vain, and once more."""
    _save(SMALL, "target")
    world.run("cp", f"{RUN}/large", str(world.folder / "large"))
    world.server.forget()
    world.run("cp", str(world.folder / "large"), f"{RUN}/target", "--overwrite")
    world.run("cp", f"{RUN}/step-1", f"{RUN}/copy")
    up = partial(s3dcp.copy, str(world.folder / "large"), f"{RUN}/cut", s3client_config=CONFIG)
    world.fails(up, "UploadPart")
    world.fails(up, "CompleteMultipartUpload")
    up()  # goes on with the parts


def bench(world: World) -> None:
    world.run("bench", RUN, "--size", "1MiB", "--tensors", "1", "--repeats", "1")
    trials = partial(run_trials, size_bytes=12 * MiB, tensors=1, repeats=1)
    world.fails(lambda: trials(RUN, [CONFIG]), "UploadPart")


def safetensors(world: World) -> None:
    """Sharded, consolidated, replaced, and in vain."""

    def save_shards(state: dict[str, Any] = SMALL) -> None:
        writer = s3dcp.S3HuggingFaceStorageWriter(
            None, f"{RUN}/shards", CONFIG, save_distributed=True
        )
        with unwrapped():
            dcp.save(dict(state), storage_writer=writer, no_dist=True)

    save_shards()
    save_shards()
    s3dcp.consolidate_safetensors_files(f"{RUN}/shards", f"{RUN}/full", s3client_config=CONFIG)
    world.fails(partial(save_shards, LARGE), "UploadPart")


def load_safetensors(_: World) -> None:
    """One that is there, and one that is not."""

    def reader(name: str) -> s3dcp.S3HuggingFaceStorageReader:
        return s3dcp.S3HuggingFaceStorageReader(None, f"{RUN}/{name}", CONFIG)

    dcp.load(dict(SMALL), storage_reader=reader("tuned"), no_dist=True)
    with pytest.raises(s3dcp.CheckpointNotFoundError):
        reader("none").read_metadata()


def files(world: World) -> None:
    fs = S3FileSystem(None, s3client_config=CONFIG)

    def write() -> None:
        with fs.create_stream(f"{RUN}/file", "wb") as stream:
            stream.write(bytes(12 * MiB))

    write()
    fs.rename(f"{RUN}/file", f"{RUN}/renamed")
    assert f"{RUN}/renamed" in fs.ls(RUN)
    assert not fs.exists(f"{RUN}/file")
    with fs.create_stream(f"{RUN}/renamed", "rb") as stream:
        assert stream.read(1) == b"\0"
    fs.rm_file(f"{RUN}/renamed")
    world.fails(write, "UploadPart")


def command(name: str) -> Callable[[World], None]:
    return lambda world: world.run(name, f"{RUN}/step-1")


# By what the table calls it.
CALLS: dict[str, Callable[[World], None]] = {
    "save": save,
    "async_save": async_save,
    "load": load,
    "list_checkpoints": listed,
    "ls": command("ls"),
    "inspect": command("inspect"),
    "verify": command("verify"),
    "delete": delete,
    "gc": gc,
    "abort-uploads": abort_uploads,
    "cp to a disk": copy_down,
    "cp to S3": copy_up,
    "bench": bench,
    "S3HuggingFaceStorageWriter": safetensors,
    "S3HuggingFaceStorageReader": load_safetensors,
    "S3FileSystem": files,
}


@pytest.fixture
def world(fake: FakeS3, tmp_path: Path) -> World:
    fake.create_bucket(BUCKET)
    for name in ("step-1", "step-2"):
        _save(SMALL, name)
    _save(LARGE, "large")
    writer = s3dcp.S3HuggingFaceStorageWriter(None, f"{RUN}/tuned", CONFIG)
    dcp.save(dict(SMALL), storage_writer=writer, no_dist=True)
    fake.forget()
    return World(fake, tmp_path)


def _policy() -> dict[str, Any]:
    [found] = [
        each for block in all_blocks("json") if "Statement" in (each := json.loads(block.text))
    ]
    return dict(found)


def _told() -> dict[str, set[str]]:
    """The table: the actions that each call needs."""
    return {
        name.replace("`", "").strip(): set(re.findall(r"`(\w+:\w+)`", actions))
        for names, actions in rows_of("call or command")
        for name in names.split(", ")
    }


def test_the_table_has_every_call_and_command() -> None:
    told = {name.split()[0] for name in _told()}

    assert set(_told()) == set(CALLS)
    assert set(cli.commands) - told == {"serve"}


def test_every_call_asks_for_what_the_policy_and_the_table_say(world: World) -> None:
    """Nothing that was asked for is missing, and nothing was granted that nobody asks for."""
    needs: set[Need] = set()
    for name, call in CALLS.items():
        call(world)
        asked = needs_of(world.server.requests)
        world.server.forget()
        assert {need.action for need in asked} == _told()[name], name
        needs |= asked
    _save(SMALL | LARGE, "encrypted", ENCRYPTED)
    s3dcp.load(dict(SMALL), f"{RUN}/encrypted", s3client_config=ENCRYPTED)
    needs |= needs_of(world.server.requests)

    policy = _policy()
    assert policy["Version"] == "2012-10-17"
    used = set()
    for need in sorted(needs):
        grants = [
            (number, action)
            for number, each in enumerate(policy["Statement"])
            for action in each["Action"]
            if action == need.action and fnmatchcase(need.resource, each["Resource"])
        ]
        assert len(grants) == 1, need
        used.update(grants)
    assert used == {(n, a) for n, each in enumerate(policy["Statement"]) for a in each["Action"]}
    assert all(each["Effect"] == "Allow" for each in policy["Statement"])


@pytest.mark.parametrize(
    ("state", "actions"),
    [
        (SMALL, {"kms:GenerateDataKey"}),
        (LARGE, {"kms:GenerateDataKey", "kms:Decrypt"}),
    ],
    ids=["in one request", "in parts"],
)
def test_parts_are_decrypted_to_be_put_together(
    world: World, state: dict[str, Any], actions: set[str]
) -> None:
    _save(state, "new", ENCRYPTED)

    needs = needs_of(world.server.requests)
    assert {each.action for each in needs if each.resource == KEY} == actions


def test_who_is_refused_is_told_of_every_action() -> None:
    hint = _HINTS[s3dcp.AccessDeniedError]

    assert set(re.findall(r"\w+:[A-Z]\w+", hint)) == {
        action for each in _policy()["Statement"] for action in each["Action"]
    }


def test_each_block_is_a_policy_or_a_lifecycle() -> None:
    found = [json.loads(block.text) for block in all_blocks("json")]

    assert len(found) == 3
    assert [sorted(each) for each in found] == [["Statement", "Version"], ["Rules"], ["Rules"]]


def test_lifecycles_are_what_s3_takes() -> None:
    client = boto3.client("s3", region_name="us-east-1")
    shape = client.meta.service_model.operation_model("PutBucketLifecycleConfiguration").input_shape
    for block in all_blocks("json"):
        rules = json.loads(block.text)
        if "Rules" in rules:
            given = {"Bucket": BUCKET, "LifecycleConfiguration": rules}
            assert not ParamValidator().validate(given, shape).has_errors()
    client.close()
