"""The recipe of a synthetic task."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from leapformer.tasks.model_section import build_config, one_of, provisional_config
from leapformer.tasks.synthetic.kind import Kind, settings_of
from leapformer.tasks.synthetic.kinds import KINDS, SETTINGS
from leapformer.training.recipes import Recipe, Section

LONGEST = 1 << 16
MOST_TIMES = 64  # the trained length
MOST_SYMBOLS = 1 << 16
Times = Annotated[int, Field(ge=1, le=MOST_TIMES)]


def _setting(of: str, what: str, *, most: int, least: int = 1) -> Any:
    return Field(default=None, ge=least, le=most, description=f"{of}: {what}; none: the kind's own default")


class DataSection(Section):
    """What is asked, in sequences how long. Settings that the kind has are filled in with its defaults."""

    kind: Annotated[str, AfterValidator(one_of(tuple(KINDS)))]
    length: int | None = Field(default=None, ge=1, le=LONGEST, description="tokens; none: the kind's own default")
    evaluate_at: list[Times] = Field(
        default=[1, 2, 4], description="lengths of the evaluation, as multiples of the trained one"
    )
    pairs: int | None = _setting("recall", "pairs of key and value", most=LONGEST)
    vocabulary: int | None = _setting("recall, copy-at, selective-copy", "symbols", least=2, most=MOST_SYMBOLS)
    questions: int | None = _setting("copy-at", "questions after a text", most=LONGEST)
    digits: int | None = _setting("copy-at", "digits of a number", most=20)
    base: int | None = _setting("copy-at", "of the digits", least=2, most=MOST_SYMBOLS)
    marked: int | None = _setting("selective-copy", "symbols to copy", most=LONGEST)
    depth: int | None = _setting("brackets", "the greatest depth", most=MOST_SYMBOLS)

    @model_validator(mode="after")
    def _fill_in(self) -> DataSection:
        own = settings_of(KINDS[self.kind])
        for name in SETTINGS:
            value = getattr(self, name)
            if name not in own and value is not None:
                raise ValueError(f"data.{name}: expected none, as kind {self.kind} has no such setting, found {value}")
        if self.length is None:
            self.length = KINDS[self.kind].default_length
        for name in own:
            setattr(self, name, getattr(self.task_kind, name))
        if self.evaluate_at != sorted({1, *self.evaluate_at}):
            raise ValueError(
                f"data.evaluate_at: expected rising multiples, the first one 1, found {list(self.evaluate_at)}"
            )
        fault = self.task_kind.fault(self.lengths)
        if fault is not None:
            raise ValueError(fault)
        return self

    @property
    def task_kind(self) -> Kind:
        """The kind with its settings."""
        kind = KINDS[self.kind]
        given = {name: getattr(self, name) for name in settings_of(kind)}
        return kind(**{name: value for name, value in given.items() if value is not None})

    @property
    def lengths(self) -> list[int]:
        """Of the evaluation, rising; the first is the trained one."""
        assert self.length is not None
        return [times * self.length for times in self.evaluate_at]


class SyntheticRecipe(Recipe):
    """A recipe with `task: synthetic`."""

    data: DataSection

    @field_validator("model", mode="after")
    @classmethod
    def _check_model(cls, model: dict[str, Any]) -> dict[str, Any]:
        provisional_config(model)
        return model

    @model_validator(mode="after")
    def _check_length(self) -> SyntheticRecipe:
        limit = build_config(self.model, vocab_size=self.data.task_kind.vocab_size).length_limit()
        fault = None if limit is None else too_long(self.data, *limit)
        if fault is not None:
            raise ValueError(fault)
        return self


def too_long(section: DataSection, most: int, why: str) -> str | None:
    """What is wrong where a model takes no more than `most` tokens, because of `why`; None: nothing."""
    needed = section.lengths[-1] + 1
    if needed <= most:
        return None
    return (
        f"data.evaluate_at: expected at most model.max_position_embeddings={most} tokens, found {needed} "
        f"(data.length={section.length} times {section.evaluate_at[-1]}, and one that closes a sequence); {why}"
    )
