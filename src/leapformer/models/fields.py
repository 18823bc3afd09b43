"""Checks of a configuration's fields, which may come from a damaged or hostile config.json: types, ranges, choices,
size.

A fault is a ValueError of one line that names the field, what was expected and what was found.
"""

import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin

import torch
from transformers import PreTrainedConfig

from leapformer.files.showing import cut, shown

MOST_LAYERS = 1024
MOST_PARAMETERS = 10**11  # of a model, about: 400 GB in float32
WIDEST = 1 << 24
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
MOST_LABELS = 1 << 20
# Words that count in a model's size: a vocabulary comes from data, and a recipe is checked before there is any.
WORDS_THAT_COUNT = 1 << 20

# What several configurations have: the least and the most, both allowed.
RANGES: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 1 << 31),
    "hidden_size": (1, WIDEST),
    "num_attention_heads": (1, 1 << 16),
    "num_key_value_heads": (1, 1 << 16),
    "head_dim": (1, 1 << 16),
    "intermediate_size": (1, WIDEST),
    "conv_width": (0, 1 << 10),
    "clocks": (1, 1 << 10),
    "clock_rate": (1e-12, 1e12),
    "clock_decades": (0, 12),
    "leap_hidden": (1, 1 << 18),
    "leap_bins": (2, WIDEST),
    "rotary_base": (1, 1e15),
    "delta_range": (1, 2),
    "attention_eps": (1e-45, 1),
    "layer_norm_eps": (0, 1),
    "hidden_dropout": (0, 1),
    "attention_dropout": (0, 1),
    "activation_dropout": (0, 1),
    "position_scale": (-1e6, 1e6),
    "initializer_range": (1e-12, 1e3),
    "embedding_initializer_range": (1e-12, 1e3),
    "embedding_scale": (-1e12, 1e12),
}
_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}


def own_fields(config_class: type) -> dict[str, Any]:
    """The fields of a configuration that are not transformers', with their annotations."""
    found: dict[str, Any] = {}
    for kind in config_class.__mro__:
        if kind is PreTrainedConfig:
            break
        found = {**kind.__dict__.get("__annotations__", {}), **found}
    return {name: annotation for name, annotation in found.items() if not isinstance(annotation, str)}


def check_types(config: PreTrainedConfig) -> None:
    """Every field of our own against its annotation; an integer will do for a number, true and false are no numbers."""
    for name, annotation in own_fields(type(config)).items():
        kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
        value = getattr(config, name, None)
        if any(_is(value, one) for one in kinds):
            continue
        words = list(dict.fromkeys(_word(one) for one in kinds if one is not int or float not in kinds))
        raise ValueError(f"config {name}: expected {' or '.join(words)}, found {shown(value)}")


def check_ranges(config: PreTrainedConfig, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Numbers between the least and the most, where they are not None."""
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        if value is None or least <= value <= most:
            continue
        expected = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"config {name}: expected {expected}, found {shown(value)}")


def check_choices(config: PreTrainedConfig, choices: Mapping[str, Iterable[str]]) -> None:
    """Names that are known, where they are not None; a list of them too."""
    for name, known in choices.items():
        value = getattr(config, name)
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None and one not in known:
                raise ValueError(f"config {name}: expected one of {', '.join(known)}, found {shown(one)}")


def check_common(config: Any) -> None:
    """What both configurations say of attention: heads, convolution, LeaP and the special tokens."""
    if config.head_dim is None and config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"config hidden_size: expected a multiple of num_attention_heads={config.num_attention_heads} "
            f"(or a head_dim), found {config.hidden_size}"
        )
    groups = config.num_key_value_heads
    if groups is not None and config.num_attention_heads % groups:
        raise ValueError(
            f"config num_key_value_heads: expected a divisor of num_attention_heads={config.num_attention_heads}, "
            f"found {groups}"
        )
    if config.conv_width == 1:
        raise ValueError("config conv_width: expected 0 (none) or at least 2, found 1")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is not None and not -1 <= number < config.vocab_size:
                raise ValueError(
                    f"config {name}: expected an id below vocab_size={config.vocab_size}, found {shown(value)}"
                )


def words_that_count(*sizes: int | None) -> int:
    """Rows of embeddings and output layers, each up to `WORDS_THAT_COUNT`."""
    return sum(min(size or 0, WORDS_THAT_COUNT) for size in sizes)


def check_size(config: PreTrainedConfig, parameters: int) -> None:
    """Refuse a model of more parameters than any machine holds, before memory is taken."""
    if parameters > MOST_PARAMETERS:
        raise ValueError(
            f"config of {type(config).__name__}: expected a model of at most {MOST_PARAMETERS:,} parameters, "
            f"found about {parameters:.1e} (hidden_size={config.hidden_size})"
        )


def check_standard(config: PreTrainedConfig, rest: dict[str, Any]) -> None:
    """Fields of transformers that it takes unseen; ``rest`` are those that are no fields of the class."""
    for name in ("output_hidden_states", "return_dict"):
        if not isinstance(getattr(config, name), bool | None):
            raise ValueError(f"config {name}: expected true or false, found {shown(getattr(config, name))}")
    for name, dtype in (("dtype", config.dtype), ("torch_dtype", rest.get("torch_dtype"))):
        known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(known, torch.dtype) and known.is_floating_point):
            raise ValueError(
                f"config {name}: expected the name of a floating dtype such as float32, found {shown(dtype)}"
            )
    check_choices(config, {"problem_type": PROBLEM_TYPES})
    labels = rest.get("num_labels")
    if labels is not None and not (_is(labels, int) and 1 <= labels <= MOST_LABELS):
        raise ValueError(f"config num_labels: expected an integer from 1 to {MOST_LABELS}, found {shown(labels)}")
    _check_labels(config)
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"config architectures: expected a list of names, found {shown(names)}")
    for name in rest:
        found = getattr(type(config), name, None)
        if not isinstance(name, str) or (isinstance(found, property) and found.fset is None) or callable(found):
            raise ValueError(f"config: expected fields of a configuration, found {shown(name)}")


def finish(config: PreTrainedConfig, rest: dict[str, Any], post_init: Any) -> None:
    """transformers' own `__post_init__`, whose faults are of many kinds."""
    check_standard(config, rest)
    try:
        post_init(**rest)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"config: expected fields that transformers takes, found {cut(error)}") from error


def _check_labels(config: PreTrainedConfig) -> None:
    for name in ("id2label", "label2id"):
        table = getattr(config, name)
        if table is None:
            continue
        if not isinstance(table, dict) or not 1 <= len(table) <= MOST_LABELS:
            raise ValueError(f"config {name}: expected from 1 to {MOST_LABELS} labels, found {shown(table)}")
        numbers = table if name == "id2label" else table.values()
        if not all(_is(number, int) or (isinstance(number, str) and number.isdecimal()) for number in numbers):
            raise ValueError(f"config {name}: expected numbers and labels, found {shown(table)}")


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (list, tuple):
        inner = get_args(kind)[0]
        return isinstance(value, list | tuple) and all(_is(one, inner) for one in value)
    if get_origin(kind) is Literal:
        return isinstance(value, str)  # which, is for `check_choices`
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, kind)


def _word(kind: Any) -> str:
    if get_origin(kind) in (list, tuple):
        return f"a list of {'names' if get_args(kind)[0] is str else 'integers'}"
    return _WORDS[str if get_origin(kind) is Literal else kind]
