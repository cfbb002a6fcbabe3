"""The losses: golden values, a plain re-implementation, gradients everywhere, and what they are for."""

import math

import numpy as np
import pytest
import torch

from iekd_hf import exploration_loss, inheritance_loss, reconstruction_loss
from iekd_hf.method.losses import EXPLORATION_DISTANCES, INHERITANCE_DISTANCES, kd_loss


LOSSES = [(inheritance_loss, name) for name in INHERITANCE_DISTANCES]
LOSSES += [(exploration_loss, name) for name in EXPLORATION_DISTANCES]
ids = [f"{loss.__name__}-{name}" for loss, name in LOSSES]


@pytest.fixture
def factors():
    torch.manual_seed(0)
    return torch.randn(4, 32, 8, 8), torch.randn(4, 32, 8, 8)


@pytest.mark.parametrize(
    "loss, distance, reduction, golden",
    [
        (inheritance_loss, "l1", "mean", 0.02491976),
        (inheritance_loss, "l2", "mean", 0.03125768),
        (inheritance_loss, "cosine", "mean", 1.00049198),
        (inheritance_loss, "l1", "sum", 51.0356),
        (exploration_loss, "l1", "mean", -0.02491976),
        (exploration_loss, "l1", "sum", -51.0356),
        (exploration_loss, "l2", "mean", -0.03125768),
        (exploration_loss, "orthogonal", "mean", 0.01659982),
    ],
)
def test_golden_values(factors, loss, distance, reduction, golden):
    assert loss(*factors, distance=distance, reduction=reduction).item() == pytest.approx(golden, rel=2e-6)


def test_reconstruction_golden_value(factors):
    assert reconstruction_loss(*factors).item() == pytest.approx(1.13271856, rel=1e-6)
    difference = (factors[0] - factors[1]).numpy()
    assert reconstruction_loss(*factors, distance="l2").item() == pytest.approx((difference**2).mean(), rel=1e-6)


def test_hand_computed():
    """(3, 4) has the direction (0.6, 0.8); against (1, 0): differences (-0.4, 0.8)."""
    student, teacher = torch.tensor([[3.0, 4.0]]).view(1, 2, 1, 1), torch.tensor([[1.0, 0.0]]).view(1, 2, 1, 1)
    expected = {
        ("l1", "mean"): 0.6,
        ("l1", "sum"): 1.2,
        ("l2", "mean"): math.sqrt(0.8 / 2),
        ("l2", "sum"): math.sqrt(0.8),
        ("cosine", "mean"): 0.4,
        ("partial_l2", "sum"): 0.8,
    }
    for (distance, reduction), value in expected.items():
        assert inheritance_loss(student, teacher, distance, reduction).item() == pytest.approx(value)
    assert exploration_loss(student, teacher, "orthogonal").item() == pytest.approx(0.6)


def test_partial_l2_leaves_out_what_is_below_a_negative_target():
    teacher = torch.tensor([[-0.6, 0.8]]).view(1, 2, 1, 1)
    below = torch.tensor([[-0.8, 0.6]]).view(1, 2, 1, 1)  # under -0.6: no loss there, 0.2 ** 2 at the other
    above = torch.tensor([[-0.28, 0.96]]).view(1, 2, 1, 1)  # 0.32 above and 0.16 above: both count
    assert inheritance_loss(below, teacher, "partial_l2", "sum").item() == pytest.approx(0.04)
    assert inheritance_loss(above, teacher, "partial_l2", "sum").item() == pytest.approx(0.32**2 + 0.16**2)


def test_cka_against_its_definition():
    """Centred Gram matrices over positions, HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), in numpy."""
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(2, 3, 5, 4, 4))
    rows_S, rows_T = (x.transpose(0, 2, 3, 1).reshape(-1, 5) for x in (student, teacher))
    centre = np.eye(len(rows_S)) - 1 / len(rows_S)
    K, L = centre @ rows_S @ rows_S.T @ centre, centre @ rows_T @ rows_T.T @ centre
    expected = (K * L).sum() / np.sqrt((K * K).sum() * (L * L).sum())
    got = exploration_loss(torch.tensor(student), torch.tensor(teacher), "cka").item()
    assert got == pytest.approx(expected, rel=1e-10)
    rotation, _ = np.linalg.qr(generator.normal(size=(5, 5)))
    turned = torch.einsum("bchw,cd->bdhw", torch.tensor(student), torch.tensor(rotation))
    assert exploration_loss(turned, torch.tensor(student) * 3, "cka").item() == pytest.approx(1)


@pytest.mark.parametrize("loss, distance", LOSSES, ids=ids)
def test_gradcheck(loss, distance):
    torch.manual_seed(1)
    student = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    for reduction in ("mean", "sum"):
        assert torch.autograd.gradcheck(lambda x: loss(x, teacher, distance, reduction), student)  # noqa: B023


@pytest.mark.parametrize("loss, distance", LOSSES, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_value_and_gradient_in_the_worst_places(loss, distance, dtype, factors):
    x = factors[0].to(dtype)
    zero = torch.zeros_like(x)
    half_zero = torch.cat([zero[:2], x[2:]])
    large, small = x.sign() * torch.finfo(dtype).max / 2, x.sign() * torch.finfo(dtype).tiny
    for student, teacher in [
        (x, x),
        (x, -x),
        (zero, x),
        (x, zero),
        (zero, zero),
        (half_zero, x),
        (large, x),
        (small, x),
        (x, large),
        (torch.ones_like(x), torch.ones_like(x)),
    ]:
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, distance)
        value.backward()
        assert value.isfinite()
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("loss, distance", LOSSES, ids=ids)
def test_properties(loss, distance, factors):
    student, teacher = factors
    value = loss(student, teacher, distance)
    assert value.shape == () and value.dtype == torch.float32
    assert loss(student.half(), teacher.half(), distance).dtype == torch.float32
    # Only directions count.
    torch.testing.assert_close(loss(5 * student, 0.1 * teacher, distance), value, rtol=1e-4, atol=1e-7)
    equal, opposite = loss(teacher, teacher, distance).item(), loss(-teacher, teacher, distance).item()
    if loss is inheritance_loss:
        assert equal == pytest.approx(0, abs=1e-6) and value > 0 and opposite > value
    else:
        assert value < equal or equal == pytest.approx(0)
    corrupt = student.clone()
    corrupt[0, 0, 0, 0] = float("nan")
    assert loss(corrupt, teacher, distance).isnan(), "a NaN must not be hidden"


def test_optimum_of_each_exploration_distance(factors):
    """Negative distances want opposition, orthogonal and CKA want independence: different aims."""
    teacher = factors[1]
    opposite, unrelated = -teacher, factors[0]
    for distance in ("l1", "l2", "partial_l2"):
        assert exploration_loss(opposite, teacher, distance) < exploration_loss(unrelated, teacher, distance)
    for distance in ("orthogonal", "cka"):
        assert exploration_loss(unrelated, teacher, distance) < exploration_loss(opposite, teacher, distance)


@pytest.mark.parametrize("distance", ["l1", "partial_l2", "cosine"])
def test_batches_add_up(factors, distance):
    """The mean over two halves is the whole: what makes gradient accumulation exact."""
    whole = inheritance_loss(*factors, distance)
    halves = [inheritance_loss(factors[0][i : i + 2], factors[1][i : i + 2], distance) for i in (0, 2)]
    torch.testing.assert_close(sum(halves) / 2, whole)


def test_float32_under_autocast(factors):
    with torch.autocast("cpu", torch.bfloat16):
        for loss, distance in LOSSES:
            inside = loss(*factors, distance)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(inside, loss(*factors, distance))


def test_kd_loss_is_hintons():
    student, teacher, T = torch.tensor([[1.0, 3.0], [0.0, 0.5]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]), 2.0
    p_S, p_T = ((z / T).exp() / (z / T).exp().sum(1, keepdim=True) for z in (student, teacher))
    expected = T**2 * (p_T * (p_T / p_S).log()).sum(1).mean()
    torch.testing.assert_close(kd_loss(student, teacher, T), expected)


def test_exceptions(factors):
    student, teacher = factors
    with pytest.raises(ValueError, match="l1, l2, cosine, partial_l2; got 'cosin'"):
        inheritance_loss(student, teacher, "cosin")
    with pytest.raises(ValueError, match="orthogonal, cka; got 'cosine'"):
        exploration_loss(student, teacher, "cosine")
    with pytest.raises(ValueError, match="mean, sum; got 'none'"):
        inheritance_loss(student, teacher, reduction="none")
    with pytest.raises(ValueError, match="one shape"):
        inheritance_loss(student, teacher[:, :16])
    with pytest.raises(ValueError, match="Expected distance to be one of l1, l2"):
        reconstruction_loss(student, teacher, "huber")
    with pytest.raises(ValueError, match="same labels"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 4))
