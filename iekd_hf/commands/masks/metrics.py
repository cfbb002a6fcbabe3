"""Mean intersection over union as an `evaluate.Metric` that works offline and keeps counts, not predictions."""

import datasets
import evaluate
import numpy as np
import torch


def count_pixels(
    predictions: torch.Tensor, references: torch.Tensor, num_labels: int, ignore_index: int = 255
) -> torch.Tensor:
    """
    Count the pixels of each true class by the class that was predicted for them: a confusion matrix.

    Args:
        predictions (`torch.Tensor` of shape `(height, width)`), references (`torch.Tensor` of the same shape):
            Classes; of references also `ignore_index`, where a pixel does not count.
        num_labels (`int`):
            How many classes there are.
        ignore_index (`int`, *optional*, defaults to 255):
            The label that leaves a pixel out.

    Returns:
        `torch.Tensor` of shape `(num_labels, num_labels)`: int64, with a row for each true class.

    Raises:
        `ValueError`: masks of two sizes.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.commands.masks.metrics import count_pixels
    >>> count_pixels(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]]), num_labels=2)
    tensor([[1, 1],
            [0, 0]])

    ```
    """
    if predictions.shape != references.shape:
        raise ValueError(
            f"Expected predictions and references of one size, got {tuple(predictions.shape)} and "
            f"{tuple(references.shape)}: resize the logits to the mask's size first."
        )
    counts = references != ignore_index
    pairs = references[counts] * num_labels + predictions[counts]
    return torch.bincount(pairs, minlength=num_labels**2).reshape(num_labels, num_labels)


class MeanIoU(evaluate.Metric):
    """
    Compute the mean over classes of the intersection over the union of predicted and true pixels.

    `add_batch(predictions=..., references=...)` takes masks of any sizes and counts their pixels; what it keeps does
    not grow with their number. `compute()` returns `mean_iou`, `mean_accuracy` (over classes) and `overall_accuracy`
    (of pixels), and with `class_names=[...]` also `iou_<name>`. A class that neither occurs nor is predicted is left
    out.

    Example:

    ```python
    >>> from iekd_hf.commands.masks.metrics import MeanIoU
    >>> metric = MeanIoU(num_labels=3)
    >>> metric.add_batch(predictions=[[[0, 0, 1, 1]]], references=[[[0, 1, 1, 255]]])
    >>> metric.compute(class_names=["cat", "dog", "cow"])  # doctest: +NORMALIZE_WHITESPACE
    {'mean_iou': 0.5, 'mean_accuracy': 0.75, 'overall_accuracy': 0.6666666666666666, 'iou_cat': 0.5, 'iou_dog': 0.5}

    ```
    """

    def __init__(self, num_labels: int, ignore_index: int = 255, **kwargs):
        super().__init__(keep_in_memory=True, **kwargs)
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.counts = torch.zeros(num_labels, num_labels, dtype=torch.int64)

    def _info(self):
        mask = datasets.List(datasets.List(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Mean intersection over union.",
            citation="",
            inputs_description="predictions: the class of each pixel of each image; references: the same, true.",
            features=datasets.Features({"predictions": mask, "references": mask}),
        )

    # The base class keeps all that is added, to hand it to `_compute` at the end.

    def add(self, *, prediction=None, reference=None):
        """Count the pixels of one image."""
        predicted, true = (torch.tensor(np.asarray(mask)).long() for mask in (prediction, reference))
        self.add_counts(count_pixels(predicted, true, self.num_labels, self.ignore_index))

    def add_batch(self, *, predictions=None, references=None):
        """Count the pixels of some images."""
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def add_counts(self, counts: torch.Tensor) -> None:
        """Add what [`count_pixels`] has counted elsewhere."""
        self.counts += counts.cpu()

    def compute(self, *, predictions=None, references=None, class_names=None):
        """Return the metrics of all that was added, and start again."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        counts, self.counts = self.counts.double().numpy(), torch.zeros_like(self.counts)
        if not counts.any():
            raise ValueError("Expected labelled pixels to measure on, got none: each one has the label of no class.")
        right, true, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
        union, occurs = true + predicted - right, true > 0
        iou = {index: float(right[index] / union[index]) for index in np.flatnonzero(union)}
        result = {
            "mean_iou": float(np.mean([*iou.values()])),
            "mean_accuracy": float((right[occurs] / true[occurs]).mean()),
            "overall_accuracy": float(right.sum() / true.sum()),
        }
        return result | {f"iou_{class_names[index]}": value for index, value in iou.items() if class_names is not None}
