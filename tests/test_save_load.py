"""`dcp.save` and `dcp.load` in one process, over HTTP."""

from __future__ import annotations

import logging
import math
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.utils.serialization import config

from s3dcp import S3ClientConfig, S3ReaderConstructor, S3StorageReader, S3StorageWriter
from s3dcp._metadata import crcs_of
from tests._states import (
    MiB,
    StateDict,
    assert_same,
    bits,
    blank,
    blank_like,
    dtypes,
    fill,
    finite,
    layouts,
    objects,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    return dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)


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
@pytest.mark.parametrize("rows", [4, 300, 5000])
def test_every_layout_comes_back(bucket: str, rows: int) -> None:
    state = layouts(rows)
    save(state, f"s3://{bucket}/ck")

    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)

    transposed = {
        name: blank_like(tensor.permute(*reversed(range(tensor.ndim)))).permute(
            *reversed(range(tensor.ndim))
        )
        for name, tensor in state.items()
    }
    assert_same(load(transposed, f"s3://{bucket}/ck"), state)


def test_every_layout_comes_back_from_moto(moto: Server, bucket: str) -> None:
    state = layouts(300)
    save(state, f"s3://{bucket}/ck")
    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)


def test_objects_come_back(s3: Server, bucket: str) -> None:
    state = objects()
    save(state, f"s3://{bucket}/ck")
    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)


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
        "wide": torch.quantize_per_tensor(plain[:, :8] * 0, 1.0, 0, torch.qint32),
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
    assert bits(targets["labelled"]) == bits(values)
    assert bits(targets["view"]) == bits(values.t())


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
    state = load(
        {"model": other, "optimizer": other_optimizer, "step": 0}, f"s3://{bucket}/ck"
    )
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


@pytest.mark.xdist_group("ranks")  # not at the same time as four ranks: it takes a GiB of memory
def test_a_tensor_over_1_gib_comes_back(bucket: str) -> None:
    # Reading what calloc returned takes no memory; only the target does.
    count = (1 << 29) + 12_345
    tensor = torch.zeros(count, dtype=torch.bfloat16)
    marks = [0, 1, (1 << 24) - 1, 1 << 24, 1 << 28, (1 << 29) - 1, 1 << 29, count - 1]
    tensor[marks] = torch.arange(1, len(marks) + 1, dtype=torch.bfloat16)
    assert tensor.nbytes > 1 << 30

    metadata = save({"huge": tensor}, f"s3://{bucket}/ck")
    [info] = metadata.storage_data.values()
    assert info.length > tensor.nbytes
    target = torch.full((count,), -1, dtype=torch.bfloat16)
    load({"huge": target}, f"s3://{bucket}/ck")
    assert target[marks].tolist() == list(range(1, len(marks) + 1))
    assert torch.count_nonzero(target) == len(marks)


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


@pytest.mark.parametrize("rows", [4, 400, 9000])
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
    assert bits(around["a"][1:-1]) == bits(state["a"])
    assert bits(around["b"][:, 1:-1]) == bits(state["b"])
    assert bits(around["c"][:, ::2]) == bits(state["c"].t())
    assert bits(around["d"][1:-1]) == bits(state["d"])
    assert bits(conj.conj()) == bits(waves)
    assert bits(-neg) == bits(waves)
    assert bits(parameter) == bits(state["a"])
    assert parameter.requires_grad
    assert not around["a"][[0, -1]].any()
    assert not around["b"][:, [0, -1]].any()
    assert not around["c"][:, 1::2].any()
    assert not around["d"][[0, -1]].any()


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


def straddling() -> StateDict:
    """Return tensors of which 5 MiB parts split headers, data and trailers."""
    state: StateDict = {}
    position = 0
    # Each item ends so far from the next multiple of 5 MiB (its header: 512 to 640 bytes, its
    # trailer: some 500), and the next starts there.
    for number, before_edge in enumerate((100, -100, 0, 3000, 700), 1):
        probe = fill((16,), torch.uint8)
        overhead = encoded_bytes(probe) - probe.nbytes
        edge = 5 * MiB * (2 * number - 1)
        size = edge - before_edge - position - overhead
        # Zips keep sizes in their trailer, which so does not depend on them; headers align.
        tensor = fill((size,), torch.uint8, number)
        state[f"t{number}"] = tensor
        position += encoded_bytes(tensor)
    return state


def encoded_bytes(tensor: torch.Tensor) -> int:
    from s3dcp._framing import encode

    return encode(tensor).nbytes


def places(metadata: Metadata, edge: int) -> set[str]:
    """Return into which sections of its items the multiples of `edge` fall."""
    found = set()
    for info in metadata.storage_data.values():
        crcs = crcs_of(info)
        assert crcs is not None
        assert crcs.data_offset is not None
        assert crcs.data_bytes is not None
        data_at = info.offset + crcs.data_offset
        first = -(-(info.offset + 1) // edge) * edge
        for at in range(first, info.offset + info.length, edge):
            if at < data_at:
                found.add("header")
            elif at < data_at + crcs.data_bytes:
                found.add("data")
            else:
                found.add("trailer")
    return found


def test_parts_may_end_anywhere(s3: Server, boto: Any, bucket: str) -> None:
    state = straddling()
    metadata = save(state, f"s3://{bucket}/ck", PART)
    assert places(metadata, 5 * MiB) == {"header", "data", "trailer"}

    [key] = data_keys(boto, bucket)
    size = boto.head_object(Bucket=bucket, Key=key)["ContentLength"]
    assert size == sum(info.length for info in metadata.storage_data.values())
    if s3.name == "moto":  # rclone forgets how many parts there were
        etag = boto.head_object(Bucket=bucket, Key=key)["ETag"]
        assert etag.endswith(f'-{math.ceil(size / (5 * MiB))}"')

    assert_same(load(blank(state), f"s3://{bucket}/ck", PART), state)
    assert_same(load(blank(state), f"s3://{bucket}/ck"), state)
