"""Simultaneous translation as a task of the training: speech or text in one language, text in another, wait-k.

Letters: B utterances, T target tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from leapformer.errors import LeapformerError
from leapformer.files.checksums import is_sound, write_sum
from leapformer.files.showing import shown
from leapformer.files.writing import make_folder
from leapformer.models import LeapformerForConditionalGeneration
from leapformer.models.loss import IGNORE_INDEX
from leapformer.models.translation import ENCODER_FIELDS
from leapformer.models.translation_configuration import PLACES, LeapformerTranslationConfig
from leapformer.tasks.model_section import build_config, config_of, model_fields
from leapformer.tasks.preparation import BadRows
from leapformer.tasks.simulst.audio.features import FeatureStatistics
from leapformer.tasks.simulst.corpora.feature_cache import CachedFeatures
from leapformer.tasks.simulst.corpora.prepared import SpokenSplit
from leapformer.tasks.simulst.corpora.spoken import read_pairs
from leapformer.tasks.simulst.examples import Sentence, TranslationCollator, TranslationDataset
from leapformer.tasks.simulst.grammar.sentences import Grammar
from leapformer.tasks.simulst.processor import TranslationProcessor, open_translation
from leapformer.tasks.simulst.results import RESULTS
from leapformer.tasks.simulst.scoring.evaluation import batches_by_length, simulate
from leapformer.tasks.simulst.scoring.instances import Instance, score
from leapformer.tasks.simulst.text.vocabulary import Vocabulary
from leapformer.training.loading import load_model
from leapformer.training.recipes import MOST_TOKENS, Recipe, Section, expand_path, read_recipe, resolve_recipe
from leapformer.training.run import Run
from leapformer.training.task import ProgressOf, Task, TaskData, untold

SET_BY_DATA = ("source", "num_features", "source_vocab_size", "ctc_vocab_size")
GRAMMAR_SENTENCES = 20_000  # for training
HELD_OUT = 300  # each for validation and the test
# Encoder fields that a recipe for pre-training takes from the recipe that it comes before.
_SHARED = tuple(name for name in ENCODER_FIELDS if name not in SET_BY_DATA)
# What it takes of that recipe's training: the seed, and how the machine is used.
_SHARED_TRAINING = ("seed", "device", "processes", "bf16", "gradient_checkpointing", "compile")


class DataSection(Section):
    """Which sentences, and how many of them."""

    source: Literal["speech", "text", "grammar"] = "speech"
    path: str | None = Field(
        default=None,
        description="speech: folder that `leapformer data prepare speech-...` filled; text: folder with SPLIT.LANGUAGE files; "
        "grammar: none, text of the built-in grammar",
    )
    source_language: str = "en"
    target_language: str = "de"
    target: Literal["translation", "transcription"] = Field(
        default="translation", description="transcription: write what was said, in its own language"
    )
    splits: dict[str, str] = Field(
        default_factory=dict, description="text: names of files for train, validation, test where they differ"
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        le=10**9,
        description="training sentences to take, from the start; none: all (grammar: 20,000)",
    )
    max_seconds: float = Field(
        default=30.0, gt=0, le=86_400, description="speech: longer utterances are left out of the training"
    )
    max_tokens: int = Field(
        default=200, ge=1, le=MOST_TOKENS, description="longer targets are left out of the training"
    )

    @model_validator(mode="after")
    def _check_path(self) -> DataSection:
        if (self.path is None) != (self.source == "grammar"):
            expected = "none with the source grammar" if self.source == "grammar" else "a folder"
            raise ValueError(f"data.path: expected {expected}, found {shown(self.path)}")
        return self


class VocabularySection(Section):
    """sentencepiece vocabularies, trained on the training split."""

    kind: Literal["unigram", "bpe", "char", "word"] = "unigram"
    size: int = Field(default=10_000, ge=8, le=10**6, description="of the target")
    source_size: int = Field(
        default=10_000, ge=8, le=10**6, description="of a text source, of transcripts and of the CTC head"
    )


class WaitKSection(Section):
    """Multi-path wait-k: a k for every batch, so that one model serves every latency (arXiv 2005.08595)."""

    max_k: int = Field(default=9, ge=0, le=10**6, description="k is drawn from 1 to it; 0: always the whole source")
    whole_share: float = Field(default=0.1, ge=0, le=1, description="share of batches that see the whole source")
    eval_k: int | None = Field(default=5, ge=1, le=10**6, description="k of the validation; none: the whole source")


class AugmentationSection(Section):
    """SpecAugment (arXiv 1904.08779), speed and vocal tract length, for speech in training."""

    frequency_width: int = Field(default=27, ge=0, le=10**4)
    frequency_masks: int = Field(default=1, ge=0, le=100)
    time_width: int = Field(default=100, ge=0, le=10**6)
    time_masks: int = Field(default=1, ge=0, le=100)
    time_share: float = Field(default=1.0, ge=0, le=1, description="longest mask as a share of the utterance")
    speed: float = Field(default=0.0, ge=0, lt=0.5, description="0.1: utterances become up to 10 % longer or shorter")
    vocal_tract: float = Field(
        default=0.0, ge=0, lt=0.5, description="0.1: formants lie up to 10 % higher or lower (Jaitly and Hinton 2013)"
    )


class StartSection(Section):
    """Weights to start from."""

    run: str | None = Field(default=None, description="folder of a finished run")
    take: Literal["encoder", "all"] = Field(
        default="encoder",
        description="encoder: with its features' statistics; all: fine-tuning, with the vocabularies too",
    )


class TranslationRecipe(Recipe):
    """A recipe with `task: simulst`."""

    data: DataSection
    vocabulary: VocabularySection = Field(default_factory=VocabularySection)
    wait_k: WaitKSection = Field(default_factory=WaitKSection)
    augmentation: AugmentationSection = Field(default_factory=AugmentationSection)
    pretraining: str | None = Field(
        default=None, description="recipe that is trained first, on the same data, and gives its encoder"
    )
    start: StartSection = Field(default_factory=StartSection)

    @field_validator("model", mode="after")
    @classmethod
    def _check_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        build_config(model, config_class=LeapformerTranslationConfig)
        return model

    @model_validator(mode="after")
    def _check_start(self) -> TranslationRecipe:
        if self.pretraining and self.start.run:
            raise ValueError("pretraining: expected none where start.run gives the weights, found both")
        return self


class TranslationData(TaskData):
    """The sentences of one recipe, its vocabularies and statistics, and its model."""

    unit = RESULTS.unit

    def __init__(
        self, recipe: TranslationRecipe, *, cache: Path, processor: TranslationProcessor | None,
        progress: ProgressOf = untold,
    ) -> None:  # fmt: skip
        self.recipe, self.cache, self.progress = recipe, cache, progress
        self.is_speech = recipe.data.source == "speech"
        self.folder = expand_path(recipe.data.path or "grammar", key="data.path")
        self.transcribe = recipe.data.target == "transcription"
        self._datasets: dict[str, TranslationDataset] = {}
        self._spoken: dict[str, SpokenSplit] = {}
        self._start: Run | None = None
        if recipe.start.run is not None:
            self._start = Run(expand_path(recipe.start.run, key="start.run"))
            self._start.results()  # a run that is not finished is no start
        self.tokenizer = self.processor = processor or self._build_processor()
        self.config()  # its faults come before anything is written
        self.train_dataset = train = self.dataset("train")
        self.train_lengths = [train.length(index) for index in range(len(train))]
        section = recipe.wait_k
        self.collator = TranslationCollator(  # type: ignore[assignment]
            seed=recipe.training.seed,
            max_k=section.max_k,
            whole_share=section.whole_share,
            augmentation=recipe.augmentation.model_dump(),
        )

    # ---- sentences

    def dataset(self, split: str) -> TranslationDataset:
        """The examples of a split, opened once.

        Raises:
            LeapformerError: there is no such split.
        """
        if split not in self._datasets:
            sentences = self.sentences(split)
            features = self._features(split) if self.is_speech else None
            dataset = TranslationDataset(sentences, self.processor, features=features, transcribe=self.transcribe)
            if split == "train":
                dataset = self._without_long_ones(dataset)
            self._datasets[split] = dataset
        return self._datasets[split]

    def sentences(self, split: str) -> list[Sentence]:
        """The sentences of a split as they were read."""
        section = self.recipe.data
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
        sizes = {"train": self.recipe.data.limit or GRAMMAR_SENTENCES, "validation": HELD_OUT, "test": HELD_OUT}
        if split not in sizes:
            raise LeapformerError(f"the built-in grammar: expected the split {', '.join(sizes)}, found {shown(split)}")
        drawn = Grammar(0).sentences(split, sizes[split], seed=0)
        return [Sentence(each.english, each.german) for each in drawn]

    def spoken(self, split: str) -> SpokenSplit:
        """The audio of a split."""
        if split not in self._spoken:
            self._spoken[split] = SpokenSplit(self.folder, split)
        return self._spoken[split]

    def _features(self, split: str) -> CachedFeatures:
        spoken = self.spoken(split)
        key = json.dumps(spoken.card["splits"][split]["sha256"], sort_keys=True)
        return CachedFeatures(spoken, key=key, cache=self.cache, progress=self.progress)

    def _without_long_ones(self, dataset: TranslationDataset) -> TranslationDataset:
        """Training takes no utterance that is longer than the recipe says, nor one without a target."""
        section = self.recipe.data
        frames = section.max_seconds * 100
        kept = [
            sentence
            for index, sentence in enumerate(dataset.sentences)
            if dataset.reference(index)
            and 0 < dataset.length(index)
            and (dataset.features is None or dataset.length(index) <= frames)
            and len(dataset.labels[index]) <= section.max_tokens
        ]
        if not kept:
            raise LeapformerError(
                f"{self.folder}: expected sentences of at most {section.max_seconds:g} s and {section.max_tokens} tokens, "
                f"found none among {len(dataset)}"
            )
        if len(kept) == len(dataset):
            return dataset
        return TranslationDataset(kept, self.processor, features=dataset.features, transcribe=self.transcribe)

    # ---- vocabularies and statistics

    def _build_processor(self) -> TranslationProcessor:
        section, before = self.recipe.data, None
        if self._start is not None:
            before = TranslationProcessor.from_pretrained(self._start.model_path)
            expected = "speech" if self.is_speech else "text"
            if before.source != expected:
                raise LeapformerError(f"start.run: expected a source of {expected}, found {before.source}")
            if self.recipe.start.take == "all":
                return before
        return TranslationProcessor(
            target_vocabulary=self._vocabulary(of_source=self.transcribe),
            statistics=self._statistics() if before is None else before.statistics,
            source_vocabulary=self._vocabulary(of_source=True) if self._needs_source_vocabulary() else None,
            source_language=section.source_language,
            target_language=section.source_language if self.transcribe else section.target_language,
        )

    def _needs_source_vocabulary(self) -> bool:
        return not self.is_speech or bool(self.recipe.model.get("ctc_weight"))

    def _vocabulary(self, *, of_source: bool) -> Vocabulary:
        section = self.recipe.vocabulary
        size = section.source_size if of_source else section.size
        lines = [each.text if of_source else each.translation for each in self.sentences("train")]
        digest = hashlib.sha256(json.dumps([section.kind, size, lines]).encode()).hexdigest()[:16]
        path = self.cache / f"vocabulary-{digest}.spm"
        if not is_sound(path):
            make_folder(self.cache)
            Vocabulary.train([line for line in lines if line], size, kind=section.kind).save(path)
            write_sum(path, shared=True)
        return Vocabulary.load(path)

    def _statistics(self) -> FeatureStatistics | None:
        """Of the training split, computed once."""
        if not self.is_speech:
            return None
        features = self._features("train")
        path = features.path.with_suffix(".safetensors")
        if not is_sound(path):
            features.statistics().save(path)
            write_sum(path, shared=True)
        return FeatureStatistics.load(path)

    # ---- the model

    def config(self) -> LeapformerTranslationConfig:
        processor = self.processor
        set_by_data: dict[str, Any] = {"source": processor.source, "vocab_size": len(processor.target_vocabulary)}
        if processor.source_vocabulary is not None:
            size = len(processor.source_vocabulary)
            set_by_data |= {"source_vocab_size": size, "ctc_vocab_size": size}
        return config_of(self.recipe, config_class=LeapformerTranslationConfig, **set_by_data)

    def build_model(self) -> LeapformerForConditionalGeneration:
        model = LeapformerForConditionalGeneration(self.config())
        if self._start is not None:
            self.take_over(model, load_model(self._start.model_path), everything=self.recipe.start.take == "all")
        return model

    def take_over(self, model: Any, pretrained: Any, *, everything: bool = False) -> None:
        """The encoder of a model that transcribes, and its CTC head where that is for the same symbols; or all weights."""
        if everything:
            try:
                model.load_state_dict(pretrained.state_dict())
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise LeapformerError(
                    f"start.run: expected a model of the same sizes, found another: {reason}"
                ) from None
            return
        try:
            model.take_encoder(pretrained, named=str(pretrained.config.name_or_path or "the pre-training"))
        except ValueError as error:
            raise LeapformerError(str(error)) from None
        mine, theirs = model.ctc_head, pretrained.ctc_head
        if mine is not None and theirs is not None and mine.weight.shape == theirs.weight.shape:
            mine.load_state_dict(theirs.state_dict())

    def check_model(self, model: Any) -> None:
        expected = "speech" if self.is_speech else "text"
        if model.config.source != expected:
            raise LeapformerError(
                f"data.source: expected {model.config.source}, which the model takes, found {expected}"
            )

    def describe_model(self, model: Any) -> dict[str, Any]:
        config = model.config
        places = [getattr(config, place) for place in PLACES]
        return {
            "attention": places[0] if len(set(places)) == 1 else "/".join(places),
            "variant": config.variant,
            "conv_width": config.conv_width,
            "source": config.source,
            "context": config.context,
        }

    # ---- metrics

    def count_targets(self, batch: dict[str, Any]) -> int:
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def quick_metrics(self, model: Any) -> dict[str, float]:
        """Loss, without smoothing and CTC, and accuracy on sentences spread evenly over the validation set."""
        dataset = self.dataset("validation")
        tokens = sum(map(len, dataset.labels))
        every = max(1, round(tokens / self.recipe.training.eval_tokens))
        found = self.metrics(model, dataset, range(0, len(dataset), every))
        return {"loss": found["loss"], "token_accuracy": found["token_accuracy"]}

    def evaluate(self, model: Any, *, split: str) -> dict[str, Any]:
        """Loss of a whole split, and the quality of what the model writes with the recipe's k."""
        dataset = self.dataset(split)
        found = self.metrics(model, dataset, range(len(dataset)), told=f"evaluating the {split} split")
        scores = score(self.simulate(model, split=split, k=self.recipe.wait_k.eval_k))
        if self.transcribe:
            return {"metrics": {**found, "chrF": scores["chrF"]}}
        control = score(self.simulate(model, split=split, k=self.recipe.wait_k.eval_k, exchanged=True))["BLEU"]
        shown = {name: scores[name] for name in ("BLEU", "chrF", "AL", "LAAL")}
        return {"metrics": {**found, "k": self.recipe.wait_k.eval_k, **shown, "exchanged_BLEU": control}}

    def simulate(
        self, model: Any, *, split: str, k: int | None, limit: int | None = None, exchanged: bool = False
    ) -> list[Instance]:
        """The log of what the model would write live, of the first `limit` sentences; see `simulst.evaluation`.

        Arguments:
            exchanged: every sentence gets the source of the next: a model that listens then scores next to nothing.
        """
        was_training = model.training
        model.eval()
        dataset = self.dataset(split)
        if exchanged:
            dataset = dataset.exchanged()
        instances = simulate(model, dataset, k=k, size=self._batch_size(), limit=limit, progress=self.progress)
        model.train(was_training)
        return instances

    def _batch_size(self) -> int:
        """Frames or source tokens of a batch of an evaluation: a state takes four frames."""
        return self.recipe.training.eval_batch_tokens * (4 if self.is_speech else 1)

    @torch.no_grad()
    def metrics(
        self, model: Any, dataset: TranslationDataset, indices: Sequence[int], *, told: str = ""
    ) -> dict[str, float]:
        """Mean loss in nats per token (no smoothing, no CTC), perplexity and accuracy, the target being given, with eval_k."""
        was_training = model.training
        model.eval()
        collate = TranslationCollator()
        batches = batches_by_length(dataset, indices, size=self._batch_size())
        nats, right, count = 0.0, 0, 0
        for number in self.progress(range(len(batches)), told) if told else range(len(batches)):
            batch = collate([dataset[index] for index in batches[number]])
            batch["k"] = self.recipe.wait_k.eval_k
            batch = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in batch.items()}
            found = model(**batch)
            real = batch["labels"] != IGNORE_INDEX
            tokens = int(real.sum())
            nats += float(found.nll) * tokens
            right += int((found.logits.argmax(-1) == batch["labels"])[real].sum())
            count += tokens
        model.train(was_training)
        loss = nats / count
        perplexity = float(torch.tensor(loss).exp())
        return {"loss": loss, "perplexity": perplexity, "token_accuracy": right / count, "sentences": len(indices)}


class TranslationTask(Task):
    """`task: simulst`."""

    name = "simulst"
    recipe_type = TranslationRecipe
    results = RESULTS
    model_classes = (LeapformerForConditionalGeneration,)
    model_fields = model_fields(*SET_BY_DATA, config_class=LeapformerTranslationConfig)

    def prepare(
        self, recipe: TranslationRecipe, *, cache: Path, tokenizer: Any = None, progress: ProgressOf = untold
    ) -> TranslationData:
        """Open the data; features, their statistics and vocabularies are computed once and kept under `cache`."""
        return TranslationData(recipe, cache=cache, processor=tokenizer, progress=progress)

    def load_tokenizer(self, folder: Path) -> TranslationProcessor:
        return TranslationProcessor.from_pretrained(folder)

    def open(self, folder: Path) -> tuple[Any, TranslationProcessor]:
        return open_translation(folder)

    def pretraining(self, recipe: TranslationRecipe) -> tuple[Recipe, Task] | None:
        """The recipe that `pretraining` names, on this recipe's data, with its encoder, vocabularies and seed, on its device."""
        if recipe.pretraining is None:
            return None
        content = read_recipe(recipe.pretraining)
        own, theirs = recipe.to_dict(), dict(content.get("data", {}))
        content["data"] = {**own["data"], "target": theirs.get("target", "transcription")}
        content["vocabulary"] = own["vocabulary"]
        shared = {name: recipe.model[name] for name in _SHARED if name in recipe.model}
        content["model"] = {**content.get("model", {}), **shared}
        content["training"] = {
            **content.get("training", {}),
            **{name: own["training"][name] for name in _SHARED_TRAINING},
        }
        resolved = resolve_recipe(content, schema=TranslationRecipe, model_fields=self.model_fields)
        return resolved, self


def _find(folder: Path, name: str) -> Path:
    """A file of this name, compressed or not."""
    for path in (folder / name, *(folder / f"{name}{suffix}" for suffix in (".gz", ".xz", ".zst"))):
        if path.is_file():
            return path
    raise LeapformerError(f"{folder}: expected the file {name} (or {name}.gz, .xz, .zst), found no such file")


TASK = TranslationTask()
