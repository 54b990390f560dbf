"""The layers: what a module of s3dcp may import, read from its syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import s3dcp

PACKAGE = Path(s3dcp.__file__).parent

# A module imports from rows above its own, or from modules to its left in its row.
ROWS = {
    # Errors stand above the portal, whose own are among them: users catch one tree.
    "errors": ["_errors", "_node", "_waiting"],
    "portal": [
        *("_giving_way", "_collector", "_calls", "_workers", "_loop_thread"),
        *("_cancellation", "_portal", "_budget"),
    ],
    "values": ["_config", "_keys", "_store"],
    "pure": ["_checksums", "_ranges", "_boxes", "_commit", "_formats", "_inventory", "_opcodes"],
    "engine": ["_pacing", "_tally", "_flow", "_uploads", "_downloads", "_publish"],
    "transport": [
        *("_receive", "_sockets", "_turns", "_payload", "_failures"),
        *("_botocore", "_client", "_spread"),
    ],
    "tensors": [
        *("_torch_internals", "_pickles", "_metadata", "_framing", "_layouts", "_devices"),
        *("_staging", "_safetensors", "_hf_index"),
    ],
    "facade": [
        *("_report", "_progress", "_telemetry", "_planning", "_recording"),
        *("_s3client", "_prefixes", "_streams", "_readers", "_ranged_reader", "_dcp_reader"),
        *("_constructors", "_transfers", "_filesystem"),
        *("_items", "_landing", "_outgoing", "_saving", "_loading"),
        *("_writer", "_reader", "_group_reader", "_planner", "_checkpoint"),
        *("_hf_files", "_survey", "_catalog", "_verifying"),
        *("_copies", "_disk", "_places", "_manifests", "_movers", "_sending", "_copying", "_bench"),
        *("_consolidation", "_hf_saving", "_hf_writer", "_hf_reader"),
    ],
    "cli": ["_terminal", "_options", "_plots", "_cli_bench", "_cli", "__main__"],
}
ORDER = [module for row in ROWS.values() for module in row]
ROW_OF = {module: row for row, modules in ROWS.items() for module in modules}

# Only these rows import these packages.
RESERVED = {
    "threading": {"portal"},
    "uvloop": {"portal"},
    "aiohttp": {"transport"},
    "aiobotocore": {"transport"},
    "botocore": {"transport"},
    "torch": {"tensors", "facade"},
    "click": {"cli"},
    "tqdm": {"facade", "cli"},
    "opentelemetry": {"facade"},
    "matplotlib": {"cli"},
}

PRESENT = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
TESTING = sorted((PACKAGE / "testing").glob("*.py"))


class Imports(ast.NodeVisitor):
    """What a module imports, in absolute dotted names; functions' bodies included.

    Attributes:
        run: What is imported when the module or one of its functions runs.
        typed: What is imported under `if TYPE_CHECKING` alone.
    """

    def __init__(self, source: str, package: str) -> None:
        self.run: set[str] = set()
        self.typed: set[str] = set()
        self._into = self.run
        self._package = package.split(".")
        self.visit(ast.parse(source))

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            self.generic_visit(node)
            return
        outer, self._into = self._into, self.typed
        for statement in node.body:
            self.visit(statement)
        self._into = outer
        for statement in node.orelse:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        self._into.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self._package[: len(self._package) - node.level + 1] if node.level else []
        module = ".".join([*base, node.module] if node.module else base)
        # `from s3dcp import _errors` imports a module, `from s3dcp._errors import X` a name.
        self._into.update(f"{module}.{alias.name}" for alias in node.names)


def imports_of(path: Path, package: str = "s3dcp") -> Imports:
    return Imports(path.read_text("utf-8"), package)


def own(names: set[str]) -> set[str]:
    """The modules of s3dcp among dotted names; "" is the package itself."""
    parts = [name.split(".") for name in names]
    inside = {part[1] if len(part) > 1 else "" for part in parts if part[0] == "s3dcp"}
    return {name if name in {*PRESENT, "testing"} else "" for name in inside}


def foreign(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_imports_are_read_in_every_form() -> None:
    source = """
if TYPE_CHECKING:
    import torch
else:
    import numpy
import aiohttp.payload
from . import _errors
from .._store import Store
def later():
    from botocore.auth import SigV4Auth
"""

    imports = Imports(source, "s3dcp.testing")

    assert imports.typed == {"torch"}
    assert imports.run == {
        "numpy",
        "aiohttp.payload",
        "s3dcp.testing._errors",
        "s3dcp._store.Store",
        "botocore.auth.SigV4Auth",
    }
    assert own(imports.run) == {"testing", "_store"}
    assert own({"s3dcp", "s3dcp.S3Client", "s3dcp._errors.S3Exception"}) == {"", "_errors"}


def test_every_module_has_a_place() -> None:
    assert set(PRESENT) <= set(ORDER)


@pytest.mark.parametrize("module", sorted(set(PRESENT) & set(ORDER)))
def test_imports_point_up_or_left(module: str) -> None:
    imports = imports_of(PACKAGE / f"{module}.py")

    allowed = set(ORDER[: ORDER.index(module)])
    if ROW_OF[module] == "cli":
        allowed |= {"", "testing"}  # it stands outside, as users do
    assert own(imports.run) <= allowed
    assert own(imports.typed) <= allowed


@pytest.mark.parametrize("module", sorted(set(PRESENT) & set(ORDER)))
def test_packages_are_imported_in_their_row_only(module: str) -> None:
    imports = imports_of(PACKAGE / f"{module}.py")

    for package in foreign(imports.run) & set(RESERVED):
        assert ROW_OF[module] in RESERVED[package], package


@pytest.mark.parametrize("path", TESTING, ids=lambda path: path.stem)
def test_the_testing_package_stands_alone(path: Path) -> None:
    imports = imports_of(path, "s3dcp.testing")

    assert own(imports.run | imports.typed) <= {"_errors", "testing"}
    assert "torch" not in foreign(imports.run | imports.typed)
