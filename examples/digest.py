"""A fingerprint of a whole training state, the same on any number of ranks."""

import ctypes
import hashlib

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict


def state_sha256(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Return, on rank 0, the SHA-256 of all parameters, buffers and optimizer state.

    Collective. Gathers the whole state on rank 0, one tensor at a time: for small models only.
    Other ranks get a value that means nothing.
    """
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True
    )
    parameters, optimizer_state = get_state_dict(model, optimizer, options=options)
    sha = hashlib.sha256()
    for name, value in sorted({**parameters, **optimizer_state}.items()):
        if isinstance(value, torch.Tensor):
            dense = value.contiguous()  # bound to a name: the address below is only borrowed
            sha.update(f"{name} {dense.dtype} {tuple(dense.shape)}\n".encode())
            sha.update((ctypes.c_char * dense.nbytes).from_address(dense.data_ptr()))
        else:
            sha.update(f"{name} {value!r}\n".encode())
    return sha.hexdigest()
