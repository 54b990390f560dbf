"""What the training examples share: the state of a run, and what it prints."""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful


class Training(Stateful):
    """All that a resumed run needs; DCP calls the two methods when it saves and loads."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state under names that depend neither on ranks nor on DDP or FSDP."""
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what DCP has read."""
        model, optim, self.step = (state_dict[name] for name in ("model", "optim", "step"))
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optim)


def log(event: str, **fields: Any) -> None:
    """Print one JSON line, from rank 0."""
    if dist.get_rank() == 0:
        print(json.dumps({"event": event, **fields}) + "\n", end="", flush=True)
