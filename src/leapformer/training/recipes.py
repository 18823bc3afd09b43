"""Recipes: everything that decides what is trained, as one validated YAML document.

A recipe has the sections `model` and `training` described here, and the sections its task adds (a language model:
`data` and `tokenizer`). Unknown keys are faults, and all faults of a recipe are reported together.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from leapformer.errors import LeapformerError

NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")


class RecipeError(LeapformerError):
    """A recipe that can't be used. With several faults, each stands on a line of its own after the first."""

    def __init__(self, recipe: str, faults: Sequence[str]) -> None:
        self.faults = list(faults)
        if len(self.faults) == 1:
            super().__init__(f"recipe {recipe}: {self.faults[0]}")
        else:
            lines = "".join(f"\n  {fault}" for fault in self.faults)
            super().__init__(f"recipe {recipe}: {len(self.faults)} faults{lines}")


class Section(BaseModel):
    """A group of recipe keys. Keys it does not know are faults."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class TrainingSection(Section):
    """How the weights are found. Steps count optimizer updates; tokens are those the loss is taken over."""

    seed: int = Field(default=0, ge=0, description="start of the weights, dropout and order of the data")
    max_steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=8, ge=1, description="blocks per device and forward pass")
    accumulation: int = Field(default=1, ge=1, description="forward passes per step")
    optimizer: Literal["adamw", "nesterov", "muon"] = "adamw"
    learning_rate: float = Field(default=3e-3, gt=0, description="the highest of the schedule")
    min_learning_rate: float = Field(default=0.0, ge=0, description="where the schedule ends")
    schedule: Literal["cosine", "linear", "inverse-sqrt", "constant"] = "cosine"
    warmup_steps: int = Field(default=100, ge=0)
    warmup_learning_rate: float = Field(default=0.0, ge=0, description="where the warm-up starts")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="of AdamW")
    epsilon: float = Field(default=1e-8, gt=0, description="of AdamW")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="of Nesterov's SGD and of Muon")
    weight_decay: float = Field(default=0.1, ge=0, description="on matrices; never on biases and norms")
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 for none")
    clip_values: float = Field(default=0.0, ge=0, description="largest size of each of its values; 0 for none")
    log_every: int = Field(default=50, ge=1, description="steps")
    eval_every: int = Field(default=500, ge=1, description="steps between evaluations on a part of the validation set")
    eval_tokens: int = Field(default=32_768, ge=1, description="size of that part, in tokens of the model")
    eval_batch_tokens: int = Field(default=8_192, ge=1, description="tokens per forward pass of an evaluation")
    save_every: int = Field(default=500, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1)
    bf16: bool | Literal["auto"] = Field(default="auto", description="auto: on a GPU that has it")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int = Field(default=1, ge=1, description="that share each batch on the CPU, at most one a thread")
    gradient_checkpointing: bool = False
    compile: bool = Field(default=False, description="torch.compile the model")


class Recipe(Section):
    """What every task's recipe has. A task subclasses it and adds its own sections."""

    name: str
    description: str = ""
    task: str
    model: dict[str, Any] = Field(default_factory=dict, description="fields of LeapformerConfig")
    training: TrainingSection = Field(default_factory=TrainingSection)

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe, with every default written out, as plain YAML types."""
        return self.model_dump(mode="json")

    @property
    def fingerprint(self) -> str:
        """A short digest of the recipe without its seed: equal for repetitions of one experiment."""
        return fingerprint(self.to_dict())


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """A short digest of a resolved recipe without its name, its seed, and the number of processes that share the work."""
    content = {key: value for key, value in recipe.items() if key not in ("name", "description")}
    content["training"] = {key: value for key, value in recipe["training"].items() if key not in ("seed", "processes")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def recipe_folder() -> Path:
    """The folder of the recipes that come with the package."""
    return Path(str(resources.files("leapformer") / "recipes"))


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, such as "lm/wikitext2-small"."""
    folder = recipe_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def read_recipe(reference: str | os.PathLike[str]) -> dict[str, Any]:
    """The unvalidated content of a recipe, on top of that of the recipe which its `base` names.

    Arguments:
        reference: a name out of `recipe_names`, or the path of a .yaml file.

    Raises:
        LeapformerError: there is no such recipe, the file is not a YAML mapping, or it is its own base.
    """
    content, seen = _read_alone(reference), [os.fspath(reference)]
    while (base := content.pop("base", None)) is not None:
        if base in seen:
            raise LeapformerError(
                f"recipe {seen[0]}: base: expected another recipe, found {' -> '.join([*seen, base])}"
            )
        seen.append(base)
        content = _on_top(_read_alone(base), content)
    return content


def _on_top(base: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key, anything else is replaced; the next base is the base's."""
    merged = {key: value for key, value in base.items() if key not in ("name", "description")}
    for key, value in content.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _read_alone(reference: str | os.PathLike[str]) -> dict[str, Any]:
    reference = os.fspath(reference)
    if reference.endswith((".yaml", ".yml")):
        path, name = Path(reference), Path(reference).stem
        if not path.is_file():
            raise LeapformerError(f"recipe file {reference}: no such file")
    else:
        path, name = recipe_folder() / f"{reference}.yaml", reference
        if reference not in recipe_names():
            raise LeapformerError(f"unknown recipe {reference!r}{nearest(reference, recipe_names(), everything=True)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LeapformerError(f"recipe file {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise LeapformerError(f"recipe file {path}: expected a mapping of sections, found {type(content).__name__}")
    content.setdefault("name", name)
    return content


def resolve_recipe(
    content: Mapping[str, Any], *, schema: type[Recipe], model_fields: Mapping[str, Any], overrides: Sequence[str] = ()
) -> Recipe:
    """Apply overrides to the content of a recipe and validate the whole.

    Arguments:
        content: what `read_recipe` returned.
        schema: the recipe type of the task.
        model_fields: the fields that the section `model` may use, with their types.
        overrides: "key=value" each; a key is dotted ("training.seed") or a name that only one section has ("seed").

    Raises:
        RecipeError: lists every fault.
    """
    name = str(content.get("name", "without a name"))
    known = known_keys(schema, model_fields)
    merged: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()
    }
    faults = list(_apply_overrides(merged, overrides, known))
    model = merged.get("model")
    if isinstance(model, Mapping):
        merged["model"], model_faults = _check_model_fields(model, model_fields)
        faults += model_faults
    try:
        recipe = schema.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(name, faults + list(_faults(error, known))) from error
    if faults:
        raise RecipeError(name, faults)
    return recipe


def known_keys(schema: type[Recipe], model_fields: Iterable[str]) -> list[str]:
    """Every dotted key that a recipe of this type may have."""
    keys = [f"model.{field}" for field in model_fields]
    for section, field in schema.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            keys += [f"{section}.{key}" for key in annotation.model_fields]
        elif section != "model":
            keys.append(section)
    return sorted(keys)


def nearest(name: str, known: Sequence[str], *, everything: bool = False) -> str:
    """ "; did you mean ...?" with the known names that look like `name`, or nothing.

    Arguments:
        everything: list all known names where none looks alike.
    """
    leaves = {key.rsplit(".", 1)[-1]: key for key in known}
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.55)
    close += [leaves[leaf] for leaf in difflib.get_close_matches(name, leaves, n=3, cutoff=0.6)]
    close = list(dict.fromkeys(close))[:3]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(known)}" if everything else ""


def parse_value(text: str) -> Any:
    """The value of an override: a number ("3e-3" included), or YAML (true, null, [leap, softmax], text)."""
    if NUMBER.fullmatch(text):
        number = float(text)
        is_integer = not re.search(r"[.eE]", text) and math.isfinite(number)
        return int(text) if is_integer else number
    return yaml.safe_load(text)


def expand_path(path: str, *, key: str) -> Path:
    """A path with ~ and $VARIABLES replaced.

    Raises:
        LeapformerError: a variable is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    missing = re.search(r"\$\{?(\w+)", expanded)
    if missing:
        raise LeapformerError(
            f"{key}: the environment variable {missing.group(1)} is not set (in {path!r}); "
            f"set it, or give the folder with {key}=PATH"
        )
    return Path(expanded)


def _apply_overrides(merged: dict[str, Any], overrides: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    """Write overrides into `merged`; yields the faults."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            yield f"override {override!r}: expected key=value"
            continue
        matches = [key] if key in known else [full for full in known if full.rsplit(".", 1)[-1] == key]
        if not matches:
            yield f"{key}: unknown key{nearest(key, known)}"
        elif len(matches) > 1:
            yield f"{key}: ambiguous; expected one of {', '.join(matches)}"
        else:
            section, dot, leaf = matches[0].partition(".")
            target = merged.setdefault(section, {}) if dot else merged
            if not isinstance(target, dict):
                continue  # the section itself is at fault, and validation says so
            try:
                target[leaf or section] = parse_value(text)
            except yaml.YAMLError:
                yield f"{key}: {text!r} is not a valid value"


def _check_model_fields(model: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a model section that are right, and a line for each of the others."""
    right, faults = {}, []
    for key, value in model.items():
        if key not in fields:
            faults.append(f"model.{key}: unknown key{nearest(key, sorted(fields))}")
            continue
        try:
            right[key] = TypeAdapter(fields[key]).validate_python(value)
        except ValidationError as error:
            expected = " or ".join(dict.fromkeys(_expected(fault) for fault in error.errors()))
            faults.append(f"model.{key}: expected {expected}, found {value!r}")
    return right, faults


def _expected(fault: Mapping[str, Any]) -> str:
    return fault["msg"].removeprefix("Input should be ")


def _faults(error: ValidationError, known: Sequence[str]) -> Iterator[str]:
    """One line for each fault that pydantic found; the branches of a union are told as one."""
    seen = set()
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        key = ".".join(path[:2])
        if key in seen:
            continue
        seen.add(key)
        if fault["type"] == "extra_forbidden":
            yield f"{key}: unknown key{nearest(key, known)}"
        elif fault["type"] == "missing":
            yield f"{key}: missing"
        elif fault["type"] == "value_error":
            yield fault["msg"].removeprefix("Value error, ")  # our own checks name the key themselves
        else:
            yield f"{key}: expected {_expected(fault)}, found {fault['input']!r}"
