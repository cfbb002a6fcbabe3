"""Where a feature map is taken in any vision model: layer names, forward hooks, tokens to maps, sizes matched."""

import difflib
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from .adapters import without_adapters
from .timm_layers import last_features_layer


# Parameters that put extra tokens in front of the patches: ViT, DeiT, DINOv2 and v3, CLIP, PVT, and timm's names.
_PREFIX_TOKENS = ("cls_token", "class_token", "class_embedding", "distillation_token", "dist_token")
_REGISTER_TOKENS = ("register_tokens", "reg_token")

# Some entries are a class with its arguments.
_ACTIVATIONS = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})


class _LastLayerReached(Exception):
    """Ends a forward pass of which nothing more is needed."""


class FeatureTap:
    """
    Read feature maps out of a model's forward pass with hooks, whatever the family.

    CNNs give `(batch_size, channels, height, width)` as they are; token sequences lose their class and register tokens
    and are laid out on the image's grid, which need not be square; channels-last maps are brought to channels first.

    Args:
        model (`nn.Module`):
            The model. Its hooks exist only between [`attach`] and [`detach`].
        layers (`list[str]`, *optional*):
            Dotted module paths. By default the output of the model's `base_model`, i.e. after the final norm or last
            convolution that `hidden_states[-1]` lacks in ViT, Swin, DINOv2 and MobileNetV2.
        before_activation (`bool`, *optional*, defaults to `False`):
            Whether a layer that ends in an activation gives what went into that, as OD compares.

    Raises:
        `ValueError`: a path that does not exist, or a model whose last feature map is not known.
    """

    def __init__(self, model: nn.Module, layers: list[str] | None = None, before_activation: bool = False):
        self.model, self.before_activation = model, before_activation
        named = without_adapters(model)
        self.layers = [_default_layer(named)] if layers is None else list(layers)
        self.modules = [_find_layer(named, name) for name in self.layers]
        self.num_prefix_tokens = count_prefix_tokens(model)
        self._handles: list = []
        self._outputs: dict[int, torch.Tensor] = {}
        self._activation: tuple = (None, None)  # what went into the last activation, and what came out
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
        self._activation = (None, None)

    def probe(self, inputs: dict, stop_after_last: bool = True) -> tuple[dict | None, list[int]]:
        """Return the model's output (or `None`) and each map's channels, by one forward pass that leaves no trace."""
        was_attached, was_training = bool(self._handles), self.model.training
        self.model.eval()
        self.attach()
        try:
            with torch.no_grad():
                outputs, maps = self.run(inputs, stop_after_last)
                return outputs, [feature_map.shape[1] for feature_map in maps]
        finally:
            self.model.train(was_training)
            if not was_attached:
                self.detach()

    def _make_hook(self, index: int):
        def keep(module, args, output):
            # Gradient checkpointing runs a module once more in the backward pass: that output is not wanted.
            if self._active:
                self._outputs[index] = first_tensor(output)
                before, after = self._activation
                if after is not None and self._outputs[index] is after:
                    self._outputs[index] = before
                if self._stop_after_last and len(self._outputs) == len(self.modules):
                    raise _LastLayerReached

        return keep

    def _before_activation(self, module, args):
        if self._active:
            self._activation = (args[0].clone() if getattr(module, "inplace", False) else args[0], None)

    def _after_activation(self, module, args, output):
        if self._active:
            self._activation = (self._activation[0], output)

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
                    f"tensor, which it did not.{_suggest_layers()}"
                )
            maps.append(to_map(self._outputs[index], image_size, self.num_prefix_tokens, name))
        self._forget()
        return outputs, maps


def match_sizes(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Bring two tensors to the smaller height and the smaller width of both by adaptive average pooling.

    Args:
        student (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Factors of the student.
        teacher (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Factors of the teacher, of any height and width.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: both with the same height and width.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf.features import match_sizes
    >>> [x.shape[2:] for x in match_sizes(torch.randn(2, 8, 7, 7), torch.randn(2, 8, 14, 6))]
    [torch.Size([7, 6]), torch.Size([7, 6])]

    ```
    """
    size = tuple(min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (student, teacher))


def _suggest_layers() -> str:
    return " iekd_hf.list_layers(model, image_size) prints the layers that can be named."


def _default_layer(model: nn.Module) -> str:
    if hasattr(model, "timm_model"):  # of Transformers, around a timm model with its head
        return f"timm_model.{last_features_layer(model.timm_model)}"
    if hasattr(model, "forward_features"):
        return last_features_layer(model)
    base_model = getattr(model, "base_model", model)
    if base_model is not model:
        return next(name for name, module in model.named_modules() if module is base_model)
    # Some heads hold the parts of their body themselves: SigLIP and CLIP `vision_model`, HGNet-V2 `encoder`.
    for name in ("vision_model", "encoder"):
        if isinstance(model, PreTrainedModel) and isinstance(getattr(model, name, None), nn.Module):
            return name
    raise ValueError(
        f"Expected a model whose last feature map is known, got {type(model).__name__}: name its layer in "
        f"teacher_layers, student_layers or peer_layers.{_suggest_layers()}"
    )


def _find_layer(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules())
    if name not in modules or not name:
        close = difflib.get_close_matches(name, modules, n=5, cutoff=0.5)
        hint = f"; close matches: {', '.join(close)}" if close else ""
        raise ValueError(f"Expected a layer of {type(model).__name__}, got {name!r}{hint}.{_suggest_layers()}")
    return modules[name]


def first_tensor(output) -> torch.Tensor | None:
    """Pick `last_hidden_state`, or else the first tensor of a module's output."""
    if isinstance(output, torch.Tensor):
        return output
    if getattr(output, "last_hidden_state", None) is not None:
        return output.last_hidden_state
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


def count_prefix_tokens(model: nn.Module) -> int:
    count = 0
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if last in _PREFIX_TOKENS:
            count += 1
        elif last in _REGISTER_TOKENS:
            count += parameter.shape[-2]
    return count


def _image_size(inputs: dict, model: nn.Module) -> tuple[int, int]:
    pixels = inputs.get(getattr(model, "main_input_name", "pixel_values"))
    if pixels is None:
        pixels = next(value for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim == 4)
    return tuple(pixels.shape[-2:])


def _mismatch(grid: tuple[int, int], image_size: tuple[int, int]) -> float:
    """Compare the aspect of a grid with the image's; 0 where they agree."""
    return abs(math.log(grid[0] / grid[1]) - math.log(image_size[0] / image_size[1]))


def _grid(num_tokens: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Find height and width of `num_tokens` patches: the factors whose aspect is nearest to the image's."""
    heights = (h for h in range(1, num_tokens + 1) if num_tokens % h == 0)
    return min(((h, num_tokens // h) for h in heights), key=lambda grid: _mismatch(grid, image_size))


def to_map(
    feature: torch.Tensor | None, image_size: tuple[int, int], num_prefix_tokens: int, name: str
) -> torch.Tensor:
    """Lay a layer's output out as `(batch_size, channels, height, width)`."""
    if feature is not None and feature.ndim == 4:
        # Channels last where the last two axes have the image's aspect less than the middle two have.
        if _mismatch(feature.shape[1:3], image_size) < _mismatch(feature.shape[2:4], image_size):
            return feature.movedim(3, 1)
        return feature
    if feature is not None and feature.ndim == 3:
        # Hierarchical models (PVT) may add their class token in the last stage only, so none is tried as well.
        candidates = {
            n: _grid(feature.shape[1] - n, image_size) for n in (num_prefix_tokens, 0) if feature.shape[1] > n
        }
        skip, grid = min(candidates.items(), key=lambda item: _mismatch(item[1], image_size))
        if _mismatch(grid, image_size) < math.log(2):
            return feature[:, skip:].transpose(1, 2).unflatten(2, grid)
    raise ValueError(
        f"Expected layer {name!r} to give a map (batch_size, channels, height, width) or the patches (batch_size, "
        f"sequence_length, hidden_size) of a {image_size[0]}x{image_size[1]} image, got "
        f"{None if feature is None else tuple(feature.shape)}: name another layer.{_suggest_layers()}"
    )
