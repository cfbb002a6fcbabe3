"""The table and the picture at the end of a detection run."""

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from report import Result, align


def table(results: list[Result]) -> str:
    """
    Lay results out as a text table.

    Args:
        results (`list[Result]`):
            A row each.

    Returns:
        `str`: aligned columns: model, parameters, mAP and mAP50 in percent, images a second, seconds of each stage.

    Example:

    ```python
    >>> from detection_report import table
    >>> from report import Result
    >>> print(table([Result("teacher", 1000, {"map": 0.5, "map_50": 0.75}, {"training": 3.21}, latency=4.0)]))
    model    parameters   mAP  mAP50  images/s  seconds
    -------  ----------  ----  -----  --------  ------------
    teacher       1,000  50.0   75.0       250  training 3.2

    ```
    """
    rows = [["model", "parameters", "mAP", "mAP50", "images/s", "seconds"]]
    for result in results:
        measured = [result.metrics.get(name) for name in ("map", "map_50")]
        rows.append(
            [
                result.name,
                f"{result.parameters:,}",
                *("-" if value is None else f"{100 * value:.1f}" for value in measured),
                "-" if result.latency is None else f"{1000 / result.latency:.0f}",
                ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.seconds.items()) or "-",
            ]
        )
    return align(rows)


def draw_detections(
    images: list[PIL.Image.Image], truth: list[dict], found: dict[str, list[dict]], names: list[str], path: str
) -> None:
    """
    Draw predicted boxes over true ones, the models side by side.

    Args:
        images (`list[PIL.Image.Image]`):
            Some images, a row each.
        truth (`list[dict]`):
            The true `boxes` [x, y, width, height] and `labels` of each.
        found (`dict[str, list[dict]]`):
            By the model's name, the predicted `boxes`, `labels` and `scores` of each.
        names (`list[str]`):
            The classes.
        path (`str`):
            The PNG file to write.
    """
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
