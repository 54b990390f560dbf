"""The README and the guide, run: their Python, imports, commands and tables.

Every Python block of a page runs, top to bottom, in one namespace on one rank, as the README's
first comment says. No block can opt out: a fence of a language that is not known here fails a test,
and the lines that ran are compared with the fences that a plain scan finds.
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
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import botocore.exceptions
import pytest
from click.testing import CliRunner

import s3dcp
from s3dcp._cli import cli
from s3dcp._failures import _BY_CODE
from s3dcp.testing import FakeS3
from tests._pages import PAGES, README, ROOT, Block, all_blocks, blocks_of, lines_of, rows_of
from tests._servers import use

if TYPE_CHECKING:
    from tests._ranks import RankPool
    from tests._servers import Server

_LANGUAGES = {"python", "sh", "diff", "json"}
_BUCKET = "my-bucket"
_ENDPOINT = "https://s3.example.com"
_PROGRAMS = {"torchrun", "s3dcp"}
_TYPED = {"python3", ".", "pip", "python"}  # by tests.test_newcomer
_NOT_RUN = {"serve"}
_CODE = re.compile(r"`([^`]{8,})`")  # shorter ones are parts of names
# S3's names for errors that mean nothing more to us than their status.
_OF_STORES = {
    *("Forbidden", "NotImplemented", "InvalidArgument", "MalformedXML"),
    *("KMS.DisabledException", "KMS.NotFoundException"),
}
# Of the calls, s3fs and torch.
_ARGUMENTS = {
    *("overwrite", "region", "weights_only", "thread_count", "use_collectives", "no_dist"),
    *("reader_constructor", "s3client_config", "serialization_format", "keep", "dry_run"),
    *("progress", "save_distributed", "enable_consolidation", "format"),
    *("cache_staged_state_dict", "anon", "trusted_metadata", "storage_writer", "storage_reader"),
}


every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def _names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def _texts(tree: ast.AST) -> list[str]:
    """The strings of a module that are no docstrings."""
    nodes = list(ast.walk(tree))
    docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


def _errors() -> set[str]:
    """Those that are raised: all but the two that only group others."""
    every = {
        name
        for name in s3dcp.__all__
        if isinstance(found := getattr(s3dcp, name), type) and issubclass(found, Exception)
    }
    return every - {"S3Exception", "CheckpointError"}


def _pyproject() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return found["project"]  # type: ignore[no-any-return]


def _run_snippets(snippets: list[Block]) -> list[int]:
    """On a rank: run them all, and return the lines where they start."""
    namespace: dict[str, object] = {"__name__": "readme"}
    ran = []
    for snippet in snippets:
        environ = dict(os.environ)
        # Empty lines in front, so that a traceback has the page's own line numbers.
        code = compile("\n" * (snippet.line - 1) + snippet.text, snippet.page, "exec")
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", "torch.distributed is")  # without a group
                exec(code, namespace)
        finally:
            os.environ.clear()
            os.environ.update(environ)
        ran.append(snippet.line)
    return ran


class TestSnippets:
    @every_page
    def test_every_python_block_runs(
        self, ranks1: RankPool, server: Server, bucket: str, page: Path
    ) -> None:
        snippets = []
        for block in blocks_of("python", page):
            text = block.text.replace(_BUCKET, bucket).replace(_ENDPOINT, server.endpoint_url)
            snippets.append(Block(page, block.language, block.line, text))

        [ran] = ranks1.run(_run_snippets, snippets)

        scanned = [n + 1 for n, line in enumerate(lines_of(page), 1) if line.strip() == "```python"]
        assert ran == scanned

    def test_the_readmes_run_without_a_process_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in the terminal that `s3dcp serve` has been made known to."""
        with FakeS3() as fake:
            fake.create_bucket(_BUCKET)
            for name, value in fake.environ().items():
                monkeypatch.setenv(name, value)
            assert _run_snippets(blocks_of("python"))
            fake.check()

    def test_there_are_snippets(self) -> None:
        assert len(blocks_of("python")) >= 8
        assert len(all_blocks("python")) >= 18

    def test_what_stands_for_the_tests_own_is_used_and_said(self) -> None:
        comment = README.read_text(encoding="utf-8").partition("<!--")[2].partition("-->")[0]
        for stand_in in (_BUCKET, _ENDPOINT):
            assert f"`{stand_in}`" in comment
            assert any(stand_in in block.text for block in all_blocks("python"))

    @every_page
    def test_no_block_hides(self, page: Path) -> None:
        """Every fence starts its line, and is of a language that something here checks."""
        blocks = blocks_of(page=page)

        assert {block.language for block in blocks} <= _LANGUAGES
        fences = [line for line in lines_of(page) if "```" in line or "~~~" in line]
        assert len(fences) == 2 * len(blocks)


class TestCommands:
    def test_make_targets_exist(self) -> None:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
        named = re.findall(r"`make ([\w-]+)", README.read_text(encoding="utf-8"))

        assert {"demo", "test"} <= set(named) <= targets

    def test_shell_commands_name_what_exists(self) -> None:
        commands = [
            shlex.split(line, comments=True)
            for block in all_blocks("sh")
            for line in block.text.splitlines()
        ]

        assert {command[0] for command in commands} == _PROGRAMS | _TYPED
        for command in commands:
            if command[0] == "torchrun":
                _check_script(command[1:])
            if command[0] == "s3dcp":
                cli.commands[command[1]].make_context(command[1], command[2:])  # or it raises

    @every_page
    def test_commands_of_ours_run(
        self, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a run of three checkpoints; `serve` would not end."""
        monkeypatch.chdir(tmp_path)
        with FakeS3() as fake:
            use(fake, monkeypatch)
            fake.create_bucket(_BUCKET)
            for step in (100, 200, 300):
                s3dcp.save({"step": step}, f"s3://{_BUCKET}/run/step-{step}")
            for block in blocks_of("sh", page):
                for line in block.text.splitlines():
                    program, *arguments = shlex.split(line, comments=True)
                    if program == "s3dcp" and arguments[0] not in _NOT_RUN:
                        done = CliRunner().invoke(cli, arguments)
                        assert done.exit_code == 0, f"{line}: {done.output}"
            fake.check()

    def test_every_command_is_shown(self) -> None:
        shown = re.findall(r"^s3dcp ([\w-]+)", README.read_text(encoding="utf-8"), re.MULTILINE)

        assert set(shown) == set(cli.commands)

    def test_extras_exist(self) -> None:
        extras = set(re.findall(r"\.\[(\w+)\]", README.read_text(encoding="utf-8")))

        assert extras
        assert extras <= set(_pyproject()["optional-dependencies"])


def _check_script(arguments: list[str]) -> None:
    [script] = [word for word in arguments if word.endswith(".py")]
    source = (ROOT / script).read_text(encoding="utf-8")
    for option in arguments[arguments.index(script) + 1 :]:
        if option.startswith("--"):
            assert f'"{option}"' in source, f"{script} has no {option}"


class TestTables:
    def test_configuration(self) -> None:
        told = {
            _names(name)[0]: ast.literal_eval(default.strip("`"))
            for name, default, _ in rows_of("`S3ClientConfig` field")
        }

        assert told == {
            field.name: field.default for field in fields(s3dcp.S3ClientConfig) if field.name != "_"
        }
        assert list(told) == [field.name for field in fields(s3dcp.S3ClientConfig)]

    def test_errors(self) -> None:
        """Each is told of once."""
        told = [name for error, _ in rows_of("error") for name in _names(error)]

        assert len(told) == len(set(told))
        assert set(told) == _errors()

    def test_messages(self) -> None:
        """Each is one of ours, of botocore's, or S3's name for an error; every error has one."""
        ours = "\n".join(
            text
            for path in Path(s3dcp.__file__).parent.glob("_*.py")
            for text in _texts(ast.parse(path.read_text(encoding="utf-8")))
        )
        theirs = "\n".join(
            getattr(found, "fmt", "") for found in vars(botocore.exceptions).values()
        )
        rows = list(rows_of("message"))
        told = {
            text: error.strip("`") for cell, error, _ in rows for text in re.findall(_CODE, cell)
        }

        assert {text for text in told if text not in ours + theirs} == _OF_STORES
        assert {code: _BY_CODE[code].__name__ for code in told.keys() & _BY_CODE} == {
            code: error for code, error in told.items() if code in _BY_CODE
        }
        assert {name for _, error, _ in rows for name in _names(error)} == _errors()

    def test_support_matrix(self) -> None:
        supported = {name: cell for name, cell, _ in rows_of("part")}
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
            for strategy, _ in rows_of("strategy")
            for name in re.findall(r"\w+Strategy\w*", strategy)
        }

        assert told == {name for name in s3dcp.__all__ if "Strategy" in name}


def _anchors(page: Path) -> set[str]:
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    }


class TestText:
    @every_page
    def test_names_exist(self, page: Path) -> None:
        """Whatever looks like one of s3dcp's names is one, or Python's, or S3's for an error."""
        named = set(re.findall(r"`(S3\w+|\w+Error|\w+Strategy)\b", page.read_text("utf-8")))

        assert {name for name in named if not hasattr(s3dcp, name)} <= {*dir(builtins), *_BY_CODE}

    @every_page
    def test_settings_exist(self, page: Path) -> None:
        """Whatever is written as an argument with a value is one of a setting or a call."""
        named = set(re.findall(r"`(\w+)=(?!\{)[^`]*`", page.read_text("utf-8")))
        settings = {field.name for field in fields(s3dcp.S3ClientConfig)}

        assert named <= settings | _ARGUMENTS

    @every_page
    def test_links_lead_somewhere(self, page: Path) -> None:
        for target in re.findall(r"\]\((?!https?://)([^)]*)\)", page.read_text("utf-8")):
            path, _, heading = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), target
            assert not heading or heading in _anchors(there), target

    def test_the_guide_is_whole(self) -> None:
        """Its index leads to every page, and the README to the index."""
        index = (ROOT / "docs" / "README.md").read_text("utf-8")

        assert all(page.name in index for page in PAGES if page.parent.name == "docs")
        assert "docs/README.md" in README.read_text("utf-8")

    def test_the_version_is_in_the_changelog(self) -> None:
        changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        newest = re.search(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)

        assert newest is not None
        assert newest[1] == s3dcp.__version__ == _pyproject()["version"]
