"""
Distil an object detector: a small one, the student, learns from a large one, the teacher.

Three arguments matter:
  --teacher       a detector or a classifier on the Hub or in a folder; left out, one is trained first
  --student       the detector that you want to have
  --dataset_name  images on the Hub, each with its objects: bbox [x, y, width, height] in pixels and category

Examples:
  iekd-hf detect         (drawn images of simple shapes, in a few minutes)
  iekd-hf detect --teacher PekingU/rtdetr_r50vd --student PekingU/rtdetr_r18vd --dataset_name rishitdagli/cppe-5

A recipe, a JSON or YAML file, holds arguments; those after it take precedence: iekd-hf detect recipe.yaml
On several GPUs: accelerate launch -m iekd_hf.commands.detect, with the same arguments
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from iekd_hf import IEKDTrainingArguments

from ..method.presets import METHODS
from ..models.inherit import inherit_head
from ..models.kinds import is_detector
from ..models.loading import find_processor, load_model
from ..training.base_trainer import DistillationTrainer
from .arguments import ModelArguments, teacher_epochs_field
from .boxes.data import DetectionDataArguments
from .boxes.run import PICTURE, DetectionRun, DetectionScriptArguments, build_detector
from .boxes.tiny_detectors import is_tiny
from .images.source import original_rows
from .packages import require
from .parser import parse_arguments
from .report.table import Result, detection_table, gain
from .run import Compared
from .terminal import command


@dataclass
class DetectorArguments(ModelArguments):
    """Say which detectors."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Teacher: a Hub id, a folder, or `tiny-rt-detr-<width>`, which is trained on the data first. A "
            "classifier can teach a detector's backbone, too. Default: tiny-rt-detr-32."
        },
    )
    student: str = field(
        default="tiny-rt-detr-8",
        metadata={"help": "Student: a Hub id, a folder, or `tiny-rt-detr-<width>`, which starts from scratch."},
    )
    teacher_epochs: float | None = teacher_epochs_field("10 for the shapes")


@dataclass
class RunArguments(DetectionScriptArguments, IEKDTrainingArguments):
    """Add the arguments of distillation to those that the commands share."""

    # Two detectors' queries do not correspond, and views of images with boxes are not made again for a cache.
    _refused = ("lambda_kd", "kd_distance", "kd_share", "temperature")
    _refused += ("cache_teacher", "cache_views", "teacher_cache_dir")

    method: str = field(
        default="ie-ft",
        metadata={
            "help": "What is distilled: plain, ft, at, od, ie-ft, ie-at, ie-od, inheritance or exploration.",
            "choices": [name for name in METHODS if "kd" not in name],
        },
    )
    do_predict: bool = field(
        default=False,
        metadata={
            "help": "Write predictions.json, in COCO's form, for the test split, or else for the validation images; "
            "image_id is an image's row in the data, category_id the data's number of a class."
        },
    )
    inherit_head: bool | None = field(
        default=None,
        metadata={
            "help": "Begin the distilled student with the teacher's weights outside of the backbone, where names and "
            "shapes agree. Default: where a tiny detector teaches a tiny one."
        },
    )
    paraphraser_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of stage 1. Default: 2 for the shapes, otherwise 50."}
    )
    picture_images: int = field(default=6, metadata={"help": "How many validation images the picture shows."})
    picture_threshold: float = field(default=0.4, metadata={"help": "Least score of the boxes in the picture."})


class DetectRun(DetectionRun):
    """Distil a detector, and compare it with its teacher and with the same student without one."""

    def get_teacher(self, model_args: DetectorArguments) -> Compared:
        """Load the teacher, or build and train it, and measure it where it detects the data's classes."""
        name, epochs = model_args.teacher or "tiny-rt-detr-32", model_args.teacher_epochs
        hub, dtype = model_args.hub("teacher"), model_args.dtype
        if epochs is None:
            epochs = self.args.default_teacher_epochs if is_tiny(name) else 0
        processor = None
        if is_tiny(name) or epochs > 0:
            teacher = build_detector(name, "--teacher", self.names, self.most_objects, False, dtype=dtype, **hub)
        else:  # its features teach, whatever its head is for
            teacher = load_model(name, "--teacher", dtype=dtype, **hub)
            processor = find_processor(name, **hub)
        self.announce(f"Teacher: {name}{'' if epochs else ', as it is'}", epochs)
        result = self.train_teacher(teacher, epochs, processor)
        if self.args.do_eval and is_detector(teacher) and teacher.config.id2label == dict(enumerate(self.names)):
            result.metrics = self.evaluate(teacher, processor)
        return Compared(result, teacher, processor)

    def prepare_student(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Give the student the teacher's head, where that is wanted."""
        if self.args.inherit_head is None:
            width = getattr(student.config, "d_model", None)
            self.args.inherit_head = is_tiny(self.student_name) and getattr(teacher.config, "d_model", None) == width
        if self.args.inherit_head:
            inherit_head(student, teacher)

    def measure_student(self, trainer: DistillationTrainer, result: Result) -> dict[str, float]:
        """Save and return COCO's metrics, which are the row's, too."""
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        result.metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        return metrics

    def predict(self, trainer: DistillationTrainer, student: PreTrainedModel) -> None:
        """Write predictions.json."""
        if not trainer.is_world_process_zero():
            return
        split = self.splits.get("test", self.splits["validation"])
        numbers = [int(name) for name in self.names] if all(map(str.isdecimal, self.names)) else range(len(self.names))
        predictions = [
            {
                "image_id": row,
                "category_id": numbers[label],
                "category": self.names[label],
                "bbox": box,
                "score": score,
            }
            for row, found in zip(original_rows(split.images), self.detect(student, split), strict=True)
            for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True)
        ]
        Path(self.args.output_dir, "predictions.json").write_text(json.dumps(predictions))

    def report(self, compared: list[Compared]) -> None:
        """Write results.json, print the table, and draw what the students find."""
        results = [row.result for row in compared]
        self.write_results(results, "inherit_head")
        print("\n" + detection_table(results) + "\n")
        if self.args.do_eval:
            print("mAP: COCO's, in percent; images/s: one image at a time, CPU, 1 thread, float32, median")
            if sentence := gain(results, len(self.splits["validation"]), "map", "points of mAP"):
                print(sentence)
            picture = os.path.join(self.args.output_dir, PICTURE)
            students = {row.result.name: row.model for row in compared if row.result.name != "teacher"}
            self.draw_samples(students, picture)
            print(f"Student: {self.args.output_dir}   Picture: {picture}")

    def draw_samples(self, models: dict[str, PreTrainedModel], path: str) -> None:
        """Draw what the models find in some validation images."""
        from .report.detections import draw_detections

        split, count = self.splits["validation"], min(self.args.picture_images, len(self.splits["validation"]))
        sample = split.select([index * len(split) // count for index in range(count)])
        images = [image for _, image, _ in sample.rows(range(count))]
        threshold = self.args.picture_threshold
        found = {name: list(self.detect(model, sample, threshold=threshold)) for name, model in models.items()}
        draw_detections(images, sample.truth(range(count)), found, self.names, path)


KINDS = (DetectorArguments, DetectionDataArguments, RunArguments)


@command
def main(given: list[str]) -> None:
    """Run `iekd-hf detect`, with the arguments of the command line by default."""
    model_args, data_args, args = parse_arguments(KINDS, __doc__, "iekd-hf detect", given)
    require("cli", "matplotlib", "pycocotools")
    run = DetectRun(data_args, args)
    from_scratch = model_args.student_from_scratch or is_tiny(model_args.student)
    hub = model_args.hub("student")
    student = build_detector(
        model_args.student,
        "--student",
        run.names,
        run.most_objects,
        from_scratch,
        dtype=model_args.dtype,
        new_head=args.do_train,
        **hub,
    )
    run.prepare_images(model_args.student, **hub)
    run.check_size(student)
    run.distil(student, model_args)


if __name__ == "__main__":
    main()
