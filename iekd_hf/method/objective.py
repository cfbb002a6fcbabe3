r"""The objective \(L = L_{goal} + \lambda_{inh} L_{inh} + \lambda_{exp} L_{exp} + ...\): losses, λs and schedule."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .logits import dist_loss, dkd_loss, standardized_kd_loss
from .losses import exploration_loss, inheritance_loss, kd_loss
from .padding import mask_at, match_sizes


# The argument that weighs each loss; the task's own has the weight 1.
LAMBDA_OF = {
    "inheritance_loss": "lambda_inh",
    "exploration_loss": "lambda_exp",
    "kd_loss": "lambda_kd",
    "kl_loss": "lambda_kl",
}
LAMBDA_SCHEDULES = ("constant", "linear", "cosine")
# In place of a λ: it is chosen by its loss's share of the gradient.
AUTO = "auto"


class Objective:
    r"""
    Add up \(L = L_{goal} + \sum_i \lambda_i L_i\).

    The λs are read from the arguments at each call: a hyperparameter search changes them between two runs.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf import IEKDTrainingArguments
    >>> from iekd_hf.method.objective import Objective
    >>> args = IEKDTrainingArguments("out", lambda_inh=10.0, lambda_exp=0.0, lambda_schedule="linear")
    >>> objective = Objective(args, ("lambda_inh", "lambda_exp"))
    >>> losses = {"task_loss": torch.tensor(2.0), "inheritance_loss": torch.tensor(0.5)}
    >>> objective(losses, progress=0.0), objective(losses, progress=0.8)
    (tensor(7.), tensor(3.))

    ```
    """

    def __init__(self, args: Any, lambdas: tuple[str, ...], presets: Mapping[str, float] | None = None):
        self.args, self.lambdas, self.presets = args, lambdas, presets or {}
        self.found: dict[str, float] = {}  # what "auto" stands for, once it is measured; a preset before

    def weights(self) -> dict[str, float]:
        """Return the λs in use, without their schedule."""
        given = {name: getattr(self.args, name) for name in self.lambdas}
        found = {name: self.found.get(name, self.presets.get(name)) for name in self.automatic()}
        return {name: found.get(name, value) for name, value in given.items() if is_on(value)}

    def automatic(self) -> list[str]:
        """Return the names of the λs that are "auto"."""
        return [name for name in self.lambdas if getattr(self.args, name) == AUTO]

    def weights_at(self, progress: float) -> dict[str, float]:
        """Return the λs in use when a share `progress` of the training steps is done."""
        scale = lambda_scale(progress, self.args.lambda_schedule, self.args.lambda_warmup_ratio)
        return {name: scale * value for name, value in self.weights().items()}

    def __call__(self, losses: dict[str, torch.Tensor], progress: float | None) -> torch.Tensor:
        """Return the weighted sum of scalars by name, `task_loss` among them; without a progress, of no schedule."""
        weights = self.weights() if progress is None else self.weights_at(progress)
        total = losses["task_loss"]
        for name, loss in losses.items():
            if name in LAMBDA_OF:
                total = total + weights[LAMBDA_OF[name]] * loss
        return total


def is_on(weight: float | str) -> bool:
    """Return whether a λ, a number or "auto", puts its loss into use."""
    return weight == AUTO or weight > 0


def lambda_scale(progress: float, schedule: str, warmup_ratio: float) -> float:
    """Return the factor in [0, 1] on the λs: a linear warm-up, then the schedule."""
    if progress < warmup_ratio:
        return progress / warmup_ratio
    if schedule == "constant":
        return 1.0
    remaining = 1 - (progress - warmup_ratio) / (1 - warmup_ratio)
    return remaining if schedule == "linear" else (1 - math.cos(math.pi * remaining)) / 2


def factor_losses(
    factors_inh: list[torch.Tensor],
    factors_exp: list[torch.Tensor],
    factors_T: list[torch.Tensor],
    args: Any,
    normalize: bool = True,
    pixel_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    r"""Return \(L_{inh}\) and \(L_{exp}\), each the mean over the pairs (of layers, or of peers)."""
    losses = {}
    inherit = functools.partial(inheritance_loss, normalize=normalize)
    for name, loss, factors_S, distance in (
        ("inheritance_loss", inherit, factors_inh, args.inheritance_distance),
        ("exploration_loss", exploration_loss, factors_exp, args.exploration_distance),
    ):
        if factors_S:
            pairs = [match_sizes(F_S, F_T, pixel_mask) for F_S, F_T in zip(factors_S, factors_T, strict=True)]
            of_pairs = [loss(F_S, F_T, distance, args.loss_reduction, mask=mask) for F_S, F_T, mask in pairs]
            losses[name] = torch.stack(of_pairs).mean()
    return losses


def logit_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
    multi_label: bool = False,
    distance: str = "kl",
) -> torch.Tensor:
    r"""
    Return the logit term as the task has it.

    Args:
        student_logits (`torch.Tensor`), teacher_logits (`torch.Tensor`):
            `(batch_size, num_labels)`, or dense, `(batch_size, num_labels, height, width)`.
        temperature (`float`):
            As in [`kd_loss`].
        labels (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
            Labels of dense logits, of any size: positions that they leave out do not count, unless they leave out a
            whole image, which has no labels then and counts as it is. With `"dkd"`, the class of each image.
        ignore_index (`int`, *optional*, defaults to -100):
            The label that leaves a position out.
        multi_label (`bool`, *optional*, defaults to `False`):
            Whether each label is a question of its own: the divergence is the mean over the two answers to each.
        distance (`str`, *optional*, defaults to `"kl"`):
            `"kl"`: [`kd_loss`]; `"dkd"`: [`dkd_loss`]; `"dist"`: [`dist_loss`]; `"standardized"`:
            [`standardized_kd_loss`]. Of the last three only the last one takes dense logits, and none several labels.

    Returns:
        `torch.Tensor`: a scalar, not negative.
    """
    mask = None
    if distance == "dkd":
        return dkd_loss(student_logits, teacher_logits, labels, temperature)
    if distance == "dist":
        return dist_loss(student_logits, teacher_logits, temperature)
    if multi_label:  # the softmax over (z, 0) is the sigmoid of z
        logits = (student_logits, teacher_logits)
        student_logits, teacher_logits = (torch.stack([z, torch.zeros_like(z)], dim=1) for z in logits)
    elif student_logits.ndim > 2:
        size = student_logits.shape[2:]
        if teacher_logits.shape[2:] != size:
            teacher_logits = F.interpolate(teacher_logits.float(), size=size, mode="bilinear", antialias=True)
        if labels is not None:
            labelled = labels != ignore_index
            labelled = labelled | ~labelled.flatten(1).any(dim=1).view(-1, 1, 1)
            mask = mask_at(labelled, size)
    divergence = standardized_kd_loss if distance == "standardized" else kd_loss
    return divergence(student_logits, teacher_logits, temperature, mask)
