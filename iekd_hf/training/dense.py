"""Checks of dense tasks before training: labels of pixels, logits that can be compared, depth without a loss."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.data import Dataset

from ..features.tap import FeatureTap
from ..models.adapters import without_adapters
from ..models.kinds import ignore_index_of, is_semantic_segmenter
from .labels import describe_rows


def check_masks(model: nn.Module, batch: dict, where: str = "") -> None:
    """Refuse labels of a segmenter that are not of the images' size, or are neither a class nor ignored."""
    labels, pixels = batch.get("labels"), batch.get("pixel_values")
    if not is_semantic_segmenter(model) or labels is None or pixels is None:
        return
    if labels.ndim != 3 or labels.shape[-2:] != pixels.shape[-2:]:
        raise ValueError(
            f"Expected labels {(len(pixels), *pixels.shape[-2:])}, one for each pixel of pixel_values, got "
            f"{tuple(labels.shape)}{where}: give both to the image processor, or resize the masks by their nearest "
            "pixels."
        )
    num_labels, ignore_index = model.config.num_labels, ignore_index_of(model)
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= max(num_labels, 2)))
    if outside.any():
        raise ValueError(
            f"Expected labels of pixels from 0 to {num_labels - 1}, the model's {num_labels} classes, or "
            f"{ignore_index}, which it ignores, got {int(labels[outside][0])}{where}: fix the masks, load the model "
            "with more num_labels, or set the label that its configuration ignores."
        )


def check_masks_of(model: nn.Module, dataset: Dataset, name: str) -> None:
    """Check the masks of a list in memory, where that is cheap."""
    if not isinstance(dataset, list) or not is_semantic_segmenter(model):
        return
    for index, row in enumerate(dataset):
        batch = {key: row.get(key) for key in ("labels", "pixel_values")} if isinstance(row, dict) else {}
        if all(isinstance(value, torch.Tensor) for value in batch.values()):
            check_masks(model, {key: value[None] for key, value in batch.items()}, f" in row {index} of {name}")


def probe_with_labels(tap: FeatureTap, batch: dict) -> tuple[dict, list[torch.Size]]:
    """Run a model once, its loss too; refuse labels that it cannot take, and a task that it does not train for."""
    check_masks(tap.model, batch)
    try:
        outputs, shapes = tap.probe(batch, stop_after_last=False)
    except NotImplementedError as error:
        raise ValueError(
            f"Expected a model that computes its loss, got {type(tap.model).__name__}, whose training Transformers "
            f'does not implement ("{error}"): pass compute_loss_func, such as a distance between '
            "outputs['predicted_depth'] and the labels."
        ) from error
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if str(error).startswith("Expected "):
            raise
        raise ValueError(
            f"Expected a first example that {type(without_adapters(tap.model)).__name__} takes, got "
            f"{describe_rows([batch])} ({error}): fix the data set's transform, or load the model for such images "
            "and labels (num_labels, problem_type)."
        ) from error
    if not isinstance(outputs, Mapping):
        raise ValueError(
            f"Expected {type(without_adapters(tap.model)).__name__} to return a ModelOutput or a dictionary with loss "
            f"and logits, got a {type(outputs).__name__}: load it with return_dict=True, or let its forward return "
            "one."
        )
    return outputs, shapes


def check_comparable(student: nn.Module, outputs: dict, teacher_logits: torch.Tensor) -> None:
    """Refuse a student without logits, and logits of images beside logits of pixels."""
    logits = outputs.get("logits")
    if logits is None:
        raise ValueError(
            f"Expected logits of the student for lambda_kd > 0, got {', '.join(outputs)} of "
            f"{type(student).__name__}: set lambda_kd=0; the feature losses do not need them."
        )
    if logits.ndim != teacher_logits.ndim:
        raise ValueError(
            "Expected logits of one kind for lambda_kd > 0, for images or for pixels, got "
            f"{tuple(logits.shape)} of the student and {tuple(teacher_logits.shape)} of the teacher: take a teacher "
            "of the student's task, or set lambda_kd=0; the feature losses do not need them."
        )
