"""The picture at the end of a run of detectors."""

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle


def draw_detections(
    images: list[PIL.Image.Image], truth: list[dict], found: dict[str, list[dict]], names: list[str], path: str
) -> None:
    """Draw predicted boxes over true ones, the models side by side, as a PNG file."""
    across = min(2, len(images))  # of images in a row, each once for each model
    down = -(-len(images) // across)
    columns = across * len(found)
    height = sum(image.height / image.width for image in images) / len(images)
    figure, axes = plt.subplots(
        down, columns, figsize=(3.2 * columns, 3.2 * height * down + 0.8), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for index, (image, true) in enumerate(zip(images, truth, strict=True)):
        for column, (model, predictions) in enumerate(found.items()):
            axis = axes[index // across, index % across * len(found) + column]
            axis.imshow(image)
            axis.set_title(model, fontsize="small")
            for box, label in zip(true["boxes"], true["labels"], strict=True):
                _box(axis, box, "white", linewidth=2.5)
                _box(axis, box, f"C{label % 10}", linewidth=1, linestyle=":")
            predicted = predictions[index]
            for box, label, score in zip(predicted["boxes"], predicted["labels"], predicted["scores"], strict=True):
                _box(axis, box, f"C{label % 10}", linewidth=1.5)
                axis.text(
                    *box[:2],
                    f"{score:.2f}",
                    fontsize=6,
                    color="white",
                    bbox={"facecolor": f"C{label % 10}", "edgecolor": "none", "pad": 0.8},
                )
    drawn = [*truth, *(image for predictions in found.values() for image in predictions)]
    used = sorted({label for image in drawn for label in image["labels"]})
    handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=f"C{label % 10}", linewidth=1.5) for label in used]
    figure.legend(
        [*handles, Rectangle((0, 0), 1, 1, fill=False, edgecolor="black", linewidth=1, linestyle=":")],
        [*(names[label] for label in used), "true box"],
        loc="outside lower center",
        ncols=min(len(used) + 1, 8),
        fontsize="small",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _box(axis: Axes, box: list[float], colour: str, **style) -> None:
    # Pixels are drawn around their index: their left edge is half a pixel before it.
    axis.add_patch(Rectangle((box[0] - 0.5, box[1] - 0.5), *box[2:], fill=False, edgecolor=colour, **style))
