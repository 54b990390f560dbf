"""The command line: `s3dcp`, or `python -m s3dcp`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

import click

from s3dcp import __version__
from s3dcp import _catalog as catalog
from s3dcp import _verifying as verifying
from s3dcp._cli_bench import bench
from s3dcp._copying import copy
from s3dcp._formats import FORMATS, FormatName
from s3dcp._inventory import CheckpointInfo, folder_of
from s3dcp._keys import S3Uri, parse_s3_uri
from s3dcp._options import Commands, as_json_option, on_store, seconds
from s3dcp._ranges import MiB
from s3dcp._s3client import S3Client
from s3dcp._terminal import Bar, counts_of, plain, print_json, print_table, shown_size
from s3dcp.testing import FakeS3

_DAMAGED = 1
# So that each connection of a fast link has a buffer; nothing else of the process needs memory.
_COPY_BYTES = 512 * MiB
# What a terminal may have for another store, and what would win over a server's own.
_STRONGER = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")

_grace = click.option(
    "--grace",
    "grace_s",
    type=seconds,
    metavar="TIME",
    default="24h",
    show_default=True,
    help="Leave alone what is younger: it may belong to a save that is under way.",
)
_really = click.option("--delete", "really", is_flag=True, help="Do it, rather than only tell.")


_format = click.option(
    "--format",
    "format_name",
    type=click.Choice([each.name for each in FORMATS]),
    help="Which checkpoint is meant, where there are both.",
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Look after PyTorch distributed checkpoints on S3."""


@cli.command()
@click.argument("uri")
@on_store
@as_json_option
def ls(uri: str, store: dict[str, Any], *, as_json: bool) -> None:
    """List the checkpoints below URI, oldest first."""
    found = catalog.list_checkpoints(uri, **store)
    if as_json:
        print_json([_as_dict(each) for each in found])
        return
    print_table(
        ("COMMITTED", "FORMAT", ">STEP", ">RANKS", ">TENSORS", ">SIZE", "CHECKPOINT", "STATE"),
        [
            (
                each.committed_at.isoformat(sep=" ", timespec="seconds")
                if each.committed_at
                else None,
                each.format,
                each.step,
                each.ranks,
                each.tensors,
                shown_size(each.size_bytes),
                each.uri,
                "complete" if each.complete else f"incomplete: {each.problem}",
            )
            for each in found
        ],
    )


@cli.command()
@click.argument("uri")
@on_store
@_format
@as_json_option
def inspect(
    uri: str, store: dict[str, Any], *, format_name: FormatName | None, as_json: bool
) -> None:
    """Show the tensors of the checkpoint at URI."""
    client, place = S3Client(**store), parse_s3_uri(uri)
    entries = client.call(verifying.inspect, place, format_name)
    if as_json:
        print_json([_entry_as_dict(entry) for entry in entries])
        return
    folder = folder_of(place).key
    print_table(
        ("NAME", "SHAPE", "DTYPE", ">SIZE", "FILE"),
        [
            (
                entry.name,
                None if entry.shape is None else "x".join(map(str, entry.shape)) or "scalar",
                entry.dtype,
                shown_size(entry.size_bytes),
                _first(entry.keys, folder),
            )
            for entry in entries
        ],
    )


@cli.command()
@click.argument("uri")
@on_store
@_format
@as_json_option
def verify(
    uri: str, store: dict[str, Any], *, format_name: FormatName | None, as_json: bool
) -> None:
    """Check every byte of the checkpoint at URI.

    Its objects must be there and long enough, and every item must have the checksum (CRC64NVME)
    that was taken when it was saved. Safetensors files must be what their headers and the index
    say. Nothing is executed.

    Exit status: 0 if it is whole, 1 if it is damaged, 2 if that could not be found out.
    """
    client = S3Client(**store)
    with Bar() as bar:
        budget_bytes = client.s3client_config.memory_bytes()
        verdict = client.call(
            verifying.verify,
            parse_s3_uri(uri),
            budget_bytes=budget_bytes,
            format_name=format_name,
            progress=bar.advance,
        )
    if as_json:
        print_json({**dataclasses.asdict(verdict), "whole": not verdict.problems})
        click.get_current_context().exit(_DAMAGED if verdict.problems else 0)
    for problem in verdict.problems:
        click.echo(plain(problem))
    if verdict.problems:
        click.get_current_context().exit(_DAMAGED)
    click.echo(
        f"{plain(uri)} is whole: {verdict.objects} objects, {verdict.verified} items compared "
        f"with their checksums ({shown_size(verdict.size_bytes)})"
    )
    if verdict.unverified:
        click.echo(f"{verdict.unverified} items have no checksum: their sizes were checked")


@cli.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@on_store
@_format
@click.option("--overwrite", is_flag=True, help="Replace another checkpoint that is at DST.")
@click.option(
    "--no-verify",
    is_flag=True,
    help="Do not compare the items' checksums, nor look into safetensors files.",
)
@as_json_option
def cp(
    source: str,
    target: str,
    store: dict[str, Any],
    *,
    format_name: FormatName | None,
    overwrite: bool,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Copy a checkpoint between S3 and a disk.

    SRC and DST are the checkpoint's folder and the copy's own: s3://BUCKET/FOLDER, or a path. Both
    may be on S3.

    Copied is what the checkpoint names: of DCP, what its .metadata does; of safetensors, what the
    index or the manifest of shards does, or else model.safetensors. With safetensors go a model's
    small files in the same folder: *.json, *.txt, *.model, *.py, *.md, *.jinja and *.tiktoken.
    Other files and folders below stay behind.

    The same command goes on with a copy that was cut off. Until the end, DST is no checkpoint.
    """
    config = dataclasses.replace(store["s3client_config"], memory_budget_bytes=_COPY_BYTES)
    began_s = time.monotonic()
    with Bar() as bar:
        report = copy(
            source,
            target,
            format=format_name,
            overwrite=overwrite,
            verify=not no_verify,
            progress=partial(bar.advance, what="copying"),
            comparing=partial(bar.advance, what="comparing"),
            **store | {"s3client_config": config},
        )
    wall_s = time.monotonic() - began_s
    if as_json:
        print_json(
            dataclasses.asdict(report)
            | {"totals": counts_of(report.totals.overall), "wall_s": wall_s}
        )
        return
    whole = f"{report.objects} objects ({shown_size(report.size_bytes)})"
    if not report.copied_objects:
        click.echo(f"{plain(target)} is a copy of {plain(source)} already: {whole}")
        return
    click.echo(f"{plain(target)} is a copy of {plain(source)}: {whole}")
    click.echo(
        f"{report.copied_objects} objects were copied: {shown_size(report.copied_bytes)} in "
        f"{wall_s:.1f} s ({shown_size(report.copied_bytes / max(wall_s, 1e-9))}/s)"
    )
    click.echo(
        f"{report.verified} items were compared with checksums"
        + (f", {report.unverified} were not" if report.unverified else "")
    )


@cli.command()
@click.argument("uri")
@on_store
@click.option(
    "--keep", type=click.IntRange(min=1), help="How many of the newest complete ones stay."
)
@_grace
@_really
@as_json_option
def gc(
    uri: str,
    store: dict[str, Any],
    *,
    keep: int | None,
    grace_s: float,
    really: bool,
    as_json: bool,
) -> None:
    """Remove what is no longer needed below URI.

    That is: all checkpoints older than the newest N complete ones of their format, and data that no
    checkpoint names, which saves that failed have left.

    Without --keep, no checkpoint is removed. Without --delete, nothing is.
    """
    found = catalog.gc(uri, keep=keep, grace_s=grace_s, dry_run=not really, **store)
    bucket = parse_s3_uri(uri).bucket
    if as_json:
        objects = [
            {
                "uri": str(S3Uri(bucket, each.key)),
                "size_bytes": each.size_bytes,
                "last_modified": _time(each.last_modified),
            }
            for each in found.objects
        ]
        print_json(
            {
                "dry_run": not really,
                "checkpoints": [_as_dict(each) for each in found.checkpoints],
                "objects": objects,
                "unreadable": [_as_dict(each) for each in found.unreadable],
                "copies": found.copies,
            }
        )
        return
    for each in found.unreadable:
        click.echo(plain(f"Left alone, with all below it: {each.uri}: {each.problem}"), err=True)
    for place in found.copies:
        told = (
            "a copy to it was cut off. Copy again, or remove the folder if all of it is the copy's"
        )
        click.echo(plain(f"Left alone: {place}: {told}"), err=True)
    rows = [("checkpoint", each.uri, each.size_bytes) for each in found.checkpoints]
    rows += [("object", str(S3Uri(bucket, each.key)), each.size_bytes) for each in found.objects]
    _print_removed(uri, rows, "delete", "deleted", really=really)


@cli.command()
@click.argument("uri")
@on_store
@_grace
@_really
@as_json_option
def abort_uploads(
    uri: str, store: dict[str, Any], *, grace_s: float, really: bool, as_json: bool
) -> None:
    """Abort unfinished uploads below URI.

    A killed save leaves them, and their parts are stored and paid for. Without --delete, they are
    only listed.
    """
    found = catalog.abort_uploads(uri, grace_s=grace_s, dry_run=not really, **store)
    bucket = parse_s3_uri(uri).bucket
    if as_json:
        uploads = [
            {
                "uri": str(S3Uri(bucket, each.key)),
                "upload_id": each.upload_id,
                "initiated": _time(each.initiated),
            }
            for each in found
        ]
        print_json({"dry_run": not really, "uploads": uploads})
        return
    rows = [("upload", str(S3Uri(bucket, each.key)), None) for each in found]
    _print_removed(uri, rows, "abort", "aborted", really=really)


@cli.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="[default: a free one]",
)
@click.option("--bucket", "buckets", multiple=True, default=["trial"], show_default=True)
def serve(port: int, buckets: Sequence[str]) -> None:
    """Serve S3 from memory, to try things out.

    Paste what it prints into another terminal: the commands there then reach it. Ctrl-C ends it,
    and what it holds is gone.
    """
    with suppress(KeyboardInterrupt), FakeS3(port=port) as server:
        for bucket in buckets:
            server.create_bucket(bucket)
        click.echo(f"unset {' '.join(_STRONGER)}")
        for name, value in server.environ().items():
            click.echo(f"export {name}={value}")
        while True:
            time.sleep(3600)


cli.add_command(bench)


def _as_dict(info: CheckpointInfo) -> dict[str, Any]:
    return {
        **dataclasses.asdict(info),
        "committed_at": _time(info.committed_at),
        "complete": info.complete,
    }


def _time(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat() if moment else None


def _entry_as_dict(entry: verifying.StoredEntry) -> dict[str, Any]:
    pieces = [dataclasses.asdict(piece) for piece in entry.pieces]
    for piece in pieces:
        crc = piece.pop("crc")
        # As text: 64 bits are more than most readers of JSON keep of a number.
        piece["crc64nvme"] = None if crc is None else f"{crc:016x}"
    return {
        "name": entry.name,
        "shape": entry.shape,
        "dtype": entry.dtype,
        "size_bytes": entry.size_bytes,
        "pieces": pieces,
    }


def _print_removed(
    below: str, rows: Sequence[tuple[str, str, int | None]], verb: str, done: str, *, really: bool
) -> None:
    for kind, uri, size_bytes in rows:
        size = "" if size_bytes is None else f" ({shown_size(size_bytes)})"
        click.echo(plain(f"{done if really else f'would {verb}'} {kind} {uri}{size}"))
    if not rows:
        left = "what is younger than --grace is left alone."
        click.echo(f"Nothing to {verb} below {plain(below)}: {left}", err=True)
    elif not really:
        click.echo(f"Nothing was changed: repeat it with --delete to {verb} these.", err=True)


def _first(keys: Sequence[str], folder: str) -> str:
    name = keys[0].removeprefix(folder)
    return f"{name} (and {len(keys) - 1} more)" if len(keys) > 1 else name
