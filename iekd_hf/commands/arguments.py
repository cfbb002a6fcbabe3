"""The arguments that the commands share."""

from dataclasses import dataclass, field

import torch

from ..method.presets import METHODS


# The digits are small and learnt in a few epochs.
DIGITS_EPOCHS = {"num_train_epochs": 10.0, "paraphraser_epochs": 3.0}
DIGITS_TEACHER_EPOCHS = 8.0
OTHER_EPOCHS = 30.0


@dataclass
class ScriptArguments:
    """Change the defaults of a trainer's arguments where a command wants others; all can be set."""

    output_dir: str | None = field(default="out", metadata={"help": "Folder for results and checkpoints."})
    do_train: bool = field(
        default=True, metadata={"help": "Train; otherwise only measure the student, or the peers, as they are."}
    )
    do_eval: bool = field(
        default=True, metadata={"help": "Evaluate on the validation images during training and at the end."}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs. Default: 10 for the digits, otherwise 30."}
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
    max_grad_norm: float = field(default=0.0, metadata={"help": "Maximum gradient norm; 0 for no clipping."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint."})
    save_total_limit: int | None = field(default=1, metadata={"help": "How many checkpoints to keep."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log the losses."})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "Pin batches in memory. Default: where there is a GPU."}
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "Trackers: tensorboard, wandb, ..., or none."}
    )
    disable_tqdm: bool = field(
        default=False, metadata={"help": "Print lines instead of a progress bar, as is done without a terminal."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: transforms need the images."})
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 mixed precision."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there is a GPU."})
    seed: int = field(default=42, metadata={"help": "Seed of all that is random."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Resume the run in output_dir (true), or this checkpoint."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Push the result to the Hub, with a model card."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to push to. Default: output_dir's name, in your namespace."}
    )
    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the pushed model, as on the Hub (mit, ...). Default: the pretrained one's."},
    )

    # Epochs on the data that a command makes itself, and on all other data.
    own_epochs, own_teacher_epochs = DIGITS_EPOCHS, DIGITS_TEACHER_EPOCHS
    other_epochs = OTHER_EPOCHS

    def __post_init__(self):
        # Which default holds is known when the data is.
        self.uses_own_epochs = False
        self.undecided = [name for name in self.own_epochs if getattr(self, name, 0) is None]
        for name in self.undecided:
            setattr(self, name, self.other_epochs)
        if not self.num_train_epochs > 0:
            raise ValueError(
                f"Expected num_train_epochs above 0, got {self.num_train_epochs}: to measure without training, set "
                "--do_train false."
            )
        if not self.do_eval:
            self.eval_strategy = "no"  # any other would turn it on
        super().__post_init__()

    def use_own_epochs(self) -> None:
        """Take the epochs of a command's own data where none were given."""
        for name in self.undecided:
            setattr(self, name, self.own_epochs[name])
        self.uses_own_epochs = "num_train_epochs" in self.undecided

    @property
    def default_teacher_epochs(self) -> float:
        """Return the epochs of a teacher that starts from scratch, where none were given."""
        return self.own_teacher_epochs if self.uses_own_epochs else self.num_train_epochs


class MethodByDefault:
    """Choose method and weights where none were given, once teacher and student are known."""

    def __post_init__(self):
        self.chooses_method = self.method is None and self.lambda_kd is None
        self.chooses_weights = self.method is None and self.lambda_inh is None and self.lambda_exp is None
        self.method = self.method or "ie-ft"
        super().__post_init__()

    def choose_method(self, teacher_knows_classes: bool) -> None:
        """Add the logit term where no method was given and the teacher knows the classes."""
        if self.chooses_method and teacher_knows_classes:
            self.method, self.lambda_kd = "ie-ft+kd", METHODS["ie-ft+kd"]["lambda_kd"]

    def divide_weights(self, by: float) -> None:
        """Take a part of the preset's weights between features, where nothing was given."""
        if self.chooses_weights:
            preset = METHODS[self.method]
            self.lambda_inh, self.lambda_exp = preset["lambda_inh"] / by, preset["lambda_exp"] / by


def teacher_epochs_field(own: str):
    """Return the field of `teacher_epochs`, with the default for data of the command's own in words."""
    return field(
        default=None,
        metadata={
            "help": "Epochs to train the teacher on the data first. Default: num_train_epochs for a teacher without "
            f"weights ({own}), otherwise 0."
        },
    )


@dataclass
class ModelArguments:
    """Say which teacher and which student, and where they come from."""

    _argument_group_name = "Teacher and student"

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
    teacher_epochs: float | None = teacher_epochs_field("8 for the digits")
    plain_student: bool = field(
        default=True,
        metadata={"help": "Also train the same student without a teacher, on the same schedule, to compare with."},
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of a moving average of the distilled student, which is measured beside it and saved in the "
            "folder `average` of output_dir; 0.999 suits a few thousand steps. Default: no average."
        },
    )
    teacher_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the teacher's repository."}
    )
    student_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the student's repository."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type that saved weights are loaded in. `auto` takes that of the file; to train faster use --bf16 "
            "instead, and --teacher_dtype for the teacher.",
            "choices": ["float32", "bfloat16", "float16", "auto"],
        },
    )
    token: str | None = field(
        default=None,
        metadata={"help": "Token for private repositories. Default: HF_TOKEN, or what `hf auth login` has stored."},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the code that comes with a model on the Hub. Only for repositories you trust."},
    )

    def __post_init__(self):
        if self.teacher_epochs is not None and not self.teacher_epochs >= 0:
            raise ValueError(f"Expected teacher_epochs of at least 0, got {self.teacher_epochs}.")

    def hub(self, role: str) -> dict:
        """Return the keyword arguments of `from_pretrained` for the teacher or the student."""
        revision = self.teacher_revision if role == "teacher" else self.student_revision
        return {"revision": revision, "token": self.token, "trust_remote_code": self.trust_remote_code}
