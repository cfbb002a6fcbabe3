"""What trackers get through Trainer's `report_to`: components and weights, in groups, and no path of this machine."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import make_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


COMPONENTS = ("task_loss", "inheritance_loss", "exploration_loss")


def read_events(folder: Path) -> EventAccumulator:
    (folder,) = {path.parent for path in folder.rglob("events*")}
    return EventAccumulator(str(folder)).Reload()


def check_scalars(events: EventAccumulator, log_history: list[dict], names: list[str]) -> None:
    """Compare each scalar, step by step, with what the trainer has logged."""
    for name in names:
        tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
        logged = [(logs["step"], logs[name]) for logs in log_history if name in logs]
        assert logged, name
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(s, pytest.approx(v, rel=1e-6)) for s, v in logged]


def test_tensorboard_has_components_and_weights(make_trainer, tmp_path):
    trainer = make_trainer(
        report_to="tensorboard", hub_token="hf_secret", lambda_schedule="linear", lambda_inh=1000, lambda_kd=0.5
    )
    trainer.train()
    events = read_events(tmp_path / "out" / "runs")
    names = ["loss", *COMPONENTS, "kd_loss", "lambda_inh", "lambda_exp", "lambda_kd", "learning_rate"]
    check_scalars(events, trainer.state.log_history, names)
    assert [e.value for e in events.Scalars("train/lambda_inh")] == [500, 0]
    # Both stages may be one run of a tracker: the names of the first stage are its own.
    events = read_events(tmp_path / "out" / "_stage_1")
    scalars = events.Tags()["scalars"]
    assert all(tag.startswith("train/paraphraser/") or tag == "train/epoch" for tag in scalars), scalars
    assert len(events.Scalars("train/paraphraser/reconstruction_loss")) == 4
    assert len(events.Scalars("train/paraphraser/held_out_mean_map_loss")) == 1
    # What is pushed along.
    for file in (tmp_path / "out").rglob("events*"):
        content = file.read_bytes()
        assert b'"lambda_inh": 1000' in content
        assert str(tmp_path).encode() not in content and b"hf_secret" not in content, file


def test_tensorboard_groups_by_peer(make_mutual, tmp_path):
    evaluated = {"eval_dataset": make_images(), "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_mutual(report_to="tensorboard", mutual_loss="ie+kl", **evaluated)
    trainer.train()
    names = [f"peer_{i}/{name}" for i in (1, 2) for name in (*COMPONENTS, "kl_loss", "reconstruction_loss")]
    names += ["lambda_inh", "lambda_exp", "lambda_kl", "eval_loss", "eval_peer_1_loss", "eval_peer_2_loss"]
    check_scalars(read_events(tmp_path / "out" / "runs"), trainer.state.log_history, names)


def test_trackers_of_accelerate_are_let_alone(make_trainer, tmp_path):
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "own")
    accelerator.init_trackers("script", config={"note": 1})
    make_trainer(report_to="none").train()
    accelerator.log({"mine": 2.5}, step=7)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "own" / "script")).Reload()
    assert events.Tags()["scalars"] == ["mine"]
    assert [(e.step, e.value) for e in events.Scalars("mine")] == [(7, 2.5)]
