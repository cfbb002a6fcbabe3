"""One cell of a comparison: one method, one pair of networks, one seed, in a folder of its own that is made once."""

import datetime
import json
import logging
import os
import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

import accelerate
import datasets
import numpy as np
import torch
import transformers
from comparison_explorations import EXPLORATIONS
from comparison_methods import MUTUAL, label, parse_method
from huggingface_hub.utils import WeakFileLock
from transformers import BaseImageProcessor, PreTrainedModel, set_seed
from transformers.trainer_callback import ExportableState

import iekd_hf
from iekd_hf import METHODS, IEKDTrainer, IEKDTrainingArguments, MutualTrainer, MutualTrainingArguments
from iekd_hf.commands.images.data import DataArguments, load_images
from iekd_hf.commands.images.metrics import TopKAccuracy
from iekd_hf.commands.images.run import build_model, build_processor, is_shorthand
from iekd_hf.commands.images.transforms import prepare
from iekd_hf.method.objective import is_on
from iekd_hf.models.loading import find_processor, load_model
from iekd_hf.training.base_trainer import DistillationTrainer
from iekd_hf.training.checkpoints import load_weights
from iekd_hf.training.resume import last_run


logger = logging.getLogger(__name__)

# What Trainer measures of a training, from where its process begins.
OF_ONE_PROCESS = ("train_loss", "train_samples_per_second", "train_steps_per_second")


@dataclass
class ScheduleArguments:
    """Say how every network is trained; the same for all methods."""

    epochs: float = field(default=30.0, metadata={"help": "Epochs of each student and peer."})
    plain_epochs: float = field(
        default=0.0,
        metadata={"help": "Epochs of plain training before, once for each student and seed; all go on from there."},
    )
    teacher_epochs: float = field(default=30.0, metadata={"help": "Epochs of the teachers."})
    flipped_labels: float = field(
        default=0.0, metadata={"help": "Share of the teachers' training labels that are flipped to another class."}
    )
    paraphraser_epochs: float = field(default=30.0, metadata={"help": "Epochs of stage 1, once for each teacher."})
    student_samples: int | None = field(
        default=None, metadata={"help": "Train students, peers and paraphrasers on this many images. Default: all."}
    )
    batch_size: int = field(default=128, metadata={"help": "Batch size."})
    learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate of SGD."})
    milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of the steps after which the learning rate falls to a tenth, as the papers have it: 0.5 "
            "0.75. Default: one cycle, a fifth of the steps up along a line and down along a cosine."
        },
    )
    held_out: int = field(
        default=5000, metadata={"help": "Images of the training split that no network sees: the validation part."}
    )
    cache_views: int = field(
        default=8, metadata={"help": "Views of each image, for all methods; the teacher runs once over them. 0: live."}
    )
    mixed_precision: str = field(default="bf16", metadata={"help": "Precision.", "choices": ["bf16", "fp16", "no"]})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})

    def training_arguments(self, folder: Path, seed: int, epochs: float, **kwargs) -> dict:
        """Return the arguments of a trainer."""
        if self.milestones is None:
            schedule = {"lr_scheduler_type": "cosine", "warmup_steps": 0.2}
        else:
            schedule = {"lr_scheduler_type": "constant"}
        return {
            "output_dir": str(folder),
            "num_train_epochs": epochs,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": 2 * self.batch_size,
            "learning_rate": self.learning_rate,
            **schedule,
            "optim": "sgd",
            "optim_args": "momentum=0.9,nesterov=true",
            "weight_decay": 5e-4,
            "max_grad_norm": 0.0,
            "bf16": self.mixed_precision == "bf16",
            "fp16": self.mixed_precision == "fp16",
            "channels_last": True,
            "use_cpu": self.use_cpu or not torch.cuda.is_available(),  # else bf16 is refused there
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "logging_strategy": "epoch",
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "seed": seed,
            **kwargs,
        }


class MultiStep(transformers.TrainerCallback):
    """Lower the learning rate to a tenth after some shares of the steps."""

    def __init__(self, milestones: list[float]):
        self.milestones = milestones

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        """Replace the constant factor of Trainer's schedule."""
        steps = [round(share * state.max_steps) for share in self.milestones]
        lr_scheduler.lr_lambdas = [lambda step: 0.1 ** sum(step >= s for s in steps)] * len(lr_scheduler.lr_lambdas)


class Elapsed(transformers.TrainerCallback, ExportableState):
    """Count the seconds of a training, with those of processes that were broken off: checkpoints hold the count."""

    def __init__(self):
        self.start, self.before = self._now(), {"train_runtime": 0.0, "train_cpu_seconds": 0.0}

    def on_train_begin(self, args, state, control, **kwargs):
        """Go on from a checkpoint, if the run does."""
        self.start = self._now()
        if state.global_step > 0:
            self.before = state.stateful_callbacks[type(self).__name__]["attributes"]

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": self.seconds()}

    def seconds(self) -> dict[str, float]:
        """Return the seconds so far, by a clock and of the CPU."""
        return {name: self.before[name] + now - self.start[name] for name, now in self._now().items()}

    @staticmethod
    def _now() -> dict[str, float]:
        return {"train_runtime": time.monotonic(), "train_cpu_seconds": time.process_time()}


def train(trainer: transformers.Trainer) -> dict[str, float]:
    """Train, from the last epoch on that a process before has finished; return the metrics that are of all epochs."""
    elapsed = Elapsed()
    trainer.add_callback(elapsed)
    begun = last_run(trainer.args.output_dir) is not None
    metrics = trainer.train(resume_from_checkpoint=begun).metrics
    if begun:  # what Trainer counts is of this process alone
        metrics = {name: metrics[name] for name in metrics if name not in OF_ONE_PROCESS}
    return metrics | elapsed.seconds()


def keep_settings(path: Path, settings: dict) -> None:
    """
    Note what all cells of a folder are made with.

    Args:
        path (`Path`):
            Where it is noted.
        settings (`dict`):
            What may not change from cell to cell.

    Raises:
        `ValueError`: if other settings are noted there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write(path, settings)
    noted = json.loads(path.read_text())
    if changed := [name for name, value in settings.items() if value != noted.get(name)]:
        before, now = (", ".join(f"{name}={those.get(name)!r}" for name in changed) for those in (noted, settings))
        raise ValueError(
            f"Expected the settings that {path.parent} was begun with, {before}, got {now}: give another --output_dir."
        )


class Comparison:
    """
    Hold the images, and train what is compared on them.

    Args:
        data_args (`DataArguments`):
            Where the images come from. The test part is their test or validation split.
        schedule (`ScheduleArguments`):
            How networks are trained.
        output_dir (`str`):
            Where everything is kept.

    Raises:
        `ValueError`: if the folder holds a comparison of other images or with another schedule.
    """

    def __init__(self, data_args: DataArguments, schedule: ScheduleArguments, output_dir: str):
        self.schedule, self.folder = schedule, Path(output_dir)
        splits = load_images(data_args, seed=0)
        held_out = splits["train"].train_test_split(schedule.held_out, seed=0, stratify_by_column="label")
        train, test = held_out["train"], splits.get("test", splits["validation"])
        if "label" not in test.column_names:
            raise ValueError("Expected a test split with labels, got hidden ones: give the files of the other splits.")
        few = train
        if schedule.student_samples is not None:
            few = train.train_test_split(train_size=schedule.student_samples, seed=0, stratify_by_column="label")
            few = few["train"]
        self.names = train.features["label"].names
        self.processor = build_processor("cifar-resnet-", data_args.image_size, train[0]["image"])
        told = flip_labels(train, schedule.flipped_labels) if schedule.flipped_labels > 0 else train
        parts = datasets.DatasetDict(train=told, validation=held_out["test"], test=test)
        self.images, self.augmentation = prepare(parts, self.processor, data_args, seed=0)
        fewer = prepare(datasets.DatasetDict(train=few), self.processor, data_args, seed=0)[0]
        self.images["few"] = fewer["train"]
        self.metric = TopKAccuracy(keep_in_memory=True)
        keep_settings(self.folder / "settings.json", {**asdict(schedule), **asdict(data_args)})

    def build(self, name: str, seed: int) -> PreTrainedModel:
        """Make a network from scratch."""
        set_seed(seed)
        return build_model(name, "network", self.names, from_scratch=True, trust_remote_code=False)

    def student(self, name: str, seed: int) -> PreTrainedModel:
        """Make a student: from scratch, or trained alone for `plain_epochs` before."""
        model = self.build(name, seed)
        if self.schedule.plain_epochs > 0:
            folder = self.folder / "plain_students" / name / f"seed-{seed}"
            self.train_once(model, folder, seed, self.schedule.plain_epochs, "few", ["validation"])
        return model

    def common(self, part: str) -> dict:
        """Return the arguments that every trainer takes."""
        milestones = self.schedule.milestones
        return {
            "train_dataset": self.images[part],
            "eval_dataset": self.images["validation"],
            "augmentation": self.augmentation,
            "processing_class": self.processor,
            "callbacks": None if milestones is None else [MultiStep(milestones)],
            "compute_metrics": lambda prediction: self.metric.compute(
                predictions=prediction.predictions, references=prediction.label_ids
            ),
        }

    def train_alone(self, model: PreTrainedModel, folder: Path, seed: int, epochs: float, part: str):
        """Train a network on its own loss; return the trainer and the metrics."""
        args = IEKDTrainingArguments(method="plain", **self.schedule.training_arguments(folder, seed, epochs))
        model = model.to(memory_format=torch.channels_last)
        trainer = DistillationTrainer(model=model, args=args, **self.common(part))
        metrics = train(trainer)
        trainer.save_model()
        return trainer, metrics

    def train_once(
        self, model: PreTrainedModel, folder: Path, seed: int, epochs: float, part: str, parts: list[str]
    ) -> None:
        """Train a network alone and evaluate it, or load what was trained in this folder before."""
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / "lock"):
            if not (folder / "metrics.json").is_file():
                logger.warning("Training %s.", folder.relative_to(self.folder))
                trainer, metrics = self.train_alone(model, folder, seed, epochs, part)
                write(folder / "metrics.json", {**metrics, **self.accuracies(trainer, parts)})
        load_weights(model, str(folder))

    def teacher(self, name: str) -> tuple[PreTrainedModel, BaseImageProcessor | None]:
        """
        Train a teacher on the whole training part, or load the one that was trained before.

        A saved one (Hub id or folder) is used as it is, with its own image processor.
        """
        if not is_shorthand(name):
            return load_model(name, "teacher"), find_processor(name)
        model, folder = self.build(name, seed=0), self.folder / "teachers" / name
        self.train_once(model, folder, 0, self.schedule.teacher_epochs, "train", ["validation", "test"])
        return model, None

    def paraphraser(self, name: str, teacher: PreTrainedModel, processor: BaseImageProcessor | None) -> str:
        """Train the paraphraser of a teacher, or find the one that was trained before; return its folder."""
        folder = self.folder / "paraphrasers" / quote(name, safe="")
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / "lock"):
            if not (folder / "metrics.json").is_file():
                logger.warning("Training the paraphraser of %s.", name)
                arguments = self.schedule.training_arguments(folder, 0, 1, max_steps=1)
                args = IEKDTrainingArguments(paraphraser_epochs=self.schedule.paraphraser_epochs, **arguments)
                # Stage 1 needs any student that takes the images: a saved teacher's kind might not.
                student = self.build(name if is_shorthand(name) else "cifar-resnet-8", 0)
                trainer = IEKDTrainer(student, teacher, args, teacher_processor=processor, **self.common("few"))
                write(folder / "metrics.json", train(trainer))
        return str(folder / "_paraphraser")

    def accuracies(self, trainer, parts: list[str], peer: str = "") -> dict[str, float]:
        """Evaluate on some parts."""
        found = {}
        for part in parts:
            metrics = trainer.evaluate(self.images[part], metric_key_prefix=f"{part}{peer}")
            found |= {name: value for name, value in metrics.items() if name.endswith(("accuracy", "loss"))}
        return found

    def run(self, networks: str, method: str, seed: int, parts: list[str]) -> bool:
        """
        Run one cell, unless it has been run or is running.

        Args:
            networks (`str`):
                `teacher:student`, or peers `first+second`.
            method (`str`):
                A method's name, and arguments that differ from its own: `ie-ft,lambda_inh=300`.
            seed (`int`):
                Of the student's weights, the order of the images, and the split.
            parts (`list[str]`):
                What to evaluate on: `validation`, `test`.

        Returns:
            `bool`: whether it was run now.
        """
        folder = cell_folder(self.folder, networks, method, seed)
        folder.mkdir(parents=True, exist_ok=True)
        done = folder / "metrics.json"
        if done.is_file():
            warn_of_missing(folder, json.loads(done.read_text()), parts)
            return False
        try:
            with WeakFileLock(folder / "lock", timeout=0.1):
                if done.is_file():
                    return False
                logger.warning("%s  %s  seed %d", networks, method, seed)
                run = self._run_pair if ":" in networks else self._run_peers
                history, args, metrics = run(networks, *parse_method(method), folder, seed, parts)
                metrics |= {"made": made()}
                write(folder / "log.json", history)
                write(folder / "arguments.json", {**asdict(self.schedule), **args})
                write(done, metrics)
        except TimeoutError:  # another process runs it
            return False
        return True

    def _run_pair(self, networks: str, method: str, changes: dict, folder: Path, seed: int, parts: list[str]) -> tuple:
        teacher_name, _, student_name = networks.rpartition(":")
        (teacher, processor), student = self.teacher(teacher_name), self.student(student_name, seed)
        views, exploration = self.schedule.cache_views, changes.pop("exploration", "as in the paper")
        args = IEKDTrainingArguments(
            method=method,
            split_seed=seed,
            cache_teacher=views > 0,
            cache_views=max(views, 1),
            teacher_cache_dir=str(self.folder / "teacher_cache"),
            **self.schedule.training_arguments(folder / "student", seed, self.schedule.epochs, **changes),
        )
        needs_paraphraser = args.knowledge == "factors" and (is_on(args.lambda_inh) or is_on(args.lambda_exp))
        paraphraser = self.paraphraser(teacher_name, teacher, processor) if needs_paraphraser else None
        trainer = EXPLORATIONS[exploration](
            student, teacher, args, paraphraser=paraphraser, teacher_processor=processor, **self.common("few")
        )
        metrics = train(trainer)
        trainer.save_model()
        names = [*METHODS[method], "temperature", "lambda_schedule", "lambda_warmup_ratio", "split_mode", "split_seed"]
        used = {**changes, "exploration": exploration, **{name: getattr(args, name) for name in names}}
        return trainer.state.log_history, used, metrics | self.accuracies(trainer, parts)

    def _run_peers(
        self, networks: str, method: str, changes: dict, folder: Path, seed: int, parts: list[str]
    ) -> tuple:
        names = networks.split("+")
        peers = [self.build(name, 1000 * i + seed) for i, name in enumerate(names, start=1)]
        if method == "alone":
            history, metrics, seconds = [], {}, Counter()
            for i, peer in enumerate(peers, start=1):
                place = folder / "peers" / f"peer_{i}"
                trainer, trained = self.train_alone(peer, place, seed, self.schedule.epochs, "few")
                seconds.update({name: trained[name] for name in ("train_runtime", "train_cpu_seconds")})
                metrics |= self.accuracies(trainer, parts, peer=f"_peer_{i}")
                history += trainer.state.log_history
            return history, {}, metrics | seconds
        arguments = self.schedule.training_arguments(folder / "peers", seed, self.schedule.epochs, **changes)
        args = MutualTrainingArguments(mutual_loss=MUTUAL[method], split_seed=seed, **arguments)
        trainer = MutualTrainer(peers, args, **self.common("few"))
        metrics = train(trainer)
        trainer.save_model()
        used = {**changes, "mutual_loss": args.mutual_loss, **trainer.distillation_objective.weights()}
        return trainer.state.log_history, used, metrics | self.accuracies(trainer, parts)


def warn_of_missing(cell: Path, metrics: dict, parts: list[str]) -> None:
    """Warn that a finished cell, which is not run again, was not evaluated on some parts."""
    if missing := [part for part in parts if not any(name.startswith(f"{part}_") for name in metrics)]:
        logger.warning("%s was not evaluated on %s: give other seeds.", cell, " or ".join(missing))


def flip_labels(images: datasets.Dataset, share: float) -> datasets.Dataset:
    """Give a share of the images, the same ones at each call, another label, each other one as likely."""
    rng, labels = np.random.default_rng(0), np.array(images["label"])
    flipped = rng.permutation(len(labels))[: round(share * len(labels))]
    classes = images.features["label"].num_classes
    labels[flipped] = (labels[flipped] + rng.integers(1, classes, len(flipped))) % classes
    return images.remove_columns("label").add_column("label", labels.tolist(), feature=images.features["label"])


def cell_folder(folder: Path, networks: str, method: str, seed: int) -> Path:
    """Return the folder of a cell."""
    # A network that is a folder must not lead out of this one.
    name = "-to-".join(quote(part, safe="+") for part in networks.rsplit(":", 1))
    return folder / "cells" / name / label(method) / f"seed-{seed}"


def made() -> dict[str, str]:
    """Return when and by which versions something was made."""
    modules = (torch, transformers, accelerate, datasets, iekd_hf)
    device = accelerate.PartialState().device  # the Trainer's, which may stay on the CPU
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        **{module.__name__: module.__version__ for module in modules},
    }


def write(path: Path, content) -> None:
    """Write JSON, whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=1))
    os.replace(unfinished, path)
