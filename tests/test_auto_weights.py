"""Weights that are "auto": what they are by hand, when they are measured, and that nothing else notices."""

import json
import math
import sys
import warnings

import pytest
import torch
from conftest import make_images, make_resnet, make_vit, same
from test_resume import StopAt, everything, logged
from test_whole_batches import make_augmentation, make_decoded
from transformers import HfArgumentParser, ResNetForImageClassification, TrainerCallback

from iekd_hf import METHODS, IEKDTrainer, IEKDTrainingArguments, MutualTrainingArguments, Paraphraser
from iekd_hf.commands.distill import KINDS
from iekd_hf.commands.parser import CommandParser
from iekd_hf.training import weights
from iekd_hf.training.gradient_shares import measure_ratios
from iekd_hf.training.weights import AutoWeights


AUTO = {"lambda_inh": "auto", "lambda_exp": "auto"}
SHARES = ("inheritance_loss_gradient_share", "exploration_loss_gradient_share", "kd_loss_gradient_share")


@pytest.fixture
def often(monkeypatch):
    """Measure each third step at least."""
    monkeypatch.setattr(weights, "_LEAST", 2)
    monkeypatch.setattr(weights, "_MOST", 3)


def measured(trainer) -> list[dict]:
    return [logs for logs in trainer.state.log_history if logs.keys() & {*SHARES} and "train_loss" not in logs]


# ---- The arguments ----


def test_arguments_take_numbers_and_the_word(tmp_path):
    args = IEKDTrainingArguments(tmp_path, lambda_inh="auto", lambda_exp="3", lambda_kd=2)
    assert (args.lambda_inh, args.lambda_exp, args.lambda_kd) == ("auto", 3.0, 2)
    assert IEKDTrainingArguments(tmp_path, lambda_inh="1e3").lambda_inh == 1000.0
    for wrong in ("Auto", "much", ""):
        with pytest.raises(ValueError, match=f"Expected lambda_kd as a number or 'auto', got '{wrong}'"):
            IEKDTrainingArguments(tmp_path, lambda_kd=wrong)
    for wrong in (-1.0, "-1", "nan", "inf", float("inf")):
        with pytest.raises(ValueError, match="Expected lambda_exp to be a finite weight of at least 0"):
            IEKDTrainingArguments(tmp_path, lambda_exp=wrong)
    with pytest.raises(ValueError, match="lambda_inh of type float or str or None, got True"):
        IEKDTrainingArguments(tmp_path, lambda_inh=True)
    with pytest.raises(ValueError, match=r"Expected kd_share above 0, got 0\.0"):
        IEKDTrainingArguments(tmp_path, kd_share=0.0)
    for name in ("lambda_inh", "lambda_exp", "lambda_kl"):
        with pytest.raises(ValueError, match=f"Expected {name} as a number for peers, got 'auto'"):
            MutualTrainingArguments(tmp_path, **{name: "auto"})


def test_the_command_line_takes_both(tmp_path):
    given = ["--output_dir", str(tmp_path), "--lambda_inh", "auto", "--lambda_exp", "3e2", "--kd_share", "1.5"]
    for parsed in (
        HfArgumentParser(IEKDTrainingArguments).parse_args_into_dataclasses(given)[0],
        next(a for a in CommandParser(KINDS, "Distil.").read(given) if isinstance(a, IEKDTrainingArguments)),
    ):
        assert (parsed.lambda_inh, parsed.lambda_exp, parsed.kd_share) == ("auto", 300.0, 1.5)
        assert parsed.lambda_kd == METHODS["ie-ft"]["lambda_kd"]


# ---- What is found ----


def test_the_shares_are_those_that_were_asked_for(make_trainer):
    """Found before training; the number given by hand has that share, and trains to the same bits."""
    given = {"lambda_kd": "auto", "inheritance_share": 3.0, "exploration_share": 0.25, "kd_share": 0.5}
    trainer = make_trainer(**AUTO, **given)
    metrics = trainer.train().metrics
    assert [metrics[name] for name in SHARES] == pytest.approx([3.0, 0.25, 0.5], rel=1e-5)
    logs = logged(trainer)[0]
    found = {name: logs[name] for name in ("lambda_inh", "lambda_exp", "lambda_kd")}
    assert found == trainer.distillation_objective.weights() and all(value > 0 for value in found.values())
    by_number = make_trainer(**found)
    by_number.train()
    assert same(by_number.student_side.state_dict(), trainer.student_side.state_dict())
    assert logged(by_number) == logged(trainer)


def test_a_schedule_scales_what_is_found(make_trainer):
    trainer = make_trainer(**AUTO, lambda_schedule="linear", max_steps=4)
    trainer.train()
    found = trainer.distillation_objective.weights()["lambda_inh"]
    assert [logs["lambda_inh"] / found for logs in logged(trainer)] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_measured_again_with_a_running_mean(make_trainer, often):
    """After 2, 4 and 7 steps; each time the geometric mean of what was and what is."""
    ratios, courses = [], []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            courses.append(trainer.distillation_objective.weights()["lambda_inh"])
            ratios.append(measure_ratios(trainer)["inheritance_loss"])

    trainer = make_trainer(lambda_inh="auto", lambda_exp=0.0, max_steps=9, learning_rate=0.05, callbacks=[Look()])
    trainer.train()
    mean, expected = ratios[0], []
    for step in range(9):
        mean = math.sqrt(mean * ratios[step]) if step in (2, 4, 7) else mean
        expected.append(10.0 / mean)
    assert courses == pytest.approx(expected, rel=1e-5)
    assert len(set(courses)) == 4
    assert [logs["step"] for logs in measured(trainer)] == [2, 4, 7]
    assert measured(trainer)[0][SHARES[0]] == pytest.approx(courses[2] * ratios[2], rel=1e-5)


def test_a_weight_does_not_run_after_a_loss_that_is_met():
    """An encoder may meet its loss by itself, the sooner the larger the weight, whose gradient then vanishes."""
    kept = AutoWeights()
    for step, ratio in enumerate([0.1, 0.05, 1e-4, 1e-9, 0.0, 1e-9]):
        kept.take({"lambda_exp": ratio}, step)
    assert kept.ratios["lambda_exp"] == pytest.approx(0.01)  # ten times the first weight
    kept.take({"lambda_exp": 0.09}, 6)
    assert kept.ratios["lambda_exp"] == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("steps_of_an_epoch", "expected"),
    [
        (1000, [0, 100, 200, 400, 800, 1300, 1800, 2300]),
        (352, [0, 100, 200, 400, 752, 1104, 1456, 1808, 2160]),  # once an epoch
        (19, [*range(0, 2400, 100)]),
    ],
)
def test_when_it_is_measured(steps_of_an_epoch, expected):
    kept, steps, most = AutoWeights(), [], weights.steps_between(10 * steps_of_an_epoch, 10)
    for step in range(2400):
        if kept.is_due(step, most):
            steps.append(step)
            kept.take({}, step)
    assert steps == expected
    # Those of numbers are logged at the same steps, but for the first, whose shares are among the run's metrics.
    assert [step for step in range(2400) if weights._is_time(step, most)] == steps[1:]
    if steps_of_an_epoch >= 100:
        assert {step // steps_of_an_epoch for step in steps} == {*range(1 + steps[-1] // steps_of_an_epoch)}


def test_a_stream_has_no_epochs_to_measure_in():
    assert weights.steps_between(10_000, sys.maxsize) == 500


def test_shares_of_numbers_are_logged_on_the_way(make_trainer, tmp_path, often):
    """After 2, 4 and 7 steps, which changes nothing else; a resumed run goes on with it."""

    def make(folder, **kwargs):
        common = {"max_steps": 9, "save_strategy": "no", "output_dir": str(tmp_path / folder)}
        return make_trainer(make_vit(seed=1, hidden_dropout_prob=0.1), **common, **kwargs)

    straight, resumed = make("straight"), make("broken", callbacks=[StopAt(4)])
    straight.train()
    resumed.train()
    resumed = make("broken")
    resumed.train(resume_from_checkpoint=True)
    assert [logs["step"] for logs in measured(straight)] == [2, 4, 7]
    assert measured(straight)[0].keys() == {*SHARES[:2], "epoch", "step"}
    assert measured(resumed) == measured(straight) and same(everything(resumed), everything(straight))
    weights._LEAST = weights._MOST = 100
    without = make("without")
    without.train()
    assert measured(without) == [] and same(everything(without), everything(straight))
    assert logged(without) == logged(straight)


def test_what_is_no_ratio_changes_nothing():
    kept = AutoWeights()
    kept.take({"lambda_inh": 4.0, "lambda_exp": 0.0}, 0)
    kept.take({"lambda_inh": float("nan"), "lambda_exp": float("inf")}, 1)
    kept.take({}, 2)
    assert kept.ratios == {"lambda_inh": 4.0}
    kept.take({"lambda_inh": 1.0}, 3)
    assert kept.ratios == {"lambda_inh": 2.0} and json.loads(json.dumps(kept.state())) == kept.state()


# ---- What does not notice ----


@pytest.mark.parametrize("kind", ["resnet", "vit", "decoded"])
def test_measuring_amid_training_leaves_no_trace(make_trainer, kind):
    """Weights, BatchNorm's statistics, dropout and the order of images are as without."""

    class Measure(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            first, second = measure_ratios(trainer), measure_ratios(trainer)
            assert first == second and first["inheritance_loss"] > 0

    def make(**kwargs):
        model = make_vit(seed=1, hidden_dropout_prob=0.1) if kind == "vit" else make_resnet(8, seed=1)
        if kind == "decoded":
            kwargs |= {"train_dataset": make_decoded(16), "augmentation": make_augmentation()}
        return make_trainer(model, max_steps=5, gradient_accumulation_steps=2, **kwargs)

    without = make()
    without.train()
    trainer = make(callbacks=[Measure()])
    trainer.train()
    assert same(everything(trainer), everything(without))
    assert logged(trainer) == logged(without)


@pytest.mark.parametrize("accumulated, precision", [(1, {}), (2, {}), (1, {"bf16": True})])
def test_batches_and_precision_do_not_matter(make_trainer, accumulated, precision):
    torch.manual_seed(0)
    given = AUTO | {"paraphraser": Paraphraser(16, 8)}
    trainer = make_trainer(**given, gradient_accumulation_steps=accumulated, **precision)
    trainer.train()
    plain = make_trainer(**given)
    plain.train()
    found, expected = (t.distillation_objective.weights() for t in (trainer, plain))
    tolerance = 0.1 if precision else 1e-6
    assert [*found.values()] == pytest.approx([*expected.values()], rel=tolerance)


@pytest.mark.parametrize("stop, restored", [(5, False), (4, True), (7, True)])
def test_resumed_to_the_last_bit(make_trainer, tmp_path, often, stop, restored):
    """Between two measurements, and just before one; also where Trainer restores callbacks by itself."""

    def make(folder, **kwargs):
        model = make_vit(seed=1, hidden_dropout_prob=0.1)
        common = {"max_steps": 9, "save_strategy": "no", "lambda_kd": "auto", "learning_rate": 0.05}
        common["restore_callback_states_from_checkpoint"] = restored
        return make_trainer(model, output_dir=str(tmp_path / folder), **AUTO, **common, **kwargs)

    straight = make("straight")
    straight.train()
    make("broken", callbacks=[StopAt(stop)]).train()
    resumed = make("broken")
    resumed.train(resume_from_checkpoint=True)
    assert same(everything(resumed), everything(straight))
    assert logged(resumed) == logged(straight) and measured(resumed) == measured(straight)
    assert len(measured(straight)) == 3
    assert resumed.distillation_objective.weights() == straight.distillation_objective.weights()


def test_resumed_with_numbers_before(make_trainer):
    """A checkpoint that knows nothing of it: measured at the first step, and saved from there on."""
    make_trainer(max_steps=4, save_strategy="steps", save_steps=2, callbacks=[StopAt(2)]).train()
    trainer = make_trainer(**AUTO, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert [logs["step"] for logs in measured(trainer)] == [2]
    assert trainer.state.stateful_callbacks["AutoWeights"]["attributes"]["measured_at"] == 2


def test_training_twice_begins_anew(make_trainer):
    trainer = make_trainer(**AUTO)
    trainer.train()
    first = trainer.distillation_objective.weights()
    trainer.train()
    assert trainer.distillation_objective.weights() != first
    assert sum(isinstance(c, AutoWeights) for c in trainer.callback_handler.callbacks) == 1


# ---- Without labels ----


def test_without_labels_it_is_refused(make_trainer):
    images = [{"pixel_values": image["pixel_values"]} for image in make_images()]
    with pytest.raises(ValueError, match=r"labels for lambda_inh='auto', got none.*'ie-ft' are lambda_inh=3000"):
        make_trainer(lambda_inh="auto", train_dataset=images)


def test_where_the_measured_batches_have_no_label_the_preset_holds(make_trainer):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(42)).tolist()
    images = make_images(64)
    for i in order[:60]:
        images[i]["labels"] = -100
    trainer = make_trainer(**AUTO, train_dataset=images)
    with pytest.warns(UserWarning, match=r"lambda_inh and lambda_exp cannot be found.*inh=3000, lambda_exp=300"):
        trainer.train()
    assert logged(trainer)[0]["lambda_inh"] == METHODS["ie-ft"]["lambda_inh"]


# ---- Clipping ----


@pytest.mark.parametrize(
    "warns, settings",
    [
        (True, {"optim": "sgd"}),
        (True, {"optim": "sgd", "method": "at", "max_grad_norm": 5.0}),
        (True, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}),
        (False, {"optim": "sgd", "max_grad_norm": 0.0}),
        (False, {"optim": "sgd", "method": "kd"}),
        (False, {"optim": "adamw_torch"}),
    ],
)
def test_clipping_with_sgd_is_warned_of_once(make_trainer, warns, settings):
    trainer = make_trainer(paraphraser=Paraphraser(16, 8) if "method" not in settings else None, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(w.message) for w in caught if "max_grad_norm=0" in str(w.message)]
    assert len(told) == warns
    if told:
        assert "71.6 % in place of 80.4 %" in told[0]


def test_an_optimizer_that_was_given(make_trainer):
    student = make_resnet(8, seed=1)
    optimizers = (torch.optim.SGD(student.parameters(), lr=0.1), None)
    with pytest.warns(UserWarning, match="max_grad_norm=1 clips"):
        make_trainer(student, optimizers=optimizers).train()


def test_a_head_that_reads_the_class_token_alone_has_a_gradient(make_trainer):
    """It has none at the patches, which are a ViT's map."""
    trainer = make_trainer(make_vit(seed=1), **AUTO)
    metrics = trainer.train().metrics
    assert metrics["inheritance_loss_gradient_share"] == pytest.approx(10.0)


# ---- Batches of a size that is found ----


def make_limited() -> ResNetForImageClassification:
    """Make a student that trains on at most eight images at once."""
    model = make_resnet(8, seed=1)
    forward = model.forward

    def limited(pixel_values, labels=None, **kwargs):
        if model.training and len(pixel_values) > 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return forward(pixel_values=pixel_values, labels=labels, **kwargs)

    model.forward = limited
    return model


@pytest.mark.parametrize("given", ["model", "model_init"])
@pytest.mark.parametrize("lambdas", [{}, AUTO])
def test_measured_in_batches_that_fit(make_trainer, often, monkeypatch, given, lambdas):
    sizes = []
    measure = IEKDTrainer.maps_and_losses

    def note(self, inputs):
        sizes.append((self.state.global_step, len(inputs["pixel_values"])))
        return measure(self, inputs)

    monkeypatch.setattr(IEKDTrainer, "maps_and_losses", note)
    student = {"model": make_limited()} if given == "model" else {"model_init": make_limited}
    found = {"auto_find_batch_size": True, "per_device_train_batch_size": 12}
    trainer = make_trainer(**student, **found, **lambdas, train_dataset=make_images(48), max_steps=4)
    metrics = trainer.train().metrics
    assert trainer._train_batch_size <= 8 and trainer.state.global_step == 4
    assert sizes[0] == (0, 12)  # the try that does not fit
    assert {size for _, size in sizes[-8:]} == {trainer._train_batch_size}
    assert {step for step, _ in sizes} == {0, 2}
    assert [metrics[name] > 0 for name in SHARES[:2]] == [True, True]
    if lambdas:
        assert [metrics[name] for name in SHARES[:2]] == pytest.approx([10.0, 1.0], rel=1e-5)


def test_what_was_measured_in_batches_that_did_not_fit_is_forgotten(make_trainer, monkeypatch):
    """The measurement fits, the training does not."""
    compute_loss = IEKDTrainer.compute_loss

    def limited(self, model, inputs, *args, **kwargs):
        if model.training and len(inputs["pixel_values"]) > 8:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(IEKDTrainer, "compute_loss", limited)
    settings = {**AUTO, "paraphraser": Paraphraser(16, 8)}
    trainer = make_trainer(**settings, auto_find_batch_size=True, per_device_train_batch_size=12)
    metrics = trainer.train().metrics
    straight = make_trainer(**settings, per_device_train_batch_size=trainer._train_batch_size)
    assert straight.train().metrics[SHARES[0]] == pytest.approx(metrics[SHARES[0]])
    assert logged(trainer)[0]["lambda_inh"] == pytest.approx(logged(straight)[0]["lambda_inh"])
