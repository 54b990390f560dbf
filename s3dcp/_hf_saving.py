"""One rank's part of a save as safetensors files: for each a header, then tensors' bare memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from s3dcp._devices import is_host
from s3dcp._errors import IncompleteSaveError, S3ConfigError
from s3dcp._framing import is_plain, memory_of
from s3dcp._hf_index import (
    FORMAT,
    FORMAT_KEY,
    OFFSETS_KEY,
    SAVE_ID_KEY,
    SHARDING_KEY,
    VERSION,
    VERSION_KEY,
)
from s3dcp._keys import S3Uri, join
from s3dcp._outgoing import Charge, OutgoingFile, Piece
from s3dcp._safetensors import Header, bare_frame, make_header
from s3dcp._saving import SavedItems
from s3dcp._staging import COPIED_BYTES


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file to write.

    Attributes:
        name: Its name.
        save_id: Of the save that it is a part of.
        items: Its tensors, in the order in which they lie in it.
        head: Its first bytes, up to the first tensor's.
        header: What they say.
    """

    name: str
    save_id: str
    items: Sequence[WriteItem]
    head: bytes
    header: Header


def plan_file(name: str, items: Sequence[WriteItem], save_id: str) -> PlannedFile:
    """Lay out a file.

    Raises:
        S3ConfigError: something that a safetensors file cannot hold.
    """
    by_name = {item.index.fqn: item for item in items}
    if len(by_name) != len(items):
        twice = sorted({i.index.fqn for i in items if by_name[i.index.fqn] is not i})
        raise S3ConfigError(
            f"{', '.join(twice[:3])}: a rank has several shards of it, and a safetensors file "
            "holds a name once. Save with S3StorageWriter, or gather the state dict first"
        )
    tensors = {fqn: _tensor(item) for fqn, item in by_name.items()}
    offsets = {
        item.index.fqn: {OFFSETS_KEY: list(item.tensor_data.chunk.offsets)}
        for item in items
        if item.tensor_data is not None
    }
    extra = {
        FORMAT_KEY: FORMAT,
        VERSION_KEY: VERSION,
        SHARDING_KEY: json.dumps(offsets),
        SAVE_ID_KEY: save_id,
    }
    head, header = make_header(tensors, extra)
    return PlannedFile(name, save_id, [by_name[fqn] for fqn in header.entries], head, header)


def _tensor(item: WriteItem) -> tuple[torch.dtype, tuple[int, ...]]:
    data = item.tensor_data
    if item.type == WriteItemType.BYTE_IO or data is None:
        raise S3ConfigError(
            f"{item.index.fqn} is no tensor, and safetensors files hold nothing else: leave it "
            "out of the state dict, or save it apart with S3StorageWriter"
        )
    if data.properties.layout is not torch.strided:
        raise S3ConfigError(
            f"{item.index.fqn} is {data.properties.layout}, and safetensors files hold dense "
            "tensors: convert it with to_dense()"
        )
    return data.properties.dtype, tuple(data.chunk.sizes)


class SafetensorsItems(SavedItems):
    """Writes the tensors of one plan as safetensors files; arguments as `SavedItems`."""

    def write_files(self, base: S3Uri, files: Sequence[PlannedFile]) -> list[WriteResult]:
        """Write every file below `base`, and return a result for every tensor.

        Raises:
            S3Exception: something could not be written. Nothing of this plan is left behind.
        """
        self._planned = {file.name: file for file in files}
        uris = [S3Uri(base.bucket, join(base.key, file.name)) for file in files]
        return self.write(
            [(uri, file.name, file.items) for uri, file in zip(uris, files, strict=True)]
        )

    def _open(self, uri: S3Uri, name: str, items: Sequence[WriteItem]) -> None:
        super()._open(uri, name, items)
        self._push(self._files[-1], memoryview(self._planned[name].head), Piece())

    def _add_tensor(self, file: OutgoingFile, write_item: WriteItem, tensor: torch.Tensor) -> None:
        entry = self._planned[file.name].header.entries[write_item.index.fqn]
        if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise IncompleteSaveError(
                f"{write_item.index.fqn} was planned as {entry.dtype} of shape {entry.shape}, and "
                f"is {tensor.dtype} of shape {tuple(tensor.shape)}: nothing was published"
            )
        frame = bare_frame(tensor.nbytes)
        is_small = frame.length <= COPIED_BYTES
        charge: Charge | None = None  # of memory that this tensor was copied to
        if not is_host(tensor) and is_plain(tensor) and not is_small:
            self._add_framed(file, write_item, tensor, frame, self._staged(tensor))
            return
        if not is_host(tensor) or not is_plain(tensor):
            charge = self._charge(tensor.nbytes)
            tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        if is_small:
            self._copy(file, write_item, tensor, frame)
            if charge is not None:
                self._release(charge)
        else:
            memory = iter([(memory_of(tensor), charge)])
            self._add_framed(file, write_item, tensor, frame, memory)
