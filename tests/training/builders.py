"""A language model so small that a whole training takes about a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from leapformer.tasks.registry import load_recipe
from leapformer.training.recipes import Recipe
from leapformer.training.task import Task

WORDS = "the cat sat on a mat and saw the dog that ate an apple near an old house by the sea".split()


def write_text_file(folder: Path) -> Path:
    """A file of simple sentences."""
    path = folder / "text.txt"
    lines = [" ".join(WORDS[(step * start + start) % len(WORDS)] for step in range(9)) for start in range(1, 60)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_content(folder: Path) -> dict[str, Any]:
    """The content of a recipe that trains on it."""
    return {
        "name": "tiny",
        "task": "lm",
        "data": {"source": "text", "path": str(write_text_file(folder)), "block_size": 16},
        "tokenizer": {"kind": "bytes"},
        "model": {
            "attention": "leap",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "hidden_dropout": 0.1,
        },
        "training": {
            "max_steps": 8,
            "batch_size": 4,
            "warmup_steps": 2,
            "log_every": 1,
            "eval_every": 4,
            "eval_tokens": 200,
            "save_every": 3,
            "device": "cpu",
        },
    }


def write_recipe(folder: Path) -> Path:
    """The recipe as a file."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_content(folder)), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, *overrides: str) -> tuple[Recipe, Task]:
    """The validated recipe and its task."""
    return load_recipe(write_recipe(folder), overrides)
