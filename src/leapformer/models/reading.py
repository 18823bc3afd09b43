"""What stands beside a model's weights, read so that a fault is one line and nothing is taken before it is looked
at.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedConfig

from leapformer.errors import LeapformerError
from leapformer.files.reading import read_json_object
from leapformer.files.showing import cut, shown

# Settings of generation whose type transformers looks at only when it computes with them, if ever.
GENERATION_FIELDS: tuple[tuple[tuple[str, ...], tuple[type, ...], str], ...] = (
    (
        (
            "max_length",
            "max_new_tokens",
            "min_length",
            "min_new_tokens",
            "num_beams",
            "num_beam_groups",
            "num_return_sequences",
            "top_k",
            "no_repeat_ngram_size",
            "pad_token_id",
            "bos_token_id",
            "prefill_chunk_size",
        ),
        (int,),
        "an integer",
    ),
    (("do_sample", "use_cache", "output_scores", "output_logits", "return_dict_in_generate"), (bool,), "true or false"),
    (
        ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty", "max_time"),
        (int, float),
        "a number",
    ),
    (("eos_token_id",), (int, list), "an integer or a list"),
)


class CheckpointError(LeapformerError, ValueError):
    """A checkpoint is cut off, damaged, or of another model."""


def read_config(cls: type[PreTrainedConfig], json_file: str | os.PathLike[str]) -> dict[str, Any]:
    """In place of transformers' `_dict_from_json_file`: the object in a config.json.

    Raises CheckpointError where there is none.
    """
    try:
        return cls._decode_special_floats(read_json_object(json_file))
    except LeapformerError as error:
        raise CheckpointError(str(error)) from None


def check_folder(where: str, config_class: Any, subfolder: str = "") -> None:
    """Refuse a folder whose config.json is of another kind of model (transformers would only warn), or whose
    generation_config.json is damaged (transformers would take none). What is no folder is left to transformers.

    Raises CheckpointError.
    """
    if not os.path.isdir(where):
        return
    folder = Path(where, subfolder)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"checkpoint {cut(folder, 240)}: expected a config.json, found none")
    found = read_config(config_class, folder / "config.json").get("model_type")
    if found != config_class.model_type:
        raise CheckpointError(
            f"checkpoint {cut(folder, 240)}: expected model_type {config_class.model_type!r}, found {shown(found)}"
        )
    if os.path.lexists(folder / "generation_config.json"):
        _check_generation(folder / "generation_config.json")


def _check_generation(path: Path) -> None:
    fields = read_config(PreTrainedConfig, path)
    for names, kinds, expected in GENERATION_FIELDS:
        for name in names:
            value = fields.get(name)
            wrong_bool = isinstance(value, bool) and bool not in kinds
            if value is not None and (wrong_bool or not isinstance(value, kinds)):
                raise CheckpointError(f"{cut(path, 240)}: {name}: expected {expected}, found {shown(value)}")
    try:
        GenerationConfig(**fields)
    except Exception as error:  # of many kinds: it takes values of any type and computes with them
        raise CheckpointError(f"{cut(path, 240)}: expected settings of generation, found {cut(error)}") from error


def check_shapes(where: str, model_class: Any, config: PreTrainedConfig, subfolder: str = "") -> None:
    """Compare the weights that a file names with those of the model, before either takes memory.

    Raises CheckpointError where a shape differs, or where more is missing than is there; a few that are missing or too
    many are found when the weights are loaded.
    """
    path = Path(where, subfolder, "model.safetensors")
    if not path.is_file():
        return
    prefix = f"{model_class.base_model_prefix}."
    with torch.device("meta"):
        model = model_class(config)
    expected = {name.removeprefix(prefix): tuple(x.shape) for name, x in model.state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {where}: expected whole safetensors weights, found {cut(error)}") from error
    found = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            raise CheckpointError(
                f"checkpoint {where}: its weights have other shapes than its config says ({name}: expected "
                f"{list(expected[name])}, found {list(found[name])})"
            )
    missing = sorted(name for name in expected.keys() - found.keys() if not name.startswith("lm_head."))
    if sum(math.prod(expected[name]) for name in missing) > sum(map(math.prod, found.values())):
        raise weights_of_another(where, model_class, missing, [])


def weights_of_another(where: str, model_class: type, missing: list[str], surplus: list[str]) -> CheckpointError:
    """The error of weights that are missing or too many."""
    return CheckpointError(
        f"checkpoint {where}: expected the weights of {model_class.__name__} as its config says, "
        f"found {len(missing)} missing (first: {missing[:1]}) and {len(surplus)} others (first: {surplus[:1]})"
    )
