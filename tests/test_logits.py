"""The logit terms beside Hinton's: by hand, as their authors' code has them, their gradients, and what they need."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_images, make_resnet, make_vit

from iekd_hf.method.logits import KD_DISTANCES, dist_loss, dkd_loss, standardized_kd_loss
from iekd_hf.method.losses import kd_loss


LABELS = torch.tensor([0, 4, 2, 2])
LOSSES = {
    "dkd": lambda s, t, temperature=4.0: dkd_loss(s, t, LABELS.to(s.device), temperature),
    "dist": dist_loss,
    "standardized": standardized_kd_loss,
}


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 5, generator=generator), 3 * torch.randn(4, 5, generator=generator)


def test_dkd_by_hand():
    """p_T = (1/2, 1/4, 1/4), p_S = (1/4, 1/4, 1/2), class 0: (1/2, 1/2) and (1/4, 3/4), rest 1 : 1 and 1 : 2."""
    student, teacher = torch.tensor([[1.0, 1.0, 2.0]]).log(), torch.tensor([[2.0, 1.0, 1.0]]).log()
    tckd = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    nckd = 0.5 * math.log(0.5 / (1 / 3)) + 0.5 * math.log(0.5 / (2 / 3))
    label = torch.tensor([0])
    assert dkd_loss(student, teacher, label, 1.0, 1.0, 0.0).item() == pytest.approx(tckd, rel=1e-5)
    assert dkd_loss(student, teacher, label, 1.0, 0.0, 1.0).item() == pytest.approx(nckd, rel=1e-5)
    assert dkd_loss(student, teacher, label, 1.0).item() == pytest.approx(tckd + 8 * nckd, rel=1e-5)
    # KL(p_T || p_S) = TCKD + (1 - p_T of the class) NCKD, the paper's first equation.
    whole = kd_loss(student, teacher, temperature=1.0).item()
    assert whole == pytest.approx(tckd + 0.5 * nckd, rel=1e-5)


def test_dkd_as_the_authors_have_it(logits):
    student, teacher = (z.double() for z in logits)
    mask = F.one_hot(LABELS, 5).bool()

    def two(p):
        return torch.stack([(p * mask).sum(1), (p * ~mask).sum(1)], dim=1)

    p_S, p_T = ((z / 3).softmax(1) for z in (student, teacher))
    tckd = F.kl_div(two(p_S).log(), two(p_T), reduction="sum") * 9 / 4
    rest_S, rest_T = (z / 3 - 1000.0 * mask for z in (student, teacher))
    nckd = F.kl_div(rest_S.log_softmax(1), rest_T.softmax(1), reduction="sum") * 9 / 4
    assert dkd_loss(student, teacher, LABELS, 3.0, 0.5, 2.0).item() == pytest.approx((0.5 * tckd + 2 * nckd).item())


def test_dkd_leaves_out_rows_without_a_label(logits):
    student, teacher = logits
    student.requires_grad_()
    some = torch.tensor([0, -100, 2, -100])
    loss = dkd_loss(student, teacher, some)
    torch.testing.assert_close(loss, dkd_loss(student[::2], teacher[::2], some[::2]))
    loss.backward()
    assert student.grad[1].abs().max() == student.grad[3].abs().max() == 0 < student.grad[0].abs().max()
    none = dkd_loss(student, teacher, torch.full((4,), -100))
    assert none.item() == 0 and none.requires_grad
    with pytest.raises(ValueError, match=r"class of each image as labels with kd_distance='dkd', got torch\.float32"):
        dkd_loss(student, teacher, torch.rand(4, 5))


def test_dist_by_hand(logits):
    student, teacher = logits
    p_S, p_T = ((z / 2).softmax(1).double() for z in (student, teacher))
    inter = sum(1 - torch.corrcoef(torch.stack([s, t]))[0, 1] for s, t in zip(p_S, p_T, strict=True)) / 4
    intra = sum(1 - torch.corrcoef(torch.stack([s, t]))[0, 1] for s, t in zip(p_S.T, p_T.T, strict=True)) / 5
    expected = 4 * (0.5 * inter + 2 * intra)
    assert dist_loss(student, teacher, 2.0, 0.5, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_standardized_by_hand(logits):
    student, teacher = logits
    z_S, z_T = ((z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True) for z in logits)
    p_S, p_T = ((z / 2).softmax(1) for z in (z_S, z_T))
    expected = 4 * (p_T * (p_T.log() - p_S.log())).sum(1).mean()
    assert standardized_kd_loss(student, teacher, 2.0).item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(
        standardized_kd_loss(10 * student - 3, teacher, 2.0), standardized_kd_loss(student, teacher, 2.0)
    )


def test_standardized_of_pixels_is_that_of_rows(logits):
    student, teacher = (z.T.reshape(1, 5, 2, 2) for z in logits)
    torch.testing.assert_close(standardized_kd_loss(student, teacher), standardized_kd_loss(*logits))
    mask = torch.tensor([[[1, 0], [1, 0]]])
    torch.testing.assert_close(
        standardized_kd_loss(student, teacher, mask=mask), standardized_kd_loss(*(z[::2] for z in logits))
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_and_types(name, logits):
    loss, (student, teacher) = LOSSES[name], logits
    student64 = student.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher.double()), student64)
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-5) and loss(student, teacher) > 0
    for dtype in (torch.bfloat16, torch.float16):
        assert loss(student.to(dtype), teacher.to(dtype)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher), loss(student, teacher).float())
    for odd in (torch.zeros(4, 5), torch.full((4, 5), 7.0), 1e4 * student, student[:1].expand(4, 5)):
        leaf = odd.clone().requires_grad_()
        value = loss(leaf, teacher)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all()
    corrupt = student.clone()
    corrupt[0, 0] = float("nan")
    assert loss(corrupt, teacher).isnan(), "a NaN must not be hidden"


def test_a_single_image_has_finite_gradients_of_dist(logits):
    leaf = logits[0][:1].clone().requires_grad_()
    dist_loss(leaf, logits[1][:1]).backward()
    assert leaf.grad.isfinite().all()


# ---- In training ----


def of_first_batch(trainer) -> dict:
    trainer.train()
    return next(logs for logs in trainer.state.log_history if "kd_loss" in logs)


@pytest.mark.parametrize("distance", KD_DISTANCES)
def test_each_distance_trains_beside_features(make_trainer, distance):
    """What is logged of the first step is the loss of the untrained student by hand."""
    student, images = make_resnet(8, seed=1), make_images(4)
    trainer = make_trainer(
        make_resnet(8, seed=1),
        method="at+kd",
        kd_distance=distance,
        temperature=2.0,
        train_dataset=images,
        train_sampling_strategy="sequential",
    )
    logs = of_first_batch(trainer)
    pixels, labels = torch.stack([x["pixel_values"] for x in images]), torch.tensor([x["labels"] for x in images])
    with torch.no_grad():
        z_S, z_T = student.train()(pixels).logits, make_resnet(16, seed=2).eval()(pixels).logits
    by_hand = {
        "kl": lambda: kd_loss(z_S, z_T, 2.0),
        "dkd": lambda: dkd_loss(z_S, z_T, labels, 2.0),
        "dist": lambda: dist_loss(z_S, z_T, 2.0),
        "standardized": lambda: standardized_kd_loss(z_S, z_T, 2.0),
    }
    assert logs["kd_loss"] == pytest.approx(by_hand[distance]().item(), rel=1e-4)
    assert logs["inheritance_loss"] > 0


def test_dkd_over_accumulated_batches_is_the_mean_over_all_labels(make_trainer):
    """Three labels in the first micro-batch, one in the second: the same gradient as of one batch of eight."""

    def train(batch_size, accumulated):
        images = make_images(8)
        for i in (3, 5, 6, 7):
            images[i]["labels"] = -100
        trainer = make_trainer(
            make_vit(seed=1),  # without BatchNorm, which sees batches
            method="kd",
            kd_distance="dkd",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
            train_dataset=images,
            train_sampling_strategy="sequential",
            optim="sgd",
            max_grad_norm=0.0,
            max_steps=1,
        )
        trainer.train()
        return trainer.student.state_dict()

    once, accumulated = train(8, 1), train(4, 2)
    for name, value in once.items():
        torch.testing.assert_close(accumulated[name], value, rtol=1e-4, atol=1e-6)


def test_combinations_that_mean_nothing(make_trainer):
    def refused(match, **kwargs):
        with pytest.raises(ValueError, match=match):
            make_trainer(**{"method": "kd", "kd_distance": "dkd", **kwargs})

    refused("one of kl, dkd, dist, standardized; got 'dkt'", kd_distance="dkt")
    several = [{**image, "labels": torch.tensor([1.0, 0.0, 1.0])} for image in make_images()]
    for distance in ("dkd", "dist", "standardized"):
        kind = {"num_labels": 3, "problem_type": "multi_label_classification"}
        models = {"model": make_resnet(8, **kind), "teacher_model": make_resnet(16, **kind)}
        refused(f"'{distance}' with several labels an image", kd_distance=distance, train_dataset=several, **models)
        models = {"model": make_resnet(8, num_labels=2), "teacher_model": make_resnet(16, num_labels=2)}
        refused(
            f"'{distance}' with 2 classes", kd_distance=distance, train_dataset=make_images(num_labels=2), **models
        )
    none = [{"pixel_values": image["pixel_values"]} for image in make_images()]
    refused("'dkd' with no labels", train_dataset=none)
    refused("'dkd' with mixing", mixing=torch.nn.Identity())
    make_trainer(method="kd", kd_distance="dist", train_dataset=none)  # which needs none
    make_trainer(method="plain", kd_distance="dkd", mixing=torch.nn.Identity())  # which is not in use


def test_shares_of_classes_of_a_collator_are_refused_before_the_first_step(make_trainer):
    def collate(rows):
        batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
        return {**batch, "labels": F.one_hot(torch.tensor([row["labels"] for row in rows]), 3).float()}

    kind = {"problem_type": "single_label_classification"}
    common = {"method": "ie-ft+kd", "data_collator": collate, "eval_strategy": "no"}
    with pytest.raises(ValueError, match="class of each image as labels with kd_distance='dkd'"):
        make_trainer(make_resnet(8, seed=1, **kind), kd_distance="dkd", **common)
    make_trainer(make_resnet(8, seed=1, **kind), kd_distance="kl", **common).train()
