"""
Average runs of classifiers, or of segmenters, over their seeds: a table in Markdown, with differences within a seed.

    python examples/benchmarks/average_accuracy.py --runs few-* --output_file few_labels.json

Each folder is an --output_dir of run_iekd.py, or each one of run_mutual.py, or of run_iekd_segmentation.py.
"""

from collections import defaultdict

from average_detection import PLAIN, average, check_same
from comparison_report import interval, paired


# What is averaged, by its name in the files, and what it is called; the first that a model has.
METRICS = {"accuracy": "accuracy", "mean_iou": "mIoU"}


def accuracies(runs: list[dict]) -> dict[str, dict[int, float]]:
    """
    Sort accuracies, or mean IoU, by model and seed.

    Args:
        runs (`list[dict]`):
            What [`read_runs`] gave.

    Returns:
        `dict[str, dict[int, float]]`: percent, by name, a distilled student's with its method, and by seed.

    Example:

    ```python
    >>> models = {"teacher": {"metrics": {"accuracy": 0.5}}, "distilled student": {"metrics": {"accuracy": 0.25}}}
    >>> settings = {"seed": 1, "method": "kd", "lambda_kd": 1.0, "kd_distance": "dist"}
    >>> accuracies([{"settings": settings, "models": models}])
    {'teacher': {1: 50.0}, 'kd, dist': {1: 25.0}}

    ```
    """
    found = defaultdict(dict)
    for run in runs:
        settings = run["settings"]
        for name, model in run["models"].items():
            title = name
            if name == "distilled student":
                distance = settings.get("kd_distance", "kl")  # which older runs do not know
                title = settings["method"] + ("" if distance == "kl" or not settings["lambda_kd"] else f", {distance}")
                title += "" if settings.get("unlabelled", True) else ", labelled images alone"
            if (metric := metric_of(model)) is not None:
                value = 100 * model["metrics"][metric]
                check_same(title, settings["seed"], found[title].setdefault(settings["seed"], value), value)
    return dict(found)


def metric_of(model: dict) -> str | None:
    """
    Return which metric of a model is averaged.

    Args:
        model (`dict`):
            What was measured of it; nothing of a teacher that does another task.

    Returns:
        `str` or `None`

    Example:

    ```python
    >>> metric_of({"metrics": {"mean_iou": 0.5, "loss": 1.0}})
    'mean_iou'

    ```
    """
    return next((name for name in METRICS if name in model["metrics"]), None)


def markdown(runs: list[dict]) -> str:
    """
    Write the table.

    Args:
        runs (`list[dict]`):
            What [`read_runs`] gave.

    Returns:
        `str`: Markdown, in percent; after a plus-minus half of a 95 % interval. Differences are from the
        plain student and from `kd`, or from the same peer alone and under DML, and the least of the first is there.
    """
    values = accuracies(runs)
    others = ("alone", "DML") if any(name.startswith("peer ") for name in values) else (PLAIN, "kd")
    metrics = {metric_of(model) for run in runs for model in run["models"].values()} - {None}
    if len(metrics) != 1:
        raise ValueError(f"Expected runs of one task, got those with {' and '.join(sorted(metrics))}: keep one kind.")
    titles = ["model", "seeds", METRICS[metrics.pop()], *(f"- {other}" for other in others), f"least - {others[0]}"]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for name, own in values.items():
        mean, _, half = interval(list(own.values()))
        row = [name, str(len(own)), f"{mean:.1f} \u00b1 {half:.1f}" if len(own) > 1 else f"{mean:.1f}"]
        peer = name[: len("peer 1")] if others[0] == "alone" else ""
        against = [{"alone": f"{peer} alone", "DML": f"{peer}, DML"}.get(other, other) for other in others]
        for other in against:
            is_compared = name not in (other, "teacher") and values.get(other, {}).keys() & own.keys()
            row.append(paired(own, values[other]) if is_compared else "")
        first = values.get(against[0], {})
        gains = [own[seed] - first[seed] for seed in own.keys() & first.keys()]
        row.append(f"{min(gains):+.1f}" if gains and row[3] else "")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    average(markdown, __doc__)


if __name__ == "__main__":
    main()
