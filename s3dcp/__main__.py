"""`python -m s3dcp`, and the command `s3dcp`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say how to install what it needs."""
    try:
        from s3dcp._cli import cli
    except ModuleNotFoundError as exc:
        if exc.name not in {"click", "tqdm"}:
            raise
        sys.stderr.write(f's3dcp: {exc.name} is missing: pip install "s3dcp[cli]"\n')
        sys.exit(2)
    cli(prog_name="s3dcp")


if __name__ == "__main__":
    main()
