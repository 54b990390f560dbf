"""What a checkpoint consists of, read where it is: on S3 or on a disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from s3dcp._commit import has_token
from s3dcp._copies import Item, Manifest, forged, is_reserved, items_of
from s3dcp._errors import IntegrityError
from s3dcp._flow import wait_all
from s3dcp._formats import DCP, Format, holds_data
from s3dcp._hf_files import File, fetch_header, tensors_of
from s3dcp._hf_index import Index, parse_index
from s3dcp._inventory import Contents, problem_of
from s3dcp._places import Place
from s3dcp._portal import offload
from s3dcp._store import ObjectInfo


async def manifest_of(
    place: Place, format_: Format, commits: Sequence[ObjectInfo], *, look_into: bool
) -> Manifest:
    """Find out what is to be copied.

    Args:
        place: Where it is.
        format_: Of what there, if there is more than one checkpoint.
        commits: Its commits.
        look_into: Whether to read the headers of safetensors files, which say whether these are
            whole and of one save, and where the tensors are.

    Raises:
        CheckpointChangedError: it is being replaced.
        CorruptMetadataError: a commit or a header cannot be read, or is forged.
        IntegrityError: a file is missing or cut short.
        InvalidS3UriError: a name leads out of the folder.
        OSError, S3Exception: as the place.
    """
    bodies = await read_commits(place, commits)
    # Reversed: `.metadata`, rank 0's own, or the index last.
    bodies = dict(reversed(bodies.items()))
    if format_ is DCP:
        items = await offload(items_of, bodies, f"{place}/")
        files = await place.files(items)
        ends = {name: max(item.end for item in found) for name, found in items.items()}
        _refuse_incomplete(place, commits, ends, files)
        return Manifest(
            commits=bodies,
            files={name: files[name] for name in items},
            items=items,
            bare={name for name in items if not has_token(name)},
        )
    indices = await offload(_indices, place, bodies)
    single = {info.key for info in commits if holds_data(info.key)}
    named = single.union(*(index.files for index in indices))
    beside = await place.companions(format_)
    files = await place.files({*beside, *named})
    _refuse_incomplete(place, commits, dict.fromkeys(named, 0), files)
    stored = {name: files[name] for name in named}
    return Manifest(
        commits=bodies,
        files={name: files[name] for name in sorted(files)},
        items=await _items(place, stored, indices) if look_into else {},
        bare=files.keys(),
    )


async def read_commits(place: Place, commits: Iterable[ObjectInfo]) -> dict[str, bytes]:
    """Return the bytes of the commits that are there still, but for those that hold data."""
    described = [info.key for info in commits if not holds_data(info.key)]
    bodies = {name: await place.read(name) for name in described}
    return {name: body for name, body in bodies.items() if body is not None}


def names_of(place: Place, format_: Format, commits: Mapping[str, bytes]) -> set[str]:
    """Return the files that commits name, and that may be removed with them.

    Raises:
        CorruptMetadataError: a commit cannot be read, or is forged.
        InvalidS3UriError: a name leads out of the folder.
        DiskError: so does a link in it, or it leads to a folder.
    """
    if format_ is DCP:
        names = set(items_of(commits, f"{place}/"))
    else:
        names = {name for index in _indices(place, commits) for name in index.files}
    for name in names:
        place.check(name)
    return {name for name in names if format_.is_own(name)}


def _indices(place: Place, commits: Mapping[str, bytes]) -> list[Index]:
    found = []
    for name, body in commits.items():
        source = f"{place}/{name}"
        index = parse_index(body, source=source)
        for file in index.files:
            if is_reserved(file) and not holds_data(file):
                raise forged(source, file)
        found.append(index)
    return found


def _refuse_incomplete(
    place: Place,
    commits: Iterable[ObjectInfo],
    least_bytes: Mapping[str, int],
    files: Mapping[str, ObjectInfo],
) -> None:
    sizes = {name: info.size_bytes for name, info in files.items()}
    problem = problem_of(commits, Contents(least_bytes=least_bytes, tensors=0), sizes)
    if problem is not None:
        raise IntegrityError(f"{place} is incomplete, and was not copied: {problem}")


async def _items(
    place: Place, stored: Mapping[str, ObjectInfo], indices: Iterable[Index]
) -> dict[str, list[Item]]:
    """Return the tensors of each file, once all files are known to fit together."""

    async def read(info: ObjectInfo) -> File:
        fetch = partial(place.fetch, info)
        source = f"{place}/{info.key}"
        return File(await fetch_header(fetch, info.size_bytes, source=source), info.etag)

    headers = await wait_all([partial(read, info) for info in stored.values()])
    files = dict(zip(stored, headers, strict=True))
    unnamed = dict(files)
    crcs = {}
    for index in indices:
        own = {name: files[name] for name in sorted(index.files)}
        await offload(tensors_of, place.where, own, index)
        for name in own:
            unnamed.pop(name, None)
        for name, saved in index.saved.items():
            crcs.update({(name, tensor): each.item for tensor, each in saved.crcs.items()})
    await offload(tensors_of, place.where, unnamed, None)
    return {
        name: [
            Item(name=tensor, start=entry.start, end=entry.end, crc=crcs.get((name, tensor)))
            for tensor, entry in file.header.entries.items()
        ]
        for name, file in files.items()
    }
