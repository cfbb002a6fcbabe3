"""Images with boxes for the detection example: where they come from, what is checked, what is left out."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import datasets
import numpy as np
import PIL.Image
from image_source import SourceArguments, check_filled, check_images, find_column, limit, load_source, rename_columns
from shapes import make_shapes


logger = logging.getLogger(__name__)

# Images of shapes, where no others are given: for training, and for validation.
_SHAPES = {"train": 800, "validation": 200}


@dataclass
class DetectionDataArguments(SourceArguments):
    """Say where images and boxes come from. With none of it, images of simple shapes are drawn."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of training images with a metadata.jsonl that holds `objects`."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Parquet file with images and `objects`."})
    objects_column_name: str = field(
        default="objects",
        metadata={"help": "Column of the objects: `bbox` [x, y, width, height] in pixels, and `category`."},
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Height and width in pixels that images are resized to. Default: the pretrained student's way, or "
            "else the first image's own size."
        },
    )
    image_square_size: int | None = field(
        default=None,
        metadata={"help": "Resize the longer side to this many pixels and pad to a square, instead of --image_size."},
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Flip training images at random."})
    scale_jitter: float = field(
        default=1.5,
        metadata={
            "help": "Zoom training images in (a crop) or out (with a border) by up to this factor at random; 1 for "
            "neither."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ValueError(f"Expected image_size to be height and width, got {self.image_size}.")
        if self.image_size is not None and self.image_square_size is not None:
            raise ValueError("Expected image_size or image_square_size, got both: keep one.")
        if not self.scale_jitter >= 1:
            raise ValueError(f"Expected scale_jitter of at least 1, got {self.scale_jitter}.")


@dataclass
class Annotated:
    """
    Hold the images of a split beside their checked objects.

    Args:
        images (`datasets.Dataset`):
            With a column `image`.
        objects (`datasets.Dataset`):
            Row for row, the columns `boxes` [x, y, width, height] inside of the image, `labels`, `area`, `iscrowd`.
    """

    images: datasets.Dataset
    objects: datasets.Dataset

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, indices: list[int]) -> Iterator[tuple[int, PIL.Image.Image, dict[str, list]]]:
        """Yield the index, the image in RGB and the objects of some rows."""
        images = self.images[indices]["image"]
        for index, image, objects in zip(indices, images, self.truth(indices), strict=True):
            yield index, image.convert("RGB"), objects

    def truth(self, indices: list[int]) -> list[dict[str, list]]:
        """Return the objects of some rows."""
        columns = self.objects[indices]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def load_annotated(args: DetectionDataArguments, seed: int) -> tuple[dict[str, Annotated], list[str]]:
    """
    Load the data and bring it into one form.

    Boxes are clipped to their image, those without area are left out, as COCO's tools do; both are counted and
    reported.

    Args:
        args (`DetectionDataArguments`):
            Where it comes from.
        seed (`int`):
            Seed of the validation split, where one is cut off.

    Returns:
        `tuple`: the splits `train`, `validation` and perhaps `test`, and the names of the classes.

    Raises:
        `ValueError`: no such data, an empty split or one without boxes, annotations of another form, a category
        outside the label map, a file that is no image.
    """
    if args.is_given:
        splits = load_source(args)
    else:
        splits = datasets.DatasetDict({name: make_shapes(n, seed=i) for i, (name, n) in enumerate(_SHAPES.items())})
    for name, split in splits.items():
        image = find_column(split, name, "image", args.image_column_name, datasets.Image)
        fields_of(split, name, args.objects_column_name)
        splits[name] = rename_columns(split, {image: "image", args.objects_column_name: "objects"})
    check_filled(splits)
    if "validation" not in splits:
        parts = splits["train"].train_test_split(args.train_val_split, seed=seed)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    limit(splits, args, seed)
    names = _class_names(splits["train"])
    annotated, remarks = {}, []
    for name, split in splits.items():
        sizes = check_images(split, name)
        objects, remark = clean(list(_objects(split)), sizes, name)
        remarks += [remark] if remark else []
        categories = _codes(objects, fields_of(split, name, "objects")["category"], names, name)
        if name != "test" and not any(len(image["bbox"]) for image in objects):
            raise ValueError(f"Expected boxes in the {name} split, got none in {len(objects)} images: check its file.")
        columns = {
            "boxes": [image["bbox"] for image in objects],
            "labels": categories,
            "area": [image["area"] for image in objects],
            "iscrowd": [image["iscrowd"] for image in objects],
        }
        annotated[name] = Annotated(split.select_columns("image"), datasets.Dataset.from_dict(columns, _FEATURES))
    if remarks:
        logger.warning("Boxes that do not fit their image: %s.", "; ".join(remarks))
    return annotated, names


_FEATURES = datasets.Features(
    {
        "boxes": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
        "labels": datasets.List(datasets.Value("int64")),
        "area": datasets.List(datasets.Value("float32")),
        "iscrowd": datasets.List(datasets.Value("int64")),
    }
)


def fields_of(split: datasets.Dataset, name: str, column: str) -> dict:
    """
    Return the features of an image's objects, as `{"bbox": ..., "category": ...}`.

    Args:
        split (`datasets.Dataset`), name (`str`):
            A split, and what it is called.
        column (`str`):
            The column of the objects: lists by field, or a list with a dictionary for each object.

    Raises:
        `ValueError`: annotations of another form.

    Example:

    ```python
    >>> from detection_data import fields_of
    >>> from shapes import make_shapes
    >>> fields_of(make_shapes(1, seed=0), "train", "objects")["category"].names
    ['circle', 'square', 'triangle', 'cross']

    ```
    """
    feature = split.features.get(column)
    fields = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
    if not isinstance(fields, dict) or not {"bbox", "category"} <= fields.keys():
        has = f"the fields {', '.join(fields)}" if isinstance(fields, dict) else f"{fields}"
        got = has if column in split.features else f"the columns {', '.join(split.column_names)}"
        raise ValueError(
            f"Expected a column {column!r} in the {name} split, with `bbox` [x, y, width, height] in pixels and "
            f"`category` of each object, got {got}: bring the annotations into that form, or name their column with "
            "--objects_column_name."
        )
    if fields is feature:  # lists by field: what is in them
        fields = {key: getattr(value, "feature", value) for key, value in fields.items()}
    return fields


def _objects(split: datasets.Dataset) -> Iterator[dict[str, list]]:
    """Yield each image's objects as lists by field."""
    for example in split.select_columns("objects"):
        objects = example["objects"]
        if isinstance(objects, dict):
            yield objects
        else:
            keys = ("bbox", "category", "area", "iscrowd")
            yield {key: [entry[key] for entry in objects] for key in keys if not objects or key in objects[0]}


def clean(objects: list[dict], sizes: list[tuple[int, int]], name: str) -> tuple[list[dict], str]:
    """
    Clip boxes to their images and leave out those without area.

    Args:
        objects (`list[dict]`):
            Of each image: `bbox`, `category`, perhaps `area` and `iscrowd`.
        sizes (`list[tuple[int, int]]`):
            (height, width) of each image.
        name (`str`):
            What the split is called.

    Returns:
        `tuple[list[dict], str]`: the objects that are kept, all with `area` and `iscrowd`; and what was done, empty
        where that is nothing.

    Raises:
        `ValueError`: boxes that are not [x, y, width, height] in pixels.

    Example:

    ```python
    >>> from detection_data import clean
    >>> boxes = [[2.0, 2.0, 4.0, 4.0], [6.0, 6.0, 8.0, 2.0], [1.0, 1.0, 0.0, 3.0]]
    >>> clean([{"bbox": boxes, "category": [0, 1, 1]}], [(10, 10)], "train")[0][0]["bbox"]
    [[2.0, 2.0, 4.0, 4.0], [6.0, 6.0, 4.0, 2.0]]
    >>> clean([{"bbox": boxes, "category": [0, 1, 1]}], [(10, 10)], "train")[1]
    'of 3 in the train split 1 is clipped to it, 1 without area inside of it is left out'

    ```
    """
    boxes = [_as_array(image["bbox"], row, name) for row, image in enumerate(objects)]
    _check_form(boxes, sizes, name)
    kept, clipped, dropped = [], 0, 0
    for image, found, (height, width) in zip(objects, boxes, sizes, strict=True):
        start = found[:, :2].clip(0, [width, height])
        end = (found[:, :2] + found[:, 2:]).clip(0, [width, height])
        inside = np.concatenate([start, end - start], axis=1)
        keep = (inside[:, 2:] > 0).all(axis=1)
        changed = keep & (np.abs(inside - found) > 0.01).any(axis=1)
        clipped, dropped = clipped + int(changed.sum()), dropped + int((~keep).sum())
        area = np.where(changed, inside[:, 2] * inside[:, 3], image.get("area") or found[:, 2] * found[:, 3])
        columns = {"bbox": inside.tolist(), "category": image["category"], "area": area.tolist()}
        columns["iscrowd"] = image.get("iscrowd") or [0] * len(found)
        kept.append(
            {key: [v for v, good in zip(values, keep, strict=True) if good] for key, values in columns.items()}
        )
    parts = [f"{clipped} {'is' if clipped == 1 else 'are'} clipped to it"] if clipped else []
    parts += [f"{dropped} without area inside of it {'is' if dropped == 1 else 'are'} left out"] if dropped else []
    return kept, f"of {sum(map(len, boxes))} in the {name} split {', '.join(parts)}" if parts else ""


def _as_array(boxes: list, row: int, name: str) -> np.ndarray:
    try:
        array = np.asarray(boxes, dtype=np.float64).reshape(len(boxes), 4)
    except (TypeError, ValueError):
        array = None
    if array is None or not np.isfinite(array).all():
        raise ValueError(
            f"Expected each bbox to be [x, y, width, height] in pixels, got {boxes} in row {row} of the {name} split: "
            "mend or remove it."
        )
    return array


def _check_form(boxes: list[np.ndarray], sizes: list[tuple[int, int]], name: str) -> None:
    """Refuse boxes that must be meant otherwise than [x, y, width, height] in pixels."""
    found = np.concatenate(boxes)
    if not len(found):
        return
    ends = np.repeat([(width, height) for height, width in sizes], list(map(len, boxes)), axis=0)
    outside = (found[:, :2] + found[:, 2:] > ends + 1).any(axis=1)
    what = ""
    if found.max() <= 1 and ends.min() > 1:
        what = "numbers from 0 to 1: multiply them with the image's width and height"
    elif outside.mean() > 0.5 and (found[:, 2:] > found[:, :2]).all() and (found[:, 2:] <= ends + 1).all():
        what = "what looks like corners [x0, y0, x1, y1]: subtract the first corner from the second"
    if what:
        raise ValueError(f"Expected bbox as [x, y, width, height] in pixels in the {name} split, got {what}.")


def _class_names(split: datasets.Dataset) -> list[str]:
    kind = fields_of(split, "train", "objects")["category"]
    if isinstance(kind, datasets.ClassLabel):
        return kind.names
    values = {value for image in _objects(split) for value in image["category"]}
    if all(isinstance(value, int) for value in values):
        return [str(code) for code in range(max(values, default=0) + 1)]
    return sorted(map(str, values))


def _codes(objects: list[dict], kind, names: list[str], name: str) -> list[list[int]]:
    """Return the categories as indices of the training split's names."""
    own = kind.names if isinstance(kind, datasets.ClassLabel) else None
    index = {label: code for code, label in enumerate(names)}
    codes = []
    for row, image in enumerate(objects):
        for value in image["category"]:
            label = value if own is None else own[value] if 0 <= value < len(own) else None
            if str(label) not in index:
                raise ValueError(
                    f"Expected categories of the {name} split among the training split's {len(names)} classes, got "
                    f"{value if label is None else label!r} in row {row}: mend it, or train on images of that class "
                    "too."
                )
        labels = image["category"] if own is None else [own[value] for value in image["category"]]
        codes.append([index[str(label)] for label in labels])
    return codes
