"""The table of policies: from a name and options to a policy, and all that is fed from it, shown with a test's own
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile
import torch

pytest.importorskip("kaldi_native_fbank")
pytest.importorskip("sentencepiece")
pytest.importorskip("sacrebleu")

from leapformer.cli import main
from leapformer.errors import LeapformerError
from leapformer.tasks.simulst.processor import TranslationProcessor
from leapformer.tasks.simulst.scoring.curves import log_path, point_name
from leapformer.tasks.simulst.scoring.instances import read_instances, score
from leapformer.tasks.simulst.scoring.live import translate_batched, translate_live
from leapformer.tasks.simulst.streaming.policies import AlignAtt, LocalAgreement, WaitK
from leapformer.tasks.simulst.streaming.policy_registry import (
    POLICIES,
    Option,
    PolicyEntry,
    all_options,
    parse_line,
    parse_policy,
)
from leapformer.tasks.simulst.streaming.policy_requests import Read, Restore, Save, Target, Turn, Write
from leapformer.tasks.simulst.streaming.translator import StreamingTranslator
from leapformer.tasks.simulst.streaming.translator_batch import TranslatorBatch
from leapformer.training.loading import load_model
from leapformer.training.run import Run
from tests.tasks.simulst.builders import tiny_recipe
from tests.tasks.simulst.translators import noise, speech_model, speech_processor

ROOT = Path(__file__).parents[4]
EXAMPLES = [
    ("wait-k", {"k": "2"}, WaitK(2)),
    ("wait-k", {"k": "0"}, WaitK(None)),
    ("local-agreement", {"agreement": "3", "ahead": "6"}, LocalAgreement(3, ahead=6)),
    ("align-att", {"frames": "2"}, AlignAtt(2)),
]


@dataclass(frozen=True)
class ReadSomeWriteOne:
    """Read some chunks, write a token, and so on; the rest when the source has ended."""

    reads: int

    keep_mass = False

    def turn(self, target: Target) -> Turn:
        while target.is_open:
            if target.chunks < self.reads * (target.written + 1) and not target.source_ended:
                yield Read()
            yield Write()


TOY = PolicyEntry(
    "read-write",
    f"{__name__}:ReadSomeWriteOne",
    (Option("reads", "chunks to read for each token", 2, 1),),
    writes="a token for every few chunks",
    sees="all that was read",
    takes="one step a token",
)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(POLICIES, TOY.name, TOY)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of text and speech that have learned nothing."""
    folder = tmp_path_factory.mktemp("runs")
    for source in ("text", "speech"):
        recipe, task = tiny_recipe(folder, source=source)
        data, run = task.prepare(recipe, cache=folder / ".cache"), Run(folder / source)
        torch.manual_seed(3)
        model = data.build_model().eval()
        # An output of its own, with which something is written that does not end at once, or not at all.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        model.lm_head.weight.data[:4] *= 0.3
        run.start(recipe)
        model.save_pretrained(run.model_path)
        data.processor.save_pretrained(run.model_path)
        run.write_results({"name": source, "source": source, "attention": "leap", "splits": {}})
    return folder


@pytest.fixture(scope="module")
def opened(runs):
    """The data and the model of each run."""
    found = {}
    for source in ("text", "speech"):
        recipe, task = tiny_recipe(runs, source=source)
        tokenizer = task.load_tokenizer(runs / source / "model")
        found[source] = (
            task.prepare(recipe, cache=runs / ".cache", tokenizer=tokenizer),
            load_model(runs / source / "model"),
        )
    return found


def one_line(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


# ---- from text to a policy


@pytest.mark.parametrize(("name", "given", "expected"), EXAMPLES)
def test_a_name_and_options_are_a_policy(name, given, expected):
    assert parse_policy(name, given) == expected
    assert parse_policy(name, {**dict.fromkeys(all_options()), **given}) == expected  # None: not given


def test_defaults_are_those_of_the_classes():
    assert [parse_policy(name, {}) for name in POLICIES] == [WaitK(), LocalAgreement(), AlignAtt()]
    assert parse_line("wait-k", {}).values == (5, None)
    assert parse_line("local-agreement", {}).values == (2,)


def test_a_line_has_values_of_one_option_and_others_that_are_fixed():
    line = parse_line("local-agreement", {"agreement": "3, 2,3", "ahead": "6"})
    assert line.values == (3, 2) and line.label == "local-agreement ahead=6" and line.option == "agreement"
    assert [line.policy(value) for value in line.values] == [LocalAgreement(3, ahead=6), LocalAgreement(2, ahead=6)]
    assert point_name(line.label, line.option, 3) == "local-agreement-ahead-6-agreement-3"
    assert parse_line("wait-k", {"k": "1,3"}).values == (1, 3, None)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("x" * 200, {}, "--policy: expected one of wait-k, local-agreement, align-att, found 'xxx"),
        ("wait-k", {"k": "-1"}, "--k: expected an integer from 0 on, up to 9,999,999, found '-1'"),
        ("wait-k", {"k": "1e3"}, "--k: expected an integer from 0 on, up to 9,999,999, found '1e3'"),
        ("wait-k", {"k": "9" * 5000}, "--k: expected an integer from 0 on, up to 9,999,999, found '999"),
        ("local-agreement", {"agreement": "1"}, "--agreement: expected an integer from 2 on, up to 100, found '1'"),
        ("align-att", {"frames": "²"}, "--frames: expected an integer from 1 on, up to 9,999,999, found '²'"),
        ("align-att", {"k": "3"}, r"--k: expected an option of align-att \(--frames\), found one of another policy"),
    ],
)
def test_wrong_names_and_values_are_one_line(name, given, message):
    with pytest.raises(LeapformerError, match=message) as found:
        parse_policy(name, given)
    assert "\n" not in str(found.value) and len(str(found.value)) < 250


@pytest.mark.parametrize("text", ["0", "1,x", "", "1,,2", "-1", "1.5"])
def test_wrong_values_of_a_line_are_one_line(text):
    with pytest.raises(
        LeapformerError, match="--k: expected integers from 1 on with commas between, up to 9,999,999, f"
    ):
        parse_line("wait-k", {"k": text})
    with pytest.raises(LeapformerError, match="--ahead: expected an integer from 1 on, up to 9,999,999, found "):
        parse_line("local-agreement", {"ahead": text})


def test_an_option_may_be_a_number_with_a_point():
    option = Option("share_of_it", "a share", 0.5, 0.25, 1, kind=float)
    assert option.value("0.75") == 0.75 and option.values("1,0.25,1.0") == [1.0, 0.25]
    assert option.flag == "--share-of-it"
    for text in ("nan", "inf", "0.2", "1.5", "-0.5", "."):
        with pytest.raises(LeapformerError, match="--share-of-it: expected a number from 0.25 on, up to 1, found"):
            option.value(text)


def test_options_of_policies_are_no_others_of_the_commands(capsys):
    for command in ("translate", "evaluate"):
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert [shown.count(f"  --{name} ") for name in ("k", "agreement", "ahead", "frames")] == [1, 1, 1, 1]


def test_the_documentation_lists_every_policy():
    rows = [
        f"| `{entry.name}`, `{entry.home.partition(':')[2]}` | {entry.writes} | {entry.sees} | {entry.takes} | "
        f"{', '.join(f'`{option.flag} {option.default}`' for option in entry.options)} |"
        for entry in POLICIES.values()
    ]
    assert "\n".join(rows) in (ROOT / "docs" / "simulst.md").read_text(encoding="utf-8")


# ---- scores


@pytest.mark.parametrize("source", ["text", "speech"])
@pytest.mark.parametrize("policy", [WaitK(2), LocalAgreement(2, ahead=4), AlignAtt(1), ReadSomeWriteOne(2)], ids=repr)
def test_many_sentences_at_a_time_are_what_they_are_live(opened, source, policy):
    data, model = opened[source]
    how = {"split": "validation", "policy": policy, "limit": 2}
    live, _ = translate_live(data, model, **how)
    together = translate_batched(data, model, **how)
    assert [each.prediction for each in together] == [each.prediction for each in live]
    assert [each.delays for each in together] == [each.delays for each in live]
    assert [each.index for each in together] == list(range(2)) and any(each.delays for each in live)
    assert all(each.elapsed == [] for each in together)


@pytest.mark.parametrize("batched", [[], ["--batched"]], ids=["live", "batched"])
def test_evaluate_scores_any_policy(runs, toy, capsys, batched):
    run = Run(runs / "text")
    before = run.results()
    arguments = ["evaluate", run.path, "--split", "test", "--limit", 2, *batched]
    assert main([*map(str, arguments), "--policy", "read-write", "--reads", "1,3"]) == 0
    printed = capsys.readouterr().out
    assert "read-write, reads = 1 BLEU " in printed and "read-write, reads = 3 BLEU " in printed
    assert main([*map(str, arguments), "--policy", "align-att"]) == 0
    assert main([*map(str, arguments), "--k", "1"]) == 0
    assert "offline  BLEU " in capsys.readouterr().out
    results = run.results()
    assert {**results, "curves": None, "policy_curves": None} == {**before, "curves": None, "policy_curves": None}
    assert [point["k"] for point in results["curves"]["test"]] == [1, None]
    toy_line, align_att = results["policy_curves"]["test"]
    assert (toy_line["label"], toy_line["option"]) == ("read-write", "reads")
    assert [point["reads"] for point in toy_line["points"]] == [1, 3]
    assert [align_att["label"], align_att["option"], align_att["points"][0]["frames"]] == ["align-att", "frames", 1]
    for point in toy_line["points"]:
        instances = read_instances(log_path(run.path, "test", f"read-write-reads-{point['reads']}"))
        assert len(instances) == point["sentences"] == 2
        assert {name: point[name] for name in ("BLEU", "LAAL")} == {
            name: score(instances)[name] for name in ("BLEU", "LAAL")
        }
    assert toy_line["points"][0]["AP"] < toy_line["points"][1]["AP"]
    # Measured anew, a line takes its own place and no other's.
    assert main([*map(str, arguments), "--policy", "read-write", "--reads", "2"]) == 0
    labels = {line["label"]: line["points"] for line in run.results()["policy_curves"]["test"]}
    assert set(labels) == {"read-write", "align-att"} and [point["reads"] for point in labels["read-write"]] == [2]


def test_translate_takes_any_policy(runs, toy, tmp_path, capsys):
    run, samples = runs / "speech", noise(1.0, seed=1)
    soundfile.write(tmp_path / "speech.wav", samples, 16_000, subtype="FLOAT")
    model, processor = load_model(run / "model"), TranslationProcessor.from_pretrained(run / "model")
    with StreamingTranslator(model, processor, ReadSomeWriteOne(1)) as translator:
        words = translator.push(samples) + translator.finish()
    assert main(["translate", str(run), str(tmp_path / "speech.wav"), "--policy", "read-write", "--reads", "1"]) == 0
    assert capsys.readouterr().out == " ".join(word.text for word in words) + "\n" and words
    found = one_line(capsys, "translate", run, "x.wav", "--policy", "read-write", "--reads", "0")
    assert "--reads: expected an integer from 1 on, up to 9,999,999, found '0'" in found


def test_wrong_evaluations_are_one_line(runs, capsys):
    run = runs / "text"
    assert "--policy: expected one of wait-k, local-agreement, align-att, found 'read-write'" in one_line(
        capsys, "evaluate", run, "--policy", "read-write"
    )
    assert "--frames: expected integers from 1 on with commas between, up to 9,999,999, found '0'" in one_line(
        capsys, "evaluate", run, "--policy", "align-att", "--frames", "2,0"
    )
    assert "--frames: expected an option of wait-k (--k), found one of another policy" in one_line(
        capsys, "evaluate", run, "--frames", "2"
    )
    assert "--k: expected integers from 1 on" in one_line(capsys, "evaluate", run, "--k", "0")


# ---- what a policy must not do


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([Restore()], "policy Scripted: expected Save before Restore, found none"),
        ([Save(), Restore(), Restore()], "policy Scripted: expected Save before Restore, found none"),
        ([Write()] * 90, "policy Scripted: expected no Write where the sentence has ended or is full, found one"),
        ([Write(token=2), Write()], "policy Scripted: expected no Write where the sentence has ended or is full"),
        (["write"], "policy Scripted: expected Read, Write, Save or Restore, found 'write'"),
    ],
)
def test_a_policy_that_asks_for_what_cannot_be_is_told(requests, message):
    class Scripted:
        keep_mass = False

        def turn(self, target):
            yield from (request for request in requests)  # which takes answers, as a list does not

    translator = StreamingTranslator(speech_model(ends=True), speech_processor(), Scripted())
    with pytest.raises(ValueError, match=message):
        translator.push(noise(0.13))


def test_what_is_taken_back_is_as_if_it_had_not_been_written():
    """Words, tokens, the end and the decoder alike; what is remembered comes back with the next turn."""
    model, memories = speech_model(seed=2, dtype=torch.float32), []

    class Wavering:
        keep_mass = False

        def turn(self, target):
            memories.append(target.memory)
            before = (target.last, target.written, target.ended)
            yield Save()
            for token in (*speech_processor().target_vocabulary.encode("der hund im garten"), 2):
                yield Write(token=token)
            assert target.ended
            yield Restore()
            assert (target.last, target.written, target.ended) == before
            if target.is_open:
                yield Write()
            yield Read(memory=target.written)

    class Plain:
        keep_mass = False

        def turn(self, target):
            if target.is_open:
                yield Write()

    found = []
    for policy in (Wavering(), Plain()):
        batch = TranslatorBatch(model, speech_processor(), policy)
        stream, words = batch.open(), []
        batch.push(stream, noise(1.6, seed=1))
        while batch.waits:
            words += batch.step().get(stream, [])
        found.append((words, batch.nbytes))
    assert found[0] == found[1] and len(found[0][0]) > 1
    assert memories == [None, *range(1, len(memories))]
