"""Checkpoints that were damaged, or made by hand, are told in one line before they are used."""

from __future__ import annotations

import io
import json
import logging
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from leapformer.errors import LeapformerError
from leapformer.files.checksums import SUMS, check_sums
from leapformer.files.records import read_progress
from leapformer.training.arguments import build_optimizer, build_schedule
from leapformer.training.loading import load_model
from leapformer.training.recipes import TrainingSection
from leapformer.training.restoring import (
    check_random_state,
    check_trainer_state,
    load_optimizer,
    load_schedule,
    load_weights,
    read_archive,
)
from leapformer.training.run import Run
from leapformer.training.saving import seal
from leapformer.training.train import train

from .builders import tiny_recipe
from .test_train import interrupt_at, last_weights, losses

FILES = ["optimizer.pt", "model.safetensors", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress.json"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was stopped after step 5, with checkpoint-3 before it; and how it ends."""
    folder = tmp_path_factory.mktemp("interrupted")
    recipe, task = tiny_recipe(folder)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 4)
        assert train(recipe, task, folder / "run").results is None
    shutil.copytree(folder / "run", folder / "whole")
    assert train(recipe, task, folder / "whole").results is not None
    return folder, recipe, task


@pytest.fixture
def run(interrupted, tmp_path):
    """A copy of the interrupted run."""
    shutil.copytree(interrupted[0] / "run", tmp_path / "run")
    return Run(tmp_path / "run")


def last(run: Run) -> Path:
    return run.checkpoints_path / "checkpoint-5"


def flipped(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed(run, name):
    path = last(run) / name
    whole = path.read_bytes()
    bits = [int(share * (len(whole) * 8 - 1)) for share in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1)]
    for bit in bits:
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(LeapformerError) as caught:
            run.last_checkpoint()
        message = str(caught.value)
        assert str(path) in message and "\n" not in message and len(message) < 600
        assert message.endswith(f"remove {last(run)} to resume from checkpoint-3")
    path.write_bytes(whole)
    assert run.last_checkpoint() == last(run)


def test_the_way_out_is_one(interrupted, run):
    """Also where there is no checkpoint before."""
    _, recipe, task = interrupted
    shutil.rmtree(run.checkpoints_path / "checkpoint-3")
    (last(run) / "optimizer.pt").unlink()
    with pytest.raises(LeapformerError, match=f"remove {last(run)} to begin again with step 1$"):
        train(recipe, task, run.path)
    shutil.rmtree(last(run))
    assert train(recipe, task, run.path).results is not None
    assert losses(run.path) == losses(interrupted[0] / "whole")


@pytest.mark.parametrize("damage", ["", "gone", "row"])
def test_damaged_checksums_are_noticed(run, damage):
    path = last(run) / SUMS
    lines = path.read_text().splitlines(keepends=True)
    path.write_text({"": "", "gone": "".join(lines[:-3]), "row": "".join(lines) + "\0"}[damage])
    with pytest.raises(LeapformerError, match=f"{SUMS}.*; remove .*checkpoint-5 to resume from"):
        run.last_checkpoint()


def test_checkpoints_of_older_versions_still_load(interrupted, run):
    """Without checksums, and without the sum of losses of the row that is to come."""
    folder, recipe, task = interrupted
    for path in [*run.path.rglob(SUMS)]:
        path.unlink()
    progress = json.loads((last(run) / "progress.json").read_text())
    (last(run) / "progress.json").write_text(json.dumps({key: progress[key] for key in ("targets", "seconds")}))
    assert train(recipe, task, run.path).results is not None
    expected = last_weights(folder / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in last_weights(run.path).items())


def test_a_saved_model_is_checked_where_it_is_loaded(run, caplog):
    folder = run.model_path
    assert check_sums(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for share in (0.3, 0.6, 0.999):
        weights.write_bytes(flipped(whole, int(len(whole) * 8 * share)))
        with pytest.raises(LeapformerError, match="model.safetensors: (this file is damaged|expected whole)"):
            load_model(folder)
    weights.write_bytes(whole)
    with caplog.at_level(logging.WARNING, logger="leapformer"):
        load_model(folder)
        assert not caplog.records
        tokenizer = folder / "tokenizer_config.json"
        tokenizer.write_text(tokenizer.read_text() + " ")
        load_model(folder)
    (record,) = caplog.records
    assert "tokenizer_config.json: this file is damaged" in record.getMessage() and SUMS in record.getMessage()


# ---- what a right checksum does not tell


def resealed(folder: Path, name: str, content: object) -> None:
    torch.save(content, folder / name)
    seal(folder)


def test_a_state_made_by_hand_ends_in_one_line(interrupted, run):
    """The fused optimizers would read beyond these tensors."""
    _, recipe, task = interrupted
    state = torch.load(last(run) / "optimizer.pt", weights_only=True)
    state["state"][0]["exp_avg"] = torch.zeros(1)
    resealed(last(run), "optimizer.pt", state)
    with pytest.raises(LeapformerError) as caught:
        train(recipe, task, run.path)
    message = str(caught.value)
    assert "optimizer.pt: parameter 0: exp_avg: expected a tensor of float32 [" in message and "\n" not in message
    assert "found a tensor of float32 [1]; remove " in message
    # Elsewhere in the same folder: weights of another shape, a schedule of another step, generators of another kind.
    shutil.rmtree(last(run))
    other = run.checkpoints_path / "checkpoint-3"
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name].double()}, other / "model.safetensors")
    seal(other)
    with pytest.raises(LeapformerError, match=f"{name}: expected a tensor of float32 .*, found a tensor of float64"):
        train(recipe, task, run.path)
    save_file(weights, other / "model.safetensors")
    random_state = torch.load(other / "rng_state.pth", weights_only=False)
    resealed(other, "rng_state.pth", {**random_state, "cpu": torch.zeros(3)})
    with pytest.raises(
        LeapformerError, match="rng_state.pth: cpu: expected a tensor of uint8 .*begin again with step 1"
    ):
        train(recipe, task, run.path)


def small(optimizer: str = "adamw") -> tuple[torch.optim.Optimizer, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    built = build_optimizer(model, TrainingSection(optimizer=optimizer, warmup_steps=2))  # type: ignore[arg-type]
    build_schedule(built, TrainingSection())
    return built, model


def stepped(optimizer: str, steps: int = 2) -> tuple[torch.optim.Optimizer, nn.Module]:
    built, model = small(optimizer)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        built.step()
    return built, model


@pytest.mark.parametrize("optimizer", ["adamw", "nesterov", "muon"])
def test_a_state_of_the_same_optimizer_is_taken_up(tmp_path, optimizer):
    one, model = stepped(optimizer)
    torch.save(one.state_dict(), tmp_path / "optimizer.pt")
    two, other = small(optimizer)
    other.load_state_dict(model.state_dict())
    load_optimizer(two, tmp_path / "optimizer.pt")
    for each, weights in ((one, model), (two, other)):
        each.zero_grad()
        weights(torch.ones(1, 3)).sum().backward()
        each.step()
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, its)
    third, _ = small({"adamw": "nesterov", "nesterov": "muon", "muon": "adamw"}[optimizer])
    with pytest.raises(LeapformerError, match="optimizer.pt: "):
        load_optimizer(third, tmp_path / "optimizer.pt")


BAD_TENSORS = {
    "dtype": torch.zeros(4, 3, dtype=torch.float64),
    "integers": torch.zeros(4, 3, dtype=torch.int64),
    "shape": torch.zeros(4, 4),
    "empty": torch.zeros(0),
    "expanded": torch.zeros(1).expand(4, 3),
    "transposed": torch.zeros(3, 4).T,
    "sparse": torch.zeros(4, 3).to_sparse(),
    "number": 0.5,
    "none": None,
    "list": [0.0] * 12,
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_tensors_of_another_form_are_refused(tmp_path, kind):
    built, _ = stepped("adamw")
    state = built.state_dict()
    state["state"][0]["exp_avg_sq"] = BAD_TENSORS[kind]
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(LeapformerError, match=r"parameter 0: exp_avg_sq: expected a tensor of float32 \[4, 3\], found"):
        load_optimizer(built, tmp_path / "optimizer.pt")


def bad_states() -> dict:
    good = stepped("adamw")[0].state_dict()
    groups, state = good["param_groups"], good["state"]
    shared: list = []
    for _ in range(60):
        shared = [shared, shared]
    return {
        "no mapping": [1, 2],
        "no state": {"param_groups": groups},
        "groups": {**good, "param_groups": groups[:1]},
        "group": {**good, "param_groups": [3, groups[1]]},
        "params": {**good, "param_groups": [{**groups[0], "params": [0, 0]}, groups[1]]},
        "rate": {**good, "param_groups": [{**groups[0], "lr": float("nan")}, groups[1]]},
        "rate bomb": {**good, "param_groups": [{**groups[0], "lr": shared}, groups[1]]},
        "params bomb": {**good, "param_groups": [{**groups[0], "params": shared}, groups[1]]},
        "index": {**good, "state": {**state, 99: state[0]}},
        "name": {**good, "state": {**state, "0": state[0]}},
        "keys": {**good, "state": {**state, 0: {"step": torch.zeros(())}}},
        "step": {**good, "state": {**state, 0: {**state[0], "step": torch.zeros(2)}}},
        "step dtype": {**good, "state": {**state, 0: {**state[0], "step": torch.zeros((), dtype=torch.int64)}}},
    }


@pytest.mark.parametrize("kind", bad_states())
def test_states_of_another_structure_are_refused(tmp_path, kind):
    built, _ = stepped("adamw")
    torch.save(bad_states()[kind], tmp_path / "optimizer.pt")
    with pytest.raises(LeapformerError) as caught:
        load_optimizer(built, tmp_path / "optimizer.pt")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_options_are_those_of_the_recipe(tmp_path):
    """`maximize` or `capturable` in a file would change what the optimizer does."""
    built, _ = stepped("adamw")
    state = built.state_dict()
    state["param_groups"] = [
        {**group, "maximize": True, "eps": 5.0, "new": 1, "lr": 0.5} for group in state["param_groups"]
    ]
    torch.save(state, tmp_path / "optimizer.pt")
    load_optimizer(built, tmp_path / "optimizer.pt")
    for group in built.param_groups:
        assert (group["maximize"], group["eps"], group["lr"], "new" in group) == (False, 1e-8, 0.5, False)


def test_a_schedule_elsewhere_is_refused(tmp_path):
    built, _ = small()
    schedule = build_schedule(built, TrainingSection(warmup_steps=2))
    state = schedule.state_dict()
    for change in ({"last_epoch": 7}, {"last_epoch": True}, {"_last_lr": [0.1]}, {"_last_lr": 3}, {"_step_count": "x"}):
        torch.save({**state, **change}, tmp_path / "scheduler.pt")
        with pytest.raises(LeapformerError, match="scheduler.pt: "):
            load_schedule(schedule, tmp_path / "scheduler.pt", step=0)
    torch.save({**state, "step": 1, "optimizer": None}, tmp_path / "scheduler.pt")
    load_schedule(schedule, tmp_path / "scheduler.pt", step=0)
    assert callable(schedule.step) and schedule.optimizer is built


def test_random_states_of_another_form_are_refused(tmp_path):
    path = tmp_path / "rng_state.pth"
    good = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(good, path)
    check_random_state(path)
    kind, keys, position, *rest = good["numpy"]
    for change in (
        {"python": (3, (1, 2), None)},
        {"python": None},
        {"cpu": torch.zeros(5)},
        {"numpy": (kind, keys, 10**6, *rest)},
        {"numpy": (kind, keys[:5], position, *rest)},
        {"numpy": ("PCG64", keys, position, *rest)},
    ):
        torch.save({**good, **change}, path)
        with pytest.raises(LeapformerError, match="rng_state.pth: "):
            check_random_state(path)


def test_weights_that_lack_one_are_refused(tmp_path):
    _, model = small()
    weights = model.state_dict()
    save_file({name: weights[name] for name in list(weights)[1:]}, tmp_path / "model.safetensors")
    with pytest.raises(LeapformerError, match="expected the weights of this recipe's model, found no 0.weight"):
        load_weights(model, tmp_path / "model.safetensors")
    save_file({**weights, "more": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(LeapformerError, match="expected the weights of this recipe's model, found more"):
        load_weights(model, tmp_path / "model.safetensors")


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_archives_run_no_code_and_do_not_swell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), "evil.pt")
    with pytest.raises(LeapformerError, match="evil.pt: expected a file of torch.save with tensors and numbers alone"):
        read_archive(tmp_path / "evil.pt")
    assert not (tmp_path / "evil").exists()
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", pickle.dumps(bytes(1 << 20)))
    with pytest.raises(
        LeapformerError, match="bomb.pt: expected a file of torch.save, found one with compressed parts"
    ):
        read_archive(tmp_path / "bomb.pt")
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer)
    for cut in range(0, len(buffer.getvalue()), 97):
        (tmp_path / "cut.pt").write_bytes(buffer.getvalue()[:cut])
        with pytest.raises(LeapformerError, match="cut.pt: expected a whole file"):
            read_archive(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("progress.json", {"targets": "many"}),
        ("progress.json", {"targets": -1}),
        ("progress.json", {"seconds": None}),
        ("progress.json", {"targets": 1.5}),
        ("progress.json", {"loss_sum": [1]}),
        ("progress.json", {"loss_steps": -3}),
        ("trainer_state.json", {"global_step": 4}),
        ("trainer_state.json", {"global_step": "5"}),
        ("trainer_state.json", {"unheard_of": 1}),
        ("trainer_state.json", {"log_history": {}}),
        ("trainer_state.json", {"best_metric": "x"}),
        ("trainer_state.json", {"epoch": [0]}),
    ],
)
def test_counts_of_another_kind_are_refused(run, name, change):
    path = last(run) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LeapformerError, match=f"{name}: ") as caught:
        read_progress(path) if name == "progress.json" else check_trainer_state(path, step=5)
    assert "\n" not in str(caught.value)
    seal(last(run))
    with pytest.raises(LeapformerError, match="remove .*checkpoint-5 to resume from checkpoint-3"):
        run.last_checkpoint()
