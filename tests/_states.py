"""State dicts that a checkpoint has to bring back bit by bit, and how to tell whether it did."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from s3dcp._torch_internals import neg_view

KiB = 1 << 10
MiB = 1 << 20

StateDict = dict[str, Any]

_FLOATS = ("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32")
_FLOATS_8 = ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")

#: Every dtype that torch's own pair of storage reader and writer brings back. It has no size for
#: bits8, int4 and their like: the planner's metadata cannot describe those.
DTYPES: tuple[torch.dtype, ...] = (
    *(getattr(torch, name) for name in (*_FLOATS, *_INTEGERS)),
    *(getattr(torch, f"float8_{name}") for name in _FLOATS_8),
    torch.float4_e2m1fn_x2,
)

# What a target holds before the load: no test's tensors are made of it.
_BLANK_BYTE = 0xA5


def fill(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Return a contiguous tensor of random bytes, NaNs among them."""
    count = math.prod(shape)
    generator = torch.Generator().manual_seed(seed * 7919 + count)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if not count:
        return torch.empty(shape, dtype=dtype)
    size = count * dtype.itemsize
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (-(-size // 8),), generator=generator)
    return words.view(torch.uint8)[:size].clone().view(dtype).view(shape)


def finite(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Return a contiguous tensor of random bytes without NaNs, whose bits arithmetic may change."""
    return fill(shape, dtype, seed).nan_to_num(1.0, 2.0, -2.0)


def blank_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor of the same shape and dtype that holds something else."""
    target = torch.empty(tensor.shape, dtype=tensor.dtype)
    if target.numel():
        raw = target.view(-1).view(torch.uint8)
        raw.fill_(True if tensor.dtype is torch.bool else _BLANK_BYTE)
    return target


def blank_turned(tensor: torch.Tensor) -> torch.Tensor:
    """Return such a tensor whose memory is in the opposite order of its dimensions."""
    backwards = tuple(reversed(range(tensor.ndim)))
    return torch.permute(blank_like(torch.permute(tensor, backwards)), backwards)


def blank(value: Any) -> Any:
    """Return what to load a state dict into: of its structure, and with none of its values."""
    if isinstance(value, torch.Tensor):
        return blank_like(value)
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list) and any(isinstance(item, (torch.Tensor, dict)) for item in value):
        return [blank(item) for item in value]
    return "to be replaced"


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare two dense tensors of one dtype, NaNs included."""
    return left.shape == right.shape and torch.equal(_bits(left), _bits(right))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(torch.uint8)


def assert_same(found: Any, expected: Any, name: str = "state") -> None:
    """Compare values and types, bit by bit."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), name
        _assert_same_tensors(found, expected, name)
    elif isinstance(expected, dict):
        assert list(found) == list(expected), name
        for key, value in expected.items():
            assert_same(found[key], value, f"{name}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected), name
        assert len(found) == len(expected), name
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{name}.{number}")
    elif isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray), name
        assert found.dtype == expected.dtype, name
        assert np.array_equal(found, expected), name
    else:
        assert type(found) is type(expected), name
        assert found == expected, name


def _assert_same_tensors(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert found.dtype == expected.dtype, name
    assert found.shape == expected.shape, name
    assert found.layout == expected.layout, name
    if expected.is_quantized:
        assert torch.equal(found, expected), name
    elif expected.layout is torch.sparse_coo:
        assert torch.equal(found.coalesce().indices(), expected.coalesce().indices()), name
        assert torch.equal(found.coalesce().values(), expected.coalesce().values()), name
    elif expected.layout is torch.sparse_csr:
        assert torch.equal(found.crow_indices(), expected.crow_indices()), name
        assert torch.equal(found.col_indices(), expected.col_indices()), name
        assert torch.equal(found.values(), expected.values()), name
    else:
        assert same_bits(found, expected), name


def dtypes(shape: tuple[int, ...]) -> StateDict:
    """Return a tensor of every dtype."""
    return {str(dtype): fill(shape, dtype, seed) for seed, dtype in enumerate(DTYPES)}


def layouts(rows: int) -> StateDict:
    """Return tensors in every layout that memory can have, of some `rows` KiB each."""
    base = fill((rows, 256), seed=1)
    image = fill((2, 4, rows, 8), torch.bfloat16, 2)
    volume = fill((1, 4, rows, 4, 2), torch.float16, 3)
    waves = finite((rows, 128), torch.complex64, 4)
    return {
        "contiguous": fill((rows, 256), seed=5),
        "transposed": fill((rows, 256), seed=6).t(),
        "permuted": fill((4, rows, 64), seed=7).permute(2, 0, 1),
        "channels_last": image.contiguous(memory_format=torch.channels_last),
        "channels_last_3d": volume.contiguous(memory_format=torch.channels_last_3d),
        "strided": fill((2 * rows, 512), seed=8)[::2, ::2],
        "flipped_part": fill((rows, 512), seed=9)[:, 256:],
        "expanded": fill((1, 256), seed=10).expand(rows, 256),
        "overlapping": fill((rows + 255,), seed=11).as_strided((rows, 256), (1, 1)),
        # As many bytes as its storage has, and yet not those.
        "overlapping_in_full": fill((rows * 256,), seed=12).as_strided((rows, 256), (1, 1)),
        # Three views of one storage, two of which overlap.
        "shared": base,
        "shared_top": base[: rows // 2],
        "shared_middle": base[rows // 4 : rows // 2 + 1],
        "conj": waves.conj(),
        "neg": neg_view(finite((rows, 256), torch.float64, 13)),
        "conj_and_neg": neg_view(waves.conj().t()),
        "imag_of_conj": waves.conj().imag,
        "parameter": nn.Parameter(fill((rows, 256), seed=14)),
        "frozen": nn.Parameter(fill((rows, 256), torch.float16, 15), requires_grad=False),
        "in_a_graph": finite((rows, 256), seed=16).requires_grad_() * 2,
        "no_dimension": fill((), torch.float64, 17),
        "one_element": fill((1, 1, 1), torch.int64, 18).expand(1, 1, 1),
        "empty": torch.empty(0),
        "empty_rows": torch.empty(0, rows, dtype=torch.bfloat16),
        "empty_columns": torch.empty(rows, 0, 3, dtype=torch.int8),
        "empty_transposed": torch.empty(rows, 0).t(),
        "empty_part": base[:0],
    }


@dataclass
class Progress:
    """An object of a class of one's own."""

    step: int
    loss: float


def objects() -> StateDict:
    """Return what is no tensor, nested as in trainers' state dicts."""
    return {
        "int": 3,
        "negative": -(2**80),
        "float": 0.1,
        "infinite": float("inf"),
        "bool": True,
        "none": None,
        "str": "text with ünïcode, / and \0",
        "empty_str": "",
        "bytes": b"\0\xff",
        "tuple": (1, (2.5, "three"), None),
        "list": [1, 2, [3]],
        "set": {1, 2},
        "ordered": OrderedDict(first=1, second=[2]),
        "decimal": Decimal("1.10"),
        "datetime": datetime(2024, 2, 29, tzinfo=UTC),
        "path": PurePosixPath("a/b"),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "own": Progress(7, 0.25),
        "numpy": np.arange(12, dtype=np.int16).reshape(3, 4).T,
        "numpy_scalar": np.float32(1.5),
        "nested": {"lr": 1e-3, "betas": (0.9, 0.999), "deep": {"er": {"est": [None, "x"]}}},
        "list_of_dicts": [{"lr": 1.0, "params": [0, 1]}, {"lr": 2.0, "params": [2]}],
        "tensors_in_a_list": [fill((2, 3), seed=20), fill((4,), torch.int64, 21)],
        # Larger than one part: 9 MiB that do not compress.
        "large": fill((9 * MiB,), torch.uint8, 22).numpy().tobytes(),
    }


class CutPlanner(DefaultLoadPlanner):
    """Loads a box of every tensor, as a rank does whose shard is cut otherwise than it was saved.

    Args:
        rows: First and last of the first dimension, as parts of it.
        columns: The same of the second.
    """

    def __init__(
        self, rows: tuple[float, float], columns: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        super().__init__()
        self._parts = (rows, columns)

    def box(self, tensor: torch.Tensor) -> tuple[slice, ...]:
        """Return the box that is loaded of such a tensor."""
        return tuple(
            slice(int(first * size), int(last * size))
            for (first, last), size in zip(self._parts, tensor.shape, strict=False)
        )

    def create_local_plan(self) -> LoadPlan:
        """Cut every item down to the box."""
        plan = super().create_local_plan()
        return dataclasses.replace(plan, items=[self._cut(item) for item in plan.items])

    def _cut(self, item: ReadItem) -> ReadItem:
        box = self.box(self.state_dict[item.dest_index.fqn])
        rest = tuple(item.lengths)[len(box) :]
        offsets = torch.Size([*(part.start for part in box), *(0 for _ in rest)])
        lengths = torch.Size([*(part.stop - part.start for part in box), *rest])
        return dataclasses.replace(
            item, storage_offsets=offsets, dest_offsets=offsets, lengths=lengths
        )
