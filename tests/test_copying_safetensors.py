"""Safetensors checkpoints copied between S3 and a disk: ours, and folders as others write them."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

import s3dcp
from s3dcp import (
    CheckpointChangedError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptMetadataError,
    IntegrityError,
    InvalidS3UriError,
    S3ClientConfig,
    S3ConfigError,
    S3Exception,
    copy,
)
from s3dcp.testing import Call, Drop, FakeS3, Fault, FlipByte, Record, Refuse
from tests._commands import command, run
from tests._fakes import BUCKET, uri_of
from tests._hf import INDEX, MANIFEST, TWO_FILES, load, loaded_by_the_library, names, save, state_of
from tests._states import MiB, assert_same, fill

if TYPE_CHECKING:
    from pathlib import Path

    from tests._forked import Child, Zygote
    from tests._servers import Server
    from tests._states import StateDict

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning")

RUN, COPY = uri_of("run"), uri_of("copy")
SINGLE = "model.safetensors"
FILES = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
# What `save_pretrained` and its like leave beside the weights,
COMPANIONS = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "merges.txt"),
    *("chat_template.jinja", "qwen.tiktoken", "modeling_own.py", "README.md"),
}
# and what else may lie there.
OTHERS = {
    *("pytorch_model.bin.index.json", "optimizer.pt", "training_args.bin", ".gitattributes"),
    *("adapter.safetensors", "below/config.json"),
}
# One request after the other.
ONE = S3ClientConfig(max_connections=1, part_size=5 * MiB, memory_budget_bytes=10 * MiB)


def tensors(seed: int = 1, rows: int = 1) -> dict[str, torch.Tensor]:
    """Return what fills two files; with 17 rows, of more than 16 MiB the second."""
    return {"a.weight": fill((3, 5), seed=seed), "b.weight": fill((rows, 1 << 18), seed=seed)}


def pretrained(
    folder: Path, state: dict[str, torch.Tensor], *, single: bool = False
) -> dict[str, torch.Tensor]:
    """Write a folder as `save_pretrained` of Hugging Face's transformers does."""
    files = (
        {SINGLE: state} if single else dict(zip(FILES, ({k: state[k]} for k in state), strict=True))
    )
    for name in sorted(COMPANIONS | OTHERS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"{name} of a model".encode())
    for name, own in files.items():
        safetensors.torch.save_file(own, folder / name, metadata={"format": "pt"})
    if not single:
        weight_map = {key: name for name, own in files.items() for key in own}
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    return state


def on_disk(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in on_disk(folder)}


def writes(fake: FakeS3) -> set[str]:
    return fake.stats().keys() & {"PutObject", "CreateMultipartUpload", "DeleteObject"}


def kill(fake: FakeS3, zygote: Zygote, arguments: tuple[str, ...], **where: Any) -> None:
    """Run the program in a process of its own, and kill it at one of its requests."""
    killed: list[Child] = []

    def at_request(_: Record) -> Fault:
        killed[0].signal(signal.SIGKILL)
        return Drop(at="head")

    fake.inject(Call(before=at_request), **where)
    killed.append(zygote.start(command, arguments, None))
    assert killed[0].end()[0] == -signal.SIGKILL
    fake.forget()


def cut_off(source: Path | str, target: str, fake: FakeS3) -> None:
    """Copy all but the index."""
    rule = fake.inject(Refuse("AccessDenied"), operation="PutObject", key=f"*/{INDEX}")
    with pytest.raises(S3Exception):
        copy(source, target)
    assert rule.struck


class TestOurs:
    @pytest.mark.parametrize(
        ("options", "commit"), [({}, INDEX), ({"save_distributed": True}, MANIFEST)]
    )
    def test_all_ways(
        self, fake: FakeS3, tmp_path: Path, options: dict[str, Any], commit: str
    ) -> None:
        state = state_of(1)
        save(state, "run", fqn_to_index_mapping=TWO_FILES, **options)
        checked = sum(1 for tensor in state.values() if tensor.nbytes)

        down = copy(RUN, tmp_path)
        up = copy(tmp_path, COPY)
        within = copy(COPY, uri_of("again"))

        assert (down.objects, down.copied_objects) == (2, 2)
        assert down.copied_bytes == down.size_bytes == up.copied_bytes
        for report in (down, up, within):
            assert (report.verified, report.unverified) == (checked, 0)
        assert on_disk(tmp_path) == set(names(fake, "run"))
        assert commit in on_disk(tmp_path)
        assert_same(
            dict(sorted(loaded_by_the_library(tmp_path).items())), dict(sorted(state.items()))
        )
        for path in ("copy", "again"):
            assert_same(load(state, path), state)
            assert run("verify", uri_of(path)).exit_code == 0
        assert fake.uploads(BUCKET) == {}

    def test_again_it_has_nothing_to_do(self, fake: FakeS3, tmp_path: Path) -> None:
        save(tensors(), "run")
        copy(RUN, tmp_path)
        copy(tmp_path, COPY)
        fake.forget()

        for way in ((RUN, tmp_path), (tmp_path, COPY), (RUN, COPY)):
            assert copy(*way).copied_objects == 0

        assert writes(fake) == set()
        assert all(each.key.endswith(".json") or each.bytes_out < MiB for each in fake.requests)

    def test_what_was_lost_of_a_copy_is_copied(self, fake: FakeS3, tmp_path: Path) -> None:
        state = tensors()
        save(state, "run", fqn_to_index_mapping={"a.weight": 1, "b.weight": 2})
        copy(RUN, tmp_path)
        (tmp_path / FILES[0]).unlink()

        assert copy(RUN, tmp_path).copied_objects == 1
        assert_same(loaded_by_the_library(tmp_path), state)

    def test_a_file_of_the_same_name_that_no_index_names_is_not_lost(
        self, fake: FakeS3, tmp_path: Path
    ) -> None:
        save(tensors(), "run")
        [name] = [name for name in names(fake, "run") if name != INDEX]
        (tmp_path / name).write_bytes(b"mine")

        with pytest.raises(CheckpointExistsError, match=f"{name} is another"):
            copy(RUN, tmp_path)

        assert contents(tmp_path) == {name: b"mine"}

    def test_without_the_shards_that_they_were_made_of(self, fake: FakeS3, tmp_path: Path) -> None:
        save(tensors(), "run", save_distributed=True, enable_consolidation=True)
        assert f"sharded/{MANIFEST}" in names(fake, "run")

        copy(RUN, tmp_path / "full")
        copy(f"{RUN}/sharded", tmp_path / "shards")

        assert on_disk(tmp_path / "full") == {INDEX, "model-00001-of-00001.safetensors"}
        assert MANIFEST in on_disk(tmp_path / "shards")

    def test_a_save_that_died_where_a_copy_was_cut_off(self, fake: FakeS3) -> None:
        """Its files have the names and sizes of the copy's, whose claim is still there."""
        save(tensors(1), "run")
        cut_off(RUN, COPY, fake)
        fake.inject(Refuse("AccessDenied"), operation="PutObject", key=f"copy/{INDEX}")
        with pytest.raises(S3Exception):
            save(tensors(2), "copy")
        assert ".s3dcp-copy" in names(fake, "copy")

        with pytest.raises(CheckpointExistsError, match="a part of one"):
            copy(RUN, COPY)
        copy(RUN, COPY, overwrite=True)

        assert run("verify", COPY).exit_code == 0
        assert_same(load(tensors(1), "copy"), tensors(1))

    def test_overwriting_mends_a_copy(self, fake: FakeS3) -> None:
        """That has its own index, and a file of the same size of another save."""
        for seed in (1, 2):
            save(tensors(seed), f"{seed}")
        copy(uri_of("1"), COPY)
        [name] = [name for name in names(fake, "copy") if name != INDEX]
        fake.write(BUCKET, f"copy/{name}", fake.read(BUCKET, f"2/{name}"))
        assert run("verify", COPY).exit_code != 0

        assert copy(uri_of("1"), COPY, overwrite=True).copied_objects == 1

        assert run("verify", COPY).exit_code == 0

    def test_of_what_has_a_new_configuration_nothing_else_is_copied(
        self, fake: FakeS3, tmp_path: Path
    ) -> None:
        state = tensors()
        save(state, "run")
        fake.write(BUCKET, "run/config.json", b"old")
        copy(RUN, tmp_path)
        fake.write(BUCKET, "run/config.json", b"new")

        with pytest.raises(CheckpointExistsError, match=r"config\.json is another"):
            copy(RUN, tmp_path)
        report = copy(RUN, tmp_path, overwrite=True)

        assert report.copied_objects == 1
        assert (tmp_path / "config.json").read_bytes() == b"new"
        assert_same(loaded_by_the_library(tmp_path), state)

    @pytest.mark.parametrize("offset", [100, 100_000], ids=["header", "tensor"])
    def test_damage_on_the_way(self, fake: FakeS3, tmp_path: Path, offset: int) -> None:
        """A header, which no item's own checksum tells of, is read once before it is copied."""
        save(tensors(), "run")
        flipped = FlipByte(offset)
        fake.inject(flipped, operation="GetObject", key="*.safetensors", skip=1, times=None)

        with pytest.raises(IntegrityError, match=r"bytes .* differ"):
            copy(RUN, tmp_path)

        assert INDEX not in on_disk(tmp_path)


class TestPretrained:
    """Nothing in such a folder says which version of a file belongs to the others."""

    @pytest.mark.parametrize("single", [False, True])
    def test_all_ways(self, fake: FakeS3, tmp_path: Path, single: bool) -> None:
        state = pretrained(tmp_path / "model", tensors(), single=single)
        weights = [SINGLE] if single else FILES
        commit = [] if single else [INDEX]

        up = copy(tmp_path / "model", RUN)
        within = copy(RUN, COPY)
        down = copy(COPY, tmp_path / "copy")

        expected = {*COMPANIONS, *weights, *commit}
        assert set(names(fake, "run")) == set(names(fake, "copy")) == expected
        original = contents(tmp_path / "model")
        assert contents(tmp_path / "copy") == {name: original[name] for name in expected}
        assert_same(loaded_by_the_library(tmp_path / "copy"), state)
        assert_same(load(state, "copy"), state)
        for report in (up, within, down):
            assert (report.objects, report.copied_objects) == (len(expected) - len(commit),) * 2
            assert (report.verified, report.unverified) == (2, 0)

    @pytest.mark.parametrize("single", [False, True])
    def test_again_it_has_nothing_to_do(self, fake: FakeS3, tmp_path: Path, single: bool) -> None:
        pretrained(tmp_path / "model", tensors(), single=single)
        copy(tmp_path / "model", RUN)
        copy(RUN, tmp_path / "copy")
        copy(RUN, COPY)
        fake.forget()

        for way in ((tmp_path / "model", RUN), (RUN, tmp_path / "copy"), (RUN, COPY)):
            assert copy(*way).copied_objects == 0

        assert writes(fake) == set()

    @pytest.mark.parametrize("single", [False, True])
    @pytest.mark.parametrize("way", ["up", "down", "within"])
    def test_another_of_the_same_names_and_sizes(
        self, fake: FakeS3, tmp_path: Path, way: str, single: bool
    ) -> None:
        """As two fine-tunings of one model are: their indices are the same to the byte."""
        pretrained(tmp_path / "1", tensors(1), single=single)
        state = pretrained(tmp_path / "2", tensors(2), single=single)
        assert single or len({(tmp_path / n / INDEX).read_bytes() for n in "12"}) == 1
        sources: list[Any] = [tmp_path / "1", tmp_path / "2"]
        if way != "up":
            sources = [uri_of("1"), uri_of("2")]
            copy(tmp_path / "1", sources[0])
            copy(tmp_path / "2", sources[1])
        target = tmp_path / "copy" if way == "down" else COPY
        copy(sources[0], target)

        with pytest.raises(CheckpointExistsError, match="--overwrite"):
            copy(sources[1], target)
        assert copy(sources[0], target).copied_objects == 0  # nothing was changed
        report = copy(sources[1], target, overwrite=True)

        assert report.copied_objects == (1 if single else 2)
        if way == "down":
            assert_same(loaded_by_the_library(tmp_path / "copy"), state)
        else:
            assert_same(load(state, "copy"), state)

    def test_users_own_files_at_the_target_stay(self, fake: FakeS3, tmp_path: Path) -> None:
        pretrained(tmp_path / "model", tensors())
        copy(tmp_path / "model", RUN)
        own = tmp_path / "project"
        own.mkdir()
        for name in ("train.py", "README.md"):  # the latter is the model's too
            (own / name).write_text("mine")

        with pytest.raises(CheckpointExistsError, match=r"README\.md is another"):
            copy(RUN, own)
        assert contents(own) == {"train.py": b"mine", "README.md": b"mine"}
        copy(RUN, own, overwrite=True)

        assert (own / "train.py").read_text() == "mine"
        assert (own / "README.md").read_text() == "README.md of a model"

    def test_a_configuration_that_was_changed_since(self, fake: FakeS3, tmp_path: Path) -> None:
        pretrained(tmp_path / "model", tensors())
        copy(tmp_path / "model", RUN)
        (tmp_path / "model/config.json").write_text("longer than it was before")

        with pytest.raises(CheckpointExistsError, match=r"config\.json is another"):
            copy(tmp_path / "model", RUN)
        report = copy(tmp_path / "model", RUN, overwrite=True)

        assert report.copied_objects == 1
        assert fake.read(BUCKET, "run/config.json") == b"longer than it was before"

    def test_what_is_there_already_by_other_means(self, fake: FakeS3, tmp_path: Path) -> None:
        pretrained(tmp_path / "model", tensors())
        for name in (FILES[1], "config.json"):
            fake.write(BUCKET, f"run/{name}", (tmp_path / "model" / name).read_bytes())

        report = copy(tmp_path / "model", RUN)

        assert report.copied_objects == report.objects - 2
        assert copy(RUN, tmp_path / "copy").objects == report.objects

    def test_one_file_in_place_of_several(self, fake: FakeS3, tmp_path: Path) -> None:
        pretrained(tmp_path / "several", tensors(1))
        state = pretrained(tmp_path / "one", tensors(2), single=True)
        for way in (("several", "one"), ("one", "several")):
            copy(tmp_path / way[0], COPY, overwrite=True)
            with pytest.raises(CheckpointExistsError):
                copy(tmp_path / way[1], COPY)
            copy(tmp_path / way[1], COPY, overwrite=True)

            weights = {name for name in names(fake, "copy") if ".safetensors" in name}
            assert weights == ({SINGLE} if way[1] == "one" else {*FILES, INDEX})
        copy(tmp_path / "one", COPY, overwrite=True)
        assert_same(load(state, "copy"), state)

    def test_a_checkpoint_in_a_folder_below_stays(self, fake: FakeS3, tmp_path: Path) -> None:
        """Even if the index that is replaced names its files."""
        state = pretrained(tmp_path / "other", tensors(2))
        pretrained(tmp_path / "model", tensors(1))
        copy(tmp_path / "other", f"{RUN}/other")
        named = {"a.weight": f"other/{FILES[0]}", "b.weight": "old.safetensors"}
        fake.write(BUCKET, f"run/{INDEX}", json.dumps({"weight_map": named}).encode())
        fake.write(BUCKET, "run/old.safetensors", b"")

        copy(tmp_path / "model", RUN, overwrite=True)

        assert_same(load(state, "run/other"), state)
        assert "old.safetensors" not in names(fake, "run")

    def test_a_file_at_the_target_that_is_called_as_a_part(
        self, fake: FakeS3, tmp_path: Path
    ) -> None:
        pretrained(tmp_path / "model", tensors())
        copy(tmp_path / "model", RUN)
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy/config.json.partial").write_text("mine")

        with pytest.raises(CheckpointExistsError, match=r"config\.json\.partial is another"):
            copy(RUN, tmp_path / "copy")
        assert contents(tmp_path / "copy") == {"config.json.partial": b"mine"}

        copy(RUN, tmp_path / "copy", overwrite=True)
        assert on_disk(tmp_path / "copy") == set(names(fake, "run"))

    def test_through_links(self, fake: FakeS3, tmp_path: Path) -> None:
        """As in the cache of the Hub."""
        state = pretrained(tmp_path / "blobs", tensors())
        (tmp_path / "snapshot").mkdir()
        for path in (tmp_path / "blobs").iterdir():
            (tmp_path / "snapshot" / path.name).symlink_to(path)

        copy(tmp_path / "snapshot", RUN)

        assert_same(load(state, "run"), state)

    def test_on_rclone(self, server: Server, bucket: str, tmp_path: Path) -> None:
        state = pretrained(tmp_path / "model", tensors())

        copy(tmp_path / "model", f"s3://{bucket}/run")
        copy(f"s3://{bucket}/run", f"s3://{bucket}/copy")
        copy(f"s3://{bucket}/copy", tmp_path / "copy")

        assert_same(loaded_by_the_library(tmp_path / "copy"), state)
        assert copy(f"s3://{bucket}/copy", tmp_path / "copy").copied_objects == 0


class TestCutOff:
    @pytest.mark.parametrize("single", [False, True])
    def test_the_commit_is_last(self, fake: FakeS3, tmp_path: Path, single: bool) -> None:
        pretrained(tmp_path / "model", tensors(), single=single)
        commit = SINGLE if single else INDEX
        rule = fake.inject(Refuse("AccessDenied"), operation="PutObject", key=f"*/{commit}")

        with pytest.raises(S3Exception):
            copy(tmp_path / "model", RUN)

        assert rule.struck
        assert s3dcp.list_checkpoints(RUN) == []
        files = COMPANIONS if single else {*COMPANIONS, *FILES}
        assert set(names(fake, "run")) == {*files, ".s3dcp-copy"}
        assert copy(tmp_path / "model", RUN).copied_objects == (1 if single else 0)
        assert set(names(fake, "run")) == {*files, commit}

    def test_what_is_there_of_it_is_not_loaded(self, fake: FakeS3, tmp_path: Path) -> None:
        """As files without an index are, if nothing tells that they are not all."""
        state = pretrained(tmp_path, tensors())
        cut_off(tmp_path, RUN, fake)

        with pytest.raises(AssertionError, match=r"a copy to it has not .* delete \.s3dcp-copy"):
            load(state, "run")
        assert (
            "a copy to it has not finished" in run("verify", RUN, "--format", "safetensors").stderr
        )
        fake.delete(BUCKET, "run/.s3dcp-copy")
        assert_same(load(state, "run"), state)

    def test_gc_tells_of_it_and_leaves_it_alone(self, fake: FakeS3, tmp_path: Path) -> None:
        """What lies there may have been there before."""
        pretrained(tmp_path, tensors())
        cut_off(tmp_path, RUN, fake)
        there = names(fake, "run")
        assert s3dcp.gc(uri_of("")).copies == ()  # it may be under way

        found = run("gc", uri_of(""), "--grace", "0s", "--delete")

        assert (found.exit_code, found.stdout) == (0, "")
        assert f"Left alone: {RUN}: a copy to it was cut off. Copy again, or" in found.stderr
        assert json.loads(run("gc", RUN, "--grace", "0s", "--json").stdout)["copies"] == [RUN]
        assert names(fake, "run") == there
        copy(tmp_path, RUN)
        assert s3dcp.gc(RUN, grace_s=0).copies == ()

    def test_gc_removes_its_claim_once_nothing_else_is_there(
        self, fake: FakeS3, tmp_path: Path
    ) -> None:
        """As of checkpoints of ours, whose files `gc` knows."""
        save(state_of(1), "ours", fqn_to_index_mapping=TWO_FILES)
        cut_off(uri_of("ours"), COPY, fake)
        claim = "copy/.s3dcp-copy"

        told = s3dcp.gc(uri_of(""), grace_s=0)
        assert claim in [each.key for each in told.objects]
        assert claim in fake.keys(BUCKET)
        assert s3dcp.gc(uri_of(""), grace_s=0, dry_run=False) == told

        assert told.copies == ()
        assert names(fake, "copy") == []
        assert len(names(fake, "ours")) == 3

    @pytest.mark.parametrize("single", [False, True])
    def test_killed_on_its_way_down(
        self, fake: FakeS3, zygote: Zygote, tmp_path: Path, single: bool
    ) -> None:
        state = pretrained(tmp_path / "model", tensors(rows=17), single=single)
        copy(tmp_path / "model", RUN)
        weights = [f"run/{name}" for name in ([SINGLE] if single else FILES)]

        def is_further_on(record: Record) -> bool:
            return not record.headers["range"].startswith("bytes=0-")

        arguments = ("cp", RUN, str(tmp_path / "copy"))
        kill(fake, zygote, arguments, operation="GetObject", key=weights[-1], where=is_further_on)
        assert on_disk(tmp_path / "copy").isdisjoint({INDEX, SINGLE})
        before = sum(map(len, contents(tmp_path / "copy").values())) - 64  # a claim's

        found = json.loads(run(*arguments, "--json").stdout)

        assert found["copied_bytes"] == found["size_bytes"] - before
        assert_same(loaded_by_the_library(tmp_path / "copy"), state)
        assert on_disk(tmp_path / "copy") == set(names(fake, "run"))

    @pytest.mark.parametrize("single", [False, True])
    def test_killed_on_its_way_up(
        self, fake: FakeS3, zygote: Zygote, tmp_path: Path, single: bool
    ) -> None:
        state = pretrained(tmp_path / "model", tensors(rows=17), single=single)
        arguments = ("cp", str(tmp_path / "model"), RUN)

        kill(fake, zygote, arguments, operation="UploadPart", skip=1)
        assert s3dcp.list_checkpoints(RUN) == []
        assert len(fake.uploads(BUCKET)) == 1

        result = run(*arguments)

        assert result.exit_code == 0
        assert "CreateMultipartUpload" not in fake.stats()
        assert fake.uploads(BUCKET) == {}
        assert_same(load(state, "run"), state)
        assert ".s3dcp-copy" not in names(fake, "run")

    @pytest.mark.parametrize("single", [False, True])
    def test_another_was_saved_there_since(
        self, fake: FakeS3, tmp_path: Path, single: bool
    ) -> None:
        """Of the same names and sizes, and with the same index; the claim is still there."""
        pretrained(tmp_path / "model", tensors(1), single=single)
        copy(tmp_path / "model", RUN)
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key=f"run/{FILES[1]}", skip=1)
        fake.inject(Refuse("AccessDenied"), operation="GetObject", key=f"run/{SINGLE}", skip=1)
        with pytest.raises(S3Exception):
            copy(RUN, tmp_path / "copy")
        assert ".s3dcp-copy" in on_disk(tmp_path / "copy")
        pretrained(tmp_path / "copy", tensors(2), single=single)
        there = contents(tmp_path / "copy")

        with pytest.raises(CheckpointExistsError):
            copy(RUN, tmp_path / "copy")

        assert contents(tmp_path / "copy") == there
        copy(RUN, tmp_path / "copy", overwrite=True)
        found, copied = contents(tmp_path / "copy"), contents(tmp_path / "model")
        weights = [SINGLE] if single else FILES
        assert all(found[name] == copied[name] != there[name] for name in weights)

    @pytest.mark.parametrize("name", [FILES[1], "config.json"])
    def test_what_others_put_there_since_is_not_taken_for_the_copys(
        self, fake: FakeS3, tmp_path: Path, name: str
    ) -> None:
        """Of the same size; the claim is still there."""
        state = pretrained(tmp_path, tensors())
        cut_off(tmp_path, RUN, fake)
        other = (tmp_path / name).read_bytes()[::-1]
        fake.write(BUCKET, f"run/{name}", other)

        with pytest.raises(CheckpointExistsError, match=f"{name} is another"):
            copy(tmp_path, RUN)
        assert fake.read(BUCKET, f"run/{name}") == other
        assert INDEX not in names(fake, "run")

        assert copy(tmp_path, RUN, overwrite=True).copied_objects == 1
        assert fake.read(BUCKET, f"run/{name}") == (tmp_path / name).read_bytes()
        assert_same(load(state, "run"), state)

    def test_its_claim_is_deleted_with_it(self, fake: FakeS3, tmp_path: Path) -> None:
        """If it was cut off right after the commit."""
        pretrained(tmp_path, tensors())
        fake.inject(Refuse("AccessDenied"), operation="DeleteObject", key="*/.s3dcp-copy")
        with pytest.raises(S3Exception):
            copy(tmp_path, RUN)
        assert ".s3dcp-copy" in names(fake, "run")

        s3dcp.delete(RUN)

        assert set(names(fake, "run")) == COMPANIONS

    def test_of_another_it_takes_over_nothing_but_what_is_the_same(
        self, fake: FakeS3, tmp_path: Path
    ) -> None:
        pretrained(tmp_path / "1", tensors(1))
        state = pretrained(tmp_path / "2", tensors(2))
        cut_off(tmp_path / "1", COPY, fake)

        with pytest.raises(CheckpointExistsError, match="a part of one"):
            copy(tmp_path / "2", COPY)
        report = copy(tmp_path / "2", COPY, overwrite=True)

        assert report.copied_objects == 2
        assert_same(load(state, "copy"), state)


class TestWhichOne:
    def both(self, folder: Path) -> StateDict:
        state = pretrained(folder, tensors())
        dcp.save(dict(state), storage_writer=FileSystemWriter(folder), no_dist=True)
        return state

    def test_where_there_are_both(self, fake: FakeS3, tmp_path: Path) -> None:
        state = self.both(tmp_path)
        with pytest.raises(S3ConfigError, match=r"dcp and safetensors at .*: say which"):
            copy(tmp_path, RUN)
        told = run("cp", str(tmp_path), RUN)
        assert (told.exit_code, told.stdout) == (2, "")

        copy(tmp_path, f"{RUN}/dcp", format="dcp")
        assert run("cp", str(tmp_path), f"{RUN}/st", "--format", "safetensors").exit_code == 0

        assert names(fake, "run/dcp") == [".metadata", "__0_0.distcp"]
        assert set(names(fake, "run/st")) == {*COMPANIONS, *FILES, INDEX}
        assert_same(load(state, "run/st"), state)

    def test_each_leaves_the_other_at_the_target_alone(self, fake: FakeS3, tmp_path: Path) -> None:
        self.both(tmp_path)

        copy(tmp_path, RUN, format="dcp")
        copy(tmp_path, RUN, format="safetensors")

        found = s3dcp.list_checkpoints(RUN)
        assert {(each.format, each.problem) for each in found} == {
            ("dcp", None),
            ("safetensors", None),
        }

    @pytest.mark.parametrize("disk", [False, True])
    def test_what_was_looked_for(self, fake: FakeS3, tmp_path: Path, disk: bool) -> None:
        pretrained(tmp_path / "model", tensors())
        copy(tmp_path / "model", RUN)
        source, target = (str(tmp_path / "model"), COPY) if disk else (RUN, str(tmp_path / "x"))
        nothing = str(tmp_path) if disk else uri_of("nowhere")

        with pytest.raises(CheckpointNotFoundError) as raised:
            copy(nothing, target)
        assert f"No checkpoint at {nothing}: there is no .metadata (dcp), nor {INDEX}, " in str(
            raised.value
        )
        with pytest.raises(CheckpointNotFoundError) as raised:
            copy(source, target, format="dcp")
        assert str(raised.value) == (
            f"No checkpoint at {source}: there is no .metadata (dcp). There is one of safetensors: "
            "leave format= (--format) out, or name that"
        )


class TestRefused:
    def refuse(
        self, folder: Path, error: type[Exception], match: str, **options: Any
    ) -> pytest.ExceptionInfo[Exception]:
        with pytest.raises(error, match=match) as raised:
            copy(folder, COPY, **options)
        return raised

    def test_incomplete_or_damaged(self, fake: FakeS3, tmp_path: Path) -> None:
        pretrained(tmp_path, tensors())
        path = tmp_path / FILES[0]
        body = path.read_bytes()

        path.write_bytes(body[:-1])
        self.refuse(tmp_path, CorruptMetadataError, "is truncated")
        path.write_bytes((tmp_path / FILES[1]).read_bytes())
        self.refuse(tmp_path, CorruptMetadataError, "has no tensor in the file that its")
        path.unlink()
        self.refuse(tmp_path, IntegrityError, f"was not copied: missing: {FILES[0]}")
        (tmp_path / INDEX).write_text("{")
        self.refuse(tmp_path, CorruptMetadataError, "is malformed")

        assert names(fake, "copy") == []

    def test_without_a_look_into_them_files_of_any_kind_go(
        self, fake: FakeS3, tmp_path: Path
    ) -> None:
        """Such as dtypes that are new to s3dcp."""
        (tmp_path / SINGLE).write_bytes(b"no header at all")
        self.refuse(tmp_path, CorruptMetadataError, "no safetensors file")

        assert copy(tmp_path, COPY, verify=False).copied_objects == 1
        assert fake.read(BUCKET, f"copy/{SINGLE}") == b"no header at all"

    def test_files_of_two_saves(self, fake: FakeS3, tmp_path: Path) -> None:
        for seed in (1, 2):
            save(tensors(seed), f"{seed}")
            copy(uri_of(f"{seed}"), tmp_path / f"{seed}")
        [name] = [name for name in on_disk(tmp_path / "1") if name != INDEX]
        (tmp_path / "1" / name).write_bytes((tmp_path / "2" / name).read_bytes())

        self.refuse(tmp_path / "1", CheckpointChangedError, "is of another save")

    @pytest.mark.parametrize("up", [False, True])
    @pytest.mark.parametrize(
        "name", ["../out", "/etc/out", INDEX, ".metadata", ".s3dcp-copy", f"a/{MANIFEST}"]
    )
    def test_names_that_no_data_has(
        self, fake: FakeS3, tmp_path: Path, name: str, up: bool
    ) -> None:
        body = json.dumps({"weight_map": {"w": name}}).encode()
        folder = tmp_path / "below" / "folder"
        if up:
            folder.mkdir(parents=True)
            (folder / INDEX).write_bytes(body)
            (folder / "../out").write_bytes(b"x")
        else:
            fake.write(BUCKET, f"run/{INDEX}", body)

        with pytest.raises((InvalidS3UriError, CorruptMetadataError)):
            copy(folder, COPY) if up else copy(RUN, folder)

        assert names(fake, "copy") == []
        assert up or not folder.exists()

    @pytest.mark.parametrize("within", [False, True])
    def test_the_source_is_replaced_meanwhile(
        self, fake: FakeS3, tmp_path: Path, within: bool
    ) -> None:
        pretrained(tmp_path / "model", tensors(), single=True)
        copy(tmp_path / "model", RUN)
        pretrained(tmp_path / "model", tensors(2), single=True)

        def replace(_: Record) -> Fault:
            body = (tmp_path / "model" / SINGLE).read_bytes()
            fake.write(BUCKET, f"run/{SINGLE}", body)
            return Fault()

        # The last moment: everything else has been copied.
        operation = "HeadObject" if within else "GetObject"
        rule = fake.inject(
            Call(before=replace), operation=operation, key=f"*/{SINGLE}", skip=0 if within else 1
        )

        with pytest.raises(CheckpointChangedError):
            copy(RUN, COPY if within else tmp_path / "copy")

        assert rule.struck
        assert SINGLE not in (names(fake, "copy") if within else on_disk(tmp_path / "copy"))

    def test_a_file_on_the_disk_changes_meanwhile(self, fake: FakeS3, tmp_path: Path) -> None:
        pretrained(tmp_path, tensors())

        def change(_: Record) -> Fault:
            (tmp_path / "config.json").write_text("new")
            return Fault()

        rule = fake.inject(Call(before=change), operation="PutObject", key=f"*/{FILES[0]}")

        with pytest.raises(CheckpointChangedError):
            copy(tmp_path, RUN, s3client_config=ONE)

        assert rule.struck
        assert s3dcp.list_checkpoints(RUN) == []

    def test_an_index_at_the_target_that_cannot_be_read(
        self, fake: FakeS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        state = pretrained(tmp_path, tensors())
        fake.write(BUCKET, f"run/{INDEX}", b"{")
        fake.write(BUCKET, "run/old.safetensors", b"")

        copy(tmp_path, RUN, overwrite=True)

        assert "left in place" in caplog.text
        assert "old.safetensors" in names(fake, "run")
        assert_same(load(state, "run"), state)
