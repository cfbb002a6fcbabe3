"""Gradient of each weighted loss at the student's feature maps, relative to the task's."""

import warnings
from collections.abc import Iterable

import torch
from transformers import Trainer

from ..method.objective import LAMBDA_OF
from ..method.trainable import frozen_statistics


# Below this share a warning says that a loss hardly acts.
SMALL_SHARE = 0.01
# Keeps the gradients of half precision inside their range; it cancels out.
_SCALE = 1024.0
_BATCHES = 4


def gradient_shares(
    runs: Iterable[tuple[list[torch.Tensor], dict[str, torch.Tensor]]], weights: dict[str, float]
) -> dict[str, float]:
    """Return the gradient norm of each weighted loss at the feature maps over that of the task's loss."""
    norms, losses = 0.0, {}
    for feature_maps, losses in runs:
        norms = norms + torch.stack([_gradient_norm(loss, feature_maps) for loss in losses.values()])
    if not losses or norms[0] == 0:
        return {}
    shares = dict(zip(losses, (norms / norms[0]).tolist(), strict=True))
    return {name: shares[name] * weights[LAMBDA_OF[name]] for name in losses if name != "task_loss"}


def measure_gradient_shares(trainer: Trainer) -> dict[str, float]:
    """Measure the shares on some batches before training, and warn of losses that hardly act."""
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
    """Warn of losses whose gradient is negligible next to the task's."""
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
