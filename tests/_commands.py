"""The command line, called in this process and run in one of its own, on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner, Result

from s3dcp.__main__ import main
from s3dcp._cli import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Seconds in which any command is done.
LIMIT_S = 200


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="s3dcp")


# Ends what was shown; nothing writes that by itself.
_END = b"\x04"


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Open a terminal of 24 lines of 80 columns: our end, which does not block, and theirs."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    os.set_blocking(ours, False)
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


def shown(ours: int, theirs: int) -> str:
    """Return all that has been written to a terminal, which may arrive bit by bit."""
    os.write(theirs, _END)
    text = b""
    while not text.endswith(_END):
        assert select.select([ours], [], [], LIMIT_S)[0], text
        text += os.read(ours, 1 << 16)
    return text.removesuffix(_END).decode()


def program(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "s3dcp", *arguments]
    return subprocess.Popen(command, text=True, **options)


def own_terminal() -> None:
    """In a child: make its standard input the terminal whose Ctrl-C it gets."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def command(arguments: tuple[str, ...], tty: str | None) -> None:
    """In a child: be the program, on a terminal of its own if there is one."""
    if tty is not None:
        standard = os.open(tty, os.O_RDWR)
        for number in range(3):
            os.dup2(standard, number)
        own_terminal()
    sys.argv = ["s3dcp", *arguments]
    main()
