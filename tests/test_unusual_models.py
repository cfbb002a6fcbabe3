"""Models that are built otherwise than most: several towers, queries, windows, hybrids, another main input."""

import pytest
import torch
import transformers as t
from conftest import make_images, make_resnet, make_vit
from test_architectures import FOUR, STAGES, TOWERS, VIT
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config
from transformers.models.rf_detr.modeling_rf_detr import RfDetrDinov2Backbone

from iekd_hf import list_layers
from iekd_hf.features.layers import default_layers
from iekd_hf.features.maps import count_extra_tokens, to_map
from iekd_hf.features.tap import FeatureTap
from iekd_hf.models.loading import load_model


def test_class_tokens_of_several_towers_are_not_added_up():
    """FLAVA's image tower and its multimodal one have a class token each, of which the map of images loses one."""
    multimodal = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    towers = {"image_config": VIT, "text_config": TOWERS["text_config"], "multimodal_config": multimodal}
    model = t.FlavaModel(t.FlavaConfig(hidden_size=16, projection_dim=16, **towers))
    assert count_extra_tokens(model) == (1, 0)
    assert FeatureTap(model).probe({"pixel_values": torch.randn(1, 3, 32, 32)})[1] == [(16, 4, 4)]


def test_class_tokens_of_pefts_copies_are_not_added_up():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier", "embeddings"])
    model = peft.get_peft_model(make_vit(), config)
    assert count_extra_tokens(model) == (1, 0)


@pytest.mark.parametrize(
    "num_tokens, size, grid",
    [
        (72, (64, 64), None),  # 8 queries, or class tokens, in front of 8x8 patches
        (65, (64, 128), None),  # 64 patches of 16x8 pixels and a class token: no square patches
        (12, (64, 64), None),  # a square image has as many rows as columns
        (81, (65, 65), (9, 9)),  # patches of 8, those at the edge cut off
        (72, (65, 60), (9, 8)),
        (49, (63, 63), (7, 7)),
    ],
)
def test_only_square_patches_make_a_grid(num_tokens, size, grid):
    feature = torch.randn(1, num_tokens, 4)
    if grid is None:
        with pytest.raises(
            ValueError, match=rf"or the patches .* of a {size[0]}x{size[1]} image, got \(1, {num_tokens}"
        ):
            to_map(feature, size, (0, 0), "layer")
    else:
        assert to_map(feature, size, (0, 0), "layer").shape == (1, 4, *grid)


def test_queries_among_the_patches_are_no_map(capsys):
    """EoMT runs its queries through its last layers together with the patches: those layers are not listed."""
    config = t.EomtConfig(num_queries=8, num_upscale_blocks=1, num_blocks=1, num_labels=3, **VIT)
    layers = list_layers(t.EomtForUniversalSegmentation(config), image_size=32)
    capsys.readouterr()
    assert "layernorm" not in layers and layers["layers.0"] == (16, 4, 4)


def make_windowed():
    torch.manual_seed(0)
    return RfDetrDinov2Backbone(RfDetrDinov2Config(num_windows=2, window_block_indices=[0], **VIT))


def test_a_layer_of_windows_is_no_map(make_trainer, tmp_path, capsys):
    assert "encoder.layer.0" not in list_layers(make_windowed(), image_size=32)
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"'encoder.layer.0' of .* a map of each image, got 4 for 1, such as windows"):
        make_trainer(teacher_model=make_windowed(), teacher_layers=["encoder.layer.0"], student_layers=["resnet"])
    assert not any((tmp_path / "out").iterdir())


def test_a_hybrids_convolutions_are_not_its_last_map():
    stem = t.BitConfig(
        embedding_size=8,
        num_groups=2,
        hidden_sizes=[8, 8, 16],
        depths=[1, 1, 1],
        layer_type="bottleneck",
        global_padding="same",
        embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"],
    )
    config = t.DPTConfig(
        **VIT | {"num_hidden_layers": 4, "patch_size": 16, "image_size": 64},
        is_hybrid=True,
        backbone_config=stem,
        backbone_featmap_shape=[1, 16, 4, 4],
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
    )
    assert default_layers(t.DPTForDepthEstimation(config)) == ["dpt"]
    assert default_layers(t.DPTModel(config)) == ["last_hidden_state"]


def make_sam2_config(config_class):
    backbone = t.Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        window_size_per_stage=[8, 4, 4, 4],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[2, 2],
        query_stride=[2, 2],
        patch_kernel_size=[7, 7],
        patch_stride=[4, 4],
        patch_padding=[3, 3],
    )
    vision = t.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=16,
    )
    decoder = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 16, "iou_head_hidden_dim": 16}
    prompts = {"hidden_size": 16, "image_size": 64, "patch_size": 16}
    return config_class(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)


def test_sam_2(tmp_path, capsys):
    """Published checkpoints name the class for videos; its weights are those of the one for images, and more."""
    model = t.Sam2Model(make_sam2_config(t.Sam2Config))
    assert list_layers(model, image_size=64)
    capsys.readouterr()
    model.save_pretrained(tmp_path)
    config = t.Sam2Config.from_pretrained(tmp_path)
    config.architectures = ["Sam2VideoModel"]
    config.save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path), "teacher_model")) is t.Sam2Model


def test_a_tower_whose_main_input_is_a_text(make_trainer, tmp_path):
    torch.manual_seed(0)
    student = Idefics3VisionTransformer(Idefics3VisionConfig(**VIT))
    before = student.encoder.layers[0].mlp.fc1.weight.clone()
    images = [{"pixel_values": image["pixel_values"]} for image in make_images()]
    trainer = make_trainer(student, train_dataset=images, eval_dataset=images)
    trainer.train()
    assert trainer.evaluate()["eval_inheritance_loss"] > 0
    assert not torch.equal(student.encoder.layers[0].mlp.fc1.weight, before)
    trainer.save_model()
    assert Idefics3VisionTransformer.from_pretrained(tmp_path / "out").num_parameters() == student.num_parameters()


def test_a_student_whose_forward_takes_no_labels(make_trainer, tmp_path):
    """With labels nothing would train its head; it can learn from its teacher alone."""
    student = t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(num_labels=3, **VIT))
    with pytest.raises(
        ValueError, match=r"takes the labels of train_dataset, got DeiTFor.*WithTeacher, whose forward"
    ):
        make_trainer(student)
    assert not (tmp_path / "out").exists()
    images = [{"pixel_values": image["pixel_values"]} for image in make_images()]
    assert make_trainer(student, train_dataset=images, method="ie-ft+kd").train().global_step == 2


def test_activation_checkpointing_where_there_is_none(make_trainer, tmp_path):
    student = t.ConvNextForImageClassification(t.ConvNextConfig(num_stages=2, num_labels=3, **STAGES))
    with pytest.raises(
        ValueError, match=r"gradient_checkpointing=True, got ConvNextForImageClassification, which has"
    ):
        make_trainer(student, gradient_checkpointing=True)
    assert not (tmp_path / "out").exists()


def test_a_student_that_returns_a_tuple(make_trainer, tmp_path):
    with pytest.raises(ValueError, match=r"to return a ModelOutput or a dictionary .* got a tuple: load it with"):
        make_trainer(make_resnet(8, return_dict=False))
    assert not any((tmp_path / "out").iterdir())


def test_own_outputs_are_those_of_models_without_a_head(make_trainer):
    """The first output of a segmenter is its scores, whatever name one gives them."""
    backbone = t.ConvNextConfig(num_stages=4, out_features=["stage1", "stage2", "stage3", "stage4"], **FOUR)
    config = t.UperNetConfig(
        backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], use_auxiliary_head=False, num_labels=3
    )
    teacher = t.UperNetForSemanticSegmentation(config)
    with pytest.raises(ValueError, match="a layer of UperNetForSemanticSegmentation, got 'last_hidden_state'"):
        make_trainer(teacher_model=teacher, teacher_layers=["last_hidden_state"], student_layers=["resnet"])
