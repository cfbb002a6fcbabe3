"""
Look at what the halves of a distilled student have become: the figures of the IE-KD paper, from a finished run.

    python examples/analyze_student.py --run out --teacher out/_teacher --output_dir analysis

`--run` is the output_dir of an IEKDTrainer (or of run_iekd.py), where the student and, in `_encoders`, its split are.
The images come as in run_iekd.py; without any, scikit-learn's digits. It writes

- cka.png: linear CKA between the features of teacher, student, both halves, and a student trained without a teacher;
- active_neurons.png: how many neurons of each respond;
- relevance.png: where each looks (Grad-CAM of the predicted class) on some images;
- analysis.json: the numbers.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from classification import build_processor
from example_run import parse_arguments
from image_data import DataArguments, load_images
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from iekd_hf.checkpoints import ENCODERS_FILE, ENCODERS_FOLDER
from iekd_hf.features import FeatureTap
from iekd_hf.losses import exploration_loss


logger = logging.getLogger(__name__)


@dataclass
class AnalysisArguments:
    """Say which models, and how many images."""

    run: str = field(default="out", metadata={"help": "Folder of a finished run of IEKDTrainer."})
    teacher: str | None = field(
        default=None, metadata={"help": "The run's teacher, a Hub id or a folder. Default: `_teacher` of the run."}
    )
    plain: str | None = field(
        default=None,
        metadata={"help": "The same student without a teacher. Default: `_plain_student` of the run, if it is there."},
    )
    output_dir: str = field(default="analysis", metadata={"help": "Where the pictures and numbers go."})
    num_images: int = field(default=512, metadata={"help": "Images for CKA and active neurons."})
    num_pictures: int = field(default=6, metadata={"help": "Images to draw the relevance on."})


class Tapped(nn.Module):
    """
    Let a model's feature map pass through a module of its own, at which captum can attribute.

    Args:
        model (`PreTrainedModel`):
            An image classifier.
        layers (`list[str]`, *optional*):
            The layer of the map, as in [`FeatureTap`].
        channels (`torch.Tensor`, *optional*):
            Which of its channels count; by default all.
    """

    def __init__(self, model: PreTrainedModel, layers: list[str] | None = None, channels: torch.Tensor | None = None):
        super().__init__()
        self.model, self.tap, self.channels = model.eval(), FeatureTap(model, layers), channels
        self.tap.attach()
        self.map = nn.Identity()
        self.tap.modules[0].register_forward_hook(self._through)

    def _through(self, module, args, output):
        if isinstance(output, torch.Tensor):
            return self.map(output)
        output["last_hidden_state"] = self.map(output["last_hidden_state"])
        return output

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return self.model(pixel_values=pixel_values).logits

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the map `(batch_size, channels, height, width)`, of the channels that count."""
        (f,) = self.tap.run({"pixel_values": pixel_values})[1]
        return f if self.channels is None else f.index_select(1, self.channels)

    def relevance(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Return Grad-CAM of the predicted class, of the channels that count, at the images' size.

        Returns:
            `torch.Tensor`: of shape `(batch_size, height, width)`, within [0, 1] for each image.
        """
        grad_cam = LayerGradCam(self, self.map)
        target = self(pixel_values).argmax(dim=1)
        by_channel = grad_cam.attribute(pixel_values, target, attr_dim_summation=False).detach()
        if self.channels is not None:
            by_channel = by_channel.index_select(1, self.channels)
        heat = by_channel.sum(dim=1, keepdim=True).relu()
        heat = F.interpolate(heat, pixel_values.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return heat / heat.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)


def active_neurons(features: torch.Tensor, threshold: float = 0.1) -> dict[str, float]:
    """
    Count the neurons of a map that respond.

    A neuron is one channel at one position. It is active on an image where its response is above a share of the
    largest that any neuron of its map has on that image.

    Args:
        features (`torch.Tensor` of shape `(num_images, channels, height, width)`):
            Maps after a ReLU, so that a response is positive.
        threshold (`float`, *optional*, defaults to 0.1):
            That share.

    Returns:
        `dict[str, float]`: `active_share` of the neurons on an image, averaged over images; `active_channels`, the
        share of channels that are active somewhere on at least a tenth of the images.

    Example:

    ```python
    >>> features = torch.tensor([[0.0, 1.0], [0.0, 2.0]]).view(2, 2, 1, 1)
    >>> active_neurons(features)
    {'active_share': 0.5, 'active_channels': 0.5}

    ```
    """
    active = features > threshold * features.amax(dim=(1, 2, 3), keepdim=True)
    channels = active.flatten(2).any(dim=2).float().mean(dim=0) >= 0.1
    return {"active_share": active.float().mean().item(), "active_channels": channels.float().mean().item()}


def cka_matrix(features: dict[str, torch.Tensor]) -> np.ndarray:
    """
    Compare maps by linear CKA (Kornblith et al., 2019), each position of each image being a sample.

    Args:
        features (`dict[str, torch.Tensor]`):
            Maps `(num_images, channels, height, width)`; brought to the smallest grid first.

    Returns:
        `numpy.ndarray`: of shape `(len(features), len(features))`, within [0, 1].
    """
    size = tuple(min(f.shape[axis] for f in features.values()) for axis in (2, 3))
    maps = [F.adaptive_avg_pool2d(f, size) for f in features.values()]
    return np.array([[_cka(first, second) for second in maps] for first in maps])


def _cka(first: torch.Tensor, second: torch.Tensor) -> float:
    # The library's CKA wants factors of one width: zero channels change neither its value nor its centring.
    width = max(first.shape[1], second.shape[1])
    first, second = (F.pad(f, (0, 0, 0, 0, 0, width - f.shape[1])) for f in (first, second))
    return exploration_loss(first, second, distance="cka").item()


def read_split(run: str) -> tuple[list[str], torch.Tensor, torch.Tensor, list[str]]:
    """Return the layer that was split, the channels that inherit and explore, and the teacher's layer."""
    file = Path(run) / ENCODERS_FOLDER / ENCODERS_FILE
    if not file.is_file():
        raise ValueError(
            f"Expected a finished run of IEKDTrainer in --run, got {run!r} without {ENCODERS_FOLDER}/{ENCODERS_FILE}: "
            "give the output_dir of the run, after save_model()."
        )
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        halves = [opened.get_tensor(f"splits.0.{half}_indices") for half in ("inheritance", "exploration")]
    return [metadata["student_layers"].split(", ")[0]], *halves, [metadata["teacher_layers"].split(", ")[0]]


def load(name: str, role: str) -> PreTrainedModel:
    """Load a classifier."""
    try:
        return AutoModelForImageClassification.from_pretrained(name, use_safetensors=True)
    except OSError as error:
        raise ValueError(f"Expected a model in {role}, got {name!r}, which cannot be loaded: {error}") from error


def main() -> None:
    analysis, data_args = parse_arguments((AnalysisArguments, DataArguments), __doc__)
    logging.basicConfig(level=logging.WARNING)
    run, out = Path(analysis.run), Path(analysis.output_dir)
    student_layers, inherits, explores, teacher_layers = read_split(analysis.run)
    student = load(analysis.run, "--run")
    networks = {
        "teacher": Tapped(load(analysis.teacher or str(run / "_teacher"), "--teacher"), teacher_layers),
        "student": Tapped(student, student_layers),
    }
    for name, channels in (("inheritance half", inherits), ("exploration half", explores)):
        if len(channels):
            networks[name] = Tapped(load(analysis.run, "--run"), student_layers, channels)
    plain = analysis.plain or (str(run / "_plain_student") if (run / "_plain_student").is_dir() else None)
    if plain is not None:
        networks["plain student"] = Tapped(load(plain, "--plain"), student_layers)

    validation = load_images(data_args, seed=42)["validation"]
    validation = validation.shuffle(seed=0).select(range(min(analysis.num_images, len(validation))))
    images = [image.convert("RGB") for image in validation["image"]]
    processor = build_processor(analysis.run, data_args.image_size, images[0])
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    features = {name: torch.cat([net.features(x) for x in pixels.split(128)]) for name, net in networks.items()}

    out.mkdir(parents=True, exist_ok=True)
    matrix = cka_matrix(features)
    active = {name: active_neurons(f) for name, f in features.items()}
    numbers = {
        "images": len(images),
        "cka": {a: {b: float(matrix[i, j]) for j, b in enumerate(features)} for i, a in enumerate(features)},
        "active_neurons": active,
    }
    (out / "analysis.json").write_text(json.dumps(numbers, indent=1))
    draw_cka(matrix, list(features), out / "cka.png")
    draw_active(active, out / "active_neurons.png")
    few = pixels[: analysis.num_pictures]
    draw_relevance(images, {name: net.relevance(few) for name, net in networks.items()}, out / "relevance.png")
    width = max(map(len, features))
    print(f"{'':{width}}  CKA with the teacher  active neurons  active channels")
    for i, name in enumerate(features):
        shares = active[name]
        print(
            f"{name:{width}}  {matrix[i, 0]:20.3f}  {shares['active_share']:14.1%}  {shares['active_channels']:15.1%}"
        )
    print(f"\nPictures: {out}/cka.png {out}/active_neurons.png {out}/relevance.png   Numbers: {out}/analysis.json")


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


if __name__ == "__main__":
    main()
