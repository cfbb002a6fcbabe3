"""
Models of timm, alone as teachers and wrapped by Transformers as either, and a ResNet of torchvision as a teacher.

Neither is among the requirements: `make test-torchvision` runs these tests in an environment that has both.
"""

import copy
import json

import PIL.Image
import pytest
import torch
from conftest import make_images, make_resnet, same


try:
    import timm
except (ImportError, RuntimeError) as error:  # torchvision's operators, registered for another torch
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperImageProcessor,
    ViTImageProcessorPil,
)
from transformers.utils import is_timm_available

from iekd_hf import BatchAugmentation
from iekd_hf.features.tap import FeatureTap
from iekd_hf.models.loading import find_processor
from iekd_hf.teacher.pixels import TeacherPixels


needs_wrapper = pytest.mark.skipif(not is_timm_available(), reason="Transformers finds no timm with torchvision")

# architecture: (arguments, layer of the last feature map, its channels)
ARCHITECTURES = {
    "resnet18": ({}, "layer4", 512),
    "vit_tiny_patch16_224": ({"img_size": 32, "depth": 2}, "norm", 192),
    "convnext_atto": ({}, "norm_pre", 320),
    "efficientnet_lite0": ({}, "bn2", 1280),
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "depths": (1, 1, 1, 1)}, "norm", 768),
}


def wrapped(architecture: str, seed: int = 0) -> TimmWrapperForImageClassification:
    torch.manual_seed(seed)
    arguments = ARCHITECTURES[architecture][0]
    labels = {"id2label": {i: f"LABEL_{i}" for i in range(3)}, "label2id": {f"LABEL_{i}": i for i in range(3)}}
    config = TimmWrapperConfig(architecture=architecture, model_args=arguments, **labels)
    return TimmWrapperForImageClassification(config)


def images(architecture: str) -> list[dict]:
    size = ARCHITECTURES[architecture][0].get("img_size", 64)
    return make_images(8, size=(size, size))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_map_is_what_forward_features_returns(architecture):
    arguments, layer, channels = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=3, **arguments).eval()
    before = copy.deepcopy(model.state_dict())
    tap = FeatureTap(model)
    assert tap.layers == [layer] and same(model.state_dict(), before)
    pixels = torch.stack([image["pixel_values"] for image in images(architecture)[:2]])
    with torch.no_grad():
        tap.attach()
        _, (feature_map,) = tap.run({"x": pixels})
        tap.detach()
        features = model.forward_features(pixels)
    assert feature_map.shape[:2] == (2, channels)
    if features.ndim == 3:
        features = features[:, -feature_map[0, 0].numel() :].transpose(1, 2).unflatten(2, feature_map.shape[2:])
    elif features.shape != feature_map.shape:  # Swin is channels last
        features = features.movedim(3, 1)
    assert torch.equal(feature_map, features)


@needs_wrapper
def test_the_values_of_timms_processor():
    """Of its data config, the only place where they are."""
    mean, std = [0.1, 0.2, 0.3], [0.2, 0.3, 0.4]
    own = TimmWrapperImageProcessor({"input_size": [3, 48, 48], "mean": mean, "std": std, "crop_pct": 1.0})
    picture = PIL.Image.new("RGB", (48, 48), (40, 90, 200))
    expected = own(picture, return_tensors="pt")["pixel_values"]
    raw = torch.tensor([40, 90, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 48, 48)
    torch.testing.assert_close(BatchAugmentation.from_processor(own)(raw), expected)
    student = ViTImageProcessorPil(size={"height": 32, "width": 32})
    pixels = TeacherPixels.between(student, own)(student(picture, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(pixels, expected, rtol=1e-4, atol=1e-4)


@needs_wrapper
def test_timms_processor_is_found_by_name(make_trainer, tmp_path):
    """A repository of timm has no preprocessor_config.json: the values are in the model's configuration."""
    values = {"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.3, 0.4), "input_size": (3, 48, 48)}
    model = timm.create_model("resnet18", pretrained_cfg_overlay=values)
    timm.models.save_for_hf(model, tmp_path / "teacher", safe_serialization=True)
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    del config["model_args"]  # published repositories have none, and Transformers has num_classes twice with it
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    assert not (tmp_path / "teacher" / "preprocessor_config.json").exists()
    processor = find_processor(str(tmp_path / "teacher"))
    assert tuple(processor.data_config["mean"]) == values["mean"]
    student = ViTImageProcessorPil(size={"height": 32, "width": 32})
    trainer = make_trainer(teacher_model=str(tmp_path / "teacher"), processing_class=student)
    assert trainer.teacher.teacher_pixels.size == {"height": 48, "width": 48}


@needs_wrapper
@pytest.mark.parametrize("architecture", ["resnet18", "vit_tiny_patch16_224"])
def test_wrapped_as_student_and_bare_as_teacher(make_trainer, tmp_path, architecture):
    arguments, layer, _ = ARCHITECTURES[architecture]
    teacher = timm.create_model(architecture, num_classes=5, **arguments)
    rows = images(architecture)
    common = {"train_dataset": rows, "factor_channels": 8, "save_strategy": "steps", "save_steps": 1}
    straight = make_trainer(wrapped(architecture), teacher, **common)
    assert straight.student_side.tap.layers == [f"timm_model.{layer}"] and straight.teacher.tap.layers == [layer]
    straight.train()
    assert straight.state.log_history[-2]["inheritance_loss"] > 0
    straight.save_model()
    loaded = TimmWrapperForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert same(loaded.state_dict(), straight.student.state_dict())
    resumed = make_trainer(wrapped(architecture, seed=5), teacher, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert same(resumed.student.state_dict(), straight.student.state_dict())


@needs_wrapper
def test_wrapped_as_teacher_of_another_family(make_trainer):
    trainer = make_trainer(make_resnet(8), wrapped("resnet18"), train_dataset=images("resnet18"), factor_channels=8)
    trainer.train()
    assert trainer.state.log_history[-2]["inheritance_loss"] > 0


@pytest.mark.parametrize("fast_teacher", [True, False])
def test_a_resnet_of_torchvision_is_a_teacher(make_trainer, fast_teacher):
    torch.manual_seed(0)
    teacher = resnet18(num_classes=3).eval()
    rows = images("resnet18")
    own = {"teacher_layers": ["layer4"], "factor_channels": 8, "fast_teacher": fast_teacher, "lambda_kd": 1.0}
    with pytest.warns(UserWarning, match="has no config.id2label: its 3 logits are taken"):
        trainer = make_trainer(make_resnet(8), teacher, train_dataset=rows, **own)
    trainer.train()
    assert trainer.state.log_history[-2]["inheritance_loss"] > 0
    pixels = torch.stack([image["pixel_values"] for image in rows[:2]])
    with torch.no_grad():
        f_T = create_feature_extractor(teacher, ["layer4"])(pixels)["layer4"]
        trainer.teacher.tap.attach()
        (F_T,), logits = trainer.teacher({"pixel_values": pixels, "labels": torch.zeros(2)}, with_logits=True)
        torch.testing.assert_close(logits, teacher(pixels), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(F_T, trainer.teacher.paraphrasers[0].encode(f_T), rtol=1e-4, atol=1e-4)
