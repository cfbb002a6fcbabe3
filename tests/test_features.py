"""Feature maps of any model: tokens, grids, sizes, layer names, and how little of the teacher is run."""

import pytest
import torch
from conftest import make_resnet, make_vit
from torch import nn
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from iekd_hf import list_layers
from iekd_hf.features.layers import backbone_layers
from iekd_hf.features.maps import split_index, to_map
from iekd_hf.features.tap import FeatureTap
from iekd_hf.method.padding import match_sizes
from iekd_hf.teacher.frozen import FrozenTeacher


def maps_of(model, pixels, layers=None, **kwargs):
    tap = FeatureTap(model.eval(), layers)
    tap.attach()
    try:
        with torch.no_grad():
            return tap.run({"pixel_values": pixels}, **kwargs)
    finally:
        tap.detach()


def test_a_cnns_map_is_its_last_hidden_state():
    model, pixels = make_resnet(8), torch.randn(2, 3, 32, 48)
    outputs, (feature_map,) = maps_of(model, pixels)
    assert torch.equal(feature_map, model.resnet(pixels).last_hidden_state)
    assert outputs.logits.shape == (2, 3)


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (48, 16), (8, 64)])
def test_tokens_lie_on_the_images_grid(size):
    """Patch (i, j) of the map is the output for the pixels around (8i, 8j): checked by disturbing one patch."""
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            patch_size=8,
            image_size=size,
        )
    ).eval()
    layers = ["vit.embeddings"]
    pixels = torch.randn(1, 3, *size)
    (before,) = maps_of(model, pixels, layers)[1]
    grid = (size[0] // 8, size[1] // 8)
    assert before.shape == (1, 16, *grid)
    row, column = grid[0] - 1, grid[1] // 2
    pixels[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
    (after,) = maps_of(model, pixels, layers)[1]
    moved = (after - before).abs().sum(dim=(0, 1)) > 0
    assert moved[row, column] and moved.sum() == 1


def test_class_and_register_tokens_are_dropped():
    config = Dinov2WithRegistersConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=8,
        image_size=32,
        num_register_tokens=4,
    )
    model, pixels = Dinov2WithRegistersForImageClassification(config).eval(), torch.randn(2, 3, 32, 32)
    (feature_map,) = maps_of(model, pixels)[1]
    tokens = model.dinov2_with_registers(pixels).last_hidden_state  # class, 4 registers, 16 patches
    assert tokens.shape == (2, 21, 16)
    assert torch.equal(feature_map.flatten(2).transpose(1, 2), tokens[:, 5:])


def test_the_final_norm_and_the_last_convolution_are_in_the_map():
    """hidden_states[-1] lacks them in Swin and MobileNetV2."""
    swin = SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    )
    with torch.no_grad():
        swin.swin.layernorm.weight.fill_(7)
    (feature_map,) = maps_of(swin, torch.randn(2, 3, 32, 64))[1]
    assert feature_map.shape == (2, 16, 4, 8)
    assert feature_map.std() == pytest.approx(7, rel=0.1)
    mobilenet = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25))
    assert maps_of(mobilenet, torch.randn(2, 3, 64, 64))[1][0].shape == (2, 1280, 2, 2)


def test_channels_last_maps_are_turned():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.turn = nn.Identity()

        def forward(self, pixel_values):
            return self.turn(self.conv(pixel_values).movedim(1, 3))

    model, pixels = Body(), torch.randn(2, 3, 32, 48)
    (feature_map,) = maps_of(model, pixels, ["turn"])[1]
    assert torch.equal(feature_map, model.conv(pixels))


def test_the_teachers_forward_stops_after_the_last_layer():
    model = make_resnet(8)
    ran = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    outputs, maps = maps_of(model, torch.randn(2, 3, 32, 32), ["resnet.encoder.stages.0"], stop_after_last=True)
    assert outputs is None and maps[0].shape == (2, 8, 8, 8)
    assert not any(name.startswith(("resnet.encoder.stages.1", "classifier")) for name in ran)


def test_the_teacher_makes_no_graph_and_stays_in_eval_mode():
    teacher = FrozenTeacher(make_resnet(8), FeatureTap(make_resnet(8)))
    model = teacher.teacher.train()
    teacher = FrozenTeacher(model, FeatureTap(model))
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    teacher.tap.attach()
    (feature_map,), logits = teacher.feature_maps({"pixel_values": torch.randn(2, 3, 32, 32), "labels": None}, True)
    assert not feature_map.requires_grad and not logits.requires_grad


def test_a_tap_sees_nothing_outside_of_its_run():
    """Gradient checkpointing runs layers again in the backward pass."""
    model = make_resnet(8)
    tap = FeatureTap(model)
    tap.attach()
    model(torch.randn(1, 3, 32, 32))
    assert not tap._outputs
    tap.attach()
    assert len(model.resnet._forward_hooks) == 1  # attached once
    tap.detach()
    assert not model.resnet._forward_hooks


def test_a_map_is_what_its_layer_gave_not_what_was_written_over_it():
    """DenseNet's last ReLU works in place, after the last layer."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(3, 8, 3, stride=2, padding=1)

        def forward(self, pixel_values):
            return self.features(pixel_values).relu_().mean(dim=(2, 3))

    model, pixels = Body(), torch.randn(2, 3, 32, 48)
    tap = FeatureTap(model, ["features"])
    tap.attach()
    maps = [tap.run({"pixel_values": pixels}, stop_after_last)[1][0] for stop_after_last in (True, False)]
    assert maps[0].min() < 0 and torch.equal(*maps)
    gradient = torch.autograd.grad(maps[1].sum(), model.features.bias)[0]
    assert torch.equal(gradient, torch.full((8,), 2.0 * 16 * 24))


def test_unknown_layer_lists_close_matches():
    with pytest.raises(ValueError, match=r"got 'resnet.encoder.stage.1'; close matches: .*resnet.encoder.stages.1\b"):
        FeatureTap(make_resnet(8), ["resnet.encoder.stage.1"])
    with pytest.raises(ValueError, match="list_layers"):
        FeatureTap(make_resnet(8), [""])


def test_layers_that_give_no_map():
    with pytest.raises(ValueError, match=r"'classifier' to give a map.*got \(2, 3\)"):
        maps_of(make_resnet(8), torch.randn(2, 3, 32, 32), ["classifier"])
    model = make_resnet(8)
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'unused' of ResNetForImageClassification to run"):
        maps_of(model, torch.randn(2, 3, 32, 32), ["unused"])
    with pytest.raises(ValueError, match="name its layer"):
        FeatureTap(nn.Sequential(nn.Conv2d(3, 3, 3)))


def test_list_layers(capsys):
    layers = list_layers(make_vit(), image_size=32)
    printed = capsys.readouterr().out
    assert layers["vit.encoder.layer.0" if "vit.encoder.layer.0" in layers else "vit.layers.0"] == (16, 4, 4)
    assert layers["vit"] == (16, 4, 4)
    for name, shape in layers.items():
        assert f"{name} " in printed and " x ".join(map(str, shape)) in printed
    model = make_resnet(8).train()
    for name, shape in list_layers(model, image_size=(32, 64)).items():
        assert maps_of(model, torch.randn(1, 3, 32, 64), [name])[1][0].shape[1:] == shape
    model.train()
    list_layers(model, 32)
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_match_sizes_averages():
    student, teacher = torch.arange(16.0).view(1, 1, 4, 4), torch.zeros(1, 1, 2, 4)
    matched, same_teacher, _ = match_sizes(student, teacher)
    assert matched.tolist() == [[[[2.0, 3.0, 4.0, 5.0], [10.0, 11.0, 12.0, 13.0]]]]
    assert same_teacher is teacher


def test_an_index_picks_one_of_several_maps():
    assert split_index("model.backbone.model[-1]") == ("model.backbone.model", -1)
    assert split_index("resnet") == ("resnet", None)


def test_the_backbone_of_a_detector():
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    config = DetrConfig(backbone_config=backbone, d_model=16, encoder_layers=1, decoder_layers=1)
    assert backbone_layers(DetrForObjectDetection(config)) == ["model.backbone.model[-1]"]


@pytest.mark.parametrize(
    ("size", "grid"), [((70, 402), (5, 28)), ((224, 330), (16, 23)), ((224, 224), (16, 16)), ((28, 140), (2, 10))]
)
def test_tokens_of_sizes_that_patches_do_not_divide(size, grid):
    """A grid with the class and register tokens in it may come nearer to the image's aspect."""
    patches = torch.arange(grid[0] * grid[1], dtype=torch.float32).view(1, -1, 1)
    tokens = torch.cat([torch.full((1, 5, 1), -1.0), patches], dim=1)
    assert torch.equal(to_map(tokens, size, (5, 0), "encoder").flatten(), patches.flatten())
    assert to_map(tokens, size, (5, 0), "encoder").shape == (1, 1, *grid)
