"""Images, labels, splits and files as people publish them: used as they are meant, or refused in one sentence."""

import copy
import csv
import json
import logging
import pickle

import datasets
import numpy as np
import PIL.Image
import pytest
import run_iekd
import run_mutual
import torch
from conftest import make_images, make_resnet
from test_run_iekd import QUICK
from transformers import ViTImageProcessorPil

from iekd_hf import DecodedImages
from iekd_hf.commands.boxes.data import DetectionDataArguments, load_annotated
from iekd_hf.commands.images.data import DataArguments, load_images
from iekd_hf.commands.images.source import check_filled
from iekd_hf.commands.images.transforms import prepare
from iekd_hf.data.rgb import to_rgb
from iekd_hf.features.tap import FeatureTap


PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def picture(i: int = 0, size: tuple[int, int] = (24, 24)) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8))


def folder_of(root, classes=("cat", "dog"), count=10, ending="png", make=picture):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            make(i).save(root / name / f"{i}.{ending}")
    return str(root)


def rows(labels, feature=None, column="label"):
    images = [picture(i) for i in range(len(labels))]
    split = datasets.Dataset.from_dict({"image": images, column: labels}).cast_column("image", datasets.Image())
    return split if feature is None else split.cast_column(column, feature)


def load_rows(tmp_path, labels, feature=None, **kwargs):
    rows(labels, feature).to_parquet(tmp_path / "rows.parquet")
    return load_images(DataArguments(train_file=str(tmp_path / "rows.parquet"), **kwargs), 0)


def publish(root, **splits):
    """Write a data set as the Hub has them."""
    for name, split in splits.items():
        (root / "data").mkdir(parents=True, exist_ok=True)
        split.to_parquet(root / "data" / f"{name}-00000-of-00001.parquet")
    return str(root)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.full((4, 4), 30000, np.uint16), 117),
        (np.full((4, 4), 30000, np.int32), 117),
        (np.full((4, 4), 0.5, np.float32), 128),
        (np.full((4, 4), 77, np.uint8), 77),
    ],
)
def test_pixels_are_scaled_by_their_range(pixels, expected):
    image = to_rgb(PIL.Image.fromarray(pixels))
    assert image.mode == "RGB" and image.getextrema() == ((expected, expected),) * 3


def test_pixels_without_a_range_are_refused():
    for pixels, words in (
        (np.full((4, 4), 70000, np.int32), "0 to 65535 in an image of mode I, got 70000"),
        (np.full((4, 4), 200.0, np.float32), "0 to 1 in an image of mode F, got 200"),
        (np.full((4, 4), np.nan, np.float32), "mode F, got nan"),
    ):
        with pytest.raises(ValueError, match=words):
            to_rgb(PIL.Image.fromarray(pixels))
        images = datasets.Dataset.from_dict({"image": [PIL.Image.fromarray(np.zeros((4, 4), np.float32)), None]})
        del images
    plain = PIL.Image.new("RGB", (4, 4))
    assert to_rgb(plain).getpixel((0, 0)) == (0, 0, 0)


def test_transparent_pixels_are_white():
    icon = PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    icon.putpixel((1, 1), (10, 20, 30, 255))
    assert to_rgb(icon).getpixel((0, 0)) == (255, 255, 255) and to_rgb(icon).getpixel((1, 1)) == (10, 20, 30)
    palette = icon.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("decode_once", [True, False])
def test_16_bit_images_do_not_become_white(tmp_path, decode_once):
    levels = iter([9000, 30000, 52000])

    def make(i):
        if i == 0:
            make.level = next(levels)
        return PIL.Image.fromarray(np.full((24, 24), make.level, np.uint16))

    root = folder_of(tmp_path / "x", ("a", "b", "c"), 4, make=make)
    args = DataArguments(train_dir=root, decode_once=decode_once, augmentation="none", horizontal_flip=False)
    images, augmentation = prepare(load_images(args, 0), PROCESSOR, args, 0)
    for example in (images["train"][i] for i in range(len(images["train"]))):
        pixels = example["pixel_values"]
        if decode_once:
            pixels = augmentation(pixels[None])
        level = [9000, 30000, 52000][int(example["labels"])]
        torch.testing.assert_close(pixels, torch.full_like(pixels, level / 65535 * 2 - 1), atol=0.01, rtol=0)


def test_images_of_12_bits_in_16_are_told(tmp_path, caplog):
    def load(name, largest):
        root = folder_of(tmp_path / name, make=lambda i: PIL.Image.fromarray(np.full((8, 8), largest, np.uint16)))
        load_images(DataArguments(train_dir=root), 0)

    load("16", 65535)
    assert "dark" not in caplog.text
    load("12", 4095)
    assert "images of mode I;16 in the train split use less than an eighth of their range" in caplog.text


def test_what_cannot_be_decoded_is_named_by_its_file(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "x", ending="jpg", make=lambda i: picture(i, (64, 64)))
    cut = tmp_path / "x" / "dog" / "4.jpg"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    # The row is that of the data as given, before a validation part is drawn.
    with pytest.raises(
        ValueError, match=r"image in row 14 of the .* split \(4\.jpg\).*truncated.*: replace or remove"
    ):
        load_images(DataArguments(train_dir=root), 0)
    files = datasets.Dataset.from_dict({"image": [str(tmp_path / "x" / "dog" / f"{i}.jpg") for i in range(6)]})
    with pytest.raises(ValueError, match=r"image in row 4 \(4\.jpg\).*truncated"):
        DecodedImages.decode(files.cast_column("image", datasets.Image()))
    cut.write_bytes(whole)
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"row \d+ of the .* split \(\d\.jpg\).*DecompressionBombError"):
        load_images(DataArguments(train_dir=root), 0)


@pytest.mark.parametrize("name", ["valid", "val", "dev", "validation"])
def test_validation_splits_by_their_usual_names(tmp_path, name, caplog):
    kind = datasets.ClassLabel(names=["a", "b"])
    root = publish(tmp_path, train=rows([0, 1] * 6, kind), extra=rows([0, 1], kind), **{name: rows([1, 0] * 3, kind)})
    with caplog.at_level(logging.WARNING):
        splits = load_images(DataArguments(dataset_name=root), 0)
    assert {split: len(of) for split, of in splits.items()} == {"train": 12, "validation": 6}
    assert "that are not used: extra" in caplog.text


def test_without_a_train_split(tmp_path):
    root = publish(tmp_path / "x", test=rows([0, 1] * 6))
    with pytest.raises(ValueError, match=r"a split called train in .*, got test: rename"):
        load_images(DataArguments(dataset_name=root), 0)
    for name in ("train", "val"):
        folder_of(tmp_path / "folders" / name, count=2)
    with pytest.raises(ValueError, match=r"got the splits train, val: give the folder as --dataset_name"):
        load_images(DataArguments(train_dir=str(tmp_path / "folders")), 0)
    splits = load_images(DataArguments(dataset_name=str(tmp_path / "folders")), 0)
    assert {split: len(of) for split, of in splits.items()} == {"train": 4, "validation": 4}


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl"])
def test_files_by_their_ending_in_a_folder_with_brackets(tmp_path, ending):
    root = tmp_path / "fold [1]*"
    folder_of(root)
    table = [{"image": f"{name}/{i}.png", "label": name} for name in ("cat", "dog") for i in range(10)]
    frame = datasets.Dataset.from_list(table)
    file = root / f"train.{ending}"
    frame.to_csv(file) if ending == "csv" else frame.to_json(file)
    splits = load_images(DataArguments(train_file=str(file)), 0)
    assert len(splits["train"]) == 17 and splits["train"].features["label"].names == ["cat", "dog"]
    assert splits["train"][0]["image"].size == (24, 24)


def test_a_folder_with_brackets_and_files_of_other_kinds(tmp_path):
    root = folder_of(tmp_path / "fold [1]")
    assert len(load_images(DataArguments(train_dir=root), 0)["train"]) == 17
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ValueError, match=r"ends in \.parquet, \.csv, \.json, \.jsonl, got .*x\.txt"):
        load_images(DataArguments(train_file=str(tmp_path / "x.txt")), 0)
    (tmp_path / "x.parquet").write_text("image,label")
    with pytest.raises(ValueError, match=r"Expected a parquet file of train images, got .*x\.parquet"):
        load_images(DataArguments(train_file=str(tmp_path / "x.parquet")), 0)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (("cat/a", "cat/b", "dog/a", "dog/b"), "got several folders called a and several b, each of which"),
        (
            ("cat", "dog", "dog/more"),
            r"got images in '.*dog' and in folders within it: move them, or name the classes",
        ),
        (("", "cat", "dog"), "got images in '.*folders' and in folders within it"),
        (("cat",), "got images in '.*cat' alone"),
    ],
)
def test_folders_that_are_not_one_for_each_class(tmp_path, places, words):
    root = tmp_path / "folders"
    for place in places:
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            picture(i).save(root / place / f"{i}.png")
    with pytest.raises(ValueError, match=f"Expected a folder of images for each class in '.*folders', {words}"):
        load_images(DataArguments(train_dir=str(root)), 0)
    files = sorted(root.rglob("*.png"))
    lines = [f"{file.relative_to(root).as_posix()},{i % 2}" for i, file in enumerate(files)]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    assert load_images(DataArguments(train_dir=str(root)), 0)["train"].features["label"].names == ["0", "1"]


def test_classes_may_lie_deeper_and_beside_hidden_folders(tmp_path):
    folder_of(tmp_path / "pets" / "small")
    folder_of(tmp_path / "pets" / "large", classes=("cow", ".ipynb_checkpoints"))
    splits = load_images(DataArguments(train_dir=str(tmp_path / "pets")), 0)
    assert splits["train"].features["label"].names == ["cat", "cow", "dog"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"validation_dir": "v"}, "as --train_dir or --train_file beside validation_dir, got none: give them too"),
        ({"dataset_name": "d", "validation_file": "v"}, "beside validation_file, got dataset_name, whose own splits"),
        ({"train_dir": "t", "validation_file": "v", "validation_dir": "v"}, "got validation_dir and validation_file"),
        (
            {"train_file": "t", "dataset_config_name": "c"},
            "Expected dataset_name beside dataset_config_name, got none",
        ),
    ],
)
@pytest.mark.parametrize("arguments", [DataArguments, DetectionDataArguments])
def test_sources_that_would_not_be_read_are_refused(given, words, arguments):
    with pytest.raises(ValueError, match=words):
        arguments(**given)


def test_labels_of_every_kind_become_classes(tmp_path, caplog):
    def names(labels, feature=None):
        split = load_rows(tmp_path, labels, feature)["train"]
        return split.features["label"].names

    assert names([True, False] * 5) == ["False", "True"]
    assert names(["b", "a"] * 5) == ["a", "b"]
    assert names([0.0, 1.0] * 5) == ["0", "1"]
    assert names([0, 1, 2] * 4) == ["0", "1", "2"] and "become the classes" not in caplog.text
    assert names([10001, 7] * 5) == ["7", "10001"]
    assert "The labels 7, 10001 become the classes 0 to 1" in caplog.text


@pytest.mark.parametrize(
    ("labels", "feature", "words"),
    [
        ([0, 1, None, 1] * 3, None, "a label in every row of the train split, got None in row 2"),
        ([0, 1, -1, 1] * 3, datasets.ClassLabel(names=["a", "b"]), "got -1 in row 2"),
        ([0, 1, 1, -100] * 3, None, "got -100 in row 3"),
        (["a", "", "b", "b"] * 3, None, "got '' in row 1"),
        ([0.0, 1.7] * 6, None, r"Expected classes as labels of the train split, got 1\.7 in row 1"),
        ([3] * 12, None, "images of two classes or more, got the label 3 alone"),
        ([[1, 0, 1], [0, 1, 0]] * 6, None, "one class as the label of each image in the train split, got the type"),
    ],
)
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, feature, words):
    with pytest.raises(ValueError, match=words):
        load_rows(tmp_path, labels, feature)


def test_numbers_and_columns_of_the_command_that_cannot_be_meant(tmp_path):
    for argument, value in (("max_train_samples", 0), ("max_eval_samples", -5), ("image_size", 0)):
        with pytest.raises(ValueError, match=f"Expected {argument} of at least 1.*got {value}"):
            DataArguments(**{argument: value})
    with pytest.raises(ValueError, match="image_square_size of at least 1 pixel, got 0"):
        DetectionDataArguments(image_square_size=0)
    with pytest.raises(ValueError, match=r"images, or their paths, in column 'label' of the train split, got Value"):
        load_rows(tmp_path, [0, 1] * 6, image_column_name="label")
    with pytest.raises(ValueError, match="two images or more in the train split, as a part of it validates"):
        check_filled(datasets.DatasetDict({"train": rows([0])}))


def test_a_column_that_may_be_meant_as_well_is_named(tmp_path, caplog):
    part = rows([0, 1] * 6, datasets.ClassLabel(names=["a", "b"]), "split").select_columns("split")
    both = datasets.concatenate_datasets([rows(["cat", "dog"] * 6), part], axis=1)
    both.to_parquet(tmp_path / "rows.parquet")
    load = {"train_file": str(tmp_path / "rows.parquet")}
    assert load_images(DataArguments(**load), 0)["train"].features["label"].names == ["a", "b"]
    said = "The labels of the train split are read from its column split, not from label: --label_column_name chooses."
    assert said in caplog.text
    caplog.clear()
    splits = load_images(DataArguments(**load, label_column_name="label"), 0)
    assert splits["train"].features["label"].names == ["cat", "dog"] and not caplog.text
    both = both.cast_column("label", datasets.ClassLabel(names=["cat", "dog"])).rename_column("label", "labels")
    both.select_columns(["image", "split", "labels"]).to_parquet(tmp_path / "rows.parquet")
    assert load_images(DataArguments(**load), 0)["train"].features["label"].names == ["cat", "dog"]
    assert not caplog.text


@pytest.mark.parametrize("column", ["image", "label"])
def test_one_column_cannot_be_images_and_labels(tmp_path, column):
    both = {"image_column_name": column, "label_column_name": column}
    paths = rows(["a.png", "b.png"] * 6).remove_columns("image" if column == "label" else "label")
    paths.to_parquet(tmp_path / "rows.parquet")
    words = f"images and labels in two columns of the train split, got {column!r} for both: .*--label_column_name"
    with pytest.raises(ValueError, match=words):
        load_images(DataArguments(train_file=str(tmp_path / "rows.parquet"), **both), 0)


@pytest.mark.parametrize("decode_once", [True, False])
@pytest.mark.parametrize("hidden", [-1, None])
def test_hidden_labels_of_a_split_that_is_predicted(tmp_path, hidden, decode_once):
    kind = datasets.ClassLabel(names=["a", "b"])
    root = publish(
        tmp_path, train=rows([0, 1] * 6, kind), validation=rows([0, 1] * 2, kind), test=rows([hidden] * 3, kind)
    )
    args = DataArguments(dataset_name=root, decode_once=decode_once)
    images, _ = prepare(load_images(args, 0), PROCESSOR, args, 0)
    assert "labels" not in images["test"][0] and "pixel_values" in images["test"][0]


@pytest.mark.slow
def test_transforms_can_be_given_to_spawned_workers(tmp_path):
    args = DataArguments(train_dir=folder_of(tmp_path / "x"), decode_once=False, augmentation="resized_crop")
    images, _ = prepare(load_images(args, 0), PROCESSOR, args, 0)
    for split in images.values():
        assert pickle.loads(pickle.dumps(split))[0]["pixel_values"].shape == (3, 16, 16)
    loader = torch.utils.data.DataLoader(images["train"], batch_size=4, num_workers=1, multiprocessing_context="spawn")
    assert next(iter(loader))["pixel_values"].shape == (4, 3, 16, 16)


def test_a_tapped_model_can_be_copied_and_saved(tmp_path):
    model, pixels = make_resnet(), torch.zeros(1, 3, 32, 32)
    tap = FeatureTap(model, before_activation=True)
    tap.attach()
    twin = copy.deepcopy(model)
    torch.save(twin, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (twin, loaded):
        assert torch.equal(other.eval()(pixels).logits, model.eval()(pixels).logits)
    assert tap.run({"pixel_values": pixels})[1][0].ndim == 4


def test_predictions_of_hidden_labels_with_commas_in_their_names(run_example, tmp_path):
    names = ["cat, black", 'the "dog"']
    kind = datasets.ClassLabel(names=names)
    root = publish(
        tmp_path / "x", train=rows([0, 1] * 8, kind), validation=rows([0, 1] * 4, kind), test=rows([-1] * 5, kind)
    )
    small = [*QUICK, "--plain_student", "false", "--image_size", 16, "--student", "cifar-resnet-8"]
    printed = run_example(run_iekd, "--output_dir", tmp_path / "o", "--dataset_name", root, *small, "--do_predict")
    assert "distilled student" in printed
    with (tmp_path / "o" / "predictions.csv").open(newline="") as file:
        predictions = list(csv.reader(file))
    assert predictions[0] == ["row", "label"] and [row for row, _ in predictions[1:]] == list("01234")
    assert {label for _, label in predictions[1:]} <= set(names)


def detection_file(tmp_path, categories, name="rows"):
    objects = [{"bbox": [[4, 4, 8, 8]], "category": [category]} for category in categories]
    images = [picture(i, (40, 40)) for i in range(len(objects))]
    split = datasets.Dataset.from_dict({"image": images, "objects": objects})
    split.cast_column("image", datasets.Image()).to_parquet(tmp_path / f"{name}.parquet")
    return str(tmp_path / f"{name}.parquet")


def test_categories_of_objects(tmp_path, caplog):
    bad = detection_file(tmp_path, ["a", "b", "a", None, "a", "b"])
    with pytest.raises(ValueError, match=r"every object in the train split, got None in row 3: name"):
        load_annotated(DetectionDataArguments(train_file=bad, validation_file=bad), 0)
    good = detection_file(tmp_path, [7, 10001] * 3)
    splits, names = load_annotated(DetectionDataArguments(train_file=good, validation_file=good), 0)
    assert names == ["7", "10001"] and splits["train"].truth([1])[0]["labels"] == [1]
    assert "The labels 7, 10001 become the classes 0 to 1" in caplog.text


@pytest.mark.parametrize("module", [run_iekd, run_mutual])
def test_mistakes_are_said_before_anything_trains(run_example, make_trainer, make_mutual, tmp_path, module):
    def run(*arguments):
        run_example(module, "--output_dir", tmp_path / "o", "--use_cpu", *arguments)

    with pytest.raises(ValueError, match=r"a whole checkpoint to resume from, got .*no such folder"):
        run("--resume_from_checkpoint", tmp_path / "o" / "checkpoint-7")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"a whole checkpoint .*empty': trainer_state\.json is missing"):
        run("--resume_from_checkpoint", tmp_path / "empty")
    other = {run_iekd: make_trainer, run_mutual: make_mutual}[module]
    other(save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match=r"(a checkpoint of this CifarResNet\w+ in|peers CifarResNet\w+, Cifar)"):
        run("--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2", "--max_train_samples", 24)
    for epochs in ("0", "-3"):
        with pytest.raises(ValueError, match=rf"num_train_epochs above 0, got {epochs}\.0: .*--do_train false"):
            run("--num_train_epochs", epochs)
    assert not list((tmp_path / "o").glob("*"))


def test_a_saved_teacher_is_loaded_whole_or_refused(run_example, tmp_path):
    teacher = make_resnet(16, num_labels=5)
    teacher.save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").unlink()
    torch.save(teacher.state_dict(), tmp_path / "t" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"Expected --teacher='.*' to hold a loadable"):
        run_example(run_iekd, "--output_dir", tmp_path / "o", *QUICK, "--teacher", tmp_path / "t")
    make_resnet(16, num_labels=5).save_pretrained(tmp_path / "code")
    processor = {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.Own"}}
    (tmp_path / "code" / "preprocessor_config.json").write_text(json.dumps(processor))
    (tmp_path / "code" / "own.py").write_text("class Own: pass")
    with pytest.raises(ValueError, match=r"Expected the teacher's image processor without code of its own"):
        run_example(run_iekd, "--output_dir", tmp_path / "o", *QUICK, "--teacher", tmp_path / "code")


def test_the_card_shows_names_from_outside_as_they_are(make_trainer, tmp_path):
    names = ["a\n---\n# heading", "<script>alert(1)</script>", "![image](https://example.org/x.png) | `b` *c*"]
    maps = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}

    def per_class(prediction):
        return {f"accuracy_{name}": 0.5 for name in names}

    trainer = make_trainer(
        model=make_resnet(8, **maps), eval_dataset=make_images(), compute_metrics=per_class, eval_strategy="epoch"
    )
    trainer.train()
    trainer.args.optim_args = "momentum=0.9<img src=x>\n# shouted"
    trainer.create_model_card(dataset="mine\n---\n# <b>", dataset_args="one\n---\n# two")
    card = (tmp_path / "out" / "README.md").read_text()
    text = card.partition("\n---\n")[2]
    assert "<img" not in text and "# shouted" not in text.splitlines()
    assert "# heading" not in text.splitlines() and "\n---" not in text
    assert "<script>" not in text and "<b>" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "![image]" not in text and r"!\[image\](https://example.org/x.png) \| \`b\` \*c\*" in text
