"""What the example scripts share: their arguments, models by name, and runs to compare with."""

import copy
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import PIL.Image
import torch
import transformers
from latency import median_milliseconds
from report import Result
from transformers import AutoConfig, BaseImageProcessor, HfArgumentParser, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from iekd_hf import IEKDTrainer
from iekd_hf.models.loading import explain_unreachable
from iekd_hf.training.base_trainer import DistillationTrainer
from iekd_hf.training.checkpoints import load_weights
from iekd_hf.training.resume import find_resume_point


logger = logging.getLogger(__name__)

# The digits are small and learnt in a few epochs.
DIGITS_EPOCHS = {"num_train_epochs": 6.0, "paraphraser_epochs": 4.0}
OTHER_EPOCHS = 30.0
# What a network that was trained to compare with leaves in its folder at its end.
_DONE = "done.json"


@dataclass
class ScriptArguments:
    """Change those defaults of a trainer's arguments that suit a script; each can be set on the command line."""

    output_dir: str | None = field(default="out", metadata={"help": "Where the results and checkpoints go."})
    do_train: bool = field(default=True, metadata={"help": "Train; otherwise measure the models as they are."})
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs. Default: 6 for the digits, otherwise 30."}
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
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of what is pushed, as the Hub names it (mit, ...). Default: the pretrained one's."},
    )

    # Epochs on the data that a script makes itself, and on all other data.
    own_epochs = DIGITS_EPOCHS
    other_epochs = OTHER_EPOCHS

    def __post_init__(self):
        # Which default holds is known when the data is.
        self.undecided = [name for name in self.own_epochs if getattr(self, name, 0) is None]
        for name in self.undecided:
            setattr(self, name, self.other_epochs)
        super().__post_init__()

    def use_own_epochs(self) -> None:
        """Take the epochs of a script's own data where none were given."""
        for name in self.undecided:
            setattr(self, name, self.own_epochs[name])


def parse_arguments(kinds: tuple[type, ...], description: str) -> tuple:
    """Read flags, or one JSON or YAML file."""
    parser = HfArgumentParser(kinds, description=description)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def load_for_classes(
    auto_class: type,
    name: str,
    role: str,
    names: list[str],
    from_scratch: bool,
    trust_remote_code: bool,
    dtype: str = "float32",
    **hub,
) -> PreTrainedModel:
    """
    Load a model for these classes.

    Args:
        auto_class (`type`):
            `AutoModelForImageClassification` and its like.
        name (`str`):
            Hub id or folder.
        role (`str`):
            What to call it in an error.
        names (`list[str]`):
            The classes.
        from_scratch (`bool`):
            Whether to take the configuration only.
        trust_remote_code (`bool`), dtype (`str`), hub (`revision`, `token`):
            As in `from_pretrained`.

    Returns:
        `PreTrainedModel`: with a new head where its classes were others.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub, **label_maps(names))
        if from_scratch:
            config.name_or_path = ""  # its weights are not that model's
            # float32, whatever type the weights that are left out were saved in
            return auto_class.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
        return auto_class.from_pretrained(
            name,
            config=config,
            ignore_mismatched_sizes=True,  # the head of other classes
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            **hub,
        )
    except (OSError, ValueError) as error:
        raise ValueError(explain_unreachable(name, role, error)) from error


def label_maps(names: list[str]) -> dict[str, dict]:
    """Return a configuration's `id2label` and `label2id`."""
    return {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}


def check_output_dir(args: TrainingArguments) -> str | bool | None:
    """Return what to resume from; refuse to mix a new run into an old one's checkpoints, or to continue nothing."""
    resume = args.resume_from_checkpoint
    if resume is not None and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true" or None
    if args.do_train and not resume and os.path.isdir(args.output_dir) and get_last_checkpoint(args.output_dir):
        raise ValueError(
            f"Expected an output_dir without checkpoints, got {args.output_dir!r} with "
            f"{os.path.basename(get_last_checkpoint(args.output_dir))}: add --resume_from_checkpoint true to continue "
            "that run, or choose another --output_dir."
        )
    beside = (Path(args.output_dir).glob(f"_*/{name}") for name in (_DONE, "checkpoint-*"))
    if (
        args.do_train
        and resume is True
        and find_resume_point(args.output_dir, True) is None
        and not any(map(any, beside))
    ):
        raise ValueError(
            f"Expected the output_dir of a run that has begun, got {args.output_dir!r} without any checkpoint: leave "
            "--resume_from_checkpoint out to start it, or name that run's --output_dir."
        )
    return resume


class ExampleRun:
    """
    Hold what the trainers of one script share; a subclass has the data.

    Args:
        args (`TrainingArguments`):
            Made of [`ScriptArguments`] and a trainer's own.
    """

    # Trains what the result is compared with.
    trainer_class: type[DistillationTrainer] = DistillationTrainer
    # The images, and the student's image processor, once they are known.
    splits: datasets.DatasetDict
    processor: BaseImageProcessor

    def __init__(self, args: TrainingArguments):
        logging.basicConfig(
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            level=logging.WARNING if args.should_log else logging.ERROR,
        )
        transformers.utils.logging.disable_progress_bar()  # those of loading and saving; training keeps its own
        self.args = args
        resume = check_output_dir(args)
        # What was finished beside the run is taken up even where the run itself has not begun.
        self.reuses = bool(resume)
        self.resume = None if resume is True and find_resume_point(args.output_dir, True) is None else resume
        set_seed(args.seed)

    def common(self) -> dict:
        """Return the arguments that every trainer of this script takes."""
        raise NotImplementedError

    def evaluate(self, model: PreTrainedModel, processor: BaseImageProcessor | None = None) -> dict[str, float]:
        """Return a model's metrics on the validation images, as its own processor makes them if it has another."""
        raise NotImplementedError

    def train_beside(
        self, name: str, epochs: float, models: dict[str, PreTrainedModel], make_trainer: Callable
    ) -> tuple[float, list[dict]]:
        """
        Train what the result is compared with, in a folder that is never pushed; a resumed run finds it there.

        Args:
            name (`str`):
                What to call it and its folder.
            epochs (`float`):
                How long.
            models (`dict[str, PreTrainedModel]`):
                The models by the folder, inside of that one, that the trainer saves them in; changed in place.
            make_trainer (`Callable`):
                Makes the trainer from its arguments.

        Returns:
            `tuple`: seconds, and the log history.
        """
        folder = Path(self.args.output_dir) / f"_{re.sub('[^a-z0-9]+', '_', name.lower())}"
        done = folder / _DONE
        if self.reuses and done.is_file():
            for subfolder, model in models.items():
                load_weights(model, str(folder / subfolder))
            content = json.loads(done.read_text())
            return content["seconds"], content["log_history"]
        args = copy.copy(self.args)
        args.output_dir, args.num_train_epochs, args.push_to_hub = str(folder), epochs, False
        args.report_to = []  # trackers would mix it with the run that it is compared with
        args.load_best_model_at_end, args.metric_for_best_model = False, None
        trainer = make_trainer(args)
        logger.warning("Training the %s for %g epochs.", name, epochs)
        output = trainer.train(get_last_checkpoint(folder) if self.reuses and folder.is_dir() else None)
        seconds = output.metrics["train_runtime"]
        trainer.save_model()
        if trainer.is_world_process_zero():
            done.write_text(json.dumps({"seconds": seconds, "log_history": trainer.state.log_history}))
        return seconds, trainer.state.log_history

    def train_alone(self, model: PreTrainedModel, name: str, epochs: float) -> tuple[float, list[dict]]:
        """Train a model on its own loss, as [`train_beside`]."""
        return self.train_beside(
            name, epochs, {"": model}, lambda args: self.trainer_class(model=model, args=args, **self.common())
        )

    def measure(self, model: PreTrainedModel, **common) -> dict[str, float]:
        """Return a model's metrics, by the arguments of a trainer."""
        args = copy.copy(self.args)
        args.push_to_hub, args.report_to = False, []
        metrics = self.trainer_class(model=model, args=args, **common).evaluate()
        return {name.removeprefix("eval_"): value for name, value in metrics.items()}

    def train_teacher(self, teacher: PreTrainedModel, epochs: float) -> Result:
        """Train the teacher on the data, unless it is for no epochs; its metrics are still to be measured."""
        result = Result("teacher", teacher.num_parameters())
        if epochs > 0:
            seconds, result.log_history = self.train_alone(teacher, "teacher", epochs)
            result.seconds = {"training": seconds}
            teacher.config.name_or_path = ""  # no longer the model of that name
        return result

    def train_plain(self, student: PreTrainedModel) -> Result:
        """Train the student without a teacher, on the same schedule, and measure it."""
        seconds, history = self.train_alone(student, "plain student", self.args.num_train_epochs)
        measured = self.evaluate(student) if self.args.do_eval else {}
        return Result("plain student", student.num_parameters(), measured, {"training": seconds}, history)

    def distil(self, trainer: IEKDTrainer) -> Result:
        """Train both stages, and save the student with what is known of the training."""
        logger.warning("Distilling the student: stage 1 (paraphraser), then stage 2.")
        metrics = trainer.train(resume_from_checkpoint=self.resume).metrics
        seconds = {"stage 2": metrics["train_runtime"]}
        if "paraphraser_train_runtime" in metrics:
            seconds = {"stage 1": metrics["paraphraser_train_runtime"], **seconds}
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        return Result("distilled student", trainer.student.num_parameters(), {}, seconds, trainer.state.log_history)

    def ask_the_hub(self, model: PreTrainedModel) -> None:
        """Let a Hub that refuses the repository say so now, and not after the networks to compare with are trained."""
        if self.args.push_to_hub:
            args = copy.copy(self.args)
            args.report_to = []
            self.trainer_class(model=model, args=args, **self.common())

    def first_image(self) -> PIL.Image.Image:
        """Return the first validation image, in RGB."""
        return self.splits["validation"][0]["image"].convert("RGB")

    def latency(self, model: PreTrainedModel, processor: BaseImageProcessor | None = None) -> float:
        """Return the milliseconds that a model takes for one image, on one thread of the CPU in float32."""
        pixels = (processor or self.processor)(self.first_image(), return_tensors="pt")["pixel_values"]
        on_cpu = copy.deepcopy(model).to("cpu", torch.float32).eval()
        with torch.inference_mode():
            return median_milliseconds(lambda: on_cpu(pixel_values=pixels))
