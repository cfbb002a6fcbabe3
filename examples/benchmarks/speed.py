"""
Time what a step, an epoch, an evaluation and a batch of images cost, and how much memory they take.

    python examples/benchmarks/speed.py --output_dir speed

Each section runs in a process of its own, on one thread unless OMP_NUM_THREADS says otherwise; within it all cases
take turns, step by step, and each ratio is the median over the rounds of the ratio to the section's first case, which
is run twice: how far the second time is from 1 says how far to trust the rest. Times are the process's own, or wall
time on a GPU. The table goes to the screen and to speed.md, everything to speed.json, the ratios to speed.png;
sections that were measured earlier stay there.
"""

import argparse
import copy
import functools
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
import transformers
from lockstep import StepsOf, compare
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification, Trainer, ViTImageProcessorPil

from iekd_hf import (
    BatchAugmentation,
    CifarResNetConfig,
    CifarResNetForImageClassification,
    DecodedImages,
    FactorEncoder,
    IEKDTrainer,
    IEKDTrainingArguments,
    Paraphraser,
)
from iekd_hf.base_trainer import DistillationTrainer


matplotlib.use("Agg")
import matplotlib.pyplot as plt


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SGD = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
BARE, CONTROL = "bare IE-KD loop, fp32", "the same once more (control)"
# glibc gives freed activations back to the kernel and faults them in again, which moves times by 3 to 25 %, and has
# another pool of memory for each thread, of which the trainers have one each.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_ARENA_MAX": "1"}


class Setting:
    """
    Hold images and models of one size; a model is made when it is asked for.

    Args:
        image_size (`int`), batch_size (`int`), num_images (`int`):
            Of the images, which are noise.
        make_teacher (`Callable`), make_student (`Callable`):
            Make the models, as they start.
        factor_channels (`int`, *optional*):
            Channels of the factors. By default half of the teacher's.
    """

    def __init__(self, image_size, batch_size, num_images, make_teacher, make_student, factor_channels=None):
        self.batch_size, self.make_teacher, self.make_student = batch_size, make_teacher, make_student
        self.factor_channels = factor_channels
        noise = np.random.default_rng(0).integers(0, 256, (num_images, image_size, image_size, 3), dtype=np.uint8)
        rows = {"image": [PIL.Image.fromarray(image) for image in noise], "label": [i % 10 for i in range(num_images)]}
        self.rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        datasets.disable_progress_bars()
        self.images = DecodedImages.decode(self.rows)
        self.augmentation = BatchAugmentation([0.5] * 3, [0.5] * 3, crop="padded", horizontal_flip=True)
        self.folder = tempfile.TemporaryDirectory()

    @functools.cached_property
    def teacher(self) -> PreTrainedModel:
        return self.make_teacher().eval()

    @functools.cached_property
    def student(self) -> PreTrainedModel:
        return self.make_student()

    @functools.cached_property
    def paraphraser(self) -> Paraphraser:
        channels = self.teacher.config.hidden_sizes[-1]
        return Paraphraser(channels, self.factor_channels or channels // 2).eval()

    def arguments(self, **kwargs) -> IEKDTrainingArguments:
        return IEKDTrainingArguments(
            output_dir=self.folder.name,
            max_steps=10**6,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=256,
            learning_rate=SGD["lr"],
            lr_scheduler_type="constant",
            optim="sgd",
            optim_args="momentum=0.9,nesterov=true",
            weight_decay=SGD["weight_decay"],
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            cache_views=1,
            use_cpu=not torch.cuda.is_available(),
            **kwargs,
        )

    def common(self, **kwargs) -> dict:
        model, args = copy.deepcopy(self.student), self.arguments(**kwargs)
        return {
            "model": model,
            "args": args,
            "train_dataset": self.images,
            "eval_dataset": self.images,
            "augmentation": self.augmentation,
        }

    def iekd(self, **kwargs) -> IEKDTrainer:
        """Make our trainer."""
        return IEKDTrainer(teacher_model=self.teacher, paraphraser=self.paraphraser, **self.common(**kwargs))

    def alone(self, **kwargs) -> Trainer:
        """Make a trainer of the student alone: Trainer itself, but for the images."""
        return DistillationTrainer(**self.common(**kwargs))


class BareLoop:
    """The mathematics of IE-KD as one would write it down, without a framework; or the student alone."""

    def __init__(self, setting: Setting, distil: bool = True):
        self.setting, self.distil = setting, distil
        self.student = copy.deepcopy(setting.student).to(DEVICE).train()
        self.augmentation = copy.deepcopy(setting.augmentation).to(DEVICE)
        trained = [*self.student.parameters()]
        if distil:
            self.teacher, self.paraphraser = setting.teacher.to(DEVICE), setting.paraphraser.to(DEVICE)
            channels, k = self.student.config.hidden_sizes[-1], self.paraphraser.factor_channels
            self.inheriting, self.exploring = torch.randperm(channels, device=DEVICE).chunk(2)
            self.encoders = torch.nn.ModuleList(FactorEncoder(channels // 2, k) for _ in range(2)).to(DEVICE)
            trained += self.encoders.parameters()
        self.optimizer = torch.optim.SGD(trained, **SGD)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.randperm(len(self.setting.images))[: self.setting.batch_size]
        batch = self.setting.images.__getitems__(ids.tolist())
        pixels = batch["pixel_values"].to(DEVICE, non_blocking=True)
        return self.augmentation(pixels, ids), batch["labels"].to(DEVICE, non_blocking=True)

    @torch.no_grad()
    def target(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.paraphraser.encode(self.teacher.base_model(pixels).last_hidden_state)

    def loss(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # First, as it is faster: its activations take the memory that the student's will have.
        F_T = F.normalize(self.target(pixels).flatten(1)) if self.distil else None
        features = self.student.base_model(pixels)
        f_S = features.last_hidden_state
        loss = F.cross_entropy(self.student.classifier(features.pooler_output), labels)
        if self.distil:
            F_inh = F.normalize(self.encoders[0](f_S.index_select(1, self.inheriting)).flatten(1))
            F_exp = F.normalize(self.encoders[1](f_S.index_select(1, self.exploring)).flatten(1))
            loss = loss + 1000 * (F_inh - F_T).abs().mean() - 100 * (F_exp - F_T).abs().mean()
        return loss

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss(*self.batch()).backward()
        self.optimizer.step()


def cifar(depth: int, **kwargs) -> PreTrainedModel:
    return CifarResNetForImageClassification(CifarResNetConfig.from_depth(depth, num_labels=10, **kwargs))


def cifar_setting() -> Setting:
    return Setting(32, 128, 2048, lambda: cifar(56), lambda: cifar(20))


def tiny_setting() -> Setting:
    return Setting(28, 16, 2048, lambda: cifar(8), lambda: cifar(8, hidden_sizes=[8, 16, 32], embedding_size=8))


def imagenet_setting(factor_channels: int | None = None) -> Setting:
    basic = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}

    def resnet(**kwargs):
        return ResNetForImageClassification(ResNetConfig(num_labels=10, **kwargs))

    return Setting(224, 8, 64, resnet, lambda: resnet(**basic), factor_channels)


def photographs() -> Setting:
    return Setting(256, 128, 128, make_teacher=None, make_student=None)


def teachers(bare: BareLoop, trainer: IEKDTrainer) -> dict:
    """Return the forward passes of the teacher's side alone."""
    pixels, _ = bare.batch()
    trainer.teacher.tap.attach()

    def fast():
        with trainer.accelerator.autocast():
            trainer.teacher({"pixel_values": pixels})

    return {"teacher and its encoder, forward": lambda: bare.target(pixels), "the same, fast copy": fast}


def steps(setting: Setting, rounds: int) -> dict:
    """Time fp32 steps."""
    bare, control, alone = BareLoop(setting), BareLoop(setting), BareLoop(setting, distil=False)
    contenders = {
        BARE: bare,
        CONTROL: control,
        "IEKDTrainer, fast_teacher=False": StepsOf(lambda: setting.iekd(fast_teacher=False)),
        "IEKDTrainer": StepsOf(setting.iekd),
        "IEKDTrainer, channels_last": StepsOf(lambda: setting.iekd(channels_last=True)),
        "IEKDTrainer, cached teacher": StepsOf(lambda: setting.iekd(cache_teacher=True)),
        "student alone, bare loop": alone,
        "student alone, Trainer": StepsOf(setting.alone),
        **teachers(bare, setting.iekd()),
    }
    return compare(contenders, rounds)


def cached_steps(setting: Setting, rounds: int) -> dict:
    """Time a live and a cached teacher."""
    contenders = {
        BARE: BareLoop(setting),
        CONTROL: BareLoop(setting),
        "IEKDTrainer": StepsOf(setting.iekd),
        "IEKDTrainer, cached teacher": StepsOf(lambda: setting.iekd(cache_teacher=True)),
        "student alone, Trainer": StepsOf(setting.alone),
    }
    return compare(contenders, rounds)


def bf16_steps(setting: Setting, rounds: int) -> dict:
    """Time bf16 steps against the fp32 loop."""
    bf16 = {"bf16": True}
    trainer = setting.iekd(**bf16, teacher_dtype="bfloat16")
    contenders = {
        BARE: BareLoop(setting),
        CONTROL: BareLoop(setting),
        "IEKDTrainer, bf16": StepsOf(lambda: setting.iekd(**bf16)),
        "IEKDTrainer, bf16, channels_last": StepsOf(lambda: setting.iekd(**bf16, channels_last=True)),
        "IEKDTrainer, bf16, channels_last, teacher_dtype=bfloat16": StepsOf(
            lambda: setting.iekd(**bf16, channels_last=True, teacher_dtype="bfloat16")
        ),
        "IEKDTrainer, bf16, channels_last, cached teacher": StepsOf(
            lambda: setting.iekd(**bf16, channels_last=True, cache_teacher=True)
        ),
        "student alone, Trainer, bf16, channels_last": StepsOf(lambda: setting.alone(**bf16, channels_last=True)),
    }
    contenders["teacher and its encoder, forward, bf16 fast copy"] = teachers(BareLoop(setting), trainer)[
        "the same, fast copy"
    ]
    return compare(contenders, rounds)


def compiled_steps(setting: Setting, rounds: int) -> dict:
    """Time compiled steps against the fp32 loop."""
    bf16 = {"bf16": True, "channels_last": True, "teacher_dtype": "bfloat16"}
    contenders = {
        BARE: BareLoop(setting),
        CONTROL: BareLoop(setting),
        "IEKDTrainer, bf16, channels_last, torch_compile, compile_teacher": StepsOf(
            lambda: setting.iekd(**bf16, torch_compile=True, compile_teacher=True)
        ),
    }
    return compare(contenders, rounds)


def torchdistill_steps(setting: Setting, rounds: int) -> dict:
    """Time torchdistill's factor transfer beside ours, which is the whole map inheriting; needs torchdistill."""
    from torchdistill_ft import factor_transfer

    bare = BareLoop(setting)
    no_checkpoint = str(Path(setting.folder.name, "none"))
    step = factor_transfer(setting.teacher, copy.deepcopy(setting.student), SGD, DEVICE, no_checkpoint)
    contenders = {
        BARE: bare,
        CONTROL: BareLoop(setting),
        "IEKDTrainer as factor transfer, fast_teacher=False": StepsOf(
            lambda: setting.iekd(inheritance_ratio=1.0, lambda_exp=0.0, fast_teacher=False)
        ),
        "IEKDTrainer as factor transfer": StepsOf(lambda: setting.iekd(inheritance_ratio=1.0, lambda_exp=0.0)),
        "torchdistill's factor transfer": lambda: step(*bare.batch()),
    }
    return compare(contenders, rounds)


def evaluations(setting: Setting, rounds: int) -> dict:
    """Time evaluate()."""
    alone, again, iekd = setting.alone(), setting.alone(), setting.iekd()
    contenders = {
        "evaluate() of a Trainer": alone.evaluate,
        CONTROL: again.evaluate,
        "evaluate() of IEKDTrainer": iekd.evaluate,
    }
    return compare(contenders, rounds)


def data_paths(setting: Setting, rounds: int) -> dict:
    """Time the examples' ways from images to a batch of pixel values, in images a second."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from image_data import DataArguments
    from image_transforms import prepare
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    side = min(setting.images.shape[-1], 224)
    processor = ViTImageProcessorPil(size={"height": side, "width": side})
    splits = datasets.DatasetDict({"train": setting.rows, "validation": setting.rows})
    args = DataArguments(horizontal_flip=True)  # crops with padding up to 64 pixels, resized ones above
    args.sizes, args.decode_once = {setting.images.shape[1:]}, True
    whole, augmentation = prepare(splits, processor, args, seed=0)
    augmentation.to(DEVICE)
    args.decode_once = False
    one_by_one, _ = prepare(splits, processor, args, seed=0)

    def whole_batches(split, drawn):
        for batch in DataLoader(whole[split], batch_size=128, shuffle=True, collate_fn=lambda batch: batch):
            ids = (torch.from_numpy(batch["image_ids"]),) if drawn else ()
            augmentation(batch["pixel_values"].to(DEVICE), *ids)

    def examples(split):
        for batch in DataLoader(one_by_one[split], batch_size=128, shuffle=True, collate_fn=default_data_collator):
            batch["pixel_values"].to(DEVICE)

    contenders = {
        "whole batches, crop and flip": lambda: whole_batches("train", True),
        CONTROL: lambda: whole_batches("train", True),
        "whole batches, normalised only": lambda: whole_batches("validation", False),
        "image by image (datasets, processor, kornia), crop and flip": lambda: examples("train"),
        "image by image, normalised only": lambda: examples("validation"),
    }
    results = compare(contenders, rounds)
    for result in results.values():
        result["images_per_second"] = 1000 * len(setting.images) / result["milliseconds"]
    return results


def peak(which: str) -> dict:
    """Measure how much more memory than after the imports one case takes, in MiB; one process each."""

    def status(name):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) / 1024

    before = status("VmRSS")
    place, case = which.split(":")
    setting = SETTINGS[place]()
    if case == "bare":
        step = BareLoop(setting)
    else:
        cached = functools.partial(setting.iekd, cache_teacher=True)
        step = StepsOf({"alone": setting.alone, "live": setting.iekd, "cached": cached}[case])
    for _ in range(8):
        step()
    if torch.cuda.is_available():
        return {"mebibytes": torch.cuda.max_memory_allocated() / 2**20}
    return {"mebibytes": status("VmHWM") - before}


# Name: title, what it is measured on, how, and how many rounds.
CIFAR, IMAGENET = "ResNet-56 -> ResNet-20, 32x32, batch 128", "ResNet-50 -> ResNet-18, 224x224, batch 8"
SECTIONS = {
    "steps": (CIFAR, cifar_setting, steps, 12),
    "bf16": (f"{CIFAR}, bf16", cifar_setting, bf16_steps, 12),
    "compile": (f"{CIFAR}, bf16, compiled", cifar_setting, compiled_steps, 12),
    "tiny": ("ResNet-8 -> narrow ResNet-8, 28x28, batch 16", tiny_setting, steps, 60),
    "imagenet": (IMAGENET, imagenet_setting, steps, 6),
    "imagenet k=256": (f"{IMAGENET}, factor_channels=256", lambda: imagenet_setting(256), cached_steps, 6),
    "imagenet bf16": (f"{IMAGENET}, bf16", imagenet_setting, bf16_steps, 6),
    "torchdistill": (f"{CIFAR}, factor transfer", cifar_setting, torchdistill_steps, 12),
    "evaluation": ("ResNet-20, 2,048 images of 32x32", cifar_setting, evaluations, 8),
    "imagenet evaluation": ("ResNet-18, 64 images of 224x224", imagenet_setting, evaluations, 6),
    "data": ("images of 32x32, batch 128", cifar_setting, data_paths, 30),
    "imagenet data": ("images of 256x256 to 224x224, batch 128", photographs, data_paths, 6),
}
MEMORY = {"student alone, Trainer": "alone", "bare IE-KD loop": "bare", "IEKDTrainer": "live"}
MEMORY |= {"IEKDTrainer, cached teacher": "cached"}
PLACES = {"cifar": CIFAR, "imagenet": IMAGENET}
SETTINGS = {"cifar": cifar_setting, "imagenet": imagenet_setting}


def in_a_process(argument: str, pin: bool) -> dict:
    """Run one section by itself."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **(MALLOC if pin else {})}
    command = [sys.executable, __file__, "--only", argument]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_times(name: str) -> dict:
    """Return the section of that name."""
    cases = [{"name": case, **numbers} for case, numbers in in_a_process(name, pin=True).items()]
    return {name: {"title": SECTIONS[name][0], "cases": cases}}


def measure_memory() -> dict:
    """Return the sections of peak memory."""
    sections = {}
    for place, title in PLACES.items():
        cases = [{"name": case, **in_a_process(f"{place}:{key}", pin=False)} for case, key in MEMORY.items()]
        cases = [{**case, "ratio": case["mebibytes"] / cases[0]["mebibytes"]} for case in cases]
        sections[f"memory {place}"] = {"title": f"peak memory over imports, {title}", "cases": cases}
    return sections


def machine() -> str:
    """Say what was measured on."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {versions}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(": ")[1].split() for line in lines if line.startswith("flags")), [])
    wanted = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return f"{name} ({' '.join(wanted)}), {threads} thread, {versions}"


def table(sections: dict) -> str:
    """Lay the results out in Markdown."""
    lines = [machine()]
    for section in sections.values():
        unit = next(name for name in ("mebibytes", "images_per_second", "milliseconds") if name in section["cases"][0])
        heading = {"mebibytes": "MiB", "images_per_second": "images/s", "milliseconds": "ms"}[unit]
        lines += ["", f"| {section['title']} | {heading} | ratio | range |", "|---|---:|---:|---|"]
        for case in section["cases"]:
            spread = f"{case['lowest']:.3f} to {case['highest']:.3f}" if "lowest" in case else ""
            digits = 1 if case[unit] < 100 else 0
            lines.append(f"| {case['name']} | {case[unit]:,.{digits}f} | {case['ratio']:.3f} | {spread} |")
    return "\n".join(lines)


def draw(sections: dict, path: Path) -> None:
    """Draw the ratios as bars, a picture for each section."""
    sections = list(sections.values())
    heights = [len(section["cases"]) + 1 for section in sections]
    figure, axes = plt.subplots(
        len(sections),
        figsize=(10, 0.32 * sum(heights) + 0.5 * len(sections)),
        gridspec_kw={"height_ratios": heights},
        constrained_layout=True,
        squeeze=False,
    )
    for axis, section in zip(axes[:, 0], sections, strict=True):
        names, ratios = zip(*((case["name"], case["ratio"]) for case in section["cases"]), strict=True)
        axis.bar_label(axis.barh(names, ratios, color="C0"), [f"{ratio:.2f}" for ratio in ratios], padding=4)
        axis.set_title(section["title"], fontsize="medium", loc="left")
        axis.axvline(1, color="black", linewidth=0.5)
        axis.invert_yaxis()
        axis.margins(x=0.1)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SECTIONS, "memory"]
    if importlib.util.find_spec("torchdistill") is None:
        names.remove("torchdistill")
    parser.add_argument(
        "--sections", nargs="+", choices=names, default=names, metavar="SECTION", help=", ".join(names)
    )
    parser.add_argument("--output_dir", type=Path, default=Path("speed"))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        torch.manual_seed(0)
        if ":" in options.only:
            print(json.dumps(peak(options.only)))
        else:
            _, make_setting, measure, rounds = SECTIONS[options.only]
            print(json.dumps(measure(make_setting(), rounds)))
        return
    options.output_dir.mkdir(parents=True, exist_ok=True)
    written = options.output_dir / "speed.json"
    sections = json.loads(written.read_text())["sections"] if written.is_file() else {}
    for name in options.sections:
        print(f"{name} ...", file=sys.stderr, flush=True)
        sections.update(measure_memory() if name == "memory" else measure_times(name))
        order = [*SECTIONS, *(f"memory {place}" for place in PLACES)]
        sections = {key: sections[key] for key in order if key in sections}
        written.write_text(json.dumps({"machine": machine(), "sections": sections}, indent=2) + "\n")
        (options.output_dir / "speed.md").write_text(table(sections) + "\n")
        draw(sections, options.output_dir / "speed.png")
    print(table(sections))


if __name__ == "__main__":
    main()
