"""What the baselines are by their own authors' formulas, what methods make of the arguments, and how they train."""

import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import make_images, make_resnet, make_vit, same
from torch import nn
from transformers import AutoModelForImageClassification

from iekd_hf import METHODS, IEKDTrainingArguments, exploration_loss, inheritance_loss
from iekd_hf.features.tap import FeatureTap
from iekd_hf.method.knowledge import AttentionMap, Connector, MarginReLU
from iekd_hf.training.checkpoints import ENCODERS_FILE


# ---- The mathematics ----


def test_attention_transfer_is_its_authors_loss():
    """Zagoruyko's code: at(x) = normalize(x.pow(2).mean(1).view(n, -1)), loss = (at(x) - at(y)).pow(2).mean()."""
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 8, 6, 5), torch.randn(4, 16, 6, 5)

    def at(x):
        return F.normalize(x.pow(2).mean(1).reshape(len(x), -1))

    theirs = (at(student) - at(teacher)).pow(2).mean()
    ours = [AttentionMap().encode(x) for x in (student, teacher)]
    assert ours[0].shape == (4, 1, 6, 5)
    assert inheritance_loss(*ours, distance="cosine").item() * 2 / 30 == pytest.approx(theirs.item(), rel=1e-5)
    # What explores turns it round: their sum does not depend on the maps.
    both = inheritance_loss(*ours, distance="cosine") + exploration_loss(*ours, distance="orthogonal")
    assert both.item() == pytest.approx(1.0, rel=1e-6)


def test_attention_maps_do_not_overflow_in_half_precision():
    f = torch.full((1, 2, 2, 2), 1000.0, dtype=torch.float16)
    assert AttentionMap()(f).unique().item() == 1e6
    assert AttentionMap()(f.double()).dtype == torch.float64


def test_partial_l2_without_norms_is_the_overhauls_loss():
    """Heo's code: ((source - target)^2 * ((source > target) | (target > 0)).float()).sum()."""
    torch.manual_seed(0)
    source, target = 5 * torch.randn(4, 8, 3, 3), 2 * torch.randn(4, 8, 3, 3)
    theirs = ((source - target) ** 2 * ((source > target) | (target > 0)).float()).sum() / 4
    ours = inheritance_loss(source, target, "partial_l2", "sum", normalize=False)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert inheritance_loss(2 * source, 2 * target, "partial_l2", "sum", normalize=False).item() == pytest.approx(
        4 * theirs.item(), rel=1e-5
    )
    source = source.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: inheritance_loss(x, target.double(), "partial_l2", normalize=False), source
    )
    with pytest.raises(ValueError, match="normalize=True with the distance 'cosine'"):
        inheritance_loss(source, source, "cosine", normalize=False)


def test_margins_are_the_mean_negative_response_of_each_channel():
    margin_relu = MarginReLU(in_channels=3)
    first = torch.tensor([[-1.0, 2.0], [0.5, 4.0], [-6.0, -2.0]]).view(1, 3, 1, 2)
    second = torch.tensor([[-3.0, -5.0], [1.0, 0.0], [8.0, 1.0]]).view(1, 3, 1, 2)
    margin_relu.measure([first, second])
    assert margin_relu.margins.tolist() == [-3.0, 0.0, -4.0]  # a channel that is never negative is cut at 0
    assert margin_relu.encode(second).flatten().tolist() == [-3.0, -3.0, 1.0, 0.0, 8.0, 1.0]


# ---- Before the activation ----


def test_what_went_into_the_last_activation_is_tapped():
    model, pixels = make_resnet(8).eval(), make_images(2)[0]["pixel_values"][None]
    before, after = FeatureTap(model, before_activation=True), FeatureTap(model)
    for tap in (before, after):
        tap.attach()
    (pre,) = before.run({"pixel_values": pixels})[1]
    (post,) = after.run({"pixel_values": pixels})[1]
    assert pre.min() < 0 <= post.min()
    assert torch.equal(pre.relu(), post)


def test_an_activation_in_place_is_no_obstacle():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))

        def forward(self, pixel_values):
            return self.body(pixel_values)

    net, pixels = Net(), torch.randn(1, 3, 8, 8)
    tap = FeatureTap(net, ["body"], before_activation=True)
    tap.attach()
    output, (pre,) = tap.run({"pixel_values": pixels})
    assert pre.min() < 0 and torch.equal(pre.relu(), output)
    on_itself = FeatureTap(net, ["body.1"], before_activation=True)
    on_itself.attach()
    assert torch.equal(on_itself.run({"pixel_values": pixels})[1][0], pre)


def test_a_map_that_no_activation_made_is_taken_as_it_is():
    model, pixels = make_vit().eval(), make_images(2)[0]["pixel_values"][None]
    taps = [FeatureTap(model, before_activation=flag) for flag in (True, False)]
    for tap in taps:
        tap.attach()
    (first,), (second,) = (tap.run({"pixel_values": pixels})[1] for tap in taps)
    assert torch.equal(first, second)  # the last operation of a ViT's body is a norm


# ---- The arguments ----


def test_a_method_sets_what_was_not_given(tmp_path):
    defaults = IEKDTrainingArguments(tmp_path)
    assert defaults.method == "ie-ft" and defaults.inheritance_ratio == 0.5 and defaults.knowledge == "factors"
    ft = IEKDTrainingArguments(tmp_path, method="ft", lambda_exp=7.0, inheritance_ratio=0.0)
    assert (ft.lambda_exp, ft.inheritance_ratio) == (7.0, 0.0)  # given ones stay, zeros too
    assert ft.lambda_inh == 0  # as no channel inherits
    assert IEKDTrainingArguments(tmp_path, inheritance_ratio=1.0).lambda_exp == 0
    assert ft.inheritance_distance == METHODS["ft"]["inheritance_distance"]
    for name, values in METHODS.items():
        args = IEKDTrainingArguments(tmp_path, method=name)
        assert {key: getattr(args, key) for key in values} == values
        assert (args.lambda_kd > 0) == (name == "kd" or name.endswith("+kd"))
        assert (args.lambda_inh > 0) == (name.split("+")[0] not in ("plain", "kd", "exploration"))
        assert (args.lambda_exp > 0) == (name.startswith("ie-") or name.startswith("exploration"))
        whole = name.split("+")[0] in ("ft", "at", "od")
        assert args.inheritance_ratio == (1.0 if whole else 0.5)


# ---- Training ----


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_its_components(make_trainer, method):
    trainer = make_trainer(method=method)
    before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    teacher = {name: value.clone() for name, value in trainer.teacher.teacher.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = trainer.train()
    assert not same(before, trainer.student.state_dict()) and same(teacher, trainer.teacher.teacher.state_dict())
    logged = next(logs for logs in trainer.state.log_history if "task_loss" in logs)
    name = method.removesuffix("+kd")
    expected = {"kd_loss": name == "kd" or method.endswith("+kd")}
    expected["inheritance_loss"] = name not in ("plain", "kd", "exploration")
    expected["exploration_loss"] = name.startswith(("ie-", "exploration"))
    assert {component: component in logged for component in expected} == expected
    shares = {key for key in result.metrics if key.endswith("_gradient_share")}
    assert shares == {f"{component}_gradient_share" for component, used in expected.items() if used}


def test_plain_runs_no_teacher(make_trainer):
    trainer = make_trainer(method="plain")
    calls = []
    trainer.teacher.teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert not calls


@pytest.mark.parametrize("method, kind", [("at", AttentionMap), ("od", Connector)])
def test_encoders_of_the_baselines(make_trainer, method, kind):
    side = make_trainer(method=method).student_side
    assert [type(encoder) for encoder in side.inheritance_encoders] == [kind]
    assert not side.exploration_encoders


@pytest.mark.parametrize("method", ["ie-at", "ie-od"])
def test_ten_steps_equal_five_and_five(make_trainer, tmp_path, method):
    common = {"method": method, "save_strategy": "steps", "save_steps": 5, "dataloader_drop_last": True}
    whole = make_trainer(max_steps=10, output_dir=str(tmp_path / "whole"), **common)
    whole.train()
    half = make_trainer(max_steps=10, output_dir=str(tmp_path / "whole"), **common)
    half.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert same(whole.student_side.state_dict(), half.student_side.state_dict())
    assert same(whole.teacher.paraphrasers.state_dict(), half.teacher.paraphrasers.state_dict())


def test_margins_can_be_used_again(make_trainer, tmp_path):
    first = make_trainer(method="od", output_dir=str(tmp_path / "first"))
    first.train()
    again = make_trainer(method="od", paraphraser=str(tmp_path / "first" / "_paraphraser"))
    assert torch.equal(again.teacher.paraphrasers[0].margins, first.teacher.paraphrasers[0].margins)
    assert again.teacher.paraphrasers[0].margins.min() < 0
    again.train()
    assert same(first.student_side.state_dict(), again.student_side.state_dict())


def test_knowledge_that_needs_no_paraphraser_refuses_one(make_trainer):
    with pytest.raises(ValueError, match="no paraphraser with knowledge='attention'"):
        make_trainer(method="at", paraphraser=MarginReLU(16))
    with pytest.raises(ValueError, match="Expected a Paraphraser for this knowledge, got a MarginReLU"):
        make_trainer(method="ft", paraphraser=MarginReLU(16))


# ---- What a weight amounts to ----


def test_gradient_shares_against_a_plain_computation(make_trainer):
    """One batch, a teacher of the same kind: the norms by hand from the maps of a hook."""
    from iekd_hf.training.gradient_shares import gradient_ratios, weighted

    torch.manual_seed(0)
    f = torch.randn(4, 6, 3, 3, requires_grad=True)
    target = torch.randn(4, 3, 3, 3)
    losses = {"task_loss": f.mean(dim=(2, 3)).square().sum(), "inheritance_loss": inheritance_loss(f[:, :3], target)}
    task, inherit = (torch.autograd.grad(loss, f, retain_graph=True)[0].norm() for loss in losses.values())
    shares = weighted(gradient_ratios([([f], losses)]), {"lambda_inh": 50.0})
    assert shares == {"inheritance_loss": pytest.approx((50 * inherit / task).item(), rel=1e-5)}


def test_of_the_batches_that_are_measured_one_graph_is_held_at_a_time():
    from iekd_hf.training.gradient_shares import gradient_ratios

    held = []

    def runs():
        for _ in range(3):
            assert not [feature for feature in held if feature() is not None]
            f = torch.ones(2, 3, requires_grad=True)
            held.append(weakref.ref(f))
            yield [f], {"task_loss": f.sum(), "inheritance_loss": 2 * f.sum()}
            del f

    assert gradient_ratios(runs()) == {"inheritance_loss": pytest.approx(2.0)}
    assert len(held) == 3


def test_a_weight_that_does_nothing_is_warned_of_with_a_better_one(make_trainer):
    with pytest.warns(
        UserWarning, match=r"lambda_inh=1e-06 .* inheritance loss .* is 0\.00% .*hardly act.* set lambda_inh to"
    ):
        trainer = make_trainer(lambda_inh=1e-6, lambda_exp=0.0)
        share = trainer.train().metrics["inheritance_loss_gradient_share"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        better = make_trainer(lambda_inh=1e-6 * 0.1 / share, lambda_exp=0.0)
        assert better.train().metrics["inheritance_loss_gradient_share"] == pytest.approx(0.1, rel=1e-3)
    assert not [w for w in caught if "hardly act" in str(w.message)]


def test_measuring_the_shares_leaves_no_trace(make_trainer, monkeypatch):
    measured = make_trainer()
    measured.train()
    without = make_trainer()
    monkeypatch.setattr("iekd_hf.iekd_trainer.measure_gradient_shares", lambda trainer: {})
    without.train()
    assert same(measured.student_side.state_dict(), without.student_side.state_dict())


# ---- The split travels with the run ----


def test_a_finished_run_keeps_its_split_beside_the_plain_student(make_trainer, tmp_path):
    from safetensors import safe_open

    trainer = make_trainer(output_dir=str(tmp_path / "run"), split_seed=3)
    trainer.save_model()
    assert not (tmp_path / "run" / "_encoders").exists()  # nothing was trained
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere" / "_encoders").exists()
    with safe_open(tmp_path / "run" / "_encoders" / ENCODERS_FILE, framework="pt") as opened:
        assert opened.metadata()["teacher_layers"] == "resnet"
        kept = opened.get_tensor("splits.0.inheritance_indices")
    assert torch.equal(kept, trainer.student_side.splits[0].inheritance_indices)
    _, info = AutoModelForImageClassification.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(info.values())
