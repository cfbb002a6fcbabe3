"""What is known of detectors: where their backbone's maps are, and which of their outputs are predictions."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from ..models.adapters import without_adapters


# Where DETR and its kin keep a timm model, bare of the backbone's own class.
_BARE_BACKBONES = ("backbone.model", "backbone.conv_encoder.model")

# What detectors return beside loss, logits and boxes. Kept, it would be more than the images that it was made of.
NOT_PREDICTIONS = (
    *("last_hidden_state", "encoder_last_hidden_state", "encoder_hidden_states", "decoder_hidden_states"),
    *("encoder_attentions", "decoder_attentions", "cross_attentions", "auxiliary_outputs", "backbone_features"),
    *("intermediate_hidden_states", "intermediate_logits", "intermediate_predicted_corners"),
    *("intermediate_reference_points", "init_reference_points", "initial_reference_points"),
    *("enc_outputs_class", "enc_outputs_coord_logits", "enc_topk_logits", "enc_topk_bboxes", "denoising_meta_values"),
)


def is_detector(model: nn.Module) -> bool:
    """Tell whether a model of Transformers predicts boxes."""
    return type(model).__name__.endswith("ForObjectDetection")


def refuse_logit_term(models: Iterable[nn.Module], term: str, way_out: str) -> None:
    """
    Refuse a term between the logits of detectors.

    Args:
        models (`Iterable[nn.Module]`):
            The models whose logits would be compared.
        term (`str`), way_out (`str`):
            The argument that turns the term on, and what to do instead.

    Raises:
        `ValueError`: a detector among them.
    """
    for model in map(without_adapters, models):
        if is_detector(model):
            raise ValueError(
                f"Expected no {term} with a detector, got it with {type(model).__name__}: the queries of two "
                "detectors do not correspond, so there are no logits to compare. "
                f"{way_out}; the feature losses do not need it."
            )


def backbone_layers(model: nn.Module) -> list[str]:
    """
    Name the maps of the backbone that a model holds.

    A detector whose encoder fuses the levels of a pyramid (RT-DETR, D-FINE and their kin, whose configuration has
    `encoder_in_channels`) has one layer for each level, all others have the last map alone.

    Args:
        model (`nn.Module`):
            A detector, or any other model around a backbone of Transformers.

    Returns:
        `list[str]`: the backbone's path with indices from the end; empty where the model has no backbone.

    Example:

    ```python
    >>> from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    >>> from iekd_hf.features.detectors import backbone_layers
    >>> backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    >>> config = DetrConfig(backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1)
    >>> backbone_layers(DetrForObjectDetection(config))
    ['model.backbone.model[-1]']

    ```
    """
    if not isinstance(model, PreTrainedModel):
        return []
    modules = {name: module for name, module in model.named_modules() if name}
    of_transformers = (name for name, module in modules.items() if isinstance(module, BackboneMixin))
    bare = (name for name in modules if f".{name}".endswith(tuple(f".{end}" for end in _BARE_BACKBONES)))
    path = next(of_transformers, None) or next(bare, None)
    if path is None:
        return []
    num_levels = len(getattr(model.config, "encoder_in_channels", None) or [None])
    return [f"{path}[{index}]" for index in range(-num_levels, 0)]
