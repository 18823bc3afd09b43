"""The SimulEval agent: its protocol with stand-ins for SimulEval's classes, and SimulEval itself where it is
installed.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from leapformer.errors import LeapformerError
from leapformer.tasks.simulst import simuleval_agent_path
from leapformer.tasks.simulst.streaming.policies import AlignAtt, LocalAgreement, WaitK
from leapformer.tasks.simulst.streaming.translator import StreamingTranslator
from tests.tasks.simulst.translators import CHUNK_MS, noise, save_run, speech_model, speech_processor

SIMULEVAL = "LEAPFORMER_SIMULEVAL"
ROOT = Path(__file__).parents[3]
REFERENCES = ["der hund", "die katze trinkt milch"]
# What the training needs and the agent must not.
TRAINING_ONLY = ("datasets", "accelerate", "pydantic", "rich", "tensorboard", "sacrebleu", "psutil")


# ---- stand-ins for simuleval 1.1.4, as far as a speech-to-text agent meets them


class States:
    def __init__(self):
        self.reset()

    def reset(self):
        self.source, self.target, self.source_sample_rate = [], [], 0
        self.source_finished = self.target_finished = False


class SpeechToTextAgent:
    def __init__(self, args):
        self.args, self.states = args, States()
        self.reset()

    def reset(self):
        self.states.reset()

    def pushpop(self, segment):
        """Push a segment and take what is written: (content, finished), content None where it reads."""
        self.states.source_finished = segment.finished
        self.states.source += segment.content
        self.states.source_sample_rate = segment.sample_rate
        if self.states.target_finished:
            return None, True
        action = self.policy(self.states)
        if action.is_read():
            return None, False
        self.states.target_finished = action.finished
        return action.content, action.finished


class ReadAction:
    def is_read(self):
        return True


@dataclass
class WriteAction:
    content: str
    finished: bool

    def is_read(self):
        return False


@pytest.fixture
def agent_class(monkeypatch):
    entries = []
    agents, actions, utils = (ModuleType(f"simuleval.{name}") for name in ("agents", "agents.actions", "utils"))
    agents.SpeechToTextAgent, actions.ReadAction, actions.WriteAction = SpeechToTextAgent, ReadAction, WriteAction
    utils.entrypoint = lambda kind: entries.append(kind) or kind
    for module in (ModuleType("simuleval"), agents, actions, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    namespace = {"__name__": "agents"}
    exec(compile(simuleval_agent_path().read_text(), "simuleval_agent.py", "exec"), namespace)
    assert [kind.__name__ for kind in entries] == ["LeapformerAgent"]
    return entries[0]


def play(agent, samples, *, rate=16_000, segment_ms=CHUNK_MS):
    """SimulEval's loop over one sentence: words and the ms that were sent before each."""
    size, sent, words, delays = math.ceil(segment_ms / 1000 * rate), 0, [], []
    finished = False
    while sent < len(samples) or not sent:
        content = samples[sent : sent + size].tolist()
        sent = min(sent + size, len(samples)) or 1
        segment = SimpleNamespace(content=content, sample_rate=rate, finished=sent >= len(samples))
        text, finished = agent.pushpop(segment)
        assert not finished or segment.finished  # else the rest would become another sentence
        new = (text or "").split()
        words += new
        delays += [sent * 1000 / rate] * len(new)
    assert finished
    agent.reset()
    return words, delays


def alone(model, samples, policy, **options):
    policy = policy if isinstance(policy, AlignAtt | LocalAgreement) else WaitK(policy)
    with StreamingTranslator(model, speech_processor(), policy, **options) as translator:
        return translator.push(samples) + translator.finish()


def arguments(agent_class, run, *more):
    parser = ArgumentParser()
    agent_class.add_args(parser)
    return parser.parse_args(["--run", str(run), *more])


@pytest.mark.parametrize("k", [2, 0])
def test_the_agent_writes_what_the_translator_writes_and_carries_nothing_over(agent_class, tmp_path, k):
    model = speech_model(seed=2, dtype=torch.float32)
    agent = agent_class(arguments(agent_class, save_run(tmp_path, model, speech_processor()), "--k", str(k)))
    assert agent_class.add_args.__doc__ and arguments(agent_class, "x").k == 5
    for seed, seconds in ((1, 1.3), (4, 0.75), (1, 1.3)):
        samples = noise(seconds, seed=seed)
        expected = alone(model, samples, k or None)
        words, delays = play(agent, samples)
        assert words == [word.text for word in expected] and len(words) > 0
        assert delays == [word.read_ms for word in expected]
        assert agent.translator is None


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        (["--policy", "local-agreement", "--agreement", "3", "--ahead", "5"], LocalAgreement(3, ahead=5)),
        (["--policy", "align-att", "--frames", "2"], AlignAtt(2)),
    ],
)
def test_the_agent_takes_any_policy(agent_class, tmp_path, options, policy):
    model = speech_model(seed=2, dtype=torch.float32)
    agent = agent_class(arguments(agent_class, save_run(tmp_path, model, speech_processor()), *options))
    samples = noise(1.3, seed=1)
    expected = alone(model, samples, policy)
    words, delays = play(agent, samples)
    assert words == [word.text for word in expected] and len(words) > 0
    assert delays == [word.read_ms for word in expected]


def test_wrong_options_of_the_agent_are_told(agent_class, tmp_path, capsys):
    with pytest.raises(SystemExit):
        arguments(agent_class, tmp_path, "--frames", "0")
    assert "--frames: expected an integer from 1 on, up to 9,999,999, found '0'" in capsys.readouterr().err
    run = save_run(tmp_path, speech_model(dtype=torch.float32), speech_processor())
    with pytest.raises(
        LeapformerError, match="--policy: expected one of wait-k, local-agreement, align-att, found 'x'"
    ):
        agent_class(arguments(agent_class, run, "--policy", "x"))


def test_an_early_end_is_kept_back_and_odd_audio_goes_through(agent_class, tmp_path):
    model = speech_model(seed=2, dtype=torch.float32)
    run = save_run(tmp_path, model, speech_processor())
    agent = agent_class(arguments(agent_class, run, "--k", "1"))
    agent.model.config.eos_token_id = list(range(2, 30))
    words, _ = play(agent, noise(1.0, seed=1))
    agent.model.config.eos_token_id = 2
    assert len(words) < 3
    samples = noise(0.5, seed=2, rate=48_000)
    assert play(agent, samples, rate=48_000)[0] == [word.text for word in alone(model, samples, 1, sample_rate=48_000)]
    assert play(agent, np.zeros(0, np.float32))[0] == []
    assert agent.pushpop(SimpleNamespace(content=[], sample_rate=0, finished=False)) == (None, False)


def test_the_agent_needs_nothing_of_the_training(tmp_path):
    """In a process of its own, where what only the training needs cannot be imported."""
    save_run(tmp_path / "run", speech_model(dtype=torch.float32), speech_processor())
    package = tmp_path / "path" / "simuleval"
    (package / "agents").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "agents" / "__init__.py").write_text("class SpeechToTextAgent:\n    def __init__(self, args): pass\n")
    (package / "agents" / "actions.py").write_text("class ReadAction: pass\nclass WriteAction: pass\n")
    (package / "utils.py").write_text("def entrypoint(kind): return kind\n")
    program = f"""
import sys
for name in {TRAINING_ONLY!r}:
    sys.modules[name] = None
from argparse import Namespace
namespace = {{}}
exec(compile(open({str(simuleval_agent_path())!r}).read(), "agent", "exec"), namespace)
agent = namespace["LeapformerAgent"](Namespace(run={str(tmp_path / "run")!r}, k=5))
print(type(agent.model).__name__)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(package.parent)}, capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert found.stdout.strip() == "LeapformerForConditionalGeneration", found.stderr


@pytest.mark.slow
@pytest.mark.skipif(SIMULEVAL not in os.environ, reason=f"{SIMULEVAL} is not set: a Python that has simuleval 1.1.4")
def test_simuleval_itself_end_to_end(tmp_path):
    import soundfile

    model = speech_model(seed=2, dtype=torch.float32)
    run = save_run(tmp_path / "run", model, speech_processor())
    audio = [noise(1.3, seed=1), noise(0.75, seed=4)]
    paths = []
    for number, samples in enumerate(audio):
        paths.append(str(tmp_path / f"{number}.wav"))
        soundfile.write(paths[-1], samples, 16_000, subtype="FLOAT")
    (tmp_path / "source.txt").write_text("\n".join(paths) + "\n")
    (tmp_path / "target.txt").write_text("\n".join(REFERENCES) + "\n")
    command = [
        os.environ[SIMULEVAL], "-c", "from simuleval.cli import main; main()", "--agent", str(simuleval_agent_path()),
        "--run", str(run), "--k", "2", "--source", "source.txt", "--target", "target.txt", "--source-segment-size",
        str(CHUNK_MS), "--quality-metrics", "BLEU", "--latency-metrics", "LAAL", "AL", "AP", "DAL", "--output", "out",
    ]  # fmt: skip
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "out" / "instances.log").read_text().splitlines()]
    assert len(rows) == 2 and (tmp_path / "out" / "scores.tsv").is_file()
    for row, samples in zip(rows, audio, strict=True):
        expected = alone(model, samples, 2)
        assert row["prediction"] == " ".join(word.text for word in expected)
        assert row["delays"] == pytest.approx([word.read_ms for word in expected])
