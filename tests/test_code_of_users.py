"""Trainer code that people have: subclasses, collators, label columns, models of their own; as with Trainer."""

import types

import datasets
import pytest
import torch
import torch.nn.functional as F
from conftest import make_images, make_resnet, make_vit, same
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments, default_data_collator
from transformers.modeling_outputs import ImageClassifierOutput

from iekd_hf import IEKDTrainer, MutualTrainer
from iekd_hf.training.checks import check_engine
from iekd_hf.training.data_checks import check_dispatched
from iekd_hf.training.labels import FillLabels
from iekd_hf.training.resume import check_ran_to_its_end


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# ---- Subclasses ----


class Weighted(IEKDTrainer):
    """Class weights, as people write them for Trainer."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 3.0]))
        return (loss, outputs) if return_outputs else loss


class Noted(IEKDTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.noted = getattr(self, "noted", 0) + 1
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def test_a_loss_that_leaves_the_method_out_is_refused(make_trainer, make_mutual, tmp_path):
    with pytest.raises(ValueError, match=r"Weighted to keep the losses of IEKDTrainer, got a compute_loss of its own"):
        make_trainer(trainer_class=Weighted)
    peers = type("WeightedPeers", (MutualTrainer,), {"compute_loss": Weighted.compute_loss})
    with pytest.raises(ValueError, match=r"WeightedPeers to keep the losses of MutualTrainer"):
        make_mutual(trainer_class=peers)
    assert not (tmp_path / "out").exists()
    trainer = make_trainer(trainer_class=Noted)
    trainer.train()
    assert trainer.noted == 2 and "inheritance_loss" in trainer.state.log_history[0]


class TwoRates(IEKDTrainer):
    def create_optimizer(self, model=None):
        head = [*self.model.classifier.parameters()]
        body = [p for n, p in self.model.named_parameters() if not n.startswith("classifier.")]
        self.optimizer = torch.optim.SGD([{"params": head, "lr": 0.1}, {"params": body, "lr": 0.01}])
        return self.optimizer


def test_an_optimizer_that_a_subclass_makes_trains_the_encoders(make_trainer):
    trainer = make_trainer(trainer_class=TwoRates)
    encoders = {n: p for n, p in trainer.student_side.named_parameters() if not n.startswith("student.")}
    before = {name: parameter.detach().clone() for name, parameter in encoders.items()}
    trainer.train()
    assert not [name for name, value in before.items() if torch.equal(encoders[name], value)]
    assert len(trainer.optimizer.param_groups) == 3


def test_metrics_have_the_epoch_as_trainers_have(make_trainer, make_mutual):
    for trainer in (make_trainer(eval_dataset=make_images()), make_mutual(eval_dataset=make_images())):
        metrics = trainer.train().metrics
        assert metrics["epoch"] == 0.5 == trainer.evaluate()["epoch"]
        assert "task_loss" in str(trainer.state.log_history[0])


# ---- Collators and columns ----


def collate_tuples(rows: list[tuple]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.stack([row[0] for row in rows]), "labels": torch.tensor([row[1] for row in rows])}


@pytest.mark.parametrize("method", ["ie-ft+kd", "plain"])
def test_tuples_with_a_collator(make_trainer, make_mutual, tmp_path, method):
    """As torchvision's data sets give them."""
    rows = [(image["pixel_values"], image["labels"]) for image in make_images()]
    given = {"train_dataset": rows, "eval_dataset": rows, "data_collator": collate_tuples, "compute_metrics": accuracy}
    trainer = make_trainer(method=method, **given)
    trainer.train()
    arguments = TrainingArguments(str(tmp_path / "plain"), report_to="none", use_cpu=True, disable_tqdm=True)
    plain = Trainer(trainer.model, arguments, **given)
    ours, theirs = trainer.evaluate(), plain.evaluate()
    assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"]) and ours["eval_accuracy"] == theirs["eval_accuracy"]
    assert make_mutual(models=[make_resnet(8), make_vit()], **given).train().global_step == 2


CLASSES = ["ant", "bee", "cat"]


def collate_names(rows: list[dict]) -> dict[str, torch.Tensor]:
    labels = torch.tensor([CLASSES.index(row["label"]) for row in rows])
    return {"pixel_values": torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows]), "labels": labels}


@pytest.mark.parametrize("kind", ["list", "table", "transform"])
def test_names_of_classes_that_are_mapped(make_trainer, kind):
    rows = [{"pixel_values": im["pixel_values"], "label": CLASSES[im["labels"]]} for im in make_images()]
    given = {"train_dataset": rows, "data_collator": collate_names}
    if kind != "list":
        table = datasets.Dataset.from_list([{**row, "pixel_values": row["pixel_values"].numpy()} for row in rows])
        given["train_dataset"] = table
    if kind == "transform":
        table = table.with_transform(
            lambda batch: {
                "pixel_values": [torch.tensor(pixels) for pixels in batch["pixel_values"]],
                "labels": [CLASSES.index(name) for name in batch["label"]],
            }
        )
        given = {"train_dataset": table}
    trainer = make_trainer(remove_unused_columns=False, logging_first_step=True, **given)
    trainer.train()
    assert trainer.state.log_history[0]["task_loss"] > 0.5


def test_a_column_that_the_collator_does_not_read(make_trainer):
    """Labels of another task beside: neither their classes nor those that are missing count."""
    images = [{**im, "coarse": im["labels"], "label": -100, "labels": None} for im in make_images()]

    def collate(rows):
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["coarse"] for row in rows]),
        }

    given = {"train_dataset": images, "eval_dataset": images, "data_collator": collate, "compute_metrics": accuracy}
    given["remove_unused_columns"] = False
    metrics = make_trainer(**given).evaluate()
    assert 0.5 < metrics["eval_loss"] < 3 and "eval_accuracy" in metrics
    wide = [{**image, "label": 7} for image in images]
    assert make_trainer(**given | {"train_dataset": wide}).train().global_step == 2


def test_batches_that_are_dispatched_have_labels_throughout():
    rows = [{"pixel_values": image["pixel_values"], "labels": None} for image in make_images(2)]
    fill = FillLabels(lambda rows: rows)
    assert not fill.is_usual and fill(rows) is rows
    fill = FillLabels(default_data_collator)
    assert "labels" not in fill(rows)
    fill.fills_all = True
    assert fill(rows)["labels"].tolist() == [-100, -100]
    assert fill([{**rows[0], "labels": 2}, {"pixel_values": rows[1]["pixel_values"]}])["labels"].tolist() == [2, -100]


def accelerator_of(num_processes: int, dispatch_batches: bool | None) -> types.SimpleNamespace:
    config = types.SimpleNamespace(dispatch_batches=dispatch_batches)
    return types.SimpleNamespace(num_processes=num_processes, dataloader_config=config)


def test_lists_are_not_dispatched():
    """Accelerate joins the boxes of one rank's image with those of another's, and says nothing."""
    stream = datasets.Dataset.from_dict({"a": [1]}).to_iterable_dataset()
    batch = {"pixel_values": torch.zeros(1, 3, 8, 8), "labels": [{"boxes": torch.zeros(1, 4)}]}
    for dataset, dispatch in ((stream, None), ([1], True)):
        with pytest.raises(ValueError, match=r"dispatched to 2 processes, got 'labels' of type list, .* come apart"):
            check_dispatched(accelerator_of(2, dispatch), dataset, batch)
    for processes, dataset, dispatch in ((1, stream, None), (2, [1], None), (2, stream, False)):
        check_dispatched(accelerator_of(processes, dispatch), dataset, batch)
    check_dispatched(accelerator_of(2, None), stream, {"pixel_values": batch["pixel_values"]})


# ---- Models of their own ----


class OwnConfig(PreTrainedConfig):
    model_type = "own"


class OwnModel(PreTrainedModel):
    """A head on a backbone, which does not say what its main input is."""

    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.body, self.head = make_resnet(8, seed=1).resnet, nn.Linear(8, 3)
        self.post_init()

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(pixel_values).pooler_output.flatten(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class OwnNames(OwnModel):
    def forward(self, image, target=None):
        return super().forward(image, target)


LAYERS = {"student_layers": ["body"], "teacher_layers": ["resnet"]}


def test_a_model_that_does_not_name_its_main_input(make_trainer, tmp_path):
    torch.manual_seed(0)
    trainer = make_trainer(OwnModel(OwnConfig(num_labels=3)), method="ie-ft+kd", **LAYERS)
    trainer.train()
    trainer.save_model()
    assert same(OwnModel.from_pretrained(tmp_path / "out").state_dict(), trainer.model.state_dict())


def test_a_model_with_other_names_for_images_and_labels(make_trainer):
    torch.manual_seed(0)
    images = [{"image": image["pixel_values"], "target": image["labels"]} for image in make_images()]
    given = {"train_dataset": images, "eval_dataset": images, "compute_metrics": accuracy, "label_names": ["target"]}
    trainer = make_trainer(OwnNames(OwnConfig(num_labels=3)), **given, **LAYERS)
    trainer.train()
    metrics = trainer.evaluate()
    with torch.no_grad():
        stacked = torch.stack([image["image"] for image in images])
        expected = trainer.model.eval()(stacked, torch.tensor([image["target"] for image in images])).loss
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5) and "eval_accuracy" in metrics


# ---- How it is launched ----


def test_checkpoints_of_each_machine_are_refused():
    args = types.SimpleNamespace(n_gpu=1, save_on_each_node=True, world_size=2)
    with pytest.raises(ValueError, match=r"save_on_each_node=False with several processes, got True"):
        check_engine(types.SimpleNamespace(args=args))


def test_a_stage_that_a_signal_has_ended_is_not_finished(make_trainer):
    trainer = make_trainer(enable_jit_checkpoint=True)
    trainer.state.global_step, trainer.state.max_steps = 1, 4
    with pytest.raises(RuntimeError, match=r"stage 1 to take 4 steps, got a signal to end after 1, .*: go on with"):
        check_ran_to_its_end(trainer, "stage 1")
    trainer.state.global_step = 4
    check_ran_to_its_end(trainer, "stage 1")
