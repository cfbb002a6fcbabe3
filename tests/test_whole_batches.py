"""Decoded images and their augmentation: the pixels, the draws, and training on them."""

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import make_resnet, make_vit, same
from torch.utils.data import DataLoader, Subset
from transformers import (
    EfficientNetImageProcessorPil,
    MobileViTImageProcessorPil,
    TrainerCallback,
    ViTImageProcessorPil,
)

from iekd_hf import BatchAugmentation, DecodedImages
from iekd_hf.commands.images.transforms import _Processed


MEAN_AND_STD = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def make_decoded(count: int = 16, size: tuple[int, int] = (32, 32), seed: int = 0) -> DecodedImages:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=3)})
    rows = {"image": [PIL.Image.fromarray(image) for image in pixels], "label": [i % 3 for i in range(count)]}
    images = DecodedImages.decode(datasets.Dataset.from_dict(rows, features=features))
    assert np.array_equal(images.__getitems__(range(count))["pixel_values"].numpy(), pixels.transpose(0, 3, 1, 2))
    return images


def make_augmentation(**kwargs) -> BatchAugmentation:
    return BatchAugmentation(**({**MEAN_AND_STD, "crop": "padded", "padding": 4, "horizontal_flip": True} | kwargs))


# ---- Decoded images ----


def test_batches_are_the_rows_asked_for_in_any_order(monkeypatch, tmp_path):
    monkeypatch.setattr("iekd_hf.data.decoded_images._PIECE_BYTES", 3 * 4 * 6 * 5)  # pieces of 5 rows
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (23, 4, 6, 3), dtype=np.uint8)
    rows = {"picture": [PIL.Image.fromarray(image) for image in pixels], "label": list(range(23))}
    on_disk = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
    on_disk.save_to_disk(tmp_path / "images")
    images = DecodedImages.decode(datasets.load_from_disk(tmp_path / "images"), image_column="picture")
    assert len(images._pieces) > 3 and images.table.cache_files
    for ids in ([22, 0, 7, 7, 13], [4, 5], list(range(23)), []):
        batch = images.__getitems__(ids)
        assert np.array_equal(batch["pixel_values"].numpy(), pixels[ids].transpose(0, 3, 1, 2))
        assert batch["labels"].tolist() == ids == batch["image_ids"].tolist()
    assert len(list(images)) == 23
    with pytest.raises(IndexError, match="from 0 to 22, got 23"):
        images[23]


def test_they_are_decoded_once(tmp_path):
    rows = {"image": [PIL.Image.new("RGB", (4, 4))] * 3}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "images")
    files = [DecodedImages.decode(datasets.load_from_disk(tmp_path / "images")).table.cache_files for _ in range(2)]
    assert files[0] == files[1] != []


def test_workers_and_subsets_give_the_same_batches():
    images = make_decoded(12)
    subset = Subset(images, [3, 1, 8, 2, 11])
    for workers in (0, 2):
        loader = DataLoader(subset, batch_size=2, collate_fn=lambda batch: batch, num_workers=workers)
        assert [batch["image_ids"].tolist() for batch in loader] == [[3, 1], [8, 2], [11]]


def test_images_of_mixed_size_are_refused_unless_prepared():
    sizes = [(4, 4), (4, 4), (6, 4)]
    rows = datasets.Dataset.from_dict({"image": [PIL.Image.new("RGB", size) for size in sizes]})
    rows = rows.cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=r"of one size, \(3, 4, 4\) as the first one, got uint8 \(3, 4, 6\) in row 2"):
        DecodedImages.decode(rows)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, do_rescale=False, do_normalize=False)
    images = DecodedImages.decode(rows, prepare=lambda batch: processor(batch, return_tensors="np")["pixel_values"])
    assert images.shape == (3, 8, 8)
    with pytest.raises(ValueError, match="Expected a column 'picture' of images, got image"):
        DecodedImages.decode(rows, image_column="picture")
    with pytest.raises(ValueError, match="got an empty dataset"):
        DecodedImages.decode(rows.select([]))


# ---- Augmentation ----


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (ViTImageProcessorPil, {}),
        (ViTImageProcessorPil, {"image_mean": [0.1, 0.2, 0.3]}),
        (ViTImageProcessorPil, {"do_normalize": False}),
        (ViTImageProcessorPil, {"do_rescale": False}),
        (MobileViTImageProcessorPil, {}),
        (MobileViTImageProcessorPil, {"do_rescale": False}),
        (MobileViTImageProcessorPil, {"do_flip_channel_order": False}),
        (EfficientNetImageProcessorPil, {}),
        (EfficientNetImageProcessorPil, {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.3, 0.4]}),
        (EfficientNetImageProcessorPil, {"include_top": False}),
        (EfficientNetImageProcessorPil, {"do_normalize": False}),
        (EfficientNetImageProcessorPil, {"rescale_factor": 1 / 127.5, "rescale_offset": True}),
    ],
)
def test_it_normalises_as_the_processor_does(kind, kwargs):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    processor = kind(do_resize=False, do_center_crop=False, **kwargs)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    augmentation = BatchAugmentation.from_processor(processor)
    torch.testing.assert_close(augmentation(raw), expected.float(), rtol=1e-5, atol=1e-5)
    # The same of pixels that the commands have decoded once.
    decoded = torch.from_numpy(_Processed(processor)([image]))
    torch.testing.assert_close(augmentation(decoded), expected.float(), rtol=1e-5, atol=1e-5)


def test_grey_images_and_images_of_many_bands_are_normalised_too():
    for channels in (1, 5):
        values = {"image_mean": [0.2] * channels, "image_std": [0.4] * channels}
        augmentation = BatchAugmentation.from_processor(ViTImageProcessorPil(**values))
        got = augmentation(torch.full((1, channels, 4, 4), 102, dtype=torch.uint8))
        torch.testing.assert_close(got, torch.full((1, channels, 4, 4), 0.5))


@pytest.mark.parametrize("size", [(32, 32), (9, 16)])
def test_padded_crops_equal_a_slicing_reference_to_the_bit(size):
    pixels = torch.randint(0, 256, (64, 3, *size), dtype=torch.uint8)
    augment, plain = make_augmentation(), BatchAugmentation(**MEAN_AND_STD)
    padded = F.pad(plain(pixels), [4] * 4, mode="reflect")
    got, places = augment(pixels, torch.arange(64), view=3), set()
    for i in range(64):
        found = [
            (y, x, flip)
            for y in range(9)
            for x in range(9)
            for flip in (False, True)
            if torch.equal(
                padded[i, :, y : y + size[0], x : x + size[1]].flip(2)
                if flip
                else padded[i, :, y : y + size[0], x : x + size[1]],
                got[i],
            )
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 40 and {flip for *_, flip in places} == {False, True}


def test_draws_are_uniform_and_independent():
    augment, ids = make_augmentation(), torch.arange(20_000)
    draws = [draw for view in (0, 1, 2) for draw in augment._draw(ids, view, 5)]
    draws += [*make_augmentation(seed=1)._draw(ids, 0, 5)]
    for draw in draws:
        counts = torch.histc(draw.float(), bins=100, min=0, max=1)
        assert ((counts - 200) ** 2 / 200).sum() < 150  # chi-square, 99 degrees of freedom: p < 0.001
        assert torch.corrcoef(torch.stack([draw[1:], draw[:-1]]))[0, 1].abs() < 0.03
    assert (torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))).abs().max() < 0.035


def test_a_view_depends_on_image_view_and_seed_alone():
    pixels, ids = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(100, 116)
    for kwargs in ({}, {"crop": "resized", "size": (24, 20)}):
        augment = make_augmentation(**kwargs)
        whole = augment(pixels, ids, 5)
        order = torch.randperm(16)
        torch.manual_seed(3)
        assert torch.equal(augment(pixels[order], ids[order], 5), whole[order])
        assert not torch.equal(augment(pixels, ids, 6), whole)
        assert not torch.equal(make_augmentation(**kwargs, seed=1)(pixels, ids, 5), whole)


def test_resized_crops_are_the_parts_they_should_be():
    # A picture of its own coordinates: each pixel says where it comes from.
    y, x = torch.meshgrid(torch.arange(64), torch.arange(96), indexing="ij")
    pixels = torch.stack([y, x, 0 * x]).to(torch.uint8)[None].repeat(512, 1, 1, 1)
    augment = BatchAugmentation(
        [0.0] * 3, [1.0] * 3, rescale_factor=1.0, size=(16, 16), crop="resized", horizontal_flip=True
    )
    views = augment(pixels, torch.arange(512))
    assert views.shape == (512, 3, 16, 16)
    heights = (views[:, 0, -1, 8] - views[:, 0, 0, 8]) * 16 / 15
    widths = (views[:, 1, 8, -1] - views[:, 1, 8, 0]) * 16 / 15
    assert 0.4 < (widths < 0).float().mean() < 0.6  # flipped
    # Less than a pixel is lost where a crop ends at the border.
    areas, ratios = heights * widths.abs() / (64 * 96), widths.abs() / heights
    assert areas.min() > 0.07 and areas.max() < 1.01 and 0.4 < areas.mean() < 0.55
    whole = (heights > 62) | (widths.abs() > 94)
    assert ratios[~whole].min() > 0.72 and ratios[~whole].max() < 1.39
    assert views[:, 0].min() >= 0 and views[:, 0].max() <= 63 and views[:, 1].max() <= 95


def test_without_ids_nothing_is_drawn():
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    plain = BatchAugmentation(**MEAN_AND_STD)(pixels)
    assert torch.equal(make_augmentation()(pixels), plain)
    assert make_augmentation(crop="resized", size=(20, 24))(pixels).shape == (4, 3, 20, 24)


@pytest.mark.parametrize("crop", [None, "padded", "resized"])
def test_training_and_evaluation_give_one_size(crop):
    pixels, augment = (
        torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8),
        make_augmentation(crop=crop, size=(20, 24)),
    )
    assert augment(pixels, torch.arange(4)).shape == augment(pixels).shape == (4, 3, 20, 24)


def test_bad_augmentations_are_refused():
    with pytest.raises(ValueError, match="crop to be one of padded, resized, or None; got 'random'"):
        make_augmentation(crop="random")
    with pytest.raises(ValueError, match="padding below the images' 4x4 pixels, got 4"):
        make_augmentation()(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.arange(1))


# ---- Training ----


class Views(TrainerCallback):
    """Keep what the model is given."""

    def __init__(self, trainer):
        self.seen, self.trainer = [], trainer
        trainer.model.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, module, args, kwargs):
        self.seen.append((module.training, kwargs["pixel_values"]))


def test_training_sees_new_views_each_epoch_and_evaluation_whole_images(make_trainer):
    images, plain = make_decoded(8), BatchAugmentation(**MEAN_AND_STD)
    trainer = make_trainer(
        train_dataset=images,
        eval_dataset=images,
        augmentation=make_augmentation(),
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        eval_strategy="epoch",
    )
    views = Views(trainer)
    trainer.train()
    # Before training, one batch tells the gradients' shares.
    _, *trained = [pixels for training, pixels in views.seen if training]
    evaluated = [pixels for training, pixels in views.seen if not training]
    whole = plain(images.__getitems__(range(8))["pixel_values"])
    assert len(trained) == 2 and len(evaluated) >= 2 and torch.equal(evaluated[-1], whole)
    expected = [make_augmentation()(images.__getitems__(range(8))["pixel_values"], torch.arange(8), v) for v in (0, 1)]
    for got, view in zip(trained, expected, strict=True):
        for image in got:  # in another order
            assert any(torch.equal(image, one) for one in view)
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("kind", ["iekd", "mutual"])
def test_resuming_within_an_epoch_is_exact_with_augmentation(make_trainer, make_mutual, kind, tmp_path):
    def make(steps, out):
        common = {
            "train_dataset": make_decoded(16),
            "augmentation": make_augmentation(),
            "max_steps": steps,
            "output_dir": str(tmp_path / out),
            "save_strategy": "steps",
            "save_steps": 3,  # of 4 in an epoch
            "lr_scheduler_type": "constant",
        }
        if kind == "iekd":
            return make_trainer(make_resnet(8, seed=1), **common)
        return make_mutual([make_resnet(8, seed=1), make_vit(seed=2)], **common)

    whole = make(6, "whole")
    whole.train()
    make(3, "parts").train()
    parts = make(6, "parts")
    parts.train(resume_from_checkpoint=True)
    models = [(whole.model, parts.model)] if kind == "iekd" else zip(whole.models, parts.models, strict=True)
    assert all(same(one.state_dict(), other.state_dict()) for one, other in models)


def test_raw_pixels_without_an_augmentation_are_refused(make_trainer):
    with pytest.raises(ValueError, match="Expected an augmentation to make the model's input of raw uint8 pixels"):
        make_trainer(train_dataset=make_decoded(4))


def test_labels_outside_the_students_are_refused(make_trainer):
    with pytest.raises(ValueError, match="from 0 to 1, the model's 2 classes, got 2 in row 2"):
        make_trainer(make_resnet(8, num_labels=2), train_dataset=make_decoded(4), augmentation=make_augmentation())
