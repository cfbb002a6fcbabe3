"""Which images have a label: read from a data set, filled in where a row has none, left out of metrics."""

from collections.abc import Callable, Iterable, Mapping

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset
from transformers import DefaultDataCollator, EvalPrediction, default_data_collator

from ..data.decoded_images import DecodedImages


# The label of an image without one, which cross-entropy leaves out.
NO_LABEL = -100
# What a row calls its label; default_data_collator makes `labels` of both.
_COLUMNS = ("labels", "label")


def read_classes(dataset: Dataset, column: str) -> np.ndarray | None:
    """
    Return a column of class labels, -100 for those that are missing, or `None` where there are no classes.

    That is read where it is cheap: of a table, of decoded images, of a list in memory.
    """
    if isinstance(dataset, list):
        values = [row.get(column) if isinstance(row, dict) else None for row in dataset]
        if all(value is None for value in values):
            return None
        values = [NO_LABEL if value is None else value for value in values]
        numbers = all(isinstance(value, (int, np.integer)) or getattr(value, "ndim", 1) == 0 for value in values)
        labels = np.array([int(value) if float(value).is_integer() else 0.5 for value in values]) if numbers else None
        return labels if labels is not None and labels.dtype.kind in "iu" else None
    if isinstance(dataset, DecodedImages):
        dataset = dataset.table
    feature = dataset.features.get(column) if isinstance(dataset, datasets.Dataset) else None
    if isinstance(feature, datasets.ClassLabel) or str(getattr(feature, "dtype", "")).startswith("int"):
        labels = dataset.select_columns([column]).with_format("arrow")[:].column(column)
        return labels.fill_null(NO_LABEL).to_numpy()
    return None


def is_transformed(dataset: Dataset) -> bool:
    """Return whether a table's rows are what a transform makes of them, labels too."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"


def is_other_label(example: dict, label: int) -> bool:
    """Return whether an example, as it comes, has another label than its row in the table, or none."""
    given = [example[column] for column in _COLUMNS if example.get(column) is not None]
    return not any(_is_class(value) and int(value) == label for value in given)


def check_are_classes(dataset: Dataset, column: str, name: str) -> None:
    """Refuse labels of an image classifier that are no classes where others are, or that would be lost."""
    if isinstance(dataset, list):
        values = [row.get(column) if isinstance(row, dict) else None for row in dataset]
        has_classes = any(_is_class(value) for value in values)
        for row, value in enumerate(values):
            if isinstance(value, str) or (has_classes and value is not None and not _is_class(value)):
                raise ValueError(
                    f"Expected the number of a class as {column!r} in every row of {name}, got {value!r} in row "
                    f"{row}: fix it, or leave the label out (None) where there is none."
                )
    elif isinstance(dataset, datasets.Dataset) and column in dataset.features:
        feature = dataset.features[column]
        dtype = getattr(feature, "dtype", "")
        # default_data_collator would leave strings out; a transform may make classes of them.
        if dtype in ("string", "large_string") and not (is_transformed(dataset) and _brings_class(dataset[0])):
            raise ValueError(
                f"Expected the numbers of classes in column {column!r} of {name}, got strings: make classes of them "
                f"by class_encode_column({column!r})."
            )
        missing = dataset.data.column(column).null_count if dataset.format["type"] is not None else 0
        if missing and dtype.startswith("int"):
            raise ValueError(
                f"Expected {NO_LABEL} for images without a label in column {column!r} of {name}, got {missing} "
                f"missing values, which the format {dataset.format['type']!r} turns into NaN: write {NO_LABEL} there."
            )


def _brings_class(example: dict) -> bool:
    return any(_is_class(example[column]) for column in _COLUMNS if example.get(column) is not None)


def _is_class(value) -> bool:
    """Return whether a label is the number of a class, as it is or in an array or tensor of one."""
    if getattr(value, "ndim", 1) == 0:
        value = value.item()
    return isinstance(value, int) or (isinstance(value, float) and value.is_integer())


def describe_rows(rows: Iterable[dict]) -> str:
    """Describe the values of some rows by their shapes and types, each once."""
    found = {}
    for row in rows:
        for name, value in row.items() if isinstance(row, Mapping) else [("rows", row)]:
            shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", type(value).__name__)
            kind = str(dtype).removeprefix("torch.") + ("" if shape is None else f" of shape {tuple(shape)}")
            found.setdefault(name, {})[kind] = None
    return ", ".join(f"{name}: {' and '.join(kinds)}" for name, kinds in found.items())


def read_least_target(dataset: Dataset) -> float | None:
    """Return the least of all targets of a table with several labels an image, or `None` where there are none."""
    table = dataset.table if isinstance(dataset, DecodedImages) else dataset
    for column in _COLUMNS if isinstance(table, datasets.Dataset) else ():
        if isinstance(table.features.get(column), (datasets.List, datasets.Sequence)):
            targets = table.select_columns([column]).with_format("arrow")[:].column(column)
            return pc.min(pc.list_flatten(targets)).as_py()
    return None


def count_labelled(dataset: Dataset | None) -> int | None:
    """Return how many images have a label, or `None` where that cannot be read, or a transform may hide some."""
    for column in _COLUMNS:
        labels = read_classes(dataset, column)
        if labels is not None:
            count = int((labels != NO_LABEL).sum())
            return None if count == len(labels) and is_transformed(dataset) else count
    if isinstance(dataset, DecodedImages) and "labels" not in dataset.table.column_names:
        return 0
    return None


def collates_as_usual(collate: Callable | None) -> bool:
    """Return whether a collator is Trainer's own, which reads each row's `label` or `labels`; others may read any."""
    return collate in (None, default_data_collator) or isinstance(collate, DefaultDataCollator)


class FillLabels:
    """
    Collate rows of which some have no label: theirs is -100; a batch where none has one gets no `labels`.

    It gets them, -100 throughout, where `fills_all` is set: ranks that batches are dispatched to must all have the
    same keys. A collator of one's own gets the rows as they are.
    """

    def __init__(self, collate: Callable):
        self.collate, self.is_usual = collate, collates_as_usual(collate)
        self.fills_all = False

    def __call__(self, rows: list):
        if self.is_usual and isinstance(rows[0], Mapping):
            if self.fills_all and all(row.get(column) is None for row in rows for column in _COLUMNS):
                rows = [{**row, "labels": NO_LABEL} for row in rows]
            for column in _COLUMNS:
                missing = [row.get(column) is None for row in rows]
                if all(missing):
                    rows = [{name: value for name, value in row.items() if name != column} for row in rows]
                elif any(missing):
                    filler = _no_label_like(rows[missing.index(False)][column], column)
                    rows = [{**row, column: filler if row.get(column) is None else row[column]} for row in rows]
        return self.collate(rows)


def _no_label_like(label, column: str) -> int | np.ndarray | torch.Tensor:
    """Return -100 as another row has its class: a number, or an array or tensor of one."""
    if isinstance(label, (int, np.integer)):
        return NO_LABEL
    if getattr(label, "ndim", 1) == 0 and str(label.dtype).rpartition(".")[2].startswith(("int", "uint8")):
        return torch.full_like(label, NO_LABEL) if isinstance(label, torch.Tensor) else np.full_like(label, NO_LABEL)
    raise ValueError(
        f"Expected {column!r} in every row of a batch, or none, got some without and another of type "
        f"{type(label).__name__}: only beside labels that are numbers of classes may rows have none. Remove those "
        "rows, or the labels of all."
    )


def measure_labelled(compute_metrics: Callable, prediction: EvalPrediction, **compute_result: bool) -> dict:
    """
    Call `compute_metrics` with the images that have a label; without any there is nothing to measure.

    They come as Trainer gives them: all, as a list of batches (`eval_do_concat_batches`), or batch by batch
    (`batch_eval_metrics`), of which the last one says `compute_result`.
    """
    labels = prediction.label_ids
    if not _are_classes(labels):
        return compute_metrics(prediction, **compute_result)
    kept = [of_batch != NO_LABEL for of_batch in labels] if isinstance(labels, list) else labels != NO_LABEL
    batches = kept if isinstance(kept, list) else [kept]
    if all(rows.all() for rows in batches):
        return compute_metrics(prediction, **compute_result)
    if not any(rows.any() for rows in batches) and not any(compute_result.values()):
        return {}

    def keep(values, kept):
        if isinstance(values, list) and isinstance(kept, list):
            return [keep(value, rows) for value, rows in zip(values, kept, strict=True) if rows.any()]
        if isinstance(values, tuple):
            return tuple(keep(value, kept) for value in values)
        return values if values is None else values[kept]

    given = {"inputs": prediction.inputs, "losses": prediction.losses}
    given = {name: keep(values, kept) for name, values in given.items() if values is not None}
    labelled = EvalPrediction(keep(prediction.predictions, kept), keep(labels, kept), **given)
    return compute_metrics(labelled, **compute_result)


def _are_classes(labels) -> bool:
    """Return whether labels are one class for each image, as arrays, tensors, or a list of these."""
    if isinstance(labels, list):
        return all(map(_are_classes, labels))
    if isinstance(labels, torch.Tensor):
        return labels.ndim == 1 and not labels.is_floating_point()
    return isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu"
