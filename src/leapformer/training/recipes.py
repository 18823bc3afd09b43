"""Recipes: everything that decides what is trained, as one validated YAML document.

A recipe has the sections `model` and `training` described here, and the sections its task adds (a language model:
`data` and `tokenizer`). Unknown keys are faults, and all faults of a recipe are reported together.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from leapformer.errors import LeapformerError
from leapformer.files.reading import is_plain_value, parse_yaml, read_yaml
from leapformer.files.records import expected
from leapformer.files.showing import cut, shown

MOST_STEPS = 10**9
MOST_TOKENS = 10**9  # of a batch, a block, a part of a split
MOST_BATCH = 10**6
MOST_RATE = 1e38  # what float32 holds; a rate that is too high ends the training by itself
MOST_SEED = 2**32 - 1  # that numpy takes
MOST_BASES = 20  # recipes that stand on one another
MOST_FAULTS = 50  # told of one recipe
QUOTED = ("[", "{", '"', "'")  # how an override's value begins that is read as YAML


class RecipeError(LeapformerError):
    """A recipe that can't be used. With several faults, each stands on a line of its own after the first."""

    def __init__(self, recipe: str, faults: Sequence[str]) -> None:
        self.faults = [cut(fault, 400) for fault in faults]
        if len(self.faults) == 1:
            super().__init__(f"recipe {recipe}: {self.faults[0]}")
        else:
            lines = "".join(f"\n  {fault}" for fault in self.faults[:MOST_FAULTS])
            super().__init__(f"recipe {recipe}: {len(self.faults)} faults{lines}")


Beta = Annotated[float, Field(ge=0, lt=1)]
# That of a folder too.
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]


class Section(BaseModel):
    """A group of recipe keys. Keys it does not know are faults."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and not _takes_truth(cls.model_fields[str(info.field_name)].annotation):
            raise PydanticCustomError("truth", "a value that is no truth value")
        return value


def _takes_truth(annotation: Any) -> bool:
    """pydantic takes true for 1 where only a number is asked for."""
    return any(kind in str(annotation) for kind in ("bool", "Any"))


class TrainingSection(Section):
    """How the weights are found. Steps count optimizer updates; tokens are those the loss is taken over."""

    seed: int = Field(default=0, ge=0, le=MOST_SEED, description="start of the weights, dropout and order of the data")
    max_steps: int = Field(default=1000, ge=1, le=MOST_STEPS)
    batch_size: int = Field(default=8, ge=1, le=MOST_BATCH, description="blocks per device and forward pass")
    accumulation: int = Field(default=1, ge=1, le=MOST_BATCH, description="forward passes per step")
    optimizer: Literal["adamw", "nesterov", "muon"] = "adamw"
    learning_rate: float = Field(default=3e-3, gt=0, le=MOST_RATE, description="the highest of the schedule")
    min_learning_rate: float = Field(default=0.0, ge=0, le=MOST_RATE, description="where the schedule ends")
    schedule: Literal["cosine", "linear", "inverse-sqrt", "constant"] = "cosine"
    warmup_steps: int = Field(default=100, ge=0, le=MOST_STEPS)
    warmup_learning_rate: float = Field(default=0.0, ge=0, le=MOST_RATE, description="where the warm-up starts")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), description="of AdamW")
    epsilon: float = Field(default=1e-8, gt=0, le=1, description="of AdamW")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="of Nesterov's SGD and of Muon")
    weight_decay: float = Field(default=0.1, ge=0, le=MOST_RATE, description="on matrices; never on biases and norms")
    clip: float = Field(default=1.0, ge=0, le=1e30, description="largest norm of the gradient; 0 for none")
    clip_values: float = Field(default=0.0, ge=0, le=1e30, description="largest size of each of its values; 0 for none")
    log_every: int = Field(default=50, ge=1, le=MOST_STEPS, description="steps")
    eval_every: int = Field(
        default=500, ge=1, le=MOST_STEPS, description="steps between evaluations on a part of the validation set"
    )
    eval_tokens: int = Field(
        default=32_768, ge=1, le=MOST_TOKENS, description="size of that part, in tokens of the model"
    )
    eval_batch_tokens: int = Field(
        default=8_192, ge=1, le=MOST_TOKENS, description="tokens per forward pass of an evaluation"
    )
    save_every: int = Field(default=500, ge=1, le=MOST_STEPS, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, le=MOST_STEPS)
    bf16: bool | Literal["auto"] = Field(default="auto", description="auto: on a GPU that has it")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int = Field(
        default=1, ge=1, le=1024, description="that share each batch on the CPU, at most one a thread"
    )
    gradient_checkpointing: bool = False
    compile: bool = Field(default=False, description="torch.compile the model")


class Recipe(Section):
    """What every task's recipe has. A task subclasses it and adds its own sections."""

    name: Name
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
    """A short digest of a resolved recipe without its name, its seed, and how many processes share the work."""
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
        if not isinstance(base, str) or base in seen or len(seen) == MOST_BASES:
            found = " -> ".join([*seen, base]) if isinstance(base, str) else shown(base)
            raise LeapformerError(f"recipe {cut(seen[0], 240)}: base: expected another recipe, found {cut(found, 240)}")
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
        if not os.path.lexists(path):
            raise LeapformerError(f"recipe file {cut(reference, 240)}: no such file")
    else:
        path, name = recipe_folder() / f"{reference}.yaml", reference
        if reference not in recipe_names():
            raise LeapformerError(
                f"unknown recipe {shown(reference)}{nearest(reference, recipe_names(), everything=True)}"
            )
    try:
        content = read_yaml(path)
    except LeapformerError as error:
        raise LeapformerError(f"recipe file {error}") from None
    if not isinstance(content, dict):
        raise LeapformerError(
            f"recipe file {cut(path, 240)}: expected a mapping of sections, found {type(content).__name__}"
        )
    for key in content:
        if not isinstance(key, str):
            raise LeapformerError(f"recipe file {cut(path, 240)}: expected names of sections, found {shown(key)}")
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
    name = cut(content["name"]) if isinstance(content.get("name"), str) else "without a name"
    known = known_keys(schema, model_fields)
    merged: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()
    }
    faults = [*_apply_overrides(merged, overrides, known), *_unwritable(merged)]
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
    name = name[:100]  # the search takes quadratic time
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.55)
    close += [leaves[leaf] for leaf in difflib.get_close_matches(name, leaves, n=3, cutoff=0.6)]
    close = list(dict.fromkeys(close))[:3]
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known: {', '.join(known)}" if everything else ""


def parse_value(text: str) -> Any:
    """The value of an override: null, true, false or a number as in YAML, YAML where it begins with [ { or a quote,
    else the text as it is.

    Raises:
        LeapformerError: it begins like YAML, and is none.
    """
    return parse_yaml(text, where="value") if is_plain_value(text) or text.startswith(QUOTED) else text


def as_override(key: str, text: str) -> str:
    """The override that sets a key to this very text."""
    quoted = is_plain_value(text) or text.startswith(QUOTED)
    return f"{key}={json.dumps(text, ensure_ascii=False) if quoted else text}"


def expand_path(path: str, *, key: str) -> Path:
    """A path with ~ and $VARIABLES replaced.

    Raises:
        LeapformerError: a variable is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    missing = re.search(r"\$\{?(\w+)", expanded)
    if missing:
        raise LeapformerError(
            f"{key}: the environment variable {cut(missing.group(1))} is not set (in {shown(path)}); "
            f"set it, or give the folder with {key}=PATH"
        )
    return Path(expanded)


def _apply_overrides(merged: dict[str, Any], overrides: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    """Write overrides into `merged`; yields the faults."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            yield f"override {shown(override)}: expected key=value"
            continue
        matches = [key] if key in known else [full for full in known if full.rsplit(".", 1)[-1] == key]
        if not matches:
            yield f"{cut(key)}: unknown key{nearest(key, known)}"
        elif len(matches) > 1:
            yield f"{key}: ambiguous; expected one of {', '.join(matches)}"
        else:
            section, dot, leaf = matches[0].partition(".")
            target = merged.setdefault(section, {}) if dot else merged
            if not isinstance(target, dict):
                continue  # the section itself is at fault, and validation says so
            try:
                target[leaf or section] = parse_value(text)
            except LeapformerError as error:
                yield f"{key}: {error}"


def _unwritable(content: Any) -> Iterator[str]:
    """A fault where a text is none that a file or a path can hold."""
    level = [content]
    while level:
        for each in level:
            if isinstance(each, str) and ("\0" in each or any("\ud800" <= letter <= "\udfff" for letter in each)):
                yield f"expected text, found {shown(each)}, which is none that a file can hold"
                return
        level = [
            inner
            for outer in level
            if isinstance(outer, Mapping | list)
            for inner in ([*outer.keys(), *outer.values()] if isinstance(outer, Mapping) else outer)
        ]


def _check_model_fields(model: Mapping[str, Any], fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a model section that are right, and a line for each of the others."""
    right, faults = {}, []
    for key, value in model.items():
        if key not in fields:
            faults.append(f"model.{cut(key)}: unknown key{nearest(str(key), sorted(fields))}")
            continue
        if isinstance(value, bool) and not _takes_truth(fields[key]):
            faults.append(f"model.{key}: expected a value that is no truth value, found {value}")
            continue
        try:
            right[key] = TypeAdapter(fields[key], config=ConfigDict(allow_inf_nan=False)).validate_python(value)
        except ValidationError as error:
            wanted = " or ".join(dict.fromkeys(expected(fault) for fault in error.errors()))
            faults.append(f"model.{key}: expected {wanted}, found {shown(value)}")
    return right, faults


def _faults(error: ValidationError, known: Sequence[str]) -> Iterator[str]:
    """One line for each fault that pydantic found; the branches of a union are told as one."""
    seen = set()
    for fault in error.errors():
        path = [str(part) for part in fault["loc"]]
        key = cut(".".join(path[:2]))
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
            yield f"{key}: expected {expected(fault)}, found {shown(fault['input'])}"
