"""Inheritance and exploration knowledge distillation (IE-KD, IE-DML) for vision models, as Hugging Face Trainers."""

from transformers import AutoConfig, AutoModelForImageClassification

from .arguments import METHODS, IEKDTrainingArguments, MutualTrainingArguments
from .data.augmentation import BatchAugmentation
from .data.decoded_images import DecodedImages
from .features.listing import list_layers
from .iekd_trainer import IEKDTrainer
from .method.factors import ChannelSplit, FactorEncoder, Paraphraser
from .method.losses import exploration_loss, inheritance_loss, reconstruction_loss
from .models.modeling_cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from .mutual_trainer import MutualTrainer
from .training.average import EMACallback
from .training.base_trainer import DistillationTrainer


AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification)

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
    "inheritance_loss",
    "list_layers",
    "reconstruction_loss",
]
