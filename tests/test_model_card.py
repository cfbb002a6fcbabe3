"""The model card: metadata that the Hub takes, what a stranger reads, and nothing of this machine."""

import re

import pytest
from conftest import make_images, make_resnet
from hub_server import card_errors
from huggingface_hub import ModelCard
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

from iekd_hf import Paraphraser
from iekd_hf.hub.card_facts import curve, hub_id, last_metrics


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


def test_a_folder_is_no_name_on_the_hub():
    names = ("microsoft/resnet-18", "/home/me/student", "./student", "", None)
    assert [hub_id(name) for name in names] == ["microsoft/resnet-18", None, None, None, None]


EVALUATED = {
    "eval_dataset": make_images(),
    "compute_metrics": accuracy,
    "eval_strategy": "steps",
    "eval_steps": 1,
}


def read_card(folder) -> ModelCard:
    """Read a card that the Hub would take, whose links lead somewhere, and which is the same once more read."""
    content = (folder / "README.md").read_text()
    assert card_errors(content) == []
    card = ModelCard(content)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    for text, address in re.findall(r"\[([^\]]*)\]\(([^)]*)\)", card.text):
        assert text and re.fullmatch(r"https://(huggingface\.co/.+|arxiv\.org/abs/.+)|[\w.]+\.png", address), address
    assert str(folder.parent) not in content
    assert "{{" not in content and "{%" not in content and "None" not in content
    return card


def table_of(card: ModelCard) -> list[list[str]]:
    lines = card.text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| | model |"))
    rows = [line for line in lines[first : first + 10] if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in (rows[0], *rows[2:])]


def test_latencies_that_somebody_has_measured(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.create_model_card(latencies={"student": 0.456})
    card = read_card(tmp_path / "out")
    header, teacher, student = table_of(card)
    assert header[:5] == ["", "model", "parameters", "size", "latency"]
    assert (teacher[4], student[4]) == ("-", "0.46 ms")
    assert "Latency: one image on one thread of a CPU" in card.text
    trainer.create_model_card()
    assert "latency" not in read_card(tmp_path / "out").text.lower()


def test_from_configurations(make_trainer, tmp_path):
    trainer = make_trainer(**EVALUATED)
    trainer.train()
    trainer.create_model_card(teacher_metrics={"eval_accuracy": 0.875, "eval_loss": 1.0, "eval_runtime": 2.0})
    card = read_card(tmp_path / "out")
    data = card.data.to_dict()
    measured = trainer.state.log_history[-2]["eval_accuracy"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-classification"
    assert {"iekd", "knowledge-distillation"} <= set(data["tags"]) and data["metrics"] == ["accuracy"]
    (result,) = data["model-index"][0]["results"]
    assert result["task"] == {"type": "image-classification"}
    assert result["metrics"] == [{"type": "accuracy", "name": "accuracy", "value": measured}]
    for name in ("base_model", "base_model_relation", "teacher", "datasets", "license"):
        assert name not in data
    header, teacher, student = table_of(card)
    assert header == ["", "model", "parameters", "size", "accuracy"]
    assert teacher[2::2] == [f"{make_resnet(16).num_parameters():,}", "0.8750"]
    assert student[2::2] == [f"{make_resnet(8).num_parameters():,}", f"{measured:.4f}"]
    assert "imitates the teacher's" in card.text and "huang2021revisiting" in card.text
    assert "kim2018paraphrasing" in card.text and "| `lambda_inh` | 3000.0 |" in card.text
    assert "exploration_loss | eval_loss | eval_accuracy |" in re.sub(" +", " ", card.text)


def test_what_was_not_measured_is_left_out(make_trainer, tmp_path):
    trainer = make_trainer(**EVALUATED)
    trainer.train()
    trainer.create_model_card()
    assert next(row[4] for row in table_of(read_card(tmp_path / "out"))[1:]) == "-"
    trainer = make_trainer()
    trainer.train()
    trainer.create_model_card()
    card = read_card(tmp_path / "out")
    assert table_of(card)[0] == ["", "model", "parameters", "size"]
    assert "model-index" not in card.data.to_dict()


def test_from_folders(make_trainer, tmp_path):
    for name, width in (("student", 8), ("teacher", 16)):
        make_resnet(width).save_pretrained(tmp_path / name)
    trainer = make_trainer(model=str(tmp_path / "student"), teacher_model=str(tmp_path / "teacher"), **EVALUATED)
    trainer.train()
    trainer.create_model_card(dataset_tags=str(tmp_path), dataset=str(tmp_path / "gone"))
    data = read_card(tmp_path / "out").data.to_dict()
    assert "base_model" not in data and "teacher" not in data and "datasets" not in data


def test_from_the_hub(make_trainer, tmp_path):
    student, teacher = make_resnet(8), make_resnet(16)
    student.config.name_or_path, teacher.config.name_or_path = "microsoft/resnet-18", "microsoft/resnet-50"
    trainer = make_trainer(model=student, teacher_model=teacher, **EVALUATED)
    trainer.train()
    trainer.create_model_card(dataset_tags="uoft-cs/cifar10", dataset_args="plain_text", license="mit", tags="mine")
    card = read_card(tmp_path / "out")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("microsoft/resnet-18", "finetune")
    assert (data["teacher"], data["datasets"], data["license"]) == ("microsoft/resnet-50", ["uoft-cs/cifar10"], "mit")
    assert data["model-index"][0]["results"][0]["dataset"] == {
        "type": "uoft-cs/cifar10",
        "name": "uoft-cs/cifar10",
        "config": "plain_text",
    }
    for address in ("microsoft/resnet-18", "microsoft/resnet-50", "datasets/uoft-cs/cifar10"):
        assert f"(https://huggingface.co/{address})" in card.text
    # Only the configuration was taken; the tags of an earlier card stay.
    trainer.create_model_card(finetuned_from="")
    data = read_card(tmp_path / "out").data.to_dict()
    assert "base_model" not in data and "mine" in data["tags"]


def test_metrics_are_those_of_the_weights(make_trainer):
    trainer = make_trainer(
        **EVALUATED, max_steps=3, save_strategy="steps", save_steps=1, load_best_model_at_end=True, learning_rate=0.5
    )
    trainer.train()
    assert last_metrics(trainer) == pytest.approx({"accuracy": trainer.evaluate()["eval_accuracy"]})
    trainer.state.log_history = [logs for logs in trainer.state.log_history if "eval_accuracy" not in logs]
    assert last_metrics(trainer) == {}
    assert make_trainer(**(EVALUATED | {"eval_steps": 2}), max_steps=3).train().global_step == 3


def test_curve_is_short():
    history = [{"step": i, "epoch": i / 2, "loss": 1.0, "task_loss": 0.5} for i in range(1, 101)]
    history += [{"step": 100, "epoch": 50.0, "train_runtime": 1.0}]
    rows = curve(history).splitlines()[2:]
    assert len(rows) == 20
    assert [int(row.split("|")[2]) for row in rows][:: len(rows) - 1] == [1, 100]
    assert curve([]) == ""


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"lambda_kd": 1.0}, "answers imitate the teacher's ([Hinton"),
        ({"lambda_kd": 1.0, "kd_distance": "dist"}, "answers imitate the teacher's ([DIST"),
        ({"inheritance_ratio": 1.0}, "imitate"),
    ],
)
def test_other_recipes(make_trainer, tmp_path, settings, says):
    lambdas = {"lambda_inh": 0, "lambda_exp": 0} if "lambda_kd" in settings else {}
    make_trainer(**settings, **lambdas).create_model_card()
    text = read_card(tmp_path / "out").text
    assert says in text and "pushed to find" not in text and "Default:" not in text and "_share` |" not in text


def test_peers(make_mutual, tmp_path):
    trainer = make_mutual(**EVALUATED, mutual_loss="ie+kl")
    trainer.train()
    trainer.create_model_card()
    card = read_card(tmp_path / "out")
    (result,) = card.data.to_dict()["model-index"][0]["results"]
    logs = next(logs for logs in reversed(trainer.state.log_history) if "eval_accuracy" in logs)
    assert [(each["name"], each["value"]) for each in result["metrics"]] == [
        (f"accuracy of peer_{i}", logs[f"eval_peer_{i}_accuracy"]) for i in (1, 2)
    ]
    assert "deep-mutual-learning" in card.data.tags and "zhang2018deep" in card.text
    assert [row[0] for row in table_of(card)] == ["", "peer_1", "peer_2"]


def test_peers_on_several_data_sets(make_mutual, tmp_path):
    sets = {"seen": make_images(), "new_ones": make_images(8)}
    trainer = make_mutual(**EVALUATED | {"eval_dataset": sets})
    trainer.train()
    trainer.create_model_card()
    header, *peers = table_of(read_card(tmp_path / "out"))
    assert header[4:] == ["seen_accuracy", "new_ones_accuracy"]
    logs = {name: value for logs in trainer.state.log_history[:-1] for name, value in logs.items()}
    for name, row in zip(("peer_1", "peer_2"), peers, strict=True):
        assert row[4:] == [f"{logs[f'eval_{of}_{name}_accuracy']:.4f}" for of in sets]


def test_paraphraser(make_trainer, tmp_path):
    teacher = make_resnet(16)
    teacher.config.name_or_path = "microsoft/resnet-50"
    trainer = make_trainer(teacher_model=teacher)
    error = trainer.train().metrics["paraphraser_reconstruction_loss"]
    card = read_card(tmp_path / "out" / "_paraphraser")
    assert card.data.to_dict()["teacher"] == "microsoft/resnet-50" and "license" not in card.data.to_dict()
    assert {"iekd", "paraphraser"} <= set(card.data.tags) and card.data.library_name == "iekd_hf"
    assert f"{error:.4g}" in card.text and "layer of the teacher: `resnet`" in card.text
    loaded = Paraphraser.from_pretrained(tmp_path / "out" / "_paraphraser")
    loaded.save_pretrained(tmp_path / "copy", model_card_kwargs={"license": "mit", "dataset": "uoft-cs/cifar10"})
    data = read_card(tmp_path / "copy").data.to_dict()
    assert (data["license"], data["datasets"]) == ("mit", ["uoft-cs/cifar10"]) and "teacher" not in data


def test_a_recipe_leaves_out_a_stage_1_that_did_not_run(make_trainer, tmp_path):
    def rows_of(**kwargs) -> tuple[bool, bool]:
        make_trainer(**kwargs).create_model_card()
        return "`paraphraser_epochs`" in (card := read_card(tmp_path / "out").text), "`split_mode`" in card

    assert rows_of() == (True, True)
    assert rows_of(paraphraser=Paraphraser(16, 8)) == (False, True)
    assert rows_of(method="od") == (False, True)


def test_a_depth_estimator_has_no_classes(make_trainer, tmp_path):
    backbone = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=8,
        image_size=32,
        out_indices=[1, 2],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=8,
        reassemble_hidden_size=16,
        reassemble_factors=[1, 0.5],
        neck_hidden_sizes=[8, 16],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    images = [{"pixel_values": image["pixel_values"]} for image in make_images()]
    trainer = make_trainer(DepthAnythingForDepthEstimation(config), train_dataset=images)
    trainer.create_model_card()
    card = read_card(tmp_path / "out")
    assert card.data.pipeline_tag == "depth-estimation"
    assert "This is a depth estimator with" in card.text and "classes" not in card.text
