"""Quality against latency: a trained model evaluated with several values of a policy's option, its logs and its scores.

RUN/evaluation/SPLIT/k-5/instances.log                   what was written with wait-k, k = 5, and when
RUN/evaluation/SPLIT/offline/...                         with the whole source before the first word, the ceiling
RUN/evaluation/SPLIT/align-att-frames-2/...              with another policy

results.json has the scores of wait-k, which models are trained with, under `curves`, a list of points by split, and
those of the other policies under `policy_curves`, by split a list of lines {"label", "option", "points"}; see
`keep_points`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from leapformer.files.writing import make_folder
from leapformer.tasks.simulst.scoring.instances import LOG_NAME, Instance, score, write_instances
from leapformer.tasks.simulst.streaming.policy_registry import DEFAULT, PolicyLine, parse_line

FOLDER = "evaluation"
OFFLINE = "offline"


def parse_ks(text: str) -> list[int | None]:
    """The values of `--k`: "1,3,5" and the offline form behind them.

    Raises:
        LeapformerError: one is no integer from 1 on.
    """
    return list(parse_line(DEFAULT, {"k": text}).values)


def log_path(run: Path, split: str, point: int | str | None) -> Path:
    """Where the log of a point lies: that of a k, offline (None), or by its name (`point_name`)."""
    name = OFFLINE if point is None else point if isinstance(point, str) else f"k-{point}"
    return run / FOLDER / split / name / LOG_NAME


def point_name(label: str, option: str, value: Any) -> str:
    """What `log_path` takes for a policy other than wait-k, such as "align-att-frames-2".

    Arguments:
        label, option: of its line. value: of the option; passed over where there is none.
    """
    parts = [label, *([option, str(value)] if option else [])]
    return re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(parts))


def point_title(line: PolicyLine, value: Any) -> str:
    """The same for a person: "k = 5", "offline", "align-att, frames = 2"."""
    if line.entry.is_trained:
        return OFFLINE if value is None else f"{line.option} = {value}"
    return f"{line.label}, {line.option} = {value}" if line.option else line.label


def evaluate_curve(
    run: Path,
    split: str,
    ks: Sequence[Any],
    *,
    write: Callable[[Any], Sequence[Instance]],
    line: PolicyLine | None = None,
    real_time_factor: Callable[[Any], float | None] = lambda k: None,
    told: Callable[[dict[str, Any]], None] = lambda point: None,
    keep: Callable[[Callable[[], None]], object] = lambda write: write(),
) -> list[dict[str, Any]]:
    """Write the log of each k, and return its scores as a point of the curve, {"k": ..., "BLEU": ..., "LAAL": ...}.

    Arguments:
        ks: of wait-k, or the values of the line's option.
        write: gives the log of a k. real_time_factor: of a k, where it was measured. told: called with each point.
        keep: calls what writes a log, and may go on where that fails.
        line: of a policy, whose points have its option in the place of k. None: of wait-k.
    """
    line = parse_line(DEFAULT, {}) if line is None else line
    points = []
    for k in ks:
        instances = write(k)
        path = log_path(run, split, k if line.entry.is_trained else point_name(line.label, line.option, k))
        keep(partial(_write_log, path, instances))
        point: dict[str, Any] = {line.option: k} if line.option else {}
        point |= {"sentences": len(instances), **score(instances)}
        factor = real_time_factor(k)
        if factor is not None:
            point["real_time_factor"] = factor
        told(point)
        points.append(point)
    return points


def _write_log(path: Path, instances: Sequence[Instance]) -> None:
    make_folder(path.parent)
    write_instances(path, instances)


def keep_points(results: dict[str, Any], split: str, line: PolicyLine, points: Sequence[dict[str, Any]]) -> None:
    """Put the points of a line into the content of results.json, in the place of those that it had."""
    if line.entry.is_trained:
        results.setdefault("curves", {})[split] = list(points)
        return
    lines = results.setdefault("policy_curves", {}).setdefault(split, [])
    new = {"label": line.label, "option": line.option, "points": list(points)}
    lines[:] = [*(each for each in lines if each["label"] != line.label), new]
