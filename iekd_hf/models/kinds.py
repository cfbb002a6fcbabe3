"""What is known of a model by its class and configuration: its task, and the label that leaves a pixel out."""

from torch import nn

from .adapters import without_adapters
from .signature import takes


# Where configurations keep it: most families, and UperNet.
_IGNORE_INDEX = ("semantic_loss_ignore_index", "loss_ignore_index")
# By the end of a class's name: what the model is, and why its output has no logits.
_DETECTOR = ("a detector", "the queries of two detectors do not correspond, so there are no logits to compare")
_BY_QUERIES = (
    "a segmenter by queries",
    "these do not correspond between two models, so there are no logits to compare",
)
_WITHOUT_LOGITS = {
    "ForObjectDetection": _DETECTOR,
    "ForUniversalSegmentation": _BY_QUERIES,
    "ForInstanceSegmentation": _BY_QUERIES,
    "ForSegmentation": _BY_QUERIES,
    "ForDepthEstimation": ("a depth estimator", "depth is a number and no class, so there are no logits to compare"),
}


def ignore_index_of(model: nn.Module) -> int:
    """Return the label that a model's loss leaves out."""
    config = getattr(without_adapters(model), "config", None)
    return next((getattr(config, name) for name in _IGNORE_INDEX if hasattr(config, name)), -100)


def set_ignore_index(model: nn.Module, ignore_index: int) -> None:
    """Set the label that a model's loss leaves out."""
    for name in _IGNORE_INDEX:
        if hasattr(model.config, name):
            setattr(model.config, name, ignore_index)


def is_semantic_segmenter(model: nn.Module) -> bool:
    """Return whether a model of Transformers predicts the class of each pixel."""
    return type(without_adapters(model)).__name__.endswith("ForSemanticSegmentation")


def why_no_logits(model: nn.Module) -> tuple[str, str] | None:
    """Return what a model of Transformers is and why its output has no logits to compare, or `None` if it may have."""
    name = type(without_adapters(model)).__name__
    return next((why for end, why in _WITHOUT_LOGITS.items() if name.endswith(end)), None)


def main_input_of(model: nn.Module) -> str:
    """Return what a model calls its images; OneFormer names its task beside them, Idefics3's tower a text."""
    name = getattr(model, "main_input_name", "pixel_values")
    name = name if isinstance(name, str) else name[0]
    return "pixel_values" if name != "pixel_values" and takes(model, "pixel_values") else name
