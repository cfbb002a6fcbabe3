"""A step of RepDistiller's factor transfer, its own networks and loop, to time beside ours; a clone on PYTHONPATH."""

import contextlib
import io
from collections.abc import Callable
from types import SimpleNamespace

import torch


def factor_transfer(sgd: dict, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """
    Set up RepDistiller's factor transfer from a CIFAR ResNet-56 to a ResNet-20; its paraphraser stays as it starts.

    Args:
        sgd (`dict`):
            Arguments of the optimizer.
        device (`torch.device`):
            Where.

    Returns:
        `Callable`: does one step on pixel values and labels.
    """
    from distiller_zoo.FT import FactorTransfer
    from distiller_zoo.KD import DistillKL
    from helper.loops import train_distill
    from models.resnet import resnet20, resnet56
    from models.util import Paraphraser, Translator

    student, teacher = resnet20(num_classes=10), resnet56(num_classes=10)
    shape = torch.Size([2, 64, 8, 8])  # of either last map, at 32x32
    modules = torch.nn.ModuleList([student, Translator(shape, shape), Paraphraser(shape), teacher]).to(device)
    criteria = [torch.nn.CrossEntropyLoss(), DistillKL(4), FactorTransfer()]
    optimizer = torch.optim.SGD([*student.parameters(), *modules[1].parameters()], **sgd)
    options = SimpleNamespace(distill="factor", gamma=1.0, alpha=0.0, beta=200.0, print_freq=10**6)

    def step(pixels: torch.Tensor, labels: torch.Tensor) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it reports each epoch, which is one step here
            train_distill(1, [(pixels, labels, labels)], modules, criteria, optimizer, options)

    return step
