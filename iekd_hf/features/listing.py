"""List the layers whose maps can be distilled."""

import contextlib
from collections import deque

import torch
from torch import nn

from ..models.adapters import without_adapters
from ..models.signature import find_image_tower, is_headless, takes
from .maps import count_extra_tokens, first_tensor, several_maps, split_index, to_map
from .patches import as_inputs
from .trace import make_sample, watching


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
    model, prefix = without_adapters(model), ""
    if takes(model, "input_ids") and (tower := find_image_tower(model)):  # CLIP: no text is needed
        model, prefix = model.get_submodule(tower), f"{tower}."
    pixels = make_sample(model, image_size)
    size, extra_tokens = tuple(pixels.shape[-2:]), count_extra_tokens(model)
    found: dict[str, tuple[int, int, int]] = {}
    order: dict[str, int] = {}
    leaves: deque[tuple[str, torch.Tensor]] = deque(maxlen=16)

    def keep(name):
        def hook(module, args, output):
            order[name] = len(order)
            if next(module.children(), None) is None:
                leaves.append((name, output))
                return
            last = getattr(output, "last_hidden_state", None)
            # Blocks only, as single convolutions, norms and activations would bury them; but also the final norm.
            norms = [leaf for leaf, given in leaves if given is last and leaf.rpartition(".")[0] == name]
            maps = several_maps(output)
            own = [name] if name or prefix else ["last_hidden_state"] if is_headless(model) else []
            named = {f"{name or 'feature_maps'}[{index}]": maps[index] for index in range(-len(maps), 0)}
            for path, tensor in (named or dict.fromkeys([*norms, *own], first_tensor(output))).items():
                with contextlib.suppress(ValueError, TypeError):  # no map: a head, a pooler, an attention module
                    feature_map = to_map(tensor, size, extra_tokens, path)
                    if len(feature_map) == 1:  # not of windows
                        found[path] = tuple(feature_map.shape[1:])

        return hook

    modules = {name: module for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    with watching(model, modules, keep), torch.no_grad():
        model(**as_inputs(model, pixels))
    in_order = sorted(found, key=lambda path: order.get(split_index(path)[0], len(order)))
    return {f"{prefix}{path}".removesuffix("."): found[path] for path in in_order}
