"""What the ranks of a node share."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def local_world_size() -> int:
    """Return how many ranks this node has, as torchrun says; 1 if nobody does."""
    try:
        return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    except ValueError:
        return 1


def local_cores() -> int:
    """Return this rank's share of the node's cores; at least 1."""
    return max(1, (os.cpu_count() or 1) // local_world_size())


def free_memory_bytes() -> int | None:
    """Return how much memory can be taken without swapping, or all there is where that is unknown.

    None where nobody says, as on Windows.
    """
    found = []
    with suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    with suppress(OSError, ValueError):  # a container's limit, which may be "max"
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text("ascii")))
    return min(found, default=None)
