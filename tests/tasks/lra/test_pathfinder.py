"""Pathfinder: what is drawn can be solved from the pixels, and the release's folders are read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leapformer.errors import LeapformerError
from leapformer.tasks.lra import pathfinder
from leapformer.tasks.lra.dataset import load
from leapformer.tasks.lra.preparation import prepare
from leapformer.tasks.lra.snakes import SETTINGS, Pictures, draw
from tests.tasks.lra.builders import fails, spread


@pytest.fixture(scope="module")
def drawn() -> Pictures:
    return draw(np.random.default_rng(0), SETTINGS[32], paddles=14, count=300)


def connected(pixels: np.ndarray, first: np.ndarray, last: np.ndarray, *, gap: float) -> bool:
    """Whether one comes from the pixel nearest `first` to the one nearest `last` by steps of at most `gap` rows and
    columns.
    """
    places = np.argwhere(pixels)
    near = np.abs(places[:, None] - places[None]).max(axis=-1) <= gap
    begin, end = (np.linalg.norm(places - marker, axis=1).argmin() for marker in (first, last))
    reached = np.zeros(len(places), dtype=bool)
    reached[begin] = True
    while not reached[end]:
        further = near[reached].any(axis=0)
        if (further == reached).all():
            return False
        reached = further
    return True


def solved(pictures: Pictures, *, further: int = 0) -> float:
    """The share of right answers from linking gaps of up to two margins (at 32: the margin and one), or further."""
    answers = [
        connected(pixels, first, last, gap=2 * margin + further)
        for pixels, (first, last), margin in zip(pictures.targets, pictures.markers, pictures.margins, strict=True)
    ]
    return float((np.array(answers) == pictures.labels).mean())


def test_an_oracle_that_links_gaps_up_to_the_margin_and_one_finds_the_labels(drawn):
    assert solved(drawn) >= 0.95
    # And the pictures are of two separate curves, not of one blot.
    assert solved(drawn, further=100) == pytest.approx(drawn.labels.mean())


@pytest.mark.parametrize("size", [64, 128, 256])
def test_larger_pictures(size):
    pictures = draw(np.random.default_rng(1), SETTINGS[size], paddles=6, count=6)
    assert pictures.images.shape == (6, size, size)
    assert solved(pictures) >= 0.95


def test_labels_are_balanced_and_pixels_are_grey(drawn):
    assert drawn.labels.mean() == pytest.approx(0.5, abs=spread(0.5, 300))
    assert drawn.images.dtype == np.uint8 and drawn.images.max() == 255
    # 48 paddles of 2 to 4 pixels each on 1,024, and two discs.
    assert 48 * 2 / 1024 < (drawn.images > 0).mean() < (48 * 4 + 2 * 16) / 1024
    assert {0, 191, 255} < set(np.unique(drawn.images).tolist())  # 191: a paddle along a row covers half of it


def test_the_discs_lie_on_tips_of_the_target_snakes(drawn):
    for image, pixels, markers in zip(drawn.images, drawn.targets, drawn.markers, strict=True):
        for row, column in markers:
            assert image[row, column] == 255
            assert np.abs(np.argwhere(pixels) - [row, column]).max(axis=1).min() <= 1


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pathfinder") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pathfinder, "SHARD_PIXELS", 30 * 1024)
        prepare("pathfinder", folder, count=80, level=6, workers=1)
    return folder


def test_prepared_pictures(small):
    card = json.loads((small / "card.json").read_text())
    assert [card["splits"][split]["examples"] for split in ("train", "validation", "test")] == [80, 10, 10]
    train = load("pathfinder", small, "train")
    assert (train.vocab_size, train.num_classes, train.max_length, train.pad_id) == (256, 2, 1024, None)
    assert train[0]["input_ids"].shape == (1024,) and train[0]["input_ids"].dtype == np.uint8
    pictures = {
        bytes(item["input_ids"])
        for split in ("train", "validation", "test")
        for item in load("pathfinder", small, split)
    }
    assert len(pictures) == 100


def test_pictures_do_not_depend_on_the_workers(small, tmp_path, monkeypatch):
    monkeypatch.setattr(pathfinder, "SHARD_PIXELS", 30 * 1024)
    prepare("pathfinder", tmp_path / "x", count=80, level=6, workers=2)
    for split in ("train", "validation", "test"):
        assert (tmp_path / "x" / f"{split}.safetensors").read_bytes() == (small / f"{split}.safetensors").read_bytes()


def test_the_generator_is_still_the_version_that_it_says():
    """Another picture from the same seed needs another version in GENERATOR, for shards and cards to tell them
    apart.
    """
    pictures = draw(np.random.default_rng(0), SETTINGS[32], paddles=6, count=8)
    digest = hashlib.sha256(pictures.images.tobytes() + pictures.labels.tobytes()).hexdigest()
    assert (pathfinder.GENERATOR, digest[:16]) == ("pathfinder generator 1", "c1b394a6938c15ef")


# ---- the release's folders


def write_release(root: Path, *, plain: bool, pictures: int = 20, size: int = 32) -> Path:
    folder = root / "pathfinder32" / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    for batch in (0, 1):
        (folder / "imgs" / str(batch)).mkdir(parents=True)
        rows = []
        for number in range(pictures):
            image = np.full((size, size), 10 * batch + number, np.uint8)
            name = f"sample_{number}.png"
            Image.fromarray(image).save(folder / "imgs" / str(batch) / name)
            rows.append([f"imgs/{batch}", name, str(number), str(number % 2), "1.0", "14", "4", "2", "0.5", "1", "1"])
        path = folder / "metadata" / f"{batch}.npy"
        if plain:
            path.write_text("\n".join(" ".join(row) for row in rows) + "\n")
        else:
            np.save(path, np.array(rows))
    return folder


@pytest.mark.parametrize("plain", [True, False])
def test_the_release_is_read(tmp_path, plain):
    folder = write_release(tmp_path / "release", plain=plain)
    (folder / "imgs" / "0" / "sample_5.png").write_bytes(b"")  # the release has such a one
    card = prepare("pathfinder", tmp_path / "x", source=tmp_path / "release")
    assert sum(card["splits"][split]["examples"] for split in card["splits"]) == 39
    assert card["bad_rows"] == [] and card["notes"]["empty_files"] == 1
    assert [card["splits"][split]["examples"] in (expected, expected - 1) for split, expected in
            (("train", 32), ("validation", 4), ("test", 4))] == [True] * 3  # fmt: skip
    greys = []
    for split in ("train", "validation", "test"):
        for item in load("pathfinder", tmp_path / "x", split):
            assert len(set(item["input_ids"].tolist())) == 1
            grey = int(item["input_ids"][0])
            assert item["label"] == grey % 2
            greys.append(grey)
    assert sorted(greys) == sorted([*range(20), *range(10, 30)])[:5] + sorted([*range(20), *range(10, 30)])[6:]


def test_bad_pictures_and_rows_are_named_or_skipped(tmp_path):
    folder = write_release(tmp_path / "release", plain=True)
    (folder / "imgs" / "1" / "sample_3.png").write_bytes(b"not a picture")
    fails("imgs/1/sample_3.png: expected a picture", "pathfinder", tmp_path / "x", source=folder)
    Image.new("L", (31, 32)).save(folder / "imgs" / "1" / "sample_3.png")
    fails("sample_3.png: expected 32 x 32 pixels, found 31 x 32", "pathfinder", tmp_path / "x", source=folder)
    (folder / "imgs" / "1" / "sample_3.png").unlink()
    fails("sample_3.png: expected a picture, found", "pathfinder", tmp_path / "x", source=folder)
    with (folder / "metadata" / "0.npy").open("a") as file:
        file.write("imgs/0 sample_0.png 0\nimgs/0 sample_0.png 0 2\n../../.. sample_0.png 0 1\n")
    card = prepare("pathfinder", tmp_path / "y", source=folder, skip_bad=True)
    assert [row.split(": ")[1] for row in card["bad_rows"]] == [
        "expected folder, file, index and label, found 3 columns",
        "expected the label 0 or 1, found '2'",
        "expected a file inside curv_contour_length_14, found '../../..'",
        "expected a picture, found [Errno 2] No such file or directory",
    ]
    assert card["bad_rows"][0].startswith(f"{folder / 'metadata' / '0.npy'}:21")


def test_metadata_are_never_unpickled(tmp_path):
    folder = write_release(tmp_path / "release", plain=True)
    np.save(folder / "metadata" / "0.npy", np.array([["imgs/0", {}]], dtype=object), allow_pickle=True)
    fails(r"0\.npy: expected rows of text or an array of text, found Object arrays", "pathfinder", tmp_path / "x",
          source=folder)  # fmt: skip


def test_wrong_options_and_folders(tmp_path):
    fails("--size: expected 32, 64, 128 or 256, found 33", "pathfinder", tmp_path / "x", size=33)
    fails("--level: expected 6, 9 or 14, found 8", "pathfinder", tmp_path / "x", level=8)
    write_release(tmp_path / "release", plain=True)
    fails("expected pathfinder32/curv_baseline", "pathfinder", tmp_path / "x", source=tmp_path / "release", level=6)
    with pytest.raises(LeapformerError, match=r"0\.npy: expected rows of text"):
        pathfinder.read_metadata(tmp_path / "0.npy")


def test_arrays_that_promise_too_much(tmp_path):
    import io

    from leapformer.tasks.lra.pathfinder import read_metadata

    file = io.BytesIO()
    np.save(file, np.array([["a", "b"]]))
    content = file.getvalue()
    path = tmp_path / "0.npy"
    for old, new in (
        (b"(1, 2)", b"(9, 2)"),
        (b"(1, 2), }", b"(10**9, 2), }"),
        (b"<U1", b"<U9"),
        (b"(1, 2)", b"(-1, 2)"),
    ):
        path.write_bytes(content.replace(old, new))
        with pytest.raises(LeapformerError, match="0.npy: expected rows of text or an array of text, found"):
            read_metadata(path)
    path.write_bytes(content[:-1])
    with pytest.raises(LeapformerError, match="0.npy: expected rows of text or an array of text, found"):
        read_metadata(path)
    path.write_bytes(content)
    assert read_metadata(path) == [["a", "b"]]
