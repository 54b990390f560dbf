"""Servers to test, try and demonstrate s3dcp against.

`FakeS3` is an S3 in memory, for tests and benches: it is strict, fast, and fails as it is told to.

    with FakeS3() as server:
        server.create_bucket("bucket")
        server.inject(slow_down(), operation="UploadPart", times=3)
        lost = server.inject(lost_response(), operation="PutObject", key="*/.metadata")
        ...  # what is tested, with `server.environ()` in its environment
        assert len(lost.struck) == 1
        server.check()

`LocalS3` is a real S3 server on a folder; it needs `pip install "s3dcp[testing]"`.
"""

from s3dcp.testing._exchange import Exchange
from s3dcp.testing._fake import FakeS3
from s3dcp.testing._fake_process import FakeS3Process
from s3dcp.testing._faults import (
    Call,
    Cut,
    Drip,
    Drop,
    Extend,
    Fault,
    FlipByte,
    IgnoreRange,
    Refuse,
    Stall,
    StopReading,
    WrongRange,
    internal_error,
    lost_response,
    slow_down,
    wrong_region,
)
from s3dcp.testing._objects import Limits
from s3dcp.testing._process import LocalServerError
from s3dcp.testing._rclone import LocalS3
from s3dcp.testing._records import Record, Violation
from s3dcp.testing._rules import Rule

__all__ = [
    # servers
    "FakeS3",
    "FakeS3Process",
    "Limits",
    "LocalS3",
    "LocalServerError",
    # faults
    "Call",
    "Cut",
    "Drip",
    "Drop",
    "Exchange",
    "Extend",
    "Fault",
    "FlipByte",
    "IgnoreRange",
    "Refuse",
    "Rule",
    "Stall",
    "StopReading",
    "WrongRange",
    "internal_error",
    "lost_response",
    "slow_down",
    "wrong_region",
    # what was seen
    "Record",
    "Violation",
]
