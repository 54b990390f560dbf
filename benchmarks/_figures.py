"""Figures from samples: medians, rates, ratios. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from benchmarks._values import GiB, Sample


def wall_s(samples: Sequence[Sample]) -> float:
    """Return the median time."""
    return median(sample.wall_s for sample in samples)


def gib_per_s(samples: Sequence[Sample]) -> float:
    """Return the tensors' GiB over the median time."""
    return samples[0].nbytes / GiB / wall_s(samples)


def cpu_s_per_gib(samples: Sequence[Sample]) -> float:
    """Return the median of the client's CPU seconds over the tensors' GiB."""
    return median(sample.cpu_s for sample in samples) / (samples[0].nbytes / GiB)


def moved(samples: Sequence[Sample]) -> float:
    """Return the bytes that were received over those that were needed, at the worst."""
    return max(ratio(sample.received_bytes, sample.nbytes) for sample in samples)


def peak_mib(samples: Sequence[Sample]) -> float:
    """Return the most memory that was taken beyond the tensors, NaN where it cannot be told."""
    peaks = [sample.peak_bytes for sample in samples if sample.peak_bytes is not None]
    return max(peaks) / (1 << 20) if peaks else math.nan


def ratio(ours: float, theirs: float) -> float:
    """Return how many times `theirs` `ours` is."""
    return ours / theirs if theirs else math.inf


def percentile(values: Sequence[float], fraction: float) -> float:
    """Return the nearest-rank percentile: the least value that so many are not above.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values have no percentile")
    rank = math.ceil(fraction * len(values))
    return sorted(values)[max(rank, 1) - 1]
