"""Streaming from samples or words to words: the training forward, whatever the pushes; independent streams; bad
input.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from leapformer.models import SequenceTooLong
from leapformer.models.translation_stream import greedy_translation
from leapformer.tasks.simulst.audio.reading import resample
from leapformer.tasks.simulst.streaming.policies import AlignAtt, LocalAgreement, WaitK
from leapformer.tasks.simulst.streaming.policy_requests import Write
from leapformer.tasks.simulst.streaming.translator import StreamingTranslator
from leapformer.tasks.simulst.streaming.translator_batch import TranslatorBatch
from leapformer.tasks.simulst.text.words import SPARE_TOKENS, Word
from tests.tasks.simulst.translators import (
    CHUNK,
    CHUNK_MS,
    audio_states,
    cuts,
    noise,
    speech_model,
    speech_processor,
    text_model,
    text_processor,
    vocabulary,
)

RATE = 16_000
KINDS = {
    "leap": {},
    "gated": {"variant": "gated"},
    "softmax": {f"{place}_attention": "softmax" for place in ("encoder", "decoder", "cross")},
    "cosformer": {"cross_attention": "cosformer", "max_source_positions": 60, "max_target_positions": 60},
}
kinds = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())


class Recorder:
    """A policy that keeps what each step proposed and how many states there were; or writes a script instead."""

    def __init__(self, policy, script=()):
        self.policy, self.keep_mass, self.script = policy, policy.keep_mass, list(script)
        self.logits, self.available, self.tokens = [], [], []

    def turn(self, target):
        turn, answer = self.policy.turn(target), None
        while True:
            try:
                request = turn.send(answer)
            except StopIteration:
                return
            available = target.available
            if isinstance(request, Write) and self.script:
                request = replace(request, token=self.script.pop(0))
            answer = yield request
            if isinstance(request, Write):
                self.logits.append(answer.logits)
                self.available.append(available)
                self.tokens.append(answer.token)


def translate(model, samples, parts, policy=None, *, processor=None, **options):
    """All words of a source in some pieces, and the translator after them."""
    translator = StreamingTranslator(model, processor or speech_processor(), policy, **options)
    words = []
    for part in parts:
        words += translator.push(samples[part])
    return words + translator.finish(), translator


def whole(samples):
    return [slice(0, len(samples))]


def expected_words(tokens, k, milliseconds):
    """Words and times by hand: a word is complete with the token after it, at min((k + i) chunks, the whole)."""
    words, start = [], 0
    for place in range(1, len(tokens) + 1):
        if place == len(tokens) or vocabulary().starts_word(tokens[place]):
            time = milliseconds if k is None else min((k + place) * CHUNK_MS, milliseconds)
            words += [(text, time) for text in vocabulary().decode(tokens[start:place]).split()]
            start = place
    return words


def told(words):
    return [(word.text, word.read_ms) for word in words]


# ---- streaming is training


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9, None])
def test_the_logits_are_those_of_training_whatever_the_pushes(k):
    model, samples = speech_model(ends=False, dtype=torch.float32), noise(1.4, seed=3)
    for most in (61, 3000, RATE):
        recorder = Recorder(WaitK(k))
        translate(model, samples, cuts(len(samples), most, seed=most), recorder, max_tokens_per_chunk=1)
        labels = torch.tensor([recorder.tokens])
        features = speech_processor().features(samples)[None]
        expected = model(features, labels=labels, k=k).logits[0]
        torch.testing.assert_close(torch.stack(recorder.logits), expected, atol=1e-5, rtol=1e-5)
        states = math.ceil(len(samples) / 640)
        if k is not None:  # each from its own g(i), as soon as that was read
            assert recorder.available == [min((k + i) * CHUNK, states) for i in range(len(recorder.tokens))]
        else:
            assert set(recorder.available) == {states}


@torch.no_grad()
@kinds
def test_the_logits_are_those_of_training_for_every_attention(fields):
    model, samples = speech_model(ends=False, **fields), noise(1.3, seed=4)
    recorder = Recorder(WaitK(2))
    translate(model, samples, cuts(len(samples), 5000), recorder, max_tokens_per_chunk=1)
    labels, features = torch.tensor([recorder.tokens]), speech_processor().features(samples)[None]
    assert len(recorder.tokens) == SPARE_TOKENS + math.ceil(1300 / CHUNK_MS)
    expected = model(features, labels=labels, k=2).logits[0]
    torch.testing.assert_close(torch.stack(recorder.logits), expected, atol=1e-9, rtol=1e-9)


def test_sample_by_sample_is_the_same_to_the_last_bit():
    model, samples = speech_model(seed=2, dtype=torch.float32), noise(0.7, seed=1)
    recorders, words = [Recorder(WaitK(1)) for _ in range(3)], []
    for recorder, parts in zip(
        recorders, (cuts(len(samples), 1), whole(samples), cuts(len(samples), 999)), strict=True
    ):
        words.append(translate(model, samples, parts, recorder)[0])
    assert words[0] == words[1] == words[2] and len(words[0]) > 1
    for other in recorders[1:]:
        assert torch.equal(torch.stack(recorders[0].logits), torch.stack(other.logits))


@pytest.mark.parametrize("policy", [WaitK(1), WaitK(3), LocalAgreement(2, ahead=6), AlignAtt()], ids=repr)
def test_what_comes_later_changes_nothing_at_all(policy):
    model, samples = speech_model(seed=2, ends=False, dtype=torch.float32), noise(1.8, seed=1)
    cut = round(RATE * 7.4 * CHUNK_MS / 1000)
    other = np.concatenate([samples[:cut], noise(1.1, seed=8)])
    first, second = Recorder(policy), Recorder(policy)
    words = translate(model, samples, cuts(len(samples), 4000), first)[0]
    changed = translate(model, other, cuts(len(other), 9000), second)[0]
    early = [word for word in words if word.chunk <= 7]
    assert early and changed[: len(early)] == early
    steps = sum(available <= 7 * CHUNK for available in first.available)
    assert steps and torch.equal(torch.stack(first.logits[:steps]), torch.stack(second.logits[:steps]))
    assert not torch.equal(first.logits[-1], second.logits[-1])


@pytest.mark.parametrize("k", [1, 2, 5, None])
def test_words_and_times_are_those_of_the_whole_utterance(k):
    complete = 0
    for seed in range(5):
        model, samples = speech_model(seed=seed), noise(0.9 + 0.13 * seed, seed=seed)
        model.config.eos_token_id = [2, 8, 15, 31]
        most = SPARE_TOKENS + 2 * math.ceil(1000 * len(samples) / RATE / CHUNK_MS)
        tokens = greedy_translation(model, audio_states(model, samples), k=k, max_tokens=most)[0]
        parts = cuts(len(samples), 5000, seed=seed)
        words, translator = translate(model, samples, parts, WaitK(k), max_tokens_per_chunk=2)
        expected = expected_words(tokens, k, 1000 * len(samples) / RATE)
        assert told(words) == expected
        assert translator.finished and translator.text == " ".join(text for text, _ in expected)
        assert [word.index for word in words] == list(range(len(words)))
        complete += 0 < len(words) and len(tokens) < most
    assert complete >= 2


def test_full_context_encodes_all_again_at_every_read():
    model, samples = speech_model(context="full", ends=False), noise(0.8)
    recorder = Recorder(WaitK(2))
    translate(model, samples, cuts(len(samples), 3000), recorder, max_tokens_per_chunk=1)
    features, labels = speech_processor().features(samples)[None], torch.tensor([recorder.tokens])
    with torch.no_grad():
        at_first = model(features[:, : 4 * 2 * CHUNK], labels=labels).logits[0, 0]
    torch.testing.assert_close(recorder.logits[0], at_first, atol=1e-9, rtol=1e-9)
    assert recorder.available[:4] == [6, 9, 12, 15]


# ---- audio of other rates, and odd audio


@pytest.mark.parametrize("rate", [8_000, 48_000])
def test_other_rates_are_resampled(rate):
    model, samples = speech_model(seed=2), noise(1.2, seed=1, rate=rate)
    words, translator = translate(model, samples, cuts(len(samples), 4000), WaitK(1), sample_rate=rate)
    at_16_khz = resample(samples, rate)
    expected, _ = translate(model, at_16_khz, whole(at_16_khz), WaitK(1))
    assert told(words) == told(expected) and len(words) > 1
    assert translator.read_ms == 1200
    with pytest.raises(ValueError, match="snapshot: expected audio at 16,000 Hz .* found"):
        StreamingTranslator(model, speech_processor(), sample_rate=rate).snapshot()


def test_silence_one_sample_and_no_sample():
    model = speech_model(seed=2)
    for samples in (np.zeros(20_000, np.float32), np.ones(1, np.float32)):
        words, translator = translate(model, samples, whole(samples), WaitK(2))
        most = SPARE_TOKENS + 8 * math.ceil(len(samples) / RATE * 1000 / CHUNK_MS)
        tokens = greedy_translation(model, audio_states(model, samples), k=2, max_tokens=most)[0]
        assert told(words) == expected_words(tokens, 2, 1000 * len(samples) / RATE)
        assert all(word.read_ms <= 1000 * len(samples) / RATE for word in words)
    assert translate(model, np.zeros(0, np.float32), [slice(0, 0)])[0] == []


def test_bad_samples_are_refused_and_nothing_changes():
    model, samples = speech_model(seed=2), noise(1.0)
    words, _ = translate(model, samples, whole(samples), WaitK(1))
    translator = StreamingTranslator(model, speech_processor(), WaitK(1))
    found = translator.push(samples[:7000])
    bad = samples[7000:8000].copy()
    bad[3] = np.nan
    with pytest.raises(ValueError, match="expected finite ones, got nan at index 3"):
        translator.push(bad)
    with pytest.raises(ValueError, match=r"expected floating \[N\] within \[-1, 1\], got int16 \[4\]"):
        translator.push(np.zeros(4, np.int16))
    with pytest.raises(ValueError, match=r"got float32 \[4, 2\]"):
        translator.push(np.zeros((4, 2), np.float32))
    found += translator.push(samples[7000:]) + translator.finish()
    assert found == words


def test_wrong_use_is_one_clear_line():
    model = speech_model()
    translator = StreamingTranslator(model, speech_processor())
    translator.finish()
    with pytest.raises(ValueError, match="expected no push after finish"):
        translator.push(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="expected one call of finish, found another"):
        translator.finish()
    with pytest.raises(ValueError, match="expected a processor for speech, the model's source, found one for text"):
        StreamingTranslator(model, text_processor())
    with pytest.raises(ValueError, match="expected a model in evaluation mode"):
        StreamingTranslator(speech_model().train(), speech_processor())
    with pytest.raises(ValueError, match="max_tokens_per_chunk: expected at least 1, found 0"):
        StreamingTranslator(model, speech_processor(), max_tokens_per_chunk=0)
    with pytest.raises(ValueError, match="text: expected words as str, found ndarray"):
        StreamingTranslator(text_model(), text_processor()).push(np.zeros(4, np.float32))


def test_audio_beyond_cosformers_maximum_is_told_and_others_go_on():
    model = speech_model(encoder_attention="cosformer", max_source_positions=20, ends=False)
    samples = noise(1.0)
    words, _ = translate(model, samples[:8000], whole(samples[:8000]), WaitK(1))
    batch = TranslatorBatch(model, speech_processor(), WaitK(1))
    long, short = batch.open(), batch.open()
    batch.push(long, samples[:8000])
    batch.push(short, samples[:8000])
    batch.finish(short)
    with pytest.raises(SequenceTooLong, match="expected at most max_source_positions=20, found 25"):
        batch.push(long, samples[8000:])
    found = []
    while batch.waits:
        found += batch.step().get(short, [])
    assert told(found) == told(words) and batch.finished(long)


# ---- the end of a sentence, and no end


def sentence(text):
    return [*vocabulary().encode(text), 2]


def test_after_the_end_of_the_sentence_only_time_passes():
    model, samples = speech_model(), noise(2.4)
    script = sentence("der hund")
    translator = StreamingTranslator(model, speech_processor(), Recorder(WaitK(2), script))
    words = translator.push(samples)
    at = (2 + len(script) - 1) * CHUNK_MS
    assert [word.text for word in words] == ["der", "hund"] and words[1].read_ms == at < 2400
    assert translator.finished and translator.text == "der hund"
    before = translator.nbytes
    assert translator.push(noise(3.0)) == [] and translator.nbytes == before
    assert translator.read_ms == 5400 and translator.finish() == []


def test_continuous_goes_on_with_another_sentence():
    model, samples = speech_model(), noise(3.6)
    first, second = sentence("der hund"), sentence("im garten schläft")
    recorder = Recorder(WaitK(2), first + second)
    translator = StreamingTranslator(model, speech_processor(), recorder, continuous=True)
    words = translator.push(samples) + translator.finish()
    assert [word.text for word in words][:5] == ["der", "hund", "im", "garten", "schläft"]
    seen = (2 + len(first) - 1) * CHUNK  # states that the first sentence has used
    states = model.encode(speech_processor().features(samples)[None].to(model.dtype)).hidden
    labels = torch.tensor([second])
    with torch.no_grad():
        rest = (states[:, seen:], None)
        logits = model(labels=labels, source_states=type(audio_states(model, samples))(*rest), k=2).logits[0]
    found = torch.stack(recorder.logits[len(first) : len(first) + len(second)])
    torch.testing.assert_close(found, logits, atol=1e-9, rtol=1e-9)
    at = (seen // CHUNK + 2 + len(second) - 1) * CHUNK_MS  # the end of the second
    assert words[4].read_ms == min(at, 3600) and words[4].index == 4


def test_a_model_that_never_ends_stops():
    model, samples = speech_model(ends=False), noise(1.2)
    for policy in (WaitK(1), WaitK(None), LocalAgreement(2, ahead=6), AlignAtt()):
        recorder = Recorder(policy)
        _, translator = translate(model, samples, cuts(len(samples), 3000), recorder, max_tokens_per_chunk=2)
        written = sum(states == 30 for states in recorder.available)
        assert translator.finished and written <= SPARE_TOKENS + 2 * 10
    recorder = Recorder(WaitK(None))
    translate(model, samples, whole(samples), recorder, max_tokens_per_chunk=2)
    assert len(recorder.tokens) == SPARE_TOKENS + 2 * 10
    cosformer = speech_model(ends=False, decoder_attention="cosformer", max_target_positions=7)
    recorder = Recorder(WaitK(1))
    translate(cosformer, samples, whole(samples), recorder)
    assert len(recorder.tokens) == 7


# ---- the state


@pytest.mark.parametrize("variant", ["paper", "gated"])
def test_the_state_does_not_grow(variant):
    model = speech_model(ends=False, dtype=torch.float32, variant=variant)
    for policy in (WaitK(3), LocalAgreement(ahead=3)):
        translator, sizes = StreamingTranslator(model, speech_processor(), policy, continuous=True), []
        for second in range(12):
            translator.push(noise(0.6, seed=second))  # five chunks
            sizes.append(translator.nbytes)
        assert len(set(sizes[1:])) == 1 and sizes[1] < 60_000
        with translator:
            pass
        assert translator.nbytes == 0 and translator.finished and translator.read_ms == 7200
        translator.close()
        with pytest.raises(ValueError, match="stream 0: expected one that is open, found none"):
            translator.push(noise(0.1))


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        *((kind, WaitK(2)) for kind in KINDS),
        *((kind, policy) for kind in ("leap", "softmax") for policy in (LocalAgreement(2, ahead=4), AlignAtt())),
    ],
    ids=repr,
)
def test_snapshot_and_restore(kind, policy):
    model, samples = speech_model(seed=2, **KINDS[kind]), noise(1.3, seed=1)
    translator = StreamingTranslator(model, speech_processor(), policy)
    start = translator.push(samples[:9100])
    kept = translator.snapshot()
    rest = translator.push(samples[9100:]) + translator.finish()
    text = translator.text
    for _ in range(2):
        translator.restore(kept)
        assert translator.text == " ".join(word.text for word in start) and not translator.finished
        translator.push(noise(0.5, seed=7))
        translator.restore(kept)
        assert translator.push(samples[9100:]) + translator.finish() == rest and translator.text == text
    assert start + rest == translate(model, samples, whole(samples), policy)[0]


def test_interleaved_translators_know_nothing_of_each_other():
    model = speech_model(seed=2, dtype=torch.float32)
    audio = [noise(1.1, seed=seed) for seed in range(3)]
    alone = [translate(model, samples, whole(samples), WaitK(1))[0] for samples in audio]
    translators = [StreamingTranslator(model, speech_processor(), WaitK(1)) for _ in audio]
    found = [[], [], []]
    for part in cuts(len(audio[0]), 2500):
        for row, translator in enumerate(translators):
            found[row] += translator.push(audio[row][part])
    for row, translator in enumerate(translators):
        found[row] += translator.finish()
    assert found == alone and len({str(words) for words in alone}) == 3


# ---- many streams


def run_batch(model, audio, policies, batch, *, seed, drop=None, at=3000):
    """Streams that open at random times and get pieces of random sizes; `drop` is closed in the middle."""
    generator = np.random.default_rng(seed)
    numbers, places = {}, [0] * len(audio)
    found, waiting = [[] for _ in audio], set(range(len(audio)))
    closed = 0
    while waiting:
        row = int(generator.choice(sorted(waiting)))
        if row not in numbers:
            numbers[row] = batch.open(policies[row])
        elif row == drop and places[row] > at:
            before = batch.nbytes
            batch.close(numbers[row])
            closed = before - batch.nbytes
            waiting.discard(row)
        elif places[row] == len(audio[row]):
            batch.finish(numbers[row])
            waiting.discard(row)
        else:
            size = int(generator.integers(1, 5000))
            batch.push(numbers[row], audio[row][places[row] : places[row] + size])
            places[row] = min(places[row] + size, len(audio[row]))
        if generator.random() < 0.4:
            step(batch, numbers, found)
    while batch.waits:
        step(batch, numbers, found)
    return found, closed, numbers


def step(batch, numbers, found):
    rows = {number: row for row, number in numbers.items()}
    for number, words in batch.step().items():
        found[rows[number]] += words


@pytest.mark.parametrize("fields", [*KINDS.values(), {"context": "full"}], ids=[*KINDS, "full"])
def test_streams_of_a_batch_are_what_they_are_alone(fields):
    model = speech_model(seed=2, **fields)
    audio = [noise(0.5 + 0.3 * row, seed=row) for row in range(5)]
    policies = [WaitK(1), WaitK(3), LocalAgreement(2, ahead=4), WaitK(None), WaitK(2)]
    alone = [
        translate(model, samples, whole(samples), policy)[0] for samples, policy in zip(audio, policies, strict=True)
    ]
    batch = TranslatorBatch(model, speech_processor())
    found, closed, numbers = run_batch(model, audio, policies, batch, seed=5, drop=4)
    assert found[:4] == alone[:4] and found[4] == alone[4][: len(found[4])]
    assert sum(map(len, found)) > 6 and closed > 5000
    for row in range(4):
        assert batch.finished(numbers[row])
        batch.close(numbers[row])
    assert batch.nbytes == 0


def test_policies_that_look_at_the_attention_in_a_batch():
    model = speech_model(seed=2)
    audio, policies = [noise(1.2, seed=row) for row in range(3)], [AlignAtt(1), AlignAtt(2), AlignAtt(1, layers=(0,))]
    alone = [
        translate(model, samples, whole(samples), policy)[0] for samples, policy in zip(audio, policies, strict=True)
    ]
    batch = TranslatorBatch(model, speech_processor(), AlignAtt())
    assert run_batch(model, audio, policies, batch, seed=1)[0] == alone
    with pytest.raises(ValueError, match="expected one that looks at the attention as the batch's policy does"):
        batch.open(WaitK(1))


def test_streams_step_together():
    """Encoder and decoder run once for all rows, not once for each."""
    model, calls = speech_model(ends=False), []
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
        for module in (model.encoder.norm, model.decoder.norm)
    ]
    batch = TranslatorBatch(model, speech_processor(), WaitK(1))
    numbers = [batch.open() for _ in range(4)]
    for number in numbers:
        batch.push(number, noise(CHUNK_MS / 1000, seed=number))
    batch.step()
    for hook in hooks:
        hook.remove()
    assert calls == [4, 4]


# ---- text


@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("k", [1, 4, None])
def test_a_text_source_counts_words(k, ratio):
    written = 0
    for seed in range(2):
        model, text = text_model(seed=seed, pre_decision=ratio), "im garten schläft heute der kleine hund"
        ids = text_processor().source_ids(text)
        tokens = greedy_translation(
            model, model.encode(input_ids=torch.tensor([ids])), k=k, max_tokens=SPARE_TOKENS + len(ids)
        )[0]
        translator = StreamingTranslator(model, text_processor(), WaitK(k), max_tokens_per_chunk=ratio)
        words = []
        for part in text.split(" "):
            words += translator.push(f" {part}\n")
        words += translator.finish()
        lies_in = [
            number
            for number, word in enumerate(text.split(), start=1)
            for _ in vocabulary().encode(word)
        ] + [7]  # fmt: skip
        expected, start = [], 0
        for place in range(1, len(tokens) + 1):
            if place == len(tokens) or vocabulary().starts_word(tokens[place]):
                seen = len(ids) if k is None else min((k + place) * ratio, len(ids))
                expected += [(word, lies_in[seen - 1]) for word in vocabulary().decode(tokens[start:place]).split()]
                start = place
        if len(tokens) == SPARE_TOKENS + len(ids):  # a limit for each chunk is a little more, where the last has less
            expected, words = expected[:-1], words[: len(expected) - 1]
        assert told(words) == expected
        written += len(expected)
        assert translator.read_ms == 7
        at_once = StreamingTranslator(model, text_processor(), WaitK(k), max_tokens_per_chunk=ratio)
        assert (at_once.push(text) + at_once.finish())[: len(words)] == words
    assert written > 2


def test_an_empty_text_gives_nothing():
    translator = StreamingTranslator(text_model(seed=1), text_processor())
    assert translator.push(" \n ") == [] and translator.finish() == [] and translator.text == ""


def test_a_word_is_what_it_says():
    assert Word("hund", 720.0, 2, 0) == Word(text="hund", read_ms=720.0, chunk=2, index=0)
