"""`leapformer bench streaming` with a tiny model; what a simulation adds up, by hand. Never how long anything took."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from benchmarks.acceptance import acceptance_table
from benchmarks.acceptance import main as judge
from leapformer.bench import speakers, streaming
from leapformer.bench.rows import Spread, to_json
from leapformer.bench.speakers import Push, Served, Server, schedule, simulate
from leapformer.bench.streaming import LengthRow, LiveStream, SpeakersRow, Tail, percentiles, stream
from leapformer.cli import main
from leapformer.models import DecoderStream
from leapformer.tasks.simulst.audio.features import FeatureStatistics, offline
from leapformer.tasks.simulst.audio.reading import SAMPLE_RATE
from tests.models.translation_builders import FEATURES, TINY, tiny_translator

CHUNK = 1920  # samples of 3 states, 120 ms
SECOND = SAMPLE_RATE


@pytest.fixture
def statistics() -> FeatureStatistics:
    return FeatureStatistics.of(offline(streaming.noise(1).numpy(), bins=FEATURES))


# ---- one speaker


@pytest.mark.parametrize("samples", [CHUNK * 12, CHUNK * 12 + 700, CHUNK * 2 + 1])
def test_a_stream_writes_what_the_whole_utterance_has(samples, statistics, monkeypatch):
    """Filterbank, encoder and decoder, chunk by chunk, choose the tokens that the parallel form chooses."""
    model, audio = tiny_translator(dtype=torch.float32), streaming.noise(2)[:samples]
    chosen, step = [], DecoderStream.step

    def noted(self, tokens, **rest):
        logits = step(self, tokens, **rest)
        chosen.append(int(logits.argmax(-1)))
        return logits

    monkeypatch.setattr(DecoderStream, "step", noted)
    run = stream(model, audio, statistics)
    chunks = -(-samples // CHUNK)
    assert run.tokens == len(chosen) == chunks and len(run.chunks) == chunks + 1
    features = statistics.normalize(offline(audio.numpy(), bins=FEATURES))[None]
    before = torch.tensor([[model.config.bos_token_id, *chosen[:-1]]])
    with torch.no_grad():
        logits = model(features, decoder_input_ids=before, k=streaming.K).logits
    assert logits[0].argmax(-1).tolist() == chosen


def test_a_token_after_every_chunk_from_the_kth_on(statistics):
    live = LiveStream(tiny_translator(dtype=torch.float32), statistics)
    audio, tokens = streaming.noise(2), []
    for start in range(0, 8 * CHUNK, CHUNK):
        live.push(audio[start : start + CHUNK])
        tokens.append(live.run.tokens)
    assert streaming.K == 5 and tokens == [0, 0, 0, 0, 1, 2, 3, 4]
    live.finish()
    assert live.run.tokens == 8
    by_stage = [
        sum(parts) for parts in zip(*([s.wall for s in stage] for stage in live.run.stages.values()), strict=True)
    ]
    assert by_stage == pytest.approx([sample.wall for sample in live.run.chunks])


def test_the_state_of_linear_attention_alone_does_not_grow(statistics):
    for name, fields in streaming.FORMS.items():
        model = tiny_translator(dtype=torch.float32, **fields)
        kept = {stream(model, streaming.noise(6)[: n * CHUNK], statistics).state_bytes for n in (8, 20, 40)}
        assert len(kept) == (1 if name == streaming.LEAP else 3), name


def test_percentiles_are_measured_values():
    found = percentiles([float(n) for n in range(100, 0, -1)])
    assert found == Tail(median=50.0, p95=95.0, p99=99.0, longest=100.0, n=100)
    assert percentiles([3.0]).p95 == 3.0


# ---- many speakers


def test_what_waits_is_one_batch():
    """A processor that takes 1 s for a batch and 0.25 s more for a push in it, words half a second before the end."""
    pushes = [
        Push(1.0, 0, 0, False),
        Push(1.5, 1, 0, False),
        Push(2.0, 0, 1, False),
        Push(2.25, 2, 0, True),
        Push(2.5, 1, 1, True),
        Push(9.0, 0, 2, True),
    ]
    batches = []

    def serve(batch):
        batches.append([(push.speaker, push.chunk) for push in batch])
        seconds = 1 + 0.25 * len(batch)
        return Served(seconds, [(push.speaker, seconds - 0.5) for push in batch if push.chunk or push.last])

    waits = simulate(reversed(pushes), serve)
    # Free at 1: one push until 2.25; then speakers 1, 0 and 2 until 4; then speaker 1's second until 5.25; idle to 9.
    assert batches == [[(0, 0)], [(1, 0), (0, 1), (2, 0)], [(1, 1)], [(0, 2)]]
    assert waits.delays == [2.25 + 1.25 - 2.0, 2.25 + 1.25 - 2.25, 4 + 0.75 - 2.5, 0.75]
    assert (waits.busy, waits.end, waits.batches) == (1.25 + 1.75 + 1.25 + 1.25, 10.25, [1, 3, 1, 1])


def test_a_speaker_s_pushes_are_never_in_one_batch():
    pushes = [Push(0.1 * n, 0, n, n == 4) for n in range(5)]
    served = []
    waits = simulate(pushes, lambda batch: (served.append([push.chunk for push in batch]), Served(1.0, [(0, 1.0)]))[1])
    assert served == [[0], [1], [2], [3], [4]]
    assert waits.delays == pytest.approx([n + 1 - 0.1 * n for n in range(5)])


def test_speakers_follow_one_utterance_with_another():
    pushes = schedule(3, 20.0, 0.36)
    assert pushes == sorted(pushes) == schedule(3, 20.0, 0.36) != schedule(3, 20.0, 0.36, seed=1)
    phases = set()
    for speaker in range(3):
        own = [push for push in pushes if push.speaker == speaker]
        steps = [after.time - before.time for before, after in itertools.pairwise(own)]
        assert steps == pytest.approx([0.36] * len(steps))
        assert all(after.chunk == (0 if before.last else before.chunk + 1) for before, after in itertools.pairwise(own))
        lengths = [push.chunk + 1 for push in own if push.last]
        assert all(speakers.SHORTEST_UTTERANCE <= n <= speakers.LONGEST_UTTERANCE for n in lengths) and len(lengths) > 1
        assert own[0].chunk == 0 and 0.36 <= own[0].time < 0.72 and own[-1].last
        assert own[-1].time >= 20 > own[-1].time - lengths[-1] * 0.36
        phases.add(own[0].time)
    assert len(phases) == 3


def test_a_server_writes_a_word_for_every_chunk(statistics):
    """By a clock that ticks once at every look; speakers 0 and 1 say 4 and 3 chunks, and speaker 0 begins again."""
    ticks = itertools.count()
    server = Server(
        tiny_translator(dtype=torch.float32), statistics, streaming.noise(1), k=2, clock=lambda: next(ticks)
    )
    # The first token is possible after two chunks, and a word is out with the token after it.
    assert server.serve([Push(0, 0, 0, False), Push(0, 1, 0, False)]) == Served(2, [])
    assert server.serve([Push(0, 0, 1, False)]).words == []
    assert server.serve([Push(0, 0, 2, False), Push(0, 1, 1, False)]).words == [(0, 1)]
    # Speaker 1 ends: its chunk is one step of the batch (with speaker 0's word), the rest of its words the next.
    served = server.serve([Push(0, 0, 3, False), Push(0, 1, 2, True)])
    assert sorted(served.words) == [(0, 1), (1, 1), (1, 2), (1, 2)] and served.seconds == 3
    assert list(server._streams) == [0]
    assert server.serve([Push(0, 0, 4, True), Push(0, 1, 0, False)]).words == [(0, 1), (0, 2), (0, 2)]
    assert list(server._streams) == [1] and len(server.translators._streams) == 1


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()
    with speakers.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with pytest.raises(KeyboardInterrupt), speakers.threads(before + 1):
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before


# ---- the command


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(streaming, "MODEL", {**TINY, "num_features": 80})
    monkeypatch.setattr(streaming, "SPEAKERS", (2, 3))
    monkeypatch.setattr(streaming, "SPEAKERS_SECONDS", 1)
    # Two threads need a machine of their own; `threads` is tested by itself.
    monkeypatch.setattr(streaming, "SPEAKERS_RUNS", (("LeaPformer", 1), ("softmax", 1)))


def test_the_command_leaves_json_tables_and_a_picture(tmp_path, capsys, small):
    before = torch.get_num_threads(), torch.random.get_rng_state()
    try:
        arguments = ["bench", "streaming", "--lengths", "2,1", "--repeats", "2", "--output", str(tmp_path)]
        assert main(arguments) == 0
    finally:
        torch.set_num_threads(before[0])
    assert torch.equal(torch.random.get_rng_state(), before[1])
    content = json.loads((tmp_path / "streaming.json").read_text())
    assert content["finished"] is True and content["settings"]["limit"] == 120
    assert [row["seconds"] for row in content["lengths"]] == [1, 2]
    for row in content["lengths"]:
        assert list(row["contenders"]) == list(streaming.FORMS) and row["not_run"] == {}
        assert set(row["tokens"].values()) == {-(-row["seconds"] * SECOND // CHUNK)}
        for name, times in row["contenders"].items():
            factor = row["real_time_factor"][name]
            assert factor["n"] == 2 and factor["median"] == pytest.approx(
                times["cpu_ms"]["median"] / 1e3 / row["seconds"]
            )
            assert set(row["stage_ms"][name]) == set(streaming.STAGES)
            assert row["chunk_ms"][name]["n"] == 2 * row["tokens"][name]
    states = [[row["state_bytes"][name] for row in content["lengths"]] for name in streaming.FORMS]
    assert states[0][0] == states[0][1] and states[1][0] < states[1][1] and states[2][0] < states[2][1]
    assert [profile["contender"] for profile in content["profiles"]] == [streaming.LEAP, streaming.SOFTMAX]
    found = [(row["contender"], row["threads"], row["clock"], row["speakers"]) for row in content["speakers"]]
    runs = [("LeaPformer", 1, "cpu"), ("softmax", 1, "cpu")]
    assert found == [(*run, n) for run in runs for n in (2, 3)]
    assert all(0 < row["busy"] <= 1 <= row["pushes_a_batch"] and row["words"] >= 20 for row in content["speakers"])
    printed = capsys.readouterr().out
    titles = ("Real-time factor", "KiB kept", "by stage", "many speakers", "Where a chunk of softmax spends its time")
    assert all(text in printed for text in titles)
    assert (tmp_path / "streaming.png").read_bytes().startswith(b"\x89PNG")
    assert judge(["--only-table", "--output", str(tmp_path)]) == 0
    assert "LeaPformer, streaming, 1 to 2 s of audio: bytes of state" in capsys.readouterr().out
    assert "95 % of the words within" in (tmp_path / "acceptance.md").read_text()


def test_lengths_over_the_limit_are_not_run(tmp_path, capsys, small):
    before = torch.get_num_threads()
    arguments = ["bench", "streaming", "--quick", "--lengths", "1", "--limit", "1e-9", "--output", str(tmp_path)]
    try:
        assert main(arguments) == 0
    finally:
        torch.set_num_threads(before)
    (row,) = json.loads((tmp_path / "streaming.json").read_text())["lengths"]
    assert list(row["not_run"]) == list(streaming.FORMS) and row["contenders"] == {}
    assert "Not run at 1 s: softmax (about " in capsys.readouterr().out
    assert judge(["--only-table", "--output", str(tmp_path)]) == 0
    assert "not measured: not among the lengths" in (tmp_path / "acceptance.md").read_text()


def test_too_many_speakers_end_the_row(tmp_path, small, monkeypatch):
    """From the first number on at which more than 5 % of the words wait longer than a chunk."""
    monkeypatch.setattr(streaming, "SPEAKERS", (2, 3, 4))
    slow = {2: 0.1, 3: 0.2, 4: 0.1}
    monkeypatch.setattr(
        streaming, "simulate", lambda pushes, serve: speakers.Waits([slow[len({p.speaker for p in pushes})]], 1, 2, [1])
    )
    before = torch.get_num_threads()
    try:
        assert main(["bench", "streaming", "--lengths", "1", "--repeats", "1", "--output", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(before)
    rows = json.loads((tmp_path / "streaming.json").read_text())["speakers"]
    assert [(row["speakers"], row["delay_ms"]["p95"]) for row in rows] == 2 * [(2, 100.0), (3, 200.0)]


def content_of(factors, states, delay=None):
    def row(seconds, factor, state):
        return LengthRow(
            seconds=seconds,
            real_time_factor={"LeaPformer": Spread(factor, factor, factor)},
            state_bytes={"LeaPformer": state},
            chunk_ms={},
            stage_ms={},
            tokens={},
        )

    lengths = [row(*values) for values in zip((5, 60, 600), factors, states, strict=False)]
    speakers = []
    if delay is not None:
        about = {"contender": "LeaPformer", "speakers": 32, "threads": 2, "seconds": 60, "clock": "wall", "words": 1}
        tail = Tail(median=1.0, p95=delay, p99=delay, longest=delay, n=1)
        speakers.append(SpeakersRow(**about, delay_ms=tail, busy=1.0, pushes_a_batch=1.0))
    return to_json({"settings": {"quick": False}, "lengths": lengths, "speakers": speakers})


def test_acceptance():
    rows = acceptance_table({"streaming": content_of((0.05, 0.04, 0.048), (1000, 1000, 1000), 90.0)}).rows
    assert [row[2] for row in rows] == ["1.25 x", "0.05", "1.00 x", "90.0 ms"]
    assert [row[-1] for row in rows] == ["no", "yes", "yes", "yes"]
    assert (
        "5 to 600 s of audio" in rows[0][0]
        and "highest at 5 s" in rows[1][0]
        and "32 speakers, 2 threads" in rows[3][0]
    )
    rows = acceptance_table({"streaming": content_of((0.2, 0.2, 0.19), (1000, 1001, 1000), 361.0)}).rows
    assert [row[-1] for row in rows] == ["yes", "no", "no", "no"]
    rows = acceptance_table({"streaming": content_of((), ())}).rows
    reasons = ["not measured: not among the lengths"] * 3 + ["not measured: fewer speakers are too many here"]
    assert [row[-1] for row in rows] == reasons
