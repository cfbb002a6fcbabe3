r"""The task's own loss \(L_{goal}\), over the images that have a label."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

from ..method.objective import logit_loss
from ..models.adapters import without_adapters
from ..models.kinds import ignore_index_of
from ..models.signature import takes, takes_labels
from .labels import NO_LABEL, count_labelled
from .soft_labels import are_soft, soft_cross_entropy


class TaskLabels(NamedTuple):
    """Hold a batch's labels for the task's loss."""

    given: torch.Tensor | None
    filled: torch.Tensor | None  # as a loss can take them that is NaN without any label
    weight: torch.Tensor | None  # of that loss
    are_soft: bool = False  # shares of the classes, `(batch_size, num_labels)`


class TaskLoss:
    r"""
    Compute \(L_{goal}\) as Trainer does, but over the images that have a label: it is 0 where a batch has none.

    An image without a label has -100, or none at all, as its label; in dense labels each position is what the model's
    loss ignores. What `compute_loss_func` does about them is left to it.

    Soft labels are shares of the classes, as `mixing` or a data collator makes them for a student whose `problem_type`
    is `"single_label_classification"`. An image without a label has shares of 0.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.count_labelled()
        self._labelled_share: torch.Tensor | None = None  # of a step, where it has several micro-batches or ranks
        self._mean_size: float | None = None  # of a step's micro-batches, where they are not all of one size

    def count_labelled(self) -> None:
        """Count the training images with a label."""
        # None: not known, as it cannot be read cheaply.
        self.num_labelled = 0
        if self.takes_labels:
            has_classes = "labels" in self.trainer.label_names and not self.is_regression
            self.num_labelled = self.labelled_in(self.trainer.train_dataset) if has_classes else None

    def labelled_in(self, dataset: Dataset | None) -> int | None:
        """Return how many images of a data set have a label that the model takes; `None` where that is not known."""
        if not self.takes_labels:
            return 0
        is_usual = getattr(self.trainer.data_collator, "is_usual", False)  # another may have been put in its place
        return count_labelled(dataset) if is_usual else None

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers to predict."""
        model = without_adapters(self.trainer.model)
        config, is_classifier = getattr(model, "config", None), type(model).__name__.endswith("ForImageClassification")
        one = is_classifier and getattr(config, "num_labels", None) == 1
        return one or getattr(config, "problem_type", None) == "regression"

    @property
    def takes_labels(self) -> bool:
        """Whether the model has a head that takes labels, or a custom loss does."""
        model = without_adapters(self.trainer.model)
        if self.trainer.compute_loss_func is not None or takes_labels(model):
            return True
        return any(takes(model, name) for name in self.trainer.label_names)  # whatever they are called

    @property
    def takes_classes(self) -> bool:
        """Whether the model takes one class of each image as `labels`."""
        model = without_adapters(self.trainer.model)
        if "labels" not in self.trainer.label_names or not type(model).__name__.endswith("ForImageClassification"):
            return False
        problem = getattr(model.config, "problem_type", None)
        return not self.is_regression and problem in (None, "single_label_classification")

    @property
    def are_all_labelled(self) -> bool:
        """Whether each training image is known to have a label."""
        return self.num_labelled is not None and self.num_labelled == len(self.trainer.train_dataset)

    def in_words(self) -> str:
        """Return how many images had a label, as the object of a sentence."""
        if self.num_labelled == 0:
            return "no labels"
        if self.num_labelled is None or self.are_all_labelled:
            return "the labels of its images"
        return f"the labels of {self.num_labelled:,} of its {len(self.trainer.train_dataset):,} images"

    @property
    def is_custom(self) -> bool:
        """Whether a custom loss or label smoothing replaces the model's loss."""
        return self.trainer.compute_loss_func is not None or self.trainer.label_smoother is not None

    def take_labels(self, inputs: dict) -> TaskLabels:
        """Take the labels of a batch; leave the model such as its own loss can take, where it needs them."""
        given = inputs.get("labels")
        labels = TaskLabels(given, given, None)
        config = getattr(without_adapters(self.trainer.model), "config", None)
        problem, num_labels = getattr(config, "problem_type", None), getattr(config, "num_labels", None)
        is_class = isinstance(given, torch.Tensor) and not given.is_floating_point()
        is_class = is_class and num_labels != 1 and problem in (None, "single_label_classification")
        if are_soft(self.trainer.model, given):
            share = given.sum(dim=1).mean()
            several = self._labelled_share is not None and self.trainer.model.training
            weight = torch.where(share > 0, share / self._labelled_share, 0.0) if several else None
            del inputs["labels"]  # which the model's own loss does not know
            return TaskLabels(given, given, weight, are_soft=True)
        if is_class and not (self.trainer.model.training and self.are_all_labelled):
            share = self.share_of(given)
            # The mean over no labels is NaN, and so is its gradient: such a batch gets a class, and no weight.
            filled = torch.where(share > 0, given, 0)
            total = share if self._labelled_share is None or not self.trainer.model.training else self._labelled_share
            weight = torch.where(share > 0, share / total, 0.0)
            labels = TaskLabels(given, filled, weight)
        if given is not None and self.is_custom:
            del inputs["labels"]
        elif given is not None:
            inputs["labels"] = labels.filled
        return labels

    def share_of(self, labels: torch.Tensor | None) -> torch.Tensor:
        """Return the share of a batch's images that have a label."""
        if not isinstance(labels, torch.Tensor):  # of detectors, each image has its objects
            return torch.tensor(0.0 if labels is None else 1.0, device=self.trainer.args.device)
        return (labels != self._ignored_in(labels)).reshape(len(labels), -1).any(dim=1).float().mean()

    def _count(self, labels: TaskLabels) -> torch.Tensor | int | None:
        """Return how many labels there are to divide a sum by, at least 1; `None` where they are no tensor."""
        given = labels.given
        if not isinstance(given, torch.Tensor):
            return 1 if given is None else None
        if labels.are_soft:
            return given.sum().clamp(min=1)
        return (given != self._ignored_in(given)).sum().clamp(min=1)

    def _ignored_in(self, labels: torch.Tensor) -> int:
        """Return the label that the loss leaves out: of images, or of positions."""
        return NO_LABEL if labels.ndim == 1 else ignore_index_of(self.trainer.model)

    def begin_step(self, micro_batches: list[dict], device: torch.device) -> None:
        """Count how many images of a step have a label, on all ranks."""
        # So that accumulated micro-batches, each of which has the mean over its own labels, make the mean over all.
        self.end_step()
        # Of a stream that has ended there are none.
        several = len(micro_batches) > 1 or (micro_batches and self.trainer.args.world_size > 1)
        if not several:
            return
        sizes = [find_batch_size(batch) for batch in micro_batches]
        if len({*sizes}) > 1:
            self._mean_size = sum(sizes) / len(sizes)
        if self.takes_labels and not self.are_all_labelled:
            shares = [self.share_of(batch.get("labels")).to(device) for batch in micro_batches]
            of_step = sum(size * share for size, share in zip(sizes, shares, strict=True)) / sum(sizes)
            self._labelled_share = self.trainer.accelerator.reduce(of_step, "mean")

    def end_step(self) -> None:
        """Let the next batch be one by itself."""
        self._labelled_share = self._mean_size = None

    def weigh(self, losses: dict[str, torch.Tensor], inputs: dict) -> dict[str, torch.Tensor]:
        """Weigh a micro-batch by its images where a step's differ in size, so that their mean is that of one batch."""
        if self._mean_size is None or not self.trainer.model.training:
            return losses
        part = find_batch_size(inputs) / self._mean_size
        return {name: loss * part for name, loss in losses.items()}

    def __call__(self, model: nn.Module, outputs: dict, labels: TaskLabels) -> torch.Tensor:
        """Return L_goal as Trainer has it: `compute_loss_func`, label smoothing, or the model's own loss."""
        if self.trainer.compute_loss_func is not None:
            # Of the micro-batch, not of the step as Trainer counts: what it returns is divided by the accumulation
            # steps like all our losses.
            return self.trainer.compute_loss_func(outputs, labels.given, num_items_in_batch=self._count(labels))
        if labels.are_soft:
            loss = soft_cross_entropy(outputs["logits"], labels.given, self.trainer.args.label_smoothing_factor)
        elif self.trainer.label_smoother is not None and labels.given is not None:
            loss = self.trainer.label_smoother(outputs, labels.filled)
        elif outputs.get("loss") is not None:
            loss = outputs["loss"].squeeze()  # OneFormer gives a list of one
        else:
            return nothing_of(outputs)
        return loss if labels.weight is None else loss * labels.weight

    def has_goal(self, model: nn.Module, outputs: dict, sample: dict) -> bool:
        """Return whether the task has a loss, by what is known of the labels and what the model gives for a sample."""
        is_labelled = sample.get("labels") is not None
        if is_labelled and outputs.get("loss") is None and not self.is_custom:
            raise ValueError(
                f"Expected {type(model).__name__} to return a loss for a batch with labels, got only "
                f"{', '.join(outputs)}: let its forward return one, or pass compute_loss_func."
            )
        if self.trainer.compute_loss_func is not None or (self.num_labelled and not is_labelled):
            return True
        return (outputs.get("loss") is not None or is_labelled) and self.num_labelled != 0

    def refuse_no_goal(self, model: nn.Module, outputs: dict) -> None:
        """Refuse a training that has no loss, neither the task's nor another one."""
        raise ValueError(
            f"Expected {type(model).__name__} to return a loss, got only {', '.join(outputs)}: the batch "
            f"needs {' and '.join(self.trainer.label_names) or 'labels'}, or pass compute_loss_func."
        )

    def logit_loss(self, model: nn.Module, logits, teacher_logits, labels: TaskLabels) -> torch.Tensor:
        """Return the logit term between two models that do the task of `model`."""
        config = getattr(without_adapters(model), "config", None)
        ignored, args, given = ignore_index_of(model), self.trainer.args, labels.given
        problem = getattr(config, "problem_type", None)
        multi_label = problem == "multi_label_classification"
        if problem is None and isinstance(given, torch.Tensor) and given.is_floating_point():
            multi_label = given.ndim == 2 and not labels.are_soft  # what the model's own loss would have noted
        distance = getattr(args, "kd_distance", "kl")
        if distance == "dkd" and given is None:
            given = torch.full(logits.shape[:1], NO_LABEL, device=logits.device)
        loss = logit_loss(logits, teacher_logits, args.temperature, given, ignored, multi_label, distance)
        # Where a mean is over the images with a label, that of a step is over all of its micro-batches, as the task's.
        return loss * labels.weight if distance == "dkd" and labels.weight is not None else loss


def nothing_of(outputs: dict) -> torch.Tensor:
    """Return 0 with a graph to what a model gives: its logits, or else its maps."""
    values = [outputs["logits"]] if "logits" in outputs else [*outputs.values()]
    flat = [x for value in values for x in (value if isinstance(value, (tuple, list)) else [value])]
    return sum((x * 0).sum() for x in flat if isinstance(x, torch.Tensor) and x.is_floating_point())
