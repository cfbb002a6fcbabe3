"""The modules that train, each in one `forward`: students and peers with their encoders, paraphrasers."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..features.tap import FeatureTap
from .factors import ChannelSplit, Paraphraser
from .knowledge import KNOWLEDGE, Knowledge
from .objective import is_on


class StudentWithEncoders(nn.Module):
    """
    Hold everything that trains in stage 2 in one `forward`, for one DDP wrapper, one compiler and one optimizer.
    """

    def __init__(
        self,
        student: nn.Module,
        tap: FeatureTap,
        splits: list[ChannelSplit],
        factor_channels: list[int],
        inherit: bool,
        explore: bool,
        knowledge: Knowledge = KNOWLEDGE["factors"],
        kernel_size: int = 3,
    ):
        super().__init__()
        self.student = student
        self.tap = tap
        self.splits = nn.ModuleList(splits)

        def encoders(indices: str, wanted: bool) -> nn.ModuleList:
            widths = [len(getattr(split, indices)) for split in splits]
            return nn.ModuleList(
                knowledge.student_side(width, k, kernel_size)
                for width, k in zip(widths, factor_channels, strict=True)
                if wanted and width
            )

        self.inheritance_encoders = encoders("inheritance_indices", inherit)
        self.exploration_encoders = encoders("exploration_indices", explore)

    @classmethod
    def of(cls, tap: FeatureTap, widths: list[int], factor_channels: list[int], args: Any, knowledge: Knowledge):
        """Split maps of these channels and make encoders as the arguments say."""
        splits = [ChannelSplit(width, args.inheritance_ratio, args.split_mode, args.split_seed) for width in widths]
        inherit, explore = is_on(args.lambda_inh), is_on(args.lambda_exp)
        return cls(tap.model, tap, splits, factor_channels, inherit, explore, knowledge, args.encoder_kernel_size)

    def forward(self, **inputs) -> tuple[dict, list[torch.Tensor], list[torch.Tensor]]:
        """Return the student's output and the factors F_inh and F_exp of each pair; an unused half has none."""
        outputs, feature_maps = self.tap.run(inputs)
        return outputs, *self.factors(feature_maps)

    def factors(self, feature_maps: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return F_inh and F_exp of each map."""
        for name, f_S in zip(self.tap.layers, feature_maps, strict=True):
            used = self.inheritance_encoders or self.exploration_encoders
            if used and torch.is_grad_enabled() and not f_S.requires_grad:
                raise ValueError(
                    f"Expected the student's feature map at {name!r} to carry a gradient, got one without, so no "
                    "feature loss would reach the student: gradient checkpointing is reentrant (set "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}), or its layers were frozen since.'
                )
        halves = [split(f_S) for split, f_S in zip(self.splits, feature_maps, strict=True)]
        factors_inh = [encode(f_inh) for encode, (f_inh, _) in zip(self.inheritance_encoders, halves, strict=False)]
        factors_exp = [encode(f_exp) for encode, (_, f_exp) in zip(self.exploration_encoders, halves, strict=False)]
        return factors_inh, factors_exp


class Peer(StudentWithEncoders):
    """
    Hold one of several networks that teach each other, with its encoders: a student whose pairs are the other peers,
    all against its one feature map. With logits alone it has no pairs.
    """

    def forward(self, **inputs) -> tuple[dict, list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]:
        """Return the output, F_inh and F_exp towards each other peer, and the map itself, detached, to teach with."""
        outputs, feature_maps = self.tap.run(inputs)
        return outputs, *self.factors(feature_maps), feature_maps[0].detach() if feature_maps else None

    @torch.no_grad()
    def teach(self, inputs: dict, with_logits: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the current map, and the logits if asked for, without moving BatchNorm statistics."""
        with frozen_statistics(self.student):
            outputs, feature_maps = self.tap.run(inputs, stop_after_last=not with_logits)
        return feature_maps[0] if feature_maps else None, outputs["logits"] if with_logits else None


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Draw weights from their own seed, whatever was built before, and leave the global state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


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


class ParaphraserStack(nn.Module):
    """Hold what trains in stage 1 in one `forward`: one paraphraser for each layer of the teacher."""

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
    """

    def __init__(self, taps: list[FeatureTap], widths: list[int], args):
        super().__init__()
        factor_channels = [KNOWLEDGE["factors"].width(width, args.factor_channels) for width in widths]
        self.peers, self.paraphrasers = nn.ModuleList(), nn.ModuleList()
        for i, (tap, width) in enumerate(zip(taps, widths, strict=True)):
            others = [k for j, k in enumerate(factor_channels) if j != i and tap.layers]
            peer = Peer.of(tap, [width] * len(tap.layers), others, args, KNOWLEDGE["factors"])
            self.peers.append(peer.to(tap.model.dtype))
            if tap.layers:
                paraphraser = Paraphraser(
                    width, factor_channels[i], args.paraphraser_decoder, args.encoder_kernel_size
                )
                self.paraphrasers.append(paraphraser.to(tap.model.dtype))
