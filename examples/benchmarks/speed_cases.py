"""What the speed benchmark compares: images and models of one size, a bare loop, and each section's contenders."""

import copy
import functools
import io
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import repdistiller_ft
import timm_features
import torch
import torch.nn.functional as F
import torchdistill_ft
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
from iekd_hf.training.base_trainer import DistillationTrainer


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SGD = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}
LABEL = datasets.ClassLabel(num_classes=10)
BARE, CONTROL = "bare IE-KD loop, fp32", "the same once more (control)"


class Setting:
    """
    Hold images and models of one size; decoded images and models are made when they are asked for.

    Args:
        image_size (`int`), batch_size (`int`), num_images (`int`):
            Of the images, which are noise.
        make_teacher (`Callable`), make_student (`Callable`):
            Make the models, as they start.
        factor_channels (`int`, *optional*):
            Channels of the factors. By default half of the teacher's.

    `kernel_size` is that of the encoders and the paraphraser; it can be changed before they are made.
    """

    kernel_size = 3

    def __init__(self, image_size, batch_size, num_images, make_teacher, make_student, factor_channels=None):
        self.batch_size, self.make_teacher, self.make_student = batch_size, make_teacher, make_student
        self.factor_channels = factor_channels
        noise = np.random.default_rng(0).integers(0, 256, (num_images, image_size, image_size, 3), dtype=np.uint8)
        rows = {"image": [PIL.Image.fromarray(image) for image in noise], "label": [i % 10 for i in range(num_images)]}
        self.rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        datasets.disable_progress_bars()
        self.augmentation = BatchAugmentation([0.5] * 3, [0.5] * 3, crop="padded", horizontal_flip=True)
        self.folder = tempfile.TemporaryDirectory()

    @functools.cached_property
    def images(self) -> DecodedImages:
        return DecodedImages.decode(self.rows)

    @functools.cached_property
    def teacher(self) -> PreTrainedModel:
        return self.make_teacher().eval()

    @functools.cached_property
    def student(self) -> PreTrainedModel:
        return self.make_student()

    @functools.cached_property
    def paraphraser(self) -> Paraphraser:
        channels = self.teacher.config.hidden_sizes[-1]
        return Paraphraser(channels, self.factor_channels or channels // 2, kernel_size=self.kernel_size).eval()

    def arguments(self, **kwargs) -> IEKDTrainingArguments:
        kwargs = {"lambda_inh": 1000.0, "lambda_exp": 100.0, **kwargs}  # those of the bare loop
        return IEKDTrainingArguments(
            output_dir=self.folder.name,
            max_steps=10**6,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=2 * self.batch_size,
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
        kwargs = {"encoder_kernel_size": self.kernel_size, **kwargs}
        return IEKDTrainer(teacher_model=self.teacher, paraphraser=self.paraphraser, **self.common(**kwargs))

    def iekd_by_name(self, **kwargs) -> IEKDTrainer:
        """Make our trainer of a teacher and a paraphraser that are read from a disk, and held by nothing else."""
        folders = {name: str(Path(self.folder.name, name)) for name in ("teacher", "paraphraser")}
        for name, folder in folders.items():
            getattr(self, name).save_pretrained(folder)
            vars(self).pop(name)
        models = {"teacher_model": folders["teacher"], "paraphraser": folders["paraphraser"]}
        return IEKDTrainer(**models, **self.common(encoder_kernel_size=self.kernel_size, **kwargs))

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


def jpeg_files(enlarged: int = 1) -> datasets.Dataset:
    """Make files of mixed sizes, around 500x375, of parts of the two photographs of scikit-learn, perhaps enlarged."""
    from sklearn.datasets import load_sample_images

    generator, files = np.random.default_rng(0), []
    photographs = [PIL.Image.fromarray(pixels) for pixels in load_sample_images().images]
    for i in range(64):
        width, height = generator.integers(420, 580), generator.integers(315, 427)
        x, y = generator.integers(0, 641 - width), generator.integers(0, 428 - height)
        file = io.BytesIO()
        part = photographs[i % 2].crop((x, y, x + width, y + height))
        part.resize((enlarged * width, enlarged * height)).save(file, "JPEG", quality=90)
        files.append({"bytes": file.getvalue(), "path": None})
    datasets.disable_progress_bars()
    rows = {"image": files, "label": [i % 10 for i in range(len(files))]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(image=datasets.Image(), label=LABEL))


def teaching(trainer: IEKDTrainer, pixels: torch.Tensor) -> Callable[[], object]:
    """Return the forward pass of a trainer's teacher, to its factors, alone."""
    trainer.teacher.tap.attach()

    def forward():
        with trainer.accelerator.autocast():
            return trainer.teacher({"pixel_values": pixels})

    return forward


def steps(setting: Setting, rounds: int) -> dict:
    """Time fp32 steps."""
    bare = BareLoop(setting)
    pixels, _ = bare.batch()
    contenders = {
        BARE: bare,
        CONTROL: BareLoop(setting),
        "IEKDTrainer, fast_teacher=False": StepsOf(lambda: setting.iekd(fast_teacher=False)),
        "IEKDTrainer": StepsOf(setting.iekd),
        "IEKDTrainer, channels_last": StepsOf(lambda: setting.iekd(channels_last=True)),
        "IEKDTrainer, cached teacher": StepsOf(lambda: setting.iekd(cache_teacher=True)),
        "student alone, bare loop": BareLoop(setting, distil=False),
        "student alone, Trainer": StepsOf(setting.alone),
        "teacher and its encoder, forward": lambda: bare.target(pixels),
        "the same, fast copy": teaching(setting.iekd(), pixels),
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


def half_steps(setting: Setting, rounds: int, precision: str = "bf16") -> dict:
    """Time steps in half precision, bf16 or fp16, against the fp32 loop."""
    half, bare = {precision: True}, BareLoop(setting)
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    pixels, _ = bare.batch()
    contenders = {
        BARE: bare,
        CONTROL: BareLoop(setting),
        f"IEKDTrainer, {precision}": StepsOf(lambda: setting.iekd(**half)),
        f"IEKDTrainer, {precision}, channels_last": StepsOf(lambda: setting.iekd(**half, channels_last=True)),
        f"IEKDTrainer, {precision}, channels_last, teacher_dtype={dtype}": StepsOf(
            lambda: setting.iekd(**half, channels_last=True, teacher_dtype=dtype)
        ),
        f"IEKDTrainer, {precision}, channels_last, cached teacher": StepsOf(
            lambda: setting.iekd(**half, channels_last=True, cache_teacher=True)
        ),
        f"student alone, Trainer, {precision}, channels_last": StepsOf(
            lambda: setting.alone(**half, channels_last=True)
        ),
        f"teacher and its encoder, forward, {precision} fast copy": teaching(
            setting.iekd(**half, teacher_dtype=dtype), pixels
        ),
    }
    return compare(contenders, rounds)


fp16_steps = functools.partial(half_steps, precision="fp16")


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


def peers_steps(setting: Setting, rounds: int) -> dict:
    """Time factor transfer, the whole map inheriting, beside what others do, of those that can be imported."""
    bare, transfer = BareLoop(setting), {"inheritance_ratio": 1.0, "lambda_exp": 0.0}
    contenders = {
        BARE: bare,
        CONTROL: BareLoop(setting),
        "IEKDTrainer as factor transfer, fast_teacher=False": StepsOf(
            lambda: setting.iekd(**transfer, fast_teacher=False)
        ),
        "IEKDTrainer as factor transfer": StepsOf(lambda: setting.iekd(**transfer)),
        "student alone, Trainer": StepsOf(setting.alone),
    }
    steps = {}
    if isinstance(setting.teacher, CifarResNetForImageClassification):
        if find_spec("torchdistill") is not None:
            no_checkpoint = str(Path(setting.folder.name, "none"))
            given = (setting.teacher, copy.deepcopy(setting.student), SGD, DEVICE)
            steps["torchdistill, factor transfer"] = torchdistill_ft.factor_transfer(*given, no_checkpoint)
        if find_spec("distiller_zoo") is not None:
            steps["RepDistiller, factor transfer"] = repdistiller_ft.factor_transfer(SGD, DEVICE)
    elif find_spec("timm") is not None:
        steps["timm, feature distillation"] = timm_features.feature_distillation(SGD, DEVICE)
    for name, step in steps.items():
        contenders[name] = lambda step=step: step(*bare.batch())
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
    """Time the commands' ways from images to a batch of pixel values, in images a second."""
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    from iekd_hf.commands.images.data import DataArguments
    from iekd_hf.commands.images.transforms import prepare

    width, height = setting.rows[0]["image"].size
    side = min(height, 224)
    processor = ViTImageProcessorPil(size={"height": side, "width": side})
    splits = datasets.DatasetDict({"train": setting.rows, "validation": setting.rows})
    args = DataArguments(horizontal_flip=True)  # crops with padding up to 64 pixels, resized ones above
    args.sizes, args.decode_once = {(height, width)}, True
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
        result["images_per_second"] = 1000 * len(setting.rows) / result["milliseconds"]
    return results


def file_paths(rows: datasets.Dataset, rounds: int) -> dict:
    """Time the commands' ways from files of mixed sizes to batches on the device, beside their decoding alone."""
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    from iekd_hf.commands.images.data import DataArguments
    from iekd_hf.commands.images.transforms import prepare

    processor = ViTImageProcessorPil(size={"height": 224, "width": 224})
    args = DataArguments(horizontal_flip=True, decode_once=False)
    images, normalisation = prepare(datasets.DatasetDict(train=rows, validation=rows), processor, args, seed=0)

    def decoding():
        for example in rows:
            example["image"].convert("RGB")

    def examples(split):
        for batch in DataLoader(images[split], batch_size=32, shuffle=True, collate_fn=default_data_collator):
            normalisation(batch["pixel_values"].to(DEVICE))

    results = compare(
        {
            "decoding alone": decoding,
            CONTROL: decoding,
            "image by image, crop and flip": lambda: examples("train"),
            "image by image, as in evaluation": lambda: examples("validation"),
        },
        rounds,
    )
    for result in results.values():
        result["images_per_second"] = 1000 * len(rows) / result["milliseconds"]
    return results


SETTINGS = {"cifar": cifar_setting, "imagenet": imagenet_setting}


def memory(name: str) -> float:
    """Return what Linux says of this process's memory under a name, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def peak(which: str) -> dict:
    """Measure how much more memory than after the imports one case takes, in MiB, at most and in a step alone."""
    before = memory("VmRSS")
    place, case = which.split(":")
    setting = SETTINGS[place]()
    if case == "bare":
        step = BareLoop(setting)
    else:
        setting.kernel_size = 1 if case.endswith("1x1") else 3
        live, cached = setting.iekd_by_name, functools.partial(setting.iekd_by_name, cache_teacher=True)
        step = StepsOf({"alone": setting.alone, "live": live, "cached": cached}[case.removesuffix(" 1x1")])

    def highest():
        return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else memory("VmHWM") - before

    for _ in range(3):
        step()
    whole = highest()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets VmHWM
    for _ in range(5):
        step()
    return {"mebibytes": max(whole, highest()), "in_a_step": highest()}
