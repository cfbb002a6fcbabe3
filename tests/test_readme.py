"""
Every code block of the README and of the documents runs. Names on the Hub stand for small local folders of that name,
and torchvision, which does not import beside every build of torch, for a module with a network in its style.
"""

import configparser
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_resnet
from hub_server import HubServer
from transformers import (
    Dinov2Config,
    Dinov2Model,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerImageProcessorPil,
    ViTImageProcessorPil,
)

from iekd_hf.commands.boxes.shapes import make_shapes
from iekd_hf.commands.boxes.tiny_detectors import tiny_detector, tiny_processor
from iekd_hf.commands.masks.shapes import CLASSES, make_masked_shapes


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# In the order in which people read them: code on a page goes on where the page before it ended.
PAGES = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
TEXT = "\n".join([README, *((ROOT / "docs" / page).read_text() for page in PAGES)])
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line[2:] for kind, block in BLOCKS if kind == "console" for line in block.splitlines() if line[:2] == "$ "]

# Transformers' run_image_classification.py as far as the README's diff goes: the same lines, in the same order.
CLASSIFICATION_SCRIPT = """
import numpy as np
import torch
from datasets import load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


def collate_fn(examples):
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    return {"pixel_values": pixel_values, "labels": torch.tensor([example["labels"] for example in examples])}


def main():
    (training_args,) = HfArgumentParser((TrainingArguments,)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    image_processor = AutoImageProcessor.from_pretrained("microsoft/resnet-18")
    dataset = load_dataset("uoft-cs/cifar10").rename_columns({"img": "image", "label": "labels"})
    labels = dataset["train"].features["labels"].names
    model = AutoModelForImageClassification.from_pretrained(
        "microsoft/resnet-18",
        num_labels=len(labels),
        label2id={label: str(i) for i, label in enumerate(labels)},
        id2label={str(i): label for i, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )

    def transform(rows):
        return {**image_processor(rows["image"], return_tensors="pt"), "labels": rows["labels"]}

    dataset.set_transform(transform)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"] if training_args.do_train else None,
        eval_dataset=dataset["test"] if training_args.do_eval else None,
        compute_metrics=lambda p: {"accuracy": float(np.mean(np.argmax(p.predictions, axis=1) == p.label_ids))},
        processing_class=image_processor,
        data_collator=collate_fn,
    )
    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=None)
        trainer.save_model()
        trainer.log_metrics("train", train_result.metrics)
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.create_model_card(
        finetuned_from="microsoft/resnet-18",
        tasks="image-classification",
        dataset="uoft-cs/cifar10",
        tags=["image-classification", "vision"],
    )


main()
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Make what the README takes from the Hub folders of the working directory."""
    import datasets

    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    for name, width in (("resnet-18", 8), ("resnet-50", 16)):
        make_resnet(width, num_labels=1000, seed=width).save_pretrained(tmp_path / "microsoft" / name)
        processor.save_pretrained(tmp_path / "microsoft" / name)
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        pixels = generator.integers(0, 255, (24, 32, 32, 3)).astype(np.uint8)
        features = datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
        )
        rows = {"img": [PIL.Image.fromarray(image) for image in pixels], "label": [i % 10 for i in range(24)]}
        folder = tmp_path / "uoft-cs" / "cifar10"
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    for name, width in (("rtdetr_r18vd", 4), ("rtdetr_r50vd", 8)):
        tiny_detector(f"tiny-rt-detr-{width}").save_pretrained(tmp_path / "PekingU" / name)
        tiny_processor(64, 64).save_pretrained(tmp_path / "PekingU" / name)
    for split in ("train", "test"):
        folder = tmp_path / "rishitdagli" / "cppe-5"
        folder.mkdir(parents=True, exist_ok=True)
        make_shapes(8, seed=0).to_parquet(folder / f"{split}.parquet")
    for width, name in ((8, "mit-b0"), (16, "mit-b3")):
        torch.manual_seed(width)
        stages = {"hidden_sizes": [8, 8, 8, width], "depths": [1] * 4, "num_attention_heads": [1] * 4}
        config = SegformerConfig(**stages, decoder_hidden_size=8, num_labels=7)
        SegformerForImageClassification(config).save_pretrained(tmp_path / "nvidia" / name)
        SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "nvidia" / name)
    folder = tmp_path / "segments" / "sidewalk-semantic"
    folder.mkdir(parents=True)
    make_masked_shapes(12, seed=0).rename_column("image", "pixel_values").to_parquet(folder / "train.parquet")
    (folder / "id2label.json").write_text(json.dumps(dict(enumerate(CLASSES))))
    torch.manual_seed(0)
    dinov2 = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=16, image_size=32)
    Dinov2Model(dinov2).save_pretrained(tmp_path / "facebook" / "dinov2-small")
    processor.save_pretrained(tmp_path / "facebook" / "dinov2-small")
    (tmp_path / "photographs").mkdir()
    for i in range(8):
        pixels = generator.integers(0, 255, (40 + i, 50 - i, 3)).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "photographs" / f"{i}.png")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_hub(hub: HubServer, home: Path) -> dict[str, str]:
    """Return an environment in which the Hub is the server."""
    return {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "hf_test",
        "HF_HOME": str(home / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }


@pytest.mark.slow
def test_python_blocks_in_order(stand_ins):
    script = "\n".join(block for kind, block in BLOCKS if kind == "python")
    assert (script.count("IEKDTrainer("), script.count("MutualTrainer(")) == (11, 1)
    assert script.count("from torchvision.models import ") == script.count("torchvision.") == 2
    script = script.replace("from torchvision.models import", "from torchvision_stand_in import")
    (stand_ins / "torchvision_stand_in.py").write_text(
        "from test_foreign_teachers import TorchvisionResNet\n\n"
        "def resnet50(weights):\n    return TorchvisionResNet(num_classes=1000)\n\n"
        "def get_model(name, num_classes):\n    return TorchvisionResNet(num_classes=num_classes)\n"
    )
    with HubServer() as hub:
        environment = with_hub(hub, stand_ins) | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))}
        program = [sys.executable, "-c", script]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert {"model.safetensors", "README.md"} <= set(hub.repos["user/recipe"]["files"])
        assert "last-checkpoint/optimizer.pt" in hub.repos["user/third"]["files"]
    assert "resnet.encoder.stages.1" in done.stdout  # list_layers
    assert (stand_ins / "out" / "model.safetensors").is_file()
    assert len(list((stand_ins / "cached" / "_teacher_cache").glob("*/factors_0.npy"))) == 1
    assert (stand_ins / "peers" / "peer_2" / "model.safetensors").is_file()
    assert (stand_ins / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, row, folders",
    [
        ("run_iekd", "distilled student", [""]),
        ("run_mutual", "peer 2, IE-DML", ["peer_1/", "peer_2/"]),
        ("run_iekd_detection", "distilled student", [""]),
        ("run_iekd_segmentation", "distilled student", [""]),
    ],
)
def test_the_accelerate_line(stand_ins, script, row, folders):
    """As it stands, but for fewer epochs."""
    epochs = ["--num_train_epochs", "2"] + ["--paraphraser_epochs", "2"] * (script != "run_mutual")
    (command,) = [c for c in COMMANDS if c.startswith(f"accelerate launch examples/{script}.py")]
    with HubServer() as hub:
        environment = with_hub(hub, stand_ins)
        accelerate, *arguments = shlex.split(command)
        program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *arguments, *epochs]
        assert accelerate == "accelerate"
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert re.search(rf"^{row} +[\d,]+ +\d", done.stdout, flags=re.MULTILINE), done.stdout
        (repository,) = hub.repos.values()
        saved = {
            f"{f}{file}" for f in folders for file in ("model.safetensors", "config.json", "preprocessor_config.json")
        }
        assert saved | {"README.md"} <= set(repository["files"])
        assert not [path for path in repository["files"] if path.startswith(("_", "checkpoint-"))]


def patched(script: str, diff: str) -> str:
    """Apply a diff; what a hunk takes away and leaves must stand together, once, in the script."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
        assert script.count(before) == 1, before
        script = script.replace(before, after)
    return script


@pytest.mark.slow
def test_the_diff_makes_a_script_distil(stand_ins):
    (diff,) = [block for kind, block in BLOCKS if kind == "diff"]
    assert [sum(line.startswith(sign) for line in diff.splitlines()) for sign in "+-"] == [2, 2]
    (stand_ins / "run.py").write_text(patched(CLASSIFICATION_SCRIPT, diff))
    arguments = "--output_dir out --do_train --do_eval --remove_unused_columns false --max_steps 2 --use_cpu"
    arguments += " --paraphraser_epochs 1 --logging_steps 1 --report_to none"
    program = [sys.executable, "run.py", *arguments.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (stand_ins / "out" / "_paraphraser").is_dir() and (stand_ins / "out" / "model.safetensors").is_file()
    assert "inheritance_loss" in (stand_ins / "out" / "trainer_state.json").read_text()


@pytest.mark.slow
def test_the_console_command(stand_ins):
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    scripts = config.get("options.entry_points", "console_scripts", fallback="")
    targets = dict(re.findall(r"^\s*([\w-]+)\s*=\s*(\S+)", scripts, flags=re.MULTILINE))
    if "iekd-hf" not in targets:
        pytest.skip("setup.cfg names no console command iekd-hf")
    (command,) = {c for c in COMMANDS if c.startswith("iekd-hf ")}
    module, function = targets["iekd-hf"].split(":")
    # As the installed command does, but from this tree.
    program = f"import sys; sys.argv[0] = 'iekd-hf'; from {module} import {function}; sys.exit({function}())"
    with HubServer() as hub:
        environment = with_hub(hub, stand_ins)
        arguments = [sys.executable, "-c", program, *shlex.split(command)[1:]]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^distilled student +[\d,]+ +\d", done.stdout, flags=re.MULTILINE), done.stdout
    assert (stand_ins / "out" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, rows, shorter, least",
    [
        ("demo", ["teacher", "plain student", "distilled student"], "", 80),
        (
            "demo-mutual",
            [f"peer {i}{how}" for how in (" alone", ", DML", ", IE-DML with KL") for i in (1, 2)],
            " --num_train_epochs 2",
            1,
        ),
    ],
)
def test_make_demo(tmp_path, target, rows, shorter, least):
    """The demos themselves, in a copy of the tree that shares the virtual environment in which the tests run."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("runs in the virtual environment that the Makefile makes")
    ignore = shutil.ignore_patterns(".venv", ".git", "__pycache__", "demo*", "out")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignore)
    (tmp_path / "copy" / ".venv").symlink_to(ROOT / ".venv")
    assert f"make {target}" in COMMANDS
    # The stamps are as old as the installation; a copy has newer files, which are not to be installed again.
    make = ["make", "--no-print-directory", "-o", ".venv/examples", target]
    where = {"cwd": tmp_path / "copy", "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}, "text": True}
    if shorter:
        lines = subprocess.run([*make, "-n"], capture_output=True, check=True, **where).stdout.strip()
        make = ["sh", "-c", lines + shorter]
    done = subprocess.run(make, capture_output=True, check=False, **where)
    assert done.returncode == 0, done.stderr[-3000:]
    accuracies = dict(re.findall(r"^(\S.*\S) +[\d,]+ +([\d.]+)% ", done.stdout, re.MULTILINE))
    assert list(accuracies) == rows and all(float(value) > least for value in accuracies.values()), done.stdout
    assert (tmp_path / "copy" / target / "report.png").is_file()


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_other_demos_are_the_scripts_as_they_are(task):
    """They take some minutes; the scripts have tests of their own."""
    if not (ROOT / ".venv" / "bin").is_dir():
        pytest.skip("needs the virtual environment that the Makefile makes")
    make = ["make", "--no-print-directory", "-n", "-o", ".venv/examples", f"demo-{task}"]  # within `make test`, too
    lines = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1].endswith(f" examples/run_iekd_{task}.py --output_dir demo-{task}")
    assert f"make demo-{task}" in COMMANDS


SCRIPTS = sorted({shlex.split(command)[1] for command in COMMANDS if command.startswith("python ")})


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_know_the_arguments_of_the_pages(script, monkeypatch, capsys):
    """Other tests run these scripts with data and sizes of their own."""
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    known = capsys.readouterr().out
    for command in COMMANDS:
        if command.startswith(f"python {script} "):
            for argument in re.findall(r" (--[\w-]+)", command):
                assert re.search(rf"(^|[\s,\[]){re.escape(argument)}\b", known), f"{script} does not know {argument}"


def test_every_command_is_one_of_those_run():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        benchmarks = (
            "average_accuracy",
            "average_detection",
            "compare_methods",
            "flowers",
            "mutual_step",
            "speed",
            "streams",
        )
        with_tests = [f"benchmarks/{name}.py" for name in benchmarks]  # of their own
        with_tests += ["analyze_student.py", "export_onnx.py"]
        with_tests += [f"run_{name}.py" for name in ("iekd", "iekd_detection", "iekd_segmentation", "mutual")]
        known = {"make": targets, "python": [f"examples/{script}" for script in with_tests]}
        assert arguments[0] in known.get(program, []) or program in ("accelerate", "pip", "iekd-hf"), command
    # `make test` is what runs this file, and installs by the line that the README shows.
    assert "make test" in COMMANDS and "make test" in (ROOT / ".ci" / "run").read_text()
    (pip,) = [command for command in COMMANDS if command.startswith("pip")]
    assert '-e ".[cli]"' in pip and '-e ".[cli]"' in (ROOT / "Makefile").read_text()
    assert {kind for kind, _ in BLOCKS} <= {"console", "python", "diff", "bibtex"}
    assert [kind for kind, _ in BLOCKS].count("diff") == 1
    # Each page is in the order above, and no block is written in a way that this file does not see.
    assert {*PAGES} == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert len(re.findall(r"^\s*(?:```|~~~)", TEXT, flags=re.MULTILINE)) == 2 * len(BLOCKS)


def test_badges_say_what_setup_cfg_says():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = dict(line.split(">=") for line in config["options"]["install_requires"].split() if ">=" in line)
    required["python"] = config["options"]["python_requires"].removeprefix(">=")
    badges = dict(re.findall(r"img\.shields\.io/badge/(\w+)-(\S+)-blue", README))
    assert badges.pop("licence").replace("--", "-") == config["metadata"]["license"]
    assert set(badges) == {"python", "torch", "transformers"}
    assert {name: value.removesuffix("%2B") for name, value in badges.items()} == {
        name: required[name] for name in badges
    }
