"""What is known of a model by its class and configuration: its task, and the label that leaves a pixel out."""

import inspect

from torch import nn

from .adapters import without_adapters


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
    "ForDepthEstimation": ("a depth estimator", "depth is a number, not a class, so there are no logits to compare"),
}

# Outputs of detectors that are no predictions; gathered, they would take more memory than the images.
_NOT_PREDICTED_BY_DETECTORS = (
    *("last_hidden_state", "encoder_last_hidden_state", "encoder_hidden_states", "decoder_hidden_states"),
    *("encoder_attentions", "decoder_attentions", "cross_attentions", "auxiliary_outputs", "backbone_features"),
    *("intermediate_hidden_states", "intermediate_logits", "intermediate_predicted_corners"),
    *("intermediate_reference_points", "init_reference_points", "initial_reference_points"),
    *("enc_outputs_class", "enc_outputs_coord_logits", "enc_topk_logits", "enc_topk_bboxes", "denoising_meta_values"),
)
# Fields of any model's output that Trainer would otherwise gather as predictions and hand to compute_metrics.
_NOT_PREDICTIONS = ("past_key_values", "hidden_states", "reshaped_hidden_states", "attentions")


def ignore_index_of(model: nn.Module) -> int:
    """Return the label that a model's loss leaves out."""
    config = getattr(without_adapters(model), "config", None)
    return next((getattr(config, name) for name in _IGNORE_INDEX if hasattr(config, name)), -100)


def set_ignore_index(model: nn.Module, ignore_index: int) -> None:
    """Set the label that a model's loss leaves out."""
    for name in _IGNORE_INDEX:
        if hasattr(model.config, name):
            setattr(model.config, name, ignore_index)


def is_detector(model: nn.Module) -> bool:
    """Return whether a model of Transformers predicts boxes."""
    return type(without_adapters(model)).__name__.endswith("ForObjectDetection")


def is_semantic_segmenter(model: nn.Module) -> bool:
    """Return whether a model of Transformers predicts the class of each pixel."""
    return type(without_adapters(model)).__name__.endswith("ForSemanticSegmentation")


def why_no_logits(model: nn.Module) -> tuple[str, str] | None:
    """Return what a model of Transformers is and why its output has no logits to compare, or `None` if it may have."""
    name = type(without_adapters(model)).__name__
    return next((why for end, why in _WITHOUT_LOGITS.items() if name.endswith(end)), None)


def names_of_no_predictions(model: nn.Module) -> list[str]:
    """Return the fields of a model's output that Trainer shall not gather as predictions, for compute_metrics."""
    names = [*getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", []), *_NOT_PREDICTIONS]
    return [*names, *(_NOT_PREDICTED_BY_DETECTORS if is_detector(model) else ())]


def main_input_of(model: nn.Module) -> str:
    """
    Return what a model calls its images.

    OneFormer names its task beside them. Idefics3's tower names a text, and so does each `PreTrainedModel` that does
    not say otherwise.
    """
    model = without_adapters(model)
    name = getattr(model, "main_input_name", "pixel_values")
    name = name if isinstance(name, str) else name[0]
    if name == "pixel_values":
        return name
    taken = inspect.signature(model.forward).parameters
    return "pixel_values" if "pixel_values" in taken else name if name in taken else next(iter(taken), name)
