"""Trainers that evaluate detectors image by image, in memory that does not grow with their number but for boxes."""

import torch
from transformers import DetrImageProcessorPil, EvalPrediction, RTDetrImageProcessorPil
from transformers.utils import ModelOutput

from iekd_hf import IEKDTrainer

from ...training.base_trainer import DistillationTrainer
from .data import Annotated
from .metrics import CocoDetection


# Who reads which output: one with a last column of its own for "no object", or with a score of each class by itself.
# It is the model's family that counts, not that of the processor which made its pixels.
_WITH_NO_OBJECT, _EACH_CLASS = DetrImageProcessorPil(), RTDetrImageProcessorPil()


class _PredictsBoxes:
    """
    Let a Trainer predict logits and boxes alone.

    A detector's output has all its feature maps and auxiliary predictions, too; and the labels that several processes
    have, of any number of boxes, cannot be gathered. Each image's row, and what its boxes are relative to, can.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training or not return_outputs:
            return result
        loss, outputs = result
        return loss, {name: outputs[name].float() for name in ("logits", "pred_boxes")}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, predictions, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if labels is not None:
            labels = tuple(torch.stack([label[name] for label in labels]) for name in ("image_id", "frame"))
        return loss, predictions, labels


class DetectionTrainer(_PredictsBoxes, DistillationTrainer):
    """Train a detector on its own loss."""


class IEKDDetectionTrainer(_PredictsBoxes, IEKDTrainer):
    """Train a detector as [`~iekd_hf.IEKDTrainer`] does."""


class BoxMetrics:
    """Compute COCO's metrics batch by batch, as `compute_metrics` of a Trainer with `batch_eval_metrics`."""

    def __init__(self, split: Annotated, names: list[str]):
        self.split, self.names = split, names
        self.metric = CocoDetection(keep_in_memory=True)

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Take a batch; return the metrics of all batches after the last one."""
        image_ids, frames = prediction.label_ids
        found = to_boxes(*prediction.predictions, frames, len(self.names))
        self.metric.add_batch(predictions=found, references=self.split.truth(image_ids.flatten().tolist()))
        return self.metric.compute(class_names=self.names) if compute_result else {}


def to_boxes(
    logits: torch.Tensor,
    pred_boxes: torch.Tensor,
    frames: torch.Tensor,
    num_classes: int,
    threshold: float = 0.0,
) -> list[dict[str, list]]:
    """
    Make boxes in the pixels of the original images of a detector's output.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_queries, num_labels)`), pred_boxes (`torch.Tensor` of shape \
`(batch_size, num_queries, 4)`):
            The output.
        frames (`torch.Tensor` of shape `(batch_size, 2)`):
            What the boxes are relative to, see [`~iekd_hf.commands.boxes.transforms.frame_of`].
        num_classes (`int`):
            How many classes there are: DETR, YOLOS and Table Transformer have one column more, for no object.
        threshold (`float`, *optional*, defaults to 0):
            The least score.

    Returns:
        `list[dict[str, list]]`: of each image `boxes` [x, y, width, height], `scores` and `labels`.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.commands.boxes.trainers import to_boxes
    >>> logits, pred_boxes = torch.tensor([[[-9.0, 0.0]]]), torch.tensor([[[0.5, 0.5, 0.5, 0.25]]])
    >>> to_boxes(logits, pred_boxes, torch.tensor([[480.0, 640.0]]), num_classes=2)
    [{'boxes': [[160.0, 180.0, 320.0, 120.0]], 'scores': [0.5], 'labels': [1]}]

    ```
    """
    output = ModelOutput(logits=logits, pred_boxes=pred_boxes)
    reader = _WITH_NO_OBJECT if logits.shape[-1] > num_classes else _EACH_CLASS
    found = reader.post_process_object_detection(output, threshold=threshold, target_sizes=frames)
    images = []
    for image in found:
        boxes = image["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        images.append(
            {"boxes": boxes.tolist(), "scores": image["scores"].tolist(), "labels": image["labels"].tolist()}
        )
    return images
