"""Models with adapters of PEFT as students: what is refused, and how an adapter is read back, whole."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


ADAPTER_FILE = "adapter_model.safetensors"


def is_adapted(model: nn.Module) -> bool:
    """Return whether `peft.get_peft_model` has wrapped a model."""
    return hasattr(model, "get_base_model")


def without_adapters(model: nn.Module) -> nn.Module:
    """Return the model inside PEFT's wrapper, or the model itself."""
    return model.get_base_model() if is_adapted(model) else model


def check_adapted(model: nn.Module) -> None:
    """Refuse what an adapter's file would not hold after training."""
    if getattr(model, "_hf_peft_config_loaded", False) and not is_adapted(model):
        raise ValueError(
            f"Expected adapters as peft.get_peft_model gives them, got a {type(model).__name__} after add_adapter(), "
            "whose checkpoints would hold the adapter without what else has trained: pass get_peft_model(student, "
            "config)."
        )
    if not is_adapted(model):
        return
    norms = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    # Of what `modules_to_save` names, PEFT trains a copy beside the original, which does not train.
    lost = [n for n in norms if not {"modules_to_save", "original_module"} & {*n.split(".")}]
    if lost:
        last = lost[0].rpartition(".")[2]
        raise ValueError(
            f"Expected the statistics of BatchNorm layers to be saved with the adapter, got {len(lost)} such layers "
            f"outside of it ({lost[0]}): they would move in training and be lost. Add {last!r} to modules_to_save in "
            "the adapter's configuration."
        )


def load_adapter(model: nn.Module, folder: str) -> None:
    """Load the active adapter that `save_pretrained` has written, all of it or none."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    name = model.active_adapter
    file = Path(folder, *([] if name == "default" else [name]), ADAPTER_FILE)
    what_to_do = "give the model with the adapter that was trained there, or another output_dir."
    if not file.is_file():
        raise ValueError(f"Expected the adapter {name!r} in {folder}, got no {ADAPTER_FILE} of it: {what_to_do}")
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    saved = load_file(file)
    different = different_weights(own, saved)
    if different:
        raise ValueError(
            f"Expected the weights of the adapter {name!r} in {folder}, got others ({len(different)} are missing, "
            f"unknown or of another shape, such as {different[0]}): {what_to_do}"
        )
    set_peft_model_state_dict(model, saved, adapter_name=name)


def different_weights(own: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of what only one of two states has, or has in another shape."""
    return sorted(
        name
        for name in own.keys() | saved.keys()
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    )
