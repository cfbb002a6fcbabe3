"""Detectors as students and as teachers: where their maps are, what is refused, and what is saved."""

import copy
import functools
import re
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers as t
from conftest import make_resnet, make_vit, same
from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoModelForObjectDetection
from transformers.backbone_utils import BackboneMixin

from iekd_hf import Paraphraser, inherit_head, list_layers, reconstruction_loss
from iekd_hf.commands.boxes.tiny_detectors import tiny_config, tiny_detector
from iekd_hf.features.layers import default_layers, pair_layers
from iekd_hf.features.tap import FeatureTap
from iekd_hf.method.objective import factor_losses
from iekd_hf.method.padding import mask_at
from iekd_hf.method.trainable import ParaphraserStack
from iekd_hf.training.data_checks import check_dataset
from iekd_hf.training.paraphraser_trainer import ParaphraserTrainer


CATS = {0: "cat", 1: "dog"}
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
    size = {"height": 64, "width": 64} if family == "RTDetr" else {"shortest_edge": 48, "longest_edge": 96}
    return getattr(t, f"{family}ImageProcessorPil")(size=size)


SIZES = [(48, 96), (64, 48), (48, 48), (40, 64)]


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


# ---- Teachers of other kinds ----


def make_convnext():
    torch.manual_seed(2)
    config = t.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], num_labels=7)
    return t.ConvNextForImageClassification(config)


CLASSIFIERS = {
    "ResNet": lambda: make_resnet(16, num_labels=7, seed=2),
    "ViT": lambda: make_vit(num_labels=7, seed=2),
    "ConvNeXt": make_convnext,
}


def make_doc_layout(version: int):
    torch.manual_seed(2)
    own = {} if version == 4 else pyramid(16)
    config = getattr(t, f"PPDocLayoutV{version}Config")(backbone_config=hgnet(16), **own, **LABELS)
    return getattr(t, f"PPDocLayoutV{version}ForObjectDetection")(config)


WITHOUT_LOSS = {f"PP-DocLayoutV{version}": functools.partial(make_doc_layout, version) for version in (2, 3, 4)}
WITHOUT_LOSS["PP-OCRv5"] = lambda: t.PPOCRV5MobileDetForObjectDetection(t.PPOCRV5MobileDetConfig())


@pytest.mark.parametrize("name", WITHOUT_LOSS)
def test_detectors_that_cannot_be_trained_can_teach(make_detection, name):
    """Transformers has no losses of theirs, but their backbones are like others."""
    teacher, processor = WITHOUT_LOSS[name](), processor_of("RT-DETR")
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_detection(build("RT-DETR"), teacher, processor)
    trainer.train()
    assert len(trainer.teacher.tap.layers) == (3 if "Layout" in name else 1)
    assert trainer.state.log_history[0]["inheritance_loss"] > 0 and same(teacher.state_dict(), before)


def test_a_student_that_cannot_be_trained_is_refused_before_stage_1(make_detection, tmp_path):
    for name, message in (
        ("PP-DocLayoutV4", "does not support training"),
        ("PP-OCRv5", "to return a loss for a batch with labels, got only"),
    ):
        with pytest.raises(ValueError, match=message):
            make_detection(WITHOUT_LOSS[name](), build("RT-DETR", 16), processor_of("RT-DETR"))
    assert not (tmp_path / "out" / "_paraphraser").exists()


@pytest.mark.parametrize("student", ["DETR", "RT-DETR"])
@pytest.mark.parametrize("teacher", CLASSIFIERS)
def test_a_classifier_teaches_a_backbone(make_detection, teacher, student):
    """Its pixels are its own, it takes no mask and no boxes, and its classes do not matter."""
    classifier, seen = CLASSIFIERS[teacher](), []
    own = t.ViTImageProcessorPil(size={"height": 32, "width": 32})
    before = copy.deepcopy(classifier.state_dict())
    trainer = make_detection(build(student), classifier, processor_of(student), teacher_processor=own)
    trainer.teacher.teacher.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    trainer.train()
    assert all(kwargs.keys() == {"pixel_values"} for kwargs in seen) and seen[0]["pixel_values"].shape[2:] == (32, 32)
    assert same(classifier.state_dict(), before)
    assert trainer.student_side.tap.layers == ["model.backbone.model[-1]"]
    assert trainer.state.log_history[-2]["inheritance_loss"] > 0


def test_a_detector_teacher_sees_the_mask_and_no_boxes(make_detection):
    seen = []
    trainer = make_detection(
        build("Conditional DETR"),
        build("DETR", 16),
        processor_of("Conditional DETR"),
        teacher_processor=t.DetrImageProcessorPil(
            size={"shortest_edge": 96, "longest_edge": 192}, image_mean=[0.1] * 3, image_std=[0.2] * 3
        ),
        train_sampling_strategy="sequential",
    )
    trainer.teacher.teacher.register_forward_pre_hook(lambda *call: seen.append(call[2]), with_kwargs=True)
    trainer.train()
    for kwargs in seen:
        assert kwargs.keys() == {"pixel_values", "pixel_mask"}
        pixels, mask = kwargs["pixel_values"], kwargs["pixel_mask"]
        assert mask.shape == pixels.shape[:1] + pixels.shape[2:] and mask.dtype == torch.int64
        assert not pixels.masked_select(mask[:, None] == 0).any()
    batch = seen[-1]["pixel_mask"]
    assert batch.shape == (4, 128, 192) and not batch.all()


@pytest.mark.parametrize("name", ["DETR", "RT-DETR", "YOLOS"])
def test_the_fast_teachers_maps_are_the_teachers(make_detection, name):
    teacher = build(name, 16)
    trainer = make_detection(build("DETR"), teacher, processor_of("DETR"), teacher_processor=processor_of(name))
    batch = trainer.sample_batch()
    trainer.teacher.tap.attach()
    got, _ = trainer.teacher.feature_maps(batch)
    inputs = trainer.teacher.to_teacher_inputs(batch)
    expected = run_tap(teacher, inputs["pixel_values"])[-1:]
    for fast, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    assert trainer.teacher.fast and trainer.teacher.teacher is not teacher


@pytest.mark.parametrize("name", ["DETR", "RT-DETR"])
def test_responses_before_the_activation(make_detection, name):
    """OD: of each level what goes into the last ReLU of its stage, though the backbone gives all levels at once."""
    model, pixels = build(name).eval(), torch.randn(2, 3, 64, 64)
    before, after = (run_tap(model, pixels, before_activation=flag) for flag in (True, False))
    for responses, feature_map in zip(before, after, strict=True):
        assert (responses < 0).any() and torch.equal(responses.relu(), feature_map)
    trainer = make_detection(model, build(name, 16, seed=2), processor_of(name), method="ie-od")
    trainer.train()
    margins = [margin_relu.margins for margin_relu in trainer.teacher.paraphrasers]
    assert len(margins) == len(after) and all((margin < 0).any() for margin in margins)


# ---- What is refused, before any training ----


def test_a_frozen_backbone_is_refused_and_half_a_frozen_one_is_not(make_detection):
    def frozen(name):
        student = build(name)
        student.model.backbone.requires_grad_(False)
        return student

    processor = processor_of("DETR")
    for name in ("DETR", "RT-DETR"):
        with pytest.raises(
            ValueError, match=r"map at 'model.backbone.model\[-\d\]' to carry a gradient.*requires_grad_"
        ):
            make_detection(frozen(name), build("DETR", 16), processor_of(name))
    make_detection(frozen("DETR"), build("DETR", 16), processor, method="plain").train()  # no loss on it
    student = frozen("DETR")
    student.model.backbone.model.encoder.stages[3].requires_grad_(True)
    make_detection(student, build("DETR", 16), processor).train()


def test_the_logit_term_is_refused(make_detection):
    for method in ("kd", "ie-ft+kd"):
        with pytest.raises(
            ValueError, match=r"lambda_kd > 0 with a detector.*queries of two detectors do not corr.*\+kd"
        ):
            make_detection(build("DETR"), build("DETR", 16), processor_of("DETR"), method=method)


def test_a_cached_teacher_is_refused(make_detection):
    with pytest.raises(ValueError, match="Expected DecodedImages and an augmentation with cache_teacher=True"):
        make_detection(build("DETR"), build("DETR", 16), processor_of("DETR"), cache_teacher=True)


def test_a_detector_without_a_backbone_lists_what_can_be_named(make_detection):
    class OwnForObjectDetection(t.PreTrainedModel):
        config_class, main_input_name = t.PreTrainedConfig, "pixel_values"

        def __init__(self):
            super().__init__(t.PreTrainedConfig(num_labels=3))
            self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())
            self.head = nn.Sequential(nn.Conv2d(8, 7, 1))

        def forward(self, pixel_values, labels=None):
            out = self.head(self.trunk(pixel_values))
            return {"loss": out.mean(), "logits": out[:, :3], "pred_boxes": out[:, 3:]}

    message = r"a detector with a backbone, got OwnFor.*such as 'trunk' or 'head'.*list_layers"
    with pytest.raises(ValueError, match=message):
        make_detection(OwnForObjectDetection(), build("DETR", 16), processor_of("DETR"))
    make_detection(
        OwnForObjectDetection(), build("DETR", 16), processor_of("RT-DETR"), student_layers=["trunk"]
    ).train()


def test_columns_of_boxes_are_no_class_labels(make_detection):
    """Nothing is read into the columns of a data set for detection, in whichever of the usual forms."""
    boxes = {"bbox": [[4.0, 6.0, 20.0, 16.0]], "category_id": [7]}
    for column in ({"objects": [boxes] * 8}, {"labels": [[{"class_labels": 9}]] * 8}, {"labels": [[9, 9]] * 8}):
        rows = datasets.Dataset.from_dict({"image_id": list(range(8)), **column})
        check_dataset(rows, "train_dataset", build("DETR"))


# ---- Runs ----


def test_resumed_exactly(make_detection, tmp_path):
    """RT-DETR, whose denoising queries draw numbers: ten steps are five and five."""

    def make(folder, **kwargs):
        arguments = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "cosine"}
        arguments |= {"output_dir": str(tmp_path / folder), "lambda_schedule": "cosine"}
        processor = processor_of("RT-DETR")
        return make_detection(build("RT-DETR"), build("RT-DETR", 16, seed=2), processor, **(arguments | kwargs))

    class StopAtFive(t.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 5

    straight = make("straight")
    straight.train()
    make("broken", callbacks=[StopAtFive()]).train()
    resumed = make("broken", split_seed=2)
    resumed.train(resume_from_checkpoint=True)
    assert same(straight.student_side.state_dict(), resumed.student_side.state_dict())
    assert same(straight.teacher.paraphrasers.state_dict(), resumed.teacher.paraphrasers.state_dict())


def test_evaluation_keeps_logits_and_boxes_only(make_detection):
    """And the dictionary of losses, so that they stand where Trainer's own examples expect them."""
    seen = []
    for name in FAMILIES:
        trainer = make_detection(
            build(name),
            build("DETR", 16),
            processor_of(name),
            eval_dataset=pictures(),
            eval_do_concat_batches=False,
            compute_metrics=lambda prediction: seen.append(prediction) or {"map": 0.5},
        )
        assert trainer.evaluate()["eval_map"] == 0.5
        for losses, logits, boxes in seen[-1].predictions:
            assert isinstance(losses, dict) and logits.shape[:2] == boxes.shape[:2] and boxes.shape[2] == 4


def test_the_card_is_a_detectors(make_detection, tmp_path):
    teacher = build("DETR", 16)
    trainer = make_detection(build("RT-DETR"), teacher, processor_of("RT-DETR"), eval_dataset=pictures())
    trainer.compute_metrics, trainer.args.eval_do_concat_batches = lambda prediction: {"map_50": 0.25}, False
    shares = trainer.train().metrics
    assert shares["inheritance_loss_gradient_share"] > 0 and shares["exploration_loss_gradient_share"] > 0
    trainer.evaluate()
    trainer.create_model_card(teacher_metrics={"map_50": 0.75})
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "object-detection"
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [("map_50", 0.25)]
    assert "This is an object detector for 3 classes (ant, bee, cat)" in card.text.replace("\n", " ")
    assert 'pipeline("object-detection"' in card.text and "0.7500" in card.text


def update(make_detection, batch_size, steps, rows):
    """Return the task's loss and the step made by one update of a DETR without dropout and batch statistics."""
    torch.manual_seed(1)
    config = t.DetrConfig(**DETR, backbone_config=resnet(8, LAST), dropout=0.0, **LABELS)
    processor = t.DetrImageProcessorPil(size={"height": 64, "width": 64})
    trainer = make_detection(
        t.DetrForObjectDetection(config).requires_grad_(True),
        build("DETR", 16),
        processor,
        train_dataset=rows,
        paraphraser=Paraphraser(16, 8),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        max_steps=1,
        train_sampling_strategy="sequential",
    )
    for module in trainer.student_side.modules():
        if isinstance(module, nn.BatchNorm2d):  # of the encoders
            module.train(False).train = lambda mode=True, module=module: module
    before = {name: value.clone() for name, value in trainer.student.named_parameters()}
    trainer.train()
    moved = {name: value.detach() - before[name] for name, value in trainer.student.named_parameters()}
    return trainer.state.log_history[0]["task_loss"], moved


def test_accumulation_adds_up_where_micro_batches_have_as_many_boxes(make_detection):
    """
    Detectors divide their losses by the boxes of a micro-batch, and Trainer averages these: each micro-batch counts
    the same, however many boxes it has.
    """
    rows = pictures(8)[:4]
    whole, split = update(make_detection, 4, 1, rows), update(make_detection, 2, 2, rows)
    assert split[0] == pytest.approx(whole[0], rel=1e-4)
    for name, value in whole[1].items():
        torch.testing.assert_close(split[1][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for row in rows[:2]:
        row["annotations"]["annotations"] = row["annotations"]["annotations"][:1]
    whole, split = update(make_detection, 4, 1, rows), update(make_detection, 2, 2, rows)
    assert split[0] != pytest.approx(whole[0], rel=1e-3)


@pytest.mark.parametrize("name", ["DETR", "RT-DETR"])
def test_two_detectors_teach_each_other(make_mutual, tmp_path, name):
    peers = [build(name, 8, seed=1), build(name, 16, seed=2)]
    before = [copy.deepcopy(peer.state_dict()) for peer in peers]
    processor = processor_of(name)
    keywords = {
        "train_dataset": pictures(),
        "data_collator": Collate(processor),
        "processing_class": processor,
        "remove_unused_columns": False,
        "learning_rate": 1e-3,
    }
    trainer = make_mutual(peers, mutual_loss="ie", **keywords)
    trainer.train()
    logged = trainer.state.log_history[0]
    for i in (1, 2):
        for loss in ("task_loss", "inheritance_loss", "exploration_loss", "reconstruction_loss"):
            assert torch.tensor(logged[f"peer_{i}/{loss}"]).isfinite()
    for peer, start in zip(peers, before, strict=True):
        path = trainer.taps[peers.index(peer)].layers[0].removesuffix("[-1]")
        moved = [not torch.equal(v, start[f"{path}.{k}"]) for k, v in peer.get_submodule(path).named_parameters()]
        assert all(moved)
    if name == "DETR":  # whose batches are padded, which the peers' losses leave out
        collate = keywords["data_collator"]
        whole = {"data_collator": lambda rows: {**collate(rows), "pixel_mask": None}}
        fresh = [[build(name, 8, seed=1), build(name, 16, seed=2)] for _ in range(2)]
        once = {**keywords, "max_steps": 1, "train_sampling_strategy": "sequential"}
        let_in, left_out = make_mutual(fresh[0], **(once | whole)), make_mutual(fresh[1], **once)
        let_in.train()
        left_out.train()
        first, second = (run.state.log_history[0] for run in (let_in, left_out))
        for loss in ("peer_1/reconstruction_loss", "peer_2/inheritance_loss"):
            assert first[loss] != second[loss]
    trainer.save_model()
    for i, peer in enumerate(peers, start=1):
        loaded, info = AutoModelForObjectDetection.from_pretrained(
            tmp_path / "out" / f"peer_{i}", output_loading_info=True
        )
        assert not any(info.values()) and same(loaded.state_dict(), peer.state_dict())
    for loss in ("kl", "ie+kl"):
        with pytest.raises(ValueError, match=r"mutual_loss='.*kl' with a detector.*queries of two detectors"):
            make_mutual(peers, mutual_loss=loss, **keywords)
    peers[1].model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="to carry a gradient"):
        make_mutual(peers, mutual_loss="ie", **keywords)


def test_the_guide_lists_the_families():
    guide = (Path(__file__).parent.parent / "docs" / "guide" / "detection.md").read_text()
    listed = re.search(r"^Detectors whose.*?:\n\n(.+?)\n\n", guide, flags=re.DOTALL | re.MULTILINE)[1]
    assert [name.strip(" .\n") for name in listed.replace("\n", " ").split(",")] == sorted(FAMILIES, key=str.lower)


def test_both_stages_leave_padding_out(make_detection, tmp_path):
    trainer = make_detection(build("DETR"), build("RT-DETR", 16), processor_of("DETR"), paraphraser=Paraphraser(16, 8))
    batch = trainer._prepare_inputs(trainer.data_collator(pictures()[:4]))
    assert not batch["pixel_mask"].all()
    trainer.teacher.tap.attach()
    trainer.student_side.tap.attach()
    with torch.no_grad():
        trainer.student_side.eval()
        feature_maps, losses = trainer.maps_and_losses(dict(batch))
        F_inh, F_exp = trainer.student_side.factors(feature_maps)
        F_T, _ = trainer.teacher(batch)
        left_out, let_in = (
            factor_losses(F_inh, F_exp, F_T, trainer.args, pixel_mask=mask) for mask in (batch["pixel_mask"], None)
        )
        for name in left_out:
            assert losses[name] == left_out[name] != let_in[name]

        stack = ParaphraserStack([Paraphraser(16, 8)]).eval()
        keywords = {"output_dir": str(tmp_path / "stage_1"), "train_dataset": pictures(), "held_out": None}
        keywords |= {"data_collator": trainer.data_collator, "augmentation": None}
        stage_1 = ParaphraserTrainer(stack, trainer.teacher, trainer.args, **keywords)
        (f_T,), _ = trainer.teacher.feature_maps(batch)
        mask = mask_at(batch["pixel_mask"], f_T.shape[2:])
        (reconstruction,) = stack([f_T])
        left_out, let_in = (reconstruction_loss(reconstruction, f_T, mask=m) for m in (mask, None))
        assert stage_1.compute_loss(stack, batch) == left_out != let_in


def test_a_teacher_by_name_brings_its_processor(make_detection, tmp_path):
    own = t.DetrImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 192}, image_mean=[0.1] * 3)
    build("DETR", 16).save_pretrained(tmp_path / "teacher")
    own.save_pretrained(tmp_path / "teacher")
    trainer = make_detection(build("RT-DETR"), str(tmp_path / "teacher"), processor_of("RT-DETR"))
    assert type(trainer.teacher.teacher) is t.DetrForObjectDetection
    assert trainer.teacher.to_teacher_inputs(trainer.sample_batch())["pixel_values"].shape[2:] == (96, 96)
    trainer.train()


def test_a_student_takes_the_head_of_its_teacher_and_nothing_else():
    config = tiny_config("tiny-rt-detr-8", id2label=CATS)
    teacher = t.RTDetrForObjectDetection(tiny_config("tiny-rt-detr-16", id2label=CATS))
    student = t.RTDetrForObjectDetection(t.RTDetrConfig(**{**config.to_dict(), "decoder_layers": 1}))
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (student, teacher)]
    names = inherit_head(student, teacher)
    assert same(teacher.state_dict(), before[1])
    for name, value in student.state_dict().items():
        assert value.equal((before[1] if name in names else before[0])[name]), name
    assert not any("backbone" in name for name in names)
    assert any("decoder.layers.0" in name for name in names) and "model.decoder.class_embed.0.weight" in names
    # The convolutions that take the backbone's channels are as wide as it is.
    assert "model.encoder_input_proj.0.0.weight" not in names


def test_a_head_that_does_not_fit_is_refused():
    tiny = tiny_detector("tiny-rt-detr-8", id2label=CATS)
    with pytest.raises(
        ValueError, match=r"a student with a module named backbone .* got ResNetForImageClassification: leave"
    ):
        inherit_head(make_resnet(8), tiny)
    with pytest.raises(ValueError, match=r"same name and shape as the student's, got ResNetFor.* for RTDetr.*family"):
        inherit_head(tiny, make_resnet(8))
