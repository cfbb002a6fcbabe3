"""Which layer of a timm model gives what its `forward_features` returns: its last feature map, after the last norm."""

import torch
from torch import nn


def last_features_layer(model: nn.Module) -> str:
    """
    Find the layer by one forward pass: the one that has made the very tensor that `forward_features` returns.

    timm has no name for it: it is `layer4` in a ResNet, `norm` in a ViT, `bn2` in an EfficientNet; of these
    `feature_info` knows the first only.

    Args:
        model (`nn.Module`):
            A timm model.

    Returns:
        `str`: the layer's dotted path.

    Raises:
        `ValueError`: no layer gives it.
    """
    weight = next(parameter for parameter in model.parameters() if parameter.ndim == 4)  # of the first convolution
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.pretrained_cfg["input_size"][1:]
    pixels = torch.zeros(1, weight.shape[1], *size, dtype=weight.dtype, device=weight.device)
    outputs: dict[str, object] = {}

    def keep(name):
        return lambda module, args, output: outputs.__setitem__(name, output)

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            features = model.forward_features(pixels)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    same = [name for name, output in outputs.items() if output is features]
    if not same:
        raise ValueError(
            f"Expected a layer of {type(model).__name__} whose output forward_features returns, found none: name one "
            "in teacher_layers or student_layers. iekd_hf.list_layers(model, image_size) prints the layers that can "
            "be named."
        )
    # A block and its last layer give the same tensor: the block; so do a block and an idle norm behind it.
    return min(reversed(same), key=lambda name: name.count("."))
