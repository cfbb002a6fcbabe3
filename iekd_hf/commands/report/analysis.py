"""The pictures of `iekd-hf analyze`."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch


def draw_cka(matrix: np.ndarray, names: list[str], path: Path) -> None:
    """Draw the matrix with its values."""
    figure, axes = plt.subplots(figsize=(6.5, 5.5), constrained_layout=True)
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for (row, column), value in np.ndenumerate(matrix):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axes.set_title("Linear CKA between feature maps")
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_active(active: dict[str, dict[str, float]], path: Path) -> None:
    """Draw a bar for each network."""
    figure, axes = plt.subplots(figsize=(7, 3.5), constrained_layout=True)
    bars = axes.barh(list(active), [100 * shares["active_share"] for shares in active.values()])
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set(title="Active neurons on an image", xlabel="% of the neurons of the map")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_relevance(images: list, heat: dict[str, torch.Tensor], path: Path) -> None:
    """Draw each image, and over it where each network looks."""
    count = len(next(iter(heat.values())))
    figure, axes = plt.subplots(
        len(heat) + 1, count, figsize=(1.7 * count + 1.2, 1.75 * (len(heat) + 1)), squeeze=False, layout="constrained"
    )
    for column in range(count):
        for row, name in enumerate(["image", *heat]):
            panel = axes[row, column]
            height, width = next(iter(heat.values())).shape[1:]
            panel.imshow(images[column].resize((width, height)), cmap="gray")
            if name in heat:
                panel.imshow(heat[name][column], cmap="jet", alpha=0.5, vmin=0, vmax=1)
            panel.set_xticks([])
            panel.set_yticks([])
            if column == 0:
                panel.set_ylabel(name, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
