"""Load the trained model of a run, and say clearly why where that can't be done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from leapformer.errors import LeapformerError
from leapformer.models import (
    LeapformerForCausalLM,
    LeapformerForConditionalGeneration,
    LeapformerForMaskedLM,
    LeapformerForSequenceClassification,
)
from leapformer.training.saving import check_weights

# Which class a configuration's `architectures` may name; the first of a model type where it names none.
_CLASSES: tuple[Any, ...] = (
    LeapformerForCausalLM,
    LeapformerForMaskedLM,
    LeapformerForSequenceClassification,
    LeapformerForConditionalGeneration,
)


def load_model(folder: str | Path) -> Any:
    """The model in a folder that `save_pretrained` wrote, in evaluation mode on the CPU.

    Raises:
        LeapformerError: there is none, its weights are cut off, or they are those of another model.
    """
    folder = Path(folder)
    kind = _class_of(folder / "config.json")
    check_weights(folder / "model.safetensors")
    try:
        model, report = kind.from_pretrained(folder, output_loading_info=True)
    except (RuntimeError, ValueError) as error:
        raise LeapformerError(
            f"{folder}: the weights do not fit the configuration beside them ({_first_line(error)})"
        ) from error
    wrong = [f"{kind.removesuffix('_keys')} {sorted(map(str, report[kind]))[0]}" for kind in report if report[kind]]
    if wrong:
        raise LeapformerError(
            f"{folder}: expected the weights that config.json describes, found those of another model "
            f"({'; '.join(wrong[:3])})"
        )
    return model.eval()


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        LeapformerError: there is none, or it is damaged.
    """
    folder = Path(folder)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise LeapformerError(f"{folder}: no tokenizer could be loaded ({_first_line(error)})") from error


def saved_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model; None where its task has none."""
    return load_tokenizer(folder) if (Path(folder) / "tokenizer_config.json").is_file() else None


def _class_of(path: Path) -> type:
    """What config.json says the weights are of."""
    if not path.is_file():
        raise LeapformerError(f"{path}: expected the configuration of a model, found no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise LeapformerError(f"{path}: not valid JSON: {error}") from error
    found = content.get("model_type") if isinstance(content, dict) else None
    types = list(dict.fromkeys(kind.config_class.model_type for kind in _CLASSES))
    if found not in types:
        raise LeapformerError(f"{path}: expected a model of type {' or '.join(map(repr, types))}, found {found!r}")
    known = {kind.__name__: kind for kind in _CLASSES if kind.config_class.model_type == found}
    (name, *_) = content.get("architectures") or known
    if name not in known:
        raise LeapformerError(f"{path}: architectures: expected one of {', '.join(known)}, found {name!r}")
    return known[name]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
