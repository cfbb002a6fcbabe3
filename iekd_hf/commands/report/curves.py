"""The pictures at the end of a run of image classifiers: what was gained, and the losses for those who tune them."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from .table import Result, gain


_MOST_EXAMPLES = 12
_WORDS = {"task": "the labels", "inheritance": "inheriting", "exploration": "exploring", "kd": "the teacher's logits"}
_LOSSES = ("task_loss", "inheritance_loss", "exploration_loss", "kd_loss", "kl_loss", "reconstruction_loss")
_COLOURS = {"teacher": "0.45", "plain student": "C1", "distilled student": "C0"}
_COLOURS_OF_PEERS = {"alone": "0.45", "DML": "C1"}


@dataclass
class Examples:
    """Hold the validation images, what they are, and what two students take them for."""

    images: object  # a sequence of `PIL.Image.Image`, of which some are read
    truth: np.ndarray
    before: np.ndarray
    after: np.ndarray
    names: list[str]


def title_of(results: list[Result], num_images: int) -> str:
    """
    Say in one sentence what distilling has gained, or what there is instead.

    Args:
        results (`list[Result]`):
            Those of `iekd-hf distill`: teacher, plain student, distilled student; the last one alone is enough.
        num_images (`int`):
            How many images they were measured on.

    Returns:
        `str`: the sentence.

    Example:

    ```python
    >>> teacher, student = ({"accuracy": value} for value in (0.98, 0.96))
    >>> title_of([Result("teacher", 20, teacher), Result("distilled student", 10, student)], 599)
    'The distilled student has 96.0 % on 599 validation images, its teacher 98.0 %.'

    ```
    """
    if sentence := gain(results, num_images):
        return sentence
    accuracy = {result.name: 100 * result.metrics["accuracy"] for result in results if "accuracy" in result.metrics}
    name = results[-1].name
    if name not in accuracy:
        return f"How the {name} has learnt"
    teacher = f", its teacher {accuracy['teacher']:.1f} %" if "teacher" in accuracy else ""
    return f"The {name} has {accuracy[name]:.1f} % on {num_images:,} validation images{teacher}."


def gain_of_peers(results: list[Result]) -> str:
    """
    Say in one sentence what learning together has gained.

    Args:
        results (`list[Result]`):
            Those of `iekd-hf mutual`, named "peer 1 alone", "peer 1, DML" and so on.

    Returns:
        `str`: the sentence.

    Example:

    ```python
    >>> alone, together = ({"accuracy": value} for value in (0.93, 0.945))
    >>> gain_of_peers([Result("peer 1 alone", 1000, alone), Result("peer 1, IE-DML", 1000, together)])
    'Learning together by IE-DML: peer 1 94.5 % (+1.5 points over alone)'

    ```
    """
    accuracy = {result.name: 100 * result.metrics["accuracy"] for result in results if "accuracy" in result.metrics}
    how = results[-1].name.partition(", ")[2]
    peers = []
    for name, value in accuracy.items():
        peer, _, own = name.partition(", ")
        if own == how:
            alone = accuracy.get(f"{peer} alone")
            peers.append(
                f"{peer} {value:.1f} %" + ("" if alone is None else f" ({value - alone:+.1f} points over alone)")
            )
    return f"Learning together by {how}: {', '.join(peers)}"


def draw_gain(results: list[Result], path: Path, num_images: int, examples: Examples | None = None) -> None:
    """Draw accuracy while the students learn, images that only the distilled one gets right, and what pulled at it."""
    shares = results[-1].gradient_shares
    width = {_draw_accuracy: 1.25}
    if examples is not None:
        width[_draw_examples] = 1.15
    if shares:
        width[_draw_shares] = 0.95
    figure = plt.figure(figsize=(4.6 * sum(width.values()), 4.9), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(1, len(width), width_ratios=list(width.values())))
    what = {_draw_accuracy: results, _draw_examples: examples, _draw_shares: shares}
    for draw, part in zip(width, parts, strict=True):
        draw(part, what[draw])
    figure.suptitle(title_of(results, num_images), fontsize="x-large")
    _save(figure, path)


def draw_peers(results: list[Result], path: Path) -> None:
    """Draw accuracy while the peers learn, a panel for each peer."""
    by_peer: dict[str, list[Result]] = {}
    for result in results:
        by_peer.setdefault(" ".join(result.name.split()[:2]).rstrip(","), []).append(result)
    figure = plt.figure(figsize=(6.2 * len(by_peer), 4.9), layout="constrained")
    for (peer, own), part in zip(by_peer.items(), np.atleast_1d(figure.subfigures(1, len(by_peer))), strict=True):
        axes = part.subplots()
        names = {result.name: result.name.removeprefix(peer).strip(", ") for result in own}
        colours = {name: _COLOURS_OF_PEERS.get(how, "C0") for name, how in names.items()}
        _draw_curves(axes, own, colours, names)
        axes.set_title(f"{peer} ({own[0].parameters:,} parameters)")
    figure.suptitle(gain_of_peers(results), fontsize="x-large")
    _save(figure, path)


def draw_losses(result: Result, path: Path) -> None:
    """Draw the losses as they are logged, before their weights: for those who tune these."""
    names = [name for name in _LOSSES if any(name in logs for logs in result.log_history)]
    if not names:
        return
    figure, panels = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.2), squeeze=False, layout="constrained")
    for axes, name in zip(panels[0], names, strict=True):
        points = [(logs["step"], logs[name]) for logs in result.log_history if name in logs]
        axes.plot(*zip(*points, strict=True), marker=".", color="C0")
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{result.name}: losses before their weights; each is to fall")
    _save(figure, path)


def _draw_accuracy(part: SubFigure, results: list[Result]) -> None:
    axes = part.subplots()
    _draw_curves(axes, results, _COLOURS, {result.name: result.name for result in results})
    axes.set_title("Accuracy while they learn")


def _draw_curves(axes: Axes, results: list[Result], colours: dict[str, str], names: dict[str, str]) -> None:
    """Draw a line for each network that learnt, with its name and final accuracy at its end; a teacher's is dashed."""
    ends, last = [], 1
    for result in results:
        final, colour = result.metrics.get("accuracy"), colours.get(result.name, "C2")
        points = [
            (logs["step"], 100 * logs["eval_accuracy"]) for logs in result.log_history if "eval_accuracy" in logs
        ]
        if final is not None:
            ends.append((100 * final, f"{names[result.name]} {100 * final:.1f} %", colour))
        if result.name == "teacher" or not points:
            if final is not None:
                axes.axhline(100 * final, linestyle="--", color=colour, linewidth=1.2)
        else:
            axes.plot(*zip(*points, strict=True), marker=".", color=colour)
            last = max(last, points[-1][0])
    axes.set(xlabel="step", ylabel="% of the validation images", xlim=(0, last))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.margins(y=0.06)
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 101.5))
    _label_ends(axes, ends, last)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]], last: float) -> None:
    """Write names beside the ends of lines, one above the other where these are close."""
    low, high = axes.get_ylim()
    apart, top = (high - low) * 0.055, high
    for value, text, colour in sorted(ends, reverse=True):
        top = min(value, top)
        axes.annotate(text, (last, top), (6, 0), textcoords="offset points", color=colour, va="center")
        top -= apart


def _draw_examples(part: SubFigure, examples: Examples) -> None:
    was, is_now = examples.before == examples.truth, examples.after == examples.truth
    won, lost = np.flatnonzero(is_now & ~was), np.flatnonzero(was & ~is_now)
    part.suptitle(
        f"Only the distilled student gets these right\n(now right: {len(won):,}, now wrong: {len(lost):,})",
        fontsize="large",
    )
    few = won[np.linspace(0, len(won) - 1, min(_MOST_EXAMPLES, len(won))).astype(int)] if len(won) else []
    across = 4 if len(few) > 6 else 3
    panels = part.subplots(max(1, -(-len(few) // across)), across, squeeze=False).flat
    for axes in panels:
        axes.axis("off")
    for axes, index in zip(part.axes, few, strict=False):
        image = examples.images[int(index)].convert("RGB")
        image.thumbnail((160, 160))
        axes.imshow(image)
        names = [_short(examples.names[said[index]]) for said in (examples.truth, examples.before)]
        axes.set_title("it is {}\nplain: {}".format(*names), fontsize="small", pad=3)


def _draw_shares(part: SubFigure, shares: dict[str, float]) -> None:
    axes = part.subplots()
    shares = {_WORDS.get(name, name): share for name, share in {"task": 1.0, **shares}.items()}
    bars = axes.barh(list(shares), list(shares.values()), color=["C1", *["C0"] * (len(shares) - 1)], height=0.6)
    axes.bar_label(bars, [f"{share:.2g}" for share in shares.values()], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(title="What pulled at its features", xlabel="gradient, the labels' = 1, before training")


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}…"


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
