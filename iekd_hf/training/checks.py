"""Checks before training: models that do not go together, arguments that do not fit them."""

import inspect
import re
import warnings
from collections.abc import Iterable

import torch
from accelerate.utils import is_compiled_module, parse_flag_from_env
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.backbone_utils import BackboneMixin
from transformers.utils import find_labels, logging

from ..features.layers import check_layers, pair_layers
from ..features.patches import patch_size_of
from ..features.tap import FeatureTap
from ..method.objective import is_on
from ..models.adapters import check_adapted, without_adapters
from ..models.kinds import main_input_of, why_no_logits
from ..models.signature import is_headless, takes_labels
from .data_checks import check_datasets
from .labels import collates_as_usual, count_labelled


logger = logging.get_logger(__name__)


def check_label_maps(first: PreTrainedModel, second: PreTrainedModel, who: str, term: str, remedy: str) -> None:
    """Refuse the logit term between models of different labels."""
    ours, theirs = label_map(first), label_map(second)
    if None not in (ours, theirs) and ours != theirs:
        sizes = [None if labels is None else len(labels) for labels in (ours, theirs)]
        difference = next(
            (i for i in sorted({*(ours or {}), *(theirs or {})}) if (ours or {}).get(i) != (theirs or {}).get(i)), None
        )
        raise ValueError(
            f"Expected equal label maps of {who} for {term}, got {sizes[0]} and {sizes[1]} labels, which differ first "
            f"at {difference} ({(ours or {}).get(difference)!r} and {(theirs or {}).get(difference)!r}): load both "
            f"with the same id2label, or set {remedy}; the feature losses do not need it."
        )


def check_can_be_student(model: nn.Module, name: str) -> None:
    """Refuse a module that could not be saved and loaded as a model, or that does not take whole images."""
    if is_compiled_module(model):
        raise ValueError(
            f"Expected {name} to be a PreTrainedModel, got what torch.compile makes of one: pass the model itself, "
            "with torch_compile=True in the arguments, or after its own compile()."
        )
    if not isinstance(without_adapters(model), PreTrainedModel):
        raise ValueError(
            f"Expected {name} to be a PreTrainedModel, which can be saved and loaded, got {type(model).__name__}: "
            "wrap a module of torchvision or your own in one, as the guide's page on models shows in a few lines; "
            "timm's come wrapped as TimmWrapperForImageClassification."
        )
    if patch_size_of(model) is not None:
        raise ValueError(
            f"Expected {name} to take whole images, got {type(model).__name__}, which takes patches of them: pass a "
            "model of one image size, such as SiglipForImageClassification, or take it as the teacher."
        )


def check_student(
    student: PreTrainedModel, teacher: nn.Module, args: TrainingArguments, kwargs: dict
) -> tuple[list[str], list[str]]:
    """Check the student against teacher, arguments and data; return the layers that are paired."""
    check_can_be_student(student, "model")
    if not isinstance(teacher, nn.Module):
        raise ValueError(
            f"Expected a teacher_model, got {type(teacher).__name__}: pass a model, a Hub id or a folder."
        )
    check_adapted(student)
    check_takes_labels(student, args, kwargs)
    check_checkpointing(student, args)
    check_noise(student, args)
    check_weights_are_there(teacher)
    shared = {id(parameter) for parameter in student.parameters()} & {id(p) for p in teacher.parameters()}
    if shared:
        raise ValueError(
            f"Expected a teacher with weights of its own, got one that shares {len(shared)} with the student: they "
            "would train. Pass copy.deepcopy(model) as teacher_model."
        )
    for model, named in ((teacher, args.teacher_layers), (student, args.student_layers)):
        check_layers(model, named or [])
    layers = pair_layers(student, teacher, args.student_layers, args.teacher_layers)
    if is_on(args.lambda_kd):
        for model, role in ((student, "student"), (teacher, "teacher")):
            bare = without_adapters(model)
            if is_headless(bare) or isinstance(bare, BackboneMixin):
                raise ValueError(
                    f"Expected a {role} with logits for lambda_kd > 0, got {type(bare).__name__}, which has no head: "
                    "set lambda_kd=0, or a method without '+kd'; the feature losses do not need it."
                )
        refuse_logit_term([student, teacher], "lambda_kd > 0", "Set lambda_kd=0, or a method without '+kd'")
        check_not_regression(student, "lambda_kd > 0", "set lambda_kd=0, or a method without '+kd'")
        check_label_maps(student, teacher, "student and teacher", "lambda_kd > 0", "lambda_kd=0")
    check_datasets(student, kwargs)
    return layers


def check_takes_labels(student: PreTrainedModel, args: TrainingArguments, kwargs: dict) -> None:
    """Refuse a student with a head whose forward takes no labels, where there are some."""
    bare = without_adapters(student)
    has_own_loss = kwargs.get("compute_loss_func") is not None or args.label_names
    is_usual = collates_as_usual(kwargs.get("data_collator"))
    if not takes_labels(bare) or find_labels(type(bare)) or has_own_loss or not is_usual:
        return
    if count_labelled(kwargs.get("train_dataset")):
        raise ValueError(
            f"Expected a student that takes the labels of train_dataset, got {type(bare).__name__}, whose forward "
            "takes none, so that nothing would train its head: load the same weights as a class that does "
            "(DeiTForImageClassification for DeiTForImageClassificationWithTeacher), pass compute_loss_func and "
            "label_names, or remove the labels."
        )


def check_own_loss(kind: type, ours: type, is_called: bool = True) -> None:
    """Refuse a subclass whose own `compute_loss` leaves the method out, or is not called in training at all."""
    for cls in kind.__mro__[: kind.__mro__.index(ours)]:
        code = getattr(vars(cls).get("compute_loss"), "__code__", None)
        # One that calls super() has the cell `__class__`; others may name the method of a class.
        calls_ours = code and ("__class__" in code.co_freevars or "compute_loss" in code.co_names)
        if code and not (calls_ours and is_called):
            raise ValueError(
                f"Expected {cls.__name__} to keep the losses of {ours.__name__}, got a compute_loss of its own, which "
                f"{'would leave them out' if is_called else 'no training calls'}: pass the task's loss as "
                "compute_loss_func(outputs, labels, num_items_in_batch)"
                + (", or call super().compute_loss(...)." if is_called else ".")
            )


def check_checkpointing(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Refuse activation checkpointing where a model has none, before stage 1."""
    if args.gradient_checkpointing and not without_adapters(model).supports_gradient_checkpointing:
        raise ValueError(
            f"Expected a student with activation checkpointing for gradient_checkpointing=True, got "
            f"{type(without_adapters(model)).__name__}, which has none: set gradient_checkpointing=False."
        )


def check_noise(student: PreTrainedModel, args: TrainingArguments) -> None:
    """Refuse NEFTune's noise where Trainer would find no embeddings to add it to, before stage 1."""
    if args.neftune_noise_alpha is None:
        return
    try:
        without_adapters(student).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        raise ValueError(
            f"Expected a student with input embeddings for neftune_noise_alpha, got {type(student).__name__}, which "
            "has none: leave neftune_noise_alpha out."
        ) from None


def check_weights_are_there(teacher: nn.Module) -> None:
    """Refuse a teacher whose weights are not in memory."""
    if any(parameter.is_meta for parameter in teacher.parameters()):
        raise ValueError(
            f"Expected a teacher with its weights in memory, got a {type(teacher).__name__} with some on the device "
            '"meta", as a device_map leaves what it offloads: load it whole on the CPU, with '
            'teacher_sharding="fsdp" if it does not fit on one device.'
        )


def tell_of_no_labels(student: PreTrainedModel, args: TrainingArguments) -> None:
    """Say that nothing but the teacher teaches, and warn of a head that nothing trains."""
    logger.info("No image has a label: the student learns from the teacher alone, and L_goal is 0.")
    if args.lambda_kd == 0 and takes_labels(without_adapters(student)):
        warnings.warn(
            f"No image has a label and lambda_kd=0, so nothing trains the head of {type(student).__name__}: its "
            "predictions will mean nothing. Pass the student without a head (AutoModel), or a method with '+kd'.",
            UserWarning,
            stacklevel=5,
        )


def refuse_logit_term(models: Iterable[nn.Module], term: str, remedy: str) -> None:
    """Refuse a term between the logits of models that have none."""
    for model in models:
        if found := why_no_logits(model):
            what, why = found
            raise ValueError(
                f"Expected no {term} with {what}, got it with {type(without_adapters(model)).__name__}: {why}. "
                f"{remedy}; the feature losses do not need it."
            )


def check_engine(trainer: Trainer) -> None:
    """Refuse the ways to run that would take a student and its encoders apart."""
    name = type(trainer).__name__
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"Expected one process per GPU, got {trainer.args.n_gpu} GPUs in one process, where DataParallel would "
            f"split every batch under {name}'s hooks: run `accelerate launch --num_processes {trainer.args.n_gpu} "
            "script.py`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if trainer.args.save_on_each_node and trainer.args.world_size > 1:
        raise ValueError(
            "Expected save_on_each_node=False with several processes, got True: checkpoints on machines without the "
            "main process would lack the weights. Use an output_dir that all machines see."
        )
    for engine, is_used in (("FSDP", trainer.is_fsdp_enabled), ("DeepSpeed", trainer.is_deepspeed_enabled)):
        # On a CPU, and in one process, Accelerate leaves out an engine that it was told to use, and does not say so.
        variable = f"ACCELERATE_USE_{engine.upper()}"
        if (is_asked_for := parse_flag_from_env(variable)) or is_used:
            asked = f" ({variable})" if is_asked_for else ""
            has_teacher = hasattr(trainer.args, "teacher_sharding")
            raise ValueError(
                f"Expected DDP or one process, got {engine}{asked}: {name} wraps the student together with its factor "
                f"encoders, which {engine} would shard or rebuild without the student's own class. Vision students "
                "fit on one GPU: run `accelerate launch --multi_gpu script.py` without it"
                + ("; a teacher that does not is shared out by teacher_sharding='fsdp'." if has_teacher else ".")
            )


def check_precision(model: nn.Module, inputs: dict) -> None:
    """Refuse a student in half precision for inputs in float32: its weights would train in half precision, too."""
    pixels = inputs.get(main_input_of(model))
    if pixels is not None and model.dtype in (torch.float16, torch.bfloat16) and pixels.dtype == torch.float32:
        raise ValueError(
            f"Expected a student in float32, got one in {str(model.dtype).removeprefix('torch.')}, as Transformers "
            'loads a file of that type: load it with dtype="float32". To train in mixed precision, set bf16=True or '
            "fp16=True in the arguments."
        )


def check_not_regression(model: nn.Module, term: str, remedy: str) -> None:
    """Refuse a term between the outputs of a regression, which are no logits."""
    config = getattr(without_adapters(model), "config", None)
    if getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", None) == 1:
        raise ValueError(
            f"Expected logits of classes for {term}, got the targets of a regression from {type(model).__name__}, "
            f"between which a softmax means nothing: {remedy}; the feature losses do not need it."
        )


def check_trainable(tap: FeatureTap, inputs: dict) -> None:
    """Refuse a feature map without gradient; a partly frozen backbone is fine."""
    if tap.layers and (frozen := tap.frozen_layers(inputs)):
        raise ValueError(
            f"Expected the student's feature map at {frozen[0]!r} to carry a gradient, got one without, so "
            f"no feature loss would reach the student: all parameters of {type(tap.model).__name__} before it are "
            "frozen, as Transformers builds a ResNet in DETR and similar detectors. Call requires_grad_(True) on the "
            "student, or on its backbone, or name a layer that trains."
        )


def check_factor_channels(widths: list[int], channels: list[int]) -> None:
    """Refuse factors that are wider than anybody wants."""
    for width, of_teacher in zip(widths, channels, strict=True):
        if width > 16 * of_teacher:
            raise ValueError(
                f"Expected factor_channels of at most 16 times the teacher's {of_teacher} channels, got {width}: "
                "factors are compact, half of the channels by default."
            )


def label_map(model: nn.Module) -> dict[int, str] | None:
    """Return a model's `id2label`, or `None` without one; keys as JSON has them are made numbers."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    return labels and {int(key): label for key, label in labels.items()}


def check_logits(student: PreTrainedModel, teacher: nn.Module, logits: torch.Tensor) -> None:
    """Refuse a teacher without a label map whose logits are not as many as the student's classes."""
    labels = label_map(student)
    if label_map(teacher) is not None or labels is None:
        return
    if logits.ndim not in (2, 4) or logits.shape[1] != len(labels):
        raise ValueError(
            f"Expected {len(labels)} logits of the teacher for lambda_kd > 0, one for each class of the student, got "
            f"the shape {tuple(logits.shape)} of {type(teacher).__name__}: give the student these classes, or set "
            "lambda_kd=0; the feature losses do not need it."
        )
    warnings.warn(
        f"{type(teacher).__name__} has no config.id2label: its {len(labels)} logits are taken to be the student's "
        "classes, in the student's order.",
        stacklevel=3,
    )


def check_optim_args(args: TrainingArguments, model: nn.Module) -> None:
    """Refuse `optim_args` that the optimizer would not know; Trainer leaves them out in silence."""
    if not args.optim_args:
        return
    parts = [re.fullmatch(r"\s*(\w+)\s*=[^=,]+", part) for part in args.optim_args.split(",")]
    if not all(parts):
        raise ValueError(
            f"Expected optim_args as 'name=value,name=value', got {args.optim_args!r}: such as 'momentum=0.9'."
        )
    optimizer_cls, _ = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not optimizer_cls.__module__.startswith("torch.optim"):
        return  # Trainer has names of its own for options of these
    known = inspect.signature(optimizer_cls).parameters
    if unknown := [part[1] for part in parts if part[1] not in known]:
        raise ValueError(
            f"Expected arguments of {optimizer_cls.__name__} in optim_args, got {', '.join(unknown)}: it takes "
            f"{', '.join(name for name in known if name != 'params')}. Set optim for another optimizer."
        )


def check_callbacks(callbacks) -> None:
    """Refuse callbacks that are not a list of them."""
    is_list = callbacks is None or isinstance(callbacks, (list, tuple))
    kinds = [c if isinstance(c, type) else type(c) for c in callbacks or ()] if is_list else [type(callbacks)]
    if wrong := [kind.__name__ for kind in kinds if not issubclass(kind, TrainerCallback)]:
        raise ValueError(f"Expected callbacks as a list of TrainerCallback, got {wrong[0]}: pass callbacks=[...].")
    if not is_list:
        raise ValueError(f"Expected callbacks as a list, got one {kinds[0].__name__}: pass callbacks=[...].")


def check_recipe(trainer: Trainer, mixing: nn.Module | None) -> None:
    """Refuse parts of a recipe that do not go together."""
    args, optimizer = trainer.args, trainer.optimizer
    if mixing is not None and getattr(args, "cache_teacher", False):
        raise ValueError(
            "Expected no mixing with cache_teacher=True, got both: a cached teacher has seen each image by itself. "
            "Set cache_teacher=False, or leave mixing out."
        )
    if optimizer is not None and getattr(args, "layer_decay", None) is not None:
        raise ValueError(
            "Expected no optimizer in optimizers with layer_decay, got one: set the learning rate of each of its "
            "groups yourself, and leave layer_decay out."
        )
    if optimizer is None:
        check_optim_args(args, trainer.model)
