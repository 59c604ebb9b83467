"""Evaluation from a checkout: `python launch/meta_eval.py --run checkpoints/demo --methods none,vote,mass`."""

import sys

from mass.console import evaluate

if __name__ == "__main__":
    sys.exit(evaluate())
