"""Recipes of kornia and Trainer: MixUp and CutMix by soft labels, RandAugment, learning rates by layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_images, make_resnet, make_vit, same
from test_resume import ARGUMENTS, StopAt, everything
from transformers import default_data_collator

from iekd_hf import BatchAugmentation, DistillationTrainer, Paraphraser
from iekd_hf.commands.images.recipes import MixedBatches, RandAugmentedBatches
from iekd_hf.training.layer_rates import layer_rates
from iekd_hf.training.soft_labels import soft_cross_entropy


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
    with pytest.raises(ValueError, match="Expected --rand_augment from 1 to 29, got 30"):
        RandAugmentedBatches(augmentation, magnitude=30)


# ---- Soft labels through every loss ----


class WithTheNext(torch.nn.Module):
    """Mix each image with the next one of the batch, three to one, and keep what was made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def forward(self, pixel_values, labels):
        shares = F.one_hot(labels, 3).float()
        mixed = tuple(0.75 * x + 0.25 * x.roll(-1, dims=0) for x in (pixel_values, shares))
        self.made.append(mixed)
        return mixed


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_cross_entropy_is_torchs_where_all_images_have_a_label(smoothing):
    logits, shares = torch.randn(6, 4), torch.rand(6, 4).softmax(dim=1)
    expected = F.cross_entropy(logits, shares, label_smoothing=smoothing)
    torch.testing.assert_close(soft_cross_entropy(logits, shares, smoothing), expected)
    unlabelled = torch.cat([shares, torch.zeros(3, 4)])  # which change nothing
    torch.testing.assert_close(soft_cross_entropy(torch.cat([logits, logits[:3]]), unlabelled, smoothing), expected)
    assert soft_cross_entropy(logits, torch.zeros(6, 4), smoothing) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_loss_is_of_the_mixed_images(make_trainer, smoothing):
    mixing, seen = WithTheNext(), []
    student, teacher = make_resnet(8, seed=1), make_resnet(16, seed=2)
    trainer = make_trainer(
        copy.deepcopy(student),
        teacher,
        method="ie-ft+kd",
        mixing=mixing,
        max_steps=1,
        learning_rate=0.0,
        label_smoothing_factor=smoothing,
        paraphraser=Paraphraser(16, 8),
    )
    trainer.teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]["pixel_values"]))
    trainer.train()
    ((pixels, shares),) = mixing.made
    assert torch.equal(seen[-1], pixels)
    logits = student.train()(pixels).logits
    logged = next(logs for logs in trainer.state.log_history if "task_loss" in logs)
    expected = F.cross_entropy(logits, shares, label_smoothing=smoothing)
    assert logged["task_loss"] == pytest.approx(expected.item(), rel=1e-4)
    z_S, z_T = (z / 4 for z in (logits, teacher.eval()(pixels).logits))
    expected = 16 * F.kl_div(z_S.log_softmax(1), z_T.softmax(1), reduction="batchmean")
    assert logged["kd_loss"] == pytest.approx(expected.item(), rel=1e-3)


def test_evaluation_is_of_whole_images(make_trainer):
    mixing, images = WithTheNext(), make_images()
    trainer = make_trainer(mixing=mixing, eval_dataset=images, compute_metrics=lambda p: {"n": len(p.label_ids)})
    trainer.train()
    count = len(mixing.made)
    assert count == 2
    assert trainer.evaluate()["eval_n"] == len(images) and len(mixing.made) == count


def test_soft_labels_of_a_data_collator(make_trainer):
    """As torchvision's CutMix makes them; what the student is, its configuration says."""

    def collate(examples):
        batch = default_data_collator(examples)
        batch["pixel_values"], batch["labels"] = mixing(batch["pixel_values"], batch["labels"])
        return batch

    mixing = WithTheNext()
    arguments = {"max_steps": 1, "data_collator": collate, "method": "plain", "learning_rate": 0.0}
    student = make_resnet(8, seed=1, problem_type="single_label_classification")
    trainer = make_trainer(copy.deepcopy(student), **arguments)
    trainer.train()
    pixels, shares = mixing.made[1]  # after the example that shapes are found with
    expected = F.cross_entropy(student.train()(pixels).logits, shares)
    assert trainer.state.log_history[0]["task_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_mixed_batches_are_drawn_again_where_a_run_goes_on(make_trainer, tmp_path):
    def run(folder, resume=None, **kwargs):
        trainer = make_trainer(
            **ARGUMENTS, output_dir=str(tmp_path / folder), mixing=MixedBatches(3, mixup=0.4, cutmix=0.4), **kwargs
        )
        trainer.train(resume_from_checkpoint=resume)
        return everything(trainer)

    straight = run("straight")
    run("broken", callbacks=[StopAt(5)])
    assert same(run("broken", resume=True), straight)


def test_peers_learn_from_mixed_batches(make_mutual):
    mixing = WithTheNext()
    trainer = make_mutual(mixing=mixing, mutual_loss="ie+kl", max_steps=1, learning_rate=0.0)
    students = copy.deepcopy(trainer.models)
    trainer.train()
    ((pixels, shares),) = mixing.made
    logged = next(logs for logs in trainer.state.log_history if "peer_1/task_loss" in logs)
    expected = F.cross_entropy(students[0].train()(pixels).logits, shares)
    assert logged["peer_1/task_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_what_cannot_be_mixed(make_trainer):
    with pytest.raises(ValueError, match="Expected no mixing with cache_teacher=True"):
        make_trainer(mixing=WithTheNext(), cache_teacher=True)
    images = [{**image, "labels": torch.tensor([0.0, 1.0, 1.0])} for image in make_images()]
    student = make_resnet(8, problem_type="multi_label_classification")
    message = r"Expected a class of each image as labels with mixing, got torch\.Size"
    trainer = make_trainer(student, trainer_class=plain, train_dataset=images, mixing=WithTheNext())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    with pytest.raises(ValueError, match=message):  # where there is a first stage, before it
        make_trainer(student, train_dataset=images, mixing=WithTheNext())
    with pytest.raises(ValueError, match="Expected a class of each image as labels with mixing, got None"):
        make_trainer(make_resnet(8).base_model, mixing=WithTheNext())


@pytest.mark.parametrize("without", [-100, None])
@pytest.mark.parametrize("labelled", [2, 0])
def test_batches_without_a_label_are_mixed(make_trainer, without, labelled):
    images = [
        {**image, "labels": image["labels"] if i < labelled else without} for i, image in enumerate(make_images(8))
    ]
    trainer = make_trainer(
        method="kd",
        train_dataset=images,
        mixing=MixedBatches(3, mixup=0.5, cutmix=0.5),
        train_sampling_strategy="sequential",
    )
    trainer.train()
    logs = [logs for logs in trainer.state.log_history if "kd_loss" in logs]
    assert [logs["task_loss"] > 0 for logs in logs] == [labelled > 0, False] and logs[1]["kd_loss"] > 0


# ---- Learning rates by layer ----


def rates_of(trainer) -> dict[str, float]:
    """Return the learning rate of each of the student's parameters, and that of the encoders."""
    groups = trainer.optimizer.param_groups
    rate_of = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    assert len(rate_of) == sum(len(group["params"]) for group in groups)
    rates = {name: rate_of.pop(parameter) for name, parameter in trainer.model.named_parameters()}
    assert len(rate_of) > 0 and len(set(rate_of.values())) == 1
    return {**rates, "encoders": next(iter(rate_of.values()))}


def test_learning_rates_fall_from_the_head_to_the_input(make_trainer):
    trainer = make_trainer(make_vit(seed=1), layer_decay=0.5, learning_rate=0.8, weight_decay=0.1)
    trainer.create_optimizer()
    rates = rates_of(trainer)
    assert rates["encoders"] == rates["classifier.weight"] == rates["vit.layernorm.weight"] == 0.8
    by_block = {name: rates[name] for name in rates if ".layers." in name or ".layer." in name}
    assert {rate for name, rate in by_block.items() if ".1." in name} == {0.4}
    assert {rate for name, rate in by_block.items() if ".0." in name} == {0.2}
    assert {rate for name, rate in rates.items() if "embeddings" in name} == {0.1}
    assert trainer.optimizer.param_groups[0]["lr"] == 0.8  # which is logged
    decays = {p: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decays[trainer.model.vit.layernorm.bias] == 0.0 and decays[trainer.model.classifier.weight] == 0.1


def test_the_schedule_holds_for_all_rates_and_a_resumed_run_is_the_same(make_trainer, tmp_path):
    def run(folder, resume=None, **kwargs):
        trainer = make_trainer(**ARGUMENTS, layer_decay=0.5, output_dir=str(tmp_path / folder), **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run("straight")
    run("broken", callbacks=[StopAt(5)])
    assert same(everything(run("broken", resume=True)), everything(straight))
    groups = straight.optimizer.param_groups
    assert {group["initial_lr"] / 0.01 for group in groups} == {1.0, 0.5, 0.25, 0.125}
    ratios = {round(group["lr"] / group["initial_lr"], 9) for group in groups}
    assert len(ratios) == 1 and ratios.pop() < 0.1


def test_bad_layer_decays(make_trainer):
    with pytest.raises(ValueError, match=r"Expected layer_decay within \(0, 1\], got 0\.0"):
        make_trainer(layer_decay=0.0)
    student = make_resnet(8)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Expected no optimizer in optimizers with layer_decay"):
        make_trainer(student, optimizers=(optimizer, None), layer_decay=0.5)
    with pytest.raises(ValueError, match="Expected a model whose blocks are in a ModuleList for layer_decay"):
        layer_rates(torch.nn.Linear(1, 1), 0.5)


def plain(model, teacher_model, **kwargs):
    return DistillationTrainer(model=model, **kwargs)
