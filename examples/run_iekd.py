"""
Distil an image classifier by inheritance and exploration.

    accelerate launch examples/run_iekd.py \
        --teacher microsoft/resnet-50 --student microsoft/resnet-18 \
        --dataset_name uoft-cs/cifar10 --output_dir out --push_to_hub

Without a data set it uses scikit-learn's handwritten digits, without a teacher it first trains one: no network is
needed. All arguments can also stand in one JSON or YAML file: run_iekd.py recipe.yaml
"""

import copy
import json
import logging
import os
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from image_data import DataArguments, add_transforms, load_images
from image_metrics import TopKAccuracy
from report import Result, draw, table
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from iekd_hf import CifarResNetConfig, IEKDTrainer, IEKDTrainingArguments
from iekd_hf.base_trainer import DistillationTrainer, load_weights
from iekd_hf.loading import explain_unreachable, find_processor


logger = logging.getLogger(__name__)

DIGITS_EPOCHS = {"num_train_epochs": 6.0, "paraphraser_epochs": 4.0}


@dataclass
class ModelArguments:
    """Say which models."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Teacher: a Hub id, a folder, or `cifar-resnet-<depth>`, which is trained on the data first. "
            "Default: cifar-resnet-20."
        },
    )
    student: str = field(
        default="cifar-resnet-8",
        metadata={"help": "Student: a Hub id, a folder, or `cifar-resnet-<depth>`, which starts from scratch."},
    )
    student_from_scratch: bool = field(
        default=False, metadata={"help": "Take only the student's configuration from --student, not its weights."}
    )
    paraphraser: str | None = field(
        default=None,
        metadata={"help": "A trained paraphraser (Hub id or folder) of this teacher; leaves stage 1 out."},
    )
    teacher_epochs: float | None = field(
        default=None,
        metadata={
            "help": "Epochs to train the teacher on the data first. Default: num_train_epochs for a teacher without "
            "weights, otherwise 0."
        },
    )
    plain_student: bool = field(
        default=True,
        metadata={"help": "Also train the same student without a teacher, on the same schedule, to compare with."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run model code that comes with a Hub model. Only for repositories you trust."},
    )


@dataclass
class RunArguments(IEKDTrainingArguments):
    """Change those defaults of the trainer's arguments that suit a script; each can be set on the command line."""

    output_dir: str | None = field(default="out", metadata={"help": "Where the student and its checkpoints go."})
    do_train: bool = field(default=True, metadata={"help": "Distil."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate on the validation images."})
    do_predict: bool = field(
        default=False,
        metadata={"help": "Write predictions.csv for the test split, or else for the validation images."},
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of stage 2. Default: 6 for the digits, otherwise 30."}
    )
    paraphraser_epochs: float | None = field(
        default=None, metadata={"help": "Epochs of stage 1. Default: 4 for the digits, otherwise 30."}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch size of each device."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Batch size of each device in evaluation."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate. Default: 0.1 for students from scratch, otherwise 0.01."}
    )
    optim: str = field(default="sgd", metadata={"help": "Optimizer, as in TrainingArguments; the papers use SGD."})
    optim_args: str | None = field(
        default="momentum=0.9,nesterov=true", metadata={"help": "Arguments of the optimizer."}
    )
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0, as in the papers, for none."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "How many checkpoints to keep."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log the losses."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Pin the batches' memory, which serves a GPU only."}
    )
    report_to: str = field(default="none", metadata={"help": "Tracker: tensorboard, wandb, ..., or none."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: transforms need the images."})
    seed: int = field(default=42, metadata={"help": "Seed of everything."})

    def __post_init__(self):
        # Which default holds is known when the data is: the digits are small and learnt in a few epochs.
        self.undecided = [name for name in DIGITS_EPOCHS if getattr(self, name) is None]
        for name in self.undecided:
            setattr(self, name, 30.0)
        super().__post_init__()


def parse_arguments() -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Read flags, or one JSON or YAML file."""
    parser = HfArgumentParser((ModelArguments, DataArguments, RunArguments), description=__doc__)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def build_model(
    name: str, role: str, names: list[str], from_scratch: bool, trust_remote_code: bool
) -> PreTrainedModel:
    """
    Make a classifier for these classes.

    Args:
        name (`str`):
            Hub id, folder or `cifar-resnet-<depth>`.
        role (`str`):
            What to call it in an error.
        names (`list[str]`):
            The classes.
        from_scratch (`bool`):
            Whether to take the configuration only.
        trust_remote_code (`bool`):
            As in `from_pretrained`.

    Returns:
        `PreTrainedModel`: with a new head where its classes were others.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
    if match := re.fullmatch(r"cifar-resnet-(\d+)", name):
        return AutoModelForImageClassification.from_config(CifarResNetConfig.from_depth(int(match[1]), **labels))
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **labels)
        if from_scratch:
            return AutoModelForImageClassification.from_config(config, trust_remote_code=trust_remote_code)
        return AutoModelForImageClassification.from_pretrained(
            name,
            config=config,
            ignore_mismatched_sizes=True,  # the head of other classes
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except OSError as error:
        raise ValueError(explain_unreachable(name, role, error)) from error


def is_shorthand(name: str | None) -> bool:
    """Tell whether a name stands for a network without weights."""
    return name is None or name.startswith("cifar-resnet-")


def has_classes(name: str, names: list[str], trust_remote_code: bool) -> bool:
    """Tell whether a saved model has just these classes."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(explain_unreachable(name, "--teacher", error)) from error
    return config.id2label == dict(enumerate(names))


def build_processor(student: str, image_size: int | None, first_image) -> BaseImageProcessor:
    """Load the student's image processor, or make one for the images' own size."""
    if not is_shorthand(student):
        processor = find_processor(student)
        if processor is not None:
            if image_size is not None:
                processor.size = {"height": image_size, "width": image_size}
                processor.do_center_crop = False
            return processor
    height, width = (image_size, image_size) if image_size else (first_image.height, first_image.width)
    mean_and_std = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return ViTImageProcessorPil(size={"height": height, "width": width}, **mean_and_std)


def check_output_dir(args: RunArguments) -> str | bool | None:
    """Return what to resume from; refuse to mix a new run into an old one's checkpoints."""
    resume = args.resume_from_checkpoint
    if resume is not None and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true" or None
    if args.do_train and not resume and os.path.isdir(args.output_dir) and get_last_checkpoint(args.output_dir):
        raise ValueError(
            f"Expected an output_dir without checkpoints, got {args.output_dir!r} with "
            f"{os.path.basename(get_last_checkpoint(args.output_dir))}: add --resume_from_checkpoint true to continue "
            "that run, or choose another --output_dir."
        )
    return resume


class Run:
    """Hold what the steps of the script share."""

    def __init__(self, model_args: ModelArguments, data_args: DataArguments, args: RunArguments):
        self.model_args, self.data_args, self.args = model_args, data_args, args
        self.resume = check_output_dir(args)
        set_seed(args.seed)
        with args.main_process_first(desc="loading images"):  # the others find them in the cache
            self.splits = load_images(data_args, args.seed)
        self.names = self.splits["train"].features["label"].names
        if data_args.uses_digits:
            for name in args.undecided:
                setattr(args, name, DIGITS_EPOCHS[name])
            data_args.image_size = data_args.image_size or 16  # 8x8 scans leave no room for three stages
        from_scratch = model_args.student_from_scratch or is_shorthand(model_args.student)
        self.student = build_model(
            model_args.student, "--student", self.names, from_scratch, model_args.trust_remote_code
        )
        if args.learning_rate is None:
            args.learning_rate = 0.1 if from_scratch else 0.01
        first_image = self.splits["train"][0]["image"]
        self.processor = build_processor(model_args.student, data_args.image_size, first_image)
        add_transforms(self.splits, self.processor, data_args)
        self.metric = TopKAccuracy(keep_in_memory=True)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return top-1 and top-5 accuracy."""
        return self.metric.compute(predictions=prediction.predictions, references=prediction.label_ids)

    def common(self) -> dict:
        """Return the arguments that every trainer of this script takes."""
        return {
            "train_dataset": self.splits["train"],
            "eval_dataset": self.splits["validation"],
            "processing_class": self.processor,
            "compute_metrics": self.compute_metrics,
        }

    def train_alone(self, model: PreTrainedModel, name: str, epochs: float) -> tuple[dict[str, float], list[dict]]:
        """
        Train a model on its own loss, in a folder that is never pushed; a resumed run finds it there.

        Args:
            model (`PreTrainedModel`):
                The model; changed in place.
            name (`str`):
                What to call it and its folder.
            epochs (`float`):
                How long.

        Returns:
            `tuple`: seconds by stage, and the log history.
        """
        folder = Path(self.args.output_dir) / f"_{name.replace(' ', '_')}"
        done = folder / "done.json"
        if self.resume and done.is_file():
            load_weights(model, str(folder))
            content = json.loads(done.read_text())
            return content["seconds"], content["log_history"]
        args = copy.copy(self.args)
        args.output_dir, args.num_train_epochs, args.push_to_hub = str(folder), epochs, False
        args.load_best_model_at_end = False
        trainer = DistillationTrainer(model=model, args=args, **self.common())
        logger.warning("Training the %s for %g epochs.", name, epochs)
        started = time.perf_counter()
        trainer.train(get_last_checkpoint(folder) if self.resume and folder.is_dir() else None)
        seconds = {"training": time.perf_counter() - started}
        trainer.save_model()
        if trainer.is_world_process_zero():
            done.write_text(json.dumps({"seconds": seconds, "log_history": trainer.state.log_history}))
        return seconds, trainer.state.log_history

    def evaluate(self, model: PreTrainedModel, processor: BaseImageProcessor | None = None) -> dict[str, float]:
        """Return a model's metrics on the validation images, as its own processor makes them if it has another."""
        args = copy.copy(self.args)
        args.push_to_hub = False
        validation = self.splits["validation"]
        if processor is not None:
            own = datasets.DatasetDict({"validation": validation.with_format(None)})
            add_transforms(own, processor, self.data_args)
            validation = own["validation"]
        metrics = DistillationTrainer(model=model, args=args, **self.common()).evaluate(validation)
        return {name.removeprefix("eval_"): value for name, value in metrics.items()}

    def get_teacher(self) -> tuple[PreTrainedModel, BaseImageProcessor | None, Result]:
        """Load the teacher, or build and train it."""
        name, epochs = self.model_args.teacher or "cifar-resnet-20", self.model_args.teacher_epochs
        trust = self.model_args.trust_remote_code
        if epochs is None:
            epochs = self.args.num_train_epochs if is_shorthand(name) else 0
        own_classes = is_shorthand(name) or epochs > 0 or has_classes(name, self.names, trust)
        if own_classes:
            teacher = build_model(name, "--teacher", self.names, False, trust)
        else:  # its features teach, its head is for other classes
            teacher = AutoModelForImageClassification.from_pretrained(
                name, use_safetensors=True, trust_remote_code=trust
            )
        processor = None if is_shorthand(name) or epochs > 0 else find_processor(name)
        result = Result("teacher", teacher.num_parameters())
        if epochs > 0:
            result.seconds, result.log_history = self.train_alone(teacher, "teacher", epochs)
        if own_classes and self.args.do_eval:
            result.metrics = self.evaluate(teacher, processor)
        return teacher, processor, result


def main() -> None:
    model_args, data_args, args = parse_arguments()
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        level=logging.WARNING if args.should_log else logging.ERROR,
    )
    transformers.utils.logging.disable_progress_bar()  # those of loading and saving; training keeps its own
    run = Run(model_args, data_args, args)
    results = []

    if args.do_train:
        plain = copy.deepcopy(run.student)  # the same start as the distilled student's
        teacher, teacher_processor, result = run.get_teacher()
        results.append(result)
        if model_args.plain_student:
            seconds, history = run.train_alone(plain, "plain student", args.num_train_epochs)
            metrics = run.evaluate(plain) if args.do_eval else {}
            results.append(Result("plain student", plain.num_parameters(), metrics, seconds, history))
        trainer = IEKDTrainer(
            model=run.student,
            teacher_model=teacher,
            teacher_processor=teacher_processor,
            paraphraser=model_args.paraphraser,
            args=args,
            **run.common(),
        )
        logger.warning("Distilling the student: stage 1 (paraphraser), then stage 2.")
        output = trainer.train(resume_from_checkpoint=run.resume)
        seconds = {"stage 2": output.metrics["train_runtime"]}
        if "paraphraser_train_runtime" in output.metrics:
            seconds = {"stage 1": output.metrics["paraphraser_train_runtime"], **seconds}
        results.append(
            Result("distilled student", run.student.num_parameters(), {}, seconds, trainer.state.log_history)
        )
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", output.metrics)
        trainer.save_metrics("train", output.metrics)
    else:
        trainer = DistillationTrainer(model=run.student, args=args, **run.common())

    if args.do_eval:
        prediction = trainer.predict(run.splits["validation"], metric_key_prefix="eval")
        per_class = run.metric.compute(
            predictions=prediction.predictions, references=prediction.label_ids, class_names=run.names
        )
        metrics = {**prediction.metrics, **{f"eval_{name}": value for name, value in per_class.items()}}
        trainer.save_metrics("eval", metrics)
        if results:
            results[-1].metrics = per_class
        else:
            results.append(Result("student", run.student.num_parameters(), per_class))
    if args.do_predict:
        split = run.splits.get("test", run.splits["validation"])
        classes = trainer.predict(split, metric_key_prefix="predict").predictions.argmax(axis=1)
        if trainer.is_world_process_zero():
            lines = [f"{row},{run.names[index]}" for row, index in enumerate(classes)]
            Path(args.output_dir, "predictions.csv").write_text("\n".join(["row,label", *lines, ""]))

    if trainer.is_world_process_zero() and results:
        print("\n" + table(results) + "\n")
        if args.do_train:
            draw(results, os.path.join(args.output_dir, "report.png"))
            print(f"Student: {args.output_dir}   Picture: {os.path.join(args.output_dir, 'report.png')}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset=data_args.dataset_name, tasks="image-classification")


if __name__ == "__main__":
    main()
