"""Stage 1: get a teacher's paraphrasers: check given ones, train them, or measure OD's margins."""

import gc
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, random_split
from transformers import Trainer, set_seed
from transformers.utils import logging

from ..arguments import STAGE_1_ARGUMENTS, IEKDTrainingArguments
from ..method.factors import Paraphraser
from ..method.knowledge import KNOWLEDGE, MarginReLU
from ..method.objective import is_on
from ..method.padding import zero_padding
from ..method.trainable import ParaphraserStack
from ..teacher.frozen import FrozenTeacher
from .checkpoints import load_paraphrasers, save_paraphrasers
from .data_checks import is_stream
from .paraphraser_trainer import ParaphraserTrainer
from .resume import PARAPHRASER_FOLDER, STAGE_1_FOLDER, ResumePoint, check_ran_to_its_end


logger = logging.get_logger(__name__)

MARGIN_BATCHES = 8


def get_paraphrasers(source, teacher_channels: list[int], args: IEKDTrainingArguments) -> list[nn.Module]:
    """Load paraphrasers and check that they fit the teacher and the arguments."""
    knowledge = KNOWLEDGE[args.knowledge]
    if not knowledge.is_kept:
        raise ValueError("Expected no paraphraser with knowledge='attention', got one: attention maps need none.")
    paraphrasers = load_paraphrasers(source, len(teacher_channels), knowledge.teacher_side)
    for paraphraser, channels in zip(paraphrasers, teacher_channels, strict=True):
        if paraphraser.in_channels != channels:
            raise ValueError(
                f"Expected a paraphraser for {channels} channels, the teacher's, got one for "
                f"{paraphraser.in_channels}: choose one of this teacher and layer, or pass None to train one."
            )
        if knowledge.is_trained and args.factor_channels not in (None, paraphraser.factor_channels):
            raise ValueError(
                f"Expected a paraphraser with factor_channels={args.factor_channels}, got one with "
                f"{paraphraser.factor_channels}: leave factor_channels at None, or pass another paraphraser."
            )
    return paraphrasers


def save_whole(trainer: Trainer, folder: Path) -> None:
    """Save the paraphrasers of an [`IEKDTrainer`] whole, as they were given or as stage 1 has kept them."""
    source = trainer.given_paraphrasers or str(Path(trainer.args.output_dir) / PARAPHRASER_FOLDER)
    save_paraphrasers(get_paraphrasers(source, trainer.teacher_channels, trainer.args), folder)


def run_stage_1(trainer: Trainer, point: ResumePoint | None) -> dict[str, float]:
    """Give an [`IEKDTrainer`] its paraphrasers, trained where its run has none; return the metrics of the training."""
    args, teacher, checkpoint = trainer.args, trainer.teacher, point.stage_1_checkpoint if point else None
    if not is_on(args.lambda_inh) and not is_on(args.lambda_exp):
        return {}  # no factor is compared: plain logit distillation needs no paraphraser
    if not trainer.knowledge.is_kept:
        teacher.set_paraphrasers([trainer.knowledge.teacher_side() for _ in trainer.teacher_channels])
        return {}
    widths = list(zip(trainer.teacher_channels, trainer.factor_channels(), strict=True))
    settings = stage_1_settings(widths, args)
    if trainer.given_paraphrasers is not None or (settings == trainer.stage_1_settings and not checkpoint):
        return {}
    finished, unfinished = (Path(args.output_dir) / name for name in (PARAPHRASER_FOLDER, STAGE_1_FOLDER))
    kept = point.paraphrasers if point else None
    if kept:
        paraphrasers, metrics = get_paraphrasers(str(kept), trainer.teacher_channels, args), {}
    else:
        if not checkpoint and trainer.is_world_process_zero():
            remove_checkpoints(unfinished)
            shutil.rmtree(finished, ignore_errors=True)
        paraphrasers, metrics = make_paraphrasers(trainer, widths, unfinished, checkpoint)
        trainer.stage_1_settings = settings
    teacher.set_paraphrasers(paraphrasers)
    # Those of a checkpoint that lies elsewhere, too: a push, or a run that goes on again, reads them here.
    if args.should_save and not (kept and kept.resolve() == finished.resolve()):
        save_paraphrasers(paraphrasers, finished, trainer.run)
        remove_checkpoints(unfinished)
    trainer.accelerator.wait_for_everyone()
    return metrics


def make_paraphrasers(
    trainer: Trainer, widths: list[tuple[int, int]], folder: Path, checkpoint: str | None
) -> tuple[list[nn.Module], dict[str, float]]:
    """Train the paraphrasers of an [`IEKDTrainer`] in a folder, or measure its margins, by what it compares."""
    teacher = trainer.teacher
    if trainer.knowledge.is_trained:
        train_dataset, held_out = split_images(trainer.train_dataset, trainer.eval_dataset, trainer.args.seed)
        paraphrasers, metrics = train_paraphrasers(
            *(teacher, widths, trainer.args, folder, checkpoint),
            train_dataset=train_dataset,
            held_out=held_out,
            columns=trainer.batch_columns(),
            data_collator=trainer.data_collator,
            augmentation=trainer.augmentation,
        )
        gc.collect()  # its optimizer and DDP's buckets, which are in cycles and as large as the paraphrasers
        known = {"teacher": trainer.teacher_summary.source, **(metrics if len(paraphrasers) == 1 else {})}
        for paraphraser, layer in zip(paraphrasers, teacher.tap.layers, strict=True):
            paraphraser.facts = {"layer": layer, **known}
    else:
        with trainer.accelerator.autocast():
            batches = trainer.some_batches(MARGIN_BATCHES)
            paraphrasers, metrics = measure_margins(teacher, [channels for channels, _ in widths], batches)
        for margin_relu in paraphrasers:
            trainer.sync_buffers(margin_relu)
    return paraphrasers, metrics


def train_paraphrasers(
    teacher: FrozenTeacher,
    widths: list[tuple[int, int]],
    args: IEKDTrainingArguments,
    output_dir: Path,
    checkpoint: str | None,
    **images,
) -> tuple[list[Paraphraser], dict[str, float]]:
    """Train a paraphraser for each map of the teacher."""
    set_seed(args.seed)  # the same paraphrasers whatever was built before them
    paraphrasers = [Paraphraser(c, k, args.paraphraser_decoder, args.encoder_kernel_size) for c, k in widths]
    trainer = ParaphraserTrainer(ParaphraserStack(paraphrasers), teacher, args, output_dir=str(output_dir), **images)
    steps, epochs = trainer.args.max_steps, trainer.args.num_train_epochs
    length = f"{steps:,} steps" if steps > 0 else f"{epochs:g} epochs"
    logger.info(f"Stage 1: training the paraphraser, {length}.")
    output = trainer.train(ResumePoint(checkpoint) if checkpoint else None)
    check_ran_to_its_end(trainer, "stage 1")
    # MLflow's callback ends whatever run is active when it is collected: let that be now, not in stage 2.
    trainer.callback_handler.callbacks.clear()
    return paraphrasers, {"train_runtime": output.metrics["train_runtime"], **trainer.reported}


def measure_margins(
    teacher: FrozenTeacher, teacher_channels: list[int], batches: Iterable[dict]
) -> tuple[list[MarginReLU], dict[str, float]]:
    """Measure the margins of OD on some batches; there is nothing to train."""
    start = time.monotonic()
    maps = [maps_without_padding(teacher, inputs) for inputs in batches]
    margins = [MarginReLU(channels) for channels in teacher_channels]
    for margin_relu, of_layer in zip(margins, zip(*maps, strict=True), strict=True):
        margin_relu.to(of_layer[0].device).measure(of_layer)
    return margins, {"train_runtime": round(time.monotonic() - start, 4)}


def maps_without_padding(teacher: FrozenTeacher, inputs: dict) -> list[torch.Tensor]:
    """Return the teacher's maps with zeros for the padding, which no margin is measured on."""
    return [zero_padding(f_T, inputs.get("pixel_mask")) for f_T in teacher.feature_maps(inputs)[0]]


def split_images(train_dataset: Dataset, eval_dataset, seed: int) -> tuple[Dataset, Dataset | None]:
    """Return images to train on and to report on: the evaluation set, or a twentieth of the training set."""
    held_out = next(iter(eval_dataset.values())) if isinstance(eval_dataset, dict) else eval_dataset
    if held_out is None and not is_stream(train_dataset) and len(train_dataset) > 1:
        num_held_out = max(len(train_dataset) // 20, 1)
        sizes = [len(train_dataset) - num_held_out, num_held_out]
        train_dataset, held_out = random_split(train_dataset, sizes, generator=torch.Generator().manual_seed(seed))
    return train_dataset, held_out


def stage_1_settings(widths: list[tuple[int, int]], args: IEKDTrainingArguments) -> tuple:
    """Return what the paraphrasers depend on; a hyperparameter search may change it between two runs."""
    names = (*sorted(STAGE_1_ARGUMENTS), "encoder_kernel_size", "max_steps", "seed", "bf16", "fp16")
    names += ("per_device_train_batch_size", "gradient_accumulation_steps")
    return tuple(widths), *(getattr(args, name) for name in names)


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a stage 1 that is over; what trackers have written there stays."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
