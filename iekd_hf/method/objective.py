"""The objective as a weighted sum: L_inh and L_exp over pairs of factors, and the weights that go with each loss."""

import functools

import torch

from ..arguments import IETrainingArguments
from .losses import exploration_loss, inheritance_loss
from .padding import match_sizes


# Which argument weighs which component; the task's own loss has the weight 1.
WEIGHTS = {
    "inheritance_loss": "lambda_inh",
    "exploration_loss": "lambda_exp",
    "kd_loss": "lambda_kd",
    "kl_loss": "lambda_kl",
}


def factor_losses(
    factors_inh: list[torch.Tensor],
    factors_exp: list[torch.Tensor],
    factors_T: list[torch.Tensor],
    args: IETrainingArguments,
    normalize: bool = True,
    pixel_mask: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    r"""
    Return \(L_{inh}\) and \(L_{exp}\), each the mean over the pairs (of layers, or of peers).

    Args:
        factors_inh (`list[torch.Tensor]`), factors_exp (`list[torch.Tensor]`):
            The student's factors, `(batch_size, factor_channels, height, width)` each; empty where a half is not used.
        factors_T (`list[torch.Tensor]`):
            The teacher's factors, of any height and width.
        args (`IETrainingArguments`):
            Distances and reduction.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether what inherits is compared by its direction. What explores always is: a distance to be made larger
            needs a bound.
        pixel_mask (`torch.Tensor` of shape `(batch_size, image_height, image_width)`, *optional*):
            1 where the images are in a padded batch; the padding does not enter the losses.

    Returns:
        `dict[str, torch.Tensor]`: the losses before their weights, without those of an unused half.
    """
    components = {}
    inherit = functools.partial(inheritance_loss, normalize=normalize)
    for name, loss, factors_S, distance in (
        ("inheritance_loss", inherit, factors_inh, args.inheritance_distance),
        ("exploration_loss", exploration_loss, factors_exp, args.exploration_distance),
    ):
        if factors_S:
            pairs = [match_sizes(F_S, F_T, pixel_mask) for F_S, F_T in zip(factors_S, factors_T, strict=True)]
            losses = [loss(F_S, F_T, distance, args.loss_reduction, mask=mask) for F_S, F_T, mask in pairs]
            components[name] = torch.stack(losses).mean()
    return components


def weighted_sum(components: dict[str, torch.Tensor], weights: dict[str, float]) -> torch.Tensor:
    """
    Return the objective.

    Args:
        components (`dict[str, torch.Tensor]`):
            Scalars by name, `task_loss` among them.
        weights (`dict[str, float]`):
            The λs of the others, by the name of their argument.

    Returns:
        `torch.Tensor`: a scalar.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.method.objective import weighted_sum
    >>> components = {"task_loss": torch.tensor(2.0), "inheritance_loss": torch.tensor(0.5)}
    >>> weighted_sum(components, {"lambda_inh": 10.0})
    tensor(7.)

    ```
    """
    loss = components["task_loss"]
    for name, value in components.items():
        if name in WEIGHTS:
            loss = loss + weights[WEIGHTS[name]] * value
    return loss
