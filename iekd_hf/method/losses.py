"""The losses of IE-KD, as pure functions over factors of shape `(batch_size, factor_channels, height, width)`.

Every function computes in float32 (float64 stays float64) outside autocast: in half precision a squared sum overflows
and a norm's epsilon rounds to zero.
"""

import torch
import torch.nn.functional as F

from .distances import EXPLORATION_DISTANCES, INHERITANCE_DISTANCES, RECONSTRUCTION_DISTANCES, Valid, unit


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
    N
    elements), which is what the authors' code does; `"sum"` sums over the elements and averages over the batch, which
    is the formula as printed and N times larger. The weight `lambda_inh` means something else under each.

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
    _check(student_factors, teacher_factors, "inheritance_distance", distance, INHERITANCE_DISTANCES, reduction, mask)
    if distance == "cosine" and not normalize:
        raise ValueError("Expected normalize=True with the distance 'cosine', got False: choose another distance.")

    valid = Valid(mask)

    def compare(student, teacher):
        student, teacher = valid.cut(student), valid.cut(teacher)
        student, teacher = (unit(student), unit(teacher)) if normalize else (student, teacher)
        return INHERITANCE_DISTANCES[distance](student, teacher, reduction, valid)

    return _in_full_precision(compare, student_factors, teacher_factors)


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
    negative distances and have their optimum at opposite factors; `"orthogonal"` and `"cka"` have it at unrelated
    ones: these are different aims, not different scales.

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
    _check(student_factors, teacher_factors, "exploration_distance", distance, EXPLORATION_DISTANCES, reduction, mask)
    valid = Valid(mask)

    def compare(student, teacher):
        student, teacher = valid.cut(student), valid.cut(teacher)
        student, teacher = (student, teacher) if distance == "cka" else (unit(student), unit(teacher))
        return EXPLORATION_DISTANCES[distance](student, teacher, reduction, valid)

    return _in_full_precision(compare, student_factors, teacher_factors)


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
    _check(reconstruction, target, "reconstruction_distance", distance, RECONSTRUCTION_DISTANCES, "mean", mask)
    error, valid = F.l1_loss if distance == "l1" else F.mse_loss, Valid(mask)

    def compare(reconstruction, target):
        weights = valid.weights(target.dtype).view(-1, 1, 1, 1)
        weights = weights if distance == "l1" else weights.sqrt()  # they are squared with the difference
        return error(valid.cut(reconstruction) * weights, valid.cut(target) * weights)

    return _in_full_precision(error if mask is None else compare, reconstruction, target)


def kd_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 4.0) -> torch.Tensor:
    r"""
    Compare softened class probabilities: \(T^2 KL(p_T^{(T)} \| p_S^{(T)})\) of Hinton et al., 2015.

    Args:
        student_logits (`torch.Tensor` of shape `(batch_size, num_labels)`):
            Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(batch_size, num_labels)`):
            Logits of the teacher, over the same labels.
        temperature (`float`, *optional*, defaults to 4.0):
            Both logits are divided by it; the factor T^2 keeps the gradient's size.

    Returns:
        `torch.Tensor`: a scalar, not negative, averaged over the batch.

    Raises:
        `ValueError`: logits of different shapes.

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

    def divergence(student, teacher):
        student = F.log_softmax(student / temperature, dim=-1)
        teacher = F.log_softmax(teacher / temperature, dim=-1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2

    return _in_full_precision(divergence, student_logits, teacher_logits)


def _in_full_precision(function, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = (x if x.dtype == torch.float64 else x.float() for x in (student, teacher))
        return function(student, teacher)


def _check(
    student: torch.Tensor,
    teacher: torch.Tensor,
    argument: str,
    distance: str,
    known,
    reduction: str,
    mask: torch.Tensor | None,
) -> None:
    if distance not in known:
        raise ValueError(f"Expected {argument} to be one of {', '.join(known)}; got {distance!r}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"Expected the reduction to be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
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
