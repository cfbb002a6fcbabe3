"""Learning rates that fall from the head of a model towards its input, for students that are pretrained."""

from collections import defaultdict

import torch
from torch import nn


def layer_rates(model: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """
    Return the factor on the learning rate of each parameter.

    The blocks are those of the largest `ModuleList`: layers of a ViT, stages of a ResNet. What comes after them
    has the factor 1, each block `decay` times that of the block after it, and what comes before them once more.

    Args:
        model (`nn.Module`):
            A student.
        decay (`float`):
            Factor from a block to the one before it, in (0, 1].

    Returns:
        `dict[nn.Parameter, float]`

    Raises:
        `ValueError`: a model without a `ModuleList`.

    Example:

    ```python
    >>> from transformers import ResNetConfig, ResNetForImageClassification
    >>> from iekd_hf.training.layer_rates import layer_rates
    >>> config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    >>> model = ResNetForImageClassification(config)
    >>> rates, stages = layer_rates(model, decay=0.5), model.resnet.encoder.stages
    >>> parts = (model.resnet.embedder, *stages, model.classifier)
    >>> [rates[next(part.parameters())] for part in parts]
    [0.125, 0.25, 0.5, 1.0]

    ```
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    inner = {id(below) for outer in lists for below in outer.modules() if below is not outer}
    lists = [blocks for blocks in lists if id(blocks) not in inner]
    if not lists:
        raise ValueError(
            f"Expected a model whose blocks are in a ModuleList for layer_decay, got {type(model).__name__} without "
            "one: leave layer_decay out, and pass an optimizer with groups of your own in optimizers."
        )
    blocks = max(lists, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))
    depth_of = {p: depth for depth, block in enumerate(blocks, start=1) for p in block.parameters()}
    rates, last = {}, 0
    for parameter in model.parameters():
        in_block = parameter in depth_of
        last = max(last, depth_of.get(parameter, 0))
        # What is no block comes before them until the first one is met, and after them from then on.
        depth = depth_of[parameter] if in_block else (len(blocks) + 1 if last else 0)
        rates[parameter] = decay ** (len(blocks) + 1 - depth)
    return rates


def split_by_rate(optimizer: torch.optim.Optimizer, rates: dict[nn.Parameter, float]) -> None:
    """Split an optimizer's groups into one for each factor, the largest first, which is the one that is logged."""
    groups = []
    for group in optimizer.param_groups:
        of_rate = defaultdict(list)
        for parameter in group["params"]:
            of_rate[rates.get(parameter, 1.0)].append(parameter)
        groups += [{**group, "params": p, "lr": group["lr"] * rate} for rate, p in of_rate.items()]
    optimizer.param_groups[:] = sorted(groups, key=lambda group: -group["lr"])
