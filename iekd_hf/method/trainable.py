"""What trains, each in one `forward`: students and peers with their encoders, and paraphrasers."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..features.tap import FeatureTap
from .factors import ChannelSplit, Paraphraser
from .knowledge import encoder_of


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
            used = self.inheritance_encoders or self.exploration_encoders
            if used and torch.is_grad_enabled() and not f_S.requires_grad:
                raise ValueError(
                    f"Expected the student's feature map at {name!r} to carry a gradient, got one without: gradient "
                    'checkpointing is reentrant (set gradient_checkpointing_kwargs={"use_reentrant": False}), or its '
                    "layers were frozen since; no feature loss would reach the student."
                )
        halves = [split(f_S) for split, f_S in zip(self.splits, feature_maps, strict=True)]
        factors_inh = [encode(f_inh) for encode, (f_inh, _) in zip(self.inheritance_encoders, halves, strict=False)]
        factors_exp = [encode(f_exp) for encode, (_, f_exp) in zip(self.exploration_encoders, halves, strict=False)]
        return factors_inh, factors_exp


def check_trainable(tap: FeatureTap, inputs: dict) -> None:
    """
    Refuse a map that no feature loss can change; one of which a part is frozen is fine.

    Args:
        tap (`FeatureTap`):
            Where the maps of a model that is to learn are taken.
        inputs (`dict`):
            A batch.

    Raises:
        `ValueError`: nothing that trains before a map, as in a DETR, whose backbone Transformers builds frozen.
    """
    if tap.layers and (frozen := tap.frozen_layers(inputs)):
        raise ValueError(
            f"Expected the student's feature map at {frozen[0]!r} to carry a gradient, got one without: all "
            f"parameters of {type(tap.model).__name__} before it are frozen, as Transformers builds a ResNet in "
            "DETR and its kin. Call requires_grad_(True) on the student, or on its backbone, or name a layer that "
            "trains; no feature loss would reach the student."
        )


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
