"""Run as a script by tests/test_interrupts.py: calls in a hot loop, interrupted again and again.

It does not import torch. Every interrupt comes at a moment of its own, and only when the one before
it has been caught.
"""

from __future__ import annotations

import asyncio
import faulthandler
import queue
import random
import signal
import sys
from collections.abc import Callable

from s3dcp._calls import Call
from s3dcp._portal import Calls, Portal, offload

INTERRUPTS = 300


class Target:
    """Memory that the loop writes to.

    Attributes:
        written: How often.
        held: How many calls are not done with it.
    """

    def __init__(self) -> None:
        self.written = 0
        self.held = 0


async def write(target: Target) -> None:
    target.held += 1
    try:
        for _ in range(4):
            target.written += 1
            await asyncio.sleep(0)
        if target.written % 16 == 0:
            await offload(int)
            target.written += 1
    finally:
        try:
            await asyncio.sleep(0)
        finally:
            target.held -= 1


async def touch(target: Target) -> None:
    target.written += 1


def by_short_call(here: Portal, target: Target) -> None:
    here.call(touch, target)


def by_call(here: Portal, target: Target) -> None:
    here.call(write, target)


def by_submission(here: Portal, target: Target) -> None:
    calls = Calls(here)
    ended: queue.SimpleQueue[Call[None]] = queue.SimpleQueue()
    tidied = []

    async def tidy() -> None:
        tidied.append(target.held)

    try:
        for _ in range(3):
            calls.submit(write, target).add_done_callback(ended.put)
        for _ in range(3):
            ended.get().result()
    except BaseException:
        calls.abandon(tidy)
        assert tidied == [0]
        raise


USES = (by_short_call, by_call, by_submission)


async def tasks() -> int:
    return len(asyncio.all_tasks())


def main(loop_factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    here = Portal(loop_factory)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    moments = random.Random(1)
    made = 0
    seen: list[tuple[Target, int]] = []
    while len(seen) < INTERRUPTS:
        use = USES[len(seen) % len(USES)]
        target = Target()
        try:
            # By the kernel, which stops at any instruction. A thread could only send a signal while
            # it has the GIL: when this one is at one of the few places where it lets go of it.
            signal.setitimer(signal.ITIMER_REAL, 0.0001 + moments.random() * 0.003)
            while True:
                made += 1
                use(here, target)
        except KeyboardInterrupt:
            assert not target.held
            seen.append((target, target.written))
    assert all(target.written == written for target, written in seen)
    assert here.call(tasks) == 1
    assert not here._calls
    here.close()
    assert made >= INTERRUPTS
    sys.stdout.write(f"{len(seen)} interrupts\n")


if __name__ == "__main__":
    faulthandler.dump_traceback_later(190, exit=True)
    if sys.argv[1] == "asyncio":
        main(asyncio.new_event_loop)
    else:
        import uvloop

        main(uvloop.new_event_loop)
