"""Segmenters and depth estimators, each as student and as teacher, with no layer named; and what is refused."""

import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers as t
from conftest import make_resnet

from iekd_hf.method.losses import kd_loss
from iekd_hf.method.objective import logit_loss
from iekd_hf.models.kinds import ignore_index_of


VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
FOUR = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
BEIT = {**VIT, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2], "auxiliary_channels": 8}
DPT = {**VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16]}
DPT |= {"fusion_hidden_size": 8}
MOBILEVIT = {"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32], "num_attention_heads": 2}
# Their own initializer_range is for pretrained weights: with 0.02 hardly anything gets through.
DEEPLAB = {"image_size": 64, "aspp_out_channels": 16, "atrous_rates": [1, 2, 3], "initializer_range": 0.2}


def resnet(width: int = 16) -> t.ResNetConfig:
    stages = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, width], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return t.ResNetConfig(**stages, out_features=["stage1", "stage2", "stage3", "stage4"])


UPERNET = {"hidden_size": 16, "pool_scales": [1, 2], "auxiliary_in_channels": 8, "auxiliary_channels": 8}

# name: (family, configuration, image size)
FAMILIES = {
    "BEiT": ("Beit", BEIT, 32),
    "Data2Vec Vision": ("Data2VecVision", {**BEIT, "out_indices": [0, 1, 2, 3]}, 32),
    "DPT": ("DPT", DPT, 32),
    "MobileNet V2": ("MobileNetV2", {"depth_multiplier": 0.25, "initializer_range": 0.2}, 64),
    "MobileViT": ("MobileViT", {**MOBILEVIT, **DEEPLAB}, 64),
    "MobileViT V2": (
        "MobileViTV2",
        {"width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1], "base_attn_unit_dims": [16, 16, 16], **DEEPLAB},
        64,
    ),
    "SegFormer": ("Segformer", {**FOUR, "decoder_hidden_size": 16}, 64),
    "UperNet": ("UperNet", {"backbone_config": resnet(), **UPERNET}, 64),
}


def build(name: str, num_labels: int = 3, seed: int = 0) -> tuple[t.PreTrainedModel, int]:
    family, kwargs, size = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(t, f"{family}Config")(num_labels=num_labels, **kwargs)
    return getattr(t, f"{family}ForSemanticSegmentation")(config), size


def make_masked(count: int = 8, size: int = 64, num_labels: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(0, num_labels, (count, size, size), generator=generator)
    labels[:, :5] = 255
    return [{"pixel_values": image, "labels": mask} for image, mask in zip(pixels, labels, strict=True)]


@pytest.fixture
def segment(make_trainer):
    """Take two steps, and return what was logged and how many of the student's parameters have moved."""

    def run(student, teacher, size=64, train_dataset=None, **kwargs):
        before = {name: value.clone() for name, value in student.named_parameters()}
        rows = make_masked(size=size) if train_dataset is None else train_dataset
        trainer = make_trainer(student, teacher, train_dataset=rows, per_device_train_batch_size=4, **kwargs)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(logs) == 2
        components = [name for name in logs[0] if name.endswith("_loss")]
        assert all(torch.tensor(entry[name]).isfinite() for entry in logs for name in components)
        moved = [not torch.equal(value, before[name]) for name, value in student.named_parameters()]
        return logs, sum(moved) / len(moved)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_two_steps_with_no_layer_named(segment, name, role):
    """Logits, too, whose sizes differ from family to family."""
    model, size = build(name)
    other, _ = build("UperNet" if name == "SegFormer" else "SegFormer", seed=1)
    student, teacher = (model, other) if role == "student" else (other, model)
    logs, moved = segment(student, teacher, size, method="ie-ft+kd")
    assert all(entry[name] > 0 for entry in logs for name in ("task_loss", "inheritance_loss", "kd_loss"))
    assert moved > 0.7


@pytest.mark.parametrize("teacher", ["classifier", "headless"])
def test_other_models_teach_a_segmenter(segment, teacher):
    config = t.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=64, num_labels=3
    )
    model = make_resnet(16, num_labels=5) if teacher == "classifier" else t.Dinov2Model(config)
    student, _ = build("SegFormer")
    logs, moved = segment(student, model)
    assert moved > 0.7 and all(entry["exploration_loss"] < 0 for entry in logs)


# ---- Segmenters by queries, and depth ----

QUERIES = {"num_labels": 3, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 2, "train_num_points": 50}
QUERIES |= {"hidden_dim": 32, "num_attention_heads": 2, "dim_feedforward": 16, "encoder_feedforward_dim": 16}


def mask2former() -> t.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"feature_size": 32, "mask_feature_size": 32}
    return t.Mask2FormerForUniversalSegmentation(t.Mask2FormerConfig(backbone_config=resnet(), **QUERIES, **sizes))


def maskformer() -> t.PreTrainedModel:
    torch.manual_seed(0)
    decoder = t.DetrConfig(d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5, decoder_attention_heads=2)
    config = t.MaskFormerConfig(
        backbone_config=resnet(), decoder_config=decoder, fpn_feature_size=32, mask_feature_size=32, num_labels=3
    )
    return t.MaskFormerForInstanceSegmentation(config)


def oneformer() -> t.PreTrainedModel:
    torch.manual_seed(0)
    text = {"width": 64, "context_length": 7, "num_layers": 1, "vocab_size": 64, "n_ctx": 2}
    sizes = {**QUERIES, "hidden_dim": 64, "conv_dim": 64, "mask_dim": 64}
    sizes |= {"query_dec_layers": 1, "task_seq_len": 7, "is_training": True}
    sizes |= {f"text_encoder_{name}": value for name, value in text.items()}
    return t.OneFormerForUniversalSegmentation(t.OneFormerConfig(backbone_config=resnet(), **sizes))


BY_QUERIES = {"Mask2Former": mask2former, "MaskFormer": maskformer, "OneFormer": oneformer}


def make_segments(count: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(3, 64, 64, generator=generator),
            "mask_labels": torch.randint(0, 2, (2, 64, 64), generator=generator).float(),
            "class_labels": torch.tensor([0, 2]),
        }
        for _ in range(count)
    ]


def collate_segments(rows: list[dict]) -> dict:
    lists = ("mask_labels", "class_labels")
    return {k: [r[k] for r in rows] if k in lists else torch.stack([r[k] for r in rows]) for k in rows[0]}


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_QUERIES)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_segmenters_by_queries(segment, name, role):
    """OneFormer is given its task with each image, also where it teaches."""
    rows = make_segments()
    student = mask2former() if role == "teacher" else BY_QUERIES[name]()
    if name == "OneFormer":
        student = oneformer()
        rows = [{**row, "task_inputs": torch.arange(7), "text_inputs": torch.ones(3, 7).long()} for row in rows]
    teacher = make_resnet(16, seed=3) if role == "student" else BY_QUERIES[name]()
    _, moved = segment(student, teacher, train_dataset=rows, data_collator=collate_segments, max_steps=2)
    assert moved > 0.5


def glpn() -> t.PreTrainedModel:
    torch.manual_seed(0)
    return t.GLPNForDepthEstimation(t.GLPNConfig(**FOUR, decoder_hidden_size=16))


def dpt_of_depth() -> t.PreTrainedModel:
    torch.manual_seed(0)
    return t.DPTForDepthEstimation(t.DPTConfig(**{**DPT, "image_size": 64}))


def depth_anything() -> t.PreTrainedModel:
    torch.manual_seed(0)
    stages = [f"stage{i}" for i in range(1, 5)]
    body = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8, "image_size": 64}
    backbone = t.Dinov2Config(**body, out_features=stages, reshape_hidden_states=False)
    sizes = {"reassemble_hidden_size": 16, "neck_hidden_sizes": [8, 8, 16, 16]}
    sizes |= {"fusion_hidden_size": 8, "head_hidden_size": 8}
    return t.DepthAnythingForDepthEstimation(t.DepthAnythingConfig(backbone_config=backbone, patch_size=8, **sizes))


OF_DEPTH = {"Depth Anything": depth_anything, "DPT": dpt_of_depth, "GLPN": glpn}


def make_depths(count: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    pixels, depths = torch.randn(count, 3, 64, 64, generator=generator), torch.rand(count, 64, 64, generator=generator)
    return [{"pixel_values": x, "labels": 0.1 + 5 * depth} for x, depth in zip(pixels, depths, strict=True)]


def mean_error(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    depth = torch.nn.functional.interpolate(outputs["predicted_depth"][:, None], size=labels.shape[1:])
    return (depth[:, 0] - labels).abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_DEPTH)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_depth_estimators(segment, name, role):
    """Transformers computes GLPN's loss alone; the others bring their own."""
    model = OF_DEPTH[name]()
    student, teacher = (model, make_resnet(16, seed=3)) if role == "student" else (glpn(), model)
    own = {} if name == "GLPN" or role == "teacher" else {"compute_loss_func": mean_error}
    logs, moved = segment(student, teacher, train_dataset=make_depths(), **own)
    assert moved > 0.7 and logs[0]["task_loss"] > 0


# ---- Peers ----


@pytest.mark.parametrize("mutual_loss", ["ie", "ie+kl"])
def test_two_segmenters_teach_each_other(make_mutual, mutual_loss):
    """Their logits have a quarter of the image's size, and its whole size."""
    peers = [build("SegFormer")[0], build("UperNet")[0]]
    trainer = make_mutual(peers, mutual_loss=mutual_loss, train_dataset=make_masked())
    before = [[parameter.clone() for parameter in peer.parameters()] for peer in peers]
    trainer.train()
    logs = trainer.state.log_history[0]
    names = ["task_loss", "inheritance_loss", *(["kl_loss"] if "kl" in mutual_loss else [])]
    assert all(logs[f"peer_{i}/{name}"] > 0 for i in (1, 2) for name in names), logs
    for peer, old in zip(peers, before, strict=True):
        moved = [not torch.equal(p, q) for p, q in zip(peer.parameters(), old, strict=True)]
        assert sum(moved) > 0.7 * len(moved)


# ---- Pixels without a class ----


def test_logits_of_two_sizes_are_compared_on_the_students_grid():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 2, 2, generator=generator)
    resized = torch.nn.functional.interpolate(teacher, size=(4, 4), mode="bilinear")
    torch.testing.assert_close(logit_loss(student, teacher, 4.0), kd_loss(student, resized))
    # A constant stays one when it is made smaller, too.
    torch.testing.assert_close(
        logit_loss(student, torch.full((2, 3, 8, 8), 5.0), 4.0), kd_loss(student, torch.zeros(2, 3, 4, 4))
    )


def test_the_label_that_a_family_ignores_is_known():
    for name in FAMILIES:
        assert ignore_index_of(build(name)[0]) == 255
    assert ignore_index_of(make_resnet()) == -100


@pytest.mark.parametrize("name", ["SegFormer", "UperNet"])
def test_images_without_a_class_leave_the_tasks_loss_out(segment, name):
    """Not NaN, and logits still teach; an image of them beside others does not count."""
    rows = [{**row, "labels": torch.full_like(row["labels"], 255)} for row in make_masked()]
    logs, _ = segment(build(name)[0], build("SegFormer", seed=1)[0], train_dataset=rows, method="ie-ft+kd")
    assert all(entry["task_loss"] == 0 and entry["kd_loss"] > 0 for entry in logs)


# ---- What is refused ----


@pytest.mark.parametrize(
    "student, teacher, rows, words",
    [
        (mask2former, resnet, make_segments, r"no lambda_kd > 0 with a segmenter by queries, got it with Mask2Former"),
        (glpn, resnet, make_depths, r"with a depth estimator, got it with GLPN\w+: depth is a number, not a class"),
        ("SegFormer", maskformer, make_masked, r"with a segmenter by queries, got it with MaskFormer"),
        ("SegFormer", depth_anything, make_masked, r"with a depth estimator, got it with DepthAnything"),
        (
            "SegFormer",
            resnet,
            make_masked,
            r"of one kind .* got \(1, 3, 16, 16\) of the student and \(1, 3\) of",
        ),
        ("SegFormer", lambda: build("UperNet", 5)[0], make_masked, r"got 3 and 5 labels, which differ first at 3"),
    ],
)
def test_logits_that_cannot_be_compared(make_trainer, student, teacher, rows, words):
    student = build(student)[0] if isinstance(student, str) else student()
    teacher = make_resnet(16, seed=3) if teacher is resnet else teacher()
    with pytest.raises(ValueError, match=words):
        make_trainer(student, teacher, method="kd", train_dataset=rows(), data_collator=collate_segments)


@pytest.mark.parametrize("name", ["SegFormer", "UperNet"])
def test_masks_that_do_not_fit(make_trainer, make_mutual, name):
    small = [{**row, "labels": row["labels"][::2, ::2]} for row in make_masked()]
    other = make_masked()
    other[3]["labels"][9, 9] = 7
    for rows, words in (
        (small, r"labels \(1, 64, 64\), one for each pixel of pixel_values, got \(1, 32, 32\) in row 0 of train_data"),
        (other, r"from 0 to 2, the model's 3 classes, or 255, .* got 7 in row 3 of train_dataset"),
    ):
        with pytest.raises(ValueError, match=words):
            make_trainer(build(name)[0], train_dataset=rows)
        with pytest.raises(ValueError, match=words):
            make_mutual([build(name)[0], build(name)[0]], train_dataset=rows)
    with pytest.raises(ValueError, match=r"one for each pixel of pixel_values, got \(1, 32, 32\):"):
        make_trainer(build(name)[0], train_dataset=datasets.Dataset.from_list(small).with_format("torch"))


def test_a_task_that_is_not_trained_for(make_trainer):
    for model in (dpt_of_depth(), depth_anything()):
        with pytest.raises(ValueError, match=rf"got {type(model).__name__}, whose .*pass compute_loss_func"):
            make_trainer(model, train_dataset=make_depths())


def test_the_guide_lists_them():
    guide = (Path(__file__).parent.parent / "docs" / "guide" / "segmentation.md").read_text()
    starts = {"Segmenters whose": FAMILIES, "Segmenters by queries": BY_QUERIES, "Depth estimators": OF_DEPTH}
    for start, names in starts.items():
        listed = re.search(rf"^{start}.*?:\n\n(.+?)\n\n", guide, flags=re.DOTALL | re.MULTILINE)[1]
        assert {name.strip(" .\n") for name in listed.replace("\n", " ").split(",")} == set(names)
