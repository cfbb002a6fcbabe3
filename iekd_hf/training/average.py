"""A moving average of the student's weights, kept beside it while it trains."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback
from transformers.utils import logging

from ..hub.card_facts import AVERAGED


logger = logging.get_logger(__name__)

AVERAGE_FILE = "average.safetensors"


class EMACallback(TrainerCallback):
    r"""
    Keep an exponential moving average of the student: after each step
    \(\bar\theta \leftarrow d \bar\theta + (1 - d) \theta\), of BatchNorm's statistics too.

    Training and what Trainer evaluates and saves stay as they are. Checkpoints hold the average, and a resumed run
    goes on with it. `model` is the averaged student, to save; [`~EMACallback.in_use`] lets a trainer evaluate it.

    Args:
        decay (`float`, *optional*, defaults to 0.999):
            d, in [0, 1). The average looks back over about 1 / (1 - d) steps, which should be a small part of the run.

    Raises:
        `ValueError`: a decay outside its range.

    Example:

    ```python
    >>> import torch
    >>> from transformers import TrainerControl, TrainerState
    >>> from iekd_hf import EMACallback
    >>> model, average = torch.nn.Linear(1, 1, bias=False), EMACallback(decay=0.9)
    >>> average.on_train_begin(None, TrainerState(), TrainerControl(), model=model)
    >>> for weight in (1.0, 2.0):
    ...     _ = torch.nn.init.constant_(model.weight, weight)
    ...     average.on_step_end(None, TrainerState(), TrainerControl(), model=model)
    >>> average.model.weight.item()  # 0.9 * 1 + 0.1 * 2
    1.100000023841858
    >>> with average.in_use(model):
    ...     print(model.weight.item())
    1.100000023841858
    >>> model.weight.item()
    2.0

    ```
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"Expected decay within [0, 1), got {decay}.")
        self.decay = decay
        self.averaged: AveragedModel | None = None
        self.is_in_use = False
        self._checkpoint: Path | None = None  # that the run goes on from

    @property
    def model(self) -> nn.Module:
        """Return the averaged student, once training has begun."""
        if self.averaged is None:
            raise ValueError("Expected an average of a student, got none: there is one once training has begun.")
        return self.averaged.module

    @contextlib.contextmanager
    def in_use(self, model: nn.Module) -> Iterator[None]:
        """
        Give a model the averaged weights for a while: `with average.in_use(trainer.model): trainer.evaluate()`.

        A model card has the metrics that were measured with the weights that are in use when it is written.

        Args:
            model (`nn.Module`):
                The student.
        """
        self._exchange_with(model)
        try:
            yield
        finally:
            self._exchange_with(model)

    def _exchange_with(self, model: nn.Module) -> None:
        _exchange(model, self.model)
        self.is_in_use = not self.is_in_use

    def on_log(self, args, state, control, **kwargs):
        """Tell what is measured of the average from what is measured of the student."""
        if self.is_in_use:
            state.log_history[-1][AVERAGED] = True

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Begin with the student as it is, or with the average of the checkpoint that was loaded."""
        self.averaged = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(self.decay), use_buffers=True
        ).requires_grad_(False)
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        if (checkpoint / AVERAGE_FILE).is_file():
            load_model(self.averaged, checkpoint / AVERAGE_FILE)
        else:
            logger.warning(
                f"There is no average of the student in {checkpoint}: the average starts from the student there."
            )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Take in the student after a step."""
        self.averaged.update_parameters(model)

    def save(self, folder: str | Path) -> None:
        """Write the average to a checkpoint's folder."""
        save_model(self.averaged, str(Path(folder) / AVERAGE_FILE))

    def load(self, folder: str | Path) -> None:
        """Go on from a checkpoint's folder when training begins."""
        self._checkpoint = Path(folder)


def averages_among(callbacks: Iterable[TrainerCallback]) -> list[EMACallback]:
    """Return the callbacks that keep an average."""
    return [callback for callback in callbacks if isinstance(callback, EMACallback)]


@torch.no_grad()
def _exchange(first: nn.Module, second: nn.Module) -> None:
    """Exchange the weights and buffers of two models, each in its place in memory."""
    tensors = (itertools.chain(model.parameters(), model.buffers()) for model in (first, second))
    for one, other in zip(*tensors, strict=True):
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
