"""Where an image is changed together with what is annotated in it: the arguments that say how, and the geometry."""

from dataclasses import dataclass, field

import numpy as np

from .source import SourceArguments


# Of the border around an image that was zoomed out.
GREY = (114, 114, 114)


@dataclass
class JitteredArguments(SourceArguments):
    """Say what size images come in, and how training images are flipped and zoomed with their annotations."""

    image_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Height and width in pixels that images are resized to. Default: the pretrained student's way, or "
            "else the first image's own size."
        },
    )
    horizontal_flip: bool = field(default=True, metadata={"help": "Flip training images at random."})
    scale_jitter: float | None = field(
        default=None,
        metadata={
            "help": "Zoom training images in (a crop) or out (with a border) by up to this factor at random; 1 for "
            "neither. Default: 1.5, but 1 for the shapes."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ValueError(f"Expected image_size to be height and width, got {self.image_size}.")
        if self.scale_jitter is None:
            self.scale_jitter = 1.5 if self.is_given else 1.0
        if not self.scale_jitter >= 1:
            raise ValueError(f"Expected scale_jitter of at least 1, got {self.scale_jitter}.")


def window(size: tuple[int, int], factor: float, place: tuple[float, float]) -> np.ndarray:
    """
    Return what is seen of an image after zooming by a factor, in its pixels.

    Args:
        size (`tuple[int, int]`):
            Width and height of the image.
        factor (`float`):
            How much larger things become: above 1 a part of the image is seen, below 1 the image and a border.
        place (`tuple[float, float]`):
            Where that part is in the image, or the image within its border: from (0, 0), left and top, to (1, 1).

    Returns:
        `np.ndarray` of shape `(4,)`: x and y of the first corner and of the last one.

    Example:

    ```python
    >>> from iekd_hf.commands.images.jitter import window
    >>> window((8, 8), factor=2, place=(0, 1)).tolist()
    [0.0, 4.0, 4.0, 8.0]

    ```
    """
    size = np.array(size)
    start = (size - size / factor) * np.array(place)
    return np.concatenate([start, start + size / factor])
