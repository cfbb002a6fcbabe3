"""Students with adapters of PEFT: what trains, what is saved, and that it comes back, also in the middle of a run."""

import copy

import numpy as np
import pytest
import torch
from conftest import make_images, make_resnet, make_vit, same
from test_resume import ARGUMENTS, StopAt, everything, logged
from transformers import SegformerConfig, SegformerForSemanticSegmentation


peft = pytest.importorskip("peft")

CONFIGURATIONS = {
    "vit": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], "lora_dropout": 0.1},
    "resnet": {"target_modules": ["convolution"], "modules_to_save": ["classifier", "normalization"]},
}


def make_base(family: str):
    return make_vit(seed=1, hidden_dropout_prob=0.1) if family == "vit" else make_resnet(8, seed=1)


def make_adapted(family: str, seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    return peft.get_peft_model(make_base(family), peft.LoraConfig(r=2, **(CONFIGURATIONS[family] | kwargs)))


def logits(model) -> torch.Tensor:
    pixels = torch.stack([image["pixel_values"] for image in make_images(4, seed=7)])
    with torch.no_grad():
        return model.eval()(pixel_values=pixels).logits


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_only_adapters_and_what_is_to_be_saved_train(make_trainer, tmp_path, family):
    student = make_adapted(family)
    before = copy.deepcopy(student.state_dict())
    trainer = make_trainer(student, max_steps=3)
    side = copy.deepcopy(trainer.student_side.state_dict())
    trainer.train()
    assert trainer.student is student and trainer.student_side.tap.layers == [family]
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    meant = {name for name in before if "lora_" in name or ".modules_to_save." in name}
    assert moved == meant  # BatchNorm's statistics among them
    encoders = {n: v for n, v in trainer.student_side.named_parameters() if not n.startswith("student.")}
    assert encoders and not any(torch.equal(value, side[name]) for name, value in encoders.items())

    trainer.save_model()
    files = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not {"model.safetensors", "config.json"} & files
    loaded = peft.PeftModel.from_pretrained(make_base(family), tmp_path / "out")
    assert torch.equal(logits(loaded), logits(student))
    assert not torch.equal(logits(loaded), logits(make_base(family)))
    merged = logits(loaded.merge_and_unload())  # a plain student again
    torch.testing.assert_close(merged, logits(student), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_ten_steps_equal_five_and_five(make_trainer, tmp_path, family):
    def make(seed=0, **kwargs):
        return make_trainer(make_adapted(family, seed), **(ARGUMENTS | kwargs))

    straight = make(output_dir=str(tmp_path / "straight"))
    straight.train()
    make(output_dir=str(tmp_path / "broken"), callbacks=[StopAt(5)]).train()
    resumed = make(seed=3, output_dir=str(tmp_path / "broken"))  # other adapters: the checkpoint's must win
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 10
    assert same(everything(resumed), everything(straight))
    assert logged(resumed) == logged(straight)


@pytest.mark.parametrize("adapter_name", ["default", "digits"])
def test_the_best_adapter_is_reloaded(make_trainer, adapter_name):
    values, states = iter([0.1, 0.9, 0.2, 0.9]), []

    def compute_metrics(prediction):
        states.append(copy.deepcopy(student.state_dict()))
        return {"accuracy": next(values)}

    configuration = peft.LoraConfig(r=2, **CONFIGURATIONS["vit"])
    student = peft.get_peft_model(make_base("vit"), configuration, adapter_name=adapter_name)
    trainer = make_trainer(
        student,
        eval_dataset=make_images(8),
        compute_metrics=compute_metrics,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same(student.state_dict(), states[1]) and not same(student.state_dict(), states[2])
    assert [p.requires_grad for n, p in student.named_parameters() if "lora_" in n] == [True] * 8


def test_prediction_and_metrics_are_the_adapted_students(make_trainer):
    images = make_images(8)
    trainer = make_trainer(make_adapted("vit"), eval_dataset=images, lambda_kd=1.0)
    trainer.train()
    predictions = trainer.predict(images).predictions
    pixels = torch.stack([image["pixel_values"] for image in images])
    with torch.no_grad():
        expected = trainer.student.eval()(pixel_values=pixels).logits.numpy()
    np.testing.assert_allclose(predictions, expected, rtol=1e-4, atol=1e-5)


def test_statistics_that_would_be_lost_are_refused(make_trainer, tmp_path):
    student = make_adapted("resnet", modules_to_save=["classifier"])
    with pytest.raises(ValueError, match=r"got 6 such layers .* Add 'normalization' to modules_to_save"):
        make_trainer(student)
    assert not (tmp_path / "out").exists()


def test_adapters_of_transformers_own_are_refused(make_trainer, monkeypatch):
    # Transformers 5.24 asks for PEFT 0.22 here, which is newer than the version in constraints.txt.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
    student = make_base("vit")
    student.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"after add_adapter\(\).*get_peft_model"):
        make_trainer(student)


def test_peers_with_adapters_are_refused(make_mutual):
    with pytest.raises(ValueError, match=r"got models\[1\] with adapters"):
        make_mutual([make_base("resnet"), make_adapted("vit")])


def test_another_adapter_is_refused_whole(make_trainer, tmp_path):
    make_trainer(make_adapted("vit"), save_strategy="steps", save_steps=2).train()
    other = make_adapted("vit", target_modules=["q_proj", "k_proj"])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        ValueError, match=r"weights of the adapter 'default' .* got others \(8 are missing, .*[kv]_proj"
    ):
        make_trainer(other, max_steps=4).train(resume_from_checkpoint=True)
    assert same(other.state_dict(), before)
    (tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors").unlink()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is missing"):
        make_trainer(make_adapted("vit"), max_steps=4).train(resume_from_checkpoint=checkpoint)
    (tmp_path / "out" / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"got no adapter_model\.safetensors"):
        make_trainer(make_adapted("vit"), max_steps=4).train(resume_from_checkpoint=checkpoint)


def test_layers_have_the_base_models_names(make_trainer, capsys):
    from iekd_hf import list_layers

    student = make_adapted("vit")
    assert list_layers(student, 32)["vit.layers.0"] == (16, 4, 4)
    trainer = make_trainer(student, student_layers=["vit.layers.0"])
    trainer.train()
    assert trainer.state.log_history[-2]["inheritance_loss"] > 0


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_a_teacher_can_have_adapters_too(make_trainer, family):
    teacher = make_adapted(family)
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(make_resnet(8, seed=4), teacher, lambda_kd=1.0)
    trainer.train()
    assert same(teacher.state_dict(), before)
    trainer.teacher.tap.attach()
    pixels = torch.stack([image["pixel_values"] for image in make_images(4, seed=7)])
    _, seen = trainer.teacher({"pixel_values": pixels}, with_logits=True)
    torch.testing.assert_close(seen, logits(teacher), rtol=1e-4, atol=1e-5)


def test_the_card_says_how_to_put_the_adapter_on_its_base(make_trainer, tmp_path):
    from huggingface_hub import ModelCard

    base = make_base("vit")
    base.name_or_path = base.config._name_or_path = "user/base"
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, **CONFIGURATIONS["vit"]))
    trainer = make_trainer(student)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "image-classification")
    assert (data["base_model"], data["base_model_relation"]) == ("user/base", "adapter")
    code = card.text.split("```python\n")[1].split("```")[0]
    make_base("vit").save_pretrained(tmp_path / "user" / "base")
    for name, folder in (("user/base", tmp_path / "user" / "base"), (".", tmp_path / "out")):
        code = code.replace(f'"{name}"', repr(str(folder)))
    names = {}
    exec(code, names)
    assert torch.equal(logits(names["model"]), logits(student))


def test_an_adapter_of_a_folder_is_not_pushed(make_trainer, tmp_path):
    """Its file names the base: a path of this machine."""
    make_base("vit").save_pretrained(tmp_path / "base")
    base = type(make_base("vit")).from_pretrained(tmp_path / "base")
    student = peft.get_peft_model(base, peft.LoraConfig(r=2, **CONFIGURATIONS["vit"]))
    with pytest.raises(ValueError, match=r"adapter of a model of the Hub to push, got one of the folder 'base'"):
        make_trainer(student, push_to_hub=True, hub_token="hf_test")


def test_a_batch_norm_within_a_head_that_is_saved(make_trainer, tmp_path):
    """As PEFT's recipe for SegFormer has it: what `modules_to_save` names has the norm inside."""
    torch.manual_seed(1)
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2]}
    strides = {
        "sr_ratios": [2, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
        "decoder_hidden_size": 16,
    }
    base = SegformerForSemanticSegmentation(SegformerConfig(num_labels=3, **sizes, **strides))
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["decode_head"])
    student = peft.get_peft_model(copy.deepcopy(base), config)
    images = [{**image, "labels": torch.full((32, 32), i % 3)} for i, image in enumerate(make_images())]
    trainer = make_trainer(student, train_dataset=images)
    trainer.train()
    trainer.save_model()
    pixels = torch.randn(2, 3, 32, 32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=pixels).logits, student.eval()(pixel_values=pixels).logits)
