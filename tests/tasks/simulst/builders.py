"""Tiny data and recipes of translation, so small that a whole training takes about a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from leapformer.tasks.card import FORMAT
from leapformer.tasks.registry import load_recipe

NOUNS = {"dog": "Hund", "tree": "Baum", "table": "Tisch", "man": "Mann", "train": "Zug", "apple": "Apfel"}
VERBS = {"sees": "sieht", "finds": "findet", "takes": "nimmt", "knows": "kennt"}
SIZES = {"train": 60, "validation": 12, "test": 12}


def pairs(split: str) -> list[tuple[str, str]]:
    """English sentences with their German translations."""
    rng = np.random.default_rng(sorted(SIZES).index(split))
    found = []
    for _ in range(SIZES[split]):
        subject, thing = (list(NOUNS)[number] for number in rng.integers(len(NOUNS), size=2))
        verb = list(VERBS)[rng.integers(len(VERBS))]
        found.append((f"The {subject} {verb} the {thing}.", f"Der {NOUNS[subject]} {VERBS[verb]} den {NOUNS[thing]}."))
    return found


def write_texts(folder: Path) -> Path:
    """The pairs as files of lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SIZES:
        for place, language in enumerate(("en", "de")):
            lines = [pair[place] for pair in pairs(split)]
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_speech(folder: Path) -> Path:
    """The pairs as prepared audio: each character is a tone of 20 ms."""
    folder.mkdir(parents=True, exist_ok=True)
    card: dict[str, Any] = {
        "format": FORMAT,
        "task": "spoken",
        "made": {},
        "sample_rate": 16_000,
        "licence": "none",
        "splits": {},
        "bad_rows": [],
    }
    for split in SIZES:
        rows, start, pieces = [], 0, []
        for number, (text, translation) in enumerate(pairs(split)):
            times = np.arange(320) / 16_000
            tones = [np.sin(2 * np.pi * (200 + 60 * (ord(c) % 50)) * times) for c in text]
            audio = (8000 * np.concatenate(tones)).astype("<i2")
            pieces.append(audio)
            rows.append(
                {
                    "id": f"{split}-{number:06d}",
                    "text": text,
                    "translation": translation,
                    "start": start,
                    "samples": len(audio),
                }
            )
            start += len(audio)
        (folder / f"{split}.int16").write_bytes(np.concatenate(pieces).tobytes())
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        card["splits"][split] = {
            "utterances": len(rows),
            "seconds": start / 16_000,
            "bytes": 2 * start,
            "speakers": 1,
            "sha256": {"made": f"{split} of a test"},
        }
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


def tiny_content(path: Path, *, source: str = "text") -> dict[str, Any]:
    """The content of a recipe on such data."""
    return {
        "name": "tiny",
        "task": "simulst",
        "data": {"source": source, "path": str(path)},
        "vocabulary": {"size": 40, "source_size": 40},
        "wait_k": {"max_k": 3, "whole_share": 0.2, "eval_k": 2},
        "augmentation": {"time_share": 0.2, "speed": 0.1, "vocal_tract": 0.1},
        "model": {
            "pre_decision": 1 if source == "text" else 9,
            "conv_channels": 4,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "initializer_range": 0.2,
            "ctc_weight": 0.3,
        },
        "training": {
            "max_steps": 6,
            "batch_size": 4,
            "learning_rate": 0.01,
            "warmup_steps": 2,
            "log_every": 1,
            "eval_every": 3,
            "eval_tokens": 100,
            "eval_batch_tokens": 300,
            "save_every": 2,
            "device": "cpu",
        },
    }


def write_recipe(folder: Path, content: dict[str, Any], name: str = "tiny") -> Path:
    """The recipe as a file."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**content, "name": name}), encoding="utf-8")
    return path


def tiny_recipe(folder: Path, *overrides: str, source: str = "text"):
    """A validated recipe and its task on fresh data."""
    write = write_texts if source == "text" else write_speech
    data = folder / f"{source}-data"
    if not data.is_dir():
        write(data)
    return load_recipe(write_recipe(folder, tiny_content(data, source=source)), overrides)
