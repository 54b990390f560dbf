"""Turns: requests one at a time, bodies behind those that were there before them."""

from __future__ import annotations

import asyncio

from s3dcp._turns import Turns


def test_bodies_wait_for_the_requests_before_them() -> None:
    told: list[str] = []

    async def request(turns: Turns, name: str) -> None:
        await turns.make()
        told.append(f"{name} made")
        await turns.send()
        told.append(f"{name} sent")

    async def scenario() -> None:
        turns = Turns()
        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(request(turns, name))

    asyncio.run(scenario())
    assert told[:3] == ["a made", "b made", "c made"]
    assert sorted(told[3:]) == ["a sent", "b sent", "c sent"]


def test_a_body_does_not_wait_for_later_requests() -> None:
    async def scenario() -> None:
        turns = Turns()
        early = asyncio.create_task(turns.make())
        await asyncio.sleep(0)
        body = asyncio.create_task(turns.send())
        await asyncio.sleep(0)
        late = [asyncio.create_task(turns.make()) for _ in range(5)]
        await body
        assert early.done()
        assert not late[-1].done()
        await asyncio.gather(*late)

    asyncio.run(scenario())


def test_a_request_that_is_given_up_holds_up_no_body() -> None:
    async def scenario() -> None:
        turns = Turns()
        requests = [asyncio.create_task(turns.make()) for _ in range(3)]
        await asyncio.sleep(0)
        bodies = [asyncio.create_task(turns.send()) for _ in range(2)]
        await asyncio.sleep(0)
        requests[1].cancel()
        bodies[0].cancel()
        async with asyncio.timeout(60):
            await bodies[1]
        assert bodies[0].cancelled()

    asyncio.run(scenario())
