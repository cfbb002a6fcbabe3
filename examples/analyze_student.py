"""
Look at what the halves of a distilled student have become: the figures of the IE-KD paper, from a finished run.

    python examples/analyze_student.py --run out --teacher out/_teacher --output_dir analysis

The same as `iekd-hf analyze`; --help lists the arguments. Needs pip install "iekd_hf[cli]".
"""

import sys

from iekd_hf.commands.cli import main as iekd_hf


def main() -> None:
    """Run `iekd-hf analyze` with the arguments of the command line."""
    iekd_hf(["analyze", *sys.argv[1:]])


if __name__ == "__main__":
    main()
