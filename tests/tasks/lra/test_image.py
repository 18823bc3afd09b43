"""Image: CIFAR-10 in each form that it comes in, grey by the task's own weights."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leapformer.tasks.lra.dataset import load
from leapformer.tasks.lra.image import grey
from leapformer.tasks.lra.preparation import prepare
from tests.tasks.lra.builders import fails

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_grey_is_cut_to_an_integer():
    rgb = np.random.default_rng(0).integers(0, 256, (500, 3), dtype=np.uint8)
    expected = [int(np.floor((2989 * int(r) + 5870 * int(g) + 1140 * int(b)) / 10_000)) for r, g, b in rgb]
    assert grey(rgb).tolist() == expected
    assert grey(np.array([[255, 255, 255], [0, 0, 0]], np.uint8)).tolist() == [254, 0]


def write_batches(folder: Path, *, binary: bool, rows: int = 4) -> tuple[Path, np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (6, rows, 3072), dtype=np.uint8)
    labels = generator.integers(0, 10, (6, rows))
    for number, name in enumerate([*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"]):
        if binary:
            content = np.concatenate([labels[number][:, None].astype(np.uint8), data[number]], axis=1)
            (folder / f"{name}.bin").write_bytes(content.tobytes())
        else:
            batch = {b"data": data[number], b"labels": labels[number].tolist(), b"batch_label": b"x"}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder, data, labels


@pytest.mark.parametrize("binary", [False, True])
def test_batches(tmp_path, binary):
    folder = "cifar-10-batches-bin" if binary else "cifar-10-batches-py"
    _, data, labels = write_batches(tmp_path / "cifar" / folder, binary=binary)
    card = prepare("image", tmp_path / "x", source=tmp_path / "cifar")
    assert [card["splits"][split]["examples"] for split in ("train", "validation", "test")] == [18, 2, 4]
    test = load("image", tmp_path / "x", "test")
    assert test.labels.tolist() == labels[5].tolist()
    assert (test.vocab_size, test.num_classes, test.max_length, test.pad_id) == (256, 10, 1024, None)
    planes = data[5].reshape(4, 3, 1024)
    assert all(np.array_equal(test[n]["input_ids"], grey(planes[n].T)) for n in range(4))
    train = [item for split in ("train", "validation") for item in load("image", tmp_path / "x", split)]
    assert sorted(item["label"] for item in train) == sorted(labels[:5].reshape(-1).tolist())


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def write_zips(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for split, each in (("train", 2), ("test", 1)):
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            for label, name in enumerate(NAMES):
                for number in range(each):
                    archive.writestr(f"{name}/{number:04d}.png", png(pixels(10 * label + number)))
            archive.writestr("../evil.txt", "x")
    return folder


def write_folders(folder: Path) -> Path:
    for split, each in (("train", 2), ("test", 1)):
        for label, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for number in range(each):
                (folder / split / name / f"{number}.png").write_bytes(png(pixels(10 * label + number)))
    return folder


def check_pictures(folder: Path) -> None:
    test = load("image", folder, "test")
    assert test.labels.tolist() == list(range(10))
    assert all(np.array_equal(test[n]["input_ids"], grey(pixels(10 * n)).reshape(-1)) for n in range(10))
    assert len(load("image", folder, "train")) == 18 and len(load("image", folder, "validation")) == 2


def test_folders_and_zips_of_pictures(tmp_path):
    prepare("image", tmp_path / "x", source=write_folders(tmp_path / "folders"))
    check_pictures(tmp_path / "x")
    prepare("image", tmp_path / "y", source=write_zips(tmp_path / "zips"))
    check_pictures(tmp_path / "y")
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        for file in sorted((tmp_path / "folders").rglob("*.png")):
            archive.write(file, f"cifar/{file.relative_to(tmp_path / 'folders')}")
    prepare("image", tmp_path / "z", source=tmp_path / "one.zip")
    check_pictures(tmp_path / "z")
    assert not list(tmp_path.parent.rglob("evil.txt"))  # read in place, so nothing is unpacked anywhere


def test_grey_pictures_stay_as_they_are(tmp_path):
    source = write_folders(tmp_path / "folders")
    (source / "test" / "airplane" / "0.png").write_bytes(png(np.full((32, 32), 255, np.uint8)))
    prepare("image", tmp_path / "x", source=source)
    assert set(load("image", tmp_path / "x", "test")[0]["input_ids"].tolist()) == {255}


def test_bad_pictures(tmp_path):
    source = write_folders(tmp_path / "folders")
    bad = source / "test" / "bird" / "0.png"
    bad.write_bytes(png(pixels(0))[:100])
    fails("bird/0.png: expected a picture, found", "image", tmp_path / "x", source=source)
    bad.write_bytes(png(np.zeros((16, 32), np.uint8)))
    fails("bird/0.png: expected 32 x 32 pixels, found 32 x 16", "image", tmp_path / "x", source=source)
    card = prepare("image", tmp_path / "y", source=source, skip_bad=True)
    assert len(card["bad_rows"]) == 1 and card["splits"]["test"]["examples"] == 9
    bad.unlink()
    fails("test: expected 10 folders of pictures, one for each class, found 9", "image", tmp_path / "x", source=source)


def test_bad_batches(tmp_path):
    folder, data, labels = write_batches(tmp_path / "py", binary=False)
    path = folder / "data_batch_2"
    path.write_bytes(pickle.dumps({"data": data[0], "labels": [10, *labels[0][1:].tolist()]}))
    fails("data_batch_2:0: expected a label 0 to 9, found '10'", "image", tmp_path / "x", source=folder)
    path.write_bytes(pickle.dumps({"data": data[0], "labels": [1]}))
    fails("data_batch_2: expected 4 labels", "image", tmp_path / "x", source=folder)
    path.write_bytes(pickle.dumps({"data": data[0].astype(np.int64), "labels": [1]}))
    fails("data_batch_2: expected data, uint8", "image", tmp_path / "x", source=folder)
    path.unlink()
    fails("data_batch_2: cannot be read", "image", tmp_path / "x", source=folder)
    folder, *_ = write_batches(tmp_path / "bin", binary=True)
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    fails("data_batch_2.bin:3: expected 3073 bytes a picture, found 3072", "image", tmp_path / "x", source=folder)
    path.unlink()
    fails("data_batch_2.bin: cannot be read", "image", tmp_path / "x", source=folder)


def test_other_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    fails(
        "expected data_batch_1 or data_batch_1.bin, or train and test",
        "image",
        tmp_path / "x",
        source=tmp_path / "empty",
    )
    (tmp_path / "one.zip").write_bytes(b"PK")
    fails("one.zip: expected a whole zip of pictures", "image", tmp_path / "x", source=tmp_path / "one.zip")
    source = write_zips(tmp_path / "zips")
    (source / "test.zip").unlink()
    fails("test.zip: expected a whole zip of pictures", "image", tmp_path / "x", source=source)


def test_hidden_files_are_no_pictures(tmp_path):
    """What a Mac leaves behind in folders and zips."""
    source = write_folders(tmp_path / "folders")
    expected = prepare("image", tmp_path / "x", source=source)["splits"]
    for kind in ("airplane", "truck"):
        (source / "train" / kind / "._0.png").write_bytes(b"\0\5\x16\7 no picture")
    (source / "train" / ".hidden").mkdir()
    (source / "train" / ".hidden" / "0.png").write_bytes(png(pixels(0)))
    assert prepare("image", tmp_path / "y", source=source)["splits"] == expected
    zips = write_zips(tmp_path / "zips")
    expected = prepare("image", tmp_path / "z", source=zips)["splits"]
    with zipfile.ZipFile(zips / "train.zip", "a") as archive:
        archive.writestr("__MACOSX/airplane/._0000.png", b"no picture")
        archive.writestr("airplane/._0000.png", b"no picture")
    assert prepare("image", tmp_path / "w", source=zips)["splits"] == expected


def test_pictures_that_are_cut_off_or_damaged(tmp_path):
    source = write_folders(tmp_path / "folders")
    place = source / "train" / "cat" / "1.png"
    content = {"PNG": png(pixels(1)), "JPEG": png(pixels(1), "JPEG")}
    for whole in content.values():
        for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:40]):
            place.write_bytes(damaged)
            fails("cat/1.png: expected a picture, found", "image", tmp_path / "x", source=source)
    flipped = bytearray(content["PNG"])
    flipped[len(flipped) // 2] ^= 1
    place.write_bytes(bytes(flipped))
    fails("cat/1.png: expected a picture, found", "image", tmp_path / "x", source=source)


def test_pictures_that_would_take_the_memory(tmp_path):
    source = write_folders(tmp_path / "folders")
    place = source / "train" / "cat" / "1.png"
    with place.open("wb") as file:  # a sparse file: no disk is taken
        file.truncate(3 << 30)
    fails(
        "cat/1.png: expected a picture, found expected at most 1,048,576 bytes", "image", tmp_path / "x", source=source
    )
    place.write_bytes(png(np.zeros((3000, 3000), np.uint8)))
    fails("cat/1.png: expected 32 x 32 pixels, found 3000 x 3000", "image", tmp_path / "x", source=source)
    zips = write_zips(tmp_path / "zips")
    with zipfile.ZipFile(zips / "train.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/9999.png", bytes(8 << 20))
    fails("cat/9999.png: expected a picture.*found 8,388,608", "image", tmp_path / "x", source=zips)


def test_no_other_decoder_is_asked(tmp_path):
    """Pillow starts Ghostscript for PostScript, whatever the file is called."""
    source = write_folders(tmp_path / "folders")
    (source / "train" / "cat" / "1.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    )
    fails("cat/1.png: expected a picture, found cannot identify", "image", tmp_path / "x", source=source)
