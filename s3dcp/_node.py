"""What the ranks of a node share."""

from __future__ import annotations

import os


def local_world_size() -> int:
    """Return how many ranks this node has, as torchrun says; 1 if nobody does."""
    try:
        return max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    except ValueError:
        return 1


def local_cores() -> int:
    """Return this rank's share of the node's cores; at least 1."""
    return max(1, (os.cpu_count() or 1) // local_world_size())
