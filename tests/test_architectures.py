"""Families of transformers, each as student and as teacher, with no layer named."""

import re
from pathlib import Path

import pytest
import torch
import transformers as t
from conftest import make_images, make_resnet


def small(**kwargs):
    return dict(num_labels=3, **kwargs)


VIT = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=8, image_size=32
)
SWIN = dict(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
STAGES = dict(hidden_sizes=[8, 16], depths=[1, 1])
FOUR = dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
TOWERS = dict(
    vision_config=VIT,
    text_config=dict(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
)

# name: (family, configuration, image size)
FAMILIES = {
    "BEiT": ("Beit", VIT, 32),
    "BiT": ("Bit", dict(embedding_size=8, num_groups=2, **STAGES), 32),
    "CLIP": ("CLIP", TOWERS, 32),
    "ConvNeXt": ("ConvNext", dict(num_stages=2, **STAGES), 32),
    "ConvNeXt V2": ("ConvNextV2", dict(num_stages=2, **STAGES), 32),
    "CvT": ("Cvt", dict(embed_dim=[8, 16, 16], num_heads=[1, 1, 2], depth=[1, 2, 3]), 64),
    "Data2Vec Vision": ("Data2VecVision", VIT, 32),
    "DeiT": ("DeiT", VIT, 32),
    "DINOv2": ("Dinov2", VIT, 32),
    "DINOv2 with registers": ("Dinov2WithRegisters", VIT, 32),
    "Donut Swin": ("DonutSwin", SWIN, 32),
    # Its own initializer_range is for pretrained weights: with 0.02 the last of seven blocks gives zeros.
    "EfficientNet": (
        "EfficientNet",
        dict(width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320, initializer_range=1.0),
        64,
    ),
    "FocalNet": (
        "FocalNet",
        dict(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3]),
        32,
    ),
    "HGNet V2": (
        "HGNetV2",
        dict(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            stem_channels=[3, 8, 8],
            stage_in_channels=[8, 8],
            stage_mid_channels=[8, 8],
            stage_out_channels=[8, 16],
            stage_num_blocks=[1, 1],
            stage_downsample=[False, True],
            stage_light_block=[False, False],
            stage_kernel_size=[3, 3],
            stage_numb_of_layers=[1, 1],
        ),
        32,
    ),
    "Hiera": (
        "Hiera",
        dict(
            embed_dim=8,
            image_size=[64, 64],
            depths=[1, 1],
            num_heads=[1, 2],
            num_query_pool=1,
            masked_unit_size=[2, 2],
            masked_unit_attention=[True, False],
        ),
        64,
    ),
    "I-JEPA": ("IJepa", VIT, 32),
    "LeViT": (
        "Levit",
        dict(
            image_size=64,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1],
            key_dim=[4, 4, 4],
        ),
        64,
    ),
    "MetaCLIP 2": ("MetaClip2", TOWERS, 32),
    "MobileNet V1": ("MobileNetV1", dict(depth_multiplier=0.25), 32),
    "MobileNet V2": ("MobileNetV2", dict(depth_multiplier=0.25), 32),
    "MobileViT": (
        "MobileViT",
        dict(
            image_size=64,
            hidden_sizes=[16, 16, 16],
            neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32],
            num_attention_heads=2,
        ),
        64,
    ),
    "MobileViT V2": (
        "MobileViTV2",
        dict(image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[16, 16, 16]),
        64,
    ),
    "PoolFormer": ("PoolFormer", FOUR, 64),
    "PVT": ("Pvt", dict(image_size=64, num_attention_heads=[1, 1, 2, 2], **FOUR), 64),
    "PVT V2": ("PvtV2", dict(image_size=64, num_attention_heads=[1, 1, 2, 2], mlp_ratios=[2, 2, 2, 2], **FOUR), 64),
    "RegNet": ("RegNet", dict(embedding_size=8, groups_width=8, **STAGES), 32),
    "ResNet": ("ResNet", dict(embedding_size=8, layer_type="bottleneck", **STAGES), 32),
    "SegFormer": ("Segformer", dict(num_attention_heads=[1, 1, 2, 2], **FOUR), 64),
    "SigLIP": ("Siglip", TOWERS, 32),
    "SwiftFormer": ("SwiftFormer", dict(image_size=64, embed_dims=[8, 8, 16, 16], depths=[1, 1, 1, 1]), 64),
    "Swin": ("Swin", SWIN, 32),
    "Swin V2": ("Swinv2", SWIN, 32),
    "TextNet": ("TextNet", {}, 32),
    "ViT": ("ViT", VIT, 32),
    "ViT MSN": ("ViTMSN", VIT, 32),
}


def build(name: str):
    family, kwargs, size = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(t, f"{family}Config")(num_labels=3, **kwargs)
    return getattr(t, f"{family}ForImageClassification")(config), size


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_two_steps_with_no_layer_named(make_trainer, name, role):
    model, size = build(name)
    other = make_resnet(8, seed=3)
    student, teacher = (model, other) if role == "student" else (other, model)
    before = {key: value.clone() for key, value in student.base_model.named_parameters()}
    trainer = make_trainer(
        student, teacher, train_dataset=make_images(8, size=(size, size)), per_device_train_batch_size=4
    )
    trainer.train()
    logs = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert len(logs) == 2
    for component in ("task_loss", "inheritance_loss", "exploration_loss"):
        assert all(torch.tensor(entry[component]).isfinite() for entry in logs)
    moved = [not torch.equal(value, before[key]) for key, value in student.base_model.named_parameters()]
    assert sum(moved) > 0.5 * len(moved)  # some heads use a part of the body only


def test_the_guide_lists_them():
    guide = (Path(__file__).parent.parent / "docs" / "guide" / "models.md").read_text()
    listed = re.search(r"^Architectures.*?:\n\n(.+?)\n\n", guide, flags=re.DOTALL | re.MULTILINE)[1]
    assert {name.strip(" .\n") for name in listed.replace("\n", " ").split(",")} == set(FAMILIES) | {"CIFAR ResNet"}
    assert len(FAMILIES) >= 20
