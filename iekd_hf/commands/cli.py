"""
The console command `iekd-hf`.

A subcommand is imported when it is called, so that this file needs the standard library alone; the help of each is
kept as a text (`python docs/generate.py` writes them), because the arguments of Trainer take seconds to import.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path


HELP = Path(__file__).parent / "help"

# By the name of its file: what a subcommand does, and an example.
COMMANDS = {
    "distill": (
        "distil an image classifier from a teacher",
        "--teacher microsoft/resnet-50 --student microsoft/resnet-18 --dataset_name uoft-cs/cifar10",
    ),
    "mutual": (
        "let image classifiers teach each other while they learn",
        "--peers cifar-resnet-32 cifar-resnet-20 --dataset_name uoft-cs/cifar10",
    ),
    "detect": (
        "distil an object detector from a teacher",
        "--teacher PekingU/rtdetr_r50vd --student PekingU/rtdetr_r18vd --dataset_name rishitdagli/cppe-5",
    ),
    "segment": (
        "distil a semantic segmenter from a teacher",
        "--teacher nvidia/mit-b3 --student nvidia/mit-b0 --dataset_name segments/sidewalk-semantic",
    ),
    "export": ("write a saved classifier as ONNX and compare both", "--model out --output student.onnx"),
    "analyze": ("draw what the halves of a distilled student have learnt", "--run out --output_dir analysis"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run a subcommand of `iekd-hf`.

    Args:
        argv (`Sequence[str]`, *optional*):
            The subcommand and its arguments. Default: those of the command line.

    Raises:
        `SystemExit`: after `--help`, for an unknown subcommand, and where a package is missing that it needs.

    Example:

    ```python
    >>> from iekd_hf.commands.cli import main
    >>> main(["--help"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    SystemExit: 0

    ```
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    lines = [f"  {name:8}  {what}\n            iekd-hf {name} {example}" for name, (what, example) in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="iekd-hf",
        usage="iekd-hf COMMAND [arguments]",
        description="Distillation by inheritance and exploration, for image classifiers, detectors and segmenters.\n"
        "Try it on handwritten digits that come with scikit-learn, in a minute: iekd-hf distill",
        epilog="\n".join(["commands, each with an example:", *lines, "", "All arguments: iekd-hf COMMAND --help"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    command = parser.parse_args(argv[:1]).command
    if {"-h", "--help"} & {*argv}:
        print((HELP / f"{command}.txt").read_text(encoding="utf-8"), end="")
        raise SystemExit(0)
    importlib.import_module(f"iekd_hf.commands.{command}").main(argv[1:])


if __name__ == "__main__":
    main()
