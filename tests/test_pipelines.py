"""What was saved works where others use models: pipelines, and the evaluator with metrics that need no network."""

import datasets
import evaluate
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_resnet, make_vit
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    ResNetConfig,
    ViTImageProcessorPil,
    pipeline,
)

from iekd_hf import CifarResNetConfig, CifarResNetForImageClassification
from iekd_hf.commands.images.metrics import MacroF1, TopKAccuracy


NAMES = ["ant", "bee", "cat"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
STUDENTS = {
    "ResNet": lambda: make_resnet(8, seed=1, **LABELS),
    "ViT": lambda: make_vit(seed=1, **LABELS),
    "CIFAR ResNet": lambda: CifarResNetForImageClassification(CifarResNetConfig.from_depth(8, **LABELS)),
}


def pictures(count: int, size: tuple[int, int] = (40, 30)) -> list[PIL.Image.Image]:
    generator = np.random.default_rng(0)
    return [PIL.Image.fromarray(generator.integers(0, 255, (*size, 3)).astype(np.uint8)) for _ in range(count)]


@pytest.fixture(params=STUDENTS)
def saved(request, make_trainer, tmp_path):
    """Distil a student, save it, and return its folder."""
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    trainer = make_trainer(STUDENTS[request.param](), processing_class=processor)
    trainer.train()
    trainer.save_model()
    return tmp_path / "out"


def logits_of(folder, images) -> np.ndarray:
    student = AutoModelForImageClassification.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")
    with torch.no_grad():
        return student(**pixels).logits.numpy()


def test_image_classification(saved):
    images = pictures(4)
    classify = pipeline("image-classification", model=str(saved))
    expected = torch.from_numpy(logits_of(saved, images)).softmax(dim=1)
    for scores, row in zip(classify(images, top_k=3), expected, strict=True):
        assert [score["label"] for score in scores] == [NAMES[i] for i in row.argsort(descending=True)]
        assert [score["score"] for score in scores] == pytest.approx(row.sort(descending=True).values.tolist(), 1e-4)


def test_evaluator(saved):
    """The evaluator gives class indices, by the label mapping, where Trainer gives logits."""
    images = pictures(12)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    data = datasets.Dataset.from_dict({"image": images, "label": [i % 3 for i in range(12)]}, features=features)
    metric = evaluate.combine([TopKAccuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)])
    result = evaluate.evaluator("image-classification").compute(
        model_or_pipeline=str(saved), data=data, metric=metric, label_mapping=LABELS["label2id"]
    )
    logits = logits_of(saved, images)
    from_logits = metric.compute(predictions=logits, references=data["label"])
    assert {name: result[name] for name in from_logits} == from_logits
    classes = logits.argmax(axis=1)
    assert result["accuracy"] == accuracy_score(data["label"], classes)
    assert result["macro_f1"] == f1_score(data["label"], classes, average="macro", zero_division=0)
    assert result["latency_in_seconds"] > 0


def test_metrics_take_batches_and_class_names_in_either_form():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(30, 8)), generator.integers(0, 8, 30)
    metric = evaluate.combine([TopKAccuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)])
    names = [f"c{i}" for i in range(8)]
    whole = metric.compute(predictions=logits, references=labels, class_names=names)
    parts = [TopKAccuracy(keep_in_memory=True), MacroF1(keep_in_memory=True)]
    for part in parts:
        for start in (0, 10, 20):
            part.add_batch(predictions=logits[start : start + 10], references=labels[start : start + 10])
    assert parts[0].compute(class_names=names) | parts[1].compute() == whole
    # Indices know no second best; the same object takes them after logits.
    indices = metric.compute(predictions=logits.argmax(axis=1), references=labels, class_names=names)
    assert whole.pop("top5_accuracy") > whole["accuracy"]
    assert indices == whole


def test_a_metric_is_loaded_by_its_path():
    """As `evaluate.load("accuracy")` is, but for its code, which does not come from the Hub."""
    from iekd_hf.commands.images.metrics import __file__ as path

    metric = evaluate.load(path, keep_in_memory=True)
    assert metric.compute(predictions=[0, 1, 1], references=[0, 1, 0]) == {"accuracy": pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="Predictions and/or references don't match"):
        metric.compute(predictions=["cat", "bee"], references=[0, 1])  # an evaluator without its label_mapping


def make_detr(width: int, seed: int) -> DetrForObjectDetection:
    torch.manual_seed(seed)
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, width],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = DetrConfig(backbone_config=backbone, d_model=16, num_queries=5, num_labels=3, **sizes, **LABELS)
    # The backbone is frozen as it is built; it has to learn.
    return DetrForObjectDetection(config).requires_grad_(True)


def test_object_detection(make_trainer, tmp_path):
    """A detector whose backbone inherits, without a layer named."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "pixel_values": torch.randn(3, 64, 64, generator=generator),
            "labels": {
                "class_labels": torch.tensor([i % 3, 1]),
                "boxes": torch.rand(2, 4, generator=generator) / 2 + 0.1,
            },
        }
        for i in range(8)
    ]

    def collate(rows):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": [row["labels"] for row in rows],
        }

    trainer = make_trainer(
        make_detr(16, seed=1),
        make_detr(32, seed=2),
        train_dataset=rows,
        data_collator=collate,
        processing_class=DetrImageProcessorPil(size={"height": 64, "width": 64}),
        remove_unused_columns=False,
    )
    before = trainer.student.model.backbone.model.encoder.stages[0].layers[0].layer[0].convolution.weight.clone()
    trainer.train()
    assert trainer.state.log_history[-2]["inheritance_loss"] > 0
    assert not torch.equal(
        trainer.student.model.backbone.model.encoder.stages[0].layers[0].layer[0].convolution.weight, before
    )
    trainer.save_model()
    detect = pipeline("object-detection", model=str(tmp_path / "out"), threshold=0.0)
    same, info = DetrForObjectDetection.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and all(
        torch.equal(value, detect.model.state_dict()[name]) for name, value in same.state_dict().items()
    )
    (picture,) = pictures(1)
    found = detect(picture)
    assert len(found) == 5 and {box["label"] for box in found} <= set(NAMES)
    assert all({"xmin", "ymin", "xmax", "ymax"} == set(box["box"]) for box in found)
