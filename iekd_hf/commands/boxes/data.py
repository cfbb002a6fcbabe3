"""Images with boxes: where they come from, what is checked, what is left out."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import datasets
import PIL.Image

from ...data.rgb import to_rgb
from ..images.jitter import JitteredArguments
from ..images.labels import is_missing, name_classes
from ..images.source import (
    check_filled,
    check_images,
    find_column,
    limit,
    load_source,
    original_rows,
    rename_columns,
)
from .clean import clean
from .shapes import make_shapes


logger = logging.getLogger(__name__)

# Images of shapes, where no others are given: for training, and for validation.
_SHAPES = {"train": 1000, "validation": 200}


@dataclass
class DetectionDataArguments(JitteredArguments):
    """Say where images and boxes come from. With none of it, images of simple shapes are drawn."""

    train_dir: str | None = field(
        default=None, metadata={"help": "Folder of training images with a metadata.jsonl that holds `objects`."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Parquet file with images and `objects`."})
    objects_column_name: str = field(
        default="objects",
        metadata={"help": "Column of the objects: `bbox` [x, y, width, height] in pixels, and `category`."},
    )
    image_square_size: int | None = field(
        default=None,
        metadata={
            "help": "Resize the longer side to this many pixels and pad to a square, instead of --image_size. The "
            "student's boxes are then relative to the square, which pipelines take for the image."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.image_square_size is not None and self.image_square_size < 1:
            raise ValueError(f"Expected image_square_size of at least 1 pixel, got {self.image_square_size}.")
        if self.image_size is not None and self.image_square_size is not None:
            raise ValueError("Expected image_size or image_square_size, got both: keep one.")


@dataclass
class Annotated:
    """Hold the images of a split beside their checked objects, row for row."""

    images: datasets.Dataset  # the column `image`
    objects: datasets.Dataset  # `boxes` [x, y, width, height] inside of the image, `labels`, `area`, `iscrowd`

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: list[int]) -> "Annotated":
        """Return some rows as a split of their own."""
        return Annotated(self.images.select(indices), self.objects.select(indices))

    def rows(self, indices: list[int]) -> Iterator[tuple[int, PIL.Image.Image, dict[str, list]]]:
        """Yield the index, the image in RGB and the objects of some rows."""
        images = self.images[indices]["image"]
        for index, image, objects in zip(indices, images, self.truth(indices), strict=True):
            yield index, to_rgb(image), objects

    def truth(self, indices: list[int]) -> list[dict[str, list]]:
        """Return the objects of some rows."""
        columns = self.objects[indices]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def load_annotated(args: DetectionDataArguments, seed: int) -> tuple[dict[str, Annotated], list[str]]:
    """Load the splits and the names of the classes; boxes are clipped, those without area left out and counted."""
    if args.is_given:
        splits = load_source(args)
    else:
        splits = datasets.DatasetDict({name: make_shapes(n, seed=i) for i, (name, n) in enumerate(_SHAPES.items())})
    for name, split in splits.items():
        image = find_column(split, name, "image", args.image_column_name, datasets.Image)
        hidden = name == "test" and split.features.get(args.objects_column_name) in (None, datasets.Value("null"))
        if hidden:
            logger.warning("Objects of the test split are hidden, so it is only predicted.")
            splits[name] = rename_columns(split, {image: "image"})
        else:
            fields_of(split, name, args.objects_column_name)
            splits[name] = rename_columns(split, {image: "image", args.objects_column_name: "objects"})
    check_filled(splits)
    names = _class_names(splits["train"])
    if "validation" not in splits:
        parts = splits["train"].train_test_split(args.train_val_split, seed=seed)
        splits["train"], splits["validation"] = parts["train"], parts["test"]
    limit(splits, args, seed)
    annotated, remarks = {}, []
    for name, split in splits.items():
        sizes = check_images(split, name)
        is_hidden = "objects" not in split.column_names
        objects = [{"bbox": [], "category": []}] * len(split) if is_hidden else _labelled(split, name)
        objects, remark = clean(objects, sizes, name, original_rows(split))
        remarks += [remark] if remark else []
        kind = None if is_hidden else fields_of(split, name, "objects")["category"]
        categories = _codes(objects, kind, names, name, original_rows(split))
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
        logger.warning("Boxes outside their image: %s.", "; ".join(remarks))
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
    >>> from iekd_hf.commands.boxes.data import fields_of
    >>> from iekd_hf.commands.boxes.shapes import make_shapes
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
    if not isinstance(fields["category"], (datasets.ClassLabel, datasets.Value)):
        raise ValueError(
            f"Expected one `category` of each object in the {name} split, a name or a number, got the type "
            f"{fields['category']}: bring the annotations into that form."
        )
    return fields


def _objects(split: datasets.Dataset) -> Iterator[dict[str, list]]:
    """Yield each image's objects as lists by field, empty where it has none."""
    for example in split.select_columns("objects"):
        objects = example["objects"] or []
        if not isinstance(objects, dict):
            objects = {key: [entry[key] for entry in objects] for key in (objects[0] if objects else ())}
        objects = {"bbox": [], "category": [], **{key: each for key, each in objects.items() if each is not None}}
        # pandas makes floats of integers where one is missing
        yield {**objects, "category": [_without_point(value) for value in objects["category"]]}


def _without_point(category):
    return int(category) if isinstance(category, float) and category.is_integer() else category


def _class_names(split: datasets.Dataset) -> list[str]:
    kind = fields_of(split, "train", "objects")["category"]
    if isinstance(kind, datasets.ClassLabel):
        return kind.names
    return name_classes(value for image in _objects(split) for value in image["category"] if not is_missing(value))


def _labelled(split: datasets.Dataset, name: str) -> list[dict[str, list]]:
    """Return the objects; one without a category is refused, but those of a test split may be hidden and are none."""
    kept = []
    for row, image in zip(original_rows(split), _objects(split), strict=True):
        missing = [value for value in image["category"] if is_missing(value) or isinstance(value, float)]
        if missing and name != "test":
            raise ValueError(
                f"Expected a category for every object in the {name} split, got {missing[0]!r} in row {row}: name the "
                "object's category, or remove it."
            )
        kept.append({"bbox": [], "category": []} if missing else image)
    return kept


def _codes(objects: list[dict], kind, names: list[str], name: str, rows: Sequence[int]) -> list[list[int]]:
    """Return the categories as indices of the training split's names."""
    own = kind.names if isinstance(kind, datasets.ClassLabel) else None
    index = {label: code for code, label in enumerate(names)}
    codes = []
    for row, image in zip(rows, objects, strict=True):
        for value in image["category"]:
            label = value if own is None else own[value] if 0 <= value < len(own) else None
            if str(label) not in index:
                raise ValueError(
                    f"Expected categories of the {name} split among the training split's {len(names)} classes, got "
                    f"{value if label is None else label!r} in row {row}: fix it, or train on images of that class "
                    "too."
                )
        labels = image["category"] if own is None else [own[value] for value in image["category"]]
        codes.append([index[str(label)] for label in labels])
    return codes
