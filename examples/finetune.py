"""Fine-tune a GPT from a safetensors checkpoint on S3, and publish the result as another one.

    python examples/finetune.py --base s3://bucket/base --uri s3://bucket/tuned --steps 20

The base may come from anywhere: one `model.safetensors`, or several files and their
`model.safetensors.index.json`, as `huggingface-cli download` and `aws s3 sync` leave them. What is
published, `transformers`, vLLM and the `safetensors` library read. Prints one JSON line a step.

The state dict of a model that FSDP2 shards goes through the same two calls, with
`save_distributed=True, enable_consolidation=True` on its way out.
"""

import argparse
import json

import torch
import torch.distributed.checkpoint as dcp
from gpt import GPT, batch, stdlib_text

from s3dcp import S3ClientConfig, S3HuggingFaceStorageReader, S3HuggingFaceStorageWriter

# Path style suits a local endpoint (AWS_ENDPOINT_URL); on AWS the defaults do.
S3_CONFIG = S3ClientConfig(force_path_style=True)
SEQUENCES = 8  # of a step
FILES = 2  # that the result is split into


def load_base(model: GPT, uri: str) -> None:
    """Read the base into the model's own memory; bfloat16 becomes float32 on the way."""
    dcp.load(
        model.state_dict(),
        storage_reader=S3HuggingFaceStorageReader(None, uri, S3_CONFIG),
        no_dist=True,
    )


def publish(model: GPT, uri: str) -> None:
    """Write the model in bfloat16. Its index goes last: readers see all of it, or nothing."""
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    files = {name: 1 + number * FILES // len(state) for number, name in enumerate(state)}
    writer = S3HuggingFaceStorageWriter(None, uri, S3_CONFIG, fqn_to_index_mapping=files)
    dcp.save(state, storage_writer=writer, no_dist=True)


def tune(model: GPT, steps: int) -> None:
    """Train the last block, the norm and the head; everything else stays as the base has it."""
    model.requires_grad_(False)
    for part in (model.blocks[-1], model.norm, model.head):
        part.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    text = stdlib_text()
    for step in range(1, steps + 1):
        tokens, targets = batch(text, seed=0, step=step, rank=0, world_size=1, sequences=SEQUENCES)
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(json.dumps({"event": "step", "step": step, "loss": loss.item()}), flush=True)


def main() -> None:
    """Load, tune, publish."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", required=True, help="s3://bucket/prefix of the base model")
    parser.add_argument("--uri", required=True, help="s3://bucket/prefix to publish to")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    model = GPT()
    load_base(model, arguments.base)
    tune(model, arguments.steps)
    publish(model, arguments.uri)
    print(json.dumps({"event": "published", "uri": arguments.uri}), flush=True)


if __name__ == "__main__":
    main()
