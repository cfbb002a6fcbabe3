"""What is refused before training starts: empty datasets, labels outside the model's range, label maps that differ."""

import datasets
from torch.utils.data import Dataset
from transformers import PreTrainedModel


def check_dataset(dataset: Dataset, name: str, model: PreTrainedModel) -> None:
    """
    Refuse an empty dataset, and class labels that the model has no output for.

    Labels are read where that is cheap: in the columns `labels` or `label` of a `datasets.Dataset`.

    Args:
        dataset (`Dataset`):
            The dataset.
        name (`str`):
            What the argument is called: `"train_dataset"`.
        model (`PreTrainedModel`):
            The student.

    Raises:
        `ValueError`: no rows, or a label outside `range(num_labels)`; -100, which the loss ignores, is fine.
    """
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(
            f"Expected {name} to hold at least one example, got an empty dataset: check its file or split."
        )
    if not isinstance(dataset, datasets.Dataset):
        return
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    for column in ("labels", "label"):
        feature = dataset.features.get(column)
        integers = isinstance(feature, datasets.ClassLabel) or str(getattr(feature, "dtype", "")).startswith("int")
        if num_labels is None or not integers:
            continue
        labels = dataset.select_columns([column]).with_format("numpy")[:][column]
        outside = (labels != -100) & ((labels < 0) | (labels >= num_labels))
        if outside.any():
            row = int(outside.argmax())
            raise ValueError(
                f"Expected labels of {name} within 0 and {num_labels - 1}, the student's {num_labels} classes, got "
                f"{int(labels[row])} in row {row} of column {column!r}: load the student with num_labels="
                f"{int(labels.max()) + 1}, or mend the labels."
            )


def check_label_maps(student: PreTrainedModel, teacher) -> None:
    """
    Refuse the logit term between models of different labels.

    Args:
        student (`PreTrainedModel`):
            The student.
        teacher (`PreTrainedModel`):
            The teacher.

    Raises:
        `ValueError`: the label maps `id2label` differ.
    """
    ours, theirs = (getattr(getattr(m, "config", None), "id2label", None) for m in (student, teacher))
    if ours != theirs:
        sizes = [None if labels is None else len(labels) for labels in (ours, theirs)]
        difference = next(
            (i for i in sorted({*(ours or {}), *(theirs or {})}) if (ours or {}).get(i) != (theirs or {}).get(i)), None
        )
        raise ValueError(
            f"Expected equal label maps of student and teacher for lambda_kd > 0, got {sizes[0]} and {sizes[1]} "
            f"labels, which differ first at {difference} ({(ours or {}).get(difference)!r} and "
            f"{(theirs or {}).get(difference)!r}): load both with the same id2label, or set lambda_kd=0; the feature "
            "losses do not need it."
        )
