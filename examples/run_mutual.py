"""
Let image classifiers teach each other while they learn: IE-DML, beside DML and beside each of them alone.

    accelerate launch examples/run_mutual.py \
        --peers cifar-resnet-32 cifar-resnet-20 --dataset_name uoft-cs/cifar10 --output_dir mutual --push_to_hub

The same as `iekd-hf mutual`; --help lists the arguments. Needs pip install "iekd_hf[cli]".
"""

import sys

from iekd_hf.commands.cli import main as iekd_hf


def main() -> None:
    """Run `iekd-hf mutual` with the arguments of the command line."""
    iekd_hf(["mutual", *sys.argv[1:]])


if __name__ == "__main__":
    main()
