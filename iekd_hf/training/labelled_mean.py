"""The loss of an evaluation where some images have no label: the mean over those that have one."""

import torch
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..models.kinds import main_input_of
from .labels import NO_LABEL


class LabelledMean:
    """
    Average the task's loss of an evaluation over the images that have a label.

    Trainer averages it over all images, and a batch without any label has a loss of 0. What it does not gather on one
    rank it must not gather on another either: to a classifier each batch brings labels, -100 where it has none.
    """

    def __init__(self, trainer: Trainer, dataset: Dataset):
        self.trainer = trainer
        num_labelled = trainer.task_loss.labelled_in(dataset)
        # Else all batches are alike, and Trainer's mean is right. To a regression -100 is a target.
        some_lack = num_labelled != 0 and (num_labelled is None or num_labelled != len(dataset))
        self.is_needed = some_lack and not trainer.task_loss.is_regression
        self._rows: list[torch.Tensor] = []

    def fill(self, inputs: dict) -> dict:
        """Give a classifier's batch labels where it has none."""
        if not self.is_needed or inputs.get("labels") is not None or not self.trainer.task_loss.takes_classes:
            return inputs
        images = inputs[main_input_of(self.trainer.model)]
        return {**inputs, "labels": torch.full((len(images),), NO_LABEL, device=images.device)}

    def record(self, loss: torch.Tensor | None, labels, were_filled: bool) -> None:
        """Add a batch's loss, by the share of its images that have a label."""
        if not self.is_needed:
            return
        device = self.trainer.args.device
        share = torch.tensor(float(loss is not None), device=device)  # what has no `labels` has others, or none
        if labels is not None:
            share = share * self.trainer.task_loss.share_of(labels).to(device)
        weighted = share if loss is None else torch.where(share > 0, loss.detach().mean() * share, 0.0)
        row = torch.stack([weighted.float(), share, torch.full_like(share, were_filled)])
        self._rows.append(gather_row_of_each_image(self.trainer, row))

    def complete(self, output: EvalLoopOutput, prefix: str) -> EvalLoopOutput:
        """Return what an evaluation has found, with that mean as its loss; leave out labels that were not there."""
        if not self._rows:
            return output
        rows = torch.cat(self._rows).double()
        total, share, filled = rows.sum(dim=0).tolist()
        if 0 < share < len(rows):
            output.metrics[f"{prefix}_loss"] = total / share
        if filled < len(rows):
            return output
        output.metrics.pop(f"{prefix}_loss", None)
        return output._replace(label_ids=None)


def gather_row_of_each_image(trainer: Trainer, row: torch.Tensor) -> torch.Tensor:
    """Gather what holds for a batch as Trainer gathers losses: for each image, without those that fill up the last."""
    return trainer.accelerator.gather_for_metrics(row.repeat(trainer.args.eval_batch_size, 1))
