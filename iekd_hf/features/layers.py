"""Which layers of a vision model give its feature maps: by default, by name, and in pairs."""

import difflib

from torch import nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from ..models.adapters import without_adapters
from ..models.kinds import is_detector
from ..models.signature import check_sees_images, find_image_tower, is_headless
from .listing import find_layers
from .maps import OWN_OUTPUTS, count_extra_tokens, split_index, suggest_layers
from .trace import last_features_layer, layer_before_pooling


# Where DETR-like detectors keep a bare timm model.
_BARE_BACKBONES = ("backbone.model", "backbone.conv_encoder.model")


def default_layers(model: nn.Module) -> list[str]:
    """Return the layers whose maps are taken by default, in the order of the forward pass."""
    check_sees_images(model)
    if hasattr(model, "timm_model"):  # of Transformers, around a timm model with its head
        return [f"timm_model.{last_features_layer(model.timm_model)}"]
    if hasattr(model, "forward_features") and hasattr(model, "pretrained_cfg"):
        return [last_features_layer(model)]
    if isinstance(model, BackboneMixin):
        return ["feature_maps[-1]"]
    if layers := backbone_layers(model):
        return layers
    if is_detector(model) and not count_extra_tokens(model)[1]:
        raise ValueError(
            f"Expected a detector with a backbone, got {type(model).__name__} without one that is known: name its "
            f"layer in teacher_layers, student_layers or peer_layers, {_candidates(model)}.{suggest_layers()}"
        )
    if is_headless(model):
        return ["last_hidden_state"]
    base_model = getattr(model, "base_model", model)
    if base_model is not model:
        return [next(name for name, module in model.named_modules() if module is base_model)]
    # The image tower of CLIP, or of a classifier that holds the parts of its body itself: SigLIP, HGNet V2.
    if layer := find_image_tower(model) or layer_before_pooling(model):
        return [layer]
    raise ValueError(
        f"Expected a model whose last feature map is known, got {type(model).__name__}: name its layer in "
        f"teacher_layers, student_layers or peer_layers.{suggest_layers()}"
    )


def pair_layers(
    student: nn.Module, teacher: nn.Module, student_layers: list[str] | None, teacher_layers: list[str] | None
) -> tuple[list[str], list[str]]:
    """
    Return the layers of student and teacher that are compared, in order.

    If one side has more default layers than the other (an RT-DETR's three levels against a classifier's one map), its
    last ones are taken.
    """
    named = (student_layers, teacher_layers)
    found = [
        list(layers) if layers is not None else default_layers(without_adapters(model))
        for model, layers in zip((student, teacher), named, strict=True)
    ]
    count = min(map(len, found))
    if any(layers is not None and len(layers) > count for layers in named):
        raise ValueError(
            f"Expected as many student_layers as teacher_layers, got {len(found[0])} and {len(found[1])}: they are "
            "paired in order, and None stands for the last feature map, or the levels of a detector's pyramid."
        )
    return found[0][-count:], found[1][-count:]


def backbone_layers(model: nn.Module) -> list[str]:
    """
    Name the maps of the backbone that a model holds.

    A detector whose encoder fuses the levels of a pyramid (RT-DETR, D-FINE and others whose configuration has
    `encoder_in_channels`) has one layer for each level; all other models have the last map alone.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    modules = {name: module for name, module in model.named_modules() if name}
    # The convolutions in the embeddings of a hybrid DPT are no backbone of what predicts.
    inner = {name for name in modules if "embeddings" in name.split(".")}
    of_transformers = (n for n, module in modules.items() if isinstance(module, BackboneMixin) and n not in inner)
    bare = (name for name in modules if f".{name}".endswith(tuple(f".{end}" for end in _BARE_BACKBONES)))
    path = next(of_transformers, None) or next(bare, None)
    if path is None:
        return []
    num_levels = len(getattr(model.config, "encoder_in_channels", None) or [None])
    return [f"{path}[{index}]" for index in range(-num_levels, 0)]


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a layer's name; for a map that the model itself returns, the model."""
    modules, (path, _) = dict(model.named_modules()), split_index(name)
    returns_maps = not isinstance(model, PreTrainedModel) or is_headless(model) or isinstance(model, BackboneMixin)
    if path in OWN_OUTPUTS and path not in modules and returns_maps:
        return model
    if path not in modules or not path:
        close = difflib.get_close_matches(path, modules, n=5, cutoff=0.5)
        hint = f"; close matches: {', '.join(close)}" if close else ""
        raise ValueError(f"Expected a layer of {type(model).__name__}, got {name!r}{hint}.{suggest_layers()}")
    return modules[path]


def check_layers(model: nn.Module, names: list[str]) -> None:
    """Refuse names of layers that a model does not have, with or without adapters."""
    for name in names:
        find_layer(without_adapters(model), name)


def _candidates(model: nn.Module) -> str:
    """Suggest the last layers that give a map, if the model takes an image of 224 pixels."""
    try:
        found = list(find_layers(model))
    except Exception:  # a model that nothing is known of, such as which size it takes
        found = []
    return f"such as {' or '.join(map(repr, found[-5:]))}" if found else "whichever gives its last feature map"
