"""From images with masks to a segmenter's input: augmentation that moves both, then its image processor."""

import math

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from ..images.jitter import GREY, window
from .data import Masked


def sample_labels(
    labels: np.ndarray, size: tuple[int, int], ignore_index: int, extent: np.ndarray | None = None
) -> np.ndarray:
    """
    Bring a part of a mask to a size by its nearest labels.

    Args:
        labels (`np.ndarray` of shape `(height, width)`):
            The label of each pixel.
        size (`tuple[int, int]`):
            The height and width that are wanted.
        ignore_index (`int`):
            The label of what is outside of the mask.
        extent (`np.ndarray` of shape `(4,)`, *optional*):
            The part, as [`~iekd_hf.commands.images.jitter.window`] gives it. By default all of the mask.

    Returns:
        `np.ndarray` of that size.

    Example:

    ```python
    >>> import numpy as np
    >>> from iekd_hf.commands.masks.transforms import sample_labels
    >>> labels = np.array([[1, 2], [3, 4]])
    >>> sample_labels(labels, (2, 4), ignore_index=255)
    array([[1, 1, 2, 2],
           [3, 3, 4, 4]])
    >>> sample_labels(labels, (2, 2), ignore_index=255, extent=np.array([1.0, -1.0, 3.0, 1.0]))
    array([[255, 255],
           [  2, 255]])

    ```
    """
    height, width = labels.shape
    left, top, right, bottom = (0, 0, width, height) if extent is None else extent
    # Pixels are where their centres are, as for PIL.
    rows = np.floor(top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0]).astype(np.int64)
    columns = np.floor(left + (np.arange(size[1]) + 0.5) * (right - left) / size[1]).astype(np.int64)
    seen = labels[rows.clip(0, height - 1)[:, None], columns.clip(0, width - 1)]
    inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    return np.where(inside, seen, ignore_index)


class SegmentationImages(Dataset):
    """
    Give the examples of a split as a segmenter takes them, augmented by numbers of torch's generator.

    `labels` have the size of `pixel_values`; with `with_masks` there is also `masks`, of the original images' sizes.
    """

    def __init__(
        self,
        split: Masked,
        processor: BaseImageProcessor,
        horizontal_flip: bool = False,
        scale_jitter: float = 1.0,
        with_masks: bool = False,
    ):
        self.split, self.processor, self.with_masks = split, processor, with_masks
        self.horizontal_flip, self.scale_jitter = horizontal_flip, scale_jitter

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """Return examples with `pixel_values` and `labels`, and perhaps `masks`."""
        images, masks = [], []
        for row in self.split.rows(list(map(int, indices))):
            for values, of_row in zip((images, masks), self.augment(*row), strict=True):
                values.append(of_row)
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        size, ignore_index = tuple(pixels.shape[-2:]), self.split.args.ignore_index
        examples = []
        for values, labels in zip(pixels, masks, strict=True):
            example = {"pixel_values": values, "labels": torch.from_numpy(sample_labels(labels, size, ignore_index))}
            examples.append(example | ({"masks": torch.from_numpy(labels)} if self.with_masks else {}))
        return examples

    def augment(self, image: PIL.Image.Image, labels: np.ndarray) -> tuple[PIL.Image.Image, np.ndarray]:
        """Return one image and its labels, flipped and zoomed at random."""
        flips, jitter, *place = torch.rand(4).tolist()
        if self.horizontal_flip and flips < 0.5:
            image, labels = PIL.ImageOps.mirror(image), labels[:, ::-1]
        if self.scale_jitter == 1:
            return image, labels
        extent = window(image.size, math.exp(math.log(self.scale_jitter) * (2 * jitter - 1)), tuple(place))
        resample = PIL.Image.Resampling.BILINEAR
        seen = image.transform(image.size, PIL.Image.Transform.EXTENT, tuple(extent), resample, fillcolor=GREY)
        return seen, sample_labels(labels, labels.shape, self.split.args.ignore_index, extent)


def collate(examples: list[dict]) -> dict:
    """
    Put examples together: pixels and labels as one tensor each, masks as a list.

    Args:
        examples (`list[dict]`):
            What [`SegmentationImages`] gives.

    Returns:
        `dict`: a batch.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.commands.masks.transforms import collate
    >>> example = {"pixel_values": torch.zeros(3, 8, 8), "labels": torch.zeros(8, 8), "masks": torch.zeros(5, 7)}
    >>> batch = collate([example, example])
    >>> batch["labels"].shape, len(batch["masks"])
    (torch.Size([2, 8, 8]), 2)

    ```
    """
    batch = {name: [example[name] for example in examples] for name in examples[0]}
    return {name: values if name == "masks" else torch.stack(values) for name, values in batch.items()}
