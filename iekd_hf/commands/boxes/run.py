"""What `detect` is made of: its arguments, detectors by name, and what is measured."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import PIL.Image
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForObjectDetection, BaseImageProcessor, PreTrainedModel, TrainingArguments

from ...models.loading import find_processor
from ..arguments import ScriptArguments
from ..networks import label_maps, load_for_classes
from ..run import CommandRun
from .data import Annotated, DetectionDataArguments, load_annotated
from .tiny_detectors import is_tiny, open_norms, tiny_detector, tiny_processor
from .trainers import BoxMetrics, DetectionTrainer, IEKDDetectionTrainer, to_boxes
from .transforms import DetectionImages, collate


logger = logging.getLogger(__name__)

PICTURE = "detections.png"
# The shapes are learnt in a few minutes.
SHAPES_EPOCHS = {"num_train_epochs": 5.0, "paraphraser_epochs": 2.0}
SHAPES_TEACHER_EPOCHS = 10.0


@dataclass
class DetectionScriptArguments(ScriptArguments):
    """Change those defaults that suit detectors, which are trained by AdamW."""

    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs. Default: 5 for the shapes, otherwise 50."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Batch size of each device."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Batch size of each device in evaluation."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate. Default: 0.002 for tiny detectors, otherwise 0.0001."}
    )
    optim: str = field(default="adamw_torch_fused", metadata={"help": "Optimizer, as in TrainingArguments."})
    optim_args: str | None = field(default=None, metadata={"help": "Arguments of the optimizer."})
    weight_decay: float = field(default=1e-4, metadata={"help": "Weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Maximum gradient norm; 0 for no clipping."})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of a linear warm-up, or their share of all steps where below 1."}
    )
    eval_strategy: str = field(
        default="no", metadata={"help": "When to evaluate while training; at the end that is done anyway."}
    )
    batch_eval_metrics: bool = field(
        default=True, metadata={"help": "Must stay on: predictions are not kept, but for their boxes."}
    )

    own_epochs, own_teacher_epochs = SHAPES_EPOCHS, SHAPES_TEACHER_EPOCHS
    other_epochs = 50.0


def build_detector(
    name: str,
    role: str,
    names: list[str],
    most_objects: int,
    from_scratch: bool,
    trust_remote_code: bool = False,
    **keywords,
) -> PreTrainedModel:
    """
    Make a detector for these classes.

    Args:
        name (`str`):
            Hub id, folder or `tiny-rt-detr-<width>`.
        role (`str`):
            What to call it in an error.
        names (`list[str]`):
            The classes.
        most_objects (`int`):
            How many objects an image has at most; a detector that has fewer queries is warned of.
        from_scratch (`bool`):
            Whether to take the configuration only.
        trust_remote_code (`bool`), keywords (`dtype`, `revision`, `token`):
            As in `from_pretrained`.

    Returns:
        `PreTrainedModel`: with a new head where its classes were others.

    Example:

    ```python
    >>> from iekd_hf.commands.boxes.run import build_detector
    >>> model = build_detector("tiny-rt-detr-8", "--student", ["cat", "dog"], most_objects=5, from_scratch=True)
    >>> type(model).__name__, model.config.num_queries
    ('RTDetrForObjectDetection', 10)

    ```
    """
    if is_tiny(name):
        return tiny_detector(name, max(most_objects, 5), **label_maps(names))
    model = load_for_classes(
        AutoModelForObjectDetection, name, role, names, from_scratch, trust_remote_code, **keywords
    )
    if from_scratch:
        open_norms(model)
        model.requires_grad_(True)  # DETR keeps the first layers of a backbone as they are, which is for trained ones
    queries = getattr(model.config, "num_queries", None) or getattr(model.config, "num_detection_tokens", most_objects)
    if queries < most_objects:
        logger.warning(
            "%s finds at most %d objects in an image, but some have %d: it will miss the rest; take one with more "
            "queries to find all.",
            *(role, queries, most_objects),
        )
    return model


def build_processor(name: str, args: DetectionDataArguments, size: tuple[int, int], **hub) -> BaseImageProcessor:
    """
    Load a detector's image processor, or make one.

    Args:
        name (`str`):
            Hub id, folder or `tiny-rt-detr-<width>`.
        args (`DetectionDataArguments`):
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
    >>> from iekd_hf.commands.boxes.run import build_processor
    >>> from iekd_hf.commands.boxes.data import DetectionDataArguments
    >>> processor = build_processor("tiny-rt-detr-8", DetectionDataArguments(image_square_size=64), (48, 96))
    >>> processor(PIL.Image.new("RGB", (96, 48)), return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 3, 64, 64])

    ```
    """
    processor = None if is_tiny(name) else find_processor(name, **hub)
    if processor is None:
        processor = tiny_processor(*(args.image_size or size))
    if args.image_size is not None:
        processor.size = dict(zip(("height", "width"), args.image_size, strict=True))
        processor.do_pad = False
    if args.image_square_size is not None:
        side = args.image_square_size
        processor.size = {"max_height": side, "max_width": side}
        processor.do_pad, processor.pad_size = True, {"height": side, "width": side}
    return processor


class DetectionRun(CommandRun):
    """Hold the annotated images, and what the trainers of `detect` share."""

    trainer_class = DetectionTrainer
    distiller_class = IEKDDetectionTrainer
    shown_metric = "map"

    def __init__(self, data_args: DetectionDataArguments, args: TrainingArguments):
        super().__init__(args)
        self.data_args = data_args
        with args.main_process_first(desc="loading images"):  # the others find them in the cache
            self.splits, self.names = load_annotated(data_args, args.seed)
        if not data_args.is_given:
            args.use_own_epochs()
        self.most_objects = max(len(labels) for split in self.splits.values() for labels in split.objects["labels"])

    def prepare_images(self, network: str, **hub) -> None:
        """Let the images come as a network takes them, and choose the learning rate that goes with it."""
        if self.args.learning_rate is None:
            self.args.learning_rate = 2e-3 if is_tiny(network) else 1e-4
        first = self.splits["train"].images[0]["image"]
        self.processor = build_processor(network, self.data_args, (first.height, first.width), **hub)
        jitter = {"horizontal_flip": self.data_args.horizontal_flip, "scale_jitter": self.data_args.scale_jitter}
        self.train_images = DetectionImages(self.splits["train"], self.processor, **jitter)

    def check_size(self, model: PreTrainedModel) -> None:
        """Refuse images of a size that a detector does not take, before anything trains."""
        try:
            list(self.detect(model, self.splits["train"].select([0])))
        except RuntimeError as error:
            height, width = self.train_images[0]["pixel_values"].shape[-2:]
            raise ValueError(
                f"Expected images of a size that {type(model).__name__} takes, got {height}x{width} pixels ({error}): "
                "give --image_size multiples of the backbone's largest stride, 32 in most detectors, 16 in "
                "tiny-rt-detr."
            ) from error

    def common(self, learner: str = "teacher") -> dict:
        """Return the arguments that every trainer of this command takes."""
        return {"train_dataset": self.train_images, "data_collator": collate, **self.of_evaluation(self.processor)}

    def of_evaluation(self, processor: BaseImageProcessor, split: str = "validation") -> dict:
        """Return those that say what is evaluated, and how."""
        return {
            "eval_dataset": DetectionImages(self.splits[split], processor),
            "processing_class": processor,
            "compute_metrics": BoxMetrics(self.splits[split], self.names),
        }

    def first_image(self) -> PIL.Image.Image:
        """Return the first validation image, in RGB."""
        return next(self.splits["validation"].rows([0]))[1]

    def evaluate(self, model: PreTrainedModel, processor: BaseImageProcessor | None = None) -> dict[str, float]:
        """Return a model's metrics on the validation images, as its own processor makes them if it has another."""
        return self.measure(model, data_collator=collate, **self.of_evaluation(processor or self.processor))

    @torch.inference_mode()
    def detect(self, model: PreTrainedModel, split: Annotated, threshold: float = 0) -> Iterator[dict[str, list]]:
        """Yield what a model finds in each image, in its pixels."""
        images = DetectionImages(split, self.processor)
        model = model.to(self.args.device).eval()
        for batch in DataLoader(images, self.args.per_device_eval_batch_size, collate_fn=collate):
            inputs = {name: value.to(self.args.device) for name, value in batch.items() if name != "labels"}
            outputs = model(**inputs)
            frames = torch.stack([label["frame"] for label in batch["labels"]]).to(self.args.device)
            yield from to_boxes(outputs.logits.float(), outputs.pred_boxes.float(), frames, len(self.names), threshold)

    def for_the_card(self) -> dict:
        """Return what the model card says of the data and the run."""
        data = self.data_args
        return {
            "dataset": None if data.is_given else "images of simple shapes",
            "dataset_tags": data.dataset_name,
            "dataset_args": data.dataset_config_name,
            "license": self.args.license,
            "tasks": "object-detection",
            "picture": PICTURE if self.args.do_train and self.args.do_eval else None,
        }
