"""True boxes as COCO's tools take them: in pixels, inside of their image, with an area."""

import math
from collections.abc import Sequence

import numpy as np


def clean(
    objects: list[dict], sizes: list[tuple[int, int]], name: str, rows: Sequence[int] | None = None
) -> tuple[list[dict], str]:
    """
    Clip boxes to their images and leave out those without area.

    Args:
        objects (`list[dict]`):
            Of each image: `bbox`, `category`, perhaps `area` and `iscrowd`.
        sizes (`list[tuple[int, int]]`):
            (height, width) of each image.
        name (`str`):
            What the split is called.
        rows (`Sequence[int]`, *optional*):
            What the images' rows are called. By default their numbers here.

    Returns:
        `tuple[list[dict], str]`: the objects that are kept, all with `area` and `iscrowd`; and what was done, empty
        where that is nothing.

    Raises:
        `ValueError`: boxes that are not [x, y, width, height] in pixels.

    Example:

    ```python
    >>> from iekd_hf.commands.boxes.clean import clean
    >>> boxes = [[2.0, 2.0, 4.0, 4.0], [6.0, 6.0, 8.0, 2.0], [1.0, 1.0, 0.0, 3.0]]
    >>> clean([{"bbox": boxes, "category": [0, 1, 1]}], [(10, 10)], "train")[0][0]["bbox"]
    [[2.0, 2.0, 4.0, 4.0], [6.0, 6.0, 4.0, 2.0]]
    >>> clean([{"bbox": boxes, "category": [0, 1, 1]}], [(10, 10)], "train")[1]
    '2 of 3 in the train split (1 clipped, 1 without area inside left out)'

    ```
    """
    rows = rows or range(len(objects))
    boxes = [_as_array(image, row, name) for row, image in zip(rows, objects, strict=True)]
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
    parts = [f"{clipped} clipped"] if clipped else []
    parts += [f"{dropped} without area inside left out"] if dropped else []
    count = f"{clipped + dropped} of {sum(map(len, boxes))}"
    return kept, f"{count} in the {name} split ({', '.join(parts)})" if parts else ""


def _as_array(image: dict[str, list], row: int, name: str) -> np.ndarray:
    boxes, categories = image["bbox"], image["category"]
    try:
        array = np.asarray(boxes, dtype=np.float64).reshape(len(boxes), 4)
    except (TypeError, ValueError):
        array = None
    if array is None or not np.isfinite(array).all():
        raise ValueError(
            f"Expected each bbox to be [x, y, width, height] in pixels, got {boxes} in row {row} of the {name} split: "
            "fix or remove it."
        )
    if len(categories) != len(boxes):
        raise ValueError(
            f"Expected a category for each bbox, got {len(categories)} for {len(boxes)} in row {row} of the {name} "
            "split: fix or remove it."
        )
    for key, (expected, suits) in _OPTIONAL.items():
        values = image.get(key) or []
        wrong = [f"{value!r}" for value in values if not (isinstance(value, (int, float)) and suits(value))]
        if values and len(values) != len(boxes):
            wrong = [f"{len(values)} for {len(boxes)}"]
        if wrong:
            raise ValueError(
                f"Expected {expected} as {key} for each bbox, got {wrong[0]} in row {row} of the {name} split: fix "
                "or remove it, or leave that field out."
            )
    return array


# What COCO's tools take in the fields that may be left out.
_OPTIONAL = {
    "area": ("a number of at least 0", lambda value: 0 <= value < math.inf),
    "iscrowd": ("0 or 1", lambda value: value in (0, 1)),
}


def _check_form(boxes: list[np.ndarray], sizes: list[tuple[int, int]], name: str) -> None:
    """Refuse boxes that must be meant otherwise than [x, y, width, height] in pixels."""
    found = np.concatenate(boxes)
    if not len(found):
        return
    ends = np.repeat([(width, height) for height, width in sizes], list(map(len, boxes)), axis=0)
    outside = (found[:, :2] + found[:, 2:] > ends + 1).any(axis=1)
    what = ""
    if found.max() <= 1 and ends.min() > 1:
        what = "numbers from 0 to 1: multiply them by the image's width and height"
    elif outside.mean() > 0.5 and (found[:, 2:] > found[:, :2]).all() and (found[:, 2:] <= ends + 1).all():
        what = "what looks like corners [x0, y0, x1, y1]: subtract the first corner from the second"
    if what:
        raise ValueError(f"Expected bbox as [x, y, width, height] in pixels in the {name} split, got {what}.")
