"""Segmenters and depth estimators, each as student and as teacher, with no layer named; and what is refused."""

import pytest
import torch
import transformers as t
from conftest import make_resnet


VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
FOUR = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
BEIT = {**VIT, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "auxiliary_channels": 8}
DPT = {**VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16]}
DPT |= {"fusion_hidden_size": 8}
MOBILEVIT = {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32], "num_attention_heads": 2}
# Their own initializer_range is for pretrained weights: with 0.02 hardly anything gets through.
DEEPLAB = {"image_size": 64, "aspp_out_channels": 16, "atrous_rates": [1, 2, 3], "initializer_range": 0.2}


def resnet(width: int = 16) -> t.ResNetConfig:
    stages = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, width], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return t.ResNetConfig(**stages, out_features=["stage1", "stage2", "stage3", "stage4"])


UPERNET = {"hidden_size": 16, "pool_scales": [1, 2], "auxiliary_in_channels": 8, "auxiliary_channels": 8}

# name: (family, configuration, image size)
FAMILIES = {
    "BEiT": ("Beit", BEIT, 32),
    "Data2Vec Vision": ("Data2VecVision", {**BEIT, "out_indices": [0, 1, 2, 3]}, 32),
    "DPT": ("DPT", DPT, 32),
    "MobileNet V2": ("MobileNetV2", {"depth_multiplier": 0.25, "initializer_range": 0.2}, 64),
    "MobileViT": ("MobileViT", {**MOBILEVIT, **DEEPLAB}, 64),
    "MobileViT V2": (
        "MobileViTV2",
        {"width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1], "base_attn_unit_dims": [16, 16, 16], **DEEPLAB},
        64,
    ),
    "SegFormer": ("Segformer", {**FOUR, "decoder_hidden_size": 16}, 64),
    "UperNet": ("UperNet", {"backbone_config": resnet(), **UPERNET}, 64),
}


def build(name: str, num_labels: int = 3, seed: int = 0) -> tuple[t.PreTrainedModel, int]:
    family, kwargs, size = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(t, f"{family}Config")(num_labels=num_labels, **kwargs)
    return getattr(t, f"{family}ForSemanticSegmentation")(config), size


def make_masked(count: int = 8, size: int = 64, num_labels: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(0, num_labels, (count, size, size), generator=generator)
    labels[:, :5] = 255
    return [{"pixel_values": image, "labels": mask} for image, mask in zip(pixels, labels, strict=True)]


@pytest.fixture
def segment(make_trainer):
    """Take two steps, and return what was logged and how many of the student's parameters have moved."""

    def run(student, teacher, size=64, train_dataset=None, **kwargs):
        before = {name: value.clone() for name, value in student.named_parameters()}
        rows = make_masked(size=size) if train_dataset is None else train_dataset
        trainer = make_trainer(student, teacher, train_dataset=rows, per_device_train_batch_size=4, **kwargs)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logs) == 2
        components = [name for name in logs[0] if name.endswith("_loss")]
        assert all(torch.tensor(entry[name]).isfinite() for entry in logs for name in components)
        moved = [not torch.equal(value, before[name]) for name, value in student.named_parameters()]
        return logs, sum(moved) / len(moved)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_two_steps_with_no_layer_named(segment, name, role):
    """Logits, too, whose sizes differ from family to family."""
    model, size = build(name)
    other, _ = build("UperNet" if name == "SegFormer" else "SegFormer", seed=1)
    student, teacher = (model, other) if role == "student" else (other, model)
    logs, moved = segment(student, teacher, size, method="ie-ft+kd")
    assert all(entry[name] > 0 for entry in logs for name in ("task_loss", "inheritance_loss", "kd_loss"))
    assert moved > 0.7


@pytest.mark.parametrize("teacher", ["classifier", "headless"])
def test_other_models_teach_a_segmenter(segment, teacher):
    config = t.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=64, num_labels=3
    )
    model = make_resnet(16, num_labels=5) if teacher == "classifier" else t.Dinov2Model(config)
    student, _ = build("SegFormer")
    logs, moved = segment(student, model)
    assert moved > 0.7 and all(entry["exploration_loss"] < 0 for entry in logs)
