"""Imported by the fork server alone: what its children find done already.

A process that imports torch and makes its first save takes 4 s. One that is forked from this
module's takes 0.1 s: all is imported, botocore's models are parsed, and a save was made. The portal
and the server that it took are closed again, so that no Python thread is there to be lost.
"""

from __future__ import annotations

import gc
import os
import warnings

import torch
import torch._dynamo  # the first DTensor would
import torch.distributed.checkpoint as dcp

from s3dcp import S3StorageWriter
from s3dcp._portal import _close_portal
from s3dcp.testing import FakeS3


def _warm_up() -> None:
    torch.set_num_threads(1)
    environ = dict(os.environ)
    with FakeS3() as server, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server.create_bucket("warm-up")
        os.environ.update(server.environ())
        state = {"weight": torch.ones(8), "step": 1}
        for _ in range(2):  # the second replaces the first, which is the longer way
            dcp.save(state, storage_writer=S3StorageWriter(None, "s3://warm-up/ck"), no_dist=True)
        _close_portal()
    os.environ.clear()
    os.environ.update(environ)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it looks at


_warm_up()
