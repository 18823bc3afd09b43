"""The command `leapformer` as the child of another one that runs many: ``python -m leapformer.cli.child ARGUMENTS``.

It stops as after SIGTERM, with a checkpoint, when that one is gone.
"""

from __future__ import annotations

import sys

from leapformer.cli import main
from leapformer.training.children import stop_with_parent

if __name__ == "__main__":
    stop_with_parent()
    sys.exit(main())
