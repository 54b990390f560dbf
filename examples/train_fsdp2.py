"""Train a small GPT with FSDP2 and keep its checkpoints on S3.

    torchrun --nproc-per-node=4 examples/train_fsdp2.py --uri s3://bucket/run --steps 20
    torchrun --nproc-per-node=2 examples/train_fsdp2.py --uri s3://bucket/run --steps 40 --resume

Rank 0 prints one JSON line an event: start, resume, step, save. The second command may run on
another number of ranks than the first: DCP reshards while it loads.
"""

import argparse
import json
import os
import re
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from digest import state_sha256
from gpt import GPT, batch, stdlib_text
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from s3dcp import HexPrefixStrategy, S3ClientConfig, S3FileSystem, S3StorageReader, S3StorageWriter

# Path style suits a local endpoint (AWS_ENDPOINT_URL); on AWS the defaults do.
S3_CONFIG = S3ClientConfig(force_path_style=True)


class Training(Stateful):
    """All that a resumed run needs; DCP calls the two methods when it saves and loads."""

    def __init__(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's shards, under names that do not depend on the number of ranks."""
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what DCP has read."""
        model, optim, self.step = (state_dict[name] for name in ("model", "optim", "step"))
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optim)


def log(event: str, **fields: Any) -> None:
    """Print one JSON line, from rank 0."""
    if dist.get_rank() == 0:
        print(json.dumps({"event": event, **fields}), flush=True)


def newest_checkpoint(region: str, uri: str) -> str | None:
    """Return the newest complete checkpoint under `uri`: one with a .metadata, written last."""
    fs = S3FileSystem(region, s3client_config=S3_CONFIG)
    found = (re.search(r"/step-(\d+)/?$", entry) for entry in fs.ls(uri))
    for step in sorted((int(match[1]) for match in found if match), reverse=True):
        if fs.exists(f"{uri}/step-{step}/.metadata"):
            return f"{uri}/step-{step}"
    return None


def resume(training: Training, args: argparse.Namespace) -> None:
    """Load the newest complete checkpoint, if there is one."""
    # Rank 0 looks and tells the others: all of them must load the same checkpoint.
    uri = [newest_checkpoint(args.region, args.uri) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(uri)
    if uri[0] is None:
        return
    reader = S3StorageReader(args.region, uri[0], s3client_config=S3_CONFIG)
    began = time.perf_counter()
    dcp.load({"training": training}, storage_reader=reader)
    seconds = time.perf_counter() - began
    sha256 = state_sha256(training.model, training.optimizer)
    log("resume", step=training.step, seconds=seconds, sha256=sha256)


def save(training: Training, args: argparse.Namespace) -> None:
    """Save to a folder of the step's own, the ranks' objects spread over hex prefixes."""
    writer = S3StorageWriter(
        args.region,
        f"{args.uri}/step-{training.step}",
        s3client_config=S3_CONFIG,
        prefix_strategy=HexPrefixStrategy(),
    )
    began = time.perf_counter()
    metadata = dcp.save({"training": training}, storage_writer=writer)
    seconds = time.perf_counter() - began
    items = metadata.storage_data.values()
    size = sum(item.length for item in items)
    log(
        "save",
        step=training.step,
        bytes=size,
        seconds=seconds,
        gib_per_s=size / seconds / 2**30,
        objects=len({item.relative_path for item in items}) + 1,  # and .metadata
        sha256=state_sha256(training.model, training.optimizer),
    )


def train(args: argparse.Namespace) -> None:
    """Train up to `args.steps`, saving every `args.save_every` steps."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(args.seed)  # the same weights on every rank, then one shard of them on each
    model, text = GPT(), stdlib_text()
    mesh = init_device_mesh("cpu", (world_size,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    training = Training(model, torch.optim.AdamW(model.parameters(), lr=args.learning_rate))

    pids: list[int] = [0] * world_size
    dist.all_gather_object(pids, os.getpid())
    log("start", ranks=world_size, pids=pids)
    if args.resume:
        resume(training, args)
    while training.step < args.steps:
        tokens, targets = batch(
            text, seed=args.seed, step=training.step, rank=rank, world_size=world_size
        )
        loss = model(tokens, targets)
        loss.backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.step += 1
        mean_loss = loss.detach() / world_size
        dist.all_reduce(mean_loss)
        log("step", step=training.step, loss=mean_loss.item())
        if training.step % args.save_every == 0:
            save(training, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small GPT, checkpoints on S3.")
    parser.add_argument("--uri", required=True, help="where checkpoints go: s3://bucket/prefix")
    parser.add_argument("--region", default=os.environ.get("AWS_REGION", "us-east-1"))
    parser.add_argument("--steps", type=int, default=20, help="train up to this step")
    parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint, if any")
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    try:
        train(parser.parse_args())
    finally:
        dist.destroy_process_group()
