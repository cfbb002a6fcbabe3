"""Evaluate images without labels by what a student has learnt of its teacher."""

import contextlib
from collections.abc import Iterator

import torch

from ..method.trainable import StudentWithEncoders
from ..teacher.frozen import FrozenTeacher
from .base_trainer import DistillationTrainer
from .component_log import ComponentLog
from .labels import count_labelled


class HeldOutTrainer(DistillationTrainer):
    """
    Let `evaluate()` measure the losses of distillation where images have no labels.

    `eval_loss` is their sum by their weights, without a schedule; each is there by its name, too.
    """

    teacher: FrozenTeacher
    student_side: StudentWithEncoders | None = None
    _losses_seen: ComponentLog | None = None  # while they are measured

    def maps_and_losses(self, inputs: dict) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Return the student's maps of a batch and the losses on them."""
        raise NotImplementedError

    def evaluation_loop(self, dataloader, description, *args, **kwargs):
        """Evaluate as Trainer does, and say what the losses were where they were measured."""
        weights = self.distillation_objective.weights()
        can_measure = self.student_side is not None and (self.teacher.paraphrasers or {*weights} <= {"lambda_kd"})
        if description != "Evaluation" or not weights or not can_measure:
            return super().evaluation_loop(dataloader, description, *args, **kwargs)
        self._has_labels = self.takes_labels and count_labelled(dataloader.dataset) != 0
        with self._both_sides_ready() as self._losses_seen:
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
            means, _ = self._losses_seen.means(self.accelerator)
        prefix = kwargs["metric_key_prefix"]
        output.metrics.update({f"{prefix}_{name}": mean for name, mean in means.items() if name != "task_loss"})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predict with the bare student; measure the losses where a batch has no labels."""
        is_labelled = any(inputs.get(name) is not None for name in self.label_names)
        if self._losses_seen is None or (self._has_labels and is_labelled):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad():
            _, losses = self.maps_and_losses(self._prepare_inputs(inputs))
        self._losses_seen.record(losses, self.state.global_step)
        return self.distillation_objective(losses, progress=None), None, None

    @contextlib.contextmanager
    def _both_sides_ready(self) -> Iterator[ComponentLog]:
        """Attach the taps of both sides where they are not, and let the encoders be alike on all ranks."""
        idle = [tap for tap in (self.teacher.tap, self.student_side.tap) if not tap.is_attached]
        for tap in idle:
            tap.attach()
        self.sync_buffers(self.student_side)
        self.student_side.eval()
        try:
            yield ComponentLog()
        finally:
            self._losses_seen = None
            for tap in idle:
                tap.detach()
