"""The arguments of the trainers: `TrainingArguments` and what the method adds."""

import math
import os
from dataclasses import dataclass, field

from transformers import TrainingArguments

from .factors import DECODERS, SPLIT_MODES
from .losses import EXPLORATION_DISTANCES, INHERITANCE_DISTANCES, RECONSTRUCTION_DISTANCES, REDUCTIONS


LAMBDA_SCHEDULES = ("constant", "linear", "cosine")


def _choice(default: str, known, text: str):
    return field(default=default, metadata={"help": text, "choices": list(known)})


@dataclass
class IEKDTrainingArguments(TrainingArguments):
    r"""
    Hold the arguments of [`IEKDTrainer`]: those of [`~transformers.TrainingArguments`], and the method's own.

    The objective is \(L = L_{goal} + \lambda_{inh} L_{inh} + \lambda_{exp} L_{exp} + \lambda_{kd} L_{kd}\).

    Args:
        lambda_inh (`float`, *optional*, defaults to 1000.0):
            Weight of the inheritance loss. With `loss_reduction="mean"` the loss is about 1.13 / sqrt(N) for factors
            of N elements (0.025 for 32 x 8 x 8), so useful weights are in the hundreds. 0 removes the half's encoder.
        lambda_exp (`float`, *optional*, defaults to 100.0):
            Weight of the exploration loss. 0 removes the half's encoder.
        lambda_schedule (`str`, *optional*, defaults to `"constant"`):
            How both weights and `lambda_kd` move after the warm-up: `"constant"`, or down to 0 at the end of training
            along a line (`"linear"`) or half a cosine (`"cosine"`).
        lambda_warmup_ratio (`float`, *optional*, defaults to 0.0):
            Share of the training steps over which the weights rise linearly from 0, in [0, 1).
        inheritance_distance (`str`, *optional*, defaults to `"l1"`):
            Distance of [`inheritance_loss`].
        exploration_distance (`str`, *optional*, defaults to `"l1"`):
            Distance of [`exploration_loss`].
        loss_reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` over a factor's elements, or `"sum"`.
        inheritance_ratio (`float`, *optional*, defaults to 0.5):
            Share of the student's channels that inherit, in [0, 1].
        split_mode (`str`, *optional*, defaults to `"random"`):
            `"random"` or `"natural"`, see [`ChannelSplit`].
        split_seed (`int`, *optional*, defaults to 0):
            Seed of the random split.
        factor_channels (`int`, *optional*):
            Channels k of the factors. By default half of the teacher's channels.
        teacher_layers (`list[str]`, *optional*):
            Dotted paths of the teacher's layers. By default its last feature map.
        student_layers (`list[str]`, *optional*):
            Dotted paths of the student's layers, as many as of the teacher's. By default its last feature map.
        paraphraser_epochs (`float`, *optional*, defaults to 30.0):
            Epochs of stage 1, when no paraphraser is given.
        paraphraser_learning_rate (`float`, *optional*, defaults to 0.1):
            Peak learning rate of stage 1 (SGD, Nesterov momentum 0.9, weight decay 5e-4, cosine schedule).
        paraphraser_decoder (`str`, *optional*, defaults to `"conv"`):
            `"conv"` or `"transposed"`, see [`Paraphraser`].
        reconstruction_distance (`str`, *optional*, defaults to `"l1"`):
            Distance of [`reconstruction_loss`] in stage 1.
        lambda_kd (`float`, *optional*, defaults to 0.0):
            Weight of the logit term of Hinton et al. Above 0 both models need the same labels.
        temperature (`float`, *optional*, defaults to 4.0):
            Temperature of the logit term.

    Raises:
        `ValueError`: a value outside its range, or an unknown name.

    Example:

    ```python
    >>> from iekd_hf import IEKDTrainingArguments
    >>> args = IEKDTrainingArguments(output_dir="out", lambda_schedule="cosine", lambda_warmup_ratio=0.1)
    >>> [round(args.lambda_scale(progress), 3) for progress in (0.0, 0.05, 0.1, 0.55, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]

    ```
    """

    lambda_inh: float = field(default=1000.0, metadata={"help": "Weight of the inheritance loss; 0 turns it off."})
    lambda_exp: float = field(default=100.0, metadata={"help": "Weight of the exploration loss; 0 turns it off."})
    lambda_schedule: str = _choice("constant", LAMBDA_SCHEDULES, "How the weights move after their warm-up.")
    lambda_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps over which the weights rise linearly from 0, in [0, 1)."}
    )
    inheritance_distance: str = _choice("l1", INHERITANCE_DISTANCES, "Distance of the inheritance loss.")
    exploration_distance: str = _choice("l1", EXPLORATION_DISTANCES, "Distance of the exploration loss.")
    loss_reduction: str = _choice("mean", REDUCTIONS, "Mean over a factor's elements, or their sum.")
    inheritance_ratio: float = field(
        default=0.5, metadata={"help": "Share of the student's channels that inherit, in [0, 1]."}
    )
    split_mode: str = _choice("random", SPLIT_MODES, "How the channels are split.")
    split_seed: int = field(default=0, metadata={"help": "Seed of the random split."})
    factor_channels: int | None = field(
        default=None, metadata={"help": "Channels k of the factors. Default: half of the teacher's."}
    )
    teacher_layers: list[str] | None = field(
        default=None, metadata={"help": "Dotted paths of the teacher's layers. Default: its last feature map."}
    )
    student_layers: list[str] | None = field(
        default=None, metadata={"help": "Dotted paths of the student's layers. Default: its last feature map."}
    )
    paraphraser_epochs: float = field(
        default=30.0, metadata={"help": "Epochs of stage 1, when no paraphraser is given."}
    )
    paraphraser_learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate of stage 1."})
    paraphraser_decoder: str = _choice("conv", DECODERS, "Convolutions of the paraphraser's decoder.")
    reconstruction_distance: str = _choice("l1", RECONSTRUCTION_DISTANCES, "Reconstruction loss of stage 1.")
    lambda_kd: float = field(
        default=0.0, metadata={"help": "Weight of the logit term (Hinton et al.); needs equal labels. 0 turns it off."}
    )
    temperature: float = field(default=4.0, metadata={"help": "Temperature of the logit term."})

    def __post_init__(self):
        super().__post_init__()
        for name, known in (
            ("lambda_schedule", LAMBDA_SCHEDULES),
            ("inheritance_distance", INHERITANCE_DISTANCES),
            ("exploration_distance", EXPLORATION_DISTANCES),
            ("loss_reduction", REDUCTIONS),
            ("split_mode", SPLIT_MODES),
            ("paraphraser_decoder", DECODERS),
            ("reconstruction_distance", RECONSTRUCTION_DISTANCES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"Expected {name} to be one of {', '.join(known)}; got {getattr(self, name)!r}.")
        for name in ("lambda_inh", "lambda_exp", "lambda_kd"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(
                    f"Expected {name} to be a finite weight of at least 0, got {getattr(self, name)}; the exploration "
                    "loss has its sign already."
                )
        if not 0 <= self.inheritance_ratio <= 1:
            raise ValueError(f"Expected inheritance_ratio within [0, 1], got {self.inheritance_ratio}.")
        if not 0 <= self.lambda_warmup_ratio < 1:
            raise ValueError(f"Expected lambda_warmup_ratio within [0, 1), got {self.lambda_warmup_ratio}.")
        for name in ("temperature", "paraphraser_epochs", "paraphraser_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Expected {name} above 0, got {getattr(self, name)}.")
        if self.factor_channels is not None and self.factor_channels < 1:
            raise ValueError(f"Expected factor_channels of at least 1, or None, got {self.factor_channels}.")
        _check_layer_pairs(self.teacher_layers, self.student_layers)

    def __getstate__(self) -> dict:
        # Trainer pickles its arguments into training_args.bin and pushes that: no token and no path of this machine
        # in it.
        state = {
            k: os.path.basename(v) if isinstance(v, str) and os.path.isabs(v) else v for k, v in vars(self).items()
        }
        return {**state, "hub_token": None}

    def __copy__(self) -> "IEKDTrainingArguments":
        # A copy, unlike a pickle, stays in this process and keeps both.
        new = object.__new__(type(self))
        vars(new).update(vars(self))
        return new

    def lambda_scale(self, progress: float) -> float:
        """
        Return the factor in [0, 1] on the λs.

        Args:
            progress (`float`):
                Share of the training steps done, in [0, 1].

        Returns:
            `float`: linear warm-up, then the schedule.
        """
        if progress < self.lambda_warmup_ratio:
            return progress / self.lambda_warmup_ratio
        if self.lambda_schedule == "constant":
            return 1.0
        remaining = 1 - (progress - self.lambda_warmup_ratio) / (1 - self.lambda_warmup_ratio)
        return remaining if self.lambda_schedule == "linear" else (1 - math.cos(math.pi * remaining)) / 2


def _check_layer_pairs(teacher_layers: list[str] | None, student_layers: list[str] | None) -> None:
    """Refuse layer lists that cannot be paired one to one; one side may stay automatic against a single layer."""
    num_teacher = 1 if teacher_layers is None else len(teacher_layers)
    num_student = 1 if student_layers is None else len(student_layers)
    if num_teacher != num_student or num_teacher == 0:
        raise ValueError(
            f"Expected as many teacher_layers as student_layers, got {num_teacher} and {num_student}: they are paired "
            "in order, and None stands for one layer, the last feature map."
        )
