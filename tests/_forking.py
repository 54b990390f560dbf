"""Run as a script by tests/test_process_life.py: forks beside requests, without torch.

Children end as the interpreter ends. The parent then uses what it has.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter

from s3dcp._config import S3ClientConfig
from s3dcp._s3client import S3Client

FORKS = 10
BODY = bytes(range(256)) * 4096 * 6  # in two parts


def main(endpoint_url: str, bucket: str) -> None:
    client = S3Client("us-east-1", S3ClientConfig(endpoint_url=endpoint_url, part_size=5 << 20))
    here, _ = client.connect()
    here.call(client.put_object, bucket, "forks", BODY)  # names are looked up, connections open
    ends: Counter[int] = Counter()

    async def puts() -> None:
        while ends.total() < FORKS:
            await client.put_object(bucket, "forks", BODY)

    gc.freeze()  # so that children need not look at all of it when they end
    putting = here.submit(puts)
    while ends.total() < FORKS:
        if not (pid := os.fork()):
            sys.exit(0)
        ends[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])] += 1
    putting.result()
    assert here.call(client.get_object, bucket, "forks") == BODY
    sys.stdout.write(f"{dict(ends)}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
