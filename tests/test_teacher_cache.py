"""The teacher's cache: the same training as with a live teacher, made once, whole or not at all, refused in time."""

import collections
import json
import os
import subprocess
import sys
import threading

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import make_images, make_resnet
from test_whole_batches import make_augmentation, make_decoded
from torch import nn
from transformers import TrainerCallback, ViTImageProcessorPil

from iekd_hf import DecodedImages, Paraphraser
from iekd_hf.teacher.cache import _digest
from iekd_hf.teacher.frozen import FrozenTeacher, attributes


def make_paraphraser(seed: int = 0) -> Paraphraser:
    torch.manual_seed(seed)
    return Paraphraser(16, 8)


@pytest.fixture
def make(make_trainer):
    """Build a trainer on raw images with a cache of two views, and count the teacher's images."""

    def call(**kwargs):
        defaults = {
            "train_dataset": make_decoded(16),
            "augmentation": make_augmentation(),
            "paraphraser": make_paraphraser(),
            "cache_teacher": True,
            "cache_views": 2,
            "max_steps": -1,
            "num_train_epochs": 2,
        }
        return make_trainer(**(defaults | kwargs))

    return call


@pytest.fixture
def images_seen(monkeypatch):
    """Count the images that the teacher is run on."""
    counts, forward = collections.Counter(), FrozenTeacher.forward

    def counted(self, inputs, with_logits=False):
        counts["images"] += len(inputs["pixel_values"])
        return forward(self, inputs, with_logits)

    monkeypatch.setattr(FrozenTeacher, "forward", counted)
    return counts


def course(trainer) -> list[float]:
    trainer.train()
    steps = [logs for logs in trainer.state.log_history if "task_loss" in logs]
    return [logs[name] for logs in steps for name in sorted(logs) if name.endswith("_loss")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lambda_kd", [0.0, 1.0])
def test_a_cached_run_has_the_losses_of_a_live_one(make, images_seen, precision, lambda_kd):
    courses = []
    for cached in (False, True):
        trainer = make(cache_teacher=cached, lambda_kd=lambda_kd, bf16=precision == "bf16", optim="sgd")
        images_seen.clear()
        courses.append(course(trainer))
        # Every image once an epoch, or once a view. Before, 4 batches tell the gradients' shares, of which a cache
        # knows the factors already, and one image tells the shapes of a cache.
        assert images_seen["images"] == 2 * 16 + (1 if cached else 4 * 4)
    assert len(courses[0]) == 8 * (4 if lambda_kd else 3)
    # float16 keeps 11 bits: all of what bfloat16 has, but not of float32, which small differences of logits show.
    if precision == "bf16":
        assert courses[1] == courses[0]
    else:
        np.testing.assert_allclose(courses[1], courses[0], rtol=2e-3 if lambda_kd else 2e-4)
        assert courses[1] != courses[0]


def test_the_teachers_pixels_are_made_before_it_is_cached(make):
    small, large = (
        ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[mean] * 3)
        for size, mean in ((32, 0.5), (48, 0.1))
    )
    courses = [
        course(make(cache_teacher=cached, processing_class=small, teacher_processor=large, optim="sgd"))
        for cached in (False, True)
    ]
    np.testing.assert_allclose(courses[1], courses[0], rtol=2e-4)


def test_views_take_turns(make, images_seen):
    trainer, views = make(num_train_epochs=5), []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            views.append(trainer.view)

    trainer.add_callback(Watch())
    trainer.train()
    assert views == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4 + [0] * 4
    assert images_seen["images"] == 1 + 2 * 16


def test_it_is_made_once_and_anew_when_anything_changes(make, images_seen, tmp_path):
    shared = {"teacher_cache_dir": str(tmp_path / "shared"), "num_train_epochs": 1}
    other_images = make_decoded(16, seed=1)
    make_resnet(16, seed=2).save_pretrained(tmp_path / "teacher")
    make(**shared).train()
    for changed in (
        {},
        {"lambda_inh": 5.0, "learning_rate": 0.001},  # nothing that the teacher says depends on
        {"teacher_model": str(tmp_path / "teacher")},  # the same one
        {"teacher_model": make_resnet(16, seed=5)},
        {"teacher_layers": ["resnet.encoder.stages.1"]},
        {"paraphraser": make_paraphraser(seed=1)},
        {"train_dataset": other_images},
        {"augmentation": make_augmentation(seed=1)},
        {"augmentation": make_augmentation(padding=3)},
        {"augmentation": make_augmentation(mean=[0.1, 0.2, 0.3])},
        {"teacher_processor": ViTImageProcessorPil(image_mean=[0.1] * 3, size={"height": 32, "width": 32})},
        {"cache_views": 3},
        {"lambda_kd": 1.0},
        {"bf16": True},
        {"teacher_dtype": "bfloat16"},
    ):
        images_seen.clear()
        processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
        make(**({**shared, "processing_class": processor} | changed)).train()
        same = changed.keys() <= {"lambda_inh", "learning_rate"} or isinstance(changed.get("teacher_model"), str)
        assert images_seen["images"] == (0 if same else 1 + 16 * changed.get("cache_views", 2)), changed
    folders = [path for path in (tmp_path / "shared").iterdir() if path.is_dir()]
    assert len(folders) == 13
    for folder in folders:
        names = {path.name for path in folder.iterdir()}
        assert names - {"logits.npy"} == {"complete.json", "done.npy", "factors_0.npy"}
        spec = (folder / "complete.json").read_text()
        assert str(tmp_path) not in spec and json.loads(spec)["views"] in (2, 3)


def test_it_is_made_anew_when_files_of_images_have_changed(make, images_seen, tmp_path):
    rows = {"image": [str(tmp_path / f"{i}.png") for i in range(4)], "label": [0, 1, 2, 0]}
    shared = {"teacher_cache_dir": str(tmp_path / "shared"), "num_train_epochs": 1}
    fingerprints, seen = set(), []
    for color in ("red", "blue", "blue"):
        for path in rows["image"]:
            PIL.Image.new("RGB", (32, 32), color).save(path)
        files = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        images = DecodedImages.decode(files)
        fingerprints.add(images.table._fingerprint)
        images_seen.clear()
        make(**shared, train_dataset=images).train()
        seen.append(images_seen["images"])
    assert len(fingerprints) == 1 and seen == [1 + 2 * 4, 1 + 2 * 4, 0]


def test_it_is_found_for_a_copy_of_the_same_files(make, images_seen, tmp_path):
    """As a cluster makes for each job: to datasets, files of other times are other data."""
    shared = {"teacher_cache_dir": str(tmp_path / "shared"), "num_train_epochs": 1}
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    rows = {"image": [PIL.Image.fromarray(pixels) for pixels in noise], "label": [0, 1, 2, 0]}
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    names, seen = set(), []
    for job in ("first", "second"):
        (tmp_path / job).mkdir()
        made.to_parquet(tmp_path / job / "train.parquet")
        images = DecodedImages.decode(datasets.Dataset.from_parquet(str(tmp_path / job / "train.parquet")))
        names.add(images.table._fingerprint)
        images_seen.clear()
        make(**shared, train_dataset=images).train()
        seen.append(images_seen["images"])
    assert len(names) == 2 and seen == [1 + 2 * 4, 0]


class Own(nn.Module):
    """A teacher whose function is not in its weights alone."""

    def __init__(self, dilation: int = 1, slope: float = 0.1, offset: float = 0.0, activation=F.leaky_relu):
        torch.manual_seed(0)
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=4, padding=dilation, dilation=dilation)
        self.head = nn.Linear(16, 3)
        self.slope, self.activation, self.config = slope, activation, {"any": object()}
        self.register_buffer("offset", torch.tensor(offset), persistent=False)

    def forward(self, pixel_values):
        return self.head(self.activation(self.conv(pixel_values + self.offset), self.slope).mean((2, 3)))


def test_it_is_made_anew_for_a_module_of_the_same_weights_that_differs_otherwise(make, images_seen, tmp_path):
    shared = {"teacher_cache_dir": str(tmp_path / "shared"), "num_train_epochs": 1, "teacher_layers": ["conv"]}
    for changed in ({}, {"dilation": 4}, {"slope": 0.2}, {"offset": 1.0}, {"activation": F.elu}):
        for images in (1 + 2 * 16, 0):
            images_seen.clear()
            make(**shared, teacher_model=Own(**changed), paraphraser=make_paraphraser()).train()
            assert images_seen["images"] == images, changed


def test_it_is_made_anew_for_a_model_of_transformers_that_was_changed_by_hand(make, images_seen, tmp_path):
    """The weights and the configuration are the same."""
    shared = {"teacher_cache_dir": str(tmp_path / "shared"), "num_train_epochs": 1}
    for change in ("none", "stride", "activation"):
        teacher = make_resnet(16, seed=2)
        if change == "stride":
            teacher.resnet.embedder.embedder.convolution.stride = (1, 1)
        if change == "activation":
            teacher.resnet.encoder.stages[0].layers[0].activation = nn.GELU()
        images_seen.clear()
        make(**shared, teacher_model=teacher, paraphraser=make_paraphraser()).train()
        assert images_seen["images"] == 1 + 2 * 16, change


def test_another_process_finds_it():
    # A digest that depended on addresses or hash seeds would differ.
    code = (
        "from test_teacher_cache import Own; from test_whole_batches import make_augmentation, make_decoded; "
        "from iekd_hf.teacher.cache import _digest; from iekd_hf.teacher.frozen import attributes; "
        "print(_digest(make_augmentation(size=(3, 4))), attributes(Own()), make_decoded(4).checksum())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    here = [_digest(make_augmentation(size=(3, 4))), attributes(Own()), make_decoded(4).checksum()]
    assert there.stdout.split() == here


def test_an_interrupted_one_is_continued_and_never_read(make, images_seen, monkeypatch, tmp_path):
    monkeypatch.setattr("iekd_hf.teacher.cache._BLOCK", 8)
    run, calls = FrozenTeacher.forward, []

    def broken(self, inputs, with_logits=False):
        calls.append(len(inputs["pixel_values"]))
        if sum(calls) > 1 + 3 * 8 + 4:  # one image for the shapes, three blocks of four, and a half
            raise KeyboardInterrupt
        return run(self, inputs, with_logits)

    whole = course(make(output_dir=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        patch.setattr(FrozenTeacher, "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            make(per_device_eval_batch_size=4).train()
    (folder,) = (path for path in (tmp_path / "out" / "_teacher_cache").iterdir() if path.is_dir())
    done = np.load(folder / "done.npy").astype(bool).tolist()
    assert done == [True] * 3 + [False] and not (folder / "complete.json").exists()
    images_seen.clear()
    continued = course(make(per_device_eval_batch_size=4))
    assert images_seen["images"] == 8  # the last block only
    assert continued == whole


@pytest.mark.parametrize("complete", [True, False])
def test_blocks_that_have_changed_are_made_anew(make, images_seen, monkeypatch, tmp_path, caplog, complete):
    monkeypatch.setattr("iekd_hf.teacher.cache._BLOCK", 8)
    expected = course(make())
    (folder,) = (path for path in (tmp_path / "out" / "_teacher_cache").iterdir() if path.is_dir())
    file = folder / "factors_0.npy"
    whole = bytearray(file.read_bytes())
    file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 16]) + whole[-4:])  # of the last of four blocks
    if not complete:
        (folder / "complete.json").unlink()
    images_seen.clear()
    assert course(make()) == expected
    assert images_seen["images"] == 8 and file.read_bytes() == whole
    assert ("1 of 4 blocks are made again, the first of them view 1 from image 8 on" in caplog.text) == complete


@pytest.mark.parametrize("name", ["factors_0.npy", "done.npy"])
def test_an_emptied_file_is_made_anew(make, images_seen, tmp_path, name, caplog):
    expected = course(make())
    (folder,) = (path for path in (tmp_path / "out" / "_teacher_cache").iterdir() if path.is_dir())
    (folder / name).write_bytes(b"")
    images_seen.clear()
    assert course(make()) == expected and images_seen["images"] == 1 + 2 * 16
    assert "is damaged and will be made again" in caplog.text


def test_files_without_a_note_of_what_is_done_count_for_nothing(make, images_seen, tmp_path):
    first = make()
    first.train()
    (folder,) = (path for path in (tmp_path / "out" / "_teacher_cache").iterdir() if path.is_dir())
    (folder / "complete.json").unlink()
    (folder / "factors_0.npy").write_bytes(b"half of an array")
    images_seen.clear()
    make().train()
    assert images_seen["images"] == 1 + 2 * 16
    assert np.isfinite(np.load(folder / "factors_0.npy")).all()


def test_runs_that_want_the_same_wait_for_the_one_that_makes_it(make, images_seen):
    trainers = [make(num_train_epochs=1) for _ in range(2)]
    threads = [threading.Thread(target=trainer.train) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert images_seen["images"] == 1 + 2 * 16
    assert [trainer.state.global_step for trainer in trainers] == [4, 4]


def test_a_disk_that_is_too_small_is_refused_with_the_numbers(make, monkeypatch):
    trainer = make()
    usage = collections.namedtuple("usage", "total used free")(2**40, 2**40 - 2**13, 2**13)
    monkeypatch.setattr("iekd_hf.teacher.cache.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match=r"0.00 GiB for 2 views of 16 images, got 0.00 GiB free.*lower cache_views"):
        trainer.train()


def test_values_beyond_float16_are_refused(make):
    paraphraser = make_paraphraser()
    with torch.no_grad():
        paraphraser.encoder[-2].weight.mul_(1e6)
    with pytest.raises(FloatingPointError, match=r"that float16 can hold.*cache_teacher=False"):
        make(paraphraser=paraphraser).train()


def test_images_whose_views_cannot_be_made_again_are_refused(make):
    with pytest.raises(ValueError, match=r"Expected DecodedImages and an augmentation.*got list and BatchAugm"):
        make(train_dataset=make_images(4))
    with pytest.raises(ValueError, match="got DecodedImages and NoneType"):
        make(augmentation=None)
    with pytest.raises(ValueError, match="Expected cache_views above 0, got 0"):
        make(cache_views=0)


def test_without_factors_only_logits_are_cached(make, tmp_path):
    trainer = make(lambda_inh=0.0, lambda_exp=0.0, lambda_kd=1.0, paraphraser=None)
    trainer.train()
    (folder,) = (path for path in (tmp_path / "out" / "_teacher_cache").iterdir() if path.is_dir())
    assert {path.name for path in folder.iterdir()} == {"complete.json", "done.npy", "logits.npy"}


def test_resuming_reads_the_same_cache(make, images_seen):
    common = {"num_train_epochs": 3, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 6}
    whole = make(**common)
    whole.train()
    images_seen.clear()
    parts = make(**common)
    parts.train(resume_from_checkpoint=str(parts.args.output_dir) + "/checkpoint-6")
    assert images_seen["images"] == 0
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))


def test_the_teacher_waits_in_the_hosts_memory_unless_it_is_needed(make, monkeypatch):
    """It runs for the cache and on held-out images without labels, and is where it runs then, and after training."""
    places, runs, to, maps = [], [], FrozenTeacher.to, FrozenTeacher.feature_maps

    def moved(self, place, *args, **kwargs):
        places.append(place)
        return to(self, place, *args, **kwargs)

    def noted(self, *args, **kwargs):
        runs.append(places[-1])
        return maps(self, *args, **kwargs)

    monkeypatch.setattr(FrozenTeacher, "to", moved)
    monkeypatch.setattr(FrozenTeacher, "feature_maps", noted)
    unlabelled = make_decoded(8)
    unlabelled.table = unlabelled.table.remove_columns("labels")
    trainer = make(eval_dataset=unlabelled, eval_strategy="epoch")
    places.clear()
    places.append(trainer.args.device)
    trainer.train()
    assert "eval_inheritance_loss" in trainer.state.log_history[-2]
    there, device = "cpu", trainer.args.device  # a name, and torch's device, so that they differ here
    assert set(map(type, runs)) == {torch.device} and len(runs) > 4
    assert [type(place) for place in places] == [torch.device, str, *2 * [torch.device, str], torch.device]
    assert places[-1] == device and places[1] == there
