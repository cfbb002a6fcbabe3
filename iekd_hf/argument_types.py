"""Refuse arguments of another type than their field's, such as numbers in quotes; a whole number may be a float."""

import inspect
from dataclasses import fields
from types import NoneType
from typing import get_args, get_origin

from transformers import TrainingArguments


# Of Trainer's own arguments, those whose types it does not look at itself until it fails.
_NUMBERS_OF_TRAINER = {"learning_rate", "max_steps", "num_train_epochs", "gradient_accumulation_steps", "seed"}
_NUMBERS_OF_TRAINER |= {"per_device_train_batch_size", "per_device_eval_batch_size"}
_FIELDS_OF_TRAINER = {f.name for f in fields(TrainingArguments)} - _NUMBERS_OF_TRAINER


def check_types(args: TrainingArguments) -> None:
    """Refuse values of another type than their field's; an int in a field for floats becomes one."""
    # By the annotations: HfArgumentParser takes the None out of the types of a dataclass's fields.
    types = {k: v for cls in reversed(type(args).__mro__) for k, v in inspect.get_annotations(cls).items()}
    for f in fields(args):
        kinds, value = get_args(types[f.name]) or (types[f.name],), getattr(args, f.name)
        if f.name in _FIELDS_OF_TRAINER:
            continue
        if any(_is_a(value, kind) for kind in kinds):
            # A hyperparameter search of Trainer casts what it suggests to the type of the value that is there.
            if float in kinds and isinstance(value, int) and int not in kinds:
                setattr(args, f.name, float(value))
            continue
        # A list by what is in it: list[str].
        names = " or ".join(str(kind) if get_args(kind) else kind.__name__ for kind in kinds)
        names = names.replace("NoneType", "None")
        raise ValueError(f"Expected {f.name} of type {names}, got {value!r} of type {type(value).__name__}.")


def _is_a(value, kind: type) -> bool:
    """Return whether a value is of a field's type; an int is a float, a bool is neither."""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    kind = get_origin(kind) or kind
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return value is None if kind is NoneType else isinstance(value, kind)
