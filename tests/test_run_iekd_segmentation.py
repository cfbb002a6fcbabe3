"""The segmentation script: the whole run in small, few masks, other data and models, memory that does not grow."""

import functools
import json
import re
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import run_iekd_segmentation
import torch
from conftest import make_resnet
from test_run_iekd_detection import TensorsInMemory
from test_segmentation_transforms import split_of
from test_segmenters import build
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessorPil,
    TrainingArguments,
    pipeline,
)

from iekd_hf.commands.images.source import original_rows
from iekd_hf.commands.masks.data import SegmentationDataArguments, load_masked
from iekd_hf.commands.masks.metrics import MeanIoU
from iekd_hf.commands.masks.run import build_segmenter, fit_whole
from iekd_hf.commands.masks.shapes import CLASSES, make_masked_shapes
from iekd_hf.commands.masks.tiny_segmenters import tiny_processor
from iekd_hf.commands.masks.trainers import PixelMetrics, SegmentationTrainer
from iekd_hf.commands.masks.transforms import SegmentationImages, collate


QUICK = ["--num_train_epochs", "1", "--paraphraser_epochs", "1", "--teacher", "tiny-upernet-8"]
QUICK += ["--student", "tiny-upernet-4", "--disable_tqdm", "true", "--use_cpu"]
FEW = ["--max_train_samples", "16", "--max_eval_samples", "6", "--labelled_samples", "5"]


@pytest.fixture
def run(run_example):
    return functools.partial(run_example, run_iekd_segmentation)


@pytest.mark.slow
def test_the_shapes_from_nothing_to_the_table(run, tmp_path):
    printed = run("--output_dir", tmp_path, *QUICK, *FEW, "--do_predict", "--eval_strategy", "epoch")
    for row in ("teacher", "plain student", "distilled student"):
        assert re.search(rf"^{row} +\d+,\d\d\d +\d+\.\d +\d+\.\d +\d+ +(\d+|the) \w", printed, flags=re.MULTILINE), (
            printed
        )
    assert PIL.Image.open(tmp_path / "segmentations.png").size[1] > 700
    student, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and student.config.id2label == dict(enumerate(CLASSES))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["method"] == "ie-ft+kd"
    assert list(results["models"]) == ["teacher", "plain student", "distilled student"]
    metrics = results["models"]["distilled student"]["metrics"]
    assert "5 masks" in printed and "the same 5, 11 images without, and the teacher" in printed
    assert {"mean_iou", "overall_accuracy", "mean_accuracy", "iou_background", "loss"} <= set(metrics)
    # The saved student, used as anybody would, finds what the run wrote down and measured.
    truth = make_masked_shapes(200, seed=1).shuffle(seed=42).select(range(6))
    saved = [np.asarray(PIL.Image.open(tmp_path / "predictions" / f"{row}.png")) for row in original_rows(truth)]
    measured = MeanIoU(num_labels=5).compute(predictions=saved, references=truth["label"])
    assert measured["mean_iou"] == pytest.approx(metrics["mean_iou"])
    found = pipeline("image-segmentation", str(tmp_path))(truth[0]["image"], subtask="semantic")
    shown = np.full((48, 48), 255)
    for segment in found:
        shown[np.asarray(segment["mask"]) > 0] = CLASSES.index(segment["label"])
    assert (shown == saved[0]).mean() > 0.99


@pytest.mark.slow
def test_a_data_set_as_published_yaml_and_saved_models(run, tmp_path):
    """A folder with id2label.json, background that does not count, 16 bits, a teacher of another family and size."""
    names = dict(enumerate(["circle", "square", "triangle", "cross"]))
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 12), ("validation", 5)):
        rows = make_masked_shapes(count, seed=count).rename_columns({"image": "pixels", "label": "annotation"})
        deep = [PIL.Image.fromarray(np.asarray(mask).astype(np.uint16)) for mask in rows["annotation"]]
        features = datasets.Features({"annotation": datasets.Image(), "pixels": datasets.Image()})
        columns = {"annotation": deep, "pixels": rows["pixels"]}
        datasets.Dataset.from_dict(columns, features).to_parquet(folder / f"{split}.parquet")
    (folder / "id2label.json").write_text(json.dumps(names))
    teacher, _ = build("UperNet", 4)
    teacher.config.id2label = names
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_processor(64, 64).save_pretrained(tmp_path / "teacher")
    build("SegFormer", 3)[0].save_pretrained(tmp_path / "student")  # of other classes: gets a new head
    SegformerImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "student")
    recipe = {"teacher": str(tmp_path / "teacher"), "student": str(tmp_path / "student"), "dataset_name": str(folder)}
    recipe |= {"do_reduce_labels": True, "output_dir": str(tmp_path / "out")}
    recipe |= {"num_train_epochs": 1, "paraphraser_epochs": 1, "disable_tqdm": True, "use_cpu": True}
    (tmp_path / "recipe.yaml").write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in recipe.items()))
    printed = run(tmp_path / "recipe.yaml")
    assert re.search(r"^teacher +[\d,]+ +\d+\.\d +\d+\.\d +\d+ +- +-$", printed, flags=re.MULTILINE), printed
    assert AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out").config.id2label == names
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").do_reduce_labels
    recipe |= {"student": recipe["output_dir"], "output_dir": str(tmp_path / "alone"), "do_train": False}
    recipe |= {"image_size": [64, 96], "do_predict": True}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert re.search(r"^student +[\d,]+ +\d", run(tmp_path / "recipe.json"), flags=re.MULTILINE)
    files = (tmp_path / "alone" / "predictions").glob("*.png")
    assert set(np.concatenate([np.unique(PIL.Image.open(file)) for file in files])) <= {1, 2, 3, 4}  # as in the masks


@pytest.mark.slow
def test_a_classifier_teaches_a_segmenter(run, tmp_path):
    make_resnet(16, num_labels=5, seed=2).save_pretrained(tmp_path / "teacher")
    arguments = [*QUICK, *FEW, "--teacher", tmp_path / "teacher", "--plain_student", "false"]
    printed = run("--output_dir", tmp_path / "out", *arguments)
    assert re.search(r"^teacher +[\d,]+ +- +- +\d+ +- +-$", printed, flags=re.MULTILINE), printed
    assert "plain student" not in printed and "distilled student" in printed
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["method"] == "ie-ft"


@pytest.mark.slow
def test_what_cannot_be_had(run, tmp_path):
    with pytest.raises(ValueError, match=r"--student .*'nobody/nothing'.*HF_HUB_CACHE"):
        run("--output_dir", tmp_path, *QUICK, *FEW, "--student", "nobody/nothing")
    with pytest.raises(ValueError, match=r"a width of 4, 8, 12, \.\.\., got 'tiny-upernet-6'"):
        run("--output_dir", tmp_path, *QUICK, *FEW, "--student", "tiny-upernet-6")
    build("DPT")[0].save_pretrained(tmp_path / "dpt")
    with pytest.raises(ValueError, match=r"takes, got 4x4 pixels \(.*give --image_size"):
        run("--output_dir", tmp_path, *QUICK, *FEW, "--student", tmp_path / "dpt", "--image_size", "4", "4")
    for learner, samples in (("labelled_samples", 9), ("max_train_samples", 17)):
        with pytest.raises(
            ValueError, match=rf"got a last one of a single image \({samples} in .*--dataloader_drop_last"
        ):
            run("--output_dir", tmp_path, *QUICK, *FEW, f"--{learner}", samples)
    assert not (tmp_path / "_teacher").exists()


def parquet(folder: Path, images, masks) -> SegmentationDataArguments:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    path = folder / "train.parquet"
    datasets.Dataset.from_dict({"image": images, "label": masks}, features).to_parquet(path)
    return SegmentationDataArguments(train_file=str(path))


def grey(*labels: int, size: int = 4) -> list[PIL.Image.Image]:
    return [PIL.Image.new("L", (size, size), label) for label in labels]


IMAGES = [PIL.Image.new("RGB", (4, 4))] * 4


@pytest.mark.parametrize(
    "masks, said",
    [
        ([*grey(0, 1, 1), *grey(0, size=3)], r"size of its image in row \d .* got 3x3 for an image of 4x4 pixels"),
        (
            [*grey(0, 1, 1), PIL.Image.new("RGB", (4, 4))],
            r"got an image of mode RGB in row \d .*--label_column",
        ),
        (grey(255, 255, 255, 255), r"labelled pixels in the \w+ split, got none in \d masks: .*--do_reduce_labels"),
        ([*grey(0, 1, 1), None], r"Expected a mask in row \d of the \w+ split, got none"),
    ],
)
def test_masks_that_are_refused(tmp_path, masks, said):
    with pytest.raises(ValueError, match=said):
        load_masked(parquet(tmp_path, IMAGES, masks), seed=0)


def test_a_class_that_would_become_the_label_of_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ignore_index above 0 with do_reduce_labels, got 0"):
        SegmentationDataArguments(do_reduce_labels=True, ignore_index=0)
    mask = PIL.Image.fromarray(np.arange(4, dtype=np.uint8).repeat(4).reshape(4, 4))
    args = parquet(tmp_path, IMAGES, [mask] * 4)
    args.do_reduce_labels, args.ignore_index = True, 2
    with pytest.raises(ValueError, match=r"no label 3 in row \d .*turns into 2, the --ignore_index: choose"):
        load_masked(args, seed=0)
    args.ignore_index = 3
    assert load_masked(args, seed=0)[1] == ["1", "2"]


def test_what_is_called_a_mask_is_no_image(tmp_path):
    """Whatever stands first, and whatever the images are called; but what is named is taken."""
    features = datasets.Features({"label": datasets.Image(), "pixel_values": datasets.Image()})
    columns = {"label": grey(0, 1, 1, 0), "pixel_values": grey(*range(3, 7))}
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "train.parquet")
    args = SegmentationDataArguments(train_file=str(tmp_path / "train.parquet"))
    splits, names = load_masked(args, seed=0)
    assert names == ["0", "1"]
    assert {image.getpixel((0, 0)) for image in splits["train"].images["image"]} <= set(range(3, 7))
    args.image_column_name = "label"
    assert len(load_masked(args, seed=0)[1]) >= 6


def test_a_label_that_is_no_class_is_refused(tmp_path):
    args = parquet(tmp_path, IMAGES, grey(0, 1, 7, 255))
    args.id2label_file = str(tmp_path / "names.json")
    Path(args.id2label_file).write_text('{"0": "cat", "1": "dog"}')
    with pytest.raises(ValueError, match=r"from 0 to 1, the 2 classes, or 255 for none, got 7 in the mask in row \d"):
        load_masked(args, seed=0)
    args.ignore_index = 7
    with pytest.raises(ValueError, match=r"or 7 for none, got 255 in the mask in row \d"):
        load_masked(args, seed=0)
    Path(args.id2label_file).write_text('["cat", "dog"]')
    with pytest.raises(ValueError, match=r'a JSON file such as \{"0": "wall", .*--id2label_file'):
        load_masked(args, seed=0)


def test_classes_without_names_are_numbers_and_those_without_pixels_are_said(tmp_path, caplog):
    args = parquet(tmp_path, IMAGES, grey(0, 3, 3, 0))
    args.do_reduce_labels = True
    assert load_masked(args, seed=0)[1] == ["1", "2", "3"]  # the data's
    caplog.clear()
    args.do_reduce_labels = False
    _, names = load_masked(args, seed=0)
    assert names == ["0", "1", "2", "3"]
    assert "Classes that no training pixel has: 1, 2 (2 of 4)." in caplog.text


def test_a_processor_that_crops_and_keeps_proportions_fits_whole_images():
    from transformers import DPTImageProcessorPil, MobileViTImageProcessorPil

    cropping = MobileViTImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 32, "width": 32})
    keeping = DPTImageProcessorPil(size={"height": 32, "width": 32}, keep_aspect_ratio=True)
    for processor in (cropping, keeping, SegformerImageProcessorPil(size={"shortest_edge": 32})):
        image = PIL.Image.new("RGB", (100, 50))
        assert fit_whole(processor)(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
        assert fit_whole(processor, [16, 64])(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 16, 64)


@pytest.mark.parametrize("kind", ["ConvNext", "PoolFormer", "Levit", "EfficientNet", "Bit", "DeiT"])
def test_a_classifiers_processor_fits_whole_images(kind):
    """Whatever it takes for a size; the values of pixels stay."""
    import transformers

    processor = getattr(transformers, f"{kind}ImageProcessorPil")(image_mean=[0.1, 0.2, 0.3])
    image = PIL.Image.new("RGB", (100, 50), (10, 20, 30))
    expected = processor(image, return_tensors="pt")["pixel_values"][0, :, 20, 20]
    fitting = fit_whole(processor, [32, 64])
    pixels = fitting(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 64) and fitting.size == {"height": 32, "width": 64}
    torch.testing.assert_close(pixels, expected.view(1, 3, 1, 1).expand_as(pixels))


def make_case(count: int) -> tuple[torch.nn.Module, SegmentationImages]:
    """Return a model, and images with masks of several sizes, a border of them without a class."""
    rows = [make_masked_shapes(1, seed=i, size=32 + 8 * (i % 3))[0] for i in range(count)]
    masks = [np.pad(np.asarray(row["label"])[2:], ((2, 0), (0, 0)), constant_values=255) for row in rows]
    torch.manual_seed(0)
    model = build_segmenter("tiny-upernet-4", "--student", list(CLASSES), True)
    split = split_of([row["image"] for row in rows], masks)
    return model, SegmentationImages(split, tiny_processor(32, 32), with_masks=True)


def test_evaluation_takes_the_same_memory_however_many_images(tmp_path):
    """And says what the masks give that the model finds one by one, at their own sizes."""
    model, images = make_case(24)
    counter = TensorsInMemory()
    args = TrainingArguments(
        str(tmp_path),
        per_device_eval_batch_size=3,
        batch_eval_metrics=True,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SegmentationTrainer(
        model=model,
        args=args,
        eval_dataset=images,
        data_collator=collate,
        compute_metrics=PixelMetrics(list(CLASSES)),
        callbacks=[counter],
    )
    result = trainer.evaluate()
    assert len(counter.bytes) == 8
    # Batches hold the same sizes; the last step has no next batch. The logits of one batch are 60 KiB.
    assert max(counter.bytes[1:-1]) - min(counter.bytes[1:-1]) < 2048
    metric = MeanIoU(num_labels=5)
    model.eval()
    for image, mask in images.split.rows(range(24)):
        pixels = images.processor(image, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**pixels)
        (found,) = images.processor.post_process_semantic_segmentation(outputs, target_sizes=[mask.shape])
        metric.add(prediction=found, reference=mask)
    for name, value in metric.compute().items():
        assert result[f"eval_{name}"] == pytest.approx(value)
    assert trainer.evaluate()["eval_mean_iou"] == result["eval_mean_iou"]  # nothing is left of the first time


def test_the_label_that_is_left_out_is_told_to_the_model(tmp_path):
    config = SegformerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_attention_heads=[1] * 4)
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    model = build_segmenter(str(tmp_path), "--student", ["a", "b", "c"], False, ignore_index=9)
    assert model.config.semantic_loss_ignore_index == 9 and model.config.num_labels == 3
    assert build_segmenter("tiny-upernet-4", "--student", ["a"], True, 9).config.loss_ignore_index == 9
