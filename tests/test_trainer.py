"""The promises of IEKDTrainer: what moves, what stays, what is logged, and that it computes the paper's objective."""

import copy
import gc
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_images, make_resnet, make_vit, same
from transformers import EarlyStoppingCallback, TrainerCallback, ViTImageProcessorPil

from iekd_hf import DistillationTrainer, FactorEncoder, IEKDTrainer, IEKDTrainingArguments, MutualTrainer, Paraphraser
from iekd_hf.training.stage_1 import stage_1_settings


def train_logs(trainer) -> list[dict]:
    return [logs for logs in trainer.state.log_history if "loss" in logs]


def test_the_objective_is_the_papers(make_trainer):
    """Three steps of SGD in plain lines, in float64, give the trainer's weights."""
    images = make_images(12)
    paraphraser = Paraphraser(16, 8)
    trainer = make_trainer(
        make_resnet(8, seed=1).double(),
        make_resnet(16, seed=2).double(),
        train_dataset=[{**image, "pixel_values": image["pixel_values"].double()} for image in images],
        paraphraser=paraphraser.double(),
        max_steps=3,
        lambda_inh=7.0,
        lambda_exp=3.0,
        lambda_kd=0.5,
        temperature=2.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    student, teacher = copy.deepcopy(trainer.student), copy.deepcopy(trainer.teacher.teacher).eval()
    (split,), (encode_inh,), (encode_exp,) = (
        copy.deepcopy(modules)
        for modules in (
            trainer.student_side.splits,
            trainer.student_side.inheritance_encoders,
            trainer.student_side.exploration_encoders,
        )
    )
    trainer.train()

    encode_T = copy.deepcopy(paraphraser).eval().encode
    parameters = [*student.parameters(), *encode_inh.parameters(), *encode_exp.parameters()]
    for batch in (images[0:4], images[4:8], images[8:12]):
        x = torch.stack([image["pixel_values"] for image in batch]).double()
        y = torch.tensor([image["labels"] for image in batch])
        with torch.no_grad():
            F_T = F.normalize(encode_T(teacher.resnet(x).last_hidden_state).flatten(1))
            z_T = teacher(x).logits
        student.train()
        body = student.resnet(x)
        z_S = student.classifier(body.pooler_output)
        f_S = body.last_hidden_state
        F_inh = F.normalize(encode_inh(f_S[:, split.inheritance_indices]).flatten(1))
        F_exp = F.normalize(encode_exp(f_S[:, split.exploration_indices]).flatten(1))
        kl = F.kl_div(F.log_softmax(z_S / 2, 1), F.softmax(z_T / 2, 1), reduction="batchmean") * 4
        loss = F.cross_entropy(z_S, y) + 7 * (F_inh - F_T).abs().mean() - 3 * (F_exp - F_T).abs().mean() + 0.5 * kl
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= 0.01 * gradient
    for name, value in student.state_dict().items():
        torch.testing.assert_close(trainer.student.state_dict()[name], value, rtol=1e-9, atol=1e-11, msg=name)
    for name, value in encode_exp.state_dict().items():
        torch.testing.assert_close(trainer.student_side.exploration_encoders[0].state_dict()[name], value)


def test_everything_that_should_move_moves_and_the_teacher_does_not(make_trainer):
    teacher = make_resnet(16, seed=2).train()  # even a teacher handed over in train mode
    for parameter in teacher.parameters():
        parameter.requires_grad_(True)
    before = copy.deepcopy(teacher.state_dict())
    trainer = make_trainer(teacher_model=teacher)
    side = copy.deepcopy(trainer.student_side.state_dict())
    hooks = sum(len(module._forward_hooks) for module in teacher.modules())
    trainer.train()
    assert same(teacher.state_dict(), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert sum(len(module._forward_hooks) for module in teacher.modules()) == hooks == 0
    assert sum(len(module._forward_hooks) for module in trainer.student.modules()) == 0
    still = [
        name
        for name, parameter in trainer.student_side.named_parameters()
        if torch.equal(parameter, side[name]) and parameter.requires_grad
    ]
    assert not still, f"did not move: {still}"
    assert "splits.0.inheritance_indices" in trainer.student_side.state_dict()


def test_the_paraphraser_is_frozen_in_stage_2(make_trainer):
    paraphraser = Paraphraser(16, 8)
    before = copy.deepcopy(paraphraser.state_dict())
    trainer = make_trainer(paraphraser=paraphraser)
    trainer.train()
    assert same(paraphraser.state_dict(), before)
    assert not paraphraser.encoder.training


def test_logs_hold_the_raw_components_and_the_weights(make_trainer):
    trainer = make_trainer(lambda_inh=10.0, lambda_exp=5.0, lambda_kd=2.0, max_steps=3)
    trainer.train()
    for logs in train_logs(trainer):
        total = logs["task_loss"] + 10 * logs["inheritance_loss"] + 5 * logs["exploration_loss"] + 2 * logs["kd_loss"]
        assert logs["loss"] == pytest.approx(total, rel=1e-4)
        assert logs["inheritance_loss"] > 0 > logs["exploration_loss"]
        assert (logs["lambda_inh"], logs["lambda_exp"], logs["lambda_kd"]) == (10, 5, 2)


def test_stage_1_logs_reports_and_is_kept(make_trainer, tmp_path):
    trainer = make_trainer(paraphraser_epochs=2)
    with pytest.warns(UserWarning, match="has not beaten the trivial predictor"):
        output = trainer.train()
    assert output.metrics["paraphraser_reconstruction_loss"] > output.metrics["paraphraser_mean_map_loss"] > 0
    kept = Paraphraser.from_pretrained(tmp_path / "out" / "_paraphraser")
    assert same(kept.encoder.state_dict(), trainer.teacher.paraphrasers[0].encoder.state_dict())
    assert not list((tmp_path / "out" / "_stage_1").glob("checkpoint-*"))


def test_after_stage_1_only_what_encodes_is_kept_in_memory(make_trainer):
    def whole():
        gc.collect()
        return [x for x in gc.get_objects() if isinstance(x, Paraphraser) and "decoder" in dict(x.named_children())]

    before = len(whole())
    trainer = make_trainer()
    trainer.train()
    (paraphraser,) = trainer.teacher.paraphrasers
    assert {name.split(".")[0] for name in paraphraser.state_dict()} == {"encoder"}
    assert len(whole()) <= before


def test_a_good_paraphraser_does_not_warn(make_trainer):
    colours = torch.rand(40, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 32, 32)
    images = [{"pixel_values": colour.contiguous(), "labels": 0} for colour in colours]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*trivial predictor.*")
        output = make_trainer(
            paraphraser_epochs=60, train_dataset=images[8:], eval_dataset=images[:8], factor_channels=16
        ).train()
    assert output.metrics["paraphraser_reconstruction_loss"] < output.metrics["paraphraser_mean_map_loss"]


def test_stage_1_reports_on_images_of_another_size(make_trainer):
    output = make_trainer(eval_dataset=make_images(4, size=(48, 40))).train()
    assert output.metrics["paraphraser_mean_map_loss"] > 0


def test_lambda_schedule_is_followed(make_trainer):
    trainer = make_trainer(max_steps=4, lambda_inh=8.0, lambda_schedule="linear", lambda_warmup_ratio=0.5)
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(logs.get("lambda_inh"))

    trainer.add_callback(Watch())
    trainer.train()
    assert seen[:4] == [4.0, 8.0, 4.0, 0.0]  # logged after steps 1 to 4, i.e. at progress 1/4 to 4/4


def _cross_entropy(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels)


def _sum_over_count(outputs, labels, num_items_in_batch=None):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("family", ["resnet", "vit", "own loss", "own sum"])
def test_accumulation_equals_one_large_batch(make_trainer, family):
    """1 x 16 == 4 x 4; models whose forward takes **kwargs are where Trainer guesses wrong."""
    results = []
    for batch_size, steps in ((16, 1), (4, 4)):
        # Batch statistics differ between 16 images and 4: without BatchNorm (frozen, in eval mode) nothing may.
        student = make_vit(seed=1) if family == "vit" else make_resnet(8, seed=1)
        trainer = make_trainer(
            student,
            paraphraser=Paraphraser(16, 8),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            max_steps=1,
            lambda_inh=100.0,
            lambda_exp=10.0,
            train_sampling_strategy="sequential",
            compute_loss_func={"own loss": _cross_entropy, "own sum": _sum_over_count}.get(family),
        )
        for module in trainer.student_side.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train = lambda mode=True, module=module: module
                module.eval = module.train
                module.training = False
        before = copy.deepcopy(trainer.student.state_dict())
        trainer.train()
        results.append({k: v - before[k] for k, v in trainer.student.state_dict().items() if v.is_floating_point()})
        logged = train_logs(trainer)[0]
        results[-1]["loss"] = torch.tensor(logged["loss"])
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("trainer_class", [IEKDTrainer, DistillationTrainer, MutualTrainer])
def test_a_loss_function_divides_by_the_labels_of_its_micro_batch(make_trainer, make_mutual, trainer_class):
    """A sum over the count, as Transformers documents it, is the mean, in training and in evaluation."""
    counts, courses = [], []

    def sum_over_count(outputs, labels, num_items_in_batch=None):
        counts.append(int(num_items_in_batch))
        return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    images = make_images(16)
    for loss, batch_size, steps in ((None, 16, 1), (sum_over_count, 16, 1), (sum_over_count, 4, 4)):
        common = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps, "max_steps": 1}
        common |= {"train_dataset": images, "eval_dataset": images, "compute_loss_func": loss, "optim": "sgd"}
        common |= {"max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
        if trainer_class is MutualTrainer:  # updates its peers by each micro-batch
            trainer = make_mutual([make_vit(seed=1), make_vit(seed=2)], **common | {"gradient_accumulation_steps": 1})
        else:
            trainer = make_trainer(make_vit(seed=1), method="plain", **common)
        if trainer_class is DistillationTrainer:
            of_trainer = {name: common[name] for name in ("train_dataset", "eval_dataset", "compute_loss_func")}
            trainer = DistillationTrainer(model=trainer.model, args=trainer.args, **of_trainer)
        losses = [trainer.evaluate()["eval_loss"]]
        counts_in_evaluation, counts[:] = {*counts}, []
        trainer.train()
        if loss is not None:
            assert counts_in_evaluation == {8} and {*counts} == {batch_size}
        counts.clear()
        courses.append(losses + [p.detach().clone() for p in trainer.model.parameters()])
    for course in courses[1:2] if trainer_class is MutualTrainer else courses[1:]:
        assert course[0] == pytest.approx(courses[0][0], rel=1e-5)
        torch.testing.assert_close(course[1:], courses[0][1:], rtol=2e-4, atol=2e-6)


def test_a_loss_function_that_divides_takes_a_batch_without_labels(make_trainer):
    images = [{**image, "labels": -100 if i < 4 else image["labels"]} for i, image in enumerate(make_images(8))]
    trainer = make_trainer(
        method="kd", train_dataset=images, compute_loss_func=_sum_over_count, train_sampling_strategy="sequential"
    )
    trainer.train()
    first, second = train_logs(trainer)
    assert first["task_loss"] == 0 < second["task_loss"]


def test_evaluation_is_the_student_alone(make_trainer):
    seen = {}

    def compute_metrics(prediction):
        seen["predictions"] = prediction.predictions
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    images = make_images(8)
    student = make_resnet(8, seed=1)
    student.config.output_hidden_states = True  # must not end up in the metrics
    trainer = make_trainer(student, eval_dataset=images, compute_metrics=compute_metrics)
    trainer.train()
    calls = []
    handle = trainer.teacher.teacher.register_forward_hook(lambda *args: calls.append(1))
    metrics = trainer.evaluate()
    predictions = trainer.predict(images)
    handle.remove()
    assert not calls
    student.eval()
    with torch.no_grad():
        x = torch.stack([image["pixel_values"] for image in images])
        expected = student(x, labels=torch.tensor([image["labels"] for image in images]))
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    np.testing.assert_allclose(seen["predictions"], expected.logits.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(predictions.predictions, expected.logits.numpy(), rtol=1e-4, atol=1e-5)


def test_best_model_goes_by_the_metric_and_is_reloaded_whole(make_trainer):
    """A ViT, whose weights Trainer's own reload loses; the metric is best in the middle."""
    values = iter([0.1, 0.9, 0.2, 0.9])
    states = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            states.append(copy.deepcopy(model.state_dict()))

    trainer = make_trainer(
        make_vit(seed=1),
        eval_dataset=make_images(8),
        compute_metrics=lambda p: {"accuracy": next(values)},
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        callbacks=[Keep()],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same(trainer.student.state_dict(), states[1])
    assert not same(trainer.student.state_dict(), states[2])


def test_saved_student_is_plain(make_trainer, tmp_path):
    trainer = make_trainer(processing_class=ViTImageProcessorPil())
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    student, info = type(trainer.student).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert same(student.state_dict(), trainer.student.state_dict())
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json", "training_args.bin"}


@pytest.mark.parametrize("ratio, inherits, explores", [(1.0, True, False), (0.0, False, True), (0.3, True, True)])
def test_pure_inheritance_and_pure_exploration(make_trainer, ratio, inherits, explores):
    trainer = make_trainer(make_resnet(9, seed=1), inheritance_ratio=ratio)  # an odd number of channels
    trainer.train()
    logs = train_logs(trainer)[-1]
    assert ("inheritance_loss" in logs, "exploration_loss" in logs) == (inherits, explores)


def test_a_zero_weight_removes_the_encoder(make_trainer):
    trainer = make_trainer(lambda_exp=0.0)
    assert not trainer.student_side.exploration_encoders
    trainer.train()
    assert "exploration_loss" not in train_logs(trainer)[-1]


def test_logit_distillation_alone_needs_no_paraphraser(make_trainer, tmp_path):
    trainer = make_trainer(lambda_inh=0.0, lambda_exp=0.0, lambda_kd=1.0, save_strategy="steps", save_steps=1)
    output = trainer.train()
    assert not any(name.startswith("paraphraser") for name in output.metrics)
    assert not (tmp_path / "out" / "_paraphraser").exists()
    logs = train_logs(trainer)[-1]
    assert logs["loss"] == pytest.approx(logs["task_loss"] + logs["kd_loss"], rel=1e-5)
    again = make_trainer(lambda_inh=0.0, lambda_exp=0.0, lambda_kd=1.0, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again.state.global_step == 3


@pytest.mark.parametrize(
    "inheritance_distance, exploration_distance",
    [("l2", "l2"), ("cosine", "orthogonal"), ("partial_l2", "partial_l2"), ("l1", "cka")],
)
def test_every_distance_trains(make_trainer, inheritance_distance, exploration_distance):
    trainer = make_trainer(
        inheritance_distance=inheritance_distance, exploration_distance=exploration_distance, loss_reduction="sum"
    )
    trainer.train()
    assert np.isfinite(train_logs(trainer)[-1]["loss"])


def test_several_pairs_of_layers(make_trainer, tmp_path):
    layers = ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]
    trainer = make_trainer(teacher_layers=layers, student_layers=layers)
    trainer.train()
    widths = [encoder.layers[1].in_channels for encoder in trainer.student_side.inheritance_encoders]
    assert widths == [4, 4]
    assert [p.in_channels for p in trainer.teacher.paraphrasers] == [8, 16]
    # The folder of several paraphrasers can be given back.
    again = make_trainer(
        teacher_layers=layers, student_layers=layers, paraphraser=str(tmp_path / "out" / "_paraphraser")
    )
    assert same(again.teacher.paraphrasers[1].state_dict(), trainer.teacher.paraphrasers[1].state_dict())


def test_label_smoothing_and_own_loss_function(make_trainer):
    own = {}

    def compute_loss_func(outputs, labels, num_items_in_batch=None):
        own["called"] = True
        return F.cross_entropy(outputs.logits, labels) * 2

    smooth = make_trainer(label_smoothing_factor=0.1, paraphraser=Paraphraser(16, 8))
    smooth.train()
    doubled = make_trainer(compute_loss_func=compute_loss_func, paraphraser=Paraphraser(16, 8))
    doubled.train()
    plain = make_trainer(paraphraser=Paraphraser(16, 8))
    plain.train()
    first = [train_logs(trainer)[0]["task_loss"] for trainer in (plain, smooth, doubled)]
    assert own["called"]
    assert first[2] == pytest.approx(2 * first[0], rel=1e-4)
    assert first[1] != first[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_nothing(make_trainer, precision):
    states = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            make_vit(seed=1),
            paraphraser=Paraphraser(16, 8),
            gradient_checkpointing=checkpointing,
            bf16=precision == "bf16",
        )
        trainer.train()
        states.append(trainer.student.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_bf16_trains_and_evaluates_in_bf16(make_trainer):
    trainer = make_trainer(bf16=True, eval_dataset=make_images(8), eval_strategy="steps", eval_steps=1)
    dtypes = []
    handle = trainer.student.resnet.encoder.register_forward_hook(
        lambda module, args, output: dtypes.append((module.training, output.last_hidden_state.dtype))
    )
    trainer.train()
    trainer.evaluate()
    handle.remove()
    assert set(dtypes) == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert all(parameter.dtype == torch.float32 for parameter in trainer.student.parameters())
    assert not hasattr(trainer.student_side.forward, "__wrapped__")  # autocast's wrapper is gone after training


@pytest.mark.slow
def test_torch_compile(make_trainer):
    common = {"max_steps": 3, "optim": "sgd", "lambda_inh": 10.0, "lambda_exp": 1.0}
    trainer = make_trainer(
        torch_compile=True, torch_compile_backend="aot_eager", eval_dataset=make_images(8), **common
    )
    trainer.evaluate()  # before training, too, which compiles the bare student
    trainer.train()
    reference = make_trainer(eval_dataset=make_images(8), **common)
    reference.train()
    for name, value in reference.student.state_dict().items():
        torch.testing.assert_close(trainer.student.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_optimizers_cover_student_and_encoders(make_trainer, optim):
    trainer = make_trainer(optim=optim, lr_scheduler_type="cosine", warmup_steps=1)
    trainer.train()
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in trainer.student_side.parameters()}
    assert optim != "sgd" or all(group["fused"] for group in trainer.optimizer.param_groups)


def test_early_stopping_and_foreign_callbacks_see_the_student(make_trainer):
    models = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            models.append(model)

    trainer = make_trainer(
        eval_dataset=make_images(8),
        compute_metrics=lambda p: {"accuracy": 0.5},
        max_steps=10,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        callbacks=[EarlyStoppingCallback(2), Watch()],
    )
    trainer.train()
    assert trainer.state.global_step == 3
    assert all(model is trainer.student for model in models)


def test_training_twice_goes_on_and_keeps_the_paraphraser(make_trainer):
    trainer = make_trainer()
    trainer.train()
    paraphraser = copy.deepcopy(trainer.teacher.paraphrasers.state_dict())
    after_first = copy.deepcopy(trainer.student.state_dict())
    trainer.train()
    assert same(trainer.teacher.paraphrasers.state_dict(), paraphraser)
    assert not same(trainer.student.state_dict(), after_first)


@pytest.mark.parametrize("given", [1, "auto"])
def test_a_search_trains_with_the_weight_that_it_suggests(make_trainer, given):
    suggested, trained = [0.25, "auto", 0.75], []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            side = trainer.student_side
            trained.append((args.lambda_inh, args.lambda_exp, args.layer_decay, len(side.inheritance_encoders)))

    trainer = make_trainer(
        model_init=lambda: make_resnet(8, seed=1), eval_dataset=make_images(8), lambda_inh=given, layer_decay=1
    )
    trainer.add_callback(Watch())
    trainer.hyperparameter_search(
        hp_space=lambda trial: {"lambda_inh": suggested[trial.number], "layer_decay": 0.5},
        n_trials=3,
        backend="optuna",
        direction="minimize",
    )
    assert trained == [(weight, 300.0, 0.5, 1) for weight in suggested]


def test_hyperparameter_search(make_trainer):
    widths = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            widths.append((args.lambda_inh, len(trainer.student_side.splits[0].inheritance_indices)))

    trainer = make_trainer(
        model_init=lambda: make_resnet(8, seed=1), eval_dataset=make_images(8), eval_strategy="steps", eval_steps=2
    )
    trainer.add_callback(Watch())
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {
            "lambda_inh": trial.suggest_categorical("lambda_inh", [1.0, 500.0]),
            "inheritance_ratio": trial.suggest_categorical("inheritance_ratio", [0.25, 0.75]),
        },
        n_trials=3,
        backend="optuna",
        direction="minimize",
    )
    assert best.objective > 0
    assert len(widths) == 3
    assert {width for _, width in widths} <= {2, 6}


def test_a_search_cannot_change_what_a_trainer_was_built_with(make_trainer):
    trainer = make_trainer(model_init=lambda: make_resnet(8, seed=1), eval_dataset=make_images(8))
    with pytest.raises(ValueError, match="got method='kd' for a trainer that was built with 'ie-ft': search with one"):
        trainer.hyperparameter_search(
            hp_space=lambda trial: {"method": "kd"}, n_trials=1, backend="optuna", direction="minimize"
        )


def test_stage_1_runs_again_for_what_its_result_depends_on(make_trainer):
    trainer = make_trainer(paraphraser_max_steps=1)
    first = stage_1_settings([(16, 8)], trainer.args)
    for name, value in (("paraphraser_max_steps", 2), ("seed", 7), ("per_device_train_batch_size", 2)):
        before = getattr(trainer.args, name)
        setattr(trainer.args, name, value)
        assert stage_1_settings([(16, 8)], trainer.args) != first
        setattr(trainer.args, name, before)
    assert stage_1_settings([(16, 8)], trainer.args) == first


def test_data_that_are_put_in_place_later_are_counted(make_trainer):
    trainer = make_trainer(method="kd")
    trainer.train_dataset = [
        {**row, "labels": -100 if i % 2 else row["labels"]} for i, row in enumerate(make_images())
    ]
    trainer.train()
    assert trainer.task_loss.num_labelled == 8


def test_teacher_sees_its_own_pixels(make_trainer):
    student_processor = ViTImageProcessorPil(
        image_mean=[0.5] * 3, image_std=[0.25] * 3, size={"height": 32, "width": 32}
    )
    teacher_processor = ViTImageProcessorPil(
        image_mean=[0.1] * 3, image_std=[0.2] * 3, size={"height": 48, "width": 48}
    )
    raw = np.full((3, 32, 32), 102, dtype=np.uint8)
    images = [
        {"pixel_values": student_processor(raw, input_data_format="channels_first")["pixel_values"][0], "labels": 0}
    ]
    seen = {}
    trainer = make_trainer(
        train_dataset=images * 8,
        processing_class=student_processor,
        teacher_processor=teacher_processor,
    )
    trainer.teacher.teacher.resnet.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    trainer.train()
    assert seen["x"].shape[-2:] == (48, 48)
    expected = (102 / 255 - 0.1) / 0.2
    torch.testing.assert_close(seen["x"], torch.full_like(seen["x"], expected), rtol=1e-5, atol=1e-5)


def test_teacher_with_other_labels_and_another_size_of_map(make_trainer):
    trainer = make_trainer(make_vit(seed=1), make_resnet(16, num_labels=1000, seed=2))
    trainer.train()  # ViT 4x4 patches against ResNet 4x4; 1000 labels against 3
    big = make_trainer(make_vit(seed=1, image_size=64), train_dataset=make_images(8, size=(64, 64)))
    big.train()  # 8x8 against 8x8
    hierarchical = make_trainer(
        make_vit(seed=1, image_size=64),
        teacher_layers=["resnet.embedder"],
        train_dataset=make_images(8, size=(64, 64)),
    )
    hierarchical.train()  # 8x8 against 16x16


def test_models_by_folder(make_trainer, tmp_path):
    make_resnet(8, seed=1).save_pretrained(tmp_path / "student")
    make_vit(seed=2).save_pretrained(tmp_path / "teacher")
    ViTImageProcessorPil(image_mean=[0.0] * 3, size={"height": 32, "width": 32}).save_pretrained(tmp_path / "teacher")
    trainer = make_trainer(
        str(tmp_path / "student"),
        str(tmp_path / "teacher"),
        processing_class=ViTImageProcessorPil(size={"height": 32, "width": 32}),
    )
    assert trainer.teacher.teacher_pixels is not None  # read from the folder: another mean
    trainer.train()


def test_factor_encoder_of_each_half(make_trainer):
    trainer = make_trainer(make_resnet(10, seed=1), inheritance_ratio=0.3, factor_channels=5)
    (inherit,), (explore,) = trainer.student_side.inheritance_encoders, trainer.student_side.exploration_encoders
    for encoder, width in ((inherit, 3), (explore, 7)):
        expected = FactorEncoder(width, 5)
        assert [p.shape for p in encoder.parameters()] == [p.shape for p in expected.parameters()]


def test_cheaper_encoders_in_both_stages(make_trainer, make_mutual, tmp_path):
    trainer = make_trainer(encoder_kernel_size=1)
    trainer.train()
    (paraphraser,) = trainer.teacher.paraphrasers
    sides = (paraphraser, trainer.student_side.inheritance_encoders, trainer.student_side.exploration_encoders)
    sizes = {m.kernel_size for side in sides for m in side.modules() if isinstance(m, torch.nn.Conv2d)}
    assert sizes == {(1, 1)}
    # Kept with the paraphraser, whatever the next run's encoders are.
    kept = Paraphraser.from_pretrained(tmp_path / "out" / "_paraphraser")
    assert same(kept.encoder.state_dict(), paraphraser.encoder.state_dict())
    peers = make_mutual(encoder_kernel_size=1).group
    encoders = (*peers.paraphrasers, *(peer.inheritance_encoders for peer in peers.peers))
    assert {m.kernel_size for e in encoders for m in e.modules() if isinstance(m, torch.nn.Conv2d)} == {(1, 1)}


def test_iterable_dataset(make_trainer):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from make_images(16)

    trainer = make_trainer(train_dataset=Stream(), paraphraser=Paraphraser(16, 8))
    trainer.train()
    assert trainer.state.global_step == 2


def test_evaluation_without_training_data(make_trainer):
    trainer = make_trainer(train_dataset=None, eval_dataset=make_images(8))
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="train_dataset"):
        trainer.train()


def test_arguments_are_required(tmp_path):
    with pytest.raises(ValueError, match="IEKDTrainingArguments"):
        IEKDTrainer(model=make_resnet(), teacher_model=make_resnet())
    with pytest.raises(ValueError, match="teacher_model"):
        IEKDTrainer(model=make_resnet(), args=IEKDTrainingArguments(tmp_path, report_to="none"))
