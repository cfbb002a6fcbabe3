"""The CIFAR ResNets of the literature (ResNet-20, 32, 44, 56, 110) on transformers' own ResNet.

This file stands alone, so that it can travel with a pushed model as its custom code.
"""

from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification


class CifarResNetConfig(ResNetConfig):
    """
    Configure a CIFAR ResNet: He et al., 2016, section 4.2, with projection shortcuts.

    Args:
        embedding_size (`int`, *optional*, defaults to 16):
            Channels after the stem.
        hidden_sizes (`list[int]`, *optional*, defaults to `[16, 32, 64]`):
            Channels of the three stages.
        depths (`list[int]`, *optional*, defaults to `[3, 3, 3]`):
            Blocks of each stage: n, for a depth of 6n + 2.
        kwargs:
            As in [`~transformers.ResNetConfig`].

    Example:

    ```python
    >>> from iekd_hf import CifarResNetConfig
    >>> CifarResNetConfig.from_depth(56).depths
    [9, 9, 9]

    ```
    """

    model_type = "cifar_resnet"

    def __init__(self, embedding_size=16, hidden_sizes=(16, 32, 64), depths=(3, 3, 3), layer_type="basic", **kwargs):
        super().__init__(
            embedding_size=embedding_size,
            hidden_sizes=list(hidden_sizes),
            depths=list(depths),
            layer_type=layer_type,
            **kwargs,
        )

    @classmethod
    def from_depth(cls, depth: int, **kwargs) -> "CifarResNetConfig":
        """
        Make the configuration of a depth as the literature counts it.

        Args:
            depth (`int`):
                20, 32, 44, 56, 110, or any other 6n + 2.
            kwargs:
                As in [`CifarResNetConfig`].

        Returns:
            `CifarResNetConfig`: with n blocks in each stage.

        Raises:
            `ValueError`: a depth that is not 6n + 2.
        """
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"Expected the depth of a CIFAR ResNet to be 6n + 2 (20, 32, 44, 56, 110), got {depth}.")
        return cls(depths=[(depth - 2) // 6] * 3, **kwargs)


class CifarResNetForImageClassification(ResNetForImageClassification):
    """
    Classify small images with a ResNet whose stem is one 3x3 convolution of stride 1, without max-pooling.

    Args:
        config (`CifarResNetConfig`):
            The configuration.

    Example:

    ```python
    >>> from iekd_hf import CifarResNetConfig, CifarResNetForImageClassification
    >>> CifarResNetForImageClassification(CifarResNetConfig.from_depth(20, num_labels=10)).num_parameters()
    272474

    ```
    """

    config_class = CifarResNetConfig

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        stem = self.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(
            config.num_channels, config.embedding_size, kernel_size=3, padding=1, bias=False
        )
        stem.pooler = nn.Identity()
        # Initialise the new convolution as the model's own; what is initialised already is left alone.
        self.post_init()


# `save_pretrained` copies this file beside the weights, so that the model loads where iekd_hf is not installed.
CifarResNetConfig.register_for_auto_class()
CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
