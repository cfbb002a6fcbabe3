"""Where a run goes on: which stage, from which checkpoint, with which paraphrasers, and where in a stream."""

import json
import math
import uuid
from dataclasses import dataclass
from pathlib import Path

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length, sort_checkpoints
from transformers.utils import logging

from .manifest import find_checkpoint_damage, read_manifest, write_whole


logger = logging.get_logger(__name__)

# Trainer never uploads names that begin with an underscore: what is pushed is the plain student.
PARAPHRASER_FOLDER = "_paraphraser"
STAGE_1_FOLDER = "_stage_1"
# Names the run that an `output_dir` belongs to, so that a new run never goes on from an old one's checkpoint.
RUN_FILE = "_run.json"


@dataclass(frozen=True)
class ResumePoint:
    """Say where a run goes on; with nothing set, it was interrupted before there was anything to go on from."""

    checkpoint: str | None = None  # of stage 2
    stage_1_checkpoint: str | None = None  # where stage 1 is not over
    paraphrasers: Path | None = None  # folder of the finished ones


def find_resume_point(
    output_dir: str | Path, resume_from_checkpoint: "str | bool | ResumePoint | None"
) -> ResumePoint | None:
    """Find where a run goes on; only the disk is read. A point that was found before stays."""
    if isinstance(resume_from_checkpoint, ResumePoint) or not resume_from_checkpoint:
        return resume_from_checkpoint or None
    if resume_from_checkpoint is not True:
        named = Path(resume_from_checkpoint)
        if damage := find_checkpoint_damage(named):
            raise ValueError(
                f"Expected a whole checkpoint to resume from, got {str(named)!r}: {damage}. Check the path, copy "
                "it again, or go on from an earlier one (resume_from_checkpoint=True takes the newest whole one)."
            )
        if named.parent.name == STAGE_1_FOLDER:
            return ResumePoint(stage_1_checkpoint=str(resume_from_checkpoint))
        # A checkpoint from the Hub has them inside.
        inside, beside = named / PARAPHRASER_FOLDER, named.parent / PARAPHRASER_FOLDER
        above = named.parent.parent / PARAPHRASER_FOLDER  # of a search, whose trials have folders of their own
        found = next((folder for folder in (inside, beside, above) if folder.is_dir()), beside)
        return ResumePoint(str(resume_from_checkpoint), paraphrasers=found)
    finished = Path(output_dir) / PARAPHRASER_FOLDER
    if checkpoint := find_last_checkpoint(output_dir):
        return ResumePoint(checkpoint, paraphrasers=finished)
    # Stage 1 is over, even if its checkpoints have not all been removed.
    if finished.is_dir() and _is_of_run(finished, last_run(output_dir)):
        return ResumePoint(paraphrasers=finished)
    if checkpoint := find_last_checkpoint(Path(output_dir) / STAGE_1_FOLDER):
        return ResumePoint(stage_1_checkpoint=checkpoint)
    if last_run(output_dir) is not None:
        logger.warning(f"The run in {output_dir} was interrupted before its first checkpoint: it starts again.")
        return ResumePoint()
    return None


def check_ran_to_its_end(trainer: Trainer, what: str) -> None:
    """Stop where a signal has ended a training before its last step: nothing of it must be taken as finished."""
    state = trainer.state
    if trainer.args.enable_jit_checkpoint and state.global_step < state.max_steps:
        raise RuntimeError(
            f"Expected {what} to take {state.max_steps} steps, got a signal to end after {state.global_step}, where a "
            "checkpoint was written: go on with resume_from_checkpoint=True."
        )


def find_last_checkpoint(folder: str | Path) -> str | None:
    """Return the newest whole checkpoint of a folder's last run; log which newer ones are skipped."""
    run = last_run(folder)
    for checkpoint in reversed(sort_checkpoints(str(folder)) if Path(folder).is_dir() else []):
        damage = find_checkpoint_damage(checkpoint)
        if damage is None and not _is_of_run(checkpoint, run):
            damage = "it belongs to an earlier run in this folder; to resume from it, give its path"
        if damage is None:
            return checkpoint
        logger.warning(f"Skipping {checkpoint}: {damage}.")
    return None


def begin_run(output_dir: str | Path, point: ResumePoint | None) -> str:
    """Name the run that an `output_dir` belongs to from now on: a new one, or the one that goes on."""
    run = read_manifest(point.checkpoint).get("run") if point and point.checkpoint else None
    run = run or (last_run(output_dir) if point else None) or uuid.uuid4().hex
    if point is None or run != last_run(output_dir):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_whole(Path(output_dir, RUN_FILE), json.dumps({"run": run}))
    return run


def go_on_in_stream(args: TrainingArguments, of_epoch: dict) -> dict | None:
    """
    Correct what Trainer's `_run_epoch` is given for a pass over data without a length; `None` for a pass that is over.

    Trainer takes all steps for one pass, and would begin again from a checkpoint of a later one.
    """
    checkpoint, epoch = of_epoch["resume_from_checkpoint"], of_epoch["epoch"]
    if checkpoint is None or args.ignore_data_skip or has_length(of_epoch["train_dataloader"]):
        return of_epoch
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    passes = math.ceil(state.epoch) - 1  # its fraction is the steps of the pass, over max_steps
    if epoch != passes:
        return of_epoch if epoch > passes else None
    batches = round((state.epoch - passes) * state.max_steps) * args.gradient_accumulation_steps
    return {**of_epoch, "epochs_trained": epoch, "steps_trained_in_current_epoch": batches}


def _is_of_run(folder: str | Path, run: str | None) -> bool:
    return run is None or read_manifest(folder).get("run") == run


def last_run(output_dir: str | Path) -> str | None:
    """Return the name of the run that was last begun in a folder; none in folders of other programs."""
    try:
        return json.loads(Path(output_dir, RUN_FILE).read_text())["run"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"Expected the name of the run in {Path(output_dir, RUN_FILE)}, got a file that cannot be read "
            f"({type(error).__name__}: {error}): remove it to go on from the newest whole checkpoint in that folder."
        ) from error
