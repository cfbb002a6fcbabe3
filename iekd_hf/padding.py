"""Factors of several sizes brought together, without the padding of a batch."""

import torch
import torch.nn.functional as F


def match_sizes(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Bring two tensors to the smaller height and the smaller width of both by adaptive average pooling.

    Args:
        student (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Factors of the student.
        teacher (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Factors of the teacher, of any height and width.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both with the same height and width.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.padding import match_sizes
    >>> [x.shape[2:] for x in match_sizes(torch.randn(2, 8, 7, 7), torch.randn(2, 8, 14, 6))]
    [torch.Size([7, 6]), torch.Size([7, 6])]

    ```
    """
    size = tuple(min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
