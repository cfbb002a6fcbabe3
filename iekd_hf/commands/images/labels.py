"""Labels as people write them, brought to classes from 0 on; what is no class is refused before anything trains."""

import logging
import os
from collections import Counter
from collections.abc import Iterable

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder


logger = logging.getLogger(__name__)

# What a class is given as.
_Label = str | int | bool


def name_classes(values: Iterable[_Label]) -> list[str]:
    """
    Name the classes after the labels that occur, in their order.

    Args:
        values (`Iterable` of `str`, `int` or `bool`):
            The labels, each once or more often.

    Returns:
        `list[str]`: the names; numbers that leave some out become dense classes, which is logged.

    Example:

    ```python
    >>> from iekd_hf.commands.images.labels import name_classes
    >>> name_classes([10002, 10001, 10002]), name_classes(["dog", "cat"]), name_classes([True, False])
    (['10001', '10002'], ['cat', 'dog'], ['False', 'True'])

    ```
    """
    kinds = set(values)
    numbers = all(isinstance(value, int) for value in kinds)
    names = [str(value) for value in (sorted(kinds) if numbers else sorted(kinds, key=str))]
    if (
        numbers
        and not any(isinstance(value, bool) for value in kinds)
        and names != [str(i) for i in range(len(names))]
    ):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        logger.warning("The labels %s become the classes 0 to %d, with the labels as names.", shown, len(names) - 1)
    return names


def check_class_folders(path: str) -> None:
    """Refuse a folder in which classes cannot be told by the folders of the images; with metadata it is not asked."""
    holding = []
    for place, folders, files in os.walk(path, followlinks=True):
        if not set(files).isdisjoint(ImageFolder.METADATA_FILENAMES):
            return
        folders[:] = [folder for folder in folders if not folder.startswith((".", "__"))]  # which datasets leaves out
        if any(os.path.splitext(file)[1].lower() in ImageFolder.EXTENSIONS for file in files):
            holding.append(place)
    twice = [name for name, count in Counter(map(os.path.basename, holding)).items() if count > 1]
    around = [place for place in holding if any(other.startswith(place + os.sep) for other in holding)]
    if twice:
        found = f"several folders called {' and several '.join(sorted(twice))}, each of which would be one class"
    elif around:
        found = f"images in {around[0]!r} and in folders within it"
    elif len(holding) == 1:
        found = f"images in {holding[0]!r} alone"
    else:
        return
    raise ValueError(
        f"Expected a folder of images for each class in {path!r}, got {found}: move them, or name the classes in a "
        "metadata.csv with the columns file_name and label."
    )


def unify_labels(splits: datasets.DatasetDict, unlabelled: bool = False) -> datasets.DatasetDict:
    """
    Make `label` one `ClassLabel` over all splits; a test split whose labels are hidden loses the column.

    With `unlabelled`, training images may lack a label.
    """
    labelled = {name: split for name, split in splits.items() if "label" in split.column_names}
    values = {name: _values(split, name, unlabelled and name == "train") for name, split in labelled.items()}
    known = [value for value in values["train"] if value is not None]
    if not known:
        raise ValueError("Expected some training images with a label, got none: a classifier needs its classes.")
    feature = splits["train"].features["label"]
    if not isinstance(feature, datasets.ClassLabel):
        feature = datasets.ClassLabel(names=name_classes(known))
    if feature.num_classes < 2:
        raise ValueError(
            f"Expected images of two classes or more, got the label {', '.join(feature.names)} alone: check the file, "
            "or name another column with --label_column_name."
        )
    unified = datasets.DatasetDict()
    for name, split in splits.items():
        own = split.features.get("label")
        unified[name] = split
        if own is None:
            continue
        if values[name] is None:
            logger.warning("Labels of the %s split are hidden, so it is only predicted, without metrics.", name)
            unified[name] = split.remove_columns("label")
            continue
        if isinstance(own, datasets.ClassLabel) and own.names == feature.names:
            continue
        write = own.int2str if isinstance(own, datasets.ClassLabel) else str
        strings = [None if value is None else write(value) for value in values[name]]
        unknown = sorted(set(strings) - {None, *feature.names})
        if unknown:
            raise ValueError(
                f"Expected labels of the {name} split among the training split's {feature.num_classes} classes, got "
                f"{', '.join(unknown[:5])}: fix the labels, or train on images of those classes too."
            )
        codes = [None if string is None else feature.str2int(string) for string in strings]
        unified[name] = split.remove_columns("label").add_column("label", codes).cast_column("label", feature)
    return unified


def set_unlabelled_apart(splits: datasets.DatasetDict) -> None:
    """Make the training images without a label a split of their own, `unlabelled`, in place."""
    train = splits["train"]
    if any(map(is_missing, train["label"][:])):
        for name, wanted in (("train", False), ("unlabelled", True)):
            # Not `select`, which forgets what rows they were where one follows the other.
            splits[name] = train.filter(
                lambda labels, wanted=wanted: [is_missing(label) == wanted for label in labels],
                input_columns="label",
                batched=True,
                keep_in_memory=True,
                load_from_cache_file=False,
            )
        splits["unlabelled"] = splits["unlabelled"].remove_columns("label")


def _values(split: datasets.Dataset, name: str, may_lack: bool) -> list[_Label | None] | None:
    """Return the labels of a split, `None` for a missing one; `None` for all of a test split where one is missing."""
    feature = split.features["label"]
    dtype = getattr(feature, "dtype", "")
    if not isinstance(feature, (datasets.ClassLabel, datasets.Value)) or not (
        dtype in ("string", "large_string", "bool", "null") or dtype.startswith(("int", "uint", "float"))
    ):
        raise ValueError(
            f"Expected one class as the label of each image in the {name} split, got the type {feature}: this command "
            "distils classifiers; for several labels an image use IEKDTrainer with a student whose problem_type is "
            "multi_label_classification, or name another column with --label_column_name."
        )
    values = split["label"][:]
    for row, value in enumerate(values):
        if is_missing(value):
            if may_lack:
                continue
            if name == "test":
                return None
            raise ValueError(
                f"Expected a label in every row of the {name} split, got {value!r} in row {row}: remove the row, or "
                "label it; iekd-hf distill takes training images without a label with --unlabelled true. (Labels "
                "below 0 count as missing; if they are classes, write them as names.)"
            )
        if isinstance(feature, datasets.ClassLabel) and value >= feature.num_classes:
            raise ValueError(
                f"Expected labels of the {name} split from 0 to {feature.num_classes - 1}, got {value} in row "
                f"{row}: fix it."
            )
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(
                f"Expected classes as labels of the {name} split, got {value} in row {row}: this command distils "
                "classifiers; for targets of a regression use IEKDTrainer with a student of num_labels=1."
            )
    values = [None if is_missing(value) else value for value in values]
    return [int(value) if isinstance(value, float) else value for value in values]


def is_missing(value: _Label | float | None) -> bool:
    """Return whether a label stands for none: null, empty, NaN or below 0."""
    return value is None or (not value if isinstance(value, str) else not value >= 0)
