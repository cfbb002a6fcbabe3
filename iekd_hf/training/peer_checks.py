"""Checks of peers before training: models that cannot teach each other, options that would reach one of them."""

from collections.abc import Iterable

from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import find_labels

from ..models.adapters import is_adapted
from .average import averages_among
from .checks import check_callbacks, check_can_be_student, check_label_maps, check_not_regression, refuse_logit_term
from .data_checks import check_datasets


def check_no_average(callbacks: Iterable) -> None:
    """Refuse a moving average of one model where several train."""
    if averages_among(callbacks):
        raise ValueError(
            "Expected no EMACallback among the callbacks, got one: it averages one model, and here several train. Use "
            "it with IEKDTrainer, or leave it out."
        )


def check_models(models: list[PreTrainedModel], args: TrainingArguments, kwargs: dict) -> None:
    """Refuse models that cannot be trained together."""
    if len(models) < 2:
        raise ValueError(f"Expected at least two models, got {len(models)}: a peer learns from another one.")
    owners = {}
    for i, model in enumerate(models):
        check_can_be_student(model, f"models[{i}]")
        for parameter in model.parameters():
            if owners.setdefault(parameter, i) != i:
                raise ValueError(
                    f"Expected models with weights of their own, but models[{owners[parameter]}] and models[{i}] "
                    "share theirs: build the second one again, or pass copy.deepcopy(model)."
                )
        if getattr(model, "is_activation_checkpointing", False):
            raise ValueError(
                f"Expected no activation checkpointing, got it in models[{i}]: it would run the peer forward once "
                "more in the backward pass, and move BatchNorm's statistics twice a step. Call its "
                "gradient_checkpointing_disable(); use bf16 or a smaller batch."
            )
        if is_adapted(model):
            raise ValueError(
                f"Expected models whose every weight trains, got models[{i}] with adapters: peers start from scratch. "
                "Pass it without, or use IEKDTrainer, whose student can have adapters."
            )
        if not find_labels(type(model)) and kwargs.get("compute_loss_func") is None:
            raise ValueError(
                f"Expected models[{i}] to return a loss, got {type(model).__name__}, which takes no labels: pass a "
                "model with a head for the task, or compute_loss_func."
            )
        check_datasets(model, kwargs)
    check_callbacks(kwargs.get("callbacks"))
    check_no_average(kwargs.get("callbacks") or ())
    if args.neftune_noise_alpha is not None:
        raise ValueError(
            "Expected no neftune_noise_alpha, got one: Trainer would add the noise to the first peer alone. Leave it "
            "out."
        )
    for name in ("model", "model_init", "optimizers"):
        if kwargs.get(name) not in (None, (None, None)):
            raise ValueError(
                f"Expected no {name}, got one: pass models=[...]; each gets an optimizer of its own, by args.optim or "
                "optimizer_cls_and_kwargs."
            )
    if args.peer_layers is not None and len(args.peer_layers) != len(models):
        raise ValueError(
            f"Expected a layer for each of the {len(models)} models in peer_layers, got {len(args.peer_layers)}."
        )
    if "kl" in args.mutual_loss:
        term = f"mutual_loss={args.mutual_loss!r}"
        refuse_logit_term(models, term, "Set mutual_loss='ie'")
        for model in models:
            check_not_regression(model, term, "set mutual_loss='ie'")
        for i, model in enumerate(models):
            check_label_maps(models[0], model, f"models[0] and models[{i}]", term, "mutual_loss='ie'")
