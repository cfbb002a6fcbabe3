"""The table and the picture at the end of a run."""

from dataclasses import dataclass, field

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Result:
    """Hold what the table says of one model; `None` where it was not measured."""

    name: str
    parameters: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    log_history: list[dict] = field(default_factory=list)
    latency: float | None = None  # milliseconds for one image


def table(results: list[Result]) -> str:
    """
    Lay results out as a text table.

    Args:
        results (`list[Result]`):
            A row each.

    Returns:
        `str`: aligned columns: model, parameters, accuracy, top-5 and latency where there is one, seconds of each
        stage.

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
    rows = [["model", "parameters", "accuracy", *optional, "seconds"]]
    for result in results:
        percentages = [result.metrics.get(name) for name in ("accuracy", "top5_accuracy")[: 1 + with_top5]]
        rows.append(
            [
                result.name,
                f"{result.parameters:,}",
                *("-" if value is None else f"{value:.2%}" for value in percentages),
                *(["-" if result.latency is None else f"{result.latency:.2f} ms"] if with_latency else []),
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


def draw(results: list[Result], path: str) -> None:
    """
    Draw losses by component, accuracy by epoch, and sizes.

    Args:
        results (`list[Result]`):
            Those of the table; the losses are the last one's.
        path (`str`):
            The PNG file to write.
    """
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
