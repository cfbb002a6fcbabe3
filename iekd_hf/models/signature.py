"""What a model takes and returns, as its own forward says."""

import dataclasses
import functools
import inspect
import re
import typing

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, find_labels


# Models that are trained on a few patches of each image, and what loads their weights to see all of them.
WITHOUT_MASKS = {"ViTMAEModel": "ViTModel", "ViTMAEForPreTraining": "ViTModel", "HieraForPreTraining": "HieraModel"}
# Models of videos, and what loads their weights for single images.
OF_IMAGES = {"Sam2VideoModel": "Sam2Model"}

_HAS_HEAD = re.compile("For[A-Z]").search


def takes(model: nn.Module, name: str) -> bool:
    """Return whether a model's forward has an argument of that name."""
    return name in inspect.signature(model.forward).parameters


def is_headless(model: nn.Module) -> bool:
    """Return whether a model of Transformers gives features instead of predictions: what `AutoModel` loads."""
    if not isinstance(model, PreTrainedModel) or _HAS_HEAD(type(model).__name__):
        return False
    fields = _returned_fields(model)
    if fields is None:  # code from elsewhere, which need not say what it returns
        return not find_labels(type(model))
    return "last_hidden_state" in fields and not fields & {"loss", "logits"}


def takes_labels(model: nn.Module) -> bool:
    """Return whether a model has a head for labels; of Transformers, what `AutoModel` loads has none."""
    kind = type(model)
    return not isinstance(model, PreTrainedModel) or bool(_HAS_HEAD(kind.__name__)) or bool(_labels_of(kind))


_labels_of = functools.cache(find_labels)  # it is asked for each batch


def find_image_tower(model: nn.Module) -> str | None:
    """Name the part of a model that alone takes images and gives their features, as in CLIP and SAM."""
    for name, module in model.named_modules():
        if name and is_headless(module) and takes(module, "pixel_values") and not takes(module, "input_ids"):
            return name
    return None


def check_sees_images(model: nn.Module) -> None:
    """Refuse a model that takes text or videos alone, or hides most of each image from itself."""
    name, modalities = type(model).__name__, getattr(model, "input_modalities", None)
    if takes(model, "pixel_values_videos") or modalities in ("video", ("video",)):
        raise ValueError(
            f"Expected a model of single images, got {name}, which takes videos: its tokens lie on no image's grid. "
            "Pass a model of images."
        )
    if takes(model, "input_ids") and not takes(model, "pixel_values"):
        raise ValueError(
            f"Expected a model of images, got {name}, which takes text: pass the image tower, such as "
            "CLIPVisionModel.from_pretrained(...)."
        )
    for part in model.modules():
        if type(part).__name__ in WITHOUT_MASKS:
            raise ValueError(
                f"Expected a model that sees whole images, got {name}, which hides most patches of each at random: "
                f"pass {WITHOUT_MASKS[type(part).__name__]}.from_pretrained(...), which reads the same files."
            )


def _returned_fields(model: nn.Module) -> set[str] | None:
    """Return the fields of the output that a model's forward is annotated with; `None` where it is not."""
    annotation = inspect.signature(model.forward).return_annotation
    outputs = [kind for kind in (*typing.get_args(annotation), annotation) if _is_output(kind)]
    return {field.name for kind in outputs for field in dataclasses.fields(kind)} if outputs else None


def _is_output(kind: object) -> bool:
    return inspect.isclass(kind) and issubclass(kind, ModelOutput) and dataclasses.is_dataclass(kind)
