"""Where a command's images come from: the Hub, files or folders; every image is looked at before training."""

import glob
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import datasets
import PIL.ExifTags
import PIL.Image
import pyarrow
from tqdm.auto import tqdm

from ...data.rgb import explain_undecodable, to_rgb


logger = logging.getLogger(__name__)

# What the validation split is called by those who publish data sets.
_VALIDATION = ("validation", "valid", "val", "dev")
# What a column of labels is called.
_LABELS = ("label", "labels", "class")
# Who reads a file, by its ending.
_READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
# An eighth of the range in 8 bits: no pixel of 12 bits in 16 has more.
_DARK = 32
# Orientations of EXIF at which a camera has been held upright.
_TURNED = (5, 6, 7, 8)


@dataclass
class SourceArguments:
    """Say where the images come from, whatever they are for."""

    _argument_group_name = "Images"

    dataset_name: str | None = field(default=None, metadata={"help": "Data set on the Hub, or a folder of one."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the Hub data set."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with the training images."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same, for validation."})
    train_file: str | None = field(
        default=None, metadata={"help": "Parquet, CSV or JSON file with the training images."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, for validation."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: the one that holds images."}
    )
    train_val_split: float = field(
        default=0.15,
        metadata={"help": "Share of the training split to validate on, where there is no validation split."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only this many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only this many validation images."})

    def __post_init__(self):
        sources = [name for name in ("dataset_name", "train_dir", "train_file") if getattr(self, name) is not None]
        if len(sources) > 1:
            raise ValueError(f"Expected one source of training images, got {' and '.join(sources)}: keep one.")
        given = [name for name in ("validation_dir", "validation_file") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"Expected one source of validation images, got {' and '.join(given)}: keep one.")
        if given and self.train_dir is None and self.train_file is None:
            beside = "none" if self.dataset_name is None else "dataset_name, whose own splits are used"
            raise ValueError(
                f"Expected training images as --train_dir or --train_file beside {given[0]}, got {beside}: give them "
                "too; where nothing is trained, their classes alone are used."
            )
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError("Expected dataset_name beside dataset_config_name, got none: give it too.")
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"Expected {name} of at least 1, or None for all, got {getattr(self, name)}.")
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"Expected train_val_split within (0, 1), got {self.train_val_split}.")
        self.is_given = bool(sources)


def load_source(args: SourceArguments) -> datasets.DatasetDict:
    """Load `train` and whichever other splits the arguments name."""
    try:
        if args.dataset_name is not None:
            return choose_splits(datasets.load_dataset(args.dataset_name, args.dataset_config_name), args.dataset_name)
        files = {"train": args.train_file or args.train_dir, "validation": args.validation_file or args.validation_dir}
        for name, path in files.items():
            if path is not None and not os.path.exists(path):
                raise ValueError(f"Expected a file or folder of {name} images, got {path!r}, which does not exist.")
        # Split by split: loaded together, all would get the class names of the first.
        return datasets.DatasetDict({name: _load_files(path, name) for name, path in files.items() if path})
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(
                "Expected images in the train split, got an empty one: check its file or folder."
            ) from error
        if isinstance(error, ValueError):
            raise
        name = args.dataset_name or args.train_file or args.train_dir
        raise ValueError(
            f"Expected a data set on the Hub or on disk, got {name!r}, which cannot be loaded ({error}). Without a "
            "network, give --train_file (parquet, csv, json) or --train_dir (folders of images), or fill the cache "
            "(HF_DATASETS_CACHE) on a machine that has one and set HF_HUB_OFFLINE=1."
        ) from error


def _load_files(path: str, name: str) -> datasets.Dataset:
    """Load a split from a folder of images, or from a file by whatever reads its ending."""
    if os.path.isdir(path):
        inside = {entry.name for entry in os.scandir(path) if entry.is_dir()}
        if "train" in inside and inside <= {"train", "test", *_VALIDATION}:
            raise ValueError(
                f"Expected one folder for each class in {path!r}, got the splits {', '.join(sorted(inside))}: give "
                "the folder as --dataset_name, or one split as --train_dir and one as --validation_dir."
            )
        return datasets.load_dataset(
            "imagefolder", data_files={name: os.path.join(glob.escape(path), "**")}, split=name
        )
    reader = _READERS.get(os.path.splitext(path)[1].lower())
    if reader is None:
        raise ValueError(f"Expected a file of {name} images that ends in {', '.join(_READERS)}, got {path!r}.")
    try:
        split = datasets.load_dataset(reader, data_files={name: glob.escape(path)}, split=name)
    except (datasets.exceptions.DatasetGenerationError, pyarrow.ArrowInvalid) as error:
        reason = error.__cause__ or error
        raise ValueError(f"Expected a {reader} file of {name} images, got {path!r}: {reason}") from error
    return _find_beside(split, path)


def _find_beside(split: datasets.Dataset, path: str) -> datasets.Dataset:
    """Take paths of images in a file from the file's folder, where the images are there."""
    folder = os.path.dirname(os.path.abspath(path))
    for column, feature in split.features.items():
        if getattr(feature, "dtype", "") not in ("string", "large_string"):
            continue
        values = split[column]
        found = [os.path.join(folder, value) if value else value for value in values]
        if any(value and os.path.isfile(place) for value, place in zip(values, found, strict=True)):
            beside = [
                place if value and os.path.isfile(place) else value for value, place in zip(values, found, strict=True)
            ]
            split = split.remove_columns(column).add_column(column, beside)
    return split


def choose_splits(splits: datasets.DatasetDict, name: str) -> datasets.DatasetDict:
    """
    Keep the splits `train`, `validation`, which has other usual names, and `test`; log which others are not used.

    Args:
        splits (`datasets.DatasetDict`):
            The splits of a data set as it was published.
        name (`str`):
            What the data set is called.

    Returns:
        `datasets.DatasetDict`

    Raises:
        `ValueError`: there is no `train`.

    Example:

    ```python
    >>> import datasets
    >>> from iekd_hf.commands.images.source import choose_splits
    >>> one = datasets.Dataset.from_dict({"label": [0]})
    >>> list(choose_splits(datasets.DatasetDict({"train": one, "dev": one}), "mine"))
    ['train', 'validation']

    ```
    """
    if "train" not in splits:
        raise ValueError(
            f"Expected a split called train in {name!r}, got {', '.join(splits)}: rename the one to train on, or give "
            "its files with --train_file or its folder with --train_dir."
        )
    validation = next((known for known in _VALIDATION if known in splits), None)
    roles = {"train": "train", validation: "validation", "test": "test"}
    unused = [split for split in splits if split not in roles]
    if unused:
        logger.warning("Splits of %s that are not used: %s.", name, ", ".join(unused))
    return datasets.DatasetDict({role: splits[split] for split, role in roles.items() if split in splits})


def find_column(split: datasets.Dataset, name: str, role: str, given: str | None, kind: type | None = None) -> str:
    """
    Find a column by the name that was given, by its type, or by the name of its role.

    Args:
        split (`datasets.Dataset`), name (`str`):
            A split, and what it is called.
        role (`str`):
            What the column holds: `"image"`. It is given as `--<role>_column_name`.
        given (`str`, *optional*):
            The name that was given.
        kind (`type`, *optional*):
            The type of its feature.

    Returns:
        `str`

    Raises:
        `ValueError`: there is none.

    Example:

    ```python
    >>> import datasets
    >>> from iekd_hf.commands.images.source import find_column
    >>> features = datasets.Features({"img": datasets.Image(), "fine": datasets.Value("int64")})
    >>> split = datasets.Dataset.from_dict({"img": [], "fine": []}, features=features)
    >>> find_column(split, "train", "image", None, datasets.Image)
    'img'

    ```
    """
    by_type = [column for column, feature in split.features.items() if kind and isinstance(feature, kind)]
    usual = _LABELS if role == "label" else (role,)
    by_type.sort(key=lambda column: usual.index(column) if column in usual else len(usual))  # of several, one so named
    candidates = [given] if given else [*by_type, role]
    column = next((column for column in candidates if column in split.column_names), None)
    if column is None:
        raise ValueError(
            f"Expected a column of {role}s in the {name} split, got the columns {', '.join(split.column_names)}"
            + (f", not {given!r}" if given else "")
            + f": name it with --{role}_column_name."
        )
    # Images are known by their type; but classes are also what other columns than the labels hold.
    others = [other for other in dict.fromkeys((*by_type, *usual)) if other in split.column_names and other != column]
    if kind is datasets.ClassLabel and not given and column not in usual and others:
        logger.warning(
            "The labels of the %s split are read from its column %s, not from %s: --label_column_name chooses.",
            *(name, column, " or ".join(others)),
        )
    feature = split.features[column]
    if role == "image" and getattr(feature, "dtype", "").startswith(("int", "uint", "float", "bool", "date")):
        raise ValueError(
            f"Expected images, or their paths, in column {column!r} of the {name} split, got {feature}: name another "
            "with --image_column_name."
        )
    return column


def rename_columns(split: datasets.Dataset, roles: dict[str, str]) -> datasets.Dataset:
    """
    Keep some columns under the names of their roles, the one called `image` as images.

    Args:
        split (`datasets.Dataset`):
            A split.
        roles (`dict[str, str]`):
            The role of each column that is kept.

    Returns:
        `datasets.Dataset`

    Example:

    ```python
    >>> import datasets
    >>> from iekd_hf.commands.images.source import rename_columns
    >>> split = datasets.Dataset.from_dict({"path": ["a.png"], "id": [0], "fine": [3]})
    >>> rename_columns(split, {"path": "image", "fine": "label"}).features["image"]
    Image(mode=None, decode=True)

    ```
    """
    split = split.select_columns(list(roles)).rename_columns({c: role for c, role in roles.items() if c != role})
    as_image = isinstance(split.features["image"], datasets.Image)
    return split if as_image else split.cast_column("image", datasets.Image())


def check_filled(splits: datasets.DatasetDict) -> None:
    """Refuse a split without rows."""
    for name, split in splits.items():
        if len(split) == 0:
            raise ValueError(f"Expected images in the {name} split, got an empty one: check its file or folder.")
    if "validation" not in splits and len(splits["train"]) < 2:
        raise ValueError(
            "Expected two images or more in the train split, as a part of it validates, got one: add images, or give "
            "--validation_file or --validation_dir."
        )


def limit(splits: datasets.DatasetDict, args: SourceArguments, seed: int) -> None:
    """Shorten the splits, in place, to as many images as the arguments allow."""
    learnt = args.max_train_samples  # of each kind: together, a few images with a label might all be left out
    for name, most in (("train", learnt), ("unlabelled", learnt), ("validation", args.max_eval_samples)):
        if most is not None and most < len(splits.get(name, ())):
            splits[name] = splits[name].shuffle(seed=seed).select(range(most))


def check_images(split: datasets.Dataset, name: str) -> list[tuple[int, int]]:
    """Return every image's (height, width); one that cannot be decoded is named now, not in the middle of an epoch."""
    sizes, brightest, mode = [], 0, ""
    raw = split.select_columns("image").cast_column("image", datasets.Image(decode=False))
    for row, example in enumerate(tqdm(raw, desc=f"Checking {name} images", leave=False, disable=None)):
        image = example["image"]
        try:
            with PIL.Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
                turned = opened.getexif().get(PIL.ExifTags.Base.Orientation, 1) in _TURNED
                sizes.append((opened.width, opened.height) if turned else (opened.height, opened.width))
                opened.draft(None, (1, 1))  # a JPEG is read to its end, but its pixels are computed at an eighth
                opened.load()
                if opened.mode.startswith(("I", "F")):
                    brightest = max(brightest, to_rgb(opened).getextrema()[0][1])  # refuses those without a range
                    mode = opened.mode
        except Exception as error:  # decoders raise errors of many kinds
            raise ValueError(
                explain_undecodable(image, f"row {original_rows(split)[row]} of the {name} split", error)
            ) from error
    if mode and brightest < _DARK:
        logger.warning(
            "The images of mode %s in the %s split use less than an eighth of their range, as 12 bits in 16 do, and "
            "are dark: scale them to the full range of that mode.",
            *(mode, name),
        )
    return sizes


def original_rows(split: datasets.Dataset) -> Sequence[int]:
    """Return the rows' numbers in the data as they were given, before a part was drawn from them."""
    return range(len(split)) if split._indices is None else split._indices.column(0).to_pylist()
