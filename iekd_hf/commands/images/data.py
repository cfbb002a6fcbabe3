"""Images and labels for classification: where they come from, and what is checked."""

from dataclasses import dataclass, field

import datasets
import numpy as np
import PIL.Image

from .labels import check_class_folders, set_unlabelled_apart, unify_labels
from .source import SourceArguments, check_filled, check_images, find_column, limit, load_source, rename_columns


@dataclass
class LabelledArguments(SourceArguments):
    """Say where images with classes come from. With none of it, scikit-learn's handwritten digits are used."""

    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of images for each class."})
    train_file: str | None = field(
        default=None, metadata={"help": "Parquet, CSV or JSON file with images, or their paths, and labels."}
    )
    train_val_split: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training split to validate on, where there is no validation split. Default: a third "
            "of the digits, otherwise 0.15."
        },
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the labels. Default: the one that holds class labels, or `label`."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Height and width in pixels. Default: the pretrained student's, or the first image's own."},
    )

    # Whether training images without a label are taken; `distill` makes an argument of it.
    unlabelled = None

    def __post_init__(self):
        is_given = any(source is not None for source in (self.dataset_name, self.train_dir, self.train_file))
        if self.train_val_split is None:
            self.train_val_split = 0.15 if is_given else 1 / 3
        super().__post_init__()
        self.uses_digits = not self.is_given
        self.sizes: set[tuple[int, int]] = set()  # (height, width) of the images, once they are loaded
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"Expected image_size of at least 1 pixel, got {self.image_size}.")

    def take_sizes(self, sizes: set[tuple[int, int]]) -> None:
        """Keep the sizes of the images that were loaded."""
        self.sizes = sizes


@dataclass
class DataArguments(LabelledArguments):
    """Say also how training images are augmented."""

    augmentation: str = field(
        default="auto",
        metadata={
            "help": "Crop of training images: padded by an eighth, reflected (`crop`), a random part resized "
            "(`resized_crop`), `none`, or `crop` up to 64 pixels and `resized_crop` above (`auto`).",
            "choices": ["auto", "crop", "resized_crop", "none"],
        },
    )
    horizontal_flip: bool | None = field(
        default=None, metadata={"help": "Flip training images at random. Default: yes, but not for the digits."}
    )
    rand_augment: int | None = field(
        default=None,
        metadata={"help": "Magnitude of RandAugment's two operations on training images, 1 to 29. Default: none."},
    )
    mixup: float = field(default=0.0, metadata={"help": "Share of the training batches whose images MixUp mixes."})
    cutmix: float = field(default=0.0, metadata={"help": "Share of the training batches whose images CutMix mixes."})
    decode_once: bool | None = field(
        default=None,
        metadata={
            "help": "Decode all images before training and augment whole batches on the training device; images of "
            "several sizes are brought to one. Default: where all images have one size."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.horizontal_flip is None:
            self.horizontal_flip = not self.uses_digits

    def take_sizes(self, sizes: set[tuple[int, int]]) -> None:
        """Keep the sizes of the images, and decode those of one size once, where nothing is said."""
        super().take_sizes(sizes)
        if self.decode_once is None:
            self.decode_once = len(sizes) == 1


def load_images(args: LabelledArguments, seed: int) -> datasets.DatasetDict:
    """
    Load `train`, `validation` and perhaps `test`, with the columns `image` and `label`, a `ClassLabel`.

    A test split whose labels are hidden has no column `label`.
    """
    splits = datasets.DatasetDict({"train": _digits()}) if args.uses_digits else load_source(args)
    for folder in (args.train_dir, args.validation_dir):
        if folder is not None:
            check_class_folders(folder)
    if args.uses_digits:
        args.image_size = args.image_size or 16  # 8x8 scans leave no room for three stages
    splits = datasets.DatasetDict({name: _rename_columns(split, args, name) for name, split in splits.items()})
    check_filled(splits)
    splits = unify_labels(splits, bool(args.unlabelled))
    if args.unlabelled:
        set_unlabelled_apart(splits)  # the last to choose rows: predictions name them as the data has them
    if "validation" not in splits:
        try:
            parts = splits["train"].train_test_split(args.train_val_split, seed=seed, stratify_by_column="label")
        except ValueError:  # too few images to hold every class twice
            parts = splits["train"].train_test_split(args.train_val_split, seed=seed)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    limit(splits, args, seed)
    args.take_sizes(set().union(*(check_images(split, name) for name, split in splits.items())))
    return splits


def _digits() -> datasets.Dataset:
    """Return scikit-learn's 1,797 handwritten digits: real scans of 8x8 pixels that come with the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [PIL.Image.fromarray((scan * 255 / 16).astype(np.uint8)) for scan in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(n) for n in range(10)])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target}, features=features)


def _rename_columns(split: datasets.Dataset, args: LabelledArguments, name: str) -> datasets.Dataset:
    """Keep the image and the label column, under the names `image` and `label`."""
    image = find_column(split, name, "image", args.image_column_name, datasets.Image)
    try:
        label = find_column(split, name, "label", args.label_column_name, datasets.ClassLabel)
    except ValueError:
        if name != "test":  # which may be for predictions alone
            raise
        return rename_columns(split, {image: "image"})
    if label == image:
        raise ValueError(
            f"Expected images and labels in two columns of the {name} split, got {image!r} for both: name two with "
            "--image_column_name and --label_column_name."
        )
    return rename_columns(split, {image: "image", label: "label"})
