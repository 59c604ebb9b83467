"""Meta-training under a launcher: `deepspeed launch/meta_train.py recipes/demo.yaml [KEY=VALUE ...]`."""

from mass.console import train

if __name__ == "__main__":
    train()
