"""`python -m benchmarks._worker`: measures backends in a process of its own.

Every line of standard input is a JSON object: what to `do`, and the arguments. Every answer is a
line of JSON: what was measured, or an `error`. The end of the input is the end of the worker.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TextIO

from benchmarks import _backends, _pieces, _states
from benchmarks._backends import Backend, Dcp
from benchmarks._figures import percentile
from benchmarks._meter import Meter
from benchmarks._ticks import around, ticks
from benchmarks._values import Shape

Answer = dict[str, Any]


class Worker:
    """What a worker can do, by name. State dicts are made once, and tensors are loaded in place."""

    def __init__(self) -> None:
        self._backends: dict[str, Backend] = {}
        self._states: dict[Shape, _states.State] = {}
        self._device = "cpu"

    def enter(self, environ: dict[str, str], *, device: str, quick: bool) -> Answer:
        """Go to another server, with tensors on a device."""
        os.environ.update(environ)
        self._backends.clear()
        if device != self._device:
            self._device = device
            self._states.clear()
        if quick:  # a full collection of all that torch made takes longer than the rest
            gc.freeze()
        return {}

    def prepare(self, backend: str, shape: list[int] | None) -> Answer:
        """Make the state dict and import what the backend needs."""
        self._backend(backend)
        if shape is not None:
            self._state(shape)
        gc.collect()  # later on it runs when it is due, as in a program
        return {}

    def save(self, backend: str, shape: list[int], name: str, *, keep: bool) -> Answer:
        """Save a state dict."""
        state, chosen = self._state(shape), self._backend(backend)
        measured = _measured(_states.nbytes(state), chosen.saving(state, name, keep=keep))
        if keep:
            gc.collect()  # as above: that was to have what loads need
        else:
            chosen.tidy(name)
        return measured

    def load(
        self, backend: str, shape: list[int], name: str, *, tenth: bool, verify: bool
    ) -> Answer:
        """Load a kept state dict, or every tenth tensor of it."""
        state = self._state(shape)
        if tenth:
            state = _states.every_tenth(state)
        expected = _states.digests(state) if verify else None
        _states.blank(state)
        measured = _measured(_states.nbytes(state), self._backend(backend).loading(state, name))
        if expected is not None and _states.digests(state) != expected:
            raise AssertionError(f"{backend} did not bring back what it saved")
        return measured

    def save_pieces(self, backend: str, nbytes: int, pieces: int, name: str) -> Answer:
        """Save one tensor in row-wise pieces."""
        state = {"weight": _pieces.cut(_pieces.whole(nbytes), pieces)}
        return _measured(nbytes, self._backend(backend).saving(state, name, keep=True))

    def load_piece(self, backend: str, nbytes: int, pieces: int, piece: int, name: str) -> Answer:
        """Load one row-wise piece of that tensor, and verify it."""
        expected = _pieces.whole(nbytes)
        rows = expected.shape[0]
        first, last = _pieces.edges(rows, pieces)[piece]
        target = expected[first:last].clone().zero_()
        state = {"weight": _pieces.RowPieces(rows, {first: target})}
        measured = _measured(target.nbytes, self._backend(backend).loading(state, name))
        if _states.digests({"": target}) != _states.digests({"": expected[first:last]}):
            raise AssertionError(f"{backend} loaded other rows than those that were saved")
        return measured

    def disturb(self, backend: str, shape: list[int], name: str) -> Answer:
        """Save on a thread, and tell how late a 1 ms ticker in this one is meanwhile."""
        chosen = self._backend(backend)
        assert isinstance(chosen, Dcp)
        gc.collect()  # so that none that was due anyway comes in between
        saving = chosen.saving_soon(self._state(shape), name)
        late_s = ticks(saving.done)
        saving.result()
        return _lateness(late_s)

    def idle(self, backend: str, ticks_count: int) -> Answer:  # noqa: ARG002 - nothing runs
        """Tell how late the ticker is while nothing else runs."""
        left = iter(range(ticks_count))
        return _lateness(ticks(lambda: next(left, None) is None))

    def block(self, backend: str, shape: list[int], name: str, *, loads: bool) -> Answer:
        """Tell how long the loop thread is blocked at most, during a save or a load."""
        state, chosen = self._state(shape), self._backend(backend)
        work = (
            chosen.loading(state, name) if loads else chosen.saving(state, f"{name}-b", keep=False)
        )
        gc.collect()
        wall_s, cpu_s = around(work)
        return {"wall_s": wall_s, "cpu_s": cpu_s}

    def _backend(self, name: str) -> Backend:
        if name not in self._backends:
            self._backends[name] = _backends.make(name)
        return self._backends[name]

    def _state(self, shape: list[int]) -> _states.State:
        known = Shape(*shape)
        if known not in self._states:
            self._states[known] = _states.make(known, self._device)
        return self._states[known]


def _measured(nbytes: int, work: Callable[[], object]) -> Answer:
    with Meter() as meter:
        work()
    return {
        "wall_s": meter.wall_s,
        "cpu_s": meter.cpu_s,
        "nbytes": nbytes,
        "peak_bytes": meter.peak_bytes,
    }


def _lateness(late_s: list[float]) -> Answer:
    return {
        "p50_s": percentile(late_s, 0.50),
        "p99_s": percentile(late_s, 0.99),
        "worst_s": max(late_s),
        "ticks": len(late_s),
    }


def main() -> None:
    """Answer until the input ends."""
    answers = _take_stdout()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except BaseException:  # noqa: BLE001 - it is the driver's to judge; DCP's are no Exception
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _take_stdout() -> TextIO:
    """Keep standard output to the answers: what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


if __name__ == "__main__":
    main()
