"""Damaged and hostile files through every reader of `leapformer.files` and `leapformer.tasks`.

A case takes what one reader reads, whole and small, damages one file of it, and reads. It ends in the content of the
original, in another content, or in one line. Where the format promises that a file is whole (`Reader.whole`), one that
is cut off is never read as something else; what a cache keeps (`Reader.cached`) is never anything but the original.
"""

from __future__ import annotations

import bz2
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import lzma
import pickle
import random
import shutil
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from leapformer.errors import LeapformerError
from tests.fuzz.harness import Wrong

SECONDS = 60
CASES = {"short": 200, "full": 10_000}
LONGEST_MESSAGE = 600

TEXT = "One sentence, and another.\nZwei Sätze in einer Zeile. Noch einer.\n\n = Title = \n\nwords words words\n" * 5


@dataclasses.dataclass(frozen=True)
class Reader:
    """Files, and what reads them.

    Arguments:
        make: writes the files into a folder.
        read: what the folder holds, as values that `digest` takes.
        whole: ends of names of files that say themselves how long they are.
        cached: ends of names of files that are made again where they are damaged.
        only: ends of names of the files to damage; default: all.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    whole: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    only: tuple[str, ...] = ("",)


def case(seed: int, number: int, folder: Path) -> str:
    """One damaged file and what came of it."""
    names = sorted(readers())
    rng = random.Random(f"readers {seed} {number}")
    name = names[number % len(names)]
    reader = readers()[name]
    files, original = _original(name)
    target = rng.choice([each for each in sorted(files) if each.endswith(reader.only)])
    how, content = damage(files[target], rng, [files[each] for each in sorted(files)])
    for each, whole in files.items():
        place = folder / each
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content if each == target else whole)
    where = f"{name}, {target}, {how}"
    try:
        found = digest(_quiet(reader.read, folder))
    except LeapformerError as error:
        message = str(error)
        if "\n" in message or len(message) > LONGEST_MESSAGE:
            raise Wrong(f"{where}: a message of {len(message):,} characters: {message[:200]!r}") from None
        if target.endswith(reader.cached or ("nothing",)):
            raise Wrong(f"{where}: a cache was not made again: {message}") from None
        return "refused in one line"
    except Exception as error:
        error.add_note(where)
        raise type(error)(f"{where}: {error}").with_traceback(error.__traceback__) from None
    if found == original:
        return "the same as the original"
    if target.endswith(reader.cached or ("nothing",)):
        raise Wrong(f"{where}: a damaged cache was taken")
    if how.startswith("cut") and target.endswith(reader.whole or ("nothing",)):
        raise Wrong(f"{where}: what is cut off was read as something else")
    return "read"


def _quiet(read: Callable[[Path], Any], folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read(folder)


@functools.cache
def _original(name: str) -> tuple[dict[str, bytes], str]:
    """The files of a reader, and the digest of what they hold."""
    with tempfile.TemporaryDirectory(prefix="leapformer-fuzz-") as temporary:
        folder = Path(temporary) / "case"
        folder.mkdir()
        readers()[name].make(folder)
        first = digest(_quiet(readers()[name].read, folder))
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.relative_to(folder).parts[0] == "out"
        }
    return files, first


def digest(value: Any) -> str:
    """A short name of lists, dictionaries, arrays and plain values."""
    found = hashlib.sha256()

    def add(each: Any) -> None:
        if isinstance(each, dict):
            for key in each:
                add(key)
                add(each[key])
        elif isinstance(each, list | tuple):
            found.update(f"[{len(each)}".encode())
            for inner in each:
                add(inner)
        elif isinstance(each, np.ndarray):
            found.update(f"{each.dtype}{each.shape}".encode() + each.tobytes())
        else:
            found.update(repr(each).encode("utf-8", "surrogatepass"))

    add(value)
    return found.hexdigest()


# ---- damage


def damage(content: bytes, rng: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """How a file was damaged, in words, and its bytes."""
    how = rng.choice(_WAYS)
    return how.__name__.strip("_").replace("_", " "), how(content, rng, others)


def _place(content: bytes, rng: random.Random) -> int:
    """Anywhere, and at the beginning more often, where the headers are."""
    return rng.randrange(min(len(content), 120) if rng.random() < 0.4 else len(content)) if content else 0


def _cut_off(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return content[: rng.randrange(len(content))] if content else b""


def _cut_a_little(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return content[: -rng.randint(1, 16)]


def _flip_bits(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        if changed:
            changed[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _insert(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    place = _place(content, rng)
    return content[:place] + rng.randbytes(rng.choice([1, 1, 2, 7, 300])) + content[place:]


def _delete(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    place = _place(content, rng)
    return content[:place] + content[place + rng.choice([1, 1, 2, 7, 300]) :]


def _duplicate(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    first, second = sorted((_place(content, rng), _place(content, rng)))
    return content[:second] + content[first:second] * rng.choice([1, 1, 2, 50]) + content[second:]


def _splice(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    return content[: _place(content, rng)] + other[_place(other, rng) :]


def _zero(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    place, size = _place(content, rng), rng.choice([1, 4, 16, 512])
    return content[:place] + bytes(min(size, len(content) - place)) + content[place + size :]


def _set_a_number(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A number of a header, as bytes."""
    place, size = _place(content, rng), rng.choice([1, 2, 3, 4, 8])
    most = 256**size - 1
    value = rng.choice([0, 1, most, most // 2, most // 2 + 1, most - 1, 10**6 & most, 10**12 & most])
    return content[:place] + value.to_bytes(size, rng.choice(["little", "big"])) + content[place + size :]


_STRANGE = [
    "0",
    "-1",
    "1e999",
    "NaN",
    "null",
    '""',
    "[]",
    "{}",
    "true",
    "1" + "0" * 30,
    "9" * 5000,
    "-0.5",
    "1e400",
    "0x10",
    "2020-99-99",
    "1:30",
    "..",
    "../../../etc/passwd",
    "a" * 5000,
    "\0",
    "\ud7ff\u2028",
    "[" * 3000,
    '{"a":' * 500,
    "&a [*a]",
    "!!python/object/apply:os.system [true]",
    "*a",
    "\t",
    "\n",
    '"',
]


def _set_a_value(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """A word or a number of a text."""
    text = content.decode("latin-1")
    place = _place(content, rng)
    begin, end = place, place
    while begin > 0 and text[begin - 1].isalnum():
        begin -= 1
    while end < len(text) and text[end].isalnum():
        end += 1
    return content[:begin] + rng.choice(_STRANGE).encode() + content[end:]


def _empty(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return b""


def _of_another_kind(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    made = [
        *others,
        b"words",
        b"\x7fELF" + bytes(60),
        gzip.compress(content),
        bz2.compress(content),
        rng.randbytes(2000),
        b"{}",
    ]
    return rng.choice(made)


def _with_something_behind(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    return content + rng.choice(
        [rng.randbytes(rng.choice([1, 16, 700])), bytes(rng.choice([1, 4, 512])), b"\n", content]
    )


_WAYS = [
    _cut_off,
    _cut_off,
    _cut_a_little,
    _flip_bits,
    _flip_bits,
    _flip_bits,
    _insert,
    _delete,
    _duplicate,
    _splice,
    _zero,
    _set_a_number,
    _set_a_number,
    _set_a_value,
    _set_a_value,
    _empty,
    _of_another_kind,
    _with_something_behind,
]


# ---- readers


@functools.cache
def readers() -> dict[str, Reader]:
    """All of them, by name."""
    return {**_of_text(), **_of_language(), **_of_arena(), **_of_speech(), **_of_audio()}


def _compressions() -> dict[str, Callable[[bytes], bytes]]:
    import zstandard

    return {
        "": bytes,
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _of_text() -> dict[str, Reader]:
    from leapformer.files.checksums import check_sums, write_sums
    from leapformer.files.reading import read_json, read_yaml
    from leapformer.tasks.files import read_json_rows, read_text

    rows = "".join(
        json.dumps({"text": f"row {number} ü", "label": number % 2, "x": [1.5, None]}) + "\n" for number in range(30)
    )
    value = json.dumps({"a": [1, 2.5, "text", None, True], "b": {"c": {"d": [[]]}}, "n": 10**20}, indent=1)
    yaml = "name: x\nlist: [1, 2.5, yes]\nmap: &m {a: 1}\nagain: *m\ntext: |\n  lines\n  of text\ndate: 2020-01-01\n"
    found = {
        "json": Reader(lambda f: _write(f / "a.json", value), lambda f: read_json(f / "a.json")),
        "yaml": Reader(lambda f: _write(f / "a.yaml", yaml), lambda f: read_yaml(f / "a.yaml")),
    }

    def make_sums(folder: Path) -> None:
        _write(folder / "a.bin", bytes(range(200)))
        _write(folder / "sub" / "b.txt", TEXT)
        write_sums(folder)

    def read_sums(folder: Path) -> Any:
        check_sums(folder)
        return [(folder / "a.bin").read_bytes(), (folder / "sub" / "b.txt").read_bytes()]

    found["checksums"] = Reader(make_sums, read_sums, cached=(), whole=(".bin", ".txt"))
    for suffix, compress in _compressions().items():
        whole = (suffix,) if suffix else ()
        found[f"text{suffix}"] = Reader(
            lambda f, s=suffix, c=compress: _write(f / f"a.txt{s}", c(TEXT.encode())),
            lambda f, s=suffix: read_text(f / f"a.txt{s}"),
            whole=whole,
        )
        found[f"rows{suffix}"] = Reader(
            lambda f, s=suffix, c=compress: _write(f / f"a.jsonl{s}", c(rows.encode())),
            lambda f, s=suffix: [row for row, _ in read_json_rows(f / f"a.jsonl{s}")],
            whole=whole,
        )
    return found


def _of_language() -> dict[str, Reader]:
    from leapformer.tasks.lm.corpora import load_corpus
    from leapformer.tasks.lm.packing import encode_split
    from leapformer.tasks.lm.task import TokenizerSection, cached_tokenizer
    from leapformer.tasks.lm.tokenizers import build_tokenizer

    def make_texts(folder: Path) -> None:
        _write(folder / "a.txt", TEXT)
        _write(folder / "valid.jsonl", '{"text": "held out"}\n' * 3)
        _write(folder / "more" / "b.txt.gz", gzip.compress(TEXT.encode()))

    def make_wikitext(folder: Path) -> None:
        for split in ("train", "valid", "test"):
            _write(folder / f"wiki.{split}.tokens", TEXT)

    def corpus(source: str) -> Callable[[Path], Any]:
        return lambda folder: dataclasses.astuple(load_corpus(source, path=folder))

    def read_tokens(folder: Path) -> Any:
        split = encode_split(TEXT.split("\n\n"), build_tokenizer("bytes"), cache_dir=folder / "cache")
        return [split.tokens, split.document_starts, split.words, split.bytes]

    def read_tokenizer(folder: Path) -> Any:
        tokenizer = cached_tokenizer(TokenizerSection(kind="word"), TEXT.split("\n"), cache=folder / "cache")
        return [tokenizer.encode(TEXT), tokenizer.eos_token_id]

    return {
        "texts": Reader(make_texts, corpus("text"), whole=(".gz",)),
        "wikitext": Reader(make_wikitext, corpus("wikitext")),
        "token cache": Reader(read_tokens, read_tokens, cached=("",)),
        "tokenizer cache": Reader(read_tokenizer, read_tokenizer, cached=("",)),
    }


# ---- Long-Range Arena


def _of_arena() -> dict[str, Reader]:
    found = {
        "listops": _arena("listops", _make_listops),
        "imdb": _arena("text", _make_imdb),
        "imdb rows": _arena("text", _make_imdb_rows, whole=(".xz",)),
        "retrieval": _arena("retrieval", _make_release),
        "retrieval pairs": _arena("retrieval", _make_pairs),
        "cifar": _arena("image", _make_cifar, whole=("_1", "_2", "_3", "_4", "_5", "test_batch")),
        "cifar binary": _arena("image", _make_cifar_binary),
        "pictures": _arena("image", _make_pictures, whole=(".png", ".jpg")),
        "zip of pictures": _arena("image", _make_zip, whole=(".zip",)),
        "pathfinder": _arena("pathfinder", lambda folder: _make_pathfinder(folder, as_array=False), whole=(".png",)),
        "pathfinder arrays": _arena(
            "pathfinder", lambda folder: _make_pathfinder(folder, as_array=True), whole=(".png", ".npy")
        ),
        "pickles": _arena("listops", _make_pickles, whole=(".pickle",)),
    }
    for task, make in (("listops", _make_listops), ("retrieval", _make_release), ("image", _make_cifar_binary)):
        found[f"prepared {task}"] = _prepared_arena(task, make)
    return found


def _arena(task: str, make: Callable[[Path], None], whole: tuple[str, ...] = ()) -> Reader:
    from leapformer.tasks.lra.preparation import prepare

    def read(folder: Path) -> Any:
        card = prepare(task, folder / "out", source=folder / "in", workers=1)
        return [card["splits"], card["bad_rows"]]

    return Reader(lambda folder: make(folder / "in"), read, whole=whole)


def _prepared_arena(task: str, make: Callable[[Path], None]) -> Reader:
    from leapformer.tasks.lra.dataset import load
    from leapformer.tasks.lra.preparation import prepare

    def make_data(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as source:
            make(Path(source) / "in")
            prepare(task, folder / "data", source=Path(source) / "in", workers=1)

    def read(folder: Path) -> Any:
        found: list[Any] = []
        for split in ("train", "validation", "test"):
            data = load(task, folder / "data", split)
            found += [data.vocab_size, data.num_classes, data.max_length, [data[number] for number in range(len(data))]]
        return found

    return Reader(make_data, read, whole=(".safetensors", ".json"))


def _make_listops(folder: Path) -> None:
    rows = ["( ( ( [MIN 3 ) 4 ) ] )\t3", "( ( ( [SM 3 ) 9 ) ] )\t2", "7\t7"] * 4
    for name in ("train", "val", "test"):
        _write(folder / f"basic_{name}.tsv", "\n".join(["Source\tTarget", *rows]) + "\n")


def _make_imdb(folder: Path) -> None:
    for split in ("train", "test"):
        for kind in ("pos", "neg"):
            for number in range(3):
                _write(folder / split / kind / f"{number}_7.txt", f"a {kind} review {number}")


def _make_imdb_rows(folder: Path) -> None:
    for split in ("train", "test"):
        rows = "".join(json.dumps({"label": number % 2, "text": f"review {number}"}) + "\n" for number in range(12))
        _write(folder / f"{split}.jsonl.xz", lzma.compress(rows.encode()))


def _make_release(folder: Path) -> None:
    for split in ("train", "eval", "test"):
        rows = [f"{number % 2}.0\t1\t2\tfirst text {number}\tsecond text" for number in range(6)]
        _write(folder / "tsv_data" / f"new_aan_pairs.{split}.tsv", "\n".join(rows) + "\n")


def _make_pairs(folder: Path) -> None:
    _write(folder / "papers.jsonl", "".join(json.dumps({"id": f"P{n}", "text": f"paper {n}"}) + "\n" for n in range(5)))
    for split in ("train", "dev", "test"):
        _write(folder / f"pairs.{split}.tsv", "1\tP0\tP1\n0\tP2\tP3\n1\tP4\tP0\n")


def _make_cifar(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        batch = {
            b"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8),
            b"labels": [1, 3],
            b"batch_label": name.encode(),
        }
        _write(folder / name, pickle.dumps(batch, protocol=2))


def _make_cifar_binary(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        _write(folder / f"{name}.bin", b"".join(bytes([n]) + rng.bytes(3072) for n in range(2)))


def _picture(number: int, kind: str) -> bytes:
    file = io.BytesIO()
    mode, shape = ("L", (32, 32)) if number % 2 else ("RGB", (32, 32, 3))
    Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8), mode).save(file, kind)
    return file.getvalue()


def _make_pictures(folder: Path) -> None:
    for split in ("train", "test"):
        for number in range(10):
            kind = "PNG" if number < 6 else "JPEG"
            _write(folder / split / f"class{number}" / f"1.{'png' if number < 6 else 'jpg'}", _picture(number, kind))


def _make_zip(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        with zipfile.ZipFile(folder / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(10):
                archive.writestr(f"class{number}/1.png", _picture(number, "PNG"))


def _make_pathfinder(folder: Path, *, as_array: bool) -> None:
    place = folder / "pathfinder32" / "curv_contour_length_14"
    for batch in range(2):
        rows = []
        for number in range(6):
            name = f"sample_{number}.png"
            _write(place / "imgs" / str(batch) / name, _picture(2 * number + 1, "PNG"))
            rows.append([f"imgs/{batch}", name, str(number), str(number % 2), "1.8", "6"])
        if as_array:
            file = io.BytesIO()
            np.save(file, np.array(rows))
            _write(place / "metadata" / f"{batch}.npy", file.getvalue())
        else:
            _write(place / "metadata" / f"{batch}.npy", "".join(" ".join(row) + "\n" for row in rows))


def _make_pickles(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for place, split in enumerate(("train", "dev", "test")):
        rows = []
        for number in range(4):
            ids = rng.integers(1, 16, 30)
            rows.append({"input_ids_0": ids.tolist() if number % 2 else ids.astype(np.int32), "label": number})
        _write(folder / f"lra-listops.{split}.pickle", pickle.dumps(rows, protocol=place + 2))


# ---- speech


def _of_speech() -> dict[str, Reader]:
    corpora = {
        "mustc": (_make_mustc, ()),
        "covost": (_make_covost, ()),
        "europarl": (_make_europarl, ()),
        "manifest": (_make_manifest, (".zip",)),
        "tuxpaint": (_make_tuxpaint, (".xz",)),
    }
    found = {name: _corpus(name, make, (".wav", ".flac", *whole)) for name, (make, whole) in corpora.items()}
    found["asterisk"] = _corpus("asterisk", lambda folder: _make_tuxpaint(folder, id="prompt_id"), (".wav", ".xz"))
    return {
        **found,
        "prepared speech": Reader(_make_prepared, _read_prepared, whole=(".int16", ".json", ".jsonl")),
        "feature cache": Reader(_make_features, _read_features, only=(".npy", ".sha256"), cached=("",)),
        "statistics": Reader(_make_statistics, _read_statistics, whole=(".safetensors",)),
        "vocabulary": Reader(_make_vocabulary, _read_vocabulary),
        "processor": Reader(_make_processor, _read_processor, whole=(".safetensors", ".json")),
        "instances": Reader(_make_instances, _read_instances),
    }


def _samples(seconds: float = 0.1, seed: int = 0, rate: int = 16_000) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9_000, 9_000, round(seconds * rate)).astype(np.int16)


def _audio(kind: str = "WAV", seed: int = 0, seconds: float = 0.1) -> bytes:
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, _samples(seconds, seed), 16_000, format=kind)
    return file.getvalue()


def _corpus(name: str, make: Callable[[Path], None], whole: tuple[str, ...]) -> Reader:
    from leapformer.tasks.preparation import BadRows
    from leapformer.tasks.simulst.corpora.clips import read_clip
    from leapformer.tasks.simulst.corpora.preparing import CORPORA
    from leapformer.tasks.simulst.corpora.source import Source

    def read(folder: Path) -> Any:
        source = Source(folder, "en", "de", 0, BadRows(False))
        splits = CORPORA[name].read(source)
        return [[split, [[each.row, read_clip(each.recipe)] for each in some]] for split, some in splits.items()]

    return Reader(make, read, whole=whole)


def _make_mustc(folder: Path) -> None:
    for split in ("train", "dev"):
        place = folder / "en-de" / "data" / split
        _write(place / "wav" / "ted_1.wav", _audio(seconds=0.3))
        rows = [f"- {{duration: 0.1, offset: {n / 10}, rW: 3, speaker_id: spk.1, wav: ted_1.wav}}" for n in range(3)]
        _write(place / "txt" / f"{split}.yaml", "\n".join(rows) + "\n")
        for language in ("en", "de"):
            _write(place / "txt" / f"{split}.{language}", "".join(f"line {n} {language}\n" for n in range(3)))


def _make_covost(folder: Path) -> None:
    names = [f"clip{n}.flac" for n in range(4)]
    for n, name in enumerate(names):
        _write(folder / "clips" / name, _audio("FLAC", n))
    rows = [f"{n % 2}\t{name}\tsentence {n}" for n, name in enumerate(names)]
    _write(folder / "validated.tsv", "\n".join(["client_id\tpath\tsentence", *rows]) + "\n")
    rows = [f"{name}\tSatz {n}\t{('train', 'dev', 'test')[n % 3]}" for n, name in enumerate(names)]
    _write(folder / "covost_v2.en_de.tsv", "\n".join(["path\ttranslation\tsplit", *rows]) + "\n")


def _make_europarl(folder: Path) -> None:
    _write(folder / "en" / "audios" / "a.1.wav", _audio(seconds=0.3))
    for split in ("train", "dev"):
        place = folder / "en" / "de" / split
        _write(place / "segments.lst", "a.1 0.0 0.1\na.1 0.1 0.25\n")
        _write(place / "segments.en", "one\ntwo\n")
        _write(place / "segments.de", "eins\nzwei\n")
        _write(place / "speeches.lst", "a.1\n")
        _write(place / "speakers.lst", "someone\n")


def _make_manifest(folder: Path) -> None:
    _write(folder / "a.wav", _audio())
    with zipfile.ZipFile(folder / "audio.zip", "w") as archive:
        archive.writestr("b.wav", _audio(seed=1))
        start = archive.getinfo("b.wav").header_offset + 30 + len("b.wav")
        size = archive.getinfo("b.wav").file_size
    rows = [f"a\ta.wav\teins", f"b\taudio.zip:{start}:{size}\tzwei", "c\ta.wav:100:800\tdrei"]  # noqa: F541
    _write(folder / "train.tsv", "\n".join(["id\taudio\ttgt_text", *rows]) + "\n")


def _make_tuxpaint(folder: Path, id: str = "stamp_id") -> None:
    names = [f"en/{n}.wav" for n in range(6)]
    rows = [f"en\t{name}\t{n}\t0.1\tw {n}\tSatz {n}" for n, name in enumerate(names)]
    _write(folder / "manifest.tsv", "\n".join([f"lang\tfile\t{id}\tseconds\ttranscript\tde", *rows]) + "\n")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as archive:
        for n, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(content := _audio(seed=n))
            archive.addfile(member, io.BytesIO(content))
    _write(folder / "en.tar.xz", packed.getvalue())


def _make_prepared(folder: Path) -> None:
    from leapformer.tasks.simulst.corpora.preparing import prepare_corpus

    with tempfile.TemporaryDirectory() as source:
        _make_manifest(Path(source))
        prepare_corpus("manifest", source, folder / "data", source_language="en", target_language="de", workers=1)


def _read_prepared(folder: Path) -> Any:
    from leapformer.tasks.simulst.corpora.prepared import SpokenSplit

    split = SpokenSplit(folder / "data", "train")
    return [[row["id"], row["text"], row["translation"], row["audio"]] for row in split[:]]


def _make_features(folder: Path) -> None:
    _make_prepared(folder)
    _read_features(folder)


def _read_features(folder: Path) -> Any:
    from leapformer.tasks.simulst.corpora.feature_cache import CachedFeatures
    from leapformer.tasks.simulst.corpora.prepared import SpokenSplit

    features = CachedFeatures(SpokenSplit(folder / "data", "train"), key="key", cache=folder / "cache")
    return [each.numpy() for each in features[:]]


def _make_statistics(folder: Path) -> None:
    import torch

    from leapformer.tasks.simulst.audio.features import FeatureStatistics

    FeatureStatistics(10, 2, torch.arange(80, dtype=torch.float64), torch.ones(80, dtype=torch.float64)).save(
        folder / "a.safetensors"
    )


def _read_statistics(folder: Path) -> Any:
    from leapformer.tasks.simulst.audio.features import FeatureStatistics

    found = FeatureStatistics.load(folder / "a.safetensors")
    return [found.count, found.utterances, found.mean.numpy(), found.variance.numpy()]


def _make_vocabulary(folder: Path) -> None:
    from leapformer.tasks.simulst.text.vocabulary import Vocabulary

    Vocabulary.train(TEXT.split("\n")[:3] * 3, 40).save(folder / "a.spm")


def _read_vocabulary(folder: Path) -> Any:
    from leapformer.tasks.simulst.text.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(folder / "a.spm")
    ids = vocabulary.encode("One sentence, und ein Satz ﬁ № ½.")
    return [len(vocabulary), ids, vocabulary.decode(ids), [vocabulary.starts_word(number) for number in ids]]


def _make_processor(folder: Path) -> None:
    from leapformer.tasks.simulst.processor import TranslationProcessor
    from leapformer.tasks.simulst.text.vocabulary import Vocabulary

    _make_statistics(folder)
    vocabulary = Vocabulary.train(TEXT.split("\n")[:3] * 3, 40)
    shutil.move(folder / "a.safetensors", folder / "statistics")
    from leapformer.tasks.simulst.audio.features import FeatureStatistics

    statistics = FeatureStatistics.load(folder / "statistics")
    (folder / "statistics").unlink()
    TranslationProcessor(vocabulary, statistics, vocabulary, "en", "de").save_pretrained(folder)


def _read_processor(folder: Path) -> Any:
    from leapformer.tasks.simulst.processor import TranslationProcessor

    found = TranslationProcessor.from_pretrained(folder)
    features = found.features(_samples().astype(np.float32) / 32768).numpy() if found.source == "speech" else None
    return [found.source, found.source_language, found.target_language, found.target_vocabulary.encode("One"), features]


def _make_instances(folder: Path) -> None:
    from leapformer.tasks.simulst.scoring.instances import Instance, write_instances

    some = [Instance(n, "zwei worte", [1.5, 2.5 + n], [], "ein satz", "a source", 3.5) for n in range(4)]
    write_instances(folder / "instances.log", some)


def _read_instances(folder: Path) -> Any:
    from leapformer.tasks.simulst.scoring.instances import read_instances, score

    found = read_instances(folder / "instances.log")
    score(found)
    return [each.as_row() for each in found]


# ---- audio


def _of_audio() -> dict[str, Reader]:
    """One for each kind of file that libsndfile writes with its usual codec, and for the codecs that can't seek."""
    import soundfile

    kinds = [
        (kind, soundfile.default_subtype(kind)) for kind in soundfile.available_formats() if kind not in ("RAW", "SD2")
    ]
    kinds += [
        ("WAV", "GSM610"),
        ("WAV", "IMA_ADPCM"),
        ("WAV", "MS_ADPCM"),
        ("WAV", "G721_32"),
        ("WAV", "FLOAT"),
        ("AU", "G721_32"),
        ("AU", "G723_24"),
        ("AIFF", "DWVW_16"),
        ("AIFF", "FLOAT"),
        ("CAF", "ALAC_16"),
        ("OGG", "OPUS"),
        ("W64", "GSM610"),
    ]
    return {f"audio {kind} {codec}": _audio_reader(kind, codec) for kind, codec in kinds}


def _audio_reader(kind: str, codec: str) -> Reader:
    from leapformer.tasks.simulst.audio.reading import read_audio

    suffix = ".mp3" if kind == "MP3" else f".{kind.lower()}"

    def make(folder: Path) -> None:
        import soundfile

        soundfile.write(folder / f"a{suffix}", _samples(0.5), 16_000, format=kind, subtype=codec)

    def read(folder: Path) -> Any:
        try:
            return read_audio(folder / f"a{suffix}")
        except LeapformerError as error:
            # Of kinds that are not read at all: then the original is refused too.
            if "expected audio whose file tells its length" in str(error):
                return "not read"
            raise

    return Reader(make, read, whole=("",))


readers()  # what it imports takes seconds, which no case is to be charged with
