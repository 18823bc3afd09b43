"""A lock on a folder that ends with the process which holds it, however that ends."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from leapformer.errors import LeapformerError
from leapformer.files.showing import cut

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block no other process gets past `locked` or `check_free` of this folder, which has to be there.

    A file system without locks gives none, and the block is entered all the same.

    Raises:
        LeapformerError: another process is in such a block; says which.
    """
    path = folder / LOCK
    file = _take(path)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                if _is_at(file, path):
                    path.unlink()  # while it is still held, so that nobody else's is removed
            os.close(file)


def check_free(folder: Path) -> None:
    """Check that no process is in a block of `locked`; writes nothing.

    Raises:
        LeapformerError: one is; says which.
    """
    try:
        file = os.open(folder / LOCK, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return  # no lock there, or none that could be held
    try:
        _lock(file, folder / LOCK, shared=True)
    finally:
        os.close(file)


def _take(path: Path) -> int | None:
    """The open file that holds the lock; None where the file system has no locks."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise LeapformerError(f"{cut(path, 240)}: could not be written ({error.strerror or error})") from None
        try:
            held = _lock(file, path, shared=False)
            if held and not _is_at(file, path):  # the one before removed it after we had opened it
                os.close(file)
                continue
        except BaseException:
            os.close(file)
            raise
        if not held:
            os.close(file)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # a full disk: then the next one can't say who it is
            os.ftruncate(file, 0)
            os.pwrite(file, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        return file


def _lock(file: int, path: Path, *, shared: bool) -> bool:
    """Whether the file is locked now; False where the file system or the platform has no locks."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = cut(os.pread(file, 200, 0).decode("utf-8", errors="replace")) or "another process"
        raise LeapformerError(
            f"{cut(path.parent, 240)}: {holder} is at work in this folder; wait for its end, or choose another"
        ) from None
    except OSError:
        return False
    return True


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except OSError:
        return False
