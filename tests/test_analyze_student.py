"""The analysis of a finished run: its measures by hand, and the pictures from nothing but the run's folder."""

import functools
import json

import analyze_student
import pytest
import torch
from analyze_student import Tapped, active_neurons, cka_matrix
from conftest import make_resnet


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

    quick = ["--max_train_samples", "64", "--num_train_epochs", "1", "--paraphraser_epochs", "1", "--use_cpu"]
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
    with pytest.raises(ValueError, match=r"finished run of IEKDTrainer in --run, got .* without _encoders"):
        analyse("--run", tmp_path / "run" / "_teacher", "--output_dir", tmp_path / "analysis")
