"""What people expect of a training recipe, from kornia: RandAugment, MixUp and CutMix on whole batches."""

import inspect
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from iekd_hf import BatchAugmentation


# Operations that RandAugment draws for an image, as its authors have it.
_OPERATIONS = 2
# RandAugment draws for a batch; a batch is cut into so many parts, each with draws of its own.
_PARTS = 8


def rand_augment(magnitude: int) -> nn.Module:
    """Make RandAugment for pixels in [0, 1]."""
    from kornia.augmentation.auto import RandAugment

    if not 0 < magnitude < 30:
        raise ValueError(f"Expected --rand_augment from 1 to 29, got {magnitude}: 9 is a usual magnitude.")
    return RandAugment(n=_OPERATIONS, m=magnitude)


class RandAugmentedBatches(nn.Module):
    """
    Crop, flip, apply RandAugment and normalise batches of uint8 images; in evaluation only normalise them.

    Args:
        augmentation (`BatchAugmentation`):
            What crops, flips and normalises.
        magnitude (`int`):
            Of RandAugment's operations, from 1 to 29.
    """

    def __init__(self, augmentation: BatchAugmentation, magnitude: int):
        super().__init__()
        self.augmentation, self.operations = augmentation, rand_augment(magnitude)

    def forward(
        self, pixel_values: torch.Tensor, image_ids: torch.Tensor | None = None, view: int = 0
    ) -> torch.Tensor:
        """Make one view of each image, as [`BatchAugmentation`] does."""
        pixels = self.augmentation(pixel_values, image_ids, view)
        if image_ids is None:
            return pixels
        # The operations are made for pixels in [0, 1], which crops and flips have left between the extremes of these.
        scale, shift = self.augmentation.multiply * 255, self.augmentation.add
        parts = ((pixels - shift) / scale).clamp(0, 1).chunk(_PARTS)
        return torch.cat([self.operations(part) for part in parts]) * scale + shift


class MixedBatches(nn.Module):
    r"""
    Mix the images of a batch, and their labels: MixUp and CutMix, of kornia.

    A batch is mixed in one way or not at all. MixUp draws its share evenly from [0, 1] (its authors' Beta distribution
    with \(\alpha = 1\)), CutMix cuts rectangles of such shares.

    Args:
        num_labels (`int`):
            Classes.
        mixup (`float`, *optional*, defaults to 0.0), cutmix (`float`, *optional*, defaults to 0.0):
            Share of the batches that each of them mixes.

    Raises:
        `ValueError`: shares outside [0, 1], or more than 1 together.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.commands.images.recipes import MixedBatches
    >>> mixing = MixedBatches(num_labels=2, mixup=1.0)
    >>> black_and_white = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    >>> pixel_values, labels = mixing(black_and_white, torch.tensor([0, 1]))
    >>> labels.shape, torch.allclose(labels[:, 1], pixel_values.mean(dim=(1, 2, 3)), atol=1e-6)
    (torch.Size([2, 2]), True)

    ```
    """

    def __init__(self, num_labels: int, mixup: float = 0.0, cutmix: float = 0.0):
        super().__init__()
        import kornia.augmentation as K

        if min(mixup, cutmix) < 0 or mixup + cutmix > 1:
            raise ValueError(
                f"Expected shares of the batches as mixup and cutmix, at most 1 together, got {mixup} and {cutmix}."
            )
        self.num_labels, self.mixup, self.cutmix = num_labels, mixup, cutmix
        self.mix = K.RandomMixUpV2(data_keys=["input", "class"])
        # Newer versions warn of their default, which will be turned round: the share of the cut, as older ones do.
        named = "use_correct_lambda" in inspect.signature(K.RandomCutMixV2).parameters
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.cut = K.RandomCutMixV2(
                data_keys=["input", "class"], **({"use_correct_lambda": False} if named else {})
            )

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Mix a batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                Images.
            labels (`torch.Tensor` of shape `(batch_size,)`):
                Classes; -100 for an image without one.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: images, and labels `(batch_size, num_labels)`, each row of which adds
            up to the share of the image that has a label.
        """
        draw = torch.rand(()).item()  # on the CPU: nothing waits for the device
        known = (labels >= 0).to(pixel_values.dtype)[:, None]
        one_hot = F.one_hot(labels.clamp(min=0), self.num_labels).to(pixel_values.dtype) * known
        if draw >= self.mixup + self.cutmix:
            return pixel_values, one_hot
        mixer = self.mix if draw < self.mixup else self.cut
        rows = torch.arange(len(labels), device=labels.device)
        mixed, noted = mixer(pixel_values, rows)  # the rows in place of the labels, to find both of a pair
        noted = noted.view(-1, 3)  # row, the other row, its share
        return mixed, torch.lerp(one_hot, one_hot[noted[:, 1].long()], noted[:, 2:].to(one_hot.dtype))
