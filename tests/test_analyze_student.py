"""The analysis of a finished run: its measures by hand, and the pictures from nothing but the run's folder."""

import functools
import json
import re

import pytest
import torch
from conftest import make_resnet

from iekd_hf.commands import analyze as analyze_student
from iekd_hf.commands.analyze import Tapped, active_neurons, cka_matrix, encode, varying_share


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


@pytest.mark.slow
def test_a_finished_run(run_example, tmp_path):
    import run_iekd

    quick = ["--num_train_epochs", "1", "--paraphraser_epochs", "1", "--use_cpu"]
    quick += ["--max_train_samples", "64", "--max_eval_samples", "64"]
    run_example(run_iekd, "--output_dir", tmp_path / "run", "--teacher", "cifar-resnet-8", *quick)
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


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_factors_are_those_of_the_trainer(make_trainer, ratio):
    """From the files of a run, the halves' factors come out as its encoders, in eval mode, give them."""
    pixels = torch.randn(2, 3, 32, 32)
    trainer = make_trainer(teacher_model=make_resnet(16, seed=2), inheritance_ratio=ratio)
    trainer.train()
    trainer.save_model()
    run = trainer.args.output_dir
    student_layers, inherits, explores, teacher_layers = analyze_student.read_split(run)
    features = {
        "teacher": Tapped(make_resnet(16, seed=2), teacher_layers).features(pixels),
        "inheritance half": Tapped(analyze_student.load(run, "--run"), student_layers, inherits).features(pixels),
        "exploration half": Tapped(analyze_student.load(run, "--run"), student_layers, explores).features(pixels),
    }
    factors = encode(run, f"{run}/_paraphraser", features)
    trainer.student_side.tap.attach()
    with torch.no_grad():
        _, inheritance, exploration = trainer.student_side.eval()(pixel_values=pixels)
    expected = [*inheritance, *exploration]
    assert list(factors) == ["teacher", "inheritance half", "exploration half"][: 1 + len(expected)]
    for got, wanted in zip(list(factors.values())[1:], expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("method", ["ie-od", "ie-at"])
def test_a_run_without_factors_has_none(make_trainer, method):
    trainer = make_trainer(method=method)
    trainer.train()
    trainer.save_model()
    assert encode(trainer.args.output_dir, f"{trainer.args.output_dir}/_paraphraser", {}) == {}
