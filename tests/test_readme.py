"""
Every code block of the README runs. Names on the Hub stand for small local folders of that name, and torchvision,
which does not import beside every build of torch, for a module with a network in its style.
"""

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import make_resnet
from hub_server import HubServer
from transformers import ViTImageProcessorPil

from iekd_hf.commands.boxes.shapes import make_shapes
from iekd_hf.commands.boxes.tiny_detectors import tiny_detector, tiny_processor


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [line[2:] for kind, block in BLOCKS if kind == "console" for line in block.splitlines() if line[:2] == "$ "]


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
    assert (script.count("IEKDTrainer("), script.count("MutualTrainer(")) == (7, 1)
    assert script.count("from torchvision.models import resnet50\n") == script.count("torchvision.") == 1
    script = script.replace("from torchvision.models import", "from torchvision_stand_in import")
    (stand_ins / "torchvision_stand_in.py").write_text(
        "from test_foreign_teachers import TorchvisionResNet\n\n"
        "def resnet50(weights):\n    return TorchvisionResNet(num_classes=1000)\n"
    )
    with HubServer() as hub:
        environment = with_hub(hub, stand_ins) | {"PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests"]))}
        program = [sys.executable, "-c", script]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert {"model.safetensors", "README.md"} <= set(hub.repos["user/cached"]["files"])
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
    ],
)
def test_the_accelerate_line(stand_ins, script, row, folders):
    (command,) = [c for c in COMMANDS if c.startswith(f"accelerate launch examples/{script}.py")]
    with HubServer() as hub:
        environment = with_hub(hub, stand_ins)
        accelerate, *arguments = shlex.split(command)
        program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *arguments]
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, rows",
    [
        ("demo", ["teacher", "plain student", "distilled student"]),
        ("demo-mutual", [f"peer {i}{how}" for how in (" alone", ", DML", ", IE-DML") for i in (1, 2)]),
    ],
)
def test_make_demo(tmp_path, target, rows):
    """The demos themselves, in a copy of the tree that shares the virtual environment in which the tests run."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("runs in the virtual environment that the Makefile makes")
    ignore = shutil.ignore_patterns(".venv", ".git", "__pycache__", "demo*", "out")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignore)
    (tmp_path / "copy" / ".venv").symlink_to(ROOT / ".venv")
    assert f"make {target}" in COMMANDS
    # The stamps are as old as the installation; a copy has newer files, which are not to be installed again.
    done = subprocess.run(
        ["make", "-o", ".venv/examples", target],
        cwd=tmp_path / "copy",
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    accuracies = dict(re.findall(r"^(\S.*\S) +[\d,]+ +([\d.]+)% ", done.stdout, re.MULTILINE))
    assert list(accuracies) == rows and all(float(value) > 85 for value in accuracies.values()), done.stdout
    assert (tmp_path / "copy" / target / "report.png").is_file()


def test_make_demo_detection_is_the_script_as_it_is():
    """It takes some minutes; the script has tests of its own."""
    if not (ROOT / ".venv" / "bin").is_dir():
        pytest.skip("needs the virtual environment that the Makefile makes")
    make = ["make", "--no-print-directory", "-n", "-o", ".venv/examples", "demo-detection"]  # within `make test`, too
    lines = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1].endswith(" examples/run_iekd_detection.py --output_dir demo-detection")
    assert "make demo-detection" in COMMANDS


def test_every_command_is_one_of_those_run():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        with_tests = [
            f"benchmarks/{name}.py" for name in ("average_detection", "compare_methods", "mutual_step", "speed")
        ]
        with_tests += ["analyze_student.py", "export_onnx.py", "run_iekd_detection.py"]  # of their own
        known = {"make": targets, "python": [f"examples/{script}" for script in with_tests]}
        assert arguments[0] in known.get(program, []) or program in ("accelerate", "pip"), command
    # `make test` is what runs this file, and installs by the line that the README shows.
    assert "make test" in COMMANDS and "make test" in (ROOT / ".ci" / "run").read_text()
    (pip,) = [command for command in COMMANDS if command.startswith("pip")]
    assert '-e ".[examples]"' in pip and '-e ".[examples]"' in (ROOT / "Makefile").read_text()
    assert {kind for kind, _ in BLOCKS} <= {"console", "python", "bibtex"}


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
