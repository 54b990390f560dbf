"""Train a small GPT with DDP, save in the background, and resume from the newest checkpoint.

    torchrun --nproc-per-node=2 examples/train_ddp.py --uri s3://bucket/run --steps 20
    torchrun --nproc-per-node=4 examples/train_ddp.py --uri s3://bucket/run --steps 40 --resume

Every rank holds all tensors; one writes each. Rank 0 prints one JSON line an event.
"""

import argparse
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from digest import state_sha256
from gpt import GPT, batch, stdlib_text
from torch.nn.parallel import DistributedDataParallel
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
        s3dcp.load({"training": training}, found[0].uri, s3client_config=S3_CONFIG)
        sha256 = state_sha256(training.model, training.optimizer)
        log("resume", uri=found[0].uri, step=training.step, sha256=sha256)


class Saves:
    """Saves in the background, one at a time."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.group = dist.new_group(backend="gloo")  # the training's is busy with gradients
        self.saving: Future[Any] | None = None

    def begin(self, training: Training) -> None:
        """Copy the state, and save the copy while the training goes on."""
        self.finish()
        uri, state = f"{self.uri}/step-{training.step}", {"training": training}
        self.saving = s3dcp.async_save(
            state, uri, process_group=self.group, s3client_config=S3_CONFIG
        )
        log("save", uri=uri, sha256=state_sha256(training.model, training.optimizer))

    def finish(self) -> None:
        """Wait for the save that is under way, and raise what it raised."""
        if self.saving is not None:
            self.saving.result()


def train(args: argparse.Namespace) -> None:
    """Train up to `args.steps`, saving every `args.save_every` steps."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(SEED)
    model, text, saves = DistributedDataParallel(GPT()), stdlib_text(), Saves(args.uri)
    training = Training(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
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
        if training.step % args.save_every == 0:
            saves.begin(training)
    saves.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--uri", required=True, help="where checkpoints go: s3://bucket/prefix")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint, if any")
    dist.init_process_group("gloo")
    try:
        train(parser.parse_args())
    finally:
        dist.destroy_process_group()
