"""Bring about a run's paraphrasers: given, finished earlier, resumed, or trained from nothing."""

import shutil
import time
from pathlib import Path

import torch
from torch.utils.data import random_split
from transformers import Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..method.factors import Paraphraser
from ..method.knowledge import AttentionMap, MarginReLU, kept_as, width_of
from ..method.padding import zero_padding
from ..method.trainable import ParaphraserStack
from ..teacher.frozen import FrozenTeacher
from .checkpoints import check_made_by, load_paraphrasers, save_paraphrasers
from .paraphraser_trainer import ParaphraserTrainer


logger = logging.get_logger(__name__)

# Trainer never uploads names that begin with an underscore: what is pushed is the plain student.
PARAPHRASER_FOLDER = "_paraphraser"
STAGE_1_FOLDER = "_stage_1"
_MARGIN_BATCHES = 8


class ParaphraserStage:
    """
    Run stage 1 of a trainer that has a `teacher`, once.

    Args:
        trainer (`Trainer`):
            The trainer of stage 2.
        teacher_channels (`list[int]`):
            Channels of the teacher's maps.
        given (`Paraphraser`, `list[Paraphraser]` or `str`, *optional*):
            Trained paraphrasers, or where they are. `None`: `run` trains them.

    Raises:
        `ValueError`: given paraphrasers that do not fit the teacher.
    """

    def __init__(self, trainer: Trainer, teacher_channels: list[int], given):
        self.trainer = trainer
        self.teacher_channels = teacher_channels
        self.given = given is not None
        self._trained_with: tuple | None = None
        self.kind = kept_as(trainer.args.knowledge)
        if self.given and self.kind is None:
            raise ValueError(
                "Expected no paraphraser with knowledge='attention', got one: maps of attention need none."
            )
        if self.given:
            self._take(load_paraphrasers(given, len(teacher_channels), self.kind))

    def factor_channels(self) -> list[int]:
        """Return the channels of what is compared in each pair; for factors the given paraphraser says which."""
        if self.given:
            return [paraphraser.factor_channels for paraphraser in self.trainer.teacher.paraphrasers]
        args = self.trainer.args
        return [width_of(args.knowledge, channels, args.factor_channels) for channels in self.teacher_channels]

    def run(self, resume_from_checkpoint: str | bool | None) -> tuple[str | None, dict[str, float]]:
        """
        Bring the paraphrasers about.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As `IEKDTrainer.train` takes it.

        Returns:
            `tuple`: the checkpoint of stage 2 to resume from, if any, and the metrics of this stage, if it has run.
        """
        output_dir = Path(self.trainer.args.output_dir)
        finished, unfinished = output_dir / PARAPHRASER_FOLDER, output_dir / STAGE_1_FOLDER
        checkpoint = None
        if resume_from_checkpoint is True:
            if not has_begun(output_dir):
                raise ValueError(
                    f"Expected a checkpoint to resume from in output_dir={str(output_dir)!r}, got none: train without "
                    "resume_from_checkpoint, or name the run's output_dir."
                )
            resume_from_checkpoint = _last_checkpoint(output_dir)
            checkpoint = None if resume_from_checkpoint else _last_checkpoint(unfinished)
            resuming = True
        else:
            resuming = bool(resume_from_checkpoint)
            resume_from_checkpoint = resume_from_checkpoint or None
            if resuming and Path(resume_from_checkpoint).parent.name == STAGE_1_FOLDER:
                resume_from_checkpoint, checkpoint = None, resume_from_checkpoint
            elif resuming:
                # Beside the checkpoint or, in one from the Hub, inside of it.
                inside = Path(resume_from_checkpoint) / PARAPHRASER_FOLDER
                finished = inside if inside.is_dir() else Path(resume_from_checkpoint).parent / PARAPHRASER_FOLDER

        if resume_from_checkpoint:
            check_made_by(resume_from_checkpoint, type(self.trainer).__name__)
        settings, args = self._settings(), self.trainer.args
        if args.lambda_inh == 0 and args.lambda_exp == 0:
            return resume_from_checkpoint, {}  # no factor is compared: plain logit distillation needs no paraphraser
        if self.kind is None:
            self.trainer.teacher.set_paraphrasers([AttentionMap() for _ in self.teacher_channels])
            return resume_from_checkpoint, {}
        if self.given or (settings == self._trained_with and checkpoint is None):
            return resume_from_checkpoint, {}
        if resuming and checkpoint is None:
            self._take(load_paraphrasers(str(finished), len(self.teacher_channels), self.kind))
            return resume_from_checkpoint, {}
        if not resuming and self.trainer.is_world_process_zero():
            _remove_checkpoints(unfinished)
            shutil.rmtree(finished, ignore_errors=True)
        metrics = self._train(unfinished, checkpoint)
        self._trained_with = settings
        if self.trainer.args.should_save:
            save_paraphrasers(self.trainer.teacher.paraphrasers, finished)
            _remove_checkpoints(unfinished)
        self.trainer.accelerator.wait_for_everyone()
        return resume_from_checkpoint, metrics

    def _settings(self) -> tuple:
        """Return what the paraphrasers depend on; a hyperparameter search may change it between two runs."""
        args = self.trainer.args
        distance, epochs, rate = args.reconstruction_distance, args.paraphraser_epochs, args.paraphraser_learning_rate
        return tuple(self.factor_channels()), args.paraphraser_decoder, distance, epochs, rate

    def _train(self, output_dir: Path, checkpoint: str | None) -> dict[str, float]:
        args = self.trainer.args
        set_seed(args.seed)  # the same paraphrasers whatever was built before them
        if self.kind is MarginReLU:
            return self._measure()
        widths = zip(self.teacher_channels, self.factor_channels(), strict=True)
        paraphrasers = [Paraphraser(c, k, decoder=args.paraphraser_decoder) for c, k in widths]
        train_dataset, held_out = self._data()
        stage_1 = ParaphraserTrainer(
            ParaphraserStack(paraphrasers),
            self.trainer.teacher,
            args,
            output_dir=str(output_dir),
            train_dataset=train_dataset,
            held_out=held_out,
            data_collator=self.trainer.data_collator,
            augmentation=self.trainer.augmentation,
        )
        logger.info(f"Stage 1: training the paraphraser, {args.paraphraser_epochs:g} epochs.")
        output = stage_1.train(resume_from_checkpoint=checkpoint)
        report = stage_1.reported
        # MLflow's callback ends whatever run is active when it is collected: let that be now, not in stage 2.
        stage_1.callback_handler.callbacks.clear()
        self.trainer.teacher.set_paraphrasers(paraphrasers)
        known = {"teacher": self.trainer.teacher_row.source, **(report if len(paraphrasers) == 1 else {})}
        for paraphraser, layer in zip(paraphrasers, self.trainer.teacher.tap.layers, strict=True):
            paraphraser.facts = {"layer": layer, **known}
        return {"train_runtime": output.metrics["train_runtime"], **report}

    def _measure(self) -> dict[str, float]:
        """Let the margins of OD be measured on the first batches, instead of a training."""
        trainer, start = self.trainer, time.monotonic()
        with trainer.accelerator.autocast():
            maps = [maps_without_padding(trainer.teacher, inputs) for inputs in trainer.some_batches(_MARGIN_BATCHES)]
        margins = [MarginReLU(channels).to(trainer.args.device) for channels in self.teacher_channels]
        for margin_relu, of_layer in zip(margins, zip(*maps, strict=True), strict=True):
            margin_relu.measure(of_layer)
            trainer.sync_buffers(margin_relu)
        trainer.teacher.set_paraphrasers(margins)
        return {"train_runtime": round(time.monotonic() - start, 4)}

    def _data(self) -> tuple:
        """Return images to train on and to report on: the evaluation set, or a twentieth of the training set."""
        train_dataset, held_out = self.trainer.train_dataset, self.trainer.eval_dataset
        if isinstance(held_out, dict):
            held_out = next(iter(held_out.values()))
        if held_out is None and hasattr(train_dataset, "__len__") and len(train_dataset) > 1:
            num_held_out = max(len(train_dataset) // 20, 1)
            sizes = [len(train_dataset) - num_held_out, num_held_out]
            generator = torch.Generator().manual_seed(self.trainer.args.seed)
            train_dataset, held_out = random_split(train_dataset, sizes, generator=generator)
        return train_dataset, held_out

    def _take(self, paraphrasers: list[Paraphraser]) -> None:
        """Give the teacher paraphrasers that were made elsewhere, after a look at whether they fit."""
        args = self.trainer.args
        for paraphraser, channels in zip(paraphrasers, self.teacher_channels, strict=True):
            if paraphraser.in_channels != channels:
                raise ValueError(
                    f"Expected a paraphraser for {channels} channels, the teacher's, got one for "
                    f"{paraphraser.in_channels}: choose one of this teacher and layer, or pass None to train one."
                )
            if self.kind is Paraphraser and args.factor_channels not in (None, paraphraser.factor_channels):
                raise ValueError(
                    f"Expected a paraphraser with factor_channels={args.factor_channels}, got one with "
                    f"{paraphraser.factor_channels}: leave factor_channels at None, or pass another paraphraser."
                )
        self.trainer.teacher.set_paraphrasers([paraphraser.to(args.device) for paraphraser in paraphrasers])


def maps_without_padding(teacher: FrozenTeacher, inputs: dict) -> list[torch.Tensor]:
    """Return the teacher's maps with the padding at zero, which no margin is measured on."""
    maps, pixel_mask = teacher.feature_maps(inputs)[0], inputs.get("pixel_mask")
    return [zero_padding(f_T, pixel_mask) for f_T in maps]


def has_begun(output_dir: str | Path) -> bool:
    """
    Tell whether there is something that a run can continue: a checkpoint of either stage, or a finished paraphraser.

    Args:
        output_dir (`str` or `Path`):
            The run's folder, which need not exist.

    Example:

    ```python
    >>> from iekd_hf.training.paraphraser_stage import has_begun
    >>> has_begun("no/such/folder")
    False

    ```
    """
    folder = Path(output_dir)
    of_either_stage = _last_checkpoint(folder) or _last_checkpoint(folder / STAGE_1_FOLDER)
    return of_either_stage is not None or (folder / PARAPHRASER_FOLDER).is_dir()


def _last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(folder) if folder.is_dir() else None


def _remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a stage 1 that is over; what trackers have written there stays."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
