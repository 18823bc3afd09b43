"""`python -m leapformer` is the command `leapformer`."""

import sys

from leapformer.cli import main

sys.exit(main())
