"""How many requests a key prefix bears at once, learned from the store's own throttling.

Decided here, waited for in `_flow`. S3 spreads the key space over partitions, by how keys begin,
and limits the requests to each. It does not tell where partitions end. So requests are counted by
bucket and key up to the last `/`: the prefixes of the strategies (`{digits}/[epoch_{n}/]__{rank}_`)
are apart, and so is `.metadata`, whose commit does not queue up behind data. Where that cuts finer
than the store does, each prefix learns the same by itself; the other way round, the throttling of
one would slow down others that are served.

A prefix has no limit until it is throttled. From then on additive increase, multiplicative
decrease, as TCP's congestion window:

| answer                                        | the prefix's limit                               |
|-----------------------------------------------|--------------------------------------------------|
| throttled                                     | half of what was under way, at least 1           |
| served, with as many under way as are allowed | 1 / limit more: 1 for a whole window of answers  |
| any other end                                 | stays                                            |
| to a request from before the last halving     | stays: one burst is one halving                  |

After a minute without requests a prefix is forgotten.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any, Generic, TypeVar

from s3dcp._keys import S3Uri

W = TypeVar("W")

#: Longer than the longest delay between two attempts, so that a limit outlives its retries.
FORGET_S = 60.0
_MAX_RESTING = 1024

Prefix = tuple[str, str]


def prefix_of(uri: S3Uri) -> Prefix:
    """Return the bucket and what a key shares with those that are throttled along with it."""
    return uri.bucket, uri.key.rpartition("/")[0]


class Answer(Enum):
    """What the end of a request says of its prefix."""

    SERVED = auto()
    THROTTLED = auto()
    NOTHING = auto()


class Turn:
    """The right of one request to be under way.

    Attributes:
        lane: Its prefix.
        cuts: How often the limit had been halved when it was given.
        crowd: How many were under way then, this one included.
    """

    __slots__ = ("crowd", "cuts", "lane")

    def __init__(self, lane: Lane[Any]) -> None:
        self.lane = lane
        self.cuts = lane.cuts
        self.crowd = lane.under_way


class Queue(Generic[W]):
    """Those who wait: first what is tried again, then what has not been tried, each in order.

    What has failed once has a deadline, and must not spend it behind what has none yet.
    """

    __slots__ = ("_first_tries", "_retries")

    def __init__(self) -> None:
        self._retries: deque[W] = deque()
        self._first_tries: deque[W] = deque()

    def __bool__(self) -> bool:
        return bool(self._retries or self._first_tries)

    def put(self, waiter: W, *, retry: bool) -> None:
        """Add one at the end of its kind."""
        (self._retries if retry else self._first_tries).append(waiter)

    def pop(self) -> W:
        """Remove and return who is next."""
        return (self._retries or self._first_tries).popleft()


class Lane(Generic[W]):
    """One prefix. `Lanes` knows when it may be changed."""

    __slots__ = ("cuts", "limit", "prefix", "rests_since_s", "under_way", "waiting")

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self.limit = math.inf
        self.under_way = 0
        self.cuts = 0
        self.waiting: Queue[W] = Queue()
        self.rests_since_s = 0.0

    def take(self) -> Turn:
        """Count one more."""
        self.under_way += 1
        return Turn(self)

    def end(self, turn: Turn, answer: Answer) -> None:
        """Count one less, and learn from its answer."""
        if turn.cuts == self.cuts:
            if answer is Answer.THROTTLED:
                # Answers to a burst come one by one: the most that is known of it counts.
                crowd = max(turn.crowd, self.under_way)
                self.limit = max(1.0, min(self.limit, crowd) / 2)
                self.cuts += 1
            elif answer is Answer.SERVED and self.under_way + 1 > self.limit:
                self.limit += 1 / self.limit
        self.under_way -= 1

    def admit(self) -> list[tuple[W, Turn]]:
        """Give turns to those who are next, as far as there is room."""
        given: list[tuple[W, Turn]] = []
        while self.waiting and self.under_way + 1 <= self.limit:
            given.append((self.waiting.pop(), self.take()))
        return given


class Lanes(Generic[W]):
    """The prefixes of one endpoint, and who waits for them, in order.

    Nobody waits where there is room: every call that makes room gives it away.

    Args:
        clock: Seconds; injected by tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Prefixes with requests under way; and the limits of those without, longest idle first.
        self._busy: dict[Prefix, Lane[W]] = {}
        self._resting: OrderedDict[Prefix, Lane[W]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._busy) + len(self._resting)

    def limit_of(self, prefix: Prefix) -> float:
        """Return how many may be under way; infinity where nothing was throttled."""
        lane = self._busy.get(prefix) or self._resting.get(prefix)
        return math.inf if lane is None else lane.limit

    def enter(self, prefix: Prefix) -> Turn | None:
        """Return a turn, or None where there is no room; then `wait`."""
        lane = self._busy.get(prefix)
        if lane is None:
            lane = self._busy[prefix] = self._found(prefix)
        return lane.take() if lane.under_way + 1 <= lane.limit else None

    def wait(self, prefix: Prefix, waiter: W, *, retry: bool = False) -> None:
        """Queue a waiter up for a prefix, which has no room."""
        self._busy[prefix].waiting.put(waiter, retry=retry)

    def leave(self, turn: Turn, answer: Answer) -> Sequence[tuple[W, Turn]]:
        """End a turn; return those who waited and have theirs now, in order.

        Who does not want it any more gives it back by another `leave`.
        """
        lane = turn.lane
        lane.end(turn, answer)
        given = lane.admit() if lane.waiting else ()
        if not lane.under_way:
            del self._busy[lane.prefix]
            if lane.limit < math.inf:
                self._rest(lane)
        return given

    def _found(self, prefix: Prefix) -> Lane[W]:
        lane = self._resting.pop(prefix, None) if self._resting else None
        if lane is None or self._is_old(lane):
            return Lane(prefix)
        return lane

    def _rest(self, lane: Lane[W]) -> None:
        lane.rests_since_s = self._clock()
        self._resting[lane.prefix] = lane
        while len(self._resting) > _MAX_RESTING or self._is_old(next(iter(self._resting.values()))):
            self._resting.popitem(last=False)

    def _is_old(self, lane: Lane[W]) -> bool:
        return self._clock() - lane.rests_since_s >= FORGET_S
