"""The README, run: its Python, its imports, its commands, its tables.

Every Python block runs, top to bottom, in one namespace on one rank, as the page's first comment
says. No block can opt out: a fence of a language that is not known here fails a test, and the
lines that ran are compared with the fences that a plain scan finds.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import os
import re
import shlex
import tomllib
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import s3dcp
from s3dcp._cli import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests._ranks import RankPool
    from tests._servers import Server

_ROOT = Path(__file__).parents[1]
_README = _ROOT / "README.md"
_LANGUAGES = {"python", "sh", "diff"}
_BUCKET = "my-bucket"
_ENDPOINT = "https://s3.example.com"


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block, and the line of the README that its first line is."""

    language: str
    line: int
    text: str


def _lines() -> list[str]:
    return _README.read_text(encoding="utf-8").splitlines()


def _blocks(language: str | None = None) -> list[Block]:
    found: list[Block] = []
    opened: tuple[str, int] | None = None
    for number, line in enumerate(_lines(), 1):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened = line[3:], number + 1
        else:
            assert line == "```", f"README.md:{number}: a fence inside a fence"
            text = "\n".join(_lines()[opened[1] - 1 : number - 1]) + "\n"
            found.append(Block(*opened, text))
            opened = None
    assert opened is None, "README.md: a fence that does not end"
    return [block for block in found if language in (None, block.language)]


def _rows(first_cell: str) -> Iterator[list[str]]:
    """The cells of the rows of the table with this heading."""
    lines = iter(_lines())
    for line in lines:
        if line.startswith(f"| {first_cell} |"):
            break
    else:
        pytest.fail(f"README.md has no table that starts with {first_cell!r}")
    next(lines)
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split(" | ")]


def _names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def _pyproject() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return found["project"]  # type: ignore[no-any-return]


def _run_snippets(snippets: list[Block]) -> list[int]:
    """On a rank: run them all, and return the lines where they start."""
    namespace: dict[str, object] = {"__name__": "readme"}
    ran = []
    for snippet in snippets:
        environ = dict(os.environ)
        # Empty lines in front, so that a traceback has the README's own line numbers.
        code = compile("\n" * (snippet.line - 1) + snippet.text, _README, "exec")
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("error")
                exec(code, namespace)
        finally:
            os.environ.clear()
            os.environ.update(environ)
        ran.append(snippet.line)
    return ran


class TestSnippets:
    def test_every_python_block_runs(self, ranks1: RankPool, server: Server, bucket: str) -> None:
        snippets = []
        for block in _blocks("python"):
            text = block.text.replace(_BUCKET, bucket).replace(_ENDPOINT, server.endpoint_url)
            snippets.append(Block(block.language, block.line, text))

        [ran] = ranks1.run(_run_snippets, snippets)

        scanned = [n + 1 for n, line in enumerate(_lines(), 1) if line.strip() == "```python"]
        assert ran == scanned
        assert len(ran) >= 8

    def test_what_stands_for_the_tests_own_is_used_and_said(self) -> None:
        comment = _README.read_text(encoding="utf-8").partition("<!--")[2].partition("-->")[0]
        for stand_in in (_BUCKET, _ENDPOINT):
            assert f"`{stand_in}`" in comment
            assert any(stand_in in block.text for block in _blocks("python"))

    def test_no_block_hides(self) -> None:
        """Every fence starts its line, and is of a language that something here checks."""
        blocks = _blocks()

        assert {block.language for block in blocks} == _LANGUAGES
        fences = [line for line in _lines() if "```" in line or "~~~" in line]
        assert len(fences) == 2 * len(blocks)

    def test_diffs_are_of_imports_that_work(self) -> None:
        for block in _blocks("diff"):
            signs = {line[:1] for line in block.text.splitlines()}
            assert signs == {"-", "+"}
            for sign in signs:
                source = "\n".join(
                    line[1:] for line in block.text.splitlines() if line.startswith(sign)
                )
                body = ast.parse(source).body
                assert all(isinstance(statement, ast.ImportFrom) for statement in body)
                exec(compile(source, f"{_README}:{block.line}", "exec"), {})

    def test_a_diff_replaces_every_name(self) -> None:
        for block in _blocks("diff"):
            removed, added = (
                [
                    alias.name
                    for line in block.text.splitlines()
                    if line.startswith(sign)
                    for statement in ast.parse(line[1:]).body
                    if isinstance(statement, ast.ImportFrom)
                    for alias in statement.names
                ]
                for sign in "-+"
            )
            assert len(removed) == len(added)
            assert all(name in s3dcp.__all__ for name in added)


class TestCommands:
    def test_make_targets_exist(self) -> None:
        makefile = (_ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
        named = re.findall(r"`make ([\w-]+)", _README.read_text(encoding="utf-8"))

        assert {"demo", "test"} <= set(named) <= targets

    def test_shell_commands_name_what_exists(self) -> None:
        commands = [
            shlex.split(line, comments=True)
            for block in _blocks("sh")
            for line in block.text.splitlines()
        ]

        assert {command[0] for command in commands} == {"pip", "torchrun", "s3dcp"}
        for command in commands:
            if command[0] == "torchrun":
                _check_script(command[1:])
            if command[0] == "s3dcp":
                cli.commands[command[1]].make_context(command[1], command[2:])  # or it raises

    def test_every_command_is_shown(self) -> None:
        shown = re.findall(r"^s3dcp ([\w-]+)", _README.read_text(encoding="utf-8"), re.MULTILINE)

        assert set(shown) == set(cli.commands)

    def test_extras_exist(self) -> None:
        extras = set(re.findall(r"\.\[(\w+)\]", _README.read_text(encoding="utf-8")))

        assert extras
        assert extras <= set(_pyproject()["optional-dependencies"])


def _check_script(arguments: list[str]) -> None:
    [script] = [word for word in arguments if word.endswith(".py")]
    source = (_ROOT / script).read_text(encoding="utf-8")
    for option in arguments[arguments.index(script) + 1 :]:
        if option.startswith("--"):
            assert f'"{option}"' in source, f"{script} has no {option}"


class TestTables:
    def test_configuration(self) -> None:
        told = {
            _names(name)[0]: ast.literal_eval(default.strip("`"))
            for name, default, _ in _rows("`S3ClientConfig` field")
        }

        assert told == {
            field.name: field.default for field in fields(s3dcp.S3ClientConfig) if field.name != "_"
        }
        assert list(told) == [field.name for field in fields(s3dcp.S3ClientConfig)]

    def test_errors(self) -> None:
        """Each is told of once, all but the two that only group others."""
        told = [name for error, _ in _rows("error") for name in _names(error)]
        raised = {
            name
            for name in s3dcp.__all__
            if isinstance(found := getattr(s3dcp, name), type) and issubclass(found, Exception)
        }

        assert len(told) == len(set(told))
        assert set(told) == raised - {"S3Exception", "CheckpointError"}

    def test_support_matrix(self) -> None:
        supported = {name: cell for name, cell, _ in _rows("part")}
        project = _pyproject()
        ranges = {
            name: bounds
            for requirement in project["dependencies"]
            for name, bounds in re.findall(r"^([\w-]+)([^;]*)", requirement)
        }

        for name in ("torch", "aiobotocore", "aiohttp"):
            assert supported[name] == f"`{ranges[name]}`"
        assert project["requires-python"] == f">={supported['Python'].split()[0]}"

    def test_prefix_strategies(self) -> None:
        told = {
            name
            for strategy, _ in _rows("strategy")
            for name in re.findall(r"\w+Strategy\w*", strategy)
        }

        assert told == {name for name in s3dcp.__all__ if "Strategy" in name}


class TestText:
    def test_names_exist(self) -> None:
        """Whatever looks like one of s3dcp's names is one, or Python's, torch's, or the peer's."""
        text = _README.read_text(encoding="utf-8")
        named = set(re.findall(r"`(S3\w+|\w+Error|\w+Strategy)\b", text))

        assert {name for name in named if not hasattr(s3dcp, name)} <= set(dir(builtins))

    def test_links_lead_somewhere(self) -> None:
        text = _README.read_text(encoding="utf-8")
        headings = {
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        for target in re.findall(r"\]\((?!https?://)([^)]*)\)", text):
            if target.startswith("#"):
                assert target[1:] in headings
            else:
                assert (_ROOT / target).exists()

    def test_the_version_is_in_the_changelog(self) -> None:
        changelog = (_ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        newest = re.search(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)

        assert newest is not None
        assert newest[1] == s3dcp.__version__ == _pyproject()["version"]
