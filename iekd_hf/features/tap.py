"""Read feature maps out of any vision model with forward hooks."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.activations import ACT2CLS

from ..models.adapters import without_adapters
from ..models.kinds import main_input_of
from ..models.signature import check_sees_images
from .layers import default_layers, find_layer
from .maps import count_extra_tokens, pick_tensor, split_index, suggest_layers, to_map


# Some entries are a class with its arguments.
_ACTIVATIONS = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})


class _LastLayerReached(Exception):
    """Ends a forward pass after the last layer that is needed."""


class _Hook:
    """Call a tap; a copy of the model, saved or in memory, is not tapped: its hooks do nothing."""

    def __init__(self, function: Callable | None = None, *first):
        self.function, self.first = function, first

    def __call__(self, *args):
        return None if self.function is None else self.function(*self.first, *args)

    def __reduce__(self):
        return _Hook, ()


class FeatureTap:
    """
    Read feature maps out of a model's forward pass with hooks, whatever the family.

    CNNs give `(batch_size, channels, height, width)` as they are; token sequences lose their class, register and
    detection tokens and are laid out on the image's grid, which need not be square; channels-last maps are brought to
    channels first.
    """

    def __init__(self, model: nn.Module, layers: list[str] | None = None, before_activation: bool = False):
        self.model, self.before_activation = model, before_activation
        named = without_adapters(model)
        check_sees_images(named)
        self.layers = list(layers) if layers is not None else default_layers(named)
        self.modules = [find_layer(named, name) for name in self.layers]
        self.extra_tokens = count_extra_tokens(model)
        self._handles: list = []
        self._outputs: dict[int, torch.Tensor] = {}
        # What went into an activation, by what came out of it; all of a backbone that gives several maps at its end.
        self._before: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        # What the model itself returns needs no hook, which PEFT would call past.
        self._own = [index for index, module in enumerate(self.modules) if module is named]
        self._several = bool(self._own) or any(split_index(name)[1] is not None for name in self.layers)
        self._going_in: torch.Tensor | None = None
        # Layers whose output is written over later on, by an activation in place; and each output's version.
        self._written_over: set[int] = set()
        self._versions: dict[int, int] = {}
        self._active = False
        self._stop_after_last = False

    @property
    def is_attached(self) -> bool:
        """Whether the hooks are registered."""
        return bool(self._handles)

    def attach(self) -> None:
        """Register the hooks; does nothing where they are registered."""
        if not self._handles:
            # Before the layers' own hooks, for a layer that is an activation itself.
            for part in {p for module in self.modules for p in module.modules() if self.before_activation}:
                if isinstance(part, _ACTIVATIONS):
                    self._handles.append(part.register_forward_pre_hook(_Hook(self._before_activation)))
                    self._handles.append(part.register_forward_hook(_Hook(self._after_activation)))
            for index, module in enumerate(self.modules):
                if index not in self._own:
                    self._handles.append(module.register_forward_hook(_Hook(self._keep, index)))

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

    def probe(self, inputs: dict, stop_after_last: bool = True) -> tuple[dict | None, list[torch.Size]]:
        """Return the model's output (or `None`) and each map's `(channels, height, width)`, in eval mode."""
        with torch.no_grad():
            outputs, maps = self._run_once(inputs, stop_after_last)
        return outputs, [feature_map.shape[1:] for feature_map in maps]

    def frozen_layers(self, inputs: dict) -> list[str]:
        """Return the layers whose map carries no gradient because nothing before it trains."""
        with torch.enable_grad():
            _, maps = self._run_once(inputs, stop_after_last=True)
        return [name for name, feature_map in zip(self.layers, maps, strict=True) if not feature_map.requires_grad]

    def _run_once(self, inputs: dict, stop_after_last: bool):
        was_attached, was_training = self.is_attached, self.model.training
        self.model.eval()
        self.attach()
        try:
            return self.run(inputs, stop_after_last)
        finally:
            self.model.train(was_training)
            if not was_attached:
                self.detach()

    def _keep(self, index, module, args, output):
        # Gradient checkpointing runs a module once more in the backward pass: that output is not wanted.
        if self._active:
            self._pick(index, output)
            if self._stop_after_last and len(self._outputs) == len(self.modules):
                raise _LastLayerReached

    def _pick(self, index: int, output) -> None:
        picked = pick_tensor(output, split_index(self.layers[index])[1])
        if self.before_activation and picked is not None:
            picked = self._before.get(picked, picked)
        if picked is not None:
            picked = picked.clone() if index in self._written_over else picked
            self._versions[index] = picked._version
        self._outputs[index] = picked

    def _before_activation(self, module, args):
        if self._active:
            self._going_in = args[0].clone() if getattr(module, "inplace", False) else args[0]

    def _after_activation(self, module, args, output):
        if self._active:
            if not self._several:
                self._before.clear()  # the one that ends a layer is the last one
            self._before[output], self._going_in = self._going_in, None

    def run(self, inputs: dict, stop_after_last: bool = False):
        """Run the model and return what it gives with the maps of all layers."""
        image_size = image_size_in(inputs, self.model)  # first: it refuses what are no images
        outputs, captured = self.capture(inputs, stop_after_last)
        maps, num_images = self.lay_out(captured, image_size), len(images_in(inputs, self.model))
        for feature_map, name in zip(maps, self.layers, strict=True):
            if len(feature_map) != num_images:
                raise ValueError(
                    f"Expected layer {name!r} of {type(self.model).__name__} to give a map of each image, got "
                    f"{len(feature_map)} for {num_images}, such as windows of them: name another layer."
                    f"{suggest_layers()}"
                )
        return outputs, maps

    def capture(self, inputs: dict, stop_after_last: bool = False):
        """Run the model and return what it gives with the tensors of all layers as they are, class tokens included."""
        self._forget()
        self._active, self._stop_after_last = True, stop_after_last
        try:
            outputs = self.model(**inputs)
            for index in self._own:
                self._pick(index, outputs)
        except _LastLayerReached:
            outputs = None
        finally:
            self._active = False
        if changed := {i for i, f in self._outputs.items() if f is not None and f._version != self._versions[i]}:
            self._written_over |= changed
            return self.capture(inputs, stop_after_last)
        captured = []
        for index, name in enumerate(self.layers):
            if index not in self._outputs:
                raise ValueError(
                    f"Expected layer {name!r} of {type(self.model).__name__} to run in its forward pass and to give a "
                    f"tensor, which it did not.{suggest_layers()}"
                )
            captured.append(self._outputs[index])
        self._forget()
        return outputs, captured

    def lay_out(self, captured: list[torch.Tensor | None], image_size: tuple[int, int]) -> list[torch.Tensor]:
        """Return the maps in the tensors of all layers."""
        named = zip(captured, self.layers, strict=True)
        return [to_map(feature, image_size, self.extra_tokens, name) for feature, name in named]


def image_size_in(inputs: dict, model: nn.Module) -> tuple[int, int]:
    """Return the images' height and width, or in patches where the model takes those."""
    if "spatial_shapes" in inputs:
        return tuple(inputs["spatial_shapes"][0].tolist())
    pixels = images_in(inputs, model)
    if pixels is None or pixels.ndim != 4:
        shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        raise ValueError(
            f"Expected images (batch_size, channels, height, width), got {shapes}: give one whole image for each "
            "example, neither a video nor patches."
        )
    return tuple(pixels.shape[-2:])


def images_in(inputs: dict, model: nn.Module) -> torch.Tensor | None:
    """Return the images of a batch, whatever the model calls them."""
    if isinstance(inputs.get("pixel_values"), torch.Tensor):
        return inputs["pixel_values"]
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    pixels = tensors.get(main_input_of(model))
    return next((each for each in tensors.values() if each.ndim == 4), None) if pixels is None else pixels
