"""The speed benchmark, without its clock: it compares the same mathematics, and its loops are real ones."""

import gc
import json
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))
import lockstep
import speed
import speed_cases
import streams
from conftest import same
from lockstep import StepsOf, compare
from transformers import Trainer

from iekd_hf import DistillationTrainer


def make_setting(num_images: int = 16) -> speed_cases.Setting:
    torch.manual_seed(0)
    return speed_cases.Setting(16, 4, num_images, lambda: speed_cases.cifar(14), lambda: speed_cases.cifar(8))


def test_the_bare_loop_has_the_trainers_mathematics():
    setting = make_setting()
    trainer, bare = setting.iekd(fast_teacher=False), speed_cases.BareLoop(setting)
    side = trainer.student_side
    split = side.splits[0]
    bare.inheriting, bare.exploring = split.inheritance_indices, split.exploration_indices
    bare.encoders[0].load_state_dict(side.inheritance_encoders[0].state_dict())
    bare.encoders[1].load_state_dict(side.exploration_encoders[0].state_dict())
    pixels, labels = bare.batch()
    side.tap.attach()
    trainer.teacher.tap.attach()
    trainer.state.max_steps = trainer.args.max_steps
    ours = trainer.compute_loss(side.train(), {"pixel_values": pixels, "labels": labels})
    theirs = bare.loss(pixels, labels)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    for (name, mine), other in zip(trainer.student.named_parameters(), bare.student.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert trainer.args.lambda_inh == 1000 and trainer.args.lambda_exp == 100


def test_step_by_step_is_the_trainers_own_loop():
    setting = make_setting()
    steps = StepsOf(setting.alone)
    for _ in range(6):
        steps()
    steps.stop()
    assert steps.trainer.state.global_step == 6
    whole = setting.alone()
    whole.args.max_steps = 6
    whole.train()
    assert same(steps.trainer.model.state_dict(), whole.model.state_dict())


def test_an_error_in_a_loop_is_raised_where_it_is_asked_for():
    def broken():
        trainer = make_setting().alone()
        trainer.train_dataset = None
        return trainer

    with pytest.raises(ValueError, match="requires a train_dataset"):
        StepsOf(broken)()


def test_ratios_are_of_the_same_round(monkeypatch):
    clock = iter([0, 2, 0, 3, 0, 9, 0, 6, 0, 4, 0, 4])  # names turn: a b, b a, a b
    monkeypatch.setattr(lockstep, "now", lambda: next(clock))
    results = compare({"a": lambda: None, "b": lambda: None}, rounds=2)
    assert results["a"] == {"milliseconds": 5, "ratio": 1.0, "lowest": 1.0, "highest": 1.0}
    assert results["b"] == {"milliseconds": 6.5, "ratio": 1.25, "lowest": 1.0, "highest": 1.5}


def test_streams_and_files_have_the_same_images(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "IMAGES_PER_TAR", 12)
    streams.write_images(tmp_path, 32)
    assert len([*tmp_path.glob("*.tar")]) == 3
    rows = streams.open_images("parquet", tmp_path)
    streamed = sorted(streams.open_images("tars", tmp_path), key=lambda row: row["__key__"])
    assert len(rows) == len(streamed) == 32
    for row, other in zip(rows, streamed, strict=True):
        assert row["labels"] == other["labels"] and torch.equal(row["pixel_values"], other["pixel_values"])


@pytest.mark.slow
@pytest.mark.parametrize("path", streams.PATHS)
def test_training_on_a_stream_is_watched(tmp_path, monkeypatch, path):
    monkeypatch.setattr(streams, "BATCH_SIZE", 8)
    streams.write_images(tmp_path, 80)
    measured = streams.train(path, tmp_path, 80)
    assert [noted["step"] for noted in measured["noted"]] == [1, 2, 5, 8, 10]
    assert measured["images_per_second"] > 0 and min(noted["mebibytes"] for noted in measured["noted"]) > 50
    assert "| MiB after 8 |" in streams.table({path: measured})


def test_figures_of_the_cpu_do_not_name_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "a GPU")
    assert speed.machine("cuda").startswith("a GPU") and "a GPU" not in speed.machine("cpu")


@pytest.mark.slow
def test_every_section_runs_and_is_laid_out(tmp_path, monkeypatch, capsys):
    measured = {}

    def in_this_process(argument, malloc):
        if ":" in argument:
            return {"mebibytes": 100.0 + len(argument)}
        measured[argument] = speed.SECTIONS[argument][2]
        made = speed_cases.jpeg_files().select(range(8)) if argument.endswith("files") else make_setting()
        return speed.SECTIONS[argument][2](made, 1)

    monkeypatch.setattr(speed, "in_a_process", in_this_process)
    names = [name for name in speed.SECTIONS if name not in ("compile", "fp16") and "imagenet" not in name]
    monkeypatch.setattr(sys, "argv", ["speed.py", "--output_dir", str(tmp_path), "--sections", *names, "memory"])
    speed.main()
    printed = capsys.readouterr().out
    assert list(measured) == names
    written = json.loads((tmp_path / "speed.json").read_text())
    assert [*written["sections"]] == [*names, "memory cifar", "memory imagenet"]
    for section in written["sections"].values():
        assert section["cases"][0]["ratio"] == 1 and all(case["ratio"] > 0 for case in section["cases"])
        assert section["title"] in printed
    assert "| IEKDTrainer, cached teacher | " in printed
    assert (tmp_path / "speed.md").read_text() in printed
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_peak_memory_counts_what_is_held(monkeypatch):
    def hungry():
        setting = make_setting()
        setting.alone = lambda: held.append(torch.ones(50 * 2**18)) or speed_cases.Setting.alone(setting)
        return setting

    held = []
    gc.collect()  # what earlier tests have left would be given back meanwhile
    monkeypatch.setitem(speed_cases.SETTINGS, "cifar", hungry)
    assert speed_cases.peak("cifar:alone")["mebibytes"] > 45


def test_the_student_alone_is_trained_by_trainer_itself():
    trainer = make_setting().alone()
    assert type(trainer).training_step is Trainer.training_step
    assert type(trainer).compute_loss is DistillationTrainer.compute_loss  # the task's own, and no teacher's
