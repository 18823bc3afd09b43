"""`leapformer bench streaming`: simultaneous translation of speech by the paper-sized model.

First one speaker: real-time factor and state by the length of the audio, for LeaPformer, for softmax, whose caches grow, and
for LeaPformer that encodes all the audio anew at every read. Then many speakers at once: how long words wait.

The audio is noise and the weights are fresh, which costs what real ones cost; a fresh model's end of sentence means nothing,
so wait-k writes as many tokens as there are chunks (2.8 a second, as speech has about 3).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from leapformer.analysis.plots import Line, lines_over_length
from leapformer.bench.result import Result, Say, Settings, Table, ratio_text, short
from leapformer.bench.speakers import Push, Served, Server, Waits, chunk_samples, schedule, simulate, threads
from leapformer.bench.timing import Race, Sample, spread
from leapformer.bench.training import where_time_goes
from leapformer.models import LeapformerForConditionalGeneration, LeapformerTranslationConfig
from leapformer.models.translation_configuration import PLACES
from leapformer.models.translation_stream import DecoderStream, EncoderStream
from leapformer.tasks.simulst.audio import SAMPLE_RATE
from leapformer.tasks.simulst.features import FeatureStatistics, FilterbankStream, offline

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


def measure_streaming(settings: Settings, result: Result, say: Say) -> None:
    """One race for each length of audio, where a chunk's time goes, then the speakers."""
    models = {name: fresh_translator(name) for name in FORMS}
    lengths = settings.lengths_or(SECONDS, QUICK_SECONDS)
    audio = noise(max(lengths))
    statistics = FeatureStatistics.of(offline(audio[: 10 * SAMPLE_RATE].numpy()))
    chunk = chunk_samples(models[LEAP])
    warm = {}
    for name, model in models.items():
        say(f"streaming, warm-up: {name}")
        first = audio[: WARM_CHUNKS * chunk]
        stream(model, first, statistics)
        warm[name] = (len(first) / SAMPLE_RATE, getattr(stream(model, first, statistics).total, settings.clock))
    for seconds in lengths:
        row = _length_row(seconds, models, audio, statistics, warm, settings, say)
        result.add("lengths", row)
    if not settings.quick:
        for name in (LEAP, SOFTMAX):
            say(f"profile of a chunk: {name}")
            live = LiveStream(models[name], statistics)
            for _ in range(K):
                live.push(audio[:chunk])
            profile = where_time_goes(lambda live=live: live.push(audio[:chunk]))
            result.add("profiles", {"step": "chunk", "contender": name, **profile})
    for name, count in QUICK_SPEAKERS_RUNS if settings.quick else SPEAKERS_RUNS:
        for speakers in QUICK_SPEAKERS if settings.quick else SPEAKERS:
            with threads(count):
                row = _speakers_row(name, speakers, count, models[name], audio, statistics, settings, say)
            result.add("speakers", row)
            if row["delay_ms"]["p95"] > 1e3 * chunk / SAMPLE_RATE:
                break


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


def _length_row(
    seconds: int, models: Mapping[str, LeapformerForConditionalGeneration], audio: Tensor,
    statistics: FeatureStatistics, known: dict[str, tuple[float, float]], settings: Settings, say: Say,
) -> dict[str, Any]:  # fmt: skip
    """All forms take turns with so much audio. ``known``: seconds of audio and of work, by which later ones are guessed."""
    audio, runs, outcome = audio[: seconds * SAMPLE_RATE], {name: [] for name in models}, Race()
    for name in models:
        length, took = known[name]
        guess = took * (seconds / length) ** (2 if FORMS[name].get("context") == "full" else 1)
        if guess > settings.limit:
            outcome.not_run[name] = f"about {guess:.3g} s, over the limit of {settings.limit:g} s"
    turns, begin = 0, time.monotonic()
    while turns < settings.repeats and (turns < TURNS or time.monotonic() - begin < 2 * settings.limit):
        for name in models:
            if name not in outcome.not_run:
                say(f"streaming, {seconds} s of audio, turn {turns + 1}: {name}")
                runs[name].append(stream(models[name], audio, statistics))
        turns += 1
    runs = {name: found for name, found in runs.items() if found}
    outcome.samples = {name: [run.total for run in found] for name, found in runs.items()}
    for name in runs:
        known[name] = (seconds, spread(outcome.seconds(name, settings.clock))["median"])
    return {
        "seconds": seconds,
        "contenders": outcome.as_dict(),
        "not_run": outcome.not_run,
        "real_time_factor": {
            name: spread([s / seconds for s in outcome.seconds(name, settings.clock)]) for name in runs
        },
        "chunk_ms": {name: _chunk_times(found, settings.clock) for name, found in runs.items()},
        "stage_ms": {name: _stage_times(found, settings.clock) for name, found in runs.items()},
        "state_bytes": {name: found[-1].state_bytes for name, found in runs.items()},
        "tokens": {name: found[-1].tokens for name, found in runs.items()},
    }


def _chunk_times(runs: Sequence[StreamRun], clock: str) -> dict[str, float]:
    """Of a push, not of the end."""
    return percentiles([1e3 * getattr(sample, clock) for run in runs for sample in run.chunks[:-1]])


def _stage_times(runs: Sequence[StreamRun], clock: str) -> dict[str, float]:
    """The mean of a push by stage."""
    stages = {name: [getattr(s, clock) for run in runs for s in run.stages[name][:-1]] for name in STAGES}
    return {name: 1e3 * sum(values) / len(values) for name, values in stages.items()}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, p95, p99 and the largest: measured values, the smallest that so many per cent do not exceed."""
    ordered = sorted(values)
    at = {
        name: ordered[math.ceil(share * len(ordered)) - 1]
        for name, share in (("median", 0.5), ("p95", 0.95), ("p99", 0.99))
    }
    return {**at, "longest": ordered[-1], "n": len(ordered)}


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


def _speakers_row(
    name: str, speakers: int, count: int, model: LeapformerForConditionalGeneration, audio: Tensor,
    statistics: FeatureStatistics, settings: Settings, say: Say,
) -> dict[str, Any]:  # fmt: skip
    seconds = QUICK_SPEAKERS_SECONDS if settings.quick else SPEAKERS_SECONDS
    pushes = schedule(speakers, seconds, chunk_samples(model) / SAMPLE_RATE)
    clock = "cpu" if count == 1 else "wall"
    warm, server = (Server(model, statistics, audio, k=K, clock=CLOCKS[clock]) for _ in range(2))
    done = 0

    def serve(batch: list[Push]) -> Served:
        nonlocal done
        done += len(batch)
        say(f"streaming, {speakers} speakers, threads {count}: {name}, {done / len(pushes):.0%}")
        return server.serve(batch)

    simulate([push for push in pushes if push.time < 1], warm.serve)
    about = {"contender": name, "speakers": speakers, "seconds": seconds, "threads": count, "clock": clock}
    return {**about, **_waits(simulate(pushes, serve))}


def _waits(waits: Waits) -> dict[str, Any]:
    return {
        "words": len(waits.delays),
        "delay_ms": percentiles([1e3 * delay for delay in waits.delays]),
        "busy": waits.busy / waits.end,
        "pushes_a_batch": sum(waits.batches) / len(waits.batches),
    }


# ---- what is shown


def streaming_tables(content: Mapping[str, Any]) -> list[Table]:
    """Real-time factors, times of a chunk, state, stages, speakers, profiles."""
    rows = content.get("lengths", [])
    notes = tuple(
        f"Not run at {row['seconds']} s: {name} ({reason})." for row in rows for name, reason in row["not_run"].items()
    )

    def by_length(title: str, cell: Any, notes: tuple[str, ...] = ()) -> Table:
        lines = [[f"{row['seconds']:,}", *(cell(row, name) if name in row["contenders"] else "not run" for name in FORMS)]
                 for row in rows]  # fmt: skip
        return Table(title, ["seconds of audio", *FORMS], lines, notes)

    return [
        by_length(
            f"Real-time factor: seconds of work for a second of audio, wait-{K}",
            lambda row, name: f"**{ratio_text(row['real_time_factor'][name])}**",
            notes,
        ),
        by_length(
            "Milliseconds of a chunk, median, p95",
            lambda row, name: ", ".join(short(row["chunk_ms"][name][key]) for key in ("median", "p95")),
        ),
        by_length(
            "KiB kept after the last whole chunk",
            lambda row, name: f"{row['state_bytes'][name] / 2**10:,.1f}",
        ),
        _stages_table(rows),
        _speakers_table(content.get("speakers", [])),
        *_profile_tables(content.get("profiles", [])),
    ]


def _stages_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    lines = [
        [name, f"{row['seconds']:,}", *(short(stages[stage]) for stage in STAGES)]
        for row in rows[-1:]
        for name, stages in row["stage_ms"].items()
    ]
    return Table("Milliseconds of a chunk by stage, mean", ["form", "seconds of audio", *STAGES], lines)


def _speakers_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    keys = ("median", "p95", "p99", "longest")
    lines = [
        [f"{row['contender']}, {row['threads']}, {row['clock']}", str(row["speakers"]), f"{row['words']:,}", *(short(row["delay_ms"][key]) for key in keys),
         f"{row['busy']:.0%}", short(row["pushes_a_batch"])]
        for row in rows
    ]  # fmt: skip
    title = "Milliseconds from the push that allows a word until it is there, many speakers"
    return Table(title, ["form, threads, clock", "speakers", "words", *keys, "busy", "pushes a batch"], lines)


def _profile_tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    for row in rows:
        lines = [
            [o["operator"], f"{o['calls']:,}", short(o["ms"]), f"{o['ms'] / row['all_ms']:.0%}"] for o in row["operators"]
        ]  # fmt: skip
        title = f"Where a {row['step']} of {row['contender']} spends its time ({short(row['all_ms'])} ms in operators)"
        yield Table(title, ["operator", "calls", "ms", "share"], lines)


def streaming_pictures(content: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Real-time factor against the length of the audio, both axes logarithmic."""
    rows, lines = content.get("lengths", []), []
    for name in FORMS:
        found = [(row["seconds"], row["real_time_factor"][name]) for row in rows if name in row["real_time_factor"]]
        if found:
            lines.append(Line(name, [(seconds, f["median"], f["p20"], f["p80"]) for seconds, f in found]))
    if any(len(line.points) > 1 for line in lines):
        figure = lines_over_length(lines, xlabel="seconds of audio", ylabel="real-time factor")
        figure.axes[0].set_xticks([row["seconds"] for row in rows])
        yield "streaming", figure
