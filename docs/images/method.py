"""Draw the figure of the method: python docs/images/method.py writes method.png beside this file."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch


FROZEN, TRAINED, LOSS, DATA = "#d6e4f0", "#fde3c8", "#f6c9c9", "#eeeeee"


def box(axis: Axes, x: float, y: float, text: str, colour: str, width: float = 1.5, height: float = 0.7) -> None:
    """Draw a box around its centre."""
    corner = (x - width / 2, y - height / 2)
    shape = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0.02,rounding_size=0.1", fc=colour, ec="#444444")
    axis.add_patch(shape)
    axis.text(x, y, text, ha="center", va="center", fontsize=10)


def arrow(
    axis: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "", share: float = 0.5
) -> None:
    """Draw an arrow with a label above it, that share of the way along."""
    axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "#444444", "lw": 1.2})
    if text:
        x, y = (a + share * (b - a) for a, b in zip(start, end, strict=True))
        axis.text(x, y + 0.1, text, ha="center", va="bottom", fontsize=10)


def draw() -> plt.Figure:
    """Return the figure."""
    figure, axis = plt.subplots(figsize=(10, 4.2))
    box(axis, 0.6, 2.2, "images", DATA, width=1.0)
    box(axis, 2.5, 3.7, "teacher", FROZEN)
    box(axis, 5.2, 3.7, "paraphraser's\nencoder", FROZEN)
    box(axis, 2.5, 1.4, "student", TRAINED)
    box(axis, 5.2, 2.2, "encoder", TRAINED)
    box(axis, 5.2, 0.9, "encoder", TRAINED)
    box(axis, 8.3, 2.95, r"$L_{inh}$: be like $F_T$", LOSS, width=2.0)
    box(axis, 8.3, 1.55, r"$L_{exp}$: be unlike $F_T$", LOSS, width=2.0)
    box(axis, 8.3, -0.05, r"$L_{goal}$: the task's loss", LOSS, width=2.0)
    arrow(axis, (1.15, 2.45), (1.72, 3.5))
    arrow(axis, (1.15, 1.95), (1.72, 1.6))
    arrow(axis, (3.27, 3.7), (4.42, 3.7), "$f_T$")
    arrow(axis, (3.27, 1.55), (4.42, 2.15), "$f_{inh}$")
    arrow(axis, (3.27, 1.25), (4.42, 0.95), "$f_{exp}$")
    arrow(axis, (5.97, 2.25), (7.27, 2.85), "$F_{inh}$", share=0.3)
    arrow(axis, (5.97, 0.95), (7.27, 1.45), "$F_{exp}$", share=0.3)
    axis.plot([5.97, 6.75, 6.75], [3.7, 3.7, 1.75], color="#444444", lw=1.2)
    axis.text(6.35, 3.78, "$F_T$", ha="center", va="bottom", fontsize=10)
    arrow(axis, (6.75, 3.15), (7.27, 3.05))
    arrow(axis, (6.75, 1.75), (7.27, 1.65))
    axis.plot([2.5, 2.5], [1.03, -0.05], color="#444444", lw=1.2)
    arrow(axis, (2.5, -0.05), (7.27, -0.05), "predictions")
    for x, (text, colour) in enumerate(
        (("frozen in stage 2", FROZEN), ("trained in stage 2", TRAINED), ("loss", LOSS))
    ):
        box(axis, 0.4 + 2.6 * x, -0.85, "", colour, width=0.35, height=0.25)
        axis.text(0.7 + 2.6 * x, -0.85, text, va="center", fontsize=9)
    axis.set(xlim=(0, 9.5), ylim=(-1.1, 4.2), aspect="equal")
    axis.axis("off")
    figure.tight_layout(pad=0.2)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("method.png"), dpi=110, metadata={"Software": None})
