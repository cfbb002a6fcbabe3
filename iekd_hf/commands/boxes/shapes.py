"""Draw images of simple shapes with exact boxes: something to detect where there is no network."""

import colorsys

import datasets
import numpy as np
import PIL.Image
import PIL.ImageDraw


NAMES = ("circle", "square", "triangle", "cross")
# A shape is drawn where each other one stays visible by at least this share of its pixels.
_VISIBLE = 0.6
# How far the hues of a category reach, in distances between categories: above 0.5 those of neighbours overlap.
_SPREAD = 0.5


def make_shapes(count: int, seed: int, size: int = 64) -> datasets.Dataset:
    """
    Draw images of one to three shapes that may overlap and reach over the edge, on clutter and noise.

    Args:
        count (`int`):
            How many images.
        seed (`int`):
            Seed of what is drawn.
        size (`int`, *optional*, defaults to 64):
            Height and width in pixels.

    Returns:
        `datasets.Dataset`: the columns `image` and `objects`, with `bbox` [x, y, width, height] in pixels, `category`
        and `area`, as detection data sets have them.

    Example:

    ```python
    >>> from iekd_hf.commands.boxes.shapes import make_shapes
    >>> images = make_shapes(2, seed=0)
    >>> images.column_names, images[0]["image"].size, sorted(images[0]["objects"])
    (['image', 'objects'], (64, 64), ['area', 'bbox', 'category'])

    ```
    """
    generator = np.random.default_rng(seed)
    rows = [draw_image(generator, size) for _ in range(count)]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": {
                "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
                "category": datasets.List(datasets.ClassLabel(names=list(NAMES))),
                "area": datasets.List(datasets.Value("float32")),
            },
        }
    )
    return datasets.Dataset.from_list([{"image": image, "objects": objects} for image, objects in rows], features)


def draw_image(generator: np.random.Generator, size: int) -> tuple[PIL.Image.Image, dict[str, list]]:
    """
    Draw one image.

    Args:
        generator (`np.random.Generator`):
            Draws what is drawn.
        size (`int`):
            Height and width in pixels.

    Returns:
        `tuple`: the image, and its `objects`. Boxes enclose each shape's pixels, also those under another shape.

    Example:

    ```python
    >>> import numpy as np
    >>> from iekd_hf.commands.boxes.shapes import draw_image
    >>> image, objects = draw_image(np.random.default_rng(0), size=64)
    >>> image.size, len(objects["bbox"]) == len(objects["category"]) > 0
    ((64, 64), True)

    ```
    """
    image, drawn = draw_scene(generator, size, most=3)
    objects = {"bbox": [box_of(pixels) for pixels, _ in drawn], "category": [category for _, category in drawn]}
    objects["area"] = [width * height for _, _, width, height in objects["bbox"]]
    return image, objects


def draw_scene(
    generator: np.random.Generator, size: int, most: int
) -> tuple[PIL.Image.Image, list[tuple[np.ndarray, int]]]:
    """
    Draw one image, and say which pixels each shape covers.

    Args:
        generator (`np.random.Generator`):
            Draws what is drawn.
        size (`int`):
            Height and width in pixels.
        most (`int`):
            How many shapes there are at most.

    Returns:
        `tuple`: the image, and of each shape, those below first, its pixels `(size, size)` and its category.

    Example:

    ```python
    >>> import numpy as np
    >>> from iekd_hf.commands.boxes.shapes import draw_scene
    >>> image, drawn = draw_scene(np.random.default_rng(0), size=64, most=6)
    >>> pixels, category = drawn[0]
    >>> pixels.shape, pixels.dtype, category
    ((64, 64), dtype('bool'), 1)

    ```
    """
    background = generator.integers(0, 256, 3)
    image = PIL.Image.new("RGB", (size, size), tuple(map(int, background)))
    pen = PIL.ImageDraw.Draw(image)
    for _ in range(generator.integers(4, 10)):  # clutter: lines and specks, which are nothing
        points = generator.uniform(0, size, 4)
        colour = tuple(map(int, generator.integers(0, 256, 3)))
        if generator.random() < 0.6:
            pen.line(list(points), colour, width=int(generator.integers(1, 3)))
        else:
            x, y = points[:2]
            pen.ellipse([x, y, x + 3, y + 3], colour)

    drawn: list[tuple[np.ndarray, np.ndarray, int]] = []  # of each shape: its pixels, those to be seen, what it is
    wanted = int(generator.integers(1, most + 1))
    for _ in range(3 * wanted):
        category = int(generator.integers(len(NAMES)))
        mask = draw_mask(category, generator, size)
        pixels = np.asarray(mask) > 0
        if any((seen & ~pixels).sum() < _VISIBLE * whole.sum() for whole, seen, _ in drawn):
            continue
        image.paste(_contrasting(generator, background, category), mask=mask)
        drawn = [(whole, seen & ~pixels, kind) for whole, seen, kind in drawn] + [(pixels, pixels, category)]
        if len(drawn) == wanted:
            break
    noisy = np.asarray(image) + generator.normal(0, generator.uniform(2, 10), (size, size, 3))
    image = PIL.Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    return image, [(whole, category) for whole, _, category in drawn]


def draw_mask(category: int, generator: np.random.Generator, size: int) -> PIL.Image.Image:
    """
    Draw one shape in white on black.

    Args:
        category (`int`):
            Index into the names.
        generator (`np.random.Generator`):
            Draws where, how large (a fifth to two fifths of the image) and how it is turned.
        size (`int`):
            Height and width in pixels.

    Returns:
        `PIL.Image.Image`: of mode `L`.

    Example:

    ```python
    >>> import numpy as np
    >>> from iekd_hf.commands.boxes.shapes import draw_mask
    >>> draw_mask(0, np.random.default_rng(0), size=64).getextrema()
    (0, 255)

    ```
    """
    mask = PIL.Image.new("L", (size, size))
    pen = PIL.ImageDraw.Draw(mask)
    radius = generator.uniform(size / 10, size / 5)
    centre = generator.uniform(radius / 2, size - radius / 2, 2)
    turn = generator.uniform(0, 2 * np.pi)

    def corners(angles, radii):
        angles = np.asarray(angles) + turn
        places = centre + np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.asarray(radii)[:, None]
        return [tuple(place) for place in places]

    if NAMES[category] == "circle":
        pen.ellipse([*(centre - radius), *(centre + radius)], fill=255)
    elif NAMES[category] == "square":
        pen.polygon(corners(np.arange(4) * np.pi / 2, [radius] * 4), fill=255)
    elif NAMES[category] == "triangle":
        pen.polygon(corners(np.arange(3) * 2 * np.pi / 3, [radius] * 3), fill=255)
    else:  # a cross: two bars, each a third as wide as long
        for bar in (0, np.pi / 2):
            half = np.arctan(1 / 3)
            pen.polygon(corners(bar + np.array([-half, half, np.pi - half, np.pi + half]), [radius] * 4), fill=255)
    return mask


def box_of(pixels: np.ndarray) -> list[float]:
    """
    Enclose pixels.

    Args:
        pixels (`np.ndarray` of shape `(height, width)`):
            Which belong to it.

    Returns:
        `list[float]`: x, y, width and height in pixels.

    Example:

    ```python
    >>> import numpy as np
    >>> from iekd_hf.commands.boxes.shapes import box_of
    >>> pixels = np.zeros((8, 8), dtype=bool)
    >>> pixels[2:4, 1:6] = True
    >>> box_of(pixels)
    [1.0, 2.0, 5.0, 2.0]

    ```
    """
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    return [
        float(columns[0]),
        float(rows[0]),
        float(columns[-1] - columns[0] + 1),
        float(rows[-1] - rows[0] + 1),
    ]


def _colour_of(generator: np.random.Generator, category: int) -> np.ndarray:
    """Draw a colour that is more often a category's than another's."""
    hue = (category + generator.uniform(-_SPREAD, _SPREAD)) / len(NAMES)
    saturation, value = generator.uniform(0.6, 1, 2)
    return np.round(255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value)))


def _contrasting(generator: np.random.Generator, background: np.ndarray, category: int) -> tuple[int, ...]:
    while True:
        colour = _colour_of(generator, category)
        if np.abs(colour - background).max() > 80:
            return tuple(map(int, colour))
