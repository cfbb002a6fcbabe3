"""Images as the inputs of a model that does not take them whole."""

import inspect

import torch
from torch import nn

from ..models.signature import takes


def as_inputs(model: nn.Module, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the keywords with which a model takes images, which a NaFlex model (SigLIP 2) takes in patches."""
    if patch_size := patch_size_of(model):
        return cut_patches(pixel_values, patch_size)
    name = "pixel_values" if takes(model, "pixel_values") else next(iter(inspect.signature(model.forward).parameters))
    return {name: pixel_values}


def patch_size_of(model: nn.Module) -> int | None:
    """Return the side of the patches that a model takes in place of images; `None` where it takes images."""
    if not takes(model, "spatial_shapes"):
        return None
    return getattr(model.config, "vision_config", model.config).patch_size


def cut_patches(pixel_values: torch.Tensor, patch_size: int) -> dict[str, torch.Tensor]:
    """Cut images of one size into patches, as the image processor of SigLIP 2 does."""
    batch_size, _, *size = pixel_values.shape
    if any(length % patch_size for length in size):
        raise ValueError(
            f"Expected images whose sides are multiples of {patch_size} pixels, got {size[0]}x{size[1]}: resize them."
        )
    height, width = (length // patch_size for length in size)
    patches = pixel_values.unflatten(3, (width, patch_size)).unflatten(2, (height, patch_size))
    # Each patch holds its pixels row by row, the channels of a pixel side by side.
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": patches.new_ones(patches.shape[:2], dtype=torch.int32),
        # On the CPU, where the model reads it image by image.
        "spatial_shapes": torch.tensor([[height, width]] * batch_size),
    }
