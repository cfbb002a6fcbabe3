"""Small detectors by name, for images of some hundred pixels and few objects."""

import re

from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
)


_NAME = re.compile(r"tiny-rt-detr-(\d+)")


def is_tiny(name: str | None) -> bool:
    """
    Return whether a name is one of these.

    Args:
        name (`str`, *optional*):
            A Hub id, a folder or `tiny-rt-detr-<width>`.

    Returns:
        `bool`

    Example:

    ```python
    >>> from iekd_hf.commands.boxes.tiny_detectors import is_tiny
    >>> is_tiny("tiny-rt-detr-16"), is_tiny("PekingU/rtdetr_r18vd")
    (True, False)

    ```
    """
    return name is not None and _NAME.fullmatch(name) is not None


def tiny_config(name: str, most_objects: int = 10, **labels) -> PreTrainedConfig:
    """
    Make the configuration of an RT-DETR (Zhao et al., CVPR 2024, arXiv 2304.08069) in small.

    Args:
        name (`str`):
            `tiny-rt-detr-<width>`: a ResNet of `width` to 4 * `width` channels, at strides 4 to 16, and a hybrid
            encoder over the last two and two decoder layers, of 64 channels whatever the width.
        most_objects (`int`, *optional*, defaults to 10):
            How many objects an image may have; there are twice as many queries.
        labels (`id2label`, `label2id`):
            The classes.

    Returns:
        [`~transformers.RTDetrConfig`]

    Raises:
        `ValueError`: another name, or a width that is no multiple of 4.

    Example:

    ```python
    >>> from iekd_hf.commands.boxes.tiny_detectors import tiny_config
    >>> config = tiny_config("tiny-rt-detr-16")
    >>> config.encoder_in_channels, config.num_queries
    ([32, 64], 20)

    ```
    """
    match = _NAME.fullmatch(name)
    width = int(match[1]) if match else 0
    if width < 4 or width % 4:
        raise ValueError(f"Expected tiny-rt-detr-<width> with a width of 4, 8, 12, ..., got {name!r}.")
    channels = [width, 2 * width, 4 * width]
    backbone = RTDetrResNetConfig(
        embedding_size=width,
        hidden_sizes=channels,
        depths=[1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3"],
    )
    return RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,  # there are no statistics of a pretraining to keep
        encoder_in_channels=channels[1:],
        feat_strides=[8, 16],
        encode_proj_layers=[1],
        encoder_hidden_dim=64,
        encoder_ffn_dim=128,
        encoder_attention_heads=4,
        decoder_in_channels=[64, 64],
        num_feature_levels=2,
        d_model=64,
        decoder_ffn_dim=128,
        decoder_layers=2,
        decoder_attention_heads=4,
        hidden_expansion=0.5,
        num_queries=2 * most_objects,
        num_denoising=2 * most_objects,
        weight_loss_vfl=2.0,  # so small a model places boxes long before it tells classes apart
        initializer_range=0.1,  # as 64 channels want it; the default, 0.01, is for models that start from weights
        **labels,
    )


def tiny_detector(name: str, most_objects: int = 10, **labels) -> PreTrainedModel:
    """
    Make a tiny detector that starts from scratch.

    Args:
        name (`str`), most_objects (`int`, *optional*, defaults to 10), labels (`id2label`, `label2id`):
            As in [`tiny_config`].

    Returns:
        [`~transformers.RTDetrForObjectDetection`]

    Example:

    ```python
    >>> from iekd_hf.commands.boxes.tiny_detectors import tiny_detector
    >>> tiny_detector("tiny-rt-detr-8", id2label={0: "cat", 1: "dog"}).num_parameters()
    325534

    ```
    """
    model = RTDetrForObjectDetection(tiny_config(name, most_objects, **labels))
    open_norms(model)
    return model


def open_norms(model: nn.Module) -> None:
    """
    Start the norms of a model without trained weights at 1, as everywhere else.

    Transformers draws those of RT-DETR-like detectors with a deviation of 0.01 around 0
    (`RTDetrPreTrainedModel._init_weights`), where hardly anything gets through.

    Args:
        model (`nn.Module`):
            Changed in place.

    Example:

    ```python
    >>> from iekd_hf.commands.boxes.tiny_detectors import open_norms
    >>> from torch import nn
    >>> norm = nn.BatchNorm2d(2)
    >>> _ = nn.init.normal_(norm.weight, std=0.01)
    >>> open_norms(norm)
    >>> norm.weight.tolist()
    [1.0, 1.0]

    ```
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)


def tiny_processor(height: int, width: int) -> RTDetrImageProcessorPil:
    """
    Make the image processor of a tiny detector.

    Args:
        height (`int`), width (`int`):
            What images are resized to, in pixels.

    Returns:
        [`~transformers.RTDetrImageProcessorPil`]

    Example:

    ```python
    >>> from iekd_hf.commands.boxes.tiny_detectors import tiny_processor
    >>> tiny_processor(96, 128).size["width"]
    128

    ```
    """
    mean_and_std = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return RTDetrImageProcessorPil(size={"height": height, "width": width}, do_normalize=True, **mean_and_std)
