"""Options of Trainer and states of models that either work with several losses and networks, or are refused."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from conftest import make_images, make_resnet, make_vit
from torch import nn
from transformers import MobileViTConfig, MobileViTForImageClassification, TrainingArguments

from iekd_hf import EMACallback, MutualTrainer
from iekd_hf.teacher.frozen import fingerprint
from iekd_hf.training.data_checks import fills_no_batch, leaves_one
from iekd_hf.training.partwise_optimizer import PartwiseOptimizer


# ---- Mixed precision ----


def types_of(module: nn.Module) -> list[torch.dtype]:
    """Return what a module puts out in training, as far as it has run."""
    seen = []

    def note(module, args, output):
        if module.training and output.requires_grad:
            seen.append(output.dtype)

    module.register_forward_hook(note)
    return seen


def test_bf16_in_each_training(make_trainer):
    trainer = make_trainer(bf16=True, save_strategy="steps", save_steps=1)
    encoder = trainer.student_side.inheritance_encoders[0]
    seen = [types_of(next(m for m in part.modules() if isinstance(m, nn.Conv2d))) for part in (trainer.model, encoder)]
    for resumed in (None, None, f"{trainer.args.output_dir}/checkpoint-1"):
        for types in seen:
            types.clear()
        trainer.train(resume_from_checkpoint=resumed)
        assert [{*types} for types in seen] == [{torch.bfloat16}] * 2


@pytest.mark.parametrize("mutual_loss", ["ie", "kl"])
def test_bf16_in_each_training_of_peers(make_mutual, mutual_loss):
    models = [make_resnet(8, seed=1), make_resnet(16, seed=2)]
    trainer = make_mutual(models, bf16=True, mutual_loss=mutual_loss)
    seen = [types_of(next(m for m in model.modules() if isinstance(m, nn.Conv2d))) for model in models]
    for _ in range(2):
        for types in seen:
            types.clear()
        trainer.train()
        assert [{*types} for types in seen] == [{torch.bfloat16}] * 2


# ---- Optimizers ----


class TwoModes(torch.optim.SGD):
    """As optimizers without a schedule have: other weights for evaluation than for training."""

    modes: ClassVar = []

    def train(self):
        self.modes.append("train")

    def eval(self):
        self.modes.append("eval")


def test_each_peers_optimizer_is_told_of_training_and_evaluation(make_mutual):
    TwoModes.modes.clear()
    trainer = make_mutual(optimizer_cls_and_kwargs=(TwoModes, {"lr": 0.01}), max_steps=1)
    trainer.train()
    parts = [optimizer for optimizer in trainer.optimizer.optimizer.optimizers if isinstance(optimizer, TwoModes)]
    assert len(parts) == 2 and TwoModes.modes.count("train") == 2
    TwoModes.modes.clear()
    PartwiseOptimizer(parts).eval()
    assert TwoModes.modes == ["eval"] * 2


class FirstAlone(MutualTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        return self.optimizer


class OtherRate(MutualTrainer):
    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        optimizer.param_groups[0]["lr"] = 0.5
        return optimizer


def test_one_optimizer_for_the_first_peer_is_refused(make_mutual):
    with pytest.raises(ValueError, match=r"for each peer and .*, got one SGD from FirstAlone\.create_optimizer"):
        make_mutual(trainer_class=FirstAlone).train()
    trainer = make_mutual(trainer_class=OtherRate, lr_scheduler_type="constant")
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5


def test_no_optimizers_are_trainers_default(make_mutual):
    make_mutual(optimizers=(None, None)).train()
    with pytest.raises(ValueError, match="Expected no optimizers, got one"):
        make_mutual(optimizers=(torch.optim.SGD(make_resnet().parameters()), None))


# ---- What one model of several would have alone ----


def test_a_loss_that_no_training_of_peers_calls_is_refused(make_mutual):
    class Noted(MutualTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(ValueError, match=r"compute_loss of its own, which no training calls: pass .*batch\)\.$"):
        make_mutual(trainer_class=Noted)


def test_noise_for_embeddings(make_trainer, make_mutual):
    with pytest.raises(ValueError, match="Expected no neftune_noise_alpha, got one"):
        make_mutual([make_vit(seed=1), make_vit(seed=2)], neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match="input embeddings for neftune_noise_alpha, got ResNetForImageClassification"):
        make_trainer(neftune_noise_alpha=5.0)
    make_trainer(make_vit(seed=1), neftune_noise_alpha=5.0).train()


def test_peers_whose_checkpointing_is_on_are_refused(make_mutual):
    sizes = {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [8] * 7, "num_attention_heads": 1}
    model = MobileViTForImageClassification(MobileViTConfig(**sizes, num_labels=3, image_size=32))
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"no activation checkpointing, got it in models\[1\]"):
        make_mutual([make_resnet(8), model])


def test_an_average_of_one_peer_is_refused_where_it_is_added_later(make_mutual):
    trainer = make_mutual()
    trainer.add_callback(EMACallback(0.9))
    with pytest.raises(ValueError, match="Expected no EMACallback among the callbacks, got one"):
        trainer.train()


def test_a_search_with_peers_is_refused(make_mutual):
    with pytest.raises(ValueError, match="IEKDTrainer for a hyperparameter search, got MutualTrainer"):
        make_mutual().hyperparameter_search(lambda trial: {"learning_rate": 0.1}, n_trials=1)


@pytest.mark.parametrize("loss, left_out", [("ie", "lambda_kl"), ("kl", "lambda_inh")])
def test_a_card_of_peers_names_what_has_acted(make_mutual, tmp_path, loss, left_out):
    trainer = make_mutual(mutual_loss=loss)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| `{left_out}` |" not in card
    assert ("| `inheritance_distance` |" in card, "| `temperature` |" in card) == (loss == "ie", loss == "kl")


# ---- Values of a search ----


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("lambda_inh", -5.0, "Expected lambda_inh to be a finite weight of at least 0, got -5"),
        ("lambda_warmup_ratio", 2.0, r"Expected lambda_warmup_ratio within \[0, 1\), got 2"),
        ("temperature", -1.0, "Expected temperature above 0, got -1"),
        ("lambda_schedule", "linaer", "Expected lambda_schedule to be one of constant, linear, cosine; got 'linaer'"),
        ("layer_decay", 3.0, r"Expected layer_decay within \(0, 1\], got 3"),
        ("cache_teacher", True, "cache_teacher=True for a trainer that was built with False"),
    ],
)
def test_what_the_arguments_refuse_a_search_cannot_set(make_trainer, name, value, said, tmp_path):
    trainer = make_trainer(model_init=lambda trial: make_resnet(8, seed=1))
    with pytest.raises(ValueError, match=said):
        trainer.hyperparameter_search(
            lambda trial: {name: trial.suggest_categorical(name, [value])}, n_trials=1, backend="optuna"
        )
    assert not [*tmp_path.rglob("_paraphraser")]


# ---- Batches ----


def test_stage_1_has_a_batch_where_training_has_one(make_trainer):
    """Of 16 images one is held out, and 15 fill no batch of 16."""
    trainer = make_trainer(per_device_train_batch_size=16, dataloader_drop_last=True, max_steps=-1, num_train_epochs=1)
    assert trainer.train().global_step == 1
    with pytest.raises(
        ValueError,
        match="at least one batch of 32 with dataloader_drop_last=True, got 16: set dataloader_drop_last=False",
    ):
        make_trainer(per_device_train_batch_size=32, dataloader_drop_last=True)


# ---- Models in other forms ----


@pytest.mark.parametrize(
    "config, images, batch, is_one, is_none",
    [
        ({}, 17, 4, False, False),  # Accelerate fills up the last batches
        ({"even_batches": False}, 17, 4, True, False),
        ({"even_batches": False}, 21, 4, True, False),  # of which one rank gets 4 more and the other 1
        ({"dispatch_batches": True}, 18, 4, True, False),  # shared out by two
        ({"dispatch_batches": True}, 19, 4, False, False),
        ({}, 7, 4, False, True),
        ({"split_batches": True}, 7, 4, False, False),
    ],
)
def test_sizes_of_batches_on_two_ranks(tmp_path, config, images, batch, is_one, is_none):
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=batch, accelerator_config=config, use_cpu=True)
    two = SimpleNamespace(
        accelerator_config=args.accelerator_config, train_batch_size=args.train_batch_size, world_size=2
    )
    assert leaves_one(range(images), two) == is_one
    assert fills_no_batch(range(images), two) == is_none


def test_a_teacher_without_weights_is_refused(make_trainer):
    with torch.device("meta"):
        teacher = make_resnet(16)
    with pytest.raises(ValueError, match=r'weights in memory, got a ResNetForImage\w+ with some on .* "meta"'):
        make_trainer(teacher_model=teacher)


def test_a_compiled_student_is_refused_with_what_to_do(make_trainer, make_mutual):
    compiled = torch.compile(make_resnet(8), backend="eager")
    for make in (lambda: make_trainer(compiled), lambda: make_mutual([make_resnet(8, seed=1), compiled])):
        with pytest.raises(ValueError, match=r"got what torch\.compile makes of one: pass the model itself"):
            make()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_quantised_teachers_are_told_apart(make_trainer):
    first, again, other = (
        torch.ao.quantization.quantize_dynamic(make_vit(seed=seed), {nn.Linear}, dtype=torch.qint8)
        for seed in (2, 2, 3)
    )
    assert fingerprint([first]) == fingerprint([again]) != fingerprint([other])
    assert make_trainer(make_vit(seed=1), teacher_model=first, train_dataset=make_images()).train().global_step == 2
