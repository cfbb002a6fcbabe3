"""The example script: the whole run on the digits, other sources of images, resuming, and its errors."""

import functools
import json
import re
import shutil

import datasets
import numpy as np
import PIL.Image
import pytest
import run_iekd
import torch
from conftest import break_off, same
from transformers import AutoImageProcessor, AutoModelForImageClassification

from iekd_hf.commands.distill import RunArguments
from iekd_hf.commands.images import data as image_data
from iekd_hf.commands.images.metrics import TopKAccuracy
from iekd_hf.commands.images.source import original_rows
from iekd_hf.training.manifest import read_manifest
from iekd_hf.training.resume import find_last_checkpoint


QUICK = [
    "--max_train_samples",
    "64",
    "--max_eval_samples",
    "32",
    "--num_train_epochs",
    "1",
    "--paraphraser_epochs",
    "1",
]
QUICK += ["--teacher", "cifar-resnet-8", "--disable_tqdm", "true", "--per_device_train_batch_size", "16", "--use_cpu"]


@pytest.fixture
def run(run_example):
    return functools.partial(run_example, run_iekd)


def image_rows(count=40, size=12, labels=("cat", "dog")):
    generator = np.random.default_rng(0)
    rows = {"img": [], "label": []}
    for i in range(count):
        pixels = generator.integers(0, 100, (size, size, 3)) + 100 * (i % 2)
        rows["img"].append(PIL.Image.fromarray(pixels.astype(np.uint8)))
        rows["label"].append(i % len(labels))
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(labels))})
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.slow
def test_the_digits_from_nothing_to_the_table(run, tmp_path):
    printed = run("--output_dir", tmp_path, *QUICK, "--do_predict")
    for row in ("teacher", "plain student", "distilled student"):
        cells = r"78,042 +\d+\.\d\d% +\d+\.\d\d% +\d+\.\d\d ms +\w"
        assert re.search(rf"^{row} +{cells}", printed, flags=re.MULTILINE), printed
    assert "latency: one image, CPU, 1 thread, float32, median" in printed
    assert re.search(r"stage 1 \d+\.\d, stage 2 \d+\.\d", printed)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("report.png", "losses.png"))
    # Between the command and its table a newcomer has nothing to skip: no logs, no metrics, no warnings.
    assert "{" not in printed and "*****" not in printed
    said = [re.sub(r"[\d.]+", "N", line) for line in run.func.said.splitlines()]
    assert [line for line in said if not line.startswith("  ")] == [
        "[N/N] Teacher: cifar-resnet-N, N epoch on N labelled images",
        "[N/N] Plain student: cifar-resnet-N, N steps on N labelled images",
        "[N/N] Distilled student: cifar-resnet-N, N epoch on the same N, N unlabelled, and the teacher",
    ]
    assert {re.match(r"  (\w+ \w+|\w+)  +N/N steps", line)[1] for line in said if line.startswith("  ")} == {
        *("teacher", "plain student", "stage N", "stage N"),
    }
    student, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    metrics = json.loads((tmp_path / "eval_results.json").read_text())
    assert {"eval_accuracy", "eval_top5_accuracy", "eval_macro_f1", "eval_loss"} <= set(metrics)
    assert any(re.fullmatch(r"eval_accuracy_\d", name) for name in metrics)
    # The saved student, used as anybody would, gives the predictions that the run wrote down.
    lines = (tmp_path / "predictions.csv").read_text().splitlines()[1:]
    splits = image_data.load_images(image_data.DataArguments(max_train_samples=64, max_eval_samples=32), seed=42)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = processor([image.convert("RGB") for image in splits["validation"]["image"]], return_tensors="pt")
    with torch.no_grad():
        predicted = student.eval()(**pixels).logits.argmax(dim=1).tolist()
    rows = original_rows(splits["validation"])
    named = [student.config.id2label[i] for i in predicted]
    assert lines == [f"{row},{name}" for row, name in zip(rows, named, strict=True)] and len(set(rows)) == 32
    with pytest.raises(
        ValueError, match=r"without checkpoints, got .* with checkpoint-4: add --resume_from_checkpoint"
    ):
        run("--output_dir", tmp_path, *QUICK)


@pytest.mark.slow
def test_recipes_by_their_flags(run, tmp_path):
    recipe = ["--mixup", 0.4, "--cutmix", 0.4, "--rand_augment", 9, "--label_smoothing_factor", 0.1]
    recipe += ["--ema_decay", 0.8, "--layer_decay", 0.5, "--plain_student", "false"]
    printed = run("--output_dir", tmp_path, *QUICK, *recipe)
    measured = dict(
        re.findall(r"^(distilled student|distilled student, averaged) +78,042 +(\d+\.\d\d%)", printed, re.MULTILINE)
    )
    assert len(measured) == 2, printed
    assert read_manifest(find_last_checkpoint(tmp_path))["files"].keys() >= {"average.safetensors"}
    student, average = (AutoModelForImageClassification.from_pretrained(tmp_path / part) for part in ("", "average"))
    assert AutoImageProcessor.from_pretrained(tmp_path / "average").size == {"height": 16, "width": 16}
    assert not same(student.state_dict(), average.state_dict())
    with pytest.raises(ValueError, match="Expected no --rand_augment with --cache_teacher"):
        run("--output_dir", tmp_path / "cached", *QUICK, "--rand_augment", 9, "--cache_teacher")


@pytest.mark.slow
def test_resume_reuses_what_is_finished(run, tmp_path):
    """Exact with random augmentation too, from the end of an epoch: within one, the next batch is drawn already."""
    common = ["--output_dir", tmp_path, *QUICK, "--num_train_epochs", "2", "--save_total_limit", "5"]
    run(*common)
    finished = AutoModelForImageClassification.from_pretrained(tmp_path).state_dict()
    teacher = (tmp_path / "_teacher" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "checkpoint-8")
    printed = run(*common, "--resume_from_checkpoint", "true")
    assert (tmp_path / "_teacher" / "model.safetensors").stat().st_mtime_ns == teacher
    assert re.search(r"^teacher .* training", printed, flags=re.MULTILINE)
    assert same(AutoModelForImageClassification.from_pretrained(tmp_path).state_dict(), finished)
    break_off(tmp_path)
    printed = run(*common, "--resume_from_checkpoint", "true")
    assert (tmp_path / "_teacher" / "model.safetensors").stat().st_mtime_ns == teacher
    assert same(AutoModelForImageClassification.from_pretrained(tmp_path).state_dict(), finished)
    with pytest.raises(ValueError, match=r"a run that has begun, got .*nothing' without any checkpoint: leave --res"):
        run(*common, "--output_dir", tmp_path / "nothing", "--resume_from_checkpoint", "true")


@pytest.mark.slow
@pytest.mark.parametrize("save", [["--load_best_model_at_end", "true"], ["--save_strategy", "best"]])
def test_the_plain_students_epoch_is_chosen_as_the_others(run, tmp_path, save):
    """Or the teacher would be said to add what the choice has added."""
    few = ["--max_train_samples", 40, "--max_eval_samples", 32, "--num_train_epochs", 4, "--method", "kd", "--use_cpu"]
    best = ["--metric_for_best_model", "accuracy", "--eval_strategy", "epoch", *save]
    run("--output_dir", tmp_path, *few, "--teacher", "cifar-resnet-8", "--labelled_samples", 20, *best)
    rows = json.loads((tmp_path / "results.json").read_text())["models"]
    for row, folder in (("plain student", tmp_path / "_plain_student"), ("teacher", tmp_path / "_teacher")):
        history = read_manifest(folder)["log_history"]
        measured = [logs["eval_accuracy"] for logs in history if "eval_accuracy" in logs]
        assert len(measured) == 4
        expected = max(measured) if "--load_best_model_at_end" in save else measured[-1]
        assert rows[row]["metrics"]["accuracy"] == pytest.approx(expected)


@pytest.mark.slow
def test_parquet_yaml_and_pretrained_models(run, tmp_path):
    """Columns are found by type (`img` as in CIFAR-10 on the Hub), settings come from a file, models from folders."""
    from conftest import make_resnet

    image_rows().to_parquet(tmp_path / "train.parquet")
    image_rows(10).to_parquet(tmp_path / "validation.parquet")
    make_resnet(16, num_labels=5, seed=2).save_pretrained(tmp_path / "teacher")  # other classes: features only
    make_resnet(8, num_labels=7, seed=1).save_pretrained(tmp_path / "student")  # gets a new head
    recipe = {
        "teacher": str(tmp_path / "teacher"),
        "student": str(tmp_path / "student"),
        "train_file": str(tmp_path / "train.parquet"),
        "validation_file": str(tmp_path / "validation.parquet"),
        "output_dir": str(tmp_path / "out"),
        "image_size": 32,
        "num_train_epochs": 1,
        "paraphraser_epochs": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    (tmp_path / "recipe.yaml").write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in recipe.items()))
    printed = run(tmp_path / "recipe.yaml")
    # No accuracy: its head knows other classes.
    assert re.search(r"^teacher +[\d,]+ +- +\d+\.\d\d ms +- +-$", printed, flags=re.MULTILINE), printed
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert config.id2label == {0: "cat", 1: "dog"}
    used = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert (used["method"], used["lambda_inh"], used["lambda_exp"]) == ("ie-ft", 300, 30)  # as it is pretrained
    (tmp_path / "recipe.json").write_text(
        json.dumps(
            {**recipe, "student": recipe["output_dir"], "output_dir": str(tmp_path / "alone"), "do_train": False}
        )
    )
    assert re.search(r"^student +[\d,]+ +\d", run(tmp_path / "recipe.json"), flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, (300, 30)), ({"method": "ie-ft"}, (3000, 300)), ({"lambda_inh": 500.0}, (500, 300))],
    ids=["nothing given", "a method", "a weight"],
)
def test_weights_of_a_pretrained_student(tmp_path, given, expected):
    args = RunArguments(str(tmp_path), **given)
    args.divide_weights(10)
    assert (args.lambda_inh, args.lambda_exp) == expected


@pytest.mark.slow
def test_a_trained_teacher_is_measured_on_its_own_pixels(run, tmp_path):
    """A teacher of these classes has an accuracy in the table, and it is the one that its own processor gives."""
    from conftest import make_resnet
    from transformers import ViTImageProcessorPil

    image_rows().to_parquet(tmp_path / "train.parquet")
    image_rows(16).to_parquet(tmp_path / "validation.parquet")
    processor = ViTImageProcessorPil(size={"height": 48, "width": 48}, image_mean=[0.1] * 3, image_std=[0.3] * 3)
    teacher = make_resnet(16, num_labels=2, seed=2, id2label={0: "cat", 1: "dog"}).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    with torch.no_grad():
        logits = teacher(**processor(list(image_rows(16)["img"]), return_tensors="pt")).logits
    expected = (logits.argmax(dim=1).numpy() == np.array(image_rows(16)["label"])).mean()
    files = ["--train_file", tmp_path / "train.parquet", "--validation_file", tmp_path / "validation.parquet"]
    small = [*QUICK, "--teacher", tmp_path / "teacher", "--plain_student", "false", "--image_size", "32"]
    printed = run("--output_dir", tmp_path / "out", *files, *small)
    assert re.search(rf"^teacher +[\d,]+ +{expected:.2%}", printed, flags=re.MULTILINE), printed


@pytest.mark.slow
def test_image_folder_with_images_of_mixed_sizes(run, tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 4)):
        for name in ("ant", "bee"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = generator.integers(70, 100, 2)
                PIL.Image.fromarray(generator.integers(0, 255, (height, width, 3)).astype(np.uint8)).save(
                    folder / f"{i}.png"
                )
    folders = ["--train_dir", tmp_path / "train", "--validation_dir", tmp_path / "validation", "--image_size", 72]
    printed = run("--output_dir", tmp_path / "out", *folders, *QUICK, "--plain_student", "false")
    assert "plain student" not in printed and "distilled student" in printed
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.label2id == {"ant": 0, "bee": 1}


def test_help_explains(run, capsys):
    with pytest.raises(SystemExit, match="0"):
        run("--help")
    text = capsys.readouterr().out
    for name in ("--teacher", "--lambda_inh", "--train_file", "--student_from_scratch", "--push_to_hub"):
        assert re.search(rf"{name}\b", text)


def load(tmp_path, seed=0, **kwargs):
    return image_data.load_images(image_data.DataArguments(train_file=str(tmp_path / "train.parquet"), **kwargs), seed)


def test_data_is_brought_into_one_form(tmp_path):
    rows = image_rows(20)
    rows.to_parquet(tmp_path / "train.parquet")
    splits = load(tmp_path, train_val_split=0.2)
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "validation": 4}
    assert splits["train"].column_names == ["image", "label"]
    # Names instead of codes, in another order than they first occur.
    names = rows.remove_columns("label").add_column("label", ["dog" if i % 2 else "cat" for i in range(20)])
    names.to_parquet(tmp_path / "train.parquet")
    splits = load(tmp_path)
    assert splits["train"].features["label"].names == ["cat", "dog"]


def test_bad_data(run, tmp_path):
    rows = image_rows(8)
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        ValueError, match="a column of images in the train split, got the columns img, label, not 'image'"
    ):
        load(tmp_path, image_column_name="image")
    rows.remove_columns("label").to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"column of labels.*--label_column_name"):
        load(tmp_path)
    rows.select([]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="images in the train split, got an empty one"):
        load(tmp_path)
    rows.to_parquet(tmp_path / "train.parquet")
    image_rows(4, labels=("cat", "dog", "cow")).to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match="among the training split's 2 classes, got cow"):
        load(tmp_path, validation_file=str(tmp_path / "validation.parquet"))
    with pytest.raises(ValueError, match="does not exist"):
        image_data.load_images(image_data.DataArguments(train_file=str(tmp_path / "absent.parquet")), 0)
    best = ["--eval_strategy", "epoch", "--metric_for_best_model", "eval_f2"]
    with pytest.raises(ValueError, match=r"metric of the evaluation in --metric_for_best_model, got 'eval_f2': .*acc"):
        run("--output_dir", tmp_path / "out", *QUICK, *best)
    with pytest.raises(ValueError, match="one source"):
        image_data.DataArguments(train_file="a", train_dir="b")


def test_a_file_that_is_no_image_is_named(tmp_path):
    for i in range(4):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    files = [str(tmp_path / f"{i}.png") for i in range(4)]
    split = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=r"image in row 2 of the train split \(2\.png\).*replace or remove"):
        image_data.check_images(split, "train")


def test_data_sets_and_models_that_cannot_be_reached(run, tmp_path):
    with pytest.raises(ValueError, match=r"'nobody/nothing', which cannot be loaded.*--train_file"):
        run("--output_dir", tmp_path, "--dataset_name", "nobody/nothing")
    with pytest.raises(ValueError, match=r"--student .*'nobody/nothing'.*HF_HUB_CACHE"):
        run("--output_dir", tmp_path, *QUICK, "--student", "nobody/nothing")
    with pytest.raises(ValueError, match=r"--teacher .*'nobody/nothing'"):
        run("--output_dir", tmp_path, *QUICK, "--teacher", "nobody/nothing")
    with pytest.raises(ValueError, match="6n"):
        run("--output_dir", tmp_path, *QUICK, "--teacher", "cifar-resnet-21")


def test_metric_counts():
    logits = np.eye(8)[[0, 1, 2, 3]] * 2 - np.arange(8) / 100
    result = TopKAccuracy(keep_in_memory=True).compute(
        predictions=logits, references=[0, 1, 5, 7], class_names=[f"c{i}" for i in range(8)]
    )
    # Behind the best, the lower index is the larger logit: for row 2 the best five are 2, 0, 1, 3, 4.
    assert result == {
        "accuracy": 0.5,
        "top5_accuracy": 0.5,
        "accuracy_c0": 1,
        "accuracy_c1": 1,
        "accuracy_c5": 0,
        "accuracy_c7": 0,
    }
