"""Where feature maps are taken in any vision model: the layers by name or by default, and forward hooks on them."""

import difflib

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from ..models.adapters import without_adapters
from .detectors import backbone_layers, is_detector
from .layer_list import find_layers
from .maps import count_extra_tokens, pick_tensor, split_index, suggest_layers, to_map
from .timm_layers import last_features_layer


# Some entries are a class with its arguments.
_ACTIVATIONS = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})


class _LastLayerReached(Exception):
    """Ends a forward pass of which nothing more is needed."""


class FeatureTap:
    """
    Read feature maps out of a model's forward pass with hooks, whatever the family.

    CNNs give `(batch_size, channels, height, width)` as they are; token sequences lose their class, register and
    detection tokens and are laid out on the image's grid, which need not be square; channels-last maps are brought to
    channels first.

    Args:
        model (`nn.Module`):
            The model. Its hooks exist only between [`attach`] and [`detach`].
        layers (`list[str]`, *optional*):
            Dotted module paths; an index picks one of several maps that a backbone gives, as in
            `"model.backbone.model[-1]"`. By default, in a model around a backbone (a detector), the maps that its
            backbone gives to the neck; otherwise the output of the model's `base_model`, i.e. after
            the final norm or last convolution that `hidden_states[-1]` lacks in ViT, Swin, DINOv2 and MobileNetV2.
        before_activation (`bool`, *optional*, defaults to `False`):
            Whether a layer that ends in an activation gives what went into that, as OD compares.

    Raises:
        `ValueError`: a path that does not exist, or a model whose last feature map is not known.
    """

    def __init__(self, model: nn.Module, layers: list[str] | None = None, before_activation: bool = False):
        self.model, self.before_activation = model, before_activation
        named = without_adapters(model)
        self.layers = list(layers) if layers is not None else default_layers(named)
        self.modules = [_find_layer(named, name) for name in self.layers]
        self.extra_tokens = count_extra_tokens(model)
        self._handles: list = []
        self._outputs: dict[int, torch.Tensor] = {}
        # What went into an activation, by what came out of it; all of a backbone that gives several maps at its end.
        self._before: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._several = any(split_index(name)[1] is not None for name in self.layers)
        self._going_in: torch.Tensor | None = None
        self._active = False
        self._stop_after_last = False

    def attach(self) -> None:
        """Register the hooks; does nothing where they are registered."""
        if not self._handles:
            # Before the layers' own hooks, for a layer that is an activation itself.
            for part in {p for module in self.modules for p in module.modules() if self.before_activation}:
                if isinstance(part, _ACTIVATIONS):
                    self._handles.append(part.register_forward_pre_hook(self._before_activation))
                    self._handles.append(part.register_forward_hook(self._after_activation))
            for index, module in enumerate(self.modules):
                self._handles.append(module.register_forward_hook(self._make_hook(index)))

    def detach(self) -> None:
        """Remove the hooks and let go of the captured tensors."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forget(self) -> None:
        self._outputs.clear()
        self._before.clear()
        self._going_in = None

    def probe(self, inputs: dict, stop_after_last: bool = True) -> tuple[dict | None, list[int]]:
        """Return the model's output (or `None`) and each map's channels, by one forward pass that leaves no trace."""
        with torch.no_grad():
            outputs, maps = self._run_once(inputs, stop_after_last)
        return outputs, [feature_map.shape[1] for feature_map in maps]

    def frozen_layers(self, inputs: dict) -> list[str]:
        """Return the layers whose map carries no gradient, as nothing before it trains, by a pass as in [`probe`]."""
        with torch.enable_grad():
            _, maps = self._run_once(inputs, stop_after_last=True)
        return [name for name, feature_map in zip(self.layers, maps, strict=True) if not feature_map.requires_grad]

    def _run_once(self, inputs: dict, stop_after_last: bool):
        was_attached, was_training = bool(self._handles), self.model.training
        self.model.eval()
        self.attach()
        try:
            return self.run(inputs, stop_after_last)
        finally:
            self.model.train(was_training)
            if not was_attached:
                self.detach()

    def _make_hook(self, index: int):
        which = split_index(self.layers[index])[1]

        def keep(module, args, output):
            # Gradient checkpointing runs a module once more in the backward pass: that output is not wanted.
            if self._active:
                picked = pick_tensor(output, which)
                if self.before_activation and picked is not None:
                    picked = self._before.get(picked, picked)
                self._outputs[index] = picked
                if self._stop_after_last and len(self._outputs) == len(self.modules):
                    raise _LastLayerReached

        return keep

    def _before_activation(self, module, args):
        if self._active:
            self._going_in = args[0].clone() if getattr(module, "inplace", False) else args[0]

    def _after_activation(self, module, args, output):
        if self._active:
            if not self._several:
                self._before.clear()  # the one that ends a layer is the last one
            self._before[output], self._going_in = self._going_in, None

    def run(self, inputs: dict, stop_after_last: bool = False):
        """
        Run the model and return what it gives with the maps of all layers.

        Args:
            inputs (`dict`):
                Keyword arguments of the model's forward.
            stop_after_last (`bool`, *optional*, defaults to `False`):
                Whether to leave the forward pass after the last layer that is needed; there is no output then.

        Returns:
            `tuple`: the model's output (or `None`), and a list of `(batch_size, channels, height, width)` tensors.

        Raises:
            `ValueError`: a layer that did not run, or whose output is neither a map nor a sequence of patches.
        """
        self._forget()
        self._active, self._stop_after_last = True, stop_after_last
        try:
            outputs = self.model(**inputs)
        except _LastLayerReached:
            outputs = None
        finally:
            self._active = False
        image_size = _image_size(inputs, self.model)
        maps = []
        for index, name in enumerate(self.layers):
            if index not in self._outputs:
                raise ValueError(
                    f"Expected layer {name!r} of {type(self.model).__name__} to run in its forward pass and to give a "
                    f"tensor, which it did not.{suggest_layers()}"
                )
            maps.append(to_map(self._outputs[index], image_size, self.extra_tokens, name))
        self._forget()
        return outputs, maps


def default_layers(model: nn.Module) -> list[str]:
    """
    Name the layers whose maps are taken where none is named, the last one last.

    Args:
        model (`nn.Module`):
            A vision model.

    Returns:
        `list[str]`: one layer, or the levels of a detector's pyramid.

    Raises:
        `ValueError`: a model whose last feature map is not known.
    """
    if hasattr(model, "timm_model"):  # of Transformers, around a timm model with its head
        return [f"timm_model.{last_features_layer(model.timm_model)}"]
    if hasattr(model, "forward_features"):
        return [last_features_layer(model)]
    if layers := backbone_layers(model):
        return layers
    if is_detector(model) and not count_extra_tokens(model)[1]:
        raise ValueError(
            f"Expected a detector with a backbone, got {type(model).__name__} without one that is known: name its "
            f"layer in teacher_layers, student_layers or peer_layers, {_candidates(model)}.{suggest_layers()}"
        )
    base_model = getattr(model, "base_model", model)
    if base_model is not model:
        return [next(name for name, module in model.named_modules() if module is base_model)]
    # Some heads hold the parts of their body themselves: SigLIP and CLIP `vision_model`, HGNet-V2 `encoder`.
    for name in ("vision_model", "encoder"):
        if isinstance(model, PreTrainedModel) and isinstance(getattr(model, name, None), nn.Module):
            return [name]
    raise ValueError(
        f"Expected a model whose last feature map is known, got {type(model).__name__}: name its layer in "
        f"teacher_layers, student_layers or peer_layers.{suggest_layers()}"
    )


def pair_layers(
    student: nn.Module, teacher: nn.Module, student_layers: list[str] | None, teacher_layers: list[str] | None
) -> tuple[list[str], list[str]]:
    """
    Say which layers of student and teacher are compared.

    Where one side has more layers by default than the other side has, as an RT-DETR's three levels against the one map
    of a DETR or a classifier, the last ones are taken: pairs are made from the last map backwards.

    Args:
        student (`nn.Module`), teacher (`nn.Module`):
            The models.
        student_layers (`list[str]`, *optional*), teacher_layers (`list[str]`, *optional*):
            Layers that were named, all of which are taken, in order. By default [`default_layers`].

    Returns:
        `tuple[list[str], list[str]]`: as many of the student as of the teacher.

    Raises:
        `ValueError`: more layers named on one side than the other side has.
    """
    named = (student_layers, teacher_layers)
    found = [
        list(layers) if layers is not None else default_layers(without_adapters(model))
        for model, layers in zip((student, teacher), named, strict=True)
    ]
    count = min(map(len, found))
    if any(layers is not None and len(layers) > count for layers in named):
        raise ValueError(
            f"Expected as many student_layers as teacher_layers, got {len(found[0])} and {len(found[1])}: they are "
            "paired in order, and None stands for the last feature map, or the levels of a detector's pyramid."
        )
    return found[0][-count:], found[1][-count:]


def _candidates(model: nn.Module) -> str:
    """Name the last layers that give a map, if an image of the usual size goes through the model."""
    try:
        found = list(find_layers(model))
    except Exception:  # a model that nothing is known of, such as which size it takes
        found = []
    return f"such as {' or '.join(map(repr, found[-5:]))}" if found else "whichever gives its last feature map"


def _find_layer(model: nn.Module, name: str) -> nn.Module:
    modules, (path, _) = dict(model.named_modules()), split_index(name)
    if path not in modules or not path:
        close = difflib.get_close_matches(path, modules, n=5, cutoff=0.5)
        hint = f"; close matches: {', '.join(close)}" if close else ""
        raise ValueError(f"Expected a layer of {type(model).__name__}, got {name!r}{hint}.{suggest_layers()}")
    return modules[path]


def _image_size(inputs: dict, model: nn.Module) -> tuple[int, int]:
    pixels = inputs.get(getattr(model, "main_input_name", "pixel_values"))
    if pixels is None:
        pixels = next(value for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim == 4)
    return tuple(pixels.shape[-2:])
