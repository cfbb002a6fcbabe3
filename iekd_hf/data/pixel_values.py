"""What an image processor makes of the values of pixels: a scale and a shift of each channel, and an order of them."""

from typing import Any, NamedTuple

import PIL.Image
import torch
from transformers import BaseImageProcessor, ProcessorMixin


# One colour, of which no two channels are alike and no processor makes the zeros of padding.
_COLOUR = (51, 102, 204)


class PixelValues(NamedTuple):
    """
    Tell processed pixels from raw ones: `scale * raw + shift`, of the raw channels in reverse order if `reverses`.

    Scale and shift are those of the processed channels, or one of all of them.
    """

    scale: torch.Tensor
    shift: torch.Tensor
    reverses: bool


def image_processor_of(processor: Any) -> BaseImageProcessor | None:
    """Return an image processor, or the one within a processor of several inputs (SAM, CLIP); `None` without."""
    if isinstance(processor, ProcessorMixin):
        processor = getattr(processor, "image_processor", None)
    return processor if isinstance(processor, BaseImageProcessor) else None


def pixel_values_of(processor: BaseImageProcessor) -> PixelValues:
    """
    Return what a processor makes of the values of pixels.

    Its attributes say how it scales and shifts, but not all that it does: some reverse the channels without one, and
    some normalise each image by itself. So it is run once on an image of one colour, and refused if that comes out
    as something else.
    """
    scale, shift = _declared(processor)
    if scale.ndim and scale.numel() != 3:
        return PixelValues(scale, shift, False)  # grey or of many bands, to which no processor does more
    made = _processed_colour(processor)
    expected = torch.tensor(_COLOUR) * scale + shift
    for reverses in (False, True):
        dims = [0] if reverses else []
        if torch.isclose(made, expected.flip(dims), rtol=1e-3, atol=1e-3).all(1).any():
            dims = dims if scale.ndim else []
            return PixelValues(scale.flip(dims), shift.flip(dims), reverses)
    says = [round(value, 3) for value in expected.tolist()]
    makes = [round(value, 3) for value in made[len(made) // 2].tolist()]
    raise _inexpressible(
        processor, f"which turns the colour {list(_COLOUR)} into {makes}, where its attributes say {says}"
    )


def _declared(processor: BaseImageProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and shift by a processor's attributes."""
    if hasattr(processor, "data_config"):  # timm's, wrapped by Transformers, has no other attributes
        mean, std = (torch.tensor(processor.data_config[name]) for name in ("mean", "std"))
        return 1 / 255 / std, -mean / std
    rescales = getattr(processor, "do_rescale", False)
    scale = processor.rescale_factor if rescales else 1.0
    mean, std = torch.zeros(()), torch.ones(())
    if getattr(processor, "do_normalize", False):
        if getattr(processor, "image_mean", None) is None or getattr(processor, "image_std", None) is None:
            raise _inexpressible(processor, "which normalises without an image_mean and image_std")
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    if rescales and getattr(processor, "rescale_offset", False):  # EfficientNet's: to [-1, 1]
        mean = mean + 1
    scale, shift = scale / std, -mean / std
    if getattr(processor, "include_top", False):  # EfficientNet's: by std once more, whether it normalises or not
        std = torch.tensor(processor.image_std)
        scale, shift = scale / std, shift / std
    return scale, shift


def _processed_colour(processor: BaseImageProcessor) -> torch.Tensor:
    """Return the pixels that a processor makes of an image of one colour, `(num_pixels, 3)`; some may be padding."""
    image = PIL.Image.new("RGB", (64, 64), _COLOUR)
    left_out = ("do_resize", "do_center_crop", "do_pad", "apply_ocr")  # what costs time, and changes no colour
    without = {name: False for name in left_out if getattr(processor, name, False)}
    for kwargs in (without, {}):  # some cannot leave it out
        try:
            pixels = processor(image, return_tensors="pt", **kwargs)["pixel_values"].float()
            # Channels come before height and width, or, in patches (SigLIP 2), last.
            return (pixels.movedim(-3, -1) if pixels.ndim > 3 else pixels).reshape(-1, 3)
        except Exception as error:  # anything, from code of anyone
            failure = error
    reason = str(failure).strip().partition("\n")[0]
    raise _inexpressible(
        processor, f"which makes no pixel_values of an image alone ({type(failure).__name__}: {reason})"
    ) from failure


def _inexpressible(processor: BaseImageProcessor, got: str) -> ValueError:
    return ValueError(
        "Expected an image processor that scales and shifts each channel by its rescale_factor, image_mean and "
        f"image_std, got {type(processor).__name__}, {got}: give one that does, for example a ViTImageProcessor with "
        "the mean, std and size that the model was trained with."
    )
