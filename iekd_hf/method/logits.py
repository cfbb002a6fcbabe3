"""Logit terms by others than Hinton et al., as pure functions over logits of shape `(batch_size, num_labels)`."""

import torch
import torch.nn.functional as F

from .losses import kd_loss, unit


# The label of an image that has none.
NO_CLASS = -100
# Of `kd_distance`; "kl" is `kd_loss`.
KD_DISTANCES = ("kl", "dkd", "dist", "standardized")


def dkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> torch.Tensor:
    r"""
    Compare the class of the label against the rest, and the other classes among themselves: \(\alpha\,TCKD +
    \beta\,NCKD\) of Decoupled Knowledge Distillation (Zhao et al., CVPR 2022, arXiv 2203.08679).

    Both are KL divergences, times the squared temperature. Rows without a label have no class to tell apart and are
    left out: the loss is the mean over the others, 0 where there are none.

    Args:
        student_logits (`torch.Tensor` of shape `(batch_size, num_labels)`):
            Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(batch_size, num_labels)`):
            Logits of the teacher.
        labels (`torch.Tensor` of shape `(batch_size,)`):
            The class of each row, -100 where it has none.
        temperature (`float`, *optional*, defaults to 4.0):
            Temperature of the softmax.
        alpha (`float`, *optional*, defaults to 1.0), beta (`float`, *optional*, defaults to 8.0):
            Weights of the two, the defaults of the authors' code.

    Returns:
        `torch.Tensor`: a scalar, not negative.

    Raises:
        `ValueError`: labels that are no class of each row.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.method.logits import dkd_loss
    >>> logits, labels = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, 1.0]]), torch.tensor([2, -100])
    >>> dkd_loss(logits, logits, labels)
    tensor(0.)
    >>> print(f"{dkd_loss(torch.zeros(2, 3), logits, labels, temperature=1.0):.4f}")
    1.4446

    ```
    """
    if labels.shape != student_logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"Expected the class of each image as labels with kd_distance='dkd', got {labels.dtype} of shape "
            f"{tuple(labels.shape)}: leave mixing out, or set another kd_distance, which needs no labels."
        )
    has_label = (labels != NO_CLASS).to(torch.float32)
    target = torch.where(labels == NO_CLASS, 0, labels)[:, None]
    others = torch.arange(student_logits.shape[1] - 1, device=labels.device)[None]
    others = others + (others >= target)  # the numbers of the other classes, row by row

    def parts(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = F.log_softmax(logits / temperature, dim=1)
        log_rest = log_p.gather(1, others)
        log_p_rest = log_rest.logsumexp(dim=1, keepdim=True)
        return torch.cat([log_p.gather(1, target), log_p_rest], dim=1), log_rest - log_p_rest

    with torch.autocast(student_logits.device.type, enabled=False):
        of_student, of_teacher = (parts(_at_least_float32(z)) for z in (student_logits, teacher_logits))
        tckd, nckd = (
            F.kl_div(s, t, reduction="none", log_target=True).sum(dim=1)
            for s, t in zip(of_student, of_teacher, strict=True)
        )
        total = ((alpha * tckd + beta * nckd) * has_label).sum()
        return total / has_label.sum().clamp_min(1) * temperature**2


def dist_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 4.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> torch.Tensor:
    r"""
    Correlate class probabilities, within each image and within each class (DIST, Huang et al., NeurIPS 2022, arXiv
    2205.10536): \(T^2 (\beta (1 - \bar\rho_{inter}) + \gamma (1 - \bar\rho_{intra}))\).

    \(\rho\) is Pearson's correlation of a row of the probabilities (between the classes of an image) or of a column
    (one class over the batch), so that micro-batches do not add up to one large batch. What is constant has the
    correlation 0.

    Args:
        student_logits (`torch.Tensor` of shape `(batch_size, num_labels)`):
            Logits of the student.
        teacher_logits (`torch.Tensor` of shape `(batch_size, num_labels)`):
            Logits of the teacher.
        temperature (`float`, *optional*, defaults to 4.0):
            Temperature of the softmax; the authors have 1 on ImageNet and 4 on CIFAR-100.
        beta (`float`, *optional*, defaults to 1.0), gamma (`float`, *optional*, defaults to 1.0):
            Weights of the two.

    Returns:
        `torch.Tensor`: a scalar, not negative.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.method.logits import dist_loss
    >>> logits = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, 2.0]])
    >>> bool(dist_loss(logits + 5, logits) < 1e-4), bool(dist_loss(-logits, logits) > 30)
    (True, True)

    ```
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        p_S, p_T = (F.softmax(_at_least_float32(z) / temperature, dim=1) for z in (student_logits, teacher_logits))
        between_classes, within_class = 1 - _pearson(p_S, p_T).mean(), 1 - _pearson(p_S.T, p_T.T).mean()
        return (beta * between_classes + gamma * within_class) * temperature**2


def standardized_kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 4.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Compare softened class probabilities of standardized logits: [`kd_loss`] of \((z - \bar z) / \sigma(z)\) (Sun et
    al., CVPR 2024, arXiv 2403.01643), with which neither the size nor the spread of the teacher's logits counts.

    Args:
        student_logits (`torch.Tensor`), teacher_logits (`torch.Tensor`):
            Logits of both, `(batch_size, num_labels)`, or dense, `(batch_size, num_labels, height, width)`.
        temperature (`float`, *optional*, defaults to 4.0):
            The base temperature; the authors have 2.
        mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*):
            As in [`kd_loss`].

    Returns:
        `torch.Tensor`: a scalar, not negative.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.method.logits import standardized_kd_loss
    >>> logits = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, 1.0]])
    >>> bool(standardized_kd_loss(3 * logits + 7, logits) < 1e-5), bool(standardized_kd_loss(-logits, logits) > 1)
    (True, True)

    ```
    """
    with torch.autocast(student_logits.device.type, enabled=False):
        z_S, z_T = (_standardized(_at_least_float32(z)) for z in (student_logits, teacher_logits))
        return kd_loss(z_S, z_T, temperature, mask)


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _pearson(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the correlation of each pair of rows."""
    first, second = (unit(x - x.mean(dim=1, keepdim=True)) for x in (first, second))
    return (first * second).sum(dim=1)


def _standardized(logits: torch.Tensor) -> torch.Tensor:
    # The authors' code has the unbiased deviation, and the same small number against equal logits.
    return (logits - logits.mean(dim=1, keepdim=True)) / (logits.std(dim=1, keepdim=True) + 1e-7)
