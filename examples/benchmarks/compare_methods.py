r"""
Compare methods of distillation in one harness: the same networks, images, schedule and seeds, one cell for each.

    python examples/benchmarks/compare_methods.py --output_dir comparison \
        --networks cifar-resnet-56:cifar-resnet-20 --methods plain kd ft ie-ft ft+kd ie-ft+kd --seeds 0 1 2 \
        --dataset_name uoft-cs/cifar10 --evaluate_on test

A method can be followed by arguments that differ from its own: `ie-ft,lambda_inh=300,lambda_exp=0`. Peers that teach
each other are written `cifar-resnet-20+cifar-resnet-20`, with the methods alone, dml, ie-dml, ie-dml+kl. A finished
cell is never run twice, and one that was broken off goes on from its last epoch: run the same line again to continue,
or twice at a time to use two processes. At the end, all cells of the output folder are summed up in comparison.json,
comparison.md and comparison.png; what the teachers said, in its folder teacher_cache, can be deleted then.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from comparison_cells import Comparison, ScheduleArguments
from comparison_methods import check_method
from comparison_report import collect, draw, draw_sweep, markdown

from iekd_hf.commands.images.data import DataArguments
from iekd_hf.commands.parser import parse_arguments


@dataclass
class ComparisonArguments:
    """Say what is compared."""

    networks: list[str] = field(
        default_factory=lambda: ["cifar-resnet-20:cifar-resnet-8"],
        metadata={
            "help": "Pairs `teacher:student`, or peers `first+second`; each a `cifar-resnet-<depth>`. A teacher can "
            "also be a saved one (Hub id or folder), which is used as it is."
        },
    )
    methods: list[str] = field(
        default_factory=lambda: ["plain", "kd", "ft", "ie-ft", "ft+kd", "ie-ft+kd"],
        metadata={"help": "Methods, with arguments that differ from their own after commas."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the students."})
    evaluate_on: str = field(
        default="validation",
        metadata={
            "help": "`validation`: images held out of the training split, to choose by; `test`: the test split too, "
            "for final figures.",
            "choices": ["validation", "test"],
        },
    )
    output_dir: str = field(default="comparison", metadata={"help": "Where cells, teachers and the summary are."})
    threads: int | None = field(default=None, metadata={"help": "Threads on the CPU. Default: torch's."})


def main() -> None:
    what, data_args, schedule = parse_arguments((ComparisonArguments, DataArguments, ScheduleArguments), __doc__)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, datefmt="%H:%M:%S")
    transformers.utils.logging.disable_progress_bar()
    if what.threads is not None:
        torch.set_num_threads(what.threads)
    for networks in what.networks:
        for method in what.methods:
            check_method(method, networks)  # a typing error is said now, not after some hours
    comparison = Comparison(data_args, schedule, what.output_dir)
    parts = ["validation", "test"] if what.evaluate_on == "test" else ["validation"]
    for seed in what.seeds:
        for networks in what.networks:
            for method in what.methods:
                comparison.run(networks, method, seed, parts)
    summarise(Path(what.output_dir))


def summarise(folder: Path) -> None:
    """Write and print what all finished cells come to."""
    cells = collect(folder)
    (folder / "comparison.json").write_text(json.dumps(cells))
    (folder / "comparison.md").write_text(markdown(cells))
    draw(cells, folder / "comparison.png")
    draw_sweep(cells, folder / "sweep.png")
    print(markdown(cells))
    print(f"Summary: {folder}/comparison.md   Pictures: {folder}/comparison.png {folder}/sweep.png")


if __name__ == "__main__":
    main()
