"""Make a copy of a frozen model that gives the same feature maps in less time; the original stays as it was."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..features.trace import watching


def fold_batchnorm(model: nn.Module, run: Callable[[nn.Module], object], keep: Sequence[str] = ()) -> int:
    """
    Fold BatchNorm layers into the convolutions before them, in place: in eval mode both are one convolution.

    Which convolution feeds which BatchNorm is seen in one forward pass: a tensor that a convolution has made and that
    a BatchNorm, and no other layer, takes.
    """
    made_by: dict[int, str] = {}
    alive, uses, calls, pairs = [], Counter(), Counter(), {}

    def watch(name):
        def hook(module, args, output):
            calls[name] += 1
            alive.extend((*args, output))  # an id is unique among living objects only
            for tensor in args:
                uses[id(tensor)] += 1
            if isinstance(module, nn.BatchNorm2d) and args and id(args[0]) in made_by:
                pairs[name] = (made_by[id(args[0])], id(args[0]))
            if isinstance(module, nn.Conv2d):
                made_by[id(output)] = name

        return hook

    modules = dict(model.named_modules())
    leaves = {name: module for name, module in modules.items() if next(module.children(), None) is None}
    with watching(model, leaves, watch):
        run(model)
    folded = 0
    for norm, (convolution, tensor) in pairs.items():
        if uses[tensor] == calls[norm] == calls[convolution] == 1 and convolution not in keep:
            _replace(modules, convolution, fuse_conv_bn_eval(modules[convolution], modules[norm]))
            _replace(modules, norm, nn.Identity())
            folded += 1
    return folded


def copy_fast(model: nn.Module, run: Callable[[nn.Module], list[torch.Tensor]], keep: Sequence[str] = ()) -> nn.Module:
    """Copy a model, fold its BatchNorm layers, and lay it out channels last if it is convolutional."""
    fast = copy.deepcopy(model).eval()
    if fold_batchnorm(fast, run, keep):
        for expected, got in zip(run(model), run(fast), strict=True):
            if (expected - got).norm() > 1e-3 * expected.norm():
                fast = copy.deepcopy(model).eval()
                break
    # Convolutions that only cut an image into patches, as in a ViT, do not make a model convolutional.
    convolutions = (module for module in fast.modules() if isinstance(module, nn.Conv2d))
    if any(max(m.kernel_size) > max(m.stride) for m in convolutions):
        fast = fast.to(memory_format=torch.channels_last)
    return fast


def _replace(modules: dict[str, nn.Module], name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(modules[parent], last, module)
