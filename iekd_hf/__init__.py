"""Inheritance and exploration knowledge distillation (IE-KD, IE-DML) for vision models, as Hugging Face Trainers."""

import importlib
from typing import TYPE_CHECKING

from .models.registration import register_cifar_resnets


if TYPE_CHECKING:
    from .arguments import IEKDTrainingArguments, MutualTrainingArguments
    from .data.augmentation import BatchAugmentation
    from .data.decoded_images import DecodedImages
    from .features.listing import list_layers
    from .iekd_trainer import IEKDTrainer
    from .method.factors import ChannelSplit, FactorEncoder, Paraphraser
    from .method.losses import exploration_loss, inheritance_loss, reconstruction_loss
    from .method.presets import METHODS
    from .models.inherit import inherit_head
    from .models.modeling_cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
    from .mutual_trainer import MutualTrainer
    from .training.average import EMACallback
    from .training.base_trainer import DistillationTrainer


__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "BatchAugmentation",
    "ChannelSplit",
    "CifarResNetConfig",
    "CifarResNetForImageClassification",
    "DecodedImages",
    "DistillationTrainer",
    "EMACallback",
    "FactorEncoder",
    "IEKDTrainer",
    "IEKDTrainingArguments",
    "MutualTrainer",
    "MutualTrainingArguments",
    "Paraphraser",
    "exploration_loss",
    "inherit_head",
    "inheritance_loss",
    "list_layers",
    "reconstruction_loss",
]

# Where each name is: imported when it is first asked for, because torch alone takes seconds.
_FILES = {
    "arguments": ("IEKDTrainingArguments", "MutualTrainingArguments"),
    "data.augmentation": ("BatchAugmentation",),
    "data.decoded_images": ("DecodedImages",),
    "features.listing": ("list_layers",),
    "iekd_trainer": ("IEKDTrainer",),
    "method.factors": ("ChannelSplit", "FactorEncoder", "Paraphraser"),
    "method.losses": ("exploration_loss", "inheritance_loss", "reconstruction_loss"),
    "method.presets": ("METHODS",),
    "models.inherit": ("inherit_head",),
    "models.modeling_cifar_resnet": ("CifarResNetConfig", "CifarResNetForImageClassification"),
    "mutual_trainer": ("MutualTrainer",),
    "training.average": ("EMACallback",),
    "training.base_trainer": ("DistillationTrainer",),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str):
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    importlib.import_module("transformers")  # whole, with what is registered after it, before a file here needs it
    globals()[name] = value = getattr(importlib.import_module(f".{_FILE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_cifar_resnets()
