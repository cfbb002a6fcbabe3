"""
torchvision's classifiers, as teachers with no layer named and, in the guide's wrapper, as students.

torchvision is not among the requirements: `make test-torchvision` runs these tests in an environment that has it.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import make_images, make_resnet, same


try:
    from torchvision import models
except (ImportError, RuntimeError) as error:  # its operators, registered for another torch
    pytest.skip(f"torchvision cannot be imported: {error}", allow_module_level=True)

from iekd_hf.features.layers import default_layers
from iekd_hf.features.tap import FeatureTap


# architecture: (layer, what makes its map of an image)
ARCHITECTURES = {
    "alexnet": ("features", lambda m, x: m.features(x)),
    "convnext_tiny": ("features", lambda m, x: m.features(x)),
    "densenet121": ("features", lambda m, x: m.features(x)),
    "efficientnet_b0": ("features", lambda m, x: m.features(x)),
    "maxvit_t": ("blocks.3", lambda m, x: m.blocks[3](m.blocks[2](m.blocks[1](m.blocks[0](m.stem(x)))))),
    "mnasnet0_5": ("layers", lambda m, x: m.layers(x)),
    "mobilenet_v2": ("features", lambda m, x: m.features(x)),
    "mobilenet_v3_small": ("features", lambda m, x: m.features(x)),
    "regnet_y_400mf": ("trunk_output", lambda m, x: m.trunk_output(m.stem(x))),
    "resnet18": ("layer4", lambda m, x: torch.nn.Sequential(*list(m.children())[:-2])(x)),
    "shufflenet_v2_x0_5": ("conv5", lambda m, x: torch.nn.Sequential(*list(m.children())[:-1])(x)),
    "squeezenet1_1": ("features", lambda m, x: m.features(x)),
    "swin_t": ("permute", lambda m, x: m.norm(m.features(x)).movedim(3, 1)),
}


def make_tiny_vit() -> models.VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    return models.VisionTransformer(**sizes, num_classes=3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_map_before_the_pooling_is_found(architecture):
    layer, own_map = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = models.get_model(architecture, num_classes=3).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert default_layers(model) == [layer]
    assert model.training and same(model.state_dict(), before) and torch.equal(torch.get_rng_state(), state)
    pixels = torch.randn(1, 3, *([224, 224] if architecture == "maxvit_t" else [96, 64]))
    tap = FeatureTap(model.eval())
    tap.attach()
    with torch.no_grad():
        for stop_after_last in (True, False):
            _, (feature_map,) = tap.run({"x": pixels}, stop_after_last)
            assert torch.equal(feature_map, own_map(model, pixels))


def test_a_vits_is_after_its_final_norm():
    model, pixels, seen = make_tiny_vit().eval(), torch.randn(2, 3, 32, 32), []
    model.encoder.ln.register_forward_hook(lambda module, args, output: seen.append(output))
    tap = FeatureTap(model)
    tap.attach()
    with torch.no_grad():
        _, (feature_map,) = tap.run({"x": pixels})
    assert tap.layers == ["encoder"]
    assert torch.equal(feature_map, seen[-1][:, 1:].transpose(1, 2).unflatten(2, (4, 4)))


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "densenet121", "vit"])
def test_as_a_teacher(make_trainer, architecture):
    """Logits as well: DenseNet writes over its last layer's output, by an activation in place."""
    if architecture == "vit":
        teacher = make_tiny_vit()
    else:
        torch.manual_seed(0)
        teacher = models.get_model(architecture, num_classes=3)
    rows = make_images(8, size=(32, 32) if architecture == "vit" else (64, 64))
    with pytest.warns(UserWarning, match="has no config.id2label: its 3 logits are taken"):
        trainer = make_trainer(teacher_model=teacher, train_dataset=rows, factor_channels=8, lambda_kd=1.0)
    trainer.train()
    assert trainer.state.log_history[-2]["inheritance_loss"] > 0
    trainer.teacher.tap.attach()
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    maps = [trainer.teacher.feature_maps(batch, with_logits)[0][0] for with_logits in (True, False)]
    assert torch.equal(*maps)


def test_a_size_that_it_does_not_take(make_trainer):
    with pytest.raises(ValueError, match=r"got: Wrong image height.* It was built for 32x32 pixels: .*teacher_proc"):
        make_trainer(teacher_model=make_tiny_vit(), train_dataset=make_images(size=(64, 64)))


def test_one_is_no_student_by_itself(make_trainer, make_mutual):
    with pytest.raises(ValueError, match=r"model to be a PreTrainedModel, .* got ResNet: wrap .*TimmWrapperFor"):
        make_trainer(models.resnet18(num_classes=3))
    with pytest.raises(ValueError, match=r"models\[1\] to be a PreTrainedModel, .* got ResNet: wrap"):
        make_mutual([make_resnet(8), models.resnet18(num_classes=3)])


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    """Run the guide's block and return what it defines."""
    guide = (Path(__file__).parent.parent / "docs" / "guide" / "models.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "class Torchvision" in b]
    defined = {"__name__": "wrapper"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("guide"))
        exec(block, defined)
    assert type(defined["small"].network) is models.ResNet
    return defined


@pytest.mark.parametrize("architecture", ["resnet18", "shufflenet_v2_x0_5"])
def test_the_guides_wrapper_as_a_student(make_trainer, tmp_path, wrapper, architecture):
    kind, config = wrapper["TorchvisionForImageClassification"], wrapper["TorchvisionConfig"]

    def make(seed):
        torch.manual_seed(seed)
        return kind(config(architecture, num_labels=3))

    common = {"train_dataset": make_images(8, size=(64, 64)), "save_strategy": "steps", "save_steps": 1}
    straight = make_trainer(make(0), **common)
    assert straight.student_side.tap.layers == [f"network.{ARCHITECTURES[architecture][0]}"]
    straight.train()
    assert straight.state.log_history[-2]["inheritance_loss"] > 0
    straight.save_model()
    loaded = kind.from_pretrained(tmp_path / "out")
    assert loaded.config.architecture == architecture and same(loaded.state_dict(), straight.student.state_dict())
    resumed = make_trainer(make(5), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert same(resumed.student.state_dict(), straight.student.state_dict())


def test_the_wrapper_keeps_torchvisions_weights(wrapper):
    torch.manual_seed(0)
    plain = models.resnet18(num_classes=3)
    torch.manual_seed(0)
    wrapped = wrapper["TorchvisionForImageClassification"](wrapper["TorchvisionConfig"]("resnet18", num_labels=3))
    assert same(wrapped.network.state_dict(), plain.state_dict())
