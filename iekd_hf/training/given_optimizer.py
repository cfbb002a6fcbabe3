"""Let an optimizer that a user has made train the factor encoders, too."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..method.trainable import StudentWithEncoders


def add_what_is_missing(optimizer: Optimizer, scheduler: LRScheduler | None, side: StudentWithEncoders) -> None:
    """Add the encoders to an optimizer as a group; what it leaves out of the student stays out."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    student = {id(parameter) for parameter in side.student.parameters()}
    if not known & student:
        raise ValueError(
            "Expected an optimizer of the student's weights in optimizers, got one that has none of them, and so "
            "would not train it: make it from the parameters of the model that is passed."
        )
    missing = [parameter for parameter in side.parameters() if id(parameter) not in known | student]
    if missing and scheduler is not None:
        raise ValueError(
            "Expected an optimizer without a schedule in optimizers, got both: the factor encoders have to be "
            "added to the optimizer before its schedule is made. Pass optimizers=(optimizer, None) with "
            "lr_scheduler_type, or optimizer_cls_and_kwargs."
        )
    if missing:
        optimizer.add_param_group({"params": missing})
