"""Pretrained networks, brought to the classes of the data."""

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel

from ..models.loading import explain_unreachable


def load_for_classes(
    auto_class: type,
    name: str,
    role: str,
    names: list[str],
    from_scratch: bool,
    trust_remote_code: bool,
    dtype: str = "float32",
    **hub,
) -> PreTrainedModel:
    """Load a model, or its configuration only, for these classes, with a new head where its own were others."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub, **label_maps(names))
        if from_scratch:
            config.name_or_path = ""  # its weights are not that model's
            # float32, whatever type the weights that are left out were saved in
            return auto_class.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
        return auto_class.from_pretrained(
            name,
            config=config,
            ignore_mismatched_sizes=True,  # the head of other classes
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            **hub,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(explain_unreachable(name, role, error)) from error


def label_maps(names: list[str]) -> dict[str, dict]:
    """Return a configuration's `id2label` and `label2id`."""
    return {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
