"""Pretrained networks, brought to the classes of the data."""

import copy

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
    new_head: bool = True,
    **hub,
) -> PreTrainedModel:
    """
    Load a model, or its configuration only, for these classes.

    Where its own were others it gets a new head, or is refused if it may not have one; a head of the same classes in
    another order is brought into this one.
    """
    try:
        saved = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)
        own = [saved.id2label[index] for index in sorted(saved.id2label)]
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub, **label_maps(names))
        if from_scratch:
            config.name_or_path = ""  # its weights are not that model's
            # float32, whatever type the weights that are left out were saved in
            return auto_class.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
        model = auto_class.from_pretrained(
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
    is_known = sorted(own) == sorted(names)
    if not new_head and not is_known and own != [f"LABEL_{index}" for index in range(len(names))]:
        raise ValueError(
            f"Expected {role} to know the {len(names)} classes of the data, {_shown(names)}, to be measured without "
            f"training, got one of {len(own)}, {_shown(own)}: train it, or give it images of its own classes."
        )
    if is_known and own != names:
        _reorder_classes(model, [own.index(label) for label in names])
    return model


def _reorder_classes(model: PreTrainedModel, order: list[int]) -> None:
    """Bring what a model has for each class into another order; its head's output for no object stays the last."""
    config = copy.deepcopy(model.config)
    config.num_labels += 1
    with torch.device("meta"):
        larger = dict(type(model)(config).named_parameters())
    for name, parameter in model.named_parameters():
        for dim, (size, other) in enumerate(zip(parameter.shape, larger[name].shape, strict=True)):
            if size != other:
                rows = torch.tensor([*order, *range(len(order), size)])
                parameter.data = parameter.data.index_select(dim, rows)


def _shown(names: list[str]) -> str:
    """Write the first of some names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def label_maps(names: list[str]) -> dict[str, dict]:
    """Return a configuration's `id2label` and `label2id`."""
    return {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
