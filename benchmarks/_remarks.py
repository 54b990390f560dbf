"""What is known of targets that are missed: where the time goes, what was tried. Kept by hand.

The page prints a remark beneath its target when a run misses that, and not otherwise.
"""

from __future__ import annotations

#: By row and metric, as in `_targets.TARGETS`.
REMARKS: dict[tuple[str, str], str] = {}
