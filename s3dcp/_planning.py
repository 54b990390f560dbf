"""Python's garbage collector, held back while DCP plans, which nothing but its own calls show.

A plan is some 40 objects for every tensor, all of which stay until the save or load is done. Python
takes them for a reason to walk every object of the process, again and again: a quarter of the time
that 5,000 small tensors take.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from s3dcp._collector import CollectorPause
from s3dcp._errors import PortalError
from s3dcp._portal import portal

# Longer than DCP takes to plan for 200,000 tensors.
_LONGEST_S = 60.0


class PlanningPause:
    """A pause of the collector from one call of DCP's to a later one.

    That one may never come: when the planner or another rank fails, DCP does not say so. Then the
    pause ends by itself, a minute after it began.
    """

    def __init__(self) -> None:
        self._begun: tuple[CollectorPause, Callable[[], object]] | None = None

    def begin(self) -> None:
        """Begin it, unless nothing would end it."""
        self.end()
        with suppress(PortalError):
            pause = CollectorPause()
            self._begun = pause, portal().call_later(_LONGEST_S, pause.__exit__)
            pause.__enter__()

    def end(self) -> None:
        """End it, if it has begun."""
        begun, self._begun = self._begun, None
        if begun is not None:
            pause, take_back = begun
            pause.__exit__()
            take_back()
