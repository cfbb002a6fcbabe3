"""A random part of an image, read from its file: of a JPEG no more is decoded than that part needs."""

import io
import math

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F

from ...data.rgb import to_rgb


class RandomResizedCrop:
    """
    Cut out a part of random area and aspect, resize it, and perhaps flip it.

    All of it is done on 8-bit pixels, and a JPEG of which less detail is wanted is decoded at a half, a quarter or an
    eighth of its size. What is drawn comes from torch's generator, which every worker of a DataLoader has its own of.

    Args:
        size (`tuple[int, int]`):
            Height and width in pixels of what comes out.
        horizontal_flip (`bool`):
            Whether to flip every second image, at random.
        scale (`tuple[float, float]`, *optional*, defaults to `(0.08, 1.0)`):
            Share of the image's area.
        ratio (`tuple[float, float]`, *optional*, defaults to `(3 / 4, 4 / 3)`):
            Width over height. A part that would be larger than the image is cut to it.

    Example:

    ```python
    >>> import io, PIL.Image
    >>> from iekd_hf.commands.images.reading import RandomResizedCrop
    >>> file = io.BytesIO()
    >>> PIL.Image.new("RGB", (640, 480), "red").save(file, "PNG")
    >>> pixels = RandomResizedCrop((224, 224), horizontal_flip=True)({"bytes": file.getvalue(), "path": None})
    >>> pixels.shape, pixels[:, 0, 0].tolist()
    (torch.Size([3, 224, 224]), [255, 0, 0])

    ```
    """

    def __init__(
        self,
        size: tuple[int, int],
        horizontal_flip: bool,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ):
        self.size, self.horizontal_flip, self.scale, self.ratio = size, horizontal_flip, scale, ratio

    def __call__(self, image: dict) -> torch.Tensor:
        """
        Read an image.

        Args:
            image (`dict`):
                As `datasets` keeps it undecoded: `bytes`, or else `path`.

        Returns:
            `torch.Tensor`: uint8, of shape `(3, height, width)`.
        """
        share, shape, left, top, flip = torch.rand(5).tolist()
        with PIL.Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])) as opened:
            if opened.getexif().get(PIL.ExifTags.Base.Orientation, 1) == 1:
                width, height = self._part(*opened.size, share, shape)
                needed = (opened.width * self.size[1] / width, opened.height * self.size[0] / height)
                opened.draft(None, tuple(map(math.ceil, needed)))  # nothing happens where it is no JPEG
                whole = opened
            else:
                whole = PIL.ImageOps.exif_transpose(opened)
            part = self._cut(whole, share, shape, left, top)
        # In a third of the time of PIL's resize, to the same bytes but for rounding.
        pixels = torch.from_numpy(np.array(to_rgb(part))).permute(2, 0, 1)[None]
        pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False, antialias=True)[0]
        return pixels.flip(-1) if self.horizontal_flip and flip < 0.5 else pixels

    def _cut(self, whole: PIL.Image.Image, share: float, shape: float, left: float, top: float) -> PIL.Image.Image:
        """Return the part, in whole pixels, of draws in [0, 1)."""
        width, height = (max(round(side), 1) for side in self._part(*whole.size, share, shape))
        x, y = round(left * (whole.width - width)), round(top * (whole.height - height))
        return whole.crop((x, y, x + width, y + height))

    def _part(self, width: int, height: int, share: float, shape: float) -> tuple[float, float]:
        """Return the width and height of a part, in pixels, of draws in [0, 1)."""
        area = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * share)
        low, high = map(math.log, self.ratio)
        ratio = math.exp(low + (high - low) * shape)
        return min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
