"""Each mistake gets one sentence (expected, got, what to do) before training starts, and costs nothing on disk."""

import re

import datasets
import pytest
import torch
from conftest import make_images, make_resnet, make_vit
from transformers import DefaultDataCollator, PreTrainedConfig, PreTrainedModel, PrinterCallback, ViTImageProcessorPil

from iekd_hf import ChannelSplit, IEKDTrainingArguments, MutualTrainer, MutualTrainingArguments, Paraphraser


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"inheritance_ratio": 1.2}, r"inheritance_ratio within \[0, 1\], got 1.2"),
        ({"inheritance_distance": "l3"}, "inheritance_distance to be one of l1, l2, cosine, partial_l2; got 'l3'"),
        ({"exploration_distance": "cosine"}, "one of l1, l2, partial_l2, orthogonal, cka; got 'cosine'"),
        ({"lambda_schedule": "step"}, "one of constant, linear, cosine; got 'step'"),
        ({"loss_reduction": "none"}, "mean, sum"),
        ({"split_mode": "odd"}, "random, natural"),
        ({"paraphraser_decoder": "mlp"}, "conv, transposed, linear"),
        ({"reconstruction_distance": "l3"}, "one of l1, l2"),
        ({"lambda_exp": -1.0}, "at least 0, got -1.0; the exploration loss has its sign already"),
        ({"lambda_inh": float("nan")}, "finite weight"),
        ({"method": "ft", "lambda_exp": 300}, r"lambda_exp=0 with inheritance_ratio=1, got 300.0: .*method='ie-ft'"),
        ({"method": "at+kd", "lambda_exp": "auto"}, "lambda_exp=0 with inheritance_ratio=1, got 'auto'"),
        ({"inheritance_ratio": 0, "lambda_inh": 1}, "lambda_inh=0 with inheritance_ratio=0, got 1.0"),
        ({"lambda_warmup_ratio": 1.0}, r"\[0, 1\), got 1.0"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"paraphraser_epochs": 0}, "paraphraser_epochs above 0"),
        ({"factor_channels": 0}, "at least 1"),
        ({"encoder_kernel_size": 2}, "an odd encoder_kernel_size, 1, 3, ..., got 2"),
        ({"save_strategy": "steps", "save_steps": 0}, "save_steps above 0, got 0"),
        ({"teacher_layers": ["a", "b"], "student_layers": ["a"]}, "got 2 and 1"),
        ({"teacher_layers": []}, "got 0:"),
        ({"teacher_dtype": "int8"}, "one of float32, bfloat16, float16; got 'int8'"),
        ({"fast_teacher": False, "compile_teacher": True}, "fast_teacher=True with teacher_dtype or compile_teacher"),
    ],
)
def test_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        IEKDTrainingArguments(str(tmp_path / "out"), report_to="none", **arguments)
    assert not (tmp_path / "out").exists()


def test_layers_that_do_not_exist(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"'resnet.encoder.stages.7'; close matches: resnet.encoder.stages"):
        make_trainer(teacher_layers=["resnet.encoder.stages.7"])
    with pytest.raises(ValueError, match=r"'resnet.encoder.stage.0'; close matches: resnet.encoder.stages.0"):
        make_trainer(student_layers=["resnet.encoder.stage.0"])
    assert not (tmp_path / "out").exists()


def test_logit_term_with_other_labels(make_trainer, tmp_path):
    teacher = make_resnet(16, num_labels=5)
    with pytest.raises(
        ValueError, match=r"lambda_kd > 0, got 3 and 5 labels.*differ first at 3 \(None and 'LABEL_3'\)"
    ):
        make_trainer(teacher_model=teacher, lambda_kd=1.0)
    assert not (tmp_path / "out").exists()
    make_trainer(teacher_model=teacher)  # the feature losses do not mind


def test_paraphraser_that_does_not_fit(make_trainer):
    with pytest.raises(ValueError, match="for 16 channels, the teacher's, got one for 32"):
        make_trainer(paraphraser=Paraphraser(32, 8))
    with pytest.raises(ValueError, match="factor_channels=4, got one with 8"):
        make_trainer(paraphraser=Paraphraser(16, 8), factor_channels=4)
    with pytest.raises(
        ValueError, match="Expected 1 paraphrasers, one for each layer of the teacher, got 2: pass as many"
    ):
        make_trainer(paraphraser=[Paraphraser(16, 8), Paraphraser(16, 8)])


def test_paraphraser_that_cannot_be_had(make_trainer, tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "empty"), "nobody/nothing"):
        with pytest.raises(ValueError, match="paraphraser"):
            make_trainer(paraphraser=source)
    layers = ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]
    with pytest.raises(ValueError, match="snapshot_download"):
        make_trainer(paraphraser="nobody/nothing", teacher_layers=layers, student_layers=layers)


def test_augmentation_and_processor_of_another_kind(make_trainer):
    with pytest.raises(ValueError, match=r"Expected augmentation as a torch\.nn\.Module, got function"):
        make_trainer(augmentation=lambda pixels: pixels)
    with pytest.raises(ValueError, match="Expected teacher_processor as an image processor, got 'some/name'"):
        make_trainer(teacher_processor="some/name")
    processor, collator = ViTImageProcessorPil(), DefaultDataCollator()
    with pytest.raises(ValueError, match="Expected teacher_processor as an image processor, got DefaultDataCollator"):
        make_trainer(teacher_processor=collator, processing_class=processor)
    for given, got in ((None, "None"), (collator, "DefaultDataCollator")):
        message = f"Expected an image processor as processing_class beside teacher_processor, got {got}: .*pass as"
        with pytest.raises(ValueError, match=message):
            make_trainer(teacher_processor=processor, processing_class=given)


def test_factors_wider_than_anybody_wants(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"at most 16 times the teacher's 16 channels, got 1000000: .* by default"):
        make_trainer(factor_channels=10**6)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("make", ["make_trainer", "make_mutual"])
def test_optim_args_that_the_optimizer_does_not_take(make, request, tmp_path):
    """Trainer would leave them out in silence, or fail after stage 1."""
    make = request.getfixturevalue(make)
    with pytest.raises(ValueError, match="as 'name=value,name=value', got 'momentum'"):
        make(optim="sgd", optim_args="momentum")
    with pytest.raises(ValueError, match="arguments of SGD in optim_args, got momentun: it takes lr, momentum, "):
        make(optim="sgd", optim_args="momentun=0.9,nesterov=true")
    with pytest.raises(ValueError, match="arguments of AdamW in optim_args, got momentum"):
        make(optim="adamw_torch", optim_args="momentum=0.9")
    assert not list(tmp_path.glob("out/*"))
    make(optim="sgd", optim_args="momentum=0.9, nesterov=true")


@pytest.mark.parametrize(
    "callbacks, got", [(3, "int"), (["early"], "str"), (PrinterCallback(), "one PrinterCallback")]
)
def test_callbacks_that_are_no_list_of_them(make_trainer, make_mutual, callbacks, got):
    for make in (make_trainer, make_mutual):
        with pytest.raises(ValueError, match=rf"Expected callbacks as a list.*, got {got}: pass callbacks="):
            make(callbacks=callbacks)


def test_empty_dataset(make_trainer, tmp_path):
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=f"{name} to hold at least one example"):
            make_trainer(**{name: []})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label, remedy", [(3, "load the model with num_labels=4"), (-1, "write -100 for none")])
def test_label_outside_of_the_models_range(make_trainer, label, remedy):
    rows = [{"pixel_values": image["pixel_values"].tolist(), "label": 0} for image in make_images(4)]
    rows[2]["label"] = label
    with pytest.raises(
        ValueError, match=rf"from 0 to 2, the model's 3 classes, got {label} in row 2.*: {remedy}, or fix"
    ):
        make_trainer(train_dataset=datasets.Dataset.from_list(rows))
    rows[2]["label"] = -100  # what cross-entropy ignores is fine
    make_trainer(train_dataset=datasets.Dataset.from_list(rows).with_format("torch"))


def test_columns_that_a_transform_needs(make_trainer):
    dataset = datasets.Dataset.from_dict({"image": [0, 1], "label": [0, 1]})
    dataset.set_transform(lambda rows: {"pixel_values": [torch.zeros(3, 32, 32) for _ in rows["image"]]})
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        make_trainer(train_dataset=dataset)
    with pytest.raises(ValueError, match=r"'pixel_values' in a training batch, got \['labels'\]"):
        make_trainer(train_dataset=[{"label": 1}], remove_unused_columns=False)


def test_teacher_that_needs_another_size(make_trainer):
    with pytest.raises(ValueError, match=r"to take the student's batch.*as teacher_processor"):
        make_trainer(teacher_model=make_vit(image_size=64))


def test_model_that_cannot_be_reached(make_trainer):
    with pytest.raises(ValueError, match=r"teacher_model.*'microsoft/no-such'.*local folder.*HF_HUB_CACHE"):
        make_trainer(teacher_model="microsoft/no-such")
    with pytest.raises(ValueError, match=r"Expected model .*'microsoft/no-such'"):
        make_trainer("microsoft/no-such")


def test_folder_without_a_model(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"to hold a loadable config\.json"):
        make_trainer(teacher_model=str(tmp_path))


def test_model_that_gives_no_loss(make_trainer):
    class Silent(PreTrainedModel):
        config_class = PreTrainedConfig
        main_input_name = "pixel_values"
        base_model_prefix = "body"

        def __init__(self):
            super().__init__(PreTrainedConfig(num_labels=3))
            self.body = torch.nn.Conv2d(3, 8, 3)

        def forward(self, pixel_values, labels=None):
            return {"logits": self.body(pixel_values).mean(dim=(2, 3))[:, :3]}

    with pytest.raises(
        ValueError, match=r"Silent to return a loss for a batch with labels, got only logits: let its forward"
    ):
        make_trainer(Silent(), student_layers=["body"])
    unlabelled = [{"pixel_values": image["pixel_values"]} for image in make_images(4)]
    with pytest.raises(ValueError, match=r"ResNetFor\w+ to return a loss, got only logits: the batch needs labels"):
        make_trainer(train_dataset=unlabelled, method="plain")


def test_a_frozen_student_is_refused(make_trainer):
    student = make_resnet(8)
    student.resnet.requires_grad_(False)
    with pytest.raises(ValueError, match="'resnet' to carry a gradient"):
        make_trainer(student).train()


def test_reentrant_checkpointing_is_refused(make_trainer):
    """A module inside of a reentrant checkpoint runs without a graph: its loss would silently do nothing."""
    student = make_vit(seed=1)
    layer = [name for name, _ in student.named_modules() if name.endswith(".layernorm_before")][-1]
    trainer = make_trainer(
        student,
        student_layers=[layer],
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(ValueError, match="checkpointing is reentrant"):
        trainer.train()


def test_channel_split():
    with pytest.raises(ValueError, match="at least 2 channels"):
        ChannelSplit(1, 0.5)
    with pytest.raises(ValueError, match=re.escape("within [0, 1]")):
        ChannelSplit(8, -0.1)
    with pytest.raises(ValueError, match="random, natural"):
        ChannelSplit(8, mode="sorted")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mutual_loss": "dml"}, r"one of ie, kl, ie\+kl; got 'dml'"),
        ({"lambda_kl": -1.0}, "lambda_kl to be a finite weight of at least 0, got -1.0"),
        ({"temperature": 0.0}, "temperature above 0"),
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps=1, got 4: a step updates the peers",
        ),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=False for peers, got True"),
        ({"inheritance_ratio": -0.1}, r"within \[0, 1\], got -0.1"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mutual_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        MutualTrainingArguments(str(tmp_path / "out"), report_to="none", **arguments)
    assert not (tmp_path / "out").exists()


def test_models_that_are_no_peers(make_mutual, tmp_path):
    with pytest.raises(ValueError, match="at least two models, got 1"):
        make_mutual([make_resnet()])
    model = make_resnet()
    with pytest.raises(ValueError, match=r"models\[0\] and models\[1\] share theirs.*copy.deepcopy"):
        make_mutual([model, model])
    with pytest.raises(ValueError, match="differ first at 3"):
        make_mutual([make_resnet(), make_vit(num_labels=5)], mutual_loss="kl")
    with pytest.raises(ValueError, match=r"models\[0\] and models\[2\] for mutual_loss='ie\+kl', got 3 and 5 labels"):
        make_mutual([make_resnet(), make_vit(), make_vit(num_labels=5)], mutual_loss="ie+kl")
    with pytest.raises(ValueError, match="for each of the 2 models in peer_layers, got 1"):
        make_mutual(peer_layers=["resnet"])
    with pytest.raises(ValueError, match=r"'resnet.encoder.stage.0'; close matches: resnet.encoder.stages.0"):
        make_mutual(peer_layers=["resnet.encoder.stage.0", "vit"])
    with pytest.raises(ValueError, match=r"Expected no optimizers, got one.*args\.optim"):
        make_mutual(optimizers=(torch.optim.SGD(model.parameters()), None))
    with pytest.raises(ValueError, match="Expected no model_init, got one"):
        make_mutual(model_init=make_resnet)
    with pytest.raises(ValueError, match="MutualTrainingArguments, got IEKDTrainingArguments"):
        MutualTrainer([make_resnet(), make_vit()], args=IEKDTrainingArguments(str(tmp_path / "out"), report_to="none"))
    with pytest.raises(ValueError, match=r"models\[1\] to be a folder or a Hub name that can be reached"):
        make_mutual([make_resnet(), "nobody/nothing"])
    labels_up_to_2 = datasets.Dataset.from_dict({"pixel_values": [[0.0]] * 3, "labels": [0, 1, 2]})
    with pytest.raises(ValueError, match="from 0 to 1"):  # the second peer's head is too small for them
        make_mutual([make_resnet(), make_resnet(num_labels=2)], train_dataset=labels_up_to_2)
    assert not (tmp_path / "out").exists()


def test_a_peer_that_gives_no_loss(make_mutual):
    body = make_vit().vit
    with pytest.raises(ValueError, match=r"models\[1\] to return a loss, got ViTModel, which takes no labels"):
        make_mutual([make_resnet(), body])
    unlabelled = [{"pixel_values": image["pixel_values"]} for image in make_images(4)]
    with pytest.raises(
        ValueError, match=r"labels to train models\[0\] with, got none for ResNetFor.* a batch of pixel_values"
    ):
        make_mutual(train_dataset=unlabelled)


def test_mutual_training_without_training_data(make_mutual):
    trainer = make_mutual(train_dataset=None, eval_dataset=make_images(4))
    assert trainer.evaluate()["eval_peer_2_loss"] > 0
    with pytest.raises(ValueError, match="train_dataset"):
        trainer.train()
