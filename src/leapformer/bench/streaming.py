"""`leapformer bench streaming`: simultaneous translation of speech by the paper-sized model.

First one speaker: real-time factor and state by the length of the audio, for LeaPformer, for softmax, whose caches
grow, and for LeaPformer that encodes all the audio anew at every read. Then many speakers at once: how long words wait.

The audio is noise and the weights are fresh, which costs what real ones cost; a fresh model's end of sentence means
nothing, so wait-k writes as many tokens as there are chunks (2.8 a second, as speech has about 3).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from leapformer.analysis.plots import Line, lines_over_length
from leapformer.bench.benchmark import Bench, Benchmark
from leapformer.bench.profiles import Profile, profile_of, profile_tables
from leapformer.bench.result import Table, ratio_text, short
from leapformer.bench.rows import Raced, Spread, not_run_notes, rows_of, spread
from leapformer.bench.speakers import Push, Served, Server, chunk_samples, schedule, simulate, threads
from leapformer.bench.timing import Race, Sample
from leapformer.models import LeapformerForConditionalGeneration, LeapformerTranslationConfig
from leapformer.models.translation_configuration import PLACES
from leapformer.models.translation_stream import DecoderStream, EncoderStream
from leapformer.tasks.simulst.audio.features import FeatureStatistics, FilterbankStream, offline
from leapformer.tasks.simulst.audio.reading import SAMPLE_RATE

LEAP, SOFTMAX, ANEW = "LeaPformer", "softmax", "LeaPformer, encoding anew"
FORMS: dict[str, dict[str, Any]] = {LEAP: {}, SOFTMAX: dict.fromkeys(PLACES, "softmax"), ANEW: {"context": "full"}}
MODEL: dict[str, Any] = {}  # the paper's sizes are the defaults
K = 5  # chunks before the first token, as in the paper
SECONDS, QUICK_SECONDS = (5, 10, 20, 60, 300, 600), (5, 10)
WARM_CHUNKS = 6
TURNS = 3  # at least so many, whatever they take
STAGES = ("filterbank", "encoder", "decoder")
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
SPEAKERS, QUICK_SPEAKERS = (16, 32, 64, 128, 256), (4,)
SPEAKERS_SECONDS, QUICK_SPEAKERS_SECONDS = 60, 4
SPEAKERS_THREADS = 2
# Form and threads. One thread counts process CPU time, which holds on a busy machine; more count wall time.
SPEAKERS_RUNS = ((LEAP, SPEAKERS_THREADS), (SOFTMAX, SPEAKERS_THREADS), (LEAP, 1))
QUICK_SPEAKERS_RUNS = ((LEAP, 1),)


@dataclass(frozen=True)
class Tail:
    """Measured values: the smallest that so many per cent do not exceed, and the largest of all."""

    median: float
    p95: float
    p99: float
    longest: float
    n: int


@dataclass(frozen=True, kw_only=True)
class LengthRow(Raced):
    """One race over so many seconds of audio, and what a stream of each form was like.

    Attributes:
        real_time_factor: seconds of work for a second of audio.
        chunk_ms: of a push. stage_ms: its mean by stage.
        state_bytes: all that is kept after the last whole chunk. tokens: written in all.
    """

    seconds: int
    real_time_factor: dict[str, Spread]
    chunk_ms: dict[str, Tail]
    stage_ms: dict[str, dict[str, float]]
    state_bytes: dict[str, int]
    tokens: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class SpeakersRow:
    """So many speakers for so many seconds.

    Attributes:
        contender: one of FORMS.
        threads: of PyTorch. clock: which one counts.
        delay_ms: from the push that allows a word until it is there.
        busy: share of the time in which the processor worked.
        pushes_a_batch: the mean.
    """

    contender: str
    speakers: int
    seconds: int
    threads: int
    clock: str
    words: int
    delay_ms: Tail
    busy: float
    pushes_a_batch: float


@dataclass(frozen=True)
class Material:
    """What all streams are given: a model for each form, audio (float32 [N]), and statistics of its features."""

    models: Mapping[str, LeapformerForConditionalGeneration]
    audio: Tensor
    statistics: FeatureStatistics

    @property
    def chunk(self) -> int:
        """Samples of a chunk."""
        return chunk_samples(self.models[LEAP])

    def stream(self, name: str, samples: int) -> StreamRun:
        """One stream of a form over the first so many samples."""
        return stream(self.models[name], self.audio[:samples], self.statistics)


Known = dict[str, tuple[float, float]]  # seconds of audio and of work of each form, by which later ones are guessed


def measure_streaming(bench: Bench) -> None:
    """One race for each length of audio, where a chunk's time goes, then the speakers."""
    settings = bench.settings
    lengths = settings.lengths_or(SECONDS, QUICK_SECONDS)
    models = {name: fresh_translator(name) for name in FORMS}
    audio = noise(max(lengths))
    material = Material(models, audio, FeatureStatistics.of(offline(audio[: 10 * SAMPLE_RATE].numpy())))
    known = _warm_up(bench, material)
    for seconds in lengths:
        bench.result.add("lengths", _length_row(bench, material, seconds, known))
    if not settings.quick:
        for name in (LEAP, SOFTMAX):
            bench.say(f"profile of a chunk: {name}")
            bench.result.add("profiles", _chunk_profile(material, name))
    for name, count in QUICK_SPEAKERS_RUNS if settings.quick else SPEAKERS_RUNS:
        for speakers in QUICK_SPEAKERS if settings.quick else SPEAKERS:
            with threads(count):
                row = _speakers_row(bench, material, name, speakers, count)
            bench.result.add("speakers", row)
            if row.delay_ms.p95 > 1e3 * material.chunk / SAMPLE_RATE:
                break


def _warm_up(bench: Bench, material: Material) -> Known:
    known = {}
    for name in material.models:
        bench.say(f"streaming, warm-up: {name}")
        samples = min(WARM_CHUNKS * material.chunk, len(material.audio))
        material.stream(name, samples)
        known[name] = samples / SAMPLE_RATE, getattr(material.stream(name, samples).total, bench.clock)
    return known


def _chunk_profile(material: Material, name: str) -> Profile:
    live, first = LiveStream(material.models[name], material.statistics), material.audio[: material.chunk]
    for _ in range(K):
        live.push(first)
    return profile_of(lambda: live.push(first), step="chunk", contender=name)


# ---- one speaker


@dataclass
class StreamRun:
    """One stream from begin to end.

    Attributes:
        chunks: the time of every push and of the end (the last). stages: the same by stage.
        state_bytes: all that is kept after the last whole chunk. tokens: written in all.
    """

    chunks: list[Sample] = field(default_factory=list)
    stages: dict[str, list[Sample]] = field(default_factory=lambda: {name: [] for name in STAGES})
    state_bytes: int = 0
    tokens: int = 0

    @property
    def total(self) -> Sample:
        """Seconds of it all."""
        return Sample(*(sum(column) for column in zip(*self.chunks, strict=True)))


class LiveStream:
    """One speaker: filterbank, encoder and decoder, each of which is timed.

    One token is written after each chunk from the k-th on, and at the end as many as are missing to one a chunk.
    """

    def __init__(self, model: LeapformerForConditionalGeneration, statistics: FeatureStatistics) -> None:
        assert model.config.bos_token_id is not None
        self.statistics, self.run = statistics, StreamRun()
        self.filterbank = FilterbankStream(bins=model.config.num_features)
        self.encoder, self.decoder = EncoderStream.begin(model), DecoderStream.begin(model, k=K)
        self._token = torch.tensor([model.config.bos_token_id])
        self._pushes = 0

    def push(self, samples: Tensor) -> None:
        """A chunk [N] of audio, or less of it at the end."""
        marks = [_now()]
        frames = self.statistics.normalize(self.filterbank.push(samples.numpy()))
        marks.append(_now())
        states = self.encoder.push(frames[None])
        marks.append(_now())
        self.decoder.feed(states)
        self._pushes += 1
        self._write()
        self._note([*marks, _now()])

    def finish(self) -> None:
        """The end of the audio, and the tokens that waited for it."""
        marks = [_now()]
        rest = self.filterbank.finish()
        frames = self.statistics.normalize(rest) if len(rest) else rest
        marks.append(_now())
        states = [self.encoder.push(frames[None]), self.encoder.finish()]
        marks.append(_now())
        for new in states:
            self.decoder.feed(new)
        self.decoder.finish()
        self._write()
        self._note([*marks, _now()])

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return self.filterbank.nbytes + self.encoder.nbytes + self.decoder.nbytes

    def _write(self) -> None:
        while bool(self.decoder.can_write()) and int(self.decoder.written) < self._pushes:
            self._token = self.decoder.step(self._token).argmax(-1)
            self.run.tokens += 1

    def _note(self, marks: Sequence[Sample]) -> None:
        for name, before, after in zip(STAGES, marks, marks[1:], strict=False):
            self.run.stages[name].append(_between(before, after))
        self.run.chunks.append(_between(marks[0], marks[-1]))


def stream(model: LeapformerForConditionalGeneration, audio: Tensor, statistics: FeatureStatistics) -> StreamRun:
    """Push audio [N] chunk by chunk to its end."""
    live, chunk = LiveStream(model, statistics), chunk_samples(model)
    for start in range(0, len(audio), chunk):
        live.push(audio[start : start + chunk])
        if start + chunk <= len(audio):
            live.run.state_bytes = live.nbytes
    live.finish()
    return live.run


def _length_row(bench: Bench, material: Material, seconds: int, known: Known) -> LengthRow:
    """All forms take turns with so much audio. ``known`` is updated."""
    limit, runs, outcome = bench.settings.limit, {name: [] for name in material.models}, Race()
    for name in material.models:
        length, took = known[name]
        guess = took * (seconds / length) ** (2 if FORMS[name].get("context") == "full" else 1)
        if guess > limit:
            outcome.not_run[name] = f"about {guess:.3g} s, over the limit of {limit:g} s"
    turns, begin = 0, time.monotonic()
    while turns < bench.settings.repeats and (turns < TURNS or time.monotonic() - begin < 2 * limit):
        for name in material.models:
            if name not in outcome.not_run:
                bench.say(f"streaming, {seconds} s of audio, turn {turns + 1}: {name}")
                runs[name].append(material.stream(name, seconds * SAMPLE_RATE))
        turns += 1
    runs = {name: found for name, found in runs.items() if found}
    outcome.samples = {name: [run.total for run in found] for name, found in runs.items()}
    for name in runs:
        known[name] = (seconds, spread(outcome.seconds(name, bench.clock)).median)
    return LengthRow(
        seconds=seconds,
        contenders=outcome.times(),
        not_run=outcome.not_run,
        real_time_factor={name: spread([s / seconds for s in outcome.seconds(name, bench.clock)]) for name in runs},
        chunk_ms={name: _chunk_times(found, bench.clock) for name, found in runs.items()},
        stage_ms={name: _stage_times(found, bench.clock) for name, found in runs.items()},
        state_bytes={name: found[-1].state_bytes for name, found in runs.items()},
        tokens={name: found[-1].tokens for name, found in runs.items()},
    )


def _chunk_times(runs: Sequence[StreamRun], clock: str) -> Tail:
    """Of a push, not of the end."""
    return percentiles([1e3 * getattr(sample, clock) for run in runs for sample in run.chunks[:-1]])


def _stage_times(runs: Sequence[StreamRun], clock: str) -> dict[str, float]:
    """The mean of a push by stage."""
    stages = {name: [getattr(s, clock) for run in runs for s in run.stages[name][:-1]] for name in STAGES}
    return {name: 1e3 * sum(values) / len(values) for name, values in stages.items()}


def percentiles(values: Sequence[float]) -> Tail:
    """What a row keeps of many values."""
    ordered = sorted(values)
    marks = [ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95, 0.99)]
    return Tail(*marks, longest=ordered[-1], n=len(ordered))


def _now() -> Sample:
    return Sample(time.process_time(), time.perf_counter())


def _between(before: Sample, after: Sample) -> Sample:
    return Sample(after.cpu - before.cpu, after.wall - before.wall)


def fresh_translator(name: str) -> LeapformerForConditionalGeneration:
    """A form's model with weights of seed 0, in evaluation mode; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LeapformerForConditionalGeneration(LeapformerTranslationConfig(**MODEL, **FORMS[name])).eval()


def noise(seconds: int) -> Tensor:
    """float32 [N] at 16 kHz, quiet enough to stay within [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    return (0.1 * torch.randn(seconds * SAMPLE_RATE, generator=generator)).clamp(-1, 1)


# ---- many speakers


def _speakers_row(bench: Bench, material: Material, name: str, speakers: int, count: int) -> SpeakersRow:
    """A form with so many threads, which are already set."""
    seconds = QUICK_SPEAKERS_SECONDS if bench.settings.quick else SPEAKERS_SECONDS
    pushes = schedule(speakers, seconds, material.chunk / SAMPLE_RATE)
    clock = "cpu" if count == 1 else "wall"
    model, audio, statistics = material.models[name], material.audio, material.statistics
    warm, server = (Server(model, statistics, audio, k=K, clock=CLOCKS[clock]) for _ in range(2))
    done = 0

    def serve(batch: list[Push]) -> Served:
        nonlocal done
        done += len(batch)
        bench.say(f"streaming, {speakers} speakers, threads {count}: {name}, {done / len(pushes):.0%}")
        return server.serve(batch)

    simulate([push for push in pushes if push.time < 1], warm.serve)
    waits = simulate(pushes, serve)
    return SpeakersRow(
        contender=name,
        speakers=speakers,
        seconds=seconds,
        threads=count,
        clock=clock,
        words=len(waits.delays),
        delay_ms=percentiles([1e3 * delay for delay in waits.delays]),
        busy=waits.busy / waits.end,
        pushes_a_batch=sum(waits.batches) / len(waits.batches),
    )


# ---- what is shown


def streaming_tables(content: Mapping[str, Any]) -> list[Table]:
    """Real-time factors, times of a chunk, state, stages, speakers, profiles."""
    rows = rows_of(content, "lengths", LengthRow)
    notes = not_run_notes((f"{row.seconds} s", row.not_run) for row in rows)

    def by_length(title: str, cell: Callable[[LengthRow, str], str], notes: tuple[str, ...] = ()) -> Table:
        lines = []
        for row in rows:
            cells = [cell(row, name) if name in row.contenders else "not run" for name in FORMS]
            lines.append([f"{row.seconds:,}", *cells])
        return Table(title, ["seconds of audio", *FORMS], lines, notes)

    return [
        by_length(
            f"Real-time factor: seconds of work for a second of audio, wait-{K}",
            lambda row, name: f"**{ratio_text(row.real_time_factor[name])}**",
            notes,
        ),
        by_length(
            "Milliseconds of a chunk, median, p95",
            lambda row, name: f"{short(row.chunk_ms[name].median)}, {short(row.chunk_ms[name].p95)}",
        ),
        by_length(
            "KiB kept after the last whole chunk",
            lambda row, name: f"{row.state_bytes[name] / 2**10:,.1f}",
        ),
        _stages_table(rows),
        _speakers_table(rows_of(content, "speakers", SpeakersRow)),
        *profile_tables(content),
    ]


def _stages_table(rows: Sequence[LengthRow]) -> Table:
    lines = [
        [name, f"{row.seconds:,}", *(short(stages[stage]) for stage in STAGES)]
        for row in rows[-1:]
        for name, stages in row.stage_ms.items()
    ]
    return Table("Milliseconds of a chunk by stage, mean", ["form", "seconds of audio", *STAGES], lines)


def _speakers_table(rows: Sequence[SpeakersRow]) -> Table:
    lines = []
    for row in rows:
        delay, who = row.delay_ms, f"{row.contender}, {row.threads}, {row.clock}"
        delays = [short(value) for value in (delay.median, delay.p95, delay.p99, delay.longest)]
        lines.append([who, str(row.speakers), f"{row.words:,}", *delays, f"{row.busy:.0%}", short(row.pushes_a_batch)])
    title = "Milliseconds from the push that allows a word until it is there, many speakers"
    marks = ["median", "p95", "p99", "longest"]
    return Table(title, ["form, threads, clock", "speakers", "words", *marks, "busy", "pushes a batch"], lines)


def streaming_pictures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Real-time factor against the length of the audio, both axes logarithmic."""
    rows, lines = rows_of(content, "lengths", LengthRow), []
    for name in FORMS:
        points = [row.real_time_factor[name].at(row.seconds) for row in rows if name in row.real_time_factor]
        if points:
            lines.append(Line(name, points))
    if any(len(line.points) > 1 for line in lines):
        figure = lines_over_length(lines, xlabel="seconds of audio", ylabel="real-time factor")
        figure.axes[0].set_xticks([row.seconds for row in rows])
        yield "streaming", figure


BENCHMARK = Benchmark(
    measure_streaming,
    streaming_tables,
    streaming_pictures,
    check=lambda settings: FilterbankStream(),  # says which extra is missing
    limit=120.0,  # a call is a whole stream
)
