"""Evaluate images without labels by what a student has learnt of its teacher."""

import contextlib
from collections.abc import Iterator

import torch
from torch.utils.data import Dataset
from transformers import Trainer

from .component_log import ComponentLog
from .labels import count_labelled


class HeldOutLosses:
    """
    Measure the losses of distillation on batches that have no labels.

    Their sum by their weights, without a schedule, stands in for the task's loss; each is kept by its name, too.
    """

    def __init__(self, trainer: Trainer, dataset: Dataset):
        self.trainer, self.log = trainer, ComponentLog()
        self._has_labels = trainer.task_loss.takes_labels and count_labelled(dataset) != 0

    @staticmethod
    def can_be_measured(trainer: Trainer) -> bool:
        """Return whether there is a loss besides the task's, and what it compares is there."""
        weights = trainer.distillation_objective.weights()
        ready = trainer.teacher.paraphrasers or {*weights} <= {"lambda_kd"}
        return bool(weights and trainer.student_side is not None and ready)

    def is_labelled(self, inputs: dict) -> bool:
        """Return whether a batch has labels that the student takes."""
        return self._has_labels and any(inputs.get(name) is not None for name in self.trainer.label_names)

    @torch.no_grad()
    def measure(self, inputs: dict) -> torch.Tensor:
        """Return the sum of the losses of a batch."""
        trainer = self.trainer
        _, losses = trainer.maps_and_losses(trainer._prepare_inputs(inputs))
        self.log.record(losses, trainer.state.global_step)
        return trainer.distillation_objective(losses, progress=None)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the mean of each loss over all ranks."""
        means, _ = self.log.means(self.trainer.accelerator)
        return {f"{prefix}_{name}": mean for name, mean in means.items() if name != "task_loss"}

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
