"""What s3dcp borrows from torch, overrides or imitates is what it was written for."""

from __future__ import annotations

import hashlib
import inspect
import textwrap

import pytest
import torch
from torch.distributed.checkpoint import (
    _hf_utils,
    default_planner,
    filesystem,
    hf_storage,
    metadata,
    state_dict_loader,
    state_dict_saver,
    storage,
)
from torch.storage import TypedStorage

from s3dcp import _torch_internals

MINOR = ".".join(torch.__version__.split(".")[:2])

SOURCES = {
    "narrow_tensor_by_index": _torch_internals.narrow_tensor_by_index,
    "LegacyTensorProperties": _torch_internals.LegacyTensorProperties,
    "_StorageInfo": filesystem._StorageInfo,
    "_StoragePrefix": filesystem._StoragePrefix,
    "_StorageReaderTransforms": filesystem._StorageReaderTransforms,
    "_StorageWriterTransforms": filesystem._StorageWriterTransforms,
    "_split_by_size_and_type": filesystem._split_by_size_and_type,
    "_write_item": filesystem._write_item,
    "_write_files_from_queue": filesystem._write_files_from_queue,
    "_SerialCpuLoader": filesystem._SerialCpuLoader,
    "_OverlappingCpuLoader": filesystem._OverlappingCpuLoader,
    "_FileSystemWriter": filesystem._FileSystemWriter,
    "FileSystemWriter": filesystem.FileSystemWriter,
    "FileSystemReader": filesystem.FileSystemReader,
    "FileSystemBase": filesystem.FileSystemBase,
    # Whose names, keys and arguments ours have.
    "_hf_utils": _hf_utils,
    "hf_storage": hf_storage,
    "StorageWriter": storage.StorageWriter,
    "StorageReader": storage.StorageReader,
    "metadata": metadata,
    "set_element": _torch_internals.set_element,
    "load_bytes": default_planner.DefaultLoadPlanner.load_bytes,
    "_load_state_dict": state_dict_loader._load_state_dict,
    "_save_state_dict": state_dict_saver._save_state_dict,
    "save": torch.serialization.save,
    "_save": torch.serialization._save,
    "_load": torch.serialization._load,
    "skip_data": torch.serialization.skip_data,
    "_open_zipfile_writer_buffer": torch.serialization._open_zipfile_writer_buffer,
    "_get_storage_alignment": torch.serialization._get_storage_alignment,
    "_get_layout": torch.serialization._get_layout,
    "_reduce_ex_internal": torch.Tensor._reduce_ex_internal,
    "__reduce_ex__": torch.Tensor.__reduce_ex__,
    "_rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "_rebuild_tensor_v3": torch._utils._rebuild_tensor_v3,
    "_new_dtypes": torch.storage._new_dtypes,
    "_dtype_to_storage_type_map": inspect.unwrap(torch.storage._dtype_to_storage_type_map),
    "_pickle_storage_type": TypedStorage._pickle_storage_type,
}

PINS: dict[str, dict[str, str]] = {
    "2.13": {
        "narrow_tensor_by_index": "1803a726fedae17d1cdf5a328aa95598",
        "LegacyTensorProperties": "845cb4151e232300db43a117231d7f84",
        "_StorageInfo": "74febf0cc7db965c243cd9ee7c141ff2",
        "_StoragePrefix": "dc648305e70c6a5e5681aea6293b1849",
        "_StorageReaderTransforms": "5d8ba69f11063d3705109ccf0c9589b2",
        "_StorageWriterTransforms": "c3f0219628272a90ac696f6d70662c0d",
        "_split_by_size_and_type": "ccb1de75b9c26b5953b263f0e3e7bc5d",
        "_write_item": "f1494a7d9d07bb44c7353605c24a3c16",
        "_write_files_from_queue": "f25c2a0692a7507e14c65a428a07378e",
        "_SerialCpuLoader": "9aca106cc855ed0544c0ef25669dc1bb",
        "_OverlappingCpuLoader": "a1ecbd0775d9a4207dd238b6863f7787",
        "_FileSystemWriter": "3bfa7f4dc5d955a82fa6c3bbcf848244",
        "FileSystemWriter": "4e8e22ec6d89a04037dc5e77a6e73eaf",
        "FileSystemReader": "2eefef6ddf75604212466d18f8534143",
        "FileSystemBase": "34e001b9a9d3578efdab983f9dff28a9",
        "_hf_utils": "4681fb5c73eb45ddb7fd772796fa1b5a",
        "hf_storage": "bf16c8b8e7e32e31712738e1b472a24a",
        "StorageWriter": "a43de60f0fa825b63af027f1b133db85",
        "StorageReader": "35b8a30fec14f2470861ca0f9c720be9",
        "metadata": "6231a271f0c4808062d44982f730bdf9",
        "set_element": "a07d75df5abdd9228a43e97c90022c0f",
        "load_bytes": "f23c9ba43dc34535b7a55ae790676e8f",
        "_load_state_dict": "7ea12af35d4f0240c414a26fe68973a5",
        "_save_state_dict": "f12bbbcdf2633a2e3d6042229fc4d6da",
        "save": "c473f903cc9fce800dd770f161f9bd11",
        "_save": "fe46053fbb393182d651a7324cfad436",
        "_load": "1f66acd10997e02048da5016fa3ead83",
        "skip_data": "060219be25875ffe936f5a34a2c633ab",
        "_open_zipfile_writer_buffer": "54afaa2fcb72f8fbdb5efedcb893791e",
        "_get_storage_alignment": "626ab3ce7e762f084e473436dd508761",
        "_get_layout": "31d3193d247fd7344821f9ef8f092054",
        "_reduce_ex_internal": "9a2c0ad0f18b0c317ab94e5ee6449585",
        "__reduce_ex__": "9441e267954bee3addf0d4d305d3cce7",
        "_rebuild_tensor_v2": "8033137e4761a0ef63c15aed8812068d",
        "_rebuild_tensor_v3": "4a9b016245ff84fc6f3cc55035c74863",
        "_new_dtypes": "90c01467a0a6318670fe0a04106a7866",
        "_dtype_to_storage_type_map": "30a54bffc9756e14083eef35ec486805",
        "_pickle_storage_type": "b33aa96659f65fa0ef60e6ff9b564a67",
    },
}


def digest(source: object) -> str:
    text = textwrap.dedent(inspect.getsource(source))  # type: ignore[arg-type]
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@pytest.mark.skipif(MINOR not in PINS, reason=f"torch {MINOR} has not been compared yet")
@pytest.mark.parametrize("name", SOURCES)
def test_sources_are_those_that_were_read(name: str) -> None:
    found = digest(SOURCES[name])
    assert found == PINS[MINOR][name], (
        f"torch changed {name}: compare what s3dcp makes of it, then pin {found}"
    )


def test_every_source_is_pinned() -> None:
    assert all(pins.keys() == SOURCES.keys() for pins in PINS.values())


def test_every_exported_name_exists() -> None:
    assert sorted(set(_torch_internals.__all__)) == sorted(_torch_internals.__all__)
    assert all(hasattr(_torch_internals, name) for name in _torch_internals.__all__)
