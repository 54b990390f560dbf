"""In a real IPython kernel, as a notebook runs it: its loop is running whenever a cell is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jupyter_client.manager import start_new_kernel

from s3dcp.testing import FakeS3, Stall
from tests._fakes import BUCKET, uri_of

Cell = Callable[..., str]

_FIRST = f"""
import torch, s3dcp, warnings
warnings.simplefilter("error")
uri = "{uri_of("run/step-1")}"
state = {{"weights": torch.arange(90_000.0), "step": 1}}
"""


@pytest.fixture
def kernel(fake: FakeS3) -> Iterator[tuple[Any, Any]]:
    manager, client = start_new_kernel(kernel_name="python3", env=dict(os.environ))
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.fixture
def cell(kernel: tuple[Any, Any]) -> Cell:
    """Runs a cell, and returns what it showed; or "NameOfError: its text"."""
    _, client = kernel

    def run(code: str, stream: str = "stdout") -> str:
        printed: list[str] = []

        def note(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream" and content["name"] == stream:
                printed.append(content["text"])

        reply = client.execute_interactive(code, timeout=200, output_hook=note)["content"]
        if reply["status"] == "error":
            return f"{reply['ename']}: {reply['evalue']}"
        assert reply["status"] == "ok"  # and not "aborted"
        return "".join(printed).strip()

    return run


def test_cells_save_load_and_await(cell: Cell) -> None:
    assert not cell(_FIRST)
    assert cell("s3dcp.save(state, uri)\nprint(state['step'])") == "1"
    assert cell("await s3dcp.asave(state, uri)\nprint(s3dcp.latest(uri).uri == uri)") == "True"
    loaded = "blank = {'weights': torch.zeros(90_000), 'step': 0}\n{}\n"
    compared = "print(torch.equal(blank['weights'], state['weights']), blank['step'])"
    for call in ("s3dcp.load(blank, uri)", "await s3dcp.aload(blank, uri)"):
        assert cell(loaded.replace("{}\n", f"{call}\n") + compared) == "True 1"
    assert cell("s3dcp.async_save(state, uri).result()\nprint('saved')") == "saved"
    bar = cell("s3dcp.save(state, uri, progress=True)", stream="stderr")
    assert "100%" in bar  # of text, as there are no widgets
    missing = cell("s3dcp.load(blank, uri + '-none')")
    assert missing.startswith("CheckpointNotFoundError: No checkpoint at")


def test_an_interrupted_cell_ends_and_the_next_one_works(
    fake: FakeS3, kernel: tuple[Any, Any], cell: Cell
) -> None:
    manager, client = kernel
    cell(_FIRST)
    rule = fake.inject(Stall(head=False), operation="PutObject", key="*.distcp", times=None)
    # Or a kernel refuses, for a while after an error, the cells that come behind it.
    client.execute("s3dcp.save(state, uri)", stop_on_error=False)
    rule.wait()
    manager.interrupt_kernel()
    reply = client.get_shell_msg(timeout=200)["content"]
    rule.release()
    fake.rules.clear()

    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    assert cell("s3dcp.save(state, uri)\nprint('saved')") == "saved"
    assert not fake.uploads(BUCKET)
