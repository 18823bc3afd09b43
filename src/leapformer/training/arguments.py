"""From a recipe to what the Hugging Face Trainer takes: its arguments, the optimizer and the schedule."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

from leapformer.errors import LeapformerError
from leapformer.training.muon import Muon, hidden_matrices
from leapformer.training.recipes import TrainingSection


def training_arguments(section: TrainingSection, *, checkpoints: Path) -> TrainingArguments:
    """The Trainer's arguments. Logging, progress and the choice of the best model are ours, so they are off here."""
    on_cpu = choose_device(section) == "cpu"
    options: dict[str, Any] = {
        "output_dir": str(checkpoints),
        "max_steps": section.max_steps,
        "per_device_train_batch_size": section.batch_size,
        "gradient_accumulation_steps": section.accumulation,
        "learning_rate": section.learning_rate,
        "max_grad_norm": section.clip,
        "seed": section.seed,
        "bf16": use_bf16(section),
        "use_cpu": on_cpu,
        "torch_compile": section.compile,
        "logging_strategy": "steps",
        "logging_steps": section.log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": section.eval_every,
        "save_strategy": "steps",
        "save_steps": section.save_every,
        "save_total_limit": section.keep_checkpoints,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": not on_cpu,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(**options)


def choose_device(section: TrainingSection) -> str:
    """ "cpu" or "cuda".

    Raises:
        LeapformerError: the recipe asks for a GPU and there is none.
    """
    available = torch.cuda.is_available()
    if section.device == "cuda" and not available:
        raise LeapformerError("training.device: expected a GPU that torch can use (device=cuda), found none")
    return "cuda" if section.device == "cuda" or (section.device == "auto" and available) else "cpu"


def use_bf16(section: TrainingSection) -> bool:
    """Whether to train under bfloat16 autocast: "auto" does so on a GPU that has it."""
    if section.bf16 == "auto":
        return choose_device(section) == "cuda" and torch.cuda.is_bf16_supported()
    return section.bf16


def build_optimizer(model: nn.Module, section: TrainingSection) -> Optimizer:
    """AdamW, SGD with Nesterov's momentum, or Muon with AdamW; only matrices and tables are decayed."""
    matrices = hidden_matrices(model) if section.optimizer == "muon" else []
    taken = {id(matrix) for matrix in matrices}
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if section.optimizer == "nesterov":
        return torch.optim.SGD(groups, lr=section.learning_rate, momentum=section.momentum, nesterov=True)
    adaptive: dict[str, Any] = {"lr": section.learning_rate, "betas": section.betas, "eps": section.epsilon}
    if section.optimizer == "muon":
        return Muon(matrices, groups, weight_decay=section.weight_decay, momentum=section.momentum, **adaptive)
    return torch.optim.AdamW(groups, **adaptive, fused=True)


def build_schedule(optimizer: Optimizer, section: TrainingSection) -> LambdaLR:
    """The learning rate by step: a linear warm-up, then the recipe's decay to its lowest value."""
    return LambdaLR(optimizer, partial(_scale, section=section))


def learning_rate(step: int, section: TrainingSection) -> float:
    """The learning rate of step `step`, counted from 0.

    The warm-up is linear from `warmup_learning_rate`; its first step is already one step up, so that none is wasted.
    """
    high, low = section.learning_rate, section.min_learning_rate
    if step < section.warmup_steps:
        start = section.warmup_learning_rate
        return start + (high - start) * (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, section.max_steps - section.warmup_steps)
    if section.schedule == "cosine":
        return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if section.schedule == "linear":
        return high + (low - high) * min(1.0, progress)
    if section.schedule == "inverse-sqrt":
        return max(low, high * math.sqrt(max(1, section.warmup_steps) / (step + 1)))
    return high


def _scale(step: int, section: TrainingSection) -> float:
    return learning_rate(step, section) / section.learning_rate
