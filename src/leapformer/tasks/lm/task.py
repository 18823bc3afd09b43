"""Language modelling as a task of the training: corpora, tokenizers, packed blocks and metrics behind one recipe.

Letters: B blocks, T tokens of a block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedTokenizerFast

from leapformer.errors import LeapformerError
from leapformer.files.checksums import is_sound, write_sums
from leapformer.files.writing import staged_folder
from leapformer.models import LeapformerForCausalLM
from leapformer.tasks.lm.baselines import count_baselines, count_word_baselines
from leapformer.tasks.lm.corpora import Corpus, load_corpus
from leapformer.tasks.lm.metrics import LossByPosition
from leapformer.tasks.lm.packing import EncodedSplit, PackedCollator, PackedDataset, check_context, encode_split
from leapformer.tasks.lm.results import RESULTS
from leapformer.tasks.lm.tokenizers import build_tokenizer
from leapformer.tasks.model_section import config_of, model_fields, provisional_config
from leapformer.training.loading import load_tokenizer
from leapformer.training.recipes import MOST_TOKENS, Recipe, Section, expand_path
from leapformer.training.task import ProgressOf, Task, TaskData, untold

POSITION_BINS = 16


class DataSection(Section):
    """Where the text comes from and how it is cut."""

    source: Literal["pydocs", "wikitext", "text", "hf"]
    path: str | None = Field(
        default=None, description="file or folder, $VARIABLES allowed; for hf the name of the data set"
    )
    subset: str | None = Field(default=None, description="configuration of a Hugging Face data set")
    text_field: str = Field(default="text", description="key of a .jsonl row, or column of a Hugging Face data set")
    validation_share: float = Field(
        default=0.05, gt=0, lt=1, description="held out where the source has no validation split"
    )
    block_size: int = Field(default=256, ge=2, le=MOST_TOKENS, description="tokens of a training sequence")
    context_window: int = Field(
        default=0,
        ge=0,
        le=MOST_TOKENS,
        description="evaluation: tokens each block repeats of the one before, so that predictions see more context",
    )
    across_documents: bool = Field(default=True, description="whether attention crosses the ends of documents")

    @model_validator(mode="after")
    def _check_context(self) -> DataSection:
        try:
            check_context(self.context_window, self.block_size)
        except LeapformerError as error:
            raise ValueError(str(error)) from error
        return self


class TokenizerSection(Section):
    """How text becomes tokens."""

    kind: Literal["bytes", "bpe", "word"] = "bpe"
    vocab_size: int | None = Field(default=None, ge=2, le=10**7, description="none: the kind's own default")


class LanguageModelRecipe(Recipe):
    """A recipe with `task: lm`."""

    data: DataSection
    tokenizer: TokenizerSection = Field(default_factory=lambda: TokenizerSection())

    @field_validator("model", mode="after")
    @classmethod
    def _check_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        provisional_config(model)
        return model

    @model_validator(mode="after")
    def _check_length(self) -> LanguageModelRecipe:
        limit = provisional_config(self.model).length_limit()
        if limit is not None and self.data.block_size > limit[0]:
            longest, why = limit
            raise ValueError(
                f"data.block_size: expected at most model.max_position_embeddings={longest}, "
                f"found {self.data.block_size}; {why}"
            )
        return self


class LanguageModelData(TaskData):
    """The encoded corpus of one recipe."""

    unit = RESULTS.unit
    tokenizer: PreTrainedTokenizerFast

    def __init__(
        self, recipe: LanguageModelRecipe, *, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, cache: Path
    ) -> None:
        self.recipe = recipe
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.cache = cache
        self.config = config_of(recipe, vocab_size=len(tokenizer))
        self.collator = PackedCollator()
        self._encoded: dict[str, EncodedSplit] = {}
        self.train_dataset = self.packed("train")

    def encoded(self, split: str) -> EncodedSplit:
        """The tokens of a split; kept on disk and in memory.

        Raises:
            LeapformerError: the corpus has no such split.
        """
        if split not in self._encoded:
            self._encoded[split] = encode_split(
                self.corpus.split(split),
                self.tokenizer,
                separate_documents=self.corpus.separate_documents,
                cache_dir=self.cache,
            )
        return self._encoded[split]

    def packed(self, split: str, *, context: int = 0) -> PackedDataset:
        """The blocks of a split, each repeating `context` tokens of the one before it."""
        encoded = self.encoded(split)
        pad_id: Any = self.tokenizer.convert_tokens_to_ids(str(self.tokenizer.pad_token))
        return PackedDataset(
            encoded.tokens,
            block_size=self.recipe.data.block_size,
            document_starts=encoded.document_starts,
            across_documents=self.recipe.data.across_documents,
            pad_id=pad_id,
            context=context,
        )

    def build_model(self) -> LeapformerForCausalLM:
        return LeapformerForCausalLM(self.config)

    def check_model(self, model: Any) -> None:
        limit, longest = model.config.length_limit(), self.recipe.data.block_size
        if limit is not None and longest > limit[0]:
            raise LeapformerError(
                f"data.block_size: expected at most the model's max_position_embeddings={limit[0]}, found {longest}; "
                f"{limit[1]}"
            )

    def count_targets(self, batch: dict[str, torch.Tensor]) -> int:
        """Labels are shifted inside the model, so the first of every row is not counted."""
        return int((batch["labels"][..., 1:] != -100).sum())

    def quick_metrics(self, model: Any) -> dict[str, float]:
        """Loss in nats per token on blocks spread evenly over the validation set."""
        dataset = self.packed("validation")
        wanted = max(1, self.recipe.training.eval_tokens // (self.recipe.data.block_size - 1))
        blocks = range(0, len(dataset), -(-len(dataset) // wanted))
        losses = self.losses(model, dataset, blocks)
        return {"loss": losses.total_nats / losses.tokens}

    def evaluate(self, model: Any, *, split: str) -> dict[str, Any]:
        """Metrics, perplexity by position and the counted baselines of a whole split."""
        encoded = self.encoded(split)
        dataset = self.packed(split, context=self.recipe.data.context_window)
        losses = self.losses(model, dataset, range(len(dataset)), told=f"evaluating the {split} split")
        return {
            "metrics": losses.metrics(words=encoded.words, size=encoded.bytes).as_dict(),
            "perplexity_by_position": losses.perplexity(bins=POSITION_BINS),
            "baselines": self.baselines(split),
            "state_bytes": self.state_bytes(model),
        }

    @torch.no_grad()
    def state_bytes(self, model: Any) -> int:
        """What the model keeps of one text of `data.block_size` tokens for those that come next."""
        was_training = model.training
        text = torch.zeros(1, self.recipe.data.block_size, dtype=torch.long, device=model.device)
        cache = model.eval().model(text, use_cache=True).past_key_values
        model.train(was_training)
        return cache.nbytes

    def baselines(self, split: str) -> dict[str, float]:
        """Perplexities per word counted on the training text: over the model's own tokens, and over words.

        Those over words are left out where the vocabulary is open, because unknown words make them too low.
        """
        train, evaluated = self.encoded("train"), self.encoded(split)
        tokens = count_baselines(train.tokens, evaluated.tokens, vocab_size=len(self.tokenizer), words=evaluated.words)
        found = {
            "unigram_word_perplexity": tokens.unigram_word_perplexity,
            "bigram_word_perplexity": tokens.bigram_word_perplexity,
        }
        if self.recipe.data.source == "wikitext":
            words = count_word_baselines(self.corpus.split("train"), self.corpus.split(split))
            found["unigram_over_words_word_perplexity"] = words.unigram_word_perplexity
            found["bigram_over_words_word_perplexity"] = words.bigram_word_perplexity
        return found

    @torch.no_grad()
    def losses(self, model: Any, dataset: PackedDataset, blocks: Iterable[int], *, told: str = "") -> LossByPosition:
        """Summed nats of some blocks by position, with the model in evaluation mode; ``told``: to ``progress``."""
        was_training = model.training
        model.eval()
        summed = LossByPosition(dataset.block_size - 1)
        for batch in self._batches(dataset, blocks, told):
            inputs = {
                name: batch[name].to(model.device)
                for name in ("input_ids", "labels", "attention_mask", "cu_seqlens")
                if name in batch
            }
            nats = model.token_losses(**inputs)  # [B, T]
            summed.add(nats[:, :-1].cpu(), batch["labels"], position_ids=batch.get("position_ids"))
        model.train(was_training)
        return summed

    def _batches(self, dataset: PackedDataset, blocks: Iterable[int], told: str) -> Iterator[dict[str, torch.Tensor]]:
        size = max(1, self.recipe.training.eval_batch_tokens // dataset.block_size)
        indices = list(blocks)
        starts = range(0, len(indices), size)
        for start in self.progress(starts, told) if told else starts:
            yield self.collator([dataset[index] for index in indices[start : start + size]])


class LanguageModelTask(Task):
    """`task: lm`."""

    name = "lm"
    recipe_type = LanguageModelRecipe
    results = RESULTS
    model_classes = (LeapformerForCausalLM,)
    model_fields = model_fields()

    def prepare(
        self,
        recipe: LanguageModelRecipe,
        *,
        cache: Path,
        tokenizer: PreTrainedTokenizerFast | None = None,
        progress: ProgressOf = untold,
    ) -> LanguageModelData:
        """Read the corpus, and train the tokenizer or take the given one."""
        section = recipe.data
        path = section.path
        if path is not None and section.source != "hf":
            path = str(expand_path(path, key="data.path"))
        corpus = load_corpus(
            section.source,
            path=path,
            subset=section.subset,
            text_field=section.text_field,
            validation_share=section.validation_share,
        )
        if tokenizer is None:
            tokenizer = cached_tokenizer(recipe.tokenizer, corpus.split("train"), cache=cache)
        data = LanguageModelData(recipe, corpus=corpus, tokenizer=tokenizer, cache=cache)
        data.progress = progress
        return data


def cached_tokenizer(section: TokenizerSection, documents: list[str], *, cache: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a recipe, trained once for the same text and settings."""
    if section.kind == "bytes":
        return build_tokenizer("bytes", vocab_size=section.vocab_size)
    digest = hashlib.sha256(json.dumps(section.model_dump(), sort_keys=True).encode())
    for document in documents:
        digest.update(document.encode("utf-8"))
    folder = cache / f"tokenizer-{digest.hexdigest()[:16]}"
    if not is_sound(folder):
        tokenizer = build_tokenizer(section.kind, vocab_size=section.vocab_size, documents=documents)
        with staged_folder(folder) as staging:
            tokenizer.save_pretrained(staging)
            write_sums(staging)
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


TASK = LanguageModelTask()
