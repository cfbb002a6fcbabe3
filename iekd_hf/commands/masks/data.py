"""Images with masks: where they come from, what is checked, what their classes are called."""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import datasets
import numpy as np
import PIL.Image
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ...data.rgb import to_rgb
from ..images.jitter import JitteredArguments
from ..images.source import (
    check_filled,
    check_images,
    find_column,
    limit,
    load_source,
    original_rows,
    rename_columns,
)
from .shapes import CLASSES, make_masked_shapes


logger = logging.getLogger(__name__)

# Images of shapes, where no others are given: for training, and for validation.
_SHAPES = {"train": 300, "validation": 200}
# Of how many of them the students see the masks.
_SHAPES_LABELLED = 30
# What a column of masks is called.
_MASKS = ("label", "labels", "mask", "masks", "annotation", "annotations", "segmentation", "segmentation_mask")
# What a data set's file of class names is called.
_NAMES_FILE = "id2label.json"


@dataclass
class SegmentationDataArguments(JitteredArguments):
    """Say where images and masks come from. With none of it, images of simple shapes are drawn."""

    train_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of training images with a metadata.jsonl that has `label_file_name`, their masks."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Parquet file with images and masks."})
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the masks. Default: the other one that holds images."}
    )
    id2label_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON file with the names of the classes by their numbers. Default: the data set's own "
            "id2label.json, or else numbers."
        },
    )
    do_reduce_labels: bool = field(
        default=False,
        metadata={"help": "Leave out pixels of label 0, the background, and reduce all other labels by 1."},
    )
    ignore_index: int = field(default=255, metadata={"help": "Label of pixels that are left out."})
    labelled_samples: int | None = field(
        default=None,
        metadata={
            "help": "Let the students know the masks of this many training images, drawn by seed; the distilled one "
            "learns from the others by what its teacher makes of them. A teacher that is trained here knows all. "
            "Default: 30 of the shapes, otherwise all."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.ignore_index < 0:
            raise ValueError(f"Expected ignore_index of at least 0, as pixels of masks are, got {self.ignore_index}.")
        if self.do_reduce_labels and self.ignore_index == 0:
            raise ValueError(
                "Expected ignore_index above 0 with do_reduce_labels, got 0, which would be the number of the first "
                "class after it: do_reduce_labels leaves out label 0 by itself."
            )
        if self.labelled_samples is None and not self.is_given:
            self.labelled_samples = _SHAPES_LABELLED
        if self.labelled_samples is not None and self.labelled_samples < 2:
            raise ValueError(f"Expected labelled_samples of at least 2, got {self.labelled_samples}.")


@dataclass
class Masked:
    """Hold the images of a split beside their masks, row for row."""

    images: datasets.Dataset  # the column `image`
    masks: datasets.Dataset | None  # the column `label`; `None` where there are none
    args: SegmentationDataArguments
    labelled: frozenset[int] | None = None  # the rows whose masks may be seen; all by default

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: list[int]) -> "Masked":
        """Return some rows as a split of their own."""
        masks = None if self.masks is None else self.masks.select(indices)
        return Masked(self.images.select(indices), masks, self.args)

    def rows(self, indices: list[int]) -> Iterator[tuple[PIL.Image.Image, np.ndarray]]:
        """Yield the image in RGB and the label of each of its pixels, `ignore_index` where that is not to be seen."""
        for index, image in zip(indices, map(to_rgb, self.images[indices]["image"]), strict=True):
            if self.masks is None or (self.labelled is not None and index not in self.labelled):
                labels = np.full((image.height, image.width), self.args.ignore_index)
            else:
                labels = to_labels(self.masks[index]["label"], self.args)
            yield image, labels


def to_labels(mask: PIL.Image.Image, args: SegmentationDataArguments) -> np.ndarray:
    """
    Read the class of each pixel.

    Args:
        mask (`PIL.Image.Image`):
            With one number for each pixel: grey, of a palette, or of 16 bits.
        args (`SegmentationDataArguments`):
            Says whether classes are counted from 1, and which label is none.

    Returns:
        `np.ndarray` of shape `(height, width)`: int64.

    Raises:
        `ValueError`: a mask in colours.

    Example:

    ```python
    >>> import numpy as np, PIL.Image
    >>> from iekd_hf.commands.masks.data import SegmentationDataArguments, to_labels
    >>> mask = PIL.Image.fromarray(np.array([[0, 1, 2, 255]], dtype=np.uint8))
    >>> to_labels(mask, SegmentationDataArguments(do_reduce_labels=True))
    array([[255,   0,   1, 255]])

    ```
    """
    if len(mask.getbands()) > 1 or mask.mode == "F":
        raise ValueError(f"Expected a mask with the number of a class in each pixel, got an image of mode {mask.mode}")
    labels = np.asarray(mask).astype(np.int64)
    if args.do_reduce_labels:
        labels = np.where((labels == 0) | (labels == args.ignore_index), args.ignore_index, labels - 1)
    return labels


def load_masked(args: SegmentationDataArguments, seed: int) -> tuple[dict[str, Masked], list[str]]:
    """Load the splits and the names of the classes; every image and every mask is looked at."""
    if args.is_given:
        splits = load_source(args)
    else:
        parts = {name: make_masked_shapes(n, seed=i) for i, (name, n) in enumerate(_SHAPES.items())}
        splits = datasets.DatasetDict(parts)
    splits = datasets.DatasetDict({name: _rename_columns(split, args, name) for name, split in splits.items()})
    check_filled(splits)
    if "validation" not in splits:
        parts = splits["train"].train_test_split(args.train_val_split, seed=seed)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    limit(splits, args, seed)
    names, masked, used = _class_names(args), {}, {}
    for name, split in splits.items():
        sizes = check_images(split, name)
        masks = None
        if "label" in split.column_names:
            masks = split.select_columns("label")
            used[name] = _check_masks(masks, name, sizes, names, args)
            if names is None:  # those of the training split, which is the first
                names = [str(label + args.do_reduce_labels) for label in range(max(used[name]) + 1)]
        masked[name] = Masked(split.select_columns("image"), masks, args)
    missing = [label for index, label in enumerate(names) if index not in used["train"]]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        logger.warning("Classes that no training pixel has: %s (%d of %d).", shown, len(missing), len(names))
    return masked, names


def _rename_columns(split: datasets.Dataset, args: SegmentationDataArguments, name: str) -> datasets.Dataset:
    """Keep the images and their masks, under the names `image` and `label`; a test split needs no masks."""
    # Masks are images, too: what is called a mask is none of the others, unless it is named.
    masks = [args.label_column_name] if args.label_column_name else _MASKS
    others = [column for column in split.column_names if column not in masks or column == args.image_column_name]
    image = find_column(split.select_columns(others), name, "image", args.image_column_name, datasets.Image)
    if name == "test":
        return rename_columns(split, {image: "image"})
    mask = find_column(split.remove_columns(image), name, "label", args.label_column_name, datasets.Image)
    split = rename_columns(split, {image: "image", mask: "label"})
    as_image = isinstance(split.features["label"], datasets.Image)
    return split if as_image else split.cast_column("label", datasets.Image())


def _class_names(args: SegmentationDataArguments) -> list[str] | None:
    """Return the names of the classes, where there is a file of them."""
    if not args.is_given:
        return list(CLASSES)
    path = args.id2label_file
    if path is None and args.dataset_name is not None:
        path = os.path.join(args.dataset_name, _NAMES_FILE)
        if not os.path.isdir(args.dataset_name):
            try:
                path = hf_hub_download(args.dataset_name, _NAMES_FILE, repo_type="dataset")
            except (EntryNotFoundError, LocalEntryNotFoundError):
                return None
        elif not os.path.isfile(path):
            return None
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            found = {int(index): str(label) for index, label in json.load(file).items()}
        return [found[index] for index in range(len(found))]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f'Expected a JSON file such as {{"0": "wall", "1": "floor"}} with the names of all classes from 0 on, got '
            f"{path!r} ({type(error).__name__}: {error}): fix it, or name another one with --id2label_file."
        ) from error


def _check_masks(
    masks: datasets.Dataset,
    name: str,
    sizes: list[tuple[int, int]],
    names: list[str] | None,
    args: SegmentationDataArguments,
) -> set[int]:
    """Return the classes that occur; refuse masks of another size than their image, and labels that are no class."""
    used: set[int] = set()
    for row, example, size in zip(original_rows(masks), masks, sizes, strict=True):
        where = f"in row {row} of the {name} split"
        if example["label"] is None:
            raise ValueError(f"Expected a mask {where}, got none: remove the row, or give it a mask.")
        try:
            labels = to_labels(example["label"], args)
        except ValueError as error:
            raise ValueError(
                f"{error} {where}: turn coloured masks into numbers of classes, or name another column with "
                "--label_column_name."
            ) from error
        if labels.shape != size:
            raise ValueError(
                f"Expected a mask of the size of its image {where}, got {labels.shape[0]}x{labels.shape[1]} for an "
                f"image of {size[0]}x{size[1]} pixels (height x width): fix or remove it."
            )
        if args.do_reduce_labels and (np.asarray(example["label"]) == args.ignore_index + 1).any():
            raise ValueError(
                f"Expected no label {args.ignore_index + 1} {where}, which --do_reduce_labels turns into "
                f"{args.ignore_index}, the --ignore_index: choose one that is above the number of classes."
            )
        found = set(np.flatnonzero(np.bincount(labels.ravel())).tolist()) - {args.ignore_index}
        if names is not None and found and max(found) >= len(names):
            raise ValueError(
                f"Expected labels from 0 to {len(names) - 1}, the {len(names)} classes, or {args.ignore_index} for "
                f"none, got {max(found)} in the mask {where}: fix the mask, name the label of no class with "
                "--ignore_index, or all classes with --id2label_file."
            )
        used |= found
    if not used:
        raise ValueError(
            f"Expected labelled pixels in the {name} split, got none in {len(masks)} masks: check its masks, "
            "--ignore_index and --do_reduce_labels."
        )
    return used
