"""Translation as a task: what is drawn, what is trained, what is handed over, and what comes of bad data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("kaldi_native_fbank")
pytest.importorskip("sentencepiece")
pytest.importorskip("sacrebleu")

from leapformer.errors import LeapformerError
from leapformer.tasks.registry import load_recipe
from leapformer.tasks.simulst.audio.features import FeatureStatistics, offline
from leapformer.tasks.simulst.examples import TranslationCollator
from leapformer.tasks.simulst.grammar.sentences import Grammar
from leapformer.tasks.simulst.processor import TranslationProcessor
from leapformer.tasks.simulst.scoring.curves import evaluate_curve, log_path, parse_ks
from leapformer.tasks.simulst.scoring.evaluation import complete_words, simulate, word_ends
from leapformer.tasks.simulst.scoring.instances import read_instances, score
from leapformer.tasks.simulst.scoring.live import translate_live
from leapformer.tasks.simulst.streaming.policies import WaitK
from leapformer.tasks.simulst.text.vocabulary import Vocabulary
from leapformer.training.loading import load_model
from leapformer.training.recipes import RecipeError
from leapformer.training.run import Run
from leapformer.training.train import train
from leapformer.training.trainer import PassSampler
from tests.tasks.simulst.builders import pairs, tiny_content, tiny_recipe, write_recipe, write_speech


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of text and one of speech."""
    folder = tmp_path_factory.mktemp("runs")
    for source in ("text", "speech"):
        recipe, task = tiny_recipe(folder, source=source)
        assert train(recipe, task, folder / source).results is not None
    return folder


@pytest.fixture(scope="module")
def speech(runs):
    recipe, task = tiny_recipe(runs, source="speech")
    return task.prepare(recipe, cache=runs / ".cache")


@pytest.mark.parametrize("source", ["text", "speech"])
def test_a_run_has_a_model_its_processor_and_results(runs, source):
    run = Run(runs / source)
    results, model = run.results(), load_model(run.model_path)
    processor = TranslationProcessor.from_pretrained(run.model_path)
    assert (results["source"], results["attention"], results["steps"]) == (source, "leap", 6)
    assert {"loss", "perplexity", "token_accuracy", "BLEU", "LAAL", "exchanged_BLEU"} <= results["splits"][
        "validation"
    ].keys()
    assert processor.source == model.config.source == source
    assert (processor.statistics is None) == (source == "text")
    assert model.config.vocab_size == len(processor.target_vocabulary)
    losses = [event["loss"] for event in run.metrics() if "loss" in event]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_training_goes_on_as_if_nothing_had_happened(runs, tmp_path, monkeypatch):
    from leapformer.training.callbacks import Stop

    recipe, task = tiny_recipe(runs, source="speech")
    monkeypatch.setattr(Stop, "on_step_end", _stop_after(3, Stop.on_step_end))
    assert train(recipe, task, tmp_path / "run").results is None
    monkeypatch.undo()
    assert train(recipe, task, tmp_path / "run").results is not None
    weights = [load_model(folder / "model").state_dict() for folder in (tmp_path / "run", runs / "speech")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _stop_after(steps, original):
    def on_step_end(self, args, state, control, **rest):
        self.requested = self.requested or state.global_step >= steps
        original(self, args, state, control, **rest)

    return on_step_end


# ---- data


def test_cached_features_are_those_of_the_audio(speech):
    dataset, spoken = speech.dataset("train"), speech.chosen.spoken("train")
    for number in (0, 7, 59):
        exact = offline(spoken[number]["audio"].astype(np.float32) / 32768)
        # float16 has 11 bits: the error is at most 2^-11 of a value.
        torch.testing.assert_close(dataset.features[number], exact, rtol=2**-11, atol=1e-6)
        assert dataset.length(number) == len(exact)


def test_statistics_are_those_of_all_training_frames(speech):
    frames = torch.cat(
        [offline(row["audio"].astype(np.float32) / 32768) for row in speech.chosen.spoken("train")]
    ).double()
    found: FeatureStatistics = speech.processor.statistics
    assert (found.count, found.utterances) == (len(frames), 60)
    torch.testing.assert_close(found.mean, frames.mean(0), rtol=0, atol=2e-3)
    torch.testing.assert_close(found.variance, frames.var(0, correction=0), rtol=2e-3, atol=1e-3)


def test_features_are_computed_once(runs, speech, monkeypatch):
    monkeypatch.setattr("leapformer.tasks.simulst.corpora.feature_cache.offline", None)
    recipe, task = tiny_recipe(runs, source="speech")
    again = task.prepare(recipe, cache=runs / ".cache")
    assert torch.equal(again.dataset("train").features[3], speech.dataset("train").features[3])


def test_batches_hold_what_the_sentences_say(speech):
    dataset, vocabulary = speech.dataset("validation"), speech.processor.target_vocabulary
    batch = TranslationCollator()([dataset[index] for index in range(5)])
    for row in range(5):
        labels = batch["labels"][row]
        tokens = labels[labels >= 0].tolist()
        assert tokens[-1] == 2 and vocabulary.decode(tokens) == pairs("validation")[row][1]
        symbols = batch["ctc_labels"][row]
        assert speech.processor.source_vocabulary.decode(symbols[symbols >= 0].tolist()) == pairs("validation")[row][0]
        frames = int(batch["attention_mask"][row].sum())
        assert torch.equal(batch["input_features"][row, :frames], dataset[row]["input_features"])
    assert batch["k"] is None


def test_draws_depend_on_seed_and_examples_alone(speech):
    items = [speech.dataset("train")[index] for index in range(4)]
    collate = speech.collator
    first = collate(items)
    torch.manual_seed(99)
    second = collate(items)
    assert first["k"] == second["k"] and torch.equal(first["input_features"], second["input_features"])
    ks = [collate([speech.dataset("train")[index]])["k"] for index in range(60)]
    assert set(ks) == {None, 1, 2, 3}
    assert ks.count(None) < 30  # a share of 0.2, so 30 of 60 has probability 1e-6


def test_exchanged_sources(speech):
    dataset = speech.dataset("validation")
    other = dataset.exchanged()
    for index in range(12):
        assert other.reference(index) == dataset.reference(index)
        assert torch.equal(other[index]["input_features"], dataset[(index + 1) % 12]["input_features"])
        assert other.sentences[index].text == dataset.sentences[(index + 1) % 12].text


def test_batches_of_one_length_hold_every_example_once_a_pass():
    lengths = np.random.default_rng(0).integers(1, 100, 64).tolist()
    order = list(PassSampler(64, total=64 * 3, seed=1, lengths=lengths, batch=8))
    counts = np.bincount(order, minlength=64)
    assert counts.tolist() == [3] * 64
    spreads = [np.ptp([lengths[i] for i in order[at : at + 8]]) for at in range(0, 192, 8)]
    plain = list(PassSampler(64, total=64 * 3, seed=1))
    others = [np.ptp([lengths[i] for i in plain[at : at + 8]]) for at in range(0, 192, 8)]
    assert np.mean(spreads) < np.mean(others) / 3
    assert order == list(PassSampler(64, total=64 * 3, seed=1, lengths=lengths, batch=8))


def test_the_grammar_needs_no_files(tmp_path):
    content = tiny_content(tmp_path)
    content["data"] = {"source": "grammar", "limit": 80}
    content["vocabulary"] = {"size": 90, "source_size": 90}
    recipe, task = load_recipe(write_recipe(tmp_path, content))
    data = task.prepare(recipe, cache=tmp_path / ".cache")
    drawn = Grammar(0).sentences("train", 80, seed=0)
    assert [(s.text, s.translation) for s in data.sentences("train")] == [(d.english, d.german) for d in drawn]
    assert len(data.dataset("validation")) == len(data.dataset("test")) == 300
    with pytest.raises(
        LeapformerError, match="the built-in grammar: expected the split train, validation, test, found 'x'"
    ):
        data.dataset("x")
    for section in ({"source": "grammar", "path": "x"}, {"source": "speech"}):
        with pytest.raises(RecipeError, match="data.path: expected"):
            load_recipe(write_recipe(tmp_path, {**content, "data": section}))


def test_long_utterances_are_left_out_of_the_training_alone(runs):
    recipe, task = tiny_recipe(runs, "data.max_seconds=0.5", source="speech")
    data = task.prepare(recipe, cache=runs / ".cache")
    assert 0 < len(data.dataset("train")) < 60 and len(data.dataset("validation")) == 12
    assert max(data.train_lengths) <= 50
    recipe, task = tiny_recipe(runs, "data.max_seconds=0.1", source="speech")
    with pytest.raises(
        LeapformerError, match=r"expected sentences of at most 0.1 s and 200 tokens, found none among 60"
    ):
        task.prepare(recipe, cache=runs / ".cache")


# ---- hand-over


def test_pretraining_hands_its_encoder_over(runs, tmp_path):
    content = tiny_content(runs / "speech-data", source="speech")
    before = write_recipe(tmp_path, {**content, "data": {**content["data"], "target": "transcription"}}, "before")
    main = tiny_content(runs / "speech-data", source="speech")
    main["training"] = {**main["training"], "max_steps": 1, "learning_rate": 1e-12}
    recipe, task = load_recipe(write_recipe(tmp_path, {**main, "pretraining": str(before)}, "main"))
    outcome = train(recipe, task, tmp_path / "run")
    assert outcome.results is not None
    first, model = Run(tmp_path / "run" / "pretraining"), load_model(tmp_path / "run" / "model")
    assert first.recipe()["data"]["target"] == "transcription" and "BLEU" not in first.results()["splits"]["validation"]
    pretrained = load_model(first.model_path)
    for name, weight in pretrained.encoder.state_dict().items():
        torch.testing.assert_close(model.encoder.state_dict()[name], weight, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.ctc_head.weight, pretrained.ctc_head.weight, rtol=0, atol=1e-9)
    assert not (tmp_path / "run" / ".cache").exists()  # features are kept once, beside the runs
    assert outcome.results["pretraining"]["steps"] == 6


def test_pretraining_uses_the_machine_as_the_recipe_does(tmp_path):
    recipe, task = load_recipe("simulst/demo", ["processes=1", "device=cpu", "seed=3", "learning_rate=1.0"])
    before, _ = task.pretraining(recipe)
    named, _ = load_recipe("simulst/demo-transcription")
    found, own = before.training.model_dump(), named.training.model_dump()
    assert found == {**own, "processes": 1, "device": "cpu", "seed": 3} != own


def test_start_from_a_run(runs, tmp_path):
    run = str(runs / "speech")
    recipe, task = tiny_recipe(runs, f"start.run={run}", source="speech")
    model = task.prepare(recipe, cache=runs / ".cache").build_model()
    other = load_model(runs / "speech" / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), other.encoder.parameters(), strict=True))
    assert not torch.equal(model.decoder.embed_tokens.weight, other.decoder.embed_tokens.weight)
    recipe, task = tiny_recipe(runs, f"start.run={run}", "start.take=all", "vocabulary.size=30", source="speech")
    data = task.prepare(recipe, cache=runs / ".cache")
    assert (
        data.processor.target_vocabulary == TranslationProcessor.from_pretrained(other.name_or_path).target_vocabulary
    )
    assert all(torch.equal(a, b) for a, b in zip(data.build_model().parameters(), other.parameters(), strict=True))


def test_starts_that_cannot_be(runs, tmp_path):
    for overrides, message in (
        ([f"start.run={tmp_path / 'none'}"], "expected the folder of a run"),
        ([f"start.run={runs / 'text'}"], "start.run: expected a source of speech, found text"),
    ):
        recipe, task = tiny_recipe(runs, *overrides, source="speech")
        with pytest.raises(LeapformerError, match=message):
            task.prepare(recipe, cache=runs / ".cache")
    recipe, task = tiny_recipe(runs, f"start.run={runs / 'speech'}", "model.encoder_layers=2", source="speech")
    with pytest.raises(LeapformerError, match="expected encoder_layers=2, found 1"):
        task.prepare(recipe, cache=runs / ".cache").build_model()
    with pytest.raises(RecipeError, match="pretraining: expected none where start.run gives the weights"):
        tiny_recipe(runs, "start.run=x", "pretraining=y", source="speech")


# ---- evaluation


def test_words_are_complete_with_the_next_ones_first_piece():
    vocabulary = Vocabulary.train([pair[1] for pair in pairs("train")], 40)
    text = "Der Baum sieht den Zug."
    tokens = vocabulary.encode(text)
    words = complete_words(tokens, vocabulary)
    assert " ".join(word for word, _ in words) == text
    starts = [place for place, token in enumerate(tokens) if vocabulary.piece(token).startswith("▁")]
    assert [place for _, place in words] == [*starts[1:], len(tokens)]
    assert complete_words([], vocabulary) == []


def test_tokens_of_a_source_are_read_with_their_words():
    vocabulary = Vocabulary.train([pair[0] for pair in pairs("train")], 40)
    text = "The man finds the apple."
    reads = word_ends(text, vocabulary)
    assert reads == sorted(reads) and reads[-2:] == [5, 5]
    known = 0
    for count, number in enumerate(reads[:-1], start=1):
        ids = vocabulary.encode(" ".join(text.split()[:number]))
        assert ids[:count] == vocabulary.encode(text)[:count]
        known = max(known, number)
    assert known == 5


@pytest.mark.parametrize("source", ["text", "speech"])
def test_one_sentence_at_a_time_is_the_same(runs, source):
    recipe, task = tiny_recipe(runs, source=source)
    data = task.prepare(recipe, cache=runs / ".cache", tokenizer=task.load_tokenizer(runs / source / "model"))
    model = load_model(runs / source / "model")
    torch.manual_seed(3)
    # An output of its own, with which something is written that does not end at once, or not at all.
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.lm_head.weight.data[:4] *= 0.3
    dataset = data.dataset("validation")
    for k in (1, 3, None):
        together = simulate(model, dataset, k=k, size=400)
        alone = simulate(model, dataset, k=k, size=1)
        assert [each.delays for each in together] == [each.delays for each in alone]
        assert [each.prediction for each in together] == [each.prediction for each in alone]
        for instance in together:
            assert list(instance.delays) == sorted(instance.delays)
            assert all(delay <= instance.source_length for delay in instance.delays)
            if k is None:
                assert set(instance.delays) <= {instance.source_length}
        assert any(instance.delays for instance in together)
        live, factor = translate_live(data, model, split="validation", policy=WaitK(k))
        assert [each.prediction for each in live] == [each.prediction for each in together]
        for one, other in zip(live, together, strict=True):
            assert one.delays == pytest.approx(other.delays, abs=1e-6)
            assert all(time >= delay for time, delay in zip(one.elapsed, one.delays, strict=source == "speech"))
        assert (factor is None) == (source == "text")


@pytest.mark.parametrize("source", ["text", "speech"])
def test_whole_utterances_stop_at_cosformers_maximum_as_streams_do(runs, source):
    recipe, task = tiny_recipe(runs, "decoder_attention=cosformer", "max_target_positions=5", source=source)
    data = task.prepare(recipe, cache=runs / ".cache", tokenizer=task.load_tokenizer(runs / source / "model"))
    torch.manual_seed(3)
    model = data.build_model().eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.eos_token_id = None  # a sentence that never ends by itself
    together = simulate(model, data.dataset("validation"), k=2, size=400, limit=3)
    live, _ = translate_live(data, model, split="validation", policy=WaitK(2), limit=3)
    assert [each.prediction for each in together] == [each.prediction for each in live]
    assert any(each.prediction for each in together)


def test_a_curve_has_a_log_and_scores_for_each_k(runs, tmp_path):
    recipe, task = tiny_recipe(runs)
    data = task.prepare(recipe, cache=runs / ".cache", tokenizer=task.load_tokenizer(runs / "text" / "model"))
    model = load_model(runs / "text" / "model")
    told = []
    ks = parse_ks("1, 3,1")
    assert ks == [1, 3, None]
    points = evaluate_curve(
        tmp_path, "test", ks, write=lambda k: data.simulate(model, split="test", k=k, limit=7), told=told.append
    )
    assert told == points and [point["k"] for point in points] == ks
    for point in points:
        instances = read_instances(log_path(tmp_path, "test", point["k"]))
        assert len(instances) == point["sentences"] == 7
        assert point["chrF"] == score(instances)["chrF"]
        assert json.dumps(point)
    for text in ("0", "1,x", "", "-1"):
        with pytest.raises(LeapformerError, match="--k: expected integers from 1 on"):
            parse_ks(text)


# ---- faults


def test_faults_of_data_and_recipe(runs, tmp_path):
    recipe, task = tiny_recipe(runs, "data.source_language=xx")
    with pytest.raises(
        LeapformerError, match=r"expected the file train.xx \(or train.xx.gz, .xz, .zst\), found no such"
    ):
        task.prepare(recipe, cache=tmp_path)
    recipe, task = tiny_recipe(runs, "vocabulary.size=9")
    with pytest.raises(LeapformerError, match="vocabulary of 9 unigram pieces from 60 lines: "):
        task.prepare(recipe, cache=tmp_path)
    recipe, task = tiny_recipe(runs, f"data.path={tmp_path / 'none'}", source="speech")
    with pytest.raises(LeapformerError, match="none"):
        task.prepare(recipe, cache=tmp_path)
    with pytest.raises(RecipeError, match="model.encoder_attention: expected one of leap, cosformer, linear, softmax"):
        tiny_recipe(runs, "encoder_attention=fast")
    folder = write_speech(tmp_path / "cut")
    (folder / "train.int16").write_bytes(b"12")
    recipe, task = tiny_recipe(runs, f"data.path={folder}", source="speech")
    with pytest.raises(LeapformerError, match=r"train.int16: expected .* bytes by train.jsonl, found 2"):
        task.prepare(recipe, cache=tmp_path)
