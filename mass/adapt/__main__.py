"""`python -m mass.adapt`, `accelerate launch -m mass.adapt`: the command `mass-adapt`."""

import sys

from mass.console import adapt

if __name__ == "__main__":
    sys.exit(adapt())
