"""Every private name of torch that s3dcp leans on, in one place.

`tests/test_torch_internals.py` pins the sources of these and of the methods that s3dcp overrides
or reimplements, so that a new torch fails loudly instead of writing other bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed._shard.sharded_tensor.metadata import (
    TensorProperties as LegacyTensorProperties,
)
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import (
    CURRENT_DCP_VERSION,
    _split_by_size_and_type,
    _StorageInfo,
    _StorageReaderTransforms,
    _StorageWriterTransforms,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "CURRENT_DCP_VERSION",
    "LegacyTensorProperties",
    "_StorageInfo",
    "_StorageReaderTransforms",
    "_StorageWriterTransforms",
    "_split_by_size_and_type",
    "is_zero_tensor",
    "narrow_tensor_by_index",
    "neg_view",
    "pickled_without_memory",
    "set_element",
]

#: A view of a tensor with its negative bit flipped; no public function sets the bit.
neg_view = cast("Callable[[torch.Tensor], torch.Tensor]", torch._neg_view)  # noqa: SLF001


def is_zero_tensor(tensor: torch.Tensor) -> bool:
    """Tell whether autograd made the tensor of nothing but a shape, with no memory behind it."""
    return tensor._is_zerotensor()  # noqa: SLF001


class _Reduced:
    def __init__(self, reduced: tuple[object, ...]) -> None:
        self._reduced = reduced

    def __reduce_ex__(self, _protocol: object) -> tuple[object, ...]:
        return self._reduced


def pickled_without_memory(
    like: torch.Tensor, shape: tuple[int, ...], stride: tuple[int, ...], data_bytes: int
) -> object:
    """Return an object that `torch.save` under `skip_data` writes like a tensor on the CPU.

    An empty tensor's own reduction is taken, and its storage replaced by one on the meta device
    that names the CPU as its device: this is how `skip_data` materializes fake tensors. Making a
    FakeTensor for it would take 0.4 ms each, and 0.6 s for the first.

    Args:
        like: An empty CPU tensor of the dtype and the conj and neg bits.
        shape: The shape to write.
        stride: The strides to write.
        data_bytes: The size of the storage to write.
    """
    untyped: Any = torch  # its storages and reductions have no annotations
    reduced: tuple[object, tuple[object, ...]] = untyped.Tensor.__reduce_ex__(like, 2)
    rebuild, (storage, _offset, _shape, _stride, *rest) = reduced
    sized = untyped.UntypedStorage(data_bytes, device="meta")
    if isinstance(storage, untyped.storage.TypedStorage):
        sized = untyped.storage.TypedStorage(wrap_storage=sized, dtype=like.dtype, _internal=True)
    sized._fake_device = "cpu"  # noqa: SLF001
    return _Reduced((rebuild, (sized, 0, shape, stride, *rest)))
