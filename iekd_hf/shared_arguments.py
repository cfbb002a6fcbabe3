"""What the arguments of both trainers share: the losses between factors, the split, the paraphraser, speed."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TrainingArguments

from .factors import DECODERS, SPLIT_MODES
from .losses import EXPLORATION_DISTANCES, INHERITANCE_DISTANCES, RECONSTRUCTION_DISTANCES, REDUCTIONS


LAMBDA_SCHEDULES = ("constant", "linear", "cosine")

# How both papers train the paraphraser.
PARAPHRASER_SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}


def choice(default: str, known: Iterable[str], text: str):
    """Return a field that takes one of some names."""
    return field(default=default, metadata={"help": text, "choices": list(known)})


@dataclass
class IETrainingArguments(TrainingArguments):
    r"""
    Hold what the arguments of both trainers share: the losses between factors, the split, the paraphraser.

    Args:
        lambda_inh (`float`, *optional*, defaults to 30.0), lambda_exp (`float`, *optional*, defaults to 3.0):
            Weights of the inheritance and of the exploration loss. With `loss_reduction="mean"` the losses are about
            1.13 / sqrt(N) for factors of N elements (0.025 for 32 x 8 x 8), so useful weights are in the hundreds;
            they are lower for peers, who teach from their first step, when there is little to inherit yet. 0 removes
            the half's encoder.
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
        channels_last (`bool`, *optional*, defaults to `False`):
            Whether what trains is laid out channels last, which convolutions in bf16 or fp16 run faster in.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`):
            As in [`~transformers.TrainingArguments`], where it is on: it waits for the device at every step, and a
            loss that is not finite is found here without it.

    Raises:
        `ValueError`: a value outside its range, or an unknown name.
    """

    lambda_inh: float = field(default=30.0, metadata={"help": "Weight of the inheritance loss; 0 turns it off."})
    lambda_exp: float = field(default=3.0, metadata={"help": "Weight of the exploration loss; 0 turns it off."})
    lambda_schedule: str = choice("constant", LAMBDA_SCHEDULES, "How the weights move after their warm-up.")
    lambda_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps over which the weights rise linearly from 0, in [0, 1)."}
    )
    inheritance_distance: str = choice("l1", INHERITANCE_DISTANCES, "Distance of the inheritance loss.")
    exploration_distance: str = choice("l1", EXPLORATION_DISTANCES, "Distance of the exploration loss.")
    loss_reduction: str = choice("mean", REDUCTIONS, "Mean over a factor's elements, or their sum.")
    inheritance_ratio: float = field(
        default=0.5, metadata={"help": "Share of the student's channels that inherit, in [0, 1]."}
    )
    split_mode: str = choice("random", SPLIT_MODES, "How the channels are split.")
    split_seed: int = field(default=0, metadata={"help": "Seed of the random split."})
    factor_channels: int | None = field(
        default=None, metadata={"help": "Channels k of the factors. Default: half of the teacher's."}
    )
    paraphraser_learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate of the paraphraser."})
    paraphraser_decoder: str = choice("conv", DECODERS, "Convolutions of the paraphraser's decoder.")
    reconstruction_distance: str = choice("l1", RECONSTRUCTION_DISTANCES, "Reconstruction loss of the paraphraser.")
    temperature: float = field(default=4.0, metadata={"help": "Temperature of the logit term."})
    channels_last: bool = field(
        default=False,
        metadata={"help": "Lay what trains out channels last; suits convolutions in bf16 or fp16."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are not finite out of the logs; waits for the device."}
    )

    @property
    def memory_format(self) -> torch.memory_format:
        """Return how the weights of what trains are laid out."""
        return torch.channels_last if self.channels_last else torch.preserve_format

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("lambda_schedule", LAMBDA_SCHEDULES)
        self.check_choice("inheritance_distance", INHERITANCE_DISTANCES)
        self.check_choice("exploration_distance", EXPLORATION_DISTANCES)
        self.check_choice("loss_reduction", REDUCTIONS)
        self.check_choice("split_mode", SPLIT_MODES)
        self.check_choice("paraphraser_decoder", DECODERS)
        self.check_choice("reconstruction_distance", RECONSTRUCTION_DISTANCES)
        self.check_weights("lambda_inh", "lambda_exp")
        if not 0 <= self.inheritance_ratio <= 1:
            raise ValueError(f"Expected inheritance_ratio within [0, 1], got {self.inheritance_ratio}.")
        if not 0 <= self.lambda_warmup_ratio < 1:
            raise ValueError(f"Expected lambda_warmup_ratio within [0, 1), got {self.lambda_warmup_ratio}.")
        self.check_positive("temperature", "paraphraser_learning_rate")
        if self.factor_channels is not None and self.factor_channels < 1:
            raise ValueError(f"Expected factor_channels of at least 1, or None, got {self.factor_channels}.")

    def check_choice(self, name: str, known) -> None:
        """Refuse a name that is not known."""
        if getattr(self, name) not in known:
            raise ValueError(f"Expected {name} to be one of {', '.join(known)}; got {getattr(self, name)!r}.")

    def check_weights(self, *names: str) -> None:
        """Refuse weights that are negative or not finite."""
        for name in names:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(
                    f"Expected {name} to be a finite weight of at least 0, got {getattr(self, name)}; the exploration "
                    "loss has its sign already."
                )

    def check_positive(self, *names: str) -> None:
        """Refuse values that are not above 0."""
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"Expected {name} above 0, got {getattr(self, name)}.")

    def __getstate__(self) -> dict:
        # Trainer pickles its arguments into training_args.bin and pushes that: no token and no path of this machine
        # in it.
        return {**{name: _without_folder(value) for name, value in vars(self).items()}, "hub_token": None}

    def to_dict(self) -> dict:
        """Return the values that trackers are told, and that a tracker's file in `output_dir` takes to the Hub."""
        return {name: _without_folder(value) for name, value in super().to_dict().items()}

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


def _without_folder(value):
    """Cut a path of this machine down to its last part."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
