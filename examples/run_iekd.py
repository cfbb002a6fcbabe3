"""
Distil an image classifier by inheritance and exploration.

    accelerate launch examples/run_iekd.py \
        --teacher microsoft/resnet-50 --student microsoft/resnet-18 \
        --dataset_name uoft-cs/cifar10 --output_dir out --push_to_hub

The same as `iekd-hf distill`; --help lists the arguments. Needs pip install "iekd_hf[cli]".
"""

import sys

from iekd_hf.commands.cli import main as iekd_hf


def main() -> None:
    """Run `iekd-hf distill` with the arguments of the command line."""
    iekd_hf(["distill", *sys.argv[1:]])


if __name__ == "__main__":
    main()
