"""Meta-training under a launcher: `deepspeed launch/meta_train.py recipes/demo.yaml [KEY=VALUE ...]`."""

from mass.train import main

if __name__ == "__main__":
    main()
