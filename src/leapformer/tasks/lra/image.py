"""Image: CIFAR-10 as 1,024 grey pixels in a row (Krizhevsky 2009; Tay et al. 2021).

Grey is .2989 red + .587 green + .114 blue, cut to an integer. A picture has no padding: pixel 0 is black, and a symbol
like the others. 45,000 pictures for training and 5,000, drawn with the seed, for validation; 10,000 for the test.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from leapformer.errors import LeapformerError
from leapformer.files.expanding import largest_file
from leapformer.files.reading import read_bytes
from leapformer.files.showing import cut
from leapformer.tasks.files import is_hidden, list_files
from leapformer.tasks.lra.harness import check_label, convert_pickles, has_pickles
from leapformer.tasks.lra.preparation import Description, Job, hold_out
from leapformer.tasks.lra.unpickling import read_pickle

CONVERTER = GENERATOR = "image reader 1"
OPTIONS: dict[str, Any] = {}

SIDE = 32
PIXELS = SIDE * SIDE
SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")  # no other decoder of Pillow is asked, whatever a file is: one of them starts a program
_PNG_END = b"IEND\xaeB`\x82"  # the last chunk, without content, and its checksum
LARGEST = 1 << 20  # bytes of a picture's file
CLASSES = 10
DESCRIPTION = Description(256, CLASSES, PIXELS, CONVERTER, pad_id=None)

_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_GREY = np.array([2989, 5870, 1140], dtype=np.int64)  # ten-thousandths, so that cutting to an integer is exact

Examples = Iterator[tuple[np.ndarray, int]]


def prepare(job: Job) -> Description:
    """Convert python or binary batches, folders or zips of pictures, or an older harness's pickles."""
    assert job.source is not None
    if has_pickles(job.source, "image"):
        return convert_pickles(job, "image", DESCRIPTION)
    read = find_layout(job.source)
    pictures, labels = [], []
    for picture, label in read(job, "train"):
        pictures.append(picture)
        labels.append(label)
    kept, held = hold_out(len(labels), job)
    for split, numbers in (("train", kept), ("validation", held)):
        with job.writer(split) as writer:
            for number in numbers:
                writer.add(pictures[number].tobytes(), labels[number])
    with job.writer("test") as writer:
        for picture, label in read(job, "test"):
            writer.add(picture.tobytes(), label)
    return DESCRIPTION


def grey(rgb: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] to uint8 [...]."""
    return (rgb.astype(np.int64) @ _GREY // 10_000).astype(np.uint8)


def find_layout(source: Path) -> Callable[[Job, str], Examples]:
    """The reader of what lies there.

    Raises:
        LeapformerError: nothing known.
    """
    for folder in (source, source / "cifar-10-batches-py", source / "cifar-10-batches-bin"):
        if (folder / "data_batch_1").is_file():
            return lambda job, split: _read_python(job, folder, split)
        if (folder / "data_batch_1.bin").is_file():
            return lambda job, split: _read_binary(job, folder, split)
    if (source / "train.zip").is_file():
        return lambda job, split: _read_zip(job, source / f"{split}.zip", "")
    if source.suffix == ".zip":
        return lambda job, split: _read_zip(job, source, split)
    if (source / "train").is_dir():
        return lambda job, split: _read_folder(job, source / split)
    raise LeapformerError(
        f"--from {source}: expected data_batch_1 or data_batch_1.bin, or train and test as folders or zips of "
        "pictures, "
        "found none"
    )


# ---- batches


def _read_python(job: Job, folder: Path, split: str) -> Examples:
    """Pickles of {"data": uint8 [N, 3072], "labels": [N]}, all red pixels first."""
    for name in _BATCHES[split]:
        path = folder / name
        batch = read_pickle(path)
        data, labels = (batch.get("data"), batch.get("labels")) if isinstance(batch, dict) else (None, None)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3 * PIXELS,):
            raise LeapformerError(f"{path}: expected data, uint8 [N, {3 * PIXELS}], found something else")
        if not isinstance(labels, list) or len(labels) != len(data):
            raise LeapformerError(f"{path}: expected {len(data)} labels, found something else")
        pictures = grey(data.reshape(-1, 3, PIXELS).transpose(0, 2, 1))
        for row, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            with job.bad.guard():
                yield picture, check_label(label, CLASSES, f"{path}:{row}")
        job.progress(1, 1, name)


def _read_binary(job: Job, folder: Path, split: str) -> Examples:
    """Rows of 3,073 bytes: the label, then all red, green and blue pixels."""
    for name in _BATCHES[split]:
        path = folder / f"{name}.bin"
        content = read_bytes(path, largest=largest_file())
        row_size = 1 + 3 * PIXELS
        rows, rest = divmod(len(content), row_size)
        if rest:
            job.bad.report(f"{path}:{rows}: expected {row_size} bytes a picture, found {rest}")
        array = np.frombuffer(content, np.uint8, rows * row_size).reshape(rows, row_size)
        pictures = grey(array[:, 1:].reshape(rows, 3, PIXELS).transpose(0, 2, 1))
        for row, label in enumerate(array[:, 0].tolist()):
            with job.bad.guard():
                yield pictures[row], check_label(label, CLASSES, f"{path}:{row}")
        job.progress(1, 1, path.name)


# ---- pictures, one file each: CLASS/NAME.png


def _read_folder(job: Job, folder: Path) -> Examples:
    if not folder.is_dir():
        raise LeapformerError(f"{folder}: expected a folder of pictures, found none")
    files = [path for path in list_files(folder, "*/*") if path.suffix.lower() in SUFFIXES]
    names = {path: (path.parent.name, path.name) for path in files}
    yield from _read_pictures(job, folder, names, read_picture_file)


def read_picture_file(path: Path) -> bytes:
    """The bytes of a picture, before it is decoded."""
    path.stat()  # the system's own words where there is none
    return read_bytes(path, largest=LARGEST)


def _read_zip(job: Job, path: Path, inside: str) -> Examples:
    """Read in place: nothing is unpacked, so that a name in the archive leads nowhere."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {}
            for name in sorted(archive.namelist()):
                parts = name.split("/")
                if is_hidden(name) or not name.lower().endswith(SUFFIXES):
                    continue
                if len(parts) >= 2 and inside in ("", *parts[:-2]):
                    names[name] = (parts[-2], parts[-1])
            yield from _read_pictures(job, path, names, lambda name: _read_member(archive, name))
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise LeapformerError(f"{path}: expected a whole zip of pictures, found {cut(error, 120)}") from None


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    size = archive.getinfo(name).file_size
    if size > LARGEST:
        raise LeapformerError(
            f"{archive.filename}:{name}: expected a picture of at most {LARGEST:,} bytes, found {size:,}"
        )
    return archive.read(name)


def _read_pictures(job: Job, place: Path, names: dict[Any, tuple[str, str]], read: Callable[[Any], bytes]) -> Examples:
    """The label is the place of the class among the sorted names, which is CIFAR-10's own numbering."""
    classes = sorted({name for name, _ in names.values()})
    if len(classes) != CLASSES:
        raise LeapformerError(
            f"{place}: expected {CLASSES} folders of pictures, one for each class, found {len(classes)}"
        )
    for number, (name, (kind, _)) in enumerate(sorted(names.items(), key=lambda entry: entry[1]), start=1):
        with job.bad.guard():
            where = name if isinstance(name, Path) else f"{place}:{name}"
            yield read_picture(lambda name=name: read(name), where, SIDE).reshape(-1), classes.index(kind)
        if number % 1000 == 0 or number == len(names):
            job.progress(number, len(names), place.name)


def read_picture(read: Callable[[], bytes], where: Any, side: int) -> np.ndarray:
    """The grey pixels of a picture, uint8 [side, side].

    Raises:
        LeapformerError: it cannot be read, or has another size.
    """
    where = cut(where, 240)
    try:
        content = _read_content(read, where)
        _check_end(content)
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            if picture.size != (side, side):
                raise LeapformerError(
                    f"{where}: expected {side} x {side} pixels, found {picture.width} x {picture.height}"
                )
            if picture.mode == "L":
                return np.array(picture)
            return grey(np.array(picture.convert("RGB")))
    except LeapformerError:
        raise
    except Exception as error:  # Pillow's plug-ins raise many kinds
        reason = cut(error, 100) or type(error).__name__
        raise LeapformerError(f"{where}: expected a picture, found {reason}") from None


def _read_content(read: Callable[[], bytes], where: str) -> bytes:
    try:
        return read()
    except LeapformerError as error:
        raise OSError(str(error).removeprefix(f"{where}: ")) from None


def _check_end(content: bytes) -> None:
    """Pillow stops reading where it has all pixels, and looks at no checksum of a png's pixels.

    Raises:
        OSError: the file is damaged, or ends before its format says so.
    """
    if content.startswith(b"\xff\xd8"):
        if content.rfind(b"\xff\xd9") < 0:
            raise OSError("a jpeg without its end: it is cut off")
    elif content.startswith(b"\x89PNG"):
        if _PNG_END not in content:
            raise OSError("a png without its end: it is cut off")
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            picture.verify()
