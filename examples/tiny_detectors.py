"""Small detectors by name, for images of some hundred pixels and few objects."""

import re

from transformers import PreTrainedConfig, RTDetrConfig, RTDetrImageProcessorPil, RTDetrResNetConfig


_NAME = re.compile(r"tiny-rt-detr-(\d+)")


def is_tiny(name: str | None) -> bool:
    """
    Tell whether a name is one of these.

    Args:
        name (`str`, *optional*):
            A Hub id, a folder or `tiny-rt-detr-<width>`.

    Returns:
        `bool`

    Example:

    ```python
    >>> from tiny_detectors import is_tiny
    >>> is_tiny("tiny-rt-detr-16"), is_tiny("PekingU/rtdetr_r18vd")
    (True, False)

    ```
    """
    return name is not None and _NAME.fullmatch(name) is not None


def tiny_config(name: str, **labels) -> PreTrainedConfig:
    """
    Make the configuration of an RT-DETR (Zhao et al., CVPR 2024, arXiv 2304.08069) in small.

    Args:
        name (`str`):
            `tiny-rt-detr-<width>`: a ResNet of `width` to 8 * `width` channels, at strides 4 to 32, and a hybrid
            encoder and two decoder layers of 64 channels, the same for every width.
        labels (`id2label`, `label2id`):
            The classes.

    Returns:
        [`~transformers.RTDetrConfig`]

    Raises:
        `ValueError`: another name, or a width that is no multiple of 4.

    Example:

    ```python
    >>> from tiny_detectors import tiny_config
    >>> tiny_config("tiny-rt-detr-16").encoder_in_channels
    [32, 64, 128]

    ```
    """
    match = _NAME.fullmatch(name)
    width = int(match[1]) if match else 0
    if width < 4 or width % 4:
        raise ValueError(f"Expected tiny-rt-detr-<width> with a width of 4, 8, 12, ..., got {name!r}.")
    channels = [width, 2 * width, 4 * width, 8 * width]
    backbone = RTDetrResNetConfig(
        embedding_size=width,
        hidden_sizes=channels,
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return RTDetrConfig(
        backbone_config=backbone,
        freeze_backbone_batch_norms=False,  # there are no statistics of a pretraining to keep
        encoder_in_channels=channels[1:],
        encoder_hidden_dim=64,
        encoder_ffn_dim=128,
        encoder_attention_heads=4,
        decoder_in_channels=[64, 64, 64],
        d_model=64,
        decoder_ffn_dim=128,
        decoder_layers=2,
        decoder_attention_heads=4,
        hidden_expansion=0.5,
        num_queries=30,
        num_denoising=30,
        **labels,
    )


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
    >>> from tiny_detectors import tiny_processor
    >>> tiny_processor(96, 128).size["width"]
    128

    ```
    """
    mean_and_std = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return RTDetrImageProcessorPil(size={"height": height, "width": width}, do_normalize=True, **mean_and_std)
