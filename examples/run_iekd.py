"""
Distil an image classifier by inheritance and exploration.

    accelerate launch examples/run_iekd.py \
        --teacher microsoft/resnet-50 --student microsoft/resnet-18 \
        --dataset_name uoft-cs/cifar10 --output_dir out --push_to_hub

Without a data set it uses scikit-learn's handwritten digits, without a teacher it first trains one: no network is
needed. All arguments can also stand in one JSON or YAML file: run_iekd.py recipe.yaml
"""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path

from classification import PICTURE, ImageRun, build_model, is_shorthand
from example_run import ScriptArguments, parse_arguments
from image_data import DataArguments
from model_arguments import ModelArguments
from report import Result, draw, latencies, table
from transformers import AutoConfig, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

from iekd_hf import IEKDTrainer, IEKDTrainingArguments
from iekd_hf.arguments import METHODS
from iekd_hf.models.loading import explain_unreachable, find_processor
from iekd_hf.training.base_trainer import DistillationTrainer


@dataclass
class RunArguments(ScriptArguments, IEKDTrainingArguments):
    """Add to a script's arguments those of distillation."""

    method: str | None = field(
        default=None,
        metadata={
            "help": "What is distilled, see the README: plain, kd, ft, at, od, ie-ft, ie-at, ie-od, inheritance, "
            "exploration, with or without +kd. Default: ie-ft+kd where the teacher knows the data's classes, else "
            "ie-ft.",
            "choices": list(METHODS),
        },
    )
    do_eval: bool = field(default=True, metadata={"help": "Evaluate on the validation images."})
    do_predict: bool = field(
        default=False,
        metadata={"help": "Write predictions.csv for the test split, or else for the validation images."},
    )
    paraphraser_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of stage 1. Default: 4 for the digits, otherwise 30."}
    )

    def __post_init__(self):
        self.chooses_method = self.method is None and self.lambda_kd is None
        self.method = self.method or "ie-ft"
        super().__post_init__()

    def choose_method(self, teacher_knows_classes: bool) -> None:
        """Add the logit term where nobody has said otherwise and the teacher can give one."""
        if self.chooses_method and teacher_knows_classes:
            self.method, self.lambda_kd = "ie-ft+kd", METHODS["ie-ft+kd"]["lambda_kd"]


def has_classes(name: str, names: list[str], **hub) -> bool:
    """Tell whether a saved model, the one of `--teacher`, has just these classes."""
    try:
        config = AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(explain_unreachable(name, "--teacher", error)) from error
    return config.id2label == dict(enumerate(names))


def get_teacher(
    run: ImageRun, model_args: ModelArguments
) -> tuple[PreTrainedModel, BaseImageProcessor | None, Result]:
    """Load the teacher, or build and train it."""
    name, epochs = model_args.teacher or "cifar-resnet-20", model_args.teacher_epochs
    hub, dtype = model_args.hub("teacher"), model_args.dtype
    if epochs is None:
        epochs = run.args.num_train_epochs if is_shorthand(name) else 0
    own_classes = is_shorthand(name) or epochs > 0 or has_classes(name, run.names, **hub)
    if own_classes:
        teacher = build_model(name, "--teacher", run.names, False, dtype=dtype, **hub)
    else:  # its features teach, its head is for other classes
        teacher = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True, dtype=dtype, **hub)
    processor = None if is_shorthand(name) or epochs > 0 else find_processor(name, **hub)
    run.args.choose_method(own_classes)
    result = run.train_teacher(teacher, epochs)
    if own_classes and run.args.do_eval:
        result.metrics = run.evaluate(teacher, processor)
    return teacher, processor, result


def main() -> None:
    model_args, data_args, args = parse_arguments((ModelArguments, DataArguments, RunArguments), __doc__)
    run = ImageRun(data_args, args)
    if args.cache_teacher and not data_args.decode_once:
        raise ValueError(
            "Expected images of one size with --cache_teacher, got several: add --decode_once true, which brings them "
            "to one, or leave --cache_teacher out."
        )
    from_scratch = model_args.student_from_scratch or is_shorthand(model_args.student)
    hub = model_args.hub("student")
    student = build_model(model_args.student, "--student", run.names, from_scratch, dtype=model_args.dtype, **hub)
    run.prepare_images(model_args.student, from_scratch, **hub)
    run.ask_the_hub(student)
    results, models, teacher_metrics, metrics = [], [], None, None

    if args.do_train:
        plain = copy.deepcopy(student)  # the same start as the distilled student's
        teacher, teacher_processor, result = get_teacher(run, model_args)
        results.append(result)
        teacher_metrics = result.metrics
        models.append((teacher, teacher_processor))
        if model_args.plain_student:
            results.append(run.train_plain(plain))
            models.append((plain, None))
        trainer = IEKDTrainer(
            model=student,
            teacher_model=teacher,
            teacher_processor=teacher_processor,
            paraphraser=model_args.paraphraser,
            args=args,
            **run.common(),
        )
        results.append(run.distil(trainer))
    else:
        trainer = DistillationTrainer(model=student, args=args, **run.common())

    if args.do_eval:
        prediction = trainer.predict(run.images["validation"], metric_key_prefix="eval")
        per_class = run.metric.compute(
            predictions=prediction.predictions, references=prediction.label_ids, class_names=run.names
        )
        metrics = prediction.metrics
        trainer.save_metrics("eval", {**metrics, **{f"eval_{name}": value for name, value in per_class.items()}})
        if results:
            results[-1].metrics = per_class
        else:
            results.append(Result("student", student.num_parameters(), per_class))
        models.append((student, None))
    if args.do_predict:
        split = run.images.get("test", run.images["validation"])
        classes = trainer.predict(split, metric_key_prefix="predict").predictions.argmax(axis=1)
        if trainer.is_world_process_zero():
            lines = [f"{row},{run.names[index]}" for row, index in enumerate(classes)]
            Path(args.output_dir, "predictions.csv").write_text("\n".join(["row,label", *lines, ""]))

    if trainer.is_world_process_zero() and results:
        if args.do_eval:  # all at the end, one after the other, so that they can be compared
            for result, (model, processor) in zip(results, models, strict=True):
                result.latency = run.latency(model, processor)
        print("\n" + table(results) + "\n")
        if args.do_eval:
            print("latency: one image, CPU, 1 thread, float32, median")
        if args.do_train:
            draw(results, os.path.join(args.output_dir, PICTURE))
            print(f"Student: {args.output_dir}   Picture: {os.path.join(args.output_dir, 'report.png')}")
    if args.push_to_hub:
        trainer.push_to_hub(
            teacher_metrics=teacher_metrics, metrics=metrics, latencies=latencies(results), **run.for_the_card()
        )


if __name__ == "__main__":
    main()
