"""A run that is killed before any of its file operations goes on by itself, to the same bits."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_images, make_resnet
from safetensors.torch import load_file
from test_whole_batches import make_augmentation, make_decoded

from iekd_hf import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    IEKDTrainer,
    IEKDTrainingArguments,
    MutualTrainer,
    MutualTrainingArguments,
)
from iekd_hf.commands import detect, distill, segment
from iekd_hf.commands import mutual as mutual_command
from iekd_hf.training.resume import RUN_FILE
from iekd_hf.training.saving import SAVING_FOLDER


COMMON = {
    "max_steps": 6,
    "save_steps": 2,
    "save_strategy": "steps",
    "save_total_limit": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 3,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")


class Snapshots:
    """Copy a folder before each operation that changes it, once for each state that it is in."""

    def __init__(self, folder: Path, to: Path):
        self.folder, self.to, self.active, self.seen = folder, to, True, {}
        sys.addaudithook(self)  # a hook cannot be removed

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.active or event not in EVENTS:
            return
        writes = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(arguments[0], (str, os.PathLike)) and str(self.folder) in str(arguments[0]):
            self.active = False  # the copy has operations of its own
            self.take()
            self.active = True

    def take(self) -> None:
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            if SAVING_FOLDER in path.parts:  # removed unread: what is in it makes no other state
                continue
            digest.update(str(path.relative_to(self.folder)).encode())
            digest.update(path.read_bytes() if path.is_file() else b"")
        if digest.hexdigest() not in self.seen and self.folder.is_dir():
            self.seen[digest.hexdigest()] = self.to / str(len(self.seen))
            shutil.copytree(self.folder, self.seen[digest.hexdigest()] / "out")


def live(folder: Path) -> IEKDTrainer:
    args = IEKDTrainingArguments(str(folder / "out"), **COMMON, paraphraser_epochs=1)
    return IEKDTrainer(make_resnet(8, seed=1), make_resnet(16, seed=2), args, train_dataset=make_images())


def cached(folder: Path) -> IEKDTrainer:
    args = IEKDTrainingArguments(
        str(folder / "out"), **COMMON, paraphraser_epochs=1, cache_teacher=True, cache_views=2, lambda_kd=1.0
    )
    models = [make_resnet(width, seed=width) for width in (8, 16)]
    return IEKDTrainer(*models, args, train_dataset=make_decoded(16), augmentation=make_augmentation())


def margins(folder: Path) -> IEKDTrainer:
    args = IEKDTrainingArguments(str(folder / "out"), **COMMON, method="ie-od")
    return IEKDTrainer(make_resnet(8, seed=1), make_resnet(16, seed=2), args, train_dataset=make_images())


def mutual(folder: Path) -> MutualTrainer:
    args = MutualTrainingArguments(str(folder / "out"), **COMMON)
    return MutualTrainer([make_resnet(8, seed=1), make_resnet(12, seed=2)], args, train_dataset=make_images())


def weights(trainer: IEKDTrainer | MutualTrainer) -> dict[str, torch.Tensor]:
    """Return all that has trained."""
    module = trainer.group if isinstance(trainer, MutualTrainer) else trainer.student_side
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("make", [live, cached, margins, mutual])
def test_a_run_goes_on_from_before_each_of_its_file_operations(make, tmp_path):
    trainer = make(tmp_path)
    snapshots = Snapshots(tmp_path / "out", tmp_path / "snapshots")
    trainer.train()
    trainer.save_model()
    snapshots.active = False
    expected = weights(trainer)
    assert len(snapshots.seen) > 12
    for folder in snapshots.seen.values():
        again = make(folder)
        again.train(resume_from_checkpoint=(folder / "out" / RUN_FILE).is_file())
        got = weights(again)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in got), folder
        shutil.rmtree(folder)


QUICK = ("--num_train_epochs", 1, "--per_device_train_batch_size", 12, "--eval_strategy", "no", "--use_cpu")
DISTIL = ("--paraphraser_epochs", 1, "--do_eval", "false")
PEERS = ("--peers", "cifar-resnet-8", "cifar-resnet-8")
DETECTORS = ("--teacher", "tiny-rt-detr-8", "--student", "tiny-rt-detr-4", "--image_size", 32, 32)
SEGMENTERS = ("--teacher", "tiny-upernet-8", "--student", "tiny-upernet-8", "--image_size", 32, 32)


# What commands keep beside their run is kept in one way; every few of the crash points are tried.
@pytest.mark.slow
@pytest.mark.parametrize(
    "command, arguments, weights_file, every",
    [
        (distill, (*DISTIL, "--student", "cifar-resnet-8", "--max_train_samples", 24), "model.safetensors", 4),
        (
            mutual_command,
            (*PEERS, "--max_train_samples", 24),
            "peer_2/model.safetensors",
            5,
        ),
        (detect, (*DISTIL, *DETECTORS, "--max_train_samples", 24, "--max_eval_samples", 4), "model.safetensors", 30),
        (segment, (*DISTIL, *SEGMENTERS, "--max_train_samples", 24, "--max_eval_samples", 4), "model.safetensors", 20),
    ],
    ids=["distill", "mutual", "detect", "segment"],
)
def test_a_command_goes_on_from_before_each_of_its_file_operations(
    command, arguments, weights_file, every, run_example, tmp_path
):
    if command is distill:
        config = CifarResNetConfig.from_depth(8, num_labels=10)
        CifarResNetForImageClassification(config).save_pretrained(tmp_path / "teacher")
        arguments = (*arguments, "--teacher", tmp_path / "teacher")
    snapshots = Snapshots(tmp_path / "out", tmp_path / "snapshots")
    run_example(command, *arguments, *QUICK, "--output_dir", tmp_path / "out")
    snapshots.active = False
    expected = load_file(tmp_path / "out" / weights_file)
    assert len(snapshots.seen) > 12
    for folder in list(snapshots.seen.values())[::every]:
        has_begun = any((folder / "out").glob("**/_run.json"))
        resume = ("--resume_from_checkpoint", "true") if has_begun else ()
        run_example(command, *arguments, *QUICK, *resume, "--output_dir", folder / "out")
        got = load_file(folder / "out" / weights_file)
        assert all(torch.equal(got[name], expected[name]) for name in expected), folder
        shutil.rmtree(folder)
