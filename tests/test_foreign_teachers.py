"""Teachers that are not of Transformers: modules as torchvision and timm have them."""

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from conftest import make_images, make_resnet
from torch import nn
from transformers import ViTImageProcessorPil

from iekd_hf import BatchAugmentation, DecodedImages, list_layers
from iekd_hf.teacher.pixels import TeacherPixels


class Block(nn.Module):
    def __init__(self, inplanes: int, planes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, 2, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


class TorchvisionResNet(nn.Module):
    """torchvision's ResNet in small: one `x`, activations in place and used twice, a tensor of logits, no config."""

    def __init__(self, width: int = 16, num_classes: int = 3, seed: int = 2):
        torch.manual_seed(seed)
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(8, 8))
        self.layer4 = nn.Sequential(Block(8, width))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer4(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class WithDictionary(TorchvisionResNet):
    def forward(self, image, scale: float = 1.0):
        return {"logits": scale * super().forward(image)}


class WithTuple(TorchvisionResNet):
    def forward(self, x):
        return (super().forward(x),)


def settle(teacher: nn.Module) -> nn.Module:
    """Give BatchNorm statistics that folding has to take into account."""
    with torch.no_grad():
        for _ in range(20):
            teacher.train()(torch.randn(8, 3, 32, 32))
    return teacher.eval()


@pytest.mark.parametrize("teacher_class", [TorchvisionResNet, WithDictionary])
@pytest.mark.parametrize("fast_teacher", [True, False])
def test_factors_and_logits_are_the_modules_own(make_trainer, teacher_class, fast_teacher):
    teacher = settle(teacher_class())
    with pytest.warns(UserWarning, match="has no config.id2label: its 3 logits are taken"):
        trainer = make_trainer(
            teacher_model=teacher,
            teacher_layers=["layer4"],
            fast_teacher=fast_teacher,
            lambda_kd=1.0,
            temperature=2.0,
            max_steps=1,
            train_sampling_strategy="sequential",
        )
    trainer.train()
    pixels = torch.stack([image["pixel_values"] for image in make_images(4)])
    with torch.no_grad():
        x = teacher.layer1(teacher.relu(teacher.bn1(teacher.conv1(pixels))))
        f_T = teacher.layer4(x)
        z_T = teacher.fc(f_T.mean(dim=(2, 3)))
        trainer.teacher.tap.attach()
        (F_T,), logits = trainer.teacher({"pixel_values": pixels, "labels": torch.zeros(4)}, with_logits=True)
    torch.testing.assert_close(logits, z_T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F_T, trainer.teacher.paraphrasers[0].encode(f_T), rtol=1e-4, atol=1e-4)
    # The loss of the first step, which both have seen: the student as it started, in train mode.
    z_S = make_resnet(8, seed=1).train()(pixels).logits
    kl = F.kl_div(F.log_softmax(z_S / 2, 1), F.softmax(z_T / 2, 1), reduction="batchmean") * 4
    assert trainer.state.log_history[-2]["kd_loss"] == pytest.approx(kl.item(), rel=1e-4)


def test_the_teachers_processor_holds_for_a_module_too(make_trainer):
    """Its own mean, deviation and size, from a batch that was made for the student."""
    size = {"size": {"height": 32, "width": 32}}
    student = ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3, **size)
    own = ViTImageProcessorPil(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], **size)
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8))
    seen = []
    teacher = TorchvisionResNet()
    teacher.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["x"]), with_kwargs=True)
    trainer = make_trainer(
        teacher_model=teacher,
        teacher_layers=["layer4"],
        fast_teacher=False,
        processing_class=student,
        teacher_processor=own,
    )
    trainer.teacher.tap.attach()
    trainer.teacher.feature_maps(student(picture, return_tensors="pt"))
    torch.testing.assert_close(seen[-1], own(picture, return_tensors="pt")["pixel_values"], rtol=1e-4, atol=1e-4)


class TimmProcessor(t.BaseImageProcessor):
    """What timm's, as Transformers wraps it, holds and does; it can be made where timm and torchvision are, alone."""

    def __init__(self, mean, std, size):
        super().__init__()
        self.data_config = {"input_size": (3, size, size), "mean": mean, "std": std}

    def preprocess(self, images, return_tensors="pt"):
        images = images.resize(self.data_config["input_size"][1:])
        pixels = torch.from_numpy(np.array(images)).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(self.data_config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        return t.BatchFeature({"pixel_values": (pixels - mean) / std})


VALUES = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SIZE = {"size": {"height": 32, "width": 32}}
PROCESSORS = {
    "ViT": t.ViTImageProcessorPil(**SIZE),
    "ConvNeXt": t.ConvNextImageProcessorPil(do_resize=False, **VALUES),
    "MobileViT": t.MobileViTImageProcessorPil(do_center_crop=False, **SIZE),
    "MobileViT in RGB": t.MobileViTImageProcessorPil(do_center_crop=False, do_flip_channel_order=False, **SIZE),
    "LayoutLMv2": t.LayoutLMv2ImageProcessorPil(apply_ocr=False, **SIZE),  # BGR, which no attribute says
    "EfficientNet": t.EfficientNetImageProcessorPil(**SIZE, **VALUES),
    "EfficientNet without its top": t.EfficientNetImageProcessorPil(include_top=False, **SIZE, **VALUES),
    "EfficientNet with an offset": t.EfficientNetImageProcessorPil(
        rescale_factor=1 / 127.5, rescale_offset=True, **SIZE, **VALUES
    ),
    "timm": TimmProcessor((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 32),
}


@pytest.mark.parametrize("teacher", PROCESSORS)
@pytest.mark.parametrize("student", PROCESSORS)
def test_the_teachers_pixels_are_those_of_its_processor(student, teacher):
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8))
    pixels, expected = (
        PROCESSORS[name](picture, return_tensors="pt")["pixel_values"].float() for name in (student, teacher)
    )
    to_teacher = TeacherPixels.between(PROCESSORS[student], PROCESSORS[teacher])
    torch.testing.assert_close(pixels if to_teacher is None else to_teacher(pixels), expected, rtol=1e-3, atol=1e-3)
    assert student != teacher or to_teacher is None


def test_image_processors_are_found_in_processors_of_several_inputs(make_trainer):
    """As SAM's and CLIP's are."""
    own = t.SamProcessor(t.SamImageProcessorPil(do_resize=False, do_pad=False, image_mean=[0.1] * 3))
    student = t.SamProcessor(t.SamImageProcessorPil(do_resize=False, do_pad=False))
    pictures = PIL.Image.new("RGB", (32, 32), (51, 102, 204))
    pixels, expected = (each.image_processor(pictures, return_tensors="pt")["pixel_values"] for each in (student, own))
    for processing_class, teacher in ((student, own), (student.image_processor, own), (student, own.image_processor)):
        trainer = make_trainer(processing_class=processing_class, teacher_processor=teacher)
        torch.testing.assert_close(trainer.teacher.teacher_pixels(pixels), expected, rtol=1e-4, atol=1e-4)
    raw = torch.tensor([51, 102, 204], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(BatchAugmentation.from_processor(own)(raw), expected, rtol=1e-4, atol=1e-4)


def test_a_timm_teacher_sees_its_own_size():
    student = t.ViTImageProcessorPil(**SIZE)
    to_teacher = TeacherPixels.between(student, TimmProcessor([0.5] * 3, [0.5] * 3, 48))
    assert to_teacher(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 48, 48)


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (
            t.MobileViTImageProcessorPil(do_normalize=True),
            r"which turns the colour \[51, 102, 204\] into \[0.8, 0.4, 0.2\]",
        ),
        (t.SuperGlueImageProcessorPil(), "which makes no pixel_values of an image alone"),
        (t.Pix2StructImageProcessorPil(), "which normalises without an image_mean"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(processor, reason):
    message = f"got {type(processor).__name__}, {reason}.*give one that does"
    with pytest.raises(ValueError, match=message):
        TeacherPixels.between(t.ViTImageProcessorPil(), processor)
    with pytest.raises(ValueError, match=message):
        BatchAugmentation.from_processor(processor)
    assert TeacherPixels.between(processor, type(processor)(**processor.to_dict())) is None  # on both sides it may


def test_it_can_be_cached(make_trainer):
    import datasets

    generator = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(generator.integers(0, 255, (32, 32, 3)).astype(np.uint8)) for _ in range(8)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [i % 3 for i in range(8)]})
    images = DecodedImages.decode(rows.cast_column("image", datasets.Image()))
    logs = []
    for cached in (True, False):
        trainer = make_trainer(
            teacher_model=settle(TorchvisionResNet()),
            teacher_layers=["layer4"],
            train_dataset=images,
            augmentation=BatchAugmentation(mean=[0.5] * 3, std=[0.5] * 3),
            cache_teacher=cached,
            cache_views=1,
            lambda_kd=1.0,
        )
        trainer.train()
        logs.append(trainer.state.log_history[-2])
    for name in ("inheritance_loss", "kd_loss"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=2e-3)


def test_what_the_logit_term_cannot_use_is_refused(make_trainer, tmp_path):
    layer = {"teacher_layers": ["layer4"]}
    with pytest.raises(ValueError, match=r"3 logits of the teacher for lambda_kd > 0.*\(1, 5\) of TorchvisionResNet"):
        make_trainer(teacher_model=TorchvisionResNet(num_classes=5), lambda_kd=1.0, **layer)
    with pytest.raises(ValueError, match=r"tensor of logits or a dictionary with `logits`, got tuple"):
        make_trainer(teacher_model=WithTuple(), lambda_kd=1.0, **layer)
    make_trainer(teacher_model=TorchvisionResNet(num_classes=5), **layer)  # the feature losses do not mind


class Segmenter(TorchvisionResNet):
    def forward(self, x):
        return {"out": F.interpolate(self.layer4(self.layer1(self.conv1(x))), scale_factor=8)}


def test_its_layer_is_found_or_named_and_can_be_listed(make_trainer, capsys):
    for kind in (TorchvisionResNet, WithDictionary, WithTuple):
        assert make_trainer(teacher_model=kind()).teacher.tap.layers == ["layer4"]
    with pytest.raises(ValueError, match=r"last feature map is known, got Segmenter: .*list_layers"):
        make_trainer(teacher_model=Segmenter())
    with pytest.raises(ValueError, match=r"got 'layer3'; close matches: layer[14]"):
        make_trainer(teacher_model=TorchvisionResNet(), teacher_layers=["layer3"])
    assert list_layers(TorchvisionResNet(), 32)["layer4"] == (16, 4, 4)
