"""The moving average of a student: its values by hand, saved, evaluated on demand, and resumed to the bit."""

import pytest
import torch
from conftest import make_images, make_resnet, same
from test_resume import ARGUMENTS, StopAt
from transformers import ResNetForImageClassification, TrainerCallback

from iekd_hf import EMACallback
from iekd_hf.hub.card_facts import curve, last_metrics


class Watch(TrainerCallback):
    """Keep the student's state after each step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def test_the_average_is_the_recursion_over_all_steps(make_trainer):
    """Of weights and of BatchNorm's statistics; the first step is taken as it is."""
    watch, average = Watch(), EMACallback(decay=0.75)
    trainer = make_trainer(callbacks=[watch, average], max_steps=3)
    trainer.train()
    first, second, third = watch.states
    averaged = average.model.state_dict()
    for name, value in first.items():
        if value.is_floating_point():
            expected = 0.75 * (0.75 * value + 0.25 * second[name]) + 0.25 * third[name]
            torch.testing.assert_close(averaged[name], expected)
    assert any("running_mean" in name and not torch.equal(third[name], averaged[name]) for name in first)
    assert same(trainer.model.state_dict(), third)  # what trains is left alone
    assert not any(parameter.requires_grad for parameter in average.model.parameters())


def test_a_resumed_run_has_the_same_average(make_trainer, tmp_path):
    def run(folder, *callbacks, resume=None):
        average = EMACallback(decay=0.9)
        trainer = make_trainer(**ARGUMENTS, output_dir=str(tmp_path / folder), callbacks=[average, *callbacks])
        trainer.train(resume_from_checkpoint=resume)
        return average.averaged.state_dict()

    straight = run("straight")
    interrupted = run("broken", StopAt(5))
    assert not same(interrupted, straight)
    assert same(run("broken", resume=True), straight)


def test_a_run_that_had_no_average_begins_one(make_trainer, tmp_path, caplog):
    make_trainer(**ARGUMENTS, callbacks=[StopAt(5)]).train()
    average, watch = EMACallback(decay=0.5), Watch()
    trainer = make_trainer(**{**ARGUMENTS, "max_steps": 6}, callbacks=[average, watch])
    trainer.train(resume_from_checkpoint=True)
    assert "There is no average of the student in" in caplog.text
    assert same(average.model.state_dict(), watch.states[0])


def test_it_is_evaluated_and_saved_on_demand(make_trainer, tmp_path):
    average = EMACallback(decay=0.99)
    images = make_images()
    trainer = make_trainer(callbacks=[average], max_steps=4, learning_rate=0.1, eval_dataset=images)
    trainer.train()
    before, state = trainer.evaluate()["eval_loss"], {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with average.in_use(trainer.model):
        of_average = trainer.evaluate()["eval_loss"]
        trainer.save_model(tmp_path / "average")
    assert trainer.evaluate()["eval_loss"] == before != of_average
    assert same(trainer.model.state_dict(), state)
    saved = ResNetForImageClassification.from_pretrained(tmp_path / "average").eval()
    pixel_values = torch.stack([image["pixel_values"] for image in images])
    with torch.no_grad():
        assert torch.equal(saved(pixel_values).logits, average.model.eval()(pixel_values).logits)


def spread(prediction) -> dict[str, float]:
    """Measure what no two sets of weights have in common."""
    return {"spread": float(prediction.predictions.std())}


MEASURED = {
    **ARGUMENTS,
    "eval_dataset": make_images(),
    "compute_metrics": spread,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "max_steps": 3,
    "learning_rate": 0.1,
}


def test_a_card_has_the_metrics_of_the_weights_that_are_written(make_trainer, tmp_path):
    average = EMACallback(decay=0.9)
    trainer = make_trainer(**MEASURED, callbacks=[average])
    trainer.train()
    own = last_metrics(trainer)
    with average.in_use(trainer.model):
        assert own and last_metrics(trainer) == {}
        of_average = trainer.evaluate()["eval_spread"]
        trainer.create_model_card()
    assert f"| {of_average:.4f} |" in (tmp_path / "out" / "README.md").read_text()
    trainer.create_model_card()
    assert f"| {own['spread']:.4f} |" in (tmp_path / "out" / "README.md").read_text()
    with average.in_use(trainer.model), average.in_use(trainer.model):  # the student's are back
        assert last_metrics(trainer) == own
    trainer.evaluate()
    assert last_metrics(trainer) == pytest.approx(own) != {"spread": of_average}


class MeasureAverage(TrainerCallback):
    """Evaluate the average beside the student, after each step."""

    def __init__(self, average):
        self.average, self.trainer, self.measured = average, None, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with self.average.in_use(model):
            self.measured.append(self.trainer.evaluate()["eval_spread"])
        control.should_evaluate = True


@pytest.mark.parametrize("best", [False, True])
def test_metrics_of_an_average_are_told_apart_in_a_resumed_run(make_trainer, best):
    """Also where the student is that of its best step: the average is that of the last one."""
    arguments = MEASURED | {"save_steps": 1, "load_best_model_at_end": best}
    average = EMACallback(decay=0.9)
    measure = MeasureAverage(average)
    measure.trainer = trainer = make_trainer(**arguments, callbacks=[average, measure])
    trainer.train()
    assert not best or trainer.state.best_global_step < 3
    own = last_metrics(trainer)
    assert f"{measure.measured[1]}" not in curve(trainer.state.log_history)
    average = EMACallback(decay=0.9)
    resumed = make_trainer(**arguments, callbacks=[average])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and last_metrics(resumed) == own
    with average.in_use(resumed.model):
        assert last_metrics(resumed) == {"spread": measure.measured[-1]} != own


def test_bad_values(make_mutual):
    with pytest.raises(ValueError, match=r"Expected decay within \[0, 1\), got 1\.0"):
        EMACallback(decay=1.0)
    with pytest.raises(ValueError, match="Expected an average of a student, got none"):
        _ = EMACallback().model
    with pytest.raises(ValueError, match="Expected no EMACallback among the callbacks"):
        make_mutual([make_resnet(8), make_resnet(8, seed=1)], callbacks=[EMACallback()])
