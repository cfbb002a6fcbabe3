"""COCO's metrics against cases counted by hand."""

import numpy as np
import pytest

from iekd_hf.commands.boxes.metrics import CocoDetection


def truth(*boxes, labels=None, **columns):
    area = [w * h for _, _, w, h in boxes]
    columns = {"area": area, "iscrowd": [0] * len(boxes), **columns}
    return {"boxes": list(boxes), "labels": labels or [0] * len(boxes), **columns}


def found(*boxes, scores=None, labels=None):
    scores = scores or [0.9 - 0.1 * i for i in range(len(boxes))]
    return {"boxes": list(boxes), "scores": scores, "labels": labels or [0] * len(boxes)}


def compute(predictions, references, **kwargs):
    return CocoDetection(keep_in_memory=True).compute(predictions=predictions, references=references, **kwargs)


def test_all_right_and_all_wrong():
    true = truth([0, 0, 40, 40], [50, 50, 40, 40])
    right = compute([found([0, 0, 40, 40], [50, 50, 40, 40])], [true])
    every = ("map", "map_50", "map_75", "map_medium", "mar_100")
    assert [right[name] for name in every] == pytest.approx([1] * len(every))
    assert right["mar_1"] == 0.5  # of one detection an image, two boxes
    assert "map_small" not in right and "map_large" not in right  # there are none
    wrong = compute([found([200, 200, 40, 40])], [true])
    assert wrong["map"] == wrong["map_50"] == wrong["mar_100"] == 0
    nothing = compute([found()], [true])
    assert nothing["map"] == 0


def test_an_overlap_counts_up_to_its_threshold():
    """A box with an IoU of 0.72 is right at 0.5, 0.55, ..., 0.7: five of the ten thresholds."""
    result = compute([found([0, 0, 72, 100])], [truth([0, 0, 100, 100])])
    assert [result[name] for name in ("map", "map_50", "map_75")] == pytest.approx([0.5, 1, 0])
    assert result["map_large"] == pytest.approx(0.5)


def test_a_false_alarm_between_two_hits():
    """
    Sorted by score: hit, miss, hit, of two boxes. Recall 0.5 comes with precision 1, recall 1 with 2/3; of the 101
    recalls, 51 (0 to 0.5) have precision 1 and 50 have 2/3.
    """
    true = [truth([0, 0, 20, 20], [50, 50, 20, 20])]
    predicted = [found([0, 0, 20, 20], [80, 0, 10, 10], [50, 50, 20, 20], scores=[0.9, 0.8, 0.7])]
    result = compute(predicted, true)
    assert result["map"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert result["map_small"] == pytest.approx(result["map"])
    # Over two images the ranking is common: the same boxes, one in each, give the same.
    apart = compute(
        [found([0, 0, 20, 20], [80, 0, 10, 10], scores=[0.9, 0.8]), found([50, 50, 20, 20], scores=[0.7])],
        [truth([0, 0, 20, 20]), truth([50, 50, 20, 20])],
    )
    assert apart["map"] == pytest.approx(result["map"])
    # A second detection of what is found is a false alarm; after all hits it costs nothing.
    twice = compute([found([0, 0, 20, 20], [0, 0, 20, 20])], [truth([0, 0, 20, 20])])
    assert twice["map"] == pytest.approx(1)


def test_classes_are_counted_apart_and_averaged():
    true = [truth([0, 0, 20, 20], [50, 50, 20, 20], labels=[0, 1]), truth()]
    predicted = [found([0, 0, 20, 20], [50, 50, 20, 20], labels=[0, 2]), found([0, 0, 5, 5], labels=[1])]
    result = compute(predicted, true, class_names=["cat", "dog", "cow"])
    assert (result["map_cat"], result["map_dog"]) == pytest.approx((1, 0))
    assert "map_cow" not in result and result["map"] == pytest.approx(
        0.5
    )  # there is no cow, and nothing to be right about


def test_crowds_are_not_missed_and_sizes_go_by_the_area_given():
    crowd = truth([0, 0, 20, 20], [40, 40, 50, 50], iscrowd=[0, 1])
    assert compute([found([0, 0, 20, 20])], [crowd])["map"] == pytest.approx(1)
    assert compute([found([0, 0, 20, 20], [45, 45, 10, 10])], [crowd])["map"] == pytest.approx(1)
    masked = truth([0, 0, 40, 40], area=[900.0])  # of its mask: a small object in a medium box
    assert compute([found([0, 0, 40, 40])], [masked])["map_small"] == pytest.approx(1)


def test_batches_add_up_and_nothing_is_printed(capsys):
    generator = np.random.default_rng(0)
    boxes = generator.uniform(5, 60, (12, 3, 4)).round(1)
    references = [truth(*image.tolist(), labels=[0, 1, 0]) for image in boxes]
    moved = boxes + generator.normal(0, 4, boxes.shape)
    predictions = [found(*image.tolist(), labels=[0, 1, 1]) for image in moved]
    whole = compute(predictions, references, class_names=["a", "b"])
    metric = CocoDetection(keep_in_memory=True)
    for start in range(0, 12, 5):
        metric.add_batch(predictions=predictions[start : start + 5], references=references[start : start + 5])
    assert metric.compute(class_names=["a", "b"]) == whole and 0 < whole["map"] < 1
    assert capsys.readouterr().out == ""
