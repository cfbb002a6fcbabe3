"""
Look at what the halves of a distilled student have become: the figures of the IE-KD paper, from a finished run.

Example:
  iekd-hf analyze --run out --output_dir analysis

`--run` is the output_dir of an IEKDTrainer (or of `iekd-hf distill`), where the student and, in `_encoders`, its split
are. The images come as in `iekd-hf distill`; without any, scikit-learn's digits. It writes
  cka.png             linear CKA between the features of teacher, student, both halves, and a plain student
  active_neurons.png  how many neurons of each respond
  relevance.png       where each looks (Grad-CAM of the predicted class) on some images
  analysis.json       the numbers

Where the run compared factors, it also says which share of them differs from image to image: 0 % for an encoder that
has learnt to say the same of every image, whatever its half of the student does.

The teacher sees its own pixels, as in training: those of the image processor that was saved with it. relevance.png
leaves out networks without logits of classes, and those that classify by a class token alone, as a ViT does.
"""

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from iekd_hf import FactorEncoder, exploration_loss

from ..data.rgb import to_rgb
from ..features.maps import pick_tensor, split_index
from ..features.patches import as_inputs
from ..features.tap import FeatureTap, image_size_in
from ..models.loading import find_processor, load_model
from ..teacher.frozen import fingerprint
from ..teacher.pixels import TeacherPixels
from ..training.checkpoints import ENCODERS_FILE, ENCODERS_FOLDER, load_paraphrasers
from ..training.manifest import check_undamaged
from ..training.resume import PARAPHRASER_FOLDER
from .images.data import LabelledArguments, load_images
from .images.run import build_processor
from .packages import require
from .parser import parse_arguments
from .report.results import RESULTS
from .terminal import command


logger = logging.getLogger(__name__)


@dataclass
class AnalysisArguments:
    """Say which models, and how many images."""

    _argument_group_name = "Analysis"

    run: str = field(default="out", metadata={"help": "Folder of a finished run of IEKDTrainer."})
    teacher: str | None = field(
        default=None, metadata={"help": "The run's teacher, a Hub id or a folder. Default: `_teacher` of the run."}
    )
    plain: str | None = field(
        default=None,
        metadata={"help": "The same student without a teacher. Default: `_plain_student` of the run, if it is there."},
    )
    paraphraser: str | None = field(
        default=None,
        metadata={"help": "Paraphraser of a run that compared factors. Default: its `_paraphraser`, if it is there."},
    )
    output_dir: str = field(default="analysis", metadata={"help": "Where the pictures and numbers go."})
    num_images: int = field(default=512, metadata={"help": "Images for CKA and active neurons."})
    num_pictures: int = field(default=6, metadata={"help": "Images to draw the relevance on."})


class Tapped(nn.Module):
    """Show a model's feature map to a module of its own, where captum can attribute."""

    def __init__(self, model: PreTrainedModel, layers: list[str] | None = None, channels: torch.Tensor | None = None):
        super().__init__()
        self.model, self.tap, self.channels = model.eval(), FeatureTap(model, layers), channels
        self.own_pixels: TeacherPixels | None = None  # what makes this model's pixels of the student's
        self.tap.attach()
        self.map = nn.Identity()
        self.tap.modules[0].register_forward_hook(self._show)

    def _show(self, module, args, output):
        # An identity gives the very tensor that the logits come from, also where the layer has pooled it already.
        self.map(pick_tensor(output, split_index(self.tap.layers[0])[1]))

    def _inputs(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        own = pixel_values if self.own_pixels is None else self.own_pixels(pixel_values)
        return as_inputs(self.model, own)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """Return the logits, if there are any."""
        return getattr(self.model(**self._inputs(pixel_values)), "logits", None)

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the map `(batch_size, channels, height, width)`, of the channels that count."""
        (f,) = self.tap.run(self._inputs(pixel_values))[1]
        return f if self.channels is None else f.index_select(1, self.channels)

    def relevance(self, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """
        Return Grad-CAM of the predicted class in [0, 1], at the size of the given pixels (N, H, W).

        `None` where no class depends on the map's places: there are no classes, or the class token decides alone.
        """
        from captum.attr import LayerGradientXActivation

        logits = self(pixel_values)
        if logits is None or logits.ndim != 2:
            return None
        by_gradient = LayerGradientXActivation(self, self.map, multiply_by_inputs=False)
        zeros = {"materialize_grads": True}  # for CvT, whose class token is not among its map's
        gradient = by_gradient.attribute(pixel_values, logits.argmax(dim=1), grad_kwargs=zeros).detach()
        # Grad-CAM averages over places, for which tokens must lie on their grid first.
        (gradient,) = self.tap.lay_out([gradient], image_size_in(self._inputs(pixel_values), self.model))
        if not gradient.any():
            return None
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        if self.channels is not None:
            weights = weights.index_select(1, self.channels)
        heat = (weights * self.features(pixel_values)).sum(dim=1, keepdim=True).relu()
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
    """Compare maps (N, C, H, W) by linear CKA (Kornblith et al., 2019); each position of each image is a sample."""
    size = tuple(min(f.shape[axis] for f in features.values()) for axis in (2, 3))
    maps = [F.adaptive_avg_pool2d(f, size) for f in features.values()]
    return np.array([[_cka(first, second) for second in maps] for first in maps])


def _cka(first: torch.Tensor, second: torch.Tensor) -> float:
    # The library's CKA wants factors of one width: zero channels change neither its value nor its centring.
    width = max(first.shape[1], second.shape[1])
    first, second = (F.pad(f, (0, 0, 0, 0, 0, width - f.shape[1])) for f in (first, second))
    return exploration_loss(first, second, distance="cka").item()


def varying_share(factors: torch.Tensor) -> float:
    r"""
    Measure which share of factors differs from image to image: 1 - \(\| E \hat F \|_2^2\).

    Args:
        factors (`torch.Tensor` of shape `(num_images, factor_channels, height, width)`):
            Factors; the losses see only their direction \(\hat F\).

    Returns:
        `float`: 0 where all images have the same direction, at most 1.

    Example:

    ```python
    >>> same, unrelated = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> [round(varying_share(factors.view(2, 2, 1, 1)), 3) for factors in (same, unrelated)]
    [0.0, 0.5]

    ```
    """
    return 1 - F.normalize(factors.flatten(1), dim=1).mean(dim=0).square().sum().item()


@torch.no_grad()
def encode(run: str, given: str | None, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Return the factors of the teacher's map and of the halves, of a run that compared factors; else nothing.

    The paraphraser is the one that is given, which must be the run's, or the one that the run has kept.
    """
    source = given or os.path.join(run, PARAPHRASER_FOLDER)
    if given is None and not os.path.isdir(source):
        return {}
    file = Path(run) / ENCODERS_FOLDER / ENCODERS_FILE
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    if metadata["knowledge"] != "factors":
        return {}
    paraphrasers = load_paraphrasers(source, len(metadata["teacher_layers"].split(", ")))
    if fingerprint(paraphraser.without_decoder() for paraphraser in paraphrasers) != metadata["paraphrasers"]:
        if given is not None:
            raise ValueError(
                f"Expected the paraphraser of the run in {run!r}, got another one in --paraphraser={given!r}: name "
                "the one that the run had."
            )
        return {}  # that of an earlier run in this folder
    compressor = paraphrasers[0].eval()
    factors, weights = {"teacher": compressor.encode(features["teacher"])}, load_file(file)
    for half in ("inheritance", "exploration"):
        prefix, name = f"{half}_encoders.0.", f"{half} half"
        own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        if own:
            kernel_size = own["layers.1.weight"].shape[-1]
            encoder = FactorEncoder(features[name].shape[1], compressor.factor_channels, kernel_size).eval()
            encoder.load_state_dict(own)
            factors[name] = encoder(features[name])
    return factors


def read_split(run: str) -> tuple[list[str], torch.Tensor, torch.Tensor, list[str]]:
    """Return the layer that was split, the channels that inherit and explore, and the teacher's layer."""
    file = Path(run) / ENCODERS_FOLDER / ENCODERS_FILE
    if not file.is_file():
        raise ValueError(
            f"Expected a finished run of IEKDTrainer in --run, got {run!r} without {ENCODERS_FOLDER}/{ENCODERS_FILE}: "
            "give the output_dir of the run, after save_model()."
        )
    check_undamaged(file.parent)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
        halves = [opened.get_tensor(f"splits.0.{half}_indices") for half in ("inheritance", "exploration")]
    return [metadata["student_layers"].split(", ")[0]], *halves, [metadata["teacher_layers"].split(", ")[0]]


def seed_of(run: Path) -> int:
    """Return the seed of a command's run, by which it has drawn its validation images."""
    file = run / RESULTS
    settings = json.loads(file.read_text())["settings"] if file.is_file() else {}
    return settings.get("seed", 42)


def load(name: str, role: str) -> PreTrainedModel:
    """Load a model as it was saved, with or without a head, to be measured in float32."""
    return load_model(name, role, dtype="float32")


def where_they_look(networks: dict[str, Tapped], pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the relevance of the networks that have one, and name the others."""
    heat = {name: network.relevance(pixels) for name, network in networks.items()}
    if without := [name for name, each in heat.items() if each is None]:
        logger.warning(
            f"relevance.png leaves out {', '.join(without)}: Grad-CAM needs logits of classes that "
            "come from the places of the map, not from a class token alone."
        )
    return {name: each for name, each in heat.items() if each is not None}


KINDS = (AnalysisArguments, LabelledArguments)


@command
def main(given: list[str]) -> None:
    """Run `iekd-hf analyze`, with the arguments of the command line by default."""
    analysis, data_args = parse_arguments(KINDS, __doc__, "iekd-hf analyze", given)
    require("cli", "captum", "matplotlib", "sklearn")
    from .report.analysis import draw_active, draw_cka, draw_relevance

    run, out = Path(analysis.run), Path(analysis.output_dir)
    student_layers, inherits, explores, teacher_layers = read_split(analysis.run)
    student = load(analysis.run, "--run")
    teacher = analysis.teacher or str(run / "_teacher")
    if analysis.teacher is None and not (run / "_teacher").is_dir():
        raise ValueError(
            f"Expected the run's teacher in --teacher, got none, and {analysis.run!r} did not train its own: name the "
            "teacher that it was distilled from."
        )
    networks = {
        "teacher": Tapped(load(teacher, "--teacher"), teacher_layers),
        "student": Tapped(student, student_layers),
    }
    for name, channels in (("inheritance half", inherits), ("exploration half", explores)):
        if len(channels):
            networks[name] = Tapped(load(analysis.run, "--run"), student_layers, channels)
    plain = analysis.plain or (str(run / "_plain_student") if (run / "_plain_student").is_dir() else None)
    if plain is not None:
        networks["plain student"] = Tapped(load(plain, "--plain"), student_layers)

    validation = load_images(data_args, seed_of(run))["validation"]
    validation = validation.shuffle(seed=0).select(range(min(analysis.num_images, len(validation))))
    images = [to_rgb(image) for image in validation["image"]]
    processor = build_processor(analysis.run, data_args.image_size, images[0])
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    networks["teacher"].own_pixels = TeacherPixels.between(processor, find_processor(teacher))  # as in training
    features = {name: torch.cat([net.features(x) for x in pixels.split(128)]) for name, net in networks.items()}

    out.mkdir(parents=True, exist_ok=True)
    matrix = cka_matrix(features)
    active = {name: active_neurons(f) for name, f in features.items()}
    factors = encode(analysis.run, analysis.paraphraser, features)
    varying = {name: varying_share(factor) for name, factor in factors.items()}
    numbers = {
        "images": len(images),
        "cka": {a: {b: float(matrix[i, j]) for j, b in enumerate(features)} for i, a in enumerate(features)},
        "active_neurons": active,
        "varying_factors": varying,
    }
    (out / "analysis.json").write_text(json.dumps(numbers, indent=1))
    pictures = [out / "cka.png", out / "active_neurons.png"]
    draw_cka(matrix, list(features), pictures[0])
    draw_active(active, pictures[1])
    if heat := where_they_look(networks, pixels[: analysis.num_pictures]):
        pictures.append(out / "relevance.png")
        draw_relevance(images, heat, pictures[-1])
    width = max(map(len, features))
    print(f"{'':{width}}  CKA with the teacher  active neurons  active channels  varying factors")
    for i, name in enumerate(features):
        shares = f"{active[name]['active_share']:14.1%}  {active[name]['active_channels']:15.1%}"
        share = f"{varying[name]:15.1%}" if name in varying else f"{'-':>15}"
        print(f"{name:{width}}  {matrix[i, 0]:20.3f}  {shares}  {share}")
    print(f"\nPictures: {' '.join(map(str, pictures))}   Numbers: {out}/analysis.json")


if __name__ == "__main__":
    main()
