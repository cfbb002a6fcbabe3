"""Turn a batch that was processed for the student into what the teacher's image processor would have made of it."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BaseImageProcessor


class TeacherPixels(nn.Module):
    """
    Renormalise and resize pixel values on the device, from the student's image processor to the teacher's.

    A batch is processed once, for the student. If the teacher was trained with another mean, standard deviation,
    scale or size, it would see wrong pixels and say nothing.

    Args:
        student_processor (`BaseImageProcessor`):
            The processor that made the batch.
        teacher_processor (`BaseImageProcessor`):
            The processor that the teacher expects.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ViTImageProcessorPil
    >>> from iekd_hf.pixels import TeacherPixels
    >>> student = ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"height": 4, "width": 4})
    >>> teacher = ViTImageProcessorPil(image_mean=[0.0] * 3, image_std=[0.1] * 3, size={"height": 8, "width": 8})
    >>> pixels = TeacherPixels(student, teacher)(torch.zeros(1, 3, 4, 4))
    >>> pixels.shape, round(pixels.mean().item(), 4)
    (torch.Size([1, 3, 8, 8]), 5.0)

    ```
    """

    def __init__(self, student_processor: BaseImageProcessor, teacher_processor: BaseImageProcessor):
        super().__init__()
        scale_student, shift_student = _affine(student_processor)
        scale_teacher, shift_teacher = _affine(teacher_processor)
        # raw * scale + shift are the processed pixels; invert the student's, apply the teacher's.
        scale = scale_teacher / scale_student
        self.register_buffer("scale", scale.view(1, -1, 1, 1))
        self.register_buffer("shift", (shift_teacher - shift_student * scale).view(1, -1, 1, 1))
        self.size = _output_size(teacher_processor)

    @classmethod
    def between(cls, student_processor, teacher_processor) -> "TeacherPixels | None":
        """Return what leads from one processor's pixels to the other's; `None` where that is unknown or nothing."""
        if not all(isinstance(p, BaseImageProcessor) for p in (student_processor, teacher_processor)):
            return None
        pixels = cls(student_processor, teacher_processor)
        same_size = pixels.size is None or pixels.size == _output_size(student_processor)
        same_values = torch.allclose(pixels.scale, torch.ones(())) and torch.allclose(pixels.shift, torch.zeros(()))
        return None if same_size and same_values else pixels

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the teacher's `pixel_values` of shape `(batch_size, channels, height, width)`."""
        pixel_values = pixel_values * self.scale.to(pixel_values.dtype) + self.shift.to(pixel_values.dtype)
        height, width = pixel_values.shape[-2:]
        if isinstance(self.size, int):  # the shortest edge, aspect kept
            ratio = self.size / min(height, width)
            size = (round(height * ratio), round(width * ratio))
        else:
            size = self.size or (height, width)
        if size == (height, width):
            return pixel_values
        return F.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False, antialias=True)


def _affine(processor: BaseImageProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and shift per channel of `processed = raw * scale + shift`."""
    scale = processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0
    if getattr(processor, "do_normalize", False):
        mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    else:
        mean, std = torch.zeros(1), torch.ones(1)
    return scale / std, -mean / std


def _output_size(processor: BaseImageProcessor) -> tuple[int, int] | int | None:
    """Return (height, width), or a shortest edge, or `None` where the processor does not resize."""
    if getattr(processor, "do_center_crop", False):
        size = processor.crop_size
    elif getattr(processor, "do_resize", False):
        size = processor.size
    else:
        return None
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    return size.get("shortest_edge")
