"""
Metrics as `evaluate.Metric`s that work offline: `evaluate.load("accuracy")` fetches its code from the Hub.

They take logits, as Trainer has them, or class indices, as `evaluate.evaluator("image-classification")` has them.
"""

import datasets
import evaluate
import numpy as np


def describe(description: str) -> evaluate.MetricInfo:
    """Say what a metric of classes takes, in either form."""
    references = datasets.Value("int64")
    predictions = (datasets.Sequence(datasets.Value("float32")), datasets.Value("int64"))
    return evaluate.MetricInfo(
        description=description,
        citation="",
        inputs_description="predictions: logits (num_examples, num_labels), or class indices; references: class "
        "indices.",
        features=[datasets.Features({"predictions": kind, "references": references}) for kind in predictions],
    )


class TopKAccuracy(evaluate.Metric):
    """
    Compute top-1, top-5 and per-class accuracy.

    `compute(predictions=..., references=labels)` returns `accuracy`, from logits of more than five classes
    `top5_accuracy`, and with `class_names=[...]` also `accuracy_<name>` for every class that occurs.

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
        return describe("Top-1, top-5 and per-class accuracy.")

    def _compute(self, predictions, references, class_names=None):
        predictions, labels = np.asarray(predictions), np.asarray(references)
        correct = to_classes(predictions) == labels
        result = {"accuracy": float(correct.mean())}
        if predictions.ndim == 2 and predictions.shape[1] > 5:
            best_five = np.argpartition(-predictions, 4, axis=1)[:, :5]
            result["top5_accuracy"] = float((best_five == labels[:, None]).any(axis=1).mean())
        for index, name in enumerate(class_names or ()):
            if (labels == index).any():
                result[f"accuracy_{name}"] = float(correct[labels == index].mean())
        return result


class MacroF1(evaluate.Metric):
    """
    Compute the mean of the F1 scores of all classes, rare ones counting as much as frequent ones.

    Example:

    ```python
    >>> import evaluate
    >>> both = evaluate.combine([TopKAccuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)])
    >>> both.compute(predictions=[0, 0, 0, 0], references=[0, 0, 0, 1])  # all but one image are of class 0
    {'accuracy': 0.75, 'macro_f1': 0.42857142857142855}

    ```
    """

    def _info(self):
        return describe("Mean of the classes' F1 scores.")

    def _compute(self, predictions, references, **arguments_of_others):
        from sklearn.metrics import f1_score

        # `evaluate.combine` gives all metrics the keywords of any.
        classes = to_classes(np.asarray(predictions))
        return {"macro_f1": float(f1_score(references, classes, average="macro", zero_division=0))}


def to_classes(predictions: np.ndarray) -> np.ndarray:
    """Take the largest logit of each row; class indices stay as they are."""
    return predictions.argmax(axis=1) if predictions.ndim == 2 else predictions
