"""The data of one recipe of simultaneous translation: its examples, its model, and the metrics of what that writes.

Its parts are the sentences that the recipe chose (`sentences`), what is fitted to them (`fitting`), the examples, and
the scores (`scoring`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError
from leapformer.models import LeapformerForConditionalGeneration
from leapformer.models.loss import IGNORE_INDEX
from leapformer.models.translation_configuration import PLACES, LeapformerTranslationConfig
from leapformer.tasks.model_section import config_of
from leapformer.tasks.simulst.examples import Sentence, TranslationCollator, TranslationDataset
from leapformer.tasks.simulst.fitting import fit_processor
from leapformer.tasks.simulst.processor import TranslationProcessor
from leapformer.tasks.simulst.recipe import DataSection, TranslationRecipe
from leapformer.tasks.simulst.results import RESULTS
from leapformer.tasks.simulst.scoring.evaluation import simulate
from leapformer.tasks.simulst.scoring.given_target import given_target_metrics
from leapformer.tasks.simulst.scoring.instances import Instance, score
from leapformer.tasks.simulst.sentences import ChosenSentences
from leapformer.training.loading import load_model
from leapformer.training.recipes import expand_path
from leapformer.training.run import Run
from leapformer.training.task import ProgressOf, TaskData, untold


class TranslationData(TaskData):
    """The sentences of one recipe, its vocabularies and statistics, and its model."""

    unit = RESULTS.unit

    def __init__(
        self,
        recipe: TranslationRecipe,
        *,
        cache: Path,
        processor: TranslationProcessor | None,
        progress: ProgressOf = untold,
    ) -> None:
        self.recipe, self.progress = recipe, progress
        self.chosen = ChosenSentences(recipe.data, cache=cache, progress=progress)
        self.transcribe = recipe.data.target == "transcription"
        self._datasets: dict[str, TranslationDataset] = {}
        self._start: Run | None = None
        if recipe.start.run is not None:
            self._start = Run(expand_path(recipe.start.run, key="start.run"))
            self._start.results()  # a run that is not finished is no start
        self.tokenizer = self.processor = processor or fit_processor(
            recipe, self.chosen, start=self._start, cache=cache
        )
        self.config()  # its faults come before anything is written
        self.train_dataset = train = self.dataset("train")
        self.train_lengths = [train.length(index) for index in range(len(train))]
        section = recipe.wait_k
        self.collator = TranslationCollator(
            seed=recipe.training.seed,
            max_k=section.max_k,
            whole_share=section.whole_share,
            augmentation=recipe.augmentation.model_dump(),
        )

    # ---- examples

    def sentences(self, split: str) -> list[Sentence]:
        """The sentences of a split as they were read."""
        return self.chosen.sentences(split)

    def dataset(self, split: str) -> TranslationDataset:
        """The examples of a split, opened once.

        Raises:
            LeapformerError: there is no such split.
        """
        if split not in self._datasets:
            sentences = self.sentences(split)
            features = self.chosen.features(split) if self.chosen.is_speech else None
            dataset = TranslationDataset(sentences, self.processor, features=features, transcribe=self.transcribe)
            if split == "train":
                dataset = without_long_ones(dataset, self.recipe.data, where=self.chosen.folder)
            self._datasets[split] = dataset
        return self._datasets[split]

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
            before = load_model(self._start.model_path)
            take_over_all(model, before) if self.recipe.start.take == "all" else self.take_over(model, before)
        return model

    def take_over(self, model: Any, pretrained: Any) -> None:
        """The encoder of a model that transcribes, and its CTC head where that is for the same symbols."""
        try:
            model.take_encoder(pretrained, named=str(pretrained.config.name_or_path or "the pre-training"))
        except ValueError as error:
            raise LeapformerError(str(error)) from None
        mine, theirs = model.ctc_head, pretrained.ctc_head
        if mine is not None and theirs is not None and mine.weight.shape == theirs.weight.shape:
            mine.load_state_dict(theirs.state_dict())

    def check_model(self, model: Any) -> None:
        expected = "speech" if self.chosen.is_speech else "text"
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

    def metrics(
        self, model: Any, dataset: TranslationDataset, indices: Sequence[int], *, told: str = ""
    ) -> dict[str, float]:
        """As `given_target_metrics`, with the recipe's k."""
        k, size = self.recipe.wait_k.eval_k, self._batch_size()
        return given_target_metrics(model, dataset, indices, k=k, size=size, progress=self.progress, told=told)

    def _batch_size(self) -> int:
        """Frames or source tokens of a batch of an evaluation: a state takes four frames."""
        return self.recipe.training.eval_batch_tokens * (4 if self.chosen.is_speech else 1)


def without_long_ones(dataset: TranslationDataset, section: DataSection, *, where: Path) -> TranslationDataset:
    """Training takes no utterance that is longer than the recipe says, nor one without a target."""
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
            f"{where}: expected sentences of at most {section.max_seconds:g} s and {section.max_tokens} tokens, "
            f"found none among {len(dataset)}"
        )
    return dataset if len(kept) == len(dataset) else dataset.of(kept)


def take_over_all(model: Any, before: Any) -> None:
    """All weights of a model: fine-tuning.

    Raises:
        LeapformerError: it is of other sizes.
    """
    try:
        model.load_state_dict(before.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise LeapformerError(f"start.run: expected a model of the same sizes, found another: {reason}") from None
