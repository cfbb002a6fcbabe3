"""Tiny models from configurations and data that the tests make: offline and fast."""

import functools
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


# Before anything imports them: tests never reach out, draw no window, and leave the other cores to the other workers
# (processes that they start have this environment too).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import pytest
import torch
from hub_server import HubServer
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from iekd_hf import IEKDTrainer, IEKDTrainingArguments, MutualTrainer, MutualTrainingArguments
from iekd_hf.commands import run
from iekd_hf.commands.boxes import data as boxes
from iekd_hf.commands.boxes.shapes import make_shapes
from iekd_hf.commands.masks import data as masks
from iekd_hf.commands.masks.shapes import make_masked_shapes
from iekd_hf.commands.report.latency import median_milliseconds


@pytest.fixture(autouse=True, scope="module")
def frozen_imports() -> None:
    """Take what is imported out of the garbage collection, which each training runs: half of the tests' time."""
    gc.collect()
    gc.freeze()


def make_resnet(width: int = 8, num_labels: int = 3, seed: int = 0, **kwargs) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, width],
            depths=[1, 1],
            layer_type="basic",
            num_labels=num_labels,
            **kwargs,
        )
    )


def make_vit(hidden_size: int = 16, num_labels: int = 3, seed: int = 0, image_size: int = 32, **kwargs):
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            patch_size=8,
            image_size=image_size,
            num_labels=num_labels,
            **kwargs,
        )
    )


def make_dinov2(seed: int = 0) -> Dinov2ForImageClassification:
    """Make a model with a parameter that no gradient reaches: the token that stands for masked patches."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32, num_labels=3
    )
    return Dinov2ForImageClassification(config)


def make_images(count: int = 16, num_labels: int = 3, size: tuple[int, int] = (32, 32), seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, *size, generator=generator)
    return [{"pixel_values": image, "labels": i % num_labels} for i, image in enumerate(pixels)]


OF_TRAINER = (
    "train_dataset",
    "eval_dataset",
    "paraphraser",
    "callbacks",
    "compute_metrics",
    "compute_loss_func",
    "data_collator",
    "model_init",
    "optimizers",
    "optimizer_cls_and_kwargs",
    "processing_class",
    "teacher_processor",
    "model_init_kwargs",
    "teacher_model_init_kwargs",
    "augmentation",
    "mixing",
)


def arguments(tmp_path, args_class, **kwargs) -> dict:
    """Split keywords into those of the trainer and those of its arguments, with what tiny runs want."""
    of_trainer = {name: kwargs.pop(name) for name in OF_TRAINER if name in kwargs}
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    of_trainer.setdefault("train_dataset", make_images())
    return {"args": args_class(**(defaults | kwargs)), **of_trainer}


@pytest.fixture
def make_trainer(tmp_path):
    """Build a trainer on tiny models; keyword arguments of the trainer by name, all others are training arguments."""

    def make(model=None, teacher_model=None, trainer_class=IEKDTrainer, **kwargs):
        keywords = arguments(tmp_path, IEKDTrainingArguments, **({"paraphraser_epochs": 1} | kwargs))
        if model is None and "model_init" not in keywords:
            model = make_resnet(8, seed=1)
        teacher_model = make_resnet(16, seed=2) if teacher_model is None else teacher_model
        return trainer_class(model=model, teacher_model=teacher_model, **keywords)

    return make


@pytest.fixture
def make_mutual(tmp_path):
    """Build a trainer of tiny peers, a ResNet and a ViT unless others are given; keyword arguments as above."""

    def make(models=None, trainer_class=MutualTrainer, **kwargs):
        models = [make_resnet(8, seed=1), make_vit(seed=2)] if models is None else models
        keywords = arguments(tmp_path, MutualTrainingArguments, **({"lambda_inh": 20.0, "lambda_exp": 5.0} | kwargs))
        return trainer_class(models=models, **keywords)

    return make


DRAWN_BOXES, DRAWN_MASKS = functools.cache(make_shapes), functools.cache(make_masked_shapes)


@pytest.fixture
def run_example(monkeypatch, capsys):
    """Call an example's `main` with a command line, and return what it prints; what it says beside is its `said`."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which a command changes when it fails
        # Latencies are measured for a moment, not for a second a network; shapes are drawn once.
        monkeypatch.setattr(run, "median_milliseconds", functools.partial(median_milliseconds, seconds=0.02))
        monkeypatch.setattr(boxes, "make_shapes", DRAWN_BOXES)
        monkeypatch.setattr(masks, "make_masked_shapes", DRAWN_MASKS)
        module.main()
        written = capsys.readouterr()
        call.said = written.err
        return written.out

    return call


def break_off(folder: Path) -> None:
    """Leave of a run what was finished beside it, as if it had ended before its own first checkpoint."""
    for path in (folder / "_paraphraser", folder / "_stage_1", *folder.glob("checkpoint-*")):
        shutil.rmtree(path, ignore_errors=True)


def same(first: dict, second: dict) -> bool:
    """Tell whether two state dicts are equal to the last bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- Clients of the Hub, which are processes of their own: HF_ENDPOINT is read when huggingface_hub is imported ----

ROOT = Path(__file__).parent.parent
TOKEN = "hf_test"

# Prepended where the library must not be there, even if the tests' environment has it installed.
WITHOUT_IEKD_HF = """
import sys
sys.modules["iekd_hf"] = None
try:
    import iekd_hf
    raise SystemExit("iekd_hf can be imported")
except ImportError:
    pass
"""

# What a model says about a fixed image: equal lists of numbers are equal models.
LOGITS = """
import json, torch
def logits(model):
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval().cpu()(pixel_values=pixel_values).logits.tolist()
"""

Client = Callable[..., dict]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(TOKEN) as server:
        yield server


@pytest.fixture
def client(tmp_path: Path) -> Client:
    """Return a function that runs a script in a new process and returns the JSON object of its last line of output."""

    def run(script: str, endpoint: str, *arguments: str, with_library: bool = True) -> dict:
        dropped = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "PYTHONPATH")
        env = {k: v for k, v in os.environ.items() if not k.startswith(dropped) and not k.lower().endswith("_proxy")}
        env |= {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        # Xet has a protocol and a server of its own; without it files go through LFS. One process, not DataParallel.
        env |= {"HF_HUB_DISABLE_XET": "1", "CUDA_VISIBLE_DEVICES": ""}
        if with_library:
            env["PYTHONPATH"] = str(ROOT)
        else:
            script = WITHOUT_IEKD_HF + script
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        command = [sys.executable, "-c", script, *arguments]
        options = {"env": env, "cwd": elsewhere, "stdin": subprocess.DEVNULL, "timeout": 900}
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
