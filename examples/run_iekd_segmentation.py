"""
Distil a semantic segmenter by inheritance and exploration.

    accelerate launch examples/run_iekd_segmentation.py \
        --teacher nvidia/mit-b3 --student nvidia/mit-b0 \
        --dataset_name segments/sidewalk-semantic --output_dir out --push_to_hub

The same as `iekd-hf segment`; --help lists the arguments. Needs pip install "iekd_hf[cli]".
"""

import sys

from iekd_hf.commands.cli import main as iekd_hf


def main() -> None:
    """Run `iekd-hf segment` with the arguments of the command line."""
    iekd_hf(["segment", *sys.argv[1:]])


if __name__ == "__main__":
    main()
