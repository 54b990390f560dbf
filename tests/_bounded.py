"""Hostile bytes, tried where they can do no harm: in a process with little memory and time."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from s3dcp._errors import CorruptMetadataError
from s3dcp._landing import tensor_of
from s3dcp._metadata import load_metadata

#: Beyond what the process has when it is started.
MEMORY_BYTES = 256 << 20
CPU_S = 10

# A fork goes from case to case until one ends it; another then goes on behind that.
_PROGRAM = f"""
import importlib, os, pickle, resource, sys
module, memory_bytes, cases = pickle.load(sys.stdin.buffer)
module = importlib.import_module(module)
pages = int(open("/proc/self/statm").read().split()[0])
memory = pages * resource.getpagesize() + memory_bytes
left = list(cases.items())

def outcome_of(name, case):
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = int(used.ru_utime + used.ru_stime) + {CPU_S}
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, resource.RLIM_INFINITY))
    try:
        kind, text = "value", repr(getattr(module, name)(case))[:500]
    except BaseException as exc:
        kind, text = type(exc).__name__, str(exc)[:2000]
    lacking = kind == "MemoryError" or "MemoryError" in text or "allocate memory" in text
    return "memory" if lacking else kind, text

while left:
    out, into = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        for label, (name, case) in left:
            kind, text = outcome_of(name, case)
            os.write(into, pickle.dumps((label, kind, text)))
            if kind == "memory":
                break  # an error may hold what there was
        os._exit(0)
    os.close(into)
    with open(out, "rb") as pipe:
        while True:
            try:
                said = pickle.load(pipe)
            except EOFError:
                break
            sys.stdout.buffer.write(pickle.dumps(said))
            del left[0]
    _, status = os.waitpid(child, 0)
    if status:
        sys.stdout.buffer.write(pickle.dumps((left[0][0], "died", str(status))))
        del left[0]
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case.

    Attributes:
        kind: The name of the error's type; "value", "memory" (there was not enough), or "died"
            (killed for the time it took, or crashed).
        text: The error's, or the value's.
    """

    kind: str
    text: str


def try_bounded(
    module: str, cases: Mapping[str, tuple[str, bytes]], *, memory_bytes: int = MEMORY_BYTES
) -> dict[str, Outcome]:
    """Call functions in a process that may be killed by them, and tell how it went.

    Args:
        module: Where the functions are. To import it takes longer than most cases.
        cases: For each its function's name, and what that is called with.
        memory_bytes: What a case may allocate, in address space.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=pickle.dumps((module, memory_bytes, dict(cases))),
        capture_output=True,
        check=False,
        timeout=200,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr.decode()
    said, found = done.stdout, {}
    while said:
        label, kind, text = pickle.loads(said)
        said = said[len(pickle.dumps((label, kind, text))) :]
        found[label] = Outcome(kind, text)
    assert list(found) == list(cases)
    return found


def loaded_metadata(data: bytes) -> object:
    """Unpickle metadata."""
    return type(load_metadata(data, source="hostile"))


def loaded_each(data: bytes) -> tuple[int, int]:
    """Unpickle each of many, and count those that are refused, and not."""
    flipped, taken = pickle.loads(data), 0
    for each in flipped:
        with suppress(CorruptMetadataError):
            load_metadata(each, source="hostile")
            taken += 1
    return len(flipped) - taken, taken


def loaded_item(data: bytes) -> object:
    """Decode an item as a load does that has no checksums for it."""
    tensor = tensor_of(memoryview(bytearray(data)))
    return tensor.dtype, tuple(tensor.shape), tensor.tolist()
