"""The command line: `s3dcp`, or `python -m s3dcp`.

Exit status: 0 for success, 1 where `verify` finds a checkpoint damaged, 2 where a command could
not do what it was asked for. As of any program: 130 after Ctrl-C, 141 if nobody reads the output.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from s3dcp import __version__
from s3dcp import _catalog as catalog
from s3dcp import _verifying as verifying
from s3dcp._config import S3ClientConfig
from s3dcp._errors import S3Exception
from s3dcp._inventory import CheckpointInfo, folder_of
from s3dcp._keys import S3Uri, parse_s3_uri
from s3dcp._s3client import S3Client
from s3dcp.testing import FakeS3, LocalServerError

_DAMAGED, _FAILED, _INTERRUPTED, _UNREAD = 1, 2, 130, 141
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class _Bar(tqdm):  # type: ignore[type-arg]  # generic in its stubs alone
    monitor_interval = 0  # no thread that looks after bars


class _Failure(click.ClickException):
    exit_code = _FAILED


class _Commands(click.Group):
    """Commands whose failures are one line each."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (S3Exception, LocalServerError) as exc:
            raise _Failure(_plain(str(exc))) from exc
        except BrokenPipeError:
            # Nothing more can be written, by the interpreter's exit neither.
            with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            ctx.exit(_UNREAD)
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not match:
        raise click.BadParameter(f"{text!r} is not a number followed by s, m, h or d.")
    return float(match[1]) * _SECONDS[match[2]]


def _on_store(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how to reach the store, and the URI."""

    @click.argument("uri")
    @click.option("--region", help="The bucket's region. [default: AWS_REGION]")
    @click.option("--endpoint-url", help="An S3-compatible store. [default: AWS_ENDPOINT_URL]")
    @click.option("--profile", help="A profile of the AWS configuration file.")
    @click.option("--path-style", is_flag=True, help="Address buckets as ENDPOINT/BUCKET.")
    @functools.wraps(command)
    def wrapped(
        uri: str,
        region: str | None,
        endpoint_url: str | None,
        profile: str | None,
        *,
        path_style: bool,
        **options: Any,
    ) -> None:
        config = S3ClientConfig(
            endpoint_url=endpoint_url, profile=profile, force_path_style=path_style
        )
        command(uri, {"region": region, "s3client_config": config}, **options)

    return wrapped


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_grace = click.option(
    "--grace",
    "grace_s",
    type=_seconds,
    metavar="TIME",
    default="24h",
    show_default=True,
    help="Leave alone what is younger: it may belong to a save that is under way.",
)
_really = click.option("--delete", "really", is_flag=True, help="Do it, rather than only tell.")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Look after PyTorch distributed checkpoints on S3."""


@cli.command()
@_on_store
@_as_json
def ls(uri: str, store: dict[str, Any], *, as_json: bool) -> None:
    """List the checkpoints below URI, oldest first."""
    found = catalog.list_checkpoints(uri, **store)
    if as_json:
        _print_json(_as_dict(each) for each in found)
        return
    _print_table(
        ("COMMITTED", ">STEP", ">RANKS", ">TENSORS", ">SIZE", "CHECKPOINT", "STATE"),
        [
            (
                each.committed_at.isoformat(sep=" ", timespec="seconds")
                if each.committed_at
                else None,
                each.step,
                each.ranks,
                each.tensors,
                _size(each.size_bytes),
                each.uri,
                "complete" if each.complete else f"incomplete: {each.problem}",
            )
            for each in found
        ],
    )


@cli.command()
@_on_store
@_as_json
def inspect(uri: str, store: dict[str, Any], *, as_json: bool) -> None:
    """Show the tensors of the checkpoint at URI."""
    client, place = S3Client(**store), parse_s3_uri(uri)
    entries = client.call(verifying.inspect, place)
    if as_json:
        _print_json(_entry_as_dict(entry) for entry in entries)
        return
    folder = folder_of(place).key
    _print_table(
        ("NAME", "SHAPE", "DTYPE", ">SIZE", "FILE"),
        [
            (
                entry.name,
                None if entry.shape is None else "x".join(map(str, entry.shape)) or "scalar",
                entry.dtype,
                _size(entry.size_bytes),
                _first(entry.keys, folder),
            )
            for entry in entries
        ],
    )


@cli.command()
@_on_store
def verify(uri: str, store: dict[str, Any]) -> None:
    """Check every byte of the checkpoint at URI.

    Its objects must be there and long enough, and every item must have the checksum (CRC64NVME)
    that was taken when it was saved. Nothing is executed.

    Exit status: 0 if it is whole, 1 if it is damaged, 2 if that could not be found out.
    """
    client = S3Client(**store)
    with _Bar(unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False) as bar:

        def progress(count: int, total: int) -> None:
            bar.total = total
            bar.update(count)

        budget_bytes = client.s3client_config.memory_bytes()
        verdict = client.call(
            verifying.verify, parse_s3_uri(uri), budget_bytes=budget_bytes, progress=progress
        )
    for problem in verdict.problems:
        click.echo(_plain(problem))
    if verdict.problems:
        click.get_current_context().exit(_DAMAGED)
    click.echo(
        f"{_plain(uri)} is whole: {verdict.objects} objects, {verdict.verified} items compared "
        f"with their checksums ({_size(verdict.size_bytes)})"
    )
    if verdict.unverified:
        click.echo(f"{verdict.unverified} items have no checksum: their sizes were checked")


@cli.command()
@_on_store
@click.option(
    "--keep", type=click.IntRange(min=1), help="How many of the newest complete ones stay."
)
@_grace
@_really
def gc(uri: str, store: dict[str, Any], *, keep: int | None, grace_s: float, really: bool) -> None:
    """Remove what is no longer needed below URI.

    That is: all checkpoints older than the newest N complete ones, and data objects (*.distcp)
    that no checkpoint names, which saves that failed have left.

    Without --keep, no checkpoint is removed. Without --delete, nothing is.
    """
    found = catalog.gc(uri, keep=keep, grace_s=grace_s, dry_run=not really, **store)
    bucket = parse_s3_uri(uri).bucket
    for each in found.unreadable:
        click.echo(_plain(f"Left alone, with all below it: {each.uri}: {each.problem}"), err=True)
    rows = [("checkpoint", each.uri, each.size_bytes) for each in found.checkpoints]
    rows += [("object", str(S3Uri(bucket, each.key)), each.size_bytes) for each in found.objects]
    _print_removed(rows, "delete", "deleted", really=really)


@cli.command()
@_on_store
@_grace
@_really
def abort_uploads(uri: str, store: dict[str, Any], *, grace_s: float, really: bool) -> None:
    """Abort unfinished uploads below URI.

    A killed save leaves them, and their parts are stored and paid for. Without --delete, they are
    only listed.
    """
    found = catalog.abort_uploads(uri, grace_s=grace_s, dry_run=not really, **store)
    bucket = parse_s3_uri(uri).bucket
    rows = [("upload", str(S3Uri(bucket, each.key)), None) for each in found]
    _print_removed(rows, "abort", "aborted", really=really)


@cli.command()
@click.option("--port", type=int, default=9000, show_default=True, help="0 for a free one.")
@click.option("--bucket", "buckets", multiple=True, default=["trial"], show_default=True)
def serve(port: int, buckets: Sequence[str]) -> None:
    """Serve S3 from memory, to try things out."""
    with suppress(KeyboardInterrupt), FakeS3(port=port) as server:
        for bucket in buckets:
            server.create_bucket(bucket)
        for name, value in server.environ().items():
            click.echo(f"export {name}={value}")
        while True:
            time.sleep(3600)


def _as_dict(info: CheckpointInfo) -> dict[str, Any]:
    return {
        **dataclasses.asdict(info),
        "committed_at": info.committed_at.isoformat() if info.committed_at else None,
        "complete": info.complete,
    }


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


def _print_json(rows: Iterable[dict[str, Any]]) -> None:
    click.echo(json.dumps(list(rows), indent=2))


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns; those whose head starts with `>` to the right."""
    cells = [[_plain(str("-" if cell is None else cell)) for cell in row] for row in rows]
    table = [[head.lstrip(">") for head in heads], *cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        padded = (
            cell.rjust(width) if head.startswith(">") else cell.ljust(width)
            for cell, width, head in zip(row, widths, heads, strict=True)
        )
        click.echo("  ".join(padded).rstrip())


def _print_removed(
    rows: Sequence[tuple[str, str, int | None]], verb: str, done: str, *, really: bool
) -> None:
    for kind, uri, size_bytes in rows:
        size = "" if size_bytes is None else f" ({_size(size_bytes)})"
        click.echo(_plain(f"{done if really else f'would {verb}'} {kind} {uri}{size}"))
    if rows and not really:
        click.echo(f"Nothing was changed: repeat it with --delete to {verb} these.", err=True)


def _first(keys: Sequence[str], folder: str) -> str:
    name = keys[0].removeprefix(folder)
    return f"{name} (and {len(keys) - 1} more)" if len(keys) > 1 else name


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.4g} TiB"


def _plain(text: str) -> str:
    """Return text on one line that cannot steer a terminal: names come from the bucket."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
