"""A newcomer: what the README says, typed into terminals in a new environment.

The commands and the script are the README's own blocks. What is not done is to download: the
dependencies are those of the environment that runs the tests, and pip may ask no index for more.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import copy, copytree, ignore_patterns, rmtree
from typing import TYPE_CHECKING

import pytest

from tests._pages import ROOT, section_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

_IN_TIME_S = 300
_EXPORTS = 6
_CHECKOUT = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a clone has, as far as installing it goes."""
    for name in _CHECKOUT:
        copy(ROOT / name, tmp_path)
    copytree(ROOT / "s3dcp", tmp_path / "s3dcp", ignore=ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture
def environ() -> dict[str, str]:
    """A terminal's environment."""
    mine = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "PYTHON", "VIRTUAL_ENV"))
    }
    return mine | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip has it the wrong way round: it is `build_isolation`
    }


def typed(commands: str, folder: Path, environ: dict[str, str]) -> str:
    """Run commands as a terminal would, but for ending at the first that fails."""
    done = subprocess.run(
        ["bash", "-ec", commands],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@contextmanager
def left_running(commands: str, folder: Path, environ: dict[str, str]) -> Iterator[str]:
    """Run commands in a terminal of their own up to Ctrl-C; yields what to paste into another."""
    with subprocess.Popen(
        ["bash", "-ec", commands],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as shell:
        assert shell.stdout is not None
        try:
            yield "".join(shell.stdout.readline() for _ in range(_EXPORTS))
        finally:
            os.killpg(shell.pid, signal.SIGINT)
    assert shell.returncode == 0


def borrow_dependencies(folder: Path) -> None:
    """Let a new environment have the packages of this one, s3dcp excepted."""
    specs = [find_spec(name) for name in ("torch", "hatchling")]
    sites = {Path(spec.origin).parents[1] for spec in specs if spec and spec.origin}
    [new] = folder.glob(".venv/lib/python*/site-packages")
    for old in new.glob("setuptools*"):
        rmtree(old)  # Python 3.11 makes environments with one that is too old for torch
    (new / "borrowed.pth").write_text("\n".join(map(str, sites)), encoding="utf-8")


@pytest.mark.timeout(_IN_TIME_S)
def test_from_an_empty_folder_to_a_checkpoint_that_was_loaded(
    checkout: Path, environ: dict[str, str]
) -> None:
    began_s = time.monotonic()
    made, installed = section_blocks("## Install")
    served, script, used = section_blocks("### Save and load in five minutes")
    [_, activate] = made.text.splitlines()

    typed(made.text, checkout, environ)
    borrow_dependencies(checkout)
    typed(f"{activate}\n{installed.text}", checkout, environ)
    with left_running(served.text, checkout, environ) as exports:
        own = checkout / "own"  # or Python would import the checkout's s3dcp, not the installed
        own.mkdir()
        (own / "first.py").write_text(script.text, encoding="utf-8")
        said = typed(f"{activate}\ncd own\n{exports}\n{used.text}", checkout, environ)

    assert time.monotonic() - began_s < _IN_TIME_S
    loaded, _, listed = said.splitlines()[-3:]
    assert loaded == "loaded step 100"
    assert listed.split()[-2:] == ["s3://my-bucket/run/step-100", "complete"]

    check_installed(checkout)
    # What our messages say to do is good for an installation that no index has.
    typed(f'cd /\n. {checkout}/{activate[2:]}\npip install "s3dcp[cli]"', checkout, environ)


def check_installed(folder: Path) -> None:
    """The package is all there, and nothing else is."""
    [package] = folder.glob(".venv/lib/python*/site-packages/s3dcp")
    wanted, found = (
        {path.relative_to(each) for path in each.rglob("*") if path.suffix in {".py", ".typed"}}
        for each in (ROOT / "s3dcp", package)
    )
    assert found == wanted
    assert Path("py.typed") in found
