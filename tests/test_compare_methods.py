"""The comparison of methods: its statistics by hand, cells that run once, and the whole line on the digits."""

import functools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerState


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))

import comparison_cells
import comparison_report
import datasets
from comparison_cells import Elapsed, MultiStep, cell_folder, flip_labels, keep_settings
from comparison_explorations import EXPLORATIONS
from comparison_methods import check_method, label, parse_method

from iekd_hf import METHODS, IEKDTrainer, IEKDTrainingArguments, exploration_loss, inheritance_loss
from iekd_hf.teacher.frozen import TeacherTargets
from iekd_hf.training.task_loss import TaskLabels


QUICK = ["--epochs", "1", "--teacher_epochs", "1", "--paraphraser_epochs", "1", "--held_out", "200", "--use_cpu"]
QUICK += ["--student_samples", "256", "--cache_views", "2", "--batch_size", "64", "--mixed_precision", "no"]


@pytest.fixture
def compare(run_example):
    import compare_methods

    return functools.partial(run_example, compare_methods)


def cell(method, seed, accuracy, networks="a:b", arguments=None, **metrics):
    arguments = {"lambda_inh": 10.0, "lambda_exp": 0.0, "lambda_kd": 0.0, **(arguments or {})}
    accuracies = {} if accuracy is None else {"test_accuracy": accuracy}
    return comparison_report.as_run(
        networks, method, seed, {"train_runtime": 5.0, **accuracies, **metrics}, arguments, []
    )


def test_interval_by_hand():
    """Three values, 2 degrees of freedom: t = 4.303."""
    mean, deviation, half = comparison_report.interval([70.0, 71.0, 75.0])
    assert mean == pytest.approx(72.0) and deviation == pytest.approx(math.sqrt(7.0))
    assert half == pytest.approx(4.3026527 * math.sqrt(7.0) / math.sqrt(3), rel=1e-6)
    assert comparison_report.interval([70.0])[0] == 70.0 and math.isnan(comparison_report.interval([70.0])[2])


def test_differences_are_paired_by_seed():
    # Seeds differ by far more than methods do: only pairs show it. Seed 2 has no partner and does not count.
    assert comparison_report.paired({0: 60.5, 1: 80.5, 2: 10.0}, {0: 60.0, 1: 80.0}) == "+0.50 ± 0.00"
    assert comparison_report.paired({0: 1.0}, {1: 1.0}) == "-"
    assert comparison_report.paired({0: 1.5}, {0: 1.0}) == "+0.50"


def test_the_table_has_a_row_for_each_method():
    ie = label("ie-ft,inheritance_ratio=0.25")
    cells = [cell("plain", 0, 0.70), cell("plain", 1, 0.72), cell(ie, 0, 0.71), cell(ie, 1, 0.75)]
    cells += [cell("dml", 0, None, "a+b", test_peer_1_accuracy=0.5, test_peer_2_accuracy=0.6)]
    text = comparison_report.markdown(cells)
    assert "| plain | 10 | 2 | 71.00 | 1.41 | ± 12.71 |  | 5 |" in text
    assert "| ie-ft,inheritance_ratio=0.25 | 10 | 2 | 73.00 | 2.83 | ± 25.41 | +2.00 ± 12.71 | 5 |" in text
    assert "### a+b, peer 2 (test)" in text and "| dml | 10 | 1 | 60.00 | - | - | 5 |" in text


def test_the_sweep_is_of_weights_alone_and_of_nothing_the_test_split_was_read_for():
    def of(method, accuracy, **metrics):
        name, changes = parse_method(method)
        arguments = {**METHODS[name], **changes}
        return cell(label(method), 0, None, arguments=arguments, validation_accuracy=accuracy, **metrics)

    cells = [of("ft", 0.6), of("ie-ft,lambda_inh=1000,lambda_exp=100", 0.7, exploration_loss_gradient_share=0.5)]
    cells += [of("ie-ft,exploration_distance=cka", 0.8), of("at", 0.8), of("ie-ft", 0.8)]
    cells[-1]["models"]["student"]["metrics"]["test_accuracy"] = 0.8
    lines, shares = comparison_report.sweep_points(cells)
    assert lines == {"FT": {1500.0: [60.0]}, "IE-FT, lambda_exp 0.1 of lambda_inh": {1000: [70.0]}}
    assert shares == {"exploration": [(100, 0.5)]}
    cells[1]["settings"]["networks"] = "c:d"
    assert comparison_report.sweep_points(cells)[0] == {
        "FT, a:b": {1500.0: [60.0]},
        "IE-FT, lambda_exp 0.1 of lambda_inh, c:d": {1000: [70.0]},
    }


def test_methods_with_arguments():
    assert parse_method("ie-ft,lambda_inh=300,lambda_schedule=cosine,inheritance_ratio=0.25") == (
        "ie-ft",
        {"lambda_inh": 300, "lambda_schedule": "cosine", "inheritance_ratio": 0.25},
    )
    assert parse_method("kd,bf16=false,lambda_kd=1e-9,kd_distance=dist") == (
        "kd",
        {"bf16": False, "lambda_kd": 1e-9, "kd_distance": "dist"},
    )
    with pytest.raises(ValueError, match=r"Expected a method among plain, .*; got 'ft2'"):
        parse_method("ft2")
    with pytest.raises(ValueError, match=r"Expected numbers as JSON has them .*, got 'lambda_kd=\.5'"):
        parse_method("kd,lambda_kd=.5")


def test_methods_that_networks_cannot_be_trained_with():
    check_method("ie-ft,exploration=own,lambda_inh=3", "a:b")
    check_method("dml,lambda_kl=2", "a+b")
    with pytest.raises(ValueError, match=r"Expected a method for a\+b among alone, .*; got 'plain'"):
        check_method("plain", "a+b")
    with pytest.raises(ValueError, match=r"Expected a method for /c\+\+/a:b among plain, .*; got 'dml'"):
        check_method("dml", "/c++/a:b")
    with pytest.raises(ValueError, match=r"Expected fields of IEKDTrainingArguments in .*, got lamda_inh"):
        check_method("ft,lamda_inh=3", "a:b")


@pytest.mark.parametrize("networks", ["/data/c++/a,b:cifar-resnet-8", "to/image-to-text:b", "a+b", "a:b"])
def test_networks_are_read_from_the_name_of_their_folder(networks, tmp_path):
    folder = cell_folder(tmp_path, networks, "plain" if ":" in networks else "alone", 1)
    folder.mkdir(parents=True)
    peers = "" if ":" in networks else "_peer_1"
    for name, content in {
        "metrics": {f"test{peers}_accuracy": 0.5, "train_runtime": 1.0},
        "arguments": {},
        "log": [],
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    assert comparison_report.collect(tmp_path)[0]["settings"]["networks"] == networks
    heading = f"### {networks} (test)" if not peers else f"### {networks}, peer 1 (test)"
    assert heading in comparison_report.markdown(comparison_report.collect(tmp_path))
    comparison_report.draw_sweep(comparison_report.collect(tmp_path), tmp_path / "sweep.png")


def test_a_finished_cell_that_was_not_evaluated_on_the_test_split(tmp_path, caplog):
    comparison = object.__new__(comparison_cells.Comparison)
    comparison.folder = tmp_path
    done = cell_folder(tmp_path, "a:b", "plain", 1) / "metrics.json"
    done.parent.mkdir(parents=True)
    done.write_text(json.dumps({"validation_accuracy": 0.5}))
    assert not comparison.run("a:b", "plain", 1, ["validation"]) and not caplog.messages
    assert not comparison.run("a:b", "plain", 1, ["validation", "test"])
    assert caplog.messages[0].endswith("was not evaluated on test: give other seeds.")


def test_settings_are_those_that_a_folder_was_begun_with(tmp_path):
    for _ in range(2):
        keep_settings(tmp_path / "new" / "settings.json", {"epochs": 1.0, "train_file": "a"})
    with pytest.raises(ValueError, match=r"new was begun with, train_file='a', got train_file='b': give another"):
        keep_settings(tmp_path / "new" / "settings.json", {"epochs": 1.0, "train_file": "b"})


def test_a_cell_is_named_by_its_weights_whatever_the_presets_are(monkeypatch):
    before = label("ie-ft")
    assert before == label(before)
    monkeypatch.setitem(METHODS, "ie-ft", {**METHODS["ie-ft"], "lambda_inh": 7.0})
    assert label("ie-ft") != before == label(before)
    assert label("ie-ft,lambda_exp=0") == "ie-ft,lambda_inh=7,lambda_exp=0"


def test_automatic_weights_name_a_cell_and_have_no_place_in_the_sweep():
    method = label("ft,lambda_inh=auto")
    assert method == label(method) == "ft,lambda_inh=auto"
    made = cell(method, 0, None, arguments={**METHODS["ft"], "lambda_inh": "auto"}, validation_accuracy=0.5)
    assert "| ft | auto | 1 | 50.00 |" in comparison_report.markdown([made])
    assert comparison_report.sweep_points([made]) == ({}, {})


def test_a_cell_names_the_device_that_it_ran_on(tmp_path, monkeypatch):
    assert IEKDTrainingArguments(tmp_path, use_cpu=True).device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "a GPU")
    assert comparison_cells.made()["device"] == "CPU"


def test_flipped_labels():
    labels = [i % 4 for i in range(200)]
    features = datasets.Features(image=datasets.Value("int64"), label=datasets.ClassLabel(num_classes=4))
    images = datasets.Dataset.from_dict({"image": range(200), "label": labels}, features=features)
    flipped = flip_labels(images, 0.25)
    changed = [new for old, new in zip(labels, flipped["label"], strict=True) if new != old]
    assert len(changed) == 50 and set(changed) == {0, 1, 2, 3}
    assert flipped["image"] == images["image"] and flipped.features["label"] == features["label"]
    assert flip_labels(images, 0.25)["label"] == flipped["label"]


@pytest.fixture
def losses_of(monkeypatch, tmp_path):
    """Return what a way to explore makes of factors of two images, of which the teacher knows the first."""

    def losses(exploration, F_inh, F_exp, F_T):
        monkeypatch.setattr(IEKDTrainer, "_losses", lambda *args: {"task_loss": 1.0, "exploration_loss": 2.0})
        trainer = object.__new__(EXPLORATIONS[exploration])
        trainer.args = IEKDTrainingArguments(str(tmp_path), report_to="none")
        targets = TeacherTargets([F_T], torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
        return trainer._losses(None, [F_inh], [F_exp], TaskLabels(torch.tensor([0, 1]), None, None), targets, {})

    return losses


def test_ways_to_explore(losses_of):
    F_inh, F_exp, F_T = torch.randn(3, 2, 4, 3, 3, generator=torch.manual_seed(0))
    found = losses_of("own", F_inh, F_exp, F_T)
    assert found == {"task_loss": 1.0, "exploration_loss": exploration_loss(F_exp, F_inh)}
    found, shifted = (losses_of("centred", F_inh, F_exp + shift, F_T)["exploration_loss"] for shift in (0.0, 5.0))
    assert found == pytest.approx(shifted.item(), rel=1e-5)  # what all images have in common is no answer
    half = (F_exp[0] - F_exp[1])[None], (F_T[0] - F_T[1])[None]
    assert found == pytest.approx(exploration_loss(*half).item(), rel=1e-5)
    found = losses_of("where-wrong", F_inh, F_exp, F_T)
    assert found["inheritance_loss"] == pytest.approx(inheritance_loss(F_inh[:1], F_T[:1]).item() / 2)
    assert found["exploration_loss"] == pytest.approx(exploration_loss(F_exp[1:], F_T[1:]).item() / 2)


def test_milestones():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = type("State", (), {"max_steps": 8})
    MultiStep([0.5, 0.75]).on_train_begin(None, state, None, lr_scheduler=scheduler)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.001] * 2)


def test_seconds_of_a_training_in_two_processes(monkeypatch):
    now = {"train_runtime": 100.0, "train_cpu_seconds": 10.0}
    monkeypatch.setattr(Elapsed, "_now", staticmethod(lambda: dict(now)))
    first, state = Elapsed(), TrainerState()
    first.on_train_begin(None, state, None)
    now = {"train_runtime": 107.0, "train_cpu_seconds": 15.0}
    state.global_step, state.stateful_callbacks = 8, {"Elapsed": first.state()}
    now = {"train_runtime": 900.0, "train_cpu_seconds": 1.0}
    second = Elapsed()
    second.on_train_begin(None, state, None)
    now = {"train_runtime": 902.0, "train_cpu_seconds": 2.0}
    assert second.seconds() == {"train_runtime": 9.0, "train_cpu_seconds": 6.0}


@pytest.mark.slow
def test_a_cell_that_was_broken_off_goes_on_from_its_last_epoch(compare, tmp_path, monkeypatch):
    """It comes to the same as one that was not, and another schedule is refused before anything is trained."""

    def run(folder, epochs="2"):
        networks = ["--networks", "cifar-resnet-8:cifar-resnet-8", "--methods", "ie-ft+kd", "--seeds", "3"]
        compare("--output_dir", folder, *QUICK, "--epochs", epochs, *networks)
        (cell,) = json.loads((folder / "comparison.json").read_text())
        return cell

    def break_off(self, args, state, control, **kwargs):
        if Path(args.output_dir).name == "student" and state.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Elapsed, "on_epoch_begin", break_off)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    monkeypatch.undo()
    (student,) = (tmp_path / "broken" / "cells").glob("*/*/seed-3/student")
    assert [path.name for path in student.glob("checkpoint-*")] == ["checkpoint-4"]
    with pytest.raises(ValueError, match=r"broken was begun with, epochs=2\.0, got epochs=3\.0: give another"):
        run(tmp_path / "broken", epochs="3")
    begun = []
    monkeypatch.setattr(Elapsed, "on_epoch_begin", lambda self, args, state, *_, **__: begun.append(state.epoch))
    broken = run(tmp_path / "broken")
    assert begun == [1] and "train_loss" not in broken["training"]  # Trainer's is of the last process's epochs
    # The same teacher and paraphraser; the cell anew.
    shutil.copytree(tmp_path / "broken", tmp_path / "whole", ignore=shutil.ignore_patterns("cells"))
    whole = run(tmp_path / "whole")
    assert broken["models"] == whole["models"]
    assert [line.get("loss") for line in broken["log"]] == [line.get("loss") for line in whole["log"]]


@pytest.mark.slow
def test_the_whole_line_on_the_digits(compare, tmp_path):
    common = ["--output_dir", tmp_path, *QUICK, "--evaluate_on", "test", "--networks", "cifar-resnet-8:cifar-resnet-8"]
    printed = compare(
        *common, "--methods", "plain", "ie-ft+kd,lambda_inh=50", "od,learning_rate=0.02", "--seeds", "0", "1"
    )
    assert re.search(r"^\| ie-ft\+kd \| 50, \d+, \d+ \| 2 \| ", printed, flags=re.MULTILINE), printed
    assert "### cifar-resnet-8:cifar-resnet-8 (test)" in printed and "(validation)" in printed
    folder = cell_folder(tmp_path, "cifar-resnet-8:cifar-resnet-8", "plain", 1)
    before = (folder / "metrics.json").stat().st_mtime_ns
    teacher = (tmp_path / "teachers" / "cifar-resnet-8" / "model.safetensors").stat().st_mtime_ns
    printed = compare(*common, "--methods", "plain", "--seeds", "0", "1", "2")
    assert re.search(r"^\| plain \| - \| 3 \| ", printed, flags=re.MULTILINE), printed
    assert (folder / "metrics.json").stat().st_mtime_ns == before  # a finished cell is not run again
    assert (tmp_path / "teachers" / "cifar-resnet-8" / "model.safetensors").stat().st_mtime_ns == teacher
    cells = json.loads((tmp_path / "comparison.json").read_text())
    assert len(cells) == 7
    rates = {cell["settings"]["method"].split(",")[0]: cell["settings"]["learning_rate"] for cell in cells}
    assert rates == {"plain": 0.1, "ie-ft+kd": 0.1, "od": 0.02}  # what a cell was made with, not what is common
    assert {"test_accuracy", "validation_accuracy"} <= set(cells[0]["models"]["student"]["metrics"])
    assert "torch" in cells[0]["made"] and "train_cpu_seconds" in cells[0]["training"]
    for picture in ("comparison.png", "sweep.png"):
        assert (tmp_path / picture).stat().st_size > 5_000


@pytest.mark.slow
def test_students_that_were_trained_alone_before_and_a_teacher_that_was_told_wrong(compare, tmp_path):
    common = ["--output_dir", tmp_path, *QUICK, "--networks", "cifar-resnet-8:cifar-resnet-8", "--seeds", "0"]
    common += ["--plain_epochs", "1", "--flipped_labels", "1", "--teacher_epochs", "4"]
    compare(*common, "--methods", "plain", "ie-ft+kd,lambda_inh=auto,exploration=where-wrong")
    before = json.loads((tmp_path / "plain_students" / "cifar-resnet-8" / "seed-0" / "metrics.json").read_text())
    cells = {cell["settings"]["method"]: cell for cell in json.loads((tmp_path / "comparison.json").read_text())}
    assert cells["plain"]["models"]["student"]["metrics"]["validation_loss"] < before["validation_loss"]
    explored = cells["ie-ft+kd,lambda_inh=auto,lambda_exp=300,lambda_kd=1,exploration=where-wrong"]
    assert explored["settings"]["lambda_inh"] == "auto"
    assert explored["settings"]["exploration"] == "where-wrong"
    (teacher,) = tmp_path.glob("teachers/*/metrics.json")
    # Nine wrong labels are as likely; by the right ones its loss is 1.1.
    assert json.loads(teacher.read_text())["train_loss"] > 0.95 * math.log(9)


@pytest.mark.slow
def test_peers_and_the_test_split_that_is_not_read(compare, tmp_path):
    printed = compare(
        *["--output_dir", tmp_path, *QUICK, "--networks", "cifar-resnet-8+cifar-resnet-8", "--seeds", "0"],
        *["--methods", "alone", "dml", "ie-dml"],
    )
    assert "### cifar-resnet-8+cifar-resnet-8, peer 2 (validation)" in printed and "(test)" not in printed
    for cell in json.loads((tmp_path / "comparison.json").read_text()):
        assert list(cell["models"]) == ["peer 1", "peer 2"]
        for peer in cell["models"].values():
            assert "validation_accuracy" in peer["metrics"] and "test_accuracy" not in peer["metrics"]


@pytest.mark.slow
def test_a_saved_teacher_is_used_as_it_is(compare, tmp_path):
    """Its own weights and pixels, and nothing is written into its folder or anywhere else outside."""
    from conftest import make_resnet
    from transformers import ViTImageProcessorPil

    folder = tmp_path / "mine"
    make_resnet(16, num_labels=10, seed=3).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    networks = f"{folder}:cifar-resnet-8"
    printed = compare(
        *["--output_dir", tmp_path / "out", *QUICK, "--networks", networks, "--seeds", "0", "--methods", "ie-ft"]
    )
    assert f"### {networks} (validation)" in printed
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]
    assert not (tmp_path / "out" / "teachers").exists()
    assert cell_folder(tmp_path / "out", networks, "ie-ft", 0).is_relative_to(tmp_path / "out" / "cells")
