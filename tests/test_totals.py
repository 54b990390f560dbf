"""What a writer and a reader tell of their requests."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp

from s3dcp import S3ClientConfig, S3StorageReader, S3StorageWriter
from s3dcp.testing import Cut, FakeS3, slow_down
from tests._fakes import uri_of
from tests._states import MiB

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of saves without ranks


def test_they_count_what_went_wrong(fake: FakeS3, caplog: pytest.LogCaptureFixture) -> None:
    state = {"w": torch.ones(3 * MiB), "small": torch.ones(5), "text": "abc"}
    with caplog.at_level(logging.INFO, "s3dcp"):
        fake.inject(slow_down(), operation="UploadPart", times=2)
        writer = S3StorageWriter(None, uri_of("run"), S3ClientConfig(part_size=5 * MiB))
        dcp.save(state, storage_writer=writer, no_dist=True)
        saved = writer.totals
        fake.inject(Cut(1 * MiB), operation="GetObject", key="*.distcp", times=1)
        reader = S3StorageReader(None, uri_of("run"))
        dcp.load({"w": torch.zeros(3 * MiB)}, storage_reader=reader, no_dist=True)
        loaded = reader.totals

    assert saved.operations.keys() == {
        "GetObject",  # is there a checkpoint already?
        *("CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"),
        "PutObject",  # the commit
    }
    parts = saved.operations["UploadPart"]
    assert (parts.throttles, parts.retries) == (2, 2)
    assert parts.size_bytes > 12 * MiB
    assert loaded.overall.lost_connections == loaded.overall.retries == 1
    assert loaded.overall.size_bytes >= 12 * MiB
    assert "throttles 2" in caplog.text
    assert "lost connections 1" in caplog.text
    # Each load has its own, and they stay behind when a process is handed the reader.
    assert pickle.loads(pickle.dumps(reader)).totals.overall.requests == 0
