"""A byte-level GPT in plain torch, and a text that every machine has.

The text is the Python standard library's own sources. The sequences of a training step depend
on the seed and the step alone: however many ranks share them, they are the same, so the loss
of a step can be compared across world sizes.
"""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn

VOCABULARY = 256  # one token a byte
CONTEXT = 128


class Block(nn.Module):
    """One transformer layer: causal self-attention, then an MLP, each on a residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3 * self.heads, -1))
        query, key, value = heads.transpose(1, 2).chunk(3, dim=1)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(-2))
        thought: Tensor = self.mlp(self.mlp_norm(x))
        return x + thought


class GPT(nn.Module):
    """Predicts the next byte; by default 3.3 M parameters, 39 MiB with AdamW's two moments."""

    def __init__(self, *, width: int = 256, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of `targets` given `tokens`, both (batch, time)."""
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def stdlib_text(max_bytes: int = 4 << 20) -> Tensor:
    """Return the first bytes of the standard library's top-level modules, in order of name."""
    text = bytearray()
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += source.read_bytes()
        if len(text) >= max_bytes:
            break
    return torch.frombuffer(text[:max_bytes], dtype=torch.uint8)


def batch(
    text: Tensor, *, seed: int, step: int, rank: int, world_size: int, sequences: int = 16
) -> tuple[Tensor, Tensor]:
    """Return one rank's share of a step's `sequences`: tokens, and the bytes that follow them.

    Raises:
        ValueError: the sequences cannot be shared evenly.
    """
    if sequences % world_size:
        raise ValueError(f"{sequences} sequences cannot be shared evenly by {world_size} ranks")
    generator = torch.Generator().manual_seed((seed << 32) + step)
    starts = torch.randint(len(text) - CONTEXT, (sequences,), generator=generator)
    windows = starts[rank::world_size, None] + torch.arange(CONTEXT + 1)
    spans = text[windows].long()
    return spans[:, :-1], spans[:, 1:]
