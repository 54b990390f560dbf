"""What `import s3dcp` costs: no thread, no S3 stack, little time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

#: Seconds that `import s3dcp` may take over `import torch.distributed.checkpoint`.
_BOUND_S = 0.3


def run(program: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_it_starts_no_thread_and_does_not_load_the_s3_stack() -> None:
    """Nor does naming a place: the first request connects."""
    found = run("""
import json, pickle, sys, threading
import torch.distributed.checkpoint
before = set(sys.modules)
threads = threading.active_count()

def state():
    stack = {"aiobotocore", "aiohttp", "awscrt", "boto3", "botocore", "numpy", "uvloop"}
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    return [threading.active_count() - threads, sorted(stack & loaded)]

import s3dcp, s3dcp.testing
imported = state()
writer = s3dcp.S3StorageWriter("eu-west-1", "s3://bucket/key")
reader = s3dcp.S3StorageReader("eu-west-1", "s3://bucket/key")
for made in (writer, reader, s3dcp.S3FileSystem("eu-west-1"), s3dcp.S3Client("eu-west-1")):
    pickle.loads(pickle.dumps(made))
print(json.dumps([imported, state()]))
""")
    imported, made = found
    assert imported == [0, [name for name in imported[1] if name == "awscrt"]]
    assert made == imported


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_it_is_quick() -> None:
    """Each measurement in a fork of one run that has imported torch and nothing else.

    In processor time: the files are in the page cache, and other tests run at the same time.
    """
    taken = run("""
import json, os, time, warnings
import torch.distributed.checkpoint
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside torch's threads
taken = []
for _ in range(5):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        start = time.process_time()
        import s3dcp
        os.write(writing, str(time.process_time() - start).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        taken.append(float(pipe.read()))
    os.waitpid(child, 0)
print(json.dumps(taken))
""")
    # What else the machine does can only add to it.
    assert min(taken) < _BOUND_S, taken
