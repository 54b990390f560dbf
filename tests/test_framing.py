"""Frames against `torch.save` itself: the same bytes around the data, the same tensor out."""

from __future__ import annotations

import gc
import io
import logging
import math
import tracemalloc
import weakref
from itertools import permutations
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config

from s3dcp import _framing
from s3dcp._checksums import crc_of
from s3dcp._framing import Frame, decode, encode, frame_for, frame_of, memory_of
from s3dcp._layouts import parse_header
from s3dcp._torch_internals import neg_view

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = sorted(_framing._DTYPES, key=str)
COMPLEX = [dtype for dtype in DTYPES if dtype.is_complex]

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


def tensor_of(
    dtype: torch.dtype, shape: tuple[int, ...], order: tuple[int, ...] | None = None
) -> torch.Tensor:
    """Return a dense tensor with random bytes, its dimensions laid out in memory in `order`."""
    order = tuple(range(len(shape))) if order is None else order
    if dtype is torch.bool:
        raw = torch.randint(0, 2, (math.prod(shape),), dtype=torch.uint8)
    else:
        raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    memory = raw.view(dtype) if raw.numel() else torch.empty(0, dtype=dtype)
    laid_out = memory.view(tuple(shape[axis] for axis in order))
    return laid_out.permute(tuple(order.index(axis) for axis in range(len(shape))))


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare all that a tensor is, NaNs and bits included."""
    attributes = ("dtype", "shape", "layout", "requires_grad")
    return (
        all(getattr(left, name) == getattr(right, name) for name in attributes)
        and left.stride() == right.stride()
        and (left.is_conj(), left.is_neg()) == (right.is_conj(), right.is_neg())
        and memory_of(left) == memory_of(right)
    )


def saved(tensor: torch.Tensor) -> bytes:
    """Return what stock DCP stores."""
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()
    sink = io.BytesIO()
    torch.save(tensor, sink)
    return sink.getvalue()


def check_item(tensor: torch.Tensor) -> Frame:
    """Check a tensor's frame with its memory against what `torch.save` writes and reads."""
    frame = frame_of(tensor)
    assert frame is not None
    memory = memory_of(tensor)
    item = frame.header + bytes(memory) + frame.trailer
    stock = saved(tensor)
    assert memory.nbytes == frame.data_bytes == tensor.nbytes
    assert len(item) == frame.length == len(stock)
    # Everything up to the data's descriptor, which holds the CRC-32 that a frame leaves out.
    upto = len(frame.header) + frame.data_bytes if frame.data_bytes else len(stock)
    assert item[:upto] == stock[:upto]
    assert same(torch.load(io.BytesIO(item), weights_only=True), torch.load(io.BytesIO(stock)))
    assert same(decode(item), tensor if tensor.storage_offset() == 0 else tensor.clone())
    layout = parse_header(item, len(item))
    if tensor.is_conj() or tensor.is_neg():
        assert layout is None
        return frame
    assert layout is not None
    assert (layout.dtype, layout.shape) == (tensor.dtype, tuple(tensor.shape))
    assert (layout.stride, layout.storage_offset) == (tensor.stride(), 0)
    assert item[layout.data_offset : layout.data_offset + layout.data_bytes] == memory
    return frame


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4, 5), (0,), (3, 0, 2)], ids=str)
def test_contiguous(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = tensor_of(dtype, shape)
    assert check_item(tensor) is frame_for(dtype, shape)


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_any_order_of_dimensions(order: tuple[int, ...]) -> None:
    check_item(tensor_of(torch.float32, (2, 3, 4), order))


def test_channels_last() -> None:
    check_item(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    check_item(torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d))


def test_strides_of_dimensions_of_one_and_none_mean_nothing() -> None:
    check_item(torch.randn(4).as_strided((1, 4), (77, 1)))
    check_item(torch.empty(0).as_strided((0, 4), (9, 5)))


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_conj_and_neg_bits(dtype: torch.dtype) -> None:
    tensor = tensor_of(dtype, (3, 4))
    frames = {
        check_item(variant).header
        for variant in (tensor, tensor.conj(), neg_view(tensor), neg_view(tensor.t().conj()))
    }
    assert len(frames) == 4


def test_views_are_framed_as_their_clones() -> None:
    base = torch.randn(10, 6)
    assert check_item(base[2:5]) is frame_for(torch.float32, (3, 6))
    check_item(base.t()[:, 4:6])


def test_detached_parameters_have_frames() -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    assert frame_of(parameter) is None
    check_item(parameter.detach())


@given(data=st.data(), dtype=st.sampled_from(DTYPES))
@settings(max_examples=150, deadline=None)
def test_any_dense_tensor(data: st.DataObject, dtype: torch.dtype) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=5)))
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    tensor = tensor_of(dtype, shape, order)
    if dtype.is_complex and data.draw(st.booleans()):
        tensor = tensor.conj()
    if dtype is not torch.bool and data.draw(st.integers(0, 3)) == 0:
        tensor = neg_view(tensor)
    check_item(tensor)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_dense_means_what_torch_means_by_it(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=4)))
    stride = tuple(data.draw(st.integers(0, 9)) for _ in shape)
    tensor = torch.empty(200).as_strided(shape, stride)
    # `clone` keeps the strides of dense tensors alone.
    if frame_of(tensor) is not None:
        clone = tensor.clone()
        assert clone.stride() == stride
        assert clone.untyped_storage().nbytes() == tensor.nbytes
    else:
        assert frame_of(tensor.clone()) is not None


def test_a_hundred_gigabytes_cost_nothing() -> None:
    for data_bytes in (2**32 - 1, 2**32, 100 << 30):
        frame = frame_for(torch.uint8, (data_bytes,))
        assert frame is not None
        assert frame.data_bytes == data_bytes
        assert len(frame.header) + len(frame.trailer) < 2000
        layout = parse_header(frame.header, frame.length)
        assert layout is not None
        assert (layout.data_offset, layout.data_bytes) == (len(frame.header), data_bytes)
        assert parse_header(frame.header, len(frame.header) + data_bytes - 1) is None


def test_frames_are_made_once_and_know_their_crcs() -> None:
    frame = frame_of(torch.randn(5, 3))
    assert frame is frame_of(torch.zeros(5, 3))
    assert frame is not None
    assert frame.header_crc == crc_of([memoryview(frame.header)])
    assert frame.trailer_crc == crc_of([memoryview(frame.trailer)])


@pytest.fixture
def alignment(request: pytest.FixtureRequest) -> Iterator[int]:
    before = config.save.storage_alignment
    config.save.storage_alignment = request.param
    yield request.param
    config.save.storage_alignment = before


@pytest.mark.parametrize("alignment", [128, 4096], indirect=True)
def test_the_configured_alignment_is_followed(alignment: int) -> None:
    tensor = torch.randn(4, 4)
    assert len(check_item(tensor).header) % alignment == 0


class Subclass(torch.Tensor):
    """What DCP meets as DTensor and its like."""


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3).as_subclass(Subclass),
        lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.empty(3, dtype=torch.bits8),
        lambda: torch.empty(3, dtype=vars(torch)["uint4"]),
        lambda: torch.empty(3, dtype=torch.float4_e2m1fn_x2),
        lambda: torch._efficientzerotensor(3),
        lambda: torch.randn(4, 4)[:, :2],
        lambda: torch.randn(4).expand(3, 4),
        lambda: torch.randn(9)[::2],
    ],
    ids=[
        *("subclass", "quantized", "sparse", "nested", "meta", "bits", "sub-byte", "packed"),
        *("zero-tensor", "gaps", "repeated", "steps"),
    ],
)
def test_what_has_no_frame(make: object) -> None:
    assert callable(make)
    assert frame_of(make()) is None


def test_without_a_frame_torch_saves() -> None:
    tensor = torch.eye(3).to_sparse()
    item = encode(tensor)
    assert bytes(item) == saved_as_is(tensor)
    assert parse_header(item, item.nbytes) is None
    assert torch.equal(decode(item).to_dense(), torch.eye(3))


def saved_as_is(tensor: torch.Tensor) -> bytes:
    sink = io.BytesIO()
    torch.save(tensor, sink)
    return sink.getvalue()


def test_decode_refuses_what_is_no_tensor() -> None:
    sink = io.BytesIO()
    torch.save({"a": 1}, sink)
    with pytest.raises(TypeError, match="holds a dict"):
        decode(sink.getbuffer())


def test_decode_copies_no_more_than_torch_does() -> None:
    tensor = torch.randn(1000, 1000)
    item = saved_as_is(tensor)
    tracemalloc.start()
    try:
        loaded = decode(memoryview(item))
        # torch's own allocations are not Python's, so a copy of the item would stand out.
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert torch.equal(loaded, tensor)


def test_source_is_a_file() -> None:
    source = _framing._Source(memoryview(b"0123456789"))
    assert (source.seekable(), source.readable(), source.tell()) == (True, True, 0)
    assert source.read(3) == b"012"
    assert (source.seek(-2, 2), source.read()) == (8, b"89")
    assert (source.seek(-4, 1), source.read(1)) == (6, b"6")
    assert (source.seek(50), source.read()) == (50, b"")


def test_memory_is_writable_and_shared() -> None:
    tensor = torch.zeros(3, 4, dtype=torch.int32)[1:]
    memory = memory_of(tensor)
    assert (memory.format, memory.itemsize, memory.nbytes) == ("B", 1, 32)
    memory[:4] = (7).to_bytes(4, "little")
    assert tensor[0, 0] == 7
    with pytest.raises(IndexError):
        memory[32]


def test_memory_keeps_its_storage_alive() -> None:
    tensor = torch.arange(1000)
    alive = weakref.ref(tensor)
    memory = memory_of(tensor)[8:16]
    del tensor
    gc.collect()
    assert alive() is not None
    assert memory == (1).to_bytes(8, "little")
    del memory
    assert alive() is None


def test_empty_memory_is_writable() -> None:
    memory = memory_of(torch.empty(0, 3))
    assert (memory.nbytes, memory.readonly) == (0, False)


def freed() -> torch.Tensor:
    tensor = torch.randn(10)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.randn(4, 4)[:, :2], "No plain memory"),
        (torch.empty(3, device="meta"), "No plain memory"),
        (freed(), "was freed"),
        (torch._efficientzerotensor(3), "was freed"),
    ],
    ids=["gaps", "meta", "freed", "zero-tensor"],
)
def test_no_memory(tensor: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        memory_of(tensor)


def test_a_torch_that_saves_differently_is_left_to_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def other(*_: object) -> object:
        return torch.zeros(2, 3, dtype=torch.int8)

    monkeypatch.setattr(_framing, "pickled_without_memory", other)
    _framing._frame.cache_clear()
    _framing._is_torch_save_understood.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "s3dcp.framing"):
            assert frame_of(torch.randn(3)) is None
            assert frame_of(torch.randn(4)) is None
        assert [record.levelname for record in caplog.records] == ["WARNING"]
    finally:
        _framing._frame.cache_clear()
        _framing._is_torch_save_understood.cache_clear()
