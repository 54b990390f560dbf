"""Host memory between a device and the network: reusable, and pinned where there is a GPU.

Pinned memory copies at the bus's full speed and is slow to allocate, so buffers are kept. A pool
belongs to one save or load and to the thread that drives it; what it hands out is charged to a
budget there.
"""

from __future__ import annotations

import torch

from s3dcp._framing import memory_of

# Buffers are as large as the largest use so far within a factor: reuse beats a tight fit.
_GRAIN_BYTES = 1 << 20


class Buffer:
    """Some bytes of host memory.

    Attributes:
        held_bytes: The memory that is held for it, which is what it is charged.
        tensor: The memory, as a flat uint8 tensor.
        view: The same, as a memoryview.
    """

    __slots__ = ("_whole", "held_bytes", "tensor", "view")

    def __init__(self, whole: torch.Tensor, size_bytes: int) -> None:
        self._whole = whole
        self.held_bytes = whole.nbytes
        self.tensor = whole[:size_bytes]
        self.view = memory_of(self.tensor)


class BufferPool:
    """Hands out host buffers and takes them back.

    Args:
        pinned: Whether a device will copy to or from them.
        max_kept_bytes: Bytes that are kept for reuse.
    """

    def __init__(self, *, pinned: bool, max_kept_bytes: int) -> None:
        self._pinned = pinned and torch.cuda.is_available()
        self._max_kept_bytes = max_kept_bytes
        self._kept: list[torch.Tensor] = []
        self._kept_bytes = 0

    def take(self, size_bytes: int) -> Buffer:
        """Return a buffer of `size_bytes`, whose contents are whatever they are."""
        for position, whole in enumerate(self._kept):
            if size_bytes <= whole.nbytes <= max(2 * size_bytes, _GRAIN_BYTES):
                del self._kept[position]
                self._kept_bytes -= whole.nbytes
                return Buffer(whole, size_bytes)
        # None fits: what is kept makes room for what is needed.
        self._kept.clear()
        self._kept_bytes = 0
        grains = max(-(-size_bytes // _GRAIN_BYTES), 1)
        # Not zeroed: a pass over the memory, and its pages, for nothing.
        whole = torch.empty(grains * _GRAIN_BYTES, dtype=torch.uint8, pin_memory=self._pinned)
        return Buffer(whole, size_bytes)

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back. Nobody may use its views any more."""
        whole = buffer._whole  # noqa: SLF001
        if self._kept_bytes + whole.nbytes <= self._max_kept_bytes:
            self._kept.append(whole)
            self._kept_bytes += whole.nbytes


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor's memory as flat uint8, on the tensor's own device."""
    return tensor.reshape(-1).view(torch.uint8)


def is_host(tensor: torch.Tensor) -> bool:
    """Return whether the network can reach the tensor's memory."""
    return tensor.is_cpu


def wait_for_copies(tensor: torch.Tensor) -> None:
    """Wait for copies from or to the tensor's device that were queued by this thread."""
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
