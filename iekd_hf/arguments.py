"""`IEKDTrainingArguments` and `MutualTrainingArguments`: `TrainingArguments` and what each trainer adds."""

from dataclasses import dataclass, field

from .knowledge import KNOWLEDGE
from .losses import EXPLORATION_DISTANCES, INHERITANCE_DISTANCES
from .methods import METHODS
from .shared_arguments import IETrainingArguments, choice


TEACHER_DTYPES = ("float32", "bfloat16", "float16")
MUTUAL_LOSSES = ("ie", "kl", "ie+kl")


def _of_method(text: str, choices=None):
    """Return a field whose default is the method's."""
    metadata = {"help": f"{text} Default: the method's."}
    return field(default=None, metadata=metadata if choices is None else {**metadata, "choices": list(choices)})


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
        lambda_inh (`float`, *optional*), lambda_exp (`float`, *optional*):
            Weights of the inheritance and of the exploration loss. With factors and `loss_reduction="mean"` the losses
            are about 1.13 / sqrt(N) for N elements (0.025 for 32 x 8 x 8), so useful weights are in the hundreds. 0
            removes the half's encoder.
        lambda_kd (`float`, *optional*):
            Weight of the logit term of Hinton et al. Above 0 both models need the same labels.
        inheritance_distance (`str`, *optional*), exploration_distance (`str`, *optional*):
            Distances of [`inheritance_loss`] and [`exploration_loss`].
        inheritance_ratio (`float`, *optional*):
            Share of the student's channels that inherit, in [0, 1].
        teacher_layers (`list[str]`, *optional*):
            Dotted paths of the teacher's layers; an index picks one of a backbone's maps, as in
            `"model.backbone.model[-1]"`. By default its last feature map, or the levels of a detector's pyramid; of
            these the last ones, where the student has fewer.
        student_layers (`list[str]`, *optional*):
            Dotted paths of the student's layers, as many as of the teacher's. By default as the teacher's.
        paraphraser_epochs (`float`, *optional*, defaults to 30.0):
            Epochs of stage 1, when no paraphraser is given; its learning rate falls along a cosine.
        fast_teacher (`bool`, *optional*, defaults to `True`):
            Whether to run a copy of the teacher with BatchNorm folded into its convolutions and, if it is
            convolutional, in the channels-last format; its maps are the same to rounding. The given one is not
            changed, but both are in memory.
        teacher_dtype (`str`, *optional*):
            Type to cast that copy to: `"float32"`, `"bfloat16"` or `"float16"`. By default the teacher's own.
        compile_teacher (`bool`, *optional*, defaults to `False`):
            Whether to compile that copy.
        cache_teacher (`bool`, *optional*, defaults to `False`):
            Whether to run the teacher once over some views of each image, before stage 2, and to keep its factors (and
            logits, if `lambda_kd` is on) on disk, in float16. Training then sees these views only, a new one each
            epoch and all over again after the last. It needs [`DecodedImages`], whose views can be made again.
        cache_views (`int`, *optional*, defaults to 8):
            How many views. It pays when there are more epochs than views; the fewer, the less augmentation.
        teacher_cache_dir (`str`, *optional*):
            Where caches are, for several runs to share; one is made anew where teacher, paraphraser, layers, images,
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
    (300, 0.0, 1.0)

    ```
    """

    method: str = choice("ie-ft", METHODS, "What is distilled: defaults of knowledge, weights, distances and ratio.")
    knowledge: str | None = _of_method("What of a feature map is compared.", KNOWLEDGE)
    lambda_inh: float | None = _of_method("Weight of the inheritance loss; 0 turns it off.")
    lambda_exp: float | None = _of_method("Weight of the exploration loss; 0 turns it off.")
    lambda_kd: float | None = _of_method("Weight of the logit term (Hinton et al.); needs equal labels.")
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
    fast_teacher: bool = field(
        default=True, metadata={"help": "Run a faster copy of the teacher, with the same maps to rounding."}
    )
    teacher_dtype: str | None = field(
        default=None, metadata={"help": "Type of that copy. Default: the teacher's own.", "choices": TEACHER_DTYPES}
    )
    compile_teacher: bool = field(default=False, metadata={"help": "Compile that copy."})
    cache_teacher: bool = field(
        default=False, metadata={"help": "Run the teacher once over some views of each image, and keep its factors."}
    )
    cache_views: int = field(
        default=8, metadata={"help": "How many views of each image to cache; epochs take turns with them."}
    )
    teacher_cache_dir: str | None = field(
        default=None, metadata={"help": "Where caches are. Default: _teacher_cache in output_dir."}
    )

    def __post_init__(self):
        self.check_choice("method", METHODS)
        for name, value in METHODS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        self.check_choice("knowledge", KNOWLEDGE)
        self.check_weights("lambda_kd")
        if self.knowledge == "preactivation" and self.inheritance_distance == "cosine":
            raise ValueError(
                "Expected inheritance_distance l1, l2 or partial_l2 with knowledge='preactivation', got 'cosine': "
                "responses are compared as they are, not by their direction."
            )
        self.check_positive("paraphraser_epochs", "cache_views")
        if self.teacher_dtype is not None:
            self.check_choice("teacher_dtype", TEACHER_DTYPES)
        if not self.fast_teacher and (self.teacher_dtype is not None or self.compile_teacher):
            raise ValueError(
                "Expected fast_teacher=True with teacher_dtype or compile_teacher, got False: they change the copy of "
                "the teacher that it makes. Load the teacher in another dtype yourself, or leave fast_teacher on."
            )
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
                "Expected no activation checkpointing, got it: it runs every peer forward once more in the backward "
                "pass, which would move BatchNorm's statistics twice a step. Use bf16 or a smaller batch."
            )


def _check_layer_pairs(teacher_layers: list[str] | None, student_layers: list[str] | None) -> None:
    """Refuse layer lists that cannot be paired one to one; how many a side has that is not named, its model says."""
    counts = [len(layers) for layers in (teacher_layers, student_layers) if layers is not None]
    if 0 in counts or len(set(counts)) > 1:
        raise ValueError(
            f"Expected as many teacher_layers as student_layers, got {' and '.join(map(str, counts))}: they are "
            "paired in order, and None stands for the last feature map, or the levels of a detector's pyramid."
        )
