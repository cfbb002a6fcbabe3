"""What of a feature map is compared: factors (FT, IE-KD), attention maps (AT), responses before activation (OD)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from .factors import FactorEncoder, Paraphraser


class AttentionMap(nn.Module):
    r"""
    Reduce a feature map to where it responds: \(Q_p = \frac{1}{C} \sum_c f_{c,p}^2\), without parameters.

    Source: Zagoruyko and Komodakis, *Paying More Attention to Attention*, ICLR 2017. Their loss, the mean of
    \((\hat Q_S - \hat Q_T)^2\) over N positions, is \(\frac{2}{N} (1 - \cos)\): the distance `"cosine"`. Maps are not
    negative, so minus that loss is, but for a constant, the distance `"orthogonal"`.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.method.knowledge import AttentionMap
    >>> AttentionMap()(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1))
    tensor([[[[5.]]]])

    ```
    """

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, channels, height, width)` to `(batch_size, 1, height, width)`, in float32 at least."""
        feature_map = feature_map if feature_map.dtype == torch.float64 else feature_map.float()
        return feature_map.square().mean(dim=1, keepdim=True)

    encode = forward


class MarginReLU(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="iekd_hf",
    tags=["iekd", "knowledge-distillation"],
    license="apache-2.0",
):
    r"""
    Cut a teacher's responses before the activation at a margin: \(\sigma_{m_c}(x) = \max(x, m_c)\), where \(m_c < 0\)
    is the mean of the negative responses of channel c.

    Source: Heo et al., *A Comprehensive Overhaul of Feature Distillation*, ICCV 2019 (OD). They derive the margins
    from BatchNorm's parameters; here they are measured, which needs no BatchNorm.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.method.knowledge import MarginReLU
    >>> margin_relu = MarginReLU(in_channels=1)
    >>> responses = torch.tensor([-3.0, -1.0, 5.0]).view(1, 1, 1, 3)
    >>> margin_relu.measure([responses])
    >>> margin_relu.encode(responses)
    tensor([[[[-2., -1.,  5.]]]])

    ```
    """

    def __init__(self, in_channels: int):
        super().__init__()
        self.in_channels = self.factor_channels = in_channels
        self.register_buffer("margins", torch.zeros(in_channels))

    @torch.no_grad()
    def measure(self, feature_maps: Iterable[torch.Tensor]) -> None:
        """Take each channel's mean negative response over maps `(batch_size, channels, height, width)` as margin."""
        total, count = torch.zeros_like(self.margins), torch.zeros_like(self.margins)
        for feature_map in feature_maps:
            total += feature_map.float().clamp(max=0).sum(dim=(0, 2, 3))
            count += (feature_map < 0).sum(dim=(0, 2, 3))
        self.margins.copy_(total / count.clamp_min(1))

    def encode(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Return the responses `(batch_size, in_channels, height, width)`, none below its channel's margin."""
        return torch.maximum(feature_map, self.margins.to(feature_map.dtype).view(-1, 1, 1))

    forward = encode


class Connector(nn.Sequential):
    """Bring a part of the student's responses to the teacher's channels by a 1x1 convolution and BatchNorm (OD)."""

    def __init__(self, in_channels: int, out_channels: int):
        convolution = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        nn.init.normal_(convolution.weight, std=math.sqrt(2 / out_channels))
        super().__init__(convolution, nn.BatchNorm2d(out_channels))


@dataclass(frozen=True)
class Knowledge:
    """Describe what the maps of a pair of layers are compared by, and the modules that make it of either map."""

    teacher_side: type[nn.Module]  # turns the teacher's map into the target, by `encode`
    # From a part's channels, the target's, and the size of convolutions: the part's encoder.
    student_side: Callable[[int, int, int], nn.Module]
    width: Callable[[int, int | None], int]  # from the teacher's channels and `factor_channels`: the target's
    is_kept: bool = True  # whether the teacher's side has weights, which stage 1 makes and a run keeps
    is_trained: bool = True  # by the reconstruction error; otherwise stage 1 measures them
    before_activation: bool = False  # whether maps are taken before the activation that ends a layer
    normalize: bool = True  # whether what inherits is compared by its direction


KNOWLEDGE = {
    "factors": Knowledge(
        Paraphraser, FactorEncoder, width=lambda channels, factor_channels: factor_channels or max(channels // 2, 1)
    ),
    "attention": Knowledge(
        AttentionMap,
        student_side=lambda in_channels, out_channels, kernel_size: AttentionMap(),
        width=lambda channels, factor_channels: 1,
        is_kept=False,
        is_trained=False,
    ),
    "preactivation": Knowledge(
        MarginReLU,
        student_side=lambda in_channels, out_channels, kernel_size: Connector(in_channels, out_channels),
        width=lambda channels, factor_channels: channels,
        is_trained=False,
        before_activation=True,
        normalize=False,
    ),
}
