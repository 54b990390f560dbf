"""One tensor in row-wise pieces, of which this process has some: what a DTensor is on a rank.

DCP asks a sharded tensor three things, by methods that it looks for. Answering them here makes
every rank's share of a resharding load in one process, without a process group.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Self

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

_COLUMNS = 1024


def edges(rows: int, pieces: int) -> list[tuple[int, int]]:
    """Cut rows into pieces of nearly equal size, as half-open ranges."""
    return list(pairwise(rows * number // pieces for number in range(pieces + 1)))


class RowPieces(torch.Tensor):
    """A tensor of which there are these pieces, by their first row."""

    pieces: dict[int, torch.Tensor]

    @staticmethod
    def __new__(cls: type[Self], rows: int, pieces: dict[int, torch.Tensor]) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001 - torch documents it
            cls, (rows, _COLUMNS), dtype=torch.float32
        )
        made.pieces = pieces
        return made

    def __init__(self, rows: int, pieces: dict[int, torch.Tensor]) -> None:
        """All is done by `__new__`."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as a plain method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse arithmetic: there is none to do."""
        raise NotImplementedError(f"{func} on a tensor in pieces")

    def __create_write_items__(self, fqn: str, tensor: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties.create_from_tensor(piece),
                    size=self.size(),
                ),
            )
            for chunk, piece in zip(self.__create_chunk_list__(), self.pieces.values(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size((first, 0)), sizes=piece.size())
            for first, piece in self.pieces.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.pieces[index.offset[0]]


def whole(nbytes: int) -> torch.Tensor:
    """Return a tensor of that size whose every row differs from every other."""
    count = nbytes // 4
    return torch.arange(count, dtype=torch.int32).view(torch.float32).view(-1, _COLUMNS)


def cut(tensor: torch.Tensor, pieces: int) -> RowPieces:
    """Return a tensor with all its pieces."""
    rows = tensor.shape[0]
    return RowPieces(rows, {first: tensor[first:last] for first, last in edges(rows, pieces)})
