"""Random parts of images, read from their files: which part it is, and that no more is decoded than it needs."""

import io

import numpy as np
import PIL.Image
import pytest
import torch

from iekd_hf.commands.images.reading import RandomResizedCrop


def scene(width: int, height: int) -> PIL.Image.Image:
    """Draw colours that change slowly from left to right and from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return PIL.Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).round().astype(np.uint8))


def as_file(image: PIL.Image.Image, kind: str = "PNG", **kwargs) -> dict:
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return {"bytes": file.getvalue(), "path": None}


def as_pixels(image: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).int()


@pytest.fixture
def draw(monkeypatch):
    """Set what is drawn: area, aspect, left, top, flip, each in [0, 1)."""

    def to(*values):
        monkeypatch.setattr(torch, "rand", lambda count: torch.tensor(values))

    return to


def test_the_part_by_hand(draw):
    """A quarter of 80x60 at ratio 4 / 3 is 40x30; halfway along what is left of each side it begins at (20, 15)."""
    draw(0.5, 1.0, 0.5, 0.5, 0.9)
    image = scene(80, 60)
    crop = RandomResizedCrop((15, 20), horizontal_flip=True, scale=(0.0, 0.5), ratio=(1.0, 4 / 3))
    expected = as_pixels(image.resize((20, 15), PIL.Image.Resampling.BILINEAR, (20, 15, 60, 45)))
    assert (crop(as_file(image)).int() - expected).abs().max() <= 1
    draw(0.5, 1.0, 0.5, 0.5, 0.1)
    assert (crop(as_file(image)).int() - expected.flip(-1)).abs().max() <= 1


def test_a_part_is_never_larger_than_the_image(draw):
    draw(1.0, 1.0, 1.0, 1.0, 1.0)  # all of the area, at ratio 4 / 3 of a square
    image = scene(60, 60)
    crop = RandomResizedCrop((30, 30), horizontal_flip=False)
    expected = image.resize((30, 30), PIL.Image.Resampling.BILINEAR, (0, 8, 60, 60))  # 60 * sqrt(3 / 4) is 52
    assert (crop(as_file(image)).int() - as_pixels(expected)).abs().max() <= 1


@pytest.mark.parametrize(("area", "decoded"), [(1.0, (128, 96)), (0.25, (256, 192)), (0.01, (1024, 768))])
def test_a_jpeg_is_decoded_no_larger_than_the_part_needs(draw, monkeypatch, area, decoded):
    """128x96 pixels of the whole of 1024x768 need an eighth of its size, of a part more."""
    draw(area, 1.0, 0.5, 0.5, 0.9)
    sizes, image = [], scene(1024, 768)
    cut = RandomResizedCrop._cut
    monkeypatch.setattr(
        RandomResizedCrop, "_cut", lambda self, whole, *draws: sizes.append(whole.size) or cut(self, whole, *draws)
    )
    crop = RandomResizedCrop((96, 128), horizontal_flip=False, scale=(0.0, 1.0))
    pixels = crop(as_file(image, "JPEG", quality=95))
    assert sizes == [decoded]
    exact = crop(as_file(image))
    assert sizes[1] == (1024, 768)
    assert (pixels.int() - exact).float().abs().mean() < 2


def test_a_photograph_that_was_turned_is_upright(draw):
    draw(1.0, 0.0, 0.0, 0.0, 0.9)
    upright, exif = scene(48, 64), PIL.Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    turned = as_file(upright.transpose(PIL.Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)
    crop = RandomResizedCrop((32, 24), horizontal_flip=False)
    assert (crop(turned).int() - crop(as_file(upright))).float().abs().mean() < 3


def test_draws_follow_the_seed_and_stay_in_their_range():
    image, crop = as_file(scene(80, 60)), RandomResizedCrop((8, 8), horizontal_flip=True)
    torch.manual_seed(0)
    first = [crop(image) for _ in range(8)]
    torch.manual_seed(0)
    assert all(torch.equal(crop(image), pixels) for pixels in first)
    assert len({tuple(pixels.flatten().tolist()) for pixels in first}) == 8
    torch.manual_seed(0)
    draws = torch.rand(2, 1000).T.tolist()
    parts = torch.tensor([crop._part(80, 60, share, shape) for share, shape in draws])
    areas, ratios = parts.prod(dim=1) / 4800, parts[:, 0] / parts[:, 1]
    assert areas.min() > 0.079 and areas.max() <= 1 and areas.mean() == pytest.approx(0.54, abs=0.03)
    assert ratios.min() > 0.74 and ratios.max() < 1.34
