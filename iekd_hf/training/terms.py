"""Checks of the objective's terms against the student, its labels and each other."""

from transformers import Trainer

from ..models.adapters import without_adapters
from .checks import tell_of_no_labels
from .dense import check_comparable


def check_terms(trainer: Trainer, outputs: dict, sample: dict, teacher_logits) -> None:
    """Refuse terms that a student with these outputs, or data without labels, cannot have."""
    student, objective, args = trainer.model, trainer.distillation_objective, trainer.args
    if teacher_logits is not None:
        check_comparable(student, outputs, teacher_logits)
    has_goal = trainer.task_loss.has_goal(student, outputs, sample)
    if teacher_logits is not None:
        check_kd_distance(trainer, outputs["logits"], has_goal)
    if has_goal:
        return
    if automatic := objective.automatic():
        raise ValueError(
            f"Expected images with labels for {automatic[0]}='auto', got none: there is no gradient of the task's to "
            f"take a share of. Give numbers; those of method={args.method!r} are "
            f"{', '.join(f'{name}={objective.presets[name]:g}' for name in automatic)}."
        )
    if not objective.weights():
        trainer.task_loss.refuse_no_goal(student, outputs)
    tell_of_no_labels(student, args)


def check_kd_distance(trainer: Trainer, logits, has_labels: bool) -> None:
    """Refuse logits that a `kd_distance` means nothing for."""
    distance = trainer.args.kd_distance
    if distance == "kl":
        return
    problem = getattr(getattr(without_adapters(trainer.model), "config", None), "problem_type", None)
    found = None
    if problem == "multi_label_classification":
        found = "several labels an image, each of which is a yes or no"
    elif logits.shape[1] < 3:
        found = f"{logits.shape[1]} classes, for which only the KL divergence means anything"
    elif logits.ndim > 2 and distance != "standardized":
        found = "a logit for each pixel, as it compares images"
    elif distance == "dkd" and not has_labels:
        found = "no labels, which it needs"
    elif distance == "dkd" and trainer.mixing is not None:
        found = "mixing, after which an image has no single class"
    if found:
        raise ValueError(f"Expected another kd_distance than {distance!r} with {found}: set kd_distance='kl'.")
