"""What `distill` and `mutual` share: classifiers by name, images as they take them, and what is measured."""

import re

import datasets
import evaluate
import numpy as np
from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    EvalPrediction,
    PreTrainedModel,
    TrainingArguments,
    ViTImageProcessorPil,
)

from iekd_hf import CifarResNetConfig

from ...models.loading import find_processor
from ..networks import label_maps, load_for_classes
from ..run import CommandRun
from .data import load_images
from .few_labels import StudentDataArguments, add_unlabelled, draw_labelled, split_by_labels
from .metrics import MacroF1, TopKAccuracy
from .recipes import MixedBatches
from .transforms import prepare


PICTURE, LOSSES = "report.png", "losses.png"


def build_model(
    name: str, role: str, names: list[str], from_scratch: bool, trust_remote_code: bool, dtype: str = "float32", **hub
) -> PreTrainedModel:
    """Make a classifier for these classes, with a new head where its own were others."""
    if match := re.fullmatch(r"cifar-resnet-(\d+)", name):
        config = CifarResNetConfig.from_depth(int(match[1]), **label_maps(names))
        return AutoModelForImageClassification.from_config(config)
    return load_for_classes(
        AutoModelForImageClassification, name, role, names, from_scratch, trust_remote_code, dtype, **hub
    )


def is_shorthand(name: str | None) -> bool:
    """Return whether a name stands for a network without weights."""
    return name is None or name.startswith("cifar-resnet-")


def build_processor(student: str, image_size: int | None, first_image, **hub) -> BaseImageProcessor:
    """Load the student's image processor, or make one for the images' own size."""
    if not is_shorthand(student):
        processor = find_processor(student, **hub)
        if processor is not None:
            if image_size is not None:
                processor.size = {"height": image_size, "width": image_size}
                processor.do_center_crop = False
            return processor
    height, width = (image_size, image_size) if image_size else (first_image.height, first_image.width)
    mean_and_std = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return ViTImageProcessorPil(size={"height": height, "width": width}, **mean_and_std)


class ImageRun(CommandRun):
    """Hold the images, and what the trainers of `distill` and `mutual` share."""

    def __init__(self, data_args: StudentDataArguments, args: TrainingArguments):
        super().__init__(args)
        self.data_args = data_args
        with args.main_process_first(desc="loading images"):  # the others find them in the cache
            self.splits = load_images(data_args, args.seed)
        self.names = self.splits["train"].features["label"].names
        data_args.decide(len(self.splits["train"]))
        if data_args.uses_digits:
            args.use_own_epochs()
        mixing = MixedBatches(len(self.names), data_args.mixup, data_args.cutmix)
        self.mixing = mixing if data_args.mixup + data_args.cutmix > 0 else None
        # What a model takes the validation images for.
        self.predicted: dict[PreTrainedModel, np.ndarray] = {}
        self.metric = evaluate.combine([TopKAccuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)])

    def prepare_images(self, network: str, from_scratch: bool, **hub) -> None:
        """Process images as a network takes them, and choose the learning rate that suits its start."""
        if self.args.learning_rate is None:
            self.args.learning_rate = 0.1 if from_scratch else 0.01
        first = self.splits["train"][0]["image"]
        self.processor = build_processor(network, self.data_args.image_size, first, **hub)
        with self.args.main_process_first(desc="decoding images"):
            self.images, self.augmentation = prepare(self.splits, self.processor, self.data_args, self.args.seed)
            self.hide_labels()

    def hide_labels(self) -> None:
        """Leave the students the labels of some training images; a teacher has all."""
        self.for_students = self.for_distilled = self.images["train"]
        count = self.data_args.labelled_samples
        if count is not None and self.args.do_train:
            labels = self.splits["train"].with_format("numpy")["label"][:]
            every, few = split_by_labels(self.images["train"], draw_labelled(labels, count, self.args.seed))
            self.for_students, self.for_distilled = few, few if self.data_args.unlabelled is False else every
        if "unlabelled" in self.images and self.args.do_train:
            self.for_distilled = add_unlabelled(self.for_distilled, self.images["unlabelled"])

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return top-1 and top-5 accuracy, and the mean F1 score of the classes."""
        return self.metric.compute(predictions=prediction.predictions, references=prediction.label_ids)

    def common(self, learner: str = "teacher") -> dict:
        """Return the arguments that every trainer of this command takes, with the images that one learns from."""
        images = {"teacher": self.images["train"], "distilled student": self.for_distilled}
        return {
            "train_dataset": images.get(learner, self.for_students),
            "eval_dataset": self.images["validation"],
            "augmentation": self.augmentation,
            "mixing": self.mixing,
            "processing_class": self.processor,
            "compute_metrics": self.compute_metrics,
        }

    def evaluate(self, model: PreTrainedModel, processor: BaseImageProcessor | None = None) -> dict[str, float]:
        """Return a model's metrics on the validation images, as its own processor makes them if it has another."""
        common = self.common()
        if processor is not None:
            splits = datasets.DatasetDict({"validation": self.splits["validation"]})
            images, common["augmentation"] = prepare(splits, processor, self.data_args, self.args.seed)
            common["eval_dataset"] = images["validation"]
        return self.measure(model, **common)

    def measure(self, model: PreTrainedModel, **common) -> dict[str, float]:
        """Return a model's metrics, and keep what it predicts."""
        prediction = self.measuring_trainer(model, **common).predict(common["eval_dataset"], metric_key_prefix="eval")
        self.predicted[model] = prediction.predictions.argmax(axis=1)
        return {name.removeprefix("eval_"): value for name, value in prediction.metrics.items()}

    def trained_on(self, learner: str) -> str:
        """Return what a network learns from, for the table."""
        labelled = len(self.common("teacher" if learner == "teacher" else "")["train_dataset"])
        if learner != "distilled student":
            return f"{labelled:,} labelled images"
        unlabelled = len(self.for_distilled) - labelled
        if not unlabelled:
            return f"the same {labelled:,}, and the teacher"
        return f"the same {labelled:,}, {unlabelled:,} unlabelled, and the teacher"

    def for_the_card(self) -> dict:
        """Return what the model card says of the data and the run."""
        data = self.data_args
        digits = "scikit-learn's handwritten digits" if data.uses_digits else None
        return {
            "dataset": digits,
            "dataset_tags": data.dataset_name,
            "dataset_args": data.dataset_config_name,
            "license": self.args.license,
            "tasks": "image-classification",
            "picture": PICTURE if self.args.do_train else None,
        }
