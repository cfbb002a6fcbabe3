"""
Distil a semantic segmenter: a small one, the student, learns from a large one, the teacher.

Three arguments matter:
  --teacher       a segmenter, a classifier or a model without a head; left out, a segmenter is trained first
  --student       the segmenter that you want to have
  --dataset_name  images on the Hub, each with its mask: an image of its size with a class's number in each pixel

Examples:
  iekd-hf segment        (drawn images of simple shapes, in a few minutes)
  iekd-hf segment --teacher nvidia/mit-b3 --student nvidia/mit-b0 --dataset_name segments/sidewalk-semantic

A recipe, a JSON or YAML file, holds arguments; those after it take precedence: iekd-hf segment recipe.yaml
On several GPUs: accelerate launch -m iekd_hf.commands.segment, with the same arguments
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
from transformers import PreTrainedModel

from iekd_hf import IEKDTrainingArguments

from ..method.presets import METHODS
from ..models.kinds import is_semantic_segmenter, set_ignore_index
from ..models.loading import find_processor, load_model
from ..training.base_trainer import DistillationTrainer
from .arguments import MethodByDefault, ModelArguments, teacher_epochs_field
from .images.source import original_rows
from .masks.data import SegmentationDataArguments
from .masks.run import (
    PICTURE,
    SegmentationRun,
    SegmentationScriptArguments,
    build_segmenter,
    fit_whole,
)
from .masks.tiny_segmenters import is_tiny
from .packages import require
from .parser import parse_arguments
from .report.table import Result, gain, segmentation_table
from .run import Compared
from .terminal import command


@dataclass
class SegmenterArguments(ModelArguments):
    """Say which segmenters."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Teacher: a Hub id, a folder, or `tiny-upernet-<width>`, which is trained on the data first. A "
            "classifier or a model without a head can teach, too. Default: tiny-upernet-16."
        },
    )
    student: str = field(
        default="tiny-upernet-8",
        metadata={"help": "Student: a Hub id, a folder, or `tiny-upernet-<width>`, which starts from scratch."},
    )
    teacher_epochs: float | None = teacher_epochs_field("27 for the shapes")


@dataclass
class RunArguments(MethodByDefault, SegmentationScriptArguments, IEKDTrainingArguments):
    """Add the arguments of distillation to those that the commands share."""

    # Views of images with masks are not made again for a cache.
    _refused = ("cache_teacher", "cache_views", "teacher_cache_dir")

    method: str | None = field(
        default=None,
        metadata={
            "help": "What is distilled: plain, kd, ft, at, od, ie-ft, ie-at, ie-od, inheritance, "
            "exploration, with or without +kd. Default: ie-ft+kd where the teacher knows the data's classes, else "
            "ie-ft; for tiny segmenters with a thirtieth of its weights.",
            "choices": list(METHODS),
        },
    )
    do_predict: bool = field(
        default=False,
        metadata={
            "help": "Write the predicted masks of the test split, or else of the validation images, to the folder "
            "predictions, named by their rows in the data."
        },
    )
    paraphraser_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of stage 1. Default: 3 for the shapes, otherwise 50."}
    )
    picture_images: int = field(default=6, metadata={"help": "How many validation images the picture shows."})


class SegmentRun(SegmentationRun):
    """Distil a segmenter, and compare it with its teacher and with the same student without one."""

    def get_teacher(self, model_args: SegmenterArguments) -> Compared:
        """Load the teacher, or build and train it, and measure it where it knows the data's classes."""
        name, epochs = model_args.teacher or "tiny-upernet-16", model_args.teacher_epochs
        hub, dtype = model_args.hub("teacher"), model_args.dtype
        if epochs is None:
            epochs = self.args.default_teacher_epochs if is_tiny(name) else 0
        processor = None
        if is_tiny(name) or epochs > 0:
            ignore_index = self.data_args.ignore_index
            teacher = build_segmenter(name, "--teacher", self.names, False, ignore_index, dtype=dtype, **hub)
        else:  # its features teach, whatever its head is for
            teacher = load_model(name, "--teacher", dtype=dtype, **hub)
            processor = find_processor(name, **hub)
            processor = processor and fit_whole(processor)
        own_classes = is_semantic_segmenter(teacher) and teacher.config.id2label == dict(enumerate(self.names))
        self.args.choose_method(own_classes)
        if is_tiny(model_args.student):
            self.args.divide_weights(30)  # the preset's are for larger networks
        if epochs > 0:
            self.check_last_batch(teacher, "teacher")
        self.announce(f"Teacher: {name}{'' if epochs else ', as it is'}", epochs)
        result = self.train_teacher(teacher, epochs, processor)
        if self.args.do_eval and own_classes:
            set_ignore_index(teacher, self.data_args.ignore_index)
            result.metrics = self.evaluate(teacher, processor)
        return Compared(result, teacher, processor)

    def measure_student(self, trainer: DistillationTrainer, result: Result) -> dict[str, float]:
        """Save and return mean IoU and what goes with it, which are the row's, too."""
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        result.metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        return metrics

    def predict(self, trainer: DistillationTrainer, student: PreTrainedModel) -> None:
        """Write predicted masks as PNG files, each with the number of its row in the data as name."""
        if not trainer.is_world_process_zero():
            return
        folder = Path(self.args.output_dir, "predictions")
        folder.mkdir(exist_ok=True)
        first = int(self.data_args.do_reduce_labels)  # the number of the first class in the data's masks
        kind = np.uint8 if len(self.names) + first <= 256 else np.uint16
        split = self.splits.get("test", self.splits["validation"])
        for row, classes in zip(original_rows(split.images), self.segment(student, split), strict=True):
            PIL.Image.fromarray((classes + first).astype(kind)).save(folder / f"{row}.png")

    def report(self, compared: list[Compared]) -> None:
        """Write results.json, print the table, and draw what the students make of some images."""
        results = [row.result for row in compared]
        self.write_results(results, labelled_samples=self.data_args.labelled_samples)
        print("\n" + segmentation_table(results) + "\n")
        if self.args.do_eval:
            print("mIoU, pixels: in percent; images/s: one image at a time, CPU, 1 thread, float32, median")
            if sentence := gain(results, len(self.splits["validation"]), "mean_iou", "points of mIoU"):
                print(sentence)
            picture = os.path.join(self.args.output_dir, PICTURE)
            self.draw_samples({r.result.name: r.model for r in compared if r.result.name != "teacher"}, picture)
            print(f"Student: {self.args.output_dir}   Picture: {picture}")

    def draw_samples(self, models: dict[str, PreTrainedModel], path: str) -> None:
        """Draw some validation images, their masks, and what the models make of them."""
        from .report.segmentations import draw_segmentations

        split, count = self.splits["validation"], min(self.args.picture_images, len(self.splits["validation"]))
        sample = split.select([index * len(split) // count for index in range(count)])
        images, truth = zip(*sample.rows(range(count)), strict=True)
        found = {name: list(self.segment(model, sample)) for name, model in models.items()}
        draw_segmentations(images, truth, found, self.names, path)


KINDS = (SegmenterArguments, SegmentationDataArguments, RunArguments)


@command
def main(given: list[str]) -> None:
    """Run `iekd-hf segment`, with the arguments of the command line by default."""
    model_args, data_args, args = parse_arguments(KINDS, __doc__, "iekd-hf segment", given)
    require("cli", "matplotlib")
    run = SegmentRun(data_args, args)
    from_scratch = model_args.student_from_scratch or is_tiny(model_args.student)
    hub = model_args.hub("student")
    student = build_segmenter(
        model_args.student,
        "--student",
        run.names,
        from_scratch,
        data_args.ignore_index,
        dtype=model_args.dtype,
        new_head=args.do_train,
        **hub,
    )
    run.prepare_images(model_args.student, **hub)
    run.check_size(student)
    run.check_last_batch(student, "distilled student", *["plain student"] * model_args.plain_student)
    run.distil(student, model_args)


if __name__ == "__main__":
    main()
