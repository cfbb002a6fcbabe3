"""Models without a head (`AutoModel`, `AutoBackbone`): the default map is what the model itself returns."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers as t
from conftest import make_images, make_resnet, same
from test_architectures import FAMILIES, FOUR, STAGES, SWIN, TOWERS, VIT, build
from torch import nn
from transformers import Siglip2ImageProcessorPil, ViTImageProcessorPil

from iekd_hf import BatchAugmentation, list_layers
from iekd_hf.features.patches import as_inputs, cut_patches
from iekd_hf.features.tap import FeatureTap
from iekd_hf.models.loading import load_model


REGISTERS = {**VIT, "num_register_tokens": 4}
CONVNEXT = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
RESNET = {"embedding_size": 8, "layer_type": "basic", **STAGES}
PIXIO = {**VIT, "n_cls_tokens": 8}
NAFLEX = {**{name: value for name, value in VIT.items() if name != "image_size"}, "num_patches": 16}
SAM = {**VIT, "output_channels": 8, "num_pos_feats": 4, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 32}
HIERA = FAMILIES["Hiera"][1]
MASKED_HIERA = {**HIERA, "decoder_hidden_size": 8, "decoder_num_heads": 2, "decoder_depth": 1}

# class: (configuration, its arguments, image size, grid of the map, tokens in front of it)
MODELS = {
    "Aimv2VisionModel": ("Aimv2VisionConfig", VIT, (32, 32), (4, 4), 0),
    "BeitModel": ("BeitConfig", {**VIT, "use_mean_pooling": False}, (32, 48), (4, 6), 1),
    "CLIPVisionModel": ("CLIPVisionConfig", VIT, (32, 32), (4, 4), 1),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", VIT, (32, 32), (4, 4), 1),
    "ConvNextModel": ("ConvNextConfig", dict(num_stages=2, **STAGES), (32, 48), (4, 6), None),
    "Data2VecVisionModel": ("Data2VecVisionConfig", VIT, (32, 48), (4, 6), 1),
    "DeiTModel": ("DeiTConfig", VIT, (32, 32), (4, 4), 2),
    "Dinov2Model": ("Dinov2Config", VIT, (32, 48), (4, 6), 1),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", REGISTERS, (32, 48), (4, 6), 5),
    "DINOv3ConvNextModel": ("DINOv3ConvNextConfig", CONVNEXT, (64, 96), (2, 3), 1),
    "DINOv3ViTModel": ("DINOv3ViTConfig", REGISTERS, (32, 48), (4, 6), 5),
    "HieraModel": ("HieraConfig", HIERA, (64, 64), (8, 8), 0),
    "IJepaModel": ("IJepaConfig", VIT, (32, 32), (4, 4), 0),
    "PixioModel": ("PixioConfig", PIXIO, (32, 32), (4, 4), 8),
    "ResNetModel": ("ResNetConfig", RESNET, (32, 48), (4, 6), None),
    "SamVisionModel": ("SamVisionConfig", SAM, (32, 32), (4, 4), None),
    "Siglip2VisionModel": ("Siglip2VisionConfig", NAFLEX, (32, 48), (4, 6), 0),
    "SiglipVisionModel": ("SiglipVisionConfig", VIT, (32, 32), (4, 4), 0),
    "SwinModel": ("SwinConfig", SWIN, (32, 48), (4, 6), 0),
    "Swinv2Model": ("Swinv2Config", SWIN, (32, 48), (4, 6), 0),
    "ViTModel": ("ViTConfig", VIT, (32, 32), (4, 4), 1),
}
BACKBONES = {
    "BeitBackbone": ("BeitConfig", VIT, (32, 48), (4, 6), None),
    "ConvNextBackbone": ("ConvNextConfig", FOUR, (64, 96), (2, 3), None),
    "Dinov2Backbone": ("Dinov2Config", VIT, (32, 48), (4, 6), None),
    "Dinov2WithRegistersBackbone": ("Dinov2WithRegistersConfig", REGISTERS, (32, 48), (4, 6), None),
    "DINOv3ConvNextBackbone": ("DINOv3ConvNextConfig", CONVNEXT, (64, 96), (2, 3), None),
    "DINOv3ViTBackbone": ("DINOv3ViTConfig", REGISTERS, (32, 48), (4, 6), None),
    "HieraBackbone": ("HieraConfig", HIERA, (64, 64), (8, 8), None),
    "PixioBackbone": ("PixioConfig", PIXIO, (32, 32), (4, 4), None),
    "ResNetBackbone": ("ResNetConfig", RESNET, (32, 48), (4, 6), None),
    "SwinBackbone": ("SwinConfig", SWIN, (32, 48), (4, 6), None),
    "Swinv2Backbone": ("Swinv2Config", SWIN, (32, 48), (4, 6), None),
}


def make(name: str, config: str, **kwargs) -> nn.Module:
    """Make a model whose norms are not the identity, as those of trained models are not."""
    torch.manual_seed(0)
    model = getattr(t, name)(getattr(t, config)(**kwargs)).eval()
    for path, parameter in model.named_parameters():
        if "norm" in path and parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.2, 3)
    return model


def make_dinov2(**kwargs) -> t.Dinov2Model:
    return make("Dinov2Model", "Dinov2Config", **VIT, **kwargs)


@torch.no_grad()
def default_map(model: nn.Module, inputs: dict, **kwargs) -> torch.Tensor:
    tap = FeatureTap(model, **kwargs)
    tap.attach()
    try:
        return tap.run(inputs)[1][0]
    finally:
        tap.detach()


@pytest.mark.parametrize("name", [*MODELS, *BACKBONES])
def test_the_default_map_is_the_models_own_output(name):
    config, kwargs, size, grid, extra_tokens = (MODELS | BACKBONES)[name]
    model = make(name, config, **kwargs)
    inputs = as_inputs(model, torch.randn(2, 3, *size))
    with torch.no_grad():
        outputs = model(**inputs)
    own = outputs.feature_maps[-1] if name in BACKBONES else outputs.last_hidden_state
    if extra_tokens is not None:
        assert own.shape[1] == extra_tokens + grid[0] * grid[1]
        own = own[:, extra_tokens:].transpose(1, 2).unflatten(2, grid)
    feature_map = default_map(model, inputs)
    assert feature_map.shape[2:] == grid and torch.equal(feature_map, own)


def test_the_guide_lists_them():
    guide = (Path(__file__).parent.parent / "docs" / "guide" / "models.md").read_text()
    listed = re.search(r"the model's own output:\n\n(.+?)\n\n", guide, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == {*MODELS, *BACKBONES}


@pytest.mark.parametrize("family", ["CLIP", "Siglip", "Siglip2", "Sam"])
def test_of_a_model_with_several_towers_it_is_that_of_images(family):
    towers = {**TOWERS, "vision_config": NAFLEX} if family == "Siglip2" else TOWERS
    kwargs = {"vision_config": SAM} if family == "Sam" else towers
    model, pixels = make(f"{family}Model", f"{family}Config", **kwargs), torch.randn(2, 3, 32, 32)
    tower = model.vision_encoder if family == "Sam" else model.vision_model
    inputs = as_inputs(model, pixels)
    tap = FeatureTap(model)
    tap.attach()
    with torch.no_grad():
        _, (feature_map,) = tap.run(inputs, stop_after_last=True)  # without a text
        own = tower(**inputs).last_hidden_state
    own = own if own.ndim == 4 else own[:, family == "CLIP" :].transpose(1, 2).unflatten(2, (4, 4))
    assert torch.equal(feature_map, own)


def test_a_backbones_last_map_is_the_one_it_was_asked_for():
    config = {"hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4, "out_features": ["stage2", "stage3"]}
    model = make("ConvNextBackbone", "ConvNextConfig", **config)
    feature_map = default_map(model, {"pixel_values": torch.randn(2, 3, 64, 64)})
    assert feature_map.shape == (2, 24, 4, 4)


def test_a_depth_model_whose_backbone_gives_tokens():
    backbone = t.Dinov2Config(**VIT, out_features=["stage1", "stage2"], reshape_hidden_states=False)
    sizes = {"reassemble_hidden_size": 16, "neck_hidden_sizes": [8, 8], "fusion_hidden_size": 8, "head_hidden_size": 8}
    config = {"backbone_config": backbone, "reassemble_factors": [4, 2], "patch_size": 8, **sizes}
    model = make("DepthAnythingForDepthEstimation", "DepthAnythingConfig", **config)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 48)}
    with torch.no_grad():
        tokens = model.backbone(**inputs).feature_maps[-1]
    expected = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 6))
    assert torch.equal(default_map(model, inputs), expected)


def test_what_comes_before_the_last_activation():
    model = make("ResNetModel", "ResNetConfig", **RESNET)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    before, after = default_map(model, inputs, before_activation=True), default_map(model, inputs)
    assert before.min() < 0 and torch.equal(before.relu(), after)


def test_a_map_that_is_named():
    model, inputs = make_dinov2(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    norm = default_map(model, inputs, layers=["layernorm"])
    assert torch.equal(norm, default_map(model, inputs, layers=["last_hidden_state"]))
    assert not torch.allclose(norm, default_map(model, inputs, layers=["encoder"]), atol=0.1)
    with pytest.raises(ValueError, match=r"'feature_maps\[0\]' to give a map.*got None"):
        default_map(model, inputs, layers=["feature_maps[0]"])


def test_adapters_are_no_obstacle():
    from peft import LoraConfig, get_peft_model

    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    adapted = get_peft_model(make_dinov2(), LoraConfig(target_modules=["fc1"]))
    assert torch.equal(default_map(adapted, inputs), default_map(make_dinov2(), inputs))


def test_list_layers_has_the_final_norm(capsys):
    layers = list(list_layers(make_dinov2(), 32))
    assert layers[-3:] == ["encoder", "layernorm", "last_hidden_state"]
    backbone = make("Dinov2Backbone", "Dinov2Config", **VIT, out_features=["stage1", "stage2"])
    assert list(list_layers(backbone, 32))[-2:] == ["feature_maps[-2]", "feature_maps[-1]"]
    layers = list_layers(make("SiglipModel", "SiglipConfig", **TOWERS), 32)
    assert layers["vision_model.post_layernorm"] == layers["vision_model"] == (16, 4, 4)
    assert list(list_layers(build("ViT")[0], 32))[-2:] == ["vit.layernorm", "vit"]


# ---- As teachers ----


@pytest.mark.parametrize("name", ["DINOv3ConvNextModel", "Dinov2Backbone", "Siglip2VisionModel", "ResNetModel"])
def test_as_a_teacher(make_trainer, name):
    config, kwargs, size, grid, _ = (MODELS | BACKBONES)[name]
    teacher, rows = make(name, config, **kwargs), make_images(8, size=size)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(teacher_model=teacher, train_dataset=rows, max_steps=1, factor_channels=8)
    trainer.train()
    assert trainer.state.log_history[-2]["inheritance_loss"] > 0 and same(teacher.state_dict(), before)
    # The copy's, whose BatchNorm layers are folded.
    trainer.teacher.tap.attach()
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    (feature_map,), _ = trainer.teacher.feature_maps(batch)
    expected = default_map(teacher, as_inputs(teacher, batch["pixel_values"]))
    assert trainer.teacher.fast and feature_map.shape[2:] == grid
    torch.testing.assert_close(feature_map, expected, rtol=1e-4, atol=1e-4)


def test_from_a_cache(make_trainer):
    from test_whole_batches import make_decoded

    logs = []
    for cached in (True, False):
        trainer = make_trainer(
            teacher_model=make_dinov2(),
            train_dataset=make_decoded(8),
            augmentation=BatchAugmentation(mean=[0.5] * 3, std=[0.5] * 3),
            cache_teacher=cached,
            cache_views=1,
            factor_channels=8,
        )
        trainer.train()
        logs.append(trainer.state.log_history[-2]["inheritance_loss"])
    assert logs[0] == pytest.approx(logs[1], rel=2e-3)


def test_as_a_student(make_trainer):
    """It has no loss of its own."""
    student = make_dinov2(num_labels=3)
    before = copy.deepcopy(student.state_dict())
    trainer = make_trainer(student, compute_loss_func=lambda outputs, labels, **_: 0 * outputs[0].mean())
    assert trainer.student_side.tap.layers == ["last_hidden_state"]
    trainer.train()
    assert trainer.state.log_history[-2]["inheritance_loss"] > 0
    assert not torch.equal(student.layernorm.weight, before["layernorm.weight"])


def test_the_patches_are_those_of_the_models_own_processor():
    pixels = torch.randint(0, 255, (2, 3, 32, 48), dtype=torch.uint8)
    plain = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24, **plain)
    expected = processor(list(pixels), return_tensors="pt")
    got = cut_patches(pixels.float(), 8)
    assert expected.keys() == got.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
    with pytest.raises(ValueError, match="multiples of 8 pixels, got 32x33"):
        cut_patches(torch.zeros(1, 3, 32, 33), 8)


def test_a_tower_gets_the_teachers_pixels(make_trainer):
    size = {"size": {"height": 32, "width": 32}}
    students, teachers = (ViTImageProcessorPil(image_mean=[m] * 3, image_std=[0.5] * 3, **size) for m in (0.5, 0.25))
    clip, seen = make("CLIPModel", "CLIPConfig", **TOWERS), []
    clip.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    processors = {"processing_class": students, "teacher_processor": teachers}
    trainer = make_trainer(teacher_model=clip, fast_teacher=False, factor_channels=8, **processors)
    trainer.teacher.tap.attach()
    trainer.teacher.feature_maps({"pixel_values": torch.zeros(1, 3, 32, 32)})
    torch.testing.assert_close(seen[-1], torch.full((1, 3, 32, 32), 0.5))


# ---- By name ----


def test_by_name_it_is_the_class_of_the_checkpoint(make_trainer, tmp_path):
    make_dinov2().save_pretrained(tmp_path / "dinov2")
    trainer = make_trainer(teacher_model=str(tmp_path / "dinov2"), fast_teacher=False, factor_channels=8)
    assert type(trainer.teacher.teacher) is t.Dinov2Model and trainer.teacher.tap.layers == ["last_hidden_state"]


def test_a_pooler_that_is_not_in_the_file_is_left_out(tmp_path):
    """As in the files of DINO; with random weights no cache would be found again."""
    t.ViTModel(t.ViTConfig(**VIT), add_pooling_layer=False).save_pretrained(tmp_path)
    first, second = (load_model(str(tmp_path), "teacher_model") for _ in range(2))
    assert first.pooler is None and same(first.state_dict(), second.state_dict())
    default_map(first, {"pixel_values": torch.randn(2, 3, 32, 32)})


def test_a_masked_autoencoder_is_loaded_to_see_all(tmp_path):
    decoder = {f"decoder_{name}": VIT[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    masked = make("ViTMAEForPreTraining", "ViTMAEConfig", **VIT, **decoder, decoder_num_hidden_layers=1)
    masked.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    feature_map = default_map(load_model(str(tmp_path), "teacher_model"), {"pixel_values": pixels})
    masked.config.mask_ratio = 0.0
    with torch.no_grad():
        tokens = masked.vit(pixels, noise=torch.arange(16.0).expand(2, 16)).last_hidden_state
    torch.testing.assert_close(feature_map, tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))


# ---- What is refused ----


@pytest.mark.parametrize(
    ("name", "config", "kwargs", "message"),
    [
        ("ViTMAEModel", "ViTMAEConfig", VIT, r"sees whole images, got ViTMAEModel, .* pass ViTModel.from_pretrained"),
        ("HieraForPreTraining", "HieraConfig", MASKED_HIERA, r"HieraForPreTraining, .* pass HieraModel.from_pretr"),
        ("VideoMAEModel", "VideoMAEConfig", VIT, "got VideoMAEModel, which takes videos"),
        ("VJEPA2Model", "VJEPA2Config", {**VIT, "pred_hidden_size": 24}, "got VJEPA2Model, which takes videos"),
        ("CLIPTextModel", "CLIPTextConfig", TOWERS["text_config"], "got CLIPTextModel, which takes text: .*Vision"),
    ],
)
def test_models_of_no_single_images(make_trainer, name, config, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(teacher_model=make(name, config, **kwargs))


def test_a_student_of_patches(make_trainer):
    student = make("Siglip2ForImageClassification", "Siglip2Config", **TOWERS | {"vision_config": NAFLEX})
    with pytest.raises(ValueError, match=r"model to take whole images, got Siglip2ForImageClassification, .* patches"):
        make_trainer(student)


def test_videos(make_trainer):
    videos = [{"pixel_values": torch.randn(4, 3, 32, 32), "labels": 0} for _ in range(4)]
    with pytest.raises(ValueError, match=r"images \(batch_size, .*\), got .*\(1, 4, 3, 32, 32\).*neither a video"):
        make_trainer(teacher_model=make_dinov2(), train_dataset=videos)


def test_another_size_is_the_advice_only_where_it_is_the_cause(make_trainer):
    rows = make_images(size=(64, 64))
    with pytest.raises(ValueError, match=r"built for 32x32 pixels: pass the image processor .* teacher_processor\.$"):
        make_trainer(make_resnet(), make("ViTModel", "ViTConfig", **VIT), train_dataset=rows)
    with pytest.raises(ValueError) as error:
        make_trainer(teacher_model=make_dinov2(), teacher_layers=["feature_maps[0]"])
    assert "teacher_processor" not in str(error.value)
