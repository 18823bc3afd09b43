"""The section `model` of a recipe: which fields of the configuration it may have, and what they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from huggingface_hub.errors import StrictDataclassError
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from leapformer.errors import LeapformerError
from leapformer.models import LeapformerConfig
from leapformer.models.fields import own_fields

# Fields that the data decides, or that say nothing about training.
_NEVER = {"model_type", "vocab_size", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"}


def model_fields(*set_by_task: str, config_class: Any = LeapformerConfig) -> dict[str, Any]:
    """The fields that a recipe may set, with their types and choices; those that its task sets are not among them."""
    choices = config_class.choices()
    return {
        name: Annotated[_with_text(kind), AfterValidator(one_of(choices[name]))] if name in choices else kind
        for name, kind in own_fields(config_class).items()
        if name not in _NEVER and name not in set_by_task
    }


def _with_text(kind: Any) -> Any:
    """A type that takes any text where ``kind`` takes certain names, so that there are the same words for all
    choices.
    """
    if get_origin(kind) is Literal:
        return str
    return Union[tuple(map(_with_text, get_args(kind)))] if get_origin(kind) is Union else kind  # noqa: UP007


def one_of(names: tuple[str, ...]) -> Callable[[Any], Any]:
    """A check of a name, or of each in a list."""

    def check(value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None and one not in names:
                raise PydanticCustomError("choice", "one of {names}", {"names": ", ".join(names)})
        return value

    return check


def build_config(fields: dict[str, Any], *, config_class: Any = LeapformerConfig, **set_by_task: Any) -> Any:
    """The configuration of a model section; a fault is a one-line ValueError that begins with the key."""
    try:
        return config_class(**fields, **set_by_task)
    except StrictDataclassError as error:
        raise ValueError("model." + " ".join(str(error.__cause__ or error).split())) from error
    except ValueError as error:
        raise ValueError(str(error).replace("config ", "model.", 1)) from error


def provisional_config(fields: dict[str, Any]) -> LeapformerConfig:
    """The configuration before the data says how large the vocabulary is: large enough for the bands of a softmax."""
    return build_config(fields, vocab_size=max(fields.get("adaptive_cutoffs") or [255]) + 1)


def config_of(recipe: Any, **arguments: Any) -> Any:
    """`build_config` of a recipe's section with what its data sets.

    Raises:
        LeapformerError: the data and the section don't go together.
    """
    try:
        return build_config(recipe.model, **arguments)
    except ValueError as error:
        raise LeapformerError(f"recipe {recipe.name}: {error}") from None
