"""The exported student says in onnxruntime what it says in torch, at every batch size."""

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import make_resnet, make_vit
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTImageProcessorPil,
)

from iekd_hf import CifarResNetConfig, CifarResNetForImageClassification
from iekd_hf.commands import export as export_onnx


LABELS = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}


def convnext():
    torch.manual_seed(1)
    config = ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], initializer_range=0.3, **LABELS)
    return ConvNextForImageClassification(config)


STUDENTS = {
    "ResNet": lambda: make_resnet(8, seed=1, **LABELS),
    "ViT": lambda: make_vit(seed=1, initializer_range=0.3, **LABELS),
    "CIFAR ResNet": lambda: CifarResNetForImageClassification(CifarResNetConfig.from_depth(8, **LABELS)),
    "ConvNeXt": convnext,
}

# setup.cfg states the same bound for the extra "onnx".
needs_newer_torch = pytest.mark.skipif(
    torch.__version__ < "2.13",
    reason="torch 2.7 exports a ViT with a fixed batch size only; exports are tested with torch 2.13 and later",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_newer_torch) if name == "ViT" else name for name in STUDENTS]
)
def test_onnxruntime_gives_the_distilled_students_logits(make_trainer, run_example, tmp_path, name):
    size = {"height": 48, "width": 32} if name != "ViT" else {"height": 32, "width": 32}
    trainer = make_trainer(STUDENTS[name](), max_steps=4, processing_class=ViTImageProcessorPil(size=size))
    trainer.train()
    trainer.save_model()
    file = tmp_path / "student.onnx"
    printed = run_example(export_onnx, "--model", tmp_path / "out", "--output", file)
    assert [path.name for path in tmp_path.glob("student*")] == ["student.onnx"]  # one file, with its weights

    shape = f"(batch_size, 3, {size['height']}, {size['width']})"
    assert f"pixel_values {shape} -> logits" in printed
    assert float(re.search(r"largest difference of two logits: (\S+)", printed)[1]) < 1e-4
    assert re.search(r"CPU, 1 thread, median: torch \d+\.\d\d ms, onnxruntime \d+\.\d\d ms", printed)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    student = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    for batch_size in (1, 2, 5):
        pixels = torch.randn(batch_size, 3, size["height"], size["width"])
        with torch.no_grad():
            expected = student(pixels).logits.numpy()
        (got,) = session.run(None, {"pixel_values": pixels.numpy()})
        assert np.ptp(expected) > 0.01  # the logits say something
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(metadata["id2label"]) == {"0": "ant", "1": "bee", "2": "cat"}


def test_a_wrong_export_is_not_left_behind(run_example, tmp_path, monkeypatch):
    make_resnet(8).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    export = export_onnx.export
    monkeypatch.setattr(export_onnx, "export", lambda model, *rest: export(make_resnet(8, seed=5).eval(), *rest))
    with pytest.raises(ValueError, match="to give the model's logits"):
        run_example(export_onnx, "--model", tmp_path / "model", "--output", tmp_path / "student.onnx")
    assert not list(tmp_path.glob("student*"))


def test_a_model_that_cannot_be_had(run_example, tmp_path):
    with pytest.raises(ValueError, match=r"--model to be a folder or a Hub name .*'nobody/nothing'"):
        run_example(export_onnx, "--model", "nobody/nothing", "--output", tmp_path / "student.onnx")


def test_an_adapter_is_to_be_merged_first(run_example, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_vit(), peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"a whole model in --model=.*, got an adapter of PEFT: .*merge_and_unload"):
        run_example(export_onnx, "--model", tmp_path / "adapter", "--output", tmp_path / "student.onnx")


def test_an_architecture_that_torch_does_not_export(run_example, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise torch.onnx.OnnxExporterError("a page of text\nand another")

    make_resnet(8).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ValueError, match=r"that torch .* exports to ONNX, got ResNetForImageClassification, which it"):
        run_example(export_onnx, "--model", tmp_path / "model", "--output", tmp_path / "student.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def segmenter():
    sizes = {"num_encoder_blocks": 1, "depths": [1], "hidden_sizes": [8], "num_attention_heads": [1], "sr_ratios": [1]}
    strides = {"patch_sizes": [7], "strides": [4], "mlp_ratios": [2], "decoder_hidden_size": 8}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, **strides))


NO_CLASSIFIERS = {
    "backbone": (lambda: make_resnet(8).resnet, "a classifier in --model=.*got ResNetModel, .* no logits"),
    "segmenter": (
        segmenter,
        r"Expected a classifier in --model=.*SegformerForSemanticSegmentation, .* \(1, 2, 8, 8\)",
    ),
}


@pytest.mark.parametrize("name", NO_CLASSIFIERS)
def test_a_classifier_is_never_made_up(run_example, tmp_path, name):
    make, message = NO_CLASSIFIERS[name]
    make().save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        run_example(export_onnx, "--model", tmp_path / "model", "--output", tmp_path / "student.onnx")
    assert not list(tmp_path.glob("student*"))


def test_a_head_that_is_not_in_the_file(run_example, tmp_path):
    """The configuration says that it is a classifier, but the file has the weights of its body alone."""
    model = make_resnet(8)
    model.resnet.save_pretrained(tmp_path / "model")
    model.config.architectures = ["ResNetForImageClassification"]
    model.config.save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"every weight of ResNetForImageClassification in --model=.*2 missing"):
        run_example(export_onnx, "--model", tmp_path / "model", "--output", tmp_path / "student.onnx")
    assert not list(tmp_path.glob("student*"))
