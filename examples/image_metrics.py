"""Accuracy as an `evaluate.Metric` that works offline: `evaluate.load("accuracy")` fetches its code from the Hub."""

import datasets
import evaluate
import numpy as np


class TopKAccuracy(evaluate.Metric):
    """
    Compute top-1, top-5 and per-class accuracy from logits.

    `compute(predictions=logits, references=labels)` returns `accuracy`, with more than five classes `top5_accuracy`,
    and with `class_names=[...]` also `accuracy_<name>` for every class that occurs.

    Example:

    ```python
    >>> import numpy as np
    >>> logits = np.array([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
    >>> metric = TopKAccuracy(keep_in_memory=True)
    >>> result = metric.compute(predictions=logits, references=[0, 1, 1], class_names=["cat", "dog"])
    >>> {name: round(value, 3) for name, value in result.items()}
    {'accuracy': 0.667, 'accuracy_cat': 1.0, 'accuracy_dog': 0.5}

    ```
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Top-1, top-5 and per-class accuracy.",
            citation="",
            inputs_description="predictions: logits of shape (num_examples, num_labels); references: class indices.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, class_names=None):
        logits, labels = np.asarray(predictions), np.asarray(references)
        correct = logits.argmax(axis=1) == labels
        result = {"accuracy": float(correct.mean())}
        if logits.shape[1] > 5:
            best_five = np.argpartition(-logits, 4, axis=1)[:, :5]
            result["top5_accuracy"] = float((best_five == labels[:, None]).any(axis=1).mean())
        for index, name in enumerate(class_names or ()):
            if (labels == index).any():
                result[f"accuracy_{name}"] = float(correct[labels == index].mean())
        return result
