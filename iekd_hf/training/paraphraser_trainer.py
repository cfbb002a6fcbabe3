"""Stage 1: train the paraphrasers on the frozen teacher's maps, by their reconstruction error alone."""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.utils import logging

from ..arguments import PARAPHRASER_SGD, IEKDTrainingArguments
from ..method.losses import reconstruction_loss
from ..method.padding import mask_at
from ..method.trainable import ParaphraserStack
from ..teacher.frozen import FrozenTeacher
from .base_trainer import DistillationTrainer
from .data_checks import fills_no_batch, is_stream, leaves_one


logger = logging.get_logger(__name__)

_MEAN_MAP_IMAGES = 1024


class ParaphraserTrainer(DistillationTrainer):
    r"""
    Train paraphrasers with \(L_{rec} = \|f_T - R(f_T)\|\) (section 3.1 of the paper; stage 1 of [`IEKDTrainer`]).

    SGD with Nesterov momentum 0.9 and weight decay 5e-4, as both papers have it; the learning rate falls along a
    cosine.
    """

    log_prefix = "paraphraser/"

    def __init__(
        self,
        paraphrasers: ParaphraserStack,
        teacher: FrozenTeacher,
        args: IEKDTrainingArguments,
        output_dir: str,
        train_dataset: Dataset,
        held_out: Dataset | None,
        data_collator,
        augmentation: nn.Module | None,
        columns: list[str] | None = None,
    ):
        self._columns = columns
        super().__init__(
            model=paraphrasers,
            args=_stage_1_arguments(args, output_dir, train_dataset),
            train_dataset=train_dataset,
            eval_dataset=held_out,
            data_collator=data_collator,
            augmentation=augmentation,
            optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": args.paraphraser_learning_rate, **PARAPHRASER_SGD}),
        )
        self.teacher = teacher
        self.reported: dict[str, float] = {}
        # First of all, while trackers still listen.
        self.callback_handler.callbacks.insert(0, _ReportAtTheEnd(self))

    def _set_signature_columns_if_needed(self):
        # The batches are those of stage 2, whatever the teacher's forward takes; the paraphrasers' takes feature maps.
        self._signature_columns = self._columns

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return L_rec, averaged over the layers."""
        with self.accelerator.autocast():
            feature_maps, _ = self.teacher.feature_maps(inputs)
        loss = self._reconstruction(model(feature_maps), feature_maps, inputs.get("pixel_mask"))
        self.components.record({"reconstruction_loss": loss}, self.state.global_step + 1)
        return loss

    def _reconstruction(
        self, reconstructions: list[torch.Tensor], feature_maps: list[torch.Tensor], pixel_mask: torch.Tensor | None
    ) -> torch.Tensor:
        losses = []
        for r, f_T in zip(reconstructions, feature_maps, strict=True):
            mask = mask_at(pixel_mask, f_T.shape[2:])
            losses.append(reconstruction_loss(r, f_T, self.args.reconstruction_distance, mask))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """
        Compare the reconstruction error on held-out images with that of the trivial predictor.

        That predictor is the mean map of the first training images.
        """
        if self.eval_dataset is None:
            logger.warning("No held-out images: the paraphraser's reconstruction error is not reported.")
            return {}
        self.model.eval()
        mean_maps, count = None, 0
        for feature_maps, pixel_mask in self._maps_of(self.train_dataset):
            sums = [summed(f_T.float(), pixel_mask) for f_T in feature_maps]
            mean_maps = (
                sums if mean_maps is None else [m + _resize(s, m) for m, s in zip(mean_maps, sums, strict=True)]
            )
            count += len(feature_maps[0])
            if count >= _MEAN_MAP_IMAGES:
                break
        mean_maps = [m / count for m in mean_maps]
        count = 0
        losses = torch.zeros(2, device=self.args.device)
        for feature_maps, pixel_mask in self._maps_of(self.eval_dataset):
            count += len(feature_maps[0])
            with self.accelerator.autocast():
                reconstructions = self.model(feature_maps)
            trivial = [_resize(m, f_T).expand_as(f_T) for m, f_T in zip(mean_maps, feature_maps, strict=True)]
            for index, prediction in enumerate((reconstructions, trivial)):
                losses[index] += self._reconstruction(prediction, feature_maps, pixel_mask) * len(feature_maps[0])
        ours, trivial = (losses / count).tolist()
        self.log({"held_out_reconstruction_loss": ours, "held_out_mean_map_loss": trivial})
        if not ours < trivial:
            warnings.warn(
                "The paraphraser has not beaten the trivial predictor on held-out images: reconstruction error "
                f"{ours:.4g} against {trivial:.4g} of the mean map. Its factors say little about the teacher: train "
                "it longer (paraphraser_epochs or paraphraser_max_steps), raise factor_channels, or change "
                "paraphraser_learning_rate.",
                UserWarning,
                stacklevel=3,  # not the decorator's frame
            )
        return {"reconstruction_loss": ours, "mean_map_loss": trivial}

    def _maps_of(self, dataset: Dataset):
        # The plain loader of this rank: every rank sees the same images, so all report (and warn) alike.
        loader = torch.utils.data.DataLoader(
            self.columns_in_use(dataset),
            batch_size=self.args.eval_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
        )
        for inputs in map(self._prepare_inputs, loader):
            with self.accelerator.autocast():
                feature_maps, _ = self.teacher.feature_maps(inputs)
            yield feature_maps, inputs.get("pixel_mask")


class _ReportAtTheEnd(TrainerCallback):
    def __init__(self, trainer: ParaphraserTrainer):
        self.trainer = trainer

    def on_train_end(self, args, state, control, **kwargs):
        """Let every rank have the BatchNorm statistics of rank 0, and report."""
        self.trainer.sync_buffers(self.trainer.model)
        self.trainer.reported = self.trainer.report()


def summed(feature_map: torch.Tensor, pixel_mask: torch.Tensor | None) -> torch.Tensor:
    """Sum maps over a batch; a padded position counts as the mean of the others."""
    if pixel_mask is None:
        return feature_map.sum(dim=0)
    mask = mask_at(pixel_mask, feature_map.shape[2:])[:, None]
    total = feature_map.masked_fill(~mask, 0.0).sum(dim=0)
    return total * (len(mask) / mask.sum(dim=0).clamp_min(1))


def _resize(feature_map: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Bring a map to another's height and width: images to report on may be larger than those to train on."""
    return F.adaptive_avg_pool2d(feature_map, like.shape[-2:])


def _stage_1_arguments(args: IEKDTrainingArguments, output_dir: str, train_dataset) -> IEKDTrainingArguments:
    """Copy the arguments and set what stage 1 does in its own way: no evaluation, no best model, no push."""
    args = copy.copy(args)
    args.output_dir = output_dir
    has_no_end = is_stream(train_dataset) and not hasattr(train_dataset, "__len__")
    args.max_steps = args.max_steps if has_no_end else -1
    args.max_steps, args.num_train_epochs = args.paraphraser_max_steps or args.max_steps, args.paraphraser_epochs
    if fills_no_batch(train_dataset, args):
        args.dataloader_drop_last = False  # where images are held out, those that are left may fill no batch
    if leaves_one(train_dataset, args):  # BatchNorm of a 1x1 map fails on a last batch of one image
        args.dataloader_drop_last = True
    args.learning_rate, args.weight_decay = args.paraphraser_learning_rate, PARAPHRASER_SGD["weight_decay"]
    args.lr_scheduler_type, args.lr_scheduler_kwargs, args.warmup_steps = "cosine", {}, 0
    args.eval_strategy, args.eval_on_start, args.load_best_model_at_end = "no", False, False
    args.metric_for_best_model, args.greater_is_better = None, None
    args.save_strategy = "epoch" if args.save_strategy == "best" else args.save_strategy
    args.save_total_limit, args.save_only_model = 1, False
    args.push_to_hub, args.activation_checkpointing, args.gradient_checkpointing = False, False, False
    args.label_names, args.label_smoothing_factor, args.neftune_noise_alpha = [], 0.0, None
    args.ddp_find_unused_parameters, args.layer_decay = False, None
    return args
