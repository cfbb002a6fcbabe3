"""Augmentation of images with masks: a pixel keeps its class, wherever it goes."""

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from iekd_hf.commands.images.jitter import window
from iekd_hf.commands.masks.data import Masked, SegmentationDataArguments
from iekd_hf.commands.masks.shapes import make_masked_shapes
from iekd_hf.commands.masks.tiny_segmenters import tiny_processor
from iekd_hf.commands.masks.transforms import SegmentationImages, collate, sample_labels


def split_of(images, masks, **kwargs) -> Masked:
    as_image = datasets.Features({"image": datasets.Image()}), datasets.Features({"label": datasets.Image()})
    masks = [mask if isinstance(mask, PIL.Image.Image) else PIL.Image.fromarray(mask) for mask in masks]
    columns = {"image": images}, {"label": masks}
    parts = [datasets.Dataset.from_dict(c, f) for c, f in zip(columns, as_image, strict=True)]
    return Masked(*parts, SegmentationDataArguments(**kwargs))


def painted(height: int = 40, width: int = 60) -> tuple[PIL.Image.Image, np.ndarray]:
    """Return an image of large red, green and blue blocks, and its mask."""
    labels = np.kron(np.random.default_rng(0).integers(0, 3, (4, 6)), np.ones((height // 4, width // 6), int))
    return PIL.Image.fromarray(255 * np.eye(3, dtype=np.uint8)[labels]), labels.astype(np.uint8)


@pytest.mark.parametrize("size", [(40, 60), (20, 30), (80, 90)])
def test_pixels_keep_their_classes_through_flips_zooms_and_resizing(size):
    image, labels = painted()
    processor = tiny_processor(*size)
    processor.do_normalize = False
    images = SegmentationImages(split_of([image], [labels]), processor, horizontal_flip=True, scale_jitter=2.0)
    torch.manual_seed(0)
    shares, seen = [], set()
    for _ in range(20):
        example = images[0]
        pixels, found = (example["pixel_values"] * 255).round(), example["labels"]
        assert found.shape == pixels.shape[1:] == size and found.dtype == torch.int64
        pure = (pixels.amax(dim=0) == 255) & (pixels.sum(dim=0) == 255)  # no mixture, nor of the border
        assert torch.equal(pixels.argmax(dim=0)[pure], found[pure])
        border = (pixels == 114).all(dim=0)
        assert (found[border] == 255).all()
        shares.append((pure | border).float().mean().item())
        seen.add(tuple(found.flatten().tolist()))
    assert min(shares) > 0.4 and len(seen) == 20


def test_an_image_zoomed_out_has_a_border_without_labels():
    image, labels = painted()
    extent = window(image.size, 0.5, (0.5, 0.5))
    found = sample_labels(labels, (40, 60), 255, extent)
    assert (found[:10] == 255).all() and (found[:, :15] == 255).all() and (found[10:30, 15:45] != 255).all()
    assert (found[10:30, 15:45] == labels[::2, ::2]).mean() > 0.95


def test_without_augmentation_masks_are_as_they_were():
    images = make_masked_shapes(3, seed=0)
    split = split_of(images["image"], images["label"])
    batch = collate(SegmentationImages(split, tiny_processor(48, 48), with_masks=True).__getitems__([0, 1, 2]))
    for labels, mask, example in zip(batch["labels"], batch["masks"], images, strict=True):
        assert torch.equal(labels, mask) and np.array_equal(mask.numpy(), np.asarray(example["label"]))
    assert batch["pixel_values"].shape == (3, 3, 48, 48)


def test_masks_of_several_sizes_stay_beside_labels_of_one():
    pairs = [painted(), painted(20, 30)]
    split = split_of([image for image, _ in pairs], [labels for _, labels in pairs])
    batch = collate(SegmentationImages(split, tiny_processor(32, 32), with_masks=True).__getitems__([0, 1]))
    assert batch["labels"].shape == (2, 32, 32)
    assert [tuple(mask.shape) for mask in batch["masks"]] == [(40, 60), (20, 30)]


def test_rows_that_are_not_labelled_show_no_class():
    images = make_masked_shapes(3, seed=0)
    split = split_of(images["image"], images["label"])
    hidden = Masked(split.images, split.masks, split.args, frozenset([1]))
    labels = [row["labels"] for row in SegmentationImages(hidden, tiny_processor(48, 48)).__getitems__([0, 1, 2])]
    assert [(of_row == 255).all().item() for of_row in labels] == [True, False, True]


def test_masks_of_palettes_and_of_16_bits_are_numbers():
    labels = np.array([[0, 1, 300, 65535]], dtype=np.uint16)
    small = PIL.Image.fromarray(np.array([[0, 1, 2, 255]], dtype=np.uint8), mode="P")
    small.putpalette([10, 20, 30] * 256)
    image = PIL.Image.new("RGB", (4, 1))
    for mask, kwargs, expected in (
        (PIL.Image.fromarray(labels), {"ignore_index": 65535}, [0, 1, 300, 65535]),
        (small, {}, [0, 1, 2, 255]),
        (small, {"do_reduce_labels": True}, [255, 0, 1, 255]),
        (small, {"do_reduce_labels": True, "ignore_index": 2}, [2, 0, 2, 254]),
    ):
        ((_, found),) = split_of([image], [mask], **kwargs).rows([0])
        assert found.tolist() == [expected]
