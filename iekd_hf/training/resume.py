"""Where a run goes on: which stage, from which checkpoint, with which paraphrasers."""

from dataclasses import dataclass
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint


# Trainer never uploads names that begin with an underscore: what is pushed is the plain student.
PARAPHRASER_FOLDER = "_paraphraser"
STAGE_1_FOLDER = "_stage_1"


@dataclass(frozen=True)
class ResumePoint:
    """Say where a run goes on."""

    checkpoint: str | None = None  # of stage 2
    stage_1_checkpoint: str | None = None  # where stage 1 is not over
    paraphrasers: Path | None = None  # folder of the finished ones


def find_resume_point(output_dir: str | Path, resume_from_checkpoint: str | bool | None) -> ResumePoint | None:
    """Find where a run goes on; only the disk is read."""
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is not True:
        named = Path(resume_from_checkpoint)
        if named.parent.name == STAGE_1_FOLDER:
            return ResumePoint(stage_1_checkpoint=str(resume_from_checkpoint))
        # A checkpoint from the Hub has them inside.
        inside, beside = named / PARAPHRASER_FOLDER, named.parent / PARAPHRASER_FOLDER
        return ResumePoint(str(resume_from_checkpoint), paraphrasers=inside if inside.is_dir() else beside)
    finished = Path(output_dir) / PARAPHRASER_FOLDER
    if checkpoint := _last_checkpoint(Path(output_dir)):
        return ResumePoint(checkpoint, paraphrasers=finished)
    if checkpoint := _last_checkpoint(Path(output_dir) / STAGE_1_FOLDER):
        return ResumePoint(stage_1_checkpoint=checkpoint)
    return ResumePoint(paraphrasers=finished) if finished.is_dir() else None


def _last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(folder) if folder.is_dir() else None
