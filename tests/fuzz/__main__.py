"""python -m tests.fuzz [KIND...]: run the cases, print the counts and every fault, and end with 1 if there was one."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.harness import KINDS, processors, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--cases", type=int, help="of each kind; default: those of a full run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one case alone")
    parser.add_argument("--jobs", type=int, default=processors(), help="processes at a time")
    asked = parser.parse_args()
    unknown = [kind for kind in asked.kinds if kind not in KINDS]
    if unknown:
        parser.error(f"expected kinds of {', '.join(KINDS)}, found {unknown[0]!r}")
    faults = 0
    for kind in asked.kinds or KINDS:
        count = (
            1 if asked.only is not None else asked.cases or importlib.import_module(f"tests.fuzz.{kind}").CASES["full"]
        )
        began, shown = time.monotonic(), [time.monotonic()]

        def told(done: int, kind: str = kind, count: int = count, shown: list[float] = shown) -> None:
            if time.monotonic() - shown[0] > 10:
                shown[0] = time.monotonic()
                print(f"{kind}: {done:,} of {count:,}", file=sys.stderr, flush=True)

        with tempfile.TemporaryDirectory(prefix="leapformer-fuzz-") as folder:
            tally = run(
                kind,
                count=count,
                seed=asked.seed,
                folder=Path(folder),
                first=asked.only or 0,
                jobs=asked.jobs,
                told=told,
            )
        for line in tally.lines():
            print(line, flush=True)
        print(f"  in {time.monotonic() - began:,.0f} s", flush=True)
        faults += len(tally.faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
