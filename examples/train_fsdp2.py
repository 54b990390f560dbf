"""Train a small GPT with FSDP2, save in the background, and resume on any number of ranks.

    torchrun --nproc-per-node=4 examples/train_fsdp2.py --uri s3://bucket/run --steps 20
    torchrun --nproc-per-node=2 examples/train_fsdp2.py --uri s3://bucket/run --steps 40 --resume

Rank 0 prints one JSON line an event: start, resume, step, save. DCP reshards while it loads.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from digest import state_sha256
from gpt import GPT, batch, stdlib_text
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training import Training, log

import s3dcp

# Path style suits a local endpoint (AWS_ENDPOINT_URL); on AWS the defaults do.
S3_CONFIG = s3dcp.S3ClientConfig(force_path_style=True)
SEED = 0


def resume(training: Training, uri: str) -> None:
    """Load the newest complete checkpoint, if there is one."""
    # Rank 0 looks and tells the others: all of them must load the same checkpoint.
    found = [s3dcp.latest(uri, s3client_config=S3_CONFIG) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        began = time.perf_counter()
        s3dcp.load({"training": training}, found[0].uri, s3client_config=S3_CONFIG)
        seconds = time.perf_counter() - began
        sha256 = state_sha256(training.model, training.optimizer)
        log("resume", step=training.step, seconds=seconds, sha256=sha256)


class Save:
    """A save in the background, to a folder of its step's own."""

    def __init__(self, training: Training, uri: str, group: dist.ProcessGroup) -> None:
        self.step = training.step
        self.sha256 = state_sha256(training.model, training.optimizer)
        self.reports: list[s3dcp.Report] = []
        # Copies the state, and returns: the training goes on meanwhile.
        self.future = s3dcp.async_save(
            {"training": training},
            f"{uri}/step-{training.step}",
            process_group=group,
            prefix_strategy=s3dcp.HexPrefixStrategy(),
            s3client_config=S3_CONFIG,
            on_report=self.reports.append,
        )

    def finish(self) -> None:
        """Wait for its end, raise what it raised, and tell of it."""
        items = self.future.result().storage_data.values()
        size, seconds = sum(item.length for item in items), self.reports[0].seconds
        objects = len({item.relative_path for item in items}) + 1  # and .metadata
        moved = {"bytes": size, "seconds": seconds, "gib_per_s": size / seconds / 2**30}
        log("save", step=self.step, sha256=self.sha256, objects=objects, **moved)


def train(args: argparse.Namespace) -> None:
    """Train up to `args.steps`, saving every `args.save_every` steps."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(SEED)  # the same weights on every rank, then one shard of them on each
    model, text = GPT(), stdlib_text()
    mesh = init_device_mesh("cpu", (world_size,))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    save, group = None, dist.new_group(backend="gloo")  # the training's is busy with gradients
    training = Training(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    pids: list[int] = [0] * world_size
    dist.all_gather_object(pids, os.getpid())
    log("start", ranks=world_size, pids=pids)
    if args.resume:
        resume(training, args.uri)
    while training.step < args.steps:
        step = training.step
        loss = model(*batch(text, seed=SEED, step=step, rank=rank, world_size=world_size))
        loss.backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.step += 1
        mean_loss = loss.detach() / world_size
        dist.all_reduce(mean_loss)
        log("step", step=training.step, loss=mean_loss.item())
        saves_now = training.step % args.save_every == 0
        if save is not None and (saves_now or save.future.done()):  # one at a time
            save.finish()
            save = None
        if saves_now:
            save = Save(training, args.uri, group)
    if save is not None:
        save.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--uri", required=True, help="where checkpoints go: s3://bucket/prefix")
    parser.add_argument("--steps", type=int, default=20, help="train up to this step")
    parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint, if any")
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    try:
        train(parser.parse_args())
    finally:
        dist.destroy_process_group()
