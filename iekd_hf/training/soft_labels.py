"""Labels that are shares of the classes, as mixed images have them, and the task's loss on them."""

import torch
from torch import nn
from transformers import Trainer

from ..method.objective import is_on
from ..models.adapters import without_adapters
from ..models.signature import takes_labels
from .labels import NO_LABEL


def are_soft(model: nn.Module, labels: torch.Tensor | None) -> bool:
    """Return whether labels are shares of the classes of which each image has one."""
    config = getattr(without_adapters(model), "config", None)
    is_single = getattr(config, "problem_type", None) == "single_label_classification"
    return is_single and isinstance(labels, torch.Tensor) and labels.is_floating_point() and labels.ndim == 2


def soft_cross_entropy(logits: torch.Tensor, shares: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    r"""
    Return the cross entropy of soft labels, the mean over the images by how much of each has a label.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`):
            The student's.
        shares (`torch.Tensor` of shape `(batch_size, num_labels)`):
            Not negative; a row adds up to the share of its image that has a label, 1 for most.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Share of each row that is spread evenly over the classes.

    Returns:
        `torch.Tensor`: a scalar; 0 without any label.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.training.soft_labels import soft_cross_entropy
    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    >>> soft_cross_entropy(logits, torch.tensor([[1.0, 0.0], [0.25, 0.75]]))  # of (0.1269 + 0.6931) / 2
    tensor(0.4100)
    >>> soft_cross_entropy(logits, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))  # the second image has no label
    tensor(0.1269)

    ```
    """
    of_images = shares.sum(dim=1, keepdim=True)
    shares = torch.lerp(shares, of_images / shares.shape[1], label_smoothing)
    total = -(shares * logits.float().log_softmax(dim=1)).sum()
    count = of_images.sum()
    return total / torch.where(count > 0, count, 1.0)


def mix(inputs: dict, mixing: nn.Module, model: nn.Module) -> dict:
    """Mix the images of a batch, and their classes to soft labels."""
    labels = _classes_of(inputs, model)
    model.config.problem_type = "single_label_classification"  # what Transformers finds by itself in such labels
    pixel_values, labels = mixing(inputs["pixel_values"], labels)
    return {**inputs, "pixel_values": pixel_values, "labels": labels}


def check_labels(trainer: Trainer, batch: dict) -> None:
    """Refuse labels that cannot be mixed, and soft labels where the logit term needs classes."""
    model, args = trainer.model, trainer.args
    if trainer.mixing is not None:
        _classes_of(batch, model)
    labels = batch.get("labels")
    is_dkd = getattr(args, "kd_distance", "kl") == "dkd" and is_on(args.lambda_kd)
    if is_dkd and are_soft(model, labels):
        raise ValueError(
            f"Expected the class of each image as labels with kd_distance='dkd', got {labels.dtype} of shape "
            f"{tuple(labels.shape)}: set another kd_distance, or take a data collator that keeps class numbers."
        )


def _classes_of(inputs: dict, model: nn.Module) -> torch.Tensor:
    """Return the class of each image of a batch, -100 where it has none, to be mixed."""
    bare = without_adapters(model)
    labels = inputs.get("labels") if takes_labels(bare) else None
    problem = getattr(bare.config, "problem_type", None)
    if labels is None and takes_labels(bare) and problem in (None, "single_label_classification"):
        images = inputs["pixel_values"]
        labels = torch.full((len(images),), NO_LABEL, device=images.device)
    if not isinstance(labels, torch.Tensor) or labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"Expected a class of each image as labels with mixing, got {getattr(labels, 'shape', labels)}: leave "
            "mixing out for other tasks than classification."
        )
    return labels
