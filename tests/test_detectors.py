"""Detectors as students and as teachers: where their maps are, padding, what is refused, and what is saved."""

import copy

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as t
from conftest import same
from transformers import AutoModelForObjectDetection


LEVELS = {"out_features": ["stage2", "stage3", "stage4"]}
LAST = {"out_features": ["stage4"]}
ATTENTION = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
DETR = {**ATTENTION, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
DETR |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
DEFORMABLE = {
    **DETR,
    "d_model": 64,
    "decoder_layers": 2,
    "num_feature_levels": 4,
    "encoder_n_points": 2,
    "decoder_n_points": 2,
}
DAB = {name: value for name, value in DETR.items() if name != "d_model"} | {"hidden_size": 16}


def stages(width: int) -> dict:
    return {"embedding_size": 8, "hidden_sizes": [8, 8, 8, width], "depths": [1, 1, 1, 1]}


def resnet(width: int, levels: dict) -> t.ResNetConfig:
    return t.ResNetConfig(layer_type="basic", **stages(width), **levels)


def rt_detr_resnet(width: int) -> t.RTDetrResNetConfig:
    return t.RTDetrResNetConfig(layer_type="basic", **stages(width), **LEVELS)


def hgnet(width: int) -> t.HGNetV2Config:
    return t.HGNetV2Config(
        **stages(width),
        **LEVELS,
        initializer_range=0.5,  # the default is for pretrained weights: behind frozen norms it gives zeros
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 8, 8],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 8, 8, width],
        stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False] * 4,
        stage_kernel_size=[3] * 4,
        stage_numb_of_layers=[1] * 4,
    )


def pyramid(width: int) -> dict:
    return {
        **ATTENTION,
        "d_model": 16,
        "num_queries": 5,
        "num_denoising": 2,
        "encoder_in_channels": [8, 8, width],
        "encoder_hidden_dim": 16,
        "encoder_ffn_dim": 16,
        "decoder_in_channels": [16, 16, 16],
        "decoder_ffn_dim": 16,
        "decoder_layers": 2,
        "decoder_n_points": 2,
    }


def yolos(width: int) -> dict:
    return {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": [64, 64],
        "patch_size": 8,
        "num_detection_tokens": 5,
    }


# name: (family, its configuration by the width of the last map, family of the image processor)
FAMILIES = {
    "DETR": ("Detr", lambda w: {"backbone_config": resnet(w, LAST), **DETR}, "Detr"),
    "Conditional DETR": (
        "ConditionalDetr",
        lambda w: {"backbone_config": resnet(w, LAST), **DETR},
        "ConditionalDetr",
    ),
    "DAB-DETR": ("DabDetr", lambda w: {"backbone_config": resnet(w, LAST), **DAB}, "ConditionalDetr"),
    "Deformable DETR": (
        "DeformableDetr",
        lambda w: {"backbone_config": resnet(w, LEVELS), **DEFORMABLE},
        "DeformableDetr",
    ),
    "Table Transformer": ("TableTransformer", lambda w: {"backbone_config": resnet(w, LAST), **DETR}, "Detr"),
    "RT-DETR": ("RTDetr", lambda w: {"backbone_config": rt_detr_resnet(w), **pyramid(w)}, "RTDetr"),
    "RT-DETRv2": ("RTDetrV2", lambda w: {"backbone_config": rt_detr_resnet(w), **pyramid(w)}, "RTDetr"),
    "D-FINE": ("DFine", lambda w: {"backbone_config": hgnet(w), **pyramid(w)}, "RTDetr"),
    "DEIMv2": ("Deimv2", lambda w: {"backbone_config": hgnet(w), **pyramid(w)}, "RTDetr"),
    "YOLOS": ("Yolos", yolos, "Yolos"),
}
PYRAMIDS = ("RT-DETR", "RT-DETRv2", "D-FINE", "DEIMv2")
NAMES = ["ant", "bee", "cat"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}


def build(name: str, width: int = 8, seed: int = 1):
    family, configure, _ = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(t, f"{family}Config")(**configure(width), **LABELS)
    # Transformers builds some backbones frozen; they have to learn.
    return getattr(t, f"{family}ForObjectDetection")(config).requires_grad_(True)


def processor_of(name: str):
    family = FAMILIES[name][2]
    size = {"height": 64, "width": 64} if family == "RTDetr" else {"shortest_edge": 48, "longest_edge": 64}
    return getattr(t, f"{family}ImageProcessorPil")(size=size)


SIZES = [(48, 64), (64, 48), (48, 48), (40, 64)]


def pictures(count: int = 8) -> list[dict]:
    """Make images of several sizes with boxes in COCO's format; the last one has none."""
    generator, rows = np.random.default_rng(0), []
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        boxes = [[4, 6, 20, 16], [18, 10, 22, 24]] if i < count - 1 else []
        objects = [
            {"bbox": box, "category_id": (i + k) % 3, "area": box[2] * box[3], "iscrowd": 0}
            for k, box in enumerate(boxes)
        ]
        image = PIL.Image.fromarray(generator.integers(0, 255, (height, width, 3)).astype(np.uint8))
        rows.append({"image": image, "annotations": {"image_id": i, "annotations": objects}})
    return rows


class Collate:
    """Process and, where the processor does so, pad a batch."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows):
        images, annotations = ([row[key] for row in rows] for key in ("image", "annotations"))
        batch = self.processor(images=images, annotations=annotations, return_tensors="pt")
        return {**batch, "labels": [dict(label) for label in batch["labels"]]}


@pytest.fixture
def make_detection(make_trainer):
    """Build a trainer on pictures with boxes, made ready as the student wants them."""

    def make(student, teacher, processor, **kwargs):
        kwargs = {
            "train_dataset": pictures(),
            "data_collator": Collate(processor),
            "processing_class": processor,
            "remove_unused_columns": False,
            "learning_rate": 1e-3,
            **kwargs,
        }
        return make_trainer(student, teacher, **kwargs)

    return make


# ---- Families ----


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_two_steps_with_no_layer_named(make_detection, tmp_path, name, role):
    """Against a DETR, or an RT-DETR for a DETR: families and inputs differ, pyramids end where the other side does."""
    other = "RT-DETR" if name == "DETR" else "DETR"
    student, teacher = (build(name), build(other, 16)) if role == "student" else (build(other), build(name, 16))
    before, of_student = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    trainer = make_detection(
        student,
        teacher,
        processor_of(name if role == "student" else other),
        teacher_processor=processor_of(other if role == "student" else name),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for component in ("task_loss", "inheritance_loss", "exploration_loss"):
        assert all(torch.tensor(entry[component]).isfinite() for entry in logs)
    assert logs[0]["inheritance_loss"] > 0
    assert same(teacher.state_dict(), before)
    moved = [not torch.equal(value, of_student[key]) for key, value in student.named_parameters()]
    assert sum(moved) > 0.5 * len(moved)
    trainer.save_model()
    loaded, info = AutoModelForObjectDetection.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is type(student) and not any(info.values())
    assert same(loaded.state_dict(), student.state_dict())
