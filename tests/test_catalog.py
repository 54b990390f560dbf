"""Which objects belong to which checkpoint, as tables."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest

from s3dcp import DefaultPrefixStrategy, HexPrefixStrategy, S3ConfigError, S3PrefixStrategyBase
from s3dcp._commit import data_name, metadata_name
from s3dcp._formats import (
    DCP,
    FORMATS,
    INDEX_NAME,
    MANIFEST_NAME,
    SAFETENSORS,
    Format,
    format_of,
    is_commit,
)
from s3dcp._hf_index import file_name
from s3dcp._inventory import (
    Checkpoint,
    Contents,
    ancestors,
    commits_by_folder,
    committed,
    cut_off_copies,
    doomed,
    folder_of,
    needless,
    orphans,
    place_of,
    problem_of,
    rank_of,
    shards_of,
    step_of,
)
from s3dcp._keys import S3Uri, parse_s3_uri
from s3dcp._store import ObjectInfo

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def listed(key: str, size: int = 1, *, days_old: float = 2, etag: str = '"1"') -> ObjectInfo:
    return ObjectInfo(
        key=key, size_bytes=size, etag=etag, last_modified=NOW - timedelta(days=days_old)
    )


def checkpoint(
    folder: str,
    *names: str,
    days_old: float = 2,
    problem: str | None = None,
    unreadable: str | None = None,
) -> Checkpoint:
    return Checkpoint(
        folder=S3Uri("bucket", folder),
        commits=(listed(f"{folder}.metadata", days_old=days_old),),
        contents=Contents(
            least_bytes={folder + name: 1 for name in names}, tensors=3, unreadable=unreadable
        ),
        problem=problem or unreadable,
    )


def safetensors(folder: str, *names: str, days_old: float = 2, ours: bool = True) -> Checkpoint:
    found = checkpoint(folder, *names, days_old=days_old)
    commit = MANIFEST_NAME if folder.endswith("/sharded/") and ours else INDEX_NAME
    return replace(
        found,
        format=SAFETENSORS,
        commits=(listed(f"{folder}{commit}", days_old=days_old),),
        contents=replace(found.contents, ours=ours),
    )


class TestFolders:
    @pytest.mark.parametrize(
        ("uri", "folder", "place"),
        [
            ("s3://b", "", "s3://b/"),
            ("s3://b/", "", "s3://b/"),
            ("s3://b/run", "run/", "s3://b/run"),
            ("s3://b/run/", "run/", "s3://b/run"),
            ("s3://b/run/step-1", "run/step-1/", "s3://b/run/step-1"),
            ("s3://b/run//", "run//", "s3://b/run//"),  # without its last slash it is run/
            ("s3://b//", "/", "s3://b//"),
        ],
    )
    def test_a_folder_and_its_place(self, uri: str, folder: str, place: str) -> None:
        found = folder_of(parse_s3_uri(uri))

        assert found.key == folder
        assert str(place_of(found)) == place
        assert folder_of(parse_s3_uri(place)) == found

    @pytest.mark.parametrize(
        ("folder", "expected"),
        [
            ("", []),
            ("run/", [""]),
            ("run/step-1/", ["", "run/"]),
            ("run//a/", ["", "run/", "run//"]),
            ("/a/", ["", "/"]),
        ],
    )
    def test_ancestors(self, folder: str, expected: list[str]) -> None:
        assert ancestors(folder) == expected

    @pytest.mark.parametrize(
        ("folder", "step"),
        [
            ("run/step-100/", 100),
            ("run/007/", 7),
            ("run/epoch3_step20/", 20),
            ("run/step-5-final/", None),
            ("100/run/", None),
            ("", None),
        ],
    )
    def test_the_step_is_the_number_at_the_end(self, folder: str, step: int | None) -> None:
        assert step_of(folder) == step

    def test_commits(self) -> None:
        keys = [
            ".metadata",
            "a/.metadata",
            "a/b/__10.metadata",
            "a/b/__2.metadata",
            "c/__0.metadata",
            "c/.metadata",
            "c/__0_0.distcp",
            "d/x.metadata",
            "d/.metadata.tmp",
            "d/__x.metadata",
            "d/.metadata/e",
        ]

        found = commits_by_folder(listed(key) for key in keys)

        assert {folder: [info.key for info in commits] for folder, commits in found.items()} == {
            "": [".metadata"],
            "a/": ["a/.metadata"],
            "a/b/": ["a/b/__2.metadata", "a/b/__10.metadata"],
            "c/": ["c/.metadata", "c/__0.metadata"],
        }


class TestNames:
    """Those that the writer gives are those that are looked for."""

    @pytest.mark.parametrize("rank", [None, 0, 7, 1023])
    def test_commits(self, rank: int | None) -> None:
        key = f"run/{metadata_name(rank)}"

        assert commits_by_folder([listed(key)]) == {"run/": (listed(key),)}
        assert rank_of(listed(key)) == rank

    @pytest.mark.parametrize(
        "strategy", [DefaultPrefixStrategy(), HexPrefixStrategy(epoch_num=2, prefix_count=16)]
    )
    def test_data(self, strategy: S3PrefixStrategyBase) -> None:
        names = [data_name(strategy(rank), 0, "abc") for rank in range(12)]

        assert checkpoint("run/", *names).info().ranks == 12
        assert list(orphans([listed(name) for name in names], [], NOW)) == [
            listed(name) for name in names
        ]

    @pytest.mark.parametrize(("number", "count"), [(1, 1), (7, 12), (123_456, 200_000)])
    def test_safetensors(self, number: int, count: int) -> None:
        assert SAFETENSORS.is_data(file_name(number, count))
        assert SAFETENSORS.rank_of(file_name(number, count)) is None
        shard = f"run/{file_name(number, count, shard=31)}"
        assert SAFETENSORS.is_data(shard)
        assert SAFETENSORS.rank_of(shard) == 31


class TestFormats:
    @pytest.mark.parametrize(
        ("key", "commit_of", "data_of"),
        [
            (".metadata", DCP, None),
            ("run/__3.metadata", DCP, None),
            ("run/x.metadata", None, None),
            ("run/__0_0.x.distcp", None, DCP),
            ("run/model.safetensors.index.json", SAFETENSORS, None),
            ("run/model.safetensors.manifest.json", SAFETENSORS, None),
            ("model.safetensors", SAFETENSORS, None),  # no save of ours writes it
            ("run/model-00001-of-00002.safetensors", None, SAFETENSORS),
            ("run/shard-00001-model-00001-of-00002.safetensors", None, SAFETENSORS),
            # What lies beside a model, and what others call theirs.
            ("run/config.json", None, None),
            ("run/tokenizer.model", None, None),
            ("run/generation_config.json", None, None),
            ("run/adapter_model.safetensors", None, None),
            ("run/model.safetensors.bak", None, None),
            ("run/pytorch_model.bin.index.json", None, None),
            ("run/weights.safetensors", None, None),
            ("run/model-1-of-2.safetensors", None, None),
            ("run/model.safetensors/x", None, None),
        ],
    )
    def test_what_names_say(
        self, key: str, commit_of: Format | None, data_of: Format | None
    ) -> None:
        assert [each for each in FORMATS if each.is_commit(key)] == [commit_of] * bool(commit_of)
        assert [each for each in FORMATS if each.is_data(key)] == [data_of] * bool(data_of)
        assert is_commit(key) == bool(commit_of)

    @pytest.mark.parametrize("each", FORMATS, ids=lambda each: each.name)
    def test_commits_start_with_their_prefixes(self, each: Format) -> None:
        names = [".metadata", "__7.metadata", "model.safetensors", INDEX_NAME]
        assert all(name.startswith(each.prefixes) for name in names if each.is_commit(name))

    def test_by_name(self) -> None:
        assert [format_of(each.name) for each in FORMATS] == list(FORMATS)
        with pytest.raises(S3ConfigError, match="must be 'dcp' or 'safetensors', got 'hf'"):
            format_of("hf")

    def test_a_folder_has_a_checkpoint_of_each(self) -> None:
        listing = [listed(f"run/{name}") for name in (".metadata", INDEX_NAME, "model.safetensors")]
        assert commits_by_folder(listing) == {"run/": (listing[0],)}
        assert commits_by_folder(listing, SAFETENSORS) == {"run/": (listing[2], listing[1])}


class TestProblems:
    @pytest.mark.parametrize(
        ("commits", "least", "sizes", "problem"),
        [
            ([".metadata"], {"a": 5, "b": 0}, {"a": 5, "b": 0}, None),
            ([".metadata"], {"a": 5}, {"a": 6, "other": 1}, None),
            ([".metadata"], {}, {}, None),
            ([".metadata"], {"a": 5, "b": 1}, {"b": 1}, "missing: a"),
            ([".metadata"], {"a": 0}, {}, "missing: a"),
            ([".metadata"], {"a": 5, "b": 1, "c": 1}, {}, "missing: a and 2 more"),
            ([".metadata"], {"a": 5}, {"a": 4}, "cut short: a"),
            (["__0.metadata"], {}, {}, None),
            (["__0.metadata", "__1.metadata"], {"a": 1}, {"a": 1}, None),
            (["__1.metadata"], {}, {}, "rank 0 did not commit"),
            (["__0.metadata", "__2.metadata"], {}, {}, "rank 1 did not commit"),
            (["__99999999999999999.metadata"], {}, {}, "rank 0 did not commit"),
            # Loads go by `.metadata`, whatever ranks' own lie beside it.
            ([".metadata", "__3.metadata"], {}, {}, None),
        ],
    )
    def test_what_is_wrong(
        self, commits: list[str], least: dict[str, int], sizes: dict[str, int], problem: str | None
    ) -> None:
        contents = Contents(least_bytes=least, tensors=0)

        assert problem_of([listed(key) for key in commits], contents, sizes) == problem

    def test_what_cannot_be_read_is_not_judged_further(self) -> None:
        contents = Contents(least_bytes={"a": 1}, tensors=0, unreadable="truncated")

        assert problem_of([listed(".metadata")], contents, {}) == "truncated"


class TestInfo:
    def test_what_users_see(self) -> None:
        found = checkpoint("run/step-20/", "__0_0.x.distcp", "__1_0.x.distcp", "a0/__2_0.y.distcp")

        info = found.info()

        assert info.uri == "s3://bucket/run/step-20"
        assert (info.step, info.ranks, info.objects, info.tensors, info.size_bytes) == (
            20,
            3,
            3,
            3,
            3,
        )
        assert info.committed_at == NOW - 2 * DAY
        assert info.complete

    def test_names_that_do_not_tell_the_rank(self) -> None:
        assert checkpoint("run/", "shard.bin").info().ranks is None

    def test_ranks_that_commit_one_by_one_are_done_with_the_last(self) -> None:
        commits = (listed("__0.metadata", days_old=3), listed("__1.metadata", days_old=1))
        found = Checkpoint(
            folder=S3Uri("bucket", ""),
            commits=commits,
            contents=Contents(least_bytes={}, tensors=0),
            problem=None,
        )

        assert found.info().committed_at == NOW - DAY

    def test_times_are_in_utc(self) -> None:
        """Stores' are, but botocore turns them into the machine's."""
        elsewhere = timezone(timedelta(hours=5))
        commit = replace(listed(".metadata"), last_modified=NOW.astimezone(elsewhere))

        found = committed([commit])

        assert found is not None
        assert found.isoformat() == NOW.isoformat()


class TestOrder:
    def test_by_the_time_of_the_commit_then_by_step(self) -> None:
        found = [
            checkpoint("run/step-9/", days_old=3),
            checkpoint("run/step-2/", days_old=1),
            checkpoint("run/step-10/", days_old=1),
            checkpoint("run/last/", days_old=1),
            checkpoint("run/step-11/", days_old=2),
        ]

        in_order = sorted(found, key=lambda each: each.order)

        assert [each.folder.key for each in in_order] == [
            "run/step-9/",
            "run/step-11/",
            "run/last/",
            "run/step-2/",
            "run/step-10/",
        ]

    def test_a_commit_without_a_time_is_the_oldest(self) -> None:
        timeless = Checkpoint(
            folder=S3Uri("bucket", "run/step-99/"),
            commits=(ObjectInfo(key="run/step-99/.metadata", size_bytes=1, etag=None),),
            contents=Contents(least_bytes={}, tensors=0),
            problem=None,
        )

        assert timeless.order < checkpoint("run/step-1/", days_old=99).order


class TestDoomed:
    def keys(self, keep: int | None, *found: Checkpoint) -> list[str]:
        return [each.folder.key for each in doomed(found, keep, found, NOW - timedelta(hours=1))]

    def test_all_stay_unless_told_how_many(self) -> None:
        found = [checkpoint(f"{n}/", days_old=n) for n in range(5)]

        assert self.keys(None, *found) == []
        assert self.keys(2, *found) == ["2/", "3/", "4/"]
        assert self.keys(5, *found) == []
        assert self.keys(9, *found) == []

    def test_incomplete_ones_do_not_count_and_go_with_the_old(self) -> None:
        broken = {"problem": "missing: x"}
        found = [
            checkpoint("0/", days_old=0, **broken),
            checkpoint("1/", days_old=1),
            checkpoint("2/", days_old=2, **broken),
            checkpoint("3/", days_old=3),
            checkpoint("4/", days_old=4, **broken),
        ]

        assert self.keys(1, *found) == ["2/", "3/", "4/"]
        # As long as there are not more complete ones than are to be kept, nothing is given up.
        assert self.keys(2, *found) == []

    def test_one_that_cannot_be_read_stays(self) -> None:
        found = [
            checkpoint("0/", days_old=0),
            checkpoint("1/", days_old=1, unreadable="forged"),
            checkpoint("2/", days_old=2),
        ]

        assert self.keys(1, *found) == ["2/"]

    @pytest.mark.parametrize(
        ("names", "minutes_old", "gone"),
        [
            (["__0.metadata"], 1, []),  # rank 1 may be about to commit
            (["__0.metadata", "__1.metadata"], 1, []),
            (["__0.metadata", "__1.metadata"], 90, ["1/"]),
            (["__0.metadata", ".metadata"], 1, ["1/"]),
            ([".metadata"], 1, ["1/"]),
        ],
    )
    def test_ranks_that_commit_by_themselves_count_when_all_must_have(
        self, names: list[str], minutes_old: int, gone: list[str]
    ) -> None:
        moment = NOW - timedelta(minutes=minutes_old)
        commits = tuple(
            ObjectInfo(key=f"0/{name}", size_bytes=1, etag=None, last_modified=moment)
            for name in names
        )
        newest = replace(checkpoint("0/"), commits=commits)
        assert self.keys(1, newest, checkpoint("1/", days_old=1)) == gone

    def test_nor_do_they_go(self) -> None:
        commits = (ObjectInfo(key="0/__0.metadata", size_bytes=1, etag=None, last_modified=NOW),)
        saving = replace(checkpoint("0/"), commits=commits, problem="missing: x")
        later = [checkpoint("1/", days_old=-1), checkpoint("2/", days_old=-2)]
        assert self.keys(1, saving, *later) == ["1/"]

    def test_formats_count_by_themselves(self) -> None:
        found = [checkpoint(f"dcp/{n}/", days_old=n) for n in range(3)]
        found += [safetensors(f"hf/{n}/", days_old=n + 5) for n in range(3)]

        assert self.keys(2, *found) == ["dcp/2/", "hf/2/"]

    def test_what_others_wrote_neither_counts_nor_goes(self) -> None:
        found = [safetensors(f"{n}/", days_old=n, ours=n != 1) for n in range(4)]

        assert self.keys(1, *found) == ["2/", "3/"]
        assert self.keys(2, *found) == ["3/"]

    def test_what_others_call_shards_is_a_checkpoint(self) -> None:
        full, theirs = safetensors("1/"), safetensors("1/sharded/", ours=False)
        assert shards_of([full], [full, theirs]) == []

    def test_shards_come_and_go_with_the_full_files(self) -> None:
        found = [
            each
            for n in range(3)
            for each in (
                safetensors(f"{n}/", days_old=n),
                safetensors(f"{n}/sharded/", days_old=n + 0.01),
            )
        ]

        assert self.keys(2, *found) == ["2/", "2/sharded/"]
        # Of which none were made yet, they are a checkpoint of their own.
        del found[2]
        assert self.keys(2, *found) == ["2/", "2/sharded/"]
        # Nor were those that are newer.
        found[0] = safetensors("0/", days_old=4)
        assert "0/sharded/" not in self.keys(1, *found)
        # Another format's folder above them is none of theirs.
        found[0] = checkpoint("0/")
        assert self.keys(2, *found) == ["2/", "2/sharded/"]

    def test_nor_do_those_in_its_folder_go(self) -> None:
        found = [checkpoint(f"run/{n}/", days_old=n) for n in range(3)]

        assert doomed(found, 1, [*found, checkpoint("run/", unreadable="forged")], NOW) == []
        sealed = [*found, checkpoint("run/2/x/", unreadable="forged")]
        assert doomed(found, 1, sealed, NOW) == found[1:]


class TestNeedless:
    def test_what_it_alone_named(self) -> None:
        removed = checkpoint("run/", "a.distcp", "shared.distcp", "nested/b.distcp", "plain")
        nested = checkpoint("run/nested/", "own.distcp")
        sharing = Checkpoint(
            folder=S3Uri("bucket", ""),
            commits=(),
            contents=Contents(least_bytes={"run/shared.distcp": 1}, tensors=0),
            problem=None,
        )

        assert needless([removed], [nested, sharing]) == [
            "run/a.distcp",
            "run/nested/b.distcp",
            "run/plain",
        ]

    def test_never_a_commit(self) -> None:
        forged = checkpoint("run/", "a.distcp", ".metadata", "nested/.metadata", "__0.metadata")

        assert needless([forged], []) == ["run/a.distcp"]

    def test_of_safetensors_nothing_else(self) -> None:
        named = ["model-00001-of-00001.safetensors", "x.safetensors", "config.json", ".metadata"]
        removed = safetensors("run/", *named, "model.safetensors", "below/model.safetensors")

        assert needless([removed], []) == [f"run/{name}" for name in named[:2]]

    def test_nothing_below_one_that_cannot_be_read(self) -> None:
        removed = checkpoint("run/", "a.distcp", "nested/b.distcp")

        assert needless([removed], [checkpoint("run/nested/", unreadable="forged")]) == [
            "run/a.distcp"
        ]


class TestOrphans:
    BEFORE = NOW - DAY

    def keys(self, listing: list[ObjectInfo], *found: Checkpoint) -> list[str]:
        return [info.key for info in orphans(listing, found, self.BEFORE)]

    @pytest.mark.parametrize(
        ("info", "is_orphan"),
        [
            (listed("run/__0_0.x.distcp"), True),
            (listed("run/a0/epoch_1/__0_0.x.distcp"), True),
            (listed("elsewhere/__0_0.distcp"), True),
            (listed("run/__0_0.x.distcp", days_old=1), True),
            (listed("run/__0_0.x.distcp", days_old=0.99), False),  # a save may be under way
            (listed("run/named.distcp"), False),
            (listed("run/notes.txt"), False),  # not ours
            (listed("run/.metadata"), False),
            (listed("run/x.distcp/y"), False),
            (listed("run/model-00001-of-00002.safetensors"), True),
            (listed("run/shard-00001-model-00001-of-00002.safetensors"), True),
            (listed("run/model-00001-of-00002.safetensors", days_old=0.5), False),
            (listed("run/model.safetensors"), False),
            (listed("run/other.safetensors"), False),
            (listed("run/config.json"), False),
            (ObjectInfo(key="run/x.distcp", size_bytes=1, etag=None), False),  # of unknown age
        ],
    )
    def test_data_that_nobody_names(self, info: ObjectInfo, is_orphan: bool) -> None:
        assert self.keys([info], checkpoint("run/", "named.distcp")) == [info.key] * is_orphan

    def test_files_that_a_save_may_be_overwriting(self) -> None:
        """A save that replaces a checkpoint finds old files without an index, as it wants them."""
        old, young = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        listing = [listed(f"run/{old}"), listed(f"run/{young}", days_old=0.1), listed(f"a/{old}")]

        assert self.keys(listing) == [f"a/{old}"]
        assert self.keys([*listing, listed("run/__0_0.distcp")]) == [f"a/{old}", "run/__0_0.distcp"]

    def test_what_an_index_names_is_none(self) -> None:
        listing = [listed("run/model-00001-of-00002.safetensors"), listed("run/sub/x.distcp")]

        assert self.keys(listing, safetensors("run/", "model-00001-of-00002.safetensors")) == [
            "run/sub/x.distcp"
        ]

    def test_what_a_checkpoint_above_or_nested_names_is_none(self) -> None:
        listing = [listed("run/left/__0_0.distcp"), listed("run/left/step-1/__0_0.distcp")]
        above = checkpoint("run/", "left/__0_0.distcp")
        nested = checkpoint("run/left/step-1/", "__0_0.distcp")

        assert self.keys(listing, above, nested) == []
        assert self.keys(listing, nested) == ["run/left/__0_0.distcp"]

    def test_one_that_cannot_be_read_keeps_all_below_it(self) -> None:
        listing = [listed("run/a/x.distcp"), listed("run/ab/x.distcp"), listed("x.distcp")]

        assert self.keys(listing, checkpoint("run/a/", unreadable="forged")) == [
            "run/ab/x.distcp",
            "x.distcp",
        ]
        assert self.keys(listing, checkpoint("", unreadable="forged")) == []

    def test_what_a_copy_goes_on_with(self) -> None:
        """It writes its claim again, and not what is there already."""
        listing = [listed(key) for key in ("copy/x.distcp", "copy/a0/x.distcp", "copy2/x.distcp")]

        for days_old, spared in [(0.1, 2), (2, 0)]:
            claim = listed("copy/.s3dcp-copy", days_old=days_old)
            assert self.keys([*listing, claim]) == [info.key for info in listing[spared:]]


class TestCutOffCopies:
    CLAIM = "base/.s3dcp-copy"

    @pytest.mark.parametrize(
        ("listing", "found", "beside"),
        [
            ([listed(CLAIM)], [], [set()]),
            ([listed(".s3dcp-copy")], [], [set()]),
            (
                [listed(CLAIM), listed("base/w.bin"), listed("base/x/y"), listed("z")],
                [],
                [{"w.bin"}],
            ),
            ([listed(f"{CLAIM}-not"), listed("base/w.bin")], [], []),
            # It may be under way.
            ([listed(CLAIM, days_old=0.5)], [], []),
            ([listed(CLAIM), listed("base/x/y.distcp", days_old=0.5)], [], []),
            ([ObjectInfo(key=CLAIM, size_bytes=64, etag=None)], [], []),
            # It was committed, or to replace what is there.
            ([listed(CLAIM), listed("base/.metadata")], [checkpoint("base/")], []),
            ([listed(CLAIM)], [safetensors("base/")], []),
            # Another checkpoint's.
            ([listed(CLAIM), listed("base/a")], [checkpoint("", "base/a")], [set()]),
            (
                [listed(CLAIM), listed("base/1/a", days_old=0), listed("base/1/.metadata")],
                [checkpoint("base/1/", "a")],
                [set()],
            ),
            ([listed(CLAIM)], [checkpoint("", unreadable="forged")], []),
        ],
    )
    def test_what_lies_there(
        self, listing: list[ObjectInfo], found: list[Checkpoint], beside: list[set[str]]
    ) -> None:
        copies = cut_off_copies(listing, found, NOW - DAY)

        assert list(copies) == listing[: len(copies)]
        assert [
            {info.key.rpartition("/")[2] for info in each} for each in copies.values()
        ] == beside
