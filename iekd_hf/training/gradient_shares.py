"""How much each loss pulls at the student's feature maps beside the task's own: what a weight amounts to."""

import warnings
from collections.abc import Iterable

import torch
from transformers import Trainer

from ..method.objective import LAMBDA_OF
from ..method.trainable import frozen_statistics


# Below it, a loss is said to do next to nothing.
SMALL_SHARE = 0.01
# Keeps the gradients of half precision inside their range; it cancels out.
_SCALE = 1024.0
_BATCHES = 4


def gradient_shares(
    runs: Iterable[tuple[list[torch.Tensor], dict[str, torch.Tensor]]], weights: dict[str, float]
) -> dict[str, float]:
    """
    Compare the gradients of weighted losses at the feature maps with that of the task's loss.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.training.gradient_shares import gradient_shares
    >>> f_S = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> losses = {"task_loss": f_S.square().sum() / 2, "inheritance_loss": f_S[0]}
    >>> shares = gradient_shares([([f_S], losses)], {"lambda_inh": 10.0})
    >>> {name: round(share, 3) for name, share in shares.items()}
    {'inheritance_loss': 2.0}

    ```
    """
    norms, losses = 0.0, {}
    for feature_maps, losses in runs:
        norms = norms + torch.stack([_gradient_norm(loss, feature_maps) for loss in losses.values()])
    if not losses or norms[0] == 0:
        return {}
    shares = dict(zip(losses, (norms / norms[0]).tolist(), strict=True))
    return {name: shares[name] * weights[LAMBDA_OF[name]] for name in losses if name != "task_loss"}


def measure_gradient_shares(trainer: Trainer) -> dict[str, float]:
    """Measure the shares on some batches before training, and warn of losses whose gradient is next to nothing."""
    side, weights = trainer.student_side, trainer.distillation_objective.weights()
    if not weights:
        return {}
    side.tap.attach()
    side.train()
    with frozen_statistics(side):
        shares = gradient_shares(map(trainer.maps_and_losses, trainer.some_batches(_BATCHES)), weights)
    if trainer.is_world_process_zero():
        warn_of_small_shares(shares, weights)
    return {f"{name}_gradient_share": share for name, share in shares.items()}


def _gradient_norm(loss: torch.Tensor, feature_maps: list[torch.Tensor]) -> torch.Tensor:
    gradients = torch.autograd.grad(loss * _SCALE, feature_maps, retain_graph=True, allow_unused=True)
    flat = [gradient.flatten().float() for gradient in gradients if gradient is not None]
    return torch.linalg.vector_norm(torch.cat(flat)) if flat else loss.new_zeros(())


def warn_of_small_shares(shares: dict[str, float], weights: dict[str, float]) -> None:
    """Warn of losses whose gradient is next to nothing beside the task's."""
    for name, share in shares.items():
        if share < SMALL_SHARE:
            argument, loss = LAMBDA_OF[name], name.replace("_", " ")
            weight = weights[argument]
            hint = f" For a tenth of it, set {argument} to {weight * 0.1 / share:.2g}." if share > 0 else ""
            warnings.warn(
                f"{argument}={weight:g} gives the {loss} {share:.2%} of the gradient norm of the task's loss at "
                f"the student's features, on some batches: it will hardly act.{hint}",
                UserWarning,
                stacklevel=2,
            )
