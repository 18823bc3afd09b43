"""The section `model` of a recipe: which fields of the configuration it may have, and what they make."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError

from leapformer.errors import LeapformerError
from leapformer.models import LeapformerConfig

# Fields that the data decides, or that say nothing about training.
_NEVER = {"model_type", "vocab_size", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"}


def model_fields(*set_by_task: str, config_class: type = LeapformerConfig) -> dict[str, Any]:
    """The fields that a recipe may set, with their types; those that its task sets are not among them."""
    return {
        name: kind
        for name, kind in config_class.__annotations__.items()
        if name not in _NEVER and name not in set_by_task and not isinstance(kind, str)
    }


def build_config(fields: dict[str, Any], *, config_class: Any = LeapformerConfig, **set_by_task: Any) -> Any:
    """The configuration of a model section; a fault is a one-line ValueError that begins with the key."""
    try:
        return config_class(**fields, **set_by_task)
    except StrictDataclassError as error:
        raise ValueError("model." + " ".join(str(error.__cause__ or error).split())) from error
    except ValueError as error:
        raise ValueError(str(error).replace("config ", "model.", 1)) from error


def config_of(recipe: Any, **arguments: Any) -> Any:
    """`build_config` of a recipe's section with what its data sets.

    Raises:
        LeapformerError: the data and the section don't go together.
    """
    try:
        return build_config(recipe.model, **arguments)
    except ValueError as error:
        raise LeapformerError(f"recipe {recipe.name}: {error}") from None
