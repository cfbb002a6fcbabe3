"""From images to a model's input: decoded once and augmented as whole batches, or one by one as they are read."""

import datasets
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from iekd_hf import BatchAugmentation, DecodedImages

from ...data.rgb import to_rgb
from .data import DataArguments


# The splits that networks learn from.
_LEARNT = ("train", "unlabelled")


def prepare(
    splits: datasets.DatasetDict, processor: BaseImageProcessor, args: DataArguments, seed: int
) -> tuple[dict[str, Dataset], BatchAugmentation | None]:
    """Make the splits that trainers take, and their `augmentation` where images are decoded once."""
    if not args.decode_once:
        return add_transforms(splits, processor, args), None
    size = output_size(processor)
    kind = crop_kind(args, size)
    images = {}
    for name, split in splits.items():
        resized = name in _LEARNT and kind == "resized_crop"
        images[name] = DecodedImages.decode(split, _Fit(args.sizes, size) if resized else _Processed(processor))
    augmentation = BatchAugmentation.from_processor(
        processor,
        size=size,
        crop={"crop": "padded", "resized_crop": "resized", "none": None}[kind],
        padding=padding(size),
        horizontal_flip=args.horizontal_flip,
        seed=seed,
    )
    return images, augmentation


class _Processed:
    """Resize and crop as a processor does, but leave the pixels' values to the training device."""

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, images: list[PIL.Image.Image]) -> np.ndarray:
        images = [to_rgb(image) for image in images]
        pixels = self.processor(images, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        return pixels.round().clip(0, 255).astype(np.uint8)


class _Fit:
    """
    Bring images to one size for resized crops: their own, or, if they are larger than those need, a smaller one, the
    shortest edge an eighth longer than what comes out.
    """

    def __init__(self, sizes: set[tuple[int, int]], size: tuple[int, int]):
        shortest = round(max(size) * 8 / 7)
        height, width = next(iter(sizes)) if len(sizes) == 1 else (shortest, shortest)
        scale = min(shortest / min(height, width), 1)
        self.size = (round(width * scale), round(height * scale))

    def __call__(self, images: list[PIL.Image.Image]) -> np.ndarray:
        fitted = [PIL.ImageOps.fit(to_rgb(image), self.size) for image in images]
        return np.stack([np.asarray(image) for image in fitted]).transpose(0, 3, 1, 2)


def add_transforms(
    splits: datasets.DatasetDict, processor: BaseImageProcessor, args: DataArguments
) -> dict[str, datasets.Dataset]:
    """Turn images into `pixel_values` when they are read, the training images augmented."""
    import kornia.augmentation as K

    size = output_size(processor)
    kind = crop_kind(args, size)
    flip = [K.RandomHorizontalFlip()] if args.horizontal_flip else []
    crop = [K.RandomCrop(size, padding=padding(size), padding_mode="reflect")] if kind == "crop" else []
    on_batches = K.AugmentationSequential(*crop, *flip, data_keys=["input"]) if crop or flip else None
    resized_crop = K.RandomResizedCrop(size) if kind == "resized_crop" else None
    for_training = _ForTraining(processor, on_batches, resized_crop)
    for_evaluation = _ForEvaluation(processor)
    return {
        name: split.with_transform(for_training if name in _LEARNT else for_evaluation)
        for name, split in splits.items()
    }


class _ForEvaluation:
    """Process images when they are read. Of a class of this module, so that spawned workers can be given it."""

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, examples: dict) -> dict:
        pixel_values = self.pixels([to_rgb(image) for image in examples["image"]])
        labels = {"labels": examples["label"]} if "label" in examples else {}  # those of a test split may be hidden
        return {"pixel_values": list(pixel_values), **labels}

    def pixels(self, images: list[PIL.Image.Image]) -> torch.Tensor:
        return self.processor(images, return_tensors="pt")["pixel_values"]


class _ForTraining(_ForEvaluation):
    """Process and augment images when they are read."""

    def __init__(
        self, processor: BaseImageProcessor, on_batches: torch.nn.Module | None, resized_crop: torch.nn.Module | None
    ):
        super().__init__(processor)
        self.on_batches, self.resized_crop = on_batches, resized_crop

    def pixels(self, images: list[PIL.Image.Image]) -> torch.Tensor:
        if self.resized_crop is None:
            pixel_values = super().pixels(images)
        else:  # image by image, because their sizes differ
            tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in images]
            cropped = [self.resized_crop(tensor)[0] for tensor in tensors]
            # The crop has resized, and the division rescaled: what is left is to normalise.
            pixel_values = self.processor(
                cropped, do_resize=False, do_center_crop=False, do_rescale=False, return_tensors="pt"
            )["pixel_values"]
        return pixel_values if self.on_batches is None else self.on_batches(pixel_values)


def crop_kind(args: DataArguments, size: tuple[int, int]) -> str:
    """Return which crop of training images it is."""
    if args.augmentation == "auto":
        return "crop" if max(size) <= 64 else "resized_crop"
    return args.augmentation


def padding(size: tuple[int, int]) -> int:
    """Return how many reflected pixels a crop may move by: the literature's 4 at CIFAR's 32."""
    return max(size[0] // 8, 1)


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Return the (height, width) of the images that a processor makes."""
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    side = size.get("shortest_edge")
    return (size["height"], size["width"]) if side is None else (side, side)
