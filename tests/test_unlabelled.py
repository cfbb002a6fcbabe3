"""Images without a label: what they take part in, a batch without any, and training without labels at all."""

import copy

import datasets
import numpy as np
import pytest
import torch
from conftest import make_images, make_resnet, make_vit, same
from test_whole_batches import make_augmentation, make_decoded
from transformers import (
    AutoModel,
    DefaultDataCollator,
    Dinov2Config,
    Dinov2Model,
    EvalPrediction,
    ResNetConfig,
    ResNetModel,
)

from iekd_hf import DecodedImages, IEKDTrainer, Paraphraser
from iekd_hf.features.layers import default_layers
from iekd_hf.features.tap import FeatureTap
from iekd_hf.method.losses import kd_loss
from iekd_hf.training.base_trainer import DistillationTrainer
from iekd_hf.training.labels import FillLabels, count_labelled, measure_labelled


IN_ORDER = {"train_sampling_strategy": "sequential", "optim": "sgd", "lr_scheduler_type": "constant"}


def partly_labelled(count: int, labelled: int) -> list[dict]:
    """Return images of which the first have a label, and the others, by turns, -100, null, or nothing at all."""
    images = make_images(count)
    for i, image in enumerate(images[labelled:]):
        image |= {"labels": -100 if i % 3 == 0 else None}
        if i % 3 == 2:
            del image["labels"]
    return images


class Stream(torch.utils.data.IterableDataset):
    """Give a list's rows in their order, and nothing else of it."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def headless(width: int, seed: int) -> ResNetModel:
    torch.manual_seed(seed)
    return ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, width], depths=[1, 1], layer_type="basic"))


def logs_of(trainer) -> list[dict]:
    return [logs for logs in trainer.state.log_history if "loss" in logs]


# ---- Some have a label ----


def test_the_tasks_loss_is_the_mean_over_those_with_a_label(make_trainer):
    images = partly_labelled(4, labelled=2)
    trainer = make_trainer(train_dataset=images, method="ie-ft+kd", paraphraser=Paraphraser(16, 8), **IN_ORDER)
    student, teacher = copy.deepcopy(trainer.student).train(), copy.deepcopy(trainer.teacher.teacher).eval()
    trainer.train()
    pixels = torch.stack([image["pixel_values"] for image in images])
    with torch.no_grad():
        logits, teacher_logits = student(pixels).logits, teacher(pixels).logits
    by_hand = -(logits.log_softmax(1)[0, 0] + logits.log_softmax(1)[1, 1]) / 2
    logs = logs_of(trainer)[0]
    assert logs["task_loss"] == pytest.approx(by_hand.item(), rel=1e-5)
    assert logs["kd_loss"] == pytest.approx(kd_loss(logits, teacher_logits, 4.0).item(), rel=1e-4)  # over all four


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_without_a_label_has_no_loss_of_the_task(make_trainer, smoothing):
    heads = []
    trainer = make_trainer(
        train_dataset=partly_labelled(8, labelled=3),
        paraphraser=Paraphraser(16, 8),
        label_smoothing_factor=smoothing,
        weight_decay=0.0,
        **IN_ORDER,
    )
    backward = trainer.accelerator.backward

    def watched(loss, **kwargs):
        backward(loss, **kwargs)
        heads.append([parameter.grad.abs().sum().item() for parameter in trainer.student.classifier.parameters()])
        heads.append(trainer.student.resnet.embedder.embedder.convolution.weight.grad.abs().sum().item())

    trainer.accelerator.backward = watched
    trainer.train()
    first, second = logs_of(trainer)
    assert first["task_loss"] > 0 == second["task_loss"] and second["inheritance_loss"] > 0
    assert min(heads[0]) > 0 == max(heads[2]) and heads[3] > 0  # features teach; the head is left alone


def test_plain_training_leaves_them_out(make_trainer, tmp_path):
    images, states = partly_labelled(8, labelled=4), []
    for train_dataset, steps in ((images, 2), (images[:4], 1)):
        args = make_trainer(method="plain", **IN_ORDER, weight_decay=0.0, max_steps=steps).args
        student = make_vit(seed=1)
        trainer = DistillationTrainer(model=student, args=args, train_dataset=train_dataset)
        trainer.train()
        states.append(student.state_dict())
    assert same(*states)


def test_accumulation_is_the_mean_over_all_labels(make_trainer):
    images, courses = partly_labelled(16, labelled=16), []
    for i in (0, 1, 2, 5, *range(12, 16)):  # 1, 3, 4 and no labels in the four micro-batches
        images[i]["labels"] = -100
    for batch_size, steps in ((16, 1), (4, 4)):
        trainer = make_trainer(
            make_vit(seed=1),
            method="kd",
            train_dataset=images,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
            learning_rate=1.0,
            max_steps=1,
            **IN_ORDER,
        )
        before = copy.deepcopy(trainer.student.state_dict())
        trainer.train()
        change = {name: value - before[name] for name, value in trainer.student.state_dict().items()}
        courses.append((change, logs_of(trainer)[0]["task_loss"]))
    assert courses[1][1] == pytest.approx(courses[0][1], rel=1e-5)
    for name, value in courses[0][0].items():
        torch.testing.assert_close(courses[1][0][name], value, rtol=2e-4, atol=2e-6, msg=name)


def test_resumed_to_the_last_bit(make_trainer, tmp_path):
    common = {"train_dataset": partly_labelled(16, labelled=5), "paraphraser": Paraphraser(16, 8), "max_steps": 6}
    common |= {"save_strategy": "steps", "save_steps": 3}
    straight = make_trainer(**common)
    straight.train()
    resumed = make_trainer(**common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert same(straight.student_side.state_dict(), resumed.student_side.state_dict())


def test_decoded_images_and_a_cache(make_trainer):
    table = make_decoded(16).table
    few = [label if i < 3 else -100 for i, label in enumerate(table["labels"])]
    table = table.remove_columns("labels").add_column("labels", few)
    courses, paraphraser = [], Paraphraser(16, 8)
    for cached in (False, True):
        trainer = make_trainer(
            train_dataset=DecodedImages(table),
            augmentation=make_augmentation(),
            paraphraser=paraphraser,
            cache_teacher=cached,
            cache_views=2,
            max_steps=4,
            **IN_ORDER,
        )
        assert trainer.task_loss.num_labelled == 3
        trainer.train()
        courses.append([(logs["task_loss"], logs["inheritance_loss"]) for logs in logs_of(trainer)])
    np.testing.assert_allclose(courses[1], courses[0], rtol=2e-3)
    assert [task > 0 for task, _ in courses[0]] == [True, False, False, False]


def test_peers_take_them_and_are_warned(make_mutual):
    with pytest.warns(UserWarning, match="3 of 8 images have a label.*may collapse"):
        trainer = make_mutual(train_dataset=partly_labelled(8, labelled=3), **IN_ORDER)
    trainer.train()
    first, second = logs_of(trainer)
    assert first["peer_1/task_loss"] > 0 == second["peer_1/task_loss"] == second["peer_2/task_loss"]
    with pytest.raises(ValueError, match=r"labels to train models\[0\] with, got none.*IEKDTrainer with a teacher"):
        make_mutual(train_dataset=[{"pixel_values": image["pixel_values"]} for image in make_images(4)])


def test_metrics_are_of_those_with_a_label():
    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions[0].argmax(1) == prediction.label_ids).mean())}

    logits, labels = np.eye(3), np.array([0, 2, -100])
    prediction = EvalPrediction((logits, logits), labels)
    assert accuracy(prediction) == {"accuracy": 1 / 3}
    assert measure_labelled(accuracy, prediction) == {"accuracy": 1 / 2}
    assert measure_labelled(accuracy, EvalPrediction((logits, logits), np.full(3, -100))) == {}
    targets = EvalPrediction((logits, logits), np.array([0.0, 2.0, -100.0]))  # of a regression, numbers like others
    assert measure_labelled(accuracy, targets) == {"accuracy": 1 / 3}


@pytest.mark.parametrize("without", ["-100", "null"])
@pytest.mark.parametrize("kind", ["list", "stream"])
@pytest.mark.parametrize("trainer_class", [IEKDTrainer, DistillationTrainer])
def test_the_loss_of_an_evaluation_is_the_mean_over_those_with_a_label(make_trainer, trainer_class, kind, without):
    images = make_images(10)
    for i in (*range(4), 5, 8):  # none, three and one label in the batches
        images[i] |= {"labels": -100 if without == "-100" else None}
    common = {"method": "ie-ft", "paraphraser": Paraphraser(16, 8), "per_device_eval_batch_size": 4}
    trainer = make_trainer(**common, compute_metrics=lambda prediction: {"count": len(prediction.label_ids)})
    if trainer_class is DistillationTrainer:
        keywords = {"args": trainer.args, "train_dataset": make_images(8), "compute_metrics": trainer.compute_metrics}
        trainer = DistillationTrainer(model=trainer.student, **keywords)
    labelled = [image for image in images if image["labels"] not in (None, -100)]
    with torch.no_grad():
        logits = trainer.model.eval()(torch.stack([image["pixel_values"] for image in labelled])).logits
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([image["labels"] for image in labelled]))
    metrics = trainer.evaluate(images if kind == "list" else Stream(images))
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5) and metrics["eval_count"] == 4
    assert "eval_inheritance_loss" not in metrics
    assert trainer.predict(images).label_ids.tolist() == [-100 if i["labels"] is None else i["labels"] for i in images]


def test_a_stream_without_labels_is_evaluated_by_what_is_learnt_of_the_teacher(make_trainer):
    images = [{"pixel_values": image["pixel_values"]} for image in make_images(8)]
    trainer = make_trainer(method="ie-ft", paraphraser=Paraphraser(16, 8))
    found = [trainer.evaluate(data)["eval_loss"] for data in (images, Stream(images))]
    assert found[0] == found[1] > 0
    for image in images:
        image["labels"] = -100
    assert trainer.evaluate(Stream(images))["eval_loss"] == trainer.evaluate(images)["eval_loss"] == found[0]
    plain = DistillationTrainer(model=trainer.student, args=trainer.args)
    images = [{"pixel_values": image["pixel_values"]} for image in images]
    prediction = plain.predict(Stream(images))
    assert prediction.label_ids is None and "test_loss" not in prediction.metrics
    assert prediction.predictions.shape == (8, 3)


def test_the_losses_of_images_without_labels_are_their_mean(make_trainer):
    """Whatever the batches: the last one may be of one image, unlike the others."""
    images = [{"pixel_values": image["pixel_values"]} for image in make_images(9)]
    images[-1]["pixel_values"] = images[-1]["pixel_values"] * 5
    trainer, found = make_trainer(method="ie-ft+kd", paraphraser=Paraphraser(16, 8), eval_dataset=images), []
    for size in (9, 8, 2):
        trainer.args.per_device_eval_batch_size = size
        found.append([trainer.evaluate()[f"eval_{name}loss"] for name in ("", "inheritance_", "kd_")])
    torch.testing.assert_close(found[1:], [found[0]] * 2, rtol=1e-4, atol=1e-6)


def test_rows_without_a_label_are_mixed_with_classes_only():
    collate = FillLabels(DefaultDataCollator())
    assert collate([{"labels": None}, {}, {"labels": 2}])["labels"].tolist() == [-100, -100, 2]
    assert collate([{"labels": torch.tensor(1)}, {"labels": None}])["labels"].tolist() == [1, -100]
    assert collate([{"labels": None}, {}]) == {}
    with pytest.raises(ValueError, match="some without and another of type list: only beside labels"):
        collate([{"labels": [0.0, 1.0]}, {"labels": None}])
    with pytest.raises(ValueError, match="another of type float"):
        collate([{"labels": 0.5}, {"labels": None}])


def behind_a_transform(count: int, known: int, shift: int = 0) -> datasets.Dataset:
    images = make_images(count)
    table = datasets.Dataset.from_dict({"index": [*range(count)], "label": [i["labels"] + shift for i in images]})

    def hide(rows):
        labels = [label - shift if i < known else -100 for i, label in zip(rows["index"], rows["label"], strict=True)]
        return {"pixel_values": [images[i]["pixel_values"] for i in rows["index"]], "labels": labels}

    return table.with_transform(hide)


def test_labels_that_a_transform_hides_are_hidden(make_trainer):
    table, courses = behind_a_transform(8, known=3), []
    for images in (table, list(table)):
        trainer = make_trainer(
            method="kd", train_dataset=images, eval_dataset=images, remove_unused_columns=False, **IN_ORDER
        )
        trainer.train()
        courses.append([logs["task_loss"] for logs in logs_of(trainer)] + [trainer.evaluate()["eval_loss"]])
    assert courses[0] == courses[1] and courses[0][0] > 0 == courses[0][1]
    assert count_labelled(table) is None and count_labelled(list(table)) == 3  # so that each batch is looked at


def test_labels_out_of_range_count_as_a_transform_makes_them(make_trainer):
    make_trainer(train_dataset=behind_a_transform(8, known=8, shift=5), remove_unused_columns=False)
    for images in (behind_a_transform(8, known=8), behind_a_transform(8, known=8).with_format(None)):
        with pytest.raises(ValueError, match="from 0 to 1, the model's 2 classes, got 2 in row 2"):
            make_trainer(make_resnet(8, num_labels=2), train_dataset=images)


def test_several_labels_an_image_are_whole(make_trainer):
    table = datasets.Dataset.from_list(
        [{"pixel_values": i["pixel_values"].tolist(), "labels": [1.0, 0.0, -100.0]} for i in make_images(4)]
    )
    student = make_resnet(8, seed=1, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"targets of 0 or 1.*got -100"):
        make_trainer(student, train_dataset=table.with_format("torch"))


# ---- None has a label ----


def test_a_backbone_learns_from_features_alone(make_trainer, tmp_path):
    images = [{"pixel_values": image["pixel_values"]} for image in make_images(12)]
    trainer = make_trainer(
        headless(8, seed=1),
        headless(16, seed=2),
        train_dataset=images[:8],
        eval_dataset=images[8:],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        max_steps=3,
    )
    trainer.train()
    assert all(logs["task_loss"] == 0 < logs["inheritance_loss"] for logs in logs_of(trainer))
    evaluated = [logs for logs in trainer.state.log_history if "eval_loss" in logs]
    assert len(evaluated) == 3
    for logs in evaluated:
        parts = 3000 * logs["eval_inheritance_loss"] + 300 * logs["eval_exploration_loss"]
        assert logs["eval_loss"] == pytest.approx(parts, rel=1e-4)
    assert trainer.state.best_metric == min(logs["eval_loss"] for logs in evaluated)
    assert not any(module._forward_hooks for module in trainer.student.modules())
    best = min(evaluated, key=lambda logs: logs["eval_loss"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-5)  # the best one is loaded

    trainer.save_model()
    trainer.create_model_card()
    student, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(student) is ResNetModel and not any(info.values())
    assert same(student.state_dict(), trainer.student.state_dict())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a backbone, which gives features of images, with" in card and "without any label" in card
    assert "pipeline_tag: image-feature-extraction" in card and "classes" not in card


def test_labels_that_a_backbone_cannot_take_are_left_out(make_trainer):
    trainer = make_trainer(headless(8, seed=1), train_dataset=make_images(8), eval_dataset=make_images(4))
    trainer.train()
    assert logs_of(trainer)[0]["task_loss"] == 0
    assert "eval_inheritance_loss" in trainer.evaluate()
    assert "eval_loss" not in trainer.predict(make_images(2)).metrics


def test_a_head_without_labels_learns_from_logits(make_trainer):
    images = [{"pixel_values": image["pixel_values"]} for image in make_images(8)]
    trainer = make_trainer(train_dataset=images, eval_dataset=images, method="kd")
    head = copy.deepcopy(trainer.student.classifier.state_dict())
    trainer.train()
    assert not same(head, trainer.student.classifier.state_dict())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_kd_loss"]) and metrics["eval_loss"] > 0
    with pytest.warns(UserWarning, match="nothing trains the head of ResNetForImageClassification"):
        make_trainer(train_dataset=images)
    for image in images:
        image["labels"] = -100
    trainer = make_trainer(train_dataset=images, eval_dataset=images, method="kd")
    trainer.train()
    assert trainer.evaluate()["eval_kd_loss"] > 0 == logs_of(trainer)[0]["task_loss"]


def test_what_a_method_needs(make_trainer):
    images = [{"pixel_values": image["pixel_values"]} for image in make_images(4)]
    with pytest.raises(ValueError, match="the batch needs labels, or pass compute_loss_func"):
        make_trainer(train_dataset=images, method="plain")
    with pytest.raises(ValueError, match="ResNetModel to return a loss"):
        make_trainer(headless(8, seed=1), train_dataset=make_images(4), method="plain")
    with pytest.raises(ValueError, match=r"a student with logits for lambda_kd > 0, got ResNetModel.*method without"):
        make_trainer(headless(8, seed=1), train_dataset=images, method="ie-ft+kd")
    with pytest.raises(ValueError, match="a teacher with logits for lambda_kd > 0, got ResNetModel"):
        make_trainer(teacher_model=headless(16, seed=2), method="kd")


def test_the_last_map_is_the_same_without_the_head():
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8, image_size=32)
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32)}
    for model in (make_vit(), make_resnet(), Dinov2Model(config)):
        body = model.eval().base_model
        maps = FeatureTap(body)._run_once(pixels, stop_after_last=False)[1]
        tap = FeatureTap(model, default_layers(model))
        torch.testing.assert_close(maps, tap._run_once(pixels, stop_after_last=False)[1])
        with torch.no_grad():
            features = body(**pixels).last_hidden_state
        if features.ndim == 3:
            features = features[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        torch.testing.assert_close(maps[0], features)
