"""Draw images of simple shapes with exact masks: something to segment where there is no network."""

import datasets
import numpy as np
import PIL.Image

from ..boxes.shapes import NAMES, draw_scene


# What each pixel belongs to: the topmost shape, or none.
CLASSES = ("background", *NAMES)


def make_masked_shapes(count: int, seed: int, size: int = 48) -> datasets.Dataset:
    """
    Draw images of one to six shapes that may overlap and reach over the edge, on clutter and noise.

    Args:
        count (`int`):
            How many images.
        seed (`int`):
            Seed of what is drawn.
        size (`int`, *optional*, defaults to 48):
            Height and width in pixels.

    Returns:
        `datasets.Dataset`: the columns `image` and `label`, a mask with the class of each pixel.

    Example:

    ```python
    >>> import numpy as np
    >>> from iekd_hf.commands.masks.shapes import CLASSES, make_masked_shapes
    >>> example = make_masked_shapes(1, seed=0)[0]
    >>> example["image"].size, [CLASSES[index] for index in np.unique(example["label"])]
    ((48, 48), ['background', 'square', 'cross'])

    ```
    """
    generator, rows = np.random.default_rng(seed), []
    for _ in range(count):
        image, drawn = draw_scene(generator, size, most=6)
        mask = np.zeros((size, size), dtype=np.uint8)
        for pixels, category in drawn:
            mask[pixels] = 1 + category
        rows.append({"image": image, "label": PIL.Image.fromarray(mask)})
    return datasets.Dataset.from_list(rows, datasets.Features({"image": datasets.Image(), "label": datasets.Image()}))
