"""Small segmenters by name, for images of some hundred pixels."""

import re

from transformers import (
    PreTrainedModel,
    ResNetConfig,
    SegformerImageProcessorPil,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)


_NAME = re.compile(r"tiny-upernet-(\d+)")


def is_tiny(name: str | None) -> bool:
    """
    Return whether a name is one of these.

    Args:
        name (`str`, *optional*):
            A Hub id, a folder or `tiny-upernet-<width>`.

    Returns:
        `bool`

    Example:

    ```python
    >>> from iekd_hf.commands.masks.tiny_segmenters import is_tiny
    >>> is_tiny("tiny-upernet-16"), is_tiny("nvidia/mit-b0")
    (True, False)

    ```
    """
    return name is not None and _NAME.fullmatch(name) is not None


def tiny_segmenter(name: str, **keywords) -> PreTrainedModel:
    """
    Make a tiny UperNet (Xiao et al., ECCV 2018, arXiv 1807.10221) that starts from scratch.

    Args:
        name (`str`):
            `tiny-upernet-<width>`: a ResNet of `width` to 4 * `width` channels, at strides 4 to 16, and a head of
            2 * `width` channels.
        keywords (`id2label`, `label2id`, `loss_ignore_index`):
            The classes, and the label of pixels that are left out.

    Returns:
        [`~transformers.UperNetForSemanticSegmentation`]

    Raises:
        `ValueError`: another name, or a width that is no multiple of 4.

    Example:

    ```python
    >>> from iekd_hf.commands.masks.tiny_segmenters import tiny_segmenter
    >>> tiny_segmenter("tiny-upernet-8", id2label={0: "cat", 1: "dog"}).num_parameters()
    43018

    ```
    """
    match = _NAME.fullmatch(name)
    width = int(match[1]) if match else 0
    if width < 4 or width % 4:
        raise ValueError(f"Expected tiny-upernet-<width> with a width of 4, 8, 12, ..., got {name!r}.")
    backbone = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3"],
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=2 * width, pool_scales=[1, 2], use_auxiliary_head=False, **keywords
    )
    return UperNetForSemanticSegmentation(config)


def tiny_processor(height: int, width: int) -> SegformerImageProcessorPil:
    """
    Make the image processor of a tiny segmenter.

    Args:
        height (`int`), width (`int`):
            What images are resized to, in pixels.

    Returns:
        [`~transformers.SegformerImageProcessorPil`]

    Example:

    ```python
    >>> from iekd_hf.commands.masks.tiny_segmenters import tiny_processor
    >>> tiny_processor(96, 128).size["width"]
    128

    ```
    """
    mean_and_std = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return SegformerImageProcessorPil(size={"height": height, "width": width}, **mean_and_std)
