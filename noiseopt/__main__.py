"""`python -m noiseopt`, the same as the command `noiseopt`."""

import sys

from noiseopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
