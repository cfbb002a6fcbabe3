"""Distances between factors, by name: of what inherits, of what explores, and of a reconstruction."""

import math

import torch


def _nonzero(value: torch.Tensor) -> torch.Tensor:
    """Replace zeros by ones, to divide by; NaN stays NaN."""
    return torch.where(value == 0, 1.0, value)


def unit(factors: torch.Tensor) -> torch.Tensor:
    """Flatten each sample and divide it by its L2 norm; a sample of zeros stays zero, with a finite gradient."""
    flat = factors.flatten(1)
    # Scaling by the largest entry first keeps the squares of very small and very large factors inside float32's range.
    flat = flat / _nonzero(flat.detach().abs().amax(dim=1, keepdim=True))
    # Only the norm of a sample of zeros is below 1 now, so the clamp acts on it alone.
    return flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp_min(0.5)


def _safe_sqrt(value: torch.Tensor) -> torch.Tensor:
    """Take the square root with gradient 0, instead of infinity, at 0."""
    return torch.where(value == 0, 0.0, _nonzero(value).sqrt())


class Valid:
    """
    Hold which positions of a batch of maps count; the others, which are zero in what is compared, are padding.

    What it makes of a batch without padding is what comes out without it, to the last bit.

    Args:
        mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
            1 or `True` where an image is. By default everywhere.
    """

    def __init__(self, mask: torch.Tensor | None):
        self.mask = None if mask is None else mask.bool()

    def cut(self, maps: torch.Tensor) -> torch.Tensor:
        """Set the padding of `(batch_size, channels, height, width)` to zero, whatever is there."""
        # In place of a copy, which keeps the memory format, and with it the order in which a mean sums.
        return maps if self.mask is None else maps.clone().masked_fill_(~self.mask[:, None], 0.0)

    def weights(self, dtype: torch.dtype) -> torch.Tensor:
        """Weigh each sample so that a mean over all of it counts as one over what is no padding: `(batch_size,)`."""
        counts = self.mask.flatten(1).sum(dim=1)
        return self.mask[0].numel() / counts.clamp_min(1).to(dtype)

    def rows_mean(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean of `(batch_size * height * width, channels)` over the positions that count."""
        if self.mask is None:
            return rows.mean(dim=0)
        return rows.mean(dim=0) * (self.mask.numel() / self.mask.sum().clamp_min(1).to(rows.dtype))

    def cut_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Set the padding of `(batch_size * height * width, channels)` to zero."""
        return rows if self.mask is None else rows.masked_fill(~self.mask.flatten()[:, None], 0.0)

    def ones(self) -> torch.Tensor | float:
        """Return 1 for each sample, 0 for one that is nothing but padding."""
        return 1.0 if self.mask is None else self.mask.flatten(1).any(dim=1).float()


def _reduce(per_element: torch.Tensor, reduction: str, valid: Valid) -> torch.Tensor:
    """Reduce `(batch_size, N)`: the mean over each sample's N, or the sum over it, averaged over the batch."""
    if reduction == "sum":
        return per_element.sum(dim=1).mean()
    return (per_element if valid.mask is None else per_element * valid.weights(per_element.dtype)[:, None]).mean()


def _l1(student: torch.Tensor, teacher: torch.Tensor, reduction: str, valid: Valid) -> torch.Tensor:
    return _reduce((student.flatten(1) - teacher.flatten(1)).abs(), reduction, valid)


def _l2(student: torch.Tensor, teacher: torch.Tensor, reduction: str, valid: Valid) -> torch.Tensor:
    return _safe_sqrt(_reduce((student.flatten(1) - teacher.flatten(1)).square(), reduction, valid))


def _partial_l2(student: torch.Tensor, teacher: torch.Tensor, reduction: str, valid: Valid) -> torch.Tensor:
    student, teacher = student.flatten(1), teacher.flatten(1)
    already_below = (teacher <= 0) & (student <= teacher)
    return _reduce((student - teacher).square().masked_fill(already_below, 0.0), reduction, valid)


def _cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student * teacher).sum(dim=1)


def _cka(student: torch.Tensor, teacher: torch.Tensor, valid: Valid) -> torch.Tensor:
    # Each position of each image is one sample, the factor's channels are its variables. With whole images as samples
    # there are far fewer samples than variables, and linear CKA is then close to 1 whatever the factors are.
    def centred(factors):
        rows = (factors / _nonzero(factors.detach().abs().amax())).movedim(1, -1).flatten(0, -2)
        return valid.cut_rows(rows - valid.rows_mean(rows)) / math.sqrt(rows.shape[0])

    student, teacher = centred(student), centred(teacher)
    cross = (student.T @ teacher).square().sum()
    scale = _safe_sqrt((student.T @ student).square().sum()) * _safe_sqrt((teacher.T @ teacher).square().sum())
    return cross / _nonzero(scale)


RECONSTRUCTION_DISTANCES = ("l1", "l2")
# Between factors that were divided by their norms, but for CKA, which has a scale of its own.
INHERITANCE_DISTANCES = {
    "l1": _l1,
    "l2": _l2,
    "cosine": lambda student, teacher, reduction, valid: (valid.ones() - _cosine(student, teacher)).mean(),
    "partial_l2": _partial_l2,
}
EXPLORATION_DISTANCES = {
    "l1": lambda *arguments: -_l1(*arguments),
    "l2": lambda *arguments: -_l2(*arguments),
    "partial_l2": lambda *arguments: -_partial_l2(*arguments),
    "orthogonal": lambda student, teacher, reduction, valid: _cosine(student, teacher).abs().mean(),
    "cka": lambda student, teacher, reduction, valid: _cka(student, teacher, valid),
}
