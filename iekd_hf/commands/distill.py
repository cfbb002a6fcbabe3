"""
Distil an image classifier: a small network, the student, learns from a large one, the teacher.

Three arguments matter:
  --teacher       a classifier on the Hub or in a folder; left out, one is trained first
  --student       the network that you want to have
  --dataset_name  images on the Hub; or --train_dir, a folder with one folder of images for each class

Examples:
  iekd-hf distill        (handwritten digits that come with scikit-learn, in a minute)
  iekd-hf distill --teacher microsoft/resnet-50 --student microsoft/resnet-18 --dataset_name uoft-cs/cifar10

A recipe, a JSON or YAML file, holds arguments; those after it take precedence: iekd-hf distill recipe.yaml
On several GPUs: accelerate launch -m iekd_hf.commands.distill, with the same arguments
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import AutoConfig, PreTrainedModel

from iekd_hf import IEKDTrainingArguments

from ..method.presets import METHODS
from ..models.loading import explain_unreachable, find_processor, load_model
from ..training.base_trainer import DistillationTrainer
from .arguments import MethodByDefault, ModelArguments, ScriptArguments
from .images.few_labels import StudentDataArguments
from .images.run import LOSSES, PICTURE, ImageRun, build_model, is_shorthand
from .images.source import original_rows
from .packages import require
from .parser import parse_arguments
from .report.table import Result, gain, table
from .run import Compared
from .terminal import command


if TYPE_CHECKING:
    from .report.curves import Examples


@dataclass
class ImageArguments(StudentDataArguments):
    """Add what the distilled student sees of the images whose labels it does not know."""

    unlabelled: bool | None = field(
        default=None,
        metadata={
            "help": "Give the distilled student the images that labelled_samples leaves out, without their labels, "
            "and training images whose label is missing in the data, at most max_train_samples of them. Default: the "
            "former; the latter are refused."
        },
    )


@dataclass
class RunArguments(MethodByDefault, ScriptArguments, IEKDTrainingArguments):
    """Add the arguments of distillation to those that the commands share."""

    method: str | None = field(
        default=None,
        metadata={
            "help": "What is distilled: plain, kd, ft, at, od, ie-ft, ie-at, ie-od, inheritance, "
            "exploration, with or without +kd. Default: ie-ft+kd where the teacher knows the data's classes, else "
            "ie-ft; for a pretrained student with a tenth of its weights.",
            "choices": list(METHODS),
        },
    )
    do_predict: bool = field(
        default=False,
        metadata={"help": "Write predictions.csv for the test split, or else for the validation images."},
    )
    paraphraser_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of stage 1. Default: 3 for the digits, otherwise 30."}
    )


def has_classes(name: str, names: list[str], **hub) -> bool:
    """Return whether a saved model, the one of `--teacher`, has just these classes."""
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(explain_unreachable(name, "--teacher", error)) from error
    return config.id2label == dict(enumerate(names))


class DistillRun(ImageRun):
    """Distil an image classifier, and compare it with its teacher and with the same student without one."""

    def get_teacher(self, model_args: ModelArguments) -> Compared:
        """Load the teacher, or build and train it, and measure it where it knows the data's classes."""
        name, epochs = model_args.teacher or "cifar-resnet-20", model_args.teacher_epochs
        hub, dtype = model_args.hub("teacher"), model_args.dtype
        if epochs is None:
            epochs = self.args.default_teacher_epochs if is_shorthand(name) else 0
        own_classes = is_shorthand(name) or epochs > 0 or has_classes(name, self.names, **hub)
        processor = None
        if is_shorthand(name) or epochs > 0:
            teacher = build_model(name, "--teacher", self.names, False, dtype=dtype, **hub)
        else:  # as it is, every weight of it: its features teach, even if its head is for other classes
            teacher = load_model(name, "--teacher", dtype=dtype, **hub)
            processor = find_processor(name, **hub)
        self.args.choose_method(own_classes)
        self.announce(f"Teacher: {name}{'' if epochs else ', as it is'}", epochs)
        result = self.train_teacher(teacher, epochs, processor)
        if own_classes and self.args.do_eval:
            result.metrics = self.evaluate(teacher, processor)
        return Compared(result, teacher, processor)

    def measure_student(self, trainer: DistillationTrainer, result: Result) -> dict[str, float]:
        """Save the metrics with the accuracy of each class, which are the row's, and return those without."""
        prediction = trainer.predict(self.images["validation"], metric_key_prefix="eval")
        self.predicted[trainer.model] = prediction.predictions.argmax(axis=1)
        result.metrics = self.metric.compute(
            predictions=prediction.predictions, references=prediction.label_ids, class_names=self.names
        )
        per_class = {f"eval_{name}": value for name, value in result.metrics.items()}
        trainer.save_metrics("eval", {**prediction.metrics, **per_class})
        return prediction.metrics

    def predict(self, trainer: DistillationTrainer, student: PreTrainedModel) -> None:
        """Write predictions.csv."""
        name = "test" if "test" in self.images else "validation"
        classes = trainer.predict(self.images[name], metric_key_prefix="predict").predictions.argmax(axis=1)
        if trainer.is_world_process_zero():
            with Path(self.args.output_dir, "predictions.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["row", "label"])
                rows = original_rows(self.splits[name])
                writer.writerows((row, self.names[index]) for row, index in zip(rows, classes, strict=True))

    def report(self, compared: list[Compared]) -> None:
        """Print the table of what was trained or measured, and draw the course of the training."""
        if not (self.args.do_train or self.args.do_eval):
            return
        results = [row.result for row in compared]
        unlabelled = self.data_args.unlabelled is not False
        self.write_results(results, labelled_samples=self.data_args.labelled_samples, unlabelled=unlabelled)
        print("\n" + table(results) + "\n")
        if self.args.do_eval:
            print("latency: one image, CPU, 1 thread, float32, median")
            if sentence := gain(results, len(self.splits["validation"])):
                print(sentence)
        if self.args.do_train:
            from .report.curves import draw_gain, draw_losses

            folder = Path(self.args.output_dir)
            draw_gain(results, folder / PICTURE, len(self.splits["validation"]), self.examples(compared))
            draw_losses(results[-1], folder / LOSSES)
            print(f"Student: {folder}   Picture: {folder / PICTURE}")

    def examples(self, compared: list[Compared]) -> "Examples | None":
        """Return what the plain and the distilled student take the validation images for, where both are there."""
        from .report.curves import Examples

        students = {row.result.name: row.model for row in compared if row.model in self.predicted}
        if not {"plain student", "distilled student"} <= students.keys():
            return None
        before, after = (self.predicted[students[name]] for name in ("plain student", "distilled student"))
        validation = self.splits["validation"]
        return Examples(validation["image"], np.array(validation["label"]), before, after, self.names)


KINDS = (ModelArguments, ImageArguments, RunArguments)


@command
def main(given: list[str]) -> None:
    """Run `iekd-hf distill`, with the arguments of the command line by default."""
    model_args, data_args, args = parse_arguments(KINDS, __doc__, "iekd-hf distill", given)
    require("cli", "kornia", "matplotlib", "sklearn")
    run = DistillRun(data_args, args)
    if args.cache_teacher and not data_args.decode_once:
        raise ValueError(
            "Expected --decode_once true with --cache_teacher, got false, the default where images have several "
            "sizes: add it, which brings them to one, or leave --cache_teacher out."
        )
    if args.cache_teacher and data_args.rand_augment is not None:
        raise ValueError(
            "Expected no --rand_augment with --cache_teacher, got both: what RandAugment draws cannot be drawn again "
            "for the cache. Leave one of them out."
        )
    from_scratch = model_args.student_from_scratch or is_shorthand(model_args.student)
    hub = model_args.hub("student")
    student = build_model(
        model_args.student, "--student", run.names, from_scratch, dtype=model_args.dtype, new_head=args.do_train, **hub
    )
    run.prepare_images(model_args.student, from_scratch, **hub)
    if not from_scratch:
        args.divide_weights(10)  # the preset's are for students from scratch
    run.distil(student, model_args)


if __name__ == "__main__":
    main()
