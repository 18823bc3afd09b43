"""Quality against latency: a trained model evaluated with several k, its logs and its scores.

RUN/evaluation/SPLIT/k-5/instances.log   what was written with k = 5, and when
RUN/evaluation/SPLIT/offline/...         with the whole source before the first word, the ceiling
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from leapformer.errors import LeapformerError
from leapformer.files.writing import make_folder
from leapformer.tasks.simulst.instances import LOG_NAME, Instance, score, write_instances

FOLDER = "evaluation"
OFFLINE = "offline"


def parse_ks(text: str) -> list[int | None]:
    """The values of `--k`: "1,3,5" and the offline form behind them.

    Raises:
        LeapformerError: one is no integer from 1 on.
    """
    values: list[int | None] = []
    for part in text.split(","):
        if not part.strip().isdigit() or int(part) < 1:
            raise LeapformerError(f"--k: expected integers from 1 on with commas between, found {part.strip()!r}")
        values.append(int(part))
    return [*dict.fromkeys(values), None]


def log_path(run: Path, split: str, k: int | None) -> Path:
    """Where the log of one k lies."""
    return run / FOLDER / split / (OFFLINE if k is None else f"k-{k}") / LOG_NAME


def evaluate_curve(
    run: Path,
    split: str,
    ks: Sequence[int | None],
    *,
    write: Callable[[int | None], Sequence[Instance]],
    real_time_factor: Callable[[int | None], float | None] = lambda k: None,
    told: Callable[[dict[str, Any]], None] = lambda point: None,
) -> list[dict[str, Any]]:
    """Write the log of each k, and return its scores as a point of the curve, {"k": ..., "BLEU": ..., "LAAL": ...}.

    Arguments:
        write: gives the log of a k. real_time_factor: of a k, where it was measured. told: called with each point.
    """
    points = []
    for k in ks:
        instances = write(k)
        path = log_path(run, split, k)
        make_folder(path.parent)
        write_instances(path, instances)
        point: dict[str, Any] = {"k": k, "sentences": len(instances), **score(instances)}
        factor = real_time_factor(k)
        if factor is not None:
            point["real_time_factor"] = factor
        told(point)
        points.append(point)
    return points
