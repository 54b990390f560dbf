"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import s3dcp

_ROOT = Path(__file__).parents[1]
_PACKAGES = (
    "torch",
    "aiobotocore",
    "aiohttp",
    "uvloop",
    "awscrt",
    "s3torchconnector",
    "s3fs",
)


def facts(now: datetime) -> dict[str, str]:
    """Return the machine, the versions and the run, in the order in which they are printed."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "Date": f"{now:%Y-%m-%d %H:%M} UTC",
        "Commit": _commit(),
        "Machine": f"{_processor()}, {_cores()} cores, {_memory()}",
        "System": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "Versions": ", ".join([f"s3dcp {s3dcp.__version__}", *_versions()]),
        "Load average at the start": load,
    }


def _versions() -> Iterator[str]:
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # uvloop is not everywhere
            yield f"{name} {version(name)}"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"

    def ask(*arguments: str) -> str:
        found = subprocess.run(
            [git, *arguments], cwd=_ROOT, capture_output=True, text=True, check=False
        )
        return found.stdout.strip()

    changed = ask("status", "--porcelain", "--untracked-files=no", "--", "s3dcp", "benchmarks/*.py")
    return (ask("rev-parse", "--short", "HEAD") or "unknown") + (" and changes" if changed else "")


def _processor() -> str:
    return _after(Path("/proc/cpuinfo"), "model name") or platform.processor() or "unknown"


def _memory() -> str:
    found = _after(Path("/proc/meminfo"), "MemTotal")
    return f"{int(found.split()[0]) / (1 << 20):.0f} GiB" if found else "memory unknown"


def _after(path: Path, field: str) -> str | None:
    if path.exists():
        for line in path.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return None
