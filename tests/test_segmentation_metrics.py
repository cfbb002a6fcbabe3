"""Mean IoU: values by hand, batches as one, what is left out, memory that does not grow."""

import numpy as np
import pytest
import torch

from iekd_hf.commands.masks.metrics import MeanIoU, count_pixels


TRUE = [[[0, 0, 1], [1, 2, 255]], [[2, 2, 2], [2, 2, 2]]]
FOUND = [[[0, 1, 1], [1, 2, 0]], [[2, 2, 2], [2, 2, 0]]]


def test_by_hand():
    """Of eleven pixels nine are right; class 0: 1 of 3 in the union, class 1: 2 of 3, class 2: 6 of 7."""
    result = MeanIoU(num_labels=4).compute(predictions=FOUND, references=TRUE, class_names=["a", "b", "c", "d"])
    assert result["overall_accuracy"] == pytest.approx(9 / 11)
    assert result["mean_iou"] == pytest.approx((1 / 3 + 2 / 3 + 6 / 7) / 3)
    assert result["mean_accuracy"] == pytest.approx((1 / 2 + 1 + 6 / 7) / 3)
    assert result["iou_c"] == pytest.approx(6 / 7)
    assert "iou_d" not in result  # which neither occurs nor is predicted


def test_a_class_that_is_predicted_and_never_true_counts():
    result = MeanIoU(num_labels=2).compute(predictions=[[[0, 1]]], references=[[[0, 0]]])
    assert result["mean_iou"] == 0.25 and result["mean_accuracy"] == 0.5


def test_batches_and_single_images_are_as_one():
    metric = MeanIoU(num_labels=3)
    expected = metric.compute(predictions=FOUND, references=TRUE)
    metric.add_batch(predictions=FOUND[:1], references=TRUE[:1])
    metric.add(prediction=np.array(FOUND[1]), reference=torch.tensor(TRUE[1]))
    assert metric.compute() == expected
    metric.add_batch(predictions=FOUND, references=TRUE)
    assert metric.compute() == expected  # nothing is left of the first time


def test_another_label_can_leave_pixels_out():
    counts = count_pixels(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 2]), num_labels=2, ignore_index=2)
    assert counts.tolist() == [[0, 1], [0, 1]]


def test_images_of_several_sizes_are_counted_and_not_kept():
    metric = MeanIoU(num_labels=2)
    metric.add_batch(predictions=[np.zeros((4, 4)), np.ones((2, 3))], references=[np.zeros((4, 4)), np.ones((2, 3))])
    assert metric.counts.tolist() == [[16, 0], [0, 6]] and metric.counts.shape == (2, 2)
    assert metric.writer is None  # of the base class, which would keep them


def test_nothing_to_measure_is_said():
    with pytest.raises(ValueError, match=r"Expected labelled pixels to measure on, got none"):
        MeanIoU(num_labels=2).compute(predictions=[[[0]]], references=[[[255]]])
    with pytest.raises(ValueError, match=r"one size, got \(1, 2\) and \(1, 1\)"):
        MeanIoU(num_labels=2).compute(predictions=[[[0, 0]]], references=[[[0]]])
