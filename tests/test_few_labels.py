"""Low-label studies of the commands: which labels the students know, and what each network is trained on."""

import functools
import json
import re

import datasets
import numpy as np
import PIL.Image
import pytest
import run_iekd
import torch
from test_whole_batches import make_decoded
from transformers import ViTImageProcessorPil

from iekd_hf import DecodedImages
from iekd_hf.commands.distill import ImageArguments
from iekd_hf.commands.images.data import load_images
from iekd_hf.commands.images.few_labels import add_unlabelled, draw_labelled, split_by_labels
from iekd_hf.commands.images.source import original_rows
from iekd_hf.commands.images.transforms import prepare
from iekd_hf.training.manifest import read_manifest


def test_labels_are_drawn_of_each_class_alike_and_by_seed():
    labels = np.random.default_rng(0).integers(0, 5, 200)
    rows = draw_labelled(labels, 20, seed=1)
    assert np.bincount(labels[rows]).tolist() == [4] * 5 and len({*rows}) == 20
    assert np.array_equal(rows, draw_labelled(labels, 20, seed=1))
    assert not np.array_equal(rows, draw_labelled(labels, 20, seed=2))
    for count in (4, 201):
        with pytest.raises(ValueError, match=rf"between 5 \(one of each class\) and 200 \(all images\), got {count}"):
            draw_labelled(labels, count, seed=1)


def test_what_is_hidden_keeps_its_pixels():
    images = make_decoded(12)
    every, few = split_by_labels(images, np.array([1, 5, 6]))
    assert isinstance(every, DecodedImages) and isinstance(few, DecodedImages)
    whole, batch = images.__getitems__(range(12)), every.__getitems__(range(12))
    assert torch.equal(whole["pixel_values"], batch["pixel_values"])
    assert batch["labels"].tolist() == [-100, 1, *[-100] * 3, 2, 0, *[-100] * 5]
    assert torch.equal(few.__getitems__([0, 1, 2])["pixel_values"], whole["pixel_values"][[1, 5, 6]])
    table = datasets.Dataset.from_dict({"image": [7, 8, 9], "label": [0, 1, 2]})
    table.set_transform(lambda rows: {"pixel_values": rows["image"], "labels": rows["label"]})
    every, few = split_by_labels(table, np.array([2]))
    assert every[:] == {"pixel_values": [7, 8, 9], "labels": [-100, -100, 2]}
    assert few[:] == {"pixel_values": [9], "labels": [2]}


@pytest.mark.parametrize("decode_once", [True, False])
def test_training_images_without_a_label_are_taken_if_asked_for(tmp_path, decode_once):
    images = [PIL.Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(6)]
    rows = datasets.Dataset.from_dict({"image": images, "label": ["b", None, "a", "b", None, "a"]})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "train.parquet")
    files = {"train_file": str(tmp_path / "train.parquet"), "validation_file": str(tmp_path / "validation.parquet")}
    rows.cast_column("image", datasets.Image()).select([0, 2]).to_parquet(tmp_path / "validation.parquet")
    with pytest.raises(ValueError, match=r"got None in row 1: remove.*--unlabelled true"):
        load_images(ImageArguments(**files), 0)
    args = ImageArguments(
        **files, unlabelled=True, decode_once=decode_once, augmentation="none", horizontal_flip=False
    )
    splits = load_images(args, 0)
    assert splits["train"]["label"][:] == [1, 0, 1, 0] and "label" not in splits["unlabelled"].column_names
    parts, _ = prepare(splits, ViTImageProcessorPil(size={"height": 8, "width": 8}), args, 0)
    both = add_unlabelled(parts["train"], parts["unlabelled"])
    assert [int(both[i]["labels"]) for i in range(6)] == [1, 0, 1, 0, -100, -100]
    assert torch.equal(both[4]["pixel_values"], parts["unlabelled"][0]["pixel_values"])
    args.max_train_samples = 1
    assert {name: len(split) for name, split in load_images(args, 0).items()} == {
        "train": 1,
        "validation": 2,
        "unlabelled": 1,
    }


def test_rows_are_those_of_the_data_with_unlabelled_ones_among_them(tmp_path):
    images = [PIL.Image.new("RGB", (16, 16), (row, 0, 0)) for row in range(24)]
    labels = [None if row < 8 else ("cat", "dog")[row % 2] for row in range(24)]
    split = datasets.Dataset.from_dict({"image": images, "label": labels}).cast_column("image", datasets.Image())
    split.to_parquet(tmp_path / "train.parquet")
    splits = load_images(ImageArguments(train_file=str(tmp_path / "train.parquet"), unlabelled=True), seed=0)
    assert len(splits["unlabelled"]) == 8 and len(splits["train"]) + len(splits["validation"]) == 16
    for part in splits.values():
        assert [image.getpixel((0, 0))[0] for image in part["image"][:]] == list(original_rows(part))


@pytest.mark.slow
@pytest.mark.parametrize("unlabelled", [True, False])
def test_each_network_is_trained_on_what_the_table_says(run_example, tmp_path, unlabelled):
    small = ["--max_train_samples", 96, "--max_eval_samples", 32, "--num_train_epochs", 2, "--paraphraser_epochs", 1]
    small += [
        "--teacher",
        "cifar-resnet-8",
        "--per_device_train_batch_size",
        16,
        "--use_cpu",
        "--disable_tqdm",
        "true",
    ]
    run = functools.partial(run_example, run_iekd, "--output_dir", tmp_path, *small)
    printed = run("--labelled_samples", 20, "--unlabelled", str(unlabelled).lower())
    trained_on = dict(re.findall(r"^(\w+(?: student)?) .* ms +(.*?)  ", printed, flags=re.MULTILINE))
    assert trained_on == {
        "teacher": "96 labelled images",
        "plain student": "20 labelled images",
        "distilled student": "the same 20, 76 unlabelled, and the teacher"
        if unlabelled
        else "the same 20, and the teacher",
    }
    assert re.search(r"^The teacher (adds|takes) .* on 32 validation images", printed, flags=re.MULTILINE)
    steps = {True: 12, False: 4}[unlabelled]  # of 16 images each, in two epochs
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == steps
    plain = [logs for logs in read_manifest(tmp_path / "_plain_student")["log_history"] if "eval_accuracy" in logs]
    assert [logs["step"] for logs in plain] == [steps // 2, steps]  # as many as the distilled one
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert (settings["labelled_samples"], settings["unlabelled"]) == (20, unlabelled)
    resumed = functools.partial(run, "--resume_from_checkpoint", "true", "--unlabelled", str(unlabelled).lower())
    with pytest.raises(ValueError, match=r"plain student in .* trained as now, .* on 30 .*, got one of .* on 20 "):
        resumed("--labelled_samples", 30)
    with pytest.raises(ValueError, match=r"teacher in .* as now, 3 steps on 96 labelled images, got one of 2 epochs "):
        resumed("--labelled_samples", 20, "--max_steps", 3)
    with pytest.raises(ValueError, match=r"Expected --seed 42, as the run in .* was started, got 7: resume with"):
        resumed("--labelled_samples", 20, "--seed", 7)
    with pytest.raises(ValueError, match=r"Expected no --learning_rate, as the run in .* was started, got 0\.05"):
        resumed("--labelled_samples", 20, "--learning_rate", 0.05)
