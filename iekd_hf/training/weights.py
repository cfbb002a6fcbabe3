"""What the weights of the losses amount to, before training; and, where they are "auto", what they must be."""

import math
import warnings

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..arguments import SHARE_OF
from ..method.objective import LAMBDA_OF, is_on
from .gradient_shares import measure_ratios, warn_of_small_shares, weighted


# Steps from one measurement of the shares to the next, of which each costs about two: the first ones are closer, as
# networks change fastest then, and an epoch has one at least, unless it is shorter than the least.
_LEAST, _MOST = 100, 500

# An encoder may come to meet a loss by itself, whose gradient at the student then vanishes. A weight that was raised
# for that would only drive the encoder on, without end: no weight gets above so many times what was found first.
_RAISE = 10


# What a trainer is built with, which a search cannot change any more.
_BUILT_WITH = (
    "method",
    "knowledge",
    "student_layers",
    "teacher_layers",
    "fast_teacher",
    "teacher_dtype",
    "cache_teacher",
)


class AutoWeights(TrainerCallback, ExportableState):
    """
    Keep what "auto" weights are made of, in the state of Trainer, which its checkpoints hold: a running mean of each
    loss's gradient relative to the task's, the first of them, and the step at which it was last measured.
    """

    def __init__(self):
        self.ratios: dict[str, float] = {}  # by the argument of the weight
        self.first_ratios: dict[str, float] = {}
        self.measured_at: int | None = None

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        kept = {"ratios": dict(self.ratios), "first_ratios": dict(self.first_ratios)}
        return {"args": {}, "attributes": {**kept, "measured_at": self.measured_at}}

    def on_train_begin(self, args, state, control, **kwargs):
        """Go on from a checkpoint, if the run does."""
        if args.auto_find_batch_size and state.global_step == 0:  # not from a try with batches that did not fit
            self.ratios, self.first_ratios, self.measured_at = {}, {}, None
            return
        # Trainer does so only with `restore_callback_states_from_checkpoint`.
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self.ratios, self.first_ratios = dict(kept["ratios"]), dict(kept["first_ratios"])
        self.measured_at = kept["measured_at"]

    def is_due(self, step: int, most: int) -> bool:
        """Return whether it is time to measure."""
        return self.measured_at is None or step >= next_measurement(self.measured_at, most)

    def take(self, ratios: dict[str, float], step: int) -> None:
        """Take in a measurement; each counts as much as all before it, as far as no weight gets too large by it."""
        for name, ratio in ratios.items():
            if 0 < ratio < math.inf:
                least = self.first_ratios.setdefault(name, ratio) / _RAISE
                self.ratios[name] = max(math.sqrt(self.ratios.get(name, ratio) * ratio), least)
        self.measured_at = step


def next_measurement(step: int, most: int) -> int:
    """Return the step at which shares are measured after they were at a step, `most` steps later at the latest."""
    return step + min(max(step, _LEAST), most)


def steps_between(max_steps: int, num_epochs: int) -> int:
    """Return the most steps from one measurement to the next: those of an epoch, within bounds."""
    # A stream without a length has no epochs, of which Trainer then says there are sys.maxsize.
    return min(max(max_steps // num_epochs, _LEAST), _MOST) if num_epochs <= max_steps else _MOST


def set_up_search(trainer: Trainer, trial) -> None:
    """Put a search's values into the arguments; a weight may be a number or "auto", whichever it was before."""
    # Trainer casts what is suggested to the type of the value in its place, unless that is None. When it sets the
    # search up once more, as it begins to train, the values have their types.
    weights = {name: getattr(trainer.args, name) for name in SHARE_OF}
    built_with = {name: getattr(trainer.args, name) for name in _BUILT_WITH}
    vars(trainer.args).update(dict.fromkeys(weights))
    try:
        trainer._hp_search_setup(trial)
    finally:
        vars(trainer.args).update({name: weights[name] for name in weights if getattr(trainer.args, name) is None})
    trainer.args.check_values()
    for name, value in built_with.items():
        if getattr(trainer.args, name) != value:
            raise ValueError(
                f"Expected a search over arguments that a training reads, got {name}={getattr(trainer.args, name)!r} "
                f"for a trainer that was built with {value!r}: search with one trainer for each {name}, or over the "
                "weights (lambda_inh, lambda_exp, lambda_kd; 0 leaves a loss out)."
            )


def begin_weights(trainer: Trainer) -> None:
    """Prepare for a training: forget "auto" weights of an earlier one, and warn of what clips the losses."""
    trainer.remove_callback(AutoWeights)
    trainer.shares_measured_at = None
    trainer.distillation_objective.found = {}
    if trainer.distillation_objective.automatic():
        trainer.add_callback(AutoWeights())
    if trainer.is_world_process_zero():
        warn_of_clipping(trainer)


def measure_gradient_shares(trainer: Trainer) -> dict[str, float]:
    """Measure what the weights amount to before training, and warn of losses that hardly act."""
    objective = trainer.distillation_objective
    if not objective.weights():
        return {}
    ratios = measure_ratios(trainer)
    _find(trainer, ratios, step=0)
    weights = objective.weights()
    shares = weighted(ratios, weights)
    if trainer.is_world_process_zero():
        warn_of_small_shares(shares, weights)
    return _named(shares)


def update_weights(trainer: Trainer) -> dict[str, float]:
    """
    Where it is time, measure and log what the weights amount to; set those that are "auto" for the next step.

    Returns:
        `dict[str, float]`: the shares before the first step, where the size of batches that fits is found in training.
    """
    kept, state = _kept(trainer), trainer.state
    if trainer.args.auto_find_batch_size and state.global_step == 0:
        return measure_gradient_shares(trainer)
    most = steps_between(state.max_steps, state.num_train_epochs)
    if kept is None:
        weights = trainer.distillation_objective.weights()
        # Of a stream that has ended Trainer asks for all steps to come, while it stands at one.
        is_new, trainer.shares_measured_at = state.global_step != trainer.shares_measured_at, state.global_step
        if weights and is_new and _is_time(state.global_step, most) and (ratios := measure_ratios(trainer)):
            trainer.log(_named(weighted(ratios, weights)))
    elif kept.is_due(state.global_step, most):
        ratios = measure_ratios(trainer)
        _find(trainer, ratios, state.global_step)
        trainer.log(_named(weighted(ratios, trainer.distillation_objective.weights())))
    elif not trainer.distillation_objective.found:  # those of a checkpoint
        _set(trainer, kept)
    return {}


def warn_of_clipping(trainer: Trainer) -> None:
    """Warn of gradient clipping with SGD, which shortens each of its steps."""
    args, given, named = trainer.args, trainer.optimizer, trainer.optimizer_cls_and_kwargs
    kind, *_ = (type(given),) if given else named or trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    has_features = is_on(args.lambda_inh) or is_on(args.lambda_exp)
    if issubclass(kind, torch.optim.SGD) and has_features and (args.max_grad_norm or 0) > 0:
        warnings.warn(
            f"max_grad_norm={args.max_grad_norm:g} clips the gradient at each step of SGD, and the losses between "
            "features have large ones: with Trainer's default of 1, IE-FT had 71.6 % in place of 80.4 % on CIFAR-10. "
            "Set max_grad_norm=0, as the papers have it.",
            UserWarning,
            stacklevel=3,
        )


def _is_time(step: int, most: int) -> bool:
    """Return whether a step is one of those, from 0 on."""
    at = _LEAST
    while at < min(step, most):
        at = next_measurement(at, most)
    return step >= at and (step - at) % most == 0


def _kept(trainer: Trainer) -> AutoWeights | None:
    return next((c for c in trainer.callback_handler.callbacks if isinstance(c, AutoWeights)), None)


def _find(trainer: Trainer, ratios: dict[str, float], step: int) -> None:
    """Take in a measurement for the weights that are "auto", and say once where there is nothing to go by."""
    kept, names = _kept(trainer), trainer.distillation_objective.automatic()
    if kept is None:
        return
    is_first = kept.measured_at is None
    by_argument = {LAMBDA_OF[loss]: ratio for loss, ratio in ratios.items()}
    kept.take({name: ratio for name, ratio in by_argument.items() if name in names}, step)
    _set(trainer, kept)
    missing = [name for name in names if name not in kept.ratios]
    if is_first and missing and trainer.is_world_process_zero():
        weights = trainer.distillation_objective.weights()
        warnings.warn(
            f"{' and '.join(missing)} cannot be found: on the batches measured, the gradient of the task's loss, or "
            f"of the loss to be weighed, is 0. {', '.join(f'{name}={weights[name]:g}' for name in missing)}, the "
            "method's own, until the next measurement. Where few images have labels, give a number.",
            UserWarning,
            stacklevel=3,
        )


def _set(trainer: Trainer, kept: AutoWeights) -> None:
    shares = {name: getattr(trainer.args, SHARE_OF[name]) for name in kept.ratios}
    trainer.distillation_objective.found = {name: share / kept.ratios[name] for name, share in shares.items()}


def _named(shares: dict[str, float]) -> dict[str, float]:
    return {f"{name}_gradient_share": share for name, share in shares.items()}
