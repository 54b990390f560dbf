"""What the commands share: how they end, and the options that they have in common.

Exit status: 0 for success, 1 where `verify` finds a checkpoint damaged, 2 where a command could
not do what it was asked for. As of any program: 130 after Ctrl-C, 141 if nobody reads the output.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from s3dcp._config import S3ClientConfig
from s3dcp._errors import S3Exception
from s3dcp._terminal import plain
from s3dcp.testing import LocalServerError

_FAILED, _INTERRUPTED, _UNREAD = 2, 130, 141
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class Failure(click.ClickException):
    """A command could not do what it was asked for."""

    exit_code = _FAILED


class Commands(click.Group):
    """Commands whose failures are one line each."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Nothing more can be written, by the interpreter's exit neither.
            with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
            ctx.exit(_UNREAD)
        except (S3Exception, LocalServerError, OSError) as exc:
            raise Failure(plain(str(exc))) from exc
        except KeyboardInterrupt:
            ctx.exit(_INTERRUPTED)


def seconds(text: str) -> float:
    """Read a time: a number and its unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not match:
        raise click.BadParameter(f"{text!r} is not a number followed by s, m, h or d.")
    return float(match[1]) * _SECONDS[match[2]]


def size(text: str) -> int:
    """Read a size in bytes: a number, and KiB, MiB, GiB or TiB, of which the letter does."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]?)(?:i?b)?", text.lower())
    found = int(float(match[1]) * _BYTES[match[2]]) if match else 0
    if not found:
        raise click.BadParameter(f"{text!r} is not a size, such as 64MiB or 1.5GiB.")
    return found


def on_store(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how to reach the store, which the command gets as `store`."""

    @click.option("--region", help="The bucket's region. [default: AWS_REGION]")
    @click.option("--endpoint-url", help="An S3-compatible store. [default: AWS_ENDPOINT_URL]")
    @click.option("--profile", help="A profile of the AWS configuration file.")
    @click.option("--path-style", is_flag=True, help="Address buckets as ENDPOINT/BUCKET.")
    @click.option("--unsigned", is_flag=True, help="Without credentials: a public bucket.")
    @click.option("--requester-pays", is_flag=True, help="Pay for requests to others' buckets.")
    @functools.wraps(command)
    def wrapped(
        *,
        region: str | None,
        endpoint_url: str | None,
        profile: str | None,
        path_style: bool,
        unsigned: bool,
        requester_pays: bool,
        **options: Any,
    ) -> None:
        config = S3ClientConfig(
            endpoint_url=endpoint_url,
            profile=profile,
            force_path_style=path_style,
            unsigned=unsigned,
            requester_pays=requester_pays,
        )
        command(store={"region": region, "s3client_config": config}, **options)

    return wrapped
