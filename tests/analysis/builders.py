"""Run folders as the training writes them, with made-up numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def results(attention: str, /, *, perplexity: float, **changes: Any) -> dict[str, Any]:
    """The content of a results.json."""
    return {
        "name": attention,
        "recipe": "lm/pydocs-tiny",
        "attention": attention,
        "variant": "paper",
        "seed": 0,
        "parameters": 412_345,
        "parameters_leap": 1_096 if attention == "leap" else 0,
        "steps": 400,
        "tokens": 819_200,
        "seconds": 93.4,
        "tokens_per_second": 8_770.9 if attention == "softmax" else 10_310.2,
        "peak_memory_mib": 812.5,
        "splits": {
            "validation": {
                "loss": 1.6,
                "bits_per_byte": math.log2(perplexity) * 9 / 60,
                "word_perplexity": perplexity,
                "tokens": 60_000,
                "words": 9_000,
                "bytes": 60_000,
            }
        },
        "perplexity_by_position": [
            {"start": place, "end": place + 1, "tokens": 200, "perplexity": 4 + 20 / (place + 1)}
            for place in range(255)
        ],
        "baselines": {"unigram_word_perplexity": 3_211.0, "bigram_word_perplexity": 640.2},
        "machine": {"system": "Linux", "processor": "A processor <x86>", "threads": 2, "gpu": None},
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "git": "0123456789ab",
        **changes,
    }


def write_run(folder: Path, attention: str, /, *, perplexity: float = 310.0, **changes: Any) -> Path:
    """A finished run folder."""
    run = folder / attention
    run.mkdir(parents=True)
    run.joinpath("results.json").write_text(json.dumps(results(attention, perplexity=perplexity, **changes)))
    shift = math.log(perplexity) / 10
    rows: list[dict[str, Any]] = []
    for step in range(10, 401, 10):
        loss = 1.4 + 4.0 * math.exp(-step / 40) + shift
        rows.append({"step": step, "loss": loss, "learning_rate": 1e-3, "tokens": step * 2048, "seconds": step * 0.2})
        if step % 80 == 0:
            rows.append({"step": step, "eval_loss": loss + 0.05, "tokens": step * 2048, "seconds": step * 0.2})
    run.joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def translation_results(attention: str, /, *, points: list[dict[str, Any]] | None, **changes: Any) -> dict[str, Any]:
    """The results.json of a translation run; `points` are its curve on the validation split, None for none."""
    own = results(attention, perplexity=2.0, recipe="simulst/demo", source="speech", perplexity_by_position=[])
    del own["baselines"]
    own["splits"] = {"validation": {"loss": 1.25, "perplexity": 3.49, "token_accuracy": 0.725, "sentences": 4}}
    return {**own, **({} if points is None else {"curves": {"validation": points}}), **changes}


def curve_point(k: int | None, bleu: float, lagging: float, **scores: float) -> dict[str, Any]:
    """One point of a curve, delays in ms or words."""
    return {
        "k": k,
        "sentences": 4,
        "BLEU": bleu,
        "chrF": bleu + 20,
        "AL": lagging - 10,
        "LAAL": lagging,
        "AP": 0.625,
        "DAL": lagging + 10,
        "StartOffset": lagging - 20,
        **scores,
    }


def write_translation_run(folder: Path, name: str, /, attention: str = "leap", **changes: Any) -> Path:
    """A finished translation run with the name `name`; `changes` as for `translation_results`."""
    run = write_run(folder, name)
    run.joinpath("results.json").write_text(json.dumps(translation_results(attention, **{"points": None, **changes})))
    return run
