"""`python -m noiseopt`, the same as the command `noiseopt`."""

import sys

from noiseopt.cli import main

sys.exit(main())
