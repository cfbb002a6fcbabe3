"""The layers of a vision model whose output can be distilled, for people to choose from."""

import contextlib

import torch
from torch import nn

from ..models.adapters import without_adapters
from .maps import count_extra_tokens, first_tensor, several_maps, to_map


def find_layers(model: nn.Module, image_size: int | tuple[int, int] = 224) -> dict[str, tuple[int, int, int]]:
    """
    Find the layers whose output can be distilled, by one forward pass.

    Args:
        model (`nn.Module`), image_size (`int` or `tuple[int, int]`, *optional*, defaults to 224):
            As in [`list_layers`].

    Returns:
        `dict[str, tuple[int, int, int]]`: as of [`list_layers`].
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    model = without_adapters(model)
    num_channels = getattr(getattr(model, "config", None), "num_channels", 3)
    parameter = next(model.parameters())
    pixels = torch.zeros(1, num_channels, height, width, dtype=parameter.dtype, device=parameter.device)
    extra_tokens, found, handles = count_extra_tokens(model), {}, []

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
    for name, module in model.named_modules():
        if name and next(module.children(), None) is not None and not isinstance(module, nn.ModuleList):
            handles.append(module.register_forward_hook(keep(name)))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(pixels)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return found


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
