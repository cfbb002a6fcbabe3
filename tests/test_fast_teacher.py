"""The fast teacher gives the same maps as the given one, which stays as it was; what a step must not do."""

import contextlib
import copy

import pytest
import torch
from conftest import make_images, make_resnet, make_vit, same
from test_whole_batches import make_augmentation, make_decoded
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    RegNetConfig,
    RegNetForImageClassification,
    TrainerCallback,
    TrainingArguments,
)

from iekd_hf import CifarResNetConfig, CifarResNetForImageClassification, Paraphraser
from iekd_hf.features.tap import FeatureTap
from iekd_hf.teacher.fast_copy import copy_fast, fold_batchnorm


# With how many BatchNorm layers each has, all of them behind a convolution.
FAMILIES = {
    "CIFAR ResNet": (
        lambda: CifarResNetForImageClassification(CifarResNetConfig.from_depth(8, num_labels=10)),
        9,
    ),
    "ResNet": (lambda: make_resnet(16), 6),
    "RegNet": (
        lambda: RegNetForImageClassification(
            RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8)
        ),
        9,
    ),
    "MobileNet V2": (
        lambda: MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, image_size=32)),
        52,
    ),
    "EfficientNet": (
        lambda: EfficientNetForImageClassification(
            EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.25, image_size=32, hidden_dim=320)
        ),
        None,
    ),
    "ConvNeXt": (lambda: ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16, 16, 16])), 0),
    "ViT": (make_vit, 0),
}


def with_history(model: torch.nn.Module) -> torch.nn.Module:
    """Give BatchNorm layers statistics and weights as training leaves them, not those they start with."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight, 0.5)):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return model.eval()


@torch.no_grad()
def maps_of(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    tap = FeatureTap(model)
    tap.attach()
    try:
        return tap.run({"pixel_values": x})[1]
    finally:
        tap.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_gives_the_same_maps(family):
    build, norms = FAMILIES[family]
    torch.manual_seed(0)
    model = with_history(build())
    before, sample, x = copy.deepcopy(model.state_dict()), torch.randn(1, 3, 32, 32), torch.randn(4, 3, 32, 32)
    fast = copy_fast(model, lambda m: maps_of(m, sample), FeatureTap(model).layers)
    (expected,), (got,) = maps_of(model, x), maps_of(fast, x)
    assert (got - expected).norm() < 2e-6 * expected.norm()
    left = sum(isinstance(module, torch.nn.BatchNorm2d) for module in fast.modules())
    has = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert left == 0 and (norms is None or has == norms)
    kernels = [m.weight for m in fast.modules() if isinstance(m, torch.nn.Conv2d) and min(m.weight.shape) > 1]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels) == (family != "ViT")
    assert same(model.state_dict(), before)
    assert all(w.is_contiguous() for w in model.parameters())


class UsesTheConvolutionToo(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y  # no module sees this second use


def test_what_folding_would_change_is_not_folded():
    model, x = with_history(UsesTheConvolutionToo()), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        fast = copy_fast(model, lambda m: [m(x)])
        assert isinstance(fast.norm, torch.nn.BatchNorm2d)
        torch.testing.assert_close(fast(x), model(x))


def test_a_layer_that_is_tapped_or_run_twice_is_not_folded():
    conv, norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert fold_batchnorm(torch.nn.Sequential(conv, norm).eval(), lambda m: m(x), keep=["0"]) == 0
        assert fold_batchnorm(torch.nn.Sequential(conv, norm, conv, norm).eval(), lambda m: m(x)) == 0
        assert fold_batchnorm(torch.nn.Sequential(conv, norm).eval(), lambda m: m(x)) == 1


def losses(trainer) -> list[dict]:
    names = ("loss", "task_loss", "inheritance_loss", "exploration_loss", "kd_loss")
    return [{name: logs[name] for name in names} for logs in trainer.state.log_history if "loss" in logs]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_takes_the_same_course(make_trainer, compiled):
    courses, paraphraser = [], with_history(Paraphraser(16, 8))
    for fast in (False, True):
        trainer = make_trainer(
            teacher_model=with_history(make_resnet(16, seed=2)),
            paraphraser=paraphraser,
            fast_teacher=fast,
            compile_teacher=fast and compiled,
            lambda_kd=1.0,
            max_steps=5,
            optim="sgd",
        )
        trainer.train()
        assert trainer.teacher.fast == fast
        courses.append(losses(trainer))
    for slow, fast in zip(*courses, strict=True):
        assert fast == pytest.approx(slow, rel=1e-4, abs=1e-5)  # kd_loss is a small difference of large logits


def test_a_bf16_teacher_is_near(make_trainer):
    images = make_images(4)
    x = {"pixel_values": torch.stack([image["pixel_values"] for image in images])}
    teacher, paraphraser = with_history(make_resnet(16, seed=2)), with_history(Paraphraser(16, 8))
    factors = []
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(teacher_model=teacher, paraphraser=paraphraser, teacher_dtype=dtype)
        trainer.teacher.tap.attach()
        factors.append(trainer.teacher(x)[0][0])
        assert trainer.teacher.dtype == getattr(torch, dtype)
        assert next(teacher.parameters()).dtype == torch.float32
        trainer.train()
    assert factors[1].dtype == torch.float32
    assert 0 < (factors[1] - factors[0]).norm() < 0.02 * factors[0].norm()


def test_the_teachers_side_makes_no_graph(make_trainer):
    trainer = make_trainer(paraphraser=Paraphraser(16, 8), lambda_kd=1.0)
    trainer.teacher.tap.attach()
    with torch.enable_grad():
        factors, logits = trainer.teacher({"pixel_values": torch.randn(2, 3, 32, 32)}, with_logits=True)
    assert all(tensor.grad_fn is None and not tensor.requires_grad for tensor in (*factors, logits))


class CountReads(TorchDispatchMode):
    """Count what makes the host wait for a device: a tensor's value that Python asks for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trainer", ["iekd", "cached", "mutual"])
def test_no_step_waits_for_the_device(make_trainer, make_mutual, trainer):
    counts = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            counts.append(reads.count)

    common = {
        "max_steps": 6,
        "optim": "sgd",
        "logging_strategy": "no",
        "callbacks": [Watch()],
        "train_dataset": make_images(24) if trainer == "iekd" else make_decoded(24),
        "augmentation": make_augmentation(),
    }
    if trainer == "cached":
        trainer = make_trainer(paraphraser=Paraphraser(16, 8), lambda_kd=1.0, cache_teacher=True, **common)
    elif trainer == "iekd":
        trainer = make_trainer(paraphraser=Paraphraser(16, 8), lambda_kd=1.0, **common)
    else:
        trainer = make_mutual(mutual_loss="ie+kl", **common)
    with CountReads() as reads:
        trainer.train()
        assert torch.ones(()).item() == 1 and reads.count > counts[-1]  # a read is counted
    assert len(set(counts)) == 1 and len(counts) == 6


class NoteOtherDevices(TorchDispatchMode):
    """Note what makes a tensor that is not on the meta device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.found += [str(func) for tensor in tensors if tensor.device.type != "meta"]
        return result


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ie-ft+kd", "lambda_schedule": "cosine"},
        {"method": "ie-at"},
        {"method": "od+kd", "kd_distance": "dist"},
        {"method": "kd", "kd_distance": "dkd"},
        {"method": "ie-ft+kd", "kd_distance": "standardized", "exploration_distance": "cka"},
    ],
)
def test_a_step_makes_no_tensor_on_another_device(make_trainer, monkeypatch, settings):
    """With all that trains and teaches on the meta device, as on a GPU; a value that is read there is an error."""
    images = make_images(8)
    images[0]["labels"] = -100
    trainer = make_trainer(max_steps=1, train_dataset=images, **settings)
    trainer.train()
    for side in (trainer.student_side, trainer.teacher):
        side.to("meta")
    trainer.student_side.train()
    trainer.student_side.tap.attach()
    trainer.teacher.tap.attach()
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # has no meta device
    labels = torch.empty(4, dtype=torch.long, device="meta")
    with NoteOtherDevices() as noted:
        loss = trainer.compute_loss(
            trainer.student_side, {"pixel_values": torch.empty(4, 3, 32, 32, device="meta"), "labels": labels}
        )
        loss.backward()
        assert loss.device.type == "meta" and noted.found == []
        torch.ones(())
    assert noted.found == ["aten.ones.default"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_channels_last_trains_the_same_student(make_trainer, tmp_path, precision):
    states, paraphraser = [], with_history(Paraphraser(16, 8))
    for channels_last in (False, True):
        trainer = make_trainer(
            paraphraser=paraphraser, channels_last=channels_last, bf16=precision == "bf16", optim="sgd"
        )
        kernel = trainer.student_side.inheritance_encoders[0].layers[1].weight
        trainer.train()
        assert kernel.is_contiguous(memory_format=torch.channels_last) == channels_last
        trainer.save_model(tmp_path / "saved")
        states.append(type(trainer.student).from_pretrained(tmp_path / "saved").state_dict())
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 2e-2, "atol": 2e-3}
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, **tolerance, msg=name)


def test_no_norm_of_the_gradient_is_computed_without_clipping(make_trainer):
    with_clipping, without = make_trainer(max_grad_norm=1.0), make_trainer(max_grad_norm=0.0)
    for trainer in (with_clipping, without):
        trainer.train()
    assert "grad_norm" in with_clipping.state.log_history[0] and "grad_norm" not in without.state.log_history[0]
    assert with_clipping.state.total_flos == without.state.total_flos > 0
