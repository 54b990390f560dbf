"""Safetensors checkpoints under a URI: listed, inspected, verified, deleted, cleaned up after."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
import safetensors.torch
import torch

import s3dcp
from s3dcp import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    CorruptMetadataError,
    S3Client,
    S3ClientConfig,
    S3ConfigError,
)
from s3dcp._keys import parse_s3_uri
from s3dcp._verifying import Verdict, inspect, verify
from s3dcp.testing import Call, FakeS3, Refuse
from tests._catalogs import days_ago, put_checkpoint
from tests._fakes import BUCKET, addressed, uri_of
from tests._hf import INDEX, MANIFEST, TWO_FILES, load, names, save, state_of
from tests._states import MiB, assert_same, fill

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from s3dcp._verifying import StoredEntry

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage:UserWarning"),
]

STATE = {name: state_of(1)[name] for name in ("small", "scalar", "empty", "medium")}
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SHARDS = [f"shard-00001-{name}" for name in FILES]
SIZE = sum(tensor.nbytes for tensor in STATE.values())
CONSOLIDATED: dict[str, Any] = {"save_distributed": True, "enable_consolidation": True}
BESIDE = ("config.json", "tokenizer.json", "tokenizer.model", "generation_config.json", "README.md")


@pytest.fixture(scope="module")
def shared() -> Iterator[FakeS3]:
    with FakeS3() as server:
        yield server


@pytest.fixture
def fake(shared: FakeS3) -> Iterator[FakeS3]:
    with addressed(shared) as server:
        yield server


def put(path: str, **options: Any) -> None:
    save(STATE, path, fqn_to_index_mapping=TWO_FILES, **options)


def put_single(server: FakeS3, path: str) -> None:
    state = {name: tensor.contiguous() for name, tensor in STATE.items()}
    server.write(BUCKET, f"{path}/model.safetensors", safetensors.torch.save(state))


def age(server: FakeS3, path: str, days: float) -> None:
    """Have everything below a path be of some days ago."""
    for key in server.keys(BUCKET, path):
        server.write(BUCKET, key, server.read(BUCKET, key), modified=days_ago(days))


def call(function: Callable[..., Any], path: str, **arguments: Any) -> Any:
    return S3Client().call(function, parse_s3_uri(uri_of(path)), **arguments)


class TestList:
    def test_what_was_saved(self, fake: FakeS3) -> None:
        put("run/step-1")
        put("run/step-2", save_distributed=True)
        put("run/step-3", **CONSOLIDATED)
        put_single(fake, "base")

        found = {each.uri: each for each in s3dcp.list_checkpoints(f"s3://{BUCKET}")}

        places = ["base", "run/step-1", "run/step-2", "run/step-3", "run/step-3/sharded"]
        assert sorted(found) == [uri_of(place) for place in places]
        for uri, each in found.items():
            assert (each.format, each.problem, each.tensors) == ("safetensors", None, len(STATE))
            folder = uri.removeprefix(f"s3://{BUCKET}/")
            files = [name for name in names(fake, folder) if name.endswith(".safetensors")]
            own = [name for name in files if "/" not in name]
            sizes = [len(fake.read(BUCKET, f"{folder}/{name}")) for name in own]
            assert (each.objects, each.size_bytes) == (len(own), sum(sizes))
            assert each.size_bytes > SIZE
        assert [found[uri_of(place)].ranks for place in places] == [None, None, 1, None, 1]
        assert found[uri_of("run/step-2")].step == 2

    def test_damage(self, fake: FakeS3) -> None:
        for name in "abc":
            put(f"run/{name}")
        fake.delete(BUCKET, f"run/a/{FILES[1]}")
        fake.write(BUCKET, f"run/b/{INDEX}", b"{")
        fake.write(BUCKET, f"run/c/{INDEX}", json.dumps({"weight_map": {"w": "../x"}}).encode())
        put_single(fake, "run/d")
        body = fake.read(BUCKET, "run/d/model.safetensors")
        fake.write(BUCKET, "run/d/model.safetensors", body[:-1])

        found = {each.uri[-1]: str(each.problem) for each in s3dcp.list_checkpoints(uri_of("run"))}

        assert found["a"] == f"missing: run/a/{FILES[1]}"
        assert "is malformed" in found["b"]
        assert "'.' and '..' are not allowed" in found["c"]
        assert "it is truncated, or no safetensors file" in found["d"]

    @pytest.mark.parametrize("single", [False, True])
    def test_one_that_is_replaced_by_a_smaller_one_meanwhile(
        self, fake: FakeS3, single: bool
    ) -> None:
        if single:
            put_single(fake, "run/step-1")
        else:
            put("run/step-1")
        save({"w": fill((3, 3))}, "other")
        [smaller] = [name for name in names(fake, "other") if name != INDEX]

        def replace(_: object) -> None:
            weight_map = {"w": "model.safetensors" if single else FILES[0]}
            body = fake.read(BUCKET, f"other/{smaller}")
            for name in names(fake, "run/step-1"):
                fake.write(BUCKET, f"run/step-1/{name}", body)
            if not single:
                index = json.dumps({"weight_map": weight_map}).encode()
                fake.write(BUCKET, f"run/step-1/{INDEX}", index)

        commit = "model.safetensors" if single else INDEX
        rule = fake.inject(Call(before=replace), key=f"run/step-1/{commit}")

        [found] = s3dcp.list_checkpoints(uri_of("run"))

        assert rule.struck
        body = fake.read(BUCKET, f"other/{smaller}")
        assert (found.problem, found.objects, found.size_bytes) == (None, 1, len(body))

    def test_a_save_that_was_not_committed_is_none(self, fake: FakeS3) -> None:
        put("run")
        fake.delete(BUCKET, f"run/{INDEX}")

        assert s3dcp.list_checkpoints(uri_of("run")) == []

    def test_the_latest_is_what_load_loads_unless_asked_for(self, fake: FakeS3) -> None:
        state = {"w": fill((3, 3))}
        s3dcp.save(state, uri_of("run/step-1"), no_dist=True)
        put("run/step-2")
        put("run/step-3")
        fake.delete(BUCKET, f"run/step-3/{FILES[0]}")

        latest = s3dcp.latest(uri_of("run"))
        model = s3dcp.latest(uri_of("run"), format="safetensors")

        assert latest is not None
        assert (latest.uri, latest.format) == (uri_of("run/step-1"), "dcp")
        assert model is not None
        assert (model.uri, model.format) == (uri_of("run/step-2"), "safetensors")
        with pytest.raises(S3ConfigError, match="format must be"):
            s3dcp.latest(uri_of("run"), format=cast("Any", "hf"))


class TestInspect:
    def entries(self, path: str, **arguments: Any) -> dict[str, StoredEntry]:
        return {entry.name: entry for entry in call(inspect, path, **arguments)}

    @pytest.mark.parametrize("options", [{}, {"save_distributed": True}])
    def test_what_the_headers_say(self, fake: FakeS3, options: dict[str, Any]) -> None:
        put("run", **options)
        self.check(fake, self.entries("run"), with_crcs=True)

    def test_a_file_of_the_library(self, fake: FakeS3) -> None:
        put_single(fake, "run")
        self.check(fake, self.entries("run"), with_crcs=False)

    def check(self, fake: FakeS3, found: dict[str, StoredEntry], *, with_crcs: bool) -> None:
        assert found.keys() == STATE.keys()
        for name, tensor in STATE.items():
            entry = found[name]
            assert entry.shape == tuple(tensor.shape)
            assert f"torch.{entry.dtype}" == str(tensor.dtype)
            [piece] = entry.pieces
            assert (piece.crc is not None) == with_crcs
            stored = fake.read(BUCKET, piece.key)[piece.offset : piece.offset + piece.length]
            assert stored == bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())

    def test_where_there_are_both(self, fake: FakeS3) -> None:
        put("run")
        s3dcp.save({"step": 1}, uri_of("run"), no_dist=True)

        for function in (self.entries, s3dcp.delete):
            with pytest.raises(S3ConfigError, match=r"dcp and safetensors at .*: say which"):
                function("run" if function == self.entries else uri_of("run"))
        assert self.entries("run", format_name="dcp").keys() == {"step"}
        assert self.entries("run", format_name="safetensors").keys() == STATE.keys()

    def test_none(self, fake: FakeS3) -> None:
        fake.write(BUCKET, f"run/{FILES[0]}", b"")
        with pytest.raises(CheckpointNotFoundError, match=INDEX):
            self.entries("run")


class TestVerify:
    def verify(self, path: str = "run", **arguments: Any) -> Verdict:
        return cast("Verdict", call(verify, path, budget_bytes=MiB, **arguments))

    @pytest.mark.parametrize("options", [{}, {"save_distributed": True}])
    def test_what_was_saved_is_whole(self, fake: FakeS3, options: dict[str, Any]) -> None:
        put("run", **options)

        verdict = self.verify()

        assert (verdict.problems, verdict.objects, verdict.size_bytes) == ((), 2, SIZE)
        assert (verdict.verified, verdict.unverified) == (len(STATE) - 1, 0)  # one is empty

    def test_what_others_saved_has_no_checksums(self, fake: FakeS3) -> None:
        put_single(fake, "run")

        verdict = self.verify()

        assert (verdict.problems, verdict.objects, verdict.size_bytes) == ((), 1, 0)
        assert (verdict.verified, verdict.unverified) == (0, len(STATE) - 1)

    def test_every_flipped_byte_of_a_tensor_is_found(self, fake: FakeS3) -> None:
        save({"a": fill((9, 9)), "b": fill((9, 9), seed=2)}, "run")
        key = "run/model-00001-of-00001.safetensors"
        whole = fake.read(BUCKET, key)
        for position in range(len(whole) - 2 * 9 * 9 * 4, len(whole), 61):
            damaged = bytearray(whole)
            damaged[position] ^= 1
            fake.write(BUCKET, key, bytes(damaged))

            assert len(self.verify().problems) == 1

    def test_what_does_not_fit_together(self, fake: FakeS3) -> None:
        put("run")
        key = f"run/{FILES[1]}"
        body = fake.read(BUCKET, key)
        for broken, says in [
            (body[:-1], "it is truncated"),
            (body + b"\0", "it is truncated, or no safetensors file"),
            (fake.read(BUCKET, f"run/{FILES[0]}"), "no tensor in the file that its"),
            (None, "names a file that is not there"),
        ]:
            fake.delete(BUCKET, key)
            if broken is not None:
                fake.write(BUCKET, key, broken)
            [problem] = self.verify().problems
            assert says in problem

    def test_a_file_of_another_save(self, fake: FakeS3) -> None:
        put("run")
        put("other")
        fake.write(BUCKET, f"run/{FILES[0]}", fake.read(BUCKET, f"other/{FILES[0]}"))

        [problem] = self.verify().problems

        assert "is of another save" in problem

    def test_there_is_none_of_its_format(self, fake: FakeS3) -> None:
        put("run/model")
        put_checkpoint(fake, "run/step-1/", "__0_0.distcp")
        for place, wanted, sought, other in [
            ("run/model", "dcp", r"\.metadata \(dcp\)", "safetensors"),
            ("run/step-1", "safetensors", f"{INDEX}, .* \\(safetensors\\)", "dcp"),
        ]:
            match = f"{place}: there is no {sought}. There is one of {other}: leave format="
            for function in (self.verify, partial(call, inspect), s3dcp.delete):
                key = "format" if function is s3dcp.delete else "format_name"
                kind: dict[str, Any] = {key: wanted}
                with pytest.raises(CheckpointNotFoundError, match=match):
                    function(uri_of(place) if function is s3dcp.delete else place, **kind)
        for kind, match in [
            ({}, "metadata .* nor"),
            ({"format_name": "dcp"}, "metadata"),
            ({"format_name": "safetensors"}, INDEX),
        ]:
            with pytest.raises(CheckpointNotFoundError, match=match):
                self.verify("run", **kind)

    def test_it_is_replaced_meanwhile(self, fake: FakeS3) -> None:
        put("run")
        put("other")

        def replace(_: object) -> None:
            for name in names(fake, "other"):
                fake.write(BUCKET, f"run/{name}", fake.read(BUCKET, f"other/{name}"))

        fake.inject(Call(before=replace), operation="HeadObject")

        with pytest.raises(CheckpointChangedError):
            self.verify()
        assert self.verify().problems == ()


class TestDelete:
    @pytest.mark.parametrize("options", [{}, {"save_distributed": True}, CONSOLIDATED])
    def test_all_of_it_and_nothing_else(self, fake: FakeS3, options: dict[str, Any]) -> None:
        put("run", **options)
        put("run/step-1")
        put_checkpoint(fake, "run/", "__0_0.distcp")
        for name in BESIDE:
            fake.write(BUCKET, f"run/{name}", b"{}")
        nested = [f"step-1/{name}" for name in (*FILES, INDEX)]

        s3dcp.delete(uri_of("run"), format="safetensors")

        assert names(fake, "run") == sorted([".metadata", "__0_0.distcp", *BESIDE, *nested])
        deleted = [each.key for each in fake.requests if each.operation == "DeleteObject"]
        assert deleted[-1].endswith(".safetensors")
        assert deleted[0].endswith(".json")

    def test_one_of_another_library(self, fake: FakeS3) -> None:
        index = {"weight_map": {"a": "w.safetensors", "b": "config.json", "c": "in/x.safetensors"}}
        fake.write(BUCKET, f"run/{INDEX}", json.dumps(index).encode())
        for name in ("w.safetensors", "config.json", "in/x.safetensors", "other.safetensors"):
            fake.write(BUCKET, f"run/{name}", b"")

        s3dcp.delete(uri_of("run"))

        assert names(fake, "run") == ["config.json", "other.safetensors"]

    def test_a_single_file(self, fake: FakeS3) -> None:
        put_single(fake, "run")
        fake.write(BUCKET, "run/config.json", b"{}")

        s3dcp.delete(uri_of("run"))

        assert names(fake, "run") == ["config.json"]

    def test_an_index_that_cannot_be_read(self, fake: FakeS3) -> None:
        put("run")
        fake.write(BUCKET, f"run/{INDEX}", b"{")

        with pytest.raises(CorruptMetadataError, match="Nothing was deleted"):
            s3dcp.delete(uri_of("run"))
        assert len(names(fake, "run")) == 3

    def test_one_that_is_saved_anew_meanwhile(self, fake: FakeS3) -> None:
        """A new save writes files of the same names before it commits: these stay."""
        config = S3ClientConfig(conditional_writes=True)
        put("run")

        def write_anew(_: object) -> None:
            fake.write(BUCKET, f"run/{FILES[0]}", b"new")

        fake.inject(Call(before=write_anew), operation="DeleteObject", key=f"*{FILES[0]}")

        s3dcp.delete(uri_of("run"), s3client_config=config)

        assert names(fake, "run") == [FILES[0]]
        assert fake.read(BUCKET, f"run/{FILES[0]}") == b"new"


class TestGc:
    def test_old_checkpoints_of_each_format(self, fake: FakeS3) -> None:
        for step in range(3):
            put(f"run/step-{step}", **CONSOLIDATED)
            age(fake, f"run/step-{step}/", 9 - step)
            put_checkpoint(fake, f"run/step-{step}/", "__0_0.distcp", days=9 - step)
        put_single(fake, "run/base")
        age(fake, "run/base/", 30)
        for name in BESIDE:
            fake.write(BUCKET, f"run/step-0/{name}", b"{}", modified=days_ago(30))

        told = s3dcp.gc(uri_of("run"), keep=2)
        done = s3dcp.gc(uri_of("run"), keep=2, dry_run=False)

        assert told == done
        assert [(each.format, each.uri) for each in done.checkpoints] == [
            ("dcp", uri_of("run/step-0")),
            ("safetensors", uri_of("run/step-0")),
            ("safetensors", uri_of("run/step-0/sharded")),
        ]
        assert names(fake, "run/step-0") == sorted(BESIDE)
        assert names(fake, "run/base") == ["model.safetensors"]
        assert_same(load(STATE, "run/step-1"), STATE)
        assert_same(load(STATE, "run/step-1/sharded"), STATE)
        assert s3dcp.gc(uri_of("run"), keep=2).checkpoints == ()

    @pytest.mark.parametrize("options", [{}, {"save_distributed": True}])
    def test_what_a_save_that_died_has_left(self, fake: FakeS3, options: dict[str, Any]) -> None:
        put("run/step-1")
        commit = MANIFEST if options else INDEX
        fake.inject(Refuse("AccessDenied"), operation="PutObject", key=f"*{commit}")
        with pytest.raises(AccessDeniedError):
            put("run/step-2", **options)
        for name in BESIDE:
            fake.write(BUCKET, f"run/step-2/{name}", b"{}")
        left = SHARDS if options else FILES
        assert set(left) < set(names(fake, "run/step-2"))

        assert s3dcp.gc(uri_of("run"), dry_run=False).objects == ()  # it may be under way
        age(fake, "run/", 2)
        found = s3dcp.gc(uri_of("run"), dry_run=False)

        assert [each.key for each in found.objects] == [f"run/step-2/{name}" for name in left]
        assert names(fake, "run/step-2") == sorted(BESIDE)
        assert_same(load(STATE, "run/step-1"), STATE)

    def test_what_others_left_is_theirs(self, fake: FakeS3) -> None:
        """Called as ours are, and without an index: our reader loads it, as torch's does."""
        body = safetensors.torch.save({"w": fill((3, 3))})
        for name in (FILES[0], SHARDS[0], "x.safetensors", "adapter_model.safetensors"):
            fake.write(BUCKET, f"theirs/{name}", body, modified=days_ago(9))
        fake.write(BUCKET, f"theirs/{FILES[1]}", b"no header at all", modified=days_ago(9))
        put("run")
        fake.write(BUCKET, f"mine/{FILES[0]}", fake.read(BUCKET, f"run/{FILES[0]}"))
        age(fake, "mine/", 9)

        found = s3dcp.gc(f"s3://{BUCKET}", keep=1, dry_run=False)

        assert [each.key for each in found.objects] == [f"mine/{FILES[0]}"]
        assert found.checkpoints == ()
        assert len(names(fake, "theirs")) == 5

    def test_what_an_index_above_names_stays(self, fake: FakeS3) -> None:
        put("run/part")
        fake.delete(BUCKET, f"run/part/{INDEX}")
        index = {"weight_map": {"a": f"part/{FILES[0]}"}}
        fake.write(BUCKET, f"run/{INDEX}", json.dumps(index).encode())
        age(fake, "run/", 2)

        s3dcp.gc(uri_of("run/part"), dry_run=False)

        assert names(fake, "run/part") == [FILES[0]]

    def test_an_index_that_cannot_be_read_keeps_what_is_below(self, fake: FakeS3) -> None:
        put("run/a")
        fake.write(BUCKET, f"run/a/{INDEX}", b"{")
        put("run/b")
        fake.delete(BUCKET, f"run/b/{INDEX}")
        age(fake, "run/", 2)

        found = s3dcp.gc(uri_of("run"), dry_run=False)

        assert [each.uri for each in found.unreadable] == [uri_of("run/a")]
        assert names(fake, "run/b") == []
        assert len(names(fake, "run/a")) == 3

    def test_a_save_that_writes_the_files_anew_meanwhile(self, fake: FakeS3) -> None:
        config = S3ClientConfig(conditional_writes=True)
        put("run")
        fake.delete(BUCKET, f"run/{INDEX}")
        age(fake, "run/", 2)
        put("new")

        def write_anew(_: object) -> None:
            for name in names(fake, "new"):
                fake.write(BUCKET, f"run/{name}", fake.read(BUCKET, f"new/{name}"))

        fake.inject(Call(before=write_anew), operation="DeleteObject")

        s3dcp.gc(uri_of("run"), dry_run=False, s3client_config=config)

        assert_same(load(STATE, "run"), STATE)
