"""One process of `harness.run`: KIND SEED FOLDER NUMBER... Answers with a line of JSON for each case."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import sys
import traceback
from pathlib import Path

from tests.fuzz.harness import MEMORY_MIB, Wrong


def main(kind: str, seed: int, folder: Path, numbers: list[int]) -> None:
    # What a case prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def answer(**told) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    case = importlib.import_module(f"tests.fuzz.{kind}").case
    answer(ready=True)
    before = _peak_mib()
    for number in numbers:
        own = folder / "case"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir(parents=True)
        outcome, fault = "", None
        try:
            outcome = case(seed, number, own)
        except Wrong as error:
            fault = f"wrong: {error}"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            fault = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {error}"
        if fault is None and _peak_mib() - before > MEMORY_MIB:
            fault = f"it took {_peak_mib() - before:,.0f} MiB"
        answer(number=number, outcome=outcome, fault=None if fault is None else " ".join(fault.split())[:400])


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), [int(number) for number in sys.argv[4:]])
