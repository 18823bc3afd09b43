"""``leapformer translate``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leapformer.cli import policy_options
from leapformer.cli.late import needs
from leapformer.cli.options import RunFolder, Threads, use_threads
from leapformer.errors import LeapformerError
from leapformer.files.showing import cut
from leapformer.tasks.simulst.streaming.policy_registry import DEFAULT, parse_policy

if TYPE_CHECKING:
    from leapformer.tasks.simulst.streaming.translator import StreamingTranslator
    from leapformer.tasks.simulst.text.words import Word

STDIN = "-"

Pieces = Iterator[Any]


@policy_options.takes_policies(several=False)
@needs(
    "speech",
    "leapformer.tasks.simulst.streaming.translator",
    "leapformer.tasks.simulst.streaming.sources",
    "leapformer.training.run",
)
def translate(
    folder: RunFolder,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Audio (wav, flac, ogg, mp3), or text where the run's source is text.")
    ],
    policy: Annotated[str, typer.Option(metavar="NAME", help=f"{policy_options.names()}.")] = DEFAULT,
    continuous: Annotated[
        bool, typer.Option("--continuous", help="Begin another sentence where one ends before the audio does.")
    ] = False,
    realtime: Annotated[bool, typer.Option("--realtime", help="Read the audio no faster than it is heard.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for every word, and a last one.")] = False,
    threads: Threads = None,
    **options: Any,
) -> None:
    """
    Translate while reading: words appear as the audio is read. FILE - takes lines of text from the standard input.
    """
    from leapformer.tasks.simulst.audio.reading import SAMPLE_RATE
    from leapformer.tasks.simulst.processor import open_translation
    from leapformer.tasks.simulst.streaming.sources import STATE_MS
    from leapformer.tasks.simulst.streaming.translator import StreamingTranslator
    from leapformer.training.run import Run

    use_threads(threads)
    chosen = parse_policy(policy, policy_options.given(options))
    run = Run(folder)
    run.recipe()
    model, processor = open_translation(run.model_path)
    show = show_event if as_json else show_word

    def translator() -> StreamingTranslator:
        return StreamingTranslator(model, processor, chosen, continuous=continuous)

    if processor.source == "text":
        if realtime:
            raise LeapformerError("--realtime: expected a run that translates speech, found one of text")
        translate_lines(translator, read_lines(file), show, as_json=as_json)
        return
    if file == STDIN:
        raise LeapformerError(
            "FILE: expected an audio file, found - (which reads text, and this run translates speech)"
        )
    pieces = audio_pieces(file, round(model.config.pre_decision * STATE_MS * SAMPLE_RATE / 1000))
    report = Report()
    try:
        translate_audio(translator, pieces, show, report, realtime=realtime)
    finally:
        if report.words or report.done:
            end_of_line(as_json)
    tell(report.summary(), report.line(), as_json=as_json)


# ---- speech


def audio_pieces(file: str, size: int) -> Pieces:
    """The samples of a file in pieces of a chunk, in memory that does not depend on its length."""
    from leapformer.tasks.simulst.audio.reading import read_blocks

    for block in read_blocks(file):
        for start in range(0, len(block), size):
            yield block[start : start + size]


@dataclass
class Report:
    """What a translation took.

    Attributes:
        audio_ms: of the audio. computed: seconds of computation. clock: ms from the begin of the audio, as if it had
            come in live: no piece is translated before it was heard, or before the one ahead of it is done.
        state_bytes: largest size of the state. words: how many were written.
        first: of the first word, its `read_ms` and the clock; None without words.
        ended_at: `read_ms` where the sentence ended before the audio did. done: whether the audio was read to its end.
    """

    audio_ms: float = 0.0
    computed: float = 0.0
    clock: float = 0.0
    state_bytes: int = 0
    words: int = 0
    first: tuple[float, float] | None = None
    ended_at: float | None = None
    done: bool = False

    def summary(self) -> dict[str, Any]:
        """For a machine."""
        return {
            "audio_seconds": self.audio_ms / 1000,
            "words": self.words,
            "real_time_factor": 1000 * self.computed / self.audio_ms if self.audio_ms else None,
            "state_bytes": self.state_bytes,
            "first_word_ms": None if self.first is None else self.first[0],
            "first_word_elapsed_ms": None if self.first is None else self.first[1],
            "ended_at_ms": self.ended_at,
        }

    def line(self) -> str:
        """For a person."""
        found = self.summary()
        factor = found["real_time_factor"]
        parts = [
            f"{self.audio_ms / 1000:.2f} s of audio",
            "no real-time factor" if factor is None else f"real-time factor {factor:.3f}",
            f"state {self.state_bytes:,} bytes",
        ]
        if self.first is None:
            parts.append("no word")
        else:
            parts.append("first word after {:.0f} ms, with computation {:.0f} ms".format(*self.first))
        if self.ended_at is not None:
            parts.append(f"the sentence ended at {self.ended_at / 1000:.2f} s (--continuous goes on)")
        return "; ".join(parts)


def translate_audio(
    begin: Callable[[], StreamingTranslator],
    pieces: Pieces,
    show: Callable[[Word, float], None],
    report: Report,
    *,
    realtime: bool,
) -> None:
    """Translate one stream of audio.

    Arguments:
        begin: makes the translator.
        pieces: samples at 16 kHz.
        show: is given every word and the clock in ms, see `Report`.
        report: is filled in.
        realtime: wait until each piece would have been heard.
    """
    from leapformer.tasks.simulst.audio.reading import SAMPLE_RATE

    started = time.monotonic()

    def run(work: Callable[[], list[Word]]) -> None:
        before = time.perf_counter()
        words = work()
        seconds = time.perf_counter() - before
        report.computed += seconds
        report.audio_ms = translator.read_ms
        report.clock = max(report.clock, report.audio_ms) + 1000 * seconds
        report.state_bytes = max(report.state_bytes, translator.nbytes)
        for word in words:
            report.words += 1
            report.first = report.first or (word.read_ms, report.clock)
            show(word, report.clock)

    with begin() as translator:
        for piece in pieces:
            if realtime:
                heard = started + (translator.read_ms / 1000 + len(piece) / SAMPLE_RATE)
                time.sleep(max(0.0, heard - time.monotonic()))
            run(lambda piece=piece: translator.push(piece))
            if translator.finished and report.ended_at is None:
                report.ended_at = translator.read_ms
        run(translator.finish)
    if report.ended_at is not None and report.ended_at >= report.audio_ms:
        report.ended_at = None
    report.done = True


# ---- text


def read_lines(file: str) -> Iterator[str]:
    """The lines of a UTF-8 file, or of the standard input as they come. Raises LeapformerError where it is none."""
    if file == STDIN:
        yield from _decoded(sys.stdin.buffer, "standard input")
        return
    try:
        with open(file, "rb") as lines:
            yield from _decoded(lines, file)
    except OSError as error:
        raise LeapformerError(f"{cut(file, 240)}: expected a file of text, found {error.strerror or error}") from None


def _decoded(lines: Any, where: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at column {error.start}"
            raise LeapformerError(f"{where}:{number}: expected text in UTF-8, found {found}") from None


@dataclass
class TextReport:
    """What the lines of a text took; attributes as `Report`."""

    lines: int = 0
    source_words: int = 0
    words: int = 0
    computed: float = 0.0
    state_bytes: int = 0
    first: list[float] = field(default_factory=list)  # source words before the first word, for each line that has one

    def summary(self) -> dict[str, Any]:
        return {
            "lines": self.lines,
            "source_words": self.source_words,
            "words": self.words,
            "seconds": self.computed,
            "state_bytes": self.state_bytes,
            "first_word_words": sum(self.first) / len(self.first) if self.first else None,
        }

    def line(self) -> str:
        rate = self.source_words / self.computed if self.computed else 0.0
        first = f"first word after {sum(self.first) / len(self.first):.1f} words" if self.first else "no word"
        read = f"{self.lines} lines of {self.source_words:,} words"
        return f"{read}; {rate:.1f} words/s; state {self.state_bytes:,} bytes; {first}"


def translate_lines(
    begin: Callable[[], StreamingTranslator], lines: Iterator[str], show: Callable[..., None], *, as_json: bool
) -> None:
    """Translate each line as a sentence of its own, word by word, and tell what it took."""
    report = TextReport()
    for number, line in enumerate(lines, start=1):
        report.lines = number
        with begin() as translator:
            first = True
            for word in [*line.split(), None]:
                before = time.perf_counter()
                new = translator.finish() if word is None else translator.push(word)
                report.computed += time.perf_counter() - before
                report.state_bytes = max(report.state_bytes, translator.nbytes)
                for written in new:
                    if first:
                        report.first.append(written.read_ms)
                    first = False
                    report.words += 1
                    show(written, None, line=number)
            report.source_words += int(translator.read_ms)
        end_of_line(as_json)
    tell(report.summary(), report.line(), as_json=as_json)


# ---- output


def show_word(word: Word, clock: float | None, *, line: int | None = None) -> None:
    """The word, at once."""
    sys.stdout.write(f"{' ' if word.index else ''}{word.text}")
    sys.stdout.flush()


def show_event(word: Word, clock: float | None, *, line: int | None = None) -> None:
    """The word as a line of JSON, at once."""
    event: dict[str, Any] = {"word": word.text, "index": word.index, "chunk": word.chunk}
    if clock is None:
        event |= {"read_words": word.read_ms, "line": line}
    else:
        event |= {"read_ms": word.read_ms, "elapsed_ms": round(clock, 3)}
    sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def end_of_line(as_json: bool) -> None:
    """The line of words is over."""
    if not as_json:
        sys.stdout.write("\n")
        sys.stdout.flush()


def tell(summary: dict[str, Any], line: str, *, as_json: bool) -> None:
    """How it went: the last line of JSON, and a line on the error output."""
    if as_json:
        typer.echo(json.dumps({"summary": summary}))
    typer.echo(line, err=True)
