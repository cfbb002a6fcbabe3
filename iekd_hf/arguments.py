"""The arguments of both trainers: `TrainingArguments` and what the method adds."""

import math
import os
from dataclasses import dataclass, field

from transformers import TrainingArguments

from .factors import DECODERS, SPLIT_MODES
from .losses import EXPLORATION_DISTANCES, INHERITANCE_DISTANCES, RECONSTRUCTION_DISTANCES, REDUCTIONS


LAMBDA_SCHEDULES = ("constant", "linear", "cosine")
MUTUAL_LOSSES = ("ie", "kl", "ie+kl")

# How both papers train the paraphraser.
PARAPHRASER_SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def _choice(default: str, known, text: str):
    return field(default=default, metadata={"help": text, "choices": list(known)})


@dataclass
class IETrainingArguments(TrainingArguments):
    r"""
    Hold what the arguments of both trainers share: the losses between factors, the split, the paraphraser.

    Args:
        lambda_inh (`float`, *optional*, defaults to 1000.0):
            Weight of the inheritance loss. With `loss_reduction="mean"` the loss is about 1.13 / sqrt(N) for factors
            of N elements (0.025 for 32 x 8 x 8), so useful weights are in the hundreds. 0 removes the half's encoder.
        lambda_exp (`float`, *optional*, defaults to 100.0):
            Weight of the exploration loss. 0 removes the half's encoder.
        lambda_schedule (`str`, *optional*, defaults to `"constant"`):
            How the weights of all losses beside the task's move after the warm-up: `"constant"`, or down to 0 at the
            end of training along a line (`"linear"`) or half a cosine (`"cosine"`).
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
        paraphraser_learning_rate (`float`, *optional*, defaults to 0.1):
            Peak learning rate of the paraphraser (SGD, Nesterov momentum 0.9, weight decay 5e-4).
        paraphraser_decoder (`str`, *optional*, defaults to `"conv"`):
            `"conv"` or `"transposed"`, see [`Paraphraser`].
        reconstruction_distance (`str`, *optional*, defaults to `"l1"`):
            Distance of [`reconstruction_loss`].
        temperature (`float`, *optional*, defaults to 4.0):
            Temperature of the logit term.

    Raises:
        `ValueError`: a value outside its range, or an unknown name.
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
    paraphraser_learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate of the paraphraser."})
    paraphraser_decoder: str = _choice("conv", DECODERS, "Convolutions of the paraphraser's decoder.")
    reconstruction_distance: str = _choice("l1", RECONSTRUCTION_DISTANCES, "Reconstruction loss of the paraphraser.")
    temperature: float = field(default=4.0, metadata={"help": "Temperature of the logit term."})

    def __post_init__(self):
        super().__post_init__()
        self._check_choice("lambda_schedule", LAMBDA_SCHEDULES)
        self._check_choice("inheritance_distance", INHERITANCE_DISTANCES)
        self._check_choice("exploration_distance", EXPLORATION_DISTANCES)
        self._check_choice("loss_reduction", REDUCTIONS)
        self._check_choice("split_mode", SPLIT_MODES)
        self._check_choice("paraphraser_decoder", DECODERS)
        self._check_choice("reconstruction_distance", RECONSTRUCTION_DISTANCES)
        self._check_weights("lambda_inh", "lambda_exp")
        if not 0 <= self.inheritance_ratio <= 1:
            raise ValueError(f"Expected inheritance_ratio within [0, 1], got {self.inheritance_ratio}.")
        if not 0 <= self.lambda_warmup_ratio < 1:
            raise ValueError(f"Expected lambda_warmup_ratio within [0, 1), got {self.lambda_warmup_ratio}.")
        self._check_positive("temperature", "paraphraser_learning_rate")
        if self.factor_channels is not None and self.factor_channels < 1:
            raise ValueError(f"Expected factor_channels of at least 1, or None, got {self.factor_channels}.")

    def _check_choice(self, name: str, known) -> None:
        if getattr(self, name) not in known:
            raise ValueError(f"Expected {name} to be one of {', '.join(known)}; got {getattr(self, name)!r}.")

    def _check_weights(self, *names: str) -> None:
        for name in names:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(
                    f"Expected {name} to be a finite weight of at least 0, got {getattr(self, name)}; the exploration "
                    "loss has its sign already."
                )

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"Expected {name} above 0, got {getattr(self, name)}.")

    def __getstate__(self) -> dict:
        # Trainer pickles its arguments into training_args.bin and pushes that: no token and no path of this machine
        # in it.
        state = {
            k: os.path.basename(v) if isinstance(v, str) and os.path.isabs(v) else v for k, v in vars(self).items()
        }
        return {**state, "hub_token": None}

    def __copy__(self) -> "IETrainingArguments":
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


@dataclass
class IEKDTrainingArguments(IETrainingArguments):
    r"""
    Hold the arguments of [`IEKDTrainer`]: those of [`~transformers.TrainingArguments`] and of [`IETrainingArguments`],
    and those of a frozen teacher.

    The objective is \(L = L_{goal} + \lambda_{inh} L_{inh} + \lambda_{exp} L_{exp} + \lambda_{kd} L_{kd}\).

    Args:
        teacher_layers (`list[str]`, *optional*):
            Dotted paths of the teacher's layers. By default its last feature map.
        student_layers (`list[str]`, *optional*):
            Dotted paths of the student's layers, as many as of the teacher's. By default its last feature map.
        paraphraser_epochs (`float`, *optional*, defaults to 30.0):
            Epochs of stage 1, when no paraphraser is given; its learning rate falls along a cosine.
        lambda_kd (`float`, *optional*, defaults to 0.0):
            Weight of the logit term of Hinton et al. Above 0 both models need the same labels.

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

    teacher_layers: list[str] | None = field(
        default=None, metadata={"help": "Dotted paths of the teacher's layers. Default: its last feature map."}
    )
    student_layers: list[str] | None = field(
        default=None, metadata={"help": "Dotted paths of the student's layers. Default: its last feature map."}
    )
    paraphraser_epochs: float = field(
        default=30.0, metadata={"help": "Epochs of stage 1, when no paraphraser is given."}
    )
    lambda_kd: float = field(
        default=0.0, metadata={"help": "Weight of the logit term (Hinton et al.); needs equal labels. 0 turns it off."}
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_weights("lambda_kd")
        self._check_positive("paraphraser_epochs")
        _check_layer_pairs(self.teacher_layers, self.student_layers)


@dataclass
class MutualTrainingArguments(IETrainingArguments):
    r"""
    Hold the arguments of [`MutualTrainer`]: those of [`~transformers.TrainingArguments`] and of
    [`IETrainingArguments`], and those of peers.

    Each peer's objective is \(L = L_{goal} + \lambda_{inh} L_{inh} + \lambda_{exp} L_{exp} + \lambda_{kl} L_{kl}\), of
    which the last three are means over the other peers.

    Args:
        mutual_loss (`str`, *optional*, defaults to `"ie"`):
            What a peer learns from the others: `"ie"` inherits and explores (IE-DML), `"kl"` compares the logits (DML,
            the baseline), `"ie+kl"` does both.
        lambda_inh (`float`, *optional*, defaults to 100.0), lambda_exp (`float`, *optional*, defaults to 10.0):
            As above, but lower: peers teach from their first step, when there is little to inherit yet.
        lambda_kl (`float`, *optional*, defaults to 1.0):
            Weight of the logit term of `"kl"` and `"ie+kl"`, which need the same labels.
        temperature (`float`, *optional*, defaults to 1.0):
            Temperature of the logit term; 1 as DML's authors have it.
        peer_layers (`list[str]`, *optional*):
            Dotted path of a layer for each peer. By default the last feature maps.

    Raises:
        `ValueError`: a value outside its range, or an unknown name.

    Example:

    ```python
    >>> from iekd_hf import MutualTrainingArguments
    >>> args = MutualTrainingArguments(output_dir="out", mutual_loss="kl")
    >>> args.lambda_kl, args.temperature
    (1.0, 1.0)

    ```
    """

    mutual_loss: str = _choice(
        "ie", MUTUAL_LOSSES, "What a peer learns from the others: factors (IE-DML), logits (DML), or both."
    )
    lambda_inh: float = field(default=100.0, metadata={"help": "Weight of the inheritance loss; 0 turns it off."})
    lambda_exp: float = field(default=10.0, metadata={"help": "Weight of the exploration loss; 0 turns it off."})
    lambda_kl: float = field(default=1.0, metadata={"help": "Weight of the logit term of kl and ie+kl."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the logit term."})
    peer_layers: list[str] | None = field(
        default=None, metadata={"help": "Dotted path of a layer for each peer. Default: the last feature maps."}
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_choice("mutual_loss", MUTUAL_LOSSES)
        self._check_weights("lambda_kl")
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"Expected gradient_accumulation_steps=1, got {self.gradient_accumulation_steps}: a step updates the "
                "peers one after another, each from the others as they are by then, which micro-batches taken one by "
                "one cannot do. Use more processes, or a smaller batch with a smaller learning_rate."
            )
        if self.gradient_checkpointing:
            raise ValueError(
                "Expected no activation checkpointing, got it: it runs every peer forward once more in the backward "
                "pass, which would move BatchNorm's statistics twice a step. Use bf16 or a smaller batch."
            )


def _check_layer_pairs(teacher_layers: list[str] | None, student_layers: list[str] | None) -> None:
    """Refuse layer lists that cannot be paired one to one; one side may stay automatic against a single layer."""
    num_teacher = 1 if teacher_layers is None else len(teacher_layers)
    num_student = 1 if student_layers is None else len(student_layers)
    if num_teacher != num_student or num_teacher == 0:
        raise ValueError(
            f"Expected as many teacher_layers as student_layers, got {num_teacher} and {num_student}: they are paired "
            "in order, and None stands for one layer, the last feature map."
        )
