"""Load the trained model of a run and its tokenizer, safely, and say clearly why where that can't be done.

A folder decides what is loaded and nothing else: no code out of it runs, nothing outside it is read, nothing is
fetched, and no more memory is taken than its weights fill. So transformers' loaders never see the folder: the files
named here are read one by one, checked, and handed over as values.

config.json            the fields of our configurations; others are passed over
model.safetensors      the weights
tokenizer.json         the tokenizer, where the task has one, in the library `tokenizers`' own format
tokenizer_config.json  its special tokens, and how it pads
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from leapformer.errors import LeapformerError
from leapformer.files.folders import check_own_files
from leapformer.files.reading import LARGEST, read_json_object, read_text
from leapformer.files.showing import cut, shown
from leapformer.models import (
    LeapformerForCausalLM,
    LeapformerForConditionalGeneration,
    LeapformerForMaskedLM,
    LeapformerForSequenceClassification,
)
from leapformer.models.fields import own_fields
from leapformer.training.saving import check_weights

# Those of the package; the first of a model type where a configuration's `architectures` names none.
_OURS: tuple[Any, ...] = (
    LeapformerForCausalLM,
    LeapformerForMaskedLM,
    LeapformerForSequenceClassification,
    LeapformerForConditionalGeneration,
)
# Keys that would have a loader run code of the folder, fetch some, or read other files.
_NEVER = ("auto_map", "quantization_config", "attn_implementation", "transformers_weights", "fusion_config")
# What a configuration has besides the fields of ours.
_OF_TRANSFORMERS = ("num_labels", "id2label", "label2id", "problem_type", "is_encoder_decoder")
_MOST_LABELS = 100_000
_TOKENIZER_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


# ---- the border to the libraries


@contextmanager
def one_line(where: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Whatever a library raises within the block becomes one line, "where: what (its first line)"; its warnings and
    bars are not shown.

    The one place that does so. `tokenizers` panics with an exception that is no Exception.
    """
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (LeapformerError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise LeapformerError(f"{cut(where, 240)}: {what} ({_first_line(error)})") from error
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return cut(text, 240)


# ---- models


def load_model(folder: str | Path, *, classes: Sequence[type] | None = None) -> Any:
    """The model in a folder that `save_pretrained` wrote, in evaluation mode on the CPU.

    Arguments:
        classes: what it may be, such as `Task.model_classes`; None: any of the package.

    Raises:
        LeapformerError: there is none, its weights are cut off, or they are those of another model.
    """
    folder = Path(folder)
    check_own_files(folder)
    if os.path.lexists(folder / "adapter_config.json"):
        raise LeapformerError(
            f"{cut(folder, 240)}: expected a whole model, found an adapter of one (adapter_config.json)"
        )
    content = _configuration(folder / "config.json")
    kind = _class_of(content, folder / "config.json", dict.fromkeys((*_OURS, *(classes or ()))))
    if classes is not None and kind not in classes:
        expected = " or ".join(each.__name__ for each in classes)
        raise LeapformerError(f"{cut(folder, 240)}: expected a {expected}, found a {kind.__name__}")
    check_weights(folder / "model.safetensors")
    with one_line(folder, "the weights do not fit the configuration beside them"):
        shapes = _shapes(folder / "model.safetensors")
        _check_layers(content, len(shapes), folder)
        config = kind.config_class(**_own_fields(content, kind.config_class))
        _check_shapes(kind, config, shapes, folder)
        model = _with_weights(kind, config, folder / "model.safetensors")
    model.name_or_path = model.config.name_or_path = str(folder)
    return model.eval()


def _configuration(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise LeapformerError(f"{cut(path, 240)}: expected the configuration of a model, found no such file")
    content = read_json_object(path)
    _check_keys(content, path)
    labels = [content.get("num_labels", 0), *(content.get(name) or () for name in ("id2label", "label2id"))]
    sizes = [len(each) if isinstance(each, Mapping) else each for each in labels if each != ()]
    if any(isinstance(size, int) and size > _MOST_LABELS for size in sizes):  # a name is made for each
        raise LeapformerError(f"{cut(path, 240)}: num_labels: expected at most {_MOST_LABELS:,}, found more")
    return content


def _check_keys(content: Mapping[str, Any], path: Path) -> None:
    for name in _NEVER:
        if content.get(name) is not None:
            raise LeapformerError(
                f"{cut(path, 240)}: {name}: expected none, found {shown(content[name])}; what a folder brings with it "
                "is not run"
            )


def _class_of(content: Mapping[str, Any], path: Path, classes: Iterable[Any]) -> Any:
    """Which of the classes config.json says the weights are of."""
    where, found = cut(path, 240), content.get("model_type")
    types = list(dict.fromkeys(kind.config_class.model_type for kind in classes))
    if found not in types:
        raise LeapformerError(
            f"{where}: expected a model of type {' or '.join(map(repr, types))}, found {shown(found)}"
        )
    known = {kind.__name__: kind for kind in classes if kind.config_class.model_type == found}
    named = content.get("architectures") or list(known)
    name = named[0] if isinstance(named, list) else named
    if not isinstance(name, str) or name not in known:
        raise LeapformerError(f"{where}: architectures: expected one of {', '.join(known)}, found {shown(name)}")
    return known[name]


def _own_fields(content: Mapping[str, Any], config_class: Any) -> dict[str, Any]:
    """The fields of a configuration that ours have: any other would become an attribute, in place of a method too."""
    known = {*own_fields(config_class), *_OF_TRANSFORMERS}
    return {name: value for name, value in content.items() if name in known}


def _check_layers(content: Mapping[str, Any], tensors: int, folder: Path) -> None:
    """Layers are made one by one, and each has weights."""
    for name in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        value = content.get(name, 0)
        if isinstance(value, int) and value > tensors:
            raise LeapformerError(
                f"{cut(folder, 240)}: {name}: expected at most the {tensors} weights that are there, found "
                f"{shown(value)}"
            )


def _shapes(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every weight in a file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        return {name: (each.get_shape(), each.get_dtype()) for name, each in slices.items()}


def _check_shapes(kind: Any, config: Any, shapes: Mapping[str, tuple[list[int], str]], folder: Path) -> None:
    """See that the weights are those of the configuration, before any memory is taken for them."""
    with torch.device("meta"):
        state = kind(config).state_dict(keep_vars=True)
    there = {
        id(weight) for name, weight in state.items() if name in shapes
    }  # a tied one is there under one of its names
    faults = [f"missing {name}" for name, weight in state.items() if name not in shapes and id(weight) not in there]
    faults += [f"unexpected {name}" for name in shapes if name not in state]
    for name, (shape, dtype) in shapes.items():
        weight = state.get(name)
        if weight is not None and list(weight.shape) != shape:
            faults.append(f"{name}: expected the shape {list(weight.shape)}, found {shape}")
        elif weight is not None and weight.is_floating_point() and dtype not in ("F64", "F32", "F16", "BF16"):
            faults.append(f"{name}: expected floating numbers, found {dtype}")
    if faults:
        raise LeapformerError(
            f"{cut(folder, 240)}: expected the weights that config.json describes, found those of another model "
            f"({'; '.join(cut(fault, 160) for fault in faults[:3])})"
        )


def _with_weights(kind: Any, config: Any, path: Path) -> Any:
    from safetensors.torch import load_file

    # The class's own method wants a folder; transformers' takes weights, and then looks nowhere for files.
    method: Any = PreTrainedModel.from_pretrained
    load = method.__func__
    model, report = load(kind, None, config=config, state_dict=load_file(path), output_loading_info=True)
    wrong = [f"{name.removesuffix('_keys')} {sorted(map(str, report[name]))[0]}" for name in report if report[name]]
    if wrong:
        raise LeapformerError(
            f"{cut(path.parent, 240)}: expected the weights that config.json describes, found those of another model "
            f"({'; '.join(cut(each, 160) for each in wrong[:3])})"
        )
    return model


# ---- tokenizers


_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
_INPUTS = ("input_ids", "token_type_ids", "attention_mask")
_SIDES = ("left", "right")
# What else is taken of tokenizer_config.json: is it right, and what is expected. All further keys are passed over.
_TAKEN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "padding_side": (lambda value: value in _SIDES, "left or right"),
    "truncation_side": (lambda value: value in _SIDES, "left or right"),
    "split_special_tokens": (lambda value: isinstance(value, bool), "true or false"),
    "clean_up_tokenization_spaces": (lambda value: isinstance(value, bool), "true or false"),
    "model_input_names": (
        lambda value: isinstance(value, list) and bool(value) and all(name in _INPUTS for name in value),
        f"some of {', '.join(_INPUTS)}",
    ),
}


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer beside a model.

    Raises:
        LeapformerError: there is none, or it is damaged.
    """
    folder = Path(folder)
    check_own_files(folder)
    path = folder / "tokenizer_config.json"
    with one_line(folder, "no tokenizer could be loaded"):
        content = read_json_object(path)
        _check_keys(content, path)
        if content.get("tokenizer_class") not in (None, *_TOKENIZER_CLASSES):
            raise LeapformerError(
                f"{cut(path, 240)}: tokenizer_class: expected {' or '.join(_TOKENIZER_CLASSES)}, found "
                f"{shown(content['tokenizer_class'])}"
            )
        tokenizer = _tokenizer(content, read_text(folder / "tokenizer.json", largest=4 * LARGEST), where=cut(path, 240))
        tokenizer("a b")  # what its steps don't take shows only then
    return tokenizer


def _tokenizer(content: Mapping[str, Any], text: str, *, where: str) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    taken = {}
    for name, (is_right, expected) in _TAKEN.items():
        if content.get(name) is not None:
            if not is_right(content[name]):
                raise LeapformerError(f"{where}: {name}: expected {expected}, found {shown(content[name])}")
            taken[name] = content[name]
    tokenizer = Tokenizer.from_str(text)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for name in _TOKENS:
        token = content.get(name)
        token = token.get("content") if isinstance(token, dict) else token  # older versions wrote an object
        if token is not None:
            if (
                not isinstance(token, str) or token not in vocabulary
            ):  # it would be added, and the model has no row for it
                raise LeapformerError(f"{where}: {name}: expected a token of the vocabulary, found {shown(token)}")
            taken[name] = token
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **taken)


def saved_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer beside a model; None where its task has none."""
    return load_tokenizer(folder) if os.path.lexists(Path(folder) / "tokenizer_config.json") else None


def check_fit(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Check that a model has a row for every token of the tokenizer beside it.

    Raises:
        LeapformerError: it has not, or the tokenizer ends no text and pads none.
    """
    ids = [*tokenizer.get_vocab().values()]
    size, highest = model.config.vocab_size, max(ids, default=-1)
    if highest >= size:
        raise LeapformerError(
            f"{cut(folder, 240)}: expected a tokenizer of the model's {size:,} tokens, found one with the id "
            f"{highest:,}"
        )
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise LeapformerError(f"{cut(folder, 240)}: tokenizer_config.json: expected the key {name}, found none")


def load_with_tokenizer(folder: str | Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """A language model and its tokenizer, checked to fit one another.

    Raises:
        LeapformerError: as `load_model`, `load_tokenizer` and `check_fit`.
    """
    model, tokenizer = load_model(folder, classes=(LeapformerForCausalLM,)), load_tokenizer(folder)
    check_fit(model, tokenizer, folder)
    return model, tokenizer
