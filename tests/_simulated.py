"""The simulated accelerator: compiled, and registered with torch for the rest of this process."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

NAME = "simulated"
_SOURCE = Path(__file__).with_suffix(".cpp")
_COMPILER = "g++"


def can_be_built() -> bool:
    """Whether there is what it takes."""
    return sys.platform == "linux" and shutil.which(_COMPILER) is not None


def register(folder: Path) -> None:
    """Build it in a folder, which takes 10 s, and make it this process's accelerator."""
    library = folder / f"{NAME}.so"
    paths = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    subprocess.run(
        [
            *(_COMPILER, "-std=c++20", "-Wall", "-Werror", "-O1", "-shared", "-fPIC"),
            *(*paths, str(_SOURCE), "-o", str(library)),
            *(*libraries, "-lc10", "-ltorch_cpu"),
        ],
        check=True,
    )
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _Module())  # type: ignore[no-untyped-call]


class _Module(types.ModuleType):
    """What torch and s3dcp ask of `torch.simulated`."""

    def __init__(self) -> None:
        super().__init__(f"torch.{NAME}")

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        count: int = torch.ops.simulated.device_count()
        return count

    @staticmethod
    def stream(stream: torch.Stream) -> torch.Stream:
        return stream  # a context

    is_initialized = is_available
    current_device = staticmethod(torch.accelerator.current_device_index)
    current_stream = staticmethod(torch.accelerator.current_stream)
