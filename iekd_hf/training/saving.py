"""Write checkpoints and models beside their place, and move them there when they are whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .manifest import write_manifest
from .resume import find_last_checkpoint


logger = logging.get_logger(__name__)

# Where a checkpoint or a model is while it is being written; Trainer never uploads such names.
SAVING_FOLDER = "_saving"


@contextmanager
def checkpoint_written_whole(
    checkpoint: Path, args: TrainingArguments, accelerator: Accelerator, state: TrainerState, **facts: str
) -> Iterator[Path]:
    """Give all ranks a folder to write a checkpoint into; the rank that saves then moves it to its place."""
    saving, best_before = checkpoint.parent / SAVING_FOLDER, state.best_model_checkpoint
    clears = args.local_process_index == 0
    if clears:
        shutil.rmtree(saving, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        yield saving
        if state.best_model_checkpoint == str(saving / checkpoint.name):
            state.best_model_checkpoint = str(checkpoint)  # on all ranks, which load it at the end
            if args.should_save:
                state.save_to_json(str(saving / checkpoint.name / TRAINER_STATE_NAME))
        accelerator.wait_for_everyone()  # each rank has written its random state
        if args.should_save:
            write_manifest(saving / checkpoint.name, **facts)
            shutil.rmtree(checkpoint, ignore_errors=True)
            (saving / checkpoint.name).rename(checkpoint)
        accelerator.wait_for_everyone()  # nodes may share the folder, which is cleared by one rank of each
    except BaseException:
        state.best_model_checkpoint = best_before  # this one is not there
        raise
    finally:
        if clears:
            shutil.rmtree(saving, ignore_errors=True)


def find_best(state: TrainerState, run_dir: Path) -> None:
    """Find the best checkpoint of a run whose folder was moved; Trainer looks for it where one is being written."""
    best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    if state.best_model_checkpoint is None and state.best_global_step and best.is_dir():
        state.best_model_checkpoint = str(best)


@contextmanager
def files_written_whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write files into, which then replace those of `folder`, each in one piece, weights last."""
    saving = folder / SAVING_FOLDER
    shutil.rmtree(saving, ignore_errors=True)
    yield saving
    files = sorted((path for path in saving.rglob("*") if path.is_file()), key=lambda p: p.suffix == ".safetensors")
    for path in files:
        place = folder / path.relative_to(saving)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    shutil.rmtree(saving)


def tell_failed_save(checkpoint: Path, error: Exception, world_size: int) -> None:
    """Log that a disk could not take a checkpoint, or raise it where other ranks wait; raise all other errors."""
    of_torch = any(words in str(error) for words in ("PytorchStreamWriter", "unexpected pos"))
    if not of_torch and not isinstance(error, (OSError, SafetensorError)):
        raise error
    last = find_last_checkpoint(checkpoint.parent)
    message = (
        f"Expected to write {checkpoint}, got {type(error).__name__}: {error}. "
        + (f"{Path(last).name} is the last whole checkpoint. " if last else "There is no other checkpoint. ")
        + "Make room on that disk, or lower save_total_limit."
    )
    if world_size > 1:
        raise OSError(message) from error
    logger.error(f"{message} Training goes on.")
