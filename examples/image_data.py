"""Images and labels for the classification examples: where they come from, and what is checked."""

import io
import logging
import os
from dataclasses import dataclass, field

import datasets
import numpy as np
import PIL.Image
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """Say where the images come from. With none of it, scikit-learn's handwritten digits are used."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or a folder of one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one folder of images for each class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, for validation."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file with images and labels."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, for validation."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: the one that holds images."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the labels. Default: the one that holds class labels, or `label`."}
    )
    train_val_split: float = field(
        default=0.15,
        metadata={"help": "Share of the training split to validate on, where there is no validation split."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use this many training images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use this many validation images only."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Height and width in pixels. Default: the pretrained student's, or the first image's own."},
    )
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
    decode_once: bool | None = field(
        default=None,
        metadata={
            "help": "Decode all images before training and augment whole batches on the training device; images of "
            "several sizes are brought to one. Default: where all images have one size."
        },
    )

    def __post_init__(self):
        sources = [name for name in ("dataset_name", "train_dir", "train_file") if getattr(self, name) is not None]
        if len(sources) > 1:
            raise ValueError(f"Expected one source of training images, got {' and '.join(sources)}: keep one.")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"Expected train_val_split within (0, 1), got {self.train_val_split}.")
        self.uses_digits = not sources
        self.sizes: set[tuple[int, int]] = set()  # (height, width) of the images, once they are loaded
        if self.horizontal_flip is None:
            self.horizontal_flip = not self.uses_digits


def load_images(args: DataArguments, seed: int) -> datasets.DatasetDict:
    """
    Load the data and bring it into one form.

    Args:
        args (`DataArguments`):
            Where it comes from.
        seed (`int`):
            Seed of the validation split, where one is cut off.

    Returns:
        `datasets.DatasetDict`: `train`, `validation` and perhaps `test`, with the columns `image` and `label`, a
        `ClassLabel`.

    Raises:
        `ValueError`: no such data, a missing column, an empty split, a label outside the classes, a file that is no
        image.
    """
    splits = _load(args)
    if args.uses_digits:
        args.image_size = args.image_size or 16  # 8x8 scans leave no room for three stages
    splits = datasets.DatasetDict({name: _rename_columns(split, args, name) for name, split in splits.items()})
    for name, split in splits.items():
        if len(split) == 0:
            raise ValueError(f"Expected images in the {name} split, got an empty one: check its file or folder.")
    if "validation" not in splits:
        try:
            parts = splits["train"].train_test_split(args.train_val_split, seed=seed, stratify_by_column="label")
        except ValueError:  # no class labels yet, or too few images to hold every class twice
            parts = splits["train"].train_test_split(args.train_val_split, seed=seed)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    splits = _unify_labels(splits)
    for name, most in (("train", args.max_train_samples), ("validation", args.max_eval_samples)):
        if most is not None and most < len(splits[name]):
            splits[name] = splits[name].shuffle(seed=seed).select(range(most))
    args.sizes = set().union(*(check_images(split, name) for name, split in splits.items()))
    if args.decode_once is None:
        args.decode_once = len(args.sizes) == 1
    return splits


def _load(args: DataArguments) -> datasets.DatasetDict:
    if args.uses_digits:
        return datasets.DatasetDict({"train": _digits()})
    try:
        if args.dataset_name is not None:
            return datasets.load_dataset(args.dataset_name, args.dataset_config_name)
        kind = "parquet" if args.train_file else "imagefolder"
        files = {"train": args.train_file or args.train_dir, "validation": args.validation_file or args.validation_dir}
        for name, path in files.items():
            if path is not None and not os.path.exists(path):
                raise ValueError(f"Expected a file or folder of {name} images, got {path!r}, which does not exist.")
        if kind == "imagefolder":
            files = {name: os.path.join(path, "**") for name, path in files.items() if path}
        # Split by split: loaded together, all would get the class names of the first.
        return datasets.DatasetDict(
            {
                name: datasets.load_dataset(kind, data_files={name: path}, split=name)
                for name, path in files.items()
                if path
            }
        )
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(
                "Expected images in the train split, got an empty one: check its file or folder."
            ) from error
        if isinstance(error, ValueError):
            raise
        name = args.dataset_name or args.train_file or args.train_dir
        raise ValueError(
            f"Expected a data set on the Hub or on disk, got {name!r}, which cannot be had ({error}). Without a "
            "network, give --train_file (parquet) or --train_dir (folders of images), or fill the cache "
            "(HF_DATASETS_CACHE) on a machine that has one and set HF_HUB_OFFLINE=1."
        ) from error


def _digits() -> datasets.Dataset:
    """Return scikit-learn's 1,797 handwritten digits: real scans of 8x8 pixels that come with the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = [PIL.Image.fromarray((scan * 255 / 16).astype(np.uint8)) for scan in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(n) for n in range(10)])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target}, features=features)


def _rename_columns(split: datasets.Dataset, args: DataArguments, name: str) -> datasets.Dataset:
    """Keep the image and the label column, under the names `image` and `label`."""
    by_type = {
        "image": [column for column, feature in split.features.items() if isinstance(feature, datasets.Image)],
        "label": [column for column, feature in split.features.items() if isinstance(feature, datasets.ClassLabel)],
    }
    found = {}
    for role, given in (("image", args.image_column_name), ("label", args.label_column_name)):
        candidates = [given] if given else [*by_type[role], role]
        column = next((column for column in candidates if column in split.column_names), None)
        if column is None:
            raise ValueError(
                f"Expected a column of {role}s in the {name} split, got the columns {', '.join(split.column_names)}"
                + (f", not {given!r}" if given else "")
                + f": name it with --{role}_column_name."
            )
        found[column] = role
    split = split.select_columns(list(found)).rename_columns({c: role for c, role in found.items() if c != role})
    return (
        split if isinstance(split.features["image"], datasets.Image) else split.cast_column("image", datasets.Image())
    )


def _unify_labels(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """Make `label` one `ClassLabel` over all splits."""
    feature = splits["train"].features["label"]
    if not isinstance(feature, datasets.ClassLabel):
        values = splits["train"].unique("label")
        if all(isinstance(value, int) for value in values):
            feature = datasets.ClassLabel(names=[str(i) for i in range(max(values) + 1)])
        else:
            feature = datasets.ClassLabel(names=sorted(str(value) for value in values))
    for name, split in splits.items():
        own = split.features["label"]
        if isinstance(own, datasets.ClassLabel) and own.names == feature.names:
            continue
        strings = {
            value: own.int2str(value) if isinstance(own, datasets.ClassLabel) else str(value)
            for value in split.unique("label")
        }
        unknown = sorted(set(strings.values()) - set(feature.names))
        if unknown:
            raise ValueError(
                f"Expected labels of the {name} split among the training split's {feature.num_classes} classes, got "
                f"{', '.join(unknown[:5])}: mend the labels, or train on images of those classes too."
            )
        codes = [feature.str2int(strings[value]) for value in split["label"]]
        splits[name] = split.remove_columns("label").add_column("label", codes).cast_column("label", feature)
    return splits


def check_images(split: datasets.Dataset, name: str) -> set[tuple[int, int]]:
    """
    Read the header of every image, so that a file that is none is named now and not in the middle of an epoch.

    Args:
        split (`datasets.Dataset`):
            With a column `image`.
        name (`str`):
            What the split is called.

    Returns:
        `set[tuple[int, int]]`: all (height, width) that there are.

    Raises:
        `ValueError`: the first row that holds no image.
    """
    sizes = set()
    raw = split.select_columns("image").cast_column("image", datasets.Image(decode=False))
    for row, example in enumerate(tqdm(raw, desc=f"Checking {name} images", leave=False)):
        image = example["image"]
        try:
            with PIL.Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
                sizes.add((opened.height, opened.width))
        except (OSError, TypeError, AttributeError, ValueError) as error:
            where = f" ({os.path.basename(image['path'])})" if image and image.get("path") else ""
            raise ValueError(
                f"Expected an image in row {row} of the {name} split{where}, got something that cannot be read as one "
                f"({type(error).__name__}): replace or remove it."
            ) from error
    return sizes
