"""State dicts of bytes that tell tensors apart, and how to tell whether they came back."""

from __future__ import annotations

import zlib

import torch

from benchmarks._values import Shape

_COLUMNS = 1024

State = dict[str, torch.Tensor]


def make(shape: Shape, device: str = "cpu") -> State:
    """Return float32 tensors of rows of 4 KiB, no two alike, all in a device's memory."""
    words = shape.nbytes // 8
    generator = torch.Generator().manual_seed(words)
    base = torch.randint(-(1 << 62), 1 << 62, (words,), generator=generator)
    return {
        f"layers.{number}.weight": _rows(base ^ number).to(device) for number in range(shape.count)
    }


def every_tenth(state: State) -> State:
    """Return the tensors 0, 10, 20 and so on."""
    return dict(list(state.items())[::10])


def nbytes(state: State) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state.values())


def memory(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous tensor's own memory."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def digests(state: State) -> dict[str, int]:
    """Return a checksum of each tensor."""
    return {name: zlib.crc32(memory(tensor.cpu())) for name, tensor in state.items()}


def blank(state: State) -> None:
    """Overwrite every tensor, so that what a load did not write is seen."""
    for tensor in state.values():
        tensor.zero_()


def _rows(words: torch.Tensor) -> torch.Tensor:
    return words.view(torch.float32).view(-1, _COLUMNS)
