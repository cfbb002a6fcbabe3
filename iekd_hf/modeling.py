"""What trains, each in one `forward`, and what is frozen: students and peers with encoders, and the teacher's side."""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .factors import ChannelSplit, Paraphraser
from .fast_teacher import copy_fast
from .features import FeatureTap
from .knowledge import encoder_of
from .pixels import TeacherPixels


class StudentWithEncoders(nn.Module):
    """
    Hold everything that trains in stage 2 in one `forward`, so that one DDP wrapper, one compiler and one optimizer
    see it.

    Args:
        student (`nn.Module`):
            The student.
        tap (`FeatureTap`):
            Where its feature maps are taken; one per pair of layers.
        splits (`list[ChannelSplit]`):
            The partition of each map's channels.
        factor_channels (`list[int]`):
            Channels k of the factors of each pair.
        inherit (`bool`), explore (`bool`):
            Whether the inheritance and the exploration loss are used. A half without channels has no encoder either.
        knowledge (`str`, *optional*, defaults to `"factors"`):
            What is compared, see [`IEKDTrainingArguments`].
    """

    def __init__(
        self,
        student: nn.Module,
        tap: FeatureTap,
        splits: list[ChannelSplit],
        factor_channels: list[int],
        inherit: bool,
        explore: bool,
        knowledge: str = "factors",
    ):
        super().__init__()
        self.student = student
        self.tap = tap
        self.splits = nn.ModuleList(splits)

        def encoders(indices: str, wanted: bool) -> nn.ModuleList:
            widths = [len(getattr(split, indices)) for split in splits]
            return nn.ModuleList(
                encoder_of(knowledge, width, k)
                for width, k in zip(widths, factor_channels, strict=True)
                if wanted and width
            )

        self.inheritance_encoders = encoders("inheritance_indices", inherit)
        self.exploration_encoders = encoders("exploration_indices", explore)

    def forward(self, **inputs) -> tuple[dict, list[torch.Tensor], list[torch.Tensor]]:
        """Return the student's output and the factors F_inh and F_exp of each pair; an unused half has none."""
        outputs, feature_maps = self.tap.run(inputs)
        return outputs, *self.factors(feature_maps)

    def factors(self, feature_maps: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return F_inh and F_exp of each map."""
        for name, f_S in zip(self.tap.layers, feature_maps, strict=True):
            if torch.is_grad_enabled() and not f_S.requires_grad:
                raise ValueError(
                    f"Expected the student's feature map at {name!r} to carry a gradient, got one without: its layers "
                    "are frozen, or gradient checkpointing is reentrant (set "
                    'gradient_checkpointing_kwargs={"use_reentrant": '
                    "False}); no feature loss would reach the student."
                )
        halves = [split(f_S) for split, f_S in zip(self.splits, feature_maps, strict=True)]
        factors_inh = [encode(f_inh) for encode, (f_inh, _) in zip(self.inheritance_encoders, halves, strict=False)]
        factors_exp = [encode(f_exp) for encode, (_, f_exp) in zip(self.exploration_encoders, halves, strict=False)]
        return factors_inh, factors_exp


class Peer(StudentWithEncoders):
    """
    Hold one of several networks that teach each other, with the encoders of what it learns: a student as above, whose
    pairs are the other peers, all against its one feature map. Without pairs (logits only) it taps nothing.
    """

    def forward(self, **inputs) -> tuple[dict, list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
        """Return the output, F_inh and F_exp towards each other peer, and the map itself, detached, to teach with."""
        outputs, feature_maps = self.tap.run(inputs)
        return outputs, *self.factors(feature_maps), feature_maps[0].detach() if feature_maps else None

    @torch.no_grad()
    def teach(self, inputs: dict, with_logits: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the map, and the logits if they are wanted, of the network as it is now, and leave no trace in it."""
        with frozen_statistics(self.student):
            outputs, feature_maps = self.tap.run(inputs, stop_after_last=not with_logits)
        return feature_maps[0] if feature_maps else None, outputs["logits"] if with_logits else None


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """
    Let BatchNorm normalise by the batch, as in training, without moving its running statistics.

    A network that teaches while it learns is not in eval mode, whose statistics lag behind its weights.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def logits_of(outputs: torch.Tensor | dict) -> torch.Tensor:
    """Return a teacher's logits: the entry of that name, or a tensor as it is."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, dict) and "logits" in outputs:
        return outputs["logits"]
    raise ValueError(
        "Expected the teacher to return a tensor of logits or a dictionary with `logits`, got "
        f"{type(outputs).__name__}: wrap it in a module that does, or set lambda_kd=0; the feature losses do "
        "not need it."
    )


class FrozenTeacher(nn.Module):
    """
    Hold what never trains in stage 2: the teacher, and its paraphrasers (or what else makes of its maps what is
    compared). It stays in eval mode whatever is asked.

    It is kept off the student's module tree: Trainer calls `train()` on that every step, and a teacher on it would
    move its BatchNorm statistics.

    Args:
        teacher (`nn.Module`):
            The teacher; neither its weights nor its `requires_grad` flags are changed. One that is not of Transformers
            takes the pixels as its first argument.
        tap (`FeatureTap`):
            Where its feature maps are taken.
        teacher_pixels (`TeacherPixels`, *optional*):
            Turns the student's pixels into the teacher's.
    """

    def __init__(self, teacher: nn.Module, tap: FeatureTap, teacher_pixels: TeacherPixels | None = None):
        super().__init__()
        self.teacher = teacher
        self.tap = tap
        self.teacher_pixels = teacher_pixels
        self.paraphrasers = nn.ModuleList()
        self.fast = False
        parameters = inspect.signature(teacher.forward).parameters.values()
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self._arguments = [p.name for p in parameters if p.kind not in variadic and "label" not in p.name]
        # Outside of Transformers the pixels come first, whatever they are called there.
        first = "pixel_values" if "pixel_values" in self._arguments else next(iter(self._arguments), "pixel_values")
        self.main_input_name = getattr(teacher, "main_input_name", first)
        self.dtype = next((p.dtype for p in teacher.parameters()), torch.float32)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in eval mode."""
        return super().train(False)

    def set_paraphrasers(self, paraphrasers: list[nn.Module]) -> None:
        """Take the trained paraphrasers, or what stands for them, one for each layer."""
        self.paraphrasers = nn.ModuleList(paraphrasers).eval()

    @torch.no_grad()
    def speed_up(self, sample: dict, dtype: torch.dtype | None = None, compiled: bool = False) -> None:
        """
        Go on with a copy of the teacher that gives the same maps in less time; the user's own stays as it was.

        Args:
            sample (`dict`):
                A batch, to find what can be folded and to see that the result is the same.
            dtype (`torch.dtype`, *optional*):
                What to cast the copy to.
            compiled (`bool`, *optional*, defaults to `False`):
                Whether to compile the layers that give the maps.
        """
        sample = self.adapt(sample)

        def run(model):
            tap = FeatureTap(model, self.tap.layers, self.tap.before_activation)
            tap.attach()
            try:
                return tap.run(sample)[1]
            finally:
                tap.detach()

        self.teacher = copy_fast(self.teacher, run, keep=self.tap.layers)
        self.dtype = dtype or self.dtype
        self.teacher.to(self.dtype)
        self.tap = FeatureTap(self.teacher, self.tap.layers, self.tap.before_activation)
        self.fast = True
        if compiled:
            for module in self.tap.modules:  # outside of the hooks, of which the last one leaves the forward pass
                module.forward = torch.compile(module.forward)

    def probe(self, sample: dict, with_logits: bool) -> tuple[torch.Tensor | None, list[int]]:
        """Return the logits and the maps' channels; raise `ValueError` where the student's batch does not suit it."""
        try:
            outputs, channels = self.tap.probe(self.adapt(sample), not with_logits)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            shapes = {name: tuple(x.shape) for name, x in sample.items() if isinstance(x, torch.Tensor)}
            raise ValueError(
                f"Expected {type(self.teacher).__name__} to take the student's batch {shapes}, got: {error} "
                "If it needs another size, pass teacher_processor."
            ) from error
        return logits_of(outputs) if with_logits else None, channels

    def adapt(self, inputs: dict) -> dict:
        """Return the part of the student's batch that the teacher takes, without labels, with the teacher's pixels."""
        pixels = inputs[self.main_input_name if self.main_input_name in inputs else "pixel_values"]
        if self.teacher_pixels is not None:
            pixels = self.teacher_pixels(pixels)
        inputs = {name: value for name, value in inputs.items() if name in self._arguments}
        return {**inputs, self.main_input_name: pixels.to(self.dtype)}

    @torch.no_grad()
    def feature_maps(self, inputs: dict, with_logits: bool = False) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """
        Run the teacher as far as needed.

        Args:
            inputs (`dict`):
                The student's batch.
            with_logits (`bool`, *optional*, defaults to `False`):
                Whether the logits are needed; otherwise the forward pass ends after the last layer.

        Returns:
            `tuple`: the maps f_T, `(batch_size, channels, height, width)` each, and the logits or `None`.
        """
        outputs, feature_maps = self.tap.run(self.adapt(inputs), stop_after_last=not with_logits)
        if self.dtype in (torch.float16, torch.bfloat16):  # a teacher loaded so, before float32 paraphrasers
            feature_maps = [f_T.float() for f_T in feature_maps]
        return feature_maps, logits_of(outputs) if with_logits else None

    @torch.no_grad()
    def forward(self, inputs: dict, with_logits: bool = False) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Return the factors F_T of each pair (none without paraphrasers), and the logits or `None`."""
        if not self.paraphrasers and not with_logits:
            return [], None
        feature_maps, logits = self.feature_maps(inputs, with_logits)
        if not self.paraphrasers:
            return [], logits
        return [p.encode(f_T) for p, f_T in zip(self.paraphrasers, feature_maps, strict=True)], logits


class ParaphraserStack(nn.Module):
    """
    Hold what trains in stage 1 in one `forward`: one paraphraser for each layer of the teacher.

    Args:
        paraphrasers (`list[Paraphraser]`):
            The paraphrasers, in the order of the teacher's layers.
    """

    def __init__(self, paraphrasers: list[Paraphraser]):
        super().__init__()
        self.paraphrasers = nn.ModuleList(paraphrasers)

    def forward(self, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the reconstruction of each map."""
        return [paraphraser(f_T) for paraphraser, f_T in zip(self.paraphrasers, feature_maps, strict=True)]


class PeerGroup(nn.Module):
    """
    Hold all that trains in mutual learning: the peers with their encoders, and a paraphraser of each.

    It has no forward of its own: each part is run, and wrapped for DDP, by itself.

    Args:
        taps (`list[FeatureTap]`):
            Where each peer's map is taken: its one layer, once for each other peer; no layer where only logits are
            compared, and no paraphraser then.
        widths (`list[int]`):
            Channels of the maps.
        args (`MutualTrainingArguments`):
            Split, factors and losses.
    """

    def __init__(self, taps: list[FeatureTap], widths: list[int], args):
        super().__init__()
        factor_channels = [args.factor_channels or max(width // 2, 1) for width in widths]
        self.peers, self.paraphrasers = nn.ModuleList(), nn.ModuleList()
        for i, (tap, width) in enumerate(zip(taps, widths, strict=True)):
            splits = [
                ChannelSplit(width, args.inheritance_ratio, args.split_mode, args.split_seed) for _ in tap.layers
            ]
            others = [k for j, k in enumerate(factor_channels) if j != i and tap.layers]
            peer = Peer(tap.model, tap, splits, others, inherit=args.lambda_inh > 0, explore=args.lambda_exp > 0)
            self.peers.append(peer.to(tap.model.dtype))
            if tap.layers:
                paraphraser = Paraphraser(width, factor_channels[i], decoder=args.paraphraser_decoder)
                self.paraphrasers.append(paraphraser.to(tap.model.dtype))
