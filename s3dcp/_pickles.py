"""The pickles that `.metadata` is made of, which anybody who may write to the bucket can forge.

They are unpickled with nothing but DCP's own types, through stand-ins that a pickle cannot alter:
the BUILD opcode sets attributes on whatever is on the stack, classes and functions included, so
handing out torch's own would let a checkpoint change them for the whole process.
"""

from __future__ import annotations

import copyreg
import functools
import io
import pathlib
import pickle
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from s3dcp._errors import CorruptMetadataError
from s3dcp._giving_way import free_later, give_way
from s3dcp._opcodes import check_opcodes
from s3dcp._torch_internals import LegacyTensorProperties, _StorageInfo

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def pickled(value: object) -> bytes:
    """Pickle metadata as DCP does."""
    file = _Frames()
    pickler = _Pickler(file)
    pickler.dump(value)
    free_later(pickler.states)
    return file.getvalue()


def unpickled(data: bytes | bytearray | memoryview, *, source: str, trusted: bool) -> object:
    """Unpickle metadata.

    Args:
        data: The whole pickle.
        source: Where it was read, for errors.
        trusted: Make whatever it names, and run what that runs.

    Raises:
        CorruptMetadataError: it names types that are not DCP's.
        Exception: of any type, where it is damaged or forged.
    """
    if trusted:
        return pickle.load(_Frames(data))  # noqa: S301 - what `trusted` stands for
    if check_opcodes(data) != len(data):
        raise ValueError("it goes on after its end")
    return _Unpickler(data, source).load()


class _Frames(io.BytesIO):
    """A file that lets other threads run between a pickle's frames, which are of 64 KiB.

    To pickle 50,000 items at once would keep them waiting for 0.1 s. Python code in between does
    not, even though it does nothing.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        give_way()
        return super().read(size)

    def write(self, buffer: ReadableBuffer, /) -> int:
        give_way()
        return super().write(buffer)


class _Pickler(pickle.Pickler):
    """Keeps the state that each place is pickled from, to be freed bit by bit.

    Any pickler keeps them, until it is freed, and all of them with it.
    """

    def __init__(self, file: _Frames) -> None:
        super().__init__(file)
        states: list[object] = []

        def reduced(info: _StorageInfo) -> Any:
            parts: Any = info.__reduce_ex__(pickle.DEFAULT_PROTOCOL)
            states.append(parts[2])
            return parts

        self.dispatch_table = copyreg.dispatch_table | {_StorageInfo: reduced}
        self.states = states


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes | bytearray | memoryview, source: str) -> None:
        super().__init__(_Frames(data))
        self._source = source

    def find_class(self, module: str, name: str, /) -> object:
        try:
            return _GLOBALS[module, name]
        except KeyError:
            raise CorruptMetadataError(
                f"{self._source} names {module}.{name}, which is none of DCP's types: it is "
                "forged, or was written by a planner that has types of its own, for which pass "
                "S3StorageReader(..., trusted_metadata=True): load an older checkpoint"
            ) from None


class _Sealed(type):
    """Of classes whose attributes cannot be set, and whose instances are another class's."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise AttributeError(f"{name} of {cls.__name__} cannot be set")

    def __delattr__(cls, name: str) -> None:
        raise AttributeError(f"{name} of {cls.__name__} cannot be deleted")


def _sealed(cls: type) -> type:
    # pickle wants a class whose `__new__` it calls; a partial keeps that call free of Python.
    create = functools.partial(object.__new__, cls)
    return _Sealed(cls.__name__, (cls,), {"__new__": staticmethod(create), "__slots__": ()})


class _MemoryFormat(int, metaclass=_Sealed):
    """Equals the member of DCP's memory format encodings with its value, and cannot be altered."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return int(self) == getattr(other, "value", other)

    __hash__ = int.__hash__


class _MemberOf(metaclass=_Sealed):
    """Gets a memory format by its name, and nothing else.

    Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) pickle members of an enum as `getattr` of it.
    """

    def __new__(cls, owner: object, name: str) -> Any:
        if owner is not _MemoryFormat:
            raise ValueError("builtins.getattr of what is no memory format")
        return _MemoryFormat(_MEMORY_FORMATS[name])


class _Layout(metaclass=_Sealed):
    """Makes layouts as `torch.serialization._get_layout` does."""

    def __new__(cls, name: str) -> Any:
        return _LAYOUTS[name]


class _Size(metaclass=_Sealed):
    """Makes sizes, and none from a list that is there once and named many times."""

    def __new__(cls, sizes: tuple[int, ...]) -> Any:
        if type(sizes) is not tuple or len(sizes) > _MAX_DIMENSIONS:
            raise ValueError("the size of no tensor")
        return torch.Size(sizes)


class _OrderedDict(metaclass=_Sealed):
    """Makes empty ones, as pickles do; from an argument, it would copy that."""

    def __new__(cls) -> Any:
        return OrderedDict()


class _PosixPath(metaclass=_Sealed):
    def __new__(cls, *parts: str) -> Any:
        return pathlib.PurePosixPath(*_checked(parts))


class _WindowsPath(metaclass=_Sealed):
    def __new__(cls, *parts: str) -> Any:
        return pathlib.PureWindowsPath(*_checked(parts))


def _checked(parts: tuple[str, ...]) -> tuple[str, ...]:
    # A path made of paths is as long as all of them: a few dozen, each of two, fill the memory.
    if not all(type(part) is str for part in parts) or sum(map(len, parts)) > _MAX_PATH_CHARS:
        raise ValueError("not a path of a file system")
    return parts


_MAX_DIMENSIONS = 64  # torch's own limit for a tensor that is more than a shape
_MAX_PATH_CHARS = 1 << 16
_MEMORY_FORMATS = {
    "TORCH_CONTIGUOUS_FORMAT": 0,
    "TORCH_CHANNELS_LAST": 1,
    "TORCH_PRESERVE_FORMAT": 2,
}
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_METADATA = "torch.distributed.checkpoint.metadata"
_LEGACY = "torch.distributed._shard.sharded_tensor.metadata"  # up to torch 2.2

#: All that a checkpoint's metadata may name, and what stands in for it.
_GLOBALS: dict[tuple[str, str], object] = {
    **{
        (_METADATA, cls.__name__): _sealed(cls)
        for cls in (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
        )
    },
    (_METADATA, "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    (_LEGACY, "TensorProperties"): _sealed(LegacyTensorProperties),
    (_LEGACY, "MEM_FORMAT_ENCODING"): _MemoryFormat,
    (_StorageInfo.__module__, _StorageInfo.__name__): _sealed(_StorageInfo),
    **{
        ("torch", str(value).removeprefix("torch.")): value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype)
    },
    ("torch", "Size"): _Size,
    ("torch.serialization", "_get_layout"): _Layout,
    ("builtins", "getattr"): _MemberOf,
    ("collections", "OrderedDict"): _OrderedDict,
    # Python 3.13 alone names them by their private module. Other systems' classes cannot be made.
    **{
        (module, name): make
        for module in ("pathlib", "pathlib._local")
        for name, make in (
            ("PosixPath", _PosixPath),
            ("PurePosixPath", _PosixPath),
            ("WindowsPath", _WindowsPath),
            ("PureWindowsPath", _WindowsPath),
        )
    },
}
