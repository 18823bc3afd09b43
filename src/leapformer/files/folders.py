"""What may lie in a folder that somebody handed over."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from leapformer.errors import LeapformerError
from leapformer.files.reading import kind_of_file
from leapformer.files.showing import cut, shown

MOST_ENTRIES = 100_000
LONGEST_NAME = 255  # bytes, in every usual file system


def check_own_files(folder: str | os.PathLike[str]) -> None:
    """Check that a folder holds regular files and folders alone, with all below it, and no link that leads out of it.

    So nothing in it waits for ever when it is read, and nothing outside it is read or written in its place. A folder
    that is not there holds nothing.

    Raises:
        LeapformerError: names the first thing of another kind.
    """
    root, seen = os.path.realpath(folder), 0
    for place, folders, files in os.walk(root, onerror=_cannot_look):
        for name in [*folders, *files]:
            path, seen = os.path.join(place, name), seen + 1
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                target = os.path.realpath(path)
                if os.path.commonpath([root, target]) != root:
                    raise LeapformerError(
                        f"{cut(path, 240)}: expected no link that leads out of {cut(root, 240)}, found one"
                    )
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise LeapformerError(f"{cut(path, 240)}: expected a file, found {kind_of_file(mode)}")
        if seen > MOST_ENTRIES:
            raise LeapformerError(f"{cut(root, 240)}: expected at most {MOST_ENTRIES:,} files, found more")


def check_output_folder(path: str | os.PathLike[str], *, option: str = "--output") -> None:
    """Check before the work that a path can become a folder to write into; nothing is made.

    Raises:
        LeapformerError: there is something else, or a name that no folder can have.
    """
    where = cut(os.fspath(path), 240)
    try:
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(path).parts):
            # Looking wouldn't tell where the folders around it are still to be made.
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        for place in (Path(path), *Path(path).parents):
            try:
                mode = place.lstat().st_mode
            except (FileNotFoundError, NotADirectoryError):
                continue
            if not place.is_dir():
                what = "a link to nothing" if stat.S_ISLNK(mode) else kind_of_file(mode)
                at = "" if place == Path(path) else f" at {cut(place, 240)}"
                raise LeapformerError(f"{option} {where}: expected a folder, found {what}{at}")
            return
    except OSError as error:
        raise LeapformerError(f"{option} {where}: expected a folder, found {error.strerror or error}") from None
    except ValueError:  # a zero byte
        raise LeapformerError(
            f"{option} {shown(os.fspath(path))}: expected a folder, found a zero byte in it"
        ) from None


def _cannot_look(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise LeapformerError(f"{cut(error.filename, 240)}: cannot be read ({error.strerror or error})") from None
