"""The sentences that a recipe chose: of prepared speech, of text files or of the built-in grammar."""

from __future__ import annotations

import json
from pathlib import Path

from leapformer.errors import LeapformerError
from leapformer.files.showing import shown
from leapformer.tasks.preparation import BadRows
from leapformer.tasks.simulst.corpora.feature_cache import CachedFeatures
from leapformer.tasks.simulst.corpora.prepared import SpokenSplit
from leapformer.tasks.simulst.corpora.spoken import read_pairs
from leapformer.tasks.simulst.examples import Sentence
from leapformer.tasks.simulst.grammar.sentences import Grammar
from leapformer.tasks.simulst.recipe import DataSection
from leapformer.training.recipes import expand_path
from leapformer.training.task import ProgressOf

GRAMMAR_SENTENCES = 20_000  # for training
HELD_OUT = 300  # each for validation and the test


class ChosenSentences:
    """The sentences, the audio and the features of a recipe's section `data`, by split."""

    def __init__(self, section: DataSection, *, cache: Path, progress: ProgressOf) -> None:
        self.section, self.cache, self.progress = section, cache, progress
        self.is_speech = section.source == "speech"
        self.folder = expand_path(section.path or "grammar", key="data.path")
        self._spoken: dict[str, SpokenSplit] = {}

    def sentences(self, split: str) -> list[Sentence]:
        """The sentences of a split as they were read."""
        section = self.section
        if section.source == "text":
            name = section.splits.get(split, split)
            files = [
                _find(self.folder, f"{name}.{code}") for code in (section.source_language, section.target_language)
            ]
            found = [Sentence(pair.text, pair.translation) for pair in read_pairs(files[0], files[1], BadRows(False))]
        elif section.source == "grammar":
            found = self._grammar(split)
        else:
            found = [
                Sentence(
                    row["text"], row["translation"], f"{self.folder.name}/{split}/{row['id']}", row["samples"] / 16, n
                )
                for n, row in enumerate(self.spoken(split).rows)
            ]
        return found[: section.limit] if split == "train" else found

    def _grammar(self, split: str) -> list[Sentence]:
        sizes = {"train": self.section.limit or GRAMMAR_SENTENCES, "validation": HELD_OUT, "test": HELD_OUT}
        if split not in sizes:
            raise LeapformerError(f"the built-in grammar: expected the split {', '.join(sizes)}, found {shown(split)}")
        drawn = Grammar(0).sentences(split, sizes[split], seed=0)
        return [Sentence(each.english, each.german) for each in drawn]

    def spoken(self, split: str) -> SpokenSplit:
        """The audio of a split."""
        if split not in self._spoken:
            self._spoken[split] = SpokenSplit(self.folder, split)
        return self._spoken[split]

    def features(self, split: str) -> CachedFeatures:
        """Of every utterance of a split, computed once."""
        spoken = self.spoken(split)
        key = json.dumps(spoken.card["splits"][split]["sha256"], sort_keys=True)
        return CachedFeatures(spoken, key=key, cache=self.cache, progress=self.progress)


def _find(folder: Path, name: str) -> Path:
    """A file of this name, compressed or not."""
    for path in (folder / name, *(folder / f"{name}{suffix}" for suffix in (".gz", ".xz", ".zst"))):
        if path.is_file():
            return path
    raise LeapformerError(f"{folder}: expected the file {name} (or {name}.gz, .xz, .zst), found no such file")
