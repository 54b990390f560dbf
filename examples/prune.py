"""Prune a run while it trains: keep its newest checkpoints, and every so-and-so-many-th for good.

    python examples/prune.py --uri s3://bucket/run --newest 3 --every 1000
    python examples/prune.py --uri s3://bucket/run --newest 3 --every 1000 --delete

Without --delete it only tells what it would remove. It is safe beside saves that are under way:
`s3dcp.delete` removes a checkpoint's commit first, so that nobody sees half of one, and `s3dcp.gc`
leaves alone what is younger than a day. Let a timer (cron, a Kubernetes CronJob) run it.

Prints one JSON line for each checkpoint, and one for what no checkpoint names.
"""

import argparse
import json
from collections.abc import Iterable
from typing import Any

import s3dcp
from s3dcp import CheckpointInfo

# Path style suits a local endpoint (AWS_ENDPOINT_URL); on AWS the defaults do.
S3_CONFIG = s3dcp.S3ClientConfig(force_path_style=True)


def log(event: str, **fields: Any) -> None:
    """Print one JSON line."""
    print(json.dumps({"event": event, **fields}), flush=True)


def kept(found: Iterable[CheckpointInfo], newest: int, every: int | None) -> set[str]:
    """Return the URIs of the checkpoints to keep.

    Those are the newest complete ones, those of every so-many-th step, and all that are younger
    than the newest: an incomplete one may be a rank that has not committed yet.
    """
    order = list(found)  # as `list_checkpoints` has it: the oldest first
    complete = [each for each in order if each.complete]
    if not complete:
        return {each.uri for each in order}
    keep = {each.uri for each in complete[-max(newest, 1) :]}
    keep |= {each.uri for each in order[order.index(complete[-1]) :]}
    if every is not None:
        keep |= {each.uri for each in complete if each.step and each.step % every == 0}
    return keep


def prune(args: argparse.Namespace) -> None:
    """Remove what is not kept."""
    store = {"region": args.region, "s3client_config": S3_CONFIG}
    found = [each for each in s3dcp.list_checkpoints(args.uri, **store) if each.format == "dcp"]
    keep = kept(found, args.newest, args.every)
    for each in found:
        facts = {"uri": each.uri, "step": each.step, "bytes": each.size_bytes}
        if each.uri in keep:
            log("keep", **facts)
            continue
        if args.delete:
            s3dcp.delete(each.uri, format="dcp", **store)
        log("delete", done=args.delete, problem=each.problem, **facts)

    # What saves that failed or were killed have left behind: data, and parts of uploads.
    lost = s3dcp.gc(args.uri, dry_run=not args.delete, **store).objects
    uploads = s3dcp.abort_uploads(args.uri, dry_run=not args.delete, **store)
    size = sum(each.size_bytes for each in lost)
    log("left behind", done=args.delete, objects=len(lost), bytes=size, uploads=len(uploads))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Remove a run's old checkpoints.")
    parser.add_argument("--uri", required=True, help="the run: s3://bucket/prefix")
    parser.add_argument("--region", help="the bucket's; found by default")
    parser.add_argument("--newest", type=int, default=3, help="how many of the newest stay")
    parser.add_argument("--every", type=int, help="steps whose multiples stay for good")
    parser.add_argument("--delete", action="store_true", help="do it, rather than only tell")
    prune(parser.parse_args())
