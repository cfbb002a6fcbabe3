"""Which layers of a vision model give its feature maps: by default, by name, and in pairs."""

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.utils import find_labels

from ..models.adapters import without_adapters
from .maps import count_extra_tokens, first_tensor, several_maps, split_index, suggest_layers, to_map


# Where DETR-like detectors keep a bare timm model.
_BARE_BACKBONES = ("backbone.model", "backbone.conv_encoder.model")


def default_layers(model: nn.Module) -> list[str]:
    """Return the layers whose maps are taken by default, in the order of the forward pass."""
    if hasattr(model, "timm_model"):  # of Transformers, around a timm model with its head
        return [f"timm_model.{last_features_layer(model.timm_model)}"]
    if hasattr(model, "forward_features"):
        return [last_features_layer(model)]
    if layers := backbone_layers(model):
        return layers
    if is_detector(model) and not count_extra_tokens(model)[1]:
        raise ValueError(
            f"Expected a detector with a backbone, got {type(model).__name__} without one that is known: name its "
            f"layer in teacher_layers, student_layers or peer_layers, {_candidates(model)}.{suggest_layers()}"
        )
    base_model = getattr(model, "base_model", model)
    if base_model is not model:
        return [next(name for name, module in model.named_modules() if module is base_model)]
    if has_no_head(model) and (layer := last_hidden_layer(model)):
        return [layer]
    # Some heads hold the parts of their body themselves: SigLIP and CLIP `vision_model`, HGNet-V2 `encoder`.
    for name in ("vision_model", "encoder"):
        if isinstance(model, PreTrainedModel) and isinstance(getattr(model, name, None), nn.Module):
            return [name]
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


def is_detector(model: nn.Module) -> bool:
    """Return whether a model of Transformers predicts boxes."""
    return type(model).__name__.endswith("ForObjectDetection")


def backbone_layers(model: nn.Module) -> list[str]:
    """
    Name the maps of the backbone that a model holds.

    A detector whose encoder fuses the levels of a pyramid (RT-DETR, D-FINE and others whose configuration has
    `encoder_in_channels`) has one layer for each level; all other models have the last map alone.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    modules = {name: module for name, module in model.named_modules() if name}
    of_transformers = (name for name, module in modules.items() if isinstance(module, BackboneMixin))
    bare = (name for name in modules if f".{name}".endswith(tuple(f".{end}" for end in _BARE_BACKBONES)))
    path = next(of_transformers, None) or next(bare, None)
    if path is None:
        return []
    num_levels = len(getattr(model.config, "encoder_in_channels", None) or [None])
    return [f"{path}[{index}]" for index in range(-num_levels, 0)]


def last_features_layer(model: nn.Module) -> str:
    """
    Find the layer of a timm model that makes the tensor that `forward_features` returns, by one forward pass.

    timm has no name for it: it is `layer4` in a ResNet, `norm` in a ViT, `bn2` in an EfficientNet; of these
    `feature_info` knows the first only.
    """
    weight = next(parameter for parameter in model.parameters() if parameter.ndim == 4)  # of the first convolution
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    pixels = torch.zeros(1, weight.shape[1], *size, dtype=weight.dtype, device=weight.device)
    layer = _layer_that_gives(model, lambda: model.forward_features(pixels))
    if layer is None:
        raise ValueError(
            f"Expected a layer of {type(model).__name__} whose output forward_features returns, found none: name one "
            "in teacher_layers or student_layers. iekd_hf.list_layers(model, image_size) prints the layers that can "
            "be named."
        )
    return layer


def has_no_head(model: nn.Module) -> bool:
    """Return whether a model of Transformers gives features alone."""
    return isinstance(model, PreTrainedModel) and not _labels_of(type(model))


_labels_of = functools.cache(find_labels)  # it is asked for each batch


def last_hidden_layer(model: nn.Module) -> str | None:
    """Find the layer of a model without a head that makes its `last_hidden_state`, or the last of its maps."""
    size = getattr(model.config, "image_size", None)
    size = tuple(size) if isinstance(size, (list, tuple)) else (size or 224,) * 2
    parameter = next(model.parameters())
    num_channels = getattr(model.config, "num_channels", 3)
    pixels = torch.zeros(1, num_channels, *size, dtype=parameter.dtype, device=parameter.device)

    def run():
        output = model(pixels)
        return output.feature_maps[-1] if isinstance(model, BackboneMixin) else output["last_hidden_state"]

    try:
        return _layer_that_gives(model, run)
    except Exception:  # one that takes something else than pixels
        return None


def _layer_that_gives(model: nn.Module, run: Callable[[], torch.Tensor]) -> str | None:
    """Return the layer whose output is what a function that runs the model returns."""
    outputs: dict[str, torch.Tensor | None] = {}

    def keep(name):
        return lambda module, args, output: outputs.__setitem__(name, first_tensor(output))

    modules = {name: module for name, module in model.named_modules() if name}
    with watching(model, modules, keep), torch.no_grad():
        wanted = run()
    same = [name for name, output in outputs.items() if output is wanted]
    # A block and its last layer give the same tensor: the block; so do a block and an idle norm behind it.
    return min(reversed(same), key=lambda name: name.count(".")) if same else None


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a layer's name."""
    modules, (path, _) = dict(model.named_modules()), split_index(name)
    if path not in modules or not path:
        close = difflib.get_close_matches(path, modules, n=5, cutoff=0.5)
        hint = f"; close matches: {', '.join(close)}" if close else ""
        raise ValueError(f"Expected a layer of {type(model).__name__}, got {name!r}{hint}.{suggest_layers()}")
    return modules[path]


def check_layers(model: nn.Module, names: list[str]) -> None:
    """Refuse names of layers that a model does not have, with or without adapters."""
    for name in names:
        find_layer(without_adapters(model), name)


def list_layers(model: nn.Module, image_size: int | tuple[int, int] = 224) -> dict[str, tuple[int, int, int]]:
    """
    Print the layers whose output can be distilled, with the shapes of their maps.

    Args:
        model (`nn.Module`):
            A vision model.
        image_size (`int` or `tuple[int, int]`, *optional*, defaults to 224):
            Size in pixels, or (height, width), of the image to try.

    Returns:
        `dict[str, tuple[int, int, int]]`: dotted path to (channels, height, width), in the order of the forward pass;
        a backbone that gives several maps is there once for each, with an index.

    Example:

    ```python
    >>> from transformers import ResNetConfig, ResNetForImageClassification
    >>> from iekd_hf import list_layers
    >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    >>> layers = list_layers(ResNetForImageClassification(config), image_size=64)  # doctest: +ELLIPSIS
    layer of ResNetForImageClassification     channels x height x width
    resnet.embedder.embedder                  8 x 32 x 32
    ...
    resnet                                    16 x 8 x 8

    ```
    """
    found = find_layers(model, image_size)
    title = f"layer of {type(without_adapters(model)).__name__}"
    column = max(map(len, [title, *found]))
    lines = [f"{title:{column}} channels x height x width"]
    lines += [f"{name:{column}} {' x '.join(map(str, shape))}" for name, shape in found.items()]
    print("\n".join(lines))  # noqa: T201, the one function whose purpose is to print
    return found


def find_layers(model: nn.Module, image_size: int | tuple[int, int] = 224) -> dict[str, tuple[int, int, int]]:
    """Find the layers whose output can be distilled, by one forward pass."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    model = without_adapters(model)
    num_channels = getattr(getattr(model, "config", None), "num_channels", 3)
    parameter = next(model.parameters())
    pixels = torch.zeros(1, num_channels, height, width, dtype=parameter.dtype, device=parameter.device)
    extra_tokens, found = count_extra_tokens(model), {}

    def keep(name):
        def hook(module, args, output):
            maps = several_maps(output)
            for index, feature_map in enumerate(maps, start=-len(maps)):
                found[f"{name}[{index}]"] = tuple(feature_map.shape[1:])
            if not maps:
                with contextlib.suppress(ValueError, TypeError):  # no map: a head, a pooler, an attention module
                    found[name] = tuple(to_map(first_tensor(output), (height, width), extra_tokens, name).shape[1:])

        return hook

    # Blocks only: single convolutions, norms and activations would bury them.
    blocks = {
        name: module
        for name, module in model.named_modules()
        if name and next(module.children(), None) is not None and not isinstance(module, nn.ModuleList)
    }
    with watching(model, blocks, keep), torch.no_grad():
        model(pixels)
    return found


def _candidates(model: nn.Module) -> str:
    """Suggest the last layers that give a map, if the model takes an image of 224 pixels."""
    try:
        found = list(find_layers(model))
    except Exception:  # a model that nothing is known of, such as which size it takes
        found = []
    return f"such as {' or '.join(map(repr, found[-5:]))}" if found else "whichever gives its last feature map"


@contextlib.contextmanager
def watching(model: nn.Module, modules: dict[str, nn.Module], make_hook: Callable[[str], Callable]) -> Iterator[None]:
    """Watch a model in eval mode with a forward hook on some of its modules, and leave it as it was."""
    was_training = model.training
    model.eval()
    handles = [module.register_forward_hook(make_hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
