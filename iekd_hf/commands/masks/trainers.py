"""Trainers that evaluate segmenters image by image, at the size of the image, in memory that does not grow."""

import torch
import torch.nn.functional as F
from transformers import EvalPrediction

from iekd_hf import IEKDTrainer

from ...models.kinds import ignore_index_of
from ...training.base_trainer import DistillationTrainer
from .metrics import MeanIoU, count_pixels


def to_classes(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Return the class of each pixel of one image.

    Args:
        logits (`torch.Tensor` of shape `(num_labels, height, width)`):
            A segmenter's, of any size.
        size (`tuple[int, int]`):
            Height and width of the image.

    Returns:
        `torch.Tensor` of that size.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.commands.masks.trainers import to_classes
    >>> to_classes(torch.tensor([[[0.0, 0.0]], [[-1.0, 1.0]]]), (1, 4))
    tensor([[0, 0, 1, 1]])

    ```
    """
    return F.interpolate(logits[None].float(), size=tuple(size), mode="bilinear", align_corners=False)[0].argmax(dim=0)


class _CountsPixels:
    """
    Let a Trainer predict, for each image, how many pixels of each class were taken for which.

    Logits of a whole data set would take far more memory, and masks of several sizes cannot be gathered from several
    processes. The counts can, so that each process works on its own images, and an image that comes twice is dropped.
    """

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        masks = inputs.pop("masks", None)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if masks is None or logits is None:
            return loss, logits, labels
        counts, ignore_index = [], ignore_index_of(self.model)
        for image, mask in zip(logits, masks, strict=True):
            predicted = to_classes(image, mask.shape)
            counts.append(count_pixels(predicted, mask.to(image.device), len(image), ignore_index))
        counts = torch.stack(counts)
        return loss, counts, counts.sum(dim=2)


class SegmentationTrainer(_CountsPixels, DistillationTrainer):
    """Train a segmenter on its own loss."""


class IEKDSegmentationTrainer(_CountsPixels, IEKDTrainer):
    """Train a segmenter as [`~iekd_hf.IEKDTrainer`] does."""


class PixelMetrics:
    """Compute mean IoU batch by batch, as `compute_metrics` of a Trainer with `batch_eval_metrics`."""

    def __init__(self, names: list[str]):
        self.names, self.metric = names, MeanIoU(num_labels=len(names))

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Take a batch; return the metrics of all batches after the last one."""
        self.metric.add_counts(prediction.predictions.sum(dim=0))
        return self.metric.compute(class_names=self.names) if compute_result else {}
