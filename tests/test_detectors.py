"""Detectors as students and as teachers: where their maps are, what is refused, and what is saved."""

import copy

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as t
from conftest import make_resnet, same
from torch import nn
from transformers import AutoModelForObjectDetection
from transformers.backbone_utils import BackboneMixin

from iekd_hf import list_layers
from iekd_hf.features import FeatureTap, default_layers, pair_layers


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


GROUPS = {"d_model": 16, "num_queries": 5, "decoder_layers": 2, "decoder_ffn_dim": 16, "decoder_n_points": 2}
GROUPS |= {"decoder_self_attention_heads": 2, "decoder_cross_attention_heads": 2, "group_detr": 2}
LW = {**GROUPS, "projector_scale_factors": [1.0]}


def windows(family: str, width: int):
    of_family = {"LwDetrViT": {"pretrain_image_size": 64, "num_windows": 4}, "RfDetrDinov2": {"num_windows": 2}}
    module = {"LwDetrViT": t.models.lw_detr, "RfDetrDinov2": t.models.rf_detr}[family]
    return getattr(module, f"{family}Config")(
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        window_block_indices=[0],
        out_indices=[1, 2],
        **of_family[family],
    )


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
    "LW-DETR": ("LwDetr", lambda w: {"backbone_config": windows("LwDetrViT", w), **LW}, "RTDetr"),
    "RF-DETR": ("RfDetr", lambda w: {"backbone_config": windows("RfDetrDinov2", w), **GROUPS}, "RTDetr"),
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


def run_tap(model, pixels, layers=None, **kwargs):
    tap = FeatureTap(model.eval(), layers, **kwargs)
    tap.attach()
    try:
        with torch.no_grad():
            return tap.run({"pixel_values": pixels})[1]
    finally:
        tap.detach()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_maps_are_the_backbones_own(name):
    model, pixels = build(name).eval(), torch.randn(2, 3, 64, 64 if name.endswith("-DETR") else 96)
    maps = run_tap(model, pixels)
    assert len(maps) == (3 if name in PYRAMIDS else 1)
    if name == "YOLOS":
        with torch.no_grad():
            tokens = model.vit(pixels).last_hidden_state  # class, 8 x 12 patches, 5 detections
        assert tokens.shape[1] == 1 + 96 + 5
        assert torch.equal(maps[0].flatten(2).transpose(1, 2), tokens[:, 1:-5])
        return
    backbone = next(module for module in model.modules() if isinstance(module, BackboneMixin))
    with torch.no_grad():
        expected = backbone(pixels).feature_maps[-len(maps) :]
    assert all(torch.equal(got, own) for got, own in zip(maps, expected, strict=True))


def test_maps_can_be_named_by_their_index_and_are_listed(capsys):
    model, pixels = build("RT-DETR"), torch.randn(1, 3, 64, 64)
    own, first = run_tap(model, pixels, ["model.backbone.model[-1]", "model.backbone.model[0]"])
    assert own.shape[1:] == (8, 2, 2) and first.shape[1:] == (8, 8, 8)
    layers = list_layers(model, 64)
    assert {f"model.backbone.model[{i}]" for i in (-3, -2, -1)} <= set(layers)
    assert layers["model.backbone.model[-3]"] == (8, 8, 8)
    assert "model.backbone.model[-1]" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"'model.backbone.model\[3\]' to give a map.*got None"):
        run_tap(model, pixels, ["model.backbone.model[3]"])
    with pytest.raises(ValueError, match=r"got 'model.backbon\[-1\]'; close matches: model.backbone\b"):
        FeatureTap(model, ["model.backbon[-1]"])


@pytest.mark.parametrize("name", ["DETR", "Table Transformer"])
def test_a_timm_model_within_a_detr_is_found(name):
    """DETR keeps it bare of the backbone's class; its maps are a list. A stand-in, as timm is not needed."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, kernel_size=32, stride=32)

        def forward(self, pixels):
            return [self.conv(pixels)]

    model, pixels = build(name), torch.randn(2, 3, 64, 64)
    (layer,) = default_layers(model)
    path = layer.removesuffix("[-1]")
    model.set_submodule(path, Bare())
    assert default_layers(model) == [layer]
    (feature_map,) = run_tap(model, pixels)
    assert torch.equal(feature_map, model.get_submodule(path).conv(pixels))


def test_pairs_are_made_from_the_last_map_backwards():
    levels = [f"model.backbone.model[{i}]" for i in (-3, -2, -1)]
    pyramid, detr, classifier = build("RT-DETR"), build("DETR"), make_resnet(8)
    assert pair_layers(pyramid, build("D-FINE"), None, None) == (levels, levels)
    assert pair_layers(pyramid, detr, None, None) == (levels[-1:], levels[-1:])
    assert pair_layers(detr, pyramid, None, None) == (levels[-1:], levels[-1:])
    assert pair_layers(pyramid, classifier, None, None) == (levels[-1:], ["resnet"])
    assert pair_layers(pyramid, pyramid, levels[:2], None) == (levels[:2], levels[1:])
    with pytest.raises(ValueError, match="as many student_layers as teacher_layers, got 1 and 2"):
        pair_layers(detr, pyramid, None, levels[:2])


def test_fewer_levels_than_the_student(make_detection):
    """A backbone with two levels teaches the last two of three."""
    torch.manual_seed(2)
    two = {"encoder_in_channels": [8, 16], "decoder_in_channels": [16, 16], "feat_strides": [16, 32]}
    two |= {"encode_proj_layers": [1], "num_feature_levels": 2}
    backbone = rt_detr_resnet(16)
    backbone.out_features = ["stage3", "stage4"]
    config = t.RTDetrConfig(**{**pyramid(16), **two, "backbone_config": backbone}, **LABELS)
    trainer = make_detection(build("RT-DETR"), t.RTDetrForObjectDetection(config), processor_of("RT-DETR"))
    assert (
        trainer.teacher.tap.layers
        == trainer.student_side.tap.layers
        == [f"model.backbone.model[{i}]" for i in (-2, -1)]
    )
    trainer.train()
    assert len(trainer.teacher.paraphrasers) == len(trainer.student_side.splits) == 2
    assert [p.in_channels for p in trainer.teacher.paraphrasers] == [8, 16]
