"""Padding does not enter the losses: a padded batch is the mean of its images alone, at their own sizes."""

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as t
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from iekd_hf import exploration_loss, inheritance_loss, reconstruction_loss
from iekd_hf.method.knowledge import MarginReLU
from iekd_hf.method.losses import EXPLORATION_DISTANCES, INHERITANCE_DISTANCES
from iekd_hf.method.padding import mask_at, match_sizes
from iekd_hf.teacher.pixels import TeacherPixels
from iekd_hf.training.paraphraser_trainer import summed
from iekd_hf.training.stage_1 import maps_without_padding


DISTANCES = [(inheritance_loss, name) for name in INHERITANCE_DISTANCES]
DISTANCES += [(exploration_loss, name) for name in EXPLORATION_DISTANCES]
ids = [f"{loss.__name__}-{name}" for loss, name in DISTANCES]
VALID = [(4, 6), (8, 4), (8, 8)]  # heights and widths of three images within 8 x 8 positions


def padded(channels: int = 3, dtype=torch.float64, scale: int = 1):
    """Return factors of student and teacher in a padded batch, NaN in the padding, its mask, and each image alone."""
    generator = torch.Generator().manual_seed(0)
    pixel_mask, alone = torch.zeros(len(VALID), 64, 64, dtype=torch.long), []
    student = torch.randn(len(VALID), channels, 8, 8, generator=generator, dtype=dtype)
    teacher = torch.randn(len(VALID), channels, 8 * scale, 8 * scale, generator=generator, dtype=dtype)
    for i, (height, width) in enumerate(VALID):
        pixel_mask[i, : 8 * height, : 8 * width] = 1
        own = student[i : i + 1, :, :height, :width], teacher[i : i + 1, :, : scale * height, : scale * width]
        alone.append(tuple(x.clone() for x in own))
    for factors in (student, teacher):
        factors.masked_fill_(~mask_at(pixel_mask, factors.shape[2:])[:, None], float("nan"))
    return student, teacher, pixel_mask, alone


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss, distance", DISTANCES, ids=ids)
def test_a_padded_batch_is_the_mean_of_its_images_alone(loss, distance, reduction, scale):
    """Whatever stands in the padding, NaN even; with a teacher's map of twice the size it is pooled without it."""
    student, teacher, pixel_mask, alone = padded(scale=scale)
    matched = match_sizes(student, teacher, pixel_mask)
    got = loss(*matched[:2], distance, reduction, mask=matched[2])
    each = [loss(*match_sizes(*own)[:2], distance, reduction) for own in alone]
    if distance == "cka":
        flat = [[x.flatten(2) for x in match_sizes(*own)[:2]] for own in alone]
        rows = [torch.cat([own[k] for own in flat], dim=2)[..., None] for k in (0, 1)]
        torch.testing.assert_close(got, loss(*rows, distance))
    elif distance == "l2":
        torch.testing.assert_close(got.abs(), torch.stack(each).square().mean().sqrt())
    else:
        torch.testing.assert_close(got, torch.stack(each).mean())


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_reconstruction_of_a_padded_batch(distance):
    student, teacher, pixel_mask, alone = padded()
    got = reconstruction_loss(student, teacher, distance, mask=mask_at(pixel_mask, (8, 8)))
    torch.testing.assert_close(got, torch.stack([reconstruction_loss(*own, distance) for own in alone]).mean())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("loss, distance", [*DISTANCES, (reconstruction_loss, "l1"), (reconstruction_loss, "l2")])
def test_without_padding_nothing_changes_to_the_last_bit(loss, distance, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(4, 32, *size, generator=generator).to(memory_format=layout) for size in ((7, 9), (14, 13))
    )
    values = []
    for pixel_mask in (None, torch.ones(4, 70, 90, dtype=torch.long)):
        leaf = student.clone().requires_grad_()
        if loss is reconstruction_loss:
            S, T, mask = leaf, teacher[..., :7, :9], mask_at(pixel_mask, (7, 9))
        else:
            S, T, mask = match_sizes(leaf, teacher, pixel_mask)
        value = loss(S, T, distance, mask=mask)
        values.append((value, *torch.autograd.grad(value, leaf)))
    assert all(torch.equal(plain, masked) for plain, masked in zip(*values, strict=True))


RESPONSES = [(inheritance_loss, name, {"normalize": False}) for name in ("l1", "l2", "partial_l2")]


@pytest.mark.parametrize("loss, distance, keywords", [(*each, {}) for each in DISTANCES] + RESPONSES)
def test_gradcheck_with_a_sample_that_is_nothing_but_padding(loss, distance, keywords):
    student, teacher = (x.nan_to_num(7.0) for x in padded()[:2])
    mask = mask_at(padded()[2], (8, 8))
    mask[1] = False
    student, teacher, mask = student[..., :3, :7], teacher[..., :3, :7], mask[..., :3, :7]
    for reduction in ("mean", "sum"):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, distance, reduction, mask=mask, **keywords)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all()
        assert not leaf.grad.masked_select(~mask[:, None].expand_as(leaf)).any()
        assert torch.autograd.gradcheck(lambda x: loss(x, teacher, distance, reduction, mask=mask, **keywords), leaf)  # noqa: B023
    assert torch.equal(
        loss(student, teacher, distance, mask=torch.zeros_like(mask), **keywords).abs(),
        torch.zeros((), dtype=torch.float64),
    )


def test_a_mask_of_another_size_is_refused():
    student, teacher, pixel_mask, _ = padded()
    with pytest.raises(
        ValueError, match=r"mask of shape \(batch_size, height, width\) for \(3, 3, 8, 8\), got \(3, 64, 64\)"
    ):
        inheritance_loss(student, teacher, mask=pixel_mask)


# ---- The teacher's pixels ----

VALUES = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
OWN = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}
EDGES = {"shortest_edge": 48, "longest_edge": 64}
GREY = 102


def grey(*sizes: tuple[int, int]) -> list[PIL.Image.Image]:
    return [PIL.Image.fromarray(np.full((*size, 3), GREY, dtype=np.uint8)) for size in sizes]


@pytest.mark.parametrize(
    "teacher, size",
    [
        (t.DetrImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 160}, **OWN), (128, 128)),
        (t.DetrImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 100}, **OWN), (100, 100)),
        (t.DetrImageProcessorPil(size={"height": 80, "width": 96}, **OWN), (80, 96)),
        (t.RTDetrImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=True, **OWN), (32, 32)),
        (t.DetrImageProcessorPil(do_resize=False, **OWN), (64, 64)),
        (t.ConvNextImageProcessorPil(size={"shortest_edge": 384}, **OWN), (512, 512)),
    ],
)
def test_padding_is_zero_in_the_teachers_pixels(teacher, size):
    """And not grey, which zero in the student's pixels is; the images are what its processor makes of them."""
    student = t.DetrImageProcessorPil(size=EDGES, **VALUES)
    batch = student(grey((48, 64), (64, 48)), return_tensors="pt")
    assert batch["pixel_values"].shape[2:] == (64, 64)
    pixels = TeacherPixels.between(student, teacher)(batch["pixel_values"], batch["pixel_mask"])
    assert pixels.shape[2:] == size
    mask = mask_at(batch["pixel_mask"], size)[:, None].expand_as(pixels)
    assert not pixels[~mask].any() and 0.7 < mask.float().mean() < 0.8
    # Resizing blends what lies at the border with the padding.
    inside = pixels[0, :, : int(size[0] * 0.7), : size[1]]
    torch.testing.assert_close(inside, torch.full_like(inside, (GREY / 255 - 0.1) / 0.2), rtol=1e-4, atol=1e-4)


def test_a_batch_without_padding_is_resized_as_before():
    student, teacher = (
        t.DetrImageProcessorPil(size=EDGES, **VALUES),
        t.DetrImageProcessorPil(size={"shortest_edge": 96, "longest_edge": 128}, **OWN),
    )
    batch = student(grey((48, 64), (48, 64)), return_tensors="pt")
    to_teacher = TeacherPixels.between(student, teacher)
    plain, masked = (to_teacher(batch["pixel_values"], mask) for mask in (None, batch["pixel_mask"]))
    assert plain.shape[2:] == (96, 128) and torch.equal(plain, masked)
    assert TeacherPixels.between(student, t.DetrImageProcessorPil(size=EDGES, **VALUES)) is None


def test_margins_and_mean_maps_are_those_of_the_images():
    """What stage 1 measures beside its loss leaves padding out, too: here it is -100, the images are -1 and -3."""
    feature_map, pixel_mask = torch.full((2, 1, 2, 2), -100.0), torch.zeros(2, 8, 8)
    feature_map[0], pixel_mask[0] = -1.0, 1
    feature_map[1, :, :, 0], pixel_mask[1, :, :4] = -3.0, 1

    class Teacher:
        def feature_maps(self, inputs):
            return [feature_map], None

    (cut,) = maps_without_padding(Teacher(), {"pixel_mask": pixel_mask})
    margin_relu = MarginReLU(1)
    margin_relu.measure([cut])
    assert margin_relu.margins.item() == pytest.approx((4 * -1 + 2 * -3) / 6)
    total = summed(feature_map, pixel_mask) / 2
    assert total.flatten().tolist() == [-2.0, -1.0, -2.0, -1.0]
    assert torch.equal(summed(feature_map, None), feature_map.sum(dim=0))


@pytest.mark.parametrize("loss, distance", [*DISTANCES, (reconstruction_loss, "l1"), (reconstruction_loss, "l2")])
def test_no_mask_makes_anybody_wait_for_the_device(loss, distance):
    """Tensors without values: whatever has to know one, to go on, fails."""
    with FakeTensorMode():
        student, teacher, pixel_mask = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.ones(2, 64, 64)
        if loss is not reconstruction_loss:
            student, teacher, _ = match_sizes(student, torch.randn(2, 4, 16, 16), pixel_mask)
        assert loss(student.requires_grad_(), teacher, distance, mask=mask_at(pixel_mask, (8, 8))).shape == ()
        with pytest.raises(DataDependentOutputException):
            pixel_mask.all().item()


def test_a_mask_on_another_grid_has_its_nearest_entries():
    assert mask_at(torch.tensor([[[1, 1, 1, 0, 0, 0]]]), (1, 3)).tolist() == [[[True, True, False]]]
    assert mask_at(None, (1, 3)) is None
