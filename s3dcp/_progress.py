"""How far a save or a load is: counted always, shown to whoever wants to see it.

What is counted are bytes of items whose requests have ended well. What is shown are also those of
requests under way, most of them: what was sent may still be on its way, and what has come may be
wrong. A retry takes nothing back from what was shown: it is shown again when it is more.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

from s3dcp._errors import S3ConfigError

_log = logging.getLogger("s3dcp.progress")

# A callback is called so often, and so that it takes no more than this share of the time.
_INTERVAL_S = 0.1
_MAX_SHARE = 0.05
# So much of what is under way is shown: the rest when its request has ended well.
_SHOWN_SHARE = 0.95


class ProgressCallback(Protocol):
    """Is told how far a save or a load is, on the thread that saves or loads.

    Called every 0.1 s at the most, less often where it takes its time (it gets a twentieth), and
    once with the exact numbers when all bytes are done. What it raises is logged and ends nothing;
    it is not called again then.
    """

    def __call__(self, done_bytes: int, total_bytes: int, /) -> object:
        """Take note.

        Args:
            done_bytes: Of this rank's items, as they are stored, those under way among them. Never
                less than before.
            total_bytes: Of all of them. An estimate while a save has not come to its last item.
        """


class Meter:
    """Counts the bytes of a rank's items. Belongs to the thread that saves or loads.

    Args:
        clock: Seconds; injected by tests.

    Attributes:
        done_bytes: Those whose requests have ended well.
        total_bytes: Those that are expected.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.done_bytes = self.total_bytes = 0
        self._clock = clock
        self._callback: ProgressCallback | None = None
        self._next_s = 0.0
        self._told: tuple[int, int] | None = None
        self._shown_bytes = 0
        self._under_way: Callable[[], int] = int

    def show(self, callback: ProgressCallback | None) -> None:
        """Tell `callback` from now on."""
        self._callback = callback
        self._next_s = self._clock()

    def watch(self, under_way: Callable[[], int]) -> None:
        """Ask from now on how many bytes are done of the requests that have not ended."""
        self._under_way = under_way

    def look(self) -> None:
        """Tell what has become of the requests that are under way."""
        self._tell()

    def expect(self, size_bytes: int) -> None:
        """Add to what is expected."""
        self.total_bytes += size_bytes
        self._tell()

    def advance(self, size_bytes: int) -> None:
        """Add to what is done."""
        self.done_bytes += size_bytes
        self._tell()

    def finish(self) -> None:
        """Tell of the end, at which all is done that was expected."""
        self._under_way = int
        if self._told != (self.done_bytes, self.total_bytes):
            self._next_s = self._clock()
            self._tell()

    def _tell(self) -> None:
        if self._callback is None or (started_s := self._clock()) < self._next_s:
            return
        shown = self.done_bytes + int(_SHOWN_SHARE * self._under_way())
        self._shown_bytes = max(self._shown_bytes, shown)
        self._told = self._shown_bytes, max(self.total_bytes, self._shown_bytes)
        try:
            self._callback(*self._told)
        except Exception:  # noqa: BLE001 - a checkpoint is worth more than the look of it
            _log.warning("the progress callback failed, and is not called again", exc_info=True)
            self._callback = None
        ended_s = self._clock()
        self._next_s = ended_s + max(_INTERVAL_S, (ended_s - started_s) / _MAX_SHARE)


class Bar:
    """A progress bar: in a notebook, or on standard error where that is a terminal.

    Args:
        title: What stands in front of it.

    Raises:
        S3ConfigError: tqdm is not installed.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._make, self._in_notebook = _tqdm()
        self._bar: Any = None

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """Show how far it is."""
        if self._bar is None:
            self._bar = self._make(
                desc=self._title,
                total=total_bytes,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                # A notebook's output is no terminal; tqdm is silent on what is none.
                disable=False if self._in_notebook else None,
            )
        self._bar.total = total_bytes
        self._bar.update(done_bytes - self._bar.n)

    def close(self) -> None:
        """Leave it as it is. Idempotent."""
        if self._bar is not None:
            self._bar.close()


def check_progress(progress: object) -> None:
    """Check what a user asks for.

    Raises:
        S3ConfigError: neither a boolean nor a callable, or a bar without tqdm.
    """
    if progress is True:
        _tqdm()
    elif progress is not False and not callable(progress):
        raise S3ConfigError(
            "progress must be True for a bar, False, or a callable that takes the bytes done and "
            f"the bytes in all, got {progress!r}"
        )


def _tqdm() -> tuple[Callable[..., Any], bool]:
    """Return tqdm's class for where this runs, and whether that is a notebook."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a notebook without widgets: it gets a bar of text
            from tqdm.auto import tqdm
    except ImportError as exc:
        raise S3ConfigError(
            'progress=True needs tqdm: pip install "s3dcp[cli]", or pass a callable as progress'
        ) from exc

    class Quiet(tqdm):  # type: ignore[type-arg]  # generic in its stubs alone
        monitor_interval = 0  # no thread that looks after bars

    return Quiet, _in_notebook()


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")
