"""The promises of MutualTrainer: the four steps of the paper, what moves, what is logged, evaluated and saved."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import make_images, make_resnet, make_vit, same
from transformers import AutoModelForImageClassification, TrainerCallback, ViTImageProcessorPil

from iekd_hf.method.trainable import frozen_statistics
from iekd_hf.training.partwise_optimizer import PartwiseOptimizer


def train_logs(trainer) -> list[dict]:
    return [logs for logs in trainer.state.log_history if "loss" in logs]


def in_float64(count: int) -> list[dict]:
    return [{**image, "pixel_values": image["pixel_values"].double()} for image in make_images(count)]


def batches(images: list[dict], size: int = 4):
    for i in range(0, len(images), size):
        part = images[i : i + size]
        yield torch.stack([image["pixel_values"] for image in part]), torch.tensor([image["labels"] for image in part])


PLAIN_SGD = {
    "max_steps": 3,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
}


def test_the_four_steps_are_the_papers(make_mutual):
    """Three iterations in plain lines, in float64, give the trainer's weights."""
    images = in_float64(12)
    models = [make_resnet(8, seed=1).double(), make_resnet(12, seed=2).double()]
    trainer = make_mutual(models, train_dataset=images, lambda_inh=7.0, lambda_exp=3.0, **PLAIN_SGD)
    peers, (R_1, R_2) = copy.deepcopy(trainer.group.peers), copy.deepcopy(trainer.group.paraphrasers)
    trainer.train()

    papers = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    optimizers = {part: torch.optim.SGD(part.parameters(), **papers) for part in (R_1, R_2)}
    optimizers |= {peer: torch.optim.SGD(peer.parameters(), lr=0.01) for peer in peers}

    def update(part, loss):
        optimizers[part].zero_grad()
        loss.backward(inputs=list(part.parameters()))
        optimizers[part].step()

    def f(peer, x):
        return peer.student.resnet(x).last_hidden_state

    def objective(peer, x, y, F_T):
        f_S, split = f(peer, x), peer.splits[0]
        F_inh = F.normalize(peer.inheritance_encoders[0](f_S[:, split.inheritance_indices]).flatten(1))
        F_exp = F.normalize(peer.exploration_encoders[0](f_S[:, split.exploration_indices]).flatten(1))
        F_T = F.normalize(F_T.flatten(1))
        L_goal = F.cross_entropy(peer.student.classifier(f_S.mean((2, 3))[:, :, None, None]), y)
        return L_goal + 7 * (F_inh - F_T).abs().mean() - 3 * (F_exp - F_T).abs().mean()

    first, second = peers.train()
    for x, y in batches(images):
        f_1 = f(first, x).detach()
        update(R_1, (f_1 - R_1(f_1)).abs().mean())  # 1.
        update(second, objective(second, x, y, R_1.encode(f_1).detach()))  # 2.
        f_2 = f(second, x).detach()
        update(R_2, (f_2 - R_2(f_2)).abs().mean())  # 3.
        update(first, objective(first, x, y, R_2.encode(f_2).detach()))  # 4.
    for ours, plain in ((trainer.group.peers, peers), (trainer.group.paraphrasers, [R_1, R_2])):
        for part, expected in zip(ours, plain, strict=True):
            for name, value in expected.named_parameters():
                torch.testing.assert_close(part.get_parameter(name), value, rtol=1e-9, atol=1e-11, msg=name)


def test_dml_in_plain_lines(make_mutual):
    """The baseline: each peer in turn towards the other's logits as they are by then, at a temperature."""
    images = in_float64(12)
    models = [make_resnet(8, seed=1).double(), make_vit(seed=2).double()]
    trainer = make_mutual(models, train_dataset=images, mutual_loss="kl", lambda_kl=0.5, temperature=2.0, **PLAIN_SGD)
    first, second = copy.deepcopy(models)
    trainer.train()
    optimizers = {peer: torch.optim.SGD(peer.parameters(), lr=0.01) for peer in (first, second)}
    for x, y in batches(images):
        for peer, other in ((second.train(), first.train()), (first, second)):
            z, target = peer(x).logits, other(x).logits.detach()
            kl = F.kl_div(F.log_softmax(z / 2, 1), F.softmax(target / 2, 1), reduction="batchmean") * 4
            optimizers[peer].zero_grad()
            (F.cross_entropy(z, y) + 0.5 * kl).backward()
            optimizers[peer].step()
    for ours, plain in zip(trainer.models, (first, second), strict=True):
        for name, value in plain.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), value, rtol=1e-9, atol=1e-11, msg=name)


class Count:
    """Count the forward passes of a module, and those of them that build a graph."""

    def __init__(self, module):
        self.all, self.with_graph = 0, 0
        module.register_forward_hook(self)

    def __call__(self, module, args, output):
        self.all += 1
        self.with_graph += torch.is_grad_enabled()


@pytest.mark.parametrize("mutual_loss", ["ie", "kl", "ie+kl"])
def test_two_networks_run_forward_three_times(make_mutual, mutual_loss):
    models = [make_resnet(8, seed=1), make_resnet(12, seed=2)]
    trainer = make_mutual(models, mutual_loss=mutual_loss)
    passes = [Count(model.resnet.encoder) for model in models]
    heads = [Count(model.classifier) for model in models]
    trainer.train()  # two steps
    assert [(count.all, count.with_graph) for count in passes] == [(2, 2), (4, 2)]
    # What only teaches factors ends at the feature map.
    assert [count.all for count in heads] == ([2, 2] if mutual_loss == "ie" else [2, 4])


def test_three_networks_run_forward_five_times(make_mutual):
    models = [make_resnet(width, seed=width) for width in (8, 12, 16)]
    trainer = make_mutual(models)
    passes = [Count(model.resnet.encoder) for model in models]
    paraphrasers = [Count(paraphraser.decoder) for paraphraser in trainer.group.paraphrasers]
    trainer.train()
    assert [(count.all, count.with_graph) for count in passes] == [(2, 2), (4, 2), (4, 2)]
    assert [count.all for count in paraphrasers] == [2, 2, 2]  # each is updated once a step


@pytest.mark.parametrize("number", [2, 3])
def test_batchnorm_moves_once_for_each_update_of_its_network(make_mutual, number):
    trainer = make_mutual([make_resnet(width, seed=width) for width in (8, 12, 16)[:number]], max_steps=3)
    trainer.train()
    counts = {
        name: int(value) for name, value in trainer.group.state_dict().items() if name.endswith("num_batches_tracked")
    }
    assert len(counts) > 20
    assert set(counts.values()) == {3}


def test_frozen_statistics_normalise_by_the_batch():
    norm, x = torch.nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    before = copy.deepcopy(norm.state_dict())
    with frozen_statistics(torch.nn.Sequential(norm)):
        y = norm(x)
    assert same(norm.state_dict(), before)
    torch.testing.assert_close(y, norm(x))
    assert not torch.equal(norm.running_mean, before["running_mean"])


@pytest.mark.parametrize("mutual_loss", ["ie", "kl", "ie+kl"])
def test_each_update_has_gradients_of_its_own_loss_only(make_mutual, mutual_loss):
    """At every optimizer step, parameters of exactly one part have a gradient, and the parts come in their order."""
    trainer = make_mutual(mutual_loss=mutual_loss, max_steps=1)
    parts = {f"peer_{i}": peer for i, peer in enumerate(trainer.group.peers, start=1)}
    parts |= {f"paraphraser_{i}": p for i, p in enumerate(trainer.group.paraphrasers, start=1)}
    seen = []
    step = PartwiseOptimizer.step

    def watch(self, closure=None):
        seen.append([name for name, part in parts.items() if any(p.grad is not None for p in part.parameters())])
        step(self, closure)

    trainer.create_optimizer()
    trainer.optimizer.step = watch.__get__(trainer.optimizer)
    before = copy.deepcopy(trainer.group.state_dict())
    trainer.train()
    order = {"ie": ["paraphraser_1", "peer_2", "paraphraser_2", "peer_1"], "kl": ["peer_2", "peer_1"]}
    assert seen == [[name] for name in order[mutual_loss.partition("+")[0]]]
    after = trainer.group.state_dict()
    still = [n for n, p in trainer.group.named_parameters() if torch.equal(before[n], after[n]) and p.requires_grad]
    assert not still, f"did not move: {still}"


def test_logs_hold_the_raw_components_of_each_peer(make_mutual):
    trainer = make_mutual(mutual_loss="ie+kl", lambda_kl=2.0, max_steps=3)
    trainer.train()
    for logs in train_logs(trainer):
        totals = [
            logs[f"peer_{i}/task_loss"]
            + 20 * logs[f"peer_{i}/inheritance_loss"]
            + 5 * logs[f"peer_{i}/exploration_loss"]
            + 2 * logs[f"peer_{i}/kl_loss"]
            for i in (1, 2)
        ]
        assert logs["loss"] == pytest.approx(sum(totals) / 2, rel=1e-4)
        assert all(logs[f"peer_{i}/reconstruction_loss"] > 0 for i in (1, 2))
        assert (logs["lambda_inh"], logs["lambda_exp"], logs["lambda_kl"]) == (20, 5, 2)
    assert not any("kd" in name for logs in trainer.state.log_history for name in logs)


def test_three_peers_learn_from_the_mean_over_the_others(make_mutual):
    """DML of three in plain lines: peers 2, 3, 1 in turn, each from the mean over the others as they are by then."""
    images = in_float64(12)
    models = [make_resnet(width, seed=width).double() for width in (8, 12, 16)]
    trainer = make_mutual(models, train_dataset=images, mutual_loss="kl", **PLAIN_SGD)
    peers = copy.deepcopy(models)
    trainer.train()
    optimizers = {peer: torch.optim.SGD(peer.parameters(), lr=0.01) for peer in peers}
    for x, y in batches(images):
        for i in (1, 2, 0):
            z, others = peers[i].train()(x).logits, [peers[j].train()(x).logits.detach() for j in range(3) if j != i]
            kl = [F.kl_div(F.log_softmax(z, 1), F.softmax(other, 1), reduction="batchmean") for other in others]
            optimizers[peers[i]].zero_grad()
            (F.cross_entropy(z, y) + sum(kl) / 2).backward()
            optimizers[peers[i]].step()
    for ours, plain in zip(trainer.models, peers, strict=True):
        for name, value in plain.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), value, rtol=1e-9, atol=1e-11, msg=name)


def test_three_peers_have_encoders_towards_each_other(make_mutual):
    trainer = make_mutual([make_resnet(8, seed=1), make_vit(seed=2), make_resnet(12, seed=3)])
    trainer.train()
    widths = [
        [encoder.layers[4].out_channels for encoder in peer.inheritance_encoders] for peer in trainer.group.peers
    ]
    assert widths == [[8, 6], [4, 6], [4, 8]]  # half the channels of each other one: 8, 16, 12
    assert all(f"peer_3/{name}" in train_logs(trainer)[-1] for name in ("task_loss", "inheritance_loss"))


def test_peers_may_have_other_heads_and_other_map_sizes(make_mutual):
    images = make_images(16, size=(64, 64))
    vit = make_vit(seed=2, num_labels=7, image_size=64)  # 8x8 patches
    trainer = make_mutual([make_resnet(8, seed=1), vit], train_dataset=images, eval_dataset=images[:4])
    trainer.train()
    assert {"eval_peer_1_loss", "eval_peer_2_loss", "eval_loss"} <= set(trainer.evaluate())


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean()), "note": "text"}


def test_evaluation_is_of_each_peer_and_the_mean(make_mutual):
    images = make_images(10)
    trainer = make_mutual(eval_dataset=images, compute_metrics=accuracy)
    trainer.train()
    metrics = trainer.evaluate()
    prediction = trainer.predict(images)
    x = torch.stack([image["pixel_values"] for image in images])
    y = torch.tensor([image["labels"] for image in images])
    for i, model in enumerate(trainer.models):
        with torch.no_grad():
            expected = model.eval()(x, labels=y)
        assert metrics[f"eval_peer_{i + 1}_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
        np.testing.assert_allclose(prediction.predictions[i], expected.logits.numpy(), rtol=1e-4, atol=1e-5)
        hits = (expected.logits.argmax(-1) == y).float().mean().item()
        assert metrics[f"eval_peer_{i + 1}_accuracy"] == pytest.approx(hits)
    for name in ("loss", "accuracy"):
        mean = (metrics[f"eval_peer_1_{name}"] + metrics[f"eval_peer_2_{name}"]) / 2
        assert metrics[f"eval_{name}"] == pytest.approx(mean)
    assert metrics["eval_peer_1_note"] == "text" and "eval_note" not in metrics
    # One entry in the logs, with everything.
    assert trainer.state.log_history[-1].keys() >= {"eval_peer_1_accuracy", "eval_peer_2_accuracy", "eval_accuracy"}


def test_several_evaluation_sets(make_mutual):
    sets = {"day": make_images(4), "night": make_images(6, seed=1)}
    metrics = make_mutual(eval_dataset=sets).evaluate()
    assert {"eval_day_peer_1_loss", "eval_day_loss", "eval_night_peer_2_loss", "eval_night_loss"} <= set(metrics)


@pytest.mark.parametrize("metric", ["peer_2_accuracy", "accuracy"])
def test_best_checkpoint_by_a_peer_or_by_the_mean(make_mutual, metric):
    # Three evaluations of two peers: peer 2 is best at the first, the mean at the second.
    values = iter([0.1, 0.8, 0.9, 0.7, 0.2, 0.1])
    states = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append([copy.deepcopy(model.state_dict()) for model in trainer.models])

    trainer = make_mutual(
        eval_dataset=make_images(8),
        compute_metrics=lambda p: {"accuracy": next(values)},
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        callbacks=[Keep()],
    )
    trainer.train()
    best = 1 if metric == "peer_2_accuracy" else 2
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    for model, state in zip(trainer.models, states[best - 1], strict=True):
        assert same(model.state_dict(), state)  # a ViT among them, of which Trainer's own reload loses weights


def test_saved_peers_are_plain_models(make_mutual, tmp_path):
    trainer = make_mutual(processing_class=ViTImageProcessorPil())
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"peer_1", "peer_2"}
    for i, model in enumerate(trainer.models, start=1):
        folder = tmp_path / "saved" / f"peer_{i}"
        loaded, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
        assert type(loaded) is type(model) and not any(info.values())
        assert same(loaded.state_dict(), model.state_dict())
        files = {path.name for path in folder.iterdir()}
        assert files == {"config.json", "model.safetensors", "preprocessor_config.json", "training_args.bin"}


def test_training_leaves_no_hook_and_no_wrapper(make_mutual):
    trainer = make_mutual(bf16=True)
    trainer.train()
    for model in trainer.models:
        assert sum(len(module._forward_hooks) for module in model.modules()) == 0
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    for part in (*trainer.group.peers, *trainer.group.paraphrasers):
        assert not hasattr(part.forward, "__wrapped__")
    assert trainer.model is trainer.models[0] is trainer.model_wrapped


def test_bf16_runs_every_pass_in_bf16(make_mutual):
    models = [make_resnet(8, seed=1), make_resnet(12, seed=2)]
    trainer = make_mutual(models, bf16=True, eval_dataset=make_images(4), eval_strategy="steps", eval_steps=1)
    dtypes = []
    for model in models:
        model.resnet.encoder.register_forward_hook(lambda m, a, out: dtypes.append(out.last_hidden_state.dtype))
    for paraphraser in trainer.group.paraphrasers:
        paraphraser.encoder[1].register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    trainer.train()
    assert set(dtypes) == {torch.bfloat16}
    assert all(np.isfinite(logs["loss"]) for logs in train_logs(trainer))


@pytest.mark.slow
def test_torch_compile(make_mutual):
    common = {"max_steps": 3, "optim": "sgd", "eval_dataset": make_images(8)}

    def peers():
        return [make_resnet(8, seed=1), make_resnet(12, seed=2)]

    compiled = make_mutual(peers(), torch_compile=True, torch_compile_backend="aot_eager", **common)
    compiled.evaluate()  # before training too
    compiled.train()
    reference = make_mutual(peers(), **common)
    reference.train()
    for ours, plain in zip(compiled.models, reference.models, strict=True):
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert np.isfinite(compiled.evaluate()["eval_loss"])


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "rmsprop"])
def test_one_optimizer_holds_everything_and_one_schedule_moves_it(make_mutual, optim):
    trainer = make_mutual(optim=optim, lr_scheduler_type="linear", paraphraser_learning_rate=0.5)
    trainer.train()
    optimized = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == set(trainer.group.parameters())
    assert train_logs(trainer)[0]["learning_rate"] == 0.01
    again = make_mutual(optim=optim, max_steps=4)
    again.create_optimizer_and_scheduler(4)
    again.optimizer.step()
    again.lr_scheduler.step()
    rates = {group["lr"] for part in again.optimizer.optimizers for group in part.param_groups}
    assert rates == {0.01 * 3 / 4, 0.1 * 3 / 4}


def test_a_part_that_is_not_updated_keeps_its_state():
    """Some optimizers count steps by group: in one common step() they would count those of the other parts too."""

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                group["steps"] = group.get("steps", 0) + 1

    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = PartwiseOptimizer([Counting([first], lr=0.1, momentum=0.9), Counting([second], lr=0.1, momentum=0.9)])
    for parameter in (first, second, second):
        optimizer.zero_grad()
        parameter.sum().backward()
        optimizer.step()
    assert [group["steps"] for group in optimizer.param_groups] == [1, 2]
    assert torch.equal(first, torch.full((2,), 0.9))
    restored = PartwiseOptimizer([Counting([first], lr=0.3, momentum=0.9), Counting([second], lr=0.3, momentum=0.9)])
    restored.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in restored.param_groups] == [0.1, 0.1]
    assert all(a is b for a, b in zip(restored.param_groups, (o.param_groups[0] for o in restored.optimizers)))  # noqa: B905
    assert torch.equal(restored.optimizers[1].state[second]["momentum_buffer"], torch.full((2,), 1.9))


def test_gradient_scaling_skips_the_part_that_overflows():
    """As accelerate steps it in fp16: unscaled, stepped and rescaled once for each part."""
    Accelerator(cpu=True)  # sets up the state that an optimizer of accelerate reads
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = AcceleratedOptimizer(
        PartwiseOptimizer([torch.optim.SGD([first], lr=0.1), torch.optim.SGD([second], lr=0.1)]),
        scaler=torch.amp.GradScaler("cpu", init_scale=8.0),
    )
    for parameter, factor, skipped in ((first, torch.inf, True), (second, 1.0, False)):
        optimizer.scaler.scale((parameter * factor).sum()).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == skipped
        optimizer.zero_grad()
    assert torch.equal(first, torch.ones(2)) and torch.equal(second, torch.full((2,), 0.9))


@pytest.mark.parametrize("ratio, inherits, explores", [(1.0, True, False), (0.0, False, True)])
def test_pure_inheritance_and_pure_exploration(make_mutual, ratio, inherits, explores):
    trainer = make_mutual(inheritance_ratio=ratio)
    trainer.train()
    logs = train_logs(trainer)[-1]
    assert ("peer_2/inheritance_loss" in logs, "peer_2/exploration_loss" in logs) == (inherits, explores)


def test_own_layers_loss_function_and_label_smoothing(make_mutual):
    def doubled(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels) * 2

    first = {}
    for name, kwargs in {
        "plain": {},
        "smooth": {"label_smoothing_factor": 0.1},
        "doubled": {"compute_loss_func": doubled},
    }.items():
        layers = ["resnet.encoder.stages.0", "vit.layers.0"]
        trainer = make_mutual(peer_layers=layers, **kwargs)
        assert trainer.group.paraphrasers[0].in_channels == 8
        trainer.train()
        first[name] = train_logs(trainer)[0]["peer_1/task_loss"]
    assert first["doubled"] == pytest.approx(2 * first["plain"], rel=1e-4)
    assert first["smooth"] != first["plain"]


def test_models_by_folder(make_mutual, tmp_path):
    make_resnet(8, seed=1).save_pretrained(tmp_path / "first")
    make_vit(seed=2).save_pretrained(tmp_path / "second")
    trainer = make_mutual([str(tmp_path / "first"), str(tmp_path / "second")])
    trainer.train()
    assert [type(model).__name__ for model in trainer.models] == [
        "ResNetForImageClassification",
        "ViTForImageClassification",
    ]


def test_training_twice_goes_on(make_mutual):
    trainer = make_mutual()
    trainer.train()
    after_first = copy.deepcopy(trainer.group.state_dict())
    trainer.train()
    assert not same(trainer.group.state_dict(), after_first)


def test_the_schedule_of_the_weights_is_followed(make_mutual):
    trainer = make_mutual(max_steps=4, lambda_inh=8.0, lambda_schedule="linear", lambda_warmup_ratio=0.5)
    trainer.train()
    assert [logs["lambda_inh"] for logs in train_logs(trainer)] == [4.0, 8.0, 4.0, 0.0]
