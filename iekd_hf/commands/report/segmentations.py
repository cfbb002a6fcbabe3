"""The picture at the end of a run of segmenters."""

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
from matplotlib.patches import Patch


def draw_segmentations(
    images: list[PIL.Image.Image],
    truth: list[np.ndarray],
    found: dict[str, list[np.ndarray]],
    names: list[str],
    path: str,
) -> None:
    """Draw images, a column each, above their true masks and what the models make of them, as a PNG file."""
    rows = {"image": images, "truth": truth, **found}
    colours = class_colours(len(names))
    height = sum(image.height / image.width for image in images) / len(images)
    figure, axes = plt.subplots(
        len(rows),
        len(images),
        figsize=(1.9 * len(images) + 0.4, 1.9 * height * len(rows) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for row, (name, pictures) in enumerate(rows.items()):
        axes[row, 0].set_ylabel(name)
        for axis, picture in zip(axes[row], pictures, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.imshow(picture if name == "image" else paint(picture, colours))
    used = {label for masks in (truth, *found.values()) for mask in masks for label in np.unique(mask).tolist()}
    used = sorted(label for label in used if label < len(names))
    figure.legend(
        [Patch(facecolor=colours[label], edgecolor="black", linewidth=0.5) for label in used],
        [names[label] for label in used],
        loc="outside lower center",
        ncols=min(len(used), 8),
        fontsize="small",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def class_colours(count: int) -> np.ndarray:
    """
    Choose a colour for each class.

    Args:
        count (`int`):
            How many classes.

    Returns:
        `np.ndarray` of shape `(count, 3)`: red, green and blue from 0 to 1; of the first class a dark grey, which is
        the background of many data sets.

    Example:

    ```python
    >>> from iekd_hf.commands.report.segmentations import class_colours
    >>> class_colours(3).shape
    (3, 3)

    ```
    """
    if count <= 11:
        found = [(0.2, 0.2, 0.2), *matplotlib.colormaps["tab10"].colors]
    else:
        found = matplotlib.colormaps["gist_rainbow"](np.linspace(0, 1, count))[:, :3]
    return np.asarray(found[:count])


def paint(mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """
    Paint a mask; a pixel of no class becomes white.

    Args:
        mask (`np.ndarray` of shape `(height, width)`):
            The class of each pixel.
        colours (`np.ndarray` of shape `(num_labels, 3)`):
            Of each class.

    Returns:
        `np.ndarray` of shape `(height, width, 3)`.

    Example:

    ```python
    >>> import numpy as np
    >>> from iekd_hf.commands.report.segmentations import class_colours, paint
    >>> paint(np.array([[0, 255]]), class_colours(2)).tolist()
    [[[0.2, 0.2, 0.2], [1.0, 1.0, 1.0]]]

    ```
    """
    painted = np.ones((*mask.shape, 3))
    known = mask < len(colours)
    painted[known] = colours[mask[known]]
    return painted
