"""Recipes of kornia and Trainer: MixUp and CutMix by soft labels, RandAugment, learning rates by layer."""

import pytest
import torch

from iekd_hf import BatchAugmentation
from iekd_hf.commands.images.recipes import MixedBatches, RandAugmentedBatches


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_mixed_as_the_pixels_are(kind):
    """Images of one value each, their class: what a mixed image has of another one is what its label says."""
    torch.manual_seed(0)
    labels = torch.arange(6) % 2
    images = labels.float().view(6, 1, 1, 1).expand(6, 3, 16, 16)
    mixing, found = MixedBatches(num_labels=2, **{kind: 1.0}), []
    for _ in range(4):
        mixed, soft = mixing(images, labels)
        torch.testing.assert_close(soft[:, 1], mixed.mean(dim=(1, 2, 3)))
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(6))
        found.append(soft)
    assert len(torch.cat(found).unique()) > 8


def test_a_share_of_the_batches_is_mixed():
    torch.manual_seed(0)
    mixing, images, labels = (
        MixedBatches(2, mixup=0.25, cutmix=0.25),
        torch.rand(4, 3, 8, 8),
        torch.tensor([0, 1, 1, 0]),
    )
    unmixed = [torch.equal(mixing(images, labels)[0], images) for _ in range(60)]
    assert 20 < sum(unmixed) < 40
    mixing = MixedBatches(2)
    assert torch.equal(mixing(images, labels)[1], torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match=r"at most 1 together, got 0\.6 and 0\.5"):
        MixedBatches(2, mixup=0.6, cutmix=0.5)


def test_an_image_without_a_label_takes_its_share_of_the_label():
    torch.manual_seed(0)
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 8, 8)  # the second one has no label
    for _ in range(8):
        mixed, soft = MixedBatches(2, mixup=1.0)(images, torch.tensor([1, -100]))
        torch.testing.assert_close(soft[:, 1], 1 - mixed.mean(dim=(1, 2, 3)))
        assert (soft[:, 0] == 0).all()


def test_rand_augment_changes_training_images_within_their_range():
    torch.manual_seed(0)
    augmentation = BatchAugmentation(mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3], crop="padded", horizontal_flip=True)
    batches = RandAugmentedBatches(augmentation, magnitude=9)
    images, ids = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(16)
    assert torch.equal(batches(images), augmentation(images))  # in evaluation
    augmented = batches(images, ids, 1)
    plain = augmentation(images, ids, 1)
    assert augmented.shape == plain.shape and not torch.equal(augmented, plain)
    low, high = (augmentation(torch.full_like(images[:1], value)) for value in (0, 255))
    assert (augmented >= low - 1e-5).all() and (augmented <= high + 1e-5).all()
    batches.operations = torch.nn.Identity()  # without operations nothing else has changed
    torch.testing.assert_close(batches(images, ids, 1), plain)
    with pytest.raises(ValueError, match="Expected --rand_augment between 0 and 30, got 30"):
        RandAugmentedBatches(augmentation, magnitude=30)
