"""The examples' two ways from images to a model's input: they agree, and the right one is taken."""

import numpy as np
import PIL.Image
import pytest
import run_iekd
import torch
from test_run_iekd import QUICK, image_rows
from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil

from iekd_hf import DecodedImages
from iekd_hf.commands.images import data as image_data
from iekd_hf.commands.images import transforms as image_transforms


PROCESSORS = {
    "fixed size": ViTImageProcessorPil(size={"height": 16, "width": 16}),
    "cropped": ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=0.8, image_mean=[0.2, 0.3, 0.4]),
}


def load(tmp_path, sizes=((12, 12),), **kwargs):
    """Write a folder of pictures of these sizes and load it."""
    generator = np.random.default_rng(0)
    for i in range(24):
        folder = tmp_path / "pictures" / ("cat" if i % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    arguments = image_data.DataArguments(train_dir=str(tmp_path / "pictures"), **kwargs)
    return image_data.load_images(arguments, 0), arguments


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_both_ways_evaluate_on_the_same_pixels(tmp_path, processor):
    splits, arguments = load(tmp_path)
    assert arguments.decode_once is True
    images, augmentation = image_transforms.prepare(splits, processor, arguments, 0)
    arguments.decode_once = False
    one_by_one, nothing = image_transforms.prepare(splits, processor, arguments, 0)
    assert nothing is None
    raw = images["validation"].__getitems__(range(len(images["validation"])))
    expected = one_by_one["validation"][:]
    torch.testing.assert_close(augmentation(raw["pixel_values"]), torch.stack(expected["pixel_values"]))
    assert raw["labels"].tolist() == expected["labels"]


def test_images_as_they_are_read_are_augmented_anew_each_time(tmp_path):
    splits, arguments = load(tmp_path, decode_once=False)
    processor = PROCESSORS["fixed size"]
    plain = torch.stack(
        [processor(im.convert("RGB"), return_tensors="pt")["pixel_values"][0] for im in splits["train"]["image"]]
    )
    images, _ = image_transforms.prepare(splits, processor, arguments, 0)
    batch = torch.stack(images["train"][:]["pixel_values"])
    assert batch.shape == plain.shape
    assert batch.min() >= -1 and batch.max() <= 1
    assert not torch.equal(batch, plain)
    assert not torch.equal(batch, torch.stack(images["train"][:]["pixel_values"]))


@pytest.mark.parametrize("augmentation", ["none", "resized_crop"])
def test_rand_augment_of_images_as_they_are_read(tmp_path, augmentation, monkeypatch):
    """It is given pixels in [0, 1], image by image, and what it gives is normalised."""
    splits, arguments = load(
        tmp_path, decode_once=False, rand_augment=9, horizontal_flip=False, augmentation=augmentation
    )
    processor = PROCESSORS["cropped"]
    seen, operations = [], image_transforms.rand_augment(9)
    monkeypatch.setattr(operations, "forward", lambda pixels: seen.append(pixels) or torch.full_like(pixels, 0.5))
    monkeypatch.setattr(image_transforms, "rand_augment", lambda magnitude: operations)
    images, on_device = image_transforms.prepare(splits, processor, arguments, 0)
    pixels = torch.stack(images["train"][:4]["pixel_values"])
    assert [tuple(image.shape) for image in seen] == [(1, 3, 16, 16)] * 4
    assert all(image.min() >= 0 and 0.2 < image.max() <= 1 for image in seen)
    pixels = pixels if on_device is None else on_device(pixels)
    expected = (0.5 - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
    expected = expected.view(1, 3, 1, 1).expand(4, 3, 16, 16)
    torch.testing.assert_close(pixels, expected, atol=0 if on_device is None else 0.01, rtol=1e-5)
    images["validation"][:2]
    assert len(seen) == 4  # not in evaluation


@pytest.mark.parametrize(
    ("sizes", "kind", "stored", "made"),
    [
        ([(12, 12)], "auto", (16, 16), (16, 16)),  # a crop of the processed image
        ([(12, 18)], "resized_crop", (12, 18), (16, 16)),  # a crop of the image as it is
        ([(40, 60)], "resized_crop", (18, 27), (16, 16)),  # as large as the crop needs
        ([(40, 60), (20, 20)], "resized_crop", (18, 18), (16, 16)),
        ([(12, 12)], "none", (16, 16), (16, 16)),
    ],
)
def test_what_is_stored_and_what_comes_out(tmp_path, sizes, kind, stored, made):
    splits, arguments = load(tmp_path, sizes, augmentation=kind, decode_once=True)
    images, augmentation = image_transforms.prepare(splits, PROCESSORS["fixed size"], arguments, 0)
    assert images["train"].shape[1:] == stored and images["validation"].shape[1:] == made
    batch = images["train"].__getitems__([0, 1])
    view = augmentation(batch["pixel_values"], torch.from_numpy(batch["image_ids"]))
    assert view.shape == (2, 3, *made) and view.isfinite().all()


def test_the_right_way_is_taken(tmp_path, run_example):
    load(tmp_path, [(12, 12), (14, 12)])
    arguments = ["--train_dir", tmp_path / "pictures", "--image_size", 16, "--save_strategy", "no"]
    arguments += [*QUICK, "--per_device_train_batch_size", 8, "--plain_student", "false", "--teacher_epochs", 1]
    with pytest.raises(
        ValueError, match=r"--decode_once true with --cache_teacher, got false.* several sizes: add it"
    ):
        run_example(run_iekd, "--output_dir", tmp_path / "refused", *arguments, "--cache_teacher")
    run_example(run_iekd, "--output_dir", tmp_path / "mixed", *arguments)
    assert (tmp_path / "mixed" / "model.safetensors").is_file()
    cached = ["--decode_once", "true", "--cache_teacher", "--cache_views", 2, "--num_train_epochs", 3]
    run_example(run_iekd, "--output_dir", tmp_path / "cached", *arguments, *cached)
    (factors,) = (tmp_path / "cached" / "_teacher_cache").glob("*/factors_0.npy")
    assert np.load(factors, mmap_mode="r").shape[:2] == (2, 20)


def test_a_split_of_parquet_rows_is_decoded(tmp_path):
    image_rows(20, size=12).to_parquet(tmp_path / "train.parquet")
    splits = image_data.load_images(image_data.DataArguments(train_file=str(tmp_path / "train.parquet")), 0)
    images = DecodedImages.decode(splits["train"])
    assert images.shape == (3, 12, 12) and images.table.cache_files
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in splits["train"]["image"]])
    assert np.array_equal(images.__getitems__(range(17))["pixel_values"].numpy(), pixels.transpose(0, 3, 1, 2))
