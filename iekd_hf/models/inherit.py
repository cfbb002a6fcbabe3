"""Give a student's head the weights of its teacher's."""

import torch
from torch import nn

from .adapters import without_adapters


def inherit_head(student: nn.Module, teacher: nn.Module) -> list[str]:
    """
    Copy the teacher's weights and buffers of the same name and shape into the student, outside of the backbone.

    Detectors of one family differ in their backbones, and often agree in what comes after them: a narrow backbone then
    has to learn only what the teacher's head can read. Call it before [`IEKDTrainer`] is made; where the student has
    fewer layers than the teacher, it gets the first ones.

    Source: the inheriting strategy of Kang et al., *Instance-Conditional Knowledge Distillation for Object Detection*,
    NeurIPS 2021.

    Args:
        student (`nn.Module`):
            A model with a `backbone`, such as a detector; it is changed in place.
        teacher (`nn.Module`):
            A model of the same family.

    Returns:
        `list[str]`: the names of what was copied.

    Raises:
        ValueError: if the student has no backbone, or nothing agrees.

    Example:

    ```python
    >>> from iekd_hf import inherit_head
    >>> from iekd_hf.commands.boxes.tiny_detectors import tiny_detector
    >>> student, teacher = (tiny_detector(f"tiny-rt-detr-{width}", id2label={0: "cat", 1: "dog"}) for width in (8, 32))
    >>> names = inherit_head(student, teacher)
    >>> print(len(names), "of", len(student.state_dict()))
    243 of 317
    >>> student.model.decoder.class_embed[0].weight.equal(teacher.model.decoder.class_embed[0].weight)
    True

    ```
    """
    student, teacher = without_adapters(student), without_adapters(teacher)
    given, own = teacher.state_dict(), student.state_dict()
    is_outside = {name: "backbone" not in name.split(".") for name in own}
    if all(is_outside.values()):
        raise ValueError(
            f"Expected a student with a module named backbone beside its head, got {type(student).__name__}: leave "
            "the head as it is."
        )
    names = [name for name in own if is_outside[name] and name in given and given[name].shape == own[name].shape]
    if not any(own[name].is_floating_point() and own[name].ndim for name in names):
        raise ValueError(
            f"Expected a teacher whose head has weights of the same name and shape as the student's, got "
            f"{type(teacher).__name__} for {type(student).__name__}: choose two of one family, or leave the head as "
            "it is."
        )
    with torch.no_grad():
        for name in names:
            own[name].copy_(given[name])
    return names
