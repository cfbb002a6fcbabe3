"""What a low-label study hides from the students: the labels of all but some training images."""

from dataclasses import dataclass, field

import datasets
import numpy as np
from torch.utils.data import Dataset

from iekd_hf import DecodedImages

from ...training.labels import NO_LABEL
from .data import DataArguments


@dataclass
class StudentDataArguments(DataArguments):
    """Say how much of the training images the students know."""

    labelled_samples: int | None = field(
        default=None,
        metadata={
            "help": "Let the students know the labels of this many training images, balanced over the classes, drawn "
            "by seed; a teacher that is trained here knows all. Default: 50 of the digits, otherwise all."
        },
    )

    # Of the digits, where nothing is said.
    digits_labelled = 50

    def decide(self, num_images: int) -> None:
        """Choose how many of the digits the students know, where nothing is said."""
        if self.labelled_samples is None and self.uses_digits:
            self.labelled_samples = min(self.digits_labelled, num_images)


def draw_labelled(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """
    Draw the rows whose labels the students know, balanced over the classes.

    Args:
        labels (`np.ndarray`):
            The class of each row.
        count (`int`):
            How many to draw. Where a class has too few rows, the others give more.
        seed (`int`):
            Seed of what is drawn.

    Returns:
        `np.ndarray`: the rows, in their order.

    Raises:
        `ValueError`: more rows than there are, or fewer than classes.

    Example:

    ```python
    >>> import numpy as np
    >>> from iekd_hf.commands.images.few_labels import draw_labelled
    >>> labels = np.array([0] * 90 + [1] * 9 + [2])
    >>> np.bincount(labels[draw_labelled(labels, 7, seed=0)])
    array([3, 3, 1])

    ```
    """
    classes = np.unique(labels)
    if not len(classes) <= count <= len(labels):
        raise ValueError(
            f"Expected labelled_samples between {len(classes)} (one of each class) and {len(labels)} (all images), "
            f"got {count}."
        )
    order = np.random.default_rng(seed).permutation(len(labels))
    # The first of each class, then the second of each, and so on.
    rank = np.empty(len(labels), dtype=np.int64)
    for label in classes:
        rows = order[labels[order] == label]
        rank[rows] = np.arange(len(rows))
    return np.sort(order[np.argsort(rank[order], kind="stable")][:count])


def add_unlabelled(images: Dataset, unlabelled: Dataset) -> Dataset:
    """
    Put images without a label behind others, with the label -100.

    Args:
        images (`datasets.Dataset` or [`DecodedImages`]), unlabelled (the same):
            The images as trainers take them.

    Returns:
        `datasets.Dataset` or [`DecodedImages`]

    Example:

    ```python
    >>> import datasets
    >>> from iekd_hf.commands.images.few_labels import add_unlabelled
    >>> first, second = (datasets.Dataset.from_dict(columns) for columns in ({"label": [3], "x": [0]}, {"x": [1]}))
    >>> add_unlabelled(first, second)["label"][:]
    [3, -100]

    ```
    """
    if isinstance(images, DecodedImages):
        return DecodedImages(add_unlabelled(images.table, unlabelled.table))
    every, _ = split_by_labels(images, np.arange(len(images)))
    column = next(name for name in every.column_names if name not in unlabelled.column_names)
    labels = datasets.Dataset.from_dict(
        {column: [NO_LABEL] * len(unlabelled)}, features=datasets.Features({column: datasets.Value("int64")})
    )
    added = datasets.concatenate_datasets([unlabelled.with_format(None), labels], axis=1)
    both = datasets.concatenate_datasets([every.with_format(None), added])
    both.set_format(**images.format | {"columns": None})
    return both


def split_by_labels(images: Dataset, rows: np.ndarray) -> tuple[Dataset, Dataset]:
    """
    Return all images, with the labels of some rows and -100 for the others, and the images of these rows alone.

    Args:
        images (`datasets.Dataset` or [`DecodedImages`]):
            The training images as trainers take them.
        rows (`np.ndarray`):
            The rows whose labels are known.

    Returns:
        `tuple`: two data sets of the same kind.

    Example:

    ```python
    >>> import datasets, numpy as np
    >>> from iekd_hf.commands.images.few_labels import split_by_labels
    >>> every, few = split_by_labels(datasets.Dataset.from_dict({"label": [4, 5, 6]}), np.array([1]))
    >>> every["label"][:], few["label"][:]
    ([-100, 5, -100], [5])

    ```
    """
    if isinstance(images, DecodedImages):
        every, few = split_by_labels(images.table, rows)
        return DecodedImages(every), DecodedImages(few)
    column = "labels" if "labels" in images.column_names else "label"
    known = np.full(len(images), NO_LABEL)
    known[rows] = images.select_columns([column]).with_format("numpy")[:][column][rows]
    labels = datasets.Dataset.from_dict({column: known}, features=datasets.Features({column: datasets.Value("int64")}))
    hidden = datasets.concatenate_datasets([images.remove_columns(column).with_format(None), labels], axis=1)
    hidden.set_format(**images.format | {"columns": None})
    return hidden, images.select(rows)
