"""What a tally counts, and what its one line says."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3dcp._errors import (
    ObjectNotFoundError,
    S3ConnectionError,
    S3Exception,
    S3ProtocolError,
    S3TimeoutError,
    ServerError,
    ThrottledError,
)
from s3dcp._tally import _BOUNDS_S, OperationTotals, Tally, Totals

TROUBLES = ("throttles", "timeouts", "lost_connections", "server_errors")


def tally_of(seconds: list[float]) -> OperationTotals:
    tally = Tally()
    for each in seconds:
        tally.add("GetObject", each)
    return tally.totals().overall


def test_operations_are_counted_apart_and_together() -> None:
    tally = Tally()
    tally.add("GetObject", 0.5, 100)
    tally.add("PutObject", 0.25, 7)
    tally.add("GetObject", 1.5, error=ServerError())
    tally.add("GetObject", 1.0, 50, retry=True)
    tally.add_bytes("GetObject", 1000)

    totals = tally.totals()

    assert list(totals.operations) == ["GetObject", "PutObject"]
    get, put = totals.operations.values()
    assert (get.requests, get.retries, get.size_bytes, get.server_errors) == (3, 1, 1150, 1)
    assert (put.requests, put.retries, put.size_bytes, put.server_errors) == (1, 0, 7, 0)
    both = totals.overall
    assert (both.requests, both.retries, both.size_bytes, both.max_s) == (4, 1, 1157, 1.5)
    assert both == get + put


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (ThrottledError(), "throttles"),
        (S3TimeoutError(), "timeouts"),
        (S3ConnectionError(), "lost_connections"),
        (ServerError(), "server_errors"),
        (ObjectNotFoundError(), None),
        (S3ProtocolError(), None),
    ],
)
def test_a_failure_counts_once_and_moves_nothing(error: S3Exception, trouble: str | None) -> None:
    tally = Tally()
    tally.add("GetObject", 1.0, 100, error=error)
    totals = tally.totals().overall
    assert {name: getattr(totals, name) for name in TROUBLES} == {
        name: int(name == trouble) for name in TROUBLES
    }
    assert (totals.requests, totals.size_bytes) == (1, 0)


@given(
    st.lists(st.floats(0.0, 800.0), min_size=1, max_size=200), st.sampled_from([0.0, 0.5, 0.99, 1])
)
def test_quantiles_are_close(seconds: list[float], share: float) -> None:
    exact = sorted(seconds)[max(1, math.ceil(share * len(seconds))) - 1]
    found = tally_of(seconds).quantile_s(share)
    assert exact <= found <= max(exact * 2**0.25 * 1.000001, _BOUNDS_S[0])


def test_quantiles_at_the_ends() -> None:
    assert OperationTotals().quantile_s(0.5) == 0
    assert tally_of([0.0]).quantile_s(0.99) == 0
    assert tally_of([5000.0]).quantile_s(0.5) == 5000
    assert tally_of([0.1] * 98 + [9.0] * 2).quantile_s(0.5) < 0.12
    assert tally_of([0.1] * 98 + [9.0] * 2).quantile_s(0.99) == 9


def test_memory_does_not_grow() -> None:
    assert len(tally_of([0.001 * n for n in range(5000)]).buckets) == len(_BOUNDS_S) + 1


def test_totals_are_values() -> None:
    tally = Tally()
    tally.add("GetObject", 0.5, 100)
    totals = tally.totals()
    tally.add("GetObject", 0.5, 100)
    assert totals.overall.requests == 1
    assert pickle.loads(pickle.dumps(totals)) == totals
    assert totals != tally.totals()
    with pytest.raises(FrozenInstanceError):
        totals.overall.requests = 2  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        totals.operations = {}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.0 GiB")],
)
def test_bytes_are_shown_in_units(size_bytes: int, shown: str) -> None:
    assert f", {shown}, p50" in str(OperationTotals(size_bytes=size_bytes))


def test_it_is_one_line() -> None:
    tally = Tally()
    for _ in range(3):
        tally.add("UploadPart", 0.5, 1 << 20)
    tally.add("UploadPart", 2.0, error=ThrottledError())
    tally.add("UploadPart", 0.5, 1 << 20, retry=True)
    tally.add("CompleteMultipartUpload", 0.25)
    assert str(tally.totals()) == (
        "UploadPart: requests 5, 4.0 MiB, p50 0.512 s, p99 2 s, retries 1, throttles 1; "
        "CompleteMultipartUpload: requests 1, 0 B, p50 0.25 s, p99 0.25 s"
    )
    assert str(Totals({})) == "no requests"
    assert str(tally.totals().overall).startswith("requests 6, 4.0 MiB, ")
