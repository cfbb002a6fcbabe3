"""Gradient of each loss at the student's features, class tokens among them, relative to the task's."""

import contextlib
import random
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from transformers import Trainer, set_seed

from ..method.objective import LAMBDA_OF
from ..method.trainable import frozen_statistics


# Below this share a warning says that a loss hardly acts.
SMALL_SHARE = 0.01
# Keeps the gradients of half precision inside their range; it cancels out.
_SCALE = 1024.0
_BATCHES = 4


def gradient_ratios(
    runs: Iterable[tuple[list[torch.Tensor], dict[str, torch.Tensor]]],
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda norms: norms,
) -> dict[str, float]:
    """Return the gradient norm of each loss at the features over that of the task's; nothing where that is 0."""
    norms, names = 0.0, []
    for features, losses in runs:
        norms, names = norms + torch.stack([_gradient_norm(loss, features) for loss in losses.values()]), [*losses]
        del features, losses  # or this graph is still there while the next one is made
    values = reduce(norms).tolist() if names else [0.0]
    if values[0] == 0:
        return {}
    return {name: value / values[0] for name, value in zip(names, values, strict=True) if name != "task_loss"}


def measure_ratios(trainer: Trainer) -> dict[str, float]:
    """Measure the ratios on some training batches, the same ones at each call and on all ranks; leave no trace."""
    side = trainer.student_side
    side.tap.attach()
    side.train()
    trainer.task_loss.end_step()
    with frozen_statistics(side), _own_randomness(trainer.args.seed, trainer.args.device):
        runs = map(trainer.maps_and_losses, trainer.some_batches(_BATCHES))
        return gradient_ratios(runs, lambda norms: trainer.accelerator.reduce(norms, "mean"))


def weighted(ratios: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
    """Return the shares of weighted losses."""
    return {name: ratio * weights[LAMBDA_OF[name]] for name, ratio in ratios.items()}


@contextlib.contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed, whatever was drawn before, and leave the global states as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        set_seed(seed)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _gradient_norm(loss: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
    features = [feature for feature in features if feature.requires_grad]  # none of a frozen backbone
    gradients = torch.autograd.grad(loss * _SCALE, features, retain_graph=True, allow_unused=True) if features else ()
    flat = [gradient.flatten().float() for gradient in gradients if gradient is not None]
    return torch.linalg.vector_norm(torch.cat(flat)) if flat else loss.new_zeros(())


def warn_of_small_shares(shares: dict[str, float], weights: dict[str, float]) -> None:
    """Warn of losses whose gradient is negligible next to the task's."""
    for name, share in shares.items():
        if share < SMALL_SHARE:
            argument, loss = LAMBDA_OF[name], name.replace("_", " ")
            weight = weights[argument]
            hint = f" For 10%, set {argument} to {weight * 0.1 / share:.2g}." if share > 0 else ""
            warnings.warn(
                f"With {argument}={weight:g} the gradient of the {loss} at the student's features is {share:.2%} of "
                f"the task's loss's, measured on a few batches: it will hardly act.{hint}",
                UserWarning,
                stacklevel=2,
            )
