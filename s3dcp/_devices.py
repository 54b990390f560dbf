"""Tensors of devices: GPUs and other accelerators, by whatever name torch has for them.

Copies between them and the host return when they are done. Queued ones cannot be waited for on
every device, and have nothing to gain: what copies overlap with, requests, is another thread's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def is_host(tensor: torch.Tensor) -> bool:
    """Return whether the network can reach the tensor's memory."""
    return tensor.is_cpu


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor's memory as flat uint8, on the tensor's own device."""
    return tensor.reshape(-1).view(torch.uint8)


def host_memory(size_bytes: int, *, pinned: bool) -> torch.Tensor:
    """Return memory of the host, whatever the default device is. It is not zeroed.

    Args:
        size_bytes: Its size.
        pinned: Whether a device is to copy it at its bus's full speed, if that can be had. Torch
            then takes the next power of two.
    """
    empty = partial(torch.empty, size_bytes, dtype=torch.uint8, device="cpu")
    if pinned and _pins():
        # There may be no more to pin, or the device knows nothing of it.
        with contextlib.suppress(RuntimeError):
            return empty(pin_memory=True)
    return empty()


def on_this_device(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that runs on other threads as it does on this one.

    A new thread has the first device and its default stream: memory would be taken on a device that
    another rank has, and copies would not wait for what was queued before them.
    """
    if not _is_in_use():
        return function
    stream = torch.accelerator.current_stream()

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        torch.accelerator.set_stream(stream)
        return function(*args, **kwargs)

    return run


def _pins() -> bool:
    accelerator = torch.accelerator.current_accelerator()
    # On MPS, all memory is the host's.
    return accelerator is not None and accelerator.type != "mps"


def _is_in_use() -> bool:
    """Return whether this process has used an accelerator; asking that for its stream would."""
    accelerator = torch.accelerator.current_accelerator()
    module = getattr(torch, accelerator.type, None) if accelerator is not None else None
    is_initialized: Callable[[], bool] | None = getattr(module, "is_initialized", None)
    return is_initialized is not None and is_initialized()
