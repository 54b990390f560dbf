"""What a save or load has of the process's memory: taken, given back, and used again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from s3dcp._budget import budget
from s3dcp._collector import CollectorPause
from s3dcp._staging import Buffer, Memory
from tests._states import MiB

LIMIT_BYTES = 8 * MiB


class Requests:
    """Requests under way, each of which holds a buffer until it is waited for."""

    def __init__(self) -> None:
        self.held: list[Buffer] = []
        self.give_back: Callable[[Buffer], None]

    def settle(self) -> bool:
        if not self.held:
            return False
        self.give_back(self.held.pop(0))
        return True


@pytest.fixture
def requests() -> Requests:
    return Requests()


@pytest.fixture
def memory(requests: Requests) -> Memory:
    memory = Memory(LIMIT_BYTES, requests.settle, CollectorPause())
    requests.give_back = memory.give_back
    return memory


def address(buffer: Buffer) -> int:
    return buffer.tensor.data_ptr()


def test_what_comes_back_while_it_is_waited_for_is_used_again(
    memory: Memory, requests: Requests
) -> None:
    """And not made anew: pinned memory takes long to make, and what malloc gets back, it splits."""
    with memory:
        requests.held = [memory.borrow(2 * MiB, pinned=False) for _ in range(4)]
        first = address(requests.held[0])

        again = memory.borrow(2 * MiB - 5, pinned=False)

        assert address(again) == first
        assert len(again.view) == 2 * MiB - 5
        assert memory.held_bytes == LIMIT_BYTES


def test_what_does_not_fit_makes_room(memory: Memory, requests: Requests) -> None:
    with memory:
        requests.held = [memory.borrow(2 * MiB, pinned=False) for _ in range(4)]

        large = memory.borrow(3 * MiB, pinned=False)

        assert large.held_bytes == 3 * MiB
        assert memory.held_bytes == 2 * 2 * MiB + 3 * MiB
        assert len(requests.held) == 2


def test_much_smaller_uses_take_no_large_buffer(memory: Memory) -> None:
    with memory:
        memory.give_back(memory.borrow(4 * MiB, pinned=False))

        assert memory.borrow(MiB, pinned=False).held_bytes == MiB
        assert memory.borrow(2 * MiB, pinned=False).held_bytes == 4 * MiB


def test_more_than_there_is_comes_with_nothing_to_wait_for(memory: Memory) -> None:
    with memory:
        assert memory.borrow(LIMIT_BYTES + 1, pinned=False).held_bytes == LIMIT_BYTES + MiB
    assert budget().held_bytes == 0


def test_bytes_without_a_buffer(memory: Memory, requests: Requests) -> None:
    with memory:
        memory.take(LIMIT_BYTES - MiB)
        requests.held = [memory.borrow(MiB, pinned=False)]
        memory.take(MiB)
        assert memory.held_bytes == LIMIT_BYTES
        assert not requests.held
        memory.give(LIMIT_BYTES)
        assert memory.held_bytes == 0
