"""A run that is interrupted and resumed ends with the same bits as one that is not, in either stage."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_images, make_resnet, make_vit, same
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from iekd_hf import Paraphraser
from iekd_hf.training.checkpoints import load_weights
from iekd_hf.training.manifest import write_manifest
from iekd_hf.training.paraphraser_trainer import ParaphraserTrainer


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = True
            control.should_training_stop = True


ARGUMENTS = {
    "max_steps": 10,
    "save_strategy": "steps",
    "save_steps": 5,
    "lambda_inh": 20.0,
    "lambda_exp": 5.0,
    "lambda_schedule": "cosine",
    "lambda_warmup_ratio": 0.2,
    "lr_scheduler_type": "cosine",
}

BEST = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "greater_is_better": True,
    "eval_dataset": make_images(4, seed=1),
}


def everything(trainer) -> dict:
    state = {f"student side: {k}": v.clone() for k, v in trainer.student_side.state_dict().items()}
    state |= {f"paraphraser: {k}": v.clone() for k, v in trainer.teacher.paraphrasers.state_dict().items()}
    for index, slots in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer {index} {k}": torch.as_tensor(v).clone() for k, v in slots.items()}
    return state


def everything_mutual(trainer) -> dict:
    state = {k: v.clone() for k, v in trainer.group.state_dict().items()}
    for part, optimizer in enumerate(trainer.optimizer.optimizer.optimizers):
        for index, slots in optimizer.state_dict()["state"].items():
            state |= {f"optimizer {part} {index} {k}": torch.as_tensor(v).clone() for k, v in slots.items()}
    return state


def logged(trainer) -> list[dict]:
    return [
        {k: v for k, v in logs.items() if "runtime" not in k and "per_second" not in k}
        for logs in trainer.state.log_history
        if "loss" in logs
    ]


@pytest.mark.parametrize("student", ["resnet", "vit"])
def test_ten_steps_equal_five_and_five(make_trainer, tmp_path, student):
    """To the last bit: student (dropout included), encoders, split, optimizer, the weights' schedule, and the logs."""

    def make(**kwargs):
        model = make_vit(seed=1, hidden_dropout_prob=0.1) if student == "vit" else make_resnet(8, seed=1)
        return make_trainer(model, **(ARGUMENTS | kwargs))

    straight = make(output_dir=str(tmp_path / "straight"))
    straight.train()
    interrupted = make(output_dir=str(tmp_path / "broken"), callbacks=[StopAt(5)])
    interrupted.train()
    assert interrupted.state.global_step == 5
    # A new process would draw other encoders and, from another seed, another split: the checkpoint's must win.
    resumed = make(output_dir=str(tmp_path / "broken"), split_seed=2)
    assert not torch.equal(
        resumed.student_side.splits[0].inheritance_indices, straight.student_side.splits[0].inheritance_indices
    )
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10
    assert same(everything(resumed), everything(straight))
    assert logged(resumed) == logged(straight)


@pytest.mark.parametrize("mutual_loss, number", [("ie", 2), ("kl", 2), ("ie+kl", 3)])
def test_mutual_ten_steps_equal_five_and_five(make_mutual, tmp_path, mutual_loss, number):
    """Peers of two families, dropout included; all optimizers, paraphrasers, splits, schedules, and the logs."""

    def make(**kwargs):
        models = [make_resnet(8, seed=1), make_vit(seed=2, hidden_dropout_prob=0.1), make_resnet(12, seed=3)]
        return make_mutual(models[:number], **(ARGUMENTS | {"mutual_loss": mutual_loss} | kwargs))

    straight = make(output_dir=str(tmp_path / "straight"))
    straight.train()
    make(output_dir=str(tmp_path / "broken"), callbacks=[StopAt(5)]).train()
    resumed = make(output_dir=str(tmp_path / "broken"), split_seed=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10
    assert same(everything_mutual(resumed), everything_mutual(straight))
    assert logged(resumed) == logged(straight)


def test_resume_refuses_the_other_trainers_checkpoint(make_trainer, make_mutual, tmp_path):
    common = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_trainer(output_dir=str(tmp_path / "iekd"), **common).train()
    make_mutual(output_dir=str(tmp_path / "mutual"), **common).train()
    mutual = make_mutual(output_dir=str(tmp_path / "iekd"))
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in mutual.models]
    with pytest.raises(ValueError, match=r"of MutualTrainer in .*, got one of IEKDTrainer: resume with that"):
        mutual.train(resume_from_checkpoint=True)
    assert all(same(m.state_dict(), state) for m, state in zip(mutual.models, before, strict=True))
    for resume in (True, str(tmp_path / "mutual" / "checkpoint-1")):
        with pytest.raises(ValueError, match=r"of IEKDTrainer in .*, got one of MutualTrainer: resume with that"):
            make_trainer(output_dir=str(tmp_path / "mutual")).train(resume_from_checkpoint=resume)


def test_mutual_resume_refuses_other_peers_and_losses(make_mutual, tmp_path):
    make_mutual(max_steps=1, save_strategy="steps", save_steps=1).train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(ValueError, match="mutual_loss ie\\+kl, got one for ie"):
        make_mutual(mutual_loss="ie+kl").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"peer_1.*other shapes.*another output_dir"):
        make_mutual([make_resnet(12, seed=1), make_vit(seed=2)]).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"peers ResNetFor.*, ResNetFor.*, got one for ResNetFor.*, ViTFor"):
        make_mutual([make_resnet(8), make_vit(), make_resnet(8)]).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="inheritance_ratio"):
        make_mutual(inheritance_ratio=0.25).train(resume_from_checkpoint=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_interrupted_in_stage_1(make_trainer, tmp_path, monkeypatch):
    arguments = ARGUMENTS | {"paraphraser_epochs": 2.5, "max_steps": 4}  # ten steps of stage 1
    straight = make_trainer(output_dir=str(tmp_path / "straight"), **arguments)
    straight.train()

    original = ParaphraserTrainer._save_checkpoint

    def die_after_saving(self, model, trial):
        original(self, model, trial)
        raise KeyboardInterrupt

    monkeypatch.setattr(ParaphraserTrainer, "_save_checkpoint", die_after_saving)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(output_dir=str(tmp_path / "broken"), **arguments).train()
    monkeypatch.setattr(ParaphraserTrainer, "_save_checkpoint", original)
    assert (tmp_path / "broken" / "_stage_1" / "checkpoint-5").is_dir()
    shutil.copytree(tmp_path / "broken", tmp_path / "copy")

    resumed, steps = make_trainer(output_dir=str(tmp_path / "broken"), **arguments), []
    compute_loss = ParaphraserTrainer.compute_loss

    def counted(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(ParaphraserTrainer, "compute_loss", counted)
    resumed.train(resume_from_checkpoint=True)
    assert same(everything(resumed), everything(straight)) and steps == [5, 6, 7, 8, 9]
    # The same, with the stage's checkpoint named.
    named = make_trainer(output_dir=str(tmp_path / "copy"), **arguments)
    steps.clear()
    named.train(resume_from_checkpoint=str(tmp_path / "copy" / "_stage_1" / "checkpoint-5"))
    assert same(everything(named), everything(straight)) and steps == [5, 6, 7, 8, 9]


def test_interrupted_between_the_stages(make_trainer, tmp_path):
    straight = make_trainer(output_dir=str(tmp_path / "straight"), **ARGUMENTS)
    straight.train()
    finished = make_trainer(output_dir=str(tmp_path / "broken"), **ARGUMENTS)
    finished.teacher.tap.attach()
    finished.run_stage_1()
    assert not list((tmp_path / "broken").glob("checkpoint-*"))
    resumed = make_trainer(output_dir=str(tmp_path / "broken"), **ARGUMENTS)
    resumed.train(resume_from_checkpoint=True)
    assert same(everything(resumed), everything(straight))


def test_a_given_paraphraser_gives_the_same_stage_2(make_trainer, tmp_path):
    first = make_trainer(output_dir=str(tmp_path / "first"), **ARGUMENTS)
    first.train()
    second = make_trainer(
        output_dir=str(tmp_path / "second"), paraphraser=str(tmp_path / "first" / "_paraphraser"), **ARGUMENTS
    )
    second.train()
    assert same(everything(second), everything(first))


def test_vit_is_reloaded_whole_where_trainer_is_not(tmp_path):
    """Stock Trainer's reload is the defect that load_weights is for: when it is mended there, this test says so."""
    saved = make_vit(seed=5)
    saved.save_pretrained(tmp_path)
    ours, stock = make_vit(seed=6), make_vit(seed=6)
    load_weights(ours, str(tmp_path))
    assert same(ours.state_dict(), saved.state_dict())
    args = TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)
    Trainer(stock, args)._load_from_checkpoint(str(tmp_path))
    assert not same(stock.state_dict(), saved.state_dict()), "load_weights may be replaced by Trainer's own"


def test_resume_refuses_other_shapes_and_keeps_the_disk(make_trainer, tmp_path):
    make_trainer(**(ARGUMENTS | {"max_steps": 5})).train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    wider = make_trainer(make_resnet(12, seed=1), **ARGUMENTS)
    with pytest.raises(ValueError, match=r"other shapes.*another output_dir"):
        wider.train(resume_from_checkpoint=True)
    other_split = make_trainer(inheritance_ratio=0.25, **ARGUMENTS)
    with pytest.raises(ValueError, match="inheritance_ratio"):
        other_split.train(resume_from_checkpoint=True)
    cheaper = make_trainer(encoder_kernel_size=1, **ARGUMENTS)
    with pytest.raises(ValueError, match="encoder_kernel_size"):
        cheaper.train(resume_from_checkpoint=True)
    other_paraphraser = make_trainer(paraphraser=Paraphraser(16, 8), **ARGUMENTS)
    with pytest.raises(ValueError, match="paraphraser that the checkpoint"):
        other_paraphraser.train(resume_from_checkpoint=True)
    other_layer = make_trainer(student_layers=["resnet.encoder.stages.1"], **ARGUMENTS)
    with pytest.raises(ValueError, match="student_layers"):
        other_layer.train(resume_from_checkpoint=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_resume_refuses_a_plain_trainers_checkpoint(make_trainer, tmp_path):
    args = TrainingArguments(str(tmp_path / "out"), max_steps=1, save_steps=1, report_to="none", use_cpu=True)
    Trainer(make_resnet(8, seed=1), args, train_dataset=make_images()).train()
    trainer = make_trainer(paraphraser=Paraphraser(16, 8))
    with pytest.raises(ValueError, match="another trainer"):
        trainer.train(resume_from_checkpoint=True)


def test_resume_without_a_checkpoint(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="got none"):
        make_trainer(output_dir=str(tmp_path / "nothing")).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(make_trainer, tmp_path, value):
    calls = []

    def compute_loss_func(outputs, labels, num_items_in_batch=None):
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
        if trainer.optimizer is None:  # the gradients' shares are measured, before training
            return loss
        calls.append(1)
        return loss * value if len(calls) == 3 else loss

    trainer = make_trainer(
        compute_loss_func=compute_loss_func, max_steps=8, save_strategy="steps", save_steps=2, logging_steps=100
    )
    with pytest.raises(FloatingPointError, match=r"task_loss at step 3\..*checkpoint-2, is kept"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2"]
    assert len(calls) == 4  # found when checkpoint-4 was due, which was not written
    again = make_trainer(max_steps=3, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


def test_a_peers_loss_that_is_not_finite_is_named(make_mutual):
    images = make_images()
    images[3]["pixel_values"][:] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"peer_1/reconstruction_loss.*peer_2/task_loss.* at step [1-4]\."
    ) as error:
        make_mutual(train_dataset=images, max_steps=5, logging_steps=5).train()
    assert "no checkpoint had been written" in str(error.value)


def test_nan_in_stage_1_names_the_reconstruction(make_trainer):
    images = make_images()
    images[3]["pixel_values"][:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"reconstruction_loss at step [1-4]\.") as error:
        make_trainer(train_dataset=images, paraphraser_epochs=3).train()
    assert "no checkpoint had been written" in str(error.value)


def test_a_model_that_cannot_be_saved_whole_leaves_the_earlier_one(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}

    def fill(*args, **kwargs):
        (tmp_path / "out" / "_saving" / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(trainer.model), "save_pretrained", fill)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_model()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()} == before


def test_a_full_disk_costs_one_checkpoint(make_trainer, tmp_path, monkeypatch, caplog):
    straight = make_trainer(max_steps=6, output_dir=str(tmp_path / "straight"))
    straight.train()
    trainer = make_trainer(max_steps=6, save_strategy="steps", save_steps=2)
    save = type(trainer)._save_optimizer_and_scheduler

    def fill(self, folder):
        if self.state.global_step == 4:
            (Path(folder) / "optimizer.pt").write_bytes(b"PK")
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", fill)
    trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert not (tmp_path / "out" / "_saving").exists()
    assert "No space left on device" in caplog.text and "checkpoint-2 is the last whole checkpoint" in caplog.text
    assert same(trainer.student_side.state_dict(), straight.student_side.state_dict())


@pytest.mark.parametrize("kind", ["make_trainer", "make_mutual"])
def test_a_full_disk_at_the_best_checkpoint_leaves_the_best_before_it(request, tmp_path, monkeypatch, kind):
    accuracies = {2: 0.1, 4: 0.9, 6: 0.2}
    trainer = request.getfixturevalue(kind)(
        **{**BEST, "max_steps": 6}, compute_metrics=lambda _: {"accuracy": accuracies[trainer.state.global_step]}
    )
    save = type(trainer)._save_optimizer_and_scheduler

    def fill(self, folder):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", fill)
    trainer.train()
    best = tmp_path / "out" / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    state = json.loads((tmp_path / "out" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    saved = load_file(best / ("peer_1" if kind == "make_mutual" else "") / "model.safetensors")
    assert same(saved, trainer.model.state_dict())


def test_no_checkpoint_is_the_best_where_its_disk_was_full(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(**BEST, compute_metrics=lambda _: {"accuracy": 0.5})

    def fill(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(trainer), "_save_optimizer_and_scheduler", fill)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None


@pytest.mark.parametrize("only_model", [False, True])
def test_a_checkpoint_without_its_optimizer(make_trainer, tmp_path, only_model, caplog):
    make_trainer(save_strategy="steps", save_steps=2, save_only_model=only_model).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    if only_model:
        make_trainer(max_steps=4).train(resume_from_checkpoint=str(checkpoint))
        assert "has no optimizer.pt and no scheduler.pt and no rng_state.pth" in caplog.text
        return
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing"):
        make_trainer(max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "manifest.json").unlink()  # as an earlier version has written it
    with pytest.raises(ValueError, match=r"Expected optimizer\.pt in .*save_only_model=True"):
        make_trainer(max_steps=4).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_of_another_number_of_processes_is_told_of(make_trainer, tmp_path, processes, caplog):
    make_trainer(save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    if processes == 2:
        (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
        shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
        write_manifest(checkpoint)
    make_trainer(max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    told = "was saved by 2 processes and goes on with 1: the order of the images" in caplog.text
    assert told == (processes == 2)


def test_a_checkpoint_of_another_student_is_refused_before_anything_is_made(make_trainer, tmp_path, monkeypatch):
    make_trainer(save_strategy="steps", save_steps=2).train()
    other = make_trainer(make_vit(seed=1), output_dir=str(tmp_path / "other"))
    monkeypatch.setattr(type(other), "before_training", lambda *args: pytest.fail("prepared before it was refused"))
    with pytest.raises(ValueError, match=r"Expected (a checkpoint of this|every weight of) ViTForImageClassification"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert not list((tmp_path / "other").iterdir())


def test_a_checkpoint_of_a_version_without_manifests_goes_on(make_trainer, tmp_path):
    straight = make_trainer(max_steps=4, output_dir=str(tmp_path / "straight"))
    straight.train()
    make_trainer(max_steps=4, callbacks=[StopAt(2)]).train()
    (tmp_path / "out" / "checkpoint-2" / "manifest.json").unlink()
    (tmp_path / "out" / "_paraphraser" / "manifest.json").unlink()
    (tmp_path / "out" / "_run.json").unlink()
    resumed = make_trainer(max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed.student_side.state_dict(), straight.student_side.state_dict())


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_foreign_pickle_runs_no_code(make_trainer, tmp_path, name):
    make_trainer(save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    torch.save({"state": Payload(tmp_path / "ran")}, checkpoint / name)
    write_manifest(checkpoint)
    with pytest.raises(Exception, match=r"weights_only|Weights only|WeightsUnpickler"):
        make_trainer(max_steps=4).train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("limit", [None, 2])
def test_a_run_whose_folder_was_moved_keeps_its_best_checkpoint(make_trainer, tmp_path, limit):
    measured = iter([0.1, 0.9, 0.2, 0.3, 0.4])
    settings = BEST | {"save_steps": 1, "eval_steps": 1, "compute_metrics": lambda _: {"accuracy": next(measured)}}
    make_trainer(method="kd", max_steps=3, **settings).train()
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    best = load_file(moved / "checkpoint-2" / "model.safetensors")
    again = make_trainer(method="kd", max_steps=5, output_dir=str(moved), save_total_limit=limit, **settings)
    again.train(resume_from_checkpoint=str(moved / "checkpoint-3"))
    assert again.state.best_metric == 0.9 and (moved / "checkpoint-2").is_dir()
    assert all(torch.equal(again.student.state_dict()[name], value) for name, value in best.items())


def test_a_trial_of_a_search_can_be_resumed(make_trainer, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    search = make_trainer(model_init=lambda: make_resnet(8, seed=1), eval_dataset=make_images(4), **settings)
    best = search.hyperparameter_search(lambda trial: {"learning_rate": 0.01}, n_trials=1, backend="optuna")
    checkpoint = tmp_path / "out" / f"run-{best.run_id}" / "checkpoint-1"
    trainer = make_trainer(max_steps=3)
    assert trainer.train(resume_from_checkpoint=str(checkpoint)).global_step == 3


def test_a_run_that_goes_on_elsewhere_takes_its_paraphraser_along(make_trainer, tmp_path):
    """From there it goes on again, and not with what an older run has left in that folder."""
    settings = ARGUMENTS | {"max_steps": 4, "save_steps": 2}
    whole = make_trainer(**settings)
    whole.train()
    elsewhere = {**settings, "output_dir": str(tmp_path / "elsewhere")}
    make_trainer(**elsewhere | {"seed": 3}).train()  # another run's
    broken = make_trainer(**elsewhere, callbacks=[StopAt(3)])
    broken.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    kept = Paraphraser.from_pretrained(tmp_path / "elsewhere" / "_paraphraser").state_dict()
    assert same(kept, Paraphraser.from_pretrained(tmp_path / "out" / "_paraphraser").state_dict())
    resumed = make_trainer(**elsewhere)
    resumed.train(resume_from_checkpoint=True)
    assert same(everything(whole), everything(resumed))
