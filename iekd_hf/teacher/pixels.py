"""Turn a batch that was processed for the student into what the teacher's image processor would have made of it."""

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BaseImageProcessor

from ..data.pixel_values import image_processor_of, pixel_values_of
from ..method.padding import zero_padding
from ..models.loading import find_processor


def check_teacher_processor(teacher_processor: Any, student_processor: Any) -> None:
    """Check that a given `teacher_processor` can be used."""
    if isinstance(teacher_processor, str):
        raise ValueError(
            f"Expected teacher_processor as an image processor, got {teacher_processor!r}: load it by "
            "AutoImageProcessor.from_pretrained."
        )
    if image_processor_of(teacher_processor) is None:
        raise ValueError(
            f"Expected teacher_processor as an image processor, got {type(teacher_processor).__name__}: pass one of "
            "Transformers, with the mean, std and size that the teacher was trained with."
        )
    if image_processor_of(student_processor) is None:
        got = "None" if student_processor is None else type(student_processor).__name__
        raise ValueError(
            f"Expected an image processor as processing_class beside teacher_processor, got {got}: the teacher's "
            "pixels are made of the student's, so pass as processing_class the image processor that made those."
        )


def find_teacher_processor(name_or_path: str, student_processor: Any, **kwargs) -> BaseImageProcessor | None:
    """Load the image processor that was saved with a teacher, and warn if the student's is unknown."""
    processor = find_processor(name_or_path, **kwargs)
    if processor is not None and image_processor_of(student_processor) is None:
        warnings.warn(
            f"{name_or_path} comes with an image processor, but the student's is not known, so the teacher sees the "
            "student's pixels as they are: pass as processing_class the image processor that made them.",
            stacklevel=3,
        )
    return processor


class TeacherPixels(nn.Module):
    """
    Renormalise and resize pixel values on the device, from the student's image processor to the teacher's.

    A batch is processed once, for the student. If the teacher was trained with another mean, standard deviation,
    scale, size or order of channels, it would see wrong pixels and say nothing.
    """

    def __init__(self, student_processor: BaseImageProcessor, teacher_processor: BaseImageProcessor):
        super().__init__()
        scale_student, shift_student, student_reverses = pixel_values_of(student_processor)
        scale_teacher, shift_teacher, teacher_reverses = pixel_values_of(teacher_processor)
        self.reverses = student_reverses != teacher_reverses
        if self.reverses:
            scale_student, shift_student = (_reversed(values) for values in (scale_student, shift_student))
        # raw * scale + shift are the processed pixels; invert the student's, apply the teacher's.
        scale = scale_teacher / scale_student
        self.register_buffer("scale", scale.view(1, -1, 1, 1))
        self.register_buffer("shift", (shift_teacher - shift_student * scale).view(1, -1, 1, 1))
        self.size, self.student_size = _output_size(teacher_processor), _output_size(student_processor)

    @classmethod
    def between(cls, student_processor, teacher_processor) -> "TeacherPixels | None":
        """Return what leads from one processor's pixels to the other's; `None` where that is unknown or nothing."""
        student_processor, teacher_processor = map(image_processor_of, (student_processor, teacher_processor))
        if student_processor is None or teacher_processor is None:
            return None
        if student_processor.to_json_string() == teacher_processor.to_json_string():
            return None  # whatever it makes of pixels
        pixels = cls(student_processor, teacher_processor)
        same_size = pixels.size is None or pixels.size == pixels.student_size
        same_values = torch.allclose(pixels.scale, torch.ones(())) and torch.allclose(pixels.shift, torch.zeros(()))
        return None if same_size and same_values and not pixels.reverses else pixels

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Make the teacher's pixels."""
        if self.reverses:
            pixel_values = pixel_values.flip(1)
        pixel_values = pixel_values * self.scale.to(pixel_values.dtype) + self.shift.to(pixel_values.dtype)
        pixel_values = zero_padding(pixel_values, pixel_mask)
        size = self._size_of(*pixel_values.shape[-2:], padded=pixel_mask is not None)
        if size == pixel_values.shape[-2:]:
            return pixel_values
        resized = F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False, antialias=True)
        return zero_padding(resized, pixel_mask)

    def _size_of(self, height: int, width: int, padded: bool) -> tuple[int, int]:
        """Return the height and width of the teacher's batch for the student's."""
        size = self.size or {"height": height, "width": width}
        if "height" in size:
            return size["height"], size["width"]
        shortest = min(height, width)
        if padded and self.student_size is not None:
            # The images are smaller than their batch; their own shortest edge is the one that the student's processor
            # gives them, and all of a batch grow alike.
            shortest = min(shortest, self.student_size.get("shortest_edge", shortest))
        ratio = min(size["shortest_edge"] / shortest, size.get("longest_edge", math.inf) / max(height, width))
        return round(height * ratio), round(width * ratio)


def _reversed(values: torch.Tensor) -> torch.Tensor:
    return values.flip(0) if values.ndim else values


def _output_size(processor: BaseImageProcessor) -> dict[str, int] | None:
    """Return height and width, or the shortest and perhaps the longest edge; `None` where there is no resizing."""
    if hasattr(processor, "data_config"):  # timm's
        return dict(zip(("height", "width"), processor.data_config["input_size"][-2:], strict=True))
    if getattr(processor, "do_center_crop", False):
        size = processor.crop_size
    elif getattr(processor, "do_resize", False):
        size = processor.size
    else:
        return None
    for edges in (("height", "width"), ("shortest_edge", "longest_edge")):
        if size.get(edges[0]):
            return {name: size[name] for name in edges if size.get(name)}
    return None
