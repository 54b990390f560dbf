"""A load planner that runs nothing of what it loads."""

from __future__ import annotations

import io
import pickle
import re

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from s3dcp._errors import UnsafeItemError
from s3dcp._torch_internals import set_element

_GLOBAL = re.compile(r"Unsupported (?:global|operand|class|type)[^:]*: (?:GLOBAL )?(\S+)")


class WeightsOnlyLoadPlanner(DefaultLoadPlanner):
    """torch's default planner, with `weights_only=True` for items that are no tensors.

    Those are pickles, and torch's own planner executes them. The arguments are those of
    `DefaultLoadPlanner`.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an item that is no tensor into the state dict.

        Raises:
            UnsafeItemError: its pickle names more than numbers, strings, containers of them,
                tensors, and what `torch.serialization.add_safe_globals` was given.
        """
        name = read_item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as exc:
            found = _GLOBAL.search(str(exc))
            what = f"names {found[1]}" if found else "is more than plain data"
            raise UnsafeItemError(
                f"{name} is a pickle that {what}, and was not executed. If you trust it, pass "
                "weights_only=False, or admit the type with torch.serialization.add_safe_globals"
            ) from exc
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded
