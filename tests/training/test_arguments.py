"""The schedule, the optimizer and the choice of the device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leapformer.errors import LeapformerError
from leapformer.training.arguments import build_optimizer, build_schedule, choose_device, learning_rate, use_bf16
from leapformer.training.recipes import TrainingSection


def section(**fields) -> TrainingSection:
    return TrainingSection.model_validate({"max_steps": 100, "warmup_steps": 10, "learning_rate": 1.0} | fields)


def test_warm_up_and_cosine():
    plan = section(min_learning_rate=0.1)
    assert learning_rate(0, plan) == pytest.approx(0.1)
    assert learning_rate(9, plan) == learning_rate(10, plan) == pytest.approx(1.0)
    assert learning_rate(55, plan) == pytest.approx(0.55)
    assert learning_rate(100, plan) == learning_rate(200, plan) == pytest.approx(0.1)


def test_other_schedules_and_the_start_of_the_warm_up():
    assert learning_rate(55, section(schedule="linear")) == pytest.approx(0.5)
    assert learning_rate(99, section(schedule="constant")) == 1.0
    assert learning_rate(39, section(schedule="inverse-sqrt")) == pytest.approx(0.5)  # four times the warm-up
    assert learning_rate(10, section(schedule="inverse-sqrt", warmup_steps=10)) < 1.0
    assert learning_rate(99, section(schedule="inverse-sqrt", min_learning_rate=0.4)) == 0.4
    assert learning_rate(0, section(warmup_learning_rate=0.5)) == pytest.approx(0.55)
    assert learning_rate(0, section(warmup_steps=0)) == 1.0


def test_the_schedule_of_the_optimizer_is_that_function():
    plan = section()
    optimizer = build_optimizer(nn.Linear(2, 2), plan)
    schedule = build_schedule(optimizer, plan)
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(step, plan))
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("nesterov", torch.optim.SGD)])
def test_only_matrices_are_decayed(name, kind):
    optimizer = build_optimizer(nn.Linear(2, 3), section(optimizer=name, weight_decay=0.3))
    assert isinstance(optimizer, kind)
    decays = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(3, 2): 0.3, (3,): 0.0}


def test_bfloat16_is_for_devices_that_have_it(monkeypatch):
    assert use_bf16(section(device="cpu")) is False
    assert use_bf16(section(device="cpu", bf16=True)) is True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert choose_device(section()) == "cuda" and use_bf16(section()) is True


def test_a_missing_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LeapformerError, match="training.device: expected a GPU .* found none"):
        choose_device(section(device="cuda"))
