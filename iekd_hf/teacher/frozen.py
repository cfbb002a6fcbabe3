"""The frozen teacher: its inputs from the student's batch, its feature maps, factors and logits."""

import copy
import hashlib
import inspect
import json
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from datasets.fingerprint import Hasher
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..arguments import IEKDTrainingArguments
from ..features.patches import cut_patches, patch_size_of
from ..features.tap import FeatureTap, images_in
from ..features.trace import image_size_of
from ..method.factors import Paraphraser
from ..method.padding import mask_at
from .fast_copy import copy_fast
from .pixels import TeacherPixels
from .sharding import let_go, shard


# What any module holds: hooks, flags, its weights and the modules in it. Of buffers, those that are not saved count.
_OF_ANY_MODULE = vars(nn.Module()).keys() - {"_buffers"}


def logits_of(outputs: torch.Tensor | dict) -> torch.Tensor:
    """Return a teacher's logits: its output, or the output's entry of that name."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, dict) and "logits" in outputs:
        return outputs["logits"]
    raise ValueError(
        "Expected the teacher to return a tensor of logits or a dictionary with `logits`, got "
        f"{type(outputs).__name__}: wrap it in a module that does, or set lambda_kd=0; the feature losses do "
        "not need it."
    )


class TeacherTargets(NamedTuple):
    """Hold what a student learns from: the factors F_T of each pair (none where none is compared), and the logits."""

    factors: list[torch.Tensor]
    logits: torch.Tensor | None


class FrozenTeacher(nn.Module):
    """
    Hold what never trains in stage 2: the teacher and its paraphrasers (for AT and OD, the modules in their place).
    It always stays in eval mode.

    It is kept off the student's module tree: Trainer calls `train()` on that every step, and a teacher on it would
    move its BatchNorm statistics.
    """

    def __init__(self, teacher: nn.Module, tap: FeatureTap, teacher_pixels: TeacherPixels | None = None):
        super().__init__()
        self.teacher = teacher
        self.tap = tap
        self.teacher_pixels = teacher_pixels
        self.paraphrasers = nn.ModuleList()
        self.device = self._home = next((p.device for p in teacher.parameters()), torch.device("cpu"))
        self.fast = self.sharded = False
        parameters = inspect.signature(teacher.forward).parameters.values()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self._arguments = [p.name for p in parameters if p.kind not in variadic and "label" not in p.name]
        # Outside of Transformers the pixels come first, whatever they are called there; in CLIP the text does.
        first = getattr(teacher, "main_input_name", next(iter(self._arguments), "pixel_values"))
        self.main_input_name = "pixel_values" if "pixel_values" in self._arguments else first
        self._patch_size = patch_size_of(teacher)
        self.dtype = next((p.dtype for p in teacher.parameters()), torch.float32)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in eval mode."""
        return super().train(False)

    def set_paraphrasers(self, paraphrasers: list[nn.Module]) -> None:
        """Set the trained paraphrasers, one for each layer; all that is needed of them is what encodes."""
        encoding = (p.without_decoder() if isinstance(p, Paraphraser) else p for p in paraphrasers)
        self.paraphrasers = nn.ModuleList(encoding).eval().to(self.device)

    def placed(self, args: IEKDTrainingArguments) -> "FrozenTeacher":
        """Move the teacher to its device, or share a copy of it out over all processes."""
        if args.teacher_sharding is not None:
            self.teacher = copy.deepcopy(self.teacher).eval()
            if args.teacher_dtype is not None:
                self.dtype = getattr(torch, args.teacher_dtype)
                self.teacher.to(self.dtype)
            # Before its class has another name.
            self.tap = FeatureTap(self.teacher, self.tap.layers, self.tap.before_activation)
            shard(self.teacher, args.device)
            self.sharded = True
        self.device = args.device
        return self.to(args.device)

    @torch.no_grad()
    def use_fast_copy(
        self, sample: dict, dtype: torch.dtype | None = None, compiled: bool = False, with_logits: bool = True
    ) -> None:
        """Use a faster copy of the teacher with the same maps; the given model stays unchanged."""
        sample = self.to_teacher_inputs(sample)

        def run(model):
            tap = FeatureTap(model, self.tap.layers, self.tap.before_activation)
            tap.attach()
            try:
                return tap.run(sample, stop_after_last=not with_logits)[1]
            finally:
                tap.detach()

        given, self.teacher = self.teacher, copy_fast(self.teacher, run, keep=self.tap.layers)
        given.to(self._home)  # one of both is enough where memory is scarce
        self.dtype = dtype or self.dtype
        self.teacher.to(self.dtype)
        self.tap = FeatureTap(self.teacher, self.tap.layers, self.tap.before_activation)
        self.fast = True
        if compiled:
            # Outside the hooks: the last one leaves the forward pass.
            for module in dict.fromkeys(self.tap.modules):
                module.forward = torch.compile(module.forward)

    def rest(self) -> None:
        """Wait in the host's memory, while what it says is read from a cache."""
        if not self.sharded:
            self.to("cpu")

    def wake(self) -> None:
        """Come back to where it runs."""
        self.to(self.device)

    def detach(self) -> None:
        """Be as before training: where it runs, without hooks."""
        self.wake()
        self.tap.detach()

    def probe(self, sample: dict, with_logits: bool) -> tuple[torch.Tensor | None, list[torch.Size]]:
        """Return the logits and the maps' shapes; raise `ValueError` where the student's batch does not suit it."""
        try:
            outputs, shapes_of_maps = self.tap.probe(self.to_teacher_inputs(sample), not with_logits)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            shapes = {name: tuple(x.shape) for name, x in sample.items() if isinstance(x, torch.Tensor)}
            raise ValueError(
                f"Expected {type(self.teacher).__name__} to take the student's batch {shapes}, got: "
                f"{str(error).rstrip('.')}.{self._explain_size(sample)}"
            ) from error
        self._let_go()
        return logits_of(outputs) if with_logits else None, shapes_of_maps

    def _explain_size(self, sample: dict) -> str:
        """Say which size the teacher was built for, if it is another one."""
        built_for, pixels = image_size_of(self.teacher), self.to_teacher_inputs(sample)[self.main_input_name]
        if built_for is None or pixels.ndim != 4 or tuple(pixels.shape[2:]) == built_for:
            return ""
        return (
            f" It was built for {built_for[0]}x{built_for[1]} pixels: pass the image processor that makes them as "
            "teacher_processor."
        )

    def to_teacher_inputs(self, inputs: dict) -> dict:
        """Return the part of the student's batch that the teacher takes, without labels, with the teacher's pixels."""
        named = inputs.get(self.main_input_name)
        pixels = images_in(inputs, self.teacher) if named is None else named  # whatever the student calls them
        if self.teacher_pixels is not None:
            mask = inputs.get("pixel_mask")
            pixels = self.teacher_pixels(pixels, mask)
            if mask is not None:
                inputs = {**inputs, "pixel_mask": mask_at(mask, pixels.shape[-2:]).to(mask.dtype)}
        inputs = {name: value for name, value in inputs.items() if name in self._arguments}
        inputs[self.main_input_name] = pixels.to(self.dtype)
        if self._patch_size is not None and pixels.ndim == 4:
            inputs |= cut_patches(pixels.to(self.dtype), self._patch_size)
        return inputs

    @torch.no_grad()
    def feature_maps(self, inputs: dict, with_logits: bool = False) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Run the teacher as far as needed."""
        outputs, feature_maps = self.tap.run(self.to_teacher_inputs(inputs), stop_after_last=not with_logits)
        self._let_go()
        if self.dtype in (torch.float16, torch.bfloat16):  # a teacher loaded so, before float32 paraphrasers
            feature_maps = [f_T.float() for f_T in feature_maps]
        return feature_maps, logits_of(outputs) if with_logits else None

    def _let_go(self) -> None:
        if self.sharded:
            let_go(self.teacher)

    @torch.no_grad()
    def forward(self, inputs: dict, with_logits: bool = False) -> TeacherTargets:
        """Return the factors of each pair (none without paraphrasers), and the logits or `None`."""
        if not self.paraphrasers and not with_logits:
            return TeacherTargets([], None)
        feature_maps, logits = self.feature_maps(inputs, with_logits)
        if not self.paraphrasers:
            return TeacherTargets([], logits)
        factors = [p.encode(f_T) for p, f_T in zip(self.paraphrasers, feature_maps, strict=True)]
        return TeacherTargets(factors, logits)


def fingerprint(modules: Iterable[nn.Module]) -> str:
    """Return a digest of modules' weights and statistics; all ranks must ask for that of a sharded one."""
    digest = hashlib.sha256()
    for module in modules:
        # Quantised layers pack weight and bias together, and hold types beside them.
        for held in tree_leaves(module.state_dict()):
            if not isinstance(held, torch.Tensor):
                digest.update(repr(held).encode())
                continue
            tensor = held.full_tensor() if isinstance(held, DTensor) else held
            tensor = tensor.dequantize() if tensor.is_quantized else tensor
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def attributes(network: nn.Module) -> str:
    """Return a digest of what a network's modules hold beside weights: dilations, slopes, functions' names, ..."""
    is_said = isinstance(network, PreTrainedModel)
    held = [
        (name, type(part).__qualname__, {k: v for k, v in vars(part).items() if k not in _OF_ANY_MODULE})
        for name, part in network.named_modules()
        # What a model of Transformers is beside layers of torch and activations, its configuration says.
        if not is_said or type(part).__module__.startswith(("torch.nn.", "transformers.activations"))
    ]
    return hashlib.sha256(json.dumps(held, skipkeys=True, default=_as_json).encode()).hexdigest()


def _as_json(value):
    """Return what tells a value apart that JSON does not know, the same in every process."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        return Hasher.hash(value.detach().cpu())
    return getattr(value, "__qualname__", type(value).__qualname__)
