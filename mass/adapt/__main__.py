"""`python -m mass.adapt`, `accelerate launch -m mass.adapt`: the command `mass-adapt`."""

import sys

from mass.command import main

if __name__ == "__main__":
    sys.exit(main())
