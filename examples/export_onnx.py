"""
Export a saved classifier to ONNX, and compare both runtimes on the CPU.

    python examples/export_onnx.py --model out --output student.onnx

The same as `iekd-hf export`; --help lists the arguments. Needs pip install "iekd_hf[onnx]".
"""

import sys

from iekd_hf.commands.cli import main as iekd_hf


def main() -> None:
    """Run `iekd-hf export` with the arguments of the command line."""
    iekd_hf(["export", *sys.argv[1:]])


if __name__ == "__main__":
    main()
