"""Load a checkpoint on fewer ranks than saved it, and without a process group at all.

    torchrun --nproc-per-node=4 examples/load_fewer_ranks.py --uri s3://bucket/ck --save
    torchrun --nproc-per-node=2 examples/load_fewer_ranks.py --uri s3://bucket/ck
    python examples/load_fewer_ranks.py --uri s3://bucket/ck

The state dict says which part of each tensor a rank wants; a checkpoint has all of it, whoever
wrote which part. Each command prints one JSON line, with a fingerprint of the whole model: it is
the same for all three.
"""

import argparse
import hashlib
import json

import torch
import torch.distributed as dist
from gpt import GPT
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import s3dcp

# Path style suits a local endpoint (AWS_ENDPOINT_URL); on AWS the defaults do.
S3_CONFIG = s3dcp.S3ClientConfig(force_path_style=True)


def sharded(model: GPT) -> GPT:
    """Leave each rank of the process group its shard of the model's parameters."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    return model


def fingerprint(parameters: dict[str, Tensor]) -> str:
    """Return the SHA-256 of all parameters; collective where they are sharded."""
    sha = hashlib.sha256()
    for name, tensor in sorted(parameters.items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        sha.update(f"{name} {whole.tolist()}".encode())
    return sha.hexdigest()


def main(uri: str, *, save: bool, ranks: int, rank: int) -> None:
    """Save a new model's parameters, or load them into another one."""
    torch.manual_seed(0 if save else 1)  # so that what is loaded is not there already
    model = GPT(width=64, layers=2) if ranks == 1 else sharded(GPT(width=64, layers=2))
    parameters = model.state_dict()
    if save:
        s3dcp.save({"model": parameters}, uri, s3client_config=S3_CONFIG)
    else:
        s3dcp.load({"model": parameters}, uri, s3client_config=S3_CONFIG)
        model.load_state_dict(parameters)
    event = {"event": "save" if save else "load", "ranks": ranks}
    sha256 = fingerprint(model.state_dict())
    if rank == 0:
        print(json.dumps({**event, "sha256": sha256}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Save on some ranks, load on others.")
    parser.add_argument("--uri", required=True, help="the checkpoint: s3://bucket/prefix")
    parser.add_argument("--save", action="store_true", help="save it first")
    args = parser.parse_args()
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        try:
            main(args.uri, save=args.save, ranks=dist.get_world_size(), rank=dist.get_rank())
        finally:
            dist.destroy_process_group()
    else:
        main(args.uri, save=args.save, ranks=1, rank=0)
