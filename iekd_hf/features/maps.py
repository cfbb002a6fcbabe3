"""Turn a layer's output into a feature map: pick the tensor, lay tokens out on the image's grid, channels first."""

import functools
import math
import re
from collections import Counter
from itertools import chain, product

import torch
from torch import nn
from transformers import DINOv3ConvNextModel


# Parameters that put extra tokens in front of the patches: ViT, DeiT, DINOv2 and v3, CLIP, PVT, RADIO, and timm's.
_PREFIX_TOKENS = (
    *("cls_token", "class_token", "class_embedding", "distillation_token", "dist_token"),
    *("register_tokens", "reg_token", "cls_register_token"),
)
# Behind the patches: YOLOS.
_SUFFIX_TOKENS = ("detection_tokens",)

# Names of maps that no layer gives but the model itself returns.
OWN_OUTPUTS = ("last_hidden_state", "feature_maps")


def split_index(name: str) -> tuple[str, int | None]:
    """Split the name of one of several maps that a layer gives into the layer's path and the map's index."""
    found = re.fullmatch(r"(.+)\[(-?\d+)\]", name)
    return (found[1], int(found[2])) if found else (name, None)


def first_tensor(output) -> torch.Tensor | None:
    """Pick `last_hidden_state`, or else the first tensor of a module's output."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(getattr(output, "last_hidden_state", None), torch.Tensor):
        return output.last_hidden_state
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


def several_maps(output) -> list[torch.Tensor]:
    """Return a backbone's `feature_maps`, an encoder's levels in `last_hidden_state`, or a list of maps; or none."""
    if isinstance(maps := getattr(output, "feature_maps", None), (list, tuple)):  # some as tokens: DINOv2 in DPT
        return [*maps] if all(isinstance(each, torch.Tensor) and each.ndim in (3, 4) for each in maps) else []
    for maps in (getattr(output, "last_hidden_state", None), output):
        if isinstance(maps, list) or (isinstance(maps, tuple) and maps is not output):
            return [*maps] if all(isinstance(each, torch.Tensor) and each.ndim == 4 for each in maps) else []
    return []


def pick_tensor(output, index: int | None) -> torch.Tensor | None:
    """Return the tensor of a layer's output that a name without or with an index means; `None` where there is none."""
    if index is None:
        return first_tensor(output)
    maps = several_maps(output)
    return maps[index] if -len(maps) <= index < len(maps) else None


def count_extra_tokens(model: nn.Module) -> tuple[int, int]:
    """
    Return how many tokens of a model's sequences stand before the patches, and how many behind them.

    Of several towers, and of PEFT's copies of one, the most that any of them has.
    """
    before, behind = Counter(), Counter()
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        count = parameter.shape[-2] if parameter.ndim > 1 else 1
        if last in _PREFIX_TOKENS and "head" not in owner.split("."):  # AIMv2 pools with a token of its own
            before[owner] += count
        elif last in _SUFFIX_TOKENS:
            behind[owner] += count
    for name, module in model.named_modules():
        if isinstance(module, DINOv3ConvNextModel):  # it puts its pooled map in front of the map's cells
            before[name] += 1
    return max(before.values(), default=0), max(behind.values(), default=0)


def _mismatch(grid: tuple[int, int], image_size: tuple[int, int]) -> float:
    """Compare the aspect of a grid with the image's; 0 where they agree."""
    return abs(math.log(grid[0] / grid[1]) - math.log(image_size[0] / image_size[1]))


@functools.cache
def _patch_grid(num_tokens: int, image_size: tuple[int, int]) -> tuple[bool, tuple[int, int]] | None:
    """
    Find the grid of so many patches of one size, square as those of all models are; `None` without one.

    Returns:
        Whether an edge of the image cuts patches off, which are there all the same, and the grid.
    """
    height, width = image_size
    sides = range(1, min(image_size) + 1)
    whole = ((height // side, width // side) for side in sides)
    # Each of several strides may round up or down, along each axis.
    cut = (product({height // side, -(-height // side)}, {width // side, -(-width // side)}) for side in sides)
    for is_cut, grids in ((False, whole), (True, chain.from_iterable(cut))):
        fitting = [grid for grid in grids if math.prod(grid) == num_tokens and (height != width or grid[0] == grid[1])]
        if fitting:
            return is_cut, min(fitting, key=lambda grid: _mismatch(grid, image_size))
    return None


def to_map(
    feature: torch.Tensor | None, image_size: tuple[int, int], extra_tokens: tuple[int, int], name: str
) -> torch.Tensor:
    """Lay a layer's output out as a map."""
    if feature is not None and feature.ndim == 4:
        # A map picked by its index is a backbone's, channels first. Others are channels last where their last two axes
        # fit the image's aspect less than their middle two.
        turned = _mismatch(feature.shape[1:3], image_size) < _mismatch(feature.shape[2:4], image_size)
        return feature.movedim(3, 1) if turned and split_index(name)[1] is None else feature
    if feature is not None and feature.ndim == 3:
        # Hierarchical models (PVT) may add their class token in the last stage only, so none is tried as well.
        candidates = []
        for extra in (extra_tokens, (0, 0)) if extra_tokens[1] == 0 else (extra_tokens,):
            num_patches = feature.shape[1] - sum(extra)
            if num_patches > 0 and (found := _patch_grid(num_patches, tuple(image_size))):
                is_cut, grid = found
                candidates.append((is_cut, _mismatch(grid, image_size), extra[0], grid))
        if candidates:
            *_, before, grid = min(candidates)
            return feature[:, before : before + math.prod(grid)].transpose(1, 2).unflatten(2, grid)
    raise ValueError(
        f"Expected layer {name!r} to give a map (batch_size, channels, height, width) or the patches (batch_size, "
        f"sequence_length, hidden_size) of a {image_size[0]}x{image_size[1]} image, got "
        f"{None if feature is None else tuple(feature.shape)}: name another layer.{suggest_layers()}"
    )


def suggest_layers() -> str:
    """Return the sentence that says how to list layers."""
    return " iekd_hf.list_layers(model, image_size) prints the layers that can be named."
