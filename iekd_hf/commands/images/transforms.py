"""From images to a model's input: decoded once and augmented as whole batches, or one by one as they are read."""

from collections.abc import Callable, Sequence

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
from .reading import RandomResizedCrop
from .recipes import RandAugmentedBatches, rand_augment


# The splits that networks learn from.
_LEARNT = ("train", "unlabelled")


def prepare(
    splits: datasets.DatasetDict, processor: BaseImageProcessor, args: DataArguments, seed: int
) -> tuple[dict[str, Dataset], BatchAugmentation | RandAugmentedBatches | None]:
    """Make the splits that trainers take, and their `augmentation` where images are decoded once."""
    if not args.decode_once:
        return add_transforms(splits, processor, args)
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
    if args.rand_augment is not None:
        return images, RandAugmentedBatches(augmentation, args.rand_augment)
    return images, augmentation


class _Processed:
    """Resize and crop as a processor does, but leave the pixels' values to the training device."""

    def __init__(self, processor: BaseImageProcessor):
        self.processor = processor

    def __call__(self, images: list[PIL.Image.Image]) -> np.ndarray:
        images = [to_rgb(image) for image in images]
        values = {"do_rescale": False, **unnormalized(self.processor)}
        pixels = self.processor(images, **values, return_tensors="np")["pixel_values"]
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
) -> tuple[dict[str, datasets.Dataset], BatchAugmentation | None]:
    """Turn images into `pixel_values` when they are read, the training images augmented."""
    import kornia.augmentation as K

    size = output_size(processor)
    kind = crop_kind(args, size)
    operations = None if args.rand_augment is None else rand_augment(args.rand_augment)
    if kind == "resized_crop":  # pixels stay bytes, and are normalised on the training device
        normalisation = BatchAugmentation.from_processor(processor)
        for_training = _Cropped(RandomResizedCrop(size, args.horizontal_flip), operations)
        for_evaluation = _Processed(processor)
    else:
        normalisation = None
        crop = [K.RandomCrop(size, padding=padding(size), padding_mode="reflect")] if kind == "crop" else []
        flip = [K.RandomHorizontalFlip()] if args.horizontal_flip else []
        on_batches = K.AugmentationSequential(*crop, *flip, data_keys=["input"]) if crop or flip else None
        for_training = _Augmented(processor, on_batches, operations)
        for_evaluation = _Augmented(processor)
    images = {}
    for name, split in splits.items():
        if name in _LEARNT:
            undecoded = split.cast_column("image", datasets.Image(decode=False)) if kind == "resized_crop" else split
            images[name] = undecoded.with_transform(_Read(for_training))
        else:
            images[name] = split.with_transform(_Read(for_evaluation))
    return images, normalisation


class _Read:
    """Make `pixel_values` of images when they are read. Of a class, so that spawned workers can be given it."""

    def __init__(self, pixels: Callable[[list], Sequence]):
        self.pixels = pixels

    def __call__(self, examples: dict) -> dict:
        labels = {"labels": examples["label"]} if "label" in examples else {}  # those of a test split may be hidden
        return {"pixel_values": list(self.pixels(examples["image"])), **labels}


class _Augmented:
    """Process images, and augment them where it is told how."""

    def __init__(
        self,
        processor: BaseImageProcessor,
        on_batches: torch.nn.Module | None = None,
        operations: torch.nn.Module | None = None,
    ):
        self.processor, self.on_batches, self.operations = processor, on_batches, operations

    def __call__(self, images: list[PIL.Image.Image]) -> torch.Tensor:
        images = [to_rgb(image) for image in images]
        if self.operations is None:
            pixels = self.processor(images, return_tensors="pt")["pixel_values"]
            return pixels if self.on_batches is None else self.on_batches(pixels)
        pixels = self.processor(images, **unnormalized(self.processor), return_tensors="pt")["pixel_values"]
        pixels = pixels if self.on_batches is None else self.on_batches(pixels)
        pixels = torch.cat([self.operations(image[None]) for image in pixels])  # each draws its own
        left_out = {"do_resize": False, "do_center_crop": False, "do_rescale": False}
        return self.processor(list(pixels), **left_out, return_tensors="pt")["pixel_values"]


class _Cropped:
    """Cut, resize and flip images that are still in their files."""

    def __init__(self, crop: RandomResizedCrop, operations: torch.nn.Module | None):
        self.crop, self.operations = crop, operations

    def __call__(self, images: list[dict]) -> torch.Tensor:
        pixels = torch.stack([self.crop(image) for image in images])
        if self.operations is None:
            return pixels
        augmented = torch.cat([self.operations(image[None] / 255) for image in pixels])  # each draws its own
        return (255 * augmented).round().to(torch.uint8)


def unnormalized(processor: BaseImageProcessor) -> dict[str, bool]:
    """Return the keywords by which a processor leaves the values of pixels and the order of channels as they are."""
    steps = ("do_flip_channel_order", "include_top")  # MobileViT's and EfficientNet's own
    return {"do_normalize": False, **{name: False for name in steps if hasattr(processor, name)}}


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
