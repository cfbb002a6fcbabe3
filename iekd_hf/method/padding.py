"""The padding of a batch: masks on any grid, maps without it, and factors of several sizes brought together."""

import torch
import torch.nn.functional as F


def mask_at(pixel_mask: torch.Tensor | None, size: tuple[int, int]) -> torch.Tensor | None:
    """Bring a batch's `pixel_mask` to another grid by its nearest entries, as detectors do."""
    return None if pixel_mask is None else F.interpolate(pixel_mask[None].float(), size=tuple(size))[0].bool()


def zero_padding(maps: torch.Tensor, pixel_mask: torch.Tensor | None) -> torch.Tensor:
    """Set the padding of `(batch_size, channels, height, width)` to zero; without a mask nothing changes."""
    if pixel_mask is None:
        return maps
    return maps.masked_fill(~mask_at(pixel_mask, maps.shape[-2:])[:, None], 0.0)


class Valid:
    """Leave the padding of a batch of maps out of sums and means; without a mask nothing is changed, to the bit."""

    def __init__(self, mask: torch.Tensor | None):
        self.mask = None if mask is None else mask.bool()

    def zero_padding(self, maps: torch.Tensor) -> torch.Tensor:
        """Set the padding of `(batch_size, channels, height, width)` to zero, whatever is there."""
        # A clone keeps the memory format, and with it the order in which a mean sums.
        return maps if self.mask is None else maps.clone().masked_fill_(~self.mask[:, None], 0.0)

    def weights(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the factors `(batch_size,)` that turn means over whole samples into means without padding."""
        counts = self.mask.flatten(1).sum(dim=1)
        return self.mask[0].numel() / counts.clamp_min(1).to(dtype)

    def rows_mean(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean of `(batch_size * height * width, channels)` over the positions that count."""
        if self.mask is None:
            return rows.mean(dim=0)
        return rows.mean(dim=0) * (self.mask.numel() / self.mask.sum().clamp_min(1).to(rows.dtype))

    def zero_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Set the padding of `(batch_size * height * width, channels)` to zero."""
        return rows if self.mask is None else rows.masked_fill(~self.mask.flatten()[:, None], 0.0)

    def has_content(self) -> torch.Tensor | float:
        """Return 1 for each sample, 0 for one that is nothing but padding."""
        return 1.0 if self.mask is None else self.mask.flatten(1).any(dim=1).float()


def match_sizes(
    student: torch.Tensor, teacher: torch.Tensor, pixel_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    Bring two tensors to the smaller height and the smaller width of both by adaptive average pooling.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.method.padding import match_sizes
    >>> student, teacher, mask = match_sizes(torch.randn(2, 8, 7, 7), torch.randn(2, 8, 14, 6))
    >>> student.shape, teacher.shape, mask
    (torch.Size([2, 8, 7, 6]), torch.Size([2, 8, 7, 6]), None)
    >>> feature_map, pixel_mask = torch.tensor([[[[3.0, 5.0, 5.0, 99.0]]]]), torch.tensor([[[1, 1, 1, 0]]])
    >>> match_sizes(feature_map, torch.zeros(1, 1, 1, 2), pixel_mask)
    (tensor([[[[4., 5.]]]]), tensor([[[[0., 0.]]]]), tensor([[[True, True]]]))

    ```
    """
    size = tuple(min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True))
    if pixel_mask is None:
        return *(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher)), None
    (student, mask_S), (teacher, mask_T) = (_average(x, pixel_mask, size) for x in (student, teacher))
    return student, teacher, mask_S & mask_T


def _average(
    factors: torch.Tensor, pixel_mask: torch.Tensor, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pool without padding; also return where there was anything else."""
    mask = mask_at(pixel_mask, factors.shape[2:])
    if factors.shape[2:] == size:
        return factors, mask
    pooled = F.adaptive_avg_pool2d(factors.masked_fill(~mask[:, None], 0.0), size)
    share = F.adaptive_avg_pool2d(mask[:, None].to(factors.dtype), size)
    return pooled / torch.where(share == 0, 1.0, share), share[:, 0] > 0
