"""
From annotated images to a detector's input: augmentation that moves the boxes with the pixels, then its processor.

kornia's containers move boxes too, but place them by pixel centres: scaled boxes are off by up to a pixel, they are
neither clipped nor dropped when a crop cuts them, and images of several sizes go through one by one.
"""

import math

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from ..images.jitter import GREY, window
from .data import Annotated


# A box is dropped if a crop leaves less than this share of its area.
MIN_VISIBLE = 0.3


def flip(image: PIL.Image.Image, boxes: np.ndarray) -> tuple[PIL.Image.Image, np.ndarray]:
    """
    Flip an image and its boxes from left to right.

    Args:
        image (`PIL.Image.Image`):
            The image.
        boxes (`np.ndarray` of shape `(num_boxes, 4)`):
            x, y, width and height in pixels.

    Returns:
        `tuple`: the new image and boxes.

    Example:

    ```python
    >>> import numpy as np, PIL.Image
    >>> from iekd_hf.commands.boxes.transforms import flip
    >>> flip(PIL.Image.new("RGB", (10, 8)), np.array([[1.0, 2.0, 3.0, 4.0]]))[1]
    array([[6., 2., 3., 4.]])

    ```
    """
    mirrored = boxes.copy()
    mirrored[:, 0] = image.width - boxes[:, 0] - boxes[:, 2]
    return PIL.ImageOps.mirror(image), mirrored


def zoom(
    image: PIL.Image.Image, boxes: np.ndarray, factor: float, place: tuple[float, float]
) -> tuple[PIL.Image.Image, np.ndarray, np.ndarray]:
    """
    Scale an image and keep its size: a crop of the larger one, or the smaller one on a grey canvas.

    Args:
        image (`PIL.Image.Image`):
            The image.
        boxes (`np.ndarray` of shape `(num_boxes, 4)`):
            x, y, width and height in pixels.
        factor (`float`):
            How much larger things become.
        place (`tuple[float, float]`):
            Where the crop is in the image, or the image on the canvas: from (0, 0), left and top, to (1, 1).

    Returns:
        `tuple`: the image, the boxes that stay, clipped to it, and their indices.

    Example:

    ```python
    >>> import numpy as np, PIL.Image
    >>> from iekd_hf.commands.boxes.transforms import zoom
    >>> boxes = np.array([[0.0, 0.0, 4.0, 4.0], [6.0, 6.0, 2.0, 2.0]])
    >>> zoom(PIL.Image.new("RGB", (8, 8)), boxes, factor=2, place=(0, 0))[1:]
    (array([[0., 0., 8., 8.]]), array([0]))
    >>> zoom(PIL.Image.new("RGB", (8, 8)), boxes, factor=0.5, place=(1, 0))[1]
    array([[4., 0., 2., 2.],
           [7., 3., 1., 1.]])

    ```
    """
    extent = window(image.size, factor, place)
    seen = image.transform(
        image.size, PIL.Image.Transform.EXTENT, extent, PIL.Image.Resampling.BILINEAR, fillcolor=GREY
    )
    start = extent[:2]
    corners = np.concatenate([boxes[:, :2] - start, boxes[:, :2] + boxes[:, 2:] - start], axis=1) * factor
    inside = corners.clip(0, np.tile(image.size, 2))
    inside = np.concatenate([inside[:, :2], inside[:, 2:] - inside[:, :2]], axis=1)
    whole = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
    kept = np.flatnonzero(inside[:, 2:].prod(axis=1) >= MIN_VISIBLE * whole)
    return seen, inside[kept], kept


class DetectionImages(Dataset):
    """Give the examples of a split as a detector takes them, augmented by numbers of torch's generator."""

    def __init__(
        self,
        split: Annotated,
        processor: BaseImageProcessor,
        horizontal_flip: bool = False,
        scale_jitter: float = 1.0,
    ):
        self.split, self.processor = split, processor
        self.horizontal_flip, self.scale_jitter = horizontal_flip, scale_jitter

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """Return examples with `pixel_values`, `labels`, and `pixel_mask` where the processor pads."""
        images, annotations, sizes = [], [], []
        for index, image, objects in self.split.rows(list(map(int, indices))):
            sizes.append((image.height, image.width))
            augmented, there = self.augment(image, objects)
            fields = zip(*(there[name] for name in ("boxes", "labels", "area", "iscrowd")), strict=True)
            keys = ("bbox", "category_id", "area", "iscrowd")
            annotations.append(
                {"image_id": index, "annotations": [dict(zip(keys, values, strict=True)) for values in fields]}
            )
            images.append(augmented)
        batch = self.processor(images, annotations=annotations, return_tensors="pt")
        masks = batch.get("pixel_mask")
        examples = []
        for row, (pixels, label, size) in enumerate(zip(batch["pixel_values"], batch["labels"], sizes, strict=True)):
            mask = None if masks is None else masks[row]
            example = {"pixel_values": pixels, "labels": {**label, "frame": frame_of(pixels, mask, size)}}
            examples.append(example if mask is None else {**example, "pixel_mask": mask})
        return examples

    def augment(self, image: PIL.Image.Image, objects: dict[str, list]) -> tuple[PIL.Image.Image, dict[str, list]]:
        """Return one image and its objects, flipped and zoomed at random."""
        boxes, kept = np.asarray(objects["boxes"], dtype=np.float64).reshape(-1, 4), None
        flips, jitter, *place = torch.rand(4).tolist()
        if self.horizontal_flip and flips < 0.5:
            image, boxes = flip(image, boxes)
        if self.scale_jitter > 1:
            factor = math.exp(math.log(self.scale_jitter) * (2 * jitter - 1))
            image, boxes, kept = zoom(image, boxes, factor, tuple(place))
        rows = range(len(boxes)) if kept is None else kept.tolist()
        others = {name: [objects[name][row] for row in rows] for name in ("labels", "iscrowd")}
        return image, {"boxes": boxes.tolist(), "area": boxes[:, 2:].prod(axis=1).tolist(), **others}


def frame_of(pixels: torch.Tensor, mask: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor:
    """
    Return what a detector's relative boxes are relative to, in the pixels of the original image.

    Args:
        pixels (`torch.Tensor` of shape `(channels, height, width)`):
            A detector's input.
        mask (`torch.Tensor` of shape `(height, width)`, *optional*):
            1 where that is the image and 0 where it is padding, right and below.
        size (`tuple[int, int]`):
            Height and width of the image, which has been resized.

    Returns:
        `torch.Tensor` of shape `(2,)`: height and width of image and padding.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.commands.boxes.transforms import frame_of
    >>> mask = torch.zeros(64, 64)
    >>> mask[:48] = 1
    >>> frame_of(torch.zeros(3, 64, 64), mask, size=(480, 640))
    tensor([640., 640.])

    ```
    """
    height, width = pixels.shape[-2:]
    seen = (height, width) if mask is None else (int(mask[:, 0].sum()), int(mask[0].sum()))
    return torch.tensor([size[0] * height / seen[0], size[1] * width / seen[1]])


def collate(examples: list[dict]) -> dict:
    """
    Put examples together: pixels as one tensor, labels as a list.

    Args:
        examples (`list[dict]`):
            What [`DetectionImages`] gives.

    Returns:
        `dict`: a batch.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.commands.boxes.transforms import collate
    >>> batch = collate([{"pixel_values": torch.zeros(3, 8, 8), "labels": {}} for _ in range(2)])
    >>> batch["pixel_values"].shape, batch["labels"]
    (torch.Size([2, 3, 8, 8]), [{}, {}])

    ```
    """
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0] if name != "labels"}
    return {**batch, "labels": [example["labels"] for example in examples]}
