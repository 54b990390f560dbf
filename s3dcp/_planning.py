"""Python's garbage collector, held back while DCP plans, which nothing but its own calls show.

A plan is some 40 objects for every tensor, all of which stay until the save or load is done. Python
takes them for a reason to walk every object of the process, again and again: a quarter of the time
that a save or load of 5,000 small tensors takes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from s3dcp._collector import CollectorPause
from s3dcp._errors import PortalError
from s3dcp._portal import portal

# What DCP takes to plan for some 50,000 tensors.
_LONGEST_S = 5.0


class PlanningPause:
    """A pause of the collector from one call of DCP's to a later one.

    That one may never come: when the planner or another rank fails, DCP does not say so. Then the
    pause ends by itself some seconds after it began. Nor is there one for waiting: for other ranks,
    or in several saves and loads one after another that DCP gives up.
    """

    def __init__(self) -> None:
        self._begun: tuple[CollectorPause, Callable[[], object]] | None = None

    def begin(self) -> None:
        """Begin it, unless there is one in the process already, or nothing would end it."""
        global _last  # noqa: PLW0603 - the collector is the process's, too
        if _last is not None and _last.is_in_force:
            return
        with suppress(PortalError):
            _last = pause = CollectorPause()
            self._begun = pause, portal().call_later(_LONGEST_S, pause.__exit__)
            pause.__enter__()

    def end_if_others_plan(self) -> None:
        """End it where this rank has planned, and others may not have."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.end()

    def end(self) -> None:
        """End it, if it has begun."""
        begun, self._begun = self._begun, None
        if begun is not None:
            pause, take_back = begun
            pause.__exit__()
            take_back()


_last: CollectorPause | None = None
