"""Safetensors checkpoints: saved and loaded, by us and by others, replaced, and cut short."""

from __future__ import annotations

import inspect
import json
import pickle
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from s3dcp import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    CorruptMetadataError,
    IntegrityError,
    InvalidS3UriError,
    S3ClientConfig,
    S3ConfigError,
    S3Exception,
    S3HuggingFaceStorageReader,
    S3HuggingFaceStorageWriter,
)
from s3dcp.testing import Call, Exchange, FakeS3, Fault, FlipByte, Record, Refuse, lost_response
from tests._boxes import shapes
from tests._fakes import BUCKET, addressed, uri_of
from tests._hf import (
    INDEX,
    MANIFEST,
    TWO_FILES,
    download,
    load,
    load_into,
    loaded_by_the_library,
    names,
    save,
    state_of,
    upload,
)
from tests._states import CutPlanner, MiB, StateDict, assert_same, blank, fill, finite, same_bits
from tests.test_safetensors import READABLE_DTYPES

if TYPE_CHECKING:
    from pathlib import Path

# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage:UserWarning"),
]

STATE = state_of(1)
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
# Large tensors go up in parts, and the store is known to honour conditions.
CONFIG = S3ClientConfig(part_size=5 * MiB, conditional_writes=True, memory_budget_bytes=16 * MiB)


class TestRoundTrips:
    def test_what_is_saved_is_loaded(self, fake: FakeS3) -> None:
        save(STATE, "ck", CONFIG, fqn_to_index_mapping=TWO_FILES)
        assert names(fake, "ck") == [*FILES, INDEX]
        assert_same(load(STATE, "ck", CONFIG), STATE)

    def test_a_file_of_several_parts(self, fake: FakeS3) -> None:
        state = {**STATE, "huge": fill((3000, 1000), seed=3), "huge_turned": fill((1500, 2000)).t()}
        save(state, "ck", CONFIG)
        assert sum(each.operation == "UploadPart" for each in fake.requests) > 3
        assert_same(load(state, "ck", CONFIG), state)
        body = fake.read(BUCKET, "ck/model-00001-of-00001.safetensors")
        found = safetensors.torch.load(body)
        assert_same({name: found[name] for name in state}, state)

    def test_tensors_of_a_device(self, fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
        """CPU tensors that are taken for a device's: the same copies, without a GPU."""
        for module in ("_landing", "_hf_saving"):
            monkeypatch.setattr(f"s3dcp.{module}.is_host", lambda _: False)
        state = {**STATE, "huge": fill((5000, 1000), seed=3)}
        save(state, "ck", CONFIG)
        assert_same(load(state, "ck", CONFIG), state)
        planner = CutPlanner((0.2, 0.7))
        found = load({"huge": state["huge"]}, "ck", planner=planner)["huge"]
        box = planner.box(found)
        assert_same(found[box], state["huge"][box])

    def test_the_library_reads_what_is_saved(self, fake: FakeS3, tmp_path: Path) -> None:
        save(STATE, "ck", CONFIG, fqn_to_index_mapping=TWO_FILES)
        folder = download(fake, "ck", tmp_path)
        found = loaded_by_the_library(folder)
        assert_same(dict(sorted(found.items())), dict(sorted(STATE.items())))
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == {name: FILES[n - 1] for name, n in TWO_FILES.items()}
        assert index["metadata"]["total_size"] == sum(each.nbytes for each in STATE.values())
        with safetensors.safe_open(folder / FILES[0], framework="pt") as file:
            assert file.metadata()["format"] == "pt"  # which transformers asks for

    def test_torchs_reader_reads_what_is_saved(self, fake: FakeS3, tmp_path: Path) -> None:
        save(STATE, "ck", CONFIG, fqn_to_index_mapping=TWO_FILES)
        reader = dcp.HuggingFaceStorageReader(str(download(fake, "ck", tmp_path)))
        target = blank(STATE)
        dcp.load(target, storage_reader=reader, no_dist=True)
        assert_same(target, STATE)

    @pytest.mark.parametrize("save_distributed", [False, True])
    def test_what_torchs_writer_saves_is_loaded(
        self, fake: FakeS3, tmp_path: Path, save_distributed: bool
    ) -> None:
        """Shards without a manifest too: torch writes none."""
        writer = dcp.HuggingFaceStorageWriter(
            str(tmp_path), TWO_FILES, save_distributed=save_distributed
        )
        state = {name: tensor.contiguous() for name, tensor in STATE.items()}
        dcp.save(state, storage_writer=writer, no_dist=True)
        upload(fake, tmp_path, "ck")
        assert_same(load(STATE, "ck"), STATE)

    def test_a_single_file_of_the_library(self, fake: FakeS3) -> None:
        state = {name: tensor.contiguous() for name, tensor in STATE.items()}
        fake.write(BUCKET, "ck/model.safetensors", safetensors.torch.save(state))
        assert_same(load(STATE, "ck"), STATE)

    def test_shards_have_a_manifest(self, fake: FakeS3) -> None:
        save(STATE, "ck", CONFIG, fqn_to_index_mapping=TWO_FILES, save_distributed=True)
        assert names(fake, "ck") == [MANIFEST, *(f"shard-00001-{name}" for name in FILES)]
        assert_same(load(STATE, "ck"), STATE)

    @pytest.mark.parametrize(
        ("saved", "loaded"), [("ck", "ck/"), ("ck/", "ck"), ("a/ck/", "a/ck/")]
    )
    def test_a_slash_at_the_end_is_no_other_place(
        self, fake: FakeS3, saved: str, loaded: str
    ) -> None:
        save(STATE, loaded)
        save(STATE, saved)
        assert_same(load(STATE, loaded), STATE)
        assert not any("//" in key for key in fake.keys(BUCKET))

    def test_it_is_at_the_root_of_a_bucket(self, fake: FakeS3) -> None:
        save(STATE, "")
        assert set(fake.keys(BUCKET)) == {"model-00001-of-00001.safetensors", INDEX}
        assert_same(load(STATE, ""), STATE)

    def test_asynchronously(self, fake: FakeS3) -> None:
        writer = S3HuggingFaceStorageWriter(None, uri_of("ck"))
        state = {"w": fill((9, 9))}
        saving = dcp.async_save(state, storage_writer=writer, no_dist=True)
        assert isinstance(saving, Future)
        saving.result()
        assert_same(load(state, "ck"), state)

    def test_plans_are_cached(self, fake: FakeS3) -> None:
        """The later saves' global plans are empty, and their local ones the first one's."""
        for seed in range(3):
            state = {"w": fill((9, 9), seed=seed)}
            writer = S3HuggingFaceStorageWriter(None, uri_of("ck"))
            planner = DefaultSavePlanner(enable_plan_caching=True)
            dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
            assert_same(load(state, "ck"), state)

    def test_nothing_at_all(self, fake: FakeS3) -> None:
        save({}, "ck")
        assert names(fake, "ck") == [INDEX]
        assert read_metadata("ck").state_dict_metadata == {}

    def test_it_pickles(self, fake: FakeS3) -> None:
        writer = S3HuggingFaceStorageWriter(None, uri_of("ck"), fqn_to_index_mapping={"w": 1})
        reader = S3HuggingFaceStorageReader(None, uri_of("ck"))
        state = {"w": fill((9, 9))}
        dcp.save(state, storage_writer=pickle.loads(pickle.dumps(writer)), no_dist=True)
        target = blank(state)
        dcp.load(target, storage_reader=pickle.loads(pickle.dumps(reader)), no_dist=True)
        assert_same(target, state)


described = st.dictionaries(
    st.text("abc.", min_size=1, max_size=8),
    st.tuples(st.sampled_from(READABLE_DTYPES), shapes(max_dimensions=3, max_side=40)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25)
@given(described=described, seed=st.integers(0, 9))
def test_any_state_goes_both_ways(
    shared_fake: FakeS3, described: dict[str, tuple[torch.dtype, tuple[int, ...]]], seed: int
) -> None:
    """Ours by the library, and the library's by us."""
    state = {name: fill(shape, dtype, seed) for name, (dtype, shape) in described.items()}
    with addressed(shared_fake) as fake:
        save(state, "ours")
        body = fake.read(BUCKET, "ours/model-00001-of-00001.safetensors")
        found = safetensors.torch.load(body)
        assert_same({name: found[name] for name in state}, state)

        fake.write(BUCKET, "theirs/model.safetensors", safetensors.torch.save(state))
        assert_same(load(state, "theirs"), state)


class TestLoads:
    def test_only_what_is_asked_for_is_read(self, fake: FakeS3) -> None:
        state = {"large": fill((1000, 3000), seed=1), "other": fill((1000, 3000), seed=2)}
        save(state, "ck")
        fake.forget()
        planner = CutPlanner((0.25, 0.5))
        found = load({"large": state["large"]}, "ck", planner=planner)
        box = planner.box(state["large"])
        assert torch.equal(
            found["large"][box].view(torch.uint8), state["large"][box].view(torch.uint8)
        )
        # A quarter of one of two tensors, to the edges of blocks, and the header.
        read = sum(each.bytes_out for each in fake.requests if each.operation == "GetObject")
        assert read < 0.26 * state["large"].nbytes + 2.1 * MiB

    @pytest.mark.parametrize("columns", [(0.0, 1.0), (0.3, 0.6)])
    @pytest.mark.parametrize("ours", [True, False])
    def test_boxes(self, fake: FakeS3, ours: bool, columns: tuple[float, float]) -> None:
        state = {"large": fill((1100, 1000), seed=1), "small": fill((10, 10), seed=2)}
        if ours:
            save(state, "ck")
        else:
            fake.write(BUCKET, "ck/model.safetensors", safetensors.torch.save(state))
        planner = CutPlanner((0.2, 0.7), columns)
        found = load(state, "ck", planner=planner)
        for name, tensor in state.items():
            box = planner.box(tensor)
            assert_same(found[name][box].contiguous(), tensor[box].contiguous())

    def test_dtypes_are_converted(self, fake: FakeS3) -> None:
        state = {
            "small": finite((7, 5), torch.bfloat16, 1),
            "large": finite((1100, 1000), torch.float16, 2),
            "integers": fill((40,), torch.int8, 3),
        }
        save(state, "ck")
        target = {
            "small": torch.zeros(7, 5),
            "large": torch.zeros(1100, 1000, dtype=torch.float64),
            "integers": torch.zeros(40),
        }
        load_into(target, "ck")
        for name, tensor in state.items():
            assert torch.equal(target[name], tensor.to(target[name].dtype))

    def test_into_targets_of_other_strides(self, fake: FakeS3) -> None:
        state = {"large": finite((1100, 1000), seed=1), "small": finite((10, 10), seed=2)}
        save(state, "ck")
        target = {
            name: torch.zeros(tensor.shape).t().contiguous().t() for name, tensor in state.items()
        }
        load_into(target, "ck")
        assert all(torch.equal(target[name], tensor) for name, tensor in state.items())

    def test_a_header_longer_than_the_first_read(self, fake: FakeS3) -> None:
        state = {f"a.rather.long.name.of.a.layer.{n}": fill((1,), seed=n) for n in range(900)}
        save(state, "ck")
        assert_same(load(state, "ck"), state)

    def test_a_tensor_that_the_index_leaves_out(self, fake: FakeS3) -> None:
        """The index says where a tensor is, whatever else is in the files."""
        new, old = fill((3,), seed=1), fill((4,), seed=2)
        fake.write(BUCKET, "ck/a.safetensors", safetensors.torch.save({"w": old, "v": new.clone()}))
        fake.write(BUCKET, "ck/b.safetensors", safetensors.torch.save({"w": new}))
        index = {"weight_map": {"w": "b.safetensors"}}
        fake.write(BUCKET, f"ck/{INDEX}", json.dumps(index).encode())
        assert_same(load({"w": new}, "ck"), {"w": new})

    @pytest.mark.parametrize("name", ["small", "medium", "large", "turned"])
    def test_a_flipped_byte(self, fake: FakeS3, name: str) -> None:
        save(STATE, "ck")
        key = "ck/model-00001-of-00001.safetensors"
        body = bytearray(fake.read(BUCKET, key))
        [length] = [int.from_bytes(body[:8], "little")]
        places = json.loads(body[8 : 8 + length])
        body[8 + length + places[name]["data_offsets"][0] + 3] ^= 1
        fake.write(BUCKET, key, bytes(body))
        with pytest.raises(IntegrityError, match=name):
            load(STATE, "ck")
        rest = {other: tensor for other, tensor in STATE.items() if other != name}
        assert_same(load(rest, "ck"), rest)

    def test_a_flipped_byte_in_a_part_that_is_read(self, fake: FakeS3) -> None:
        state = {"large": fill((5, MiB // 2), seed=1)}
        save(state, "ck")
        fake.inject(
            FlipByte(100),
            operation="GetObject",
            where=lambda each: (
                "range" in each.headers and not each.headers["range"].startswith("bytes=0-")
            ),
            times=1,
        )
        with pytest.raises(IntegrityError, match="large"):
            load(state, "ck", planner=CutPlanner((0.2, 0.6)))


NOT_THERE = {
    "nothing": [],
    "another folder": ["ck/sharded/model.safetensors"],
    "an index of another name": ["ck/index.json"],
}


class TestWhatIsNoCheckpoint:
    @pytest.mark.parametrize("case", NOT_THERE)
    def test_nothing_there(self, fake: FakeS3, case: str) -> None:
        for key in NOT_THERE[case]:
            fake.write(BUCKET, key, b"{}")
        with pytest.raises(AssertionError, match="No checkpoint at s3://bkt/ck"):
            load(STATE, "ck")

    @pytest.mark.parametrize(
        ("index", "error", "says"),
        [
            (b"{", CorruptMetadataError, "malformed"),
            ({"w": "gone.safetensors"}, CorruptMetadataError, "names a file that is not there"),
            ({"w": "../up.safetensors"}, InvalidS3UriError, "not allowed"),
            ({"w": "/up.safetensors"}, InvalidS3UriError, "no path below"),
            ({"x": "a.safetensors"}, CorruptMetadataError, "names for it: x"),
        ],
    )
    def test_an_index_that_lies(
        self, fake: FakeS3, index: Any, error: type[Exception], says: str
    ) -> None:
        body = index if isinstance(index, bytes) else json.dumps({"weight_map": index}).encode()
        fake.write(BUCKET, f"ck/{INDEX}", body)
        fake.write(BUCKET, "ck/a.safetensors", safetensors.torch.save({"w": fill((3,))}))
        with pytest.raises(error, match=says):
            read_metadata("ck")

    @pytest.mark.parametrize(
        ("offsets", "says"),
        [
            ({"w": {"saved_offsets": [1, 0]}}, "do not make up a whole tensor"),
            ({"w": {"saved_offsets": [0]}}, "malformed"),
            ({"w": {"saved_offsets": [-1, 0]}}, "malformed"),
            ({"w": {"saved_offsets": [2**63, 0]}}, "malformed"),
            ({"w": {"saved_offsets": None}}, "malformed"),
            ({"w": {}}, "malformed"),
            ({}, "malformed"),
            ([], "malformed"),
        ],
    )
    def test_shards_that_lie(self, fake: FakeS3, offsets: Any, says: str) -> None:
        extra = {"DCP_SHARDING_INFO": json.dumps(offsets)}
        body = safetensors.torch.save({"w": fill((2, 2))}, extra)
        fake.write(BUCKET, "ck/shard-00001-model-00001-of-00001.safetensors", body)
        with pytest.raises(CorruptMetadataError, match=says):
            read_metadata("ck")

    def test_shards_of_which_one_is_missing(self, fake: FakeS3) -> None:
        for rank in (0, 2):
            extra = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [2 * rank, 0]}})}
            body = safetensors.torch.save({"w": fill((2, 2))}, extra)
            fake.write(BUCKET, f"ck/shard-{rank}.safetensors", body)
        with pytest.raises(CorruptMetadataError, match="files are missing"):
            read_metadata("ck")

    def test_shards_of_two_dtypes(self, fake: FakeS3) -> None:
        for rank, dtype in enumerate((torch.int8, torch.uint8)):
            extra = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [2 * rank]}})}
            body = safetensors.torch.save({"w": fill((2,), dtype)}, extra)
            fake.write(BUCKET, f"ck/shard-{rank}.safetensors", body)
        with pytest.raises(CorruptMetadataError, match="not of one dtype"):
            read_metadata("ck")

    def test_a_file_that_is_truncated(self, fake: FakeS3) -> None:
        body = safetensors.torch.save({"w": fill((2, 2))})
        fake.write(BUCKET, "ck/model.safetensors", body[:-1])
        with pytest.raises(CorruptMetadataError, match=r"model\.safetensors has 87 bytes"):
            read_metadata("ck")


def read_metadata(path: str) -> Any:
    return S3HuggingFaceStorageReader(None, uri_of(path)).read_metadata()


class TestRefusals:
    @pytest.mark.parametrize(
        ("state", "says"),
        [
            ({"step": 3}, "step is no tensor"),
            ({"w": torch.zeros(2, dtype=torch.complex128)}, "hold no torch.complex128"),
            ({"w": torch.eye(3).to_sparse()}, "to_dense"),
            ({"unmapped": torch.zeros(2)}, "no file for unmapped"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
    def test_a_state_that_no_file_holds(self, fake: FakeS3, state: StateDict, says: str) -> None:
        """Known before anything is given up or sent."""
        save(STATE, "ck")
        with pytest.raises(S3ConfigError, match=says):
            save(state, "ck", fqn_to_index_mapping={"step": 1, "w": 1})
        assert_same(load(STATE, "ck"), STATE)

    @pytest.mark.parametrize(
        "options",
        [
            {"enable_consolidation": True},
            {"fqn_to_index_mapping": {"w": 0}},
            {"thread_count": 0},
        ],
    )
    def test_arguments_that_cannot_work(self, options: dict[str, Any]) -> None:
        with pytest.raises(S3ConfigError):
            S3HuggingFaceStorageWriter(None, uri_of("ck"), **options)

    @pytest.mark.parametrize(
        ("ours", "theirs"),
        [
            (S3HuggingFaceStorageWriter, dcp.HuggingFaceStorageWriter),
            (S3HuggingFaceStorageReader, dcp.HuggingFaceStorageReader),
        ],
    )
    def test_arguments_are_torchs(self, ours: type, theirs: type) -> None:
        """With the region in front, and the client's settings behind the path."""
        path, *rest = inspect.signature(theirs).parameters.values()
        region, found, config, *others = inspect.signature(ours).parameters.values()
        assert (region.name, found.name, config.name) == ("region", path.name, "s3client_config")
        assert [(p.name, p.default) for p in others[: len(rest)]] == [
            (p.name, p.default) for p in rest
        ]
        assert all(p.kind is p.KEYWORD_ONLY for p in others[len(rest) :])

    def test_a_reader_of_no_threads(self) -> None:
        with pytest.raises(S3ConfigError, match="thread_count"):
            S3HuggingFaceStorageReader(None, uri_of("ck"), thread_count=0)

    def test_without_collectives(self, fake: FakeS3) -> None:
        writer = S3HuggingFaceStorageWriter(None, uri_of("ck"))
        with pytest.raises(S3ConfigError, match="use_collectives"):
            dcp.save(STATE, storage_writer=writer, use_collectives=False)

    @pytest.mark.parametrize("name", [INDEX, MANIFEST, "model.safetensors"])
    def test_what_is_there_is_kept(self, fake: FakeS3, name: str) -> None:
        fake.write(BUCKET, f"ck/{name}", b"{}")
        with pytest.raises(CheckpointExistsError, match=name):
            save(STATE, "ck", overwrite=False)
        assert names(fake, "ck") == [name]


class TestReplacing:
    def test_what_the_old_one_alone_had_is_deleted(self, fake: FakeS3) -> None:
        save(STATE, "ck", fqn_to_index_mapping={**TWO_FILES, "large": 3})
        save(state_of(9), "ck", fqn_to_index_mapping=TWO_FILES)
        assert names(fake, "ck") == [*FILES, INDEX]
        save(STATE, "ck", save_distributed=True)
        assert names(fake, "ck") == [MANIFEST, "shard-00001-model-00001-of-00001.safetensors"]
        fake.write(BUCKET, "ck/model.safetensors", b"")
        fake.write(BUCKET, "ck/other.safetensors", b"of nobody's index")
        save(STATE, "ck")
        assert names(fake, "ck") == ["model-00001-of-00001.safetensors", INDEX, "other.safetensors"]

    def test_nothing_else_is_whatever_the_old_index_says(self, fake: FakeS3) -> None:
        kept = ["ck/below/x.safetensors", "ck/notes.txt"]
        for key in kept:
            fake.write(BUCKET, key, b"")
        weights = {"a": "below/x.safetensors", "b": "notes.txt"}
        fake.write(BUCKET, f"ck/{INDEX}", json.dumps({"weight_map": weights}).encode())
        save(STATE, "ck")
        assert set(kept) < set(fake.keys(BUCKET))

    @pytest.mark.parametrize("body", [b"{", b'{"weight_map": {"a": "../x.safetensors"}}'])
    def test_an_old_index_that_cannot_be_read(
        self, fake: FakeS3, caplog: pytest.LogCaptureFixture, body: bytes
    ) -> None:
        fake.write(BUCKET, f"ck/{INDEX}", body)
        save(STATE, "ck")
        assert "left in place" in caplog.text
        assert_same(load(STATE, "ck"), STATE)

    def test_a_single_file_stays_until_the_commit(self, fake: FakeS3) -> None:
        old = {name: tensor.contiguous() for name, tensor in STATE.items()}
        fake.write(BUCKET, "ck/model.safetensors", safetensors.torch.save(old))
        fake.inject(Refuse("AccessDenied"), operation="PutObject", key=f"*{INDEX}")
        with pytest.raises(AccessDeniedError):
            save(state_of(9), "ck")
        assert_same(load(STATE, "ck"), STATE)
        save(state_of(9), "ck")
        assert_same(load(STATE, "ck"), state_of(9))

    def test_a_file_that_is_replaced_after_its_header_was_read(self, fake: FakeS3) -> None:
        """Between the plan and the data, which on other ranks may be long."""
        save(STATE, "ck")
        key = "ck/model-00001-of-00001.safetensors"
        replaced = fake.inject(
            Replace(),
            operation="GetObject",
            key=key,
            where=lambda each: "if-match" in each.headers,
            skip=1,
        )
        with pytest.raises(CheckpointChangedError):
            load(STATE, "ck")
        assert replaced.struck

    def test_a_file_that_is_replaced_before_its_header_is_read(self, fake: FakeS3) -> None:
        save(STATE, "old")
        save(state_of(9), "ck")
        name = "model-00001-of-00001.safetensors"
        fake.write(BUCKET, f"ck/{name}", fake.read(BUCKET, f"old/{name}"))
        with pytest.raises(CheckpointChangedError, match="of another save"):
            read_metadata("ck")

    def test_a_file_that_vanishes(self, fake: FakeS3) -> None:
        save(STATE, "ck")
        vanish = Call(before=lambda _: fake._s3.buckets[BUCKET].objects.clear())
        fake.inject(vanish, operation="HeadObject")
        with pytest.raises(CheckpointChangedError):
            read_metadata("ck")


@dataclass(frozen=True)
class Replace(Fault):
    """The object is another one, of the same size, when the request takes effect."""

    async def play(self, exchange: Exchange) -> None:
        objects = exchange.s3.buckets[BUCKET].objects
        key = exchange.record.key
        objects[key] = replace(objects[key], etag='"another"')
        await super().play(exchange)


OLD, NEW = (
    {name: state_of(seed)[name] for name in ("small", "scalar", "flags", "medium")}
    for seed in (1, 50)
)


def outcome(path: str) -> str:
    """Load what is there: which state it is, or that it is none."""
    try:
        read_metadata(path)
        found = load(OLD, path)
    except CheckpointNotFoundError:
        return "none"
    except CheckpointChangedError:
        return "changing"
    except AssertionError as exc:  # torch keeps the text of what `read_metadata` raised
        return "changing" if "was replaced" in str(exc) else "other"
    for name, state in (("old", OLD), ("new", NEW)):
        if all(same_bits(found[key], tensor) for key, tensor in state.items()):
            return name
    return "a mixture"


@pytest.mark.parametrize(
    ("moment", "distributed"), [("before", False), ("after", False), ("before", True)]
)
def test_a_save_that_ends_at_any_request(
    fake: FakeS3, moment: str, distributed: bool, subtests: pytest.Subtests
) -> None:
    """As if its process was killed: neither it nor its clean-up can send anything more.

    What is there then is the old checkpoint, the new one, or, when files were being overwritten,
    none, for the `safetensors` library and its kin too: no index, no manifest.
    """
    options: dict[str, Any] = {
        "fqn_to_index_mapping": TWO_FILES,
        "save_distributed": distributed,
        "enable_consolidation": distributed,
    }
    config = replace(CONFIG, max_connections=1)
    save(OLD, "ck", config, **options)
    fake.forget()
    save(NEW, "ck", config, **options)
    count = len(fake.requests)
    seen = set()
    for number in range(count):
        with subtests.test(str(number)):
            fake.forget()
            save(OLD, "ck", config, **options)
            fake.forget()
            dead = Refuse("AccessDenied")
            if moment == "after":
                fake.inject(lost_response(), skip=number)
                fake.inject(dead, skip=number, times=None)
            else:
                fake.inject(dead, skip=number, times=None)
            with pytest.raises(S3Exception):
                save(NEW, "ck", config, **options)
            fake.forget()
            found = outcome("ck")
            seen.add(found)
            assert found in {"old", "new", "none"}
            if found == "none":
                assert not {INDEX, MANIFEST} & set(names(fake, "ck"))
            fake._on_loop(fake._s3.buckets.clear)
            fake.create_bucket(BUCKET)
    assert {"old", "none"} <= seen


def test_a_reader_at_any_moment_of_a_replacement(fake: FakeS3, subtests: pytest.Subtests) -> None:
    """A load that begins between any two requests of a save, all of which then come in between."""
    options = {"fqn_to_index_mapping": TWO_FILES}
    seen = set()
    save(OLD, "ck", CONFIG, **options)
    fake.forget()
    outcome("ck")
    count = len(fake.requests)
    for number in range(count):
        with subtests.test(str(number)):
            save(OLD, "old", CONFIG, **options)
            save(OLD, "ck", CONFIG, **options)
            save(NEW, "next", CONFIG, **options)
            fake.forget()

            def replace_all(record: Record) -> None:
                objects = fake._s3.buckets[BUCKET].objects
                for key in list(objects):
                    if key.startswith("next/"):
                        objects["ck/" + key.removeprefix("next/")] = objects[key]

            fake.inject(Call(before=replace_all), skip=number)
            found = outcome("ck")
            seen.add(found)
            fake.forget()
            assert found in {"old", "new", "changing"}
    assert {"new", "changing"} <= seen


def met(path: str) -> str:
    """Load once: which state is there, or what is told."""
    target = blank(OLD)
    try:
        load_into(target, path)
    except CheckpointChangedError:
        return "changing"
    except AssertionError as exc:  # torch keeps the text of what `read_metadata` raised
        [told] = [says for says in ("was replaced", "has not finished, and") if says in str(exc)]
        return {"was replaced": "changing"}.get(told, "none")
    for name, state in (("old", OLD), ("new", NEW)):
        if all(same_bits(target[key], tensor) for key, tensor in state.items()):
            return name
    return "a mixture"


def test_a_reader_in_the_middle_of_a_replacement(fake: FakeS3, subtests: pytest.Subtests) -> None:
    """A load that begins after any request of a save; before one of its own, others follow."""
    options = {"fqn_to_index_mapping": TWO_FILES}
    save(OLD, "ck", CONFIG, **options)
    objects = fake._s3.buckets[BUCKET].objects
    states = [dict(objects)]

    def note(_: Record) -> None:
        if objects != states[-1]:
            states.append(dict(objects))

    fake.inject(Call(before=note), times=None)
    save(NEW, "ck", replace(CONFIG, max_connections=1), **options)
    states.append(dict(objects))
    fake.forget()
    assert len(states) == 5  # the index goes, a file is replaced, the other, and a new index comes

    def become(state: dict[str, Any], _: Record | None = None) -> None:
        objects.clear()
        objects.update(state)

    seen = set()
    for first, then in [(0, 1), (1, 4), (2, 3), (2, 4)]:
        for number in count():
            with subtests.test(f"{first} to {then} before request {number}"):
                become(states[first])
                fake.forget()
                rule = fake.inject(Call(before=partial(become, states[then])), skip=number)
                found = met("ck")
                seen.add(found)
                assert found in {"old", "new", "none", "changing"}
                # Who looked for an index last has been told before there was one.
                assert found != "none" or then < 4 or len(fake.requests) - number <= 3
            if not rule.struck:
                break
    assert seen == {"old", "new", "none", "changing"}


def test_a_failed_save_leaves_nothing(fake: FakeS3) -> None:
    fake.inject(Refuse("AccessDenied"), operation="UploadPart", times=None)
    with pytest.raises(AccessDeniedError):
        save({"w": fill((5000, 1000))}, "ck", CONFIG)
    assert names(fake, "ck") == []
    assert fake.uploads(BUCKET) == {}


def test_a_commit_whose_answer_is_lost(fake: FakeS3) -> None:
    fake.inject(lost_response(), operation="PutObject", key=f"*{INDEX}")
    save(STATE, "ck", CONFIG)
    assert_same(load(STATE, "ck"), STATE)
