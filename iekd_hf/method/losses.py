"""The losses of IE-KD, as pure functions over factors of shape `(batch_size, factor_channels, height, width)`.

Every function computes in float32 (float64 stays float64) outside autocast: in half precision a squared sum overflows
and a norm's epsilon rounds to zero.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .padding import Valid


REDUCTIONS = ("mean", "sum")


def inheritance_loss(
    student_factors: torch.Tensor,
    teacher_factors: torch.Tensor,
    distance: str = "l1",
    reduction: str = "mean",
    normalize: bool = True,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Measure how far the inheritance half's factors are from the teacher's: \(L_{inh}\) of the paper, section 3.2.

    Both factors are flattened per sample and divided by their L2 norm first, \(\hat x = x / \|x\|_2\), so only the
    direction counts. `"mean"` averages over all elements and the batch (about 1.13 / sqrt(N) for unrelated factors of
    N elements), as the authors' code does; `"sum"` sums over the elements and averages over the batch, which is the
    formula as printed and N times larger. `lambda_inh` means something else under each.

    Args:
        student_factors (`torch.Tensor` of shape `(batch_size, factor_channels, height, width)`):
            Factors of the student's inheritance half.
        teacher_factors (`torch.Tensor` of shape `(batch_size, factor_channels, height, width)`):
            Factors of the teacher, same shape.
        distance (`str`, *optional*, defaults to `"l1"`):
            - `"l1"`: \(\| \hat F_{inh} - \hat F_T \|_1\).
            - `"l2"`: the root of the mean (or summed) square over the batch; batches of a gradient accumulation are
              therefore not exactly equal to one large batch.
            - `"cosine"`: 1 - cos, averaged over the batch; `reduction` does not act.
            - `"partial_l2"`: squared differences, none where the teacher is not positive and the student already below
              it (Heo et al., ICCV 2019).
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` or `"sum"`.
        normalize (`bool`, *optional*, defaults to `True`):
            Whether the factors are divided by their norms. Without, `"partial_l2"` is the loss of Heo et al. between
            responses as they are; `"cosine"` needs it.
        mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
            1 or `True` where an image is, 0 or `False` where a batch is padded. What is padded does not count: the
            loss is the mean of those of the images alone (but for `"l2"` and `"cka"`, which are over a batch), and an
            image without a position that counts adds 0. By default all positions count.

    Returns:
        `torch.Tensor`: a scalar, not negative, 0 for equal directions.

    Raises:
        `ValueError`: unknown distance or reduction, factors or a mask of different shapes, or a cosine without norms.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf import inheritance_loss
    >>> _ = torch.manual_seed(0)
    >>> student_factors, teacher_factors = torch.randn(4, 32, 8, 8), torch.randn(4, 32, 8, 8)
    >>> print(f"{inheritance_loss(student_factors, teacher_factors):.5f}")
    0.02492
    >>> print(f"{inheritance_loss(teacher_factors, 2 * teacher_factors):.5f}")
    0.00000
    >>> mask = torch.zeros(4, 8, 8)
    >>> mask[:, :6, :5] = 1  # images of 6x5, padded to 8x8
    >>> print(f"{inheritance_loss(student_factors, teacher_factors, mask=mask):.5f}")
    0.03600
    >>> print(f"{inheritance_loss(student_factors[..., :6, :5], teacher_factors[..., :6, :5]):.5f}")
    0.03600

    ```
    """
    _check(student_factors, teacher_factors, distance, INHERITANCE_DISTANCES, reduction, mask)
    if distance == "cosine" and not normalize:
        raise ValueError("Expected normalize=True with the distance 'cosine', got False: choose another distance.")

    valid = Valid(mask)
    with _prepared(student_factors, teacher_factors, valid, normalize) as (F_inh, F_T):
        return INHERITANCE_DISTANCES[distance](F_inh, F_T, reduction, valid)


def exploration_loss(
    student_factors: torch.Tensor,
    teacher_factors: torch.Tensor,
    distance: str = "l1",
    reduction: str = "mean",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Measure how alike the exploration half's factors and the teacher's are: \(L_{exp}\) of the paper, section 3.2.

    Lower is more different, so the loss is added to the objective as it is. `"l1"`, `"l2"` and `"partial_l2"` are
    negative distances: `"l1"` is lowest where all elements have the sign opposite to the teacher's and one size,
    `"l2"` at the negative of the teacher's factors. `"orthogonal"` and `"cka"` are lowest at unrelated factors: these
    are different aims, not different scales.

    Args:
        student_factors (`torch.Tensor` of shape `(batch_size, factor_channels, height, width)`):
            Factors of the student's exploration half.
        teacher_factors (`torch.Tensor` of shape `(batch_size, factor_channels, height, width)`):
            Factors of the teacher, same shape.
        distance (`str`, *optional*, defaults to `"l1"`):
            - `"l1"`, `"l2"`, `"partial_l2"`: minus the distance of that name in [`inheritance_loss`].
            - `"orthogonal"`: |cos|, averaged over the batch; `reduction` does not act.
            - `"cka"`: linear centred kernel alignment (Kornblith et al., 2019) over all positions of the batch;
              `reduction` does not act.
        reduction (`str`, *optional*, defaults to `"mean"`):
            `"mean"` or `"sum"`.
        mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
            As in [`inheritance_loss`].

    Returns:
        `torch.Tensor`: a scalar; not positive for the negative distances, within [0, 1] for the others.

    Raises:
        `ValueError`: unknown distance or reduction, or factors or a mask of different shapes.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf import exploration_loss
    >>> _ = torch.manual_seed(0)
    >>> student_factors, teacher_factors = torch.randn(4, 32, 8, 8), torch.randn(4, 32, 8, 8)
    >>> print(f"{exploration_loss(student_factors, teacher_factors):.5f}")
    -0.02492
    >>> print(f"{exploration_loss(student_factors, teacher_factors, distance='orthogonal'):.5f}")
    0.01660

    ```
    """
    _check(student_factors, teacher_factors, distance, EXPLORATION_DISTANCES, reduction, mask)
    valid = Valid(mask)
    with _prepared(student_factors, teacher_factors, valid, normalize=distance != "cka") as (F_exp, F_T):
        return EXPLORATION_DISTANCES[distance](F_exp, F_T, reduction, valid)


def reconstruction_loss(
    reconstruction: torch.Tensor, target: torch.Tensor, distance: str = "l1", mask: torch.Tensor | None = None
) -> torch.Tensor:
    r"""
    Compare a paraphraser's reconstruction with the feature map it was made from: \(L_{rec} = \|f_T - R(f_T)\|\).

    Args:
        reconstruction (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Output of the paraphraser.
        target (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            The teacher's feature map.
        distance (`str`, *optional*, defaults to `"l1"`):
            `"l1"`, the mean absolute error of the authors' code, or `"l2"`, the mean squared error of the paper.
        mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
            As in [`inheritance_loss`].

    Returns:
        `torch.Tensor`: a scalar, not negative.

    Raises:
        `ValueError`: unknown distance, or tensors or a mask of different shapes.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf import reconstruction_loss
    >>> reconstruction_loss(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), -3.0), distance="l2")
    tensor(9.)

    ```
    """
    _check(reconstruction, target, distance, RECONSTRUCTION_DISTANCES, "mean", mask)
    error, valid = F.l1_loss if distance == "l1" else F.mse_loss, Valid(mask)
    with _prepared(reconstruction, target, valid, normalize=False) as (R, f_T):
        if mask is None:
            return error(R, f_T)
        weights = valid.weights(f_T.dtype).view(-1, 1, 1, 1)
        weights = weights if distance == "l1" else weights.sqrt()  # they are squared with the difference
        return error(R * weights, f_T * weights)


def kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 4.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Compare softened class probabilities: \(T^2 KL(p_T^{(T)} \| p_S^{(T)})\) of Hinton et al., 2015.

    Logits are `(batch_size, num_labels)` or dense, `(batch_size, num_labels, height, width)`. The loss is the mean
    over images, or over all positions; `mask`, `(batch_size, height, width)`, is 1 where a position counts.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.method.losses import kd_loss
    >>> kd_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]]))
    tensor(0.)

    ```
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Expected student and teacher logits of one shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}: give both models the same labels, or set lambda_kd=0."
        )
    with _prepared(student_logits, teacher_logits, Valid(None), normalize=False) as (z_S, z_T):
        # A row for each image, or for each position.
        log_p_S, log_p_T = (F.log_softmax(z.movedim(1, -1).flatten(0, -2) / temperature, dim=-1) for z in (z_S, z_T))
        if mask is None:
            return F.kl_div(log_p_S, log_p_T, reduction="batchmean", log_target=True) * temperature**2
        divergence = F.kl_div(log_p_S, log_p_T, reduction="none", log_target=True).sum(dim=-1)
        counts = mask.flatten().to(divergence.dtype)
        return (divergence * counts).sum() / counts.sum().clamp_min(1) * temperature**2


# ---- Distances ----


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


def _centred_rows(factors: torch.Tensor, valid: Valid) -> torch.Tensor:
    """Lay factors out as rows `(batch_size * height * width, channels)` of mean 0."""
    rows = (factors / _nonzero(factors.detach().abs().amax())).movedim(1, -1).flatten(0, -2)
    return valid.zero_rows(rows - valid.rows_mean(rows)) / math.sqrt(rows.shape[0])


def _cka(student: torch.Tensor, teacher: torch.Tensor, valid: Valid) -> torch.Tensor:
    # Each position of each image is one sample, the factor's channels are its variables. With whole images as samples
    # there are far fewer samples than variables, and linear CKA is then close to 1 whatever the factors are.
    student, teacher = _centred_rows(student, valid), _centred_rows(teacher, valid)
    cross = (student.T @ teacher).square().sum()
    scale = _safe_sqrt((student.T @ student).square().sum()) * _safe_sqrt((teacher.T @ teacher).square().sum())
    return cross / _nonzero(scale)


RECONSTRUCTION_DISTANCES = ("l1", "l2")
# The distances between factors that were divided by their norms; CKA, which has a scale of its own, takes them raw.
INHERITANCE_DISTANCES = {
    "l1": _l1,
    "l2": _l2,
    "cosine": lambda student, teacher, reduction, valid: (valid.has_content() - _cosine(student, teacher)).mean(),
    "partial_l2": _partial_l2,
}
EXPLORATION_DISTANCES = {
    "l1": lambda *arguments: -_l1(*arguments),
    "l2": lambda *arguments: -_l2(*arguments),
    "partial_l2": lambda *arguments: -_partial_l2(*arguments),
    "orthogonal": lambda student, teacher, reduction, valid: _cosine(student, teacher).abs().mean(),
    "cka": lambda student, teacher, reduction, valid: _cka(student, teacher, valid),
}


# ---- Common first steps of all losses ----


@contextlib.contextmanager
def _prepared(
    student: torch.Tensor, teacher: torch.Tensor, valid: Valid, normalize: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Leave autocast and give both in float32 (float64 stays), without padding, perhaps divided by their norms."""
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = (x if x.dtype == torch.float64 else x.float() for x in (student, teacher))
        student, teacher = valid.zero_padding(student), valid.zero_padding(teacher)
        yield (unit(student), unit(teacher)) if normalize else (student, teacher)


def _check(
    student: torch.Tensor,
    teacher: torch.Tensor,
    distance: str,
    known,
    reduction: str,
    mask: torch.Tensor | None,
) -> None:
    if distance not in known:
        raise ValueError(f"Expected distance to be one of {', '.join(known)}; got {distance!r}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"Expected reduction to be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected two tensors of one shape (batch_size, channels, height, width), got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: bring both to the same channels and size first."
        )
    if mask is not None and mask.shape != (student.shape[0], *student.shape[2:]):
        raise ValueError(
            f"Expected a mask of shape (batch_size, height, width) for {tuple(student.shape)}, got "
            f"{tuple(mask.shape)}: bring it to the height and width of the factors first."
        )
