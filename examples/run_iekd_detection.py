"""
Distil an object detector by inheritance and exploration.

    accelerate launch examples/run_iekd_detection.py \
        --teacher PekingU/rtdetr_r50vd --student PekingU/rtdetr_r18vd \
        --dataset_name rishitdagli/cppe-5 --output_dir out --push_to_hub

Without a data set it draws images of simple shapes, without a teacher it first trains one: no network is needed.
Images come with their objects: `bbox` [x, y, width, height] in pixels and `category`, as COCO has them. All arguments
can also stand in one JSON or YAML file: run_iekd_detection.py recipe.yaml
"""

import copy
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from detection import PICTURE, DetectionRun, DetectionScriptArguments, build_detector
from detection_data import DetectionDataArguments
from detection_report import draw_detections, table
from detection_trainers import DetectionTrainer, IEKDDetectionTrainer
from example_run import parse_arguments
from model_arguments import ModelArguments
from report import Result, latencies
from tiny_detectors import is_tiny
from transformers import BaseImageProcessor, PreTrainedModel

from iekd_hf import IEKDTrainingArguments
from iekd_hf.arguments import METHODS
from iekd_hf.features.layers import is_detector
from iekd_hf.models.loading import find_processor, load_model


RESULTS = "results.json"


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


@dataclass
class RunArguments(DetectionScriptArguments, IEKDTrainingArguments):
    """Add to a script's arguments those of distillation."""

    method: str = field(
        default="ie-ft",
        metadata={
            "help": "What is distilled, see the README: plain, ft, at, od, ie-ft, ie-at, ie-od, inheritance or "
            "exploration.",
            "choices": [name for name in METHODS if "kd" not in name],
        },
    )
    do_eval: bool = field(default=True, metadata={"help": "Evaluate on the validation images."})
    do_predict: bool = field(
        default=False,
        metadata={
            "help": "Write predictions.json, in COCO's form, for the test split, or else for the validation images."
        },
    )
    paraphraser_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of stage 1. Default: 5 for the shapes, otherwise 50."}
    )
    picture_images: int = field(default=6, metadata={"help": "How many validation images the picture shows."})
    picture_threshold: float = field(default=0.4, metadata={"help": "Least score of the boxes in the picture."})


def get_teacher(
    run: DetectionRun, model_args: DetectorArguments
) -> tuple[PreTrainedModel, BaseImageProcessor | None, Result]:
    """Load the teacher, or build and train it."""
    name, epochs = model_args.teacher or "tiny-rt-detr-32", model_args.teacher_epochs
    hub, dtype = model_args.hub("teacher"), model_args.dtype
    if epochs is None:
        epochs = run.args.num_train_epochs if is_tiny(name) else 0
    processor = None
    if is_tiny(name) or epochs > 0:
        teacher = build_detector(name, "--teacher", run.names, run.most_objects, False, dtype=dtype, **hub)
    else:  # its features teach, whatever its head is for
        teacher = load_model(name, "--teacher", dtype=dtype, **hub)
        processor = find_processor(name, **hub)
    result = run.train_teacher(teacher, epochs)
    if run.args.do_eval and is_detector(teacher) and teacher.config.id2label == dict(enumerate(run.names)):
        result.metrics = run.evaluate(teacher, processor)
    return teacher, processor, result


def write_results(results: list[Result], args: RunArguments) -> None:
    """Write what was measured of each model, so that runs of several seeds can be put together."""
    content = {
        result.name: {
            "parameters": result.parameters,
            "metrics": result.metrics,
            "seconds": result.seconds,
            "images_per_second": None if result.latency is None else 1000 / result.latency,
        }
        for result in results
    }
    settings = ("seed", "method", "lambda_inh", "lambda_exp", "num_train_epochs", "learning_rate")
    content = {"settings": {name: getattr(args, name) for name in settings}, "models": content}
    Path(args.output_dir, RESULTS).write_text(json.dumps(content, indent=2) + "\n")


def draw_samples(run: DetectionRun, models: dict[str, PreTrainedModel]) -> None:
    """Draw what the models find in some validation images."""
    split, count = run.splits["validation"], min(run.args.picture_images, len(run.splits["validation"]))
    sample = split.select([index * len(split) // count for index in range(count)])
    images = [image for _, image, _ in sample.rows(range(count))]
    found = {
        name: list(run.detect(model, sample, threshold=run.args.picture_threshold)) for name, model in models.items()
    }
    path = os.path.join(run.args.output_dir, PICTURE)
    draw_detections(images, sample.truth(range(count)), found, run.names, path)


def main() -> None:
    model_args, data_args, args = parse_arguments((DetectorArguments, DetectionDataArguments, RunArguments), __doc__)
    run = DetectionRun(data_args, args)
    from_scratch = model_args.student_from_scratch or is_tiny(model_args.student)
    hub = model_args.hub("student")
    student = build_detector(
        model_args.student, "--student", run.names, run.most_objects, from_scratch, dtype=model_args.dtype, **hub
    )
    run.prepare_images(model_args.student, **hub)
    run.check_size(student)
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
        trainer = IEKDDetectionTrainer(
            model=student,
            teacher_model=teacher,
            teacher_processor=teacher_processor,
            paraphraser=model_args.paraphraser,
            args=args,
            **run.common(),
        )
        results.append(run.distil(trainer))
    else:
        trainer = DetectionTrainer(model=student, args=args, **run.common())
        results.append(Result("student", student.num_parameters()))
    models.append((student, None))

    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        results[-1].metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    if args.do_predict and trainer.is_world_process_zero():
        split = run.splits.get("test", run.splits["validation"])
        predictions = [
            {"image_id": row, "category": run.names[label], "bbox": box, "score": score}
            for row, found in enumerate(run.detect(student, split))
            for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True)
        ]
        Path(args.output_dir, "predictions.json").write_text(json.dumps(predictions))

    if trainer.is_world_process_zero():
        if args.do_eval:  # all at the end, one after the other, so that they can be compared
            for result, (model, processor) in zip(results, models, strict=True):
                result.latency = run.latency(model, processor)
        write_results(results, args)
        print("\n" + table(results) + "\n")
        if args.do_eval:
            print("mAP: COCO's, in percent; images/s: one image at a time, CPU, 1 thread, float32, median")
            beside = {result.name: model for result, (model, _) in zip(results, models, strict=True)}
            draw_samples(run, {name: model for name, model in beside.items() if name != "teacher"})
            print(f"Student: {args.output_dir}   Picture: {os.path.join(args.output_dir, PICTURE)}")
    if args.push_to_hub:
        trainer.push_to_hub(
            teacher_metrics=teacher_metrics, metrics=metrics, latencies=latencies(results), **run.for_the_card()
        )


if __name__ == "__main__":
    main()
