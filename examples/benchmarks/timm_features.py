"""A step of timm's feature distillation on its own ResNet-50 and ResNet-18, to time beside ours."""

from collections.abc import Callable

import torch


def feature_distillation(sgd: dict, device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """
    Set up timm's feature distillation: pooled features through one linear layer, and their squared difference.

    Args:
        sgd (`dict`):
            Arguments of the optimizer.
        device (`torch.device`):
            Where.

    Returns:
        `Callable`: does one step on pixel values and labels.
    """
    import timm
    from timm.task import FeatureDistillationTask

    student, teacher = (timm.create_model(name, num_classes=10).to(device) for name in ("resnet18", "resnet50"))
    task = FeatureDistillationTask(
        student, teacher, torch.nn.CrossEntropyLoss(), distill_loss_weight=1.0, device=device, verbose=False
    ).train()
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), **sgd)

    def step(pixels: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        task(pixels, labels)["loss"].backward()
        optimizer.step()

    return step
