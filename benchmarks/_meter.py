"""Wall time, CPU time and memory of what happens inside a `with`. For the worker's process."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

if sys.platform != "win32":
    import resource

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class Meter:
    """Measures from `__enter__` to `__exit__`.

    Attributes:
        wall_s: How long it took.
        cpu_s: User and system time of this process and of children that have ended.
        peak_bytes: The highest resident memory less that at the start; None where the kernel
            does not tell, or does not let the mark be reset.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int | None

    def __enter__(self) -> Self:
        self._resident = _kernel_says("VmRSS") if _reset_high_water() else None
        self._cpu_s = _cpu_s()
        self._start_s = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.wall_s = time.perf_counter() - self._start_s
        self.cpu_s = _cpu_s() - self._cpu_s
        peak = _kernel_says("VmHWM")
        if self._resident is None or peak is None:
            self.peak_bytes = None
        else:
            self.peak_bytes = max(0, peak - self._resident)


def _cpu_s() -> float:
    if sys.platform == "win32":
        return time.process_time()
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _reset_high_water() -> bool:
    with suppress(OSError):
        _CLEAR.write_text("5")
        return True
    return False


def _kernel_says(field: str) -> int | None:
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
    return None
