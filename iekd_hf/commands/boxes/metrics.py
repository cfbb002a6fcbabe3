"""
COCO's detection metrics as an `evaluate.Metric` that works offline, computed by COCO's own evaluator.

pycocotools and not one of its faster rewrites: it is the reference that published figures were made with.
"""

import contextlib
import io
from typing import TYPE_CHECKING

import datasets
import evaluate


if TYPE_CHECKING:
    from pycocotools.coco import COCO


# What COCOeval.summarize() computes, in its order, by the names that transformers' examples use.
SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
SUMMARY += ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")
# Of an annotation, and where it is among those of its image.
_OF_ONE = {"score": "scores", "area": "area", "iscrowd": "iscrowd"}


class CocoDetection(evaluate.Metric):
    """
    Compute mean average precision and recall over classes and over intersections from 0.5 to 0.95.

    `compute(predictions=..., references=...)` takes a dictionary for each image, with boxes [x, y, width, height] in
    pixels of the original image; small ones have up to 32x32 and large ones over 96x96. It returns `map`,
    `map_50`, `map_75`, `map_small` and so on, and with `class_names=[...]` also `map_<name>` (`map_class_<name>` for
    a class called `50` or `small`, whose name is taken). What there are no objects for (small ones, a class) is left
    out; COCO's tools have -1 there.

    Example:

    ```python
    >>> from iekd_hf.commands.boxes.metrics import CocoDetection
    >>> metric = CocoDetection(keep_in_memory=True)
    >>> truth = {"boxes": [[0, 0, 10, 10], [20, 20, 10, 10]], "labels": [0, 1], "area": [100, 100], "iscrowd": [0, 0]}
    >>> found = {"boxes": [[0, 0, 10, 10], [20, 20, 10, 8]], "scores": [0.9, 0.8], "labels": [0, 1]}
    >>> result = metric.compute(predictions=[found], references=[truth], class_names=["cat", "dog"])
    >>> {name: round(result[name], 2) for name in ("map", "map_50", "map_cat", "map_dog")}
    {'map': 0.85, 'map_50': 1.0, 'map_cat': 1.0, 'map_dog': 0.7}

    ```
    """

    def _info(self):
        boxes, numbers = (
            datasets.List(datasets.List(datasets.Value("float32"))),
            datasets.List(datasets.Value("int64")),
        )
        floats = datasets.List(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="COCO's mean average precision and recall.",
            citation="",
            inputs_description="predictions: boxes, scores, labels; references: boxes, labels, area, iscrowd.",
            features=datasets.Features(
                {
                    "predictions": {"boxes": boxes, "scores": floats, "labels": numbers},
                    "references": {"boxes": boxes, "labels": numbers, "area": floats, "iscrowd": numbers},
                }
            ),
        )

    def _compute(self, predictions, references, class_names=None):
        from pycocotools.cocoeval import COCOeval

        labels = {label for image in (*predictions, *references) for label in image["labels"]}
        labels |= set(range(len(class_names or ())))
        with contextlib.redirect_stdout(io.StringIO()):  # which pycocotools fills
            evaluation = COCOeval(_as_coco(references, labels), _as_coco(predictions, labels), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        result = dict(zip(SUMMARY, map(float, evaluation.stats), strict=True))
        # Of shape (intersections, recalls, classes, areas, detections per image); the first area is all, and of
        # detections the last is 100.
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        for index, label in enumerate(evaluation.params.catIds):
            if class_names is not None:
                key = f"map_{class_names[label]}"
                key = f"map_class_{class_names[label]}" if key in SUMMARY else key  # of a class that is called "50"
                result[key] = float(precision[:, :, index].mean())
        return {name: value for name, value in result.items() if value >= 0}


def _as_coco(images: list[dict], labels: set[int]) -> "COCO":
    """Index boxes as COCO's evaluator reads them: true ones with their areas, predicted ones with their scores."""
    from pycocotools.coco import COCO

    annotations = []
    for image_id, image in enumerate(images):
        for row, (box, label) in enumerate(zip(image["boxes"], image["labels"], strict=True)):
            annotation = {"image_id": image_id, "category_id": label, "bbox": box, "area": box[2] * box[3]}
            annotation |= {name: image[key][row] for name, key in _OF_ONE.items() if key in image}
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **annotation})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image_id} for image_id in range(len(images))],
        "categories": [{"id": label} for label in sorted(labels)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco
