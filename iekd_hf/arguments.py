"""`IEKDTrainingArguments` and `MutualTrainingArguments`: `TrainingArguments` and what each trainer adds."""

import copy
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.context import get_spawning_popen
from pathlib import Path

import torch
from transformers import TrainingArguments

from .argument_types import check_types
from .method.factors import DECODERS, SPLIT_MODES
from .method.knowledge import KNOWLEDGE
from .method.logits import KD_DISTANCES
from .method.losses import EXPLORATION_DISTANCES, INHERITANCE_DISTANCES, RECONSTRUCTION_DISTANCES, REDUCTIONS
from .method.objective import AUTO, LAMBDA_SCHEDULES, is_on, lambda_scale
from .method.presets import METHODS


# How both papers train the paraphraser.
PARAPHRASER_SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
TEACHER_DTYPES = ("float32", "bfloat16", "float16")
TEACHER_SHARDINGS = ("fsdp",)
MUTUAL_LOSSES = ("ie", "kl", "ie+kl")
# The share of the gradient by which each weight of `IEKDTrainer` is chosen, where it is "auto".
SHARE_OF = {"lambda_inh": "inheritance_share", "lambda_exp": "exploration_share", "lambda_kd": "kd_share"}
# Arguments that change nothing where no paraphraser is trained.
STAGE_1_ARGUMENTS = frozenset(
    {
        "paraphraser_decoder",
        "paraphraser_epochs",
        "paraphraser_learning_rate",
        "paraphraser_max_steps",
        "reconstruction_distance",
    }
)
# The inheritance_ratio at which the half of a weight has no channels.
_EMPTY_AT = {"lambda_inh": 0, "lambda_exp": 1}


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
            1.13 / sqrt(N) for factors of N elements (0.025 for 32 x 8 x 8), so useful weights are large: thousands for
            a student from scratch, hundreds for a pretrained one. They are lower for peers, who teach from their first
            step, when there is little to inherit yet. 0 removes the half's encoder.
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
        encoder_kernel_size (`int`, *optional*, defaults to 3):
            Height and width of the convolutions in encoders and paraphraser, an odd number. 3 is the papers'; with 1
            they have a ninth of the weights.
        paraphraser_learning_rate (`float`, *optional*, defaults to 0.1):
            Peak learning rate of the paraphraser (SGD, Nesterov momentum 0.9, weight decay 5e-4).
        paraphraser_decoder (`str`, *optional*, defaults to `"conv"`):
            `"conv"`, `"transposed"` or `"linear"`, see [`Paraphraser`].
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
    lambda_schedule: str = choice("constant", LAMBDA_SCHEDULES, "How the weights change after their warm-up.")
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
        default=None, metadata={"help": "Channels k of the factors. Default: half of the teaching network's."}
    )
    encoder_kernel_size: int = field(
        default=3,
        metadata={"help": "Size of the convolutions in encoders and paraphraser; 1 has a ninth of the weights."},
    )
    paraphraser_learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate of the paraphraser."})
    paraphraser_decoder: str = choice("conv", DECODERS, "The paraphraser's decoder; `linear` suits signed maps.")
    reconstruction_distance: str = choice("l1", RECONSTRUCTION_DISTANCES, "Reconstruction loss of the paraphraser.")
    temperature: float = field(default=4.0, metadata={"help": "Temperature of the logit term."})
    channels_last: bool = field(
        default=False,
        metadata={"help": "Train in the channels-last memory format, which suits convolutions in bf16 or fp16."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are not finite out of the logs; syncs at each step."}
    )

    @property
    def memory_format(self) -> torch.memory_format:
        """Return how the weights of what trains are laid out."""
        return torch.channels_last if self.channels_last else torch.preserve_format

    def __post_init__(self):
        super().__post_init__()
        check_types(self)
        self.check_values()

    def check_values(self) -> None:
        """Refuse values outside their range; a search sets others than those that the arguments were made with."""
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
        self.check_positive("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        if self.learning_rate is not None and not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"Expected a finite learning_rate of at least 0, got {self.learning_rate}.")
        if self.save_strategy == "steps":
            self.check_positive("save_steps")
        if self.num_train_epochs < 0:
            raise ValueError(f"Expected num_train_epochs of at least 0, got {self.num_train_epochs}.")
        if not -(2**63) <= self.split_seed < 2**63:
            raise ValueError(f"Expected split_seed within 64 bits, got {self.split_seed}.")
        if self.factor_channels is not None and self.factor_channels < 1:
            raise ValueError(f"Expected factor_channels of at least 1, or None, got {self.factor_channels}.")
        if self.encoder_kernel_size < 1 or self.encoder_kernel_size % 2 == 0:
            raise ValueError(f"Expected an odd encoder_kernel_size, 1, 3, ..., got {self.encoder_kernel_size}.")

    def check_choice(self, name: str, known) -> None:
        """Refuse a name that is not known."""
        if getattr(self, name) not in known:
            raise ValueError(f"Expected {name} to be one of {', '.join(known)}; got {getattr(self, name)!r}.")

    def check_weights(self, *names: str) -> None:
        """Refuse weights that are negative or not finite."""
        for name in names:
            if getattr(self, name) != AUTO and not 0 <= getattr(self, name) < math.inf:
                sign = "; the exploration loss has its sign already" if name == "lambda_exp" else ""
                raise ValueError(
                    f"Expected {name} to be a finite weight of at least 0, got {getattr(self, name)}{sign}."
                )

    def check_positive(self, *names: str) -> None:
        """Refuse values that are not above 0."""
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Expected {name} above 0, got {getattr(self, name)}.")

    def __getstate__(self) -> dict:
        if get_spawning_popen() is not None:  # a process that this one starts takes them from it, through no file
            return vars(self)
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

    def __deepcopy__(self, memo: dict) -> "IETrainingArguments":
        new = memo[id(self)] = copy.copy(self)
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new

    def lambda_scale(self, progress: float) -> float:
        """Return the factor in [0, 1] on the λs when a share `progress` of the training steps is done."""
        return lambda_scale(progress, self.lambda_schedule, self.lambda_warmup_ratio)


def _without_folder(value):
    """Cut a path of this machine down to its last part."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _of_method(text: str, choices=None, **metadata):
    """Return a field whose default is the method's."""
    metadata |= {"help": f"{text} Default: the method's."}
    return field(default=None, metadata=metadata if choices is None else {**metadata, "choices": list(choices)})


def _weight(text: str):
    """Return a field for a number or "auto", whose default is the method's."""
    return _of_method(text, metavar="X|auto")


def _share(default: float, term: str):
    text = f'Gradient that a weight "auto" gives the {term}, as a multiple of the task loss\'s.'
    return field(default=default, metadata={"help": text})


def _as_weight(name: str, value):
    """Return a weight as a number or "auto"; the command line gives both as text."""
    if not isinstance(value, str) or value == AUTO:
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"Expected {name} as a number or {AUTO!r}, got {value!r}: set one of them.") from None


@dataclass
class IEKDTrainingArguments(IETrainingArguments):
    r"""
    Hold the arguments of [`IEKDTrainer`]: those of [`~transformers.TrainingArguments`] and of [`IETrainingArguments`],
    and those of a frozen teacher.

    The objective is \(L = L_{goal} + \lambda_{inh} L_{inh} + \lambda_{exp} L_{exp} + \lambda_{kd} L_{kd}\).

    Args:
        method (`str`, *optional*, defaults to `"ie-ft"`):
            What is distilled, as defaults of the arguments that follow it:

            - `"plain"`: nothing, `"kd"`: the logits (Hinton et al.);
            - `"ft"`: the whole map inherits the teacher's factors (factor transfer, Kim et al., NeurIPS 2018);
            - `"at"`: its attention map (Zagoruyko and Komodakis, ICLR 2017);
            - `"od"`: its responses before the activation (overhaul of feature distillation, Heo et al., ICCV 2019);
            - `"ie-ft"`, `"ie-at"`, `"ie-od"`: one half inherits that, the other explores;
            - `"inheritance"`, `"exploration"`: `"ie-ft"` with one half only.

            All but the first two also with the logit term, as `"ft+kd"`, `"ie-ft+kd"` and so on.
        knowledge (`str`, *optional*):
            What is compared: `"factors"`, `"attention"` or `"preactivation"`. Only factors need the paraphraser of
            stage 1; for `"preactivation"` it measures the margins of OD.
        lambda_inh (`float` or `"auto"`, *optional*), lambda_exp (`float` or `"auto"`, *optional*):
            Weights of the inheritance and of the exploration loss. With factors and `loss_reduction="mean"` the losses
            are about 1.13 / sqrt(N) for N elements (0.025 for 32 x 8 x 8), so useful weights are large: thousands for
            a student from scratch, hundreds for a pretrained one. 0 removes the half's encoder.
        lambda_kd (`float` or `"auto"`, *optional*):
            Weight of the logit term. Above 0 both models need the same labels.
        kd_distance (`str`, *optional*, defaults to `"kl"`):
            The logit term: `"kl"` (Hinton et al., 2015), `"dkd"` ([`~method.logits.dkd_loss`], Zhao et al., CVPR
            2022), `"dist"` ([`~method.logits.dist_loss`], Huang et al., NeurIPS 2022) or `"standardized"`
            ([`~method.logits.standardized_kd_loss`], Sun et al., CVPR 2024). Images without a label have no part in
            `"dkd"`.
        inheritance_share (`float`, *optional*, defaults to 10.0):
            With `lambda_inh="auto"`, the gradient of the inheritance loss at the student's features, relative to that
            of the task's loss. The weight that gives it is measured before training, again after 100, 200, 400 and 800
            steps and every 500 from there on, once an epoch at least unless it has fewer than 100 steps; what counts
            is the running (geometric) mean. No weight gets above ten times the one that was found first: where an
            encoder comes to meet a loss by itself, the share falls. The defaults of shares are conventions: about what
            the weights of `"ie-ft"` and `"kd"` amount to before training on CIFAR-10.
        exploration_share (`float`, *optional*, defaults to 1.0):
            The same for `lambda_exp="auto"`.
        kd_share (`float`, *optional*, defaults to 2.0):
            The same for `lambda_kd="auto"`.
        inheritance_distance (`str`, *optional*), exploration_distance (`str`, *optional*):
            Distances of [`inheritance_loss`] and [`exploration_loss`].
        inheritance_ratio (`float`, *optional*):
            Share of the student's channels that inherit, in [0, 1]. A half without channels has a weight of 0.
        teacher_layers (`list[str]`, *optional*):
            Dotted paths of the teacher's layers; an index picks one of a backbone's maps, as in
            `"model.backbone.model[-1]"`. By default its last feature map, or the levels of a detector's pyramid; of
            these the last ones, where the student has fewer.
        student_layers (`list[str]`, *optional*):
            Dotted paths of the student's layers, as many as of the teacher's. By default as the teacher's.
        paraphraser_epochs (`float`, *optional*, defaults to 30.0):
            Epochs of stage 1, when no paraphraser is given; its learning rate falls along a cosine.
        paraphraser_max_steps (`int`, *optional*):
            Steps of stage 1, in place of its epochs. By default `max_steps` for a stream, whose length is not known.
        layer_decay (`float`, *optional*):
            Factor, in (0, 1], on the learning rate from a block of the student to the one before it, for a student
            that is pretrained. Its head and the encoders have the whole rate. By default all have.
        fast_teacher (`bool`, *optional*, defaults to `True`):
            Whether to run a copy of the teacher with BatchNorm folded into its convolutions and, if it is
            convolutional, in the channels-last format; its maps are the same up to rounding. The given one is not
            changed, but both are in memory.
        teacher_dtype (`str`, *optional*):
            Type to cast that copy to: `"float32"`, `"bfloat16"` or `"float16"`. By default the teacher's own.
        compile_teacher (`bool`, *optional*, defaults to `False`):
            Whether to compile that copy.
        teacher_sharding (`str`, *optional*):
            `"fsdp"` shares the weights of a copy of the teacher out over all processes (FSDP2), which gather each
            block's while it runs; what trains stays under DDP. For a teacher that does not fit on one device: load it
            on the CPU. That copy has no folded BatchNorm. By default each process has the whole teacher.
        cache_teacher (`bool`, *optional*, defaults to `False`):
            Whether to run the teacher once over some views of each image, before stage 2, and to keep its factors (and
            logits, if `lambda_kd` is on) on disk, in float16. Training then sees these views only, a new one each
            epoch and all over again after the last. It needs [`DecodedImages`], whose views can be made again.
        cache_views (`int`, *optional*, defaults to 8):
            How many views. It pays when there are more epochs than views; the fewer, the less augmentation.
        teacher_cache_dir (`str`, *optional*):
            Where caches are, for several runs to share; one is made again where teacher, paraphraser, layers, images,
            augmentation or processor differ. By default `_teacher_cache` in `output_dir`.

    Raises:
        `ValueError`: a value outside its range, or an unknown name.

    Example:

    ```python
    >>> from iekd_hf import IEKDTrainingArguments
    >>> args = IEKDTrainingArguments(output_dir="out", lambda_schedule="cosine", lambda_warmup_ratio=0.1)
    >>> [round(args.lambda_scale(progress), 3) for progress in (0.0, 0.05, 0.1, 0.55, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    >>> args = IEKDTrainingArguments(output_dir="out", method="ft", lambda_inh=300)
    >>> args.lambda_inh, args.lambda_exp, args.inheritance_ratio
    (300.0, 0.0, 1.0)

    ```
    """

    method: str = choice("ie-ft", METHODS, "What is distilled: defaults of knowledge, weights, distances and ratio.")
    knowledge: str | None = _of_method("What is compared of a feature map.", KNOWLEDGE)
    lambda_inh: float | str | None = _weight("Weight of the inheritance loss; 0 turns it off.")
    lambda_exp: float | str | None = _weight("Weight of the exploration loss; 0 turns it off.")
    lambda_kd: float | str | None = _weight("Weight of the logit term; needs the same labels in both models.")
    kd_distance: str = choice(
        "kl", KD_DISTANCES, "Distance of the logit term: Hinton's, DKD's, DIST's, or of z-scores."
    )
    inheritance_share: float = _share(10.0, "inheritance loss")
    exploration_share: float = _share(1.0, "exploration loss")
    kd_share: float = _share(2.0, "logit term")
    inheritance_distance: str | None = _of_method("Distance of the inheritance loss.", INHERITANCE_DISTANCES)
    exploration_distance: str | None = _of_method("Distance of the exploration loss.", EXPLORATION_DISTANCES)
    inheritance_ratio: float | None = _of_method("Share of the student's channels that inherit, in [0, 1].")
    teacher_layers: list[str] | None = field(
        default=None,
        metadata={"help": "Dotted paths of the teacher's layers. Default: its last map, or a detector's levels."},
    )
    student_layers: list[str] | None = field(
        default=None,
        metadata={"help": "Dotted paths of the student's layers. Default: its last map, or a detector's levels."},
    )
    paraphraser_epochs: float = field(
        default=30.0, metadata={"help": "Epochs of stage 1, when no paraphraser is given."}
    )
    paraphraser_max_steps: int | None = field(
        default=None,
        metadata={"help": "Steps of stage 1, instead of its epochs. Default: max_steps for data without a length."},
    )
    layer_decay: float | None = field(
        default=None,
        metadata={
            "help": "Factor on the learning rate from each block of a pretrained student to the block before it. "
            "Default: none."
        },
    )
    fast_teacher: bool = field(
        default=True, metadata={"help": "Run a faster copy of the teacher, with the same maps up to rounding."}
    )
    teacher_dtype: str | None = field(
        default=None,
        metadata={"help": "Dtype of that copy. Default: the teacher's own.", "choices": TEACHER_DTYPES},
    )
    compile_teacher: bool = field(default=False, metadata={"help": "Compile that copy."})
    teacher_sharding: str | None = field(
        default=None,
        metadata={
            "help": "Shard the teacher over all processes (FSDP2). Default: each has the whole teacher.",
            "choices": TEACHER_SHARDINGS,
        },
    )
    cache_teacher: bool = field(
        default=False, metadata={"help": "Run the teacher once over a few views of each image; cache its factors."}
    )
    cache_views: int = field(
        default=8, metadata={"help": "How many views of each image to cache; epochs take turns among them."}
    )
    teacher_cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the caches. Default: _teacher_cache in output_dir."}
    )

    def __post_init__(self):
        for name in SHARE_OF:
            setattr(self, name, _as_weight(name, getattr(self, name)))
        check_types(self)
        self.check_choice("method", METHODS)
        given = [name for name in _EMPTY_AT if getattr(self, name) is not None]
        for name, value in METHODS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        self._turn_off_empty_halves(given)

    def check_values(self) -> None:
        """Refuse values outside their range, and some that do not go together."""
        super().check_values()
        self.check_choice("knowledge", KNOWLEDGE)
        self.check_choice("kd_distance", KD_DISTANCES)
        self.check_weights("lambda_kd")
        self.check_positive(*SHARE_OF.values())
        if self.knowledge == "preactivation" and self.inheritance_distance == "cosine":
            raise ValueError(
                "Expected inheritance_distance l1, l2 or partial_l2 with knowledge='preactivation', got 'cosine': "
                "responses are compared as they are, not by their direction."
            )
        self.check_positive("paraphraser_epochs", "cache_views")
        if self.paraphraser_max_steps is not None:
            self.check_positive("paraphraser_max_steps")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"Expected layer_decay within (0, 1], got {self.layer_decay}.")
        if self.teacher_dtype is not None:
            self.check_choice("teacher_dtype", TEACHER_DTYPES)
        if not self.fast_teacher and (self.teacher_dtype is not None or self.compile_teacher):
            raise ValueError(
                "Expected fast_teacher=True with teacher_dtype or compile_teacher, got False: they change the copy of "
                "the teacher that it makes. Load the teacher in another dtype yourself, or leave fast_teacher on."
            )
        if self.teacher_sharding is not None:
            self.check_choice("teacher_sharding", TEACHER_SHARDINGS)
            if self.compile_teacher:
                raise ValueError(
                    "Expected compile_teacher=False with teacher_sharding, got True: the blocks of a sharded teacher "
                    "gather their weights outside of what could be compiled. Leave one of them out."
                )
        _check_layer_pairs(self.teacher_layers, self.student_layers)

    def _turn_off_empty_halves(self, given: list[str]) -> None:
        """Set a preset's weight of a half without channels to 0; refuse one that was given."""
        for name, empty in _EMPTY_AT.items():
            if self.inheritance_ratio != empty or not is_on(getattr(self, name)):
                continue
            if name in given:
                raise ValueError(
                    f"Expected {name}=0 with inheritance_ratio={empty}, got {getattr(self, name)!r}: there is no "
                    f"channel for it. Set {name}=0, or an inheritance_ratio between 0 and 1, as method='ie-ft' does."
                )
            setattr(self, name, 0.0)


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

    mutual_loss: str = choice(
        "ie", MUTUAL_LOSSES, "What a peer learns from the others: factors (IE-DML), logits (DML), or both."
    )
    lambda_kl: float = field(default=1.0, metadata={"help": "Weight of the logit term of kl and ie+kl."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the logit term."})
    peer_layers: list[str] | None = field(
        default=None, metadata={"help": "Dotted path of a layer for each peer. Default: the last feature maps."}
    )

    def __post_init__(self):
        if automatic := [name for name in ("lambda_inh", "lambda_exp", "lambda_kl") if getattr(self, name) == AUTO]:
            raise ValueError(
                f"Expected {automatic[0]} as a number for peers, got {AUTO!r}: each peer would need a weight of its "
                "own. Set a number; only IEKDTrainer finds weights by itself."
            )
        super().__post_init__()
        self.check_choice("mutual_loss", MUTUAL_LOSSES)
        self.check_weights("lambda_kl")
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"Expected gradient_accumulation_steps=1, got {self.gradient_accumulation_steps}: a step updates the "
                "peers one after another, each from the others as they are by then, which micro-batches taken one by "
                "one cannot do. Use more processes, or a smaller batch with a smaller learning_rate."
            )
        if self.gradient_checkpointing:
            raise ValueError(
                "Expected gradient_checkpointing=False for peers, got True: each would run forward once more in the "
                "backward pass, and move BatchNorm's statistics twice a step. Use bf16 or a smaller batch."
            )


def _check_layer_pairs(teacher_layers: list[str] | None, student_layers: list[str] | None) -> None:
    """Refuse layer lists that cannot be paired one to one; how many a side has that is not named, its model says."""
    counts = [len(layers) for layers in (teacher_layers, student_layers) if layers is not None]
    if 0 in counts or len(set(counts)) > 1:
        raise ValueError(
            f"Expected as many teacher_layers as student_layers, one or more, got {' and '.join(map(str, counts))}: "
            "they are paired in order, and None stands for the last map, or the levels of a detector's pyramid."
        )
