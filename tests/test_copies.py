"""What a copy does, decided: which files stay, which go, and what items' CRCs say."""

from __future__ import annotations

from hashlib import sha256
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3dcp import CorruptMetadataError
from s3dcp._checksums import crc_of, crcs_of
from s3dcp._copies import Checks, Item, Manifest, items_of, others, part_bytes_of, plan
from s3dcp._ranges import MiB
from s3dcp._store import ObjectInfo, Part, PartList
from tests._catalogs import metadata_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

OWN = {".metadata": b"own"}
OTHER = {".metadata": b"another"}


def manifest(
    commits: Mapping[str, bytes] = OWN,
    etag: str = '"1"',
    names: Iterable[str] = "ab",
    bare: Iterable[str] = (),
) -> Manifest:
    files = {name: ObjectInfo(key=name, size_bytes=10, etag=etag) for name in names}
    return Manifest(commits=commits, files=files, items={}, bare=frozenset(bare))


class TestPlan:
    @pytest.mark.parametrize(
        ("commits", "claimed", "there", "missing", "stale"),
        [
            pytest.param({}, False, {}, "ab", "", id="nothing there"),
            pytest.param({}, False, {"a": 10}, "ab", "a", id="a file of nobody knows what"),
            pytest.param({}, True, {"a": 10}, "b", "", id="cut off"),
            pytest.param({}, True, {"a": 10, "b": 10}, "", "", id="cut off before the commit"),
            pytest.param({}, True, {"a": 9}, "ab", "a", id="cut off, and cut short"),
            pytest.param(OWN, False, {"a": 10, "b": 10}, "", "", id="a copy already"),
            pytest.param(OWN, False, {"b": 10}, "a", "", id="a copy that lost a file"),
        ],
    )
    def test_what_is_there_stays_if_it_is_known_to_be_this(
        self,
        commits: dict[str, bytes],
        claimed: bool,
        there: dict[str, int],
        missing: str,
        stale: str,
    ) -> None:
        found = plan(manifest(), there, commits, claimed=claimed)

        assert found.missing == tuple(missing)
        assert found.removed_first == tuple(stale)
        assert (found.uncommitted, found.removed_last) == ((), ())
        assert found.trusted == (claimed or bool(commits))

    @pytest.mark.parametrize("claimed", [False, True])
    def test_another_checkpoint_stays_until_the_commit_if_it_can(self, claimed: bool) -> None:
        found = plan(manifest(), {"a": 10}, OTHER, claimed=claimed, named={"x", "y"})

        assert found.uncommitted == ()
        assert found.removed_first == (() if claimed else ("a",))
        assert found.removed_last == ("x", "y")
        assert found.trusted == claimed

    @pytest.mark.parametrize("claimed", [False, True])
    @pytest.mark.parametrize(
        ("commits", "named", "data"),
        [
            pytest.param(OTHER, {"a", "x"}, ("x", "a"), id="a name of both"),
            pytest.param(OTHER, None, ("a",), id="nobody knows what it names"),
            pytest.param({"__0.metadata": b"another"}, {"x"}, ("x", "a"), id="other commits"),
        ],
    )
    def test_another_checkpoint_goes_first_if_it_must(
        self, claimed: bool, commits: dict[str, bytes], named: set[str] | None, data: tuple[str]
    ) -> None:
        """And nothing is believed of what lies under a name that both use."""
        found = plan(manifest(), {"a": 10}, commits, claimed=claimed, named=named)

        assert found.uncommitted == tuple(commits)
        assert found.removed_first == data
        assert found.missing == ("a", "b")
        assert found.removed_last == ()
        assert not found.trusted

    @pytest.mark.parametrize("clash", [False, True])
    def test_what_lies_below_a_commit_of_its_own_stays(self, clash: bool) -> None:
        named = {"x", "below/x", "below/deep/x", "belowx", *("a" if clash else "")}

        found = plan(manifest(), {}, OTHER, claimed=False, named=named, nested=["below/.metadata"])

        assert (found.uncommitted == ()) is not clash
        assert (found.removed_first if clash else found.removed_last) == ("belowx", "x")

    @pytest.mark.parametrize(
        ("commits", "same", "replaced"),
        [
            pytest.param({}, "a", "", id="the same bytes"),
            pytest.param({}, "", "a", id="other bytes, of nobody knows what"),
            pytest.param(OWN, "a", "", id="a copy already"),
            pytest.param(OWN, "", "a", id="of another with the same index"),
            pytest.param(OTHER, "a", ".metadata", id="in use by another"),
        ],
    )
    def test_a_bare_file_is_known_by_its_bytes_alone(
        self, commits: dict[str, bytes], same: str, replaced: str
    ) -> None:
        found = others(manifest(bare="a"), {"a", "b"}, commits, same=same)

        assert found == [replaced] * bool(replaced)

    def test_no_claim_vouches_for_a_bare_file(self) -> None:
        there = {"a": 10, "b": 10}

        found = plan(manifest(bare="ab"), there, {}, claimed=True, same="b")

        assert (found.missing, found.removed_first) == (("a",), ("a",))
        assert not found.trusted

    def test_a_bare_file_that_is_the_same_stays_though_others_go(self) -> None:
        there = {"a": 10, "b": 10}

        found = plan(manifest(bare="ab"), there, OWN, claimed=False, same="a", named="ab")

        assert (found.uncommitted, found.removed_first) == ((".metadata",), ("b",))
        assert found.missing == ("b",)

    def test_a_file_that_is_a_commit_goes_before_others(self) -> None:
        single = "model.safetensors"
        source = manifest({}, names=("config.json", single), bare=("config.json", single))
        there = dict.fromkeys(source.files, 10)

        found = plan(source, there, {}, claimed=False)

        assert source.last == (single,)
        assert (found.uncommitted, found.missing) == ((single,), ("config.json", single))

    def test_a_claim_is_of_one_version_of_one_checkpoint(self) -> None:
        claims = [
            manifest().claim,
            manifest({".metadata": b"another"}).claim,
            manifest(etag='"2"').claim,
        ]

        assert len(set(claims)) == 3
        assert manifest().claim == claims[0]
        assert len(claims[0]) == 2 * sha256().digest_size


class TestItems:
    def test_by_file_and_in_order(self) -> None:
        found = items_of({".metadata": metadata_of({"b": 4, "a": 3})}, "here/")

        assert found == {
            "a": [Item(name="tensor of a", start=0, end=3, crc=None)],
            "b": [Item(name="tensor of b", start=0, end=4, crc=None)],
        }

    @pytest.mark.parametrize(
        "name", [".metadata", "__3.metadata", "below/.metadata", ".s3dcp-copy"]
    )
    def test_no_commit_is_data(self, name: str) -> None:
        with pytest.raises(CorruptMetadataError, match=r"here/\.metadata is forged"):
            items_of({".metadata": metadata_of({name: 4})}, "here/")


class TestPartBytes:
    """An object of 20 MiB, whose parts would be of 8 MiB now, and 10 MiB at most."""

    @pytest.mark.parametrize(
        ("held", "found"),
        [
            pytest.param({}, 8, id="none yet"),
            pytest.param({1: 8, 3: 4}, 8, id="as now"),
            pytest.param({3: 4}, 8, id="the last as now"),
            pytest.param({1: 5, 2: 5}, 5, id="of another size"),
            pytest.param({2: 10}, 10, id="as large as may be"),
            pytest.param({1: 11}, None, id="too large"),
            pytest.param({1: 4}, None, id="too small for S3"),
            pytest.param({1: 8, 2: 5}, None, id="of different sizes"),
            pytest.param({4: 8}, None, id="beyond the end"),
            pytest.param({0: 8}, None, id="before the beginning"),
            pytest.param({1: 8, 3: 5}, None, id="a last one that is too long"),
        ],
    )
    def test_is_that_of_all_parts(self, held: dict[int, int], found: int | None) -> None:
        parts = tuple(
            Part(number=number, size_bytes=size * MiB, etag=None, checksum=None)
            for number, size in held.items()
        )
        listed = PartList(algorithm="CRC64NVME", composite=False, parts=parts)

        size = part_bytes_of(listed, 20 * MiB, wanted_bytes=8 * MiB, most_bytes=10 * MiB)

        assert size == (found * MiB if found else None)

    def test_a_checksum_of_checksums_is_none_of_ours(self) -> None:
        listed = PartList(algorithm="CRC32", composite=True, parts=())

        assert part_bytes_of(listed, 20 * MiB, wanted_bytes=8 * MiB, most_bytes=8 * MiB) is None


class TestChecks:
    DATA = bytes(range(100))

    def checked(self, items: list[Item], parts: list[tuple[int, int]], data: bytes) -> Item | None:
        checks = Checks(items)
        for start, end in parts:
            segments = checks.segments(start, end)
            checks.add(segments, crcs_of([memoryview(data[a:b]) for a, b in segments]))
        return checks.wrong(100)

    def item(self, start: int, end: int) -> Item:
        crc = crc_of([memoryview(self.DATA[start:end])])
        return Item(name=f"{start}", start=start, end=end, crc=crc)

    @given(
        ranges=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=6),
        size=st.integers(1, 100),
        flipped=st.integers(0, 99),
        order=st.randoms(use_true_random=False),
    )
    def test_a_flipped_bit_is_found_whatever_the_parts(
        self, ranges: list[tuple[int, int]], size: int, flipped: int, order: Random
    ) -> None:
        """Items may overlap, as those of a forged commit do."""
        items = sorted(
            (self.item(min(ends), max(ends)) for ends in ranges), key=lambda item: item.start
        )
        parts = [(start, min(start + size, 100)) for start in range(0, 100, size)]
        order.shuffle(parts)
        damaged = bytearray(self.DATA)
        damaged[flipped] ^= 1

        assert self.checked(items, parts, self.DATA) is None
        wrong = self.checked(items, parts, bytes(damaged))
        hit = [item for item in items if item.start <= flipped < item.end]
        assert (wrong in hit) if hit else wrong is None

    def test_only_items_that_are_there_whole_are_compared(self) -> None:
        checks = Checks([self.item(0, 10), self.item(10, 30)])
        checks.add(checks.segments(0, 20), crcs_of([memoryview(b"x" * 10)] * 2))

        assert checks.wrong(9) is None
        assert checks.wrong(20) == self.item(0, 10)
        checks.forget()
        assert checks.segments(0, 20) == [(0, 10), (10, 20)]

    def test_without_checksums_nothing_is_cut(self) -> None:
        item = Item(name="w", start=0, end=10, crc=None)

        assert Checks([item]).segments(0, 10) == []
        assert Checks([item]).wrong(10) is None
