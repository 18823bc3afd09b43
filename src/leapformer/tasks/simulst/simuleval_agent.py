"""An agent for SimulEval 1.1.4, which scores a trained run by playing audio to it.

    simuleval --agent simuleval_agent.py --run runs/NAME --policy wait-k --k 5 --source source.txt \\
        --target target.txt --source-segment-size 360 --quality-metrics BLEU --latency-metrics LAAL AL AP DAL --output
            scores

SimulEval's pins conflict with those of the training, so it lives in an environment of its own: with torch, transformers
and leapformer, kaldi-native-fbank, sentencepiece, soundfile, and soxr for audio of another rate than 16 kHz. Nothing
else of leapformer is imported here.

SimulEval calls `policy` after each segment, and once after the last; whatever is not written then is lost. Where a
sentence is said to be finished before its source is, SimulEval begins a new one with the rest of the audio, so an early
end is kept back.
"""

# SimulEval lives in an environment of its own.
# pyright: reportMissingImports=false

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from simuleval.agents import SpeechToTextAgent
from simuleval.agents.actions import ReadAction, WriteAction
from simuleval.utils import entrypoint

from leapformer.errors import LeapformerError
from leapformer.tasks.simulst.processor import open_translation
from leapformer.tasks.simulst.streaming.policy_registry import DEFAULT, POLICIES, Option, all_options, entry_of
from leapformer.tasks.simulst.streaming.translator import StreamingTranslator


def _type_of(option: Option) -> Callable[[str], Any]:
    """What the parser calls with an option's text."""

    def value(text: str) -> Any:
        try:
            return option.value(text)
        except LeapformerError as error:
            raise ArgumentTypeError(str(error)) from None

    return value


@entrypoint
class LeapformerAgent(SpeechToTextAgent):
    """Any policy with the model of a run; a stream of its own for every sentence."""

    def __init__(self, args: Namespace) -> None:
        folder = Path(args.run) / "model"
        self.model, self.processor = open_translation(folder)
        entry = entry_of(getattr(args, "policy", DEFAULT))
        self.how = entry.make(**{name: getattr(args, name) for name in all_options() if hasattr(args, name)})
        self.translator: StreamingTranslator | None = None
        self.taken = 0
        super().__init__(args)

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        """--run, --policy and the policies' options of the command line."""
        parser.add_argument("--run", required=True, help="folder of a trained run")
        parser.add_argument("--policy", default=DEFAULT, help=", ".join(POLICIES))
        for owners in all_options().values():
            option = owners[0][1]
            text = "; ".join(f"{entry.name}: {each.described()}" for entry, each in owners)
            # Of several policies each has a default of its own.
            default = option.default if len(owners) == 1 else SUPPRESS
            parser.add_argument(option.flag, dest=option.name, type=_type_of(option), default=default, help=text)

    def reset(self) -> None:
        """Another sentence comes: nothing of the last one stays."""
        super().reset()
        if self.translator is not None:
            self.translator.close()
        self.translator, self.taken = None, 0

    def policy(self, states: Any = None) -> Any:
        """Take what is new of the source, and write the words that are complete with it."""
        states = self.states if states is None else states
        if self.translator is None:
            if not states.source and not states.source_finished:
                return ReadAction()
            # An empty source comes without a sample rate.
            rate = states.source_sample_rate or 16_000
            self.translator = StreamingTranslator(self.model, self.processor, self.how, sample_rate=rate)
        new = np.asarray(states.source[self.taken :], dtype=np.float32)
        self.taken += len(new)
        words = self.translator.push(new)
        if states.source_finished:
            words += self.translator.finish()
        text = " ".join(word.text for word in words)
        if states.source_finished:
            return WriteAction(text, finished=True)
        return WriteAction(text, finished=False) if text else ReadAction()

    def to(self, device: str, *args: Any, **kwargs: Any) -> None:
        """Move the model."""
        self.model.to(device)
