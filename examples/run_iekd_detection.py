"""
Distil an object detector by inheritance and exploration.

    accelerate launch examples/run_iekd_detection.py \
        --teacher PekingU/rtdetr_r50vd --student PekingU/rtdetr_r18vd \
        --dataset_name rishitdagli/cppe-5 --output_dir out --push_to_hub

The same as `iekd-hf detect`; --help lists the arguments. Needs pip install "iekd_hf[cli]".
"""

import sys

from iekd_hf.commands.cli import main as iekd_hf


def main() -> None:
    """Run `iekd-hf detect` with the arguments of the command line."""
    iekd_hf(["detect", *sys.argv[1:]])


if __name__ == "__main__":
    main()
