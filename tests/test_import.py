"""What `import s3dcp` costs: no thread, no S3 stack, little time."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from s3dcp import _torch_internals

pytestmark = pytest.mark.xdist_group("imports")  # which are seen in one process

#: Seconds that `import s3dcp` may take over `import torch.distributed.checkpoint`.
_BOUND_S = 0.3

# Each look is at a process in which no look before it has imported anything.
_PROGRAM = """
import importlib.util, json, os, pickle, sys, threading, time, warnings
import torch.distributed.checkpoint
before, threads = set(sys.modules), threading.active_count()

def seconds():
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        start = time.process_time()
        import s3dcp
        os.write(writing, str(time.process_time() - start).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        taken = float(pipe.read())
    os.waitpid(child, 0)
    return taken

def state():
    stack = {"aiobotocore", "aiohttp", "awscrt", "boto3", "botocore", "numpy", "uvloop"}
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    return [threading.active_count() - threads, sorted(stack & loaded)]

found = {}
if hasattr(os, "fork"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside torch's threads
        found["seconds"] = [seconds() for _ in range(5)]

# By its path: importing the package would import all of it.
spec = importlib.util.spec_from_file_location("internals", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
found["by internals"] = sorted(set(sys.modules) - before)

import s3dcp, s3dcp.testing
found["imported"] = state()
writer = s3dcp.S3StorageWriter("eu-west-1", "s3://bucket/key")
reader = s3dcp.S3StorageReader("eu-west-1", "s3://bucket/key")
for made in (writer, reader, s3dcp.S3FileSystem("eu-west-1"), s3dcp.S3Client("eu-west-1")):
    pickle.loads(pickle.dumps(made))
found["made"] = state()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, inspect.getfile(_torch_internals)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_it_starts_no_thread_and_does_not_load_the_s3_stack(found: dict[str, Any]) -> None:
    """Nor does naming a place: the first request connects."""
    imported = found["imported"]
    assert imported == [0, [name for name in imported[1] if name == "awscrt"]]
    assert found["made"] == imported


def test_torchs_internals_import_nothing_that_dcp_does_not_import(found: dict[str, Any]) -> None:
    assert found["by internals"] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_it_is_quick(found: dict[str, Any]) -> None:
    """Each measurement in a fork of one run that has imported torch and nothing else.

    In processor time: the files are in the page cache, and other tests run at the same time.
    """
    # What else the machine does can only add to it.
    assert min(found["seconds"]) < _BOUND_S, found
