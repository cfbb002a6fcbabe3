"""Streams: tar files as they come, whatever they hold; each rank its own samples; a run goes on at the right one."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_images, same
from transformers import TrainerCallback

from iekd_hf.training.paraphraser_trainer import ParaphraserTrainer


IMAGES, BATCH = 24, 4


def make_tars(folder: Path, count: int = IMAGES, num_tars: int = 2) -> str:
    """Write tar files as WebDataset has them: a picture and a class of the same name."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    for i in range(num_tars):
        with tarfile.open(folder / f"{i}.tar", "w") as tar:
            for number in range(i, count, num_tars):
                picture = io.BytesIO()
                PIL.Image.fromarray(pixels[number]).save(picture, "png")
                for ending, content in (("png", picture.getvalue()), ("cls", str(number % 3).encode())):
                    entry = tarfile.TarInfo(f"{number:06d}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return str(folder / "*.tar")


def read_row(row: dict) -> dict:
    pixels = torch.from_numpy(np.array(row["png"])).permute(2, 0, 1)
    return {"pixel_values": pixels.float() / 255, "labels": int(row["cls"])}


def read_tars(files: str, cache_dir: Path, shuffled: bool = True) -> datasets.IterableDataset:
    given = {"data_files": {"train": files}, "split": "train", "streaming": True, "cache_dir": str(cache_dir)}
    stream = datasets.load_dataset("webdataset", **given).map(read_row)
    return stream.shuffle(seed=0, buffer_size=8) if shuffled else stream


class StopAt(TrainerCallback):
    """End stage 2 early, with a checkpoint."""

    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and not args.output_dir.endswith("_stage_1"):
            control.should_save = control.should_training_stop = True


def note_pixels(trainer) -> list[torch.Tensor]:
    """Keep the pixels of each batch that a trainer trains on."""
    seen, step = [], trainer.training_step

    def seen_step(model, inputs, *args):
        seen.append(inputs["pixel_values"].clone())
        return step(model, inputs, *args)

    trainer.training_step = seen_step
    return seen


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("tars")
    return make_tars(folder), folder / "cache"


@pytest.fixture
def make_streamed(make_trainer, tars):
    def make(out: Path, stop: int | None = None, **kwargs):
        defaults = {"max_steps": 10, "paraphraser_max_steps": 3, "save_strategy": "steps", "save_steps": 1000}
        defaults |= {"per_device_train_batch_size": BATCH, "output_dir": str(out), "callbacks": [StopAt(stop)]}
        trainer = make_trainer(train_dataset=read_tars(*tars), **(defaults | kwargs))
        return trainer, note_pixels(trainer)

    return make


# Six batches a pass: in the first, at its end, in the second.
@pytest.mark.parametrize(
    ("settings", "stop"),
    [
        *[({}, stop) for stop in (3, 6, 8)],
        *[pytest.param({"dataloader_num_workers": 2}, stop, marks=pytest.mark.slow) for stop in (3, 8)],
        *[pytest.param({"gradient_accumulation_steps": 2}, stop, marks=pytest.mark.slow) for stop in (2, 4)],
    ],
)
def test_a_stream_goes_on_at_the_right_sample(make_streamed, tmp_path, settings, stop):
    unbroken, seen = make_streamed(tmp_path / "unbroken", **settings)
    unbroken.train()
    broken, before = make_streamed(tmp_path / "broken", stop, **settings)
    broken.train()
    resumed, after = make_streamed(tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(torch.cat(seen), torch.cat([*before, *after]))
    assert resumed.state.epoch == unbroken.state.epoch
    assert same(resumed.student_side.state_dict(), unbroken.student_side.state_dict())


def test_a_stream_goes_on_beyond_its_last_checkpoint(make_streamed, tmp_path):
    unbroken, seen = make_streamed(tmp_path / "unbroken", max_steps=5)
    unbroken.train()
    shorter, before = make_streamed(tmp_path / "longer", max_steps=3, save_steps=3)
    shorter.train()
    longer, after = make_streamed(tmp_path / "longer", max_steps=5)
    longer.train(resume_from_checkpoint=True)
    assert torch.equal(torch.cat(seen), torch.cat([*before, *after]))


def test_stage_1_of_a_stream_reports_on_the_evaluation_set(make_streamed, tars, tmp_path):
    for name, held_out in (("list", make_images(8)), ("stream", read_tars(*tars, shuffled=False))):
        trainer, _ = make_streamed(tmp_path / name, eval_dataset=held_out, max_steps=2)
        metrics = trainer.train().metrics
        assert metrics["paraphraser_reconstruction_loss"] > 0 and metrics["paraphraser_mean_map_loss"] > 0
    trainer, _ = make_streamed(tmp_path / "none", max_steps=2)
    assert "paraphraser_reconstruction_loss" not in trainer.train().metrics


def test_stage_1_goes_on_in_the_second_pass(make_streamed, tmp_path, monkeypatch):
    settings = {"paraphraser_max_steps": 10, "max_steps": 1, "save_steps": 8}
    unbroken, _ = make_streamed(tmp_path / "unbroken", **settings)
    unbroken.train()
    compute_loss = ParaphraserTrainer.compute_loss

    def until_step_9(self, *args, **kwargs):
        if self.state.global_step == 9:
            raise InterruptedError
        return compute_loss(self, *args, **kwargs)

    broken, _ = make_streamed(tmp_path / "broken", **settings)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(ParaphraserTrainer, "compute_loss", until_step_9)
        broken.train()
    resumed, _ = make_streamed(tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed.teacher.paraphrasers.state_dict(), unbroken.teacher.paraphrasers.state_dict())
