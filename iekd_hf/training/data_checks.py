"""Checks of data before training: empty datasets, unknown labels, batches of one image."""

from collections.abc import Iterable, Mapping

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainingArguments

from ..models.adapters import without_adapters
from ..models.signature import takes_labels
from .dense import check_masks_of
from .labels import (
    NO_LABEL,
    check_are_classes,
    collates_as_usual,
    is_other_label,
    is_transformed,
    read_classes,
    read_least_target,
)


def is_stream(dataset: Dataset) -> bool:
    """Return whether a data set is read in its own order alone."""
    return isinstance(dataset, (IterableDataset, datasets.IterableDataset))


def check_datasets(model: PreTrainedModel, kwargs: dict) -> None:
    """Check all datasets among a trainer's keywords."""
    for name in ("train_dataset", "eval_dataset"):
        given = kwargs.get(name)
        several = isinstance(given, dict) and name == "eval_dataset"
        for dataset in given.values() if several else [given]:
            if dataset is not None:
                check_dataset(dataset, name, model, collates_as_usual(kwargs.get("data_collator")))
                check_masks_of(model, dataset, name)


def check_dataset(dataset: Dataset, name: str, model: PreTrainedModel, reads_labels: bool = True) -> None:
    """
    Refuse an empty dataset, and class labels that the model has no output for.

    Labels are read where that is cheap: in the columns `labels` or `label` of a `datasets.Dataset`, or in
    [`DecodedImages`]; not where a collator may make others.
    """
    if isinstance(dataset, (str, dict)) or not (hasattr(dataset, "__getitem__") or hasattr(dataset, "__iter__")):
        remedy = "pass one of its splits" if isinstance(dataset, dict) else "load it first (datasets.load_dataset)"
        raise ValueError(f"Expected {name} as a data set, got {type(dataset).__name__}: {remedy}.")
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(
            f"Expected {name} to hold at least one example, got an empty dataset: check its file or split."
        )
    if not reads_labels or not takes_labels(without_adapters(model)):
        return  # a backbone, which takes no labels
    config = getattr(model, "config", None)
    num_labels, problem = getattr(config, "num_labels", None), getattr(config, "problem_type", None)
    if problem == "multi_label_classification" and (least := read_least_target(dataset)) is not None and least < 0:
        raise ValueError(
            f"Expected targets of 0 or 1 in {name} for several labels an image, got {least:g}: with these, single "
            "images cannot be without a label. Remove such images, or the labels of all."
        )
    if num_labels is None or num_labels == 1 or problem in ("regression", "multi_label_classification"):
        return  # targets, not classes
    for column in ("labels", "label"):
        if type(without_adapters(model)).__name__.endswith("ForImageClassification"):
            check_are_classes(dataset, column, name)
        labels = read_classes(dataset, column)
        if labels is None:
            continue
        outside = (labels != NO_LABEL) & ((labels < 0) | (labels >= num_labels))
        row = int(outside.argmax())
        # A transform may make other labels of these.
        if outside[row] and not (is_transformed(dataset) and is_other_label(dataset[row], labels[row])):
            is_below = labels[row] < 0
            remedy = "write -100 for none" if is_below else f"load the model with num_labels={int(labels.max()) + 1}"
            raise ValueError(
                f"Expected labels of {name} from 0 to {num_labels - 1}, the model's {num_labels} classes, got "
                f"{int(labels[row])} in row {row} of column {column!r}: {remedy}, or fix the labels."
            )


def check_dispatched(accelerator: Accelerator, dataset: Dataset, batch: Mapping) -> None:
    """Refuse a batch of other things than tensors where one process reads the images and shares them out."""
    if not is_dispatched(accelerator, dataset):
        return
    # Of lists, Accelerate joins those of all ranks entry by entry, and cuts the entries.
    if others := [name for name, value in batch.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(
            f"Expected batches of tensors alone where they are dispatched to {accelerator.num_processes} processes, "
            f"got {others[0]!r} of type {type(batch[others[0]]).__name__}, which would come apart: set "
            'accelerator_config={"dispatch_batches": False}, so that each process reads its own images.'
        )


def is_dispatched(accelerator: Accelerator, dataset: Dataset) -> bool:
    """Return whether one process reads the images and shares them out to others."""
    chosen = accelerator.dataloader_config.dispatch_batches
    return accelerator.num_processes > 1 and bool(is_stream(dataset) if chosen is None else chosen)


def check_batches_of_one(dataset: Dataset, args: TrainingArguments, shapes: Iterable[torch.Size]) -> None:
    """Refuse a batch of one image with maps of 1x1, on which BatchNorm of the encoders cannot train."""
    if all(shape[1:].numel() > 1 for shape in shapes):
        return
    are_single = _images_a_batch(args) == args.world_size
    if are_single or (not args.dataloader_drop_last and leaves_one(dataset, args)):
        count = f"{len(dataset)} images in " if hasattr(dataset, "__len__") else ""
        remedy = "" if are_single else "dataloader_drop_last=True, "
        raise ValueError(
            "Expected batches of at least two images where maps are 1x1, got one of a single image, which BatchNorm "
            f"cannot train on ({count}batches of {args.train_batch_size}): set {remedy}another "
            "per_device_train_batch_size, or earlier layers."
        )


def check_a_batch(dataset: Dataset, args: TrainingArguments) -> None:
    """Refuse a data set that fills no batch where batches that are not full are dropped."""
    if args.dataloader_drop_last and fills_no_batch(dataset, args):
        raise ValueError(
            f"Expected images for at least one batch of {_images_a_batch(args)} with dataloader_drop_last=True, got "
            f"{len(dataset)}: set dataloader_drop_last=False, or a smaller per_device_train_batch_size."
        )


def fills_no_batch(dataset: Dataset, args: TrainingArguments) -> bool:
    """Return whether a data set holds fewer images than a batch of all processes."""
    return hasattr(dataset, "__len__") and len(dataset) < _images_a_batch(args)


def leaves_one(dataset: Dataset, args: TrainingArguments) -> bool:
    """Return whether a process's last batch of an epoch holds a single image."""
    if not hasattr(dataset, "__len__"):
        return False
    if args.world_size > 1 and args.accelerator_config.dispatch_batches:
        return 0 < len(dataset) % _images_a_batch(args) <= args.world_size
    if args.world_size > 1 and args.accelerator_config.even_batches:
        return False  # Accelerate fills up the last batches
    return len(dataset) % args.train_batch_size == 1


def _images_a_batch(args: TrainingArguments) -> int:
    return args.train_batch_size * (1 if args.accelerator_config.split_batches else args.world_size)
