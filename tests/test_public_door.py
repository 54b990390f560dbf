"""The public door: what `s3dcp` exports, and that the reference library's calls fit it."""

from __future__ import annotations

import inspect
import pickle
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import s3torchconnector
import s3torchconnector.s3reader as reference_readers
from s3torchconnector._s3client import S3Client as ReferenceClient
from s3torchconnector.dcp import s3_file_system as reference_fs
from s3torchconnector.dcp import s3_prefix_strategy as reference_prefixes
from torch import Size
from torch.distributed.checkpoint.filesystem import (
    FileSystemBase,
    FileSystemReader,
    FileSystemWriter,
    SerializationFormat,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
)

import s3dcp

SOURCE = Path(s3dcp.__file__).read_text("utf-8")
BASE = "s3://bucket/run"


def parameters(function: Any) -> list[inspect.Parameter]:
    return [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self" and parameter.kind is not parameter.VAR_KEYWORD
    ]


class TestExports:
    def test_all_is_what_is_there(self) -> None:
        public = {
            name
            for name, value in vars(s3dcp).items()
            if not name.startswith("_") and not isinstance(value, ModuleType)
        }
        assert set(s3dcp.__all__) == public | {"__version__"}
        assert len(s3dcp.__all__) == len(set(s3dcp.__all__))

    def test_mypy_checks_a_program_that_uses_every_name(self) -> None:
        program = Path(__file__).with_name("typed_user.py").read_text("utf-8")
        assert set(s3dcp.__all__) == set(re.findall(r"\bs3dcp\.(\w+)", program)) - {"testing"}

    def test_no_module_but_the_second_door_is_public(self) -> None:
        modules = {name for name, value in vars(s3dcp).items() if isinstance(value, ModuleType)}
        assert {name for name in modules if not name.startswith("_")} <= {"testing"}
        for path in Path(s3dcp.__file__).parent.glob("*.py"):
            assert path.stem.startswith("_"), path

    def test_all_is_grouped_and_sorted(self) -> None:
        listed = SOURCE.partition("__all__ = [")[2].partition("]")[0]
        groups = re.split(r"# [a-z ]+\n", listed)[1:]
        assert len(groups) >= 5
        for group in groups:
            names = re.findall(r'"(\w+)"', group)
            assert names == sorted(names, key=lambda name: (name.startswith("__"), name))

    def test_a_star_import_is_all(self) -> None:
        namespace: dict[str, object] = {}
        exec("from s3dcp import *", namespace)
        assert namespace.keys() - {"__builtins__"} == set(s3dcp.__all__)

    def test_everything_says_what_it_is(self) -> None:
        for name in s3dcp.__all__:
            value = getattr(s3dcp, name)
            if inspect.isclass(value):
                assert value.__doc__, name
                assert value.__name__ == name
                assert value.__module__.startswith("s3dcp._")

    def test_the_version_is_the_packages(self) -> None:
        project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
        assert s3dcp.__version__ == project["project"]["version"]


# What the reference has, where, and under which names.
REFERENCE: list[tuple[Any, Any, str]] = [
    (s3dcp, reference_fs, "S3FileSystem S3StorageReader S3StorageWriter StorageMetadata"),
    (s3dcp, reference_prefixes, "DefaultPrefixStrategy NumericPrefixStrategy"),
    (s3dcp, reference_prefixes, "BinaryPrefixStrategy HexPrefixStrategy RoundRobinPrefixStrategy"),
    (s3dcp, reference_readers, "SequentialS3Reader RangedS3Reader DCPOptimizedS3Reader"),
    (s3dcp, s3torchconnector, "S3Writer"),
    (
        s3dcp.S3ReaderConstructor,
        reference_readers.S3ReaderConstructor,
        "sequential range_based dcp_optimized default get_reader_type_string",
    ),
    (s3dcp.S3Client, ReferenceClient, "head_object delete_object copy_object"),
    (
        s3dcp.S3FileSystem,
        reference_fs.S3FileSystem,
        "create_stream concat_path init_path mkdir exists rm_file validate_checkpoint_id",
    ),
    (
        s3dcp.S3StorageWriter,
        reference_fs.S3StorageWriter,
        "prepare_global_plan validate_checkpoint_id",
    ),
    (
        s3dcp.S3StorageReader,
        reference_fs.S3StorageReader,
        "prepare_local_plan validate_checkpoint_id",
    ),
    (s3dcp.S3PrefixStrategyBase, reference_prefixes.S3PrefixStrategyBase, "generate_prefix"),
    (s3dcp.S3PrefixStrategyBase, reference_prefixes.S3PrefixStrategyBase, "__call__"),
]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (getattr(ours, name), getattr(theirs, name))
        for ours, theirs, names in REFERENCE
        for name in names.split()
    ],
    ids=lambda value: value.__qualname__,
)
def test_the_references_arguments_fit(ours: Any, theirs: Any) -> None:
    """Names, order and defaults; more may follow."""
    wanted = parameters(theirs)
    found = parameters(ours)[: len(wanted)]
    assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in wanted]


@pytest.mark.parametrize("name", sorted(FileSystemBase.__abstractmethods__))
def test_the_file_system_is_torchs(name: str) -> None:
    wanted = parameters(getattr(FileSystemBase, name))
    found = parameters(getattr(s3dcp.S3FileSystem, name))
    # `rename(path, new_path)` is torch's; the reference calls the first one `old_path`.
    assert [p.name for p in found] == [p.name for p in wanted]


def test_readers_have_the_references_methods() -> None:
    for name in ("S3Reader", "SequentialS3Reader", "RangedS3Reader", "DCPOptimizedS3Reader"):
        theirs = {method for method in dir(getattr(reference_readers, name)) if method[0] != "_"}
        assert theirs <= set(dir(getattr(s3dcp, name)))


class TestStorageWriter:
    def test_its_attributes(self) -> None:
        strategy = s3dcp.HexPrefixStrategy(prefix_count=4)
        config = s3dcp.S3ClientConfig(max_attempts=2)
        writer = s3dcp.S3StorageWriter("eu-west-1", BASE, config, strategy, 3)

        assert isinstance(writer, FileSystemWriter)
        assert isinstance(writer.fs, s3dcp.S3FileSystem)
        assert writer.fs.client.region == "eu-west-1"
        assert writer.fs.client.s3client_config == config
        assert writer.path == BASE
        assert writer.prefix_strategy is strategy
        assert writer.thread_count == 3
        assert writer.sync_files is False
        default = s3dcp.S3StorageWriter(region="eu-west-1", path=BASE)
        assert isinstance(default.prefix_strategy, s3dcp.DefaultPrefixStrategy)

    def test_keywords_reach_torchs_writer(self) -> None:
        writer = s3dcp.S3StorageWriter(
            "eu-west-1",
            BASE,
            single_file_per_rank=False,
            overwrite=False,
            per_thread_copy_ahead=1,
            _extensions=[],
        )
        assert writer.single_file_per_rank is False
        assert writer.overwrite is False
        assert writer.per_thread_copy_ahead == 1
        with pytest.raises(TypeError, match="no_such_argument"):
            s3dcp.S3StorageWriter("eu-west-1", BASE, no_such_argument=1)

    def test_the_global_plan_names_prefixes(self) -> None:
        writer = s3dcp.S3StorageWriter(
            "eu-west-1", BASE, prefix_strategy=s3dcp.RoundRobinPrefixStrategy(["a", "b"])
        )
        plans = writer.prepare_global_plan([SavePlan([]) for _ in range(3)])

        prefixes = [s3dcp.StorageMetadata(prefix) for prefix in ("a/__0_", "b/__1_", "a/__2_")]
        assert [plan.storage_data for plan in plans] == prefixes

    def test_safetensors_is_refused(self) -> None:
        with pytest.raises(s3dcp.S3ConfigError, match="S3HuggingFaceStorageWriter"):
            s3dcp.S3StorageWriter(
                "eu-west-1", BASE, serialization_format=SerializationFormat.SAFETENSORS
            )

    def test_it_pickles(self) -> None:
        writer = s3dcp.S3StorageWriter("eu-west-1", BASE, thread_count=2)
        again = pickle.loads(pickle.dumps(writer))
        assert (again.path, again.thread_count) == (BASE, 2)


class TestStorageReader:
    def test_its_attributes(self) -> None:
        constructor = s3dcp.S3ReaderConstructor.range_based(1024)
        config = s3dcp.S3ClientConfig(max_attempts=2)
        reader = s3dcp.S3StorageReader("eu-west-1", BASE, config, constructor)

        assert isinstance(reader, FileSystemReader)
        assert isinstance(reader.fs, s3dcp.S3FileSystem)
        assert reader.fs.client.s3client_config == config
        assert reader.path == BASE
        assert reader.sync_files is False
        assert reader.checkpoint_id == BASE

    def test_the_local_plan_is_sorted_and_injected(self) -> None:
        injected: list[tuple[list[ReadItem], object, object]] = []

        class Constructor:
            def __call__(self, *args: object, **kwargs: object) -> s3dcp.S3Reader:
                raise NotImplementedError

            def set_item_ranges_by_file(
                self, plan_items: Any, storage_data: Any, base_path: Any
            ) -> None:
                injected.append((list(plan_items), storage_data, base_path))

        constructor = Constructor()
        assert isinstance(constructor, s3dcp.DCPS3ReaderConstructorProtocol)
        reader = s3dcp.S3StorageReader("eu-west-1", BASE, reader_constructor=constructor)
        places = {"c": ("f", 300), "a": ("f", 100), "b": ("f", 200)}
        reader.storage_data = {
            MetadataIndex(name): _StorageInfo(path, offset, 10)
            for name, (path, offset) in places.items()
        }
        plan = reader.prepare_local_plan(LoadPlan([read_item(name) for name in "cab"]))

        assert [item.storage_index.fqn for item in plan.items] == ["a", "b", "c"]
        assert injected == [(plan.items, reader.storage_data, BASE)]

    def test_it_pickles(self) -> None:
        reader = s3dcp.S3StorageReader("eu-west-1", BASE)
        assert pickle.loads(pickle.dumps(reader)).path == BASE


@pytest.mark.parametrize("cls", [s3dcp.S3StorageReader, s3dcp.S3StorageWriter, s3dcp.S3FileSystem])
def test_validate_checkpoint_id(cls: Any) -> None:
    for good in (BASE, "s3://bucket", "s3://bucket/a b//", Path(BASE)):
        assert cls.validate_checkpoint_id(good) is True
    for bad in ("run", "file:///run", "s3://", "s3:///run", "s3://bucket/../run", ""):
        assert cls.validate_checkpoint_id(bad) is False


@pytest.mark.parametrize("cls", [s3dcp.S3StorageReader, s3dcp.S3StorageWriter])
def test_reset_goes_to_another_checkpoint(cls: Any) -> None:
    made = cls("eu-west-1", BASE)
    made.reset(Path("s3://bucket/other"))
    assert made.path == made.checkpoint_id == "s3://bucket/other"
    made.reset()
    assert made.path == "s3://bucket/other"
    with pytest.raises(s3dcp.InvalidS3UriError):
        made.reset("file:///other")


def test_storage_metadata() -> None:
    metadata = s3dcp.StorageMetadata("a/__0_")
    assert metadata.prefix == "a/__0_"
    assert (
        pickle.loads(pickle.dumps(metadata)) == metadata == s3dcp.StorageMetadata(prefix="a/__0_")
    )


def test_s3_exception_is_the_root() -> None:
    for name in s3dcp.__all__:
        if name.endswith(("Error", "Exception")):
            assert issubclass(getattr(s3dcp, name), s3dcp.S3Exception)


def read_item(name: str) -> ReadItem:
    return ReadItem(
        type=LoadItemType.BYTE_IO,
        dest_index=MetadataIndex(name),
        dest_offsets=Size([0]),
        storage_index=MetadataIndex(name),
        storage_offsets=Size([0]),
        lengths=Size([0]),
    )


def _functions() -> list[Any]:
    """The public functions, and the public methods of public classes that are written here."""
    found = []
    for name in s3dcp.__all__:
        value = getattr(s3dcp, name)
        if inspect.isfunction(value):
            found.append(value)
        elif inspect.isclass(value):
            found += [
                each
                for attribute, each in vars(value).items()
                if inspect.isfunction(each)
                and each.__module__.startswith("s3dcp")
                and (attribute == "__init__" or not attribute.startswith("_"))
            ]
    return found


def test_what_is_public_is_typed_whole() -> None:
    """Every argument and result, with a marker for type checkers; `mypy` itself is in `make`."""
    assert (Path(s3dcp.__file__).parent / "py.typed").exists()
    functions = _functions()
    assert len(functions) > 60
    for function in functions:
        signature = inspect.signature(function)
        named = [each for each in signature.parameters.values() if each.name not in {"self", "cls"}]
        missing = [each.name for each in named if each.annotation is inspect.Parameter.empty]
        assert not missing, f"{function.__qualname__}: {missing}"
        assert signature.return_annotation is not inspect.Signature.empty, function.__qualname__
        if function.__name__ != "__init__":
            assert signature.return_annotation != "Any", function.__qualname__
