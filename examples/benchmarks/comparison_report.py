"""The summary of a comparison: means and intervals, paired differences, tables and pictures."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from comparison_methods import LAMBDAS, label, written


BASELINES = ("plain", "kd", "ft", "alone", "dml")


def collect(folder: Path) -> list[dict]:
    """
    Read all finished cells.

    Args:
        folder (`Path`):
            The comparison's folder.

    Returns:
        `list[dict]`: what [`as_run`] makes of each.
    """
    cells = []
    for done in sorted(folder.glob("cells/*/*/seed-*/metrics.json")):
        networks, method, seed = done.parts[-4:-1]
        arguments, log = (json.loads((done.parent / f"{name}.json").read_text()) for name in ("arguments", "log"))
        networks, seed = unquote(":".join(networks.rsplit("-to-", 1))), int(seed.removeprefix("seed-"))
        cells.append(as_run(networks, method, seed, json.loads(done.read_text()), arguments, log))
    return cells


def as_run(networks: str, method: str, seed: int, metrics: dict, arguments: dict, log: list[dict]) -> dict:
    """
    Give what a cell has measured the form that `results.json` of the commands has.

    Args:
        networks (`str`), method (`str`), seed (`int`):
            The cell.
        metrics (`dict`), arguments (`dict`), log (`list[dict]`):
            What its files say.

    Returns:
        `dict`: `settings`, `models` with the `metrics` of the student or of each peer, and `gradient_shares`; beside
        them `training`, what it took, `made`, when and by which versions, and `log`.

    Example:

    ```python
    >>> run = as_run("a:b", "ft", 1, {"test_accuracy": 0.5, "train_runtime": 9.0}, {"lambda_inh": 300.0}, [])
    >>> run["settings"]
    {'networks': 'a:b', 'method': 'ft', 'seed': 1, 'lambda_inh': 300.0}
    >>> run["models"], run["training"]
    ({'student': {'metrics': {'test_accuracy': 0.5}}}, {'train_runtime': 9.0})

    ```
    """
    models, shares, training = defaultdict(lambda: {"metrics": {}}), {}, {}
    for name, value in metrics.items():
        peer = re.match(r"(validation|test)_peer_(\d)_(.*)", name)
        if peer:
            models[f"peer {peer[2]}"]["metrics"][f"{peer[1]}_{peer[3]}"] = value
        elif name.startswith(("validation_", "test_")):
            if ":" in networks:  # of peers it is their mean
                models["student"]["metrics"][name] = value
        elif name != "made":
            (shares if name.endswith("gradient_share") else training)[name] = value
    settings = {"networks": networks, "method": method, "seed": seed, **arguments}
    made = {"made": metrics["made"]} if "made" in metrics else {}
    return {
        "settings": settings,
        "models": dict(models),
        "gradient_shares": shares,
        "training": training,
        **made,
        "log": log,
    }


def interval(values: list[float]) -> tuple[float, float, float]:
    """
    Return mean, standard deviation, and half of the 95 % interval of the mean by Student's t.

    Args:
        values (`list[float]`):
            One for each seed; of a single one nothing but the mean is known.

    Returns:
        `tuple[float, float, float]`: the last two are NaN for a single value.

    Example:

    ```python
    >>> [round(x, 3) for x in interval([1.0, 2.0, 3.0])]
    [2.0, 1.0, 2.484]

    ```
    """
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    deviation = float(np.std(values, ddof=1))
    return mean, deviation, float(scipy.stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def accuracies(cells: list[dict], part: str) -> dict[str, dict[str, dict[int, float]]]:
    """
    Sort accuracies by networks, method and seed.

    Args:
        cells (`list[dict]`):
            What [`collect`] gave.
        part (`str`):
            `validation` or `test`.

    Returns:
        `dict`: networks (of peers each by itself) to method to seed to per cent; only what was measured on that part.
    """
    found = defaultdict(lambda: defaultdict(dict))
    for cell in cells:
        settings = cell["settings"]
        for model, measured in cell["models"].items():
            name = settings["networks"] + (f", {model}" if model.startswith("peer") else "")
            if f"{part}_accuracy" in measured["metrics"]:
                accuracy = 100 * measured["metrics"][f"{part}_accuracy"]
                found[name][settings["method"]][settings["seed"]] = accuracy
    return {name: dict(methods) for name, methods in found.items()}


def paired(values: dict[int, float], baseline: dict[int, float]) -> str:
    """
    Describe the difference of two methods over the seeds that both have.

    Args:
        values (`dict[int, float]`), baseline (`dict[int, float]`):
            Accuracies by seed, in per cent.

    Returns:
        `str`: mean difference in points, with half of its 95 % interval where there are two seeds or more.

    Example:

    ```python
    >>> paired({0: 71.0, 1: 72.0, 2: 73.0}, {0: 70.0, 1: 71.5, 2: 71.5})
    '+1.00 \u00b1 1.24'

    ```
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return "-"
    mean, _, half = interval([values[seed] - baseline[seed] for seed in seeds])
    return f"{mean:+.2f}" + ("" if math.isnan(half) else f" \u00b1 {half:.2f}")


def is_of(cell: dict, networks: str, method: str) -> bool:
    """Return whether a cell is one of these networks and this method."""
    return cell["settings"]["networks"] == networks and cell["settings"]["method"] == method


def without_weights(method: str) -> str:
    """Return a method's name, with what differs from it beside the weights."""
    name, *changes = method.split(",")
    return ",".join([name, *(change for change in changes if change.split("=")[0] not in LAMBDAS)])


def markdown(cells: list[dict]) -> str:
    """
    Write the tables: for each pair and part, a row for each method.

    Args:
        cells (`list[dict]`):
            What [`collect`] gave.

    Returns:
        `str`: Markdown.
    """
    lines = []
    for part in ("test", "validation"):
        for networks, methods in accuracies(cells, part).items():
            baselines = {name: label(name) for name in BASELINES if label(name) in methods and len(methods) > 1}
            lines += [f"### {networks} ({part})", ""]
            titles = ["method", "weights", "seeds", "accuracy", "sd", "95 % interval", *(f"- {b}" for b in baselines)]
            lines += [
                "| " + " | ".join([*titles, "seconds"]) + " |",
                "|---|---|" + "---:|" * (len(titles) - 1),
            ]
            means = {method: np.mean(list(values.values())) for method, values in methods.items()}
            order = sorted(methods, key=lambda method: (method not in baselines.values(), means[method]))
            for method in order:
                of_method = [cell for cell in cells if is_of(cell, re.sub(r", peer \d$", "", networks), method)]
                used = of_method[0]["settings"]
                weights = ", ".join(written(used[name]) for name in LAMBDAS if used.get(name)) or "-"
                mean, deviation, half = interval(list(methods[method].values()))
                seconds = np.mean([cell["training"]["train_runtime"] for cell in of_method])
                row = [without_weights(method), weights, str(len(methods[method])), f"{mean:.2f}"]
                row += ["-", "-"] if math.isnan(half) else [f"{deviation:.2f}", f"\u00b1 {half:.2f}"]
                row += ["" if b == method else paired(methods[method], methods[b]) for b in baselines.values()]
                lines.append("| " + " | ".join([*row, f"{seconds:.0f}"]) + " |")
            lines.append("")
    return "\n".join(lines)


def draw(cells: list[dict], path: str) -> None:
    """
    Draw each method's accuracies: a dot for each seed, the mean and its interval.

    Args:
        cells (`list[dict]`):
            What [`collect`] gave.
        path (`str`):
            The PNG file to write.
    """
    found = accuracies(cells, "test") or accuracies(cells, "validation")
    if not found:
        return
    rows = [max(len(methods), 2) for methods in found.values()]
    figure, panels = plt.subplots(
        len(found), 1, figsize=(9, 0.34 * sum(rows) + 1.1 * len(rows)), height_ratios=rows, squeeze=False
    )
    for panel, (networks, methods) in zip(panels[:, 0], found.items(), strict=True):
        order = sorted(methods, key=lambda method: np.mean(list(methods[method].values())))
        for y, method in enumerate(order):
            values = list(methods[method].values())
            mean, _, half = interval(values)
            colour = "C7" if method in map(label, BASELINES) else "C0"
            panel.plot(values, [y] * len(values), ".", color=colour, alpha=0.5)
            panel.errorbar(mean, y, xerr=None if math.isnan(half) else half, fmt="o", color=colour, capsize=3)
        panel.set_yticks(range(len(order)), order)
        panel.set_title(networks, fontsize="medium")
        panel.grid(axis="x", alpha=0.3)
    figure.supxlabel(
        "accuracy, %: the mean of the seeds, its 95 % interval, and a small dot for each seed", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def sweep_points(cells: list[dict]) -> tuple[dict, dict]:
    """
    Take from the cells what the choice of weights rests on: those for which the test split was not read.

    Args:
        cells (`list[dict]`):
            What [`collect`] gave; cells of IE-FT, inheritance and FT count that differ in their weights alone.

    Returns:
        `tuple[dict, dict]`: by what was varied, and by networks where there are several, accuracies by `lambda_inh`;
        and by loss, pairs of its weight and its gradient's share.
    """
    lines, shares = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    are_several = len({cell["settings"]["networks"] for cell in cells}) > 1
    for cell in cells:
        used, metrics = cell["settings"], cell["models"].get("student", {"metrics": {}})["metrics"]
        if used.get("knowledge") != "factors" or "validation_accuracy" not in metrics or "test_accuracy" in metrics:
            continue
        if "," in without_weights(used["method"]) or "auto" in used.values():  # another distance, ratio or schedule
            continue
        kd = " + KD" if used["lambda_kd"] else ""
        if used["lambda_inh"] > 0:
            ratio = used["lambda_exp"] / used["lambda_inh"]
            kind = "FT" if used["inheritance_ratio"] == 1 else f"IE-FT, lambda_exp {ratio:.2g} of lambda_inh"
            of = f", {used['networks']}" if are_several else ""
            lines[kind + kd + of][used["lambda_inh"]].append(100 * metrics["validation_accuracy"])
        for loss, weight in (("inheritance", "lambda_inh"), ("exploration", "lambda_exp")):
            if f"{loss}_loss_gradient_share" in cell["gradient_shares"]:
                shares[loss].append((used[weight], cell["gradient_shares"][f"{loss}_loss_gradient_share"]))
    return {kind: dict(points) for kind, points in lines.items()}, dict(shares)


def draw_sweep(cells: list[dict], path: str) -> None:
    """
    Draw accuracy on the validation part over lambda_inh, a line for each share of lambda_exp, and what they amount to.

    Args:
        cells (`list[dict]`):
            What [`collect`] gave.
        path (`str`):
            The PNG file to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    lines, shares = sweep_points(cells)
    for colour, (name, points) in enumerate(sorted(lines.items())):
        xs = sorted(points)
        left.plot(xs, [np.mean(points[x]) for x in xs], "o-", color=f"C{colour}", label=name)
    pairs = [cell for cell in cells if "student" in cell["models"]]
    untested = [cell for cell in pairs if "test_accuracy" not in cell["models"]["student"]["metrics"]]
    for networks, methods in accuracies(untested, "validation").items():
        if plain := list(methods.get("plain", {}).values()):
            left.axhline(np.mean(plain), color="C7", linestyle="--", label=f"plain, {networks}")
    left.set(xscale="log", xlabel="lambda_inh", ylabel="accuracy on held-out training images, %")
    if left.has_data():
        left.legend(fontsize="small")
    for loss, points in shares.items():
        right.plot(*zip(*sorted(points), strict=True), ".", label=loss)
    right.axhline(0.01, color="C7", linestyle="--", label="a warning is given below")
    right.set(xscale="log", yscale="log", xlabel="weight", ylabel="gradient at the features / that of the task's loss")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
