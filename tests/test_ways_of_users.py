"""What users of Trainer bring: their optimizers, collators, streams, tasks; it trains as they expect or is refused."""

import copy
import datetime
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from conftest import make_images, make_resnet, make_vit
from torch.utils.data import Dataset, IterableDataset
from transformers import Dinov2Config, Dinov2Model

from iekd_hf import DecodedImages, IEKDTrainer, IEKDTrainingArguments, MutualTrainer, MutualTrainingArguments
from iekd_hf.method.losses import kd_loss
from iekd_hf.method.objective import logit_loss
from iekd_hf.training import weights


def stream(count: int = 16) -> datasets.IterableDataset:
    rows = [{"pixel_values": row["pixel_values"].numpy(), "labels": row["labels"]} for row in make_images(count)]
    return datasets.Dataset.from_list(rows).with_format("torch").to_iterable_dataset()


class Endless(IterableDataset):
    """A stream that has a length all the same."""

    def __len__(self):
        return 16

    def __iter__(self):
        return iter(make_images(16))


@pytest.mark.parametrize("make", [stream, Endless])
def test_a_stream_goes_through_both_stages(make_trainer, make, tmp_path):
    trainer = make_trainer(train_dataset=make(), max_steps=3, paraphraser_epochs=1)
    metrics = trainer.train().metrics
    assert trainer.state.global_step == 3 and metrics["paraphraser_train_runtime"] > 0
    trainer = make_trainer(train_dataset=make(), max_steps=3, paraphraser_max_steps=2)
    before = [p.clone() for p in trainer.student.parameters()]
    trainer.train()
    assert any(not torch.equal(p, q) for p, q in zip(before, trainer.student.parameters(), strict=True))


def test_peers_train_on_a_stream(make_mutual):
    trainer = make_mutual(train_dataset=Endless(), max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_collator_that_reads_labels_works_with_any_teacher(make_trainer):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=32)
    rows = datasets.Dataset.from_list(
        [{"pixel_values": r["pixel_values"].numpy(), "labels": r["labels"], "name": "x"} for r in make_images()]
    ).with_format("torch")

    def collate(examples):
        assert all("name" not in example for example in examples)  # Trainer removes what the student does not take
        return {
            "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }

    trainer = make_trainer(teacher_model=Dinov2Model(config), train_dataset=rows, data_collator=collate)
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_optimizer_of_the_users_own_gets_the_encoders(make_trainer):
    student = make_resnet(8, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    trainer = make_trainer(student, optimizers=(optimizer, None))
    before = copy.deepcopy(trainer.student_side.state_dict())
    trainer.train()
    for name, parameter in trainer.student_side.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(student.parameters(), lr=0.01), lambda step: 1.0)
    with pytest.raises(ValueError, match="without a schedule"):
        make_trainer(student, optimizers=(schedule.optimizer, schedule))


def test_a_parameter_that_was_left_out_of_it_stays_out(make_trainer):
    student = make_resnet(8, seed=1)
    head = [parameter for name, parameter in student.named_parameters() if "classifier" in name]
    make_trainer(student, optimizers=(torch.optim.SGD(student.resnet.parameters(), lr=0.01), None)).train()
    for parameter, same in zip(head, make_resnet(8, seed=1).classifier.parameters(), strict=True):
        assert torch.equal(parameter, same)


def test_an_optimizer_of_another_model_is_refused(make_trainer):
    optimizer = torch.optim.SGD(make_resnet(8, seed=1).parameters(), lr=0.01)
    with pytest.raises(ValueError, match="Expected an optimizer of the student's weights in optimizers, got one"):
        make_trainer(make_resnet(8, seed=1), optimizers=(optimizer, None))


def test_a_student_in_half_precision_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r'got one in float16.*dtype="float32"'):
        make_trainer(make_resnet(8).half())


@pytest.mark.parametrize("fast_teacher", [False, True])
def test_a_student_that_is_its_teacher_is_refused(make_trainer, fast_teacher):
    model = make_resnet(8)
    with pytest.raises(ValueError, match=r"shares \d+ with the student.*deepcopy"):
        make_trainer(model, model, fast_teacher=fast_teacher)
    student = make_resnet(8, seed=1)
    student.resnet.embedder = model.resnet.embedder
    with pytest.raises(ValueError, match=r"shares \d+ with the student"):
        make_trainer(student, model)


def test_examples_that_are_tuples_are_refused(make_trainer):
    class Tuples(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.randn(3, 32, 32), index % 3

    with pytest.raises(ValueError, match="dictionaries with pixel_values and labels, got a tuple"):
        make_trainer(train_dataset=Tuples())


def test_a_last_batch_of_one_image_on_a_1x1_map(make_trainer):
    images = make_images(9, size=(4, 4))
    with pytest.raises(ValueError, match=r"single image.*9 images in batches of 4.*dataloader_drop_last=True"):
        make_trainer(train_dataset=images, max_steps=-1, num_train_epochs=1)
    trainer = make_trainer(train_dataset=images, max_steps=-1, num_train_epochs=1, dataloader_drop_last=True)
    trainer.train()
    assert trainer.state.global_step == 2
    make_trainer(train_dataset=make_images(9), max_steps=-1, num_train_epochs=1).train()  # larger maps are fine


def test_a_batch_of_one_image_of_a_stream_on_a_1x1_map(make_trainer):
    rows = datasets.IterableDataset.from_generator(lambda: iter(make_images(4, size=(4, 4))))
    with pytest.raises(ValueError, match=r"single image.*\(batches of 1\): set another per_device_train_batch_size"):
        make_trainer(train_dataset=rows, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=r"single image.*\(batches of 1\)"):  # no batch is left out: all are full
        make_trainer(train_dataset=rows, per_device_train_batch_size=1, dataloader_drop_last=True)


class _OnMeta:
    """Arguments for a device other than the one that models are made on, as a GPU is."""

    @property
    def device(self):
        _ = super().device  # sets up the process
        return torch.device("meta")


class DistilOnMeta(_OnMeta, IEKDTrainingArguments):
    pass


class TeachOnMeta(_OnMeta, MutualTrainingArguments):
    pass


@pytest.mark.parametrize("waits", ["bf16_full_eval", "fp16_full_eval"])
def test_a_model_that_trainer_does_not_place_is_on_the_device_before_it_is_probed(tmp_path, waits):
    settings = {"report_to": "none", "use_cpu": True, waits: True}
    args = DistilOnMeta(str(tmp_path), fast_teacher=False, **settings)
    trainer = IEKDTrainer(make_resnet(8, seed=1), make_resnet(16, seed=2), args=args, train_dataset=make_images())
    assert {p.device.type for p in trainer.student_side.parameters()} == {"meta"}
    models = [make_resnet(8, seed=1), make_vit(seed=2)]
    trainer = MutualTrainer(models, args=TeachOnMeta(str(tmp_path), **settings), train_dataset=make_images())
    assert {p.device.type for p in trainer.group.parameters()} == {"meta"}


# ---- The logit term, as the task has it ----


def test_dense_logits_are_compared_along_the_classes():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = [z.permute(0, 2, 3, 1).reshape(-1, 5) for z in (student, teacher)]
    torch.testing.assert_close(kd_loss(student, teacher, 2.0), kd_loss(*rows, 2.0))
    repeated = [z.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3) for z in (student, teacher)]
    torch.testing.assert_close(kd_loss(*repeated, 2.0), kd_loss(student, teacher, 2.0))  # whatever the size


def test_positions_that_the_labels_leave_out_do_not_count():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 4, 6, generator=generator) for _ in range(2))
    labels = torch.zeros(2, 8, 12, dtype=torch.long)
    labels[:, :, 6:] = 255
    expected = kd_loss(student[..., :3], teacher[..., :3])
    torch.testing.assert_close(logit_loss(student, teacher, 4.0, labels, ignore_index=255), expected)
    student[..., 3:] = 7.0
    torch.testing.assert_close(logit_loss(student, teacher, 4.0, labels, ignore_index=255), expected)
    labels[1] = 255  # an image without any label counts as it is
    whole = (kd_loss(student[:1, ..., :3], teacher[:1, ..., :3]) * 12 + kd_loss(student[1:], teacher[1:]) * 24) / 36
    torch.testing.assert_close(logit_loss(student, teacher, 4.0, labels, ignore_index=255), whole)


def test_multi_label_logits_are_questions_of_their_own():
    student, teacher = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]])
    p_S, p_T = student.sigmoid(), teacher.sigmoid()
    by_hand = (p_T * (p_T / p_S).log() + (1 - p_T) * ((1 - p_T) / (1 - p_S)).log()).mean()
    torch.testing.assert_close(logit_loss(student, teacher, 1.0, multi_label=True), by_hand)


def test_a_multi_label_student_learns_from_logits(make_trainer):
    images = [{**row, "labels": torch.tensor([1.0, 0.0, 1.0])} for row in make_images()]
    models = [make_resnet(w, seed=w, problem_type="multi_label_classification") for w in (8, 16)]
    trainer = make_trainer(*models, method="kd", train_dataset=images)
    trainer.train()
    assert trainer.state.log_history[0]["kd_loss"] > 0


def test_a_regression_has_no_logits(make_trainer, make_mutual):
    images = [{**row, "labels": 1.7} for row in make_images()]
    models = [make_resnet(w, num_labels=1, problem_type="regression", seed=w) for w in (8, 16)]
    with pytest.raises(ValueError, match=r"targets of a regression.*method without"):
        make_trainer(*models, method="kd", train_dataset=images)
    with pytest.raises(ValueError, match="targets of a regression"):
        make_mutual(models, mutual_loss="kl", train_dataset=images)
    trainer = make_trainer(*models, train_dataset=images)  # features do
    trainer.train()
    assert trainer.state.log_history[0]["task_loss"] > 0


def test_a_multi_label_student_with_a_loss_of_its_own_learns_from_logits(make_trainer):
    """Whose problem_type nobody has noted: the labels say what it is."""
    images = [{**row, "labels": torch.tensor([1.0, 0.0, 1.0])} for row in make_images()]

    def binary(outputs, labels, num_items_in_batch=None):
        return F.binary_cross_entropy_with_logits(outputs["logits"], labels)

    found = []
    for problem, loss in ((None, binary), ("multi_label_classification", None)):
        models = [make_resnet(w, seed=w, problem_type=problem) for w in (8, 16)]
        trainer = make_trainer(*models, method="kd", train_dataset=images, compute_loss_func=loss, learning_rate=0.0)
        trainer.train()
        found.append(trainer.state.log_history[0]["kd_loss"])
    assert found[0] == pytest.approx(found[1])


def test_a_target_of_a_regression_may_be_100_below_zero(make_trainer):
    rows = [{**row, "labels": [-100.0, 3.0][i % 2]} for i, row in enumerate(make_images(10))]
    for kind in (float, int):
        evaluated = [{**row, "labels": kind(row["labels"])} for row in rows]
        trainer = make_trainer(
            *regressors(), eval_dataset=evaluated, compute_metrics=lambda p: {"rows": len(p.label_ids)}
        )
        metrics = trainer.evaluate()
        predicted = torch.tensor(trainer.predict(evaluated).predictions).squeeze()
        expected = F.mse_loss(predicted, torch.tensor([float(row["labels"]) for row in evaluated]))
        assert metrics["eval_rows"] == 10 and metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("method", ["plain", "kd"])
def test_a_frozen_backbone_has_no_gradient_to_measure(make_trainer, method):
    student = make_resnet(8, seed=1)
    student.resnet.requires_grad_(False)
    trainer = make_trainer(student, method=method)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    assert not any("gradient_share" in name for logs in trainer.state.log_history for name in logs)


def test_a_last_batch_of_one_image_without_encoders(make_trainer):
    """No BatchNorm of ours sees its 1x1 map."""
    images = make_images(9, size=(8, 8))
    trainer = make_trainer(
        make_vit(seed=1, image_size=8), method="kd", train_dataset=images, max_steps=-1, num_train_epochs=1
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_stream_that_ends_at_a_measurement_is_measured_once(make_trainer, monkeypatch):
    """Trainer asks for the batches of all steps to come where a pass over the stream ends."""
    calls = []
    monkeypatch.setattr(weights, "measure_ratios", lambda trainer: calls.append(trainer.state.global_step) or {"x": 1})
    monkeypatch.setattr(weights, "weighted", lambda ratios, of: {"inheritance_loss": 1.0})
    monkeypatch.setattr(weights, "_LEAST", 4)
    rows = datasets.IterableDataset.from_generator(lambda: iter(make_images(8)))
    make_trainer(method="ft", train_dataset=rows, per_device_train_batch_size=2, max_steps=7).train()
    assert calls == [0, 4]


@pytest.mark.parametrize("mode", ["batch_eval_metrics", "eval_do_concat_batches"])
def test_metrics_in_batches_are_those_of_the_images_with_a_label(make_trainer, mode):
    evaluated = [{**row, "labels": -100 if i % 4 else 1} for i, row in enumerate(make_images(11))]
    seen = []

    def measure(prediction, compute_result=True):
        labels, logits = prediction.label_ids, prediction.predictions
        batches = zip(labels, logits, strict=True) if isinstance(labels, list) else [(labels, logits)]
        for of_batch, of_logits in batches:
            assert len(of_batch) == len(of_logits)
            seen.extend(int(label) for label in of_batch)
        return {"count": len(seen)} if compute_result else {}

    arguments = {"batch_eval_metrics": True} if mode == "batch_eval_metrics" else {"eval_do_concat_batches": False}
    trainer = make_trainer(eval_dataset=evaluated, compute_metrics=measure, per_device_eval_batch_size=2, **arguments)
    assert trainer.evaluate()["eval_count"] == 3 and seen == [1, 1, 1]


@pytest.mark.parametrize("method", ["plain", "kd", "at"])
@pytest.mark.parametrize("labels", [[0, 1, 2, 0, 1, 2], [0, -100, -100, -100, 1, 2]])
def test_micro_batches_of_different_sizes_make_one_batch(make_trainer, method, labels):
    """As at the end of an epoch: each image counts alike."""
    rows = [{**row, "labels": label} for row, label in zip(make_images(6), labels, strict=True)]
    found = []
    for size, steps in ((6, 1), (4, 2)):
        trainer = make_trainer(
            *(make_vit(seed=seed) for seed in (1, 2)),
            **{"method": method, "train_dataset": rows, "max_steps": 1, "train_sampling_strategy": "sequential"},
            **{"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "learning_rate": 1.0},
            **{"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.0},
        )
        trainer.train()
        found.append((trainer.state.log_history[0], trainer.student.state_dict()))
    (one, whole), (two, parts) = found
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["task_loss"] == pytest.approx(one["task_loss"], rel=1e-5)
    for name, parameter in whole.items():
        torch.testing.assert_close(parts[name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["plain", "kd"])
def test_an_evaluation_after_micro_batches_of_different_sizes(make_trainer, method):
    """At the end of an epoch whose last step had some: the loss is that of the images."""
    trainer = make_trainer(
        *(make_vit(seed=seed) for seed in (1, 2)),
        **{"method": method, "train_dataset": make_images(6), "eval_dataset": make_images(5, seed=5), "max_steps": 1},
        **{"gradient_accumulation_steps": 2, "eval_strategy": "epoch"},
    )
    trainer.train()
    during = next(logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs)
    trainer.task_loss.end_step()
    assert during == pytest.approx(trainer.evaluate()["eval_loss"])


def test_label_maps_with_keys_as_json_has_them(make_trainer):
    student, teacher = make_resnet(8), make_resnet(16)
    student.config.id2label = {"0": "cat", "1": "dog", "2": "cow"}
    teacher.config.id2label = {0: "cat", 1: "dog", 2: "cow"}
    make_trainer(student, teacher, method="kd")
    teacher.config.id2label = {0: "cat", 1: "cow", 2: "dog"}
    with pytest.raises(ValueError, match="differ first at 1"):
        make_trainer(student, teacher, method="kd")


# ---- Labels ----


def decoded(labels, feature=None) -> DecodedImages:
    """Make images that are all of one value, their row's, so that a row is known by its pixels."""
    images = [PIL.Image.new("RGB", (4, 4), (10 * row,) * 3) for row in range(len(labels))]
    table = datasets.Dataset.from_dict({"image": images, "label": labels}).cast_column("image", datasets.Image())
    return DecodedImages.decode(table if feature is None else table.cast_column("label", feature))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 2, 1], torch.tensor([0, 2, 1])),
        ([True, False, True], torch.tensor([1, 0, 1])),
        ([0.5, 1.7, 2.9], torch.tensor([0.5, 1.7, 2.9])),
        ([[1, 0], [0, 1], [1, 1]], torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])),
        ([[0.4, 0.0], [0.0, 1.0], [1.0, 1.0]], torch.tensor([[0.4, 0.0], [0.0, 1.0], [1.0, 1.0]])),
    ],
)
def test_labels_are_kept_as_they_are(labels, expected):
    batch = decoded(labels).__getitems__([0, 1, 2])
    assert batch["labels"].dtype == expected.dtype and torch.equal(batch["labels"], expected)


def test_a_missing_label_is_named_by_its_row():
    with pytest.raises(ValueError, match=r"got none in row 2 of column 'label' \(1 of 4 rows\)"):
        decoded([0, 1, None, 1])


def test_labels_that_are_no_numbers():
    with pytest.raises(ValueError, match=r"as many labels in every row of column 'label'.*got 1 to 2"):
        decoded([[1, 0], [1]])
    with pytest.raises(ValueError, match="numbers in column 'label', got date32"):
        decoded([datetime.date(2020, 1, 1)] * 2)
    with pytest.raises(ValueError, match=r"a datasets\.Dataset to decode, got list"):
        DecodedImages.decode([1, 2])


def test_peers_in_half_precision_or_on_maps_of_one_position(make_mutual):
    with pytest.raises(ValueError, match=r'got one in float16.*dtype="float32"'):
        make_mutual([make_resnet(8).half(), make_resnet(12).half()])
    nine = {"train_dataset": make_images(9, size=(4, 4)), "max_steps": -1, "num_train_epochs": 1}
    with pytest.raises(ValueError, match=r"single image.*9 images in batches of 4.*dataloader_drop_last=True"):
        make_mutual([make_resnet(8), make_resnet(12)], **nine)


def test_strings_are_no_labels():
    with pytest.raises(ValueError, match=r"strings such as 'cat'.*class_encode_column"):
        decoded(["cat", "dog"])


@pytest.mark.parametrize(
    "pick",
    [
        lambda table: table.select([5, 3, 1]),
        lambda table: table.shuffle(seed=0),
        lambda table: table.filter(lambda row: row["labels"] % 2 == 1),
        lambda table: table.shard(2, 1),
        lambda table: table.train_test_split(0.5, seed=0)["test"],
    ],
)
def test_rows_that_are_picked_keep_their_labels(pick):
    images = DecodedImages(pick(decoded(list(range(6))).table))
    batch = images.__getitems__(list(range(len(images))))
    assert [int(pixels.flatten()[0]) // 10 for pixels in batch["pixel_values"]] == batch["labels"].tolist()


def regressors():
    return [make_resnet(w, num_labels=1, problem_type="regression", seed=w) for w in (8, 16)]


def test_targets_of_a_regression_are_no_classes(make_trainer):
    images = [{**row, "labels": 1.7} for row in make_images()]
    make_trainer(*regressors(), train_dataset=images).train()


@pytest.mark.skipif(
    torch.__version__ < "2.13",
    reason="MSELoss of torch 2.7 has no gradient for integer targets; tested with torch 2.13 and later",
)
def test_whole_numbers_are_targets_of_a_regression_too(make_trainer):
    rows = [{"pixel_values": r["pixel_values"].numpy(), "label": 20 + i} for i, r in enumerate(make_images())]
    ages = datasets.Dataset.from_list(rows).with_format("torch")
    make_trainer(*regressors(), train_dataset=ages).train()


def test_a_label_outside_the_classes_is_refused_in_a_list_too(make_trainer, make_mutual):
    images = make_images()
    images[3]["labels"] = 7
    with pytest.raises(ValueError, match=r"from 0 to 2.*got 7 in row 3.*num_labels=8"):
        make_trainer(train_dataset=images)
    with pytest.raises(ValueError, match=r"got 7 in row 3"):
        make_mutual(train_dataset=images)
    images[3]["labels"] = torch.tensor(-100)
    make_trainer(train_dataset=images)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"labels": 1.7}, r"number of a class as 'labels' in every row of train_dataset, got 1\.7 in row 3"),
        ({"labels": "cat"}, "got 'cat' in row 3"),
        ({"labels": float("nan")}, "got nan in row 3"),
        ({"labels": [1, 0, 0]}, r"got \[1, 0, 0\] in row 3"),
    ],
)
def test_a_label_that_is_no_class_is_named_by_its_row(make_trainer, row, words):
    images = make_images()
    images[3] = {**images[3], **row}
    with pytest.raises(ValueError, match=words):
        make_trainer(train_dataset=images)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["a", "b"] * 2, r"numbers of classes in column 'labels' of train_dataset, got strings.*class_encode_column"),
        ([0, 1, None, 1], r"Expected -100 for images without a label.*got 1 missing values.*'torch'.*write -100"),
        (
            [0.5, 1.5] * 2,
            r"a first example that ResNetFor\w+ takes, got .*labels: float32 of shape \(1,\)",
        ),
        ([True, False] * 2, r"a first example that ResNetFor.*num_labels, problem_type"),
    ],
)
def test_labels_of_a_table_that_are_no_classes(make_trainer, labels, words):
    rows = [
        {"pixel_values": r["pixel_values"].numpy(), "labels": v} for r, v in zip(make_images(4), labels, strict=True)
    ]
    with pytest.raises(ValueError, match=words):
        make_trainer(train_dataset=datasets.Dataset.from_list(rows).with_format("torch"))


def test_what_is_no_data_set_model_or_paraphraser_is_refused(make_trainer):
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"labels": [0]})})
    for given, words in ((3, "got int: load it first"), ("cifar10", "got str"), (splits, "DatasetDict: pass one of")):
        with pytest.raises(ValueError, match=f"Expected train_dataset as a data set, .*{words}"):
            make_trainer(train_dataset=given)
    with pytest.raises(ValueError, match="Expected a teacher_model, got int"):
        make_trainer(teacher_model=3)
    with pytest.raises(ValueError, match="Expected a Paraphraser for this knowledge, got a int"):
        make_trainer(paraphraser=3)


def test_images_that_make_no_batch_are_described(make_trainer):
    images = make_images()
    images[3]["pixel_values"] = torch.zeros(3, 24, 24)
    trainer = make_trainer(train_dataset=images)
    with pytest.raises(
        ValueError, match=r"make one batch, got pixel_values: float32 of shape \(3, \d+, \d+\) and float32 of shape"
    ):
        trainer.train()
    images[0]["pixel_values"] = PIL.Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match="make one batch, got pixel_values: Image, labels: int"):
        make_trainer(train_dataset=images)


# ---- Arguments ----


@pytest.mark.parametrize(
    ("args_class", "values", "words"),
    [
        (IEKDTrainingArguments, {"lambda_inh": "much"}, "lambda_inh as a number or 'auto', got 'much'"),
        (IEKDTrainingArguments, {"temperature": "300"}, "temperature of type float, got '300' of type str"),
        (IEKDTrainingArguments, {"cache_views": 1.5}, "cache_views of type int, got 1.5"),
        (IEKDTrainingArguments, {"factor_channels": 2.5}, "factor_channels of type int or None"),
        (IEKDTrainingArguments, {"split_seed": 0.5}, "split_seed of type int"),
        (IEKDTrainingArguments, {"method": ["ft"]}, "method of type str"),
        (IEKDTrainingArguments, {"teacher_layers": "layer4"}, r"teacher_layers of type list\[str\] or None"),
        (IEKDTrainingArguments, {"teacher_layers": [3]}, r"teacher_layers of type list\[str\] or None, got \[3\]"),
        (IEKDTrainingArguments, {"split_seed": 2**70}, "split_seed within 64 bits"),
        (IEKDTrainingArguments, {"learning_rate": "1e-3"}, "learning_rate of type float, got '1e-3' of type str"),
        (IEKDTrainingArguments, {"learning_rate": float("nan")}, "a finite learning_rate of at least 0, got nan"),
        (IEKDTrainingArguments, {"max_steps": 2.5}, "max_steps of type int, got 2.5"),
        (IEKDTrainingArguments, {"per_device_train_batch_size": 0}, "per_device_train_batch_size above 0, got 0"),
        (MutualTrainingArguments, {"num_train_epochs": -3}, "num_train_epochs of at least 0, got -3"),
        (MutualTrainingArguments, {"seed": "a"}, "seed of type int, got 'a'"),
        (IEKDTrainingArguments, {"paraphraser_epochs": float("inf")}, "paraphraser_epochs above 0, got inf"),
        (IEKDTrainingArguments, {"paraphraser_max_steps": 0}, "paraphraser_max_steps above 0"),
        (MutualTrainingArguments, {"lambda_kl": "1"}, "lambda_kl of type float"),
        (MutualTrainingArguments, {"temperature": True}, "temperature of type float"),
    ],
)
def test_arguments_of_another_type_are_refused(args_class, values, words):
    with pytest.raises(ValueError, match=words):
        args_class(output_dir="out", **values)


def test_peers_that_are_no_list_are_refused(make_mutual):
    from iekd_hf import MutualTrainer

    for models in (None, make_vit()):
        with pytest.raises(ValueError, match="Expected models as a list"):
            MutualTrainer(models, args=MutualTrainingArguments("out"))


@pytest.mark.parametrize("args_class", [IEKDTrainingArguments, MutualTrainingArguments])
def test_copies_of_arguments_keep_folder_and_token_and_files_have_neither(tmp_path, args_class):
    args = args_class(str(tmp_path / "out"), hub_token="hf_secret", use_cpu=True, lr_scheduler_kwargs={"a": [1]})
    for copied in (copy.copy(args), copy.deepcopy(args)):
        assert type(copied) is args_class and copied == args
        assert (copied.output_dir, copied.hub_token) == (str(tmp_path / "out"), "hf_secret")
    assert copied.lr_scheduler_kwargs["a"] is not args.lr_scheduler_kwargs["a"]
    torch.save(args, tmp_path / "training_args.bin")
    written = (tmp_path / "training_args.bin").read_bytes()
    assert b"hf_secret" not in written and str(tmp_path).encode() not in written


def tell(rank: int, args: IEKDTrainingArguments, file: str) -> None:
    Path(file).write_text(f"{args.output_dir} {args.hub_token}")


@pytest.mark.slow
def test_a_process_gets_the_arguments_with_folder_and_token(tmp_path):
    args = IEKDTrainingArguments(str(tmp_path / "out"), hub_token="hf_secret", use_cpu=True)
    torch.multiprocessing.spawn(tell, (args, str(tmp_path / "told")))
    assert (tmp_path / "told").read_text() == f"{tmp_path / 'out'} hf_secret"
