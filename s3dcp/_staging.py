"""Host memory between a device and the network: reusable, and pinned for a device.

Pinned memory copies at the bus's full speed and is slow to allocate, so buffers are kept. All of it
is charged to the budget that the process's saves and loads share. What was pinned and is let go of,
torch keeps, by its size, for whoever pins next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch

from s3dcp._budget import budget
from s3dcp._collector import CollectorPause
from s3dcp._devices import host_memory
from s3dcp._framing import memory_of

#: Tensors up to this size are copied, one behind the other, when they are saved and when they are
#: loaded: that is quicker than a view, a checksum and a system call for each. They have no blocks.
COPIED_BYTES = 256 << 10

# Buffers are as large as the largest use so far within a factor: reuse beats a tight fit.
_GRAIN_BYTES = 1 << 20


class Buffer:
    """Some bytes of host memory.

    Attributes:
        held_bytes: The memory that is held for it, which is what it is charged.
        tensor: The memory, as a flat uint8 tensor.
        view: The same, as a memoryview.
    """

    __slots__ = ("_pinned", "_whole", "held_bytes", "tensor", "view")

    def __init__(self, whole: torch.Tensor, size_bytes: int, *, pinned: bool) -> None:
        self._whole = whole
        self._pinned = pinned
        self.held_bytes = whole.nbytes
        self.tensor = whole[:size_bytes]
        self.view = memory_of(self.tensor)

    def fits(self, size_bytes: int, *, pinned: bool) -> bool:
        """Tell whether it may be used for so many bytes."""
        most = max(2 * size_bytes, _GRAIN_BYTES)
        return self._pinned == pinned and size_bytes <= self.held_bytes <= most

    def cut(self, size_bytes: int) -> Buffer:
        """Return a buffer of `size_bytes` in the same memory."""
        return Buffer(self._whole, size_bytes, pinned=self._pinned)


class Memory:
    """What one save or load takes of the process's memory for buffers: a context.

    Belongs to the thread that drives the save or load. Buffers that were given back are kept, as
    pinned ones are slow to make, and stay charged; they go first when there is not enough.

    Args:
        limit_bytes: What all saves and loads of the process may hold when this one takes more.
        settle: Waits for a request of its own, which may give something back; False: there is none.
        pause: Lifted while others are waited for.
    """

    def __init__(self, limit_bytes: int, settle: Callable[[], bool], pause: CollectorPause) -> None:
        self._share = budget().share(limit_bytes)
        self._settle = settle
        self._pause = pause
        self._kept: list[Buffer] = []

    @property
    def held_bytes(self) -> int:
        """What it holds."""
        return self._share.held_bytes

    def __enter__(self) -> Self:
        self._share.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._kept.clear()
        self._share.__exit__()
        # Else its owner, and with it every tensor and plan, would wait for the garbage collector.
        self._settle = _nothing_is_under_way

    def take(self, size_bytes: int) -> None:
        """Take bytes, as soon as there is room or nothing that could be waited for."""
        while not self._try_take(size_bytes):
            pass

    def give(self, size_bytes: int) -> None:
        """Give bytes back."""
        self._share.give(size_bytes)

    def borrow(self, size_bytes: int, *, pinned: bool) -> Buffer:
        """Return a buffer, whose contents are whatever they are.

        Args:
            size_bytes: Its size.
            pinned: Whether a device will copy to it or from it.
        """
        if pinned:
            held_bytes = 1 << max(size_bytes - 1, 0).bit_length()  # which torch takes anyway
        else:
            held_bytes = max(-(-size_bytes // _GRAIN_BYTES), 1) * _GRAIN_BYTES
        while (kept := self._fitting(size_bytes, pinned=pinned)) is None:
            if self._try_take(held_bytes):
                # Not zeroed: a pass over the memory, and its pages, for nothing.
                whole = host_memory(held_bytes, pinned=pinned)
                return Buffer(whole, size_bytes, pinned=pinned)
        return kept.cut(size_bytes)

    def give_back(self, buffer: Buffer) -> None:
        """Take a buffer back. Nobody may use its views any more."""
        self._kept.append(buffer)

    def _fitting(self, size_bytes: int, *, pinned: bool) -> Buffer | None:
        for position, buffer in enumerate(self._kept):
            if buffer.fits(size_bytes, pinned=pinned):
                return self._kept.pop(position)
        return None

    def _try_take(self, size_bytes: int) -> bool:
        """Take bytes; or else wait once for what may make room, a buffer that comes back too."""
        if self._share.try_take(size_bytes):
            return True
        if self._kept:
            self._share.give(sum(buffer.held_bytes for buffer in self._kept))
            self._kept.clear()
            return False
        if self._settle():
            return False
        with self._pause.lifted():
            self._share.take(size_bytes)
        return True


def _nothing_is_under_way() -> bool:
    return False
