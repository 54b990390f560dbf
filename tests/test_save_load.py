"""`dcp.save` and `dcp.load` in one process, over HTTP."""

from __future__ import annotations

import io
import math
from functools import partial
from typing import IO, TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.utils.serialization import config

from s3dcp import (
    CheckpointExistsError,
    HexPrefixStrategy,
    S3ClientConfig,
    S3Reader,
    S3ReaderConstructor,
    S3StorageReader,
    S3StorageWriter,
)
from s3dcp._framing import frame_for
from s3dcp._metadata import crcs_of
from s3dcp.testing import FakeS3
from tests._fakes import uri_of
from tests._states import (
    CutPlanner,
    MiB,
    StateDict,
    assert_same,
    blank,
    blank_turned,
    dtypes,
    fill,
    finite,
    layouts,
    objects,
    same_bits,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests._servers import Server

# torch says so of every save and load without a process group, `no_dist=True` or not.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is :UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
]

PART = S3ClientConfig(part_size=5 * MiB)


def save(
    state: StateDict,
    uri: str,
    settings: S3ClientConfig | None = None,
    planner: SavePlanner | None = None,
    **kwargs: Any,
) -> Metadata:
    writer = S3StorageWriter(None, uri, settings, **kwargs)
    saved: Metadata = dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    return saved


def load(
    state: StateDict,
    uri: str,
    settings: S3ClientConfig | None = None,
    constructor: Any = None,
    planner: DefaultLoadPlanner | None = None,
) -> StateDict:
    reader = S3StorageReader(None, uri, settings, constructor)
    dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)
    return state


def keys(boto: Any, bucket: str, prefix: str = "") -> set[str]:
    pages = boto.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return {entry["Key"] for page in pages for entry in page.get("Contents", [])}


def data_keys(boto: Any, bucket: str, prefix: str = "") -> set[str]:
    return {key for key in keys(boto, bucket, prefix) if key.endswith(".distcp")}


# What comes back.


@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (2, 3, 1 << 16)], ids=str)
def test_every_dtype_comes_back(s3: Server, bucket: str, shape: tuple[int, ...]) -> None:
    state = dtypes(shape)
    save(state, f"s3://{bucket}/ck")
    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)


# The rows decide which way an item goes: copied by the span, or received into the target; in one
# checksum, or in blocks of several requests.
@pytest.mark.parametrize("rows", [4, 300, 4200])
def test_every_layout_comes_back(bucket: str, rows: int) -> None:
    state = layouts(rows)
    save(state, f"s3://{bucket}/ck")

    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)

    turned = {name: blank_turned(tensor) for name, tensor in state.items()}
    assert_same(load(turned, f"s3://{bucket}/ck"), state)


def test_every_layout_comes_back_from_moto(moto: Server, bucket: str) -> None:
    state = layouts(300)
    save(state, f"s3://{bucket}/ck")
    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)


def test_objects_come_back(s3: Server, bucket: str) -> None:
    state = objects()
    save(state, f"s3://{bucket}/ck")
    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)


@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor:UserWarning",
    "ignore:Sparse CSR tensor support:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
)
def test_quantized_and_sparse_tensors_come_back(bucket: str) -> None:
    scales, zeros = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2])
    plain = finite((3, 1 << 18), seed=1).clamp(-9, 9)
    diagonal = torch.arange(1.0, 5.0).diag()
    state = {
        "per_tensor": torch.quantize_per_tensor(plain, 0.1, 3, torch.quint8),
        "per_channel": torch.quantize_per_channel(plain, scales, zeros, 0, torch.qint8),
        "wide": torch.quantize_per_tensor(plain[:, :8], 0.5, 0, torch.qint32),
        "coo": diagonal.to_sparse(),
        "csr": diagonal.to_sparse_csr(),
    }
    targets = {
        "per_tensor": torch.quantize_per_tensor(plain * 0, 1.0, 0, torch.quint8),
        "per_channel": torch.quantize_per_channel(plain * 0, scales, zeros, 0, torch.qint8),
        "wide": torch.quantize_per_tensor(plain[:, :8] * 0, 0.5, 0, torch.qint32),
        "coo": (diagonal * 0).to_sparse(),
        "csr": diagonal.to_sparse_csr() * 0,
    }
    save(state, f"s3://{bucket}/ck")
    assert_same(load(targets, f"s3://{bucket}/ck"), state)


class Labelled(torch.Tensor):
    """A subclass without data of its own."""


@pytest.mark.parametrize("rows", [3, 100_000])
def test_a_tensor_subclass_comes_back(bucket: str, rows: int) -> None:
    values = fill((rows, 4), seed=1)
    state = {"labelled": values.as_subclass(Labelled), "view": values.t().as_subclass(Labelled)}
    save(state, f"s3://{bucket}/ck")
    targets = {
        "labelled": torch.zeros(rows, 4).as_subclass(Labelled),
        "view": torch.zeros(4, rows),
    }
    with torch.serialization.safe_globals([Labelled]):  # as torch's reader asks for it
        load(targets, f"s3://{bucket}/ck")
    assert type(targets["labelled"]) is Labelled
    assert same_bits(targets["labelled"], values)
    assert same_bits(targets["view"], values.t())


def test_a_model_and_its_optimizer_are_loaded_in_place(bucket: str) -> None:
    def trained(seed: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (seed + 1), amsgrad=True)
        for _ in range(steps):
            model(torch.rand(6, 8)).square().sum().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = trained(0, 3)
    save({"model": model, "optimizer": optimizer, "step": 3}, f"s3://{bucket}/ck")

    other, other_optimizer = trained(1, 1)
    state = load({"model": other, "optimizer": other_optimizer, "step": 0}, f"s3://{bucket}/ck")
    assert state["step"] == 3
    assert state["model"] is other
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    assert_same(other_optimizer.state_dict(), optimizer.state_dict())


def test_5000_small_tensors_come_back(boto: Any, bucket: str) -> None:
    state: StateDict = {
        f"layer.{number}/ü": fill((number % 7, 1 + number % 41), seed=number)
        for number in range(5000)
    }
    save(state, f"s3://{bucket}/ck")
    assert len(keys(boto, bucket)) == 2
    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)


@pytest.mark.xdist_group("ranks")  # not at the same time as the ranks: it takes two GiB of memory
def test_a_tensor_over_1_gib_comes_back(fake: FakeS3) -> None:
    # Reading what calloc returned takes no memory; only the target does, and the stored object.
    count = (1 << 29) + 12_345
    tensor = torch.zeros(count, dtype=torch.bfloat16)
    marks = [0, 1, (1 << 24) - 1, 1 << 24, 1 << 28, (1 << 29) - 1, 1 << 29, count - 1]
    tensor[marks] = torch.arange(1, len(marks) + 1, dtype=torch.bfloat16)
    assert tensor.nbytes > 1 << 30

    metadata = save({"huge": tensor}, uri_of("ck"))
    [info] = metadata.storage_data.values()
    assert info.length > tensor.nbytes
    target = torch.full((count,), -1, dtype=torch.bfloat16)
    load({"huge": target}, uri_of("ck"))
    assert target[marks].tolist() == list(range(1, len(marks) + 1))
    assert torch.count_nonzero(target.view(torch.int16)) == len(marks)


# Into what it is loaded.


@pytest.mark.parametrize("rows", [3, 40_000])
def test_targets_may_have_another_dtype(bucket: str, rows: int) -> None:
    state = {
        "double": torch.linspace(-2, 2, rows * 4, dtype=torch.float64).view(rows, 4),
        "half": torch.linspace(-2, 2, rows * 4).half().view(rows, 4),
        "bfloat": torch.linspace(-2, 2, rows * 4).bfloat16().view(4, rows).t(),
        # The same width, so that only the dtype tells that bytes are not values.
        "integer": torch.arange(rows * 4, dtype=torch.int32).view(rows, 4),
        "float": torch.linspace(-9, 9, rows * 4).view(rows, 4),
    }
    save(state, f"s3://{bucket}/ck")
    targets = {
        "double": torch.zeros(rows, 4, dtype=torch.float32),
        "half": torch.zeros(rows, 4, dtype=torch.bfloat16),
        "bfloat": torch.zeros(rows, 4, dtype=torch.float64),
        "integer": torch.zeros(rows, 4, dtype=torch.float32),
        "float": torch.zeros(rows, 4, dtype=torch.int32),
    }
    load(targets, f"s3://{bucket}/ck")
    for name, target in targets.items():
        assert torch.equal(target, state[name].to(target.dtype)), name


@pytest.mark.parametrize("rows", [4, 400, 4500])
def test_targets_may_be_views_and_nothing_beside_them_is_written(bucket: str, rows: int) -> None:
    waves = finite((rows, 256), torch.complex64, 2)
    state = {name: fill((rows, 256), seed=seed) for seed, name in enumerate("abcd")}
    save({**state, "parameter": state["a"], "conj": waves, "neg": waves}, f"s3://{bucket}/ck")

    around = {
        "a": torch.zeros(rows + 2, 256),  # a view of whole rows
        "b": torch.zeros(rows, 258),  # of columns
        "c": torch.zeros(256, rows * 2),  # every other one, transposed
        "d": torch.zeros(rows * 256 + 2),  # and at no address of its own
    }
    conj = torch.zeros(rows, 256, dtype=torch.complex64)
    neg = torch.zeros(rows, 256, dtype=torch.complex64)
    parameter = nn.Parameter(torch.zeros(rows, 256))
    load(
        {
            "a": around["a"][1:-1],
            "b": around["b"][:, 1:-1],
            "c": around["c"][:, ::2].t(),
            "d": around["d"][1:-1].view(rows, 256),
            "parameter": parameter,
            "conj": conj.conj(),
            "neg": torch._neg_view(neg),
        },
        f"s3://{bucket}/ck",
    )
    assert same_bits(around["a"][1:-1], state["a"])
    assert same_bits(around["b"][:, 1:-1], state["b"])
    assert same_bits(around["c"][:, ::2], state["c"].t())
    assert same_bits(around["d"][1:-1], state["d"].view(-1))
    assert same_bits(conj.conj(), waves)
    assert same_bits(-neg, waves)
    assert same_bits(parameter, state["a"])
    assert parameter.requires_grad
    assert not around["a"][[0, -1]].any()
    assert not around["b"][:, [0, -1]].any()
    assert not around["c"][:, 1::2].any()
    assert not around["d"][[0, -1]].any()


@pytest.mark.parametrize("rows", [8, 800, 4500])
@pytest.mark.parametrize(
    "planner",
    [
        CutPlanner((0.5, 0.6)),
        CutPlanner((0.0, 0.25)),
        CutPlanner((0.75, 1.0)),
        CutPlanner((0.25, 0.75), (0.3, 0.7)),
        CutPlanner((0.0, 1.0), (0.0, 0.5)),
    ],
    ids=["few", "first", "last", "box", "columns"],
)
def test_parts_of_tensors_can_be_loaded(bucket: str, rows: int, planner: CutPlanner) -> None:
    waves = finite((rows, 128), torch.complex64, 1)
    state = {
        "contiguous": fill((rows, 256), seed=2),
        "half": fill((rows, 4, 128), torch.bfloat16, 3),
        "turned": fill((256, rows), seed=4).t(),
        "with_gaps": fill((rows, 512), seed=5)[:, ::2],
        "conj": waves.conj(),
        # The header that says so is as long as that of a plain tensor.
        "neg": torch._neg_view(finite((rows, 256), seed=6)),
        "vector": fill((rows * 256,), torch.int32, 7),
        # Of which torch's copies go wrong where it is not aligned.
        "wide": fill((rows, 64), torch.complex128, 8),
        "other_dtype": torch.arange(rows * 256, dtype=torch.int32).view(rows, 256),
    }
    save(state, f"s3://{bucket}/ck")
    targets = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    targets["with_gaps"] = torch.zeros(rows, 512)[:, ::2]
    targets["other_dtype"] = torch.zeros(rows, 256)
    load(targets, f"s3://{bucket}/ck", planner=planner)
    for name, target in targets.items():
        expected = torch.zeros_like(target)
        box = planner.box(target)
        expected[box] = state[name][box].to(target.dtype)
        assert same_bits(target, expected), name


def test_a_part_of_the_keys_can_be_loaded(bucket: str) -> None:
    state = {
        "model": {name: fill((100, 1000), seed=n) for n, name in enumerate("abcdef")},
        "small": {name: fill((3,), seed=n) for n, name in enumerate("abcdef")},
        "step": 12,
    }
    save(state, f"s3://{bucket}/ck")
    chosen = {"model": {"b": 0, "e": 0}, "small": {"a": 0, "f": 0}}
    expected = {key: {name: state[key][name] for name in chosen[key]} for key in chosen}  # type: ignore[index]
    assert_same(load(blank(expected), f"s3://{bucket}/ck"), expected)
    assert load({"step": 0}, f"s3://{bucket}/ck") == {"step": 12}


def test_keys_that_were_not_saved(bucket: str) -> None:
    state = {"kept": fill((5, 5)), "step": 3}
    save(state, f"s3://{bucket}/ck")
    fresh = torch.full((2, 2), 7.0)

    with pytest.raises(dcp.CheckpointException, match=r"Missing key.*added"):
        load({**blank(state), "added": fresh}, f"s3://{bucket}/ck")

    planner = DefaultLoadPlanner(allow_partial_load=True)
    found = load({**blank(state), "added": fresh}, f"s3://{bucket}/ck", planner=planner)
    assert_same(found, {**state, "added": torch.full((2, 2), 7.0)})


def test_a_state_dict_is_made_from_keys(bucket: str) -> None:
    state = {
        "model": {"weight": fill((40, 30)), "bias": fill((300, 300), torch.bfloat16).t()},
        "optimizer": {"lr": 0.5, "moments": fill((4, 4))},
        "step": 12,
    }
    save(state, f"s3://{bucket}/ck")

    def made(wanted: set[str] | str | None) -> StateDict:
        reader = S3StorageReader(None, f"s3://{bucket}/ck")
        return _load_state_dict_from_keys(wanted, storage_reader=reader)

    assert_same(made(None), state)
    assert_same(made({"step"}), {"step": 12})
    assert_same(made("model"), {"model": state["model"]})
    assert_same(made("model.bias"), {"model": {"bias": state["model"]["bias"]}})  # type: ignore[index]


# Large objects, in parts.


def straddling(part_bytes: int) -> StateDict:
    """Return tensors of about a part each, of which parts cut headers, data and trailers.

    Each ends so many bytes, and up to 63 more, before the end of a part; headers have some 700
    bytes, trailers 870.
    """
    state: StateDict = {}
    position = 0
    frame = frame_for(torch.uint8, (part_bytes,))
    assert frame is not None
    for number, bytes_before in enumerate((100, -100, 0, 3000, 500), 1):
        length = number * part_bytes - bytes_before - position
        size = (length - frame.length + part_bytes) // 64 * 64  # so that nothing else is padded
        state[f"t{number}"] = fill((size,), torch.uint8, number)
        position += frame.length - part_bytes + size
    return state


def places(metadata: Metadata, part_bytes: int) -> set[str]:
    """Return what of the items the parts' ends cut."""
    found = set()
    for info in metadata.storage_data.values():
        crcs = crcs_of(info)
        assert crcs is not None
        assert crcs.data_offset is not None
        assert crcs.data_bytes is not None
        data_at = info.offset + crcs.data_offset
        data_ends = data_at + crcs.data_bytes
        for at in range(part_bytes, info.offset + info.length, part_bytes):
            if info.offset < at:
                found.add("header" if at < data_at else "data" if at < data_ends else "trailer")
    return found


def test_parts_may_end_anywhere(s3: Server, boto: Any, bucket: str) -> None:
    state = straddling(PART.part_size)
    metadata = save(state, f"s3://{bucket}/ck", PART)
    assert places(metadata, PART.part_size) == {"header", "data", "trailer"}

    [key] = data_keys(boto, bucket)
    size = boto.head_object(Bucket=bucket, Key=key)["ContentLength"]
    assert size == sum(info.length for info in metadata.storage_data.values())
    if s3.name == "moto":  # rclone forgets how many parts there were
        etag = boto.head_object(Bucket=bucket, Key=key)["ETag"]
        assert etag.endswith(f'-{math.ceil(size / PART.part_size)}"')

    assert_same(load(blank(state), f"s3://{bucket}/ck", PART), state)
    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)


@pytest.mark.parametrize(
    "settings",
    [
        S3ClientConfig(),
        S3ClientConfig(max_connections=1),
        S3ClientConfig(memory_budget_bytes=1, max_connections=3, part_size=5 * MiB),
    ],
    ids=["default", "one connection", "no memory"],
)
def test_tensors_over_32_mib_come_back(bucket: str, settings: S3ClientConfig) -> None:
    state = {
        "small": fill((10, 10), seed=1),
        "contiguous": fill((9000, 1024), seed=2),
        "turned": fill((4500, 1000), torch.float64, 3).t(),
        "with_gaps": fill((3000, 1024), seed=4)[:, 100:-100],
        "medium": fill((300, 1024), seed=5),
    }
    save(state, f"s3://{bucket}/ck", settings)
    assert_same(load(blank(state), f"s3://{bucket}/ck", settings), state)
    turned = {"turned": blank_turned(state["turned"])}
    assert_same(load(turned, f"s3://{bucket}/ck", settings), {"turned": state["turned"]})


def test_frames_may_be_aligned_otherwise(bucket: str) -> None:
    state = {
        "small": fill((10, 10), torch.complex128, 1),
        "medium": fill((300, 1024), seed=2),
        "turned": fill((300, 1024), seed=3).t(),
        "large": fill((9000, 300), seed=4),
        **{f"empty{shape}": torch.empty(shape) for shape in ((0,), (0, 3), (3, 0))},
    }
    # The last makes frames of 450 KiB, of which tensors without elements are no small ones.
    for alignment in (8, 4096, 65536):
        with config.patch("save.storage_alignment", alignment):  # type: ignore[attr-defined]
            save(state, f"s3://{bucket}/{alignment}")
            assert_same(load(blank(state), f"s3://{bucket}/{alignment}"), state)
    for alignment in (8, 4096, 65536):
        assert_same(load(blank(state), f"s3://{bucket}/{alignment}"), state)


# How it is read.


class InjectedReaders:
    """A DCP reader constructor that is not s3dcp's own."""

    def __init__(self) -> None:
        self._ours = S3ReaderConstructor.dcp_optimized()
        self.opened: list[str] = []

    def __call__(self, *, key: str, **arguments: Any) -> S3Reader:
        self.opened.append(key)
        return self._ours(key=key, **arguments)

    def set_item_ranges_by_file(self, *arguments: Any) -> None:
        self._ours.set_item_ranges_by_file(*arguments)


@pytest.mark.parametrize(
    "make",
    [
        S3ReaderConstructor.default,
        S3ReaderConstructor.sequential,
        S3ReaderConstructor.range_based,
        partial(S3ReaderConstructor.range_based, 0),
        partial(S3ReaderConstructor.range_based, 1 << 16),
        S3ReaderConstructor.dcp_optimized,
        partial(S3ReaderConstructor.dcp_optimized, 0),
        partial(S3ReaderConstructor.dcp_optimized, float("inf")),
        InjectedReaders,
    ],
    ids=lambda make: getattr(make, "__name__", str(getattr(make, "args", make))),
)
def test_every_reader_constructor_loads(bucket: str, make: Callable[[], Any]) -> None:
    state: StateDict = {
        f"{name}{number}": tensor
        for number in range(4)
        for name, tensor in {
            "small": fill((number + 1, 100), torch.bfloat16, number),
            "medium": fill((number + 300, 300), seed=number),
            "turned": fill((number + 300, 300), seed=number).t(),
            "large": fill((number + 5, 1 << 18), seed=number),
        }.items()
    } | {"step": 3, "names": ["a", "b"]}
    save(state, f"s3://{bucket}/ck", thread_count=2)
    constructor = make()
    assert_same(load(blank(state), f"s3://{bucket}/ck", None, constructor), state)
    if isinstance(constructor, InjectedReaders):
        assert len(constructor.opened) == 2

    # With gaps between what is read, by the same constructor.
    some = {name: value for name, value in state.items() if name[-1] in "02p"}
    assert_same(load(blank(some), f"s3://{bucket}/ck", None, constructor), some)


def test_one_writer_and_one_reader_for_several_checkpoints(boto: Any, bucket: str) -> None:
    states = {f"s3://{bucket}/step {n}": {"a": fill((300, 300), seed=n), "n": n} for n in range(3)}
    writer = S3StorageWriter(None, f"s3://{bucket}/unused")
    for uri, state in states.items():
        dcp.save(state, checkpoint_id=uri, storage_writer=writer, no_dist=True)
    assert keys(boto, bucket, "unused") == set()

    reader = S3StorageReader(None, f"s3://{bucket}/unused")
    for uri, state in [*states.items(), *reversed(states.items())]:
        target = blank(state)
        dcp.load(target, checkpoint_id=uri, storage_reader=reader, no_dist=True)
        assert_same(target, state)

    reader.reset(f"s3://{bucket}/step 1")  # without a checkpoint_id, that is where it stays
    target = blank(state)
    dcp.load(target, storage_reader=reader, no_dist=True)
    assert target["n"] == 1


def test_a_reader_sees_what_was_saved_since_its_last_load(bucket: str) -> None:
    reader = S3StorageReader(None, f"s3://{bucket}/ck")
    writer = S3StorageWriter(None, f"s3://{bucket}/ck")
    for step in range(3):
        state = {"weight": fill((300 + step, 300), seed=step), "step": step}
        dcp.save(state, storage_writer=writer, no_dist=True)
        target = blank(state)
        dcp.load(target, storage_reader=reader, no_dist=True)
        assert_same(target, state)


# How it is written.


@pytest.mark.parametrize("thread_count", [1, 3, 8])
def test_a_rank_writes_an_object_for_each_thread(boto: Any, bucket: str, thread_count: int) -> None:
    state = {
        "a": fill((3000, 1024), seed=1),
        "b": fill((300, 1024), seed=2).t(),
        "c": fill((3,), seed=3),
        "step": 5,
    }
    metadata = save(state, f"s3://{bucket}/ck", PART, thread_count=thread_count)
    # Of eight threads, torch leaves five without an item: their objects are empty.
    assert len(data_keys(boto, bucket)) == thread_count
    used = {info.relative_path for info in metadata.storage_data.values() if info.length}
    assert len(used) == min(thread_count, 3)
    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)


@pytest.mark.parametrize("thread_count", [1, 3])
def test_every_item_may_have_an_object_of_its_own(
    boto: Any, bucket: str, thread_count: int
) -> None:
    state: StateDict = {str(n): fill((n, 100, 90), seed=n) for n in range(15)} | {"step": 5}
    save(state, f"s3://{bucket}/ck", single_file_per_rank=False, thread_count=thread_count)
    assert len(data_keys(boto, bucket)) == 16
    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)


def test_items_may_be_compressed(s3: Server, boto: Any, bucket: str) -> None:
    state = {
        "zeros": torch.zeros(1 << 22),
        "random": fill((3000, 1024), seed=1),
        "turned": fill((300, 1024), seed=2).t(),
        "small": fill((3,), seed=3),
        "step": 5,
        "text": "again " * 10_000,
    }
    save(state, f"s3://{bucket}/ck", PART, thread_count=2, _extensions=[ZStandard()])
    sizes = [
        boto.head_object(Bucket=bucket, Key=key)["ContentLength"] for key in keys(boto, bucket)
    ]
    assert 12 * MiB < sum(sizes) < 14 * MiB
    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)
    sequential = S3ReaderConstructor.sequential()
    assert_same(load(blank(state), f"s3://{bucket}/ck", None, sequential), state)


class Elsewhere(ZStandard):
    """An extension that keeps the bytes somewhere else: nothing of them is written."""

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return io.BytesIO()


def test_an_extension_that_writes_nothing_leaves_no_upload(
    s3: Server, boto: Any, bucket: str
) -> None:
    """Its object is there, with no bytes, as the metadata says."""
    state = {"weights": torch.zeros(3 * MiB)}
    save(state, f"s3://{bucket}/ck", PART, _extensions=[Elsewhere()])

    [key] = data_keys(boto, bucket)
    assert boto.head_object(Bucket=bucket, Key=key)["ContentLength"] == 0
    assert "Uploads" not in boto.list_multipart_uploads(Bucket=bucket)


@pytest.fixture
def _no_cached_plans() -> Iterator[None]:
    """Empty torch's caches of plans, which belong to the class, before and after."""
    caches: list[dict[str, Any]] = [
        getattr(SavePlanner, f"_cached_{name}")
        for name in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata")
    ]
    for cache in caches:
        cache.clear()
    yield
    for cache in caches:
        cache.clear()


@pytest.mark.usefixtures("_no_cached_plans")
@pytest.mark.parametrize("to_one_path", [False, True])
def test_plans_may_be_cached(boto: Any, bucket: str, to_one_path: bool) -> None:
    def state(step: int, rows: int) -> StateDict:
        return {
            "weight": fill((rows, 300), seed=step),
            "turned": fill((rows, 300), seed=step + 9).t(),
            "small": fill((3,), seed=step),
            "step": step,
        }

    # Values change, then shapes, then nothing but values again, then keys.
    states = [state(0, 400), state(1, 400), state(2, 500), state(3, 500)]
    states += [{**state(4, 500), "added": fill((5, 5))}, state(5, 400)]
    uris = [f"s3://{bucket}/{'ck' if to_one_path else n}" for n in range(len(states))]
    names: set[str] = set()
    for uri, saved in zip(uris, states, strict=True):
        planner = DefaultSavePlanner(enable_plan_caching=True)
        metadata = save(saved, uri, planner=planner)
        written = {info.relative_path for info in metadata.storage_data.values()}
        assert not names & written
        names |= written
        assert_same(load(blank(saved), uri), saved)
    assert SavePlanner._cached_final_save_plan  # or this tests nothing
    if to_one_path:
        assert len(keys(boto, bucket)) == 2
    else:
        for uri, saved in zip(uris, states, strict=True):
            assert_same(load(blank(saved), uri), saved)


def test_overwriting_deletes_what_only_the_old_checkpoint_used(
    s3: Server, boto: Any, bucket: str
) -> None:
    others = {
        "ck/notes.txt",
        "ck/__0_0.distcp",  # as another library names its objects
        "ck/deeper/.metadata",
        "ck-2/.metadata",
        ".metadata",
    }
    for key in others:
        boto.put_object(Bucket=bucket, Key=key, Body=b"not ours")

    old = {"a": fill((300, 300), seed=1), "b": fill((3,), seed=2), "step": 1}
    save(old, f"s3://{bucket}/ck", prefix_strategy=HexPrefixStrategy(epoch_num=1), thread_count=3)
    before = keys(boto, bucket) - others
    assert len(before) == 4
    new = {"a": fill((200, 300), seed=3), "step": 2}
    save(new, f"s3://{bucket}/ck", single_file_per_rank=False)
    after = keys(boto, bucket) - others

    assert before & after == {"ck/.metadata"}
    assert len(after) == 3
    assert_same(load(blank(new), f"s3://{bucket}/ck"), new)
    for key in others:
        assert boto.get_object(Bucket=bucket, Key=key)["Body"].read() == b"not ours"


def test_a_checkpoint_that_may_not_be_replaced_stays(boto: Any, bucket: str) -> None:
    old = {"a": fill((300, 300), seed=1)}
    save(old, f"s3://{bucket}/ck", overwrite=False)
    before = keys(boto, bucket)
    with pytest.raises(dcp.CheckpointException, match="Checkpoint already exists") as caught:
        save({"a": fill((300, 300), seed=2)}, f"s3://{bucket}/ck", overwrite=False)
    [(error, _)] = caught.value.failures.values()
    assert isinstance(error, CheckpointExistsError)
    assert keys(boto, bucket) == before
    assert_same(load(blank(old), f"s3://{bucket}/ck"), old)


def test_a_rank_of_its_own_needs_no_collectives(boto: Any, bucket: str) -> None:
    state = {"a": fill((300, 300), seed=1), "step": 4}
    writer = S3StorageWriter(None, f"s3://{bucket}/ck")
    dcp.save(state, storage_writer=writer, no_dist=True, use_collectives=False)
    assert "ck/__0.metadata" in keys(boto, bucket)
    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)
