"""The analysis of a finished run: its measures by hand, and the pictures from nothing but the run's folder."""

import functools
import json
import re

import pytest
import torch
from conftest import make_dinov2, make_images, make_resnet, make_vit
from test_architectures import build
from transformers import Dinov2Model, ViTImageProcessorPil

from iekd_hf import Paraphraser
from iekd_hf.commands import analyze as analyze_student
from iekd_hf.commands.analyze import Tapped, active_neurons, cka_matrix, encode, seed_of, varying_share
from iekd_hf.teacher.pixels import TeacherPixels


def test_cka_of_maps_of_other_widths_against_its_definition():
    torch.manual_seed(0)
    first, second = torch.randn(5, 4, 2, 3), torch.randn(5, 7, 4, 6)
    pooled = torch.nn.functional.adaptive_avg_pool2d(second, (2, 3))
    x, y = (f.movedim(1, -1).reshape(30, -1).double() for f in (first, pooled))
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    matrix = cka_matrix({"first": first, "second": second})
    assert matrix[0, 1] == pytest.approx(expected.item(), rel=1e-5) == matrix[1, 0]
    assert matrix.diagonal() == pytest.approx([1.0, 1.0])


def test_active_neurons_by_hand():
    features = torch.tensor([[[5.0, 0.4], [0.0, 0.6]], [[0.0, 0.0], [1.0, 0.0]]]).view(2, 2, 1, 2)
    # Image 1: above 0.5 are 5.0 and 0.6; image 2: above 0.1 is 1.0. Each channel on one image at least.
    assert active_neurons(features) == {"active_share": pytest.approx(3 / 8), "active_channels": 1.0}


def test_the_share_of_factors_that_varies_by_hand():
    same = torch.tensor([[1.0, 2.0], [3.0, 6.0], [0.5, 1.0]]).view(3, 1, 1, 2)
    assert varying_share(same) == pytest.approx(0.0, abs=1e-6)
    # Directions (1, 0), (0.6, 0.8): their mean is (0.8, 0.4), of which the squared norm is 0.8.
    assert varying_share(torch.tensor([[2.0, 0.0], [3.0, 4.0]]).view(2, 2, 1, 1)) == pytest.approx(0.2)
    assert varying_share(torch.tensor([[1.0], [-1.0]]).view(2, 1, 1, 1)) == pytest.approx(1.0)


def test_grad_cam_of_a_half_against_its_definition():
    """Channels weigh by the mean gradient of the class over positions; only those of the half are summed."""
    model, pixels = make_resnet(8), torch.randn(2, 3, 32, 32)
    channels = torch.tensor([1, 4, 6])
    half = Tapped(model, channels=channels)
    heat = half.relevance(pixels)
    f = half.tap.run({"pixel_values": pixels})[1][0].detach().requires_grad_()
    logits = model.classifier(model.resnet.pooler(f))
    target = logits.argmax(dim=1)
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), f)
    cam = (gradient.mean(dim=(2, 3), keepdim=True) * f)[:, channels].sum(dim=1, keepdim=True).relu()
    cam = torch.nn.functional.interpolate(cam, (32, 32), mode="bilinear", align_corners=False)[:, 0]
    expected = cam / cam.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    assert torch.allclose(heat, expected, atol=1e-5)
    assert heat.shape == (2, 32, 32)


def test_grad_cam_of_tokens_against_its_definition():
    """The patches, without the class token, on the image's grid: here 4x6 of 8 pixels each."""
    model, pixels = make_dinov2().eval(), torch.randn(2, 3, 32, 48)
    heat = Tapped(model).relevance(pixels)
    with torch.no_grad():
        tokens = model.dinov2(pixels).last_hidden_state
    tokens.requires_grad_()
    logits = model.classifier(torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))
    (gradient,) = torch.autograd.grad(logits.amax(dim=1).sum(), tokens)
    cam = (gradient[:, 1:].mean(dim=1, keepdim=True) * tokens[:, 1:]).sum(dim=2).relu().view(2, 1, 4, 6)
    cam = torch.nn.functional.interpolate(cam, (32, 48), mode="bilinear", align_corners=False)[:, 0]
    assert cam.amax() > 0
    expected = cam / cam.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    assert torch.allclose(heat, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["ViT", "CvT", "Dinov2Model"])
def test_there_is_no_grad_cam_where_no_place_decides(name):
    """A ViT and a CvT classify by their class tokens alone, and a model without a head does not classify."""
    model, size = (make_dinov2().dinov2, 32) if name == "Dinov2Model" else build(name)
    network, pixels = Tapped(model), torch.randn(2, 3, size, size)
    assert network.relevance(pixels) is None
    assert network.features(pixels).shape[:2] == (2, 16)


def test_a_network_with_pixels_of_its_own():
    size = {"height": 32, "width": 32}
    pixels = TeacherPixels(ViTImageProcessorPil(size={"height": 16, "width": 16}), ViTImageProcessorPil(size=size))
    given = torch.randn(2, 3, 16, 16)
    network, plain = Tapped(make_resnet(8)), Tapped(make_resnet(8))
    network.own_pixels = pixels
    assert torch.equal(network.features(given), plain.features(pixels(given)))
    assert network.relevance(given).shape == (2, 16, 16)


def test_load_makes_no_weights_up(tmp_path):
    model = make_resnet(8)
    model.resnet.save_pretrained(tmp_path)
    model.config.architectures = ["ResNetForImageClassification"]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"every weight of ResNetForImageClassification in --plain=.*2 missing"):
        analyze_student.load(str(tmp_path), "--plain")


# name: (teacher, student, which of them have no relevance)
PAIRS = {
    "ViT": (
        lambda: make_vit(seed=2),
        lambda: make_vit(seed=1, image_size=16),
        "teacher, student, inheritance half, .*",
    ),
    "Dinov2Model": (lambda: Dinov2Model(make_dinov2().config), lambda: make_resnet(8, seed=1), "teacher"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_transformer_as_teacher(make_trainer, run_example, tmp_path, monkeypatch, caplog, name):
    """It is measured at its own pixels, as in training; the picture leaves out who looks nowhere."""
    make_teacher, make_student, left_out = PAIRS[name]
    size, teacher, seen = {"height": 32, "width": 32}, tmp_path / "teacher", []
    students = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    make_teacher().save_pretrained(teacher)
    ViTImageProcessorPil(size=size, image_mean=[0.25] * 3, image_std=[0.5] * 3).save_pretrained(teacher)
    rows = make_images(8, size=(16, 16))
    common = {"train_dataset": rows, "processing_class": students, "factor_channels": 8, "max_steps": 1}
    trainer = make_trainer(make_student(), str(teacher), **common)
    trainer.train()
    trainer.save_model()
    load = analyze_student.load

    def load_watched(given, role):
        model = load(given, role)
        if role == "--teacher":
            model.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
            )
        return model

    monkeypatch.setattr(analyze_student, "load", load_watched)
    arguments = ["--run", tmp_path / "out", "--teacher", teacher, "--num_images", "16", "--num_pictures", "2"]
    printed = run_example(analyze_student, *arguments, "--output_dir", tmp_path / "analysis")
    numbers = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    for values in (numbers["cka"]["teacher"], numbers["active_neurons"], numbers["varying_factors"]):
        assert {"teacher", "inheritance half", "exploration half"} <= values.keys()
    # Digits are black where nothing is written: (0 - 0.25) / 0.5.
    assert seen and all(x.shape[1:] == (3, 32, 32) and x.min() == pytest.approx(-0.5) for x in seen)
    (said,) = [record.getMessage() for record in caplog.records if "relevance" in record.getMessage()]
    assert re.match(f"relevance.png leaves out {left_out}: ", said)
    assert (tmp_path / "analysis" / "relevance.png").is_file() == ("relevance.png" in printed) == (name != "ViT")


@pytest.mark.slow
def test_a_finished_run(run_example, tmp_path):
    import run_iekd

    quick = ["--num_train_epochs", "1", "--paraphraser_epochs", "1", "--use_cpu"]
    quick += ["--max_train_samples", "64", "--max_eval_samples", "64"]
    run_example(run_iekd, "--output_dir", tmp_path / "run", "--teacher", "cifar-resnet-8", *quick, "--seed", 7)
    assert seed_of(tmp_path / "run") == 7 and seed_of(tmp_path) == 42
    analyse = functools.partial(run_example, analyze_student)
    printed = analyse("--run", tmp_path / "run", "--output_dir", tmp_path / "analysis", "--num_images", "64")
    for name in ("teacher", "student", "inheritance half", "exploration half", "plain student"):
        assert f"\n{name} " in printed, printed
    for picture in ("cka", "active_neurons", "relevance"):
        assert (tmp_path / "analysis" / f"{picture}.png").stat().st_size > 5_000
    numbers = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert numbers["cka"]["teacher"]["teacher"] == pytest.approx(1.0)
    assert 0 < numbers["cka"]["inheritance half"]["exploration half"] < 1
    varying = numbers["varying_factors"]
    assert list(varying) == ["teacher", "inheritance half", "exploration half"]
    assert all(0 < share < 1 for share in varying.values())
    table = dict(re.findall(r"^(\S.*\S) +[\d.]+ +[\d.]+% +[\d.]+% +(\S+)$", printed, re.MULTILINE))
    assert table["student"] == "-" and table["exploration half"] == f"{varying['exploration half']:.1%}"
    with pytest.raises(ValueError, match=r"finished run of IEKDTrainer in --run, got .* without _encoders"):
        analyse("--run", tmp_path / "run" / "_teacher", "--output_dir", tmp_path / "analysis")
    (tmp_path / "run" / "_teacher").rename(tmp_path / "teacher")
    with pytest.raises(
        ValueError, match=r"the run's teacher in --teacher, got none, and .*run' did not train its own"
    ):
        analyse("--run", tmp_path / "run", "--output_dir", tmp_path / "analysis")


@pytest.mark.parametrize("settings", [{}, {"inheritance_ratio": 1.0}, {"encoder_kernel_size": 1}])
def test_factors_are_those_of_the_trainer(make_trainer, settings):
    """From the files of a run, the halves' factors come out as its encoders, in eval mode, give them."""
    pixels = torch.randn(2, 3, 32, 32)
    trainer = make_trainer(teacher_model=make_resnet(16, seed=2), **settings)
    trainer.train()
    trainer.save_model()
    run = trainer.args.output_dir
    student_layers, inherits, explores, teacher_layers = analyze_student.read_split(run)
    features = {
        "teacher": Tapped(make_resnet(16, seed=2), teacher_layers).features(pixels),
        "inheritance half": Tapped(analyze_student.load(run, "--run"), student_layers, inherits).features(pixels),
        "exploration half": Tapped(analyze_student.load(run, "--run"), student_layers, explores).features(pixels),
    }
    factors = encode(run, None, features)
    trainer.student_side.tap.attach()
    with torch.no_grad():
        _, inheritance, exploration = trainer.student_side.eval()(pixel_values=pixels)
    expected = [*inheritance, *exploration]
    assert list(factors) == ["teacher", "inheritance half", "exploration half"][: 1 + len(expected)]
    for got, wanted in zip(list(factors.values())[1:], expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("method", ["ie-od", "ie-at", "kd"])
def test_a_run_without_factors_has_none(make_trainer, method):
    make_trainer().train()  # leaves its paraphraser there
    trainer = make_trainer(method=method)
    trainer.train()
    trainer.save_model()
    assert encode(trainer.args.output_dir, None, {}) == {}


def test_a_paraphraser_that_is_not_the_runs(make_trainer, tmp_path):
    """An earlier run has left its own in the folder; another may be named."""
    make_trainer().train()
    trainer = make_trainer(paraphraser=Paraphraser(16, 8))
    trainer.train()
    trainer.save_model()
    assert encode(str(tmp_path / "out"), None, {}) == {}
    with pytest.raises(ValueError, match=r"the paraphraser of the run in .*out', got another one in --paraphraser="):
        encode(str(tmp_path / "out"), str(tmp_path / "out" / "_paraphraser"), {})


def test_what_only_training_reads_is_refused():
    with pytest.raises(ValueError, match=r"Expected arguments of iekd-hf analyze, got --mixup 0\.5"):
        analyze_student.main(["--run", "out", "--mixup", "0.5"])
