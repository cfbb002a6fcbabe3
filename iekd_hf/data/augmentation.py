"""Augment whole batches of decoded images on the training device, by draws that can be made again."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BaseImageProcessor, ProcessorMixin

from .pixel_values import image_processor_of, pixel_values_of


CROPS = ("padded", "resized")
_MASK = 0xFFFFFFFF


class BatchAugmentation(nn.Module):
    """
    Crop, flip and normalise a batch of uint8 images.

    The draws for an image depend only on its id, the view and the seed, so a view can be reproduced: in another order,
    on another rank, after a resume, or to match a teacher's cached outputs.

    Args:
        mean (`list[float]`), std (`list[float]`):
            Of each channel, in units of rescaled pixels.
        size (`tuple[int, int]`, *optional*):
            (height, width) in pixels of what comes out; for padded crops the image is resized first. By default that
            of the images.
        crop (`str`, *optional*):
            `"padded"`: as large as the image, out of the image with `padding` reflected pixels around it; `"resized"`:
            a part of a random area and aspect, resized. By default none.
        padding (`int`, *optional*, defaults to 4):
            Pixels on each side for padded crops.
        scale (`tuple[float, float]`, *optional*, defaults to `(0.08, 1.0)`):
            Share of the image's area in a resized crop.
        ratio (`tuple[float, float]`, *optional*, defaults to `(3 / 4, 4 / 3)`):
            Width over height of a resized crop. One that would be larger than the image is cut to it.
        horizontal_flip (`bool`, *optional*, defaults to `False`):
            Whether to flip every second image, at random.
        rescale_factor (`float`, *optional*, defaults to 1 / 255):
            Of the pixels, before they are normalised.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.
        reverse_channels (`bool`, *optional*, defaults to `False`):
            Whether to turn RGB into BGR, before mean and std, which are then those of BGR.

    Raises:
        `ValueError`: an unknown crop, or padding that a reflection cannot fill.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf import BatchAugmentation
    >>> augment = BatchAugmentation(mean=[0.5] * 3, std=[0.5] * 3, crop="padded", horizontal_flip=True)
    >>> images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    >>> ids = torch.arange(8)
    >>> first, second, again = (augment(images, ids, view) for view in (0, 1, 0))
    >>> first.shape, torch.equal(first, second), torch.equal(first, again)
    (torch.Size([8, 3, 32, 32]), False, True)

    ```
    """

    def __init__(
        self,
        mean: list[float],
        std: list[float],
        size: tuple[int, int] | None = None,
        crop: str | None = None,
        padding: int = 4,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: bool = False,
        rescale_factor: float = 1 / 255,
        seed: int = 0,
        reverse_channels: bool = False,
    ):
        super().__init__()
        if crop is not None and crop not in CROPS:
            raise ValueError(f"Expected crop to be one of {', '.join(CROPS)}, or None; got {crop!r}.")
        self.size, self.crop, self.padding, self.horizontal_flip = size, crop, padding, horizontal_flip
        self.scale, self.ratio, self.seed, self.reverse_channels = scale, ratio, seed, reverse_channels
        mean, std = torch.tensor(mean), torch.tensor(std)
        self.register_buffer("multiply", (rescale_factor / std).view(1, -1, 1, 1))
        self.register_buffer("add", (-mean / std).view(1, -1, 1, 1))

    @classmethod
    def from_processor(cls, processor: BaseImageProcessor | ProcessorMixin, **kwargs) -> "BatchAugmentation":
        """
        Take mean, std, rescaling and the order of channels from an image processor; keyword arguments are those of
        the class.
        """
        scale, shift, reverses = pixel_values_of(image_processor_of(processor) or processor)
        augmentation = cls(mean=[0.0], std=[1.0], rescale_factor=1.0, reverse_channels=reverses, **kwargs)
        augmentation.multiply, augmentation.add = scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)
        return augmentation

    def extra_repr(self) -> str:
        """Describe the augmentation."""
        names = ("size", "crop", "padding", "scale", "ratio", "horizontal_flip", "seed", "reverse_channels")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self, pixel_values: torch.Tensor, image_ids: torch.Tensor | None = None, view: int = 0
    ) -> torch.Tensor:
        """
        Make one view of each image.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                Raw pixels, uint8, on any device.
            image_ids (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Which images they are. Without, nothing is drawn: the whole image, resized if need be, normalised.
            view (`int`, *optional*, defaults to 0):
                Which view.

        Returns:
            `torch.Tensor`: float32, of shape `(batch_size, channels, *size)`.
        """
        if self.reverse_channels:
            pixel_values = pixel_values.flip(1)
        pixels = pixel_values.to(torch.float32, copy=True).mul_(self.multiply).add_(self.add)
        whole = self.crop != "resized" or image_ids is None
        if whole and self.size not in (None, tuple(pixels.shape[-2:])):
            pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False, antialias=True)
        if image_ids is None:
            return pixels
        image_ids = image_ids.to(pixels.device, torch.int64, non_blocking=True)
        flip, top, left, *shape = self._draw(image_ids, view, 5 if self.crop == "resized" else 3)
        flipped = (flip < 0.5) & self.horizontal_flip
        if self.crop == "resized":
            return self._resized_crop(pixels, flipped, top, left, *shape)
        return self._padded_crop(pixels, flipped, top, left)

    def _draw(self, image_ids: torch.Tensor, view: int, count: int) -> torch.Tensor:
        """Return numbers in [0, 1), `(count, batch_size)`: hashes of (seed, view, which, id), no generator's state."""
        key = _mix((_mix(self.seed & _MASK) + view) & _MASK)
        keys = _mix((key + torch.arange(count, device=image_ids.device)) & _MASK)
        # 24 bits, which float32 holds; not every device has float64.
        return (_mix(_mix(image_ids & _MASK) ^ keys[:, None]) >> 8).float() / 2**24

    def _padded_crop(self, pixels, flipped, top, left) -> torch.Tensor:
        # Each image is read once, by an index of its pixels that holds reflection, crop and flip. On one core that
        # makes 4.6 times as many 32x32 images a second as kornia 0.9's RandomCrop and RandomHorizontalFlip, which pad
        # a copy, cut it image by image, and flip in another pass.
        batch_size, channels, height, width = pixels.shape
        padding = self.padding if self.crop == "padded" else 0
        if padding >= min(height, width):
            raise ValueError(
                f"Expected padding below the images' {height}x{width} pixels, got {padding}: a reflection cannot fill "
                "more."
            )

        steps = 2 * padding + 1

        def places(length: int) -> torch.Tensor:  # of a row or column under each offset, reflected at both ends
            offsets = torch.arange(-padding, padding + 1, device=pixels.device)[:, None]
            place = (torch.arange(length, device=pixels.device) + offsets).abs()
            return torch.where(place < length, place, 2 * (length - 1) - place)

        rows = (places(height) * width).index_select(0, (top * steps).long())
        columns = torch.cat([places(width), places(width).flip(1)])
        columns = columns.index_select(0, (left * steps).long() + steps * flipped)
        source = (rows[:, :, None] + columns[:, None, :]).view(batch_size, 1, -1)
        return pixels.flatten(2).gather(2, source.expand(-1, channels, -1)).view_as(pixels)

    def _resized_crop(self, pixels, flipped, top, left, area, ratio) -> torch.Tensor:
        # One grid_sample for the batch, as fast as kornia 0.9's RandomResizedCrop (0.8 to 1.0 of its images a second),
        # whose draws come from torch's generator and could not be made again for an image by itself. There is no
        # antialiasing, which only images much larger than what comes out need: make them smaller when decoding them.
        height, width = pixels.shape[-2:]
        size = self.size or (height, width)
        low, high = self.scale
        area = height * width * (low + (high - low) * area)
        low, high = map(math.log, self.ratio)
        ratio = (low + (high - low) * ratio).exp()
        crop_height, crop_width = (area / ratio).sqrt().clamp(max=height), (area * ratio).sqrt().clamp(max=width)
        theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)
        for axis, crop, length, place in ((0, crop_width, width, left), (1, crop_height, height, top)):
            theta[:, axis, axis] = crop / length
            theta[:, axis, 2] = (2 * (length - crop) * place + crop) / length - 1
        theta[:, 0, 0] = torch.where(flipped, -theta[:, 0, 0], theta[:, 0, 0])
        grid = F.affine_grid(theta, (*pixels.shape[:2], *size), align_corners=False)
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _mix(x):
    """Hash 32 bits, of an `int` or of each element of an int64 tensor (Wellons' lowbias32)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
