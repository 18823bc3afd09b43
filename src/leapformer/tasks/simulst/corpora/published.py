"""Readers of the corpora of speech translation, in the layouts in which they are published.

MuST-C (Di Gangi et al. 2019), CoVoST 2 (Wang, Wu, Pino 2020, arXiv 2007.10310), Europarl-ST (Iranzo-Sanchez et al.
2020, arXiv 1911.03167), and manifests of fairseq S2T (Wang et al. 2020, arXiv 2010.05171), to which many others are
brought.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError
from leapformer.files.reading import parse_yaml
from leapformer.files.showing import cut, shown
from leapformer.tasks.files import decode_line, list_files, read_raw_lines
from leapformer.tasks.simulst.audio.reading import audio_info
from leapformer.tasks.simulst.corpora.clips import Clip, inside
from leapformer.tasks.simulst.corpora.prepared import Utterance
from leapformer.tasks.simulst.corpora.source import (
    Source,
    Splits,
    aligned_lines,
    aligned_utterance,
    first_folder,
    number_of,
    read_table,
    split_name,
    utterance,
)

# Of a file of MuST-C: the largest published one has about 250,000 segments of 4 to 5 keys, 11 values each.
_MOST_VALUES = 20_000_000
_AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3")


# ---- MuST-C


def read_mustc(source: Source) -> Splits:
    """PAIR/data/SPLIT/{wav/*.wav, txt/SPLIT.yaml, txt/SPLIT.SRC, txt/SPLIT.TGT}, or the folder PAIR itself."""
    folder = first_folder([source.folder / source.pair / "data", source.folder / "data"], source, "MuST-C")
    return {
        split_name(split.name): list(_mustc_split(split, source))
        for split in list_files(folder, "*")
        if (split / "txt").is_dir()
    }


def _mustc_split(folder: Path, source: Source) -> Iterator[Utterance]:
    index = folder / "txt" / f"{folder.name}.yaml"
    segments = _read_yaml_list(index)
    texts, translations = (
        aligned_lines(index.with_suffix(f".{language}"), len(segments), index)
        for language in (source.source, source.target)
    )
    numbers = _numbers_within_talks(segments)
    for place, segment in enumerate(segments):
        where = f"{index}:{place + 1}"
        with source.bad.guard():
            if not isinstance(segment, dict) or not {"wav", "offset", "duration"} <= segment.keys():
                raise LeapformerError(f"data: {where}: expected wav, offset and duration, found {shown(segment)}")
            wav = _plain(segment["wav"], "wav", where)
            clip = Clip(
                inside(folder / "wav", wav, where),
                f"{where}: {cut(wav)}",
                offset=number_of(segment["offset"], "offset", where),
                duration=number_of(segment["duration"], "duration", where),
            )
            id, speaker = (
                f"{Path(wav).stem}_{numbers[place]}",
                _plain(segment.get("speaker_id", ""), "speaker_id", where),
            )
            yield aligned_utterance(id, texts[place], translations[place], clip, speaker=speaker)


def _plain(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str | int | float):
        raise LeapformerError(f"data: {where}: {what}: expected a name, found {shown(value)}")
    return str(value)


def _numbers_within_talks(segments: Sequence[Any]) -> list[int]:
    """The place of each segment among those of its talk by the time, which is a part of its name."""
    talks: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for place, segment in enumerate(segments):
        wav, offset = (segment.get(key) for key in ("wav", "offset")) if isinstance(segment, dict) else (None, None)
        talks[str(wav)].append((_time(offset), place))
    numbers = [0] * len(segments)
    for talk in talks.values():
        for number, (_, place) in enumerate(sorted(talk)):
            numbers[place] = number
    return numbers


def _time(offset: Any) -> float:
    try:
        return float(offset) if isinstance(offset, int | float) else math.inf
    except OverflowError:  # an integer beyond all floats
        return math.inf


def _read_yaml_list(path: Path) -> list[Any]:
    text = "\n".join(decode_line(line, f"{path}:{row}") for row, line in enumerate(read_raw_lines(path), start=1))
    content = parse_yaml(text, where=f"data: {path}", most_nodes=_MOST_VALUES, with_rows=True)
    if not isinstance(content, list):
        raise LeapformerError(f"data: {path}: expected a list of segments, found {type(content).__name__}")
    return content


# ---- CoVoST 2


def read_covost(source: Source) -> Splits:
    """Common Voice's validated.tsv and clips/, with covost_v2.SRC_TGT.tsv, or with that file split beforehand.

    They lie in the folder, or in a folder SRC in it.
    """
    folders = [folder for folder in (source.folder, source.folder / source.source) if folder.is_dir()]
    name = f"covost_v2.{source.source}_{source.target}"
    whole = _first_file(folders, f"{name}.tsv")
    parts = {split: _first_file(folders, f"{name}.{split}.tsv") for split in ("train", "dev", "test")}
    if whole is None and not any(parts.values()):
        raise LeapformerError(f"--from {source.folder}: expected {name}.tsv or {name}.train.tsv, found neither")
    if whole is not None:
        rows = [
            (row["split"], row, where) for row, where in read_table(whole, ("path", "translation", "split"), source.bad)
        ]
    else:
        files = [(split, file) for split, file in parts.items() if file is not None]
        rows = [(split, *row) for split, file in files for row in read_table(file, ("path", "translation"), source.bad)]
    sentences = _common_voice(folders, {row["path"] for _, row, _ in rows if "sentence" not in row}, source)
    clips = first_folder([folder / "clips" for folder in folders], replace(source, folder=folders[0]), "Common Voice")
    splits: Splits = {}
    for split, row, where in rows:
        if split not in ("train", "train_covost", "dev", "test"):
            source.left_out[f"split {split or 'not given'}"] += 1
            continue
        if "sentence" not in row:
            if row["path"] not in sentences:
                source.left_out["not in validated.tsv"] += 1
                continue
            row = {**row, **sentences[row["path"]]}
        with source.bad.guard():
            clip = Clip(inside(clips, row["path"], where), f"{where}: {cut(row['path'])}")
            id, speaker = Path(row["path"]).stem, row.get("client_id", "")
            one = utterance(id, row["sentence"], row["translation"], clip, speaker=speaker, where=where)
            splits.setdefault(split_name(split.removesuffix("_covost")), []).append(one)
    return splits


def _common_voice(folders: Sequence[Path], paths: set[str], source: Source) -> dict[str, dict[str, str]]:
    """What validated.tsv says of these clips: sentence and client_id."""
    if not paths:
        return {}
    file = _first_file(folders, "validated.tsv")
    if file is None:
        raise LeapformerError(f"--from {source.folder}: expected Common Voice's validated.tsv, found none")
    return {
        row["path"]: {"sentence": row["sentence"], "client_id": row["client_id"]}
        for row, _ in read_table(file, ("client_id", "path", "sentence"), source.bad)
        if row["path"] in paths
    }


def _first_file(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


# ---- Europarl-ST


def read_europarl(source: Source) -> Splits:
    """SRC/audios/ID.wav (converted from .m4a), SRC/TGT/SPLIT/{segments.lst, segments.SRC, segments.TGT,
    speakers.lst}.
    """
    spoken = source.folder / source.source
    folder = first_folder([spoken / source.target], source, "Europarl-ST")
    splits = {}
    for name in ("train", "dev", "test"):
        if (folder / name).is_dir():
            splits[split_name(name)] = list(_europarl_split((folder / name), spoken, source))
    return splits


def _europarl_split(folder: Path, spoken: Path, source: Source) -> Iterator[Utterance]:
    index = folder / "segments.lst"
    segments = read_raw_lines(index)
    texts, translations = (
        aligned_lines(folder / f"segments.{language}", len(segments), index)
        for language in (source.source, source.target)
    )
    speaker_of = _europarl_speakers(folder, len(segments))
    for place, segment in enumerate(segments):
        where = f"{index}:{place + 1}"
        with source.bad.guard():
            fields = decode_line(segment, where).split()
            if len(fields) != 3:
                raise LeapformerError(f"data: {where}: expected audio, start and end, found {len(fields)} fields")
            audio, start, end = fields[0], number_of(fields[1], "start", where), number_of(fields[2], "end", where)
            file = _audio_file(inside(spoken / "audios", audio, where), where)
            clip = Clip(file, f"{where}: {file.name}", offset=start, duration=end - start)
            id, speaker = f"{audio}_{place}", speaker_of(place, audio)
            yield aligned_utterance(id, texts[place], translations[place], clip, speaker=speaker)


def _europarl_speakers(folder: Path, segments: int) -> Callable[[int, str], str]:
    """Who speaks in a segment: speakers.lst has a line for each one of speeches.lst, or for each segment."""
    file, speeches_file = folder / "speakers.lst", folder / "speeches.lst"
    if not file.is_file():
        return lambda _, audio: ""
    if speeches_file.is_file():
        speeches = read_raw_lines(speeches_file)
        speakers = _names(aligned_lines(file, len(speeches), speeches_file))
        of_speech = dict(zip(_names((line, str(speeches_file)) for line in speeches), speakers, strict=True))
        return lambda _, audio: of_speech.get(audio, "")
    of_segment = _names(aligned_lines(file, segments, folder / "segments.lst"))
    return lambda place, _: of_segment[place]


def _names(lines: Iterable[tuple[bytes, str]]) -> list[str]:
    return [decode_line(line, where).strip() for line, where in lines]


def _audio_file(stem: Path, where: str) -> Path:
    """The file of a recording, whatever its format. The suffix is put behind the name, which may have points in it."""
    for suffix in _AUDIO:
        if os.path.isfile(file := stem.with_name(stem.name + suffix)):  # of a name of any length
            return file
    found = (
        f"{stem.name}.m4a, which has to be converted to wav"
        if os.path.isfile(stem.with_name(f"{stem.name}.m4a"))
        else "none"
    )
    raise LeapformerError(f"data: {where}: expected {cut(stem.name)}.wav in {cut(stem.parent, 160)}, found {found}")


# ---- fairseq S2T


def read_manifests(source: Source) -> Splits:
    """SPLIT.tsv or SPLIT_st.tsv: id, audio, tgt_text, and perhaps n_frames, speaker, src_text, src_lang, tgt_lang.

    Audio is a path within the folder, FILE.zip:FIRST_BYTE:BYTES, or FILE:FIRST_SAMPLE:SAMPLES. SPLIT_asr.tsv, and files
    and rows of other languages, are passed over.
    """
    splits: Splits = {}
    files: dict[str, Path] = {}
    for file in list_files(source.folder, "*.tsv"):
        split = _manifest_split(file, source)
        if split is None:
            continue
        if split in files:
            raise LeapformerError(
                f"--from {source.folder}: expected one manifest for {split}, found {files[split].name} and {file.name}"
            )
        files[split] = file
        splits[split] = list(_manifest_rows(file, source))
    if not files:
        raise LeapformerError(f"--from {source.folder}: expected train.tsv or train_st.tsv, found no manifest")
    return splits


def _manifest_split(file: Path, source: Source) -> str | None:
    """The split of a manifest, by its name; None: it is of something else."""
    first, *tags = file.stem.split("_")
    languages = [tag for tag in tags if tag != "st" and re.fullmatch(r"[a-z]{2}(-[A-Za-z]{2,4})?", tag)]
    ours = not languages or languages in ([source.source, source.target], [source.pair])
    if "asr" in tags or not ours or not re.match(r"train|dev|valid|test|tst", first):
        return None
    return split_name(first)


def _manifest_rows(file: Path, source: Source) -> Iterator[Utterance]:
    for row, where in read_table(file, ("id", "audio", "tgt_text"), source.bad):
        languages = (row.get("src_lang") or source.source, row.get("tgt_lang") or source.target)
        if languages != (source.source, source.target):
            source.left_out["other languages"] += 1
            continue
        with source.bad.guard():
            clip = _manifest_clip(row["audio"], file.parent, where)
            text, speaker = row.get("src_text", ""), row.get("speaker", "")
            yield utterance(row["id"], text, row["tgt_text"], clip, speaker=speaker, where=where)


def _manifest_clip(audio: str, folder: Path, where: str) -> Clip:
    parts = re.fullmatch(r"(.+):([0-9]{1,18}):([0-9]{1,18})", audio)
    if parts is None:
        return Clip(inside(folder, audio, where), f"{where}: {cut(audio)}")
    file, first, length = inside(folder, parts[1], where), int(parts[2]), int(parts[3])
    if file.suffix != ".zip":
        rate = audio_info(file, name=f"data: {where}: {cut(parts[1])}").sample_rate
        return Clip(file, f"{where}: {cut(audio)}", offset=first / rate, duration=length / rate)
    return Clip(file, f"{where}: {cut(audio)}", span=(first, length))
