"""Augmentation and processing keep boxes on what they enclose: squares are drawn, moved, and found by their pixels."""

import datasets
import numpy as np
import PIL.Image
import PIL.ImageDraw
import pytest
import torch
from transformers import DetrImageProcessorPil, YolosImageProcessorPil

from iekd_hf.commands.boxes.data import Annotated
from iekd_hf.commands.boxes.shapes import box_of
from iekd_hf.commands.boxes.tiny_detectors import tiny_processor
from iekd_hf.commands.boxes.trainers import to_boxes
from iekd_hf.commands.boxes.transforms import MIN_VISIBLE, DetectionImages, collate, flip, zoom


def square(box=(20, 10, 24, 16), size=(96, 64)):
    image = PIL.Image.new("RGB", size)
    x, y, width, height = box
    PIL.ImageDraw.Draw(image).rectangle([x, y, x + width - 1, y + height - 1], fill=(255, 255, 255))
    return image, np.array([box], dtype=float)


def found(image):
    """Return the box of what is white."""
    return np.array(box_of(np.asarray(image.convert("L")) > 180))


def split_of(images, boxes, labels=None):
    labels = labels or [[0] * len(image) for image in boxes]
    area = [[w * h for _, _, w, h in image] for image in boxes]
    crowd = [[0] * len(image) for image in boxes]
    objects = {"boxes": boxes, "labels": labels, "area": area, "iscrowd": crowd}
    features = datasets.Features({"image": datasets.Image()})
    return Annotated(datasets.Dataset.from_dict({"image": images}, features), datasets.Dataset.from_dict(objects))


def test_flip():
    image, boxes = square()
    flipped, moved = flip(image, boxes)
    assert moved.tolist() == [[52.0, 10.0, 24.0, 16.0]] and found(flipped).tolist() == moved[0].tolist()
    again, back = flip(flipped, moved)
    assert np.array_equal(np.asarray(again), np.asarray(image)) and np.array_equal(back, boxes)


@pytest.mark.parametrize("factor", [0.6, 0.8, 1.0, 1.3, 1.8])
@pytest.mark.parametrize("place", [(0.0, 0.0), (0.35, 0.8), (1.0, 1.0)])
def test_zoom_finds_the_square_again(factor, place):
    image, boxes = square()
    seen, moved, kept = zoom(image, boxes, factor, place)
    assert seen.size == image.size
    if not len(kept):
        start = (np.array([96, 64]) * (1 - 1 / factor)) * place
        part = np.minimum(boxes[0, :2] + boxes[0, 2:], start + np.array([96, 64]) / factor) - np.maximum(
            boxes[0, :2], start
        )
        assert part.clip(0).prod() < MIN_VISIBLE * boxes[0, 2:].prod()
        return
    # Bilinear edges are soft: half a pixel, or that of the original where it is enlarged.
    assert np.abs(found(seen) - moved[0]).max() <= max(1.0, factor)
    corners = moved[0, :2] + moved[0, 2:]
    assert moved.min() >= 0 and (corners <= [96, 64]).all()


def test_zoom_by_hand():
    """Twice as large from the lower right quarter: one box is cut in half, one loses all but a tenth, one is gone."""
    image = PIL.Image.new("RGB", (40, 20))
    boxes = np.array([[18.0, 12.0, 4.0, 4.0], [11.0, 12.0, 10.0, 4.0], [0.0, 0.0, 5.0, 5.0], [30.0, 14.0, 4.0, 2.0]])
    _, moved, kept = zoom(image, boxes, 2.0, (1.0, 1.0))
    assert kept.tolist() == [0, 3]
    assert moved.tolist() == [[0.0, 4.0, 4.0, 8.0], [20.0, 8.0, 8.0, 4.0]]
    canvas, moved, kept = zoom(PIL.Image.new("RGB", (40, 20), "white"), boxes, 0.5, (0.5, 0.5))
    assert kept.tolist() == [0, 1, 2, 3] and moved[2].tolist() == [10.0, 5.0, 2.5, 2.5]
    assert found(canvas).tolist() == [10, 5, 20, 10] and canvas.getpixel((0, 0)) == (114, 114, 114)


def test_examples_are_augmented_anew_and_boxes_stay_on_the_square():
    images, boxes = zip(*(square((8 + 5 * i, 6 + 3 * i, 22, 18)) for i in range(8)), strict=True)
    split = split_of(list(images), [box.tolist() for box in boxes], [[i % 3] for i in range(8)])
    processor = tiny_processor(64, 96)
    torch.manual_seed(0)
    train = DetectionImages(split, processor, horizontal_flip=True, scale_jitter=1.6)
    batches = [train.__getitems__(list(range(8))) for _ in range(2)]
    assert not torch.equal(batches[0][0]["pixel_values"], batches[1][0]["pixel_values"])
    seen = 0
    for example in batches[0] + batches[1]:
        for box in example["labels"]["boxes"]:
            centre_x, centre_y, width, height = (box * torch.tensor([96, 64, 96, 64])).tolist()
            drawn = box_of((example["pixel_values"].mean(dim=0) > 0.5).numpy())
            expected = [centre_x - width / 2, centre_y - height / 2, width, height]
            assert np.abs(np.array(drawn) - expected).max() <= 1.7
            seen += 1
    assert seen >= 12
    torch.manual_seed(0)
    same = train.__getitems__(list(range(8)))
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(same, batches[0], strict=True))


PROCESSORS = {
    "fixed size": tiny_processor(64, 64),
    "padded square": tiny_processor(64, 64),
    "DETR": DetrImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 80}),
    "YOLOS": YolosImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 80}),
}
PROCESSORS["padded square"].size = {"max_height": 64, "max_width": 64}
PROCESSORS["padded square"].do_pad, PROCESSORS["padded square"].pad_size = True, {"height": 64, "width": 64}


@pytest.mark.parametrize("num_classes", [3, 4], ids=["no object", "each class"])
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_what_a_perfect_detector_says_is_the_truth_in_original_pixels(processor, num_classes):
    """
    Whatever is resized and padded, in a batch of images of several sizes; and whoever made the pixels: a detector of
    one family may be the teacher of another's student.
    """
    images, boxes = zip(square(), square((5, 30, 20, 40), (50, 80)), square((0, 0, 120, 60), (120, 60)), strict=True)
    truth = [box.tolist() for box in boxes[:2]] + [[]]
    examples = DetectionImages(split_of(list(images), truth, [[1], [2], []]), processor).__getitems__([0, 1, 2])
    batch = collate(examples)
    assert len({tuple(example["pixel_values"].shape) for example in examples}) == 1
    pred_boxes, logits = torch.full((3, 2, 4), 0.5), torch.full((3, 2, 4), -20.0)
    for row, label in enumerate(batch["labels"]):
        for query, (box, name) in enumerate(zip(label["boxes"], label["class_labels"], strict=True)):
            pred_boxes[row, query], logits[row, query, name] = box, 20.0
    frames = torch.stack([label["frame"] for label in batch["labels"]])
    predicted = to_boxes(logits, pred_boxes, frames, num_classes, threshold=0.5)
    for image, true, labels in zip(predicted, truth, ([1], [2], []), strict=True):
        np.testing.assert_allclose(np.reshape(image["boxes"], (-1, 4)), np.reshape(true, (-1, 4)), atol=1e-3)
        assert image["labels"] == labels
    assert [label["image_id"].item() for label in batch["labels"]] == [0, 1, 2]
