"""The picture at the end of a run of image classifiers."""

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .table import Result


def draw(results: list[Result], path: str) -> None:
    """Draw losses by component (of the last result), accuracy by epoch, and sizes, as a PNG file."""
    colours = {result.name: f"C{index}" for index, result in enumerate(results)}
    figure, (losses, accuracy, sizes) = plt.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    history = results[-1].log_history
    for name in ("task_loss", "inheritance_loss", "exploration_loss", "kd_loss", "kl_loss"):
        points = [(logs["epoch"], abs(logs[name])) for logs in history if name in logs]
        if points:
            losses.plot(*zip(*points, strict=True), label=f"|{name}|" if name == "exploration_loss" else name)
    losses.set(title=f"{results[-1].name}: losses before their weights", xlabel="epoch", yscale="log")
    losses.legend(fontsize="small")

    for result in results:
        points = [
            (logs["epoch"], 100 * logs["eval_accuracy"]) for logs in result.log_history if "eval_accuracy" in logs
        ]
        if points and result.name != "teacher":
            accuracy.plot(*zip(*points, strict=True), marker=".", color=colours[result.name], label=result.name)
        elif "accuracy" in result.metrics:
            label = f"{result.name} (final)"
            accuracy.axhline(100 * result.metrics["accuracy"], linestyle="--", color=colours[result.name], label=label)
    accuracy.set(title="Accuracy on the validation images", xlabel="epoch", ylabel="%")
    accuracy.legend(fontsize="small")

    bars = sizes.barh(
        [result.name for result in results],
        [result.parameters for result in results],
        color=[colours[result.name] for result in results],
    )
    sizes.bar_label(bars, [f"{result.parameters:,}" for result in results], padding=4)
    sizes.margins(x=0.25)
    sizes.invert_yaxis()
    sizes.set(title="Parameters")
    figure.savefig(path, dpi=120)
    plt.close(figure)
