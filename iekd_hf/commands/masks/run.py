"""What `segment` is made of: its arguments, segmenters by name, and what is measured."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedModel,
    TrainingArguments,
    ViTImageProcessorPil,
)

from ...models.kinds import set_ignore_index
from ...models.loading import find_processor
from ...training.data_checks import leaves_one
from ..arguments import ScriptArguments
from ..networks import label_maps, load_for_classes
from ..run import CommandRun
from .data import Masked, SegmentationDataArguments, load_masked
from .tiny_segmenters import is_tiny, tiny_processor, tiny_segmenter
from .trainers import IEKDSegmentationTrainer, PixelMetrics, SegmentationTrainer, to_classes
from .transforms import SegmentationImages, collate


logger = logging.getLogger(__name__)

PICTURE = "segmentations.png"
# The shapes are learnt in a minute or two.
SHAPES_EPOCHS = {"num_train_epochs": 13.0, "paraphraser_epochs": 3.0}
SHAPES_TEACHER_EPOCHS = 27.0
# What an image processor does to pixels beside resizing them.
_VALUES = ("resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


@dataclass
class SegmentationScriptArguments(ScriptArguments):
    """Change those defaults that suit segmenters, which are trained by AdamW."""

    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs. Default: 13 for the shapes, otherwise 50."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Batch size of each device."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Batch size of each device in evaluation."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate. Default: 0.02 for tiny segmenters, otherwise 0.00006."}
    )
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimizer, as in TrainingArguments."})
    optim_args: str | None = field(default=None, metadata={"help": "Arguments of the optimizer."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum gradient norm; 0 for no clipping."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of a linear warm-up, or their share of all steps where below 1."}
    )
    eval_strategy: str = field(
        default="no", metadata={"help": "When to evaluate while training; at the end that is done anyway."}
    )
    batch_eval_metrics: bool = field(
        default=True, metadata={"help": "Must stay on: predictions are not kept, their pixels are counted."}
    )

    own_epochs, own_teacher_epochs = SHAPES_EPOCHS, SHAPES_TEACHER_EPOCHS
    other_epochs = 50.0


def build_segmenter(
    name: str,
    role: str,
    names: list[str],
    from_scratch: bool,
    ignore_index: int = 255,
    trust_remote_code: bool = False,
    **keywords,
) -> PreTrainedModel:
    """
    Make a segmenter for these classes.

    Args:
        name (`str`):
            Hub id, folder or `tiny-upernet-<width>`.
        role (`str`):
            What to call it in an error.
        names (`list[str]`):
            The classes.
        from_scratch (`bool`):
            Whether to take the configuration only.
        ignore_index (`int`, *optional*, defaults to 255):
            The label of pixels that its loss leaves out.
        trust_remote_code (`bool`), keywords (`dtype`, `revision`, `token`):
            As in `from_pretrained`.

    Returns:
        `PreTrainedModel`: with a new head where its classes were others.

    Example:

    ```python
    >>> from iekd_hf.commands.masks.run import build_segmenter
    >>> model = build_segmenter("tiny-upernet-8", "--student", ["cat", "dog"], from_scratch=True)
    >>> type(model).__name__, model.config.num_labels
    ('UperNetForSemanticSegmentation', 2)

    ```
    """
    if is_tiny(name):
        model = tiny_segmenter(name, **label_maps(names))
    else:
        model = load_for_classes(
            AutoModelForSemanticSegmentation, name, role, names, from_scratch, trust_remote_code, **keywords
        )
    set_ignore_index(model, ignore_index)
    return model


def build_processor(name: str, args: SegmentationDataArguments, size: tuple[int, int], **hub) -> BaseImageProcessor:
    """
    Load a segmenter's image processor, or make one; all images come out whole and of one size.

    Args:
        name (`str`):
            Hub id, folder or `tiny-upernet-<width>`.
        args (`SegmentationDataArguments`):
            The size that images are brought to.
        size (`tuple[int, int]`):
            (height, width) where neither the arguments nor a saved processor has one.
        hub (`revision`, `token`, `trust_remote_code`):
            As in `from_pretrained`.

    Returns:
        `BaseImageProcessor`

    Example:

    ```python
    >>> import PIL.Image
    >>> from iekd_hf.commands.masks.data import SegmentationDataArguments
    >>> from iekd_hf.commands.masks.run import build_processor
    >>> processor = build_processor("tiny-upernet-8", SegmentationDataArguments(image_size=[32, 64]), (48, 96))
    >>> processor(PIL.Image.new("RGB", (96, 48)), return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 3, 32, 64])

    ```
    """
    processor = None if is_tiny(name) else find_processor(name, **hub)
    return fit_whole(processor or tiny_processor(*size), args.image_size, args.do_reduce_labels)


def fit_whole(
    processor: BaseImageProcessor, image_size: list[int] | None = None, do_reduce_labels: bool = False
) -> BaseImageProcessor:
    """
    Let an image processor resize images whole, without crops or borders, so that masks follow by their size.

    Where it cannot (ConvNeXt's, PoolFormer's), one that can takes its place, with the same values of pixels.
    """
    if image_size is None:
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        size = {name: value for name, value in dict(size).items() if value}
        edge = size.get("shortest_edge", size.get("longest_edge"))
        image_size = (size.get("height", edge), size.get("width", edge))
    processor.size = dict(zip(("height", "width"), image_size, strict=True))
    changes = {"do_resize": True, "do_center_crop": False, "do_pad": False, "keep_aspect_ratio": False}
    for name, value in {**changes, "crop_pct": None, "do_reduce_labels": do_reduce_labels}.items():
        if hasattr(processor, name):
            setattr(processor, name, value)
    if _fits(processor):
        return processor
    return ViTImageProcessorPil(size=processor.size, **{name: getattr(processor, name) for name in _VALUES})


def _fits(processor: BaseImageProcessor) -> bool:
    """Return whether an image processor brings an image of another shape to its size."""
    size = processor.size["height"], processor.size["width"]
    try:
        pixels = processor(PIL.Image.new("RGB", (size[0] + 30, size[1] + 10)), return_tensors="pt")["pixel_values"]
    except (AttributeError, KeyError, TypeError, ValueError):  # of what is not there where only an edge is known
        return False
    return pixels.shape[-2:] == size


class SegmentationRun(CommandRun):
    """Hold the images with their masks, and what the trainers of `segment` share."""

    trainer_class = SegmentationTrainer
    distiller_class = IEKDSegmentationTrainer
    shown_metric = "mean_iou"

    def __init__(self, data_args: SegmentationDataArguments, args: TrainingArguments):
        super().__init__(args)
        self.data_args = data_args
        with args.main_process_first(desc="loading images"):  # the others find them in the cache
            self.splits, self.names = load_masked(data_args, args.seed)
        if not data_args.is_given:
            args.use_own_epochs()
        train, count = self.splits["train"], data_args.labelled_samples
        drawn = np.random.default_rng(args.seed).permutation(len(train))[:count].tolist()
        # What the students may see: some masks, the plain one with their images, the distilled one with all images.
        self.for_students = train.select(sorted(drawn))
        self.for_distilled = Masked(train.images, train.masks, data_args, frozenset(drawn))

    def prepare_images(self, network: str, **hub) -> None:
        """Let the images come as a network takes them, and choose the learning rate that goes with it."""
        if self.args.learning_rate is None:
            self.args.learning_rate = 0.02 if is_tiny(network) else 6e-5
        first = self.first_image()
        self.processor = build_processor(network, self.data_args, (first.height, first.width), **hub)

    def train_images(self, split: Masked) -> SegmentationImages:
        """Return a split as a segmenter trains on it."""
        jitter = {"horizontal_flip": self.data_args.horizontal_flip, "scale_jitter": self.data_args.scale_jitter}
        return SegmentationImages(split, self.processor, **jitter)

    def check_size(self, model: PreTrainedModel) -> None:
        """Refuse images of a size that a segmenter does not take, before anything trains."""
        try:
            list(self.segment(model, self.splits["train"].select([0])))
        except (RuntimeError, ValueError) as error:
            height, width = self.processor.size["height"], self.processor.size["width"]
            raise ValueError(
                f"Expected images of a size that {type(model).__name__} takes, got {height}x{width} pixels ({error}): "
                "give --image_size, for most networks multiples of their largest stride, 32."
            ) from error

    def check_last_batch(self, model: PreTrainedModel, *learners: str) -> None:
        """Refuse a last batch of one image where a model cannot train on it, as one that normalises maps of 1x1."""
        images = [self.common(learner)["train_dataset"] for learner in learners]
        alone = [each for each in images if leaves_one(each, self.args)]
        if not alone or not self.args.do_train or self.args.dataloader_drop_last:
            return
        pixel_values = next(iter(DataLoader(alone[0], 1, collate_fn=collate)))["pixel_values"]
        try:
            copy.deepcopy(model).train()(pixel_values=pixel_values.to(model.device))
        except ValueError as error:
            raise ValueError(
                f"Expected batches of at least two images, as {type(model).__name__} cannot train on a single one "
                f"({error}), got a last one of a single image ({len(alone[0])} in batches of "
                f"{self.args.train_batch_size}): set --dataloader_drop_last true, or another "
                "--per_device_train_batch_size."
            ) from error

    def common(self, learner: str = "teacher") -> dict:
        """Return the arguments that every trainer of this command takes, with the images that one learns from."""
        images = {"teacher": self.splits["train"], "distilled student": self.for_distilled}
        return {
            "train_dataset": self.train_images(images.get(learner, self.for_students)),
            "data_collator": collate,
            **self.of_evaluation(self.processor),
        }

    def trained_on(self, learner: str) -> str:
        """Return what a network learns from, for the table."""
        every, labelled = len(self.splits["train"]), len(self.for_students)
        if learner != "distilled student":
            return f"{every if learner == 'teacher' else labelled:,} masks"
        others = f", {every - labelled:,} images without" if every > labelled else ""
        return f"the same {labelled:,}{others}, and the teacher"

    def of_evaluation(self, processor: BaseImageProcessor) -> dict:
        """Return those that say what is evaluated, and how."""
        return {
            "eval_dataset": SegmentationImages(self.splits["validation"], processor, with_masks=True),
            "processing_class": processor,
            "compute_metrics": PixelMetrics(self.names),
        }

    def first_image(self) -> PIL.Image.Image:
        """Return the first validation image, in RGB."""
        return next(self.splits["validation"].rows([0]))[0]

    def evaluate(self, model: PreTrainedModel, processor: BaseImageProcessor | None = None) -> dict[str, float]:
        """Return a model's metrics on the validation images, as its own processor makes them if it has another."""
        return self.measure(model, data_collator=collate, **self.of_evaluation(processor or self.processor))

    @torch.inference_mode()
    def segment(self, model: PreTrainedModel, split: Masked) -> Iterator[np.ndarray]:
        """Yield the class of each pixel of each image."""
        model = model.to(self.args.device).eval()
        images = SegmentationImages(split, self.processor, with_masks=True)
        for batch in DataLoader(images, self.args.per_device_eval_batch_size, collate_fn=collate):
            logits = model(pixel_values=batch["pixel_values"].to(self.args.device)).logits
            for image, mask in zip(logits, batch["masks"], strict=True):
                yield to_classes(image, mask.shape).cpu().numpy()

    def for_the_card(self) -> dict:
        """Return what the model card says of the data and the run."""
        data = self.data_args
        return {
            "dataset": None if data.is_given else "images of simple shapes",
            "dataset_tags": data.dataset_name,
            "dataset_args": data.dataset_config_name,
            "license": self.args.license,
            "tasks": "image-segmentation",
            "picture": PICTURE if self.args.do_train and self.args.do_eval else None,
        }
