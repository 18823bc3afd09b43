"""The command ``leapformer``: thin, and quick to start because everything heavy is imported where it is used."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from leapformer.errors import LeapformerError, MissingExtra

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process) and return its exit code.

    A fault of the user's input prints one line and gives 2; an interrupt gives 130.
    """
    try:
        return _run(argv)
    except LeapformerError as error:
        sys.stderr.write(f"leapformer: {error}\n")
        return 2
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        sys.stderr.write(f"leapformer: {error.filename or 'the disk'}: {error.strerror}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("leapformer: interrupted\n")
        return 130


def _run(argv: Sequence[str] | None) -> int:
    try:
        import typer  # noqa: F401
    except ImportError as error:
        raise MissingExtra("lm", package=error.name, purpose="the command leapformer") from error
    from leapformer.cli.app import run

    return run(argv)
