"""The tables at the end of a run."""

from dataclasses import dataclass, field


@dataclass
class Result:
    """Hold what the table says of one model; `None` where it was not measured."""

    name: str
    parameters: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    log_history: list[dict] = field(default_factory=list)
    latency: float | None = None  # milliseconds for one image
    gradient_shares: dict[str, float] = field(default_factory=dict)  # of each loss, relative to the task's
    trained_on: str = ""


def table(results: list[Result]) -> str:
    """
    Lay the results of classifiers out as a text table.

    Args:
        results (`list[Result]`):
            A row each.

    Returns:
        `str`: aligned columns: model, what it was trained on where that is said, parameters, accuracy, top-5 and
        latency where there is one, seconds of each stage.

    Example:

    ```python
    >>> print(table([Result("teacher", 1000, {"accuracy": 0.5}, {"training": 3.21}, latency=1.256)]))
    model    parameters  accuracy  latency  seconds
    -------  ----------  --------  -------  ------------
    teacher       1,000    50.00%  1.26 ms  training 3.2

    ```
    """
    with_top5 = any("top5_accuracy" in result.metrics for result in results)
    with_latency = any(result.latency is not None for result in results)
    optional = [name for name, wanted in (("top-5", with_top5), ("latency", with_latency)) if wanted]
    with_images = any(result.trained_on for result in results)
    rows = [["model", "parameters", "accuracy", *optional, *(["trained on"] if with_images else []), "seconds"]]
    for result in results:
        percentages = [result.metrics.get(name) for name in ("accuracy", "top5_accuracy")[: 1 + with_top5]]
        rows.append(
            [
                result.name,
                f"{result.parameters:,}",
                *("-" if value is None else f"{value:.2%}" for value in percentages),
                *(["-" if result.latency is None else f"{result.latency:.2f} ms"] if with_latency else []),
                *([result.trained_on or "-"] if with_images else []),
                ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.seconds.items()) or "-",
            ]
        )
    return align(rows)


def gain(results: list[Result], num_images: int, metric: str = "accuracy", unit: str = "points") -> str:
    """
    Say in a sentence what the teacher has added to the student.

    Args:
        results (`list[Result]`):
            Those of the table.
        num_images (`int`):
            How many images they were measured on.
        metric (`str`, *optional*, defaults to `"accuracy"`), unit (`str`, *optional*, defaults to `"points"`):
            By which metric, and what its hundredths are called.

    Returns:
        `str`: the sentence, empty where a plain and a distilled student were not both measured.

    Example:

    ```python
    >>> plain, distilled = ({"accuracy": value} for value in (0.883, 0.96))
    >>> gain([Result("plain student", 10, plain), Result("distilled student", 10, distilled)], 599)
    'The teacher adds 7.7 points to the same network, on 599 validation images.'

    ```
    """
    measured = {result.name: 100 * result.metrics[metric] for result in results if metric in result.metrics}
    if not {"plain student", "distilled student"} <= measured.keys():
        return ""
    points = measured["distilled student"] - measured["plain student"]
    verb = "adds {:.1f} {} to" if points > 0 else "takes {:.1f} {} from" if points < 0 else "adds nothing to"
    what = verb.format(abs(points), unit)
    return f"The teacher {what} the same network, on {num_images:,} validation images."


def detection_table(results: list[Result]) -> str:
    """
    Lay the results of detectors out as a text table.

    Args:
        results (`list[Result]`):
            A row each.

    Returns:
        `str`: aligned columns: model, parameters, mAP and mAP50 in percent, images a second, seconds of each stage.

    Example:

    ```python
    >>> from iekd_hf.commands.report.table import Result, detection_table
    >>> result = Result("teacher", 1000, {"map": 0.5, "map_50": 0.75}, {"training": 3.21}, latency=4.0)
    >>> print(detection_table([result]))
    model    parameters   mAP  mAP50  images/s  seconds
    -------  ----------  ----  -----  --------  ------------
    teacher       1,000  50.0   75.0       250  training 3.2

    ```
    """
    return _table(results, {"mAP": "map", "mAP50": "map_50"})


def segmentation_table(results: list[Result]) -> str:
    """
    Lay the results of segmenters out as a text table.

    Args:
        results (`list[Result]`):
            A row each.

    Returns:
        `str`: aligned columns: model, parameters, mean IoU and accuracy of pixels in percent, images a second, seconds
        of each stage.

    Example:

    ```python
    >>> from iekd_hf.commands.report.table import Result, segmentation_table
    >>> metrics = {"mean_iou": 0.5, "overall_accuracy": 0.75}
    >>> print(segmentation_table([Result("teacher", 1000, metrics, {"training": 3.21}, latency=4.0)]))
    model    parameters  mIoU  pixels  images/s  seconds
    -------  ----------  ----  ------  --------  ------------
    teacher       1,000  50.0    75.0       250  training 3.2

    ```
    """
    return _table(results, {"mIoU": "mean_iou", "pixels": "overall_accuracy"})


def _table(results: list[Result], columns: dict[str, str]) -> str:
    """Lay results out with metrics in percent, by their titles, and images a second."""
    with_images = any(result.trained_on for result in results)
    rows = [["model", "parameters", *columns, "images/s", *(["trained on"] if with_images else []), "seconds"]]
    for result in results:
        measured = [result.metrics.get(name) for name in columns.values()]
        rows.append(
            [
                result.name,
                f"{result.parameters:,}",
                *("-" if value is None else f"{100 * value:.1f}" for value in measured),
                "-" if result.latency is None else f"{1000 / result.latency:.0f}",
                *([result.trained_on or "-"] if with_images else []),
                ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.seconds.items()) or "-",
            ]
        )
    return align(rows)


def align(rows: list[list[str]]) -> str:
    """
    Lay a table out as text, its first and last column to the left, others to the right.

    Args:
        rows (`list[list[str]]`):
            The cells, of the head first.

    Returns:
        `str`: a line for each row, and one under the head.

    Example:

    ```python
    >>> print(align([["model", "mAP", "note"], ["teacher", "8.1", "-"]]))
    model    mAP  note
    -------  ---  ----
    teacher  8.1  -

    ```
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    last = len(widths) - 1
    lines = [
        "  ".join(
            cell.ljust(w) if i in (0, last) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def latencies(results: list[Result]) -> dict[str, float]:
    """
    Return the latencies of the teacher and of the student that is pushed, as its card takes them.

    Args:
        results (`list[Result]`):
            Those of the table.

    Returns:
        `dict[str, float]`: milliseconds of `teacher` and `student`, where they were measured.

    Example:

    ```python
    >>> latencies([Result("teacher", 1000, latency=2.5), Result("distilled student", 500, latency=1.5)])
    {'teacher': 2.5, 'student': 1.5}

    ```
    """
    measured = {result.name.replace("distilled ", ""): result.latency for result in results}
    return {role: measured[role] for role in ("teacher", "student") if measured.get(role) is not None}
