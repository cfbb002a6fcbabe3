"""Evaluate images without labels by what a student has learnt of its teacher."""

import contextlib
from collections.abc import Iterator

import torch
from torch.utils.data import Dataset
from transformers import Trainer

from .labelled_mean import gather_row_of_each_image


class HeldOutLosses:
    """
    Measure the losses of distillation on images of which none has a label.

    Their sum by their weights, without a schedule, stands in for the task's loss; each is kept by its name, too. Where
    it is not known whether any image has a label, they are measured until one has, on whichever rank, and count if
    none had.
    """

    def __init__(self, trainer: Trainer, dataset: Dataset):
        self.trainer, self._names, self._rows = trainer, (), []
        num_labelled = trainer.task_loss.labelled_in(dataset)
        self.is_certain = num_labelled is not None
        self._has_labels = bool(num_labelled)

    @staticmethod
    def can_be_measured(trainer: Trainer) -> bool:
        """Return whether there is a loss besides the task's, and what it compares is there."""
        weights = trainer.distillation_objective.weights()
        ready = trainer.teacher.paraphrasers or {*weights} <= {"lambda_kd"}
        return bool(weights and trainer.student_side is not None and ready)

    def _is_labelled(self, inputs: dict) -> bool:
        """Return whether an image of a batch, or of one before it, has a label that the student takes."""
        if not self._has_labels and not self.is_certain:
            given = [inputs[name] for name in self.trainer.label_names if inputs.get(name) is not None]
            here = any(bool(self.trainer.task_loss.share_of(labels) > 0) for labels in given)
            # All ranks go the same way, as each gathers what the others do.
            flag = torch.tensor([int(here)], device=self.trainer.args.device)
            self._has_labels = bool(self.trainer.accelerator.gather(flag).any())
        return self._has_labels

    @torch.no_grad()
    def measure(self, inputs: dict) -> bool:
        """Add the losses of a batch where no image has had a label; return whether it needs no prediction."""
        trainer = self.trainer
        if self._is_labelled(inputs):
            return False
        _, losses = trainer.maps_and_losses(trainer._prepare_inputs(inputs))
        losses["loss"] = trainer.distillation_objective(losses, progress=None)
        self._names = tuple(losses)
        row = torch.stack([loss.detach().float() for loss in losses.values()])
        self._rows.append(gather_row_of_each_image(trainer, row))
        if trainer.task_loss.takes_classes and not self.is_certain:
            return False
        trainer.labelled_mean.record(None, None, were_filled=False)
        return True

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the mean of each loss over all images; none where one of them has a label."""
        if self._has_labels or not self._rows:
            return {}
        means = torch.cat(self._rows).double().mean(dim=0).tolist()
        named = zip(self._names, means, strict=True)
        return {f"{prefix}_{name}": mean for name, mean in named if name != "task_loss"}

    @contextlib.contextmanager
    def both_sides_ready(self) -> Iterator[None]:
        """Attach the taps of both sides where they are not, and let the encoders be alike on all ranks."""
        trainer = self.trainer
        trainer.teacher.wake()
        idle = [tap for tap in (trainer.teacher.tap, trainer.student_side.tap) if not tap.is_attached]
        for tap in idle:
            tap.attach()
        trainer.sync_buffers(trainer.student_side)
        trainer.student_side.eval()
        try:
            yield
        finally:
            if trainer.cache is not None:
                trainer.teacher.rest()
            for tap in idle:
                tap.detach()
