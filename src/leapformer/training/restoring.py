"""Taking up a checkpoint: weights, optimizer, schedule and random state, each checked against what is to take it.

A checksum says that a file is what somebody wrote; what is in it may still be of another training, or made by hand. The
fused optimizers read their state by address, so a tensor of another shape or dtype would end the process.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState

from leapformer.errors import LeapformerError
from leapformer.files.reading import read_json_object
from leapformer.files.showing import cut, shown
from leapformer.training.muon import Muon
from leapformer.training.saving import check_archive, check_weights

# What the state of numpy's generator is made of, which torch.load has to be told.
_core: Any = vars(np)["_core"]  # its stub hides what numpy's own pickles name
_NUMPY = [_core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def read_archive(path: Path) -> Any:
    """What torch.save wrote, with its tensors on the CPU; nothing in it can run code.

    Raises:
        LeapformerError: it is damaged, or holds more than tensors, numbers and what they are kept in.
    """
    check_archive(path)
    try:
        with torch.serialization.safe_globals(_NUMPY):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can end in any of Python's exceptions
        raise LeapformerError(
            f"{path}: expected a file of torch.save with tensors and numbers alone, found {cut(error, 120)}"
        ) from error


# ---- weights


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights by name into a model that has all of them in the same shapes.

    Raises:
        LeapformerError: they are damaged, or those of another model.
    """
    from safetensors.torch import load_file

    check_weights(path)
    found, own = load_file(path), model.state_dict()
    for name, tensor in found.items():
        if name not in own:
            raise LeapformerError(f"{path}: expected the weights of this recipe's model, found {cut(name)}")
        _expect(tensor, own[name], f"{path}: {cut(name)}")
    there = {own[name].data_ptr() for name in found}
    missing = [name for name, tensor in own.items() if name not in found and tensor.data_ptr() not in there]
    if missing:  # a tied weight is saved once
        raise LeapformerError(f"{path}: expected the weights of this recipe's model, found no {missing[0]}")
    model.load_state_dict(found, strict=False)


# ---- optimizer and schedule


def load_optimizer(optimizer: Optimizer, path: Path) -> None:
    """Take up the state and the learning rates of an optimizer that the same recipe made.

    Its other options are those of the recipe, whatever the file says.

    Raises:
        LeapformerError: the file is damaged, or its state is not of this optimizer and these parameters.
    """
    own, found = optimizer.state_dict(), read_archive(path)
    state, groups = _part(found, "state", dict, path), _part(found, "param_groups", list, path)
    if len(groups) != len(own["param_groups"]):
        raise LeapformerError(f"{path}: expected {len(own['param_groups'])} groups, found {len(groups)}")
    taken = []
    for number, (group, mine) in enumerate(zip(groups, own["param_groups"], strict=True)):
        where = f"{path}: group {number}"
        if not isinstance(group, dict):
            raise LeapformerError(f"{where}: expected options, found {shown(group)}")
        _expect(group.get("params"), mine["params"], f"{where}: params", exactly=True)
        rates = {key: group.get(key) for key in ("lr", "initial_lr") if key in mine}
        for key, rate in rates.items():
            _expect(rate, 0.0, f"{where}: {key}")
        taken.append({**mine, **rates})
    expected = dict(enumerate(_expected_states(optimizer)))
    for index, values in state.items():
        if type(index) is not int or index not in expected or not isinstance(values, dict):
            raise LeapformerError(f"{path}: expected the state of {len(expected)} parameters, found {shown(index)}")
        if values:
            _expect(values, expected[index], f"{path}: parameter {index}")
    optimizer.load_state_dict({"state": state, "param_groups": taken})


def _expected_states(optimizer: Optimizer) -> Iterable[dict[str, Any]]:
    """For every parameter in order, what its state is like when it has one."""
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if isinstance(optimizer, Muon) and number == 0:
                yield {"momentum": parameter}
            elif isinstance(optimizer, SGD):
                yield {"momentum_buffer": parameter}
            else:
                yield {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}


def load_schedule(schedule: LRScheduler, path: Path, *, step: int) -> None:
    """Take up where a schedule was, after `step` steps; its base and its form are those of the recipe.

    Raises:
        LeapformerError: the file is damaged, or was elsewhere.
    """
    own, found = schedule.state_dict(), read_archive(path)
    last = _part(found, "last_epoch", int, path)
    if last != step:
        raise LeapformerError(f"{path}: expected the schedule after step {step}, found that after step {shown(last)}")
    taken = {key: _part(found, key, type(own[key]), path) for key in ("last_epoch", "_step_count", "_last_lr")}
    _expect(taken["_last_lr"], own["_last_lr"], f"{path}: _last_lr")
    schedule.load_state_dict({**own, **taken})


# ---- random state


def check_random_state(path: Path) -> None:
    """Check that a file holds states of the generators of Python, numpy and torch, for the Trainer to set.

    Raises:
        LeapformerError: it is damaged, or holds something else.
    """
    found = read_archive(path)
    python = (*random.getstate()[:2], None)  # a normal draw is kept, or none
    own = {"python": python, "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    for key, mine in own.items():
        _expect(_part(found, key, object, path), mine, f"{path}: {key}")
    position = found["numpy"][2]
    if not 0 <= position <= 624:  # numpy reads there without looking
        raise LeapformerError(f"{path}: numpy: expected a position from 0 to 624, found {shown(position)}")


# ---- counts


def check_trainer_state(path: Path, *, step: int) -> None:
    """Check that trainer_state.json is one that the Trainer can take up after `step` steps.

    Raises:
        LeapformerError: it is damaged, or of another step.
    """
    found = read_json_object(path)
    known = {field.name for field in fields(TrainerState)}
    unknown = next((key for key in found if key not in known), None)
    if unknown is not None:
        raise LeapformerError(f"{path}: expected the state of a Trainer, found the key {shown(unknown)}")
    if found.get("global_step") != step:
        raise LeapformerError(f"{path}: global_step: expected {step}, found {shown(found.get('global_step'))}")
    for key, like in {"epoch": 0.0, "total_flos": 0.0, "best_metric": 0.0, "best_global_step": 0}.items():
        if found.get(key) is not None:
            _expect(found[key], like, f"{path}: {key}")
    history = found.get("log_history")
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise LeapformerError(f"{path}: log_history: expected a list of objects, found {shown(history)}")


# ---- values


def _part(value: Any, key: str, kind: type, path: Path) -> Any:
    """value[key], which is to be of a kind."""
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, kind) or found is None or isinstance(found, bool):
        raise LeapformerError(f"{path}: expected a state with {key!r}, found {shown(found)}")
    return found


def _expect(value: Any, like: Any, where: str, *, exactly: bool = False) -> None:
    """Check that a value is of the form of another: types, lengths and keys, shapes, dtypes and strides of tensors.

    Only what `like` has is looked at, so the work has a bound whatever the value is.

    Arguments:
        exactly: integers have to be equal too; texts always have to.

    Raises:
        LeapformerError: it isn't; names the first place.
    """
    expected = _mismatch(value, like, exactly)
    if expected is not None:
        found = f"a tensor of {_form(value)}" if isinstance(value, Tensor) else shown(value)
        raise LeapformerError(f"{where}: expected {expected}, found {found}")
    if isinstance(like, Mapping):
        for key, inner in like.items():
            _expect(value[key], inner, f"{where}: {key}", exactly=exactly)
    elif isinstance(like, list | tuple):
        for one, inner in zip(value, like, strict=True):
            _expect(one, inner, where, exactly=exactly)


def _mismatch(value: Any, like: Any, exactly: bool) -> str | None:
    """What was expected, without what is inside, where a value is not like another; None where it is."""
    if isinstance(like, Tensor):
        plain = type(value) in (Tensor, nn.Parameter)
        return None if plain and _form(value) == _form(like) else f"a tensor of {_form(like)}"
    if isinstance(like, np.ndarray):
        fits = type(value) is np.ndarray and (value.dtype, value.shape) == (like.dtype, like.shape)
        return None if fits else f"an array of {like.dtype}, {like.shape}"
    if isinstance(like, Mapping):
        fits = isinstance(value, dict) and value.keys() == like.keys()
        return None if fits else f"the keys {', '.join(map(str, like))}"
    if isinstance(like, list | tuple):
        fits = isinstance(value, list | tuple) and len(value) == len(like)
        return None if fits else f"{len(like)} values"
    if like is None:
        return None if value is None or _is_finite(value) else "a number or none"
    if isinstance(like, float):
        return None if _is_finite(value) else "a finite number"
    if exactly or isinstance(like, str):
        return None if type(value) is type(like) and value == like else shown(like)
    return None if type(value) is type(like) else type(like).__name__


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond a float
        return False


def _form(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return f"{tensor.dtype}, {tuple(tensor.shape)}, not as values in memory"
    # Expanded or transposed values are fewer, or in another order, than a kernel that goes by the address expects.
    strides = "" if tensor.is_contiguous() else f", strides {tensor.stride()}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{strides}"
