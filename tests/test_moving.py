"""The diffs of the README and the guide: the programs before and after, run one after the other."""

from __future__ import annotations

import ast
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

import s3dcp
from tests._pages import Block, all_blocks

if TYPE_CHECKING:
    from tests._ranks import RankPool
    from tests._servers import Server

DIFFS = all_blocks("diff")


def _applied(block: Block, sign: str) -> str:
    """The program before (-) or after (+) a change."""
    lines = block.text.splitlines()
    assert all(line[:1] in {"", " ", "-", "+"} for line in lines)
    return "\n".join(line[1:] for line in lines if line[:1] in {"", " ", sign})


def _loading(source: str) -> str:
    """A program without its saves."""
    lines = [ast.unparse(each) for each in ast.parse(source).body]
    return "\n".join(line for line in lines if not line.startswith("dcp.save("))


def _run(before: str, after: str) -> None:
    """On a rank: each by itself, and each loads what the other has saved."""
    old, new = (before, _loading(before)), (after, _loading(after))
    for program in (old[0], new[1], new[0], old[1]):
        names: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if program in old else "error")  # the peers have some
            exec(program, names)
        if "loaded" in names:
            assert torch.equal(names["loaded"]["weights"], names["state_dict"]["weights"])


@pytest.mark.parametrize("block", DIFFS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_both_sides_run(ranks1: RankPool, moto: Server, bucket: str, block: Block) -> None:
    """moto, since s3torchconnector's uploads fail on rclone's answers."""
    for stand_in, own in (
        ("my-bucket", bucket),
        ("https://s3.example.com", moto.endpoint_url),
        ("my-key", moto.access_key),
        ("my-secret", moto.secret_key),
    ):
        block = Block(block.page, block.language, block.line, block.text.replace(stand_in, own))

    ranks1.run(_run, _applied(block, "-"), _applied(block, "+"))


@pytest.mark.parametrize("block", DIFFS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_what_is_come_to_is_ours(block: Block) -> None:
    added = [line[1:] for line in block.text.splitlines() if line.startswith("+from ")]
    names = [
        alias.name
        for statement in ast.walk(ast.parse("\n".join(added)))
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    ]

    assert names
    assert set(names) <= set(s3dcp.__all__)


def test_there_is_one_for_each_peer() -> None:
    whole = [block.text for block in DIFFS if "dcp.save(" in block.text]

    assert ["s3torchconnector" in text for text in whole] == [True, False]
    assert ["FsspecWriter(" in text for text in whole] == [False, True]
