"""Run a model once on a sample, to see what each of its modules gives."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .maps import count_extra_tokens, first_tensor, suggest_layers, to_map


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


def image_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Return the height and width of the images that a model was built for, where it says so."""
    config = _vision_config(model)
    known = (
        getattr(getattr(model, "patch_embed", None), "img_size", None),  # timm
        (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (None,))[1:],
        getattr(config, "image_size", None),
        getattr(model, "image_size", None),  # torchvision
    )
    size = next((each for each in known if each), None)
    return (size, size) if isinstance(size, int) else None if size is None else tuple(size)


def make_sample(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> torch.Tensor:
    """Make an image, of the size that a model was built for or else of 224 pixels."""
    size = image_size or image_size_of(model) or 224
    height, width = (size, size) if isinstance(size, int) else size
    parameter = next(model.parameters())
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    channels = getattr(_vision_config(model), "num_channels", None) or first
    pixels = torch.linspace(-1, 1, channels * height * width).view(1, channels, height, width)
    return pixels.to(parameter.device, parameter.dtype)


def _vision_config(model: nn.Module) -> object:
    config = getattr(model, "config", None)
    return getattr(config, "vision_config", None) or config


def last_features_layer(model: nn.Module) -> str:
    """
    Find the layer of a timm model that makes the tensor that `forward_features` returns, by one forward pass.

    timm has no name for it: it is `layer4` in a ResNet, `norm` in a ViT, `bn2` in an EfficientNet; of these
    `feature_info` knows the first only.
    """
    outputs: dict[str, object] = {}

    def keep(name):
        return lambda module, args, output: outputs.__setitem__(name, output)

    modules = {name: module for name, module in model.named_modules() if name}
    with watching(model, modules, keep), torch.no_grad():
        features = model.forward_features(make_sample(model))
    same = [name for name, output in outputs.items() if output is features]
    if not same:
        raise ValueError(
            f"Expected a layer of {type(model).__name__} whose output forward_features returns, found none: name one "
            f"in teacher_layers or student_layers.{suggest_layers()}"
        )
    return _outermost(same)


def layer_before_pooling(model: nn.Module) -> str | None:
    """
    Find the layer of a classifier that makes the last feature map before it is pooled, by one forward pass.

    `None` where the model does not return classes, or takes no image of the size that it seems to be for.
    """
    pixels, extra_tokens = make_sample(model), count_extra_tokens(model)
    found: deque[tuple[str, torch.Tensor]] = deque(maxlen=64)  # the end of a large model is enough

    def keep(name):
        def hook(module, args, output):
            if isinstance(output, torch.Tensor) and output.shape[:1] == (1,) and not _pools(module):
                with contextlib.suppress(ValueError):
                    if to_map(output, tuple(pixels.shape[-2:]), extra_tokens, name).shape[2:].numel() > 1:
                        found.append((name, output))

        return hook

    modules = {name: module for name, module in model.named_modules() if name}
    try:
        with watching(model, modules, keep), torch.no_grad():
            classes = first_tensor(model(pixels))
    except Exception:  # it may take anything
        return None
    if classes is None or classes.ndim != 2:
        return None
    # The scores of the classes at each place, as in a SqueezeNet, are no features.
    if found and found[-1][1].ndim == 4 and _is_pooled(found[-1][1], classes):
        found = deque((name, output) for name, output in found if output.shape[1] != classes.shape[1])
    return _outermost([name for name, output in found if output is found[-1][1]]) if found else None


def _pools(module: nn.Module) -> bool:
    return type(module).__module__ == nn.AdaptiveAvgPool2d.__module__


def _is_pooled(feature_map: torch.Tensor, classes: torch.Tensor) -> bool:
    means = feature_map.mean(dim=(2, 3))
    return means.shape == classes.shape and torch.allclose(means, classes, rtol=1e-3, atol=1e-5)


def _outermost(names: list[str]) -> str:
    """Of layers that give the same tensor, in the order in which they ended, choose the outermost."""
    # A block and its last layer give the same tensor: the block; so do a block and an idle norm behind it.
    return min(reversed(names), key=lambda name: name.count("."))
