"""Turn a layer's output into a feature map: pick the tensor, lay tokens out on the image's grid, channels first."""

import functools
import math
import re

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
    """Return how many tokens of a model's sequences stand before the patches, and how many behind them."""
    before = behind = 0
    for name, parameter in model.named_parameters():
        *path, last = name.split(".")
        count = parameter.shape[-2] if parameter.ndim > 1 else 1
        if last in _PREFIX_TOKENS and "head" not in path:  # AIMv2 pools with a token of its own
            before += count
        elif last in _SUFFIX_TOKENS:
            behind += count
    # It puts its pooled map in front of the map's cells.
    before += sum(isinstance(module, DINOv3ConvNextModel) for module in model.modules())
    return before, behind


def _mismatch(grid: tuple[int, int], image_size: tuple[int, int]) -> float:
    """Compare the aspect of a grid with the image's; 0 where they agree."""
    return abs(math.log(grid[0] / grid[1]) - math.log(image_size[0] / image_size[1]))


@functools.cache
def _patch_grid(num_tokens: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Find the grid of so many whole patches of one size, square as those of all models are; `None` without one."""
    grids = ((image_size[0] // side, image_size[1] // side) for side in range(1, min(image_size) + 1))
    return next((grid for grid in grids if grid[0] * grid[1] == num_tokens), None)


def _grid(num_tokens: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Find height and width of `num_tokens` patches: the factors whose aspect is nearest to the image's."""
    heights = (h for h in range(1, num_tokens + 1) if num_tokens % h == 0)
    return min(((h, num_tokens // h) for h in heights), key=lambda grid: _mismatch(grid, image_size))


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
            if (num_patches := feature.shape[1] - sum(extra)) > 0:
                whole = _patch_grid(num_patches, tuple(image_size))  # other grids come nearer to some aspects
                grid = whole or _grid(num_patches, image_size)
                candidates.append((whole is None, _mismatch(grid, image_size), extra[0], grid))
        if candidates:
            *_, before, grid = min(candidates)
            if _mismatch(grid, image_size) < math.log(2):
                patches = feature[:, before : before + grid[0] * grid[1]]
                return patches.transpose(1, 2).unflatten(2, grid)
    raise ValueError(
        f"Expected layer {name!r} to give a map (batch_size, channels, height, width) or the patches (batch_size, "
        f"sequence_length, hidden_size) of a {image_size[0]}x{image_size[1]} image, got "
        f"{None if feature is None else tuple(feature.shape)}: name another layer.{suggest_layers()}"
    )


def suggest_layers() -> str:
    """Return the sentence that says how to list layers."""
    return " iekd_hf.list_layers(model, image_size) prints the layers that can be named."
